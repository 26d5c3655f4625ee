r"""Evaluate a model: avg@k, unbiased pass@j and maj@k, with intervals over problems.

For each problem k completions are sampled and graded by the verifier that training uses.

    avg@k   mean over problems of the share of its samples that are right
    pass@j  mean over problems of 1 - C(k - c, j) / C(k, j), c of k right       (arXiv 2107.03374)
    maj@k   mean over problems of whether the most frequent answer is right     (arXiv 2203.11171)

Samples of one problem are not independent, so intervals go by how much problems differ: more
samples a problem cannot shrink them to nothing, and 0 of 30 right is no certainty.

A run that was cut off goes on where it stopped. OUTPUT_DIR gets results.json, every completion in
samples/*.jsonl, and samples.html, where a person reads them with their verdicts.

    python evaluate.py                                                # the raw toy teacher
    python evaluate.py --model runs/grpo/final --benchmarks toy mine.jsonl --output_dir runs/eval
    python evaluate.py --compare runs/eval runs/evaluate              # paired, problem by problem
    python evaluate.py --model Qwen/Qwen3-1.7B --benchmarks math500 aime24 aime25 --dtype bfloat16 \
        --temperature 0.7 --top_p 0.8 --top_k 20 --max_prompt_tokens 2048 --max_new_tokens 16384
"""

import html
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.stats import beta
from scipy.stats import t as student_t
from tqdm import tqdm

from common import data
from common.fingerprint import inputs_of, model_path
from common.model import DTYPES, check_lengths, load_model, load_tokenizer
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
    gather,
    join_ranks,
    lock_folder,
    on_first_rank,
    rank,
    start,
    write_atomic,
    write_json,
    write_jsonl,
    writing,
)
from common.verifier import Verifier, compare_cheaply


@dataclass
class Args:
    # --- experiment ---
    output_dir: str = "runs/evaluate"
    """where results.json, samples/ and samples.html are written"""
    compare: tuple[str, str] | None = None
    """two finished output folders: print their paired differences and sample nothing"""
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
    chat_template: str | None = None
    """a model whose chat template is used; by itself the model's own"""

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
    tensor_parallel: int = 1
    """ranks in a row that share one vLLM, for models that do not fit one GPU"""


# === statistics ===


def pass_at(j: int, num_correct: int, num_samples: int) -> float:
    """Probability that j of the samples, drawn without replacement, hold a right one."""
    return 1.0 - math.comb(num_samples - num_correct, j) / math.comb(num_samples, j)


def interval(values: Sequence[float], num_samples: int, level: float = 0.95) -> list[float]:
    """Two-sided interval of the mean over problems of a share in [0, 1], one value per problem,
    each of `num_samples` samples.

    Clopper and Pearson's, for as many independent samples as the problems are worth (Korn and
    Graubard 1998): between their number, if each is always right or always wrong, and that of all
    samples, if all are equally hard. It is never a point, as a bootstrap's of 0 right in 30 is.
    """
    values, count = np.asarray(values, dtype=float), len(values)
    mean, tail = float(values.mean()), (1 - level) / 2
    worth = effective_samples(values, num_samples)
    if count > 1:  # the spread of few problems is itself uncertain
        all_samples = max(2, count * num_samples)
        worth *= (student_t.ppf(tail, all_samples - 1) / student_t.ppf(tail, count - 1)) ** 2
    right = worth * mean
    low = beta.ppf(tail, right, worth - right + 1) if mean > 0 else 0.0
    high = beta.ppf(1 - tail, right + 1, worth - right) if mean < 1 else 1.0
    return [float(low), float(high)]


def effective_samples(values: np.ndarray, num_samples: int) -> float:
    """How many independent samples have the variance of the mean of these clusters.

    One more problem, of the largest spread there is, counts with those that were neither always
    right nor always wrong: a few of them seldom show how much problems differ.
    """
    count, mean = len(values), values.mean()
    if count == 1 or mean in (0, 1):
        return float(count)
    seen = min((values > 0).sum(), (values < 1).sum())
    spread = max(values.var(ddof=1) / (mean * (1 - mean)), 1 / num_samples)
    return float(count / min(1, (seen * spread + 1) / (seen + 1)))


