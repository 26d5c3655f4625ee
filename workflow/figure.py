"""report.png: the rows with intervals, what they cost, and what happens to the student."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np

from toy.make import is_step_by_step
from workflow.routes import ROUTES, Evaluation

UNTRAINED = "models/untrained_student"
MODELS_COLOUR = "#8c8c8c"
# How far a student has come, by the kind of its last training stage.
PHASES = ["untrained", "after warmup", "after transfer", "after GRPO"]
PHASE_OF = {"fkl_warmup": 1, "sft_transfer": 2, "opd": 2, "semi_opd": 2}
PHASE_OF |= {"student_grpo": 3, "cold_grpo": 3}
BRIDGE = ("fkl_warmup", "opd", "semi_opd")


def colour_of(route: str) -> str:
    return ROUTES[route].colour if route in ROUTES else MODELS_COLOUR


def draw(rows: list[dict], evaluations: list[Evaluation], path: Path) -> None:
    """Draw, of the first benchmark, what each stage makes of the student, in accuracy and in
    behaviour; then every model with intervals, a panel a benchmark; then costs, and the KL to the
    teacher."""
    import matplotlib  # here: half a second, and only the last process draws

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(rows[0]["benchmarks"])
    heights = [4.6, 0.8 + 0.27 * len(rows), 4.2]
    size = (6.6 * max(2, len(names)), sum(heights))
    figure = pyplot.figure(figsize=size, layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=heights)
    accuracy, behaviour = top.subplots(1, 2)
    draw_accuracy(accuracy, rows, evaluations, names[0])
    draw_behaviour(behaviour, evaluations, names[0])
    panels = middle.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        draw_routes(panel, rows, name)
    labels, flops, distance = bottom.subplots(1, 3)
    draw_cost(labels, rows, names[0], lambda row: row["label_uses"])
    labels.set_xlabel("label uses (reward calls)")
    labels.set_xscale("symlog", linthresh=5000)
    both = ("training_flops", "teacher_flops")
    draw_cost(flops, rows, names[0], lambda row: sum(row[key] for key in both) / 1e12)
    flops.set_xlabel("TFLOPs, teacher included")
    flops.set_xscale("symlog", linthresh=0.1)
    draw_distance(distance, evaluations)
    for panel in (accuracy, behaviour, *panels, labels, flops, distance):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_accuracy(panel, rows: list[dict], evaluations: list[Evaluation], name: str) -> None:
    numbers = {}
    for row in rows:
        result = row["benchmarks"][name]
        low, high = result["over_seeds"] or result["over_problems"]
        numbers[row["id"]] = tuple(100 * v for v in (result["accuracy"], low, high))
    draw_stages(panel, evaluations, numbers)
    k = rows[0]["benchmarks"][name]["num_samples"]
    panel.set_ylabel(f"avg@{k} on {Path(name).stem}, %")
    panel.set_title("What each stage makes of the student (teachers dotted)", fontsize=11)


def draw_behaviour(panel, evaluations: list[Evaluation], name: str) -> None:
    """C1: what the reward has taught the teacher and what arrives in the student."""
    listed: dict[str, list[float]] = {}
    for evaluation in evaluations:
        listed.setdefault(evaluation.id, []).append(behaviour_of(evaluation, name))
    means = {row: statistics.fmean(values) for row, values in listed.items()}
    draw_stages(panel, evaluations, {row: (mean, mean, mean) for row, mean in means.items()})
    panel.set_ylabel("works step by step, %" if name == "toy" else "mean length, tokens")
    panel.set_title("C1: what the teachers have learned reaches the students", fontsize=11)


def draw_stages(panel, evaluations: list[Evaluation], numbers: dict[str, tuple]) -> None:
    """Draw each route as a line through its stages, each teacher as a dotted line. numbers: of each
    row of the report, a mean and its interval's ends."""
    of_row = {evaluation.id: evaluation for evaluation in evaluations}
    teachers = [row for row in of_row if of_row[row].route == "models" and row != UNTRAINED]
    last = -9.0
    for row in sorted(teachers, key=numbers.get):
        height = numbers[row][0]
        panel.axhline(height, color=MODELS_COLOUR, linewidth=0.8, linestyle=":")
        last = max(height, last + 3)  # else the names would overlap
        panel.text(3.15, last + 0.3, of_row[row].title, fontsize=7, color="#5c5c5c")
    routes = list(dict.fromkeys(e.route for e in evaluations if e.route in ROUTES))
    for place, route in enumerate(routes):
        rows = [row for row in of_row if of_row[row].route == route]
        shift = 0.03 * (place - (len(routes) - 1) / 2)  # intervals stand side by side
        x = [PHASE_OF[of_row[row].stage.needs[0].kind] + shift for row in rows]
        means, low, high = np.array([numbers[row] for row in (UNTRAINED, *rows)]).T
        reach = np.clip([means - low, high - means], 0, None)
        line = {"color": colour_of(route), "label": route, "alpha": 0.85, "capsize": 2.5}
        panel.errorbar([0, *x], means, reach, fmt="o-", **line)
    panel.set_xticks(range(4), PHASES)
    panel.set_xlim(-0.2, 3.9)
    panel.legend(fontsize=7)


