r"""Evaluate a model: avg@k, unbiased pass@j and maj@k, with intervals over problems.

For each problem k completions are sampled and graded as in training.

    avg@k   mean over problems of its samples' mean reward (of 0s and 1s: the share that is right)
    pass@j  mean over problems of 1 - C(k - c, j) / C(k, j), c of k right       (arXiv 2107.03374)
    maj@k   mean over problems of the reward of the most frequent answer        (arXiv 2203.11171)

Right is a reward of at least --pass_threshold. A task that reads no answers has no maj@k.

Samples of one problem are not independent, so intervals go by how much problems differ: more
samples a problem cannot shrink them to nothing, and 0 of 30 right is no certainty.

A run that was cut off goes on where it stopped. OUTPUT_DIR gets results.json, and every completion
with its verdict in samples/*.jsonl.

    python evaluate.py                                                # the raw toy teacher
    python evaluate.py --model runs/grpo/final --benchmarks toy mine.jsonl --output_dir runs/eval
    python evaluate.py --compare runs/eval runs/evaluate              # paired, problem by problem
    python evaluate.py --model Qwen/Qwen3-1.7B --benchmarks math500 aime24 aime25 --dtype bfloat16 \
        --temperature 0.7 --top_p 0.8 --top_k 20 --max_prompt_tokens 2048 --max_new_tokens 16384
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tqdm import tqdm

from common.model.load import check_shapes, load_model
from common.model.shard import DTYPES
from common.model.tokenizer import load_tokenizer
from common.run.errors import check
from common.run.folder import claim_folder, lock_folder, write_json, write_jsonl, writing
from common.run.inputs import inputs_of, model_path
from common.run.process import CHAT, MAY_CHANGE, MODEL, NOT_NEGATIVE, POSITIVE, SHARE, start
from common.run.ranks import gather, join_ranks, on_first_rank, rank
from common.sampling.rollout import Rollout, rollout_metrics
from common.sampling.sampler import resolve_backend, sample_and_verify
from common.sampling.torch_engine import TorchEngine
from common.sampling.vllm_engine import VLLMEngine
from common.sampling.vote import majority_votes
from common.statistics import difference_interval, interval, pass_at
from common.tasks import data
from common.tasks.task import Task


@dataclass
class Args:
    # --- experiment ---
    output_dir: Annotated[str, MAY_CHANGE] = "runs/evaluate"
    """where results.json and samples/ are written"""
    compare: tuple[str, str] | None = None
    """two finished output folders: print their paired differences and sample nothing"""
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """seed of every sample"""

    # --- model ---
    model: Annotated[str, MODEL] = "toy/teacher"
    """a local folder or a hub id"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where it runs; auto takes a GPU if there is one"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """type of weights and compute"""

    # --- data ---
    task: str = "math"
    """what is asked and how it is graded: math, or a .py file (docs/tasks.md)"""
    benchmarks: tuple[str, ...] | None = None
    """names that the task knows (math: toy, math500, aime24, aime25, amc23, gsm8k), hub ids
    (owner/name:config:split) or files; default: the task's first"""
    num_problems: Annotated[int | None, POSITIVE] = None
    """take the first problems of each benchmark only"""
    max_prompt_tokens: Annotated[int, POSITIVE] = 128
    """longer prompts are an error: a benchmark without its long problems is another benchmark"""
    thinking: bool = False
    """thinking mode of the chat template"""
    chat_template: Annotated[str | None, CHAT] = None
    """a .jinja file, or a model whose chat template is used; default: the model's own"""

    # --- sampling ---
    num_samples: Annotated[int, POSITIVE] = 16
    """k: completions per problem"""
    pass_threshold: Annotated[float, SHARE] = 1.0
    """pass@j counts samples of at least this reward"""
    max_new_tokens: Annotated[int, POSITIVE] = 64
    """longest completion"""
    temperature: Annotated[float, NOT_NEGATIVE] = 1.0
    """sampling temperature; 0 is greedy"""
    top_p: Annotated[float, SHARE] = 1.0
    """nucleus sampling; 1 is off"""
    top_k: Annotated[int, NOT_NEGATIVE] = 0
    """keep the k likeliest tokens; 0 is off"""
    backend: Literal["auto", "torch", "vllm"] = "auto"
    """what samples: transformers or vLLM; auto takes vLLM on a GPU"""
    vllm_gpu_memory: Annotated[float, SHARE, MAY_CHANGE] = 0.4
    """share of the GPU's memory that vLLM may take"""
    vllm_sequences: Annotated[int, POSITIVE, MAY_CHANGE] = 256
    """how many sequences vLLM decodes at once, as far as its cache holds them"""
    enforce_eager: Annotated[bool, MAY_CHANGE] = False
    """vLLM without compilation and CUDA graphs: starts faster, samples slower"""
    tensor_parallel: Annotated[int, POSITIVE, MAY_CHANGE] = 1
    """ranks in a row that share one vLLM, for models that do not fit one GPU"""


# === results ===


