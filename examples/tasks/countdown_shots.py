"""Countdown for a small model: the same task behind worked examples, as turns of the chat.

SmolLM2-135M answers the bare prompt with prose. Behind examples it writes expressions, now and then
a right one, and GRPO has something to begin with (docs/pretrained.md).
"""

import countdown
from countdown import answer, benchmarks, columns, datasets, gold, grade  # noqa: F401

instruction = ""  # the examples say it

EXAMPLES = [
    ([3, 16, 4], 15, "16 + 3 - 4"),
    ([5, 9, 6], 39, "5 * 9 - 6"),
]


def prompt(row: dict) -> list[dict]:
    turns = []
    for numbers, target, expression in EXAMPLES:
        asked = countdown.prompt({"numbers": numbers, "target": target})
        turns.append({"role": "user", "content": asked})
        turns.append({"role": "assistant", "content": f"<answer>{expression}</answer>"})
    return [*turns, {"role": "user", "content": countdown.prompt(row)}]