def draw_routes(panel, rows: list[dict], name: str) -> None:
    for y, row in enumerate(rows):
        result = row["benchmarks"][name]
        value = 100 * result["accuracy"]
        low, high = (100 * v for v in result["over_seeds"] or result["over_problems"])
        errors = [[max(0.0, value - low)], [max(0.0, high - value)]]
        bar = {"color": colour_of(row["route"]), "height": 0.66, "capsize": 2.5}
        panel.barh(y, value, xerr=errors, **bar)
        by_seed = [100 * v for v in result["by_seed"].values()]
        if len(by_seed) > 1:
            panel.plot(by_seed, [y] * len(by_seed), "k.", markersize=3, alpha=0.45)
        end = max(high, *by_seed)
        panel.text(end + 1.5, y, f"{value:.1f}", va="center", fontsize=8)
    panel.set_xlim(0, 112)
    panel.set_xticks(range(0, 101, 20))
    over = "seeds (dots)" if any(r["benchmarks"][name]["over_seeds"] for r in rows) else "problems"
    panel.set_title(f"avg@{result['num_samples']} on {Path(name).stem}, %, 95% over {over}")
    panel.set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=9)
    panel.invert_yaxis()


def draw_cost(panel, rows: list[dict], name: str, cost: Callable[[dict], float]) -> None:
    """Draw each route as a line through its stages."""
    start = next(row for row in rows if row["id"] == UNTRAINED)
    for route in dict.fromkeys(row["route"] for row in rows if row["route"] in ROUTES):
        points = [start] + [row for row in rows if row["route"] == route]
        x = [cost(row) for row in points]
        y = [100 * row["benchmarks"][name]["accuracy"] for row in points]
        panel.plot(x, y, "-", color=colour_of(route), linewidth=1, alpha=0.5)
        panel.plot(x[1:], y[1:], "o", color=colour_of(route), markersize=6, label=route)
    panel.set_ylabel(f"avg@{start['benchmarks'][name]['num_samples']}, %")
    panel.legend(fontsize=7, loc="upper left")


def draw_distance(panel, evaluations: list[Evaluation]) -> None:
    """C2: KL(student || teacher) at each student step, mean over seeds."""
    curves: dict[str, dict[int, list[float]]] = {}  # route -> seed -> curve of its longest student
    for evaluation in evaluations:
        stages = [s for s in evaluation.stage.lineage() if s.kind in BRIDGE]
        if stages and evaluation.route not in ("models", "replay"):
            logs = [(stage.folder / "metrics.jsonl").read_text("utf-8") for stage in stages]
            lines = [line for log in logs for line in log.splitlines()]
            curve = [json.loads(line)["policy/reverse_kl"] for line in lines]
            by_seed = curves.setdefault(evaluation.route, {})
            by_seed[evaluation.seed] = max(by_seed.get(evaluation.seed, []), curve, key=len)
    for route, by_seed in curves.items():
        shortest = min(map(len, by_seed.values()))
        mean = np.mean([curve[:shortest] for curve in by_seed.values()], axis=0)
        panel.plot(range(1, shortest + 1), mean, color=colour_of(route), label=route)
    panel.set_yscale("log")
    panel.set_xlabel("student step, FKL warmup then OPD")
    panel.set_ylabel("KL(student ‖ teacher), nats a token")
    panel.set_title("C2: the student comes near its teacher", fontsize=11)
    panel.legend(fontsize=7)


def behaviour_of(evaluation: Evaluation, name: str) -> float:
    """Return, on the toy, the % of completions that work step by step; else their mean length in
    tokens."""
    if name != "toy":
        return evaluation.stage.result()["benchmarks"][name]["rollout/length"]
    lines = (evaluation.stage.folder / "samples" / "toy.jsonl").read_text("utf-8").splitlines()
    return 100 * statistics.fmean(is_step_by_step(json.loads(line)["completion"]) for line in lines)
