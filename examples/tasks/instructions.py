"""Instructions: answer briefly, under one to three constraints that a program can check.

    prompt       Tell me about the sea.
                 Use at most 12 words. Use no commas.
    completion   The sea is wide and salty and full of fish.

The reward is the share of the constraints that are met. An answer of fewer than three words earns
nothing, since the empty answer has no commas and no capital letters. Nothing else is asked of the
answer: not that it is true, and not that it is about its subject.

A kind of constraint is one row of CONSTRAINTS, after IFEval's (arXiv 2311.07911). Add yours there.
Held-out problems have other subjects and other parameters than those to train on.

    python examples/tasks/instructions.py    # writes the two data files again, always the same
"""

import json
import random
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

instruction = "Answer briefly, with nothing but the answer."
datasets = {"instructions": "instructions_train.jsonl"}
benchmarks = {"instructions": "instructions_test.jsonl"}

NUM_TRAIN, NUM_TEST = 600, 100
MIN_WORDS = 3


@dataclass(frozen=True)
class Constraint:
    ask: str  # what the prompt says; {} is the parameter
    is_met: Callable[[str, str], bool]  # of an answer and a parameter
    train: tuple[str, ...] = ("",)  # parameters to train on,
    test: tuple[str, ...] = ("",)  # and to hold out
    not_with: tuple[str, ...] = ()  # constraints that cannot be met together with this one


# === constraints ===


def words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def num_sentences(text: str) -> int:
    """Count the stretches of text that end with . ! or ? or with the text; 3.5 is one number."""
    return len([part for part in re.split(r"[.!?]+[\"')\]]*(?:\s|$)", text) if words(part)])


def num_bullets(text: str) -> int:
    return len(re.findall(r"^\s*[-*] +\S", text, re.MULTILINE))


def is_json_with(text: str, keys: str) -> bool:
    """Tell whether a text is a JSON object with these keys, with or without a fence around it."""
    fenced = re.fullmatch(r"```(?:json)?\n(.*)\n```", text, re.DOTALL)
    try:
        read = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return isinstance(read, dict) and sorted(read) == sorted(keys.split(" and "))


def is_written_in(text: str, script: str) -> bool:
    """Tell whether a text has letters, and all of them are of a script, such as Greek."""
    letters = [letter for letter in text if letter.isalpha()]
    names = [unicodedata.name(letter, "") for letter in letters]
    return bool(names) and all(name.startswith(script.upper()) for name in names)


CONSTRAINTS = {
    "max_words": Constraint(
        "Use at most {} words.",
        lambda text, n: len(words(text)) <= int(n),
        ("8", "12", "20"),
        ("10", "15"),
        not_with=("min_words",),
    ),
    "min_words": Constraint(
        "Use at least {} words.",
        lambda text, n: len(words(text)) >= int(n),
        ("15", "25"),
        ("20",),
    ),
    "sentences": Constraint(
        "Write exactly {} sentences.",
        lambda text, n: num_sentences(text) == int(n),
        ("2", "4"),
        ("3",),
        not_with=("bullets", "json"),
    ),
    "bullets": Constraint(
        'Write exactly {} bullet points, each on a line that begins with "- ".',
        lambda text, n: num_bullets(text) == int(n),
        ("2", "4"),
        ("3",),
        not_with=("json",),
    ),
    "json": Constraint(
        "Answer with one JSON object that has the keys {}, and with nothing else.",
        is_json_with,
        ("name and size", "colour and use", "what and where"),
        ("title and text", "kind and place"),
        not_with=("min_words", "script", "no_commas", "begins_with", "ends_with"),
    ),
    "script": Constraint(
        "Write in {} letters only.",
        is_written_in,
        ("Cyrillic", "Hebrew"),
        ("Greek",),
        not_with=("repeats", "begins_with", "ends_with"),
    ),
    "lower_case": Constraint("Use no capital letters.", lambda text, _: text == text.lower()),
    "no_commas": Constraint("Use no commas.", lambda text, _: "," not in text),
    "repeats": Constraint(
        'Use the word "{}" exactly twice.',
        lambda text, word: [w.lower() for w in words(text)].count(word) == 2,
        ("good", "old", "many", "small"),
        ("new", "great"),
    ),
    "begins_with": Constraint(
        'Begin with the word "{}".',
        lambda text, word: words(text.lower())[:1] == [word.lower()],
        ("Well", "Today", "Often", "People"),
        ("Sometimes", "Here"),
    ),
    "ends_with": Constraint(
        'End with the words "{}".',
        lambda text, phrase: words(text.lower())[-2:] == phrase.split(),
        ("thank you", "the end", "for now"),
        ("good luck", "that's all"),
    ),
}


# === the task ===


def prompt(row: dict) -> str:
    asked = [CONSTRAINTS[kind].ask.format(value) for kind, value in json.loads(row["constraints"])]
    return f"{row['request']}\n{' '.join(asked)}"


def grade(completion: str, row: dict) -> float:
    met = verdicts(completion, row["constraints"]).values()
    return sum(met) / len(met)


def gold(row: dict) -> str:
    return row["constraints"]


def verdicts(completion: str, constraints: str) -> dict[str, bool]:
    """Return which constraints a completion meets, by their kinds."""
    text = completion.strip()
    enough = len(words(text)) >= MIN_WORDS
    listed = json.loads(constraints)
    return {kind: enough and CONSTRAINTS[kind].is_met(text, value) for kind, value in listed}


# === data ===

REQUESTS = ("Tell me about {}.", "What do people like about {}?", "Why do people need {}?")
REQUESTS += ("Describe {} to a child.", "Write something about {}.")
TRAIN_SUBJECTS = """the sea, bread, winter, bicycles, the moon, good teachers, music, rice, trees
cities, sleep, dogs, books, football, rain, clocks, bridges, birthdays, salt, maps, gardens, coffee
trains, letters, deserts, honey, kites, libraries, markets, stars"""
TEST_SUBJECTS = """forests, tea, summer, boats, the sun, good friends, dancing, cheese, mountains
cats"""


def problem(rng: random.Random, held_out: bool) -> dict:
    subject = rng.choice(re.split(", |\n", TEST_SUBJECTS if held_out else TRAIN_SUBJECTS))
    chosen: dict[str, str] = {}
    for kind in rng.sample(list(CONSTRAINTS), rng.randint(1, 3)):
        own = CONSTRAINTS[kind]
        if not any(kind in CONSTRAINTS[o].not_with or o in own.not_with for o in chosen):
            chosen[kind] = rng.choice(own.test if held_out else own.train)
    # As a text: a table of rows (Arrow, parquet) would give every object the keys of all others.
    return {
        "request": rng.choice(REQUESTS).format(subject),
        "constraints": json.dumps(list(chosen.items())),
    }


def make_data() -> dict[str, str]:
    """File name -> contents."""
    files = {}
    for name, number, held_out in (("test", NUM_TEST, True), ("train", NUM_TRAIN, False)):
        rng, rows = random.Random(number), {}
        while len(rows) < number:
            row = problem(rng, held_out)
            rows[prompt(row)] = json.dumps(row) + "\n"
        files[f"instructions_{name}.jsonl"] = "".join(rows.values())
    return files


if __name__ == "__main__":
    for name, text in make_data().items():
        Path(__file__).with_name(name).write_text(text, "utf-8")
