"""Task files and the workers that run them: the contract, deadlines, what a broken one costs."""

import os
import re
import resource
import subprocess
import threading
import time
from pathlib import Path

import pytest
from conftest import grade

from common.run.errors import RunFailure, UserError
from common.tasks.task import Task, Verdict
from common.tasks.worker import answering_part

POWERS = r"100000000^{x}+9^{y}+z"  # a gold answer for which a bomb goes to the parser
BOMBS = [r"\boxed{9^{9^{9^9}}}", r"\boxed{100000000!}"]
GOOD = "def prompt(row): return row['text']\ndef grade(completion, row): return 1.0\n"


def write(folder: Path, code: str) -> str:
    path = folder / "own.py"
    path.write_text(code)
    return str(path)


def pids_of(task: Task) -> list[int]:
    """Of each worker's keeper, and of the process that answers."""
    workers = task.pool._workers.values()
    keepers = [worker.process.pid for worker in workers if worker.process.poll() is None]
    children = [Path(f"/proc/{pid}/task/{pid}/children").read_text().split() for pid in keepers]
    return keepers + [int(pid) for listed in children for pid in listed]


def assert_gone(pids: list[int], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    for pid in pids:
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True)
        assert shown.stdout.strip() in (b"", b"Z"), f"process {pid} is left"


# === the contract ===


def test_a_task_of_ten_lines(tmp_path):
    """Any row; partial credit; an answer to vote on; numpy and bool rewards."""
    code = (
        "instruction = 'Write it backwards.'\n"
        "datasets = {'words': 'words.jsonl'}\n"
        "def prompt(row): return row['word']\n"
        "def answer(completion): return completion.strip() or None\n"
        "def gold(row): return row['word'][::-1]\n"
        "def grade(completion, row):\n"
        "    right = sum(a == b for a, b in zip(completion, gold(row)))\n"
        "    return True if completion == gold(row) else right / 3\n"
    )
    with Task(write(tmp_path, code)) as task:
        assert task.datasets == {"words": "words.jsonl"}
        (problem,) = task.problems([{"word": "abc", "level": 3}], "dataset d")
        assert problem.messages == [{"role": "user", "content": "abc\nWrite it backwards."}]
        assert (problem.text, problem.gold) == ("abc", "cba")
        assert problem.where == "dataset d, row 1"
        assert task.grade(["cba", "cbx", "xyz", "", "<think>no</think>cba"], [problem] * 5) == [
            Verdict("correct", 1.0, "cba"),
            Verdict("partial", pytest.approx(2 / 3), "cbx"),
            Verdict("wrong", 0.0, "xyz"),
            Verdict("no_answer"),
            Verdict("correct", 1.0, "cba"),
        ]
        assert task.same([("a", "a"), ("a", "b")]) == [True, False]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def prompt(row): return 'a'", r"own.py: it has no function grade\(completion, row\)"),
        ("def grade(completion, row): return 1", r"it has no function prompt\(row\)"),
        ("import no_such_module", "own.py: ModuleNotFoundError: .*no_such_module"),
        ("def prompt(row:", "own.py: SyntaxError"),
        ("import os; os._exit(3)", "own.py: importing it ends its process"),
        ("import sys; sys.exit(3)", "own.py: SystemExit"),
        ("instruction = 3\n" + GOOD, "its instruction is no text"),
        ("datasets = ['a.jsonl']\n" + GOOD, "its datasets are no dictionary of names"),
        *(
            (
                f"columns = {{'word': {usual}}}\n" + GOOD,
                r"its columns\['word'\] is no list of names",
            )
            for usual in ("'text'", "3", "None", "[]", "[3]", "{'text': 1}")
        ),
        *(
            (
                f"{kind} = {{'a': {place}}}\n" + GOOD,
                "place of 'a' is no file and no .hub id, config",
            )
            for kind, place in (
                *(("datasets", "3"), ("datasets", "None"), ("datasets", "['owner/name']")),
                *(("benchmarks", "(None, 'b', 'c')"), ("benchmarks", "('a/b', 1, None)")),
            )
        ),
        ("grade_timeout = 0\n" + GOOD, "its grade_timeout is no number of seconds"),
    ],
)
def test_files_that_are_no_task(tmp_path, code, message):
    with pytest.raises(UserError, match=message):
        Task(write(tmp_path, code))


