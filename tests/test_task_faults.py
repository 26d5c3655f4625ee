"""Grading under attack: a seeded fuzz, bombs by the hundred, lost workers, a lost parent."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SEED, grade
from test_task import BOMBS, POWERS, assert_gone, pids_of

from common.run.inputs import ROOT
from common.sampling.rollout import Rollout
from common.sampling.vote import majority_votes
from common.tasks.math import extract_answer, is_right
from common.tasks.task import OUTCOMES, Task

pytestmark = pytest.mark.faults

ATOMS = [
    *(r"\frac{1}{2}", r"\sqrt", r"\boxed{", r"\fbox{", "}", "{", r"\left(", r"\right)", "^", "_"),
    *("!", "9", "0", "1e99", "-", "+", "*", "/", "=", "<", ",", ";", "(", ")", "[", "]", "|", "&"),
    *("x", "y", "pi", r"\pi", r"\infty", r"\sum_{i=1}^{99}", r"\int_0^1", r"\begin{pmatrix}", "$"),
    *(r"\end{pmatrix}", r"\\", r"\text{and}", "and", " ", "\n", "Answer: ", "<think>", "</think>"),
    *(
        "\0",
        "\ud800",
        "\u202e",
        "\u00e9",
        "\U0001f600",
        "%",
        r"\%",
        "\\",
        "import os",
        "__import__",
    ),
]


def random_completion(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.3:
        body = "".join(rng.choices(ATOMS, k=rng.randint(1, 12)))
    elif kind < 0.5:
        body = "".join(map(chr, rng.choices(range(0x250), k=rng.randint(1, 60))))
    elif kind < 0.6:
        body = rng.randbytes(rng.randint(1, 80)).decode("utf-8", "surrogateescape")
    elif kind < 0.7:
        opening, closing = rng.choice([("{", "}"), ("(", ")"), ("[", "]"), (r"\sqrt{", "}")])
        depth = rng.randint(10, 600)
        body = opening * depth + "1" + closing * (depth - rng.randint(0, 1))
    elif kind < 0.703:
        body = "^".join(["{9", *["{9"] * rng.randint(1, 4)]) + "}" * 9
    elif kind < 0.706:
        body = str(rng.randrange(10**6)) + "!" * rng.randint(1, 3)
    elif kind < 0.71:
        body = rng.choice(ATOMS) * (1_000_000 // 8)
    else:
        body = str(rng.randint(-999, 999)) + rng.choice(["", ".0", "/7", r"\%", r"^\circ", " cm"])
    return rf"\boxed{{{body}}}" if rng.random() < 0.8 else body


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_fuzz():
    """12,000 inputs: each gets a verdict in time; workers and memory stay what they were."""
    rng = random.Random(SEED)
    total, deadlines = 0, 0
    before = resident_mb(os.getpid())
    with Task(timeout_s=0.2) as task:
        task.pool.memory_mb = 1024
        for _ in range(60):
            completions = [random_completion(rng) for _ in range(200)]
            golds = [
                rng.choice(["5", "0.5", "1/2", r"\frac{x}{2}", "(1, 2)", "x+1"])
                for _ in completions
            ]
            began = time.monotonic()
            verdicts = grade(task, completions, golds)
            elapsed = time.monotonic() - began
            killed = sum(verdict.outcome in ("timeout", "crash") for verdict in verdicts)
            assert len(verdicts) == 200
            assert {verdict.outcome for verdict in verdicts} <= set(OUTCOMES)
            # Two workers; a lost one costs its deadline and a restart of up to a few seconds.
            assert elapsed < 30 + 4 * killed
            total, deadlines = total + len(verdicts), deadlines + killed
            assert len(task.pool._workers) <= 2
            assert all(resident_mb(pid) < 1024 for pid in pids_of(task))
        assert grade(task, [r"\boxed{\frac12}"], ["0.5"])[0].correct
        pids = pids_of(task)
    print(f"{total} inputs, {deadlines} workers lost")
    assert total == 12_000
    assert deadlines > 0
    assert resident_mb(os.getpid()) - before < 500
    assert_gone(pids)


def hostile_answer(rng: random.Random) -> str:
    return extract_answer(random_completion(rng)) or rng.choice(ATOMS)


def test_fuzz_of_both_sides():
    """Majority votes compare what models wrote with what models wrote."""
    rng = random.Random(SEED + 2)
    with Task(timeout_s=0.2) as task:
        task.pool.memory_mb = 1024
        for _ in range(20):
            pairs = [(hostile_answer(rng), hostile_answer(rng)) for _ in range(100)]
            assert {reply.kind for reply in task.pool.call("is_right", pairs)} <= {
                *("value", "error", "died", "timeout")
            }
            verdicts = grade(task, [rf"\boxed{{{answer}}}" for answer, _ in pairs], ["5"] * 100)
            rollouts = [Rollout([1], [2], None, "eos", "", verdict=v) for v in verdicts]
            assert all(0 <= share <= 1 for share in majority_votes(task, rollouts, 4))


def test_comparing_without_a_parser_takes_no_time():
    """A second for 300 comparisons, with room."""
    rng = random.Random(SEED + 3)
    spaces, digits = r"\text{" + " " * 1980 + "(", "1" * 2000
    hostile = [spaces, digits, "-" * 2000, "1," * 1000, "{,}1" * 500, "a " * 1000, "$" * 2000]
    hostile += [hostile_answer(rng)[:2000] for _ in range(100)]
    began = time.monotonic()
    for answer in hostile:
        for gold in (digits, r"\text{even}"):
            is_right(answer, gold)
            extract_answer(answer + gold)
    assert time.monotonic() - began < 10  # the cubic one took 7 s for a single comparison


def test_fuzz_of_the_extraction():
    """50,000 inputs in this process: text in, text or nothing out, in bounded time."""
    rng = random.Random(SEED + 1)
    for _ in range(50_000):
        answer = extract_answer(random_completion(rng)[:2000])
        assert answer is None or (answer == answer.strip() != "")


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 140_000,
        "{" * 1_000_000,
        r"\boxed{" + "{" * 1_000_000,
        r"\boxed{1}" * 110_000,
        r"\boxed{1} and " * 70_000,
        "Answer: " * 125_000,
        "<think>" * 140_000,
        r"\boxed{" + " " * 1_000_000 + "}",
        "Answer:" + " " * 1_000_000,
        "\\" * 1_000_000,
        r"\boxed{" + "1 " * 500_000 + "}",
        r"\boxed{" + "a" * 1_000_000 + "}",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_a_megabyte_takes_seconds_at_most(text):
    """No quadratic scan: these would take hours."""
    began = time.monotonic()
    with Task(timeout_s=0.2) as task:
        grade(task, [text], ["1"])
    assert time.monotonic() - began < 20


def test_200_bombs_in_one_batch():
    with Task(timeout_s=0.2) as task:
        completions = [BOMBS[i % 2] for i in range(200)] + [r"\boxed{\frac12}"]
        outcomes = [v.outcome for v in grade(task, completions, [POWERS] * 200 + ["0.5"])]
    assert outcomes[-1] == "correct"
    assert set(outcomes[:-1]) <= {"timeout", "crash"}


HOLDER = """
import sys
sys.path.insert(0, "tests")
from conftest import grade
from test_task import pids_of
from common.tasks.task import Task
task = Task(timeout_s={timeout_s})
grade(task, [r"\\boxed{{\\frac12}}"] * 20, ["0.5"] * 20)
print(*pids_of(task), flush=True)
{then}
"""


def start_holder(then: str, timeout_s: float = 1.0) -> tuple[subprocess.Popen, list[int]]:
    """A process that holds a task; its workers' pids."""
    code = HOLDER.format(then=then, timeout_s=timeout_s)
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    return child, list(map(int, child.stdout.readline().split()))


