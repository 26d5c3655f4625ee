r"""Seconds and memory of a training step beside TRL's, in alternation, each in its own process.

Same checkpoint, prompts, reward, P, G, lengths, micro-batch, float32, threads and optimizer; no KL
term, no gradient checkpointing on either side. GRPO against GRPOTrainer, OPD (reverse KL) against
DistillationTrainer, which has no groups: it gets every prompt G times.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.vs_trl --algorithm grpo                  # the toy, 16 x 16 x 64
    python -m benchmarks.vs_trl --algorithm opd --model RUN/fkl_warmup/final \
        --teacher RUN/teacher_grpo/final                          # RUN: runs/bridge-teacher/seed_0
    python -m benchmarks.vs_trl --algorithm grpo --case wide    # 151,936 words, 8 x 8 x 256
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common import data, sampler
from common.input_hashes import ROOT, model_path
from common.model import load_tokenizer
from common.start import start
from common.task import Task, Verdict


@dataclass(frozen=True)
class Case:
    prompts: int  # P
    group_size: int  # G
    max_new_tokens: int
    micro_batch_size: int
    chunk_size: int


CASES = {"toy": Case(16, 16, 64, 64, 2048), "wide": Case(8, 8, 256, 8, 256)}


@dataclass
class Args:
    algorithm: Literal["grpo", "opd"] = "grpo"
    """what is trained"""
    case: Literal["toy", "wide"] = "toy"
    """the toy models, or random weights with a vocabulary of 151,936"""
    model: str | None = None
    """the policy, instead of the raw toy teacher (grpo) or student (opd)"""
    teacher: str = "toy/teacher"
    """opd: the frozen teacher"""
    rounds: int = 3
    """how often the two sides alternate"""
    steps: int = 4
    """timed steps a round; one step before them is not timed"""
    side: Literal["both", "ours", "trl"] = "both"
    """both; the other two are for the child processes"""
    folder: Path | None = None
    """where the children put what they measure"""


def models(args: Args) -> tuple[str, str]:
    """Policy and teacher."""
    if args.case == "toy":
        raw = "toy/teacher" if args.algorithm == "grpo" else "toy/student"
        return model_path(args.model or raw), model_path(args.teacher)
    return str(args.folder / "model"), str(args.folder / "model")


def make_wide_model(folder: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=151_936, **shape | heads))
    model.save_pretrained(folder)
    load_tokenizer("toy/teacher").save_pretrained(folder)


def coin(ids: list[int]) -> bool:
    """A reward for random weights, which never get anything right: else all would be skipped."""
    return zlib.crc32(str(ids).encode()) % 2 == 0


# === our side ===


def run_ours(args: Args) -> dict[str, list[float]]:
    import grpo
    import opd

    case, (policy, teacher) = CASES[args.case], models(args)
    if args.case == "wide":

        def verify(task, rollouts) -> None:
            for row in rollouts:
                reward = float(coin(row.completion_ids))
                row.verdict = Verdict("correct" if reward else "wrong", reward)

        sampler.verify = verify
    own = {"kl_coef": 0.0} if args.algorithm == "grpo" else {"teacher": teacher}
    module = {"grpo": grpo, "opd": opd}[args.algorithm]
    out = args.folder / f"ours-{time.time_ns()}"
    module.main(
        module.Args(
            output_dir=str(out),
            model=policy,
            prompts_per_step=case.prompts,
            group_size=case.group_size,
            max_new_tokens=case.max_new_tokens,
            micro_batch_tokens=case.micro_batch_size * (128 + case.max_new_tokens),
            chunk_size=case.chunk_size,
            num_steps=args.steps + 1,
            learning_rate=1e-6,
            warmup_steps=0,
            checkpoint_every=0,
            backend="torch",
            **own,
        )
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    times = {key: [row.get(f"time/{key}", 0.0) for row in rows] for key in ("step", "generate")}
    times["update"] = [row["time/update"] for row in rows]
    return times | {"length": [row["rollout/length"] for row in rows]}


# === TRL's side ===


def run_trl(args: Args) -> dict[str, list[float]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

    case, (policy, teacher) = CASES[args.case], models(args)
    tokenizer = load_tokenizer(policy)
    task = Task()
    problems = data.load_problems(task, "toy")[: case.prompts * (args.steps + 1)]
    copies = 1 if args.algorithm == "grpo" else case.group_size
    rows = [
        {"prompt": data.prompt_text(tokenizer, problem.messages), "number": number}
        for number, problem in enumerate(problems)
        for _ in range(copies)
    ]
    dataset = Dataset.from_list(rows)

    def reward(completions, completion_ids, number, **_) -> list[float]:
        if args.case == "wide":
            return [float(coin(list(ids))) for ids in completion_ids]
        verdicts = task.grade(completions, [problems[n] for n in number])
        return [verdict.reward for verdict in verdicts]

    times = {"step": [], "generate": [], "length": []}
    marks = {}

    class Timer(TrainerCallback):
        def on_step_begin(self, *_, **__):
            marks["began"], marks["generate"] = time.perf_counter(), 0.0

        def on_step_end(self, *_, **__):
            times["step"].append(time.perf_counter() - marks["began"])
            times["generate"].append(marks["generate"])

    settings = {
        "output_dir": str(args.folder / f"trl-{time.time_ns()}"),
        "per_device_train_batch_size": case.micro_batch_size,
        "gradient_accumulation_steps": case.prompts * case.group_size // case.micro_batch_size,
        "max_completion_length": case.max_new_tokens,
        "max_steps": args.steps + 1,
        "learning_rate": 1e-6,
        "temperature": 1.0,
        "top_k": 0,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "seed": 0,
    }
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    common = {"train_dataset": dataset, "processing_class": tokenizer, "callbacks": [Timer()]}
    if args.algorithm == "grpo":
        config = GRPOConfig(**settings, num_generations=case.group_size, beta=0.0, loss_type="dapo")
        trainer = GRPOTrainer(model=model, reward_funcs=reward, args=config, **common)
    else:
        config = DistillationConfig(**settings, beta=1.0)
        frozen = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        trainer = DistillationTrainer(model=model, teacher_model=frozen, args=config, **common)
    generate = trainer._generate_and_score_completions

    def timed(*positional, **named):
        began = time.perf_counter()
        made = generate(*positional, **named)
        marks["generate"] += time.perf_counter() - began
        times["length"].append(made["completion_mask"].sum(1).float().mean().item())
        return made

    trainer._generate_and_score_completions = timed
    with task:
        trainer.train()
    times["update"] = [a - b for a, b in zip(times["step"], times["generate"], strict=True)]
    return times


# === both ===


def run_child(args: Args, side: str, number: int) -> dict[str, list[float]]:
    out = args.folder / f"{side}-{number}.json"
    command = [sys.executable, "-m", "benchmarks.vs_trl", "--algorithm", args.algorithm]
    command += ["--case", args.case, "--steps", str(args.steps), "--folder", str(args.folder)]
    if args.case == "toy":
        policy, teacher = models(args)
        command += ["--model", policy, "--teacher", teacher]
    with open(args.folder / f"{side}-{number}.log", "w") as log:
        child = subprocess.Popen([*command, "--side", side], cwd=ROOT, stdout=log, stderr=log)
        _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, (args.folder / f"{side}-{number}.log").read_text()[-3000:]
    measured = json.loads((args.folder / f"{side}.json").read_text())
    (args.folder / f"{side}.json").rename(out)
    return {key: values[1:] for key, values in measured.items()} | {"memory": [usage.ru_maxrss]}


def main(args: Args) -> None:
    if args.side != "both":
        measured = {"ours": run_ours, "trl": run_trl}[args.side](args)
        (args.folder / f"{args.side}.json").write_text(json.dumps(measured))
        return
    args.folder = args.folder or Path(tempfile.mkdtemp())
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.case == "wide":
        make_wide_model(args.folder / "model")
    found = {"ours": [], "trl": []}
    for number in range(args.rounds):
        for side, measured in found.items():
            measured.append(run_child(args, side, number))
            step = statistics.median(measured[-1]["step"])
            print(f"round {number + 1}, {side}: {step:.2f} s a step", flush=True)
    print(f"\n{args.algorithm}, {args.case}: medians, {torch.get_num_threads()} threads, float32")
    print("| | ours | TRL | ratio (of each round) |\n|---|---|---|---|")
    for key in ("step", "generate", "update", "memory", "length"):
        values = {
            side: [statistics.median(r[key]) for r in rounds] for side, rounds in found.items()
        }
        ratios = [a / b for a, b in zip(values["ours"], values["trl"], strict=True)]
        scale, unit = (1 / 2**20, "GB") if key == "memory" else (1, "s" if key != "length" else "")
        shown = [f"{statistics.median(values[side]) * scale:.2f} {unit}" for side in found]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {key} | {' | '.join(shown)} | {statistics.median(ratios):.2f} ({each}) |")


if __name__ == "__main__":
    start(main, Args, __doc__)
