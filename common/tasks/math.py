r"""Mathematics: the answer in the last \boxed{...} of a completion, against a gold answer.

A task file like any other (docs/tasks.md).

1. The answer is the last `\boxed{...}`, else the last `Answer:` line.
2. Answer and gold get one spelling: of Unicode, markup, currency, thousands.
3. Equal texts, words and choices (`(E) 12`) are decided as they stand.
4. Where the gold is a number, or a list, interval or matrix of them, the answer must be one too,
   written out: math-verify calls `8+4+7` equal to 19, and a policy that is paid for that learns
   within 30 steps to copy the problem's sum into its box.
5. The rest is for math-verify. It cuts a text at the first unit, or takes one formula of it: every
   number and letter must be in what it has parsed.

Answers of over 2,000 characters are wrong; on those, no step before the last takes a second. It may
take for ever: `9^{9^{9^9}}`.
"""

import logging
import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple
from unicodedata import category, normalize

from common.tasks.worker import untimed

instruction = r"Please reason step by step, and put your final answer within \boxed{}."

# name -> a file beside this one, or hub id, config, split
datasets = {"toy": "../../toy/train.jsonl"}
benchmarks = {
    "toy": "../../toy/test.jsonl",
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
MAX_ANSWER_CHARS, MAX_DEPTH = 2_000, 8  # answers are short, and their brackets not deep

# === rows ===

# `Express your answer as an integer.`, which copies of a problem have or not; never `in base 8`.
_ANSWER_FORMAT = re.compile(
    r"\b(please )?(express|give|write|provide|enter|state) (your|the) (final )?answer (as an? "
    r"((single|common|reduced|mixed) )?(integer|fraction|decimal|number)|in (its )?(simplest|lowest"
    r"|reduced) (form|terms))[.?!]?\s*\Z",
    re.IGNORECASE,
)
_GROUP = re.compile(r"\{\s*(\\[a-z]+|\d+(?:\.\d+)?|[^\W\d_])\s*\}")  # x^{2} is x^2
_SYMBOL = re.compile(  # a hyphen between words is no minus, an apostrophe behind one no prime
    r"\\[a-z]+|\\\\|\d+(?:\.\d+)?|\.\d+|\.\.\.|[^\W\d_]|:(?=\s*\d)|(?<!_)_(?!_)"
    r"|'(?=\()|(?<![^\W\d_]{2})['-]|-(?![^\W\d_]{2})|[^\w\s\\.,:;?\"'“”。、「」《》-]"
)


def prompt(row: dict) -> str:
    """Return a problem's text; of chat messages, what the user said last."""
    if not isinstance(row, dict):
        raise ValueError('the row is a list; write {"problem": ..., "answer": ...}')
    problem = row["problem"]
    if isinstance(problem, list):
        if not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in problem):
            raise ValueError("a list of chat messages must have role and content in each")
        asked = [message["content"] for message in problem if message["role"] == "user"]
        problem = asked[-1] if asked else None
        if isinstance(problem, list) and any(isinstance(part, dict) for part in problem):
            raise ValueError('content is a list of parts; write {"role": ..., "content": "text"}')
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError("no text")
    return problem.strip()


def golds(row: dict) -> list[str]:
    """Return the right answers: bare, after GSM8K's ####, or out of a worked solution's box."""
    given = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    texts = []
    for one in given:
        text = str(one)
        if isinstance(one, float):  # str(0.00001) is 1e-05, and json reads NaN and Infinity
            text = format(Decimal(text), "f") if math.isfinite(one) else ""
        text = text.rpartition("####")[2].strip()
        texts.append(extract_answer(text) or text)
    none = ("", "none", "null", "nan", "proof", "notfound", "not found")
    if not texts or any(normal(text).lower() in none for text in texts):
        raise ValueError("no answer")
    return texts


def gold(row: dict) -> str:
    """Return the right answer; of several, all."""
    return " or ".join(golds(row))


def key(text: str) -> str:
    r"""Return a problem's lower-cased letters, numbers, brackets and signs: `$x$` is `\(x\)`, but
    2+3 is not 2-3."""
    if len(text) > 20_000:  # to respell it would take seconds
        return text
    spelled = _spelled(_ANSWER_FORMAT.sub("", text)).lower()
    symbols = _SYMBOL.findall(_GROUP.sub(r" \1 ", spelled))
    return "".join(f" {s}" if s[-1].isdigit() or s[0] == "\\" else s for s in symbols) or text


