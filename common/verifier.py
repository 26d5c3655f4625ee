r"""The verifier: untrusted completions go in, verdicts come out.

Grading runs math-verify on text that a model wrote, so hostile input is assumed:
`\boxed{9^{9^{9^9}}}` computes for ever. math-verify's own time-out uses signals, works only in a
main thread and has been seen to hang; it is switched off, and each comparison runs in a worker
process that is killed at its deadline. What comparing strings or plain numbers can decide never
leaves this process.

    with Verifier() as verifier:
        verdicts = verifier.grade(completions, golds)
"""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

OUTCOMES = ("correct", "wrong", "no_answer", "timeout", "crash")

MAX_ANSWER_CHARS = 2_000  # answers are short; a request below the pipe's capacity never blocks
STARTUP_S = 120.0  # importing sympy takes a second, and far longer from a cold network disk

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ANSWER_LINE = re.compile(r"(?i:answer)\s*:\s*(.+)")
_PLAIN_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[+-]?\.\d+")


@dataclass(frozen=True)
class Verdict:
    """`outcome` is one of OUTCOMES, `answer` the text that was read from the completion, if any."""

    outcome: str
    answer: str | None = None

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"


# === reading answers ===


def extract_answer(completion: str) -> str | None:
    """The final answer of a completion: its last balanced `\\boxed{...}`, else its last `Answer:
    ...` line.

    What stands inside <think> ... </think> does not count, closed or not.
    """
    completion = completion.rpartition("</think>")[2]
    completion = completion.partition("<think>")[0]
    for match in reversed(list(_BOX.finditer(completion))):
        answer = _balanced(completion, match.end())
        if answer is not None:
            return answer.strip() or None
    lines = _ANSWER_LINE.findall(completion)
    return lines[-1].strip().strip("*$").strip() or None if lines else None


def _balanced(text: str, start: int) -> str | None:
    """text[start:end] up to the brace that closes the one before `start`; None if nothing closes
    it."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[start : match.start()]
    return None


def compare_cheaply(answer: str, gold: str) -> bool | None:
    """Equality of equal strings and of plain decimal numbers; None where it takes a parser to
    tell."""
    if answer == gold:
        return True
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    if _PLAIN_NUMBER.fullmatch(answer) and _PLAIN_NUMBER.fullmatch(gold):
        return Decimal(answer.replace(",", "")) == Decimal(gold.replace(",", ""))
    return None


# === worker processes ===

# What a worker replies, one byte an item; "t" stands for its silence at the deadline.
_OUTCOMES = {b"1": "correct", b"0": "wrong", b"t": "timeout", b"x": "crash", b"": "crash"}


class _Worker:
    """One child process. Requests are JSON lines on its stdin, replies are bytes on its stdout."""

    def __init__(self, timeout_s: float, memory_mb: int):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "common.verifier", "--worker", str(timeout_s), str(memory_mb)],
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

    def send(self, item: int, answer: str, gold: str, timeout_s: float) -> None:
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

    def grade(self, completions: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """One verdict per completion, in order."""
        verdicts: list[Verdict | None] = []
        hard: dict[int, tuple[str, str]] = {}  # index -> (answer, gold), left to the workers
        for i, (completion, gold) in enumerate(zip(completions, golds, strict=True)):
            answer = extract_answer(completion)
            same = None if answer is None else compare_cheaply(answer, gold)
            if answer is not None and same is None:
                hard[i] = (answer, gold)
            outcome = "no_answer" if answer is None else "correct" if same else "wrong"
            verdicts.append(Verdict(outcome, answer))
        with self._lock:
            try:
                for i, outcome in self._grade_in_workers(hard).items():
                    verdicts[i] = Verdict(outcome, hard[i][0])
            except BaseException:
                self.close()  # else the next batch would read the replies to this one
                raise
        return verdicts

    def _grade_in_workers(self, items: dict[int, tuple[str, str]]) -> dict[int, str]:
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
                if reply not in (b"0", b"1"):
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
        readable, _, _ = select.select(waiting, [], [], max(0.0, wait_s))
        late = [w for w in waiting if w not in readable and time.monotonic() >= w.deadline]
        return [(w, os.read(w.fileno(), 1)) for w in readable] + [(w, b"t") for w in late]


def _worker_main(timeout_s: float, memory_mb: int) -> None:
    """The child. Reads [answer, gold] lines; replies 1 (equal), 0 (not equal), x (exception)."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    import logging

    from math_verify import parse, verify

    logging.disable()  # math-verify warns that its own time-outs are off
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # nothing that a library prints may pass for a reply
    out.write(b"r")
    for line in sys.stdin.buffer:
        # Should the parent die in mid-item, the kernel's timer enforces the deadline.
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 1)
        answer, gold = json.loads(line)
        try:
            gold_parsed = parse(rf"\boxed{{{gold}}}", parsing_timeout=None)
            answer_parsed = parse(rf"\boxed{{{answer}}}", parsing_timeout=None)
            # The gold comes first: verify() is not symmetric.
            reply = b"1" if verify(gold_parsed, answer_parsed, timeout_seconds=None) else b"0"
        except Exception:
            reply = b"x"
        signal.setitimer(signal.ITIMER_REAL, 0)
        out.write(reply)


if __name__ == "__main__" and sys.argv[1:2] == ["--worker"]:
    _worker_main(float(sys.argv[2]), int(sys.argv[3]))