def test_a_task_that_is_not_there():
    with pytest.raises(UserError, match="there is no task no.py; give math or a .py file"):
        Task("no.py")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            "row['word']",
            r"dataset d, row 2: task .*own.py: KeyError: 'word' \(in prompt, line 1",
        ),
        ("3", r"row 1: task .*own.py: prompt\(row\) returned 3; it must return a text"),
        ("' '", "row 1: .*must return a text"),
        ("[]", "row 1: .*must return a text"),
        ("[{'role': 'user'}]", "row 1: .*must return a text"),
        ("[{'role': 'system', 'content': 's'}]", "row 1: .*the last one the user's"),
        ("{1, 2}", "row 1: .*must return a text"),
        (
            "[{'role': 'user', 'content': 'a', 'x': {1}}]",
            "row 1: .*set is not JSON serializable",
        ),
        ("'\\ud800'", None),
        ("__import__('time').sleep(60)", r"row 1: .*prompt\(row\) takes too long"),
    ],
)
def test_rows_that_cannot_be_asked(tmp_path, returned, message):
    code = f"def prompt(row): return {returned}\ndef grade(completion, row): return 1\n"
    with Task(write(tmp_path, code), timeout_s=0.5) as task:
        rows = [{"word": "a"}, {"other": "b"}]
        if message is None:  # not the task's mistake, but the row's
            assert task.problems(rows, "d") == ["half a surrogate pair"] * 2
        else:
            with pytest.raises(UserError, match=message):
                task.problems(rows, "dataset d")


def test_a_stall_while_rows_are_read_ends_nothing(tmp_path):
    """A busy machine makes calls late that are quick by themselves."""
    code = (
        "import time\ndef prompt(row): return time.sleep(1) or 'p'\n"
        + "def grade(completion, row): return 1\n"
    )
    with Task(write(tmp_path, code), timeout_s=0.5) as task:
        assert [problem.text for problem in task.problems([{}], "d")] == ["p"]


def test_a_prompt_that_hangs_is_called_once(tmp_path):
    calls = tmp_path / "calls"
    code = f"import time\ndef prompt(row): open({str(calls)!r}, 'a').write('.'), time.sleep(60)\n"
    own = write(tmp_path, code + GOOD.split("\n")[1])
    with Task(own, timeout_s=0.2) as task, pytest.raises(UserError, match="takes too long"):
        task.problems([{"row": n} for n in range(9)], "d")
    assert calls.read_text() == "."


@pytest.mark.parametrize(("timeout_s", "outcome"), [(None, "timeout"), (20, "correct")])
def test_the_deadline_is_the_tasks_own_unless_one_is_given(tmp_path, timeout_s, outcome):
    code = "import time\ngrade_timeout = 0.5\n"
    code += GOOD.replace("return 1.0", "return time.sleep(1) or 1.0")
    with Task(write(tmp_path, code), timeout_s) as task:
        assert grade(task, ["a"], ["1"])[0].outcome == outcome


def test_rows_that_prompt_or_gold_refuses(tmp_path):
    """A ValueError is a word about the row; any other exception is the task's own mistake."""
    code = (
        "columns = {'word': ['word']}\n"
        "def prompt(row): return row['word'] if row['word'] != 'x' else int('no number')\n"
        "def gold(row): return str(1 / len(row['word']))\n"
        "def grade(completion, row): return 1\n"
    )
    with Task(write(tmp_path, code)) as task:
        found = task.problems(
            [{"word": "x"}, {"word": None}, {}, {"word": "a"}], "d", [7, 8, 9, 10]
        )
        assert found[0].startswith("ValueError: invalid literal")
        assert found[1:3] == ["no word", "no word"]
        assert (found[3].text, found[3].where) == ("a", "d, row 10")
        with pytest.raises(UserError, match="d, row 2: task .*ZeroDivisionError.*in gold"):
            task.problems([{"word": "a"}, {"word": ""}], "d")


