"""Whole steps of each trainer, in this process: against a plain loop over the rollouts that it
saved, and what decides what it learns from.
"""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fkl_warmup
import grpo
import opd
from common.model.load import load_model
from common.run.errors import RunFailure
from common.run.inputs import ROOT
from common.run.log import Log
from common.run.process import STOP, Stopped
from common.run.run import learning_rate_at
from common.sampling.sampler import Sampler, sample_and_verify
from common.sampling.torch_engine import TorchEngine
from common.tasks.data import evaluation_prompts
from common.tasks.rows import read_file
from common.tasks.task import Verdict

TRAINERS = [grpo, opd, fkl_warmup]
SMALL = {"prompts_per_step": 4, "group_size": 4, "warmup_steps": 1, "checkpoint_every": 0}
UNMOVED = 1e-30  # a learning rate


def trained(module, folder: Path, **flags) -> Path:
    module.main(module.Args(**SMALL | flags, output_dir=str(folder)))
    return folder


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# === against a plain loop ===


def log_softmax(model, row: dict) -> torch.Tensor:
    """Log-probs [T, V] that predict a rollout's completion, by transformers' own forward."""
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    return model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)


def of_tokens(logp: torch.Tensor, row: dict) -> torch.Tensor:
    return logp.gather(1, torch.tensor(row["completion_ids"])[:, None]).squeeze(1)


def group_advantages(rows: list[dict], group_size: int) -> list[float]:
    advantages = []
    for first in range(0, len(rows), group_size):
        rewards = [row["reward"] for row in rows[first : first + group_size]]
        mean = sum(rewards) / group_size
        std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (group_size - 1))
        advantages += [(reward - mean) / (std + 1e-6) for reward in rewards]
    return advantages


def token_losses(args, model, row: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss [T] of each token, and what is logged of it, from the trainers' docstrings."""
    logp = log_softmax(model, row)
    entropy = -(logp.exp() * logp).sum(1)
    if isinstance(args, grpo.Args):
        ratio = (of_tokens(logp, row) - row["old"]).exp()
        clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
        gain = torch.minimum(ratio * row["advantage"], clipped * row["advantage"])
        log_ratio = row["frozen"] - of_tokens(logp, row)
        k3 = log_ratio.exp() - log_ratio - 1
        stopped = (gain != ratio * row["advantage"]).float()
        logged = {"kl_ref": k3, "clip_fraction": stopped, "entropy": entropy}
        return args.kl_coef * k3 - gain, logged
    logq = row["frozen"]
    reverse_kl = (logp.exp() * (logp - logq)).sum(1)
    forward_kl = (logq.exp() * (logq - logp)).sum(1)
    loss = forward_kl if isinstance(args, fkl_warmup.Args) else reverse_kl
    if getattr(args, "estimator", "full") == "sampled":
        sampled = of_tokens(logp, row)
        excess = (sampled - of_tokens(logq, row)).detach()
        loss = excess + excess * (sampled - sampled.detach())  # a value, and another's gradient
    gap = entropy + (logq.exp() * logq).sum(1)
    logged = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "entropy_gap": gap}
    return loss, logged | {"entropy": entropy}


def adamw(parameters, moments: list[list], number: int, rate: float, args) -> float:
    """The number-th update, after Loshchilov and Hutter (arXiv 1711.05101), of gradients that are
    scaled down to args.max_grad_norm; returns their norm before."""
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters))
    scale = min(1.0, args.max_grad_norm / (norm + 1e-6))
    for parameter, moment in zip(parameters, moments, strict=True):
        grad = scale * parameter.grad
        moment[0] = 0.9 * moment[0] + 0.1 * grad
        moment[1] = 0.95 * moment[1] + 0.05 * grad**2
        m, v = moment[0] / (1 - 0.9**number), moment[1] / (1 - 0.95**number)
        with torch.no_grad():
            parameter *= 1 - rate * args.weight_decay
            parameter -= rate * m / (v.sqrt() + 1e-8)
        parameter.grad = None
    return norm


