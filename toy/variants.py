"""Where the diffs of docs/variants end on the toy, beside opd.py as it is.

    python -m toy.variants                       # resumes

OPD alone and after the warmup, with each variant in a copy of the tree. Then OPD alone on a student
of the teacher's own skill, the raw teacher tuned to work step by step as seldom as the toy student:
what a shift target leaves out is the skill that the student lacks.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from common.run.process import start
from toy.studies import (
    Results,
    bridge,
    evaluate,
    make_student,
    mean_and_interval,
    run,
    share_teachers,
    variant,
)
from workflow.presets import TOY, as_words
from workflow.report import markdown

PLAIN = "opd.py as it is"
VARIANTS: dict[str, dict] = {  # flags of opd.py
    PLAIN: {},
    "shift_target": {"teacher_base": "toy/teacher"},
    "progressive_horizon": {"first_horizon": 16, "horizon_growth": 2.0},
}
ROWS = {"alone": "opd_only/opd_only", "after the warmup": "half/opd"}
USE = 0.005  # of the toy student's recipe


@dataclass
class Args:
    output_dir: Path = Path("runs/variants")
    """every run, and a copy of the tree for each variant"""
    seeds: tuple[int, ...] = (151, 152, 153)
    """of every trained stage"""
    jobs: int = 2
    """stages at the same time"""


def measure(args: Args, name: str, flags: list[str], student: str = "") -> Results:
    """Run routes with a variant's opd.py, on another student if one is named."""
    root = args.output_dir.resolve()
    folder, preset = root / f"{name}{' of equal skill' if student else ''}", root / f"{name}.json"
    preset.write_text(json.dumps({"opd": VARIANTS[name]}), "utf-8")
    share_teachers(root / PLAIN, folder)
    flags = [*flags, "--preset", str(preset), "--jobs", str(args.jobs)]
    flags += ["--student", student] if student else []
    return bridge(folder, args.seeds, flags, variant(name, root) if name != PLAIN else None)


def self_distilled(args: Args, seed: int) -> float:
    """Let the student learn from itself, told the answers, as long as OPD takes. Returns avg@16."""
    root = args.output_dir.resolve()
    folder, flags = root / "self_distillation" / f"seed_{seed}", {"seed": seed, "split": "1H"}
    flags |= {name: setting.value for name, setting in TOY["opd"].items()}
    words = [word for name, value in flags.items() for word in as_words(name, value)]
    tree = variant("self_distillation", root)
    run(["opd.py", *words, "--output_dir", str(folder / "opd")], tree)
    return evaluate(folder / "opd" / "final", folder / "eval_opd")


def main(args: Args) -> None:
    root = args.output_dir.resolve()
    root.mkdir(parents=True, exist_ok=True)
    routes = ["--routes", "opd_only", "half"]
    rows = {}
    for name in VARIANTS:
        results = measure(args, name, routes)
        rows[name] = [mean_and_interval(results.accuracy(row)) for row in ROWS.values()]
    rows["self_distillation"] = [mean_and_interval([self_distilled(args, s) for s in args.seeds])]
    skilled = make_student(USE, root / "skilled", "teacher")
    for name in (PLAIN, "shift_target"):
        results = measure(args, name, ["--routes", "opd_only"], skilled)
        rows[name].append(mean_and_interval(results.accuracy(ROWS["alone"])))
    header = ["OPD", *ROWS, "alone, a student of the teacher's skill"]
    print("\n# avg@16 in %, after OPD\n")
    print(markdown(header, [[name, *row, "", ""][: len(header)] for name, row in rows.items()]))


if __name__ == "__main__":
    start(main, Args, __doc__)
