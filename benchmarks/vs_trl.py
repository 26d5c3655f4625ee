r"""Seconds and memory of a training step beside TRL's, in alternation, each in its own process, and
beside the least that the step's matrix products take on this machine (benchmarks/floor.py).

Same checkpoint, prompts, reward, P, G, lengths, micro-batch, type, threads and optimizer; no KL
term, no gradient checkpointing on either side. GRPO against GRPOTrainer, OPD (reverse KL) against
DistillationTrainer, which has no groups: it gets every prompt G times. bfloat16: float32 weights,
computed with in bfloat16 (TRL: autocast).

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.vs_trl --algorithm grpo                  # the toy, 16 x 16 x 64
    python -m benchmarks.vs_trl --algorithm opd --model RUN/fkl_warmup/final \
        --teacher RUN/teacher_grpo/final                          # RUN: runs/bridge-teacher/seed_0
    python -m benchmarks.vs_trl --algorithm grpo --case small --dtype bfloat16
    python -m benchmarks.vs_trl --algorithm opd --case wide       # half an hour
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.floor import copy_rate, product_rate
from common.model import flops
from common.model.shard import DTYPES
from common.model.tokenizer import load_tokenizer
from common.run.inputs import ROOT, model_path
from common.run.process import start
from common.sampling import rollout, sampler
from common.tasks import data
from common.tasks.task import Task, Verdict


@dataclass(frozen=True)
class Case:
    prompts: int  # P
    group_size: int  # G
    max_new_tokens: int
    micro_batch_size: int
    chunk_size: int
    untimed: int  # steps before those that are timed


CASES = {
    "toy": Case(16, 16, 64, 64, 2048, 1),
    "small": Case(8, 8, 128, 8, 256, 0),
    "wide": Case(8, 8, 256, 8, 256, 0),
}
PROMPT = 23  # tokens of every prompt of the toy


@dataclass
class Args:
    algorithm: Literal["grpo", "opd"] = "grpo"
    """what is trained"""
    case: Literal["toy", "small", "wide"] = "toy"
    """the toy models, or random weights: of SmolLM2-135M's shape, or with 151,936 words"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute type"""
    model: str | None = None
    """the policy, instead of the raw toy teacher (grpo) or student (opd)"""
    teacher: str | None = None
    """opd: the frozen teacher, instead of the raw toy teacher"""
    rounds: int = 3
    """how often the two sides alternate"""
    steps: int = 4
    """timed steps a round"""
    side: Literal["both", "ours", "trl"] = "both"
    """both; the other two are for the child processes"""
    folder: Path | None = None
    """where the children put what they measure"""


def make_models(args: Args) -> None:
    """Random weights for policy and teacher, with the toy's tokenizer."""
    for seed, name in enumerate(("model", "teacher")):
        torch.manual_seed(seed)
        if args.case == "wide":
            shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
            shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
            shape |= {"vocab_size": 151_936, "tie_word_embeddings": True}
            model = Qwen3ForCausalLM(Qwen3Config(**shape))
        else:
            shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
            shape |= {"num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 1e5}
            shape |= {"vocab_size": 49_152, "tie_word_embeddings": True}
            model = LlamaForCausalLM(LlamaConfig(**shape))
        model.save_pretrained(args.folder / name)
        load_tokenizer("toy/teacher").save_pretrained(args.folder / name)


def coin(ids: list[int]) -> bool:
    """A reward for random weights, which never get anything right: else all would be skipped."""
    return zlib.crc32(str(ids).encode()) % 2 == 0


def peak_memory() -> list[float]:
    """GB of this process so far."""
    return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]


# === our side ===


