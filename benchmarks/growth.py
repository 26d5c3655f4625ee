"""Growth of a step's time and peak memory with its tokens and with the vocabulary: whole steps of
grpo.py and opd.py on random weights, each point in a process of its own.

    python -m benchmarks.growth --output docs/growth.png          # 3 minutes on 2 cores

Prints a table and the slopes of log time and log memory over log size: 1 is linear, 0 is flat.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import grpo
import opd
from common.model.tokenizer import load_tokenizer
from common.run.inputs import ROOT
from common.run.process import start
from common.sampling import sampler
from common.tasks.task import Verdict

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  behind the choice of a backend

PROMPTS = (4, 8, 16, 32)  # a step, of 4 completions of 64 tokens each
WORDS = (8192, 16_384, 32_768, 65_536)
FIXED_PROMPTS, FIXED_WORDS = 8, 16_384


@dataclass
class Args:
    output: str = "growth.png"
    """the picture"""
    algorithm: Literal["both", "grpo", "opd"] = "both"
    """both; one of the two is for the child processes"""
    prompts: int = FIXED_PROMPTS
    """of a child: prompts a step"""
    words: int = FIXED_WORDS
    """of a child: vocabulary"""


def measure(args: Args) -> dict[str, float]:
    """A run of three steps, of which the first is not timed."""

    def half_are_right(task, rollouts) -> None:
        for number, row in enumerate(rollouts):
            row.verdict = Verdict("correct", 1.0) if number % 2 else Verdict("wrong", 0.0)

    sampler.verify = half_are_right
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
        model = Qwen3ForCausalLM(Qwen3Config(vocab_size=args.words, **shape))
        model.save_pretrained(f"{folder}/model")
        load_tokenizer("toy/teacher").save_pretrained(f"{folder}/model")
        del model
        module = {"grpo": grpo, "opd": opd}[args.algorithm]
        own = {"kl_coef": 0.0} if module is grpo else {"teacher": f"{folder}/model"}
        module.main(
            module.Args(
                output_dir=f"{folder}/run",
                model=f"{folder}/model",
                prompts_per_step=args.prompts,
                group_size=4,
                max_new_tokens=64,
                micro_batch_tokens=1024,
                chunk_size=256,
                num_steps=3,
                learning_rate=1e-6,
                warmup_steps=0,
                checkpoint_every=0,
                backend="torch",
                **own,
            )
        )
        lines = Path(f"{folder}/run/metrics.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"seconds": statistics.median(row["time/step"] for row in rows[1:]), "gb": peak}


def in_a_process(algorithm: str, prompts: int, words: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.growth", "--algorithm", algorithm]
    command += ["--prompts", str(prompts), "--words", str(words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def main(args: Args) -> None:
    if args.algorithm != "both":
        print(json.dumps(measure(args)))
        return
    figure, axes = plt.subplots(2, 2, figsize=(8, 6), constrained_layout=True)
    tokens = tuple(prompts * 4 * 64 for prompts in PROMPTS)
    for column, (label, sizes) in enumerate((("tokens a step", tokens), ("vocabulary", WORDS))):
        for algorithm in ("grpo", "opd"):
            points = [(prompts, FIXED_WORDS) for prompts in PROMPTS]
            if column == 1:
                points = [(FIXED_PROMPTS, words) for words in WORDS]
            found = [in_a_process(algorithm, *point) for point in points]
            for row, (key, unit) in enumerate((("seconds", "s a step"), ("gb", "GB at most"))):
                values = [point[key] for point in found]
                grows = slope(sizes, values)
                shown = ", ".join(f"{value:.2f}" for value in values)
                print(f"{algorithm}, {unit} over {label}: {shown}; slope {grows:.2f}", flush=True)
                axes[row, column].loglog(sizes, values, "o-", label=f"{algorithm}: {grows:.2f}")
                for point in zip(sizes, values, strict=True):
                    above = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
                    axes[row, column].annotate(f"{point[1]:.2f}", point, **above)
                axes[row, column].set(xlabel=label, ylabel=unit, xticks=sizes, yticks=[])
                axes[row, column].margins(0.1, 0.2)
                axes[row, column].set_xticklabels([f"{size:,}" for size in sizes])
                axes[row, column].minorticks_off()
                axes[row, column].legend(title="slope")
    figure.savefig(args.output, dpi=110)
    print(f"written to {args.output}")


if __name__ == "__main__":
    start(main, Args, __doc__)
