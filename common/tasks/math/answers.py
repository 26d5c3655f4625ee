r"""The answer of a completion, and comparisons of texts, plain numbers and words.

Every regular expression here takes linear time. The rest is for math-verify (equivalence.py).
"""

import re
from decimal import Decimal

MAX_ANSWER_CHARS = 2_000  # answers are short

_BRACES = re.compile(
    r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>[+-]?\d+(?:[.,]\d+)*|[A-Z](?![A-Za-z])))|\\.|[{}]",
    re.DOTALL,
)
_ANSWER_LINE = re.compile(r"(?i:answer)\s*:[ \t]*(\S.*)")
# What may stand between two boxes that are one answer: `\boxed{2} \text{ and } \boxed{3}`.
_BETWEEN_BOXES = re.compile(
    r"(?:[\s,;$.]|\\quad|\\qquad|\\[,;: \[\]()]|\\text\{\s*(?:and|or)\s*\}|and|or)*"
)
_PLAIN_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|[+-]?\.\d+")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,?\\!|\\,|[ \u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_CURRENCY = re.compile(r"\\\$|[€£¥¢]")
_WRAPPED = re.compile(r"(?:\\(?:textbf|mathbf|boldsymbol|bm|underline|mathrm))?\{([^{}\\]*)\}")
_THINGS = re.compile(r"([\d,.+-]+)\s+([A-Za-z]{2,}(?:[ /][A-Za-z]{1,20}){0,6}[²³]?)")
# What follows a number and is no unit of it.
_NUMBER_WORDS = re.compile(
    "and|or|plus|minus|times|over|squared|cubed|mod|choose|sqrt|factorial|pi|sin|cos|tan|log|ln|exp"
    "|percent|percentage|pct|hundred|thousand|million|billion|trillion|dozen|half|halves|cent|third"
    "|thirds|quarter|quarters"
)
_WORDS = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([A-Za-z\s.'-]+)\}"
    r"|([A-Za-z]{2,3}|[A-Za-z]{4}[A-Za-z .'-]*)"
)


def extract_answer(completion: str, marker: str | None = None) -> str | None:
    r"""The final answer of a completion: its last balanced `\boxed{...}` or `\fbox{...}`, else its
    last `Answer: ...` line. Boxes joined by no more than `and` or a comma are one answer.

    marker: what begins the answer's line, instead of `Answer:`.
    """
    boxes = _boxes(completion)
    if boxes:
        first = len(boxes) - 1
        while first > 0 and _BETWEEN_BOXES.fullmatch(
            completion, boxes[first - 1][1], boxes[first][0]
        ):
            first -= 1
        contents = [content.strip() for _, _, content in boxes[first:]]
        return ", ".join(filter(None, contents)) or None
    line = _ANSWER_LINE if marker is None else re.compile(re.escape(marker) + r"[ \t]*(\S.*)")
    lines = line.findall(completion)
    return (lines[-1].strip().strip("*").strip() or None) if lines else None


def _boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of each balanced box that stands in no other, in one pass. `\boxed 2`
    is one too."""
    boxes: list[tuple[int, int, str]] = []
    open_braces: list[re.Match] = []
    for match in _BRACES.finditer(text):
        if match["bare"]:
            boxes.append((match.start(), match.end(), match["bare"]))
        elif match.group() == "}":
            opened = open_braces.pop() if open_braces else None
            if opened is not None and opened.group() != "{":
                while boxes and boxes[-1][0] > opened.start():
                    boxes.pop()
                boxes.append((opened.start(), match.end(), text[opened.end() : match.start()]))
        elif match.group().endswith("{") and match.group() != r"\{":
            open_braces.append(match)
    return boxes


def bare_answer(text: str) -> str:
    """An answer without its full stop, currency, separators of thousands, bold face and braces."""
    text = text.strip()
    if text.endswith(".") and not text.endswith(r"\right."):
        text = text[:-1].rstrip()
    while wrapped := _WRAPPED.fullmatch(text):
        text = wrapped[1].strip()
    text = _CURRENCY.sub("", text).replace(r"\degree", r"^\circ").replace("°", r"^\circ")
    return _THOUSANDS.sub("", text).replace("~", " ").strip()


def compare_cheaply(answer: str, gold: str) -> bool | None:
    """Equality of equal strings, plain decimal numbers and words; None where it takes a parser."""
    if answer == gold:
        return True
    if max(len(answer), len(gold)) > MAX_ANSWER_CHARS:
        return False
    answer, gold = bare_answer(answer), bare_answer(gold)
    if answer == gold:
        return True
    numbers = _plain_number(answer), _plain_number(gold)
    if numbers[1] is not None and numbers[0] is None:
        numbers = _number_of_things(answer), numbers[1]
    if None not in numbers:
        return numbers[0] == numbers[1]
    words = _words(answer), _words(gold)
    # math-verify reads a word as the product of its letters, equal to every anagram of it.
    return words[0] == words[1] if None not in words else None


def _plain_number(text: str) -> Decimal | None:
    text = text.strip().strip("$").strip().rstrip(".")
    return Decimal(text.replace(",", "")) if _PLAIN_NUMBER.fullmatch(text) else None


def _number_of_things(text: str) -> Decimal | None:
    """12 of `12 eggs` or `12 km/h`, but not of `12 million`."""
    match = _THINGS.fullmatch(text)
    if match is None or any(map(_NUMBER_WORDS.fullmatch, re.findall(r"[a-z]+", match[2].lower()))):
        return None
    return _plain_number(match[1])


def _words(text: str) -> str | None:
    match = _WORDS.fullmatch(text.strip().strip("$").strip())
    return " ".join((match[1] or match[2]).lower().split()) if match else None


def is_plain(gold: str) -> bool:
    """Tell whether a gold answer is a number or words: no parser is needed to read it."""
    bare = bare_answer(gold)
    return _plain_number(bare) is not None or _words(bare) is not None
