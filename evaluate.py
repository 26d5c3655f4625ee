r"""Evaluate a model: avg@k and unbiased pass@j, with intervals over problems.

For each problem k completions are sampled and graded by the verifier that training uses.

    avg@k   mean over problems of the share of its samples that are right
    pass@j  mean over problems of 1 - C(k - c, j) / C(k, j), c of k right       (arXiv 2107.03374)

Samples of one problem are not independent, so intervals come from resampling problems (a cluster
bootstrap), never samples: more samples a problem cannot shrink them to nothing.

    python evaluate.py                                                # the raw toy teacher
    python evaluate.py --model runs/grpo/final --benchmarks toy mine.jsonl --output_dir runs/eval
    python evaluate.py --model Qwen/Qwen3-1.7B --benchmarks math500 aime24 aime25 --dtype bfloat16 \
        --temperature 0.7 --top_p 0.8 --top_k 20 --max_prompt_tokens 2048 --max_new_tokens 16384
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from common import data
from common.model import DTYPES, load_model, load_tokenizer, model_path, resolve_device
from common.rollout import (
    Rollout,
    TorchEngine,
    VLLMEngine,
    resolve_backend,
    rollout_metrics,
    sample_and_verify,
)
from common.run import (
    check,
    check_ranges,
    claim_folder,
    lock_folder,
    start,
    write_json,
    write_jsonl,
)
from common.verifier import Verifier


@dataclass
class Args:
    # --- experiment ---
    output_dir: str = "runs/evaluate"
    """where results.json and samples/ are written"""
    seed: int = 0
    """seed of every sample"""

    # --- model ---
    model: str = "toy/teacher"
    """a local folder or a hub id"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where it runs; auto takes a GPU if there is one"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """type of weights and compute"""

    # --- data ---
    benchmarks: tuple[str, ...] = ("toy",)
    """toy, math500, aime24, aime25, amc23, gsm8k, a hub id, or a .jsonl or .parquet file"""
    num_problems: int | None = None
    """take the first problems of each benchmark only"""
    max_prompt_tokens: int = 128
    """longer prompts are an error: a benchmark without its long problems is another benchmark"""
    thinking: bool = False
    """thinking mode of the chat template"""

    # --- sampling ---
    num_samples: int = 16
    """k: completions per problem"""
    max_new_tokens: int = 64
    """longest completion"""
    temperature: float = 1.0
    """sampling temperature; 0 is greedy"""
    top_p: float = 1.0
    """nucleus sampling; 1 is off"""
    top_k: int = 0
    """keep the k likeliest tokens; 0 is off"""
    backend: Literal["auto", "torch", "vllm"] = "auto"
    """what samples: transformers or vLLM; auto takes vLLM on a GPU"""
    vllm_gpu_memory: float = 0.4
    """share of the GPU's memory that vLLM may take"""
    enforce_eager: bool = False
    """vLLM without compilation and CUDA graphs: starts faster, samples slower"""


# === statistics ===


def pass_at(j: int, num_correct: int, num_samples: int) -> float:
    """Probability that j of the samples, drawn without replacement, hold a right one."""
    return 1.0 - math.comb(num_samples - num_correct, j) / math.comb(num_samples, j)


def cluster_interval(values: list[float], seed: int = 0, draws: int = 10_000) -> list[float]:
    """95% percentile-bootstrap interval of the mean of one value per problem."""
    rng, values = np.random.default_rng(seed), np.asarray(values)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    return np.quantile(means, [0.025, 0.975]).tolist()


def summarise(rollouts: list[Rollout], num_samples: int) -> dict[str, object]:
    """The numbers of one benchmark; the samples of a problem stand together."""
    correct = np.array([rollout.verdict.correct for rollout in rollouts]).reshape(-1, num_samples)
    counts = correct.sum(1).tolist()
    powers = [2**i for i in range(num_samples.bit_length()) if 2**i <= num_samples]
    by_problem = {
        j: [pass_at(j, c, num_samples) for c in counts] for j in range(1, num_samples + 1)
    }
    return {
        "num_problems": len(counts),
        "num_samples": num_samples,
        "accuracy": float(correct.mean()),
        "accuracy_interval": cluster_interval(correct.mean(1).tolist()),
        "pass_at": {j: float(np.mean(values)) for j, values in by_problem.items()},
        "pass_at_interval": {j: cluster_interval(by_problem[j]) for j in powers},
        "generated_tokens": sum(len(rollout.completion_ids) for rollout in rollouts),
        **rollout_metrics(rollouts),
    }


# === main ===


def main(args: Args) -> None:
    check_ranges(args, zero_allowed=("temperature",))
    check(0 < args.top_p <= 1, f"--top_p is {args.top_p}; it must be above 0 and at most 1")
    stems = {Path(name).stem for name in args.benchmarks}
    check(len(stems) == len(args.benchmarks), "two --benchmarks have one file name; rename one")
    folder, device = Path(args.output_dir), resolve_device(args.device)
    backend = resolve_backend(args, device)
    tokenizer = load_tokenizer(args.model)
    prompts = {}
    for name in args.benchmarks:
        problems = data.load_evaluation_problems(name)[: args.num_problems]
        prompts[name] = data.render_prompts(tokenizer, problems, args)
        check(
            len(prompts[name]) == len(problems),
            f"{len(problems) - len(prompts[name])} prompts of {name} are over --max_prompt_tokens "
            f"{args.max_prompt_tokens}; raise it: all problems of a benchmark count",
        )
    claim_folder(folder, {"script": "evaluate", **vars(args)})
    if (folder / "results.json").exists():
        print(f"{folder}/results.json is there already")
        return
    (folder / "samples").mkdir(exist_ok=True)
    if backend == "vllm":
        engine = VLLMEngine(model_path(args.model), tokenizer, args)
    else:
        model = load_model(args.model, args.dtype, device)
        engine = TorchEngine(model, tokenizer, DTYPES[args.dtype])
    results, began = {}, time.perf_counter()
    with lock_folder(folder), Verifier() as verifier:
        for number, (name, asked) in enumerate(prompts.items()):
            rollouts = []
            per_batch = max(1, engine.batch_size // args.num_samples)
            for first in tqdm(range(0, len(asked), per_batch), desc=f"evaluate {name}"):
                batch, seed = asked[first : first + per_batch], (args.seed, number, first)
                rollouts += sample_and_verify(engine, verifier, batch, args.num_samples, args, seed)
            write_jsonl(
                folder / "samples" / f"{Path(name).stem}.jsonl", [r.row() for r in rollouts]
            )
            results[name] = summarise(rollouts, args.num_samples)
            print(describe(name, results[name]))
    seconds = time.perf_counter() - began
    write_json(
        folder / "results.json", {"model": args.model, "seconds": seconds, "benchmarks": results}
    )


def describe(name: str, result: dict) -> str:
    k, (low, high) = result["num_samples"], result["accuracy_interval"]
    others = ", ".join(
        f"{outcome} {result[f'rollout/{outcome}']:.1%}"
        for outcome in ("wrong", "no_answer", "timeout", "crash", "truncated")
    )
    return (
        f"{name}: avg@{k} {result['accuracy']:.1%} [{low:.1%}, {high:.1%}] over "
        f"{result['num_problems']} problems, pass@{k} {result['pass_at'][k]:.1%}; {others}; "
        f"mean length {result['rollout/length']:.0f} tokens"
    )


if __name__ == "__main__":
    start(main, Args, __doc__)
