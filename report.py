r"""What a study's report says: accuracy with two kinds of intervals, cost, claims, one figure.

bridge.py calls this at its end (alone: `python bridge.py ... --only_report`).

- Over seeds: a t-interval of the mean of independent repetitions of the whole training. (A
  percentile bootstrap of ten seeds would be far too narrow.)
- Over problems, apart: evaluate.py's interval of each problem's accuracy, averaged over the seeds.
- A claim "A < B" is judged by the seed-level paired differences B - A (the same seed draws the same
  problems): supported or not supported if the t-interval leaves out 0, at a level that Holm's
  step-down procedure corrects for the number of claims; else undecided.
"""

import json
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import t as student_t

from common.run import write_atomic, write_json
from evaluate import interval


@dataclass
class Evaluation:
    """One evaluated model: the result of `stage` (bridge.Stage); seed None: nothing trained it."""

    title: str
    route: str
    seed: int | None
    stage: object


@dataclass(frozen=True)
class Claim:
    """`lower` < `higher`, two titles of evaluations."""

    text: str
    lower: str
    higher: str
    by: str  # who says so


COLD = "cold: GRPO (all)"
FULL = "RL teacher: FKL, OPD (all)"
HALF = "RL teacher: FKL, OPD (1H), GRPO (2H)"
CLAIMS = (
    Claim("raw-teacher bridge < cold GRPO", "raw teacher: FKL, OPD (all)", COLD, "paper"),
    Claim("cold GRPO < RL-teacher bridge", COLD, FULL, "paper"),
    Claim("SFT < OPD only, on 1H", "RL teacher: SFT (1H)", "RL teacher: OPD (1H)", "paper"),
    Claim(
        "OPD only < FKL, OPD, on 1H", "RL teacher: OPD (1H)", "RL teacher: FKL, OPD (1H)", "paper"
    ),
    Claim(
        "SFT < OPD only, then GRPO on 2H",
        "RL teacher: SFT (1H), GRPO (2H)",
        "RL teacher: OPD (1H), GRPO (2H)",
        "paper",
    ),
    Claim("OPD only < FKL, OPD, then GRPO on 2H", "RL teacher: OPD (1H), GRPO (2H)", HALF, "paper"),
    Claim("replay of 1H < new labels 2H", "RL teacher: FKL, OPD (1H), GRPO (1H)", HALF, "paper"),
    Claim(
        "cold GRPO < bridge from it (same size)",
        COLD,
        "RL student as teacher: FKL, OPD (all)",
        "paper, as no worse",
    ),
    Claim(
        "cold GRPO at equal tokens < RL-teacher bridge",
        "cold: GRPO (all), tokens of full",
        FULL,
        "control of ours",
    ),
    Claim(
        "cold GRPO at equal FLOPs < RL-teacher bridge",
        "cold: GRPO (all), flops of full",
        FULL,
        "control of ours",
    ),
)

