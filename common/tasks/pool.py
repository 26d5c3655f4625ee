"""Calls of a task's functions in worker processes: each has a deadline, and costs only itself.

Graders run on text that a model wrote, and are written by people: they hang, crash, fill memory,
fork. A worker (common.tasks.worker) that passes its deadline or dies is replaced, and everything
that it started is gone with it.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from common.run.errors import RunFailure, UserError
from common.run.inputs import ROOT

STARTUP_S = 120.0  # imports may take far longer than a call, from a cold network disk above all
MAX_REPLY_BYTES = 1 << 24


@dataclass(frozen=True)
class Reply:
    """The outcome of one call."""

    kind: str  # "value"; "error": it raised; "misuse": it broke the task's contract; or "timeout"
    value: object = None  # of an error or misuse what it says
    note: str | None = None  # what the worker said before it ended


class _Worker:
    """A process, which gets requests and gives replies as lines of JSON over a socket."""

    def __init__(self, file: Path, memory_mb: int):
        self.socket, theirs = socket.socketpair()
        self.scratch = tempfile.mkdtemp(prefix="task-")
        code = "from common.tasks.worker import serve; serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(file.resolve()), str(memory_mb), self.scratch],
            cwd=ROOT,
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the trainer, which then closes its workers
        )
        theirs.close()
        self.received = b""
        self.number = 0  # of its call; 0 is its start
        self.call: int | None = None  # the index of the call that it works on
        self.note: str | None = None
        self.declared: dict | None = None  # the task, as it says once its imports are done
        self.deadline = time.monotonic() + STARTUP_S

    @property
    def idle(self) -> bool:
        return self.declared is not None and self.call is None

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, call: int, function: str, arguments: Sequence, timeout_s: float) -> None:
        self.call, self.note, self.number = call, None, self.number + 1
        self.deadline = time.monotonic() + timeout_s
        request = json.dumps([self.number, function, *arguments], default=str)
        self.socket.settimeout(timeout_s)  # a long row does not fit the socket's buffer
        with contextlib.suppress(OSError):  # it has just died: its silence is the reply
            self.socket.sendall(request.encode() + b"\n")

    def messages(self) -> list[tuple[int, str, object]] | None:
        """Return the whole messages that have come; None if it has died, or says what it should
        not: a grader may write to any descriptor."""
        try:
            chunk = self.socket.recv(1 << 16, socket.MSG_DONTWAIT)
            *lines, self.received = (self.received + chunk).split(b"\n")
            messages = [(number, kind, value) for number, kind, value in map(valid, lines)]
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        return messages if chunk and len(self.received) < MAX_REPLY_BYTES else None

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # a fork of this process may hold it too
        self.socket.close()  # at which the worker's keeper ends it and all that it started
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)  # should its keeper have been killed


def valid(line: bytes) -> object:
    """Parse JSON whose text may hold half a surrogate pair, which UTF-8 cannot: it is replaced."""
    return json.loads(json.dumps(json.loads(line), ensure_ascii=False).encode(errors="replace"))


class WorkerPool:
    """Workers for the functions of one task file.

    num_workers: started when there is something to call, replaced when they die; None: as many as
    there are cores. timeout_s: deadline of one call, in seconds. memory_mb: address space of a
    worker (Linux).

    Safe to call from any thread. Workers are gone after `close()`, and exit by themselves should
    this process be killed.
    """

    def __init__(
        self,
        file: Path,
        timeout_s: float = 2.0,
        num_workers: int | None = None,
        memory_mb: int = 2048,
    ):
        self.file, self.timeout_s = file, timeout_s
        self.num_workers, self.memory_mb = num_workers or os.cpu_count(), memory_mb
        self._workers: list[_Worker] = []
        self._tried_again: set[int] = set()  # indices of the calls of this batch
        self._has_started = False
        self._lock = threading.Lock()

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def declarations(self) -> dict:
        """Return what the task file defines beside functions. Raises UserError if it cannot be
        used."""
        with self._guarded():
            self._fill(1)
            while self._workers[0].declared is None:
                self._receive({}, deque())
            return self._workers[0].declared

    def call(self, function: str, arguments: Sequence[Sequence]) -> list[Reply]:
        """Return the replies of function(*a) for each a of `arguments`, in order."""
        with self._guarded():
            replies: dict[int, Reply] = {}
            self._tried_again.clear()
            pending = deque(range(len(arguments)))
            while len(replies) < len(arguments):
                self._fill(len(arguments) - len(replies))
                for worker in self._workers:
                    if pending and worker.idle:
                        index = pending.popleft()
                        worker.send(index, function, arguments[index], self.timeout_s)
                self._receive(replies, pending)
        return [replies[index] for index in range(len(arguments))]

    @contextlib.contextmanager
    def _guarded(self):
        with self._lock:
            try:
                yield
            except BaseException:
                self.close()  # else the next call would read the replies to this one
                raise

    def _fill(self, num_calls: int) -> None:
        for worker in [worker for worker in self._workers if worker.idle]:
            if worker.process.poll() is not None:  # it died while idle: no call is at fault
                self._drop(worker)
        while len(self._workers) < min(self.num_workers, num_calls):
            self._workers.append(_Worker(self.file, self.memory_mb))

    def _drop(self, worker: _Worker) -> None:
        worker.kill()
        self._workers.remove(worker)

    def _receive(self, replies: dict[int, Reply], pending: deque[int]) -> None:
        """Wait until some worker says something, dies or passes its deadline. One that dies after
        its first call may have been killed by an earlier one: its call is tried again, once."""
        waiting = [worker for worker in self._workers if not worker.idle]
        wait_s = min(worker.deadline for worker in waiting) - time.monotonic()
        readable = wait(waiting, max(0.0, wait_s))  # select.select takes no descriptor above 1,023
        for worker in waiting:
            if worker in readable:
                messages = worker.messages()
                for message in messages or ():
                    self._take(worker, *message, replies)
                if messages is None and worker.number > 1 and worker.call not in self._tried_again:
                    self._tried_again.add(worker.call)
                    pending.append(worker.call)
                    self._drop(worker)
                elif messages is None:
                    self._end(worker, Reply("error", "its process has died", worker.note), replies)
            elif time.monotonic() >= worker.deadline:
                self._end(worker, Reply("timeout", None, worker.note), replies)

    def _take(
        self, worker: _Worker, number: int, kind: str, value: object, replies: dict[int, Reply]
    ) -> None:
        if number != worker.number:  # of a process that an earlier call has left behind
            return
        if kind == "note":
            worker.note = value
        elif kind in ("untimed", "timed"):
            seconds = STARTUP_S if kind == "untimed" else self.timeout_s
            worker.deadline = time.monotonic() + seconds
        elif number == 0:
            if kind != "value":
                raise self._cannot_start(str(value))
            worker.declared, self._has_started = value, True
        else:
            replies[worker.call] = Reply(kind, value, worker.note)
            worker.call = None

    def _cannot_start(self, why: str) -> Exception:
        """The user's mistake; but the machine's trouble, if it has started before."""
        return (RunFailure if self._has_started else UserError)(f"task {self.file}: {why}")

    def _end(self, worker: _Worker, reply: Reply, replies: dict[int, Reply]) -> None:
        if worker.declared is None:
            what = "takes too long" if reply.kind == "timeout" else "ends its process"
            raise self._cannot_start(f"importing it {what}")
        if worker.call is not None:
            replies[worker.call] = reply
        self._drop(worker)
