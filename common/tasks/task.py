"""A task: what is asked, and what a completion of it earns. One file brings both.

    --task math              the embedded one (common/tasks/math.py)
    --task FILE.py           your own; docs/tasks.md says what it defines

The file is imported, and its functions are called, in worker processes only.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from common.run.errors import UserError, check
from common.run.inputs import task_path
from common.run.ranks import on_first_of_host, on_first_rank
from common.tasks.pool import Reply, WorkerPool

OUTCOMES = ("correct", "partial", "wrong", "no_answer", "timeout", "crash")
PATIENCE = 10  # in deadlines, where lateness would end the run: a busy machine stalls for seconds


@dataclass(frozen=True)
class Problem:
    """A row of a dataset, as its task asks it."""

    text: str  # the user's last message, without the task's instruction
    gold: str = ""  # the right answer, as people are shown it
    key: str = ""  # rows of one key are one problem
    messages: list[dict] = field(default_factory=list)  # of the chat, with the task's instruction
    row: dict = field(default_factory=dict)  # what grade() gets
    where: str = ""  # dataset and number of the row
    warning: str | None = None

    @property
    def identity(self) -> str:
        return f"{self.key}{json.dumps(self.row, sort_keys=True, default=str)}"


@dataclass(frozen=True)
class Verdict:
    """`outcome` is one of OUTCOMES, `answer` what was read from the completion, if anything was;
    `message` is a crash's."""

    outcome: str
    reward: float = 0.0  # from 0 to 1
    answer: str | None = None
    message: str = ""

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"


class Task:
    """A task file, by name or path. timeout_s: the deadline of a call in seconds; None: the
    task's own."""

    def __init__(self, name: str = "math", timeout_s: float | None = None):
        self.name, self.file = name, task_path(name)
        is_task = self.file.is_file() and self.file.suffix == ".py"
        check(is_task, f"there is no task {name}; give math or a .py file")
        self.sources: dict[str, str | None] = {}  # of the rows read so far: a hash of each
        self.pool = WorkerPool(self.file)
        (declared,) = on_first_rank(lambda: self._values("declarations", [()]))
        self.pool.timeout_s = declared["grade_timeout"] if timeout_s is None else timeout_s
        self.columns: dict[str, Sequence[str]] = declared["columns"]
        self.datasets, self.benchmarks = declared["datasets"], declared["benchmarks"]
        self.functions: list[str] = declared["functions"]

    def _values(self, function: str, arguments: Sequence[Sequence]) -> list:
        """Return what is returned for each of `arguments`; any failure is the user's mistake."""
        replies = self.pool.call(function, arguments, PATIENCE)
        failed = [reply.value for reply in replies if reply.kind != "value"]
        check(not failed, f"task {self.name}: {failed and failed[0]}")
        return [reply.value for reply in replies]

    def __enter__(self) -> "Task":
        return self

    def __exit__(self, *exc) -> None:
        self.pool.close()

    def problems(
        self, rows: Sequence[dict], source: str, numbers: Sequence[int] = ()
    ) -> list[Problem | str]:
        """Return a problem of each row, or a text that says why the row cannot be used. numbers: of
        the rows in their source. Raises UserError for a mistake in the task's code."""
        first = self.pool.call("describe", [rows[:1]], PATIENCE)  # if it hangs, once
        if first[0].kind != "value":
            rows = rows[:1]
        replies = first + self.pool.call("describe", [[row] for row in rows[1:]], PATIENCE)
        problems: list[Problem | str] = []
        numbers = numbers or range(1, len(rows) + 1)
        for number, row, reply in zip(numbers, rows, replies, strict=False):
            where = f"{source}, row {number}"
            if reply.kind != "value":
                reason = "prompt(row) takes too long" if reply.kind == "timeout" else reply.value
                raise UserError(f"{where}: task {self.name}: {reason}")
            unusable = isinstance(reply.value, str)
            problems.append(
                reply.value if unusable else Problem(row=row, where=where, **reply.value)
            )
        usable = [problem for problem in problems if isinstance(problem, Problem)][:1]
        for tried in self.pool.call("try_grade", [[problem.row] for problem in usable]):
            check(tried.kind != "misuse", f"{usable[0].where}: task {self.name}: {tried.value}")
        return problems

    def keys(self, texts: Sequence[str]) -> list[str]:
        """Return the keys of problems' texts."""
        return self._values("identify", [[text.strip()] for text in texts])

    def grade(self, completions: Sequence[str], problems: Sequence[Problem]) -> list[Verdict]:
        """Return one verdict per completion, in order. The ranks of a machine share one pool of
        workers. What is no reward is a crash too."""
        rows = [problem.row for problem in problems]
        pairs = list(zip(completions, rows, strict=True))
        replies = on_first_of_host(partial(self.pool.call, "grade"), pairs)
        verdicts = [self._verdict(reply) for reply in replies]
        self._warn(verdicts)
        return verdicts

    def _warn(self, verdicts: list[Verdict]) -> None:
        """Warn of a grader that fails at most completions: nothing would be learned, and no one
        told."""
        failed = [verdict for verdict in verdicts if verdict.outcome in ("timeout", "crash")]
        if len(failed) > max(1, len(verdicts) / 2):
            what = failed[0].message or f"no grade within {self.pool.timeout_s:g} s"
            print(f"task {self.name}: {len(failed)} of {len(verdicts)} grades failed ({what})")

    def _verdict(self, reply: Reply) -> Verdict:
        if reply.kind == "timeout":
            return Verdict("timeout", answer=reply.note)
        if reply.kind != "value":
            return Verdict("crash", answer=reply.note, message=str(reply.value))
        if reply.value is None:
            return Verdict("no_answer")
        reward = round(reply.value, 6)  # 0.1 + 0.2 and 0.3 in a group are no difference to learn
        outcome = {0.0: "wrong", 1.0: "correct"}.get(reward, "partial")
        return Verdict(outcome, reward, reply.note)

    def same(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Tell whether two answers are one vote: equal texts, or what the task's same(a, b)
        says."""
        if "same" not in self.functions:
            return [one == other for one, other in pairs]
        replies = self.pool.call("same", pairs)
        failed = [reply.value for reply in replies if reply.kind not in ("value", "timeout")]
        if failed:
            print(f"task {self.name}: {len(failed)} calls of same() failed ({failed[0]})")
        return [reply.value is True for reply in replies]
