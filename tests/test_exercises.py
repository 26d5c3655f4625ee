"""docs/exercises.md keeps its word: the tests it names pass as the code stands, and fail with what
is emptied and with each of its wrong answers."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.run.inputs import ROOT
from workflow.processes import start_forked

SCRIPT = runpy.run_path(str(ROOT / "docs" / "exercise.py"))
PAGE = (ROOT / "docs" / "exercises.md").read_text()
SOURCES = ("common", "tests", "toy", "workflow", "pyproject.toml", "evaluate.py")
SOURCES += ("grpo.py", "opd.py", "fkl_warmup.py")


@dataclass
class Exercise:
    title: str
    function: str
    file: str
    command: list[str]  # pytest's words
    wrong: list[tuple[str, str]]  # lines of the function, and what stands in their place


def exercise_of(section: str) -> Exercise:
    title, _, text = section.partition("\n")
    function, file = re.search(r"^\[`(\w+)`\]\(\.\./(\S+\.py)#L\d+\)", text, re.MULTILINE).groups()
    (line,) = re.findall(r"^pytest (.+)$", text, re.MULTILINE)
    command = [word.strip('"') for word in re.findall(r'"[^"]+"|\S+', line)]
    wrong = []
    for block in re.findall(r"^```diff\n(.+?)^```$", text, re.MULTILINE | re.DOTALL):
        lines = block.splitlines()
        old, new = ("\n".join(row[1:] for row in lines if row[0] == sign) for sign in "-+")
        wrong.append((old, new))
    return Exercise(title, function, file, command, wrong)


EXERCISES = [exercise_of(section) for section in re.split(r"^## \d+\. ", PAGE, flags=re.M)[1:]]


def source_of(exercise: Exercise) -> tuple[str, str, str]:
    return SCRIPT["parts"]((ROOT / exercise.file).read_text(), exercise.function)


@pytest.fixture
def copy(tmp_path) -> Path:
    """The tree, in a folder where it may be altered."""
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    return tmp_path


def run_pytest(folder: Path, words: list[str]) -> None:
    """In a child that has imported torch, transformers and this tree: forget this tree, and run
    pytest on its copy."""
    for path in (ROOT, folder, folder / "tests"):
        own = {item.stem for item in path.iterdir()}
        for name in [name for name in sys.modules if name.partition(".")[0] in own]:
            del sys.modules[name]
    sys.path[:] = [str(folder), *(p for p in sys.path if p not in (str(ROOT), str(ROOT / "tests")))]
    os.chdir(folder)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.exit(pytest.main(["-qx", "-p", "no:cacheprovider", *words]))


def outcome(folder: Path, words: list[str]) -> int:
    """pytest's exit code: 0 all passed, 1 some failed, others if nothing was run."""
    process = start_forked(run_pytest, folder, words)
    process.join()
    return process.exitcode


def answer(folder: Path, exercise: Exercise, body: str) -> int:
    before, _, after = source_of(exercise)
    (folder / exercise.file).write_text(before + body + after)
    return outcome(folder, exercise.command)


def test_a_wrong_answer_is_made_of_lines_of_the_function():
    assert len(EXERCISES) >= 8
    for exercise in EXERCISES:
        _, body, _ = source_of(exercise)
        assert exercise.wrong, f"{exercise.title} names no wrong answer"
        for old, new in exercise.wrong:
            assert body.count(f"{old}\n") == 1, f"{exercise.title}: not in the function: {old}"
            assert new.strip()


def test_an_exercise_is_begun_and_solved_beside_others(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("grpo.py", "docs/exercise.py", "docs/exercises.md"):
        shutil.copy(ROOT / name, tmp_path / name)

    def script(*words: str) -> int:
        command = [sys.executable, str(tmp_path / "docs" / "exercise.py"), *words]
        return subprocess.run(command, capture_output=True).returncode

    file = tmp_path / "grpo.py"
    texts = [file.read_text()]
    for words in (["4"], ["5"], ["3"], ["4", "--solve"], ["3", "--solve"], ["5", "--solve"]):
        assert script(*words) == 0
        texts.append(file.read_text())
        assert compile(texts[-1], "grpo.py", "exec")
    emptied = [text.count("raise NotImplementedError") for text in texts]
    assert emptied == [0, 1, 2, 3, 2, 1, 0]
    assert texts[6] == texts[0]
    assert [script("2"), script("2"), script("3", "--solve"), script("99")] == [0, 1, 1, 1]
    file.write_text(file.read_text().replace("raise NotImplementedError", "x = ("))
    assert script("3") == 1  # what is no Python cannot be taken apart
    assert script("2", "--solve") == 0  # but put right
    assert file.read_text() == texts[0]


@pytest.mark.slow
def test_the_code_as_it_stands_passes(copy):
    files = {word for exercise in EXERCISES for word in exercise.command if word.endswith(".py")}
    names = " or ".join(f"({exercise.command[-1]})" for exercise in EXERCISES)
    assert outcome(copy, [*files, "-k", names]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, len(EXERCISES) + 1))
def test_what_is_emptied_fails(number, copy):
    exercise = EXERCISES[number - 1]
    shutil.copytree(ROOT / "docs", copy / "docs", ignore=shutil.ignore_patterns("study", "*.png"))
    script = [sys.executable, str(copy / "docs" / "exercise.py"), str(number)]
    assert subprocess.run(script, capture_output=True).returncode == 0
    emptied = (copy / exercise.file).read_text()
    assert emptied.count("raise NotImplementedError") == 1
    assert outcome(copy, exercise.command) == 1
    assert subprocess.run([*script, "--solve"], capture_output=True).returncode == 0
    assert (copy / exercise.file).read_text() == (ROOT / exercise.file).read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exercise", "number"),
    [(exercise, number) for exercise in EXERCISES for number in range(len(exercise.wrong))],
    ids=lambda value: getattr(value, "title", value),
)
def test_a_wrong_answer_fails(exercise, number, copy):
    _, body, _ = source_of(exercise)
    old, new = exercise.wrong[number]
    assert answer(copy, exercise, body.replace(f"{old}\n", f"{new}\n")) == 1