# arXiv 2605.12483, student Qwen3-1.7B: teacher -> title -> avg@16 on MATH-500, AIME 2024 and 2025.
PAPER_BENCHMARKS = ("math500", "aime24", "aime25")
PAPER = {
    "Qwen3-8B": {
        "RL teacher (all)": (88.4, 47.7, 36.7),
        COLD: (75.9, 19.8, 17.1),
        FULL: (79.3, 25.2, 20.2),
        "RL teacher: FKL, OPD (1H)": (75.4, 22.0, 16.7),
        HALF: (78.5, 23.7, 18.5),
        "RL teacher: FKL, OPD (1H), GRPO (1H)": (75.7, 21.6, 17.0),
        "RL teacher: SFT (1H), GRPO (2H)": (77.3,),
        "RL teacher: OPD (1H), GRPO (2H)": (77.8,),
        "SFT teacher: FKL, OPD (1H)": (74.3, 21.8, 14.5),
        "SFT teacher: FKL, OPD (1H), GRPO (2H)": (77.2, 22.9, 18.4),
        "raw teacher: FKL, OPD (all)": (71.5, 15.0, 10.6),
        "RL student as teacher: FKL, OPD (all)": (76.5, 20.6, 17.1),
    },
    "Qwen3-14B": {
        "RL teacher (all)": (89.5, 47.1, 39.0),
        COLD: (75.9, 19.8, 17.1),
        FULL: (78.6, 24.6, 20.8),
        "RL teacher: FKL, OPD (1H)": (76.3, 22.7, 17.3),
        HALF: (78.7, 23.1, 19.2),
        "RL teacher: FKL, OPD (1H), GRPO (1H)": (75.6, 22.4, 17.6),
        "RL teacher: SFT (1H), GRPO (2H)": (77.2,),
        "RL teacher: OPD (1H), GRPO (2H)": (77.5,),
        "SFT teacher: FKL, OPD (1H)": (75.8, 22.0, 15.1),
        "SFT teacher: FKL, OPD (1H), GRPO (2H)": (76.9, 23.2, 18.6),
        "raw teacher: FKL, OPD (all)": (72.8, 16.7, 13.5),
        "RL student as teacher: FKL, OPD (all)": (76.5, 20.6, 17.1),
    },
}


# === statistics ===


def t_interval(values: list[float], level: float = 0.95) -> list[float] | None:
    """Two-sided interval of the mean of independent repetitions; None of a single one, and of
    values that do not differ."""
    if len(set(values)) < 2:
        return None
    error = statistics.stdev(values) / len(values) ** 0.5
    reach = student_t.ppf(0.5 + level / 2, len(values) - 1) * error
    mean = statistics.fmean(values)
    return [mean - reach, mean + reach]


def t_test(values: list[float]) -> float:
    """Two-sided p of a mean of 0; 1 of a single value, and of values that do not differ: their
    spread is not known to be 0."""
    if len(set(values)) < 2:
        return 1.0
    error, mean = statistics.stdev(values) / len(values) ** 0.5, statistics.fmean(values)
    return float(2 * student_t.sf(abs(mean) / error, len(values) - 1))


def judge(differences: list[list[float]], alpha: float = 0.05) -> list[dict[str, object]]:
    """Holm's procedure over claims that are each a list of seed-level differences, better when
    positive. The m claims are tested in order of p at alpha / m, alpha / (m - 1), ... until one
    fails. Returns mean, interval at the claim's own level, p and verdict, in the given order."""
    order = sorted(range(len(differences)), key=lambda i: t_test(differences[i]))
    results, going_on = {}, True
    for rank, i in enumerate(order):
        values = differences[i]
        mean, p = statistics.fmean(values), t_test(values)
        if going_on:  # after the first failure the level stays, so that intervals hold 0
            level = alpha / (len(order) - rank)
            going_on = p < level
        verdict = ("supported" if mean > 0 else "not supported") if going_on else "undecided"
        if len(values) > 1 and len(set(values)) == 1:
            verdict = "no verdict: the seeds do not differ"
        results[i] = {"difference": mean, "interval": t_interval(values, 1 - level)}
        results[i] |= {"level": 1 - level}
        results[i] |= {"p": p, "num_seeds": len(values), "verdict": verdict}
    return [results[i] for i in range(len(differences))]


# === collect ===


