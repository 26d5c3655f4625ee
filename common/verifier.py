r"""The verifier: untrusted completions go in, verdicts come out.

Grading runs math-verify on text that a model wrote, so hostile input is assumed:
`\boxed{9^{9^{9^9}}}` computes for ever. math-verify's own time-out uses signals, works only in a
main thread and has been seen to hang; it is switched off, and each comparison runs in a worker
process that is killed at its deadline (`common.equivalence`). What comparing strings, plain numbers
or words can decide never leaves this process; here every regular expression takes linear time.

    with Verifier() as verifier:
        verdicts = verifier.grade(completions, golds)
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from multiprocessing.connection import wait
from pathlib import Path
from typing import Literal

import tyro

OUTCOMES = ("correct", "wrong", "no_answer", "timeout", "crash")

MAX_ANSWER_CHARS = 2_000  # answers are short; a request below the pipe's capacity never blocks
STARTUP_S = 120.0  # importing sympy takes a second, and far longer from a cold network disk

_BRACES = re.compile(
    r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>[+-]?\d+(?:[.,]\d+)*|[A-Z](?![A-Za-z])))|\\.|[{}]",
    re.DOTALL,
)
_ANSWER_LINE = re.compile(r"(?i:answer)\s*:[ \t]*(\S.*)")
_END_OF_TEXT = re.compile(r"<\|im_end\|>|<\|endoftext\|>|<\|eot_id\|>|<\|end\|>|</s>")
# What may stand between two boxes that are one answer: `\boxed{2} \text{ and } \boxed{3}`.
_BETWEEN_BOXES = re.compile(
    r"(?:[\s,;$.]|\\quad|\\qquad|\\[,;: \[\]()]|\\text\{\s*(?:and|or)\s*\}|and|or)*"
)
_PLAIN_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|[+-]?\.\d+")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,?\\!|\\,|[ \u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_CURRENCY = re.compile(r"\\\$|[€£¥¢]")
_WRAPPED = re.compile(r"(?:\\(?:textbf|mathbf|boldsymbol|bm|underline|mathrm))?\{([^{}\\]*)\}")
_THINGS = re.compile(r"([\d,.+-]+)\s+([A-Za-z]{2,}(?:[ /][A-Za-z]{1,20}){0,6}[²³]?)")
# What follows a number and is no unit of it.
_NUMBER_WORDS = {
    *("and", "or", "plus", "minus", "times", "over", "squared", "cubed", "mod", "choose", "sqrt"),
    *("factorial", "pi", "sin", "cos", "tan", "log", "ln", "exp", "percent", "percentage", "pct"),
    *("hundred", "thousand", "million", "billion", "trillion", "dozen", "half", "halves", "cent"),
    *("third", "thirds", "quarter", "quarters"),
}
_WORDS = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([A-Za-z\s.'-]+)\}"
    r"|([A-Za-z]{2,3}|[A-Za-z]{4}[A-Za-z .'-]*)"
)


@dataclass(frozen=True)
class Verdict:
    """`outcome` is one of OUTCOMES, `answer` the text that was read from the completion, if any."""

    outcome: str
    answer: str | None = None

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"


# === reading answers ===


def answering_part(completion: str) -> str:
    """What lies outside <think> ... </think>, closed or not, and before an end-of-text marker."""
    completion = _END_OF_TEXT.split(completion, maxsplit=1)[0]
    return completion.rpartition("</think>")[2].partition("<think>")[0]


def extract_answer(completion: str, marker: str | None = None) -> str | None:
    r"""The final answer of a completion: its last balanced `\boxed{...}` or `\fbox{...}`, else its
    last `Answer: ...` line. Boxes joined by no more than `and` or a comma are one answer.

    marker: what begins the answer's line, instead of `Answer:`.
    """
    completion = answering_part(completion)
    boxes = _boxes(completion)
    if boxes:
        first = len(boxes) - 1
        while first > 0 and _BETWEEN_BOXES.fullmatch(
            completion, boxes[first - 1][1], boxes[first][0]
        ):
            first -= 1
        contents = [content.strip() for _, _, content in boxes[first:]]
        return ", ".join(filter(None, contents)) or None
    line = _ANSWER_LINE if marker is None else re.compile(re.escape(marker) + r"[ \t]*(\S.*)")
    lines = line.findall(completion)
    return (lines[-1].strip().strip("*").strip() or None) if lines else None


def _boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of each balanced box that stands in no other, in one pass. `\boxed 2`
    is one too."""
    boxes: list[tuple[int, int, str]] = []
    open_braces: list[re.Match] = []
    for match in _BRACES.finditer(text):
        if match["bare"]:
            boxes.append((match.start(), match.end(), match["bare"]))
        elif match.group() == "}":
            opened = open_braces.pop() if open_braces else None
            if opened is not None and opened.group() != "{":
                while boxes and boxes[-1][0] > opened.start():
                    boxes.pop()
                boxes.append((opened.start(), match.end(), text[opened.end() : match.start()]))
        elif match.group().endswith("{") and match.group() != r"\{":
            open_braces.append(match)
    return boxes


