"""Hashes of what goes into a run: a result is reused only if they are what they were.

A name in a command says where a model or a dataset lies, not what lies there now.
"""

import hashlib
from functools import cache
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from common.run.process import DATA, MODEL, marks_of

ROOT = Path(__file__).resolve().parent.parent.parent
# The files of a model's folder that decide its tokens and its numbers.
MODEL_FILES = ("*.safetensors", "config.json", "tokenizer*", "vocab*", "merges.txt", "*.jinja")
TOY_FILES = {"toy": ("toy/train.jsonl", "toy/test.jsonl")}


def inputs_of(args) -> dict[str, str | None]:
    """Return a hash of each model, dataset and file that the flags marked MODEL and DATA name. A
    hub dataset has none: the rendered prompts stand for it."""
    hashes = {f"{args.task} fingerprint": hash_of_task(args.task)}
    for flag, marks in marks_of(type(args)).items():
        value = getattr(args, flag)
        if MODEL in marks:
            hashes[f"{flag}_fingerprint"] = hash_of_model(value)
        if DATA in marks:
            names = value if isinstance(value, tuple) else (value,)
            hashes |= {f"{name} fingerprint": hash_of_source(name) for name in names if name}
    return hashes


def model_path(name: str) -> str:
    """Return a path that works from any folder for `toy/teacher` and `toy/student`; any other name
    as it is."""
    if not Path(name).exists() and (ROOT / name / "config.json").exists():
        return str(ROOT / name)
    return name


def task_path(name: str) -> Path:
    """Return the file of a task: `math` is the embedded one."""
    return ROOT / "common" / "tasks" / "math.py" if name == "math" else Path(name)


def hash_of_task(name: str) -> str | None:
    """Hash a user's task file, and the files beside it whose names begin with its name: its
    data."""
    path = task_path(name)
    if name == "math":
        return None
    return _hash(sorted(p for p in path.parent.glob(f"{path.stem}*") if p.is_file()))


def hash_of_model(name: str) -> str | None:
    """Hash the files of a local folder; return the cached commit of a hub id."""
    folder = Path(model_path(name))
    if folder.is_dir():
        paths = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)})
        return _hash(paths)
    cached = try_to_load_from_cache(name, "config.json") if name.count("/") == 1 else None
    return Path(cached).parent.name if cached else None


def hash_of_source(source: str) -> str | None:
    """Hash a dataset's or another file; None for a name of the hub."""
    paths = [ROOT / name for name in TOY_FILES.get(source, ())] or [Path(source)]
    return _hash(paths) if all(path.is_file() for path in paths) else None


def hash_of_code() -> str:
    """Hash the code that stands here: a commit's name says nothing of what was edited."""
    rooms = (ROOT / "common").rglob("*.py"), (ROOT / "workflow").glob("*.py")
    return _hash(sorted([*ROOT.glob("*.py"), *rooms[0], *rooms[1]]))


def _hash(paths: list[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        total.update(f"{path.name} {_digest(path, stat.st_mtime_ns, stat.st_size)}\n".encode())
    return total.hexdigest()[:16]


@cache
def _digest(path: Path, mtime_ns: int, size: int) -> str:
    """Hash a file once, though a workflow asks for it many times."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
