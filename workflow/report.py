r"""The report of a study: accuracy with two kinds of intervals, cost, claims, one figure.

bridge.py calls this at its end (alone: `python bridge.py ... --only_report`).

- Over seeds: a t-interval of the mean of independent repetitions of the whole training.
- Over problems, apart: evaluate.py's interval of each problem's accuracy, averaged over the seeds.
- A claim "A < B" is judged by the seed-level paired differences B - A (the same seed draws the same
  problems): supported or not supported if the t-interval leaves out 0, at a level that Holm's
  step-down procedure corrects for the number of claims; else undecided.
"""

import shlex
import statistics
import sys
from pathlib import Path

import numpy as np

from common.run.folder import read_json, write_atomic, write_json
from common.statistics import interval, judge, t_interval
from workflow.figure import draw
from workflow.paper_results import BENCHMARKS, CLAIMS, results_of
from workflow.routes import Evaluation

# === collect ===


def cost_of(evaluation: Evaluation) -> dict[str, float]:
    """Return what the training stages behind an evaluated model have used."""
    stages = evaluation.stage.lineage()
    done = {stage.name: stage.result() for stage in stages}
    paid = {s.name for s in stages if s.script == "grpo.py" or s.fixed_flags.get("correct_only")}
    labels: dict[str, int] = {}  # a split -> distinct problems: a seed draws one order of a split
    for stage in stages:
        if stage.name in paid:
            config = read_json(stage.folder / "config.json")
            count = min(done[stage.name]["cursor"], config["training_problems"])
            split = stage.fixed_flags["split"]
            labels[split] = max(count, labels.get(split, 0))
    student_steps, stage = 0, evaluation.stage
    while (stage := stage.trained_by(stage.fixed_flags["model"])) is not None:
        student_steps += done[stage.name]["step"]

    def total(key: str, names) -> float:
        return sum(done[name][key] for name in names)

    return {
        "distinct_labels": sum(labels.values()),
        "label_uses": total("verifier_calls", paid),
        "monitoring_calls": total("verifier_calls", done.keys() - paid),
        "student_steps": student_steps,
        "generated_tokens": total("generated_tokens", done),
        "training_flops": total("flops", done),
        "teacher_flops": total("teacher_flops", done),
        "seconds": total("seconds", done),
    }


def missed_budget(evaluation: Evaluation) -> bool:
    """Tell whether a compute-matched control came to its last step before it had used as much."""
    return any(
        stage.used()[stage.budget_flag.removeprefix("stop_at_")] < stage.budget()
        for stage in evaluation.stage.needs
        if stage.budget_flag
    )


def collect(evaluations: list[Evaluation]) -> list[dict]:
    """Return each row: accuracy by benchmark, over seeds and over problems, and the mean cost."""
    groups: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        groups.setdefault(evaluation.id, []).append(evaluation)
    rows = []
    for group in groups.values():
        first, costs = group[0], [cost_of(evaluation) for evaluation in group]
        row = {"id": first.id, "title": first.title, "route": first.route}
        row |= {key: statistics.fmean(cost[key] for cost in costs) for key in costs[0]}
        results = [evaluation.stage.result()["benchmarks"] for evaluation in group]
        row["benchmarks"] = {
            name: over_group(group, [result[name] for result in results]) for name in results[0]
        }
        rows.append(row | {"not_matched": sum(map(missed_budget, group))})
    return rows


def over_group(group: list[Evaluation], results: list[dict]) -> dict[str, object]:
    """Return one benchmark's results, of each evaluation of a row, as one."""
    k, accuracies = results[0]["num_samples"], [result["accuracy"] for result in results]
    majorities = [result["majority"] for result in results]
    rates = np.mean([np.array(result["averages"]) for result in results], axis=0)
    return {
        "num_samples": k,
        "num_problems": results[0]["num_problems"],
        "accuracy": statistics.fmean(accuracies),
        "over_seeds": None if group[0].seed is None else t_interval(accuracies),
        "over_problems": interval(rates, k * len(results)),
        "by_seed": {str(e.seed): value for e, value in zip(group, accuracies, strict=True)},
        "majority": None if None in majorities else statistics.fmean(majorities),
        "length": statistics.fmean(result["rollout/length"] for result in results),
        "truncated": statistics.fmean(result["rollout/truncated"] for result in results),
    }