def bare_answer(text: str) -> str:
    """An answer without its full stop, currency, separators of thousands, bold face and braces."""
    text = text.strip()
    if text.endswith(".") and not text.endswith(r"\right."):
        text = text[:-1].rstrip()
    while wrapped := _WRAPPED.fullmatch(text):
        text = wrapped[1].strip()
    text = _CURRENCY.sub("", text).replace(r"\degree", r"^\circ").replace("°", r"^\circ")
    return _THOUSANDS.sub("", text).replace("~", " ").strip()


def compare_cheaply(answer: str, gold: str) -> bool | None:
    """Equality of equal strings, plain decimal numbers and words; None where it takes a parser."""
    if answer == gold:
        return True
    if max(len(answer), len(gold)) > MAX_ANSWER_CHARS:
        return False
    answer, gold = bare_answer(answer), bare_answer(gold)
    if answer == gold:
        return True
    numbers = _plain_number(answer), _plain_number(gold)
    if numbers[1] is not None and numbers[0] is None:
        numbers = _number_of_things(answer), numbers[1]
    if None not in numbers:
        return numbers[0] == numbers[1]
    words = _words(answer), _words(gold)
    # math-verify reads a word as the product of its letters, equal to every anagram of it.
    return words[0] == words[1] if None not in words else None


def _plain_number(text: str) -> Decimal | None:
    text = text.strip().strip("$").strip().rstrip(".")
    return Decimal(text.replace(",", "")) if _PLAIN_NUMBER.fullmatch(text) else None


def _number_of_things(text: str) -> Decimal | None:
    """12 of `12 eggs` or `12 km/h`, but not of `12 million`."""
    match = _THINGS.fullmatch(text)
    if match is None or _NUMBER_WORDS.intersection(re.findall(r"[a-z]+", match[2].lower())):
        return None
    return _plain_number(match[1])


def _words(text: str) -> str | None:
    match = _WORDS.fullmatch(text.strip().strip("$").strip())
    return " ".join((match[1] or match[2]).lower().split()) if match else None


# === worker processes ===

# What a worker replies, one byte an item; "t" stands for its silence at the deadline.
_OUTCOMES = {b"1": "correct", b"0": "wrong", b"t": "timeout", b"x": "crash", b"": "crash"}


class _Worker:
    """One child process. Requests are JSON lines on its stdin, replies are bytes on its stdout."""

    def __init__(self, timeout_s: float, memory_mb: int):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "common.equivalence", str(timeout_s), str(memory_mb)],
            cwd=Path(__file__).resolve().parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the trainer, which then closes its workers
        )
        self.item: int | None = None  # the index of the item it works on
        self.ready = False  # it says so when its imports are done: no item pays for them
        self.deadline = time.monotonic() + STARTUP_S

    @property
    def idle(self) -> bool:
        return self.ready and self.item is None

    def fileno(self) -> int:
        return self.process.stdout.fileno()

    def send(self, item: int, answer: str | None, gold: str, timeout_s: float) -> None:
        self.item, self.deadline = item, time.monotonic() + timeout_s
        with contextlib.suppress(BrokenPipeError):  # it just died: its stdout ends, which is read
            self.process.stdin.write(json.dumps([answer, gold]).encode() + b"\n")
            self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


