"""Code: write a Python function that passes its unit tests.

    prompt       Write the function double(n: int) -> int: twice the number n.
    completion   ```python
                 def double(n):
                     return 2 * n
                 ```
    tests        ["assert double(3) == 6", "assert double(-1) == -2"]

The last ```python block is the answer. The reward is the share of tests that pass. A test has the
form `assert CALL == LITERAL`. The code is sent the calls only and sends the values back, which are
compared here: nothing that it can print, redefine or exit with passes a test, and what the tests
expect never reaches it. Still cheatable: a constant earns the share of tests that expect it, a
table of the prompt's examples those that repeat them. So write tests that differ from both.

The code runs in a child process, with limits on time, memory, files and processes, in a scratch
folder that is removed. Where Linux allows it, the child has no network and cannot signal other
processes. This protects from a model's mistakes. It is NOT a sandbox for hostile code, which can
still read your files (these tests among them), change those that you may change, and fill a disk
with many small files. Run what you do not trust in a container or a virtual machine.

The trainer waits longer than the child may take, so that the tests before an endless loop count.
"""

import ast
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

instruction = "Answer with one block of code that starts with ```python and ends with ```."
datasets = {"code": "code_train.jsonl"}
benchmarks = {"code": "code_test.jsonl"}

TIME_LIMIT_S = 4  # for all tests of a completion, with Python's start
grade_timeout = 2 * TIME_LIMIT_S
MAX_VALUE_BYTES = 10_000
LIMITS = {
    resource.RLIMIT_CPU: TIME_LIMIT_S,
    resource.RLIMIT_AS: 512 * 2**20,  # bytes of memory
    resource.RLIMIT_FSIZE: 2**20,  # bytes of a file; the values are one too
    resource.RLIMIT_NPROC: 0,  # no new process or thread; but root ignores this limit
    resource.RLIMIT_CORE: 0,
}
# From Linux's headers: the os module has no unshare before Python 3.12, and never a prctl.
CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWPID = 0x10000000, 0x40000000, 0x20000000
PR_SET_PDEATHSIG = 1


def prompt(row: dict) -> str:
    return row["problem"]


def answer(completion: str) -> str | None:
    """The code in the last ```python block; None if there is none or it does not end."""
    _, opening, rest = completion.rpartition("```python")
    code, closing, _ = rest.partition("\n```")
    return code.strip("\n") if opening and closing and code.strip() else None


def grade(completion: str, row: dict) -> float:
    calls, expected = zip(*map(split_test, row["tests"]), strict=True)
    values = run(answer(completion) or "", calls)
    return sum(map(equal, values, expected)) / len(calls)  # a missing value passes no test


def gold(row: dict) -> str:
    return row["solution"]


def split_test(test: str) -> tuple[str, object]:
    """`assert double(3) == 6` as ("double(3)", 6)."""
    match ast.parse(test).body:
        case [ast.Assert(test=ast.Compare(left=call, ops=[ast.Eq()], comparators=[expected]))]:
            return ast.unparse(call), ast.literal_eval(expected)
    raise ValueError(f"a test is not of the form assert CALL == LITERAL: {test}")


def equal(value: bytes, expected: object) -> bool:
    """Tell whether a value's repr is a literal that equals the expected one. The code may have sent
    anything: nothing in here runs it."""
    try:
        return len(value) <= MAX_VALUE_BYTES and ast.literal_eval(value.decode()) == expected
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False


def run(code: str, calls: tuple[str, ...]) -> list[bytes]:
    """The repr of each call's value, empty for an exception, up to where the child stopped."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
        tempfile.TemporaryFile() as request,
        tempfile.TemporaryFile() as values,  # a pipe could be flooded; a file's size is limited
    ):
        request.write(json.dumps([code, calls]).encode())
        request.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).resolve())],
            stdin=request,
            stdout=values,
            stderr=subprocess.DEVNULL,
            cwd=scratch,
            env={"HOME": scratch, "TMPDIR": scratch},
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + TIME_LIMIT_S
            # Not child.wait: once it is waited for, its number may be that of another group.
            how = os.WEXITED | os.WNOHANG | os.WNOWAIT
            while os.waitid(os.P_PID, child.pid, how) is None and time.monotonic() < deadline:
                time.sleep(0.005)
        finally:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        values.seek(0)
        return values.read().split(b"\n")


# === what the child process does ===


def isolate() -> None:
    """Die with the parent, leave the network and the other processes behind, set the limits."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID) == 0:
        # Only a child is in the new process namespace. All in it die with their first process,
        # a daemon that has left the process group too.
        if first := os.fork():
            os.waitpid(first, 0)
            os._exit(0)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for limit, value in LIMITS.items():
        hard = resource.getrlimit(limit)[1]
        if hard == resource.RLIM_INFINITY or value < hard:  # it cannot be raised
            resource.setrlimit(limit, (value, value))


def run_calls() -> None:
    code, calls = json.load(sys.stdin)
    values, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(null, stream)  # what the code prints is not among the values
    isolate()
    namespace = {"__name__": "answer"}
    exec(compile(code, "answer", "exec"), namespace)
    for call in calls:
        try:
            value = repr(eval(call, namespace))
        except BaseException:  # SystemExit too
            value = ""
        os.write(values, value.replace("\n", " ").encode() + b"\n")
    os._exit(0)  # without a wait for threads that the code has left


if __name__ == "__main__":
    run_calls()