def difference_interval(a: Sequence[float], b: Sequence[float], num_samples: int) -> list[float]:
    """95% interval of mean a - mean b on the same problems: Newcombe's of paired proportions (1998,
    method 10; MOVER), from the interval of each and their correlation over problems."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    (low_a, high_a), (low_b, high_b) = (interval(values, num_samples) for values in (a, b))
    vary = len(a) > 1 and a.std() > 0 and b.std() > 0
    correlation = float(np.corrcoef(a, b)[0, 1]) if vary else 0.0

    def reach(of_a: float, of_b: float) -> float:
        return math.sqrt(max(0.0, of_a**2 + of_b**2 - 2 * correlation * of_a * of_b))

    mean_a, mean_b = float(a.mean()), float(b.mean())
    below, above = reach(mean_a - low_a, high_b - mean_b), reach(high_a - mean_a, mean_b - low_b)
    return [mean_a - mean_b - below, mean_a - mean_b + above]


def majority_votes(verifier: Verifier, rollouts: list[Rollout], num_samples: int) -> list[float]:
    """Per problem, the probability that its most frequent answer is right, ties broken at random.

    Right answers are one candidate; wrong ones that the verifier calls equal (1/2 and 0.5) are one.
    An answer that it could not compare stands by its text; no answer is no vote.
    """
    groups = [rollouts[i : i + num_samples] for i in range(0, len(rollouts), num_samples)]
    votes = [
        Counter(
            r.verdict.answer for r in group if r.verdict.outcome in ("wrong", "timeout", "crash")
        )
        for group in groups
    ]
    comparable = [
        {r.verdict.answer for r in group if r.verdict.outcome == "wrong"} for group in groups
    ]
    pairs = [
        (n, first, second)
        for n, answers in enumerate(votes)
        for i, first in enumerate(answers)
        for second in list(answers)[i + 1 :]
        if {first, second} <= comparable[n] and compare_cheaply(first, second) is not False
    ]
    firsts, seconds = [first for _, first, _ in pairs], [second for *_, second in pairs]
    # Both ways: to an undone sum as gold answer its value is right, but not the other way round.
    one_way, back = verifier.compare(seconds, firsts), verifier.compare(firsts, seconds)
    verdicts = zip(pairs, one_way, back, strict=True)
    equal = {pair for pair, there, back in verdicts if there.correct and back.correct}
    for n, first, second in pairs:
        if (n, first, second) in equal and first in votes[n] and second in votes[n]:
            votes[n][first] += votes[n].pop(second)
    shares = []
    for group, wrong in zip(groups, votes, strict=True):
        right = sum(r.verdict.correct for r in group)
        rivals = sum(count == right for count in wrong.values())
        wins = right > 0 and right >= max(wrong.values(), default=0)
        shares.append(1 / (1 + rivals) if wins else 0.0)
    return shares


def summarise(rollouts: list[Rollout], votes: list[float], num_samples: int) -> dict[str, object]:
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
        "accuracy_interval": interval(correct.mean(1), num_samples),
        "majority": float(np.mean(votes)),
        "majority_interval": interval(votes, num_samples),
        "pass_at": {j: float(np.mean(values)) for j, values in by_problem.items()},
        "pass_at_interval": {j: interval(by_problem[j], num_samples) for j in powers},
        "generated_tokens": sum(len(rollout.completion_ids) for rollout in rollouts),
        **rollout_metrics(rollouts),
        "problems": [rollout.problem for rollout in rollouts[::num_samples]],
        "golds": [rollout.gold for rollout in rollouts[::num_samples]],
        "correct_counts": counts,
        "majority_votes": votes,
    }


def paired_difference(a: dict, b: dict) -> dict[str, tuple[float, list[float]]]:
    """Differences a - b of two results on the same problems, with intervals over problems."""
    k = a["num_samples"]
    pairs = {
        f"avg@{k}": [np.array(r["correct_counts"]) / k for r in (a, b)],
        f"maj@{k}": [np.array(r["majority_votes"]) for r in (a, b)],
    }
    return {
        name: (float(one.mean() - other.mean()), difference_interval(one, other, k))
        for name, (one, other) in pairs.items()
    }


# What says which model and where, not how it is asked: not among the settings of a result.
MAY_DIFFER = {"output_dir", "compare", "model", "benchmarks", "device", "tensor_parallel"}
MAY_DIFFER |= {"vllm_gpu_memory", "enforce_eager"}
# What --compare reads of a benchmark's results.
COMPARED = {"problems", "golds", "num_samples", "num_problems", "correct_counts", "majority_votes"}


def read_results(path: Path) -> dict:
    check(path.is_file(), f"{path} does not exist; evaluate first")
    try:
        results = json.loads(path.read_text())
        whole = isinstance(results["args"], dict)
        whole &= all(result.keys() >= COMPARED for result in results["benchmarks"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    check(whole, f"{path} is damaged or no result of evaluate.py; evaluate again")
    return results


def compare(folders: tuple[str, str]) -> None:
    """Print the paired differences of two finished runs, benchmark by benchmark, and in which other
    settings than the model the runs differ."""
    results = [read_results(Path(folder) / "results.json") for folder in folders]
    settings = [result["args"] for result in results]
    differing = [
        f"{name} ({settings[0].get(name)}, {settings[1].get(name)})"
        for name in settings[0]
        if settings[0][name] != settings[1].get(name)
    ]
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
        changed = sum(one != other for one, other in golds)
        check(changed == 0, f"{name}: {changed} problems had another gold answer in the other run")
        counts = [result[name]["num_samples"] for result in (a, b)]
        check(counts[0] == counts[1], f"{name}: {counts[0]} and {counts[1]} samples a problem")
        for measure, (value, (low, high)) in paired_difference(a[name], b[name]).items():
            print(
                f"{name} {measure}: {folders[0]} minus {folders[1]} = {100 * value:+.1f} points "
                f"[{100 * low:+.1f}, {100 * high:+.1f}] over {a[name]['num_problems']} problems"
            )


# === samples ===


def sample_benchmark(
    engine, verifier: Verifier, prompts: list[data.Prompt], args: Args, seed: tuple, path: Path
) -> list[Rollout]:
    """k graded completions per prompt. Each batch is added to `path`; what is there already from a
    run that was cut off is not sampled again, and the rest comes out as it would have."""
    per_batch = max(1, engine.batch_size // args.num_samples)
    rows = on_first_rank(lambda: kept_rows(path, len(prompts), per_batch, args.num_samples))
    starts = range(len(rows) // args.num_samples, len(prompts), per_batch)
    shown = {"total": len(prompts), "initial": starts.start, "disable": rank() > 0}
    with tqdm(desc=f"evaluate {path.stem}", **shown) as bar:
        for first in starts:
            batch, own = prompts[first : first + per_batch], (*seed, first)
            sampled = sample_and_verify(engine, verifier, batch, args.num_samples, args, own)
            new = gather([rollout.row() for rollout in sampled])
            with writing(path.parent):
                on_first_rank(lambda new=new: append_rows(path, new))
            rows += new
            bar.update(len(batch))
    return [Rollout.from_row(row) for row in rows]


def append_rows(path: Path, rows: list[dict]) -> None:
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def kept_rows(path: Path, num_prompts: int, per_batch: int, num_samples: int) -> list[dict]:
    """What a run that was cut off has left of whole batches; the rest of the file goes."""
    rows = whole_rows(path) if path.exists() else []
    done = len(rows) // num_samples
    done -= done % per_batch if done < num_prompts else 0
    rows = rows[: done * num_samples]
    write_jsonl(path, rows)
    return rows


def whole_rows(path: Path) -> list[dict]:
    """The rows before the first that was not written to its end."""
    rows = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            rows.append(json.loads(line if line.endswith("\n") else ""))
        except ValueError:
            break
    return rows


PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: .3em 0 }}
summary {{ cursor: pointer; padding: .3em 0 }}
.sample {{ border-left: 4px solid #c0392b; margin: .6em 0 .6em 1em; padding: 0 .8em }}
.sample.correct {{ border-color: #27864a }}
.sample small {{ color: #666 }}
body.correct .sample:not(.correct), body.other .sample.correct {{ display: none }}
</style>
<h1>{title}</h1>
<p>Show <select onchange="document.body.className = this.value">
<option value="">all completions<option value="correct">correct ones<option value="other">all others
</select></p>
"""


