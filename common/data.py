"""Problems and prompts: load, merge duplicates, decontaminate, split, render.

A source is `toy`, a benchmark's name, a hub id (`owner/name` or `owner/name:config`), or a local
.jsonl or .parquet file.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.run import ROOT, Progress, UserError, check, one_line, rank
from common.verifier import Verifier, extract_answer

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."

# Of the source `toy`: what is trained on, and what is held out.
TOY_TRAIN, TOY_TEST = ROOT / "toy" / "train.jsonl", ROOT / "toy" / "test.jsonl"

# name -> hub id, config, split
BENCHMARKS = {
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
    "amc23": ("math-ai/amc23", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
}

PROBLEM_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "solution", "reward_model.ground_truth")


@dataclass(frozen=True)
class Problem:
    problem: str
    answer: str

    @property
    def key(self) -> str:
        """A hash of the text up to white space: duplicates and the split go by it."""
        return hashlib.sha256(" ".join(self.problem.split()).encode()).hexdigest()


# === loading ===


def load_problems(
    source: str, problem_column: str | None = None, answer_column: str | None = None
) -> list[Problem]:
    """Every row of a source. Raises UserError if it is not there or lacks the columns."""
    rows = _read_rows(source)
    check(len(rows) > 0, f"dataset {source} is empty")
    problem_column = problem_column or _find_column(
        source, rows[0], PROBLEM_COLUMNS, "--problem_column"
    )
    answer_column = answer_column or _find_column(
        source, rows[0], ANSWER_COLUMNS, "--answer_column"
    )
    problems = []
    for number, row in enumerate(rows, 1):
        problem, answer = _get(row, problem_column), _get(row, answer_column)
        if isinstance(problem, list):  # chat messages
            problem = next((m["content"] for m in reversed(problem) if m["role"] == "user"), None)
        where = f"dataset {source}, row {number}"
        check(
            isinstance(problem, str) and problem.strip() != "",
            f"{where}: no text in column {problem_column}",
        )
        check(
            answer is not None and str(answer).strip() != "",
            f"{where}: no answer in column {answer_column}",
        )
        problems.append(Problem(problem.strip(), _final_answer(str(answer))))
    with Verifier() as verifier:
        golds = [problem.answer for problem in problems] if rank() == 0 else []
        unreadable = verifier.unreadable(golds)
    if unreadable:
        print(
            f"dataset {source}: {len(unreadable)} gold answers cannot be read, the first is "
            f"{unreadable[0]!r}: only an equal string will be right"
        )
    return problems


def _read_rows(source: str) -> list[dict]:
    if source == "toy":
        return read_jsonl(TOY_TRAIN)
    if source.endswith(".jsonl"):
        return read_jsonl(Path(source))
    if source.endswith(".parquet"):
        import pyarrow.parquet

        check(Path(source).is_file(), f"dataset file {source} does not exist")
        try:
            return pyarrow.parquet.read_table(source).to_pylist()
        except pyarrow.ArrowException as error:
            raise UserError(f"{source} is no parquet file: {one_line(error)}") from error
    hub_id, config, split = BENCHMARKS.get(
        source, (source.partition(":")[0], source.partition(":")[2] or None, "train")
    )
    check(
        hub_id.count("/") == 1,
        f"unknown dataset {source}: give toy, {', '.join(BENCHMARKS)}, a hub id (owner/name), "
        "or a .jsonl or .parquet file",
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


def _find_column(source: str, row: dict, names: Sequence[str], flag: str) -> str:
    for name in names:
        if _get(row, name) is not None:
            return name
    raise UserError(
        f"dataset {source} has no column {' or '.join(names)}, only {', '.join(row)}; rename one "
        f"(or, for a trainer's --dataset, set {flag})"
    )


def _final_answer(answer: str) -> str:
    """The bare answer: after GSM8K's ####, or out of a worked solution's box."""
    answer = answer.rpartition("####")[2].strip()
    return extract_answer(answer) or answer


def load_training_problems(
    source: str,
    split: str,
    decontaminate: Iterable[str],
    problem_column: str | None = None,
    answer_column: str | None = None,
) -> list[Problem]:
    """A source without duplicates, conflicts and evaluation problems; prints a count of each.

    split: `1H` and `2H` are two halves by a hash of the problem's text: they do not move when the
    file's order or the evaluation sets change.
    """
    rows = load_problems(source, problem_column, answer_column)
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(row.key, set()).add(row.answer)
    held_out = {row.key for name in decontaminate for row in load_evaluation_problems(name)}
    unique = {row.key: row for row in rows}
    agreed = {key: row for key, row in unique.items() if len(answers[key]) == 1}
    clean = {key: row for key, row in agreed.items() if key not in held_out}
    check(
        len(clean) > 0,
        f"no problem of {source} is left: the others are duplicates with conflicting answers or "
        f"stand in the evaluation sets ({', '.join(decontaminate)})",
    )
    half = {"1H": 0, "2H": 1}
    kept = [row for key, row in clean.items() if split == "all" or int(key, 16) % 2 == half[split]]
    check(len(kept) > 0, f"no problem of {source} falls into --split {split}")
    print(
        f"dataset {source}: {len(rows)} rows, {len(rows) - len(unique)} duplicates merged, "
        f"{len(unique) - len(agreed)} with conflicting answers and {len(agreed) - len(clean)} of "
        f"the evaluation sets dropped; split {split}: {len(kept)} problems"
    )
    return kept


def default_decontamination(source: str) -> tuple[str, ...]:
    """A dataset of the hub may overlap any benchmark; a local file is its owner's business."""
    local = source == "toy" or source.endswith((".jsonl", ".parquet"))
    return () if local else tuple(BENCHMARKS)


