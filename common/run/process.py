"""How a script starts and stops: the command line, signals, exit codes."""

import contextlib
import io
import math
import os
import re
import signal
import sys
from collections.abc import Callable

import torch.distributed as dist
import tyro

from common.run.errors import RunFailure, UserError, check, one_line
from common.run.ranks import num_ranks, rank


def start(main: Callable, args_type: type, description: str) -> None:
    """Parse the command line into `args_type` and run `main`.

    Exit codes, each with one line on stderr: 2 for what the user can mend (UserError), 1 for a run
    that failed (RunFailure, a full disk), 128 + n for signal n.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, STOP.catch)
    # Before CUDA starts. vLLM switches it off around its own pools.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    code, message, launched = 0, "", "WORLD_SIZE" in os.environ
    try:
        main(parse(args_type, description))
    except UserError as error:
        code, message = 2, f"error: {error}"
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


def parse(args_type: type, description: str):
    """The command line as `args_type`; tyro's box of several lines becomes a UserError."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(args_type, description=description, use_underscores=True)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        words = re.sub(r"[^\x20-\x7e]|(?<=\s)[-|+]+(?=\s)|---+", " ", box.getvalue())
        raise UserError(f"{' '.join(words.split())[:400]} (--help lists every flag)") from None


# === signals ===


class Stopped(BaseException):
    """A signal, where it can be obeyed."""

    def __init__(self, number: int, where: str = ""):
        super().__init__(f"stopped by {signal.Signals(number).name}{where}")
        self.number = number


class StopRequest:
    """What to do at SIGTERM and SIGINT: in a training loop wait for the next phase boundary, else
    stop; at the second signal exit at once."""

    number: int | None = None  # of the signal that waits to be obeyed
    in_loop = False

    def catch(self, number: int, frame) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        if not self.in_loop:
            raise Stopped(number)
        print("\nstopping after this phase; a second signal stops at once", file=sys.stderr)


STOP = StopRequest()  # signal handlers belong to the process


# === ranges ===

POSITIVE = (
    *("num_steps", "prompts_per_step", "group_size", "max_new_tokens", "max_prompt_tokens"),
    *("temperature", "learning_rate", "max_grad_norm", "micro_batch_tokens", "chunk_size"),
    *("num_epochs", "num_minibatches", "keep_checkpoints", "topk_size"),
    *("num_problems", "num_samples", "jobs", "gpu_memory_gb", "grade_timeout", "lora_alpha"),
    *("gpu_tflops", "mfu"),
)
NOT_NEGATIVE = (
    *("seed", "warmup_steps", "weight_decay", "checkpoint_every", "eval_every", "max_refills"),
    *("kl_coef", "clip_low", "clip_high", "importance_cap", "top_k"),
    *("stop_at_tokens", "stop_at_flops", "overlong_buffer", "lora_rank"),
)


def check_ranges(args, zero_allowed: tuple[str, ...] = ()) -> None:
    """Numbers that can only be a slip: zero or negative sizes and rates, infinities, NaN."""
    for name in (*POSITIVE, *NOT_NEGATIVE):
        value = getattr(args, name, None)
        if value is not None:
            may_be_zero = name in NOT_NEGATIVE or name in zero_allowed
            valid = math.isfinite(value) and (value > 0 or (may_be_zero and value == 0))
            low = "0 or above" if may_be_zero else "above 0"
            check(valid, f"--{name} is {value}; it must be {low}")
    warmup, steps = getattr(args, "warmup_steps", 0), getattr(args, "num_steps", None)
    if steps and warmup > steps:
        share = f"{steps / warmup:.0%} of --learning_rate"
        print(f"--warmup_steps {warmup} is above --num_steps {steps}: the rate ends at {share}")