def plain_run(args, folder: Path, rates: list[float]) -> tuple[dict, list[dict[str, float]]]:
    """The weights after a run, and its metrics, made again from its rollouts."""
    model, frozen = (
        AutoModelForCausalLM.from_pretrained(ROOT / name)
        for name in (args.model, getattr(args, "teacher", args.model))
    )
    parameters = list(model.parameters())
    moments, number, metrics = [[0.0, 0.0] for _ in parameters], 0, []
    for step, rate in enumerate(rates, 1):
        rows = read(folder / "rollouts" / f"step_{step}.jsonl")
        for row, advantage in zip(rows, group_advantages(rows, args.group_size), strict=True):
            with torch.no_grad():
                row["frozen"] = log_softmax(frozen, row)
                if isinstance(args, grpo.Args):
                    row["frozen"] = of_tokens(row["frozen"], row)
                    row["old"] = of_tokens(log_softmax(model, row), row)
                    row["advantage"] = advantage
        updates = []
        for epoch in range(args.num_epochs):
            order = random.Random(f"{args.seed}-{step}-{epoch}").sample(rows, len(rows))
            for first in range(args.num_minibatches):
                minibatch = order[first :: args.num_minibatches]
                part = [token_losses(args, model, row) for row in minibatch]
                loss = torch.cat([losses for losses, _ in part]).mean()
                loss.backward()
                number += 1
                norm = adamw(parameters, moments, number, rate, args)
                update = {"loss/total": loss.item(), "optim/grad_norm": norm}
                for name in part[0][1]:
                    values = torch.cat([logged[name] for _, logged in part])
                    update[f"policy/{name}"] = values.mean().item()
                updates.append(update)
        metrics.append({name: sum(u[name] for u in updates) / len(updates) for name in updates[0]})
    return dict(model.named_parameters()), metrics


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (grpo, {"num_minibatches": 2, "kl_coef": 0.05}),
        (grpo, {"num_epochs": 2, "clip_high": 0.28}),
        (opd, {"num_minibatches": 2}),
        (opd, {"estimator": "sampled"}),
        (fkl_warmup, {"num_epochs": 2}),
    ],
)
def test_a_run_is_a_plain_loop_over_its_rollouts(tmp_path, module, flags):
    """Three steps: advantages, old and reference log-probs, losses, clipping of the gradient,
    AdamW, the schedule. Only the rollouts are taken from the run."""
    flags = {"num_steps": 3, "lr_schedule": "linear", "weight_decay": 0.1, **flags}
    flags |= {"learning_rate": 3e-3, "max_grad_norm": 0.05}
    folder = trained(module, tmp_path / "run", **flags)
    args = module.Args(**SMALL | flags)
    expected, metrics = plain_run(args, folder, [3e-3, 3e-3, 1.5e-3])
    final = load_file(folder / "final" / "model.safetensors")
    before = load_file(ROOT / args.model / "model.safetensors")
    for name, weight in final.items():
        moved = (before[name] - expected[name]).norm()
        assert moved > 0, name
        assert (weight - expected[name]).norm() < 0.01 * moved, name
    logged = read(folder / "metrics.jsonl")
    for row, of_step in zip(logged, metrics, strict=True):
        for name, value in of_step.items():
            assert row[name] == pytest.approx(value, rel=2e-2, abs=1e-4), (row["step"], name)
    assert max(row["optim/grad_norm"] for row in logged) > 0.05  # so that clipping matters
    if module is grpo:
        assert any(row["policy/clip_fraction"] > 0 for row in logged)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", [1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5)]),
    ],
)
def test_the_learning_rate_of_each_step(schedule, rates):
    """The warmup's last step has the full rate, and so has the one after it; the rate would be 0
    one step after the last."""
    args = grpo.Args(learning_rate=2.0, lr_schedule=schedule, warmup_steps=4, num_steps=8)
    values = [learning_rate_at(step, args) for step in range(1, 9)]
    assert values == pytest.approx([0.5, 1.0, 1.5, 2.0, *(2.0 * rate for rate in rates)])
    args = grpo.Args(learning_rate=2.0, lr_schedule=schedule, warmup_steps=0, num_steps=4)
    values = [learning_rate_at(step, args) for step in range(1, 5)]
    assert values == pytest.approx([2.0 * rate for rate in rates])


# === what it learns from ===


