"""Kills, damaged files, full disks, signals: pytest -m faults. KILLS=500 pytest -m faults for more.

What is promised: a resumed run ends with the weights and the metrics of the uninterrupted one, to
the bit (here: one machine, one thread).
"""

import json
import os
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import forked
import pytest
from conftest import SEED

from common.run.inputs import ROOT

pytestmark = pytest.mark.faults
KILLS = int(os.environ.get("KILLS", "30"))
SIZES = ["--prompts_per_step", "4", "--group_size", "4", "--max_new_tokens", "16"]
SMALL = [*SIZES, "--warmup_steps", "1", "--num_steps", "6", "--checkpoint_every", "2"]
TRAINERS = {
    "grpo": [*SMALL, "--dynamic_sampling", "--num_minibatches", "2", "--eval_every", "3"],
    "opd": SMALL,
    "fkl_warmup": SMALL,
}
SHARD = "shard-00001-model-00001-of-00001.safetensors"  # parameters and optimizer of one rank
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


class Server:
    """Runs trainers, forked from one warm Python."""

    def run(self, script: str, folder: Path, fault=None, flags=()) -> int:
        """Return the exit code; that of a killed child is negative."""
        flags = [*TRAINERS[script], *flags, "--output_dir", str(folder)]
        words = [str(ROOT / f"{script}.py"), *flags]
        code, *self.printed = forked.run(words, 1, fault)
        return code

    def output(self) -> str:
        return "".join(self.printed)


@pytest.fixture(scope="module")
def server():
    return Server()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """Each trainer's uninterrupted run."""
    root = tmp_path_factory.mktemp("whole")
    for script in TRAINERS:
        assert server.run(script, root / script) == 0, server.output()
    return root


