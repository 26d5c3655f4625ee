"""The ranks of a torchrun: which device each has, and what they tell one another.

Without torchrun there is one rank, and everything here returns at once.
"""

import datetime
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from common.run.errors import UserError, check
from common.run.preflight import check_gpu


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def resolve_device(device: str) -> torch.device:
    """Resolve --device: auto takes a GPU if there is one; each rank of a machine its own."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    check(local < count, f"--nproc_per_node is above the {count} GPUs of this machine")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def join_ranks(device: str, dtype: str = "float32", cpu_offload: bool = False) -> torch.device:
    """Return this process's device. Under torchrun it joins the other ranks first, and the ranks
    after the first print nothing.

    A trainer's model is sharded on a single rank too with --cpu_offload, and in bfloat16: FSDP2
    computes in bfloat16 over float32 weights (pure bfloat16 ones do not move at a rate of 1e-6), so
    that policy and frozen models compute alike on any number of ranks. Autocast would not: it keeps
    the policy's residual stream in float32.
    """
    check_gpu(device, dtype)
    place, launched = resolve_device(device), "WORLD_SIZE" in os.environ
    if (launched or cpu_offload or dtype == "bfloat16") and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        alone = {} if launched else {"rank": 0, "world_size": 1, "store": dist.HashStore()}
        # Ranks wait for one another's rollouts, which may take far longer than NCCL's 10 minutes.
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2), **alone)
    if launched and cpu_offload:  # torchrun leaves one thread for the update
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return place


def sum_over_ranks(value: float) -> float:
    """Return the sum, the same on all ranks; exact for counts."""
    if num_ranks() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return type(value)(total.item())


def max_over_ranks(value: int) -> int:
    if num_ranks() == 1:
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def combine(parts: list[dict[str, float]], fold: Callable = sum) -> dict[str, float]:
    """Fold metrics key by key, over the parts that have it. Names in _min and _max keep the least
    and the largest, whatever `fold` does with the others."""
    names = dict.fromkeys(name for part in parts for name in part)
    folds = {"_min": min, "_max": max}
    return {
        name: folds.get(name[-4:], fold)([part[name] for part in parts if name in part])
        for name in names
    }


def gather(items: list) -> list:
    """Return the items of all ranks, in their order, on each of them."""
    if num_ranks() == 1:
        return items
    parts: list = [None] * num_ranks()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def share_of(items: list, number: int, count: int) -> tuple[int, list]:
    """Return where the number-th of `count` slices of a list begins, and the slice."""
    first, end = (len(items) * (number + i) // count for i in (0, 1))
    return first, items[first:end]


def on_first_rank(function: Callable):
    """Call it on the first rank only; all ranks get what it returns, or the user's mistake that it
    raises."""
    if num_ranks() == 1:
        return function()
    box = [None, None]
    if rank() == 0:
        try:
            box[0] = function()
        except UserError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def on_first_of_host(function: Callable[[list], list], items: list) -> list:
    """Call `function` over the items of all ranks of a machine, on the first of them only; each
    rank gets the results of its own items."""
    if num_ranks() == 1:
        return function(items)
    own_host = rank() - int(os.environ["LOCAL_RANK"])  # a machine is known by its first rank
    of_ranks = gather([(own_host, items)])
    of_host = [item for host, part in of_ranks if host == own_host for item in part]
    results = gather([function(of_host) if rank() == own_host else []])[own_host]
    before = sum(len(part) for host, part in of_ranks[: rank()] if host == own_host)
    return results[before : before + len(items)]