@pytest.mark.parametrize("module", TRAINERS)
def test_what_is_evaluated_is_what_is_trained(tmp_path, task, tokenizer, module):
    """Never the teacher, whose answers to these 32 problems are others."""
    lines = (ROOT / "toy" / "test.jsonl").read_text().splitlines(True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:32]))
    flags = {"num_steps": 1, "eval_every": 1, "eval_dataset": str(tmp_path / "few.jsonl")}
    flags |= {"learning_rate": UNMOVED, "model": "toy/student"}
    (row,) = read(trained(module, tmp_path / "run", **flags) / "metrics.jsonl")
    args = module.Args(**SMALL | flags)
    prompts = evaluation_prompts(task, tokenizer, args)
    accuracy = []
    for name in ("toy/student", "toy/teacher"):
        engine = TorchEngine(load_model(name, "float32", torch.device("cpu")), tokenizer)
        sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
        rollouts = sample_and_verify(engine, task, prompts, 1, seed=(args.seed, 0), **sampling)
        accuracy.append(sum(rollout.verdict.correct for rollout in rollouts) / len(rollouts))
    assert row["eval/accuracy"] == accuracy[0] != accuracy[1]


@pytest.mark.parametrize("module", TRAINERS)
@pytest.mark.parametrize("skip", [False, True])
def test_a_gradient_that_is_not_finite_is_no_update(tmp_path, monkeypatch, module, skip):
    """Though the loss is finite."""
    monkeypatch.setattr(module, "clip_grad_norm", lambda model, limit: math.inf)
    flags = {"num_steps": 1, "skip_nonfinite": skip}
    if not skip:
        with pytest.raises(RunFailure, match="step 1: loss -?[0-9].*, gradient norm inf"):
            trained(module, tmp_path / "run", **flags)
        assert (tmp_path / "run" / "nonfinite_step_1.jsonl").exists()
        return
    folder = trained(module, tmp_path / "run", **flags)
    assert json.loads((folder / "manifest.json").read_text())["skipped_updates"] == 1
    before = load_file(ROOT / module.Args().model / "model.safetensors")
    final = load_file(folder / "final" / "model.safetensors")
    assert all(torch.equal(final[name], before[name]) for name in before)


@pytest.mark.parametrize("module", [opd, fkl_warmup])
def test_a_student_stops_where_its_teacher_does(tmp_path, module):
    """At an id that neither its own files nor the chat template name."""
    teacher = shutil.copytree(ROOT / "toy" / "teacher", tmp_path / "teacher")
    path = teacher / "generation_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    eos = json.loads((teacher / "config.json").read_text())["eos_token_id"]
    path.write_text(json.dumps(config | {"eos_token_id": [eos, 15]}))
    folder = trained(module, tmp_path / "run", num_steps=1, teacher=str(teacher))
    saved = json.loads((folder / "final" / "generation_config.json").read_text())
    assert 15 in saved["eos_token_id"]


def test_partly_right_completions_do_not_teach_where_right_ones_are_asked_for(
    tmp_path, monkeypatch
):
    code = "def prompt(row): return row['problem']\n"
    code += "def grade(completion, row): return 1.0 if len(completion) % 2 else 0.5\n"
    (tmp_path / "half.py").write_text(code)
    learnt = []

    def minibatches(rollouts, *passes):
        learnt.extend(rollouts)
        yield rollouts

    monkeypatch.setattr(fkl_warmup, "minibatches", minibatches)
    flags = {"task": str(tmp_path / "half.py"), "dataset": str(ROOT / "toy" / "train.jsonl")}
    folder = trained(fkl_warmup, tmp_path / "run", num_steps=1, correct_only=True, **flags)
    outcomes = [row["outcome"] for row in read(folder / "rollouts" / "step_1.jsonl")]
    assert {"correct", "partial"} == set(outcomes)
    assert {rollout.verdict.outcome for rollout in learnt} == {"correct"}
    assert len(learnt) == outcomes.count("correct")


class Groups:
    """A sampler whose draws have so many groups with different grades; the others agree."""

    def __init__(self, rollouts, mixed: list[int], group_size: int):
        self.rollouts, self.mixed, self.group_size, self.asked = rollouts, mixed, group_size, []

    def draw(self, num_prompts: int, seed: tuple[int, ...]) -> list:
        mixed = self.mixed[len(self.asked)]
        self.asked.append((num_prompts, seed))
        drawn = self.rollouts[: num_prompts * self.group_size]
        for n, rollout in enumerate(drawn):
            right = n % self.group_size == 0 and n // self.group_size < mixed
            rollout.verdict = Verdict("correct", 1.0) if right else Verdict("wrong")
        return list(drawn)


