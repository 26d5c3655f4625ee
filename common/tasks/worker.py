"""The process in which a task file is imported and its functions run.

It is two processes. The keeper waits for the trainer to hang up or for the other one to end, and
then kills all that is left. The other one, in a session of its own, answers requests. What a task
prints goes nowhere; its current folder is a scratch folder that is removed.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import math
import os
import resource
import select
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MAX_FILE_BYTES = 1 << 28  # that a task may write
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # Linux's prctl


class Misuse(Exception):
    """A task file or what a function of it returned is not what it must be."""


# === the keeper ===


def serve() -> None:
    """python -c "from common.tasks.worker import serve; serve()" FILE MEMORY_MB SCRATCH_FOLDER"""
    file, memory_mb, scratch = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of the other process become this one's children
    child = os.fork()
    if child == 0:
        os.setsid()
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        work(file, memory_mb, scratch)
        os._exit(0)
    trainer = select.poll()
    trainer.register(0, 0)  # no event but the other end's closing
    while not trainer.poll(50) and os.waitpid(child, os.WNOHANG) == (0, 0):
        pass
    kill_descendants(child)
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def kill_descendants(child: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(child, signal.SIGKILL)
    while True:
        for pid in children():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def children() -> list[int]:
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # A process may call itself anything, in bytes that are no UTF-8 too.
            if int(stat.read_bytes().rpartition(b")")[2].split()[1]) == os.getpid():
                pids.append(int(stat.parent.name))
    return pids


# === the process that answers ===


class _Channel:
    """The socket to the trainer."""

    def __init__(self) -> None:
        self.socket = socket.socket(fileno=os.dup(0))
        self.number, self.pid = 0, os.getpid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)

    def say(self, kind: str, value: object) -> None:
        if os.getpid() != self.pid:
            os._exit(0)  # a fork that came back from a task's function
        message = json.dumps([self.number, kind, value]) + "\n"
        self.socket.sendall(message.encode())


channel: _Channel | None = None


@contextlib.contextmanager
def untimed():
    """Leave out the time of an import that a function makes late: it does not count against the
    call's deadline."""
    say = channel.say if channel else lambda *message: None
    say("untimed", None)
    yield
    say("timed", None)


def work(file: Path, memory_mb: int, scratch: str) -> None:
    global channel
    channel = _Channel()
    sys.path[0] = str(ROOT)  # "" would be the scratch folder
    os.chdir(scratch)
    limits = [(resource.RLIMIT_FSIZE, MAX_FILE_BYTES), (resource.RLIMIT_CORE, 0)]
    if sys.platform == "linux":
        limits.append((resource.RLIMIT_AS, memory_mb << 20))
    for kind, limit in limits:
        hard = resource.getrlimit(kind)[1]
        if hard == resource.RLIM_INFINITY or limit < hard:  # a lower one cannot be raised
            resource.setrlimit(kind, (limit, limit))
    functions = {"load": lambda: functions.update(functions_of(load(file)))}
    for line in channel.socket.makefile("rb"):
        channel.number, name, *arguments = json.loads(line)
        try:
            kind, value = "value", functions[name](*arguments)
            json.dumps(value)
        except Misuse as error:
            kind, value = "misuse", str(error)
        except MemoryError:
            os._exit(1)  # what is left of this process is not to be trusted
        except BaseException as error:
            kind, value = "error", text_of(error, str(file))
        channel.say(kind, value)


def text_of(error: BaseException, file: str) -> str:
    """Return an exception in one line, with the function of the task file that it came from."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f" (in {own[-1].name}, line {own[-1].lineno} of {Path(file).name})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"


def load(file: Path):
    sys.path.append(str(file.resolve().parent))  # last: a task may be called code.py
    sys.dont_write_bytecode = True  # nothing is written beside a user's file
    spec = importlib.util.spec_from_file_location(f"task_{file.stem}", file)
    task = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = task
    spec.loader.exec_module(task)
    for name, parameters in (("prompt", "row"), ("grade", "completion, row")):
        if not callable(getattr(task, name, None)):
            raise Misuse(f"it has no function {name}({parameters})")
    return task


def functions_of(task) -> dict[str, Callable]:
    """Return what can be called: the task's own functions, and those here that call them."""
    own = (declarations, describe, identify, grade, try_grade, same)
    return vars(task) | {function.__name__: partial(function, task) for function in own}


