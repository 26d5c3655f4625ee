r"""Mathematics: the answer in the last \boxed{...} of a completion, against a gold answer.

A task file like any other (docs/tasks.md).

1. The answer is the last `\boxed{...}`, else the last `Answer:` line.
2. Answer and gold get one spelling: of Unicode, markup, currency, thousands.
3. Equal texts, words and choices (`(E) 12`) are decided as they stand.
4. Lists, intervals and matrices are compared member by member.
5. Where the gold is a number, the answer must be one too, written out: math-verify calls `8+4+7`
   equal to 19, and a policy that is paid for that learns within 30 steps to copy the problem's sum.
6. The rest is for math-verify, if the answer is not longer than the gold: as a whole, since of a
   text it takes one formula, or what stands before a unit.

Answers of over 2,000 characters are wrong; on those, no step before the last takes a second. It may
take for ever: `9^{9^{9^9}}`.
"""

import logging
import math
import re
from decimal import Decimal
from fractions import Fraction
from functools import cache, lru_cache, partial
from itertools import accumulate
from unicodedata import normalize

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
        if not (_WORDS.fullmatch(bare) or _CHOICE.fullmatch(bare) or _are_equal(bare, bare)):
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

_BRACED = r"(?:[^{}\\]|\\.)*"  # a text whose braces are closed
for _ in range(MAX_DEPTH):
    _BRACED = rf"(?:[^{{}}\\]|\\.|\{{{_BRACED}\}})*"
_BOX = re.compile(
    rf"(?s)\\(?:boxed|fbox)\s*(?:\{{({_BRACED})\}}|([+-]?\d+(?:[.,]\d+)*|[A-Z](?![A-Za-z])))"
)
_ANSWER_LINE = re.compile(r"(?i:answer)\s*:[ \t]*(\S.*)")
# What may stand between two boxes that are one answer: `\boxed{2} apples \text{ and } \boxed{3}`.
_BETWEEN = re.compile(
    r"(?:[\s\\,;:.$()\[\]{}]|q?quad|text|and|or)*|[^\d\n.]{0,40}\band\b[\s\\${}]*"
)


def extract_answer(completion: str) -> str | None:
    r"""Return the final answer of a completion: its last balanced `\boxed{...}` or `\fbox{...}`,
    else its last `Answer: ...` line. Boxes joined by no more than `and` or a comma are one answer.
    """
    boxes = list(_BOX.finditer(completion))
    if not boxes:
        lines = _ANSWER_LINE.findall(completion)
        return (lines[-1].strip("* \t") or None) if lines else None
    first = len(boxes) - 1
    while first > 0 and _BETWEEN.fullmatch(
        completion, boxes[first - 1].end(), boxes[first].start()
    ):
        first -= 1
    contents = [(box[1] or box[2] or "").strip() for box in boxes[first:]]
    return ", ".join(filter(None, contents)) or None


# === 2. one spelling ===

_NAMES = """×times ÷div ⋅cdot ·cdot ∙cdot ≤le ≥ge ≠ne ≈approx ∞infty ∪cup ∩cap ∈in ±pm °degree
αalpha βbeta γgamma δdelta εepsilon θtheta λlambda μmu πpi ρrho σsigma τtau φphi ωomega ΔDelta
ΓGamma ΩOmega ∅emptyset"""
_TEX = str.maketrans("−‐–⁄∕’′", "---//''")
_TEX |= {ord(name[0]): rf"\{name[1:]} " for name in _NAMES.split()}
_SUPERSCRIPT = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹ⁿ]+")
_VULGAR = re.compile("[¼½¾⅐-⅞]")


def _rules(table: str) -> list[tuple[re.Pattern, str]]:
    r"""Read lines of `PATTERN => REPLACEMENT`; WORD is the end of a command, \040 a space."""
    table = table.replace("WORD", "(?![A-Za-z])")
    lines = (line.partition(" =>") for line in table.strip().split("\n"))
    return [(re.compile(pattern), replacement.strip()) for pattern, _, replacement in lines]


