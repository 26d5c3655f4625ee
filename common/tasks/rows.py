"""Rows of a source: a file, or a set of the hub. They come one by one: a set may be large."""

import csv
import gzip
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.run.errors import UserError, check, one_line
from common.run.inputs import hash_of_source
from common.tasks.task import Task

FILES = (".jsonl", ".json", ".csv", ".parquet")


def read_rows(task: Task, source: str, evaluated: bool) -> Iterator[dict]:
    """Yield the rows of a name that the task knows, a hub id or a file, and add it to the task's
    sources. evaluated: a name may be a training set's and a benchmark's, and a hub id has another
    split for each."""
    known = task.benchmarks if evaluated else task.datasets
    place = known.get(source, source)
    if isinstance(place, str) and place.endswith(FILES):
        path = task.file.parent / place if source in known else Path(place)
        yield from read_file(path)
        task.sources[str(path)] = hash_of_source(str(path))
        return
    if isinstance(place, str):
        place = [part or None for part in (*place.split(":", 2), "", "")[:3]]
    names = "".join(f"{name}, " for name in known)
    check(
        str(place[0]).count("/") == 1,
        f"unknown dataset {source}: give {names}a hub id (owner/name:config:split), or a file "
        f"({', '.join(FILES)})",
    )
    yield from _read_hub(source, *place, "test" if evaluated else "train")
    task.sources[place[0]] = hash_of_source(place[0])


def _read_hub(
    source: str, hub_id: str, config: str | None, split: str | None, usual: str
) -> Iterator[dict]:
    import datasets

    try:
        found = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # a dozen types; each of them means that there is no data
        reason = one_line(error)
        message = f"cannot load dataset {source} from the hub ({reason}); give a local .jsonl file"
        raise UserError(message) from error
    if split is None:
        only_one = usual == "test" and len(found) == 1
        check(
            usual in found or only_one,
            f"dataset {source} has no split {usual}, only {', '.join(found)}; name one, as "
            f"{hub_id}:{config or ''}:{next(iter(found))}",
        )
        found = found[usual if usual in found else next(iter(found))]
    for batch in found.with_format("arrow").iter(1000):
        yield from batch.to_pylist()


def read_file(path: Path) -> Iterator[dict]:
    check(path.is_file(), f"dataset file {path} does not exist")
    readers = {".parquet": _parquet_rows, ".csv": _csv_rows, ".json": _json_rows}
    return readers.get(path.suffix, _jsonl_rows)(path)


def _jsonl_rows(path: Path) -> Iterator[dict]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    row = _parse(line)
                except ValueError as error:  # JSON or UTF-8
                    raise UserError(f"{where}: not JSON ({error})") from error
                yield _object(row, where)


def _json_rows(path: Path) -> Iterator[dict]:
    """An array of rows; but many a .json file has one row a line."""
    try:
        rows = _parse(path.read_bytes())
    except ValueError:
        yield from _jsonl_rows(path)
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield _object(row, f"{path}, row {number}")


def _parse(text: bytes) -> object:
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """json keeps the last of two equal keys and says nothing."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a column stands twice")
    return dict(pairs)


def _object(row: object, where: str) -> dict:
    example = '{"problem": "1+1", "answer": "2"}'
    check(isinstance(row, dict), f"{where}: not a JSON object; name the columns, as {example}")
    return row


def _csv_rows(path: Path) -> Iterator[dict]:
    """Texts as they stand there: a reader that guesses types makes 0.5 of 0.50, and none of NA."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            names = reader.fieldnames or []
            check(len(set(names)) == len(names), f"{path}: a column stands twice")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                check(
                    None not in row, f"{where}: more fields than columns; quote those with commas"
                )
                yield row
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}, after line {reader.line_num}: not CSV ({error})") from error


def _parquet_rows(path: Path) -> Iterator[dict]:
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no parquet file: {one_line(error)}") from error


def _get(row: dict, column: str):
    """`reward_model.ground_truth` is a column, else a key in a nested object."""
    if column in row:
        return row[column]
    for part in column.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def name_columns(task: Task, source: str, rows: Sequence[dict], renamed: Sequence[str]) -> None:
    """Put into each row the names that the task asks for: of the column that --columns says, else
    of the first of its usual ones that has a value in any row."""
    columns = {}
    for pair in renamed:
        name, _, column = pair.partition("=")
        known = ", ".join(task.columns) or "(none: it defines no columns)"
        message = (
            f"--columns {pair}: write NAME=COLUMN, where task {task.name} has the names {known}"
        )
        check(name in task.columns and column != "", message)
        columns[name] = column
    for name, usual in task.columns.items():
        asked = [columns[name]] if name in columns else usual
        there = (c for c in asked if any(_get(row, c) not in (None, "") for row in rows))
        columns[name] = next(there, None)
        if columns[name] is None:
            listed = ", ".join(dict.fromkeys(column for row in rows for column in row))
            raise UserError(
                f"dataset {source} has no column {' or '.join(asked)}, only {listed}; rename one "
                f"(or, for a trainer's --dataset, set --columns {name}=COLUMN)"
            )
    for row in rows:
        row.update({name: _get(row, column) for name, column in columns.items()})
