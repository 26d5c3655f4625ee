r"""Whether an answer is the gold answer: math-verify calls them equal, and the answer is finished.

math-verify is content with any expression of the gold answer's value: `8+4+7` is 19 to it. A policy
that is paid for that learns within 30 steps to copy the problem's expression into its box. So what
math-verify calls equal must also be *finished*, and that is judged by the tree that it has parsed,
not by the text: whatever units, words or dollar signs stand around it, the tree is what was
compared.

- Where the gold answer is a rational number, so is the answer: one numeral, a reduced fraction, a
  per cent or a power of ten. The same holds for each element of a set, a tuple or an interval.
- Elsewhere sympy's automatic evaluation must find nothing to do in it that it does not also find in
  the gold answer: no `1+1+\sqrt{3}`, `2^3 x`, `3x-x`, `\sqrt{16}`, `5!`, `\sum_{i=1}^3 i`.
- Every number that is written in it must be in the tree: `\binom{10}{3}` and `\frac{12}{4}` are
  worked out by the parser.
- A solved equation or inequality (`x = 3`, `x < 3`) asks for a solved one.

What it does not see: an expression with variables that is only to be expanded or factored.

This module is the child of the verifier: it runs untrusted text without a deadline of its own.
`python -m common.equivalence TIMEOUT_S MEMORY_MB` answers requests on its standard input.
"""

import json
import logging
import math
import os
import re
import signal
import sys
from collections import Counter

from latex2sympy2_extended.logic import And
from math_verify import parse, verify
from math_verify.grader import (
    is_assignment_relation,
    is_relation,
    take_first_relation,
    take_last_relation,
)
from sympy import (
    Add,
    Basic,
    Derivative,
    Eq,
    Float,
    Function,
    Integer,
    Integral,
    Interval,
    Limit,
    MatrixBase,
    Mul,
    Number,
    Pow,
    Product,
    Rational,
    Set,
    Sum,
    Symbol,
    Tuple,
    UnevaluatedExpr,
    preorder_traversal,
)
from sympy.core.parameters import distribute
from sympy.core.relational import Relational

logging.disable()  # math-verify warns that its own time-outs are off