def test_a_reward_is_rounded_where_it_enters(tmp_path):
    """0.1 + 0.2 and 0.3 are one reward: their group is no mixed one."""
    code = "def prompt(row): return 'a'\ndef grade(completion, row): return eval(completion)\n"
    with Task(write(tmp_path, code)) as task:
        verdicts = grade(task, ["0.1 + 0.2", "0.3", "1 - 1e-9", "0.9999"], ["1"] * 4)
    assert [verdict.reward for verdict in verdicts] == [0.3, 0.3, 1.0, 0.9999]
    assert [verdict.outcome for verdict in verdicts[2:]] == ["correct", "partial"]


@pytest.mark.parametrize("reward", ["1.5", "-0.1", "float('nan')", "'1'", "None", "[1]", "2"])
def test_rewards_that_are_none(tmp_path, reward):
    """Told before anything is trained; if it comes later, it costs its own item."""
    message = r"grade\(completion, row\) returned .*; it must return a number from 0 to 1"
    code = f"def prompt(row): return 'a'\ndef grade(completion, row): return {reward}\n"
    refused = pytest.raises(UserError, match=f"d, row 1: task .*own.py: {message}")
    with Task(write(tmp_path, code)) as task, refused:
        task.problems([{}], "d")
    code = code.replace(f"return {reward}", f"return {reward} if completion else 1")
    code += "def answer(completion): return None if completion == 'none' else completion\n"
    with Task(write(tmp_path, code)) as task:
        task.problems([{}], "d")
        verdicts = grade(task, ["x", "", "none"], ["1"] * 3)
    assert [verdict.outcome for verdict in verdicts] == ["crash", "correct", "no_answer"]
    assert re.fullmatch(message, verdicts[0].message)


def test_conversations_are_the_same_by_all_that_is_said(tmp_path):
    code = (
        "def prompt(row):\n"
        "    turns = [('user', row['asked']), ('assistant', 'I see.'), ('user', 'Go on.')]\n"
        "    return [{'role': role, 'content': content} for role, content in turns]\n"
        "def grade(completion, row): return 1\n"
    )
    with Task(write(tmp_path, code)) as task:
        rows = [{"asked": "a"}, {"asked": "b"}, {"asked": "a"}]
        keys = [problem.key for problem in task.problems(rows, "d")]
    assert keys[0] == keys[2] != keys[1]


def test_answers_that_are_the_same(tmp_path, capsys):
    code = GOOD + "def same(a, b): return __import__('numpy').isclose(float(a), float(b))\n"
    with Task(write(tmp_path, code), timeout_s=20) as task:
        pairs = [("0.5", ".50"), ("1", "2"), ("x", "1")]
        assert task.same(pairs) == [True, False, False]
    assert "1 calls of same() failed (ValueError: could not convert" in capsys.readouterr().out


def test_workers_that_start_no_more_are_no_mistake_of_the_user(tmp_path):
    """After it has started once: the run has failed, and can go on."""
    path = write(tmp_path, GOOD)
    with Task(path) as task:
        grade(task, ["a"], ["1"])
        Path(path).write_text("import os; os._exit(1)")
        os.kill(pids_of(task)[0], 9)
        task.pool._workers[0].process.wait()
        with pytest.raises(RunFailure, match="importing it ends its process"):
            grade(task, ["a"], ["1"])


def test_a_graders_exception_is_a_crash_with_its_message(tmp_path):
    code = "def prompt(row): return 'a'\ndef grade(completion, row): return row[completion]\n"
    with Task(write(tmp_path, code)) as task:
        (verdict,) = grade(task, ["field"], ["1"])
    assert verdict.outcome == "crash"
    assert verdict.message == "KeyError: 'field' (in grade, line 2 of own.py)"
    assert verdict.reward == 0


