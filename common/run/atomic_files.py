"""Files that are whole or not there, whenever the process or the machine dies."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from common.run.errors import RunFailure, one_line
from common.run.lazy import checkpointing


def write_atomic(path: Path, text: str) -> None:
    """`path` holds either its old content or all of `text`, whenever the process or the machine
    dies."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
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
    """A full disk, or one that went away, ends a run in one line."""
    try:
        yield
    except (OSError, SafetensorError, checkpointing.CheckpointException) as error:
        causes = [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]
        raise RunFailure(f"cannot write to {folder}: {one_line(causes[0])}") from error
