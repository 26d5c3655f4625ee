"""What makes the three trainers siblings, and what keeps the code small and clean."""

import ast
import dataclasses
import difflib
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

import bridge
import evaluate
import fkl_warmup
import grpo
import opd
from common.run.inputs import ROOT

TRAINERS = [grpo, opd, fkl_warmup]
BANNER = re.compile(r"^ *# (?:===|---) (.+) (?:===|---)$", re.MULTILINE)
BANNERS = [
    *("arguments", "experiment", "model", "data", "rollouts", "optimisation", "algorithm"),
    *("score", "loss", "gradients", "main"),
    *("setup", "data", "model", "loop", "generate", "score", "update", "sync, evaluate, log"),
]
SHARED = ("rollouts", "sync, evaluate, log")
# Defaults that name the algorithm or its usual model.
OWN_VALUE = {"output_dir", "model", "learning_rate"}


def source(module) -> str:
    return Path(module.__file__).read_text()


def sections(module) -> list[tuple[str, str]]:
    """(banner, text up to the next banner), in order."""
    text = source(module)
    marks = list(BANNER.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [(mark[1], text[mark.end() : end]) for mark, end in zip(marks, ends, strict=True)]


@pytest.mark.parametrize("module", TRAINERS)
def test_banners_are_the_same_in_the_same_order(module):
    """Only grpo.py scores a whole step before it updates."""
    own = [name for name in BANNERS if module is grpo or name != "score"]
    assert [name for name, _ in sections(module)] == own


@pytest.mark.parametrize(("one", "other"), list(combinations(TRAINERS, 2)))
def test_shared_sections_are_identical_to_the_byte(one, other):
    for name in SHARED:
        texts = {
            text for module in (one, other) for title, text in sections(module) if title == name
        }
        assert len(texts) == 1, f"section {name} differs"


def algorithm(module) -> list[str]:
    """The lines of a trainer without docstrings and Args."""
    text = source(module)
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if getattr(node, "name", "") == "Args":
            left_out |= set(range(node.lineno - 1, node.end_lineno + 1))
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node) is not None:
            left_out |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return [line for n, line in enumerate(text.splitlines(), 1) if n not in left_out]


@pytest.mark.parametrize(("one", "other"), list(combinations(TRAINERS, 2)))
def test_the_readme_counts_the_changed_lines(one, other):
    lines = difflib.unified_diff(algorithm(one), algorithm(other), n=0, lineterm="")
    changed = sum(line[0] in "+-" for line in lines) - 2  # the two names at the top
    row = f"| `diff {one.__name__}.py {other.__name__}.py` | {changed} |"
    assert row in (ROOT / "README.md").read_text(), row


@pytest.mark.parametrize(("one", "other"), list(combinations([*TRAINERS, evaluate], 2)))
def test_flags_of_one_name_mean_the_same(one, other):
    """Same type everywhere; same default and help among the trainers."""
    fields = [{field.name: field for field in dataclasses.fields(m.Args)} for m in (one, other)]
    for name in fields[0].keys() & fields[1].keys():
        a, b = fields[0][name], fields[1][name]
        types = [t.__origin__ if hasattr(t, "__metadata__") else t for t in (a.type, b.type)]
        assert types[0] == types[1], name
        if evaluate not in (one, other):
            assert a.type == b.type, name  # its range, and whether it may change, too
        if evaluate not in (one, other) and name not in OWN_VALUE:
            assert a.default == b.default, name
            assert help_of(one, name) == help_of(other, name), name


def help_of(module, name: str) -> str:
    body = next(n for n in ast.parse(source(module)).body if getattr(n, "name", "") == "Args").body
    at = next(
        i for i, node in enumerate(body) if getattr(node, "target", None) and node.target.id == name
    )
    return ast.literal_eval(body[at + 1].value)


@pytest.mark.parametrize("module", [*TRAINERS, evaluate, bridge])
def test_every_argument_is_documented_and_read(module):
    code = source(module) + "".join(p.read_text() for p in (ROOT / "common").rglob("*.py"))
    code += "".join(p.read_text() for p in (ROOT / "workflow").glob("*.py"))
    code = code.replace("vars(args)", "")  # saving all of them is not reading one
    for field in dataclasses.fields(module.Args):
        assert help_of(module, field.name).strip(), field.name
        by_name = module is bridge and f'"{field.name}"' in code.replace(f'"--{field.name}"', "")
        read = re.search(rf"args\.{field.name}\b|getattr\(args, \"{field.name}\"", code)
        assert read or by_name, f"nothing reads --{field.name}"


def imports_of(path: Path) -> set[str]:
    """Modules of the project that a file imports, anywhere in it: `grpo`, `common.tasks.data`"""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in PACKAGES:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found & ROOMS.keys()


SCRIPTS = ("grpo", "fkl_warmup", "opd", "evaluate", "bridge")
PACKAGES = ("common", *(f"common.{room}" for room in ("run", "model", "sampling", "tasks")))
PACKAGES += ("workflow",)
ROOMS = {name: ROOT / f"{name}.py" for name in SCRIPTS} | {
    f"{package}.{path.stem}": path
    for package in PACKAGES
    for path in (ROOT / package.replace(".", "/")).glob("*.py")
}


def test_imports_run_one_way():
    """Scripts -> workflow -> common, and within a package no room knows one that knows it."""
    known = {name: imports_of(path) for name, path in ROOMS.items()}
    for name, imported in known.items():
        above = {"common": ("workflow.", *SCRIPTS), "workflow": SCRIPTS}.get(name.split(".")[0], ())
        assert not [other for other in imported if other.startswith(above)], name
    assert not [name for name in TRAINERS if known[name.__name__] & {*SCRIPTS}]
    while known:
        ground = {name for name, imported in known.items() if not imported & known.keys()}
        assert ground, f"these import one another: {', '.join(sorted(known))}"
        known = {name: imported for name, imported in known.items() if name not in ground}


def test_the_top_level_holds_the_five_scripts():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS)


# A trainer has the whole of its algorithm, and its Args.
LONGER = {"grpo": 398, "opd": 357, "fkl_warmup": 314, "evaluate": 330, "common.tasks.math": 480}


@pytest.mark.parametrize("name", ROOMS)
def test_a_file_is_at_most_300_lines(name):
    assert len(ROOMS[name].read_text().splitlines()) <= LONGER.get(name, 300)


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_is_clean(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def opens_text(call: ast.Call) -> bool:
    """Whether it opens text and does not say in which encoding."""
    said = ast.unparse(call)
    kinds = r"(open|.*\.(read_text|write_text))\(|.*\btext=True"
    return bool(re.match(kinds, said, re.DOTALL)) and not re.search(r"utf-8|['\"][rwa]b['\"]", said)


def test_every_file_is_opened_as_utf_8():
    """Whatever the machine's locale is."""
    folders = ("common", "workflow", "toy", "examples", "benchmarks", "docs")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for path in (*ROOT.glob("*.py"), *paths):
        calls = [n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, ast.Call)]
        assert not [ast.unparse(call) for call in calls if opens_text(call)], path
