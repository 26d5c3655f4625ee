"""When does the bridge pay? Students that use the good way more or less often, and what each route
makes of them.

    python -m toy.map                            # 5 students x 5 seeds: hours; resumes
    python -m toy.map --uses 0.02 --seeds 51     # a part of it, in the same folder

Students of one skill differ in their prior: how often they work step by step. Writes map.png (the
accuracy of each route over the prior, and bridge minus cold GRPO at equal labels, tokens and FLOPs)
and law.png: a sample of the good way falls in a step of P G completions with probability
1 - (1 - p)^(P G), so cold GRPO should discover it after about 1 / (P G p) steps.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from common.data import read_jsonl
from common.start import start
from toy.make import is_step_by_step
from toy.studies import (
    Results,
    bridge,
    difference,
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
    "opd_only": "opd_only/opd_only_grpo",
    "half": "half/student_grpo",
    "full": "full/full_opd",
    "cold_matched_tokens": "cold_matched_tokens/cold_matched_tokens",
    "cold_matched_flops": "cold_matched_flops/cold_matched_flops",
}
DIFFERENCES = {  # of two rows that have spent the same of something
    "labels: half - cold": ("half", "cold"),
    "tokens: full - cold": ("full", "cold_matched_tokens"),
    "FLOPs: full - cold": ("full", "cold_matched_flops"),
}


@dataclass
class Args:
    output_dir: Path = Path("runs/map")
    """students, runs, and the two pictures"""
    uses: tuple[float, ...] = (0.001, 0.005, 0.02, 0.08, 0.3)
    """how often each student is tuned to begin step by step"""
    seeds: tuple[int, ...] = (51, 52, 53, 54, 55)
    """of every trained stage"""
    jobs: int = 2
    """stages at the same time"""


@dataclass
class Point:
    """One student: its prior in %, as measured, and where its routes were run."""

    use: float
    prior: float
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
    flags = ["--student", student, "--jobs", str(args.jobs), "--routes", *ROWS]
    bridge(folder, args.seeds, flags)
    samples = read_jsonl(folder / "base" / "eval_untrained_student" / "samples" / "toy.jsonl")
    prior = statistics.fmean(is_step_by_step(row["completion"]) for row in samples)
    return Point(use, 100 * prior, folder)


# === the law ===


def discovery(run: Path) -> tuple[int, int, int | None]:
    """Of a cold run: its completions a step, its steps, and the first step with a rewarded
    completion that works step by step (None: it never saw one)."""
    steps = sorted((run / "rollouts").glob("step_*.jsonl"), key=lambda f: int(f.stem[5:]))
    for number, file in enumerate(steps, 1):
        rows = read_jsonl(file)
        if any(row["reward"] > 0 and is_step_by_step(row["completion"]) for row in rows):
            return len(rows), len(steps), number
    return len(rows), len(steps), None


def expected_steps(prior: float, completions: int) -> float:
    """Until one of a step's completions is of the good way, if the prior, a share, stays."""
    return 1 / (1 - (1 - prior) ** completions) if prior else float("inf")


def distance_after_warmup(run: Path) -> float:
    """Forward KL to the teacher at the end of a warmup, in nats: the paper's condition C2."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["policy/forward_kl"]


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
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    for number, point in enumerate(points):
        after_opd = Results(point.folder).accuracy("half/opd")
        for seed, accuracy in zip(seeds, after_opd, strict=True):
            folder, colour = point.folder / f"seed_{seed}", f"C{number}"
            completions, num_steps, found = discovery(folder / "cold")
            expected = min(expected_steps(point.prior / 100, completions), 2 * num_steps)
            left.plot(expected, found or num_steps, "o" if found else "^", color=colour)
            distance = distance_after_warmup(folder / "fkl_warmup")
            name = f"prior {point.prior:.2g}%" if seed == seeds[0] else None
            right.plot(distance, accuracy, "o", color=colour, label=name)
    ends = [1, max(left.get_xlim()[1], left.get_ylim()[1])]
    left.plot(ends, ends, color="black", linewidth=0.8)
    left.set(xscale="log", yscale="log", xlabel="steps until a success, expected from the prior")
    left.set_ylabel("steps until a success, measured (triangle: never)")
    right.set(xlabel="KL to the teacher after the warmup, nats", ylabel="avg@16 after OPD, %")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def print_table(points: list[Point]) -> None:
    lines = []
    for point in points:
        cells = [f"{point.prior:.2f}"]
        cells += [f"{statistics.fmean(point.accuracy(route)):.1f}" for route in ROWS]
        cells += [mean_and_interval(point.difference(name), "+") for name in DIFFERENCES]
        lines.append(cells)
    print(markdown(["prior, %", *ROWS, *DIFFERENCES], lines))


def main(args: Args) -> None:
    points = [measure(args, use) for use in args.uses]
    print_table(points)
    draw_map(points, args.output_dir / "map.png")
    draw_law(points, args.seeds, args.output_dir / "law.png")


if __name__ == "__main__":
    start(main, Args, __doc__)
