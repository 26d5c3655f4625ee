r"""The rule that an answer is finished: nothing is left to be worked out.

It is judged by the tree that math-verify has parsed, and by the text that the tree is of.

- Where the gold answer is a rational number, so is the answer: one numeral, a reduced fraction, a
  per cent or a power of ten. The same holds for each element of a set, a tuple or an interval.
- Elsewhere sympy's automatic evaluation must find nothing to do in it that it does not also find in
  the gold answer: no `1+1+\sqrt{3}`, `2^3 x`, `3x-x`, `\sqrt{16}`, `5!`, `\sum_{i=1}^3 i`.
- Brackets with a number in front, denominators, roots of numbers and logarithms count as well:
  `2(1+\sqrt{3})-2`, `\frac{6}{\sqrt{3}}`, `\sqrt{7+4\sqrt{3}}`, `\ln 24-\ln 2`, `\frac{2x+4}{2}`.
- Every number that is written in it must be in the tree, and the text may hold nothing that the
  parser carries out: `\binom{10}{3}`, `\frac{12}{4}`, `8 4`, `x|_{x=3}`, determinants, transposes.
- A solved equation or inequality (`x = 3`, `x < 3`) asks for a solved one.

What it does not see: an expression with variables that is only to be expanded or factored, and
identities of trigonometry.
"""

import math
import re
from collections import Counter

from latex2sympy2_extended.logic import And
from math_verify.grader import (
    is_assignment_relation,
    is_equation,
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
    MatMul,
    MatrixBase,
    Mul,
    Number,
    Pow,
    Product,
    Rational,
    S,
    Set,
    Sum,
    Symbol,
    Tuple,
    UnevaluatedExpr,
    Union,
    expand,
    log,
    preorder_traversal,
    sqrtdenest,
)
from sympy.core.parameters import distribute
from sympy.core.relational import Relational