def cost_of(evaluation: Evaluation) -> dict[str, float]:
    """What the training stages behind an evaluated model have used."""
    stages = evaluation.stage.behind()
    done = {stage.name: json.loads(stage.manifest.read_text()) for stage in stages}
    paid = {s.name for s in stages if s.script == "grpo.py" or s.flags.get("correct_only")}
    seen: dict[str, int] = {}  # a split -> distinct problems: one seed draws one order of a split
    for stage in stages:
        if stage.name in paid:
            config = json.loads((stage.folder / "config.json").read_text())
            count = min(done[stage.name]["cursor"], config["num_problems"])
            split = stage.flags["split"]
            seen[split] = max(count, seen.get(split, 0))
    student_steps, stage = 0, next(iter(evaluation.stage.needs), None)
    while stage is not None:
        student_steps += done[stage.name]["step"]
        stage = next((s for s in stage.needs if s.final == stage.flags["model"]), None)

    def total(key: str, names) -> float:
        return sum(done[name][key] for name in names)

    return {
        "distinct_labels": sum(seen.values()),
        "label_uses": total("verifier_calls", paid),
        "monitoring_calls": total("verifier_calls", done.keys() - paid),
        "student_steps": student_steps,
        "generated_tokens": total("generated_tokens", done),
        "training_flops": total("flops", done),
        "teacher_flops": total("teacher_flops", done),
        "seconds": total("seconds", done),
    }


def missed_budget(evaluation: Evaluation) -> bool:
    """Whether a compute-matched control came to its last step before it had used as much."""
    for stage in evaluation.stage.needs:
        if stage.budget:
            done, flag = json.loads(stage.manifest.read_text()), stage.budget[0]
            used = {"stop_at_tokens": done["generated_tokens"]}
            used["stop_at_flops"] = done["flops"] + done["teacher_flops"]
            return used[flag] < stage.flags[flag]
    return False


def collect(evaluations: list[Evaluation]) -> list[dict]:
    """One row a title: accuracy by benchmark, over seeds and over problems, and the mean cost."""
    by_title: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        by_title.setdefault(evaluation.title, []).append(evaluation)
    rows = []
    for title, group in by_title.items():
        results = [json.loads(e.stage.manifest.read_text())["benchmarks"] for e in group]
        costs = [cost_of(evaluation) for evaluation in group]
        benchmarks = {}
        for name, first in results[0].items():
            k, each = first["num_samples"], [result[name]["accuracy"] for result in results]
            rates = np.mean([np.array(r[name]["correct_counts"]) / k for r in results], axis=0)
            trained = group[0].seed is not None
            benchmarks[name] = {
                "num_samples": k,
                "num_problems": first["num_problems"],
                "accuracy": statistics.fmean(each),
                "over_seeds": t_interval(each) if trained else None,
                "over_problems": interval(rates, k * len(results)),
                "by_seed": {str(e.seed): value for e, value in zip(group, each, strict=True)},
                "majority": statistics.fmean(r[name]["majority"] for r in results),
                "length": statistics.fmean(r[name]["rollout/length"] for r in results),
                "truncated": statistics.fmean(r[name]["rollout/truncated"] for r in results),
            }
        cost = {key: statistics.fmean(c[key] for c in costs) for key in costs[0]}
        row = {"title": title, "route": group[0].route, **cost, "benchmarks": benchmarks}
        rows.append(row | {"not_matched": sum(map(missed_budget, group))})
    return rows


def judge_claims(rows: list[dict]) -> list[dict]:
    """Each claim whose two rows are there, on each benchmark, by the seeds that both have."""
    by_title = {row["title"]: row["benchmarks"] for row in rows}
    marks = {row["title"]: mark_of(row) for row in rows}
    asked = [
        {"claim": claim.text + marks[claim.lower], "by": claim.by, "benchmark": name}
        | {"lower": claim.lower, "higher": claim.higher}
        for claim in CLAIMS
        if claim.lower in by_title and claim.higher in by_title
        for name in by_title[claim.lower]
    ]
    differences = []
    for item in asked:
        low, high = (by_title[item[k]][item["benchmark"]]["by_seed"] for k in ("lower", "higher"))
        differences.append([high[seed] - low[seed] for seed in low if seed in high])
    return [item | result for item, result in zip(asked, judge(differences), strict=True)]


def mark_of(row: dict) -> str:
    """Of a control that is none, since its bound on steps came first."""
    count = row["not_matched"]
    return f" (NOT matched in {count} seed(s): the bound on steps came first)" if count else ""


