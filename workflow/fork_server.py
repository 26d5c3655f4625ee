"""One warm Python from which stages on a CPU are forked: its imports are paid once, not per stage.

`python -m workflow.fork_server` imports the scripts and then forks a child for each job that comes
over its standard input, a socket. It runs no torch operation and starts no thread before, so that
a child is what a fresh Python is after its imports: it runs the script as __main__, in a session of
its own. When the socket closes, the server stops the children that still run, and ends.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from common.run.errors import RunFailure
from common.run.inputs import ROOT
from workflow.presets import KINDS

PRELOADED = ("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor")
PRELOADED += ("transformers.modeling_utils", "common.sampling.decoding")


class ForkServer:
    """The side that asks. The server starts with the first child."""

    channel: socket.socket | None = None

    def __init__(self, environment: dict[str, str], command=("-m", "workflow.fork_server")):
        self.environment, self.command = environment, [sys.executable, *command]

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_) -> None:
        if self.channel is not None:
            self.channel.close()
            self.process.wait()

    def start(self, argv: list[str], **job) -> "ForkedProcess":
        """Run a script, argv[0]. job: further keys, for a server that knows them."""
        if self.channel is None:
            self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            # In a session of its own: Ctrl-C reaches the stages once, through us.
            settings = {"start_new_session": True, "env": self.environment, "cwd": ROOT}
            pipes = {"stdin": theirs, "stdout": subprocess.DEVNULL}
            self.process = subprocess.Popen(self.command, **pipes, **settings)
            theirs.close()
        reader, writer = os.pipe()
        with os.fdopen(writer, "wb"):
            pid = self.ask({"argv": argv, "cwd": os.getcwd(), **job}, [writer])
        return ForkedProcess(self, pid, os.fdopen(reader, "rb"))

    def ask(self, message: dict, descriptors: list[int]) -> int:
        socket.send_fds(self.channel, [json.dumps(message).encode()], descriptors)
        answer = self.channel.recv(100)
        if not answer:
            raise RunFailure("the process that stages are forked from has ended")
        return int(answer)


@dataclass
class ForkedProcess:
    """A child of the server, with what is used of subprocess.Popen."""

    server: ForkServer
    pid: int
    stdout: BinaryIO

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)  # it keeps its number until it is waited for

    def wait(self) -> int:
        """Its exit code, after the end of its output; that of a killed child is negative."""
        return self.server.ask({"wait": self.pid}, [])


def serve(prepare: Callable[[dict], None] = lambda job: None) -> None:
    """The server. prepare: called in each child, before its script."""
    for script in dict.fromkeys(script for script, _ in KINDS.values()):
        importlib.import_module(script.removesuffix(".py"))
    for name in PRELOADED:
        importlib.import_module(name)

    channel, children = socket.socket(fileno=os.dup(0)), set()
    while True:
        message, descriptors, *_ = socket.recv_fds(channel, 1 << 20, 1)
        if not message:
            break
        job = json.loads(message)
        if "wait" in job:
            _, status = os.waitpid(job["wait"], 0)
            children.remove(job["wait"])
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                channel.close()
                os._exit(run_script(job, descriptors[0], prepare))
            children.add(answer)
            os.close(descriptors[0])
        channel.send(str(answer).encode())
    for pid in children:
        os.kill(pid, signal.SIGTERM)
    os._exit(0)


def run_script(job: dict, output: int, prepare: Callable[[dict], None]) -> int:
    """What a fresh Python would do, and its exit code; but nothing that was imported is freed at
    the end, which takes a second."""
    os.setsid()
    for descriptor, source in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
        os.dup2(source, descriptor)
    os.close(output)
    os.chdir(job["cwd"])
    sys.argv, sys.path[0] = job["argv"], str(Path(job["argv"][0]).parent)
    code: object = 0
    try:
        prepare(job)
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if code is not None and not isinstance(code, int):  # sys.exit("message")
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # waits for the script's threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0


if __name__ == "__main__":
    serve()
