"""Runs trainers in forked children, so that fifty killed runs do not cost fifty imports.

Reads a job a line ({script, flags, log, fault}), prints the child's wait status a line.
"""

import json
import os
import resource
import signal
import sys
import threading

import torch

import fkl_warmup
import grpo
import opd
from common import checkpoint, files, head, torch_engine
from common.errors import RunFailure
from common.start import start

MODULES = {"grpo": grpo, "opd": opd, "fkl_warmup": fkl_warmup}


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
        at_call(head, "head_backward", number, die)
    elif site == "disk":  # in the middle of a checkpoint, or of any other write
        at_call(files, "sync_to_disk", number, die)
    elif site == "between files":
        at_call(checkpoint, "save_file", number, die)
    elif site == "engine":
        at_call(torch_engine.TorchEngine, "generate", number, no_engine)
    elif site == "nan":
        at_call(head, "hidden_states", number, poison)
    elif site == "file size":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))


def child(job: dict) -> None:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["fault"]:
        plant(*job["fault"])
    module = MODULES[job["script"]]
    sys.argv = [f"{job['script']}.py", *job["flags"]]
    code = 0
    try:
        start(module.main, module.Args, module.__doc__)
    except SystemExit as stop:
        code = stop.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


torch.set_num_threads(1)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        child(json.loads(line))
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