def summarise(
    rollouts: list[Rollout], votes: list[float] | None, num_samples: int, pass_threshold: float
) -> dict[str, object]:
    """The numbers of one benchmark; the samples of a problem stand together."""
    rewards = np.array([rollout.verdict.reward for rollout in rollouts]).reshape(-1, num_samples)
    averages, counts = rewards.mean(1), (rewards >= pass_threshold).sum(1).tolist()
    powers = [2**i for i in range(num_samples.bit_length()) if 2**i <= num_samples]
    sizes = range(1, num_samples + 1)
    by_problem = {j: [pass_at(j, count, num_samples) for count in counts] for j in sizes}
    return {
        "num_problems": len(counts),
        "num_samples": num_samples,
        "accuracy": float(averages.mean()),
        "accuracy_interval": interval(averages, num_samples),
        "majority": None if votes is None else float(np.mean(votes)),
        "majority_interval": None if votes is None else interval(votes, num_samples),
        "pass_threshold": pass_threshold,
        "pass_at": {j: float(np.mean(values)) for j, values in by_problem.items()},
        "pass_at_interval": {j: interval(by_problem[j], num_samples) for j in powers},
        "generated_tokens": sum(len(rollout.completion_ids) for rollout in rollouts),
        **rollout_metrics(rollouts),
        "problems": [rollout.problem.text for rollout in rollouts[::num_samples]],
        "golds": [rollout.problem.gold for rollout in rollouts[::num_samples]],
        "averages": averages.tolist(),
        "pass_counts": counts,
        "majority_votes": votes,
    }


def paired_difference(a: dict, b: dict) -> dict[str, tuple[float, list[float]]]:
    """Differences a - b of two results on the same problems, with intervals over problems."""
    k = a["num_samples"]
    differences = {}
    for name, key in ((f"avg@{k}", "averages"), (f"maj@{k}", "majority_votes")):
        if None not in (a[key], b[key]):
            one, other = np.array(a[key]), np.array(b[key])
            interval_of = difference_interval(one, other, k)
            differences[name] = (float(one.mean() - other.mean()), interval_of)
    return differences


# Flags that say which model is asked and where, not how: they are not kept with the results.
MAY_DIFFER = {"output_dir", "compare", "model", "benchmarks", "device"}
MAY_DIFFER |= {"tensor_parallel", "vllm_gpu_memory", "vllm_sequences", "enforce_eager"}


def read_results(path: Path) -> dict:
    """Read a results.json. Raises UserError if it lacks anything that --compare reads."""
    check(path.is_file(), f"{path} does not exist; evaluate first")
    try:
        results = json.loads(path.read_bytes())
        complete = isinstance(results["args"], dict)
        for result in results["benchmarks"].values():
            averages, votes = result["averages"], result["majority_votes"]
            by_problem = [result["problems"], result["golds"], averages, votes or averages]
            complete &= {len(values) for values in by_problem} == {result["num_problems"]}
            complete &= min(result["num_problems"], result["num_samples"]) > 0
            complete &= all(0 <= value <= 1 for value in (*averages, *(votes or ())))
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    check(complete, f"{path} is damaged or no result of evaluate.py; evaluate again")
    return results


def compare(folders: tuple[str, str]) -> None:
    """Print the paired differences of two finished runs, benchmark by benchmark, and in which other
    settings than the model the runs differ."""
    results = [read_results(Path(folder) / "results.json") for folder in folders]
    one, other = (result["args"] for result in results)
    changed = [name for name in one if one[name] != other.get(name)]
    differing = [f"{name} ({one[name]}, {other.get(name)})" for name in changed]
    if differing:
        print(f"the runs differ in more than the model: {', '.join(differing)}")
    a, b = (result["benchmarks"] for result in results)
    shared = [name for name in a if name in b]
    check(len(shared) > 0, f"no benchmark in common: {', '.join(a)} and {', '.join(b)}")
    for name in shared:
        check(
            a[name]["problems"] == b[name]["problems"],
            f"{name}: the two runs did not ask the same problems; use one --num_problems for both",
        )
        golds = zip(a[name]["golds"], b[name]["golds"], strict=True)
        moved = sum(gold != other_gold for gold, other_gold in golds)
        check(moved == 0, f"{name}: {moved} problems had another gold answer in the other run")
        k, other_k = a[name]["num_samples"], b[name]["num_samples"]
        check(k == other_k, f"{name}: {k} and {other_k} samples a problem")
        for measure, (value, (low, high)) in paired_difference(a[name], b[name]).items():
            print(
                f"{name} {measure}: {folders[0]} minus {folders[1]} = {100 * value:+.1f} points "
                f"[{100 * low:+.1f}, {100 * high:+.1f}] over {a[name]['num_problems']} problems"
            )


# === samples ===


