"""Hashes of what goes into a run: a result is reused only if they are what they were.

A name in a command says where a model or a dataset lies, not what lies there now.
"""

import ast
import contextlib
import hashlib
import sys
from functools import cache
from pathlib import Path

from huggingface_hub import constants

from common.run.process import CHAT, MODEL, marks_of

ROOT = Path(__file__).resolve().parent.parent.parent
# The files of a model's folder that decide its tokens and its numbers: weights, configs, tokenizer.
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "vocab.txt", "merges.txt")
TEMPLATE_FILES = ("*.jinja", "tokenizer_config.json")
# Modules that a worker finds before the task's folder.
FOUND_BEFORE = {*sys.stdlib_module_names, "common"}


def inputs_of(args) -> dict[str, str | None]:
    """Return a hash of the task's files, and of what each flag marked MODEL or CHAT names.
    (Datasets are known once they are read: Task.sources.)"""
    hashes = {f"{args.task} fingerprint": hash_of_task(args.task)}
    for flag, marks in marks_of(type(args)).items():
        value = getattr(args, flag)
        if MODEL in marks:
            hashes[f"{flag}_fingerprint"] = hash_of_model(value)
        if CHAT in marks and value:
            hashes[f"{flag}_fingerprint"] = hash_of_template(value)
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
    """Hash a user's task file, and the files of its folder that it imports."""
    return None if name == "math" else _hash(files_of_task(task_path(name).resolve()))


def files_of_task(file: Path) -> list[Path]:
    """Return a task's file, and the files of its folder that it imports, through one another too:
    anywhere in their code, since a function may import late."""
    found, waiting = set(), {file}
    while waiting:
        path = waiting.pop()
        found.add(path)
        with contextlib.suppress(SyntaxError):  # no one has imported it yet
            waiting |= imported_files(path, file.parent) - found
    return sorted(found)


def imported_files(path: Path, folder: Path) -> set[Path]:
    """Return the files of a task's folder that one of its files names in an import."""
    files = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            level, module = getattr(node, "level", 0), getattr(node, "module", None)
            place = path.parents[level - 1] if level else folder
            parts = (f"{module}.{alias.name}" if module else alias.name).split(".")
            for part in parts if level or parts[0] not in FOUND_BEFORE else ():
                place /= part
                files |= {place.with_name(f"{part}.py"), place / "__init__.py"}
    return {file for file in files if file.is_file()}


def has_weights(model: str) -> bool:
    """Tell whether a model's weights are in its folder."""
    return any(Path(model_path(model)).glob("*.safetensors"))


def hash_of_model(name: str) -> str | None:
    """Hash the files of a local folder; return the cached commit of a hub id. None: it is not
    here."""
    return _hash_in(name, (*MODEL_FILES, *TEMPLATE_FILES) if has_weights(name) else ())


def hash_of_template(name: str) -> str | None:
    """Hash a .jinja file, or the files of a local folder that hold its chat template; return the
    cached commit of a hub id."""
    return _hash([Path(name)]) if Path(name).is_file() else _hash_in(name, TEMPLATE_FILES)


def _hash_in(model: str, patterns: tuple[str, ...]) -> str | None:
    folder = Path(model_path(model))
    paths = {path for pattern in patterns for path in folder.glob(pattern)}
    return _hash(sorted(paths)) if paths else cached_commit("models", model)


def hash_of_source(source: str) -> str | None:
    """Hash a dataset's file; return the cached commit of a hub id. None: it is not here."""
    path = Path(source)
    return _hash([path]) if path.is_file() else cached_commit("datasets", source)


def cached_commit(kind: str, hub_id: str) -> str | None:
    """Return the commit of one of the hub's models or datasets that is in the local cache."""
    ref = Path(constants.HF_HUB_CACHE, f"{kind}--{hub_id.replace('/', '--')}", "refs", "main")
    return ref.read_text("utf-8") if hub_id.count("/") == 1 and ref.is_file() else None


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
