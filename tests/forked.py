"""Scripts in children that are forked from the workflow's warm Python, and can be told to fail.

Fifty runs do not cost fifty imports.
"""

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
from multiprocessing.connection import Connection

import torch

from common.model import head as lm_head
from common.run import checkpoint, folder
from common.run.errors import RunFailure
from common.run.inputs import ROOT
from common.sampling import torch_engine
from workflow.processes import run_script, start_forked


def run(words: list[str], threads: int, fault: tuple | None = None) -> tuple[int, str, str]:
    """Return the exit code (that of a killed child is negative) and what it printed to stdout and
    to stderr. fault: where, and when."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile() as errors:
        process = start_forked(planted, words, writer, errors.name, threads, fault)
        writer.close()
        output = b"".join(iter(lambda: os.read(reader.fileno(), 1 << 16), b""))
        reader.close()
        process.join()
        return process.exitcode, output.decode(errors="replace"), errors.read().decode()


def planted(words: list[str], output: Connection, errors: str, threads: int, fault) -> None:
    os.chdir(ROOT)
    torch.set_num_threads(threads)
    sys.stderr = open(errors, "w", buffering=1)  # noqa: SIM115
    if fault:
        plant(*fault)
    run_script(words, output)


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner, name: str, number: int, act) -> None:
    """Give what `act` makes of the result of the number-th call of owner.name."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        now = len(calls) == number
        if now and act is die:  # before the call, not after it
            die()
        result = original(*args, **kwargs)
        return act(result) if now else result

    setattr(owner, name, counted)


def no_engine(*_):
    raise RunFailure("the engine has died")


def poison(hidden: torch.Tensor) -> torch.Tensor:
    return hidden * float("nan")


def plant(site: str, number: float) -> None:
    if site == "time":
        threading.Timer(number, die).start()
    elif site == "generate":
        at_call(torch_engine.TorchEngine, "_forward", number, die)
    elif site == "update":
        at_call(lm_head, "head_backward", number, die)
    elif site == "disk":  # in the middle of a checkpoint, or of any other write
        at_call(folder, "sync_to_disk", number, die)
    elif site == "between files":
        at_call(checkpoint, "save_file", number, die)
    elif site == "engine":
        at_call(torch_engine.TorchEngine, "generate", number, no_engine)
    elif site == "nan":
        at_call(lm_head, "hidden_states", number, poison)
    elif site == "file size":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