# === tables ===


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table that also reads well in a terminal."""
    lines = [header, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def span(interval: list[float] | None, scale: float = 100, digits: int = 1) -> str:
    if interval is None:
        return ""
    low, high = (f"{scale * value:.{digits}f}" for value in interval)
    return f"[{low}, {high}]"


def accuracy_table(rows: list[dict], paper: dict[str, tuple]) -> str:
    names = list(rows[0]["benchmarks"])
    header = ["model"]
    for name in names:
        k = rows[0]["benchmarks"][name]["num_samples"]
        header += [f"{Path(name).stem} avg@{k}, %", "over seeds", "over problems"]
        header += ["the paper's"] if paper and name in PAPER_BENCHMARKS else []
    lines = []
    for row in rows:
        cells = [row["title"] + mark_of(row)]
        for name in names:
            result = row["benchmarks"][name]
            cells.append(f"{100 * result['accuracy']:.1f}")
            cells += [span(result["over_seeds"]), span(result["over_problems"])]
            if paper and name in PAPER_BENCHMARKS:
                values = dict(zip(PAPER_BENCHMARKS, paper.get(row["title"], ()), strict=False))
                cells.append(str(values.get(name, "")))
        lines.append(cells)
    return markdown(header, lines)


COSTS = {
    "distinct_labels": "distinct labels",
    "label_uses": "label uses",
    "monitoring_calls": "monitoring",
    "student_steps": "student steps",
    "generated_tokens": "generated tokens",
    "training_flops": "training TFLOPs",
    "teacher_flops": "teacher TFLOPs",
    "seconds": "seconds",
}


def cost_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        cells = [row["title"]]
        for key in COSTS:
            cells.append(f"{row[key] / 1e12:,.2f}" if "flops" in key else f"{row[key]:,.0f}")
        lines.append(cells)
    return markdown(["model", *COSTS.values()], lines)


def claims_table(claims: list[dict]) -> str:
    header = ["claim", "by", "benchmark", "difference", "interval", "level", "p", "verdict"]
    lines = [
        [
            *(claim["claim"], claim["by"], Path(claim["benchmark"]).stem),
            f"{100 * claim['difference']:+.1f}",
            span(claim["interval"]),
            f"{claim['level']:.1%}",
            f"{claim['p']:.1g}",
            claim["verdict"],
        ]
        for claim in claims
    ]
    return markdown(header, lines)


# === figure ===

COLOURS = {
    "models": "#8c8c8c",
    "cold": "#d9762b",
    "cold_matched_tokens": "#e39a5f",
    "cold_matched_flops": "#edbe98",
    "full": "#11457e",
    "half": "#1f6fb4",
    "replay": "#6aa6d8",
    "sft_transfer": "#2f8f5b",
    "opd_only": "#86bf6a",
    "sft_teacher": "#8057a8",
    "raw_teacher": "#b03a48",
    "same_size": "#c7a423",
}


def draw(rows: list[dict], evaluations: list[Evaluation], path: Path) -> None:
    """Routes with intervals, one panel a benchmark; then, of the first benchmark, accuracy against
    label uses and FLOPs, the KL to the teacher through the student's stages, and its behaviour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(rows[0]["benchmarks"])
    columns = max(2, len(names))
    heights = [0.8 + 0.27 * len(rows), 4.2, 4.2]
    figure = pyplot.figure(figsize=(6.6 * columns, sum(heights)), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=heights)
    panels = top.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        draw_routes(panel, rows, name)
    labels, flops = middle.subplots(1, 2, sharey=True)
    draw_cost(labels, rows, names[0], lambda row: row["label_uses"], "label uses (reward calls)")
    draw_cost(
        flops,
        rows,
        names[0],
        lambda row: (row["training_flops"] + row["teacher_flops"]) / 1e12,
        "TFLOPs, teacher included",
    )
    labels.set_xscale("symlog", linthresh=5000)
    flops.set_xscale("symlog", linthresh=0.1)
    distance, behaviour = bottom.subplots(1, 2)
    draw_distance(distance, evaluations)
    draw_behaviour(behaviour, evaluations, names[0])
    for panel in (*panels, labels, flops, distance, behaviour):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_routes(panel, rows: list[dict], name: str) -> None:
    for y, row in enumerate(rows):
        result = row["benchmarks"][name]
        value = 100 * result["accuracy"]
        low, high = (100 * v for v in result["over_seeds"] or result["over_problems"])
        errors = [[max(0.0, value - low)], [max(0.0, high - value)]]
        colour = COLOURS[row["route"]]
        panel.barh(y, value, xerr=errors, color=colour, height=0.66, capsize=2.5)
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


