"""Learning curves of one or several runs, side by side: one panel a metric.

python examples/curves.py runs/smollm2_grpo runs/smollm2_opd --output curves.png
"""

import json
import statistics
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
    window: int = 1
    """steps of the running mean; their own values are drawn faintly"""


def main(args: Args) -> None:
    figure, _ = plt.subplots(1, len(args.metrics), figsize=(4.5 * len(args.metrics), 3.8))
    for number, run in enumerate(args.runs):
        rows = [
            json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()
        ]
        for metric, panel in zip(args.metrics, figure.axes, strict=True):
            steps = [row["step"] for row in rows if metric in row]
            values = [row[metric] for row in rows if metric in row]
            ends = range(1, len(values) + 1)
            means = [statistics.fmean(values[max(0, end - args.window) : end]) for end in ends]
            panel.plot(steps, values, color=f"C{number}", alpha=0.25)
            panel.plot(steps, means, color=f"C{number}", label=run.name)
    for metric, panel in zip(args.metrics, figure.axes, strict=True):
        panel.set(title=metric, xlabel="step", ylim=(0, None))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="lower center", ncols=4)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(args.output, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
