"""The verifier: what it reads, what it grades, and that nothing breaks it."""

import subprocess
import threading
import time
from pathlib import Path

import pytest

from common.verifier import Verdict, Verifier, compare_cheaply, extract_answer


@pytest.fixture(scope="module")
def verifier():
    with Verifier() as shared:
        yield shared


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{3}", "3"),
        (r"\boxed{4} and \boxed{unfinished", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        ("Answer: 5", "5"),
        ("Answer: 5\nbut no\nAnswer: **6**", "6"),
        (r"Answer: 5, that is \boxed{6}", "6"),
        (r"<think>\boxed{1}</think>\boxed{2}", "2"),
        (r"<think>\boxed{1}</think> done", None),
        (r"<think>it could be \boxed{1}", None),
        (r"\boxed{}", None),
        (r"\boxed{1", None),
        ("no answer here, just 12", None),
        ("", None),
    ],
)
def test_extraction(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("7", "7", True),
        ("x+1", "x+1", True),
        ("7.0", "7", True),
        ("1,234", "1234", True),
        ("-3", "3", False),
        ("0.1", ".10", True),
        ("1,23", "123", None),
        (r"\frac{1}{2}", "0.5", None),
        ("9" * 3000, "1", False),
    ],
)
def test_cheap_comparison(answer, gold, same):
    assert compare_cheaply(answer, gold) is same


@pytest.mark.parametrize(
    ("answer", "gold", "outcome"),
    [
        (r"\frac{1}{2}", "0.5", "correct"),
        (r"\dfrac12", r"\frac{1}{2}", "correct"),
        ("x=3", "3", "correct"),
        (r"50\%", "0.5", "correct"),
        (r"\{2, 1\}", r"\{1,2\}", "correct"),
        ("(1,2)", "(2,1)", "wrong"),
        (r"2\sqrt{2}", r"\sqrt{8}", "correct"),
        (r"\frac{1}{3}", "0.5", "wrong"),
        ("hello", "5", "wrong"),
    ],
)
def test_equivalence(verifier, answer, gold, outcome):
    assert verifier.grade([rf"\boxed{{{answer}}}"], [gold]) == [Verdict(outcome, answer)]


BOMBS = [r"\boxed{9^{9^{9^9}}}", r"\boxed{100000000!}"]


def test_hostile_answers_cost_their_own_deadline_only():
    """20 bombs among 20 good answers: the good ones are graded, in order; no worker is left."""
    completions, golds = [], []
    for i in range(20):
        completions += [BOMBS[i % 2], rf"\boxed{{\frac{{{i}}}{{2}}}}"]
        golds += ["1", str(i / 2)]
    with Verifier(timeout_s=0.2) as verifier:
        began = time.monotonic()
        outcomes = [verdict.outcome for verdict in verifier.grade(completions, golds)]
        elapsed = time.monotonic() - began
        pids = [worker.process.pid for worker in verifier._workers]
    assert outcomes[1::2] == ["correct"] * 20
    assert set(outcomes[::2]) <= {"timeout", "crash"}
    assert elapsed < 60  # 20 bombs of 0.2 s and as many restarts
    assert_gone(pids)


def assert_gone(pids: list[int]) -> None:
    for pid in pids:
        shown = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
        )
        assert shown.stdout.strip() == "", f"worker {pid} is left: {shown.stdout}"


def test_memory_is_bounded():
    with Verifier(num_workers=1, memory_mb=700) as verifier:
        verifier.grade([r"\boxed{\frac12}"], ["0.5"])
        limits = Path(f"/proc/{verifier._workers[0].process.pid}/limits").read_text()
    line = next(line for line in limits.splitlines() if line.startswith("Max address space"))
    assert line.split()[3:5] == [str(700 << 20)] * 2


def test_a_killed_worker_is_replaced():
    """kill -9 in mid-item: that item crashed, everything after it is graded."""
    with Verifier(num_workers=1, timeout_s=30) as verifier:
        assert verifier.grade([r"\boxed{\frac12}"], ["0.5"])[0].correct
        victim = verifier._workers[0].process
        killer = threading.Timer(0.3, victim.kill)
        killer.start()
        graded = verifier.grade([BOMBS[0], r"\boxed{\frac12}"], ["1", "0.5"])
        assert [verdict.outcome for verdict in graded] == ["crash", "correct"]
        victim = verifier._workers[0].process
        victim.kill()
        victim.wait()
        # It died while idle: that is no item's fault.
        assert verifier.grade([r"\boxed{\frac12}"], ["0.5"])[0].correct


def test_any_thread_may_call(verifier):
    results = {}

    def work(i: int) -> None:
        results[i] = verifier.grade([rf"\boxed{{\frac{{{i}}}{{4}}}}"] * 5, [str(i / 4)] * 5)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(verdict.correct for i in range(1, 5) for verdict in results[i])


def test_workers_do_not_import_torch(verifier):
    verifier.grade([r"\boxed{\frac12}"], ["0.5"])
    maps = Path(f"/proc/{verifier._workers[0].process.pid}/maps").read_text()
    assert "python" in maps
    assert "torch" not in maps


def test_easy_answers_start_no_worker():
    with Verifier() as verifier:
        verifier.grade([r"\boxed{3}", r"\boxed{4}", "nothing"], ["3", "3", "3"])
        assert verifier._workers == []
