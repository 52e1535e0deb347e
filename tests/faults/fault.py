from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """Replace `old`, which stands exactly once in the file, by `new`; one of `tests` must then fail.

    tests: names of tests in the file's own test file, or other test files, with ::name or without, separated by blanks.
    "" means the whole of the file's own tests, which costs minutes where a name costs seconds.
    """

    name: str
    old: str
    new: str
    tests: str = ""
