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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common.run.errors import RunFailure, UserError, check
from common.run.inputs import ROOT

STARTUP_S = 120.0  # imports may take far longer than a call, from a cold network disk above all
MAX_REPLY_BYTES = 1 << 24


@dataclass(frozen=True)
class Reply:
    """The outcome of one call."""

    kind: str  # "value"; "error": it raised; "misuse": it broke the contract; "died"; or "timeout"
    value: object = None  # else what is wrong
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
        self.received, self.number = b"", 0  # of its call; the first is to load

    def ask(self, request: Sequence, timeout_s: float) -> Reply:
        """Return the reply to a request. The process is ended if it is late or has died."""
        note, deadline = None, time.monotonic() + timeout_s
        self.number += 1
        try:
            line = json.dumps([self.number, *request], default=str)
            self.socket.settimeout(timeout_s)  # a long row does not fit the socket's buffer
            self.socket.sendall(line.encode() + b"\n")
            while True:
                number, kind, value = self._message(deadline)
                if number != self.number:  # of a process that an earlier call has left behind
                    continue
                if kind == "note":
                    note = value
                elif kind in ("untimed", "timed"):
                    deadline = time.monotonic() + (STARTUP_S if kind == "untimed" else timeout_s)
                else:
                    return Reply(kind, value, note)
        except TimeoutError:
            reply = Reply("timeout", "it takes too long", note)
        except (OSError, ValueError, TypeError, RecursionError):  # a grader may write anywhere
            reply = Reply("died", "its process has died", note)
        self.end()
        return reply

    def _message(self, deadline: float) -> list:
        """Return the next message. Half a surrogate pair in it is replaced: UTF-8 has none."""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if b"\n" in self.received:
                line, _, self.received = self.received.partition(b"\n")
                text = json.dumps(json.loads(line), ensure_ascii=False)
                return json.loads(text.encode(errors="replace"))
            self.socket.settimeout(left)
            chunk = self.socket.recv(1 << 16)
            if not chunk or len(self.received) > MAX_REPLY_BYTES:
                raise ConnectionError
            self.received += chunk

    def end(self) -> None:
        """Hang up, at which the worker's keeper ends it and all that it started. A thread that
        waits for its reply waits no longer."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # a fork of this process may hold it too
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)  # should its keeper have been killed

    def __del__(self) -> None:
        self.socket.close()  # not before: a thread may be reading


class WorkerPool:
    """Workers for the functions of one task file, as many as there are cores, each asked by a
    thread. They start when there is something to call.

    timeout_s: the deadline of one call in seconds. Safe to call from any thread. Workers are gone
    after `close()`, and exit by themselves should this process be killed.
    """

    def __init__(self, file: Path, timeout_s: float = 2.0):
        self.file, self.timeout_s = file, timeout_s
        self.num_workers, self.memory_mb = os.cpu_count(), 2048  # address space of each (Linux)
        self._workers: dict[int, _Worker] = {}  # by the number of the thread that asks
        self._has_started = self._closed = False
        self._calling, self._starting = threading.Lock(), threading.Lock()

    def close(self) -> None:
        with self._starting:
            self._closed = True
            for worker in self._workers.values():
                worker.end()
            self._workers.clear()

    def call(
        self, function: str, arguments: Sequence[Sequence], patience: float = 1.0
    ) -> list[Reply]:
        """Return the replies of function(*a) for each a of `arguments`, in order. patience: a
        factor of their deadline. Raises UserError if the task file cannot be imported."""
        pending, replies = enumerate(arguments), {}

        def ask_in_turn(number: int) -> None:
            for index, values in pending:
                replies[index] = self._ask(number, (function, *values), patience)

        with self._calling, ThreadPoolExecutor(self.num_workers) as threads:
            self._closed = False
            try:
                list(threads.map(ask_in_turn, range(min(self.num_workers, len(arguments)))))
            except BaseException:
                self.close()  # else the threads would ask to their end
                raise
        return [replies[index] for index in range(len(arguments))]

    def _ask(self, number: int, request: Sequence, patience: float) -> Reply:
        """Ask a thread's worker. One that dies may have been killed by an earlier call, if there
        was one: its successor is asked again."""
        worker, deadline_s = self._worker(number), patience * self.timeout_s
        reply = worker.ask(request, deadline_s)
        if reply.kind == "died" and worker.number > 2:
            reply = self._worker(number).ask(request, deadline_s)
        return reply

    def _worker(self, number: int) -> _Worker:
        """Return a thread's worker, or its successor if it has died."""
        worker = self._workers.get(number)
        if worker and worker.process.poll() is None:
            return worker
        with self._starting:
            check(not self._closed, f"task {self.file}: its workers were closed")
            if worker:
                worker.end()  # its keeper was killed
            worker = self._workers[number] = _Worker(self.file, self.memory_mb)
        ready = worker.ask(("load",), STARTUP_S)
        if ready.kind != "value":
            ways = {
                "timeout": "importing it takes too long",
                "died": "importing it ends its process",
            }
            # The user's mistake; but the machine's trouble, if it has started before.
            kind = RunFailure if self._has_started else UserError
            raise kind(f"task {self.file}: {ways.get(ready.kind, ready.value)}")
        self._has_started = True
        return worker
