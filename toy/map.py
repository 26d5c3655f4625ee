"""The map of when the bridge pays: students that use the good way more or less often, and what each
route makes of them.

    python -m toy.map                            # 5 students x 5 seeds: two hours; resumes
    python -m toy.map --uses 0.02 --seeds 121    # a part of it, in the same folder

Students of one skill differ in their prior: how often they work step by step. Writes map.png (the
accuracy of each route over the prior, and bridge minus cold GRPO at equal labels, tokens and FLOPs)
and law.png: a success, that is, a right answer step by step, falls in a step of P G completions
with probability 1 - (1 - p)^(P G), so cold GRPO should see one after about 1 / (P G p) steps.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from scipy.stats import spearmanr

from common.run.process import start
from common.tasks.rows import read_file
from toy.make import is_step_by_step
from toy.studies import (
    Results,
    bridge,
    difference,
    distance_to_teacher,
    draw_with_interval,
    make_student,
    mean_and_interval,
    share_teachers,
)
from workflow.report import markdown

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  behind the choice of a backend

ROWS = {
    "cold": "cold/cold",
    "raw_teacher": "raw_teacher/raw_teacher_opd",
    "raw_then_grpo": "raw_then_grpo/raw_teacher_grpo",
    "opd_only": "opd_only/opd_only_grpo",
    "half": "half/student_grpo",
    "full": "full/full_opd",
    "cold_matched_tokens": "cold_matched_tokens/cold_matched_tokens",
    "cold_matched_flops": "cold_matched_flops/cold_matched_flops",
}
# Cold GRPO's rate is chosen for each student, on seeds of its own.
COLD_RATES, CHOICE_SEEDS = (1e-4, 2e-4, 4e-4, 8e-4), (101, 102)
DIFFERENCES = {  # of two rows that have spent the same of something; half has spent fewer FLOPs
    "labels: half - cold": ("half", "cold"),
    "tokens: full - cold": ("full", "cold_matched_tokens"),
    "FLOPs: full - cold": ("full", "cold_matched_flops"),
    "half - cold at full's FLOPs": ("half", "cold_matched_flops"),
}


@dataclass
class Args:
    output_dir: Path = Path("runs/map")
    """students, runs, and the two pictures"""
    uses: tuple[float, ...] = (0.001, 0.005, 0.02, 0.08, 0.3)
    """how often each student is tuned to begin step by step"""
    seeds: tuple[int, ...] = (121, 122, 123, 124, 125)
    """of every trained stage"""
    jobs: int = 2
    """stages at the same time"""


@dataclass
class Point:
    """A student: how often, in %, it works step by step, and does so with success; its runs."""

    prior: float
    successes: float
    folder: Path

    def accuracy(self, route: str) -> list[float]:
        return Results(self.folder).accuracy(ROWS[route])

    def difference(self, name: str) -> list[float]:
        return difference(*map(self.accuracy, DIFFERENCES[name]))


def measure(args: Args, use: float) -> Point:
    folder = args.output_dir / f"use_{use:g}"
    for other in sorted(args.output_dir.glob("use_*/results.json")):
        share_teachers(other.parent, folder)
    student = make_student(use, args.output_dir / "students" / f"{use:g}")
    flags = ["--student", student, "--jobs", str(args.jobs)]
    best = max(COLD_RATES, key=lambda rate: statistics.fmean(cold_at(rate, folder, flags)))
    print(f"use {use:g}: cold GRPO at {best:g}")
    flags += ["--preset", str(preset_of(best, folder)), "--routes", *ROWS]
    bridge(folder, args.seeds, flags)
    evaluated = folder / "base" / "eval_untrained_student" / "samples" / "toy.jsonl"
    samples = list(read_file(evaluated))
    prior = statistics.fmean(is_step_by_step(row["completion"]) for row in samples)
    return Point(100 * prior, 100 * statistics.fmean(map(is_success, samples)), folder)


def preset_of(rate: float, folder: Path) -> Path:
    """Return a file that sets cold GRPO's rate."""
    preset = folder.parent / f"cold_{rate:g}.json"
    settings = {"learning_rate": rate, "keep_rollouts": 1000}  # the law reads every step's
    preset.write_text(json.dumps({"cold_grpo": settings}), "utf-8")
    return preset


def cold_at(rate: float, folder: Path, flags: list[str]) -> list[float]:
    """Return what cold GRPO reaches at a rate, on the seeds of the choice."""
    flags = [*flags, "--preset", str(preset_of(rate, folder)), "--routes", "cold"]
    chosen = folder.with_name(f"{folder.name}-cold_{rate:g}")
    return bridge(chosen, CHOICE_SEEDS, flags).accuracy(ROWS["cold"])


def is_success(row: dict) -> bool:
    return row["reward"] > 0 and is_step_by_step(row["completion"])


# === the law ===