_SPELLING = _rules(r"""
[\u00ad\u200b-\u200f\u2060-\u2064\ufeff] =>
√\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\)) => \\sqrt{\1}
\\\\\s*\[[^\[\]]*\] => \\\\
\\\\(?=(?:frac|sqrt|left|right|le|ge|pi|text)WORD) => \\
\\(?:left|right|displaystyle|limits|rm|bf|it|large|Large|small)WORD =>
\\(?:text[a-z]*|[mf]box|boxed|emph|underline|boldsymbol|bm|math(?:rm|bf|sf|it))\s*(?={) => \\text
\s*\{\s* => {
\s+\} => }
(?<!\\)\\[()\[\]]|\\?\$|[€£¥¢] =>
(?<=\d)(?:\{,\}|,?\\!\s*|\\,| )(?=\d{3}(?!\d)) =>
~|(?<!\\)\\(?:[,;:!>\s]|q?quad) => \040
\\[dtc]?frac\s*WORD => \\frac
<=|\\leq(?:slant)?WORD => \\le\040
>=|\\geq(?:slant)?WORD => \\ge\040
!=|\\not\s*=|\\neqWORD => \\ne\040
\\ltWORD => <
\\gtWORD => >
\\% => %
""")
_MARKUP = _rules(r"""
^\\text\{([^{}]*)\} => \1
(?:\^\{?\s*\\circ\}?|\\degreeWORD)(?:\s*[CF]WORD)? =>
(?<=\d)\s*\^?\{?(?:\\text\{)?(?:th|st|nd|rd)WORD\}* =>
\s*(?:\\text\{(?:and|or)\}|(?<![A-Za-z])(?:and|or)WORD|;)[\s,]* => ,\040
\\mathbb\{?R\}? => (-\\infty,\\infty)
\\frac\s*(\d|[a-z](?![a-z])) => \\frac{\1}
(\\frac\{(?:[^{}]|\{[^{}]*\})*\})\s*(\d|[a-z](?![a-z])) => \1{\2}
(?<![\d.,/^_}])(\d+)\.?\s*/\s*(\d+)(?![\d.^]) => \\frac{\1}{\2}
(?<![\\A-Za-z])piWORD => \\pi\040
(?:^|(?<=[,(\[])|(?<=\\\{))([^,(\[{}]*)\\pm((?:[^,{}]|\{[^{}]*\})*) => \1+\2, \1-\2
^\\\{\s*[a-z]\s*(?:\\mid|\||:)(.*)\\\}$ => \1
(?:(?<=[\d}])(?<!_\d)|(?<=\\pi))\s*\\approx.* =>
""")
_WHOLE = re.compile(rf"(?s)(?:\\text)?\{{({_BRACED})\}}")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
_RELATION = re.compile(r"(<|>|\\[lg]e(?![a-z]))")


def _spelled(text: str) -> str:
    text = _VULGAR.sub(r" \g<0>", _SUPERSCRIPT.sub(r"^{\g<0>}", text))
    text = normalize("NFKC", text).translate(_TEX)
    for pattern, replacement in _SPELLING:
        text = pattern.sub(replacement, text)
    return text


def normal(text: str) -> str:
    """Return an answer in one spelling, without markup, degrees or full stop; `x > 3` as an
    interval, `1, 2; 3, 4` as `(1, 2), (3, 4)`."""
    text = _spelled(text).strip("* \n").rstrip("\\ ")
    for _ in range(MAX_DEPTH):
        text = text.removesuffix(".").strip()
        if whole := _WHOLE.fullmatch(text):
            text = whole[1]
    if len(groups := _split(text, ";")) > 1:
        text = ", ".join(f"({group})" for group in groups)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    if not re.search(r"[(\[]|\\\{", text):  # (100,200) are two numbers
        text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    return _as_interval(text.strip())


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


# === 3. equal texts, words, choices ===