def load_evaluation_problems(source: str) -> list[Problem]:
    """As load_problems; `toy` is the toy's held-out set."""
    return load_problems(str(TOY_TEST) if source == "toy" else source)


# === prompts ===


@dataclass(frozen=True)
class Prompt:
    problem: Problem
    ids: list[int]


def prompt_text(tokenizer, problem: str, thinking: bool = False) -> str:
    """The chat template over problem and instruction, ready for the assistant's turn."""
    messages = [{"role": "user", "content": f"{problem}\n{INSTRUCTION}"}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, enable_thinking=thinking
    )


def render_prompts(tokenizer, problems: list[Problem], args) -> list[Prompt]:
    """Problems as token ids; those over --max_prompt_tokens are dropped and counted."""
    texts = [prompt_text(tokenizer, problem.problem, args.thinking) for problem in problems]
    # The template has written the special tokens: the tokenizer must not add them again.
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompts = [Prompt(problem, row) for problem, row in zip(problems, ids, strict=True)]
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


def training_prompts(tokenizer, args) -> list[Prompt]:
    """The prompts that a trainer's --dataset, --split and --decontaminate name."""
    held_out = args.decontaminate
    held_out = default_decontamination(args.dataset) if held_out is None else held_out
    held_out = dict.fromkeys((*held_out, args.eval_dataset))
    problems = load_training_problems(
        args.dataset, args.split, held_out, args.problem_column, args.answer_column
    )
    return render_prompts(tokenizer, problems, args)


def evaluation_prompts(tokenizer, args) -> list[Prompt]:
    """The prompts of a trainer's --eval_dataset."""
    return render_prompts(tokenizer, load_evaluation_problems(args.eval_dataset), args)


class Stream:
    """Shuffled items without end. What comes next depends on the cursor alone, so that a resumed
    run draws what the uninterrupted one would have drawn."""

    def __init__(self, items: list, seed: int):
        self.items, self.seed = items, seed

    def take(self, progress: Progress, count: int) -> list:
        """The next `count` items; moves progress.cursor past them."""
        taken = []
        for position in range(progress.cursor, progress.cursor + count):
            epoch, index = divmod(position, len(self.items))
            if index == 0 or not taken:
                order = random.Random(f"{self.seed}-{epoch}").sample(self.items, len(self.items))
            taken.append(order[index])
        progress.cursor += count
        return taken


def fingerprint(tokenizer, prompts: list[Prompt], rollouts: Sequence = ()) -> dict[str, object]:
    """What a resumed run must find unchanged beside its Args: the data, and how it is put."""
    rows = "".join(prompt.problem.key + prompt.problem.answer for prompt in prompts)
    rows += "".join(str(rollout.completion_ids) for rollout in rollouts)
    template = f"{tokenizer.chat_template}{INSTRUCTION}"
    return {
        "num_problems": len(prompts),
        "dataset_fingerprint": hashlib.sha256(rows.encode()).hexdigest()[:16],
        "template_fingerprint": hashlib.sha256(template.encode()).hexdigest()[:16],
    }