@pytest.mark.parametrize("then", ["", "raise RuntimeError", "sys.exit(3)"])
def test_no_worker_outlives_a_process_that_ends(then):
    child, pids = start_holder(then)
    child.wait(timeout=30)
    assert pids
    assert_gone(pids)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_worker_outlives_a_process_that_is_killed_while_grading(sent):
    """In mid-bomb: nobody is left to enforce the deadline but the worker's keeper."""
    child, pids = start_holder(f"grade(task, [{BOMBS[0]!r}] * 50, [{POWERS!r}] * 50)", timeout_s=60)
    time.sleep(0.5)
    scratch = Path(os.readlink(f"/proc/{pids[-1]}/cwd"))
    child.send_signal(sent)
    child.wait(timeout=30)
    assert_gone(pids)
    assert not scratch.exists()


def test_training_on_poisoned_completions_finishes(tmp_path):
    """fkl_warmup.py on given rollouts that are bombs, for golds that need the parser."""
    lines = (ROOT / "toy" / "train.jsonl").read_text().splitlines()[:8]
    asked = [json.loads(line) | {"answer": POWERS} for line in lines]
    bombs = [bomb.replace(r"\boxed{", r"\boxed{x+") for bomb in BOMBS]
    given = [row | {"completion": bomb} for row in asked for bomb in bombs]
    for name, rows in (("asked", asked), ("given", given)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--dataset", "asked.jsonl", "--rollouts", "given.jsonl", "--hard_labels"]
    flags += ["--num_steps", "2", "--prompts_per_step", "2", "--group_size", "4"]
    command = [sys.executable, str(ROOT / "fkl_warmup.py"), *flags, "--output_dir", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 2
    assert '"rollout/timeout": 1.0' in metrics[0]