def declarations(task) -> dict:
    """Return what the task file says beside its functions: where its data lie, what its columns
    are."""
    known = {name: getattr(task, name, {}) for name in ("datasets", "benchmarks", "columns")}
    for name, named in known.items():
        if not isinstance(named, dict):
            raise Misuse(f"its {name} are no dictionary of names")
    for name, usual in known["columns"].items():
        listed = isinstance(usual, list | tuple) and len(usual) > 0
        if not listed or not all(isinstance(column, str) for column in usual):
            raise Misuse(f"its columns[{name!r}] is no list of names")
    for name, place in (known["datasets"] | known["benchmarks"]).items():
        match place:
            case str() | [str(), str() | None, str() | None]:
                pass
            case _:
                raise Misuse(f"the place of {name!r} is no file and no (hub id, config, split)")
    if not isinstance(getattr(task, "instruction", ""), str):
        raise Misuse("its instruction is no text")
    grade_timeout = getattr(task, "grade_timeout", 2.0)
    if not isinstance(grade_timeout, int | float) or not 0 < grade_timeout < math.inf:
        raise Misuse("its grade_timeout is no number of seconds")
    functions = [name for name in ("answer", "same") if callable(getattr(task, name, None))]
    return known | {"grade_timeout": grade_timeout, "functions": functions}


def describe(task, row: dict) -> dict | str:
    """A row as a problem: its chat messages, what identifies it, and what people are shown; or why
    it cannot be one."""
    empty = [name for name in getattr(task, "columns", {}) if row.get(name) is None]
    if empty:
        return f"no {' and no '.join(empty)}"
    try:
        asked = task.prompt(row)
        gold = task.gold(row) if hasattr(task, "gold") else ""
    except ValueError as error:
        return text_of(error, task.__file__)
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if not _are_messages(messages):
        raise Misuse(
            f"prompt(row) returned {asked!r:.60}; it must return a text, not empty, or a list of "
            "messages (role and content), the last one the user's"
        )
    # Of a conversation the last message alone may be "Go on."
    text = messages[-1]["content"].strip()
    key = identify(task, text if len(messages) == 1 or hasattr(task, "key") else str(messages))
    if not is_unicode("".join(message["content"] for message in messages) + str(gold)):
        return "half a surrogate pair"
    warning = task.check(row) if hasattr(task, "check") else None
    instruction = getattr(task, "instruction", "")
    asked = f"{text}\n{instruction}" if instruction else text
    messages = [*messages[:-1], messages[-1] | {"content": asked}]
    return {"text": text, "gold": str(gold), "key": key, "messages": messages, "warning": warning}


def is_unicode(text: str) -> bool:
    """Tell whether a text has no half of a surrogate pair, which JSON can hold and UTF-8 and
    tokenizers cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def identify(task, text: str) -> str:
    """A hash of a problem's text, or of what the task's key(text) makes of it."""
    key = task.key(text) if hasattr(task, "key") else text
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def _are_messages(messages: object) -> bool:
    if not isinstance(messages, list) or not messages:
        return False
    texts = [(m.get("role"), m.get("content")) for m in messages if isinstance(m, dict)]
    whole = len(texts) == len(messages) and all(isinstance(t, str) for pair in texts for t in pair)
    return whole and texts[-1][0] == "user" and texts[-1][1].strip() != ""


def answering_part(completion: str) -> str:
    """Return what lies outside <think> ... </think>, closed or not."""
    return completion.rpartition("</think>")[2].partition("<think>")[0]


def grade(task, completion: str, row: dict) -> float | None:
    """The reward, or None if the completion marks no answer. The answer is said before."""
    completion = answering_part(completion)
    if hasattr(task, "answer"):
        answer = task.answer(completion)
        if answer is None:
            return None
        channel.say("note", str(answer))
    return checked(task.grade(completion, row))


def try_grade(task, row: dict) -> None:
    """Check that grade() gives a reward at all, before anything is trained. It may refuse an empty
    completion."""
    try:
        reward = task.grade("", row)
    except Exception:
        return
    checked(reward)


def same(task, one: str, other: str) -> bool:
    return bool(task.same(one, other))


def checked(reward: object) -> float:
    try:
        number = math.nan if isinstance(reward, str | bytes) else float(reward)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 1:
        raise Misuse(
            f"grade(completion, row) returned {reward!r:.60}; it must return a number from 0 to 1"
        )
    return number
