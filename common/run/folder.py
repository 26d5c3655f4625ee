"""A run's folder: who may write to it, and files that are whole or not there.

DIR/config.json           the Args, package versions, git commit, fingerprints of the data
DIR/metrics.jsonl         one object a step; TensorBoard events in DIR/tensorboard
DIR/rollouts/             each step's completions with their verdicts
DIR/checkpoints/step_N/   model, optimizer, RNG state, progress: all that an exact resume needs
DIR/final/                the trained model, as save_pretrained leaves it
DIR/manifest.json         written last: only this says that the run is finished
"""

import contextlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows
    print("error: this Python has no file locks; use Linux, macOS or WSL", file=sys.stderr)
    sys.exit(2)

from common.run.errors import RunFailure, UserError, check, one_line
from common.run.inputs import ROOT, hash_of_code
from common.run.process import MAY_CHANGE, marks_of

# === who may write ===


def claim_folder(folder: Path, config: dict[str, object], args_type: type) -> None:
    """Make `folder` and its config.json; one of the same config may be there already.

    Raises UserError, and touches nothing, if the folder holds a run of another config, naming the
    differences, or anything else. Flags of `args_type` marked MAY_CHANGE may differ.
    """
    path, config = folder / "config.json", json.loads(json.dumps(config, default=str))
    if path.exists():
        old = read_json(path)
        differences = [
            f"{key}: {old.get(key)} there, {config.get(key)} here"
            for key in sorted((old.keys() | config.keys()) - may_change(args_type))
            if old.get(key) != config.get(key)
        ]
        message = f"{folder} holds a run of another config ({'; '.join(differences)})"
        check(not differences, message + "; choose another --output_dir")
        if old.get("sources") != config["sources"]:  # other bytes, the same rows
            write_json(path, old | {"sources": config["sources"]})
        if old.get("environment", {}).get("source_hash") != hash_of_code():
            print(f"the code has changed since {folder} was begun; a new --output_dir starts anew")
        return
    if folder.exists():
        # One that was killed here has left half a config.json.
        empty = folder.is_dir() and all(p.name == "config.json.tmp" for p in folder.iterdir())
        check(empty, f"{folder} exists and is no run's folder; choose another --output_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, config | {"environment": environment()})
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error


def may_change(args_type: type) -> set[str]:
    """Return the keys of config.json that may differ when a run is resumed."""
    flags = {name for name, marks in marks_of(args_type).items() if MAY_CHANGE in marks}
    return flags | {"environment", "sources"}


def lock_folder(folder: Path) -> io.TextIOBase:
    """Take a lock that lasts as long as the returned file is open, and no longer than its
    process."""
    file = open(folder / "lock", "w", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(
            f"another process is writing to {folder}; wait for it, or choose another --output_dir"
        ) from None
    return file


def environment() -> dict[str, str]:
    """Return what a result depends on besides its Args."""
    names = ("torch", "transformers", "tokenizers", "datasets", "math-verify")
    versions = {name: version(name) for name in names}
    commit = ""
    if shutil.which("git"):
        git = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(git, cwd=ROOT, capture_output=True).stdout.decode().strip()
    setting = {"machine": machine(), "python": sys.version.split()[0], **versions}
    return setting | {"git_commit": commit or "not a git checkout", "source_hash": hash_of_code()}


def machine() -> str:
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([f"{os.cpu_count()} cores ({model})", f"{memory:.0f} GiB", *gpus])


# === files that are whole or not there ===


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that `path` holds either its old content or all of the new, whenever the
    process or the machine dies. Text becomes UTF-8."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_to_disk(path.parent)


def sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=1, default=str) + "\n")


def read_json(path: Path) -> dict:
    """Read back what write_json has written. Raises UserError if it is damaged."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    check(isinstance(value, dict), f"{path} is damaged; restore it, or choose another --output_dir")
    return value


def write_jsonl(path: Path, rows: list[dict]) -> None:
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def replace_folder(temporary: Path, folder: Path) -> None:
    """Make the finished folder `temporary` appear as `folder` in one step."""
    for path in (*temporary.rglob("*"), temporary):
        sync_to_disk(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    sync_to_disk(folder.parent)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a full disk, or one that went away, into a RunFailure of one line."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunFailure(f"cannot write to {folder}: {one_line(error)}") from error
    except CheckpointException as error:
        first = next(cause for cause, _ in error.failures.values())
        raise RunFailure(f"cannot write to {folder}: {one_line(first)}") from error
