r"""The comparison of an answer with the gold answer: math-verify calls them equal, and the answer
is finished.

math-verify is content with any expression of the gold answer's value: `8+4+7` is 19 to it. A policy
that is paid for that learns within 30 steps to copy the problem's expression into its box. So what
math-verify calls equal must also be *finished*, and that is judged by the tree that it has parsed,
not by the text: whatever units, words or dollar signs stand around it, the tree is what was
compared.

math-verify's own time-out uses signals, works only in a main thread and has been seen to hang; it
is switched off. What is called here may compute for ever: `9^{9^{9^9}}`.
"""

import logging
import re

from math_verify import parse, verify
from math_verify.grader import is_relation

from common.tasks.math.finished import PER_CENT, Tree, is_assignment, is_finished, sides_of

logging.disable()  # math-verify warns that its own time-outs are off

_MATHS = re.compile(r"\$|(?<!\\)\\\[|\\\(|\\boxed")
_PROSE = re.compile(_MATHS.pattern + r"|[A-Za-z]{2} [A-Za-z]{2}")
_PLAIN_MIXED = re.compile(r"(?<![\d.,/^_])(\d+)(?:\s|\\ )+(\d+)/(\d+)(?![\d.])")
_CAME_BEFORE = re.compile(r"(?:\\[A-Za-z]+\s*|[^\s=:(*])\Z")
_ROW_SPACE = re.compile(r"\\\\\s*\[[^\[\]]*\]")  # \\[4pt]
# \text{ square inches}, \angle ABC
_LATEX_WORDS = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+(?: [A-Z]+\b)?")
# Words behind a number that make it another one.
_CHANGES = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozen|plus|minus|less|squared|cubed|factorial)\b"
)
_BASE = re.compile(r"\d\s*_\s*\{?\s*(\d+)")
_GOES_ON = re.compile(r"[^\W\d]|[\\^!(]|\s*[*/^+=(]|\s*\\[A-Za-z]")
TINY = 1e-3  # math-verify rounds decimals to 6 places: to it, 0.0 is every number below 5e-7


def read(text: str) -> list[Tree | str]:
    """Return what math-verify reads: at most one tree, then the text that it is the tree of.

    Text is read as the LaTeX of an answer; if there is prose or markup around, as a text that has
    one.
    """
    text = _PLAIN_MIXED.sub(r"\1\\frac{\2}{\3}", _ROW_SPACE.sub(r"\\\\", text))
    boxed = text if is_prose(text) else rf"\boxed{{{text}}}"
    # Of the first match only: else the text may be of one match and the tree of another.
    values = parse(boxed, parsing_timeout=None, extraction_mode="first_match")
    return values if values and isinstance(values[-1], str) else []


def is_prose(text: str) -> bool:
    """Tell whether words or marks of mathematics stand around an answer; units in LaTeX do not
    count."""
    return bool(_PROSE.search(_LATEX_WORDS.sub(" ", text)))


def is_readable(gold: str) -> bool:
    """Tell whether more than an equal string can be right."""
    return any(not isinstance(value, str) for value in read(gold))


def is_answer(gold: str, answer: str) -> bool:
    """Tell whether `answer` has the value of `gold` and is finished. Not symmetric."""
    golds, answers = read(gold), read(answer)
    if not _equal(golds, answers):
        return False
    if isinstance(golds[0], str) or isinstance(answers[0], str):
        return True  # the texts were equal
    if _is_cut_short(answers[1], answer) or not _bases_agree(answer, gold):
        return False
    words = [set(_CHANGES.findall(text.lower())) for text in (answer, gold)]
    if len(answer) < 80 and not words[0] <= words[1]:
        return False  # `84 \text{ million}`
    wanted, wanted_text = golds
    if is_assignment(wanted) and not (
        is_relation(answers[0]) and sides_of(wanted)[0][0].free_symbols
    ):
        wanted, wanted_text = sides_of(*golds)[0]  # the 3 of `x = 3`, but all of `y = 2x+3`
    if is_relation(wanted):
        return is_finished(*answers, wanted, wanted_text)
    # math-verify takes the right side: of `1 = 8+4+7` the left one must not vouch for it.
    sides = [side for side in sides_of(*answers) if is_finished(*side, wanted, wanted_text)]
    return bool(sides) and _equal([wanted], [sides[0][0]])


def _equal(golds: list, answers: list) -> bool:
    if not verify(golds, answers, timeout_seconds=None):
        return False
    gold, answer = golds[0], answers[0]
    if not all(getattr(value, "is_number", False) for value in (gold, answer)):
        return True
    readings = [[n.doit().evalf(), n.subs(PER_CENT, 1).doit().evalf()] for n in (gold, answer)]
    pairs = [(a, b) for a in readings[0] for b in readings[1]]  # 9% is 9 to it, and 0.09
    return any(not a.is_finite or bool(abs(a - b) <= TINY * abs(a)) for a, b in pairs)


def _is_cut_short(text: str, answer: str) -> bool:
    r"""Tell whether prose goes on around math-verify's number: `the length is 12\sqrt{5}`."""
    before, found, behind = answer.rpartition(text)
    if not found or not is_prose(answer) or _MATHS.search(answer):
        return False
    return bool(_GOES_ON.match(behind) or _CAME_BEFORE.search(before))


def _bases_agree(answer: str, gold: str) -> bool:
    """math-verify ignores the base of `52_8`; an answer need not say it."""
    bases = [set(_BASE.findall(text)) for text in (answer, gold)]
    return bases[0] <= (bases[1] or {"10"})