_WORDS = re.compile(r"[A-Za-z]{2,3}|[A-Za-z]{4}[A-Za-z .'-]*")
_CHOICE = re.compile(  # the first letter of several is none
    r"(?s)\(?([A-Z])(?:\)(?!.*\([A-Z]\))(.*)|[.:](?:\s(?!.*\b[A-Z][.:)]).*)?)?"
)
_SPACES = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # those that part no digits
_COMMA, _POINT = (re.compile(rf"(-?\d+){mark}(\d+)") for mark in (",", r"\."))


def is_right(answer: str, gold: str) -> bool:
    """Tell whether an answer means what the gold answer does. Not symmetric."""
    if answer == gold or max(len(answer), len(gold)) > MAX_ANSWER_CHARS:
        return answer == gold
    answer, gold = normal(answer), normal(gold)
    texts = [_SPACES.sub("", text) for text in (answer, gold)]
    if texts[0] == texts[1]:
        return True
    if choice := _CHOICE.fullmatch(gold):
        chosen, behind = _CHOICE.fullmatch(answer.upper()), (choice[2] or "").strip()
        return bool(chosen and chosen[1] == choice[1] or behind and is_right(answer, behind))
    if _WORDS.fullmatch(gold) and (_WORDS.fullmatch(answer) or len(gold) > 3):
        return texts[0].lower() == texts[1].lower()  # yes is no product of letters
    for one, other in ((answer, gold), (gold, answer)):
        if (comma := _COMMA.fullmatch(one)) and _POINT.fullmatch(other):
            return Fraction(f"{comma[1]}.{comma[2]}") == Fraction(other)
    return max(_depths(answer)) <= MAX_DEPTH and _are_equal(answer, gold)


# === 4. lists, intervals, matrices ===

_MATRIX = re.compile(r"(?s)\\begin\{([pb]?matrix|array)\}(?:\{\w+\})?(.*?)(?:\\\\\s*)?\\end\{\1\}")
_BRACKETS = re.compile(r"(?s)(\\\{|[(\[])(.*?)(\\\}|[)\]])")
# What says what a value is, as `x =`, `f(3) =`, `\angle ABC =`; or how it was found: `8 + 4 =`.
_LABEL = r"(?:_\w|_\{[^{}]*\}|\([^()]*\)|[^-+*/^<>,!=\d(_])*(?:=|\\approx|\\in(?![a-z]))"
_SUM = r"(?:\\[A-Za-z]+(?![A-Za-z])|[ei](?![A-Za-z])|[^A-Za-z,=\\])*="
_LABELS = re.compile(rf"^(?:{_LABEL})+")
_LEFT_SIDES = re.compile(rf"^(?:{_LABEL}|{_SUM})+")


def _are_equal(answer: str, gold: str) -> bool:
    """Compare value by value; only lists and unions have no order."""
    (form, given), (gold_form, wanted) = _members(answer), _members(gold)
    if gold_form == "":
        given = given if form in ("", ",") else [answer]  # `\boxed{6} ... \boxed{6}`
        return all(_is_same_value(one, wanted[0]) for one in given)
    if form != gold_form:
        return False
    if form not in (",", r"\cup"):
        return len(given) == len(wanted) and all(map(_are_equal, given, wanted))
    pairs = [[_are_equal(one, other) for other in wanted] for one in given]
    return all(map(any, pairs)) and all(map(any, zip(*pairs, strict=True)))


def _members(text: str) -> tuple[str, list[str]]:
    """Return the form of an answer ("" of a single value) and its members."""
    for separator in (r"\cup", ","):
        if len(parts := _split(text, separator)) > 1:
            return separator, parts
    right = _LEFT_SIDES.sub("", text).strip()
    if matrix := _MATRIX.fullmatch(right):
        return "matrix", [f"({row.replace('&', ',')})" for row in matrix[2].split(r"\\")]
    brackets = _BRACKETS.fullmatch(right)
    if not brackets or min(_depths(brackets[2])) < 0:
        return "", [text.strip()]
    form, members = _members(brackets[2])
    ordered = form == "," and brackets[1] != r"\{"
    return brackets[1] + brackets[3] if ordered else form, members