def metrics_of(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def same_end(folder: Path, whole: Path) -> None:
    weights = [(run / "final" / "model.safetensors").read_bytes() for run in (folder, whole)]
    assert weights[0] == weights[1]
    assert metrics_of(folder) == metrics_of(whole)  # each step once
    for step in range(1, 7):
        name = f"rollouts/step_{step}.jsonl"
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    manifests = [json.loads((run / "manifest.json").read_text()) for run in (folder, whole)]
    assert [{**m, "seconds": 0} for m in manifests][0] == {**manifests[1], "seconds": 0}


SITES = ("time", "generate", "update", "disk", "between files")


def random_fault(rng: random.Random, number: int) -> tuple[str, float]:
    site = SITES[number % len(SITES)]
    most = {"generate": 60, "update": 8, "disk": 24, "between files": 3}
    return site, rng.uniform(0.1, 2.5) if site == "time" else rng.randint(1, most[site])


@pytest.mark.parametrize("script", TRAINERS)
def test_killed_runs_end_like_the_uninterrupted_one(script, server, whole, tmp_path):
    seed = f"{SEED}-{script}"
    print(f"seed: {seed}")
    rng, numbers, kills, runs, sites = random.Random(seed), count(), 0, 0, set()
    while kills < KILLS / 3 or (len(sites) < len(SITES) and runs < 20):
        folder, faults = tmp_path / f"run_{runs}", []
        while True:
            faults.append(random_fault(rng, next(numbers)))
            code = server.run(script, folder, faults[-1])
            if code == 0:
                break
            assert code == -signal.SIGKILL, (faults, server.output())
            kills += 1
            sites.add(faults[-1][0])
            if len(faults) == 6:  # enough for one run
                assert server.run(script, folder) == 0, (faults, server.output())
                break
        runs += 1
        same_end(folder, whole / script)
        shutil.rmtree(folder)
    print(f"{kills} kills in {runs} runs, at {sorted(sites)}")
    assert len(sites) == len(SITES)


@pytest.fixture(scope="module")
def cut(server, tmp_path_factory):
    """A run that was killed in step 5, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    assert server.run("opd", folder, ("update", 5)) == -signal.SIGKILL
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"step_2", "step_4"}
    return folder


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_put_aside(harm, server, whole, cut, tmp_path):
    files = sorted(p.name for p in (cut / "checkpoints" / "step_4").iterdir())
    assert {SHARD, "rng.safetensors", "progress.json", "checksums.json"} == set(files)
    for name in files:
        folder = tmp_path / name
        shutil.copytree(cut, folder)
        path = folder / "checkpoints" / "step_4" / name
        content = bytearray(path.read_bytes())
        if harm == "remove":
            path.unlink()
        elif harm == "truncate":
            path.write_bytes(content[: len(content) // 2])
        else:
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        assert server.run("opd", folder) == 0, (name, server.output())
        assert "step_4 is damaged" in server.output()
        assert "after step 2" in server.output()
        same_end(folder, whole / "opd")


def test_no_whole_checkpoint_starts_over(server, whole, cut, tmp_path):
    shutil.copytree(cut, tmp_path / "run")
    for step in (2, 4):
        (tmp_path / "run" / "checkpoints" / f"step_{step}" / SHARD).write_bytes(b"")
    assert server.run("opd", tmp_path / "run") == 0
    same_end(tmp_path / "run", whole / "opd")


def test_a_half_written_checkpoint_is_no_checkpoint(server, whole, cut, tmp_path):
    shutil.copytree(cut, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step_4").rename(checkpoints / "step_6.tmp")
    assert server.run("opd", tmp_path / "run") == 0
    assert "after step 2" in server.output()
    same_end(tmp_path / "run", whole / "opd")


def one_line(output: str, begins: str) -> str:
    lines = [line for line in output.replace("\r", "\n").splitlines() if line.startswith(begins)]
    assert "Traceback" not in output
    assert len(lines) == 1
    return lines[0]


def test_a_full_disk(server, whole, tmp_path):
    """No file may pass 100 kB: the first checkpoint cannot be written."""
    folder = tmp_path / "run"
    assert server.run("opd", folder, ("file size", 100_000)) == 1
    message = one_line(server.output(), "error: ")
    assert "cannot write to" in message
    assert "the same command goes on" in message
    assert not list((folder / "checkpoints").glob("step_?"))
    assert server.run("opd", folder) == 0, server.output()
    same_end(folder, whole / "opd")


def test_a_full_tmpfs(server, whole, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(mount)]
    try:
        done = subprocess.run(["mount", *options], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode != 0:
        pytest.skip("this machine lets us mount nothing")
    try:
        assert server.run("opd", mount / "run", flags=["--keep_checkpoints", "3"]) == 1
        assert "No space left on device" in one_line(server.output(), "error: ")
        shutil.copytree(mount / "run", tmp_path / "run")
    finally:
        subprocess.run(["umount", str(mount)], check=True)
    assert server.run("opd", tmp_path / "run", flags=["--keep_checkpoints", "3"]) == 0
    same_end(tmp_path / "run", whole / "opd")


def test_an_engine_that_dies_loses_nothing(server, whole, tmp_path):
    """In the generation of step 4, after a checkpoint at 2: the third step is saved."""
    for script, calls in (("opd", 4), ("fkl_warmup", 4)):
        folder = tmp_path / script
        assert server.run(script, folder, ("engine", calls)) == 1
        assert "the engine has died" in one_line(server.output(), "error: ")
        assert server.run(script, folder) == 0
        assert "after step 3" in server.output()
        same_end(folder, whole / script)


# Teacher and student compute hidden states once a step (one micro-batch): the fifth is of step 3.
NAN = 5


def test_a_loss_that_is_not_finite(server, whole, tmp_path):
    assert server.run("opd", tmp_path / "run", ("nan", NAN)) == 1
    message = one_line(server.output(), "error: ")
    assert "step 3: loss nan" in message
    assert "--skip_nonfinite" in message
    batch = (tmp_path / "run" / "nonfinite_step_3.jsonl").read_text().splitlines()
    assert len(batch) == 16
    assert server.run("opd", tmp_path / "run") == 0  # without the fault it is the same run
    same_end(tmp_path / "run", whole / "opd")
    assert server.run("opd", tmp_path / "skip", ("nan", NAN), ["--skip_nonfinite"]) == 0
    rows = metrics_of(tmp_path / "skip")
    assert [row["optim/skipped"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert rows[2]["loss/total"] is None
    assert "NaN" not in (tmp_path / "skip" / "metrics.jsonl").read_text()


# === signals ===


def begin(script: str, folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags, "--output_dir", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, env=ENVIRONMENT)


def wait_for_steps(folder: Path, count: int) -> None:
    for _ in range(600):
        path = folder / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.1)
    raise AssertionError(f"{folder} has not come to step {count}")


LONG = [*SIZES, "--num_steps", "4000", "--checkpoint_every", "0", "--warmup_steps", "1"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_last_completed_step(number, tmp_path):
    folder = tmp_path / "run"
    process = begin("grpo", folder, *LONG)
    wait_for_steps(folder, 3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    steps = len(metrics_of(folder))
    message = one_line(errors, "stopped by ")
    assert message == f"stopped by {number.name} after step {steps}; the same command goes on"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step_{steps}"]
    process = begin("grpo", folder, *LONG)
    wait_for_steps(folder, steps + 2)
    process.kill()
    output, _ = process.communicate()
    assert f"after step {steps}" in output
    assert [row["step"] for row in metrics_of(folder)][: steps + 2] == list(range(1, steps + 3))


def test_a_second_signal_stops_at_once(tmp_path):
    folder = tmp_path / "run"
    flags = ["--num_steps", "9", "--prompts_per_step", "512", "--learning_rate", "1e-4"]
    process = begin("grpo", folder, *flags)  # a long generation
    while not (folder / "checkpoints").exists():
        time.sleep(0.1)
    time.sleep(2)
    process.terminate()
    time.sleep(0.3)
    began = time.perf_counter()
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert time.perf_counter() - began < 2


def test_two_runs_do_not_share_a_folder(tmp_path):
    folder = tmp_path / "run"
    first = begin("grpo", folder, *LONG)
    wait_for_steps(folder, 1)
    second = begin("grpo", folder, *LONG)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 2
    assert "another process is writing to" in one_line(errors, "error: ")
    first.kill()
    first.communicate()


# === the workflow ===

TINY = [*SIZES, "--num_steps", "2", "--num_samples", "2", "--num_problems", "8"]


def finish(folder: Path) -> None:
    """Continue until it is done; a stage that outlived its killed parent holds its lock a while."""
    for _ in range(20):
        done = subprocess.run(
            [sys.executable, str(ROOT / "bridge.py"), *TINY, "--output_dir", str(folder)],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
        )
        if done.returncode == 0:
            return
        assert "another process is writing" in done.stderr, done.stderr
        time.sleep(1)
    raise AssertionError(done.stderr)


def test_the_workflow_killed_in_each_stage(tmp_path):
    """Killed some random time after each stage began, continued each time; ends like one that was
    not killed."""
    print(f"seed: {SEED}")
    rng, folder, killed, waited = random.Random(SEED), tmp_path / "killed", [], 0
    finish(tmp_path / "whole")
    while len(killed) < 12:
        process = begin("bridge", folder, *TINY)
        for line in process.stdout:
            name = line.removeprefix("# ").strip()
            if line.startswith("# ") and "finished before" not in line and name not in killed:
                time.sleep(rng.uniform(0, 1))
                process.kill()
                killed.append(name)
                break
        process.stdout.close()
        with process.stderr:
            errors = process.stderr.read()
        if process.wait() == 0:
            break
        if process.returncode != -signal.SIGKILL:
            waited += 1
            assert "another process is writing" in errors, errors
            assert waited < 60
        time.sleep(0.5)
    finish(folder)
    assert len(killed) >= 8  # some end before they are killed
    whole = tmp_path / "whole" / "seed_0"
    for path in whole.rglob("model.safetensors"):
        if path.parent.name == "final":
            twin = folder / "seed_0" / path.relative_to(whole)
            assert twin.read_bytes() == path.read_bytes(), path


def test_a_folder_of_a_run_that_was_killed_at_once_is_its_own(tmp_path):
    """A kill or a signal while the first file is written leaves half of it, under another name."""
    run, study = tmp_path / "run", tmp_path / "study"
    run.mkdir()
    (run / "config.json.tmp").write_text('{"seed"')
    (study / "base").mkdir(parents=True)
    for script, folder, flags in (("opd", run, SMALL), ("bridge", study, [*TINY, "--dry_run"])):
        process = begin(script, folder, *flags)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def test_a_signal_to_the_workflow_reaches_its_stage(tmp_path):
    folder = tmp_path / "run"
    process = begin("bridge", folder, *TINY, "--num_steps", "4000")
    stage = folder / "seed_0" / "teacher_grpo"
    wait_for_steps(stage, 2)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    waits, last = errors.strip().splitlines()[-2:]
    assert waits == "waiting for teacher_grpo to end a phase; a second signal stops at once"
    assert "stopped by SIGTERM" in last
    steps = len(metrics_of(stage))
    assert [p.name for p in (stage / "checkpoints").iterdir()] == [f"step_{steps}"]
    assert not (folder / "seed_0" / "fkl_warmup").exists()


@pytest.mark.parametrize("script", ["grpo", "bridge"])
def test_a_closed_terminal_ends_the_run_after_a_saved_step(script, tmp_path):
    """Its processes get SIGHUP, and can write to it no more."""
    folder = tmp_path / "run"
    flags = LONG if script == "grpo" else [*TINY, "--num_steps", "4000"]
    run = folder if script == "grpo" else folder / "seed_0" / "teacher_grpo"
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags, "--output_dir", str(folder)]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
        os.execve(sys.executable, command, ENVIRONMENT)
    metrics, until = run / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or len(metrics_of(run)) < 3:
        assert time.monotonic() < until
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 1 << 16)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (128 + signal.SIGHUP, 1)
    steps = len(metrics_of(run))
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{steps}"]
