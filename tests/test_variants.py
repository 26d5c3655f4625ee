"""The diffs in docs/variants apply to the trainers as they are, and do what they say."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import opd as plain_opd
from common.model.load import load_for_training
from common.run.inputs import ROOT
from common.sampling.rollout import Rollout
from common.tasks.data import Prompt
from common.tasks.task import Problem, Verdict

SMALL = {"prompts_per_step": 4, "group_size": 2, "max_new_tokens": 12, "num_steps": 3}
CPU = torch.device("cpu")


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
    page = (ROOT / "docs" / "variants.md").read_text()
    for path in (ROOT / "docs" / "variants").glob("*.diff"):
        changed = re.findall(r"^[+-](?![+-]{2} )", path.read_text(), re.MULTILINE)
        row = re.escape(f"| [{path.name}](variants/{path.name}) |") + rf".*\| {len(changed)} \|$"
        assert re.search(row, page, re.MULTILINE), (path.name, len(changed))


@pytest.mark.parametrize(("length", "penalty"), [(1, 0), (6, 0), (7, 0.25), (9, 0.75), (10, 1)])
def test_soft_overlong_penalty(tmp_path, length, penalty):
    """DAPO (arXiv 2503.14476), equation 13: 0 up to L_max - L_cache, then linear, -1 at L_max."""
    grpo = applied("dapo_overlong", "grpo", tmp_path)
    rollout = Rollout([1], [2] * length, None, "eos", "", verdict=Verdict("correct", 1.0))
    assert grpo.reward(rollout, grpo.Args(max_new_tokens=10)) == 1
    args = grpo.Args(max_new_tokens=10, overlong_buffer=4)
    assert grpo.reward(rollout, args) == pytest.approx(1 - penalty)


@pytest.mark.parametrize(
    ("name", "flags"),
    [("shift_target", {"teacher_base": "toy/student"}), ("self_distillation", {})],
)
def test_a_variant_trains(tmp_path, name, flags):
    variant = applied(name, "opd", tmp_path)
    variant.main(variant.Args(**SMALL, **flags, output_dir=str(tmp_path / "run")))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss/total"] for line in lines]
    assert len(losses) == 3
    assert all(loss > 0 for loss in losses)


def rollouts_of(*pairs) -> list[Rollout]:
    rows = [Rollout([1, *a, 2], [*b, 2], torch.zeros(len(b) + 1), "eos", "") for a, b in pairs]
    for number, row in enumerate(rows):
        row.key = (number,)
    return rows


ROLLOUTS = rollouts_of(([25, 26], [27, 28, 29]), ([30, 31, 32], [25]), ([33], [24, 24]))


@pytest.fixture(scope="module")
def models():
    """The toy's student and teacher, the student to be trained."""
    args = plain_opd.Args()
    student = load_for_training("toy/student", args, CPU, trainable=True)
    return student, load_for_training("toy/teacher", args, CPU, flops_role="teacher")


def loss_and_gradient(module, student, *frozen) -> tuple[float, torch.Tensor]:
    student.zero_grad()
    loss = module.backward(student, *frozen, ROLLOUTS, module.Args())["loss/total"]
    return loss, torch.cat([p.grad.flatten() for p in student.parameters()])


def test_a_shift_target_adds_what_reward_has_changed(tmp_path, models):
    """From itself the student learns nothing; from a base that is its own start, the teacher."""
    student, teacher = models
    shift = applied("shift_target", "opd", tmp_path)
    loss, gradient = loss_and_gradient(shift, student, (student, teacher, teacher))
    assert abs(loss) < 1e-6
    assert gradient.abs().max() < 1e-5
    loss, gradient = loss_and_gradient(shift, student, (student, teacher, student))
    expected_loss, expected = loss_and_gradient(plain_opd, student, teacher)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_teacher_that_is_told_the_answer(tmp_path, models, tokenizer):
    student, teacher = models
    variant = applied("self_distillation", "opd", tmp_path)
    problem = Problem("7+8", "15", messages=[{"role": "user", "content": "7+8"}])
    told = variant.told_prompt(tokenizer, Prompt(problem, [1]), variant.Args())
    assert "7+8\nThe answer is 15." in tokenizer.decode(told)

    same = {tuple(row.prompt_ids): row.prompt_ids for row in ROLLOUTS}
    loss, gradient = loss_and_gradient(variant, student, teacher, same)
    expected_loss, expected = loss_and_gradient(plain_opd, student, teacher)
    assert loss == pytest.approx(expected_loss)
    torch.testing.assert_close(gradient, expected)

    hints = {tuple(row.prompt_ids): [*told, *row.prompt_ids] for row in ROLLOUTS}
    loss, _ = loss_and_gradient(variant, student, teacher, hints)
    total = 0.0
    with torch.no_grad():
        for row in ROLLOUTS:
            own, hinted = (
                model(torch.tensor([prompt + row.completion_ids])).logits[0, len(prompt) - 1 : -1]
                for model, prompt in (
                    (student, row.prompt_ids),
                    (teacher, hints[tuple(row.prompt_ids)]),
                )
            )
            logp, logq = own.double().log_softmax(-1), hinted.double().log_softmax(-1)
            total += (logp.exp() * (logp - logq)).sum().item()
    assert loss == pytest.approx(total / sum(len(row.completion_ids) for row in ROLLOUTS), rel=1e-4)


def test_the_horizon_grows_to_its_full_length(tmp_path):
    variant = applied("progressive_horizon", "opd", tmp_path)
    flags = SMALL | {"max_new_tokens": 4, "first_horizon": 2, "horizon_growth": 1.5}
    variant.main(variant.Args(**flags, output_dir=str(tmp_path / "run")))
    longest = []
    for step in (1, 2, 3):
        rows = (tmp_path / "run" / "rollouts" / f"step_{step}.jsonl").read_text().splitlines()
        longest.append(max(len(json.loads(row)["completion_ids"]) for row in rows))
    assert longest == [2, 3, 4]