def _split(text: str, separator: str) -> list[str]:
    """Split a text at what stands in no brackets."""
    parts, start = [], 0
    for at, depth in enumerate(_depths(text)):
        if depth == 0 and text.startswith(separator, at):
            parts.append(text[start:at])
            start = at + len(separator)
    return [*parts, text[start:]]


def _depths(text: str) -> list[int]:
    """Return how many brackets are open before each character."""
    return list(accumulate(((char in "([{") - (char in ")]}") for char in text), initial=0))


# === 5. numbers and units ===

_UNITS = """% percent percentage pct|2 square sq|3 cubic|/ per|m meter metre|mm|cm centimeter
centimetre|km kilometer kilometre|mi mile|ft foot feet|in inch inche|yd yard|h hr hour|min minute
|s sec second|g gram|mg|oz|ml|mph|kg kilogram|lb pound|l liter litre|dollar|cent|am|pm|men|man|day
|cup|box|of|unit"""
_UNITS = {name: names.split()[0] for names in _UNITS.split("|") for name in names.split()}
_SHORT = "|".join(name for name in _UNITS if name.isalpha() and len(name) > 1)
# A value, and behind it a base or a unit: words in \text{}, known ones, long ones behind a space.
_MEASURED = re.compile(
    rf"""(?isx) (.+?) (?: (?<=[\d}}]) | (?=\s*\\text) )
    ( _\{{?\d+\}}? | (?: [\s/%.] | \\cdot | (?: \\text\{{[a-z\s/.]*\}} | (?<=\s)[a-z]{{4,}}
    | (?<![a-z])(?:{_SHORT})s?(?![a-z]) | (?<=[a-z]/)[a-z] ) (?:\s*\^\s*\{{?-?\d\}}?)? )* )"""
)
_NO_UNIT = re.compile(  # what makes a number another one
    r"(?i)\b(?:and|or|is|not|plus|minus|more|less|times|over|by|squared|cubed|choose|mod|pi|half|dozen"
    r"|hundred|thousand|[a-z]*illion)\b"
)
_NAME = re.compile(r"\s*([A-Za-z])\s*=")
_NOTATION = _rules(r"""
^([+-]?)\s*10\s*\^\s*\{?([+-]?\d{1,3})(?!\d)\}? => \g<1>1e\2
(?<=\d)\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{?([+-]?\d{1,3})(?!\d)\}? => e\1
(\.\d*)\\(?:overline|bar|dot)\{(\d+)\} => \1\2\2\2\2\2\2\2\2
\\frac\{(-?\d+)\}\{(0*[1-9]\d*)\} => \040\1/\2
\\infty => 1e9999
""")
_DECIMAL = r"(?:\d+\.?\d*|\.\d+)(?:[eE](?:[+-]?\d{1,3}|9999))?"
_NUMBER = re.compile(rf"([+-]?)\s*(?:(?:(\d+)\s+)?(-?\d+/\d+)|({_DECIMAL}))")


def _is_same_value(answer: str, gold: str) -> bool:
    (answer, unit), (gold, gold_unit) = _measured(answer), _measured(gold)
    if unit not in ("", gold_unit) and (gold_unit or unit.isdigit()):
        return False  # another unit, or another base
    given, wanted = _number(answer), _number(gold)
    if wanted is None:
        return _is_same_expression(answer, gold)
    names = {found[1] for text in (answer, gold) if (found := _NAME.match(text))}
    if given is None or len(names) > 1:  # y=1 for x=1
        return False
    if (unit == "%") != (gold_unit == "%"):
        return wanted in (given, given / 100 if unit == "%" else given * 100)
    slack = 0 if wanted % 1 == 0 else min(1, abs(wanted)) / 10**6  # 0.3333333
    return abs(given - wanted) <= slack


