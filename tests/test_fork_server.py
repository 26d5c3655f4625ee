"""A forked stage is what its printed command is, and nothing outlives the workflow."""

import json
import os
import signal
import subprocess
import sys

import pytest
from test_scripts import SMALL, run_process

from common.run.errors import RunFailure
from common.run.inputs import ROOT
from workflow.fork_server import ForkServer

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "2"}  # as test_scripts.run


@pytest.fixture(scope="module")
def server():
    with ForkServer(ENVIRONMENT) as server:
        yield server


def fork(server: ForkServer, *words: object) -> tuple[int, str]:
    """Exit code and output of a forked script."""
    process = server.start([str(word) for word in words])
    with process.stdout:
        output = process.stdout.read().decode()
    return process.wait(), output


def test_a_forked_stage_ends_like_the_same_command_by_hand(server, tmp_path):
    for script in ("grpo", "opd"):
        flags = [*SMALL, "--num_steps", "2", "--output_dir"]
        forked, by_hand = tmp_path / "forked" / script, tmp_path / "by_hand" / script
        code, output = fork(server, ROOT / f"{script}.py", *flags, forked)
        assert code == 0, output
        assert run_process(script, *flags, by_hand).returncode == 0
        assert f"finished {forked}: 2 steps" in output
        for name in ("final/model.safetensors", "rollouts/step_2.jsonl"):
            assert (forked / name).read_bytes() == (by_hand / name).read_bytes(), name


def test_what_a_forked_script_finds(server, tmp_path, monkeypatch):
    """Itself as __main__, its flags, a session of its own, one thread, no seed that others have."""
    script = tmp_path / "stub.py"
    script.write_text(
        "import json, os, random, sys, threading, torch\n"
        "print(json.dumps({'name': __name__, 'argv': sys.argv[1:], 'path': sys.path[0],\n"
        "    'cwd': os.getcwd(), 'session': os.getsid(0) == os.getpid(),\n"
        "    'python_threads': threading.active_count(), 'threads': torch.get_num_threads(),\n"
        "    'stdin': sys.stdin.read(), 'random': random.random()}))\n"
    )
    monkeypatch.chdir(tmp_path)
    found = [json.loads(fork(server, script, "--flag", "a b")[1]) for _ in range(2)]
    assert found[0].pop("random") != found[1].pop("random")
    assert (
        found[0]
        == found[1]
        == {
            **{"name": "__main__", "argv": ["--flag", "a b"], "path": str(tmp_path)},
            **{
                "cwd": str(tmp_path),
                "session": True,
                "python_threads": 1,
                "threads": 2,
                "stdin": "",
            },
        }
    )


@pytest.mark.parametrize(
    ("body", "code", "output"),
    [
        ("raise ValueError('no')", 1, "ValueError: no"),
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('a message')", 1, "a message"),
        ("import threading as t; t.Timer(0.2, print, ['late']).start()", 0, "late"),
        ("import atexit; atexit.register(print, 'the end')", 0, "the end"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
    ],
)
def test_exit_codes(server, tmp_path, body, code, output):
    (tmp_path / "stub.py").write_text(body)
    ended, printed = fork(server, tmp_path / "stub.py")
    assert ended == code
    assert output in printed


def test_bad_flags_are_one_line(server):
    code, output = fork(server, ROOT / "grpo.py", "--no_such_flag")
    assert code == 2
    assert output.startswith("error: ")
    assert output.count("\n") == 1


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
        "import os, sys; from workflow.fork_server import ForkServer\n"
        "process = ForkServer(os.environ).start([sys.argv[1]])\n"
        "print(process.stdout.readline().decode(), flush=True)\n"
        "process.stdout.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "stub.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    workflow = subprocess.Popen(command, **pipes, cwd=ROOT)
    assert workflow.stdout.readline() == b"begin\n"
    workflow.kill()
    workflow.communicate(timeout=60)  # its stderr is the server's too: read to the end
    for _ in range(600):
        if stopped.exists():
            return
        signal.sigtimedwait([], 0.1)
    raise AssertionError("the stage was not stopped")


def test_a_server_that_died_is_one_line(tmp_path):
    (tmp_path / "stub.py").write_text("import time; time.sleep(600)")
    with ForkServer(ENVIRONMENT) as server:
        process = server.start([str(tmp_path / "stub.py")])
        server.process.kill()
        with pytest.raises((RunFailure, OSError)):
            process.wait()
        process.send_signal(signal.SIGKILL)
