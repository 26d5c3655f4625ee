"""Check the verdicts of the math task against labelled answers of other projects.

python -m benchmarks.check_labelled FILE.jsonl ...       # rows of gold, pred and expected
"""

import json
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from common.run.inputs import task_path
from common.tasks.math import extract_answer
from common.tasks.pool import WorkerPool
from common.tasks.worker import answering_part

FILE = task_path("math")
_FORMULA = re.compile(r"\$\$([^$]+)\$\$|(?<!\\)\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_FIGURES = re.compile(r"(?<!\w)-?\d[\d,.]*[^\s.,\])]*")
_LATEX_WORDS = re.compile(r"\\[A-Za-z]+\s*\{[^{}]*\}")


@dataclass
class Args:
    files: tyro.conf.Positional[tuple[Path, ...]]
    """.jsonl files of rows with gold, pred and expected (1 right, 0 wrong)"""
    show: Literal["fn", "fp"] | None = None
    """print the false negatives or the false positives instead of the counts"""
    marker: str | None = None
    """what begins the line of the answer, instead of Answer:"""


def main(args: Args) -> None:
    """Print verdicts against labels."""
    reports, wrong = [], []
    pool = WorkerPool(FILE)
    pool.call("is_right", [["x+1", "1+x"]] * 2)  # start-up is not timed
    for path in args.files:
        report, wrong_of_file = check_file(pool, path, args.marker)
        reports.append(report)
        wrong += [row for kind, row in wrong_of_file if kind == args.show]
    pool.close()
    print(json.dumps(wrong if args.show else reports, indent=1))


def judge(
    pool: WorkerPool, texts: list[str], golds: list[str], marker: str | None = None
) -> list[tuple[str, str | None]]:
    """(outcome, answer) of each text. Labelled rows hold bare answers and sentences."""
    answers = [said_answer(answering_part(text), marker) for text in texts]
    said = [said_answer if "answer is" in g or r"\\boxed" in g else extract_answer for g in golds]
    golds = [read(gold) or gold for read, gold in zip(said, golds, strict=True)]
    asked = [i for i, answer in enumerate(answers) if answer is not None]
    # The verdict is measured, not the machine: a busy one takes seconds for what needs one tenth.
    replies = pool.call("is_right", [[answers[i], golds[i]] for i in asked], patience=10)
    outcomes = dict.fromkeys(range(len(texts)), "no_answer")
    for i, reply in zip(asked, replies, strict=True):
        kinds = {"timeout": "timeout", "error": "crash", "died": "crash"}
        outcomes[i] = kinds.get(reply.kind) or ("correct" if reply.value else "wrong")
    return [(outcomes[i], answer) for i, answer in enumerate(answers)]


def said_answer(text: str, marker: str | None = None) -> str | None:
    """Return the answer of a text that need not mark it: of a sentence at its end the last formula
    or number; else the text."""
    if r"\\boxed" in text:
        text = text.replace("\\\\", "\\")  # escaped twice
    if marker is not None:
        text = text.replace(marker, "Answer:")
    if re.search(r"\\(?:boxed|fbox)\b", text):
        return extract_answer(text)
    text = text.partition("<|im_")[0].partition("I hope it is correct")[0].strip()
    text = extract_answer(text) or text
    if not re.search(r"[A-Za-z]{2} +[A-Za-z$\\(]", _LATEX_WORDS.sub("", text)):
        return text or None
    sentences = [part for part in re.split(r"\.\$*\s", text) if re.search(r"\d|\$|\\", part)]
    said = sentences[-1] if sentences else text
    behind = said.rpartition(" is ")[2]
    said = behind if re.search(r"\d|\$|\\", behind) else said
    formulas = [formula.strip() for found in _FORMULA.findall(said) for formula in found if formula]
    return (formulas or _FIGURES.findall(said) or [text])[-1]


def check_file(pool: WorkerPool, path: Path, marker: str | None) -> tuple[dict, list]:
    """The counts of a file, rows with a `review` note (conventions, wrong labels) apart; and the
    wrongly judged rows, each with "fn" or "fp"."""
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
        preds = [str(row["pred"]) for row in rows]
        golds = [str(row["gold"]) for row in rows]
        expected = [bool(row["expected"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: {path} has no rows of gold, pred, expected: {error}", file=sys.stderr)
        sys.exit(2)
    began = time.perf_counter()
    verdicts = judge(pool, preds, golds, marker)
    seconds = time.perf_counter() - began
    wrong = [
        ("fp" if outcome == "correct" else "fn", {**row, "read": answer})
        for row, (outcome, answer), right in zip(rows, verdicts, expected, strict=True)
        if (outcome == "correct") != right
    ]
    errors = Counter((kind, bool(row.get("review"))) for kind, row in wrong)
    report = {"file": str(path), "rows": len(rows)}
    report["outcomes"] = dict(Counter(outcome for outcome, _ in verdicts))
    report["rows_per_second"] = round(len(rows) / seconds)
    report["flagged"] = {"rows": sum(bool(row.get("review")) for row in rows)}
    for part, has_note in ((report, False), (report["flagged"], True)):
        part["false_negatives"] = errors["fn", has_note]
        part["false_positives"] = errors["fp", has_note]
    return report, wrong


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
