"""The scripts stand alone, so they repeat each other. Copies must stay copies: same name, same thing.

A function of the same name has the same body in every script (stages and main excepted: a stage is a function that
main calls), a flag of the same name the same type and help. And each script has --help, a line in README.md, a page in
docs/ and a launcher in shell/.
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALL = ("realfake", "synthetic_recognition", "gafi", "datadream", "distdiff")
SCRIPTS = [name for name in ALL if (ROOT / f"{name}.py").is_file()]
# Their help names what the script has.
OWN_WORDS = (
    "stages output_dir dataset seed gen_seed rows sd_model sd_batch sd_micro_batch gen_resolution gen_format "
    "gen_steps".split()
)


def functions_that_are_copies(source: str) -> dict[str, str]:
    """Top-level functions and classes of a script, without Args, main and its stages: name -> normalised code."""
    tree = ast.parse(source)
    top = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    stages = {"main", "Args"}
    if "main" in top:
        calls = [node.func for node in ast.walk(top["main"]) if isinstance(node, ast.Call)]
        stages |= {call.id for call in calls if isinstance(call, ast.Name)}
    return {name: ast.dump(node) for name, node in top.items() if name not in stages}


# Types that declare a range: what a script that does not use them calls int and float.
PLAIN = {"Count": "int", "Natural": "int", "Share": "float", "Positive": "float", "NonNegative": "float"}


def flags(source: str) -> dict[str, tuple[str, str]]:
    """The fields of Args: name -> (type, help)."""
    body = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Args").body
    found = {}
    for field, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            kind = ast.unparse(field.annotation)
            kind = re.sub(r"Annotated\[(\w+), .*?\)\]", r"\1", kind)
            found[field.target.id] = (
                re.sub(r"\w+", lambda word: PLAIN.get(word[0], word[0]), kind),
                " ".join(text.split()),
            )
    return found


def shared_flags(source: str) -> dict[str, tuple[str, str]]:
    """flags without what may differ: the help of OWN_WORDS, and the names of the stages."""
    found = {name: (kind, "" if name in OWN_WORDS else text) for name, (kind, text) in flags(source).items()}
    return found | {"stages": ("", "")}


def differing(per_script: dict[str, dict]) -> list[str]:
    """Names that two scripts define differently."""
    seen = defaultdict(dict)
    for script, definitions in per_script.items():
        for name, definition in definitions.items():
            seen[name].setdefault(definition, []).append(script)
    return [f"{name}: {' / '.join('+'.join(s) for s in v.values())}" for name, v in seen.items() if len(v) > 1]


def sources():
    return {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in SCRIPTS}


def test_there_is_a_script():
    assert SCRIPTS


def test_same_function_name_same_body():
    assert not differing({name: functions_that_are_copies(source) for name, source in sources().items()})


def test_same_flag_same_type_and_help():
    assert not differing({name: shared_flags(source) for name, source in sources().items()})


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help(script):
    assert not [name for name, (_, text) in flags(sources()[script]).items() if not text.strip()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_works_and_names_the_presets(script, launch):
    shown = launch(f"{script}.py", "--help").stdout
    for flag in ("--preset", "--dataset", "--seed", "--output-dir", "--stages", "--resume"):
        assert flag in shown, flag
    assert "digits" in shown


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_can_be_found(script):
    assert f"{script}.py" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / "docs" / f"{script}.md").is_file()
    launchers = sorted((ROOT / "shell").glob(f"{script}_*.sh"))
    assert launchers
    for launcher in launchers:
        text = launcher.read_text(encoding="utf-8")
        assert f"{script}.py" in text and '"$@"' in text, launcher.name
        preset = launcher.stem.removeprefix(f"{script}_")
        assert f"--preset {preset}" in text and f'"{preset}"' in sources()[script], launcher.name


def test_the_comparison_sees_differences():
    one = "def f(x):\n    'doc'\n    return x\n\ndef stage(): return 1\n\ndef main(): stage()\n"
    two = one.replace("return 1", "return 2").replace("return x", "# a comment is no difference\n    return x")
    assert not differing({"one": functions_that_are_copies(one), "two": functions_that_are_copies(two)})
    other = two.replace("return x", "return -x")
    assert differing({"one": functions_that_are_copies(one), "two": functions_that_are_copies(other)}) == [
        "f: one / two"
    ]
    args = "class Args:\n    seed: int = 0\n    'seed of all'\n"
    assert flags(args) == {"seed": ("int", "seed of all")}
    assert not differing({"one": flags(args), "two": flags(args.replace("= 0", "= 7"))})  # a default may differ
    assert differing({"one": flags(args), "two": flags(args.replace("int", "str"))})
    assert differing({"one": flags(args), "two": flags(args.replace("of all", ""))})
    assert not differing({"one": shared_flags(args), "two": shared_flags(args.replace("of all", ""))})
    assert differing({"one": shared_flags(args), "two": shared_flags(args.replace("int", "str"))})
