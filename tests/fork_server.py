"""The workflow's fork server, whose children can be told to fail (`fault`: where and when), and
where their stderr goes (`stderr`).

Fifty runs do not cost fifty imports.
"""

import os
import resource
import signal
import threading

import torch

from common.model import head as lm_head
from common.run import checkpoint, folder
from common.run.errors import RunFailure
from common.sampling import torch_engine
from workflow.fork_server import serve


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


def plant(job: dict) -> None:
    if "stderr" in job:
        os.dup2(os.open(job["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
    if not job.get("fault"):
        return
    site, number = job["fault"]
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


if __name__ == "__main__":
    serve(prepare=plant)
