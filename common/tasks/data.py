"""Problems and prompts: load, merge duplicates, decontaminate, split, render.

A source is a name that the task knows (`toy`, `math500`), a hub id (`owner/name` or
`owner/name:config`), or a local .jsonl or .parquet file.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.model.tokenizer import prompt_text
from common.run.errors import UserError, check, one_line
from common.tasks.task import Problem, Task

NGRAM_WORDS = 13  # so many words in common with a benchmark's problem are no accident,
TEMPLATE = 3  # unless they stand in so many of its problems

# === loading ===


def load_problems(task: Task, source: str, renamed: Sequence[str] = ()) -> list[Problem]:
    """Return every row of a training set. renamed: --columns, name=column. Raises UserError if the
    source is not there or lacks a column."""
    return _load(task, source, task.datasets, renamed)


def load_evaluation_problems(task: Task, source: str) -> list[Problem]:
    """Return every row of a held-out set, whose name may be a training set's too."""
    return _load(task, source, task.benchmarks)


def _load(task: Task, source: str, known: dict, renamed: Sequence[str] = ()) -> list[Problem]:
    rows = _read_rows(task, source, known)
    check(len(rows) > 0, f"dataset {source} is empty")
    columns = _find_columns(task, source, rows[0], renamed)
    named = [row | {name: _get(row, column) for name, column in columns.items()} for row in rows]
    problems = task.problems(named, f"dataset {source}")
    for problem in problems:
        texts = (problem.text, problem.gold)
        check(all(map(is_unicode, texts)), f"{problem.where}: half a surrogate pair")
    warnings = [problem.warning for problem in problems if problem.warning]
    if warnings:
        print(f"dataset {source}: {len(warnings)} rows with a warning, the first: {warnings[0]}")
    return problems


def _read_rows(task: Task, source: str, known: dict) -> list[dict]:
    place = known.get(source, source)
    if source in known and isinstance(place, str):
        place = str(task.file.parent / place)
    if isinstance(place, str) and place.endswith(".jsonl"):
        return read_jsonl(Path(place))
    if isinstance(place, str) and place.endswith(".parquet"):
        import pyarrow.parquet

        check(Path(place).is_file(), f"dataset file {place} does not exist")
        try:
            return pyarrow.parquet.read_table(place).to_pylist()
        except pyarrow.ArrowException as error:
            raise UserError(f"{place} is no parquet file: {one_line(error)}") from error
    if isinstance(place, str):
        name, _, config = place.partition(":")
        place = (name, config or None, "train")
    hub_id, config, split = place
    names = "".join(f"{name}, " for name in known)
    check(
        hub_id.count("/") == 1,
        f"unknown dataset {source}: give {names}a hub id (owner/name), or a .jsonl or .parquet "
        "file",
    )
    import datasets

    try:
        return datasets.load_dataset(hub_id, config, split=split).to_list()
    except Exception as error:  # a dozen types; each of them means that there is no data
        reason = one_line(error)
        message = f"cannot load dataset {source} from the hub ({reason}); give a local .jsonl file"
        raise UserError(message) from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """json keeps the last of two equal keys and says nothing."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a column stands twice")
    return dict(pairs)


def read_jsonl(path: Path) -> list[dict]:
    check(path.is_file(), f"dataset file {path} does not exist")
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line.decode(), object_pairs_hook=_unique_keys))
                except ValueError as error:  # JSON or UTF-8
                    raise UserError(f"{path}, line {number}: not JSON ({error})") from error
                check(isinstance(rows[-1], dict), f"{path}, line {number}: not a JSON object")
    return rows


def _get(row: dict, column: str):
    """`reward_model.ground_truth` is a key in a nested object."""
    for part in column.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def _find_columns(task: Task, source: str, row: dict, renamed: Sequence[str]) -> dict[str, str]:
    """The column of each name that the task asks for: as --columns says, else the first that there
    is of its usual ones."""
    pairs = [pair.partition("=")[::2] for pair in renamed]
    known = ", ".join(task.columns) or "(none: it defines no columns)"
    for name, column in pairs:
        message = (
            f"--columns {name}={column}: write NAME=COLUMN, where task {task.name} has the names "
        )
        check(name in task.columns and column != "", message + known)
    columns = dict(pairs)
    for name, usual in task.columns.items():
        asked = [columns[name]] if name in columns else usual
        there = [column for column in asked if _get(row, column) is not None]
        check(
            len(there) > 0,
            f"dataset {source} has no column {' or '.join(asked)}, only {', '.join(row)}; rename "
            f"one (or, for a trainer's --dataset, set --columns {name}=COLUMN)",
        )
        columns[name] = there[0]
    return columns


def is_unicode(text: str) -> bool:
    """Tell whether a text has no half of a surrogate pair, which JSON can hold and UTF-8 and
    tokenizers cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def ngrams(problem: Problem) -> set[tuple[str, ...]]:
    """Return every run of NGRAM_WORDS words, lower-cased."""
    words = re.findall(r"\w+", problem.text.lower())
    return {tuple(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1)}


