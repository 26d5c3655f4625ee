"""The README's plot of the study, and the paired differences that docs/study.md gives beside the
claims, out of docs/study/results.json: python examples/result_plot.py"""

import json
import sys
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).parents[1]))

from toy.studies import Results, difference, mean_and_interval  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  behind the choice of a backend

STUDY = Path(__file__).parents[1] / "docs" / "study"
ROWS = {  # title in results.json -> label and colour
    "untrained student": ("untrained student", "#8c8c8c"),
    "cold: GRPO (all)": ("cold GRPO", "#d9762b"),
    "RL teacher: FKL, OPD (1H), GRPO (2H)": ("the whole route (half)", "#1f6fb4"),
    "cold: GRPO (all), flops of full": ("cold GRPO, compute of full", "#dfaf8b"),
}
DIFFERENCES = {  # of avg@16, seed by seed; every stage of half against the one before
    "half - cold": ("half/student_grpo", "cold/cold"),
    "FKL - untrained": ("half/fkl_warmup", "models/untrained_student"),
    "OPD - FKL": ("half/opd", "half/fkl_warmup"),
    "GRPO - OPD": ("half/student_grpo", "half/opd"),
    "OPD - OPD only": ("half/opd", "opd_only/opd_only"),
}


def main() -> None:
    for name, rows in DIFFERENCES.items():
        high, low = map(Results(STUDY).accuracy, rows)
        apart = difference(high, low * (len(high) if len(low) == 1 else 1))
        gains = sum(value > 0 for value in apart)
        print(f"{name}: {mean_and_interval(apart, '+')} points; gains in {gains} of {len(apart)}")

    found = {row["title"]: row for row in json.loads((STUDY / "results.json").read_bytes())["rows"]}
    figure, (accuracy, labels) = plt.subplots(
        1, 2, figsize=(7, 2.6), sharey=True, width_ratios=(3, 2), layout="constrained"
    )
    for y, (title, (_, colour)) in enumerate(ROWS.items()):
        toy, uses = found[title]["benchmarks"]["toy"], found[title]["label_uses"]
        ends = [100 * end for end in toy["over_seeds"] or ()]  # an untrained model has no seeds
        value = 100 * toy["accuracy"]
        accuracy.barh(y, value, color=colour, height=0.62)
        accuracy.plot(ends, [y] * len(ends), "k|-", markersize=8)
        accuracy.text(max([value, *ends]) + 2.5, y, f"{value:.1f}%", va="center")
        labels.barh(y, uses, color=colour, height=0.62)
        labels.text(uses + 2500, y, f"{uses:,.0f}", va="center")
    accuracy.set(title="avg@16, and 95% intervals over ten seeds", xlim=(0, 117), xticks=[])
    accuracy.set_yticks(range(len(ROWS)), [label for label, _ in ROWS.values()])
    accuracy.invert_yaxis()
    labels.set(title="label uses", xlim=(0, 127_000), xticks=[])
    for panel in (accuracy, labels):
        panel.spines[["top", "right", "bottom"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
        panel.title.set_fontsize(10)
    figure.savefig(STUDY / "result.png", dpi=200)


if __name__ == "__main__":
    main()