def _measured(text: str) -> tuple[str, str]:
    """Part a value from the unit behind it; what is no unit stays: `12 million`, `12x`, `12+4`."""
    found = _MEASURED.fullmatch(text)
    if not found or _NO_UNIT.search(found[2]):
        return text, ""
    unit = found[2].replace(r"\text", " ").lower()
    words = (word.removesuffix("s") for word in re.findall(r"[a-z]+|[%/]|-?\d+", unit))
    return found[1], " ".join(sorted(_UNITS.get(word, word) for word in words))


def _number(text: str) -> Fraction | None:
    """Return a number; None where anything is left to work out."""
    text = _LEFT_SIDES.sub("", text)
    for pattern, replacement in _NOTATION:
        text = pattern.sub(replacement, text)
    if not (found := _NUMBER.fullmatch(text.strip())):
        return None
    sign, whole, fraction, decimal = found.groups()
    value = Fraction(fraction or decimal)
    if fraction and (value % 1 == 0 or (whole and not 0 < value < 1)):
        return None  # 12/4, 8 \frac{22}{3}
    value += int(whole or 0)
    return -value if sign == "-" else value


# === 6. expressions ===

_NUMERAL = re.compile(r"\d+\.?\d*|\.\d+")
_VARIABLE = re.compile(
    r"(?<![\\A-Za-z])(?!(?:[ei]|sin|cos|tan|log|ln|exp|sqrt)(?![A-Za-z]))[A-Za-z]"
)
_SYMBOLS = re.compile(  # all but fraction bars, and products with a letter
    r"\\(?!frac)[A-Za-z]+|(?<![\\A-Za-z])[A-Za-z]+|[\d.]+|[-+/^!(|]|\*(?![A-Za-z])"
)


def _is_same_expression(answer: str, gold: str) -> bool:
    if ("=" in answer) != ("=" in gold):
        answer, gold = _LABELS.sub("", answer), _LABELS.sub("", gold)
    if ("=" in answer) != ("=" in gold) or not _is_finished(answer, gold):
        return False
    parse, verify = _math_verify()
    try:
        given, wanted = parse(answer), parse(gold)
    except Exception:
        return False  # it cannot be read
    if not verify(wanted, given):
        return False
    if "=" in gold:
        return given.free_symbols == wanted.free_symbols  # 0 = 0 has the solutions of x = x + 1
    if not all(getattr(tree, "is_number", False) for tree in (wanted, given)):
        return True
    # math-verify rounds to 6 places: to it, 0.0 is every number below 5e-7.
    return bool(abs(wanted.evalf() - given.evalf()) <= 1e-9 * abs(wanted.evalf()))


def _is_finished(answer: str, gold: str) -> bool:
    r"""Tell whether an answer such as `5\sqrt{3}` or `2x` has no larger numeral than the gold
    answer, and one symbol more at most, with variables two. Equations and products have many forms.
    """
    variables = bool(_VARIABLE.search(_LABELS.sub("", gold)))
    if variables and re.search(r"[=(<>]|\\[lg]e(?![a-z])", gold):
        return True
    largest = [max([1, *map(float, _NUMERAL.findall(text))]) for text in (answer, gold)]
    more = len(_SYMBOLS.findall(answer)) - len(_SYMBOLS.findall(gold))
    return largest[0] <= largest[1] and more <= 1 + variables


@cache
def _math_verify():
    """Return math-verify's parser and comparison. Their import and first call take seconds, for
    which no item pays."""
    with untimed():
        from latex2sympy2_extended import NormalizationConfig, latex2sympy
        from latex2sympy2_extended.latex2sympy2 import ConversionConfig
        from math_verify import verify

        logging.disable()  # it warns that its own time-outs, which use signals, are off
        parse = partial(
            latex2sympy,
            normalization_config=NormalizationConfig(malformed_operators=True),
            conversion_config=ConversionConfig(lowercase_symbols=False),  # R - r is not 0
        )
        verify(parse("x+1"), parse("1+x"))
    return lru_cache(100)(parse), partial(verify, timeout_seconds=None)
