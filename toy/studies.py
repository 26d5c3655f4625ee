"""The common parts of the studies around bridge.py: students of other priors, runs that resume,
rows."""

import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from common.run.errors import RunFailure, check
from common.run.folder import write_json
from common.run.inputs import ROOT, hash_of_model
from common.run.process import STOP, Stopped
from common.statistics import t_interval

# No student has part in them, so that a study of several students runs them once.
TEACHERS = ("teacher_grpo", "full_teacher_grpo")


def make_student(use: float, folder: Path, shape: str = "student") -> str:
    """The shipped student, tuned to begin step by step in the share `use` of its answers; or with
    the shape "teacher" the shipped teacher, as a student of the teacher's skill."""
    student, record = folder / shape, folder / "made_of.json"
    made_of = {"use": use, shape: hash_of_model(f"toy/{shape}")}
    if not record.exists():
        run(["-m", "toy.make", "--only", shape, "--use", str(use), "--output_dir", str(folder)])
        write_json(record, made_of)
    same = json.loads(record.read_text("utf-8")) == made_of
    check(same, f"{student} was made of another toy/{shape}; choose another --output_dir")
    return str(student)


def bridge(
    folder: Path, seeds: tuple[int, ...], flags: list[str], tree: Path | None = None
) -> "Results":
    """bridge.py, without the stages that are finished. tree: this repository, or a variant of
    it."""
    run(["bridge.py", "--output_dir", str(folder), "--seeds", *map(str, seeds), *flags], tree)
    return Results(folder)


def evaluate(model: Path, folder: Path) -> float:
    """Return avg@16 of a model in %."""
    flags = ["--model", str(model), "--num_samples", "16", "--output_dir", str(folder)]
    run(["evaluate.py", *flags])
    return 100 * json.loads((folder / "results.json").read_bytes())["benchmarks"]["toy"]["accuracy"]


def variant(name: str, folder: Path) -> Path:
    """A copy of this repository's code with a diff of docs/variants, made once."""
    tree, diff = folder / "trees" / name, ROOT / "docs" / "variants" / f"{name}.diff"
    if not tree.exists():
        half = tree.with_name(f"{name}.tmp")
        shutil.rmtree(half, ignore_errors=True)
        for part in ("common", "toy", "workflow"):
            shutil.copytree(ROOT / part, half / part)
        for script in ROOT.glob("*.py"):
            shutil.copy(script, half)
        subprocess.run(["git", "apply", str(diff)], cwd=half, check=True)
        half.rename(tree)
    return tree


def run(words: list[str], tree: Path | None = None) -> None:
    """Run a script of this repository, or of a variant of it. Ctrl-C reaches it once, through the
    study, and is waited for: it saves what it has done."""
    print("python", *words, flush=True)
    command, how = [sys.executable, *words], {"start_new_session": True}
    try:
        with STOP.held():
            child = subprocess.Popen(command, cwd=tree or ROOT, stdout=subprocess.DEVNULL, **how)
        code = child.wait()
    except Stopped as stop:
        child.send_signal(stop.number)
        child.wait()
        raise
    if code:
        raise RunFailure(f"python {words[0]} ended with exit code {code}")


def share_teachers(source: Path, folder: Path) -> None:
    """Copy what a study of another student has already made of the teacher, finished or not."""
    shared = [source / "base" / "eval_raw_teacher"]
    shared += [path for name in TEACHERS for path in source.glob(f"seed_*/{name}")]
    for path in shared:
        copy = folder / path.relative_to(source)
        if path.exists() and not copy.exists():
            shutil.copytree(path, copy)


@dataclass
class Results:
    """The results that bridge.py has left in a folder."""

    folder: Path

    def read(self) -> dict:
        return json.loads((self.folder / "results.json").read_bytes())

    def accuracy(self, row: str) -> list[float]:
        """avg@k in % of a row of the report, one number a seed."""
        of_row = next(r for r in self.read()["rows"] if r["id"] == row)
        return [100 * value for value in of_row["benchmarks"]["toy"]["by_seed"].values()]


def distance_to_teacher(warmup: Path, step: int = -1) -> float:
    """Forward KL on the teacher's completions at a step of a warmup, in nats; by default at its
    end: the paper's condition C2."""
    lines = (warmup / "metrics.jsonl").read_text("utf-8").splitlines()
    return json.loads(lines[step])["policy/forward_kl"]


def difference(high: list[float], low: list[float]) -> list[float]:
    """Seed by seed."""
    return [a - b for a, b in zip(high, low, strict=True)]


def mean_and_interval(values: list[float], sign: str = "") -> str:
    """Return, for a table, the mean and its 95% interval over seeds."""
    reach = t_interval(values)
    shown = f" [{reach[0]:{sign}.1f}, {reach[1]:{sign}.1f}]" if reach else ""
    return f"{statistics.fmean(values):{sign}.1f}{shown}"


def draw_with_interval(axis, x: list[float], values: list[list[float]], label: str) -> None:
    """A line of means with 95% intervals over seeds."""
    means = [statistics.fmean(v) for v in values]
    reaches = [t_interval(v) or (mean, mean) for v, mean in zip(values, means, strict=True)]
    errors = [(high - low) / 2 for low, high in reaches]
    axis.errorbar(x, means, errors, marker="o", capsize=3, label=label)