def draw_cost(panel, rows: list[dict], name: str, cost, label: str) -> None:
    """Each route as a line through its stages."""
    start = next(row for row in rows if row["title"] == "untrained student")
    for route in dict.fromkeys(row["route"] for row in rows if row["route"] != "models"):
        points = [start] + [row for row in rows if row["route"] == route]
        x = [cost(row) for row in points]
        y = [100 * row["benchmarks"][name]["accuracy"] for row in points]
        panel.plot(x, y, "-", color=COLOURS[route], linewidth=1, alpha=0.5)
        panel.plot(x[1:], y[1:], "o", color=COLOURS[route], markersize=6, label=route)
    panel.set_xlabel(label)
    panel.set_ylabel(f"avg@{start['benchmarks'][name]['num_samples']}, %")
    panel.legend(fontsize=7, loc="upper left")


def draw_distance(panel, evaluations: list[Evaluation]) -> None:
    """C2: KL(student || teacher) at each student step, mean over seeds."""
    ends: dict[str, list[list[float]]] = {}
    for evaluation in evaluations:
        stages = [s for s in evaluation.stage.behind() if s.kind in ("fkl_warmup", "opd")]
        if stages and evaluation.route not in ("models", "replay"):
            rows = [
                json.loads(line)
                for stage in stages
                for line in (stage.folder / "metrics.jsonl").read_text().splitlines()
            ]
            curve = [row["policy/reverse_kl"] for row in rows]
            known = ends.setdefault(evaluation.route, {})
            known[evaluation.seed] = max(known.get(evaluation.seed, []), curve, key=len)
    for route, curves in ends.items():
        shortest = min(map(len, curves.values()))
        mean = np.mean([curve[:shortest] for curve in curves.values()], axis=0)
        panel.plot(range(1, shortest + 1), mean, color=COLOURS[route], label=route)
    panel.set_yscale("log")
    panel.set_xlabel("student step (FKL warmup on the teacher's rollouts, then OPD on its own)")
    panel.set_ylabel("KL(student ‖ teacher), nats a token")
    panel.set_title("C2: the student comes near its teacher", fontsize=11)
    panel.legend(fontsize=7)


