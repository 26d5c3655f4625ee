"""A model over several ranks (FSDP2): sharded, read, gathered, and its gradients summed."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from common.run.errors import check
from common.run.ranks import num_ranks, rank

ADAPTERS = ("lora_A", "lora_B")  # of a layer of common.model.lora
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def is_sharded(parameter: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor  # slow to import: not for --help

    return isinstance(parameter, DTensor)


def device_of(model) -> torch.device:
    """Return the device that computes: --cpu_offload keeps a model's shards elsewhere."""
    weight = model.get_output_embeddings().weight
    kind = weight.device_mesh.device_type if is_sharded(weight) else weight.device.type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else weight.device


# === shard ===


def shard(model, dtype: torch.dtype | None, cpu_offload: bool, device: torch.device) -> None:
    """Shard by FSDP2: a group of parameters for each decoder layer, and one for the rest, where
    embedding and head are, which may be tied. They are gathered as `dtype` (None: each as its
    own), gradients summed in float32."""
    from torch.distributed import fsdp

    options = {"mesh": init_device_mesh(device.type, (num_ranks(),)), "reshard_after_forward": True}
    options |= {"mp_policy": fsdp.MixedPrecisionPolicy(dtype, torch.float32)}
    if cpu_offload:
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
    """Read this rank's rows of each parameter from the safetensors files at a path or hub id.
    Adapters are in no file of a model."""
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
    shard, first = parameter, 0
    if is_sharded(parameter):
        shard = parameter.to_local()
        first = min(len(parameter), rank() * -(-len(parameter) // num_ranks()))
    if len(shard) > 0:
        shard.copy_(whole[first : first + len(shard)])


def _weight_files(path: str) -> dict[str, str]:
    """Map each tensor to its file."""
    from transformers.utils import cached_file as find

    missing_is_none = {"_raise_exceptions_for_missing_entries": False}
    index = find(path, "model.safetensors.index.json", **missing_is_none)
    if index is not None:
        files = json.loads(Path(index).read_bytes())["weight_map"]
        paths = {file: find(path, file) for file in set(files.values())}
        return {tensor: paths[file] for tensor, file in files.items()}
    single = find(path, "model.safetensors", **missing_is_none)
    check(single is not None, f"{path} has no safetensors files")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


@torch.no_grad()
def make_buffers(model, device: torch.device) -> None:
    """Compute buffers that are in no file, such as rotary frequencies, as transformers does."""
    for owner in {name.rpartition(".")[0] for name, _ in model.named_buffers()}:
        module = model.get_submodule(owner)
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # else it would get random values
        model._init_weights(module)
        for key, buffer in module.named_buffers(recurse=False):
            module.register_buffer(key, buffer.to(device), persistent=False)


# === gather ===


def full_weight(parameter: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a parameter in `dtype` (None: its own), without gradient; a sharded one is gathered,
    on the device that computes (--cpu_offload keeps the shards in host memory)."""
    weight, dtype = parameter.detach(), dtype or parameter.dtype
    if not is_sharded(weight):
        return weight.to(dtype)
    from torch.distributed.tensor import DTensor

    mesh, whole = weight.device_mesh, {"shape": weight.shape, "stride": weight.stride()}
    local = weight.to_local().to(mesh.device_type, dtype)
    return DTensor.from_local(
        local, mesh, weight.placements, run_check=False, **whole
    ).full_tensor()


@contextlib.contextmanager
def gathered(model) -> Iterator[None]:
    """Hold the whole model on each rank, for sampling: then ranks need not decode in step."""
    from torch.distributed import fsdp

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


def clip_grad_norm(model, limit: float) -> float:
    """Scale the gradients down to a norm of `limit` over all parameters and ranks; return the norm
    before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return full_weight(norm, torch.float32).item()
