"""The table of faults fits today's sources, and the tool tells a fault that is noticed from one that is not."""

import re
from pathlib import Path

import pytest
from sabotage import FAULTS, ROOT, Fault, main, sabotaged, selection

TABLE = [pytest.param(file, fault, id=f"{file}: {fault.name}") for file in FAULTS for fault in FAULTS[file]]


@pytest.mark.parametrize("file, fault", TABLE)
def test_every_fault_applies_and_its_tests_exist(file, fault):
    source = (ROOT / file).read_text(encoding="utf-8")
    assert sabotaged(source, fault) != source
    for test in selection(file, fault):
        path, _, name = test.partition("[")[0].partition("::")
        assert not name or re.search(rf"^def {re.escape(name)}\(", (ROOT / path).read_text(encoding="utf-8"), re.M), (
            test
        )


def test_names_are_unique():
    for file, faults in FAULTS.items():
        assert len({fault.name for fault in faults}) == len(faults), file


@pytest.fixture
def toy(tmp_path) -> Path:
    """A checkout with one file and its tests: one fast, one that hangs when the sum is wrong."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "toy.py").write_text("def double(x):\n    y = x + x\n    return y  # twice\n")
    (tmp_path / "tests" / "test_toy.py").write_text(
        "import time, toy\n\n"
        "def test_double():\n    assert toy.double(3) == 6\n\n"
        "def test_ends():\n    while toy.double(1) != 2: time.sleep(0.1)\n"
    )
    return tmp_path


def test_a_fault_is_noticed_and_a_harmless_one_reported(toy, capsys):
    table = {
        "toy.py": [
            Fault("wrong sum", "x + x", "x * x"),
            Fault("harmless", "# twice", "# two times", tests="test_double"),
            Fault("of yesterday", "x - x", "x"),
            Fault("in two places", "y", "z"),
            Fault("no Python", "return y", "return ("),
        ]
    }
    before = (toy / "toy.py").read_bytes()
    assert main(["--jobs", "2"], root=toy, faults=table) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("5 faults; without one, all is well: 2 passed")
    assert said[1].startswith("toy.py: wrong sum: noticed by tests/test_toy.py::test_double - assert 9 == 6")
    assert said[2].startswith("toy.py: harmless: NOT NOTICED (")
    assert said[3].endswith("DOES NOT APPLY: the fault no longer applies: its old text stands 0 times in the file")
    assert said[4].endswith("stands 2 times in the file")
    assert said[5].startswith("toy.py: no Python: DOES NOT APPLY: ")
    assert said[6] == "4 of 5 faults were not noticed"
    assert main(["toy", "-k", "sum"], root=toy, faults=table) == 0
    assert capsys.readouterr().out.endswith("all 1 faults were noticed\n")
    assert (toy / "toy.py").read_bytes() == before


def test_tests_without_end_and_tests_that_are_gone_notice_nothing(toy, capsys):
    endless = Fault("endless", "x + x", "x", tests="test_ends")
    assert main(["--limit", "2"], root=toy, faults={"toy.py": [endless]}) == 1
    assert "endless: NOT NOTICED, the tests did not run: no end within 2 s" in capsys.readouterr().out
    renamed = Fault("renamed", "x + x", "x", tests="test_gone")
    assert main([], root=toy, faults={"toy.py": [renamed]}) == 1
    assert "error: the tests fail without any fault: ERROR" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["nothing.py"], ["-k", "no such name"]])
def test_an_unknown_file_or_name_is_refused(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and "error: no fault" in capsys.readouterr().err


def test_the_list_names_the_tests(capsys):
    assert main(["realfake", "--list"]) == 0
    assert "realfake.py: min-SNR weight upside down: tests/test_realfake.py::test_golden_snr" in capsys.readouterr().out
