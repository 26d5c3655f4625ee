"""Countdown: reach a target with some numbers, each used exactly once (TinyZero, nano-aha-moment).

    prompt       Make 24 out of the numbers 3, 5, 12.
    completion   5 - 3 is 2, and 2 times 12 is 24. <answer>(5 - 3) * 12</answer>

The reward is 1 if the last <answer> of the completion is an expression of + - * / and brackets that
uses the given numbers and equals the target; else it is 0. The expression is read, never run: no
`eval`. Fractions keep the arithmetic exact, so that 8 / (3 - 8 / 3) is 24 and not 23.999.

    python examples/tasks/countdown.py    # writes the two data files again, always the same
"""

import ast
import json
import operator
import random
import re
from fractions import Fraction
from pathlib import Path

# The example needs a number above 20, so that no problem of ours has it as its answer.
instruction = (
    "Use every number exactly once, with + - * / and brackets. Write your expression between "
    "<answer> and </answer>, for example <answer>(25 - 4) * 2</answer>."
)
datasets = {
    "countdown": "countdown_train.jsonl",
    "countdown-3to4": ("Jiayi-Pan/Countdown-Tasks-3to4", "default", "train"),  # TinyZero's
}
benchmarks = {"countdown": "countdown_test.jsonl"}
columns = {"numbers": ("numbers", "nums"), "target": ("target",)}

NUM_TRAIN, NUM_TEST = 1000, 200
MAX_CHARS = 100  # three numbers take far less; and 100 characters cannot nest deeply
OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,  # exact: it divides fractions
}


def prompt(row: dict) -> str:
    return f"Make {row['target']} out of the numbers {', '.join(map(str, row['numbers']))}."


def answer(completion: str) -> str | None:
    """Return what stands in the last pair of answer tags; None if there is no pair or it is
    empty."""
    before = completion.rpartition("</answer>")[0]
    _, tag, expression = before.rpartition("<answer>")
    return (expression.strip() or None) if tag else None


def grade(completion: str, row: dict) -> float:
    try:
        value, used = evaluate(answer(completion) or "")
    except (ValueError, ZeroDivisionError):
        return 0.0
    return float(value == row["target"] and sorted(used) == sorted(row["numbers"]))


def gold(row: dict) -> str:
    return row.get("solution", "a solution is not known")


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """The value of an expression and the numbers in it. Raises ValueError for all that is not
    whole numbers, + - * / and brackets, and ZeroDivisionError."""
    # Python would read 1_0, 0xA, 1e1 and True as numbers, and fullwidth digits as names.
    if len(expression) > MAX_CHARS or not re.fullmatch(r"[0-9+\-*/() ]+", expression):
        raise ValueError("not an expression of whole numbers")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"not an expression: {error}") from error
    used: list[int] = []
    return value_of(tree.body, used), used


def value_of(node: ast.expr, used: list[int]) -> Fraction:
    """The value of a node of the syntax tree; appends the numbers below it to `used`."""
    if isinstance(node, ast.Constant):
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value_of(node.operand, used)
    # Neither ** nor // is among the operations: 9**9**9 would compute for ever.
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](value_of(node.left, used), value_of(node.right, used))
    raise ValueError(f"{type(node).__name__} is not allowed")


# === data ===


def problem(rng: random.Random) -> dict | None:
    """Three numbers of 1 to 20 and a random expression of them, if its value suits as a target."""
    numbers = [rng.randint(1, 20) for _ in range(3)]
    a, b, c = rng.sample(numbers, 3)
    first, second = rng.choices("+-*/", k=2)
    solution = rng.choice([f"({a} {first} {b}) {second} {c}", f"{a} {first} ({b} {second} {c})"])
    try:
        value, _ = evaluate(solution)
    except ZeroDivisionError:
        return None
    if value.denominator != 1 or not 1 <= value <= 100:
        return None
    return {"numbers": numbers, "target": int(value), "solution": solution}


def make_data() -> dict[str, str]:
    """File name -> contents. No problem is in both files, in whatever order its numbers stand."""
    rng, rows = random.Random(0), {}
    while len(rows) < NUM_TEST + NUM_TRAIN:
        if row := problem(rng):
            rows.setdefault((tuple(sorted(row["numbers"])), row["target"]), row)
    lines = [json.dumps(row) + "\n" for row in rows.values()]
    return {
        "countdown_test.jsonl": "".join(lines[:NUM_TEST]),
        "countdown_train.jsonl": "".join(lines[NUM_TEST:]),
    }


if __name__ == "__main__":
    for name, text in make_data().items():
        Path(__file__).with_name(name).write_text(text, "utf-8")
