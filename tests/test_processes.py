"""A forked stage is what its printed command is, and nothing outlives the workflow."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from test_scripts import SMALL, run_process

from common.run.errors import UserError
from common.run.inputs import ROOT
from common.run.process import STOP, Stopped
from workflow import processes
from workflow.processes import run_script, start_forked
from workflow.stages import Stage


def fork(*words: object) -> tuple[int, str]:
    """Exit code and output of a forked script."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    process = start_forked(run_script, [str(word) for word in words], writer)
    writer.close()
    output = b"".join(iter(lambda: os.read(reader.fileno(), 1 << 16), b""))
    process.join()
    return process.exitcode, output.decode()


@pytest.mark.slow
def test_a_forked_stage_ends_like_the_same_command_by_hand(tmp_path):
    for script in ("grpo", "opd"):
        flags = [*SMALL, "--num_steps", "2", "--output_dir"]
        forked, by_hand = tmp_path / "forked" / script, tmp_path / "by_hand" / script
        code, output = fork(ROOT / f"{script}.py", *flags, forked)
        assert code == 0, output
        assert run_process(script, *flags, by_hand).returncode == 0
        assert f"finished {forked}: 2 steps" in output
        for name in ("final/model.safetensors", "rollouts/step_2.jsonl"):
            assert (forked / name).read_bytes() == (by_hand / name).read_bytes(), name


def test_what_a_forked_script_finds(tmp_path, monkeypatch):
    """Itself as __main__, its flags, a session of its own, no seed that others have."""
    script = tmp_path / "stub.py"
    script.write_text(
        "import json, os, random, sys\n"
        "print(json.dumps({'name': __name__, 'argv': sys.argv[1:], 'cwd': os.getcwd(),\n"
        "    'session': os.getsid(0) == os.getpid(), 'stdin': sys.stdin.read(),\n"
        "    'imported': 'transformers.modeling_utils' in sys.modules,\n"
        "    'random': random.random()}))\n"
    )
    monkeypatch.chdir(tmp_path)
    found = [json.loads(fork(script, "--flag", "a b")[1]) for _ in range(2)]
    assert found[0].pop("random") != found[1].pop("random")
    expected = {"name": "__main__", "argv": ["--flag", "a b"], "cwd": str(tmp_path)}
    assert found == [expected | {"session": True, "stdin": "", "imported": True}] * 2


