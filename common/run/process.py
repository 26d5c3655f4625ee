"""The start and the end of a script: its command line, signals and exit codes."""

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_type_hints

import torch
import torch.distributed as dist
import tyro

from common.run.errors import RunFailure, UserError, check, one_line
from common.run.ranks import num_ranks, rank

OUT_OF_MEMORY = (
    "the same command goes on with a lower --micro_batch_tokens or --vllm_gpu_memory, with "
    "--activation_checkpointing or with --cpu_offload (of bridge.py: --teacher_cpu_offload, "
    "--student_cpu_offload); a smaller --chunk_size, --max_new_tokens or --lora_rank is another run"
)


def start(main: Callable, args_type: type, description: str) -> None:
    """Parse the command line into `args_type` and run `main`.

    Exit codes, each with one line on stderr: 2 for what the user can mend (UserError), 1 for a run
    that failed (RunFailure, a full disk), 128 + n for signal n.
    """
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, STOP.catch)
    # Before CUDA starts. vLLM switches segments off around its own pools; pinned host memory would
    # be rounded up to a power of two.
    memory = "expandable_segments:True,pinned_max_round_threshold_mb:64"
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", memory)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi counts
    code, message, launched = 0, "", "WORLD_SIZE" in os.environ
    try:
        main(parse(args_type, description))
    except UserError as error:
        code, message = 2, f"error: {error}"
    except torch.OutOfMemoryError as error:
        code, message = 1, f"error: out of GPU memory ({one_line(error)[:100]}); {OUT_OF_MEMORY}"
    except (RunFailure, OSError) as error:
        hint = "the same command goes on from the last checkpoint"
        code, message = 1, f"error: {one_line(error)}; {hint}"
    except Stopped as stop:
        code, message = 128 + stop.number, f"{stop}; the same command goes on"
    if code:
        print(f"rank {rank()}: {message}" if num_ranks() > 1 else message, file=sys.stderr)
        if num_ranks() > 1:
            sys.stdout.flush()
            os._exit(code)  # torchrun ends the other ranks; to wait for them here could hang
        sys.exit(code)
    if num_ranks() > 1:  # a group of one may be vLLM's own, which it ends itself
        dist.barrier()  # a rank that closes its connections early takes the others down
        dist.destroy_process_group()
    if launched or dist.is_initialized():
        sys.stdout.flush()
        os._exit(0)  # a group's threads were seen to abort the interpreter's own way out


# === flags ===


@dataclass(frozen=True)
class Range:
    """The numbers that a flag accepts: finite and positive ones, and 0 if `zero_allowed`."""

    zero_allowed: bool
    highest: float = sys.float_info.max

    def check(self, flag: str, value: float) -> None:
        highest = self.highest if isinstance(value, float) else min(self.highest, LARGEST_INT)
        check(not value > highest, f"--{flag} is {value}; it must be at most {highest}")
        low = "0 or above" if self.zero_allowed else "above 0"
        valid = value > 0 or (self.zero_allowed and value == 0)
        check(valid, f"--{flag} is {value}; it must be {low}")


LARGEST_INT = 2**63 - 1  # that torch takes, for a seed or a size
POSITIVE, NOT_NEGATIVE = Range(zero_allowed=False), Range(zero_allowed=True)
SHARE, PORT = Range(zero_allowed=False, highest=1), Range(zero_allowed=False, highest=65_535)
# Of a flag that says how a run is watched or where it fits, not what it computes: it may differ
# when the run is resumed.
MAY_CHANGE = "may change"
# Of a flag that names a model or a chat template: its files are hashed into the config.
MODEL, CHAT = "names a model", "names a chat template"


def marks_of(args_type: type) -> dict[str, tuple]:
    """Return what is written at each field of an Args: Annotated[int, POSITIVE, MAY_CHANGE]."""
    hints = get_type_hints(args_type, include_extras=True)
    return {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}


def parse(args_type: type, description: str, words: list[str] | None = None):
    """Parse the command line, or other words. Numbers out of their flag's range are a UserError,
    and so is tyro's box of several lines."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            args = tyro.cli(args_type, args=words, description=description, use_underscores=True)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        words = re.sub(r"[^\x20-\x7e]|(?<=\s)[-|+]+(?=\s)|---+", " ", box.getvalue())
        raise UserError(f"{' '.join(words.split())[:400]} (--help lists every flag)") from None
    for flag, marks in marks_of(args_type).items():
        given = getattr(args, flag)
        for value in given if isinstance(given, tuple) else (given,):
            for mark in marks:
                if isinstance(mark, Range) and value is not None:
                    mark.check(flag, value)
    return args


# === signals ===


class Stopped(BaseException):
    """A signal, where it can be obeyed."""

    def __init__(self, number: int, where: str = ""):
        super().__init__(f"stopped by {signal.Signals(number).name}{where}")
        self.number = number


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the last: the terminal was closed


class StopRequest:
    """The answer to SIGNALS: in a training loop wait for the next phase boundary, else
    stop; at the second signal exit at once."""

    number: int | None = None  # of the signal that waits to be obeyed
    in_loop = False

    def catch(self, number: int, frame) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        if not self.in_loop:
            raise Stopped(number)
        with contextlib.suppress(OSError):  # the terminal may be gone
            print("\nstopping after this phase; a second signal stops at once", file=sys.stderr)

    @contextlib.contextmanager
    def held(self):
        """Obey a signal at the end of the block: a child that starts in it gets an owner first."""
        self.in_loop = True
        try:
            yield
        finally:
            self.in_loop = False
        if self.number is not None:
            raise Stopped(self.number)


STOP = StopRequest()  # signal handlers belong to the process