def success_shares(run: Path) -> list[float]:
    """Return the share of each step's completions that are a success, from the first step on."""
    number_of_steps = len((run / "metrics.jsonl").read_text("utf-8").splitlines())
    steps = [run / "rollouts" / f"step_{n}.jsonl" for n in range(1, number_of_steps + 1)]
    return [statistics.fmean(map(is_success, read_file(file))) for file in steps]


def first_above(share: float, shares: list[float]) -> int | None:
    """The number of the first step with more successes than that; None: there was none."""
    return next((number for number, s in enumerate(shares, 1) if s > share), None)


def expected_steps(successes: float, completions: int) -> float:
    """Until one of a step's completions is a success, if their share stays."""
    return 1 / (1 - (1 - successes) ** completions) if successes else float("inf")


# === pictures ===


def draw_map(points: list[Point], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    priors = [point.prior for point in points]
    for route in ("cold", "raw_teacher", "opd_only", "half"):
        draw_with_interval(left, priors, [p.accuracy(route) for p in points], route)
    for name in DIFFERENCES:
        draw_with_interval(right, priors, [p.difference(name) for p in points], name)
    left.set(ylabel="avg@16, %", ylim=(0, 100))
    right.set(ylabel="bridge minus cold GRPO, points")
    right.axhline(0, color="black", linewidth=0.8)
    for axis in (left, right):
        axis.set(xscale="log", xlabel="the untrained student works step by step, %")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def draw_law(points: list[Point], seeds: tuple[int, ...], path: Path) -> None:
    """A point a seed; of cold GRPO two: its first success, and its first step of half successes.
    Prints these steps too, and how accuracy after OPD goes with the KL after the warmup."""
    first_step = points[0].folder / f"seed_{seeds[0]}" / "cold" / "rollouts" / "step_1.jsonl"
    completions = len(list(read_file(first_step)))
    lines, pairs = [], []
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    for number, point in enumerate(points):
        after_opd = Results(point.folder).accuracy("half/opd")
        expected = expected_steps(point.successes / 100, completions)
        found: dict[float, list[int | None]] = {0.0: [], 0.5: []}
        for seed, accuracy in zip(seeds, after_opd, strict=True):
            folder, colour = point.folder / f"seed_{seed}", f"C{number}"
            shares = success_shares(folder / "cold")
            shown = min(expected, 2 * len(shares))
            for share, marker in ((0.0, "o"), (0.5, "+")):
                step = first_above(share, shares)
                found[share].append(step)
                left.plot(shown, step or len(shares), marker if step else "^", color=colour)
            distance = distance_to_teacher(folder / "fkl_warmup")
            pairs.append((distance, accuracy))
            name = f"prior {point.prior:.2g}%" if seed == seeds[0] else None
            right.plot(distance, accuracy, "o", color=colour, label=name)
        steps = [
            ", ".join(str(step or "never") for step in of_seeds) for of_seeds in found.values()
        ]
        lines.append([f"{point.prior:.2f}", f"{point.successes:.3f}", f"{expected:.1f}", *steps])
    header = ["prior, %", "p, %", "a success expected at step", "measured", "half of a step"]
    print(markdown(header, lines))
    rho, p = spearmanr(*zip(*pairs, strict=True))
    print(f"KL after the warmup and accuracy after OPD: Spearman's {rho:.2f} (p = {p:.2f})")
    ends = [1, max(left.get_xlim()[1], left.get_ylim()[1])]
    left.plot(ends, ends, color="black", linewidth=0.8)
    left.set(xscale="log", yscale="log", xlabel="steps until a success, expected from the prior")
    left.set_ylabel("measured; +: until half are successes; triangle: never")
    right.set(xlabel="KL to the teacher after the warmup, nats", ylabel="avg@16 after OPD, %")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def print_tables(points: list[Point]) -> None:
    """Print what each route makes of each student; the claims, judged for each student by
    itself."""
    lines = []
    for point in points:
        cells = [f"{point.prior:.2f}"]
        cells += [f"{statistics.fmean(point.accuracy(route)):.1f}" for route in ROWS]
        cells += [mean_and_interval(point.difference(name), "+") for name in DIFFERENCES]
        lines.append(cells)
    print(markdown(["prior, %", *ROWS, *DIFFERENCES], lines))
    judged = [Results(point.folder).read()["claims"] for point in points]
    lines = []
    for claims in zip(*judged, strict=True):
        cells = [f"{100 * claim['difference']:+.1f} {claim['verdict']}" for claim in claims]
        lines.append([claims[0]["claim"], *cells])
    print(markdown(["claim", *(f"at {point.prior:.2f}%" for point in points)], lines))


def main(args: Args) -> None:
    points = [measure(args, use) for use in args.uses]
    print_tables(points)
    draw_map(points, args.output_dir / "map.png")
    draw_law(points, args.seeds, args.output_dir / "law.png")


if __name__ == "__main__":
    start(main, Args, __doc__)
