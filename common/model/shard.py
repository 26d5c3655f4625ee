"""One model over several ranks (FSDP2): sharded, read, gathered, and its gradients summed."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from common.run.errors import check
from common.run.lazy import dtensor, fsdp, transformers
from common.run.ranks import num_ranks, rank

ADAPTERS = ("lora_A", "lora_B")  # of a layer of common.model.lora
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device_of(model) -> torch.device:
    """Where it computes: --cpu_offload keeps a model's shards elsewhere."""
    weight = model.get_output_embeddings().weight
    sharded = isinstance(weight, dtensor.DTensor)
    kind = weight.device_mesh.device_type if sharded else weight.device.type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else weight.device


# === shard ===


def shard(model, args, device: torch.device) -> None:
    """FSDP2: a group of parameters for each decoder layer, and one for the rest, where embedding
    and head are, which may be tied. They are gathered as `dtype`, gradients summed in float32."""
    options = {"mesh": init_device_mesh(device.type, (num_ranks(),)), "reshard_after_forward": True}
    options |= {"mp_policy": fsdp.MixedPrecisionPolicy(DTYPES[args.dtype], torch.float32)}
    if args.cpu_offload:
        options |= {"offload_policy": fsdp.CPUOffloadPolicy(pin_memory=device.type == "cuda")}
    for module in (*model.get_decoder().layers, model):
        fsdp.fully_shard(module, **options)
        # The loss is divided by a sum over all ranks already: gradients are summed, not averaged.
        # (One rank has nothing to sum, and would divide by 1, into a copy.)
        if num_ranks() > 1:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def read_shards(model, path: str) -> None:
    """This rank's rows of each parameter, from the safetensors files at a path or hub id. Adapters
    are in no file of a model."""
    files = _weight_files(path)
    parameters = {n: p for n, p in model.named_parameters() if not n.endswith(ADAPTERS)}
    missing = [name for name in parameters if name not in files]
    check(
        not missing, f"{path} cannot be sharded: its files have no tensor {', '.join(missing[:2])}"
    )
    with contextlib.ExitStack() as stack:
        opened = {f: stack.enter_context(safe_open(f, "pt")) for f in set(files.values())}
        for key, parameter in parameters.items():
            rows = opened[files[key]].get_slice(key)
            whole = tuple(rows.get_shape())
            check(whole == tuple(parameter.shape), f"{path}: {key} has shape {whole} in the files")
            copy_rows(parameter, rows)


def copy_rows(parameter: torch.Tensor, whole) -> None:
    """Fill a parameter, or this rank's rows of it, from a whole tensor (or a slice of a file)."""
    shard = parameter.to_local() if isinstance(parameter, dtensor.DTensor) else parameter
    first = 0
    if isinstance(parameter, dtensor.DTensor):
        first = min(len(parameter), rank() * -(-len(parameter) // num_ranks()))
    if len(shard) > 0:
        shard.copy_(whole[first : first + len(shard)])


def _weight_files(path: str) -> dict[str, str]:
    """Tensor -> file."""
    find = transformers.utils.cached_file
    missing_is_none = {"_raise_exceptions_for_missing_entries": False}
    index = find(path, "model.safetensors.index.json", **missing_is_none)
    if index is not None:
        files = json.loads(Path(index).read_text())["weight_map"]
        paths = {file: find(path, file) for file in set(files.values())}
        return {tensor: paths[file] for tensor, file in files.items()}
    single = find(path, "model.safetensors", **missing_is_none)
    check(single is not None, f"{path} has no safetensors files")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def make_buffers(model, device: torch.device) -> None:
    """Rotary frequencies, which are in no file: computed again, as the module does."""
    for owner in {name.rpartition(".")[0] for name, _ in model.named_buffers()}:
        module = model.get_submodule(owner)
        fresh = type(module)(module.config)
        for key, buffer in fresh.named_buffers(recurse=False):
            module.register_buffer(key, buffer.to(device), persistent=False)


# === gather ===


def full_weight(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A parameter in `dtype`, without gradient; a sharded one is gathered, on the device that
    computes (--cpu_offload keeps the shards in host memory)."""
    weight = parameter.detach()
    if not isinstance(weight, dtensor.DTensor):
        return weight.to(dtype)
    local = weight.to_local().to(weight.device_mesh.device_type, dtype)
    return _like(weight, local).full_tensor()


def _like(weight: "dtensor.DTensor", local: torch.Tensor) -> "dtensor.DTensor":
    """`local` as this rank's shard of a tensor that is sharded as `weight` is."""
    whole = {"shape": weight.shape, "stride": weight.stride()}
    placements = weight.placements
    return dtensor.DTensor.from_local(
        local, weight.device_mesh, placements, run_check=False, **whole
    )


@contextlib.contextmanager
def gathered(model) -> Iterator[None]:
    """The whole model on each rank, for sampling: then ranks need not decode in step."""
    groups = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    for module in groups:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in groups:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


# === gradients ===


def accumulating(model, batches: Iterable, args) -> Iterator:
    """The micro-batches of one optimizer step. With --keep_gradients their gradients are added up
    whole, on the device; their sum over ranks, and their way to host memory, waits for the last."""
    batches = list(batches)
    for number, batch in enumerate(batches, 1):
        if isinstance(model, fsdp.FSDPModule):
            is_last = number == len(batches)
            model.set_requires_gradient_sync(is_last or not args.keep_gradients)
        yield batch


def clip_grad_norm(model, limit: float) -> float:
    """Scale the gradients down to a norm of `limit` over all parameters and ranks; returns the norm
    before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return full_weight(norm, torch.float32).item()