def check(row: dict) -> str | None:
    """Return what is wrong with a gold answer that is no number, word or expression."""
    for text in golds(row):
        bare = normal(text)
        known = _numbers(bare) or _WORDS.fullmatch(bare) or _choice(bare)[0]
        if not known and _parse(_without_unit(bare)[0]) is None:
            return f"gold answer {text!r} cannot be read: only an equal string will be right"
    return None


def answer(completion: str) -> str | None:
    return extract_answer(completion)


def grade(completion: str, row: dict) -> bool:
    return any(is_right(answer(completion) or "", text) for text in golds(row))


def same(one: str, other: str) -> bool:
    """Compare both ways: to an undone sum as gold its value is right, not the other way round."""
    return is_right(one, other) and is_right(other, one)


# === 1. the answer of a completion ===

_BRACES = re.compile(
    r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>[+-]?\d+(?:[.,]\d+)*|[A-Z](?![A-Za-z])))|\\.|[{}]",
    re.DOTALL,
)
_ANSWER_LINE = re.compile(r"(?i:answer)\s*:[ \t]*(\S.*)")
# What may stand between two boxes that are one answer: `\boxed{2} \text{ and } \boxed{3}`.
_BETWEEN_BOXES = re.compile(
    r"(?:[\s,;$.]|\\quad|\\qquad|\\[,;: \[\]()]|\\text\{\s*(?:and|or)\s*\}|and|or)*"
)


