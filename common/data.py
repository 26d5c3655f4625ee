"""Problems and prompts: load, merge duplicates, decontaminate, split, render.

A source is `toy`, a benchmark's name, a hub id (`owner/name` or `owner/name:config`), or a local
.jsonl or .parquet file.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, check, one_line
from common.input_hashes import ROOT
from common.ranks import rank
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

NGRAM_WORDS = 13  # so many words in common with a benchmark's problem are no accident

# `Express your answer as an integer.`, which copies of a problem have at their end or not.
_ANSWER_FORMAT = re.compile(
    r"\b(?:please )?(?:express|give|write|provide|enter|state) (?:your|the) (?:final )?answer\b"
    r"[^.?!]*[.?!]?\s*\Z",
    re.IGNORECASE,
)
# Digits, letters and operators; a hyphen between letters is none.
_SYMBOL = re.compile(r"\d+|[^\W\d_]|[+*/^=<>|!]|-(?![^\W\d_])|(?<![^\W\d_])-")


@dataclass(frozen=True)
class Problem:
    problem: str
    answer: str

    @property
    def key(self) -> str:
        r"""A hash of the text's lower-cased letters, its numbers and operators. Duplicates,
        evaluation sets and the split go by it: `$x$` is `\(x\)`, but 2+3 is not 2-3."""
        symbols = _SYMBOL.findall(_ANSWER_FORMAT.sub("", self.problem).lower())
        spelled = "".join(f" {symbol}" if symbol.isdigit() else symbol for symbol in symbols)
        return hashlib.sha256((spelled or self.problem).encode()).hexdigest()

    @property
    def ngrams(self) -> set[tuple[str, ...]]:
        """Every NGRAM_WORDS words in a row, lower-cased."""
        words = re.findall(r"\w+", self.problem.lower())
        return {tuple(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1)}


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
        where = f"dataset {source}, row {number}"
        problem = _text_of(_get(row, problem_column), f"{where}, column {problem_column}")
        answer = _get(row, answer_column)
        answer = "" if answer is None else _final_answer(str(answer))
        check(answer != "", f"{where}: no answer in column {answer_column}")
        for name, text in ((problem_column, problem), (answer_column, answer)):
            check(is_unicode(text), f"{where}: half a surrogate pair in column {name}")
        problems.append(Problem(problem, answer))
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


def _text_of(problem: object, where: str) -> str:
    """A problem's text; of chat messages, what the user said last."""
    if isinstance(problem, list):
        well_formed = all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in problem)
        check(well_formed, f"{where}: a list of chat messages must have role and content in each")
        asked = [message["content"] for message in problem if message["role"] == "user"]
        problem = asked[-1] if asked else None
    check(isinstance(problem, str) and problem.strip() != "", f"{where}: no text")
    return problem.strip()


def is_unicode(text: str) -> bool:
    """Not with half a surrogate pair, which JSON can hold and UTF-8 and tokenizers cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


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
    """A source without duplicates, conflicts and what the evaluation sets hold too, as a whole or
    NGRAM_WORDS words of it; prints a count of each.

    split: `1H` and `2H` are two halves by a hash of the problem's text: they do not move when the
    file's order or the evaluation sets change.
    """
    rows = load_problems(source, problem_column, answer_column)
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(row.key, set()).add(row.answer)
    held_out = [row for name in decontaminate for row in load_evaluation_problems(name)]
    held_out_keys = {row.key for row in held_out}
    held_out_ngrams = {ngram for row in held_out for ngram in row.ngrams}
    unique = {row.key: row for row in rows}
    agreed = {key: row for key, row in unique.items() if len(answers[key]) == 1}
    other = {key: row for key, row in agreed.items() if key not in held_out_keys}
    clean = {k: row for k, row in other.items() if held_out_ngrams.isdisjoint(row.ngrams)}
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
        f"{len(unique) - len(agreed)} with conflicting answers, {len(agreed) - len(other)} of the "
        f"evaluation sets and {len(other) - len(clean)} with {NGRAM_WORDS} words in a row of one "
        f"dropped; split {split}: {len(kept)} problems"
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
    opens_thought: bool = False  # the template has written <think>: the completion begins inside

    @property
    def identity(self) -> str:
        return f"{self.ids}{self.problem.answer}"


def prompt_text(tokenizer, problem: str, thinking: bool = False) -> str:
    """The chat template over problem and instruction, ready for the assistant's turn."""
    messages = [{"role": "user", "content": f"{problem}\n{INSTRUCTION}"}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, enable_thinking=thinking
    )


def opens_thought(text: str) -> bool:
    """Whether a prompt ends inside <think>, as templates of reasoning models leave it."""
    turn = text.rpartition(INSTRUCTION)[2]
    return turn.rfind("<think>") > turn.rfind("</think>")


def render_prompts(tokenizer, problems: list[Problem], args) -> list[Prompt]:
    """Problems as token ids; those over --max_prompt_tokens are dropped and counted."""
    texts = [prompt_text(tokenizer, problem.problem, args.thinking) for problem in problems]
    has_switch = texts[0] != prompt_text(tokenizer, problems[0].problem, not args.thinking)
    if not has_switch and (args.thinking or opens_thought(texts[0])):
        how = "opens a thought in each prompt" if opens_thought(texts[0]) else "opens no thought"
        print(f"the chat template has no switch for thinking and {how}, whatever --thinking says")
    # The template has written the special tokens: the tokenizer must not add them again.
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompts = [
        Prompt(problem, row, opens_thought(text))
        for problem, row, text in zip(problems, ids, texts, strict=True)
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
    """The prompts of a trainer's --eval_dataset, if --eval_every is set."""
    if not args.eval_every:
        return []
    return render_prompts(tokenizer, load_evaluation_problems(args.eval_dataset), args)


def fingerprint(tokenizer, dataset: Sequence, args) -> dict[str, object]:
    """What a resumed run must find unchanged beside its Args: the data, prompts or given rollouts,
    and how it is put. A template may write today's date, so prompts count as their token ids."""
    return {
        "num_problems": len({item.problem for item in dataset}),
        "prompts_fingerprint": _hash_of("".join(f"{item.identity}\n" for item in dataset)),
        "template_fingerprint": template_fingerprint(tokenizer, args.thinking),
    }


def template_fingerprint(tokenizer, thinking: bool) -> str:
    """Of what template and instruction make of any problem."""
    text = prompt_text(tokenizer, "1+1", thinking)
    return _hash_of(str(tokenizer(text, add_special_tokens=False)["input_ids"]))


def _hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
