"""Hashes of what goes into a run: a result is reused only if they are what they were.

A name in a command says where a model or a dataset lies, not what lies there now.
"""

import hashlib
from functools import cache
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

ROOT = Path(__file__).resolve().parent.parent.parent
# Of a model's folder: what decides its tokens and its numbers.
MODEL_FILES = ("*.safetensors", "config.json", "tokenizer*", "vocab*", "merges.txt", "*.jinja")
TOY_FILES = {"toy": ("toy/train.jsonl", "toy/test.jsonl")}


def inputs_of(args) -> dict[str, str | None]:
    """Of each model, dataset and file that these Args name. A hub dataset has none of its own: the
    rendered prompts stand for it."""
    models = {name: getattr(args, name, None) for name in ("model", "teacher")}
    sources = [getattr(args, name, None) for name in ("dataset", "eval_dataset", "rollouts")]
    for name in ("decontaminate", "benchmarks"):
        sources += getattr(args, name, None) or ()
    prints = {f"{flag}_fingerprint": of_model(name) for flag, name in models.items() if name}
    prints[f"{args.task} fingerprint"] = of_task(args.task)
    if args.chat_template:
        prints[f"{args.chat_template} fingerprint"] = of_source(args.chat_template)
    return prints | {f"{source} fingerprint": of_source(source) for source in sources if source}


def model_path(name: str) -> str:
    """`toy/teacher` and `toy/student` work from any folder; all else stands as it is."""
    if not Path(name).exists() and (ROOT / name / "config.json").exists():
        return str(ROOT / name)
    return name


def task_path(name: str) -> Path:
    """The file of a task: `math` is the embedded one."""
    return ROOT / "common" / "tasks" / "math" / "task.py" if name == "math" else Path(name)


def of_task(name: str) -> str | None:
    """Of a user's task file, and of those beside it whose names begin with its name: its data."""
    path = task_path(name)
    if name == "math":
        return None
    return _of_files(sorted(p for p in path.parent.glob(f"{path.stem}*") if p.is_file()))


def of_model(name: str) -> str | None:
    """Of a local folder, its files; of a hub id, the commit that is in the cache."""
    folder = Path(model_path(name))
    if folder.is_dir():
        paths = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)})
        return _of_files(paths)
    cached = try_to_load_from_cache(name, "config.json") if name.count("/") == 1 else None
    return Path(cached).parent.name if cached else None


def of_source(source: str) -> str | None:
    paths = [ROOT / name for name in TOY_FILES.get(source, ())] or [Path(source)]
    return _of_files(paths) if all(path.is_file() for path in paths) else None


def of_code() -> str:
    """Of the scripts and rooms that stand here: a commit's name says nothing of what was edited."""
    rooms = (ROOT / "common").rglob("*.py"), (ROOT / "workflow").glob("*.py")
    return _of_files(sorted([*ROOT.glob("*.py"), *rooms[0], *rooms[1]]))


def _of_files(paths: list[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        total.update(f"{path.name} {_of_file(path, stat.st_mtime_ns, stat.st_size)}\n".encode())
    return total.hexdigest()[:16]


@cache
def _of_file(path: Path, mtime_ns: int, size: int) -> str:
    """A workflow asks for one file many times."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