def draw_behaviour(panel, evaluations: list[Evaluation], name: str) -> None:
    """C1: what the reward has taught the teacher and what arrives in the student."""
    from toy.make import is_step_by_step

    toy = name == "toy"
    values: dict[str, dict[str, list[float]]] = {}
    for e in evaluations:
        if toy:
            path = e.stage.folder / "samples" / f"{name}.jsonl"
            rows = [json.loads(line)["completion"] for line in path.read_text().splitlines()]
            value = 100 * statistics.fmean(map(is_step_by_step, rows))
        else:
            manifest = json.loads(e.stage.manifest.read_text())
            value = manifest["benchmarks"][name]["rollout/length"]
        values.setdefault(e.route, {}).setdefault(e.title, []).append(value)
    for route, titles in values.items():
        means = [statistics.fmean(listed) for listed in titles.values()]
        if route == "models":
            teachers = sorted((m, t) for m, t in zip(means, titles, strict=True) if "teacher" in t)
            for i, (mean, title) in enumerate(teachers):
                panel.axhline(mean, color="#8c8c8c", linewidth=0.8, linestyle=":")
                near = i > 0 and mean - teachers[i - 1][0] < 3  # else the names would overlap
                panel.text(3.08, mean + (2.5 if near else 0), title, fontsize=7, color="#5c5c5c")
        else:
            start = statistics.fmean(values["models"]["untrained student"])
            stages = [0] + [title_stage(title) for title in titles]
            panel.plot(stages, [start, *means], "o-", color=COLOURS[route], label=route, alpha=0.85)
    panel.set_xticks(range(4), ["untrained", "after warmup", "after transfer", "after GRPO"])
    panel.set_xlim(-0.2, 3.9)
    panel.set_ylabel("works step by step, %" if toy else "mean completion length, tokens")
    panel.set_title("C1: what the teachers (dotted) have learned reaches the students", fontsize=11)
    panel.legend(fontsize=7)


def title_stage(title: str) -> int:
    """How far a student has come: 1 warmup, 2 transfer, 3 GRPO."""
    if "GRPO (" in title:
        return 3
    return 1 if title.endswith(("FKL (1H)", "FKL (all)")) else 2


# === the report ===

NOTES = """
Over seeds: t-intervals of repeated training, problems held fixed; over problems: intervals of
clustered shares, seeds held fixed; 95% each. Label uses: completions whose verdict was a reward or
a filter; monitoring: verdicts that were only logged. Student steps: rollout steps of the student's
stages. FLOPs are counted from the lengths of the sequences: matrix products of sampling, of updates
and of frozen models; what checkpointed activations compute again is left out. Costs are of all
training stages behind a row, means over seeds, evaluation left out.
"""
TOY_NOTE = """
The toy is built so that the paper's premise holds: it illustrates the mechanism, it is no evidence
for the paper at scale.
"""
CLAIM_NOTES = """
Difference: right side minus left side, in points, mean of the seeds' paired differences, with its
interval at the level that Holm's procedure gives it; p: two-sided t-test of no difference.
"""


def setting_of(evaluations: list[Evaluation]) -> dict[str, str]:
    """Machine, versions and commit of the evaluations: who writes the report may be elsewhere."""
    configs = [json.loads((e.stage.folder / "config.json").read_text()) for e in evaluations]
    every = [config["environment"] for config in configs]
    return {name: "; ".join(sorted({one[name] for one in every})) for name in every[0]}


def write_report(folder: Path, args, evaluations: list[Evaluation]) -> None:
    """report.md, report.png and results.json; prints the tables."""
    rows = collect(evaluations)
    claims = judge_claims(rows)
    qwen = Path(args.student).name == "Qwen3-1.7B"
    paper = PAPER.get(Path(args.teacher).name, {}) if qwen else {}
    notes = NOTES + (TOY_NOTE if args.teacher.startswith("toy/") else "")
    tables = f"{accuracy_table(rows, paper)}\n\n{cost_table(rows)}\n{notes}"
    if claims:
        tables += f"\n{claims_table(claims)}\n{CLAIM_NOTES}"
    setting = {"command": f"python {shlex.join(sys.argv)}"} | setting_of(evaluations)
    listed = "\n".join(f"- {name}: {value}" for name, value in setting.items())
    seeds = " ".join(map(str, args.seeds))
    title = f"# {args.teacher} to {args.student}, seeds {seeds}"
    write_atomic(folder / "report.md", f"{title}\n\n![results](report.png)\n\n{tables}\n{listed}\n")
    results = {"setting": setting, "args": vars(args), "rows": rows, "claims": claims}
    write_json(folder / "results.json", results)
    draw(rows, evaluations, folder / "report.png")
    print(f"\n{tables}\nreport: {folder}/report.md, report.png, results.json")
