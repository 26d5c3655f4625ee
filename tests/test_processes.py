"""A forked stage is what its printed command is, and nothing outlives the workflow."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
from test_scripts import SMALL, run_process

from common.run.inputs import ROOT
from workflow.processes import run_script, start_forked


def fork(*words: object) -> tuple[int, str]:
    """Exit code and output of a forked script."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    process = start_forked(run_script, [str(word) for word in words], writer)
    writer.close()
    output = b"".join(iter(lambda: os.read(reader.fileno(), 1 << 16), b""))
    process.join()
    return process.exitcode, output.decode()


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