def sample_benchmark(
    engine, task: Task, prompts: list[data.Prompt], args: Args, seed: tuple, path: Path
) -> list[Rollout]:
    """Sample k graded completions per prompt. Each batch is added to `path`; what is there already
    from a run that was cut off is not sampled again, and the rest comes out as it would have."""
    per_batch = max(1, engine.batch_size // args.num_samples)
    sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    sampling |= {"top_p": args.top_p, "top_k": args.top_k}
    rows = on_first_rank(lambda: kept_rows(path, len(prompts), per_batch, args.num_samples))
    done = len(rows) // args.num_samples
    count = {"total": len(prompts), "initial": done}
    with tqdm(desc=f"evaluate {path.stem}", disable=rank() > 0, **count) as bar:
        for first in range(done, len(prompts), per_batch):
            batch = prompts[first : first + per_batch]
            sampled = sample_and_verify(
                engine, task, batch, args.num_samples, seed=(*seed, first), **sampling
            )
            new_rows = gather([rollout.row() for rollout in sampled])
            with writing(path.parent):
                on_first_rank(lambda new_rows=new_rows: append_rows(path, new_rows))
            rows += new_rows
            bar.update(len(batch))
    return [Rollout.from_row(row) for row in rows]


def append_rows(path: Path, rows: list[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def kept_rows(path: Path, num_prompts: int, per_batch: int, num_samples: int) -> list[dict]:
    """The whole batches before the first row that was not written to its end; the rest of the file
    is removed."""
    rows = []
    for line in path.read_bytes().splitlines(True) if path.exists() else ():
        try:
            rows.append(json.loads(line if line.endswith(b"\n") else ""))
        except ValueError:
            break
    done = len(rows) // num_samples
    done -= done % per_batch if done < num_prompts else 0
    rows = rows[: done * num_samples]
    write_jsonl(path, rows)
    return rows


# === main ===


def main(args: Args) -> None:
    if args.compare:
        compare(args.compare)
        return
    check_args(args)
    device = join_ranks(args.device)
    backend = resolve_backend(args, device)
    length = args.max_prompt_tokens + args.max_new_tokens
    check_shapes(args.model, length=length, device=args.device)
    tokenizer = load_tokenizer(args.model, chat_template=args.chat_template)
    task = Task(args.task)
    names = args.benchmarks or (data.default_of(task, "benchmarks"),)
    prompts = {name: benchmark_prompts(task, name, tokenizer, args) for name in names}
    config = {"script": "evaluate", **vars(args), **on_first_rank(lambda: inputs_of(args))}
    config |= data.fingerprint(task, (), sum(prompts.values(), []))
    folder = Path(args.output_dir)
    if rank() == 0:
        claim_folder(folder, config, Args)
        _lock = lock_folder(folder)
        (folder / "samples").mkdir(exist_ok=True)
    if on_first_rank((folder / "results.json").exists):
        print(f"{folder}/results.json is there already")
        return
    if backend == "vllm":
        engine = VLLMEngine(model_path(args.model), tokenizer, args)
    else:
        model = load_model(args.model, args.dtype, device)
        engine = TorchEngine(model, tokenizer, DTYPES[args.dtype])
    results, k = {}, args.num_samples
    with task:
        for number, (name, asked) in enumerate(prompts.items()):
            path = folder / "samples" / f"{Path(name).stem}.jsonl"
            sampled = sample_benchmark(engine, task, asked, args, (args.seed, number), path)
            votes = on_first_rank(lambda rows=sampled: majority_votes(task, rows, k))
            results[name] = summarise(sampled, votes, k, args.pass_threshold)
            print(describe(name, results[name]))
    if rank() == 0:
        with writing(folder):
            settings = {k: v for k, v in vars(args).items() if k not in MAY_DIFFER}
            saved = {"model": args.model, "args": settings, "benchmarks": results}
            write_json(folder / "results.json", saved)


def check_args(args: Args) -> None:
    check(args.benchmarks != (), "--benchmarks needs a value, for example toy or math500")
    stems = [Path(name).stem for name in args.benchmarks or ()]
    check(len(set(stems)) == len(stems), "two --benchmarks have one file name; rename one")


def benchmark_prompts(task: Task, name: str, tokenizer, args: Args) -> list[data.Prompt]:
    problems = on_first_rank(lambda: data.load_evaluation_problems(task, name))[: args.num_problems]
    prompts = data.render_prompts(tokenizer, problems, args)
    too_long = len(problems) - len(prompts)
    check(
        too_long == 0,
        f"{too_long} prompts of {name} are over --max_prompt_tokens {args.max_prompt_tokens}; "
        "raise it: all problems of a benchmark count",
    )
    return prompts


def describe(name: str, result: dict) -> str:
    k, (low, high) = result["num_samples"], result["accuracy_interval"]
    outcomes = ("partial", "wrong", "no_answer", "timeout", "crash", "truncated")
    majority = "" if result["majority"] is None else f", maj@{k} {result['majority']:.1%}"
    others = ", ".join(f"{kind} {result[f'rollout/{kind}']:.1%}" for kind in outcomes)
    return (
        f"{name}: avg@{k} {result['accuracy']:.1%} [{low:.1%}, {high:.1%}] over "
        f"{result['num_problems']} problems, pass@{k} {result['pass_at'][k]:.1%}{majority}; "
        f"{others}; mean length {result['rollout/length']:.0f} tokens"
    )


if __name__ == "__main__":
    start(main, Args, __doc__)
