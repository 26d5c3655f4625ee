r"""Mathematics: the answer in the last \boxed{...} of a completion, against a gold answer.

A task file like any other (docs/tasks.md). The verdict takes five steps:

1. The answer is the last `\boxed{...}`, else the last `Answer:` line.
2. Answer and gold are normalised alike: Unicode, markup, currency, thousands.
3. Equal texts and words are decided as they stand.
4. Where the gold is a number, or a list, tuple, interval or matrix of numbers, the answer must be
   one too, written as a number: math-verify calls `8+4+7` equal to 19, and a policy that is paid
   for that learns within 30 steps to copy the problem's sum into its box.
5. The rest is for math-verify, if it has parsed every number and letter of both texts: it cuts a
   text at the first unit, or takes the first formula.

Every regular expression here takes linear time. What math-verify computes may take for ever:
`9^{9^{9^9}}`.
"""

import ast
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
MAX_ANSWER_CHARS = 2_000  # answers are short

# === rows ===

# `Express your answer as an integer.`, which copies of a problem have at their end or not.
_ANSWER_FORMAT = re.compile(
    r"\b(?:please )?(?:express|give|write|provide|enter|state) (?:your|the) (?:final )?answer\b"
    r"[^.?!]*[.?!]?\s*\Z",
    re.IGNORECASE,
)
# A hyphen between letters is no minus.
_SYMBOL = re.compile(
    r"\\[a-z]+|\d+(?:\.\d+)?|\.\d+|[^\W\d_]|[+*/^=<>|!%()\[\]]|:(?=\s*\d)|'(?=\()"
    r"|-(?![^\W\d_])|(?<![^\W\d_])-"
)


def prompt(row: dict) -> str:
    """Return a problem's text; of chat messages, what the user said last."""
    if not isinstance(row, dict):
        raise ValueError('the row is a list; write {"problem": ..., "answer": ...}')
    problem = row["problem"]
    if isinstance(problem, list):
        well_formed = all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in problem)
        if not well_formed:
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
    given = row["answer"]
    if isinstance(given, str) and given.lstrip().startswith(("['", '["')):
        try:
            given = ast.literal_eval(given.strip())  # a list that was saved as its text
        except (ValueError, SyntaxError):
            pass
    found = []
    for one in given if isinstance(given, list) and given else [given]:
        if isinstance(one, float) and not math.isfinite(one):
            raise ValueError(f"the answer {one} is no number")
        text = format(Decimal(repr(one)), "f") if isinstance(one, float) else str(one)
        text = text.rpartition("####")[2].strip()
        text = extract_answer(text) or text
        if normal(text).lower() in ("", "none", "null", "nan", "proof", "notfound", "not found"):
            raise ValueError("no answer")
        found.append(text)
    return found


def gold(row: dict) -> str:
    """Return the right answer; of several, all."""
    return " or ".join(golds(row))


def key(text: str) -> str:
    r"""Return a problem's lower-cased letters, numbers and signs: `$x$` is `\(x\)`, but 2+3 is not
    2-3."""
    symbols = _SYMBOL.findall(spelled(_ANSWER_FORMAT.sub("", text)).lower())
    return "".join(f" {s}" if s[-1].isdigit() or s[0] == "\\" else s for s in symbols) or text


def check(row: dict) -> str | None:
    """Return what is wrong with a gold answer that is no number, word or expression."""
    for text in golds(row):
        bare = normal(text)
        known = _numbers(bare) or _WORDS.fullmatch(bare) or _choice(bare)[0]
        if not known and _read(_without_unit(bare)[0]) is None:
            return f"gold answer {text!r} cannot be read: only an equal string will be right"
    return None


def answer(completion: str) -> str | None:
    return extract_answer(completion)


def grade(completion: str, row: dict) -> bool:
    return any(is_right(answer(completion), text) for text in golds(row))


def same(one: str, other: str) -> bool:
    """Both ways: to an undone sum as gold answer its value is right, not the other way round."""
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