def load_training_problems(
    task: Task, source: str, split: str, decontaminate: Iterable[str], renamed: Sequence[str] = ()
) -> list[Problem]:
    """A source without duplicates, conflicts and what the evaluation sets hold too, as a whole or
    NGRAM_WORDS words of it; prints a count of each. Words that TEMPLATE of their problems share are
    a phrase of the field, or of the prompt.

    split: `1H` and `2H` are two halves by the problem's key: they do not move when the
    file's order or the evaluation sets change.
    """
    rows = load_problems(task, source, renamed)
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(row.key, set()).add(row.gold)
    held_out = [row for name in decontaminate for row in load_evaluation_problems(task, name)]
    held_out_keys = {row.key for row in held_out}
    in_problems = Counter(ngram for row in held_out for ngram in ngrams(row))
    held_out_ngrams = {ngram for ngram, count in in_problems.items() if count < TEMPLATE}
    unique = {row.key: row for row in rows}
    agreed = {key: row for key, row in unique.items() if len(answers[key]) == 1}
    other = {key: row for key, row in agreed.items() if key not in held_out_keys}
    clean = {k: row for k, row in other.items() if held_out_ngrams.isdisjoint(ngrams(row))}
    check(
        len(clean) > 0,
        f"no problem of {source} is left: all have conflicting answers, stand in the evaluation "
        f"sets ({', '.join(decontaminate)}) or share {NGRAM_WORDS} words in a row with one of them",
    )
    half = {"1H": 0, "2H": 1}
    kept = [row for key, row in clean.items() if split == "all" or int(key, 16) % 2 == half[split]]
    check(len(kept) > 0, f"no problem of {source} falls into --split {split}")
    print(
        f"dataset {source}: {len(rows)} rows, {len(rows) - len(unique)} duplicates merged, "
        f"{len(unique) - len(agreed)} with conflicting answers, {len(agreed) - len(other)} of the "
        f"evaluation sets and {len(other) - len(clean)} with {NGRAM_WORDS} words in a row of one "
        f"dropped; split {split}: {len(kept)} problems"
    )
    return kept


def default_decontamination(task: Task, source: str) -> tuple[str, ...]:
    """A dataset of the hub may overlap any benchmark of the hub; a local file is its owner's
    business."""
    place = task.datasets.get(source, source)
    local = isinstance(place, str) and place.endswith((".jsonl", ".parquet"))
    hub = (name for name, held_out in task.benchmarks.items() if not isinstance(held_out, str))
    return () if local else tuple(hub)


# === prompts ===


@dataclass(frozen=True)
class Prompt:
    problem: Problem
    ids: list[int]
    opens_thought: bool = False  # the template has written <think>: the completion begins inside

    @property
    def identity(self) -> str:
        return f"{self.ids}{self.problem.identity}"