def samples_page(title: str, benchmarks: dict[str, list[Rollout]], num_samples: int) -> str:
    """One self-contained HTML page: the first 100 problems of each benchmark, every completion."""
    parts = [PAGE.format(title=html.escape(title))]
    for name, rollouts in benchmarks.items():
        shown = rollouts[: 100 * num_samples]
        count = f"{len(shown) // num_samples} of {len(rollouts) // num_samples} problems"
        parts.append(f"<h2>{html.escape(name)}: {count}</h2>\n")
        for first in range(0, len(shown), num_samples):
            group = shown[first : first + num_samples]
            right = sum(rollout.verdict.correct for rollout in group)
            parts.append(
                f"<details><summary>{right}/{num_samples} right: "
                f"{html.escape(group[0].problem)}</summary>\n<p>gold answer: "
                f"<code>{html.escape(group[0].gold)}</code></p>\n"
            )
            for rollout in group:
                verdict, length = rollout.verdict, len(rollout.completion_ids)
                end = "cut off" if rollout.finish == "length" else "ended"
                read = "" if verdict.answer is None else f", read: {html.escape(verdict.answer)}"
                parts.append(
                    f'<div class="sample {verdict.outcome}"><small>{verdict.outcome}{read}; '
                    f"{length} tokens, {end}</small><pre>{html.escape(rollout.text)}</pre></div>\n"
                )
            parts.append("</details>\n")
    return "".join(parts)