_TEX_OF = {"−": "-", "‐": "-", "–": "-", "⁄": "/", "∕": "/", "’": "'", "′": "'"} | {
    sign: rf"\{name} "
    for sign, name in zip(
        "×÷⋅·∙≤≥≠≈∞∪∩∈±∅°αβγδεθλμπρστφωΔΓΩ",
        "times div cdot cdot cdot le ge ne approx infty cup cap in pm emptyset degree alpha beta "
        "gamma delta epsilon theta lambda mu pi rho sigma tau phi omega Delta Gamma Omega".split(),
        strict=True,
    )
}
_TEX_OF = str.maketrans(_TEX_OF)
_SUPERSCRIPT = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹ⁿ]+")
_VULGAR = re.compile("[¼½¾⅐-⅞]")
_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"√\s*(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\\\\s*\[[^\[\]]*\]", r"\\\\ "),  # \\[4pt]
        (r"\\(?:left|right)\s*\.", ""),
        (r"\\(?:left|right|displaystyle|limits|rm|bf|it|large|Large|small)(?![A-Za-z])", ""),
        (r"(?<!\\)\\[()\[\]]|\\?\$|[€£¥¢]", ""),
        (r"(?<=\d)(?:\s?\{,\s?\}|,?\\!\s*|\\,|[ \u00a0\u2009\u202f])(?=\d{3}(?!\d))", ""),
        (r"~|(?<!\\)\\(?:[,;:!> \n]|q?quad(?![A-Za-z]))", " "),
        (r"\\[dtc]?frac\s*(?![A-Za-z])", r"\\frac"),
        (r"<=|\\leq(?:slant)?(?![A-Za-z])", r"\\le "),
        (r">=|\\geq(?:slant)?(?![A-Za-z])", r"\\ge "),
        (r"!=|\\neq(?![A-Za-z])", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\%", "%"),
        (r"\\[lr]brace(?![A-Za-z])", lambda match: rf"\{'{}'[match[0][1] == 'r']}"),
    )
]


def spelled(text: str) -> str:
    """Return a text with its Unicode as TeX, and one of several spellings of TeX."""
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{normalize('NFKC', match[0])}}}", text)
    text = _VULGAR.sub(
        lambda m: r"\frac{{{}}}{{{}}}".format(*normalize("NFKC", m[0]).split("⁄")), text
    )
    text = normalize("NFKC", text).translate(_TEX_OF)
    text = "".join(char for char in text if category(char) != "Cf")  # zero-width spaces
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return text


_WRAPPER = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|sf|it)|emph|underline|boldsymbol|bm|mbox)"
_WHOLE = re.compile(rf"(?:{_WRAPPER}\s*)?(?<!\\)\{{(.*)\}}", re.DOTALL)
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])", ""),
        (r"(?<=\d)\s*\^?\{?(?:\\(?:text|mathrm)\s*\{)?\s*(?:th|st|nd|rd)(?![A-Za-z])\}*", ""),
        (r"\s*(?:\\text\{\s*(?:and|or)\s*\}|(?<![A-Za-z])(?:and|or)(?![A-Za-z])|;)[\s,]*", ", "),
        (r"\\mathbb\s*\{?R\}?", r"(-\\infty,\\infty)"),
        (r"\\frac\s*(\d|[a-z](?![a-z]))", r"\\frac{\1}"),
        (r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\})\s*(\d|[a-z](?![a-z]))", r"\1{\2}"),
        (r"\\sqrt\s*(\d|[a-z](?![a-z]))", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"^\\pm\s*([^,]*)$", r"\1, -\1"),
        (r"^\\\{\s*[a-z]\s*(?:\\mid|\||:)(.*)\\\}$", r"\1"),
    )
]
_RELATION = re.compile(r"(<|>|\\[lg]e(?![a-z]))")


def normal(text: str) -> str:
    """Return an answer in one spelling, without markup, degrees, a full stop; `x > 3` as an
    interval."""
    text = spelled(text).strip("* \n").rstrip("\\ ").removesuffix(".").strip()
    while (whole := _WHOLE.fullmatch(text)) and _split(whole[1] + "}", "}")[0] == whole[1]:
        text = whole[1].strip().removesuffix(".")
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    exact = text.partition(r"\approx")[0].strip()
    if re.search(r"\d|\\pi", _LABEL.sub("", exact)):
        text = exact
    return _as_interval(text.strip())


def _as_interval(text: str) -> str:
    parts = [part.strip() for part in _RELATION.split(text)]
    if parts[1:2] in ([">"], [r"\ge"]):
        parts = [{">": "<", r"\ge": r"\le"}.get(part, part) for part in reversed(parts)]
    if len(parts) == 3:
        from_left = len(parts[0]) == 1 and parts[0].isalpha()
        parts = [r"-\infty", "<", *parts] if from_left else [*parts, "<", r"\infty"]
    if len(parts) != 5 or not (len(parts[2]) == 1 and parts[2].isalpha()):
        return text
    low, opens, _, closes, high = parts
    return f"{'([' [opens != '<']}{low}, {high}{')]'[closes != '<']}"


