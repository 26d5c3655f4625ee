"""The best length of the warmup: FKL and OPD share 40 steps; the warmup takes none to all of them.

    python -m toy.warmups                        # two students x 9 lengths x 3 seeds; resumes

Writes warmups.png: accuracy after FKL and OPD over the warmup's length, and over the student's
distance to its teacher where OPD begins, for each student.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from common.run.process import start
from toy.studies import (
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

STEPS, LENGTHS = 40, (0, 1, 2, 3, 4, 5, 10, 20, 40)
BASE = LENGTHS.index(5)  # the others are compared with it, seed by seed


@dataclass
class Args:
    output_dir: Path = Path("runs/warmups")
    """students, runs and the picture"""
    uses: tuple[float, ...] = (0.005, 0.08)
    """how often each student is tuned to begin step by step"""
    seeds: tuple[int, ...] = (131, 132, 133)
    """of every trained stage"""
    jobs: int = 2
    """stages at the same time"""


def measure(args: Args, use: float, length: int) -> list[float]:
    """Accuracy after `length` steps of FKL and the rest of OPD, in %, a number a seed."""
    student = make_student(use, args.output_dir / "students" / f"{use:g}")
    route, row, steps = "half", "half/opd", (length, STEPS - length)
    if length == 0:  # a transfer of one stage takes the steps of both
        route, row, steps = "opd_only", "opd_only/opd_only", (STEPS // 2, STEPS // 2)
    elif length == STEPS:  # the student before OPD
        row, steps = "half/fkl_warmup", (length, 1)
    preset = args.output_dir / f"warmup_{length}.json"
    warmup, opd = ({"num_steps": number} for number in steps)
    preset.write_text(json.dumps({"fkl_warmup": warmup, "opd": opd}), "utf-8")
    folder = folder_of(args, use, length)
    for other in sorted(args.output_dir.glob("use_*/results.json")):
        share_teachers(other.parent, folder)
    flags = ["--student", student, "--preset", str(preset), "--routes", route]
    return bridge(folder, args.seeds, [*flags, "--jobs", str(args.jobs)]).accuracy(row)


def folder_of(args: Args, use: float, length: int) -> Path:
    return args.output_dir / f"use_{use:g}-warmup_{length}"


def distances(args: Args, use: float, length: int) -> list[float]:
    """Return the distance to the teacher at the end of the warmup, a number a seed; without one, at
    another's start."""
    folder = folder_of(args, use, length or LENGTHS[1])
    step = -1 if length else 0
    return [distance_to_teacher(folder / f"seed_{s}" / "fkl_warmup", step) for s in args.seeds]


def main(args: Args) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    lines = []
    for use in args.uses:
        name = f"tuned to a prior of {use:.1%}"
        accuracies = [measure(args, use, length) for length in LENGTHS]
        apart = [distances(args, use, length) for length in LENGTHS]
        lines.append([f"{use:g}", *map(mean_and_interval, accuracies)])
        paired = [mean_and_interval(difference(a, accuracies[BASE]), "+") for a in accuracies]
        lines.append([f"  above {LENGTHS[BASE]}, points", *paired])
        lines.append(["  KL after it", *(f"{statistics.fmean(d):.3f}" for d in apart)])
        draw_with_interval(left, list(LENGTHS), accuracies, name)
        right.plot(sum(apart[:-1], []), sum(accuracies[:-1], []), "o", label=name)
    print(markdown(["use", *(f"{length} of {STEPS}" for length in LENGTHS)], lines))
    left.set(xlabel=f"steps of FKL warmup, of {STEPS}", ylabel="avg@16 after FKL and OPD, %")
    right.set(xscale="log", xlabel="KL to the teacher where OPD begins, nats")
    for axis in (left, right):
        axis.legend()
    figure.savefig(args.output_dir / "warmups.png", dpi=110)


if __name__ == "__main__":
    start(main, Args, __doc__)
