r"""Mathematics: the answer in the last \boxed{...} of a completion, against a gold answer.

A task file like any other (docs/tasks.md). What strings, plain numbers or words can decide is
decided at once; the rest is for math-verify, whose import takes seconds.
"""

import re

from common.tasks.math.answers import bare_answer, compare_cheaply, extract_answer, is_plain
from common.tasks.worker import untimed

instruction = r"Please reason step by step, and put your final answer within \boxed{}."

# name -> a file beside this one, or hub id, config, split
datasets = {"toy": "../../../toy/train.jsonl"}
benchmarks = {
    "toy": "../../../toy/test.jsonl",
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
    "amc23": ("math-ai/amc23", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
}
columns = {
    "problem": ("problem", "question", "prompt"),
    "answer": ("answer", "solution", "reward_model.ground_truth"),
}

# `Express your answer as an integer.`, which copies of a problem have at their end or not.
_ANSWER_FORMAT = re.compile(
    r"\b(?:please )?(?:express|give|write|provide|enter|state) (?:your|the) (?:final )?answer\b"
    r"[^.?!]*[.?!]?\s*\Z",
    re.IGNORECASE,
)
# Digits, letters and operators; a hyphen between letters is none.
_SYMBOL = re.compile(r"\d+|[^\W\d_]|[+*/^=<>|!]|-(?![^\W\d_])|(?<![^\W\d_])-")


def prompt(row: dict) -> str:
    """A problem's text; of chat messages, what the user said last."""
    problem = row["problem"]
    if isinstance(problem, list):
        well_formed = all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in problem)
        if not well_formed:
            raise ValueError("a list of chat messages must have role and content in each")
        asked = [message["content"] for message in problem if message["role"] == "user"]
        problem = asked[-1] if asked else None
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError("no text")
    return problem.strip()


def gold(row: dict) -> str:
    """The bare answer: after GSM8K's ####, or out of a worked solution's box."""
    answer = "" if row["answer"] is None else str(row["answer"])
    answer = answer.rpartition("####")[2].strip()
    answer = extract_answer(answer) or answer
    if not answer:
        raise ValueError("no answer")
    return answer


def key(text: str) -> str:
    r"""A problem's lower-cased letters, its numbers and operators: `$x$` is `\(x\)`, but 2+3 is not
    2-3."""
    symbols = _SYMBOL.findall(_ANSWER_FORMAT.sub("", text).lower())
    spelled = "".join(f" {symbol}" if symbol.isdigit() else symbol for symbol in symbols)
    return spelled or text


def check(row: dict) -> str | None:
    """Return what is wrong with a gold answer that is no number, word or expression."""
    if is_plain(gold(row)) or equivalence().is_readable(bare_answer(gold(row))):
        return None
    return f"gold answer {gold(row)!r} cannot be read: only an equal string will be right"


def answer(completion: str) -> str | None:
    return extract_answer(completion)


def grade(completion: str, row: dict) -> bool:
    return is_right(answer(completion), gold(row))


def same(one: str, other: str) -> bool:
    """Both ways: to an undone sum as gold answer its value is right, not the other way round."""
    return is_right(one, other) and is_right(other, one)


def is_right(answer: str, gold: str) -> bool:
    """Tell whether an answer means what the gold answer does. Not symmetric."""
    cheaply = compare_cheaply(answer, gold)
    if cheaply is not None:
        return cheaply
    return equivalence().is_answer(bare_answer(gold), bare_answer(answer))


def equivalence():
    """The module, whose import and first call take longest: no item pays for them."""
    global _equivalence
    if _equivalence is None:
        with untimed():
            from common.tasks.math import equivalence as _equivalence

            _equivalence.is_answer(r"1+\sqrt{3}", r"\sqrt{3}+1")
    return _equivalence


_equivalence = None