def extract_answer(completion: str, marker: str | None = None) -> str | None:
    r"""Return the final answer of a completion: its last balanced `\boxed{...}` or `\fbox{...}`,
    else its last `Answer: ...` line. Boxes joined by no more than `and` or a comma are one answer.

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
    r"""Return (start, end, content) of each balanced box that stands in no other, in one pass.
    `\boxed 2` is one too."""
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


# === 2. one spelling ===

_NAMES = """× times ÷ div ⋅ cdot · cdot ∙ cdot ≤ le ≥ ge ≠ ne ≈ approx ∞ infty ∪ cup ∩ cap ∈ in ± pm
∅ emptyset ° degree α alpha β beta γ gamma δ delta ε epsilon θ theta λ lambda μ mu π pi ρ rho
σ sigma τ tau φ phi ω omega Δ Delta Γ Gamma Ω Omega"""
_TEX = str.maketrans("−‐–⁄∕’′", "---//''")
_TEX |= {ord(c): rf"\{name} " for c, name in zip(*[iter(_NAMES.split())] * 2, strict=True)}
_SUPERSCRIPT = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹ⁿ]+")
_VULGAR = re.compile("[¼½¾⅐-⅞]")
_WRAPPER = (
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|sf|it)|emph|underline|boldsymbol|bm|mbox)"
)


def _rules(table: str) -> list[tuple[re.Pattern, str]]:
    r"""Read lines of `PATTERN => REPLACEMENT`; WORD is the end of a command, \040 a space."""
    table = table.replace("WORD", "(?![A-Za-z])")
    lines = (line.partition(" =>") for line in table.strip().split("\n"))
    return [(re.compile(pattern), replacement.strip()) for pattern, _, replacement in lines]


_SPELLING = _rules(r"""
√\s*(\d+(?:\.\d+)?|[A-Za-z]) => \\sqrt{\1}
√\s*\(([^()]*)\) => \\sqrt{\1}
\\\\\s*\[[^\[\]]*\] => \\\\
\\(?:left|right)\s*\. =>
\\(?:left|right|displaystyle|limits|rm|bf|it|large|Large|small)WORD =>
(?<!\\)\\[()\[\]]|\\?\$|[€£¥¢] =>
(?<=\d)(?:\s?\{,\s?\}|,?\\!\s*|\\,| )(?=\d{3}(?!\d)) =>
~|(?<!\\)\\(?:[,;:!>\s]|q?quad) => \040
\\[dtc]?frac\s*WORD => \\frac
<=|\\leq(?:slant)?WORD => \\le\040
>=|\\geq(?:slant)?WORD => \\ge\040
!=|\\neqWORD => \\ne\040
\\ltWORD => <
\\gtWORD => >
\\% => %
\\lbraceWORD => \\{
\\rbraceWORD => \\}
""")
_MARKUP = _rules(r"""
\^\s*\{?\s*\\circ\s*\}?|\\degreeWORD =>
(?<=\d)\s*\^?\{?(?:\\(?:text|mathrm)\s*\{)?\s*(?:th|st|nd|rd)WORD\}* =>
\s*(?:\\text\{\s*(?:and|or)\s*\}|(?<![A-Za-z])(?:and|or)WORD|;)[\s,]* => ,\040
\\mathbb\s*\{?R\}? => (-\\infty,\\infty)
\\frac\s*(\d|[a-z](?![a-z])) => \\frac{\1}
(\\frac\{(?:[^{}]|\{[^{}]*\})*\})\s*(\d|[a-z](?![a-z])) => \1{\2}
\\sqrt\s*(\d|[a-z](?![a-z])) => \\sqrt{\1}
(?<![\\A-Za-z])piWORD => \\pi\040
^\\pm\s*([^,]*)$ => \1, -\1
^\\\{\s*[a-z]\s*(?:\\mid|\||:)(.*)\\\}$ => \1
""")
_WHOLE = re.compile(rf"(?:{_WRAPPER}\s*)?(?<!\\)\{{(.*)\}}", re.DOTALL)
_RELATION = re.compile(r"(<|>|\\[lg]e(?![a-z]))")


def _spelled(text: str) -> str:
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{normalize('NFKC', match[0])}}}", text)
    text = _VULGAR.sub(lambda m: normalize("NFKC", rf"\frac{{{m[0]}}}").replace("⁄", "}{"), text)
    text = normalize("NFKC", text).translate(_TEX)
    text = "".join(char for char in text if category(char) != "Cf")  # zero-width spaces
    for pattern, replacement in _SPELLING:
        text = pattern.sub(replacement, text)
    return text


def normal(text: str) -> str:
    """Return an answer in one spelling, without markup, degrees or full stop; `x > 3` as an
    interval."""
    text = _spelled(text).strip("* \n").rstrip("\\ ").removesuffix(".").strip()
    for _ in range(MAX_DEPTH):
        whole = _WHOLE.fullmatch(text)
        if whole and _split(whole[1] + "}", "}")[0] == whole[1]:
            text = whole[1].strip().removesuffix(".")
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    exact = text.partition(r"\approx")[0].strip()
    return _as_interval(exact if re.search(r"\d|\\pi", _LABEL.sub("", exact)) else text.strip())


def _as_interval(text: str) -> str:
    if negated := re.fullmatch(r"-([A-Za-z])\s*(<|>|\\[lg]e)\s*(-?)([\d.]+)", text):
        text = f"{'' if negated[3] else '-'}{negated[4]} {negated[2]} {negated[1]}"
    parts = [part.strip() for part in _RELATION.split(text)]
    if parts[1:2] in ([">"], [r"\ge"]):
        parts = [{">": "<", r"\ge": r"\le"}.get(part, part) for part in reversed(parts)]
    if len(parts) == 3:
        x_first = re.fullmatch("[A-Za-z]", parts[0])
        parts = [r"-\infty", "<", *parts] if x_first else [*parts, "<", r"\infty"]
    if len(parts) != 5 or not re.fullmatch("[A-Za-z]", parts[2]):
        return text
    return f"{'(['[parts[1] != '<']}{parts[0]}, {parts[4]}{')]'[parts[3] != '<']}"


def _split(text: str, separator: str) -> list[str]:
    """Split a text at what stands in no brackets."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        if depth == 0 and text.startswith(separator, at):
            parts.append(text[start:at])
            start = at + len(separator)
        depth += (char in "([{") - (char in ")]}")
    return [*parts, text[start:]]


# === 3. words, choices, units ===

_WORDS = re.compile(r"[A-Za-z]{2,3}|[A-Za-z]{4}[A-Za-z .'-]*")
_TEXT = re.compile(rf"{_WRAPPER}\s*\{{([^{{}}\\]*)\}}")
_CHOICE = re.compile(
    rf"(?:{_WRAPPER}\s*\{{)?\s*\(([A-Z])\)\s*\}}?(.*)|([A-Z])(?:[.:)](?:\s.*)?)?", re.DOTALL
)
# What follows a number and makes it another one.
_NO_UNIT = re.compile(
    r"\b(?:and|or|if|plus|minus|less|times|over|squared|cubed|mod|choose|sqrt|factorial|pi|sin|cos|tan"
    "|log|ln|exp|[a-z]*illion|hundred|thousand|dozen|half|halves|thirds?|quarters?|one|two|three|four"
    r"|five|six|seven|eight|nine|ten|divided|by|to|power)\b"
)
_UNITS = """2 square sq|3 cubic|/ per|m meter metre|cm centimeter centimetre|mm|km kilometer
kilometre|mi mile|ft foot feet|in inch inche|yd yard|h hr hour|min minute|s sec second|g gram|mg|oz
|ml|mph|kg kilogram|lb pound|l liter litre|dollar|cent|am|pm|men|man|day|cup|box|of|unit"""
_UNITS = {name: names.split()[0] for names in _UNITS.split("|") for name in names.split()}
_UNIT = re.compile(r"(?:[A-Za-z\s/]|\^\s*\{?-?\d\}?)*")


def _choice(text: str) -> tuple[str | None, str]:
    """Return the letter of `E`, `(E)` or `(E) 12`, and what stands behind it."""
    found = _CHOICE.fullmatch(text)
    return (found[1] or found[3], (found[2] or "").strip()) if found else (None, "")


def _unit(tail: str) -> str | None:
    """Return the unit that a number's tail is; None for any other: `x`, `million`, `+4`."""
    if re.fullmatch(r"\s*|_\{?\d+\}?", tail):
        return tail.strip("_{} ")  # the base of 52_8
    text = _TEXT.sub(r" \1 ", tail).replace(r"\cdot", " ").replace(".", "")
    words = re.findall("[a-z]+", text.lower())
    if not words or not _UNIT.fullmatch(text) or _NO_UNIT.search(text.lower()):
        return None
    bare = re.sub(r"\bm(?=\^)", "meter", _TEXT.sub(" ", tail))
    for found in re.finditer(r"(/\s*)?([A-Za-z]+)", bare):
        known = found[2].lower().removesuffix("s") in _UNITS and (found[1] or len(found[2]) > 1)
        if not known and (found[1] or len(found[2]) < 4 or found.start() == 0):
            return None
    words = [_UNITS.get(word.removesuffix("s"), word.removesuffix("s")) for word in words]
    return " ".join(sorted([*words, *re.findall(r"/|-?\d", text)]))


# === 4. numbers ===


class Number(NamedTuple):
    value: Fraction | float
    is_fraction: bool
    is_percent: bool
    unit: str


_EQUALS = re.compile(r"=|\\approx|\\in(?![a-z])|(?<=[a-z]{2}):|\b(?:is|are)\b:?")
_LABEL = re.compile(r"_(?:\w|\{[^{}]*\})|\([^()]*\)")
_VARIABLE = re.compile(r"(?<![\\A-Za-z])(?![ei](?![A-Za-z]))[A-Za-z]")
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*(?:10\s*\^\s*\{?(?P<ten>[+-]?\d{1,3})(?!\d)\}?"
    r"|(?:(?P<whole>\d+)\s*)?\\frac\{(?P<minus>-?)(?P<over>\d+)\}\{(?P<under>\d+)\}"
    r"|(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:\\overline\{(?P<again>\d+)\})?"
    r"(?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{?(?P<power>[+-]?\d{1,3})(?!\d)\}?"
    r"|[eE](?P<e>[+-]?\d{1,3})(?!\d))?"
    r"|(?P<infinity>\\infty))(?P<percent>\s*(?:%|percent(?:age)?|per cent|pct))?"
)
_SLASH = re.compile(r"(?<![\d.,/^_}])(\d+)\.?\s*/\s*(\d+)(?![\d.^])")
_MATRIX = re.compile(r"\\begin\{([pb]?matrix|array)\}(?:\{[clr|]*\})?(.*?)\\end\{\1\}", re.DOTALL)


def _number(text: str) -> Number | None:
    """Return a number with its unit; None where anything is left to work out."""
    text = _SLASH.sub(r"\\frac{\1}{\2}", text)
    found = _NUMBER.match(text)
    unit = _unit(text[found.end() :]) if found else None
    if unit is None:
        return None
    if found["over"]:
        over, under, whole = (int(found[name] or 0) for name in ("over", "under", "whole"))
        if under == 0 or (whole and over >= under):
            return None  # `8 \frac{22}{2}`
        value = whole + Fraction(-over if found["minus"] else over, under)
    else:
        digits, again = (found["digits"] or "1").replace(",", "").rstrip("."), found["again"]
        value = Fraction(digits)
        if again:
            value += Fraction(
                int(again), (10 ** len(again) - 1) * 10 ** len(digits.partition(".")[2])
            )
        value *= Fraction(10) ** int(found["ten"] or found["power"] or found["e"] or 0)
    value = math.inf if found["infinity"] else value
    value = -value if found["sign"] == "-" else value
    return Number(value, bool(found["over"]), bool(found["percent"]), unit)


def _numbers(text: str, depth: int = 0) -> Number | tuple | None:
    """Return a number, or (brackets, members) of a list, interval or matrix of numbers, at any
    depth; None where a member is anything else."""
    text = _MATRIX.sub(_as_lists, text.strip())
    if one := _number(text):
        return one
    if depth == MAX_DEPTH:
        return None
    if (right := _right_side(text, arithmetic=True)) != text:
        return _numbers(right, depth + 1)
    for separator in (r"\cup", ","):
        if len(parts := _split(text, separator)) > 1:
            members = [_numbers(part, depth + 1) for part in parts]
            return None if None in members else (separator, members)
    brackets = re.fullmatch(r"(\\\{|[(\[])(.*?)(\\\}|[)\]])", text, re.DOTALL)
    inner = _numbers(brackets[2], depth + 1) if brackets else None
    if isinstance(inner, Number) and "[[" in text:
        return "[]", [inner]  # a column of a matrix
    if isinstance(inner, tuple) and inner[0] == "," and brackets[1] != r"\{":
        return brackets[1] + brackets[3], inner[1]
    return inner


def _as_lists(matrix: re.Match) -> str:
    rows = matrix[2].strip().removesuffix(r"\\").replace("&", ",").replace(r"\\", "],[")
    return f"[[{rows}]]"


def _right_side(text: str, arithmetic: bool = False) -> str:
    r"""Return what stands behind `x =`, `f(3) =`, `\angle ABC =`, `the answer is`, and if asked
    behind `8 + 4 =`; else the text: `x + y = 5` says nothing of x."""
    *_, last = [None, *_EQUALS.finditer(text)]
    for head in _LABEL.sub("(", text[: last.start()]).split("=") if last else [text]:
        named = re.search("[A-Za-z(]", head) and not re.search(r"[-+*/^<>,\d]", head)
        worked = arithmetic and last and last[0] == "=" and not re.search(",", head)
        if head.strip() and not named and (not worked or _VARIABLE.search(head)):
            return text
    return text[last.end() :].strip() if last else text


def _agree(answer: Number | tuple, gold: Number | tuple) -> bool:
    if isinstance(gold, Number) and isinstance(answer, Number):
        if answer.unit not in ("", gold.unit) and (gold.unit or answer.unit.isdigit()):
            return False
        if answer.is_fraction and not gold.is_fraction and answer.value.denominator == 1:
            return False  # 12/4 for 3
        if answer.is_percent != gold.is_percent:
            both = [{n.value, n.value / 100 if n.is_percent else n.value} for n in (answer, gold)]
            return bool(both[0] & both[1])
        infinite = math.inf in (abs(answer.value), abs(gold.value))
        if infinite or gold.value.denominator == 1:
            return answer.value == gold.value
        return abs(answer.value - gold.value) <= min(1, abs(gold.value)) / 10**6  # 0.3333333
    if isinstance(gold, Number):
        gold = (",", [gold])  # `\boxed{6} ... \boxed{6}`
    if isinstance(answer, Number) or answer[0] != gold[0]:
        return False
    if gold[0] not in (",", r"\cup"):
        return len(answer[1]) == len(gold[1]) and all(map(_agree, answer[1], gold[1]))
    pairs = [[_agree(member, wanted) for wanted in gold[1]] for member in answer[1]]
    return all(map(any, pairs)) and all(map(any, zip(*pairs, strict=True)))


# === 5. the verdict ===

_NUMERAL = re.compile(r"\d+\.?\d*|\.\d+")
_COMMAND = re.compile(r"\\(?:begin|end)\{\w+\}|\\[A-Za-z]+|\b(?:sin|cos|tan|log|ln|exp|sqrt)\b")
_ARITHMETIC = {r"\frac", r"\sqrt", r"\pi", r"\cdot", r"\times", r"\infty", r"\cup", r"\pm"}


def is_right(answer: str, gold: str) -> bool:
    """Tell whether an answer means what the gold answer does. Not symmetric."""
    if answer == gold or max(len(answer), len(gold)) > MAX_ANSWER_CHARS:
        return answer == gold
    answer, gold = normal(answer), normal(gold)
    if _squeezed(answer) == _squeezed(gold):
        return True
    letter, behind = _choice(gold)
    if letter:
        return _choice(answer)[0] == letter or (behind != "" and is_right(answer, behind))
    if wanted := _numbers(gold):
        given = _numbers(answer)
        return given is not None and _agree(given, wanted)
    if _WORDS.fullmatch(gold) and (_WORDS.fullmatch(answer) or len(gold) > 3):
        return False  # to math-verify a word is the product of its letters
    (answer, unit), (gold, gold_unit) = _without_unit(answer), _without_unit(gold)
    if ("=" in answer) != ("=" in gold):
        answer, gold = (", ".join(map(_right_side, _split(t, ","))) for t in (answer, gold))
    comparable = ("=" in answer) == ("=" in gold) and (not unit or unit == (gold_unit or unit))
    return comparable and _is_finished(answer, gold) and _are_equal(answer, gold)


def _squeezed(text: str) -> str:
    r"""Return a text without \text{} and the spaces that part no digits."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", _TEXT.sub(r"\1", text)).lower()


def _without_unit(text: str) -> tuple[str, str]:
    for found in re.finditer(rf"(?<=[\w\s}})])\s*{_WRAPPER}\s*\{{", text):
        if (unit := _unit(text[found.start() :])) is not None:
            return text[: found.start()], unit
    return text, ""


def _is_finished(answer: str, gold: str) -> bool:
    r"""Tell whether an answer for a number such as `5\sqrt{3}` has no more sums than it, no
    larger numerals, at most one more of them, and no other functions. Of a gold answer with
    variables any expression will do."""
    if _VARIABLE.search(_COMMAND.sub(" ", gold)):
        return True
    found, wanted = ([float(n) for n in _NUMERAL.findall(text)] for text in (answer, gold))
    longer = len(found) > len(wanted) + 1 or max([*found, 0]) > max([*wanted, 1])
    sums = [len(re.findall(r"[\w})]\s*[+-]", text)) for text in (answer, gold)]
    others = set(_COMMAND.findall(answer)) - set(_COMMAND.findall(gold)) - _ARITHMETIC
    return not (others or "!" in answer or longer or sums[0] > sums[1])


def _are_equal(answer: str, gold: str) -> bool:
    wanted, given = _parse(gold), _parse(answer)
    if wanted is None or given is None:
        return False
    if not _math_verify().verify([wanted], [given], timeout_seconds=None):
        return False
    if not all(getattr(tree, "is_number", False) for tree in (wanted, given)):
        return True
    # It rounds to 6 places: to it, 0.0 is every number below 5e-7.
    return bool(abs(wanted.evalf() - given.evalf()) <= 1e-5 * abs(wanted.evalf()))


def _parse(text: str):
    """Return what math-verify parses; None if a number or letter of the text is not in it."""
    library, escaped = _math_verify(), text.replace("%", r"\%")
    trees = library.parse(
        rf"\boxed{{{escaped}}}",
        [library.LatexExtractionConfig(normalization_config=library.spelling)],
        parsing_timeout=None,  # it uses signals, and has been seen to hang
        extraction_mode="first_match",
        fallback_mode="no_fallback",
    )
    if not trees:
        return None
    atoms = trees[0].atoms() | trees[0].atoms(library.Function)
    letters = "".join(str(atom.func if atom.args else atom) for atom in atoms).lower()
    numbers = {0.0, 1.0, *map(float, _NUMERAL.findall(str(trees[0])))}
    bare = _COMMAND.sub(" ", text)
    seen = set(re.findall("[a-z]", bare.lower())) <= set(letters)
    return trees[0] if seen and numbers.issuperset(map(float, _NUMERAL.findall(bare))) else None


def _math_verify():
    """Return the module, whose import and first call take longest: no item pays for them."""
    global _module
    if _module is None:
        with untimed():
            import math_verify as _module
            from latex2sympy2_extended import NormalizationConfig
            from sympy import Function

            logging.disable()  # it warns that its own time-outs are off
            _module.Function = Function
            _module.spelling = NormalizationConfig(malformed_operators=True, nits=True)  # no units
            _are_equal(r"1+\sqrt{3}", r"\sqrt{3}+1")
    return _module


_module = None