def test_half_a_surrogate_pair_of_a_grader_is_replaced(tmp_path, capsys):
    """In an answer, a message, a gold answer's warning or an instruction: UTF-8 has none."""
    code = (
        "instruction = '\\udfff'\ndef prompt(row): return 'a'\ndef check(row): return '\\ud800'\n"
    )
    code += "def answer(completion): return 'x\\ud800'\n"
    code += "def grade(completion, row): raise RuntimeError(completion and 'half \\ud83d')\n"
    with Task(write(tmp_path, code)) as task:
        (problem,) = task.problems([{}], "d")
        assert (problem.messages[0]["content"], problem.warning) == ("a\n?", "?")
        verdicts = task.grade(["a", "b"], [problem] * 2)
    assert verdicts[0].answer == "x?"
    assert verdicts[0].message.startswith("RuntimeError: half ?")
    assert "2 of 2 grades failed (RuntimeError: half ?" in capsys.readouterr().out


def test_the_task_file_is_imported_in_workers_only(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    code = f"open({str(tmp_path / 'pids')!r}, 'a').write(f'{{__import__(\"os\").getpid()}} ')\n"
    with Task(write(tmp_path, code + GOOD)) as task:
        grade(task, ["a"] * 20, ["1"] * 20)
    pids = set(map(int, (tmp_path / "pids").read_text().split()))
    assert pids
    assert os.getpid() not in pids
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.py", "pids"]  # no bytecode


def test_a_task_file_may_define_a_dataclass(tmp_path):
    """A dataclass looks its module up where annotations are texts."""
    code = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    with Task(write(tmp_path, code + "@dataclass\nclass Row:\n    text: str\n" + GOOD)) as task:
        assert grade(task, ["a"], ["1"])[0].correct


def test_a_late_import_is_not_timed(tmp_path):
    code = "import time\nfrom common.tasks.worker import untimed\n"
    code += "def load():\n    with untimed(): time.sleep(2)\n"
    with Task(write(tmp_path, code + GOOD.replace("return 1.0", "return load() or 1.0"))) as task:
        task.pool.timeout_s = 1
        assert grade(task, ["a"], ["1"])[0].correct


def test_a_grader_has_no_input_and_imports_nothing_from_its_scratch_folder(tmp_path):
    code = (
        "import sys\ndef prompt(row): return 'a'\n"
        "def grade(completion, row):\n"
        "    if completion == 'imports': import late\n"
        "    open('late.py', 'w').close()\n"
        "    return sys.stdin.read() == ''\n"
    )
    with Task(write(tmp_path, code)) as task:
        task.pool.num_workers = 1
        verdicts = grade(task, ["reads", "imports"], ["1", "1"])
    assert [verdict.outcome for verdict in verdicts] == ["correct", "crash"]
    assert verdicts[1].message.startswith("ModuleNotFoundError: No module named 'late'")


@pytest.mark.parametrize(
    ("completion", "answering"),
    [
        ("<think>1</think>2", "2"),
        ("<think>1</think> done", " done"),
        ("<think>it could be 1", ""),
        ("1</think>2", "2"),
        ("<s>4</s>5", "<s>4</s>5"),  # of a tokenizer's own tokens the rollout's text has none
        ("4", "4"),
    ],
)
def test_thoughts_are_not_graded(completion, answering):
    assert answering_part(completion) == answering


# === workers ===


def test_hostile_answers_cost_their_own_deadline_only():
    """20 bombs among 20 good answers: the good ones are graded, in order; no worker is left."""
    completions, golds = [], []
    for i in range(20):
        completions += [BOMBS[i % 2], rf"\boxed{{\frac{{{2 * i + 1}}}{{2}}}}"]
        golds += [POWERS, str(i + 0.5)]  # where the gold is a number, a bomb is wrong at once
    with Task(timeout_s=0.5) as task:
        verdicts = grade(task, completions, golds)
        pids = pids_of(task)
    assert [verdict.outcome for verdict in verdicts[1::2]] == ["correct"] * 20
    assert {verdict.outcome for verdict in verdicts[::2]} <= {"timeout", "crash"}
    assert verdicts[0].answer == "9^{9^{9^9}}"  # what was read is known all the same
    assert_gone(pids)


def test_limits(task):
    grade(task, ["a"], ["1"])
    limits = Path(f"/proc/{pids_of(task)[-1]}/limits").read_text().splitlines()
    limit_of = {line[:25].strip(): line.split()[-3] for line in limits}
    assert limit_of["Max address space"] == str(2048 << 20)
    assert limit_of["Max file size"] == str(1 << 28)


def test_a_killed_worker_is_replaced(tmp_path):
    """kill -9 in mid-item: it may be an earlier item's fault, so that this one is graded again."""
    code = GOOD.replace("return 1.0", "time.sleep(0.5 * (completion == 'slow')); return 1.0")
    with Task(write(tmp_path, "import time\n" + code), timeout_s=5) as task:
        task.pool.num_workers = 1
        for number in (0, 1):  # the keeper, then the process that answers
            assert grade(task, ["quick"], ["1"])[0].correct
            threading.Timer(0.2, os.kill, (pids_of(task)[number], 9)).start()
            verdicts = grade(task, ["slow", "quick"], ["1", "1"])
            assert [verdict.outcome for verdict in verdicts] == ["correct", "correct"]
        os.kill(pids_of(task)[0], 9)
        task.pool._workers[0].process.wait()
        assert grade(task, ["quick"], ["1"])[0].correct  # it died while idle


def test_a_grade_that_hangs_ends_with_its_keeper(tmp_path):
    code = GOOD.replace("return 1.0", "return time.sleep(60 * (completion == 'hangs')) or 1.0")
    with Task(write(tmp_path, "import time\n" + code), timeout_s=1) as task:
        assert grade(task, ["quick"], ["1"])[0].correct
        pids = pids_of(task)
        threading.Timer(0.2, os.kill, (pids[0], 9)).start()
        assert grade(task, ["hangs"], ["1"])[0].outcome == "timeout"  # asked again, in vain
        assert_gone(pids)


def test_a_reply_to_an_earlier_call_is_none_to_this_one(tmp_path):
    """A child that a grader has left behind speaks over its channel, once the next call runs."""
    code = (
        "import json, os, time\nfrom common.tasks import worker\n"
        "def prompt(row): return 'a'\n"
        "def grade(completion, row):\n"
        "    channel = worker.channel\n"
        "    late = json.dumps([channel.number, 'value', 0.25]) + '\\n'\n"
        "    if completion == 'leaves a child' and os.fork() == 0:\n"
        "        time.sleep(0.3)\n"
        "        channel.socket.sendall(late.encode())\n"
        "        os._exit(0)\n"
        "    time.sleep(1.0 * (completion == 'slow'))\n"
        "    return 1.0\n"
    )
    with Task(write(tmp_path, code), timeout_s=5) as task:
        task.pool.num_workers = 1
        verdicts = grade(task, ["leaves a child", "slow", "quick"], ["1"] * 3)
        assert [verdict.reward for verdict in verdicts] == [1.0, 1.0, 1.0]
        assert len(task.pool._workers) == 1  # nobody was replaced meanwhile


def test_as_many_workers_as_cores_share_the_calls(tmp_path, monkeypatch):
    """Eight calls of half a second, on four cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    code = "import time\n" + GOOD.replace("return 1.0", "time.sleep(0.5); return 1.0")
    with Task(write(tmp_path, code), timeout_s=5) as task:
        verdicts = grade(task, [str(n) for n in range(8)], ["1"] * 8)
        assert [verdict.reward for verdict in verdicts] == [1.0] * 8
        assert len(task.pool._workers) == 4


def test_what_an_earlier_completion_answered_is_not_this_ones_answer(tmp_path):
    code = GOOD + "import time\n"
    code += "def answer(completion): return completion if completion == 'a' else time.sleep(60)\n"
    with Task(write(tmp_path, code), timeout_s=0.5) as task:
        task.pool.num_workers = 1
        first, second = grade(task, ["a", "slow"], ["1", "1"])
        assert (first.answer, second) == ("a", Verdict("timeout", 0.0, None))


def test_any_thread_may_call(task):
    results = {}

    def work(i: int) -> None:
        results[i] = grade(task, [rf"\boxed{{\frac{{{i}}}{{11}}}}"] * 5, [f"{i}/11"] * 5)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(verdict.correct for i in range(1, 5) for verdict in results[i])


def test_workers_import_neither_torch_nor_sympy_before_they_must():
    with Task() as task:
        grade(task, [r"\boxed{3}"], ["4"])
        maps = Path(f"/proc/{pids_of(task)[-1]}/maps").read_text()
        assert "python" in maps
        assert "torch" not in maps
        assert "mpz" not in maps  # sympy's numbers


def test_a_row_longer_than_the_sockets_buffer(tmp_path):
    code = "def prompt(row): return row['text']\n"
    code += "def grade(completion, row): return len(row['text']) == len(completion)\n"
    with Task(write(tmp_path, code)) as task:
        (problem,) = task.problems([{"text": "x" * 1_000_000}], "d")
        assert problem.text == "x" * 1_000_000
        assert task.grade(["y" * 1_000_000], [problem])[0].correct


def test_more_than_1023_open_files():
    """select.select takes none above."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with Task() as task:
            assert grade(task, [r"\boxed{\frac12}"], ["0.5"])[0].correct
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


HOSTILE = {
    "hangs": "while True: pass",
    "sleeps deaf to signals": "import signal as s, time; s.signal(15, s.SIG_IGN); time.sleep(60)",
    "forks and both return": "os.fork()",
    "leaves a child in its own session": "os.fork() or (os.setsid(), os.fork(), time.sleep(600))",
    "has a name that is no text": "import ctypes; ctypes.CDLL(None).prctl(15, b'\\xff');"
    "os.fork() or (os.setsid(), time.sleep(600))",
    "fills memory": "bytearray(1 << 34)",
    "fills the disk": "open('big', 'wb').write(bytearray(1 << 29))",
    "kills itself": "os.kill(os.getpid(), 9)",
    "kills its group": "os.killpg(0, 9)",
    "kills its parent's group": "os.killpg(os.getpgid(os.getppid()), 9)",
    "writes to stdout": "print('[1, \"value\", 1.0]', flush=True); os.write(1, b'x\\n' * 999)",
    "writes to a channel": "for n in os.listdir('/proc/self/fd')[3:-1]: os.write(int(n), b'x\\n')",
    "closes everything": "os.closerange(3, 99)",
    "exits": "os._exit(0)",
    "recurses": "f = lambda: f(); f()",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_grader_costs_its_own_item(tmp_path, kind):
    code = (
        "import os, time\ndef prompt(row): return 'a'\n"
        "def grade(completion, row):\n"
        f"    if completion == 'hostile':\n        {HOSTILE[kind]}\n        return 0.5\n"
        "    return 1.0\n"
    )
    with Task(write(tmp_path, code), timeout_s=1.0) as task:
        verdicts = grade(task, ["good", "hostile", "good", "hostile", *["good"] * 8], ["1"] * 12)
        outcomes = [verdict.outcome for verdict in verdicts]
        pids = pids_of(task)
    harmless = {"forks and both return", "leaves a child in its own session", "writes to stdout"}
    harmless.add("has a name that is no text")
    expected = {"partial"} if kind in harmless else {"timeout", "crash"}
    if kind == "kills its parent's group":  # which is not its own: it may come to its end
        expected = {"crash", "partial"}
    assert {outcomes.pop(3), outcomes.pop(1)} <= expected
    assert outcomes == ["correct"] * 10
    assert_gone(pids)
    mine = [stat for stat in Path("/proc").glob("[0-9]*/cmdline") if is_of(stat, tmp_path)]
    assert mine == []


def is_of(cmdline: Path, folder: Path) -> bool:
    """Whether a process is a worker of this test's task."""
    try:
        return str(folder).encode() in cmdline.read_bytes()
    except OSError:
        return False


def test_nothing_is_left_in_the_scratch_folder(tmp_path):
    code = (
        "import os\ndef prompt(row): return os.getcwd()\n"
        "def grade(completion, row): return open('a', 'w').write('text') == 4\n"
    )
    with Task(write(tmp_path, code)) as task:
        scratch = Path(task.problems([{}], "d")[0].text)
        assert grade(task, ["a"], ["1"])[0].correct
        assert (scratch / "a").read_text() == "text"  # one item, one worker: the same
    assert not scratch.exists()
