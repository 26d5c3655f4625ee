"""Problems and prompts: load, merge duplicates, decontaminate, split, render.

A source is a name that the task knows (`toy`, `math500`), a hub id (`owner/name`,
`owner/name:config` or `owner/name:config:split`), or a local .jsonl, .json, .csv or .parquet file.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.model.tokenizer import prompt_text
from common.run.errors import check
from common.run.ranks import on_first_rank
from common.tasks.rows import FILES, name_columns, read_rows
from common.tasks.task import Problem, Task

NGRAM_WORDS = 13  # so many words in common with a benchmark's problem are no accident,
TEMPLATE = 3  # unless they stand in so many of its problems

# === loading ===


def load_problems(task: Task, source: str, renamed: Sequence[str] = ()) -> list[Problem]:
    """Return a training set's problems, rows of equal content once. renamed: --columns,
    name=column. Raises UserError if the source is not there or lacks a column."""
    return _load(task, source, renamed)[0]


def load_evaluation_problems(task: Task, source: str) -> list[Problem]:
    """Return a held-out set's problems, each once: a file may have a row per sample. With two gold
    answers a problem counts twice, since one cannot tell which is right."""
    problems, num_rows = _load(task, source, evaluated=True)
    merged = {(problem.key, problem.gold): problem for problem in reversed(problems)}
    several = len(merged) - len({key for key, _ in merged})
    if len(merged) < num_rows or several:
        told = f", {several} of them with another gold answer to the same" if several else ""
        print(f"dataset {source}: {num_rows} rows are {len(merged)} problems{told}")
    return list(merged.values())[::-1]


def _load(
    task: Task, source: str, renamed: Sequence[str] = (), evaluated: bool = False
) -> tuple[list[Problem], int]:
    """Return the problems, and of how many rows they are. Rows that cannot be used are left out,
    with a printed line."""
    numbered: dict[str, tuple[int, dict]] = {}  # by content: all that follows costs more
    for number, row in enumerate(read_rows(task, source, evaluated), 1):
        numbered.setdefault(_hash_of(json.dumps(row, default=str)), (number, row))
    check(len(numbered) > 0, f"dataset {source} is empty")
    numbers, rows = zip(*numbered.values(), strict=True)
    name_columns(task, source, rows, renamed)
    found = task.problems(rows, f"dataset {source}", numbers)
    unusable = [index for index, problem in enumerate(found) if isinstance(problem, str)]
    if unusable:
        first = unusable[0]
        row = {name: rows[first][name] for name in task.columns} or rows[first]
        told = (
            f"dataset {source}: {len(unusable)} of {len(rows)} different rows cannot be used, the "
            f"first: row {numbers[first]}: {found[first]}: {json.dumps(row, default=str):.100}"
        )
        check(2 * len(unusable) <= len(rows), f"{told}; mend them, or name other --columns")
        print(told)
    problems = [problem for problem in found if isinstance(problem, Problem)]
    warnings = [problem.warning for problem in problems if problem.warning]
    if warnings:
        print(f"dataset {source}: {len(warnings)} rows with a warning, the first: {warnings[0]}")
    return problems, number - len(unusable)


def without_beginning(texts: list[str]) -> list[str]:
    """Return the texts without the words that most of them begin with, as far as each one does."""
    sample = [re.findall(r"\w+", text.lower()) for text in texts[:: len(texts) // 1000 + 1]]
    shared: list[str] = []
    while True:
        count = len(shared)
        following = [w[count] for w in sample if len(w) > count and w[:count] == shared]
        word, times = Counter(following).most_common(1)[0] if following else ("", 0)
        if times < TEMPLATE or 2 * times <= len(sample):
            break
        shared.append(word)
    left = []
    for text in texts:
        end = 0
        for word, match in zip(shared, re.finditer(r"\w+", text), strict=False):
            if match[0].lower() != word:
                break
            end = match.end()
        left.append(text[end:])
    return left


def without_prompt(task: Task, problems: Sequence[Problem]) -> list[tuple[str, str]]:
    """Return text and key of each problem, without the words that most of the problems begin or end
    with: an instruction would make all of them alike."""
    whole = [problem.text for problem in problems]
    backwards = [text[::-1] for text in without_beginning(whole)]
    texts = [text[::-1].strip() for text in without_beginning(backwards)]
    if texts == whole:
        return [(problem.text, problem.key) for problem in problems]
    texts = [text or problem.text for text, problem in zip(texts, problems, strict=True)]
    return list(zip(texts, task.keys(texts), strict=True))


def ngrams_of(text: str) -> set[tuple[str, ...]]:
    """Return every run of NGRAM_WORDS words, lower-cased."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1)}


