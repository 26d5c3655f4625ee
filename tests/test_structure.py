"""What makes the three trainers siblings, and what keeps the documentation true."""

import ast
import dataclasses
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
from common.run import ROOT

TRAINERS = [grpo, opd, fkl_warmup]
BANNER = re.compile(r"^ *# (?:===|---) (.+) (?:===|---)$", re.MULTILINE)
BANNERS = [
    *("arguments", "experiment", "model", "data", "rollouts", "optimisation", "algorithm"),
    *("score", "loss", "micro-batches", "gradients", "schedule", "main"),
    *("setup", "data", "model", "loop", "learning rate", "generate", "score", "update"),
    *("sync", "log", "evaluate and checkpoint"),
]
SHARED = [
    *("rollouts", "micro-batches", "schedule"),
    *("learning rate", "sync", "log", "evaluate and checkpoint"),
]
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
    assert [name for name, _ in sections(module)] == BANNERS


@pytest.mark.parametrize(("one", "other"), list(combinations(TRAINERS, 2)))
def test_shared_sections_are_identical_to_the_byte(one, other):
    pairs = zip(sections(one), sections(other), strict=True)
    for position, ((name, text), (_, other_text)) in enumerate(pairs):
        if name in SHARED:
            assert text == other_text, f"section {name} ({position}) differs"


@pytest.mark.parametrize(("one", "other"), list(combinations([*TRAINERS, evaluate], 2)))
def test_flags_of_one_name_mean_the_same(one, other):
    """Same type everywhere; same default and help among the trainers."""
    fields = [{field.name: field for field in dataclasses.fields(m.Args)} for m in (one, other)]
    for name in fields[0].keys() & fields[1].keys():
        a, b = fields[0][name], fields[1][name]
        assert a.type == b.type, name
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
    code = source(module) + "".join(p.read_text() for p in (ROOT / "common").glob("*.py"))
    code += (ROOT / "memory.py").read_text()
    code = code.replace("vars(args)", "")  # saving all of them is not reading one
    for field in dataclasses.fields(module.Args):
        assert help_of(module, field.name).strip(), field.name
        by_name = module is bridge and f'"{field.name}"' in code.replace(f'"--{field.name}"', "")
        read = re.search(rf"args\.{field.name}\b|getattr\(args, \"{field.name}\"", code)
        assert read or by_name, f"nothing reads --{field.name}"


def test_metrics_are_documented_once_and_all():
    """The README's table against the keys in the code; test_scripts.py checks what is logged."""
    rows = re.findall(r"^\| `([a-z]+/[a-z_]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == len(set(rows))
    code = "".join(source(m) for m in TRAINERS)
    code += "".join(
        (ROOT / "common" / f"{n}.py").read_text() for n in ("rollout", "logprob", "run")
    )
    prefixes = "rollout|loss|policy|optim|sync|time|eval"
    assert set(re.findall(rf'"((?:{prefixes})/[a-z_]+)"', code)) <= set(rows)


def test_common_stays_small():
    modules = [path for path in (ROOT / "common").glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= 10
    assert (ROOT / "common" / "__init__.py").read_text() == ""
    assert sum(code_lines(path.read_text()) for path in modules) <= 2600


def code_lines(text: str) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        line
        for node in ast.walk(tree)
        if isinstance(node, documented) and ast.get_docstring(node) is not None
        for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    lines = enumerate(text.splitlines(), 1)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in docstrings
        for number, line in lines
    )


def test_trainers_import_no_trainer():
    for module in TRAINERS:
        imported = set(re.findall(r"^(?:from|import) (\w+)", source(module), re.MULTILINE))
        assert not imported & {"grpo", "opd", "fkl_warmup", "bridge", "evaluate"}


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_is_clean(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