def run_ours(args: Args) -> dict[str, list[float]]:
    import grpo
    import opd

    case, counts = CASES[args.case], {"flops": [], "decoded": []}
    take, verify = flops.take, rollout.verify

    def counting_take(role: str) -> float:
        counts["flops"].append(take(role))
        return counts["flops"][-1]

    def counting_verify(task, rollouts) -> None:
        counts["decoded"].append(max(len(row.completion_ids) for row in rollouts))
        if args.case == "toy":
            verify(task, rollouts)
        else:
            for row in rollouts:
                reward = float(coin(row.completion_ids))
                row.verdict = Verdict("correct" if reward else "wrong", reward)

    flops.take, sampler.verify = counting_take, counting_verify
    own = {"kl_coef": 0.0} if args.algorithm == "grpo" else {"teacher": args.teacher}
    module = {"grpo": grpo, "opd": opd}[args.algorithm]
    out = args.folder / f"ours-{time.time_ns()}"
    module.main(
        module.Args(
            output_dir=str(out),
            model=args.model,
            dtype=args.dtype,
            prompts_per_step=case.prompts,
            group_size=case.group_size,
            max_new_tokens=case.max_new_tokens,
            micro_batch_tokens=case.micro_batch_size * (PROMPT + case.max_new_tokens),
            chunk_size=case.chunk_size,
            num_steps=args.steps + case.untimed,
            learning_rate=1e-6,
            warmup_steps=0,
            checkpoint_every=0,
            backend="torch",
            **own,
        )
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    times = {
        key: [row.get(f"time/{key}", 0.0) for row in rows]
        for key in ("step", "generate", "score", "update")
    }
    times["memory"] = peak_memory()  # before the floor is measured, which takes memory too
    weights = sum(file.stat().st_size for file in Path(args.model).glob("*.safetensors"))
    weights = weights // 4 * DTYPES[args.dtype].itemsize  # the files are in float32
    spent = [sum(pair) for pair in zip(counts["flops"][::2], counts["flops"][1::2], strict=True)]
    rates = product_rate(DTYPES[args.dtype]), copy_rate()
    times["floor"] = [
        number / rates[0] + decoded * weights / rates[1]
        for number, decoded in zip(spent, counts["decoded"], strict=True)
    ]
    return times | {"length": [row["rollout/length"] for row in rows]}


# === TRL's side ===


def run_trl(args: Args) -> dict[str, list[float]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

    case, steps = CASES[args.case], CASES[args.case].untimed + args.steps
    tokenizer = load_tokenizer(args.model)
    task = Task()
    problems = data.load_problems(task, "toy")[: case.prompts * steps]
    copies = 1 if args.algorithm == "grpo" else case.group_size
    rows = [
        {"prompt": data.prompt_text(tokenizer, problem.messages), "number": number}
        for number, problem in enumerate(problems)
        for _ in range(copies)
    ]
    dataset = Dataset.from_list(rows)

    def reward(completions, completion_ids, number, **_) -> list[float]:
        if args.case != "toy":
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
        "max_steps": steps,
        "learning_rate": 1e-6,
        "temperature": 1.0,
        "top_k": 0,
        "bf16": args.dtype == "bfloat16",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "seed": 0,
    }
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    common = {"train_dataset": dataset, "processing_class": tokenizer, "callbacks": [Timer()]}
    if args.algorithm == "grpo":
        config = GRPOConfig(**settings, num_generations=case.group_size, beta=0.0, loss_type="dapo")
        trainer = GRPOTrainer(model=model, reward_funcs=reward, args=config, **common)
    else:
        config = DistillationConfig(**settings, beta=1.0)
        frozen = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=DTYPES[args.dtype])
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
    return times | {"memory": peak_memory()}


# === both ===


def run_child(args: Args, side: str, number: int) -> dict[str, list[float]]:
    log = args.folder / f"{side}-{number}.log"
    child_args = asdict(args) | {"side": side}
    command = [sys.executable, "-m", "benchmarks.vs_trl"]
    command += [word for key, value in child_args.items() for word in (f"--{key}", str(value))]
    with open(log, "wb") as output:
        child = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output)
    assert child.returncode == 0, log.read_text("utf-8")[-3000:]
    measured = json.loads((args.folder / f"{side}.json").read_bytes())
    untimed = CASES[args.case].untimed
    memory = measured.pop("memory")
    return {key: values[untimed:] for key, values in measured.items()} | {"memory": memory}


def report(args: Args, found: dict[str, list[dict[str, list[float]]]]) -> None:
    """Medians of each side, and the ratio of each round."""
    case = CASES[args.case]
    size = f"{case.prompts} x {case.group_size} x {case.max_new_tokens}"
    print(
        f"\n{args.algorithm}, {args.case}, {size}, {args.dtype}, {torch.get_num_threads()} threads"
    )
    print("| | ours | TRL | ratio (of each round) |\n|---|---|---|---|")
    medians = {}
    for key in ("step", "generate", "score", "update", "memory", "length"):
        sides = {
            side: [statistics.median(r.get(key) or [0.0]) for r in rounds]
            for side, rounds in found.items()
        }
        ratios = [a / b for a, b in zip(*sides.values(), strict=True) if b > 0]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        ratio = f"{statistics.median(ratios):.2f} ({each})" if ratios else ""
        unit = {"memory": " GB", "length": " tokens"}.get(key, " s")
        medians[key] = {side: statistics.median(values) for side, values in sides.items()}
        shown = " | ".join(f"{value:.2f}{unit}" for value in medians[key].values())
        print(f"| {key} | {shown} | {ratio} |")
    least = statistics.median([statistics.median(r["floor"]) for r in found["ours"]])
    print(f"the floor: {least:.2f} s, {least / medians['step']['trl']:.0%} of TRL's step")
    print(f"our step over the floor: {medians['step']['ours'] / least:.2f}")


def main(args: Args) -> None:
    if args.side != "both":
        measured = {"ours": run_ours, "trl": run_trl}[args.side](args)
        (args.folder / f"{args.side}.json").write_text(json.dumps(measured), "utf-8")
        return
    args.folder = args.folder or Path(tempfile.mkdtemp())
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.case == "toy":
        raw = "toy/teacher" if args.algorithm == "grpo" else "toy/student"
        args.model = model_path(args.model or raw)
        args.teacher = model_path(args.teacher or "toy/teacher")
    else:
        make_models(args)
        args.model, args.teacher = str(args.folder / "model"), str(args.folder / "teacher")
    found = {"ours": [], "trl": []}
    for number in range(args.rounds):
        for side, measured in found.items():
            measured.append(run_child(args, side, number))
            step = statistics.median(measured[-1]["step"])
            print(f"round {number + 1}, {side}: {step:.2f} s a step", flush=True)
    report(args, found)


if __name__ == "__main__":
    start(main, Args, __doc__)
