"""Where a transfer's signal goes: samples per prompt, problems, and the horizon.

    python -m toy.allocation                     # resumes; --seeds 141 for a part of it

Warmup and OPD with steps of 192 completions: 12 prompts x 16 samples, 24 x 8, 48 x 4, 192 x 1;
then GRPO. After a warmup of 12 x 16: OPD of 12 x 16, which meets 288 problems in its 24 steps; of
192 x 1 of these same 288; and with 192 x 1 of all. With 192 x 1, OPD on completions of at most 8,
16 and 32 tokens; an answer has about 48.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from common.run.errors import check
from common.run.process import start
from common.tasks.rows import read_file
from toy.studies import bridge, difference, evaluate, mean_and_interval, run, share_teachers
from workflow.presets import as_words, script_args
from workflow.report import markdown

COMPLETIONS = 192  # of a step
SAMPLES, HORIZONS = (16, 8, 4, 1), (8, 16, 32)  # and 64 tokens, the preset's
STAGES = {"FKL": "half/fkl_warmup", "OPD": "half/opd", "GRPO": "half/student_grpo"}


@dataclass
class Args:
    output_dir: Path = Path("runs/allocation")
    """every run"""
    seeds: tuple[int, ...] = (141, 142, 143, 144, 145)
    """of every trained stage"""
    jobs: int = 2
    """stages at the same time"""


def sizes(samples: int) -> dict[str, int]:
    return {"prompts_per_step": COMPLETIONS // samples, "group_size": samples}


def measure(args: Args, name: str, warmup: dict, opd: dict) -> dict[str, list[float]]:
    """Run the route `half` with these settings of its transfer. Return avg@16 after each stage, in
    %, a number a seed."""
    folder, preset = args.output_dir / name, args.output_dir / f"{name}.json"
    preset.write_text(json.dumps({"fkl_warmup": warmup, "opd": opd}), "utf-8")
    share_teachers(args.output_dir / "samples_16", folder)
    flags = ["--preset", str(preset), "--routes", "half", "--jobs", str(args.jobs)]
    results = bridge(folder, args.seeds, flags)
    return {stage: results.accuracy(row) for stage, row in STAGES.items()}


# === problems or samples? ===


def opd_again(args: Args, seed: int, of_the_same: bool) -> float:
    """OPD with 192 x 1 in place of the 12 x 16 that samples_16 has run: of the problems that it met
    there, or of all. Returns avg@16 in %."""
    there = args.output_dir / "samples_16" / f"seed_{seed}" / "opd"
    folder = args.output_dir / f"pool_{'same' if of_the_same else 'all'}" / f"seed_{seed}"
    config = json.loads((there / "config.json").read_bytes())
    flags = {name: config[name] for name in script_args("opd").__dataclass_fields__}
    flags |= sizes(1) | {"output_dir": folder / "opd"}
    if of_the_same:
        files = (there / "rollouts").glob("step_*.jsonl")
        met = {row["problem"]: row["answer"] for file in files for row in read_file(file)}
        check(len(met) == config["num_steps"] * config["prompts_per_step"], f"{there} lacks some")
        flags |= {"dataset": write_pool(met, folder.with_suffix(".jsonl")), "split": "all"}
    named = {name: value for name, value in flags.items() if value not in (None, [])}
    run(["opd.py", *(word for name, value in named.items() for word in as_words(name, value))])
    return evaluate(folder / "opd" / "final", folder / "eval_opd")


def write_pool(golds: dict[str, str], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"problem": problem, "answer": gold}) for problem, gold in golds.items()]
    path.write_text("\n".join(lines), "utf-8")
    return path


# === main ===


def main(args: Args) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    kept = {"keep_rollouts": 1000}  # opd_again reads them all
    by_samples = {n: measure(args, f"samples_{n}", sizes(n), sizes(n) | kept) for n in SAMPLES}
    print("\n# samples per prompt, in warmup and OPD: avg@16 in % after each stage\n")
    rows = [
        [f"{COMPLETIONS // n} x {n}", *map(mean_and_interval, accuracies.values())]
        for n, accuracies in by_samples.items()
    ]
    print(markdown(["prompts x samples", *STAGES], rows))

    base = by_samples[16]["OPD"]
    same, of_all = ([opd_again(args, seed, flag) for seed in args.seeds] for flag in (True, False))
    print("\n# OPD after the warmup of 12 x 16: more problems, or fewer samples of each?\n")
    named = {"12 x 16, of 288 problems": base, "192 x 1 of the same 288": same}
    rows = [
        [name, mean_and_interval(values), mean_and_interval(difference(values, base), "+")]
        for name, values in (named | {"192 x 1 of all": of_all}).items()
    ]
    print(markdown(["OPD", "avg@16, %", "above the first, points"], rows))

    by_horizon = {
        n: measure(args, f"horizon_{n}", sizes(1), sizes(1) | {"max_new_tokens": n})
        for n in HORIZONS
    }
    by_horizon[64] = by_samples[1]
    print("\n# horizon of OPD, with 192 x 1: avg@16 in % after each stage\n")
    rows = [
        [f"{n} tokens", *(mean_and_interval(accuracies[stage]) for stage in ("OPD", "GRPO"))]
        for n, accuracies in by_horizon.items()
    ]
    print(markdown(["at most", "OPD", "GRPO"], rows))


if __name__ == "__main__":
    start(main, Args, __doc__)
