"""final/: a trained model on disk, as transformers and vLLM read it, with no whole copy in memory.

A sharded model is gathered parameter by parameter, on every rank; the first one writes files of at
most SHARD_BYTES.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.model.lora import layers_of, save_adapter, weight_names, whole_weights
from common.run.atomic_files import replace_folder, writing
from common.run.inputs import model_path
from common.run.lazy import transformers
from common.run.ranks import on_first_rank, rank

SHARD_BYTES = 4 * 10**9


def file_dtype(name: str) -> str:
    """float32 or bfloat16: that of a model's files; bfloat16 too where they are in float16."""
    config = transformers.AutoConfig.from_pretrained(model_path(name), trust_remote_code=False)
    return "float32" if config.dtype in (None, torch.float32) else "bfloat16"


def save_final(model, tokenizer, folder: Path, dtype: str) -> None:
    """Model and tokenizer as `folder`, whole or not at all; adapters merged, and alone in
    folder/adapter too. All ranks call it."""
    temporary = folder.with_name(folder.name + ".tmp")

    def make_empty() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def complete() -> None:
        tokenizer.save_pretrained(temporary)
        replace_folder(temporary, folder)

    with writing(folder):
        on_first_rank(make_empty)
        save_model(model, temporary, getattr(torch, dtype), writes=rank() == 0)
        if layers_of(model):
            save_adapter(model, temporary / "adapter", writes=rank() == 0)
        on_first_rank(complete)


def save_model(model, folder: Path, dtype: torch.dtype, writes: bool) -> None:
    """Weights in `dtype`, config and generation config into an existing folder. All ranks call it;
    the one that `writes` writes."""
    files = _plan(model, dtype.itemsize)
    for file, tensors in _in_files(files, whole_weights(model, dtype), writes):
        if writes:
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if not writes:
        return
    if len(set(files.values())) > 1:
        total = sum(model.get_parameter(name).numel() for name in files) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    model.config.dtype, loaded_as = dtype, model.config.dtype
    model.config.save_pretrained(folder)
    model.config.dtype = loaded_as
    model.generation_config.save_pretrained(folder)


def _plan(model, itemsize: int) -> dict[str, str]:
    """Parameter -> file."""
    numbers, size, number = {}, 0, 1
    for name in weight_names(model):
        bytes_of_it = model.get_parameter(name).numel() * itemsize
        if size > 0 and size + bytes_of_it > SHARD_BYTES:
            size, number = 0, number + 1
        size += bytes_of_it
        numbers[name] = number
    if number == 1:
        return dict.fromkeys(numbers, "model.safetensors")
    return {name: f"model-{i:05}-of-{number:05}.safetensors" for name, i in numbers.items()}


def _in_files(
    files: dict[str, str], weights: Iterator[tuple[str, torch.Tensor]], keep: bool
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Each file with its tensors, once it has all of them."""
    tensors: dict[str, torch.Tensor] = {}
    current = None
    for name, weight in weights:
        if current not in (None, files[name]):
            yield current, tensors
            tensors = {}
        current = files[name]
        if keep:
            tensors[name] = weight.cpu().contiguous()
    if current is not None:
        yield current, tensors