def _split(text: str, separator: str) -> list[str]:
    """Split a text at what stands in no brackets."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        if depth == 0 and text.startswith(separator, at):
            parts.append(text[start:at])
            start = at + len(separator)
        depth += (char in "([{") - (char in ")]}")
    return [*parts, text[start:]]


# === 3. words and units ===

_WORDS = re.compile(r"[A-Za-z]{2,3}|[A-Za-z]{4}[A-Za-z .'-]*")
_TEXT = re.compile(rf"{_WRAPPER}\s*\{{([^{{}}\\]*)\}}")
# What follows a number and is no unit of it.
_NUMBER_WORDS = set(
    "and or if plus minus less times over squared cubed mod choose sqrt factorial pi sin cos tan "
    "log ln exp hundred thousand million billion trillion dozen half halves third thirds quarter "
    "quarters one two three four five six seven eight nine ten divided by to power".split()
)
_UNITS = dict(
    pair.split(":")
    for pair in "meter:m metre:m centimeter:cm centimetre:cm kilometer:km kilometre:km mile:mi "
    "foot:ft feet:ft inch:in inche:in yard:yd hour:h hr:h minute:min second:s sec:s gram:g "
    "kilogram:kg pound:lb liter:l litre:l dollar:usd cent:cent".split()
)
_SHORT_UNITS = set(
    "cm mm km mi ft in yd hr min sec kg mg lb oz ml am pm mph men man day cup box car boy of per "
    "sq unit usd".split()
)
_UNIT = re.compile(r"(?:[A-Za-z]|[\s/.]|\\cdot|\^\s*\{?-?\d\}?)*")


def _unit(tail: str) -> str | None:
    """Return the unit that follows a number, None for anything else: `x`, `million`, `+4`."""
    if not tail.strip():
        return ""
    if re.fullmatch(r"_\{?\d+\}?", tail):
        return tail.strip("_{}")  # the base of 52_8
    bare, text = _TEXT.sub(" ", tail), _TEXT.sub(r" \1 ", tail).replace(".", "")
    words = re.findall(r"[A-Za-z]+", text.replace(r"\cdot", " ").lower())
    if not words or not _UNIT.fullmatch(text) or _NUMBER_WORDS.intersection(words):
        return None
    for found in re.finditer(r"(/\s*)?([A-Za-z]+)", bare.replace(r"\cdot", " ")):
        word, attached = found[2].lower(), found.start() == 0
        known = word in _SHORT_UNITS or word.removesuffix("s") in _UNITS
        if not (known or found[1] or (len(word) > 3 and not attached)):
            return None
    units = [_UNITS.get(word.removesuffix("s"), word.removesuffix("s")) for word in words]
    power = {"square": "2", "sq": "2", "cubic": "3"}
    signs = [*re.findall(r"/|-?\d", text), *(power[u] for u in units if u in power)]
    return " ".join([*(u for u in units if u not in (*power, "per")), *signs])


def _choice(text: str) -> tuple[str | None, str]:
    """Return the letter of a multiple choice, `E` or `(E) 12`, and what stands behind it."""
    found = re.fullmatch(
        rf"(?:{_WRAPPER}\s*\{{)?\s*\(([A-Z])\)\s*\}}?(.*)|([A-Z])(?:[.:)]\s.*)?", text, re.DOTALL
    )
    return (found[1] or found[3], (found[2] or "").strip()) if found else (None, "")


# === 4. numbers ===


class Number(NamedTuple):
    value: Fraction | float
    is_fraction: bool = False
    is_percent: bool = False
    unit: str = ""


_EQUALS = re.compile(r"=|\\approx|\\in(?![a-z])|(?<=[a-z]{2}):|\b(?:is|are)\b:?")
_LABEL = re.compile(r"_(?:\w|\{[^{}]*\})|\([^()]*\)")
_VARIABLE = re.compile(r"(?<![\\A-Za-z])(?!\\)(?![ei](?![A-Za-z]))[A-Za-z]")


def _right_side(text: str, arithmetic: bool = False) -> str:
    r"""Return what stands behind `x =`, `f(3) =`, `\angle ABC =`, `the answer is`, and if asked
    behind `8 + 4 =`; else the text: `x + y = 5` says nothing of x."""
    *_, last = [None, *_EQUALS.finditer(text)]
    if last is None:
        return text
    for head in text[: last.start()].split("="):
        head = _LABEL.sub("(", head)
        named = not re.search(r"[-+*/^<>,\d]", head) and (arithmetic or re.search("[A-Za-z(]", head))
        if head.strip() and not named:
            if not arithmetic or last[0] != "=" or "," in head or _VARIABLE.search(head):
                return text
    return text[last.end() :].strip()


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


def _as_lists(matrix: re.Match) -> str:
    rows = matrix[2].strip().removesuffix(r"\\").replace("&", ",").replace(r"\\", "],[")
    return f"[[{rows}]]"


def _number(text: str) -> Number | None:
    """Return a number with its unit; None where anything is left to work out."""
    text = _SLASH.sub(r"\\frac{\1}{\2}", text.strip())
    found = _NUMBER.match(text)
    unit = _unit(text[found.end() :]) if found else None
    if unit is None:
        return None
    if found["infinity"]:
        value = math.inf
    elif found["over"]:
        over, under = int(found["over"]), int(found["under"])
        if under == 0 or (found["whole"] and over >= under):
            return None  # `8 \frac{22}{2}`
        value = Fraction(over, under) * (-1 if found["minus"] else 1) + int(found["whole"] or 0)
    else:
        digits = (found["digits"] or "1").replace(",", "")
        value = Fraction(digits.rstrip("."))
        if again := found["again"]:
            value += Fraction(int(again), 10 ** len(digits.partition(".")[2]) * (10 ** len(again) - 1))
        value *= Fraction(10) ** int(found["ten"] or found["power"] or found["e"] or 0)
    value = -value if found["sign"] == "-" else value
    return Number(value, bool(found["over"]), bool(found["percent"]), unit)


def _numbers(text: str) -> Number | tuple | None:
    """Return a number, or (brackets, members) of a list, tuple, interval or matrix of numbers at
    any depth; None where a member is anything else."""
    text = _MATRIX.sub(_as_lists, text.strip())
    one = _number(text)
    if one is not None:
        return one
    if (right := _right_side(text, arithmetic=True)) != text:
        return _numbers(right)
    for separator in (r"\cup", ","):
        parts = _split(text, separator)
        if len(parts) > 1:
            members = tuple(_numbers(part) for part in parts)
            return None if None in members else (separator, members)
    brackets = re.fullmatch(r"(\\\{|[(\[])(.*?)(\\\}|[)\]])", text, re.DOTALL)
    inner = _numbers(brackets[2]) if brackets else None
    if isinstance(inner, Number) and "[[" in text:  # a matrix of one column keeps its rows
        return "[]", (inner,)
    if isinstance(inner, tuple) and inner[0] == "," and brackets[1] != r"\{":
        return brackets[1] + brackets[3], inner[1]
    return inner


def _agree(answer: Number | tuple, gold: Number | tuple) -> bool:
    if isinstance(gold, Number) and isinstance(answer, Number):
        if answer.unit != gold.unit and answer.unit and (gold.unit or answer.unit.isdigit()):
            return False
        if answer.is_fraction and not gold.is_fraction and gold.value.denominator == 1:
            return False
        if answer.is_percent == gold.is_percent:
            return _close(answer.value, gold.value)
        wholes = [{n.value, n.value / 100} if n.is_percent else {n.value} for n in (answer, gold)]
        return bool(wholes[0] & wholes[1])
    if isinstance(gold, Number):
        gold = (",", (gold,))  # `\boxed{6} ... \boxed{6}`
    if isinstance(answer, Number) or answer[0] != gold[0]:
        return False
    if gold[0] not in (",", r"\cup"):
        return len(answer[1]) == len(gold[1]) and all(map(_agree, answer[1], gold[1]))
    pairs = [[_agree(member, wanted) for wanted in gold[1]] for member in answer[1]]
    return all(map(any, pairs)) and all(map(any, zip(*pairs, strict=True)))


def _close(value: Fraction | float, wanted: Fraction | float) -> bool:
    """Tell whether values are equal; 0.3333333 is a third."""
    if value == wanted or math.inf in (abs(value), abs(wanted)) or wanted.denominator == 1:
        return value == wanted
    return abs(value - wanted) <= min(1, abs(wanted)) / 10**6


# === 5. the rest ===


def is_right(answer: str, gold: str) -> bool:
    """Tell whether an answer means what the gold answer does. Not symmetric."""
    if answer == gold:
        return True
    if max(len(answer), len(gold)) > MAX_ANSWER_CHARS:
        return False
    answer, gold = normal(answer), normal(gold)
    if _squeezed(answer) == _squeezed(gold):
        return True
    letter, behind = _choice(gold)
    if letter:
        return _choice(answer)[0] == letter or (behind != "" and is_right(answer, behind))
    wanted = _numbers(gold)
    if wanted is not None:
        given = _numbers(answer)
        return given is not None and _agree(given, wanted)
    if _WORDS.fullmatch(gold) and (_WORDS.fullmatch(answer) or len(gold) > 3):
        return False  # to math-verify a word is the product of its letters
    return _same_expression(answer, gold)


def _squeezed(text: str) -> str:
    """Return a text without \text{} and the spaces that part no digits."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", _TEXT.sub(r"\1", text)).lower()