_NUMERAL = re.compile(r"\d*\.\d+|\d+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SUBSCRIPT = re.compile(r"(?<![|])_(?:\{[^{}=]*\}|\w)")
_MIXED = re.compile(r"(\d+)\s*\\[dt]?frac\{(\d+)\}\{(\d+)\}")
# Numbers side by side, an evaluation bar, a transpose, a determinant: the parser carries them out.
_EAGER = re.compile(
    r"\d(?:\s|~|\\[ ,;:!]|\\q?quad)+\d|(?:[|]|\\[lr]?[vV]ert)\s*_"
    r"|\^\s*\{?\s*(?:T|\\top|\\intercal)(?![A-Za-z])"
    r"|\{[vV]matrix\}|\\(?:det|tr|rank|operatorname|bmod|pmod)(?![A-Za-z])"
)

# LaTeX that a numeral, or a set, tuple, interval or matrix of numerals may hold; the parser works
# out `e^{\ln 3}` and \begin{vmatrix} ...
_COMMAND = re.compile(r"\\[A-Za-z]+(?:\{(?:[A-Za-z]*matrix|array)\})?")
_MATRICES = [rf"{kind}matrix" for kind in ("", "p", "b")] + ["array"]
_NUMERAL_COMMANDS = {
    *(r"\frac", r"\dfrac", r"\tfrac", r"\cfrac", r"\times", r"\cdot", r"\circ", r"\degree"),
    *(r"\infty", r"\in", r"\mathbb", r"\pm", r"\mp", r"\cup", r"\left", r"\right", r"\quad"),
    *(r"\qquad", r"\text", r"\mathrm", r"\approx", r"\lbrace", r"\rbrace", r"\langle", r"\rangle"),
    *(rf"\{word}{{{matrix}}}" for word in ("begin", "end") for matrix in _MATRICES),
}

PER_CENT = UnevaluatedExpr(Rational(1, 100))  # how math-verify writes `%`
I_AS_SYMBOL = Symbol("i", real=True)  # what it makes of the i of 3+4i

Tree = Basic | MatrixBase


def is_finished(answer: Tree, text: str, gold: Tree, gold_text: str) -> bool:
    """Tell whether nothing is left to be worked out in `answer`, beyond what is left in `gold`."""
    if not _is_as_written(answer, text) and _is_as_written(gold, gold_text):
        return False
    solved = is_relation(gold) and is_solved(gold) and len(gold.free_symbols) == 1
    if solved and is_relation(answer):
        return is_solved(answer) and not undone(answer)
    if solved or all(is_rational(element) for element in elements_of(gold)):
        rational = all(is_rational(element) for element in elements_of(answer))
        merged = undone(answer)[Union] > 0
        return rational and not merged and _NUMERAL_COMMANDS.issuperset(_COMMAND.findall(text))
    return not undone(answer) - undone(gold)


def elements_of(tree: Tree) -> list[Tree]:
    r"""Return the elements of a set, tuple, interval, matrix or \frac{1}{2} of one, at any depth;
    else itself."""
    if tree == S.Reals:
        return [-S.Infinity, S.Infinity]
    if isinstance(tree, MatMul) and sum(factor.is_Matrix for factor in tree.args) == 1:
        scalars = [factor for factor in tree.args if not factor.is_Matrix]
        if not any(scalar.is_Integer for scalar in scalars):
            return [*scalars, *(e for f in tree.args if f.is_Matrix for e in elements_of(f))]
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


def is_solved(relation: Relational | And) -> bool:
    """`x = 3`, `3 > x`, `-x > -3`, `1 < x < 3`: one side is a symbol that the other has not."""
    if isinstance(relation, And):
        return all(is_solved(part) for part in relation.args)
    sides = (relation.lhs, relation.rhs)
    return any(
        isinstance(symbol, Symbol) and symbol not in other.free_symbols
        for one, other in (sides, sides[::-1])
        for symbol in (one.doit(), -one.doit())
    )


def undone(tree: Tree) -> Counter:
    """Count how often each kind of operation can be carried out at once."""
    kinds = Counter()
    with distribute(False):  # 2(x+1) stays a product
        for node in preorder_traversal(tree):
            if isinstance(node, Sum | Product | Integral | Limit | Derivative):
                kinds[type(node)] += 1
            elif isinstance(node, Add):
                terms = [term for part in _flat(Add, node) for term in _distributed(part)]
                kinds[Add] += len(Add.make_args(Add(*terms))) < len(terms)
                kinds[log] += sum(term.has(log) for term in terms) > 1
            elif isinstance(node, Mul):
                kinds[Mul] += _is_undone_product(node)
            elif isinstance(node, Pow):
                kinds[Pow] += _is_undone_power(node)
            elif isinstance(node, Union):
                kinds[Union] += len(Union.make_args(Union(*node.args))) < len(node.args)
            elif isinstance(node, Function):
                arguments = [argument.doit() for argument in node.args]
                kinds[type(node)] += not node.func(*arguments).has(node.func)
            if isinstance(node, Mul | Pow) and not node.free_symbols - {I_AS_SYMBOL}:
                kinds["expand"] += _is_undone_number(node)
    return +kinds


def _distributed(term: Tree) -> list[Tree]:
    """The terms of 2(x+1), else the term."""
    factors = _flat(Mul, term)
    sums = [factor for factor in factors if isinstance(factor, Add)]
    others = [factor for factor in factors if not isinstance(factor, Add)]
    if len(sums) != 1 or any(factor.free_symbols for factor in others):
        return [Mul(*factors)]
    return [Mul(*others, part) for part in _flat(Add, sums[0])]


def _is_undone_power(power: Pow) -> bool:
    base, exponent = power.args
    if isinstance(base, Float):
        return False
    if exponent != -1:
        return not isinstance(Pow(base, exponent), Pow)
    fractions = [f for f in _flat(Mul, base) if isinstance(f, Pow) and f.exp == -1]
    nested = bool(fractions) or (isinstance(base, Rational) and base.q > 1)  # 1/(1/9)
    return nested or (isinstance(base, Pow) and not isinstance(Pow(base, -1), Pow))


def _is_undone_number(number: Mul | Pow) -> bool:
    r"""`(1+\sqrt{2})(3-\sqrt{2})`, `(1+\sqrt{2})^2`, `\frac{1}{1+\sqrt{2}}`, `\frac{6}{\sqrt{3}}`,
    `\sqrt{3+2\sqrt{2}}`, `\sqrt{3}(\sqrt{3}+\sqrt{2})`."""
    if isinstance(number, Pow):
        whole = isinstance(number.exp, Integer) and number.exp.p not in (0, 1)
        root = number.doit()
        denests = isinstance(root, Pow) and sqrtdenest(root) != root
        return isinstance(number.base, Add) and (whole or denests)
    factors = _flat(Mul, number)
    sums = [factor for factor in factors if isinstance(factor, Add)]
    if number.has(Float):
        return False
    if not sums:
        written = Mul(*(factor for factor in factors if isinstance(factor, Rational)))
        below = [f.base for f in factors if isinstance(f, Pow) and f.exp == -1]
        written /= Mul(*(base for base in below if isinstance(base, Rational)))
        return Mul(*factors).subs(PER_CENT, 1).as_coeff_Mul()[0] != written
    return len(sums) > 1 or _num_roots(expand(number)) < _num_roots(number)


def _num_roots(number: Tree) -> int:
    powers = (node for node in preorder_traversal(number) if isinstance(node, Pow))
    return sum(power.exp.is_Rational and not power.exp.is_Integer for power in powers)


def _is_undone_product(product: Mul) -> bool:
    """Several numerals, a fraction that can be reduced, or factors of one base."""
    factors = [factor for factor in _factors(product) if factor not in (-1, PER_CENT)]
    fractions = [f for f in factors if isinstance(f, Pow) and f.exp == -1]
    above = [f for f in factors if isinstance(f, Number)]
    below = [f.base for f in fractions if isinstance(f.base, Number)]
    below += [Integer(f.q) for f in above if f.is_Rational and f.q > 1]
    # Of (2x+4)/2 too.
    sums = [factor.doit() for factor in factors if isinstance(factor, Add)] if below else []
    contents = [abs(factor.primitive()[0]) for factor in sums]
    numerator = Mul(*(Integer(n.p) for n in above if n.is_Rational), *contents)
    integers = [int(n) for n in (numerator, *below) if n.is_Integer]
    if len(above) > 1 or len(below) > 1 or (len(integers) == 2 and math.gcd(*integers) > 1):
        return True
    others = [f for f in factors if f not in above and f not in fractions]
    others += [f for f in fractions if not isinstance(f.base, Number)]
    merged = Mul(*others).as_coeff_Mul()[1]
    return len(others) > 1 and len(Mul.make_args(merged)) < len(others)


def _factors(product: Tree) -> list[Tree]:
    """Return the factors of a product, of 6x/(3y): 6, x, 1/3, 1/y."""
    return [
        Pow(below, -1, evaluate=False) if isinstance(factor, Pow) and factor.exp == -1 else below
        for factor in _flat(Mul, product)
        for below in (_flat(Mul, factor.base) if getattr(factor, "exp", 0) == -1 else [factor])
    ]


def _flat(kind: type, tree: Tree) -> list[Tree]:
    """The terms of a sum, or factors of a product, as they were written."""
    if not isinstance(tree, kind):
        return [tree]
    return [part for argument in tree.args for part in _flat(kind, argument)]


def is_assignment(tree: Tree) -> bool:
    """`x = 12`, `x = 8+4 = 12`."""
    return isinstance(tree, Eq | And) and is_assignment_relation(tree)


def sides_of(tree: Tree, text: str = "") -> list[tuple[Tree, str]]:
    """Return of an equation or a chain of them the last side, then the first; else the tree
    itself."""
    if not isinstance(tree, Eq | And) or not is_equation(tree):
        last = text.rpartition("=")[2]  # of `P(X=2) = 3/8` the tree is 3/8
        one = not isinstance(tree, Set | Tuple) and _NUMERAL.search(last)  # `x=3, x=4` is two
        return [(tree, last if one else text)]
    last = (take_last_relation(tree).rhs, text.rpartition("=")[2])
    return [last, (take_first_relation(tree).lhs, text.partition("=")[0])]


# === written numbers ===


def _is_as_written(tree: Tree, text: str) -> bool:
    r"""Tell whether the tree is what the text says, not what the parser has worked out: it has each
    numeral, 0 and 1 apart, and nothing was substituted, transposed or a determinant."""
    text = _MIXED.sub(_improper, _SUBSCRIPT.sub(" ", text))
    if _EAGER.search(text):
        return False
    in_tree = _numbers_of(tree)
    # Of `x \approx 12/4` the tree is the right side, of `1/3 \approx 0.3` the left one.
    parts = [_numerals_of(part) for part in text.split(r"\approx")]
    parts = [readings for readings in parts if any(readings)] or parts[:1]
    return any(not reading - in_tree for readings in parts for reading in readings)


def _numerals_of(text: str) -> list[Counter]:
    """Count how often each numeral stands there, 0 and 1 apart; 1,234 is one number or two. A part
    that stands twice counts once: `6, 6` is the set of 6."""
    readings = []
    for reading in (text, _THOUSANDS.sub("", text)):
        parts = dict.fromkeys(part.strip() for part in reading.split(","))
        words = [word for part in parts for word in _NUMERAL.findall(part)]
        numerals = [float(word) if "." in word else int(word) for word in words]
        readings.append(Counter(numeral for numeral in numerals if numeral not in (0, 1)))
    return readings


def _numbers_of(tree: Tree) -> Counter:
    numbers: list[int | float] = []
    for node in preorder_traversal(tree):
        if isinstance(node, Rational):
            numbers += [abs(int(node.p)), int(node.q)]
        elif isinstance(node, Number) and node.is_finite:
            numbers.append(abs(float(node)))
    return Counter(numbers)


def _improper(mixed: re.Match) -> str:
    whole, above, below = map(int, mixed.groups())
    proper = above < below and math.gcd(above, below) == 1
    return f"{whole * below + above}/{below}" if proper else mixed.group()