def load_training_problems(
    task: Task, source: str, split: str, decontaminate: Iterable[str], renamed: Sequence[str] = ()
) -> list[Problem]:
    """A source without duplicates, conflicts and what the evaluation sets hold too, as a whole or
    NGRAM_WORDS words of it; prints a count of each. Words that TEMPLATE of their problems share are
    a phrase of the field.

    split: `1H` and `2H` are two halves by the problem's key: they do not move when the
    file's order or the evaluation sets change.
    """
    rows, num_rows = _load(task, source, renamed)
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(row.key, set()).add(row.gold)
    held_out_keys: set[str] = set()
    ngrams: dict[str, set] = {}  # of each held-out problem, in however many sets it stands
    for name in decontaminate:
        of_set = load_evaluation_problems(task, name)
        bare = without_prompt(task, of_set)
        held_out_keys |= {row.key for row in of_set} | {key for _, key in bare}
        ngrams |= {key: ngrams_of(text) for text, key in bare}
    in_problems = Counter(ngram for of_problem in ngrams.values() for ngram in of_problem)
    held_out_ngrams = {ngram for ngram, count in in_problems.items() if count < TEMPLATE}
    unique = {row.key: row for row in rows}
    agreed = [row for row in unique.values() if len(answers[row.key]) == 1]
    bare = zip(agreed, without_prompt(task, agreed), strict=True)
    other = [(row, t) for row, (t, key) in bare if held_out_keys.isdisjoint((row.key, key))]
    clean = [row for row, text in other if held_out_ngrams.isdisjoint(ngrams_of(text))]
    check(
        len(clean) > 0,
        f"no problem of {source} is left: all have conflicting answers, stand in the evaluation "
        f"sets ({', '.join(decontaminate)}) or share {NGRAM_WORDS} words in a row with one of them",
    )
    half = {"1H": 0, "2H": 1}
    kept = [row for row in clean if split == "all" or int(row.key, 16) % 2 == half[split]]
    check(len(kept) > 0, f"no problem of {source} falls into --split {split}")
    print(
        f"dataset {source}: {num_rows} rows, {num_rows - len(unique)} duplicates merged, "
        f"{len(unique) - len(agreed)} with conflicting answers, {len(agreed) - len(other)} of the "
        f"evaluation sets and {len(other) - len(clean)} with {NGRAM_WORDS} words in a row of one "
        f"dropped; split {split}: {len(kept)} problems"
    )
    return kept


def default_decontamination(task: Task, source: str) -> tuple[str, ...]:
    """A dataset of the hub may overlap any benchmark of the hub; a local file is its owner's
    business."""
    place = task.datasets.get(source, source)
    local = isinstance(place, str) and place.endswith(FILES)
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
    prompts: list[Prompt] = []
    for i in range(0, len(problems), 1000):  # a tokenizer keeps a hundred bytes a token of a batch
        part = problems[i : i + 1000]
        texts = [prompt_text(tokenizer, problem.messages, args.thinking) for problem in part]
        # The template has written the special tokens: the tokenizer must not add them again.
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        opened = [opens_thought(t, p.messages) for t, p in zip(texts, part, strict=True)]
        prompts += map(Prompt, part, ids, opened)
    asked = [prompt_text(tokenizer, problems[0].messages, mode) for mode in (False, True)]
    opened = prompts[0].opens_thought
    if asked[0] == asked[1] and (args.thinking or opened):
        how = "opens a thought in each prompt" if opened else "opens no thought"
        print(f"the chat template has no switch for thinking and {how}, whatever --thinking says")
    limit = args.max_prompt_tokens
    kept = [prompt for prompt in prompts if len(prompt.ids) <= limit]
    if len(kept) < len(prompts):
        print(f"{len(prompts) - len(kept)} prompts over --max_prompt_tokens {limit} dropped")
    shortest = min(len(prompt.ids) for prompt in prompts)
    check(
        len(kept) > 0,
        f"every prompt is over --max_prompt_tokens {limit}; the shortest has {shortest} tokens",
    )
    return kept


def training_prompts(task: Task, tokenizer, args) -> list[Prompt]:
    """The prompts that a trainer's --dataset, --split and --decontaminate name."""
    source, held_out = args.dataset or default_of(task, "datasets"), args.decontaminate
    held_out = default_decontamination(task, source) if held_out is None else held_out
    evaluated = [args.eval_dataset] if args.eval_dataset else list(task.benchmarks)[:1]
    held_out = dict.fromkeys((*held_out, *evaluated))  # whether --eval_every is set or not

    def prepare() -> list[Prompt]:
        problems = load_training_problems(task, source, args.split, held_out, args.columns)
        return render_prompts(tokenizer, problems, args)

    return on_first_rank(prepare)


def evaluation_prompts(task: Task, tokenizer, args) -> list[Prompt]:
    """The prompts of a trainer's --eval_dataset, if --eval_every is set."""
    if not args.eval_every:
        return []
    source = args.eval_dataset or default_of(task, "benchmarks")
    return on_first_rank(
        lambda: render_prompts(tokenizer, load_evaluation_problems(task, source), args)
    )


def default_of(task: Task, kind: str) -> str:
    """The first of a task's datasets or benchmarks."""
    known = getattr(task, kind)
    flag = {"datasets": "--dataset", "benchmarks": "--benchmarks (or a trainer's --eval_dataset)"}
    check(len(known) > 0, f"task {task.name} names no {kind}; set {flag[kind]}")
    return next(iter(known))


def fingerprint(task: Task, dataset: Sequence, eval_prompts: Sequence[Prompt] = ()) -> dict:
    """Return what a resumed run must find unchanged beside its Args: the prompts or given rollouts,
    as token ids, since a template may write today's date. Sources may change: their rows count."""
    return {
        "training_problems": len({item.problem.key for item in dataset}),
        "prompts_fingerprint": _hash_of("\n".join(i.identity for i in (*dataset, *eval_prompts))),
        "sources": task.sources,
    }


def _hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