@pytest.mark.parametrize(
    ("mixed", "asked", "kept"),
    [
        ([4], [4], 4),
        ([1, 3], [4, 3], 4),
        ([1, 1, 0, 0], [4, 3, 2, 2], 2),  # the last draw is taken as it comes
        ([0, 0, 0, 0], [4, 4, 4, 4], 0),
    ],
)
def test_groups_that_agree_are_drawn_again_so_often_and_no_oftener(rollouts, mixed, asked, kept):
    args = grpo.Args(prompts_per_step=4, group_size=4, dynamic_sampling=True, max_refills=3)
    sampler = Groups(rollouts, mixed, 4)
    drawn, metrics = grpo.draw_groups(sampler, 7, args)
    assert sampler.asked == [(n, (args.seed, 7, i)) for i, n in enumerate(asked)]
    assert len(drawn) == 16
    assert metrics["rollout/refills"] == len(asked) - 1
    args.dynamic_sampling = False
    sampler = Groups(rollouts, mixed, 4)
    drawn, metrics = grpo.draw_groups(sampler, 7, args)
    assert (len(sampler.asked), metrics["rollout/refills"]) == (1, 0)
    assert metrics["rollout/mixed_groups"] == mixed[0] / 4


# === where it stops ===


def test_rollouts_of_old_steps_leave_the_disk(tmp_path):
    """A step's are 50 MB at the paper's size. The first and every 50th stay."""
    (tmp_path / "rollouts").mkdir()
    log = Log(tmp_path, 0, {}, track=False, keep_rollouts=3)
    metrics = {"rollout/truncated": 0.0, "rollout/no_answer": 0.0}
    metrics |= {"rollout/length": 9.0, "rollout/accuracy": 0.5}
    for step in range(1, 103):
        log.write(step, metrics, [{"completion": "é", "step": step}])
    log.close()
    kept = {path.name for path in (tmp_path / "rollouts").iterdir()}
    newest = {f"step_{step}.jsonl" for step in (1, 100, 101, 102)}
    assert kept == newest | {"step_50.jsonl.gz"}
    for name, step in (("step_50.jsonl.gz", 50), ("step_102.jsonl", 102)):
        assert list(read_file(tmp_path / "rollouts" / name)) == [{"completion": "é", "step": step}]


def test_a_gpus_memory_is_logged(tmp_path, monkeypatch):
    resets = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 31_400_000_000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7_000_000_000, 80_000_000_000))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(1))
    rows = read(trained(grpo, tmp_path / "run", num_steps=2) / "metrics.jsonl")
    found = [(row["memory/peak_gb"], row["memory/free_gb"]) for row in rows]
    assert (found, len(resets)) == ([(31.4, 7.0)] * 2, 2)


def test_a_failure_in_mid_update_saves_nothing(tmp_path, monkeypatch):
    """The model is no completed step's then."""
    step, calls = torch.optim.AdamW.step, []

    def interrupted(optimizer, *args):
        calls.append(1)
        if len(calls) == 4:
            raise RunFailure("the second update of the second step")
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(RunFailure):
        trained(grpo, tmp_path / "run", num_steps=3, num_minibatches=2)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert (tmp_path / "run" / "rollouts" / "step_1.jsonl").exists()


@pytest.mark.parametrize("module", TRAINERS)
def test_a_signal_while_a_step_samples_saves_the_step_before_as_it_was(
    tmp_path, monkeypatch, module
):
    """Its cursor and its counts too: the step under way has drawn its prompts already."""
    draw, calls = Sampler.draw, []

    def interrupted(sampler, *args):
        rollouts = draw(sampler, *args)
        calls.append(1)
        if len(calls) == 2:
            STOP.number = 15
        return rollouts

    monkeypatch.setattr(Sampler, "draw", interrupted)
    try:
        with pytest.raises(Stopped):
            trained(module, tmp_path / "run", num_steps=3)
    finally:
        STOP.number = None
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    progress = json.loads((checkpoint / "progress.json").read_text())
    lengths = [len(r["completion_ids"]) for r in read(tmp_path / "run/rollouts/step_1.jsonl")]
    expected = {"step": 1, "cursor": 4, "verifier_calls": 16, "generated_tokens": sum(lengths)}
    assert {name: progress[name] for name in expected} == expected
    trained(module, tmp_path / "run", num_steps=3)
    trained(module, tmp_path / "whole", num_steps=3)
    one, other = (tmp_path / name / "final" / "model.safetensors" for name in ("run", "whole"))
    assert one.read_bytes() == other.read_bytes()
