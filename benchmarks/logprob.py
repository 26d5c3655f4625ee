r"""The chunked head against its three bare matrix products; OPD's loss on slices of a chunk's rows;
on a GPU, the fused kernels too.

python -m benchmarks.logprob                                       # float32: minutes on a CPU
python -m benchmarks.logprob --words 100 --hidden_size 128         # the toy's sizes
python -m benchmarks.logprob --dtype bfloat16 --chunk_size 1024
"""

import statistics
import threading
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

import opd
from common.model import logprob
from common.model.head import _add_product, head_backward
from common.model.shard import DTYPES
from common.run.process import start
from common.run.ranks import resolve_device


@dataclass
class Args:
    tokens: int = 2048
    """N: tokens of the micro-batch"""
    hidden_size: int = 1024
    """D: hidden size"""
    words: int = 151_936
    """V: vocabulary"""
    chunk_size: int = 256
    """tokens per chunk of the head"""
    rounds: int = 3
    """timed rounds, in alternation"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute type; the head's gradient is float32 either way"""


class Head:
    """A model with as much as `head_backward` needs."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight.requires_grad_()

    def get_output_embeddings(self):
        return self


def seconds(function, device: torch.device) -> float:
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_bytes(function, device: torch.device) -> int:
    """The most memory that `function` held beside what was there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    status, done, seen = Path("/proc/self/statm"), threading.Event(), []

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(int(status.read_text("utf-8").split()[1]) * 4096)

    before = int(status.read_text("utf-8").split()[1]) * 4096
    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return max(seen, default=before) - before


def head(args: Args, device: torch.device) -> None:
    torch.manual_seed(0)
    dtype, shape = DTYPES[args.dtype], (args.tokens, args.hidden_size)
    model = Head(torch.randn(args.words, args.hidden_size, device=device) * 0.02)
    hidden = torch.randn(shape, device=device, dtype=dtype)
    tokens = torch.randint(args.words, (args.tokens,), device=device)
    room = torch.zeros(args.chunk_size, args.words, device=device, dtype=dtype)
    weight, gradient = (
        model.weight.detach().to(dtype),
        torch.randn(shape, device=device, dtype=dtype),
    )

    def loss_fn(logits, tokens):
        return -logprob.token_logprobs(logits, tokens)[0].sum(), {}

    def chunked() -> None:
        leaf, how = hidden.clone().requires_grad_(), {"denominator": args.tokens}
        how |= {"inputs": {"tokens": tokens}, "chunk_size": args.chunk_size}
        head_backward(leaf, model, loss_fn, **how)

    def products() -> None:
        """The same three for each chunk, and nothing else."""
        for chunk in hidden.split(args.chunk_size):
            logits = torch.mm(chunk, weight.T, out=room[: len(chunk)])
            gradient[: len(chunk)] = logits @ weight
            _add_product(model.weight.grad, logits, chunk)

    extra = peak_bytes(chunked, device)  # the head's gradient included: it is made here
    pairs = [(seconds(products, device), seconds(chunked, device)) for _ in range(args.rounds)]
    bare, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    size = dtype.itemsize
    allowed = 3 * args.chunk_size * args.words * size + 4 * args.words * args.hidden_size
    allowed += args.tokens * args.hidden_size * size
    print(
        f"head, N {args.tokens}, D {args.hidden_size}, V {args.words}, {args.dtype}, chunks of "
        f"{args.chunk_size}, {device}: {ours:.2f} s, bare products {bare:.2f} s, ratio {ratio:.2f}"
    )
    print(
        f"extra memory {extra / 1e9:.2f} GB; three chunks and both gradients {allowed / 1e9:.2f} GB"
    )


def against_float64(args: Args, device: torch.device) -> None:
    """Print how far log-probs and their gradient are from those in float64, over 64 rows."""
    logits = (4 * torch.randn(64, args.words, device=device)).to(DTYPES[args.dtype])
    tokens = torch.randint(args.words, (64,), device=device)
    exact = logits.double().requires_grad_()
    expected = exact.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    expected.sum().backward()
    leaf = logits.clone().requires_grad_()
    found = logprob.token_logprobs(leaf, tokens)[0]
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    error, slope = (found - expected).abs().max(), (gradient - exact.grad).abs().max()
    print(f"against float64: log-probs within {error:.1e}, their gradient within {slope:.1e}")


def loss_on_slices(args: Args, device: torch.device) -> None:
    """Time OPD's loss with its metrics, forward and backward, over one chunk: as row_slices cuts
    it, by fewer and by more rows."""
    rows, dtype = args.chunk_size, DTYPES[args.dtype]
    logits, teacher_logits = torch.randn(2, rows, args.words, device=device).to(dtype)
    tokens, flags = torch.zeros(rows, dtype=torch.long, device=device), opd.Args()
    chosen = logprob.row_slices(logits)[0].stop

    def whole_chunk(size: int) -> None:
        for first in range(0, rows, size):
            leaf = logits[first : first + size].detach().requires_grad_()
            inputs = (teacher_logits[first : first + size], tokens[first : first + size], flags)
            torch.autograd.grad(opd.loss_fn(leaf, *inputs)[0], leaf)

    for size in sorted({4, 8, 16, 32, min(chosen, rows), rows}):
        extra = peak_bytes(lambda size=size: whole_chunk(size), device)
        taken = min(seconds(lambda size=size: whole_chunk(size), device) for _ in range(3))
        mark = " (row_slices)" if size == min(chosen, rows) else ""
        print(
            f"OPD's loss, {rows} x {args.words}, {torch.get_num_threads()} threads, slices of "
            f"{size:4} rows{mark}: {taken:.3f} s, {extra / 1e9:.2f} GB"
        )


def kernels(args: Args, device: torch.device) -> None:
    """Time, GB/s and share of the bandwidth of a copy, forward and backward."""
    rows, dtype = args.chunk_size, DTYPES[args.dtype]
    logits = torch.randn(rows, args.words, device=device, dtype=dtype)
    tokens, up = torch.randint(args.words, (rows,), device=device), torch.randn(rows, device=device)
    saved = logprob.forward_triton(logits, tokens, 1.0)
    target = torch.empty_like(logits)
    work = {
        "copy": (lambda: target.copy_(logits), 2),
        "forward": (lambda: logprob.forward_triton(logits, tokens, 1.0), 1),
        "backward": (
            lambda: logprob.backward_triton(logits, tokens, *saved[2:], up, 1.0, target),
            2,
        ),
    }
    index = tokens[:, None]
    work["log_softmax + gather"] = (lambda: logits.float().log_softmax(-1).gather(-1, index), 1)
    if find_spec("liger_kernel"):  # forward and gradient in one, over the logits
        from liger_kernel.transformers.functional import liger_cross_entropy

        leaf = logits.clone().requires_grad_()
        work["Liger, both"] = (lambda: liger_cross_entropy(leaf, tokens, reduction="sum"), 2)
    rates = {}
    for name, (function, passes) in work.items():
        function()
        taken = min(seconds(function, device) for _ in range(20))
        rates[name] = passes * logits.nbytes / taken / 1e9
        share = rates[name] / rates["copy"]
        print(f"{name:20} {taken * 1e3:7.3f} ms {rates[name]:7.0f} GB/s {share:5.0%} of the copy")


def main(args: Args) -> None:
    device = resolve_device("auto")
    against_float64(args, device)
    head(args, device)
    loss_on_slices(args, device)
    if device.type == "cuda":
        kernels(args, device)
    else:
        print("fused kernels: not measured (no GPU)")


if __name__ == "__main__":
    start(main, Args, __doc__)