@pytest.mark.parametrize(
    ("body", "code", "output"),
    [
        ("raise ValueError('no')", 1, "ValueError: no"),
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('a message')", 1, "a message"),
        ("import threading as t; t.Timer(0.2, print, ['late']).start()", 0, "late"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
    ],
)
def test_exit_codes(tmp_path, body, code, output):
    (tmp_path / "stub.py").write_text(body)
    ended, printed = fork(tmp_path / "stub.py")
    assert ended == code
    assert output in printed


def test_bad_flags_are_one_line():
    code, output = fork(ROOT / "grpo.py", "--no_such_flag")
    assert code == 2
    assert output.startswith("error: ")
    assert output.count("\n") == 1


TASK = """
from common.tasks.math import *
datasets = {"sums": "sums.jsonl"}
benchmarks = {"held out": "held_out.jsonl"} | datasets
"""


def test_a_stage_is_finished_if_its_rows_are_what_they_were(tmp_path, capsys):
    """A file that was replaced is looked at again by its stage, which goes by the rows."""
    task, file = tmp_path / "sums.py", tmp_path / "sums.jsonl"
    task.write_text(TASK)
    (tmp_path / "held_out.jsonl").write_text('{"problem": "1+1", "answer": "2"}')
    rows = [{"problem": f"{n}+1", "answer": str(n + 1)} for n in range(10, 18)]
    fixed = {"task": str(task), "output_dir": str(tmp_path / "eval")}
    fixed |= {"benchmarks": ("sums",), "num_samples": 1, "device": "cpu"}
    stages = [Stage("eval", "evaluate", "evaluate.py", tmp_path / "eval", fixed, {})]
    fixed = fixed | {"dataset": "sums", "learning_rate": 1e-3, "output_dir": str(tmp_path / "run")}
    fixed = {name: fixed[name] for name in fixed if name not in ("benchmarks", "num_samples")}
    fixed |= {"num_steps": 1, "warmup_steps": 0, "prompts_per_step": 2, "group_size": 2}
    stages.append(Stage("run", "opd", "opd.py", tmp_path / "run", fixed, {}))

    def run_with(rows: list[dict], separators=(",", ":")) -> str:
        text = "".join(json.dumps(row, separators=separators) + "\n" for row in rows)
        file.write_text(text)
        processes.run_stages(stages, 1, processes.FORKS is not None)
        return capsys.readouterr().out

    run_with(rows)
    assert run_with(rows).count("finished before") == 2
    assert "is there already" in run_with(rows, (", ", ": "))
    assert run_with(rows, (", ", ": ")).count("finished before") == 2
    for first in (0, 1):
        stages[:] = stages[first:]
        with pytest.raises(UserError, match="of another config .*prompts_fingerprint"):
            run_with([row | {"answer": "999"} for row in rows])
        assert f"{file}: not the file or the commit" in capsys.readouterr().out


def test_a_finished_stage_is_looked_at_by_one_process(tmp_path, monkeypatch):
    """Another machine, with another cache of the hub's, may see no reason to."""
    (tmp_path / "stub.py").write_text("")
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    stage = Stage(
        "a", "", "stub.py", tmp_path / "a", {}, {}, launcher=("torchrun", "--nnodes", "2")
    )
    stage.folder.mkdir()
    stage.manifest.write_text("{}")
    child = processes.Child(stage, forks=False)
    child.finish()
    assert child.process.args == [sys.executable, str(tmp_path / "stub.py")]


def test_a_signal_waits_until_the_child_has_an_owner(tmp_path, monkeypatch):
    """Every child is ended and reaped, though the signal comes while it starts."""
    started = []

    class Interrupted(processes.Child):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(self)
            STOP.catch(signal.SIGINT, None)

    (tmp_path / "stub.py").write_text("import time; time.sleep(600)")
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    monkeypatch.setattr(processes, "Child", Interrupted)
    monkeypatch.setattr(STOP, "number", None)
    with pytest.raises(Stopped, match="SIGINT"):
        processes.run_stages([Stage("a", "", "stub.py", tmp_path / "a", {}, {})], 1)
    assert started[0].process.returncode is not None


WORKFLOW = """
import sys
from dataclasses import dataclass
from pathlib import Path
from common.run.process import start
from workflow import processes
from workflow.stages import Stage

@dataclass
class Args:
    pass

def main(args):
    folder = Path(sys.path[-1])
    processes.ROOT, processes.PRELOADED[:] = folder, ["slow"]
    processes.run_stages([Stage("a", "", "stub.py", folder / "a", {}, {})], 1, True)

sys.path.append(sys.argv.pop())
start(main, Args, "")
"""


@pytest.mark.faults
def test_ctrl_c_while_the_warm_python_starts(tmp_path):
    """It reaches the whole group of processes: one line, and no stage is left."""
    loading, pid = tmp_path / "loading", tmp_path / "pid"
    slow = f"import pathlib, time; pathlib.Path({str(loading)!r}).touch(); time.sleep(1)"
    (tmp_path / "slow.py").write_text(slow)
    stub = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))"
    (tmp_path / "stub.py").write_text(f"{stub}; time.sleep(600)")
    command = [sys.executable, "-c", WORKFLOW, str(tmp_path)]
    how = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "start_new_session": True}
    workflow = subprocess.Popen(command, **how, cwd=ROOT, text=True)
    while not loading.exists():
        time.sleep(0.02)
    os.killpg(workflow.pid, signal.SIGINT)
    _, printed = workflow.communicate(timeout=60)
    assert workflow.returncode == 128 + signal.SIGINT, printed
    assert printed.splitlines()[-1] == "stopped by SIGINT; the same command goes on"
    assert "Traceback" not in printed
    if pid.exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


@pytest.mark.faults
def test_a_killed_workflow_leaves_no_server_and_no_stage(tmp_path):
    """SIGKILL: the socket closes, the server stops what runs, and ends."""
    stopped = tmp_path / "stopped"
    (tmp_path / "stub.py").write_text(
        "import pathlib, signal, sys, time\n"
        f"stop = lambda *_: (pathlib.Path({str(stopped)!r}).touch(), sys.exit())\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "print('begin', flush=True)\n"
        "time.sleep(600)\n"
    )
    code = (
        "import multiprocessing, os, sys\n"
        "from workflow.processes import run_script, start_forked\n"
        "reader, writer = multiprocessing.Pipe(duplex=False)\n"
        "start_forked(run_script, [sys.argv[1]], writer)\n"
        "print(os.read(reader.fileno(), 6).decode(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "stub.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    workflow = subprocess.Popen(command, **pipes, cwd=ROOT)
    assert workflow.stdout.readline() == b"begin\n"
    workflow.kill()
    workflow.wait()
    for _ in range(600):
        if stopped.exists():
            return
        signal.sigtimedwait([], 0.1)
    raise AssertionError("the stage was not stopped")
