"""A run's folder: who may write to it, and what its config.json says.

DIR/config.json           the Args, package versions, git commit, fingerprints of the data
DIR/metrics.jsonl         one object a step; TensorBoard events in DIR/tensorboard
DIR/rollouts/             each step's completions with their verdicts
DIR/checkpoints/step_N/   model, optimizer, RNG state, progress: all that an exact resume needs
DIR/final/                the trained model, as save_pretrained leaves it
DIR/manifest.json         written last: only this says that the run is finished
"""

import fcntl
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from common.run.atomic_files import write_json
from common.run.errors import UserError, check
from common.run.inputs import ROOT, of_code

# These say how a run is watched and where it fits, not what it computes: they may differ when it is
# resumed.
MAY_CHANGE = {
    *("environment", "output_dir", "track", "checkpoint_every", "keep_checkpoints", "save_dtype"),
    *("skip_nonfinite", "micro_batch_tokens", "activation_checkpointing", "cpu_offload"),
    *("keep_gradients", "tensor_parallel", "vllm_gpu_memory", "enforce_eager", "gpu_memory_gb"),
}


def claim_folder(folder: Path, config: dict[str, object]) -> None:
    """Make `folder` and its config.json; one of the same config may be there already.

    Raises UserError, and touches nothing, if the folder holds a run of another config, naming the
    differences, or anything else.
    """
    path, config = folder / "config.json", json.loads(json.dumps(config, default=str))
    if path.exists():
        old = json.loads(path.read_text())
        differences = [
            f"{key}: {old.get(key)} there, {config.get(key)} here"
            for key in sorted((old.keys() | config.keys()) - MAY_CHANGE)
            if old.get(key) != config.get(key)
        ]
        message = f"{folder} holds a run of another config ({'; '.join(differences)})"
        check(not differences, message + "; choose another --output_dir")
        return
    if folder.exists():
        empty = folder.is_dir() and not any(folder.iterdir())
        check(empty, f"{folder} exists and is no run's folder; choose another --output_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, config | {"environment": environment()})
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error


def lock_folder(folder: Path) -> io.TextIOBase:
    """A lock that lasts as long as the returned file is open, and no longer than its process."""
    file = open(folder / "lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(
            f"another process is writing to {folder}; wait for it, or choose another --output_dir"
        ) from None
    return file


def environment() -> dict[str, str]:
    """What a result depends on beside its Args."""
    names = ("torch", "transformers", "tokenizers", "datasets", "math-verify")
    versions = {name: version(name) for name in names}
    commit = ""
    if shutil.which("git"):
        git = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    setting = {"machine": machine(), "python": sys.version.split()[0], **versions}
    return setting | {"git_commit": commit or "not a git checkout", "source_hash": of_code()}


def machine() -> str:
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([f"{os.cpu_count()} cores ({model})", f"{memory:.0f} GiB", *gpus])
