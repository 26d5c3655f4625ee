"""Two rates of this machine. A step's floor is made of them: its counted FLOPs at the rate of one
large matrix product, and the weights that each decoded token reads, at the rate of a copy."""

import time

import torch


def product_rate(dtype: torch.dtype) -> float:
    """FLOPs a second of a product of two 2,048 x 2,048 matrices, the best of five."""
    a = torch.randn(2048, 2048).to(dtype)
    return 2 * 2048**3 / _best(lambda: a @ a)


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy of 200 MB, the best of five."""
    source = torch.zeros(50_000_000)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source))


def _best(work) -> float:
    work()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
