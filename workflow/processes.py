"""Stages as child processes: what is ready runs, `jobs` at a time; a failure stops the others."""

import contextlib
import multiprocessing
import os
import re
import runpy
import selectors
import signal
import subprocess
import sys
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection

from common.run.errors import RunFailure, UserError
from common.run.inputs import ROOT
from common.run.process import SIGNALS, STOP, Stopped
from workflow.stages import Stage

# One rank on a CPU is forked from a warm Python, which has paid for the imports already. It runs no
# torch operation and starts no thread, so that a child is what a fresh Python is after its imports.
FORKS = multiprocessing.get_context("forkserver") if sys.platform == "linux" else None
PRELOADED = ["grpo", "opd", "fkl_warmup", "evaluate", "workflow.processes"]
PRELOADED += ["torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor"]
PRELOADED += ["transformers.modeling_utils", "common.sampling.decoding"]


def start_forked(run, *args) -> multiprocessing.Process:
    """Call run(*args) in a child that is forked from the warm Python. Ctrl-C, which reaches that
    Python too, is for the workflow alone."""
    FORKS.set_forkserver_preload(PRELOADED)
    resource_tracker.ensure_running()  # it would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with contextlib.chdir(ROOT):  # where the server finds what it preloads
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    process = FORKS.Process(target=unblocked, args=(run, *args))
    process.start()
    return process


def unblocked(run, *args) -> None:
    """Call run(*args) where signals end the process, until it says otherwise."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    run(*args)


def run_script(words: list[str], output: Connection) -> None:
    """Do what `python WORDS > OUTPUT` does, in a session of its own, so that Ctrl-C reaches it
    once: through the workflow."""
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def _stop_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


class Child:
    """A running stage; what it prints goes to NAME.log beside its folder."""

    def __init__(self, stage: Stage, forks: bool):
        self.stage = stage
        self.log = stage.folder.with_name(stage.name + ".log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log_file = open(self.log, "ab")  # noqa: SIM115
        self.log_start = self.log_file.tell()
        words, launcher = [str(ROOT / stage.script), *stage.argv], [sys.executable]
        self.output, writer = multiprocessing.Pipe(duplex=False)
        with writer:
            if forks:
                self.process = start_forked(run_script, words, writer)
                return
            # Only its first rank looks again at a finished stage's data.
            if stage.launcher[0] == "torchrun" and not stage.manifest.exists():
                launcher += ["-m", "torch.distributed.run", *stage.launcher[1:]]
            pipes = {"stdout": writer, "stderr": writer}
            self.process = subprocess.Popen([*launcher, *words], **pipes, start_new_session=True)

    def pass_on(self, echo: bool) -> bool:
        """Write what it has printed to its log. Return False at its end."""
        piece = os.read(self.output.fileno(), 1 << 16)
        self.log_file.write(piece)
        if echo:
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
        return piece != b""

    def wait(self) -> int:
        """Return its exit code; that of a killed child is negative."""
        while self.pass_on(echo=False):
            pass
        self.output.close()
        self.log_file.close()
        if isinstance(self.process, subprocess.Popen):
            return self.process.wait()
        self.process.join()
        return self.process.exitcode

    def finish(self) -> None:
        """Raise if it has failed."""
        code = self.wait()
        if code == 0 and self.stage.manifest.exists():
            return
        text = self.log.read_bytes()[self.log_start :].decode(errors="replace").strip()
        # torchrun ends with a table of its own, and with code 1.
        errors = re.findall(r"^(?:rank \d+: )?error: .*", text, re.MULTILINE)
        reason = " / ".join(errors[:1] or text.splitlines()[-5:])
        bad_input = code == 2 or re.search(r"^ *exitcode *: 2 ", text, re.MULTILINE)
        raise (UserError if bad_input else RunFailure)(
            f"stage {self.stage.name} failed with exit code {code} ({reason}); log: {self.log}; "
            f"to retry: {self.stage.command}"
        )


def run_stages(stages: list[Stage], jobs: int, forks: bool = False) -> None:
    """Run each stage once what it needs is finished, `jobs` at a time. If one fails, or a signal
    comes, the others are stopped: they save what they have done."""
    if jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // jobs)))
    waiting, done = list(stages), set()
    with selectors.DefaultSelector() as running:
        try:
            while waiting or running.get_map():
                for stage in list(waiting):
                    ready = all(s.folder in done for s in (*stage.needs, *stage.budget_of))
                    if not ready or len(running.get_map()) == jobs:
                        continue
                    waiting.remove(stage)
                    if stage.is_finished():
                        print(f"\n# {stage.name}: finished before\n{stage.command}")
                        done.add(stage.folder)
                        continue
                    print(f"\n# {stage.name}\n{stage.command}", flush=True)
                    with STOP.held():
                        child = Child(stage, forks)
                        running.register(child.output, selectors.EVENT_READ, child)
                for key, _ in running.select() if running.get_map() else ():
                    if not key.data.pass_on(echo=jobs == 1):
                        with STOP.held():
                            running.unregister(key.fileobj)
                            key.data.finish()
                        done.add(key.data.stage.folder)
        except BaseException as error:
            number = error.number if isinstance(error, Stopped) else signal.SIGTERM
            children = [key.data for key in running.get_map().values()]

            def pass_on(number: int, frame=None) -> None:
                for child in children:
                    with contextlib.suppress(ProcessLookupError):  # it has just ended
                        os.kill(child.process.pid, number)
                if frame:
                    os._exit(128 + number)  # a second signal

            with STOP.held():
                before = {again: signal.signal(again, pass_on) for again in SIGNALS}
                if children:
                    names = ", ".join(child.stage.name for child in children)
                    waits = f"\nwaiting for {names} to end a phase; a second signal stops at once"
                    with contextlib.suppress(OSError):  # the terminal may be gone
                        print(waits, file=sys.stderr, flush=True)
                pass_on(number)
                for child in children:
                    child.wait()
                for again, handler in before.items():
                    signal.signal(again, handler)
            raise
