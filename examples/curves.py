"""Learning curves of one or several runs, side by side: one panel a metric.

python examples/curves.py runs/smollm2_grpo runs/smollm2_opd --output curves.png
"""

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders with a metrics.jsonl"""
    output: Path = Path("curves.png")
    """the picture"""
    metrics: tuple[str, ...] = ("rollout/accuracy", "rollout/length", "policy/reverse_kl")
    """what to draw; a run without a metric has no curve of it"""


def main(args: Args) -> None:
    figure, panels = plt.subplots(1, len(args.metrics), figsize=(4.5 * len(args.metrics), 3.5))
    for run in args.runs:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for metric, panel in zip(args.metrics, figure.axes, strict=True):
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            if points:
                panel.plot(*zip(*points, strict=True), label=run.name)
    for metric, panel in zip(args.metrics, figure.axes, strict=True):
        panel.set(title=metric, xlabel="step", ylim=(0, None))
        panel.legend()
    figure.tight_layout()
    figure.savefig(args.output, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