def _without_unit(text: str) -> tuple[str, str]:
    """Return an expression and the unit behind it."""
    for found in re.finditer(rf"(?<=[\w\s}})])\s*{_WRAPPER}\s*\{{", text):
        unit = _unit(text[found.start() :])
        if unit is not None:
            return text[: found.start()], unit
    return text, ""


def _same_expression(answer: str, gold: str) -> bool:
    (answer, unit), (gold, gold_unit) = _without_unit(answer), _without_unit(gold)
    if unit and gold_unit and unit != gold_unit:
        return False
    value, wanted_value = (
        ", ".join(map(_right_side, _split(text, ","))) for text in (answer, gold)
    )
    if value != answer or "=" not in answer:
        gold = wanted_value
    if wanted_value != gold or "=" not in gold:
        answer = value
    if ("=" in answer) != ("=" in gold):
        return False
    wanted = _read(gold)
    if wanted is None:
        return False
    if not _is_finished(answer, gold):
        return False
    given = _read(answer)
    if given is None or not math_verify().verify([wanted], [given], timeout_seconds=None):
        return False
    if not (getattr(wanted, "is_number", False) and getattr(given, "is_number", False)):
        return True
    # It rounds to 6 places: to it, 0.0 is every number below 5e-7.
    return bool(abs(wanted.evalf() - given.evalf()) <= 1e-5 * abs(wanted.evalf()))