def judge_claims(rows: list[dict]) -> list[dict]:
    """Judge each claim whose two rows are there, on each benchmark, by the seeds that both have."""
    by_id = {row["id"]: row for row in rows}
    asked, differences = [], []
    for claim in CLAIMS:
        low, high = by_id.get(claim.lower), by_id.get(claim.higher)
        for name in low["benchmarks"] if low and high else ():
            asked.append({"claim": claim.text + mark_of(low), "by": claim.by, "benchmark": name})
            asked[-1] |= {"lower": claim.lower, "higher": claim.higher}
            a, b = (row["benchmarks"][name]["by_seed"] for row in (low, high))
            differences.append([b[seed] - a[seed] for seed in a if seed in b])
    return [claim | verdict for claim, verdict in zip(asked, judge(differences), strict=True)]


def mark_of(row: dict) -> str:
    """Return the mark of a control that was not matched, since its bound on steps came first."""
    count = row["not_matched"]
    return f" (NOT matched in {count} seed(s): the bound on steps came first)" if count else ""


# === tables ===


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table that also reads well in a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        f"| {' | '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))} |"
        for line in (header, rule, *lines)
    )


def percent(interval: list[float] | None) -> str:
    return f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""


def accuracy_table(rows: list[dict], papers: dict[str, dict[str, float]]) -> str:
    header = ["model"]
    for name, result in rows[0]["benchmarks"].items():
        k = result["num_samples"]
        header += [f"{Path(name).stem} avg@{k}, %", "over seeds", "over problems"]
        header += ["the paper's"] if papers and name in BENCHMARKS else []
    lines = []
    for row in rows:
        cells = [row["title"] + mark_of(row)]
        for name, result in row["benchmarks"].items():
            cells.append(f"{100 * result['accuracy']:.1f}")
            cells += [percent(result["over_seeds"]), percent(result["over_problems"])]
            if papers and name in BENCHMARKS:
                cells.append(str(papers.get(row["id"], {}).get(name, "")))
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
    def cell(row: dict, key: str) -> str:
        return f"{row[key] / 1e12:,.2f}" if "flops" in key else f"{row[key]:,.0f}"

    lines = [[row["title"], *(cell(row, key) for key in COSTS)] for row in rows]
    return markdown(["model", *COSTS.values()], lines)


def claims_table(claims: list[dict]) -> str:
    header = ["claim", "by", "benchmark", "difference", "interval", "level", "p", "verdict"]
    lines = []
    for claim in claims:
        cells = [claim["claim"], claim["by"], Path(claim["benchmark"]).stem]
        cells += [f"{100 * claim['difference']:+.1f}", percent(claim["interval"])]
        cells += [f"{claim['level']:.1%}", f"{claim['p']:.1g}", claim["verdict"]]
        lines.append(cells)
    return markdown(header, lines)


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
GIVEN_NOTE = """
The RL teacher was given (--trained_teacher): what it has cost, labels above all, is not known, and
in no row.
"""
CLAIM_NOTES = """
Difference: right side minus left side, in points, mean of the seeds' paired differences, with its
interval at the level that Holm's procedure gives it; p: two-sided t-test of no difference.
"""


def setting_of(evaluations: list[Evaluation]) -> dict[str, str]:
    """Machine, versions, commit and types of the evaluations: who writes the report may be
    elsewhere."""
    configs = [read_json(e.stage.folder / "config.json") for e in evaluations]
    types = "float32 from stage to stage, computed with in "
    settings = [config["environment"] | {"weights": types + config["dtype"]} for config in configs]
    return {key: "; ".join(sorted({one[key] for one in settings})) for key in settings[0]}


def write_report(folder: Path, args, evaluations: list[Evaluation]) -> None:
    """report.md, report.png and results.json; prints the tables. args: bridge.Args."""
    rows = collect(evaluations)
    claims = judge_claims(rows)
    of_toy = args.teacher.startswith("toy/") and args.task in (None, "math")
    notes = NOTES + (TOY_NOTE if of_toy else "") + (GIVEN_NOTE if args.trained_teacher else "")
    accuracy = accuracy_table(rows, results_of(args.teacher, args.student))
    tables = f"{accuracy}\n\n{cost_table(rows)}\n{notes}"
    if claims:
        tables += f"\n{claims_table(claims)}\n{CLAIM_NOTES}"
    setting = {"command": f"python {shlex.join(sys.argv)}"} | setting_of(evaluations)
    listed = "\n".join(f"- {name}: {value}" for name, value in setting.items())
    title = f"# {args.teacher} to {args.student}, seeds {' '.join(map(str, args.seeds))}"
    write_atomic(folder / "report.md", f"{title}\n\n![results](report.png)\n\n{tables}\n{listed}\n")
    results = {"setting": setting, "args": vars(args), "rows": rows, "claims": claims}
    write_json(folder / "results.json", results)
    draw(rows, evaluations, folder / "report.png")
    print(f"\n{tables}\nreport: {folder}/report.md, report.png, results.json")
