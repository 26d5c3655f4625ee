"""A checkpoint: all that an exact resume needs, written whole or not at all, checked when read.

checkpoints/step_N/ holds the tensors of model and optimizer as each rank has them (any number of
ranks can read them), the RNG state, progress.json, and checksums.json of every file.
"""

import hashlib
import json
import os
import shutil
import sys
import warnings
from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from common.run.errors import UserError, one_line
from common.run.folder import replace_folder, write_json, writing
from common.run.ranks import num_ranks, on_first_rank


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest one in `folder` that is whole; damaged ones are put aside."""
    for step in reversed(_steps(folder)):
        path = folder / f"step_{step}"
        problem = find_damage(path)
        if problem is None:
            return path
        print(f"warning: {path} is damaged ({problem}); going back", file=sys.stderr)
        aside = path.with_name(f"damaged_{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
    return None


def save_checkpoint(
    folder: Path, progress: dict[str, object], model, optimizer, keep_checkpoints: int
) -> None:
    """Save model, optimizer and `progress` after a completed step as folder/step_N; then remove all
    but the newest `keep_checkpoints`. Every rank calls it and writes its shards."""
    path = folder / f"step_{progress['step']}"
    temporary = path.with_name(path.name + ".tmp")

    def complete() -> None:
        save_file({"cpu": torch.get_rng_state()}, temporary / "rng.safetensors")
        write_json(temporary / "progress.json", progress)
        write_json(temporary / "checksums.json", checksums(temporary))
        replace_folder(temporary, path)
        for old in _steps(folder)[:-keep_checkpoints]:
            shutil.rmtree(folder / f"step_{old}")

    on_first_rank(lambda: shutil.rmtree(temporary, ignore_errors=True))
    with writing(path):
        write_tensors(temporary, training_state(model, optimizer))
        on_first_rank(complete)


def load_checkpoint(path: Path, model, optimizer) -> None:
    """Load into model, optimizer (see prepare_state) and the CPU's random number generator."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        read_tensors(path, training_state(model, optimizer))
    except CheckpointException as error:
        message = f"{path} is not of this model and this version of the code"
        raise UserError(f"{message}; choose another --output_dir") from error
    torch.set_rng_state(load_file(path / "rng.safetensors")["cpu"])


def _steps(folder: Path) -> list[int]:
    names = [path.name.removeprefix("step_") for path in folder.glob("step_*")]
    return sorted(int(name) for name in names if name.isdigit())


# === checksums ===


def checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.name != "checksums.json":
            with open(path, "rb") as file:
                sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def find_damage(folder: Path) -> str | None:
    """Describe the damage of a checkpoint; None if it is whole."""
    try:
        expected = json.loads((folder / "checksums.json").read_bytes())
        found = checksums(folder)
    except (OSError, ValueError) as error:
        return one_line(error)
    differing = [name for name in expected if found.get(name) != expected[name]]
    return f"{', '.join(differing)} missing or changed" if differing else None


# === tensors ===

# A single process gets this warning, because it saves with no_dist.
warnings.filterwarnings("ignore", "torch.distributed is disabled")


def training_state(model, optimizer) -> dict[str, torch.Tensor]:
    """Return all that training changes, by name: parameters and optimizer state, sharded as they
    are."""
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    return {name: parameter.detach() for parameter, name in names.items()} | {
        f"optimizer/{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def prepare_state(optimizer) -> None:
    """Give parameters that AdamW has not updated yet the state that its first update would; a load
    asks for all of it, and a run may be saved before its first gradient."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in optimizer.state:
                step = torch.zeros((), dtype=torch.float32, device=parameter.device)
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": step, **moments}


def write_tensors(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Write torch's distributed checkpoint as safetensors: its default format would unpickle. A
    file is made in memory first, so there is one for every 4 GB."""
    from torch.distributed import checkpoint

    ends = accumulate(tensor.numel() * tensor.element_size() for tensor in state.values())
    files = {name: 1 + int(end // 4e9) for name, end in zip(state, ends, strict=True)}
    writer = checkpoint.HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    checkpoint.save(state, storage_writer=writer, no_dist=num_ranks() == 1)


def read_tensors(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Read into the tensors of `state`, however many ranks have written and are reading."""
    from torch.distributed import checkpoint

    reader = checkpoint.HuggingFaceStorageReader(str(folder))
    checkpoint.load(state, storage_reader=reader, no_dist=num_ranks() == 1)