class Verifier:
    """Grades completions against gold answers, whatever the completions hold.

    num_workers: processes that run math-verify; started when the first item needs one, replaced
    when killed. timeout_s: deadline of one comparison, in seconds; past it the worker is killed and
    the verdict is `timeout`. memory_mb: address space of a worker (Linux); past it the verdict is
    `crash`.

    Safe to call from any thread. Workers are gone after `close()`, and exit by themselves should
    this process be killed.
    """

    def __init__(self, num_workers: int = 2, timeout_s: float = 2.0, memory_mb: int = 2048):
        self.num_workers, self.timeout_s, self.memory_mb = num_workers, timeout_s, memory_mb
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def grade(
        self,
        completions: Sequence[str],
        golds: Sequence[str],
        *,
        marker: str | None = None,
        free_form: bool = False,
    ) -> list[Verdict]:
        """One verdict per completion, in order.

        marker: as for `extract_answer`. free_form: a completion that marks no answer is compared as
        a whole, for bare answers and sentences; else it is `no_answer`.
        """
        answers = [extract_answer(completion, marker) for completion in completions]
        if free_form:
            whole = [answering_part(completion).strip() or None for completion in completions]
            answers = [w if a is None else a for a, w in zip(answers, whole, strict=True)]
        return self.compare(answers, golds)

    def compare(self, answers: Sequence[str | None], golds: Sequence[str]) -> list[Verdict]:
        """Whether each bare answer means what its gold answer does; None is `no_answer`."""
        verdicts: list[Verdict] = []
        hard: dict[int, tuple[str, str]] = {}  # index -> (answer, gold), left to the workers
        for i, (answer, gold) in enumerate(zip(answers, golds, strict=True)):
            same = None if answer is None else compare_cheaply(answer, gold)
            if answer is not None and same is None:
                hard[i] = bare_answer(answer), bare_answer(gold)
            outcome = "no_answer" if answer is None else "correct" if same else "wrong"
            verdicts.append(Verdict(outcome, answer))
        for i, outcome in self._ask_workers(hard).items():
            verdicts[i] = Verdict(outcome, answers[i])
        return verdicts

    def unreadable(self, golds: Sequence[str]) -> list[str]:
        """Gold answers that are no number, word or expression: only an equal string will do."""
        bare = {gold: bare_answer(gold) for gold in golds}
        hard = [g for g, b in bare.items() if _plain_number(b) is None and _words(b) is None]
        outcomes = self._ask_workers({i: (None, bare[gold]) for i, gold in enumerate(hard)})
        return [gold for i, gold in enumerate(hard) if outcomes[i] != "correct"]

    def _ask_workers(self, items: dict[int, tuple[str | None, str]]) -> dict[int, str]:
        with self._lock:
            try:
                return self._dispatch(items)
            except BaseException:
                self.close()  # else the next batch would read the replies to this one
                raise

    def _dispatch(self, items: dict[int, tuple[str | None, str]]) -> dict[int, str]:
        outcomes: dict[int, str] = {}
        pending = deque(items)
        while len(outcomes) < len(items):
            self._fill_pool(len(items) - len(outcomes))
            for worker in self._workers:
                if pending and worker.idle:
                    i = pending.popleft()
                    worker.send(i, *items[i], self.timeout_s)
            for worker, reply in self._replies():
                if not worker.ready:
                    if reply != b"r":
                        raise RuntimeError("no verifier worker starts: is math-verify installed?")
                    worker.ready = True
                    continue
                outcomes[worker.item], worker.item = _OUTCOMES[reply], None
                if reply in (b"t", b""):
                    self._drop(worker)
        return outcomes

    def _fill_pool(self, num_items: int) -> None:
        for worker in [worker for worker in self._workers if worker.idle]:
            if worker.process.poll() is not None:  # it died while idle: no item is at fault
                self._drop(worker)
        while len(self._workers) < min(self.num_workers, num_items):
            self._workers.append(_Worker(self.timeout_s, self.memory_mb))

    def _drop(self, worker: _Worker) -> None:
        worker.kill()
        self._workers.remove(worker)

    def _replies(self) -> list[tuple[_Worker, bytes]]:
        """Wait until some worker replies, dies (b"") or passes its deadline (b"t")."""
        waiting = [worker for worker in self._workers if not worker.idle]
        wait_s = min(worker.deadline for worker in waiting) - time.monotonic()
        readable = wait(waiting, max(0.0, wait_s))  # select.select takes no descriptor above 1,023
        late = [w for w in waiting if w not in readable and time.monotonic() >= w.deadline]
        return [(w, os.read(w.fileno(), 1)) for w in readable] + [(w, b"t") for w in late]


# === grading files ===


@dataclass
class Args:
    files: "tyro.conf.Positional[tuple[Path, ...]]"
    """.jsonl files of rows with gold, pred and expected (1 right, 0 wrong)"""
    show: Literal["fn", "fp"] | None = None
    """print the false negatives or the false positives instead of the counts"""
    marker: str | None = None
    """what begins the line of the answer, instead of Answer:"""


def grade_files(args: Args) -> None:
    """Print verdicts against labels."""
    reports, wrong = [], []
    with Verifier() as verifier:
        verifier.grade([r"\boxed{\frac{1}{2}}"] * 2, ["0.5"] * 2)  # start-up is not timed
        for path in args.files:
            report, wrong_of_file = grade_file(verifier, path, args.marker)
            reports.append(report)
            wrong += [row for kind, row in wrong_of_file if kind == args.show]
    print(json.dumps(wrong if args.show else reports, indent=1))


def grade_file(verifier: Verifier, path: Path, marker: str | None) -> tuple[dict, list]:
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
    verdicts = verifier.grade(preds, golds, marker=marker, free_form=True)
    seconds = time.perf_counter() - began
    wrong = [
        ("fp" if verdict.correct else "fn", {**row, "read": verdict.answer})
        for row, verdict, right in zip(rows, verdicts, expected, strict=True)
        if verdict.correct != right
    ]
    errors = Counter((kind, bool(row.get("review"))) for kind, row in wrong)
    report = {"file": str(path), "rows": len(rows)}
    report["outcomes"] = dict(Counter(verdict.outcome for verdict in verdicts))
    report["rows_per_second"] = round(len(rows) / seconds)
    report["flagged"] = {"rows": sum(bool(row.get("review")) for row in rows)}
    for part, has_note in ((report, False), (report["flagged"], True)):
        part["false_negatives"] = errors["fn", has_note]
        part["false_positives"] = errors["fp", has_note]
    return report, wrong


if __name__ == "__main__":
    grade_files(tyro.cli(Args, description=__doc__, use_underscores=True))
