"""docs/diff.md is what docs/diff.py makes of the trainers as they are."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAINERS = ("grpo.py", "opd.py", "fkl_warmup.py")
SCRIPT, REASONS = "docs/diff.py", "docs/diff_reasons.json"


@pytest.fixture
def copy(tmp_path) -> Path:
    """What the script reads, in a folder where it may be altered."""
    (tmp_path / "docs").mkdir()
    for name in ("README.md", *TRAINERS, SCRIPT, REASONS):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(folder: Path) -> tuple[int, str]:
    """Exit code and messages of the script."""
    command = [sys.executable, str(folder / SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_the_page_is_up_to_date(copy):
    assert run(copy) == (0, "")
    page, expected = ((folder / "docs/diff.md").read_text() for folder in (ROOT, copy))
    assert page == expected, "docs/diff.md is out of date: python docs/diff.py"


@pytest.mark.parametrize("name", TRAINERS)
def test_every_line_is_compared_but_what_to_know(name):
    text = (ROOT / name).read_text()
    before, _, rest = text.partition("What to know:")
    compared = before.rstrip() + rest[rest.index('\n"""\n') :]
    pieces = runpy.run_path(str(ROOT / SCRIPT))["pieces"](text)
    lines = [line for piece in pieces.values() for line in piece if line]
    assert lines == [line for line in compared.splitlines() if line]