_PROSE = re.compile(r"\$|\\\[|\\\(|\\boxed|[A-Za-z]{2} [A-Za-z]{2}")
_NUMERAL = re.compile(r"\d*\.\d+|\d+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SUBSCRIPT = re.compile(r"_(?:\{[^{}]*\}|\w)")
_MIXED = re.compile(r"(\d+)\s*\\[dt]?frac\{(\d+)\}\{(\d+)\}")

# LaTeX that a numeral, or a set, tuple, interval or matrix of numerals may hold; the parser works
# out `e^{\ln 3}` and \begin{vmatrix} ...
_COMMAND = re.compile(r"\\[A-Za-z]+(?:\{(?:[A-Za-z]*matrix|array)\})?")
_NUMERAL_COMMANDS = {
    *(r"\frac", r"\dfrac", r"\tfrac", r"\cfrac", r"\times", r"\cdot", r"\circ", r"\degree"),
    *(r"\infty", r"\in", r"\pm", r"\mp", r"\cup", r"\left", r"\right", r"\quad", r"\qquad"),
    *(r"\text", r"\mathrm", r"\approx", r"\lbrace", r"\rbrace", r"\langle", r"\rangle"),
    *(
        rf"\{word}{{{kind}}}"
        for word in ("begin", "end")
        for kind in ("matrix", "pmatrix", "bmatrix")
    ),
    *(r"\begin{array}", r"\end{array}"),
}

PER_CENT = UnevaluatedExpr(Rational(1, 100))  # how math-verify writes `%`
TINY = 1e-3  # math-verify rounds decimals to 6 places: to it, 0.0 is every number below 5e-7

Tree = Basic | MatrixBase


def read(text: str) -> list[Tree | str]:
    """What math-verify reads: at most one tree, then its text.

    Text is read as the LaTeX of an answer; if there is prose or markup around, as a text that has
    one.
    """
    boxed = text if _PROSE.search(text) else rf"\boxed{{{text}}}"
    return parse(boxed, parsing_timeout=None)


def is_readable(gold: str) -> bool:
    """Whether more than an equal string can be right."""
    return any(not isinstance(value, str) for value in read(gold))


def is_answer(gold: str, answer: str) -> bool:
    """Whether `answer` has the value of `gold` and is finished. Not symmetric."""
    golds, answers = read(gold), read(answer)
    if not _equal(golds, answers):
        return False
    if isinstance(golds[0], str) or isinstance(answers[0], str):
        return True  # the texts were equal
    wanted, wanted_text = sides_of(*golds)[0] if is_assignment(golds[0]) else golds
    if isinstance(wanted, Relational | And):
        return is_finished(*answers, wanted, wanted_text)
    # math-verify takes the right side: of `1 = 8+4+7` the left one must not vouch for it.
    sides = [side for side in sides_of(*answers) if is_finished(*side, wanted, wanted_text)]
    return bool(sides) and _equal([wanted], [sides[0][0]])


def _equal(golds: list, answers: list) -> bool:
    if not verify(golds, answers, timeout_seconds=None):
        return False
    gold, answer = golds[0], answers[0]
    numbers = [value for value in (gold, answer) if getattr(value, "is_number", False)]
    if len(numbers) < 2 or any(number.has(PER_CENT) for number in numbers):  # 9% is 9 to it
        return True
    gold, answer = (number.doit().evalf() for number in numbers)
    return not gold.is_finite or bool(abs(gold - answer) <= TINY * abs(gold))


def is_assignment(tree: Tree) -> bool:
    """`x = 12`, `x = 8+4 = 12`."""
    return isinstance(tree, Eq | And) and is_assignment_relation(tree)


def sides_of(tree: Tree, text: str = "") -> list[tuple[Tree, str]]:
    """Of an equation or a chain of them the last side, then the first; else the tree itself."""
    if not isinstance(tree, Eq | And) or not is_relation(tree):
        return [(tree, text)]
    last = (take_last_relation(tree).rhs, text.rpartition("=")[2])
    return [last, (take_first_relation(tree).lhs, text.partition("=")[0])]


# === finished ===


def is_finished(answer: Tree, text: str, gold: Tree, gold_text: str) -> bool:
    """Whether nothing is left to be worked out in `answer`, beyond what is left in `gold`."""
    if not _written_numbers_are_in(answer, text) and _written_numbers_are_in(gold, gold_text):
        return False
    if all(is_rational(element) for element in elements_of(gold)):
        rational = all(is_rational(element) for element in elements_of(answer))
        return rational and _NUMERAL_COMMANDS.issuperset(_COMMAND.findall(text))
    if isinstance(gold, Relational) and is_solved(gold) and len(gold.free_symbols) == 1:
        return isinstance(answer, Relational) and is_solved(answer) and not undone(answer)
    return not undone(answer) - undone(gold)


def elements_of(tree: Tree) -> list[Tree]:
    """Those of a set, tuple, interval or matrix, at any depth; else the tree itself."""
    if isinstance(tree, Interval):
        return [tree.start, tree.end]
    if isinstance(tree, MatrixBase):
        return [element for entry in tree.flat() for element in elements_of(entry)]
    if isinstance(tree, Set | Tuple) and tree.args:
        return [element for argument in tree.args for element in elements_of(argument)]
    return [sides_of(tree)[0][0]] if is_assignment(tree) else [tree]


def is_rational(tree: Tree) -> bool:
    """A numeral: a number, a reduced fraction, a number of per cent, or times a power of ten."""
    if isinstance(tree, Number):
        return True
    factors = [f for f in _flat(Mul, tree) if f not in (Integer(-1), PER_CENT)]
    powers = [f for f in factors if isinstance(f, Pow) and f.base == 10 and f.exp.is_Integer]
    above = [f for f in factors if isinstance(f, Number)]
    below = [f.base for f in factors if isinstance(f, Pow) and f.exp == -1 and f not in powers]
    below = [base for base in below if isinstance(base, Number)]
    if len(above) + len(below) + len(powers) < len(factors) or len(above) > 1:
        return False
    if len(below) + len(powers) > 1 or not below:
        return len(below) + len(powers) <= 1
    numerals = [Rational(number) for number in (*above, *below)]
    return all(n.q == 1 for n in numerals) and math.gcd(*(n.p for n in numerals)) == 1


def is_solved(relation: Relational) -> bool:
    """`x = 3`, `3 > x`, `-x > -3`: one side is a symbol that the other has not."""
    sides = (relation.lhs, relation.rhs)
    return any(
        isinstance(symbol, Symbol) and symbol not in other.free_symbols
        for one, other in (sides, sides[::-1])
        for symbol in (one.doit(), -one.doit())
    )


def undone(tree: Tree) -> Counter:
    """How often each kind of operation can be carried out at once."""
    kinds = Counter()
    with distribute(False):  # 2(x+1) stays a product
        for node in preorder_traversal(tree):
            if isinstance(node, Sum | Product | Integral | Limit | Derivative):
                kinds[type(node)] += 1
            elif isinstance(node, Add):
                terms = _flat(Add, node)
                kinds[Add] += len(Add.make_args(Add(*terms))) < len(terms)
            elif isinstance(node, Mul):
                kinds[Mul] += _is_undone_product(node)
            elif isinstance(node, Pow) and node.exp != -1 and not isinstance(node.base, Float):
                kinds[Pow] += not isinstance(Pow(node.base, node.exp), Pow)
            elif isinstance(node, Function):
                kinds[type(node)] += not node.func(*node.args).has(node.func)
            if not node.free_symbols:
                kinds["expand"] += _is_product_of_sums(node)
    return +kinds


def _is_product_of_sums(number: Tree) -> bool:
    r"""`(1+\sqrt{2})(3-\sqrt{2})`, `(1+\sqrt{2})^2`."""
    if isinstance(number, Pow):
        return isinstance(number.base, Add) and isinstance(number.exp, Integer) and number.exp.p > 1
    return sum(isinstance(factor, Add) for factor in _flat(Mul, number)) > 1


def _is_undone_product(product: Mul) -> bool:
    """Several numerals, a fraction that can be reduced, or factors of one base."""
    factors = [factor for factor in _flat(Mul, product) if factor not in (-1, PER_CENT)]
    fractions = [f for f in factors if isinstance(f, Pow) and f.exp == -1]
    above = [f for f in factors if isinstance(f, Number)]
    below = [f.base for f in fractions if isinstance(f.base, Number)]
    integers = [int(n) for n in (*above, *below) if isinstance(n, Integer)]
    if len(above) > 1 or len(below) > 1 or (len(integers) == 2 and math.gcd(*integers) > 1):
        return True
    others = [f for f in factors if f not in above and f not in fractions]
    others += [f for f in fractions if not isinstance(f.base, Number)]
    merged = Mul(*others).as_coeff_Mul()[1]
    return len(others) > 1 and len(Mul.make_args(merged)) < len(others)


def _flat(kind: type, tree: Tree) -> list[Tree]:
    """The terms of a sum, or factors of a product, as they were written."""
    if not isinstance(tree, kind):
        return [tree]
    return [part for argument in tree.args for part in _flat(kind, argument)]


# === written numbers ===


def _written_numbers_are_in(tree: Tree, text: str) -> bool:
    """Whether the tree has each numeral of the text, 0 and 1 apart."""
    text = _MIXED.sub(_improper, _SUBSCRIPT.sub(" ", text.partition(r"\approx")[0]))
    held = {0, 1, *_numbers_of(tree)}
    readings = (text, _THOUSANDS.sub("", text))  # 1,234 is one number or two
    return any(held.issuperset(_numerals_of(reading)) for reading in readings)


def _numerals_of(text: str) -> list[int | float]:
    return [float(word) if "." in word else int(word) for word in _NUMERAL.findall(text)]


def _numbers_of(tree: Tree) -> list[int | float]:
    numbers = []
    for node in preorder_traversal(tree):
        if isinstance(node, Rational):
            numbers += [abs(int(node.p)), int(node.q)]
        elif isinstance(node, Number) and node.is_finite:
            numbers.append(abs(float(node)))
    return numbers


def _improper(mixed: re.Match) -> str:
    whole, above, below = map(int, mixed.groups())
    proper = above < below and math.gcd(above, below) == 1
    return f"{whole * below + above}/{below}" if proper else mixed.group()


# === the child process ===


def answer_requests(timeout_s: float, memory_mb: int) -> None:
    """Reads [answer, gold] lines; replies 1 (right), 0 (wrong), x (exception), a byte each.

    An answer of null asks whether the gold answer can be read.
    """
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # nothing that a library prints may pass for a reply
    out.write(b"r")
    for line in sys.stdin.buffer:
        # Should the parent die in mid-item, the kernel's timer enforces the deadline.
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 1)
        answer, gold = json.loads(line)
        try:
            yes = is_readable(gold) if answer is None else is_answer(gold, answer)
            reply = b"1" if yes else b"0"
        except MemoryError:
            os._exit(1)  # what is left of this process is not to be trusted
        except Exception:
            reply = b"x"
        signal.setitimer(signal.ITIMER_REAL, 0)
        out.write(reply)


if __name__ == "__main__":
    answer_requests(float(sys.argv[1]), int(sys.argv[2]))