def opens_thought(text: str, messages: Sequence[dict]) -> bool:
    """Tell whether a prompt ends inside <think>, as templates of reasoning models leave it."""
    turn = text.rpartition(messages[-1]["content"].strip())[2]
    return turn.rfind("<think>") > turn.rfind("</think>")


def render_prompts(tokenizer, problems: list[Problem], args) -> list[Prompt]:
    """Problems as token ids; those over --max_prompt_tokens are dropped and counted."""
    texts = [prompt_text(tokenizer, problem.messages, args.thinking) for problem in problems]
    opened = [opens_thought(t, p.messages) for t, p in zip(texts, problems, strict=True)]
    has_switch = texts[0] != prompt_text(tokenizer, problems[0].messages, not args.thinking)
    if not has_switch and (args.thinking or opened[0]):
        how = "opens a thought in each prompt" if opened[0] else "opens no thought"
        print(f"the chat template has no switch for thinking and {how}, whatever --thinking says")
    # The template has written the special tokens: the tokenizer must not add them again.
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompts = [
        Prompt(problem, row, opens)
        for problem, row, opens in zip(problems, ids, opened, strict=True)
    ]
    limit = args.max_prompt_tokens
    kept = [prompt for prompt in prompts if len(prompt.ids) <= limit]
    if len(kept) < len(prompts):
        print(f"{len(prompts) - len(kept)} prompts over --max_prompt_tokens {limit} dropped")
    shortest = min(map(len, ids))
    check(
        len(kept) > 0,
        f"every prompt is over --max_prompt_tokens {limit}; the shortest has {shortest} tokens",
    )
    return kept


def training_prompts(task: Task, tokenizer, args) -> list[Prompt]:
    """The prompts that a trainer's --dataset, --split and --decontaminate name."""
    source, held_out = args.dataset or default_of(task, "datasets"), args.decontaminate
    held_out = default_decontamination(task, source) if held_out is None else held_out
    held_out = dict.fromkeys((*held_out, *evaluation_source(task, args)))
    problems = load_training_problems(task, source, args.split, held_out, args.columns)
    return render_prompts(tokenizer, problems, args)


def evaluation_prompts(task: Task, tokenizer, args) -> list[Prompt]:
    """The prompts of a trainer's --eval_dataset, if --eval_every is set."""
    if not args.eval_every:
        return []
    source = args.eval_dataset or default_of(task, "benchmarks")
    return render_prompts(tokenizer, load_evaluation_problems(task, source), args)


def evaluation_source(task: Task, args) -> list[str]:
    """Return the set that is never trained on: --eval_dataset, or the task's first benchmark."""
    return [args.eval_dataset] if args.eval_dataset else list(task.benchmarks)[:1]


def default_of(task: Task, kind: str) -> str:
    """The first of a task's datasets or benchmarks."""
    known = getattr(task, kind)
    flag = {"datasets": "--dataset", "benchmarks": "--benchmarks (or a trainer's --eval_dataset)"}
    check(len(known) > 0, f"task {task.name} names no {kind}; set {flag[kind]}")
    return next(iter(known))


def fingerprint(tokenizer, dataset: Sequence, args) -> dict[str, object]:
    """Return what a resumed run must find unchanged beside its Args: the data, prompts or given
    rollouts, and how it is put. A template may write today's date, so prompts count as their token
    ids."""
    return {
        "num_problems": len({item.problem.key for item in dataset}),
        "prompts_fingerprint": _hash_of("".join(f"{item.identity}\n" for item in dataset)),
        "template_fingerprint": template_fingerprint(tokenizer, args),
    }


def template_fingerprint(tokenizer, args) -> str:
    """Hash what the chat template makes of any problem. (The task's instruction counts with its
    file.)"""
    messages = [{"role": "user", "content": "1+1\n"}]
    text = prompt_text(tokenizer, messages, args.thinking)
    return _hash_of(str(tokenizer(text, add_special_tokens=False)["input_ids"]))


def _hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