# === main ===


def main(args: Args) -> None:
    if args.compare:
        compare(args.compare)
        return
    check_ranges(args, zero_allowed=("temperature",))
    check(0 < args.top_p <= 1, f"--top_p is {args.top_p}; it must be above 0 and at most 1")
    check(len(args.benchmarks) > 0, "--benchmarks needs a value, for example toy or math500")
    stems = {Path(name).stem for name in args.benchmarks}
    check(len(stems) == len(args.benchmarks), "two --benchmarks have one file name; rename one")
    folder, device = Path(args.output_dir), join_ranks(args)
    backend = resolve_backend(args, device)
    check_lengths(args, args.model)
    tokenizer = load_tokenizer(args.model, chat_template=args.chat_template)
    prompts = {}
    for name in args.benchmarks:
        problems = data.load_evaluation_problems(name)[: args.num_problems]
        prompts[name] = data.render_prompts(tokenizer, problems, args)
        check(
            len(prompts[name]) == len(problems),
            f"{len(problems) - len(prompts[name])} prompts of {name} are over --max_prompt_tokens "
            f"{args.max_prompt_tokens}; raise it: all problems of a benchmark count",
        )
    fingerprints = {
        name: data.fingerprint(tokenizer, asked, args) for name, asked in prompts.items()
    }
    config = {"script": "evaluate", **vars(args), **on_first_rank(lambda: inputs_of(args))}
    config["template_fingerprint"] = data.template_fingerprint(tokenizer, args.thinking)
    config["fingerprints"] = fingerprints
    if rank() == 0:
        claim_folder(folder, config)
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
    results, samples, k = {}, {}, args.num_samples
    with Verifier() as verifier:
        for number, (name, asked) in enumerate(prompts.items()):
            path, seed = folder / "samples" / f"{Path(name).stem}.jsonl", (args.seed, number)
            sampled = sample_benchmark(engine, verifier, asked, args, seed, path)
            votes = on_first_rank(lambda rows=sampled: majority_votes(verifier, rows, k))
            results[name], samples[name] = summarise(sampled, votes, k), sampled
            print(describe(name, results[name]))

    if rank() == 0:
        page = samples_page(args.model, samples, k)
        with writing(folder):
            write_atomic(folder / "samples.html", page)
            settings = {k: v for k, v in vars(args).items() if k not in MAY_DIFFER}
            saved = {"model": args.model, "args": settings, "benchmarks": results}
            write_json(folder / "results.json", saved)


def describe(name: str, result: dict) -> str:
    k, (low, high) = result["num_samples"], result["accuracy_interval"]
    others = ", ".join(
        f"{outcome} {result[f'rollout/{outcome}']:.1%}"
        for outcome in ("wrong", "no_answer", "timeout", "crash", "truncated")
    )
    return (
        f"{name}: avg@{k} {result['accuracy']:.1%} [{low:.1%}, {high:.1%}] over "
        f"{result['num_problems']} problems, pass@{k} {result['pass_at'][k]:.1%}, "
        f"maj@{k} {result['majority']:.1%}; {others}; "
        f"mean length {result['rollout/length']:.0f} tokens"
    )


if __name__ == "__main__":
    start(main, Args, __doc__)