_NUMERAL = re.compile(r"\d+\.?\d*|\.\d+")
_COMMAND = re.compile(r"\\(?:begin|end)\{\w+\}|\\[A-Za-z]+|\b(?:sin|cos|tan|log|ln|exp|sqrt)\b")


def _read(text: str):
    """Return what math-verify parses; None if a number or letter of the text is not in it."""
    library = math_verify()
    settings = library.LatexExtractionConfig(normalization_config=library.SPELLING)
    text = text.replace("%", r"\%")
    trees = library.parse(
        rf"\boxed{{{text}}}", [settings], parsing_timeout=None, extraction_mode="first_match",
        fallback_mode="no_fallback",
    )
    if not trees or isinstance(trees[0], str):
        return None
    tree = trees[0]
    atoms = tree.atoms() | tree.atoms(library.Function)
    letters = "".join(str(atom.func if atom.args else atom) for atom in atoms).lower()
    numbers = {float(n) for n in _NUMERAL.findall(str(tree))} | {0.0, 1.0}
    bare = _COMMAND.sub(" ", text)
    seen = all(letter in letters for letter in re.findall("[a-z]", bare.lower()))
    return tree if seen and {float(n) for n in _NUMERAL.findall(bare)} <= numbers else None


def _is_finished(answer: str, gold: str) -> bool:
    r"""Tell whether an answer for a number such as `5\sqrt{3}` has no more sums, hardly more
    numerals, and no other functions than it. Golds with variables may be answered by any
    expression."""
    if re.search(r"[a-zA-Z]", re.sub(r"\\[A-Za-z]+|(?<![a-z])[ei](?![a-z])", " ", gold)):
        return True
    counts = []
    for text in (answer, gold):
        numerals = [n for n in _NUMERAL.findall(text) if float(n) != 1]
        counts.append((len(re.findall(r"[\w})]\s*[+-]", text)), len(numerals)))
    (sums, numerals), (gold_sums, gold_numerals) = counts
    others = set(_COMMAND.findall(answer)) - set(_COMMAND.findall(gold)) - _ARITHMETIC
    return not others and "!" not in answer and sums <= gold_sums and numerals <= gold_numerals + SLACK


SLACK = 1
_ARITHMETIC = {r"\frac", r"\sqrt", r"\pi", r"\cdot", r"\times", r"\infty", r"\cup", r"\pm"}


def math_verify():
    """The module, whose import and first call take longest: no item pays for them."""
    global _math_verify
    if _math_verify is None:
        with untimed():
            import math_verify as _math_verify
            from latex2sympy2_extended import NormalizationConfig
            from sympy import Function
            logging.disable()  # it warns that its time-outs, which use signals and hang, are off
            _math_verify.Function = Function
            _math_verify.SPELLING = NormalizationConfig(
                basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
            )
            _math_verify.verify(_math_verify.parse("1+\\sqrt{3}", parsing_timeout=None), _math_verify.parse("1", parsing_timeout=None), timeout_seconds=None)
    return _math_verify


_math_verify = None
