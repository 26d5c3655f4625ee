"""The diffs in docs/variants apply to the trainers as they are, and do what they say."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from common.run.inputs import ROOT
from common.sampling.rollout import Rollout
from common.tasks.task import Verdict


def applied(name: str, trainer: str, folder: Path):
    """Import a trainer with a variant."""
    shutil.copy(ROOT / f"{trainer}.py", folder)
    diff = ROOT / "docs" / "variants" / f"{name}.diff"
    done = subprocess.run(["git", "apply", str(diff)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location(name, folder / f"{trainer}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_variant_is_on_the_page():
    page = (ROOT / "docs" / "variants" / "README.md").read_text()
    for path in (ROOT / "docs" / "variants").glob("*.diff"):
        assert f"[{path.name}]({path.name})" in page


@pytest.mark.parametrize(("length", "penalty"), [(1, 0), (6, 0), (7, 0.25), (9, 0.75), (10, 1)])
def test_soft_overlong_penalty(tmp_path, length, penalty):
    """DAPO (arXiv 2503.14476), equation 13: 0 up to L_max - L_cache, then linear, -1 at L_max."""
    grpo = applied("dapo_overlong", "grpo", tmp_path)
    rollout = Rollout([1], [2] * length, None, "eos", "", verdict=Verdict("correct", 1.0))
    assert grpo.reward(rollout, grpo.Args(max_new_tokens=10)) == 1
    args = grpo.Args(max_new_tokens=10, overlong_buffer=4)
    assert grpo.reward(rollout, args) == pytest.approx(1 - penalty)
