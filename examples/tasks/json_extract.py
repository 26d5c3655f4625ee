"""JSON extraction: read a short text, answer with a JSON object that fits a schema.

    prompt       Text: Hotel Aurora: 3 nights with breakfast for Ana Silva.
                 Schema: {"type": "object", "properties": {"guest": {"type": "string"}, ...}, ...}
    completion   ```json
                 {"guest": "Ana Silva", "hotel": "Hotel Aurora", "nights": 3, "breakfast": true}
                 ```

The reward is a share: the properties that are right, among those that the text gives or the answer
has. Right means equal to the gold value and valid against the property's schema. So a property that
is missing costs its share, and one that is made up costs too (where the schema allows no others).
Strings are compared without regard to case and spaces; `enum` or `pattern` can ask for more.

    pip install jsonschema
    python examples/tasks/json_extract.py    # writes the two data files again, always the same
"""

import json
import random
import re
from pathlib import Path

from jsonschema import Draft202012Validator

instruction = "Answer with one JSON object that fits the schema, and leave out what is not said."
datasets = {"json_extract": "json_extract_train.jsonl"}
benchmarks = {"json_extract": "json_extract_test.jsonl"}

NUM_TRAIN, NUM_TEST = 500, 100
TOKEN_IN_OBJECT = re.compile(r'[{}]|"(?:[^"\\\n]+|\\.)*"?')  # a string's braces do not count


def prompt(row: dict) -> str:
    return f"Text: {row['text']}\nSchema: {row['schema']}"


def answer(completion: str) -> str | None:
    """The answer's object, its keys sorted, so that equal objects are equal texts; None if none."""
    _, fence, block = completion.rpartition("```json")
    text = block.partition("```")[0] if fence else last_object(completion)
    try:
        # By default json keeps the last of two equal keys and reads NaN and Infinity.
        read = json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse)
        return json.dumps(read, sort_keys=True) if isinstance(read, dict) else None
    except (ValueError, RecursionError):  # also of a number with thousands of digits
        return None


def grade(completion: str, row: dict) -> float:
    text = answer(completion)
    if text is None:
        return 0.0
    found, expected, schema = json.loads(text), json.loads(row["gold"]), json.loads(row["schema"])
    counted = set(expected) | (set(found) & set(schema["properties"]))
    if schema.get("additionalProperties") is False:
        counted |= set(found)
    validator = Draft202012Validator(schema)
    right = 0
    for name in set(expected) & set(found):
        # Equality first: no validator ever meets a value that is not of the gold value's shape.
        if equal(found[name], expected[name]):
            right += validator.evolve(schema=schema["properties"][name]).is_valid(found[name])
    return right / len(counted) if counted else 1.0


def gold(row: dict) -> str:
    return row["gold"]


def equal(value: object, expected: object) -> bool:
    """Equality of two JSON values; as deep as the expected one at most."""
    if isinstance(expected, str):
        return isinstance(value, str) and value.casefold().split() == expected.casefold().split()
    if isinstance(expected, list):
        same_length = isinstance(value, list) and len(value) == len(expected)
        return same_length and all(map(equal, value, expected))
    if isinstance(expected, dict):
        same_keys = isinstance(value, dict) and set(value) == set(expected)
        return same_keys and all(equal(value[key], expected[key]) for key in expected)
    # 1 and 1.0 are one number to JSON, 1 and true are not; to Python all three are equal.
    return isinstance(value, bool) == isinstance(expected, bool) and value == expected


def last_object(text: str) -> str:
    """The last {...} that no other encloses. One pass: a parse from each brace would take quadratic
    time."""
    opened: list[int] = []
    start = end = position = 0
    while True:
        # Outside of braces a quotation mark is an inch or an unpaired quote, and opens no string.
        if not opened:
            position = text.find("{", position)
            if position < 0:
                return text[start:end]
        token = TOKEN_IN_OBJECT.search(text, position)
        if token is None:
            return text[start:end]
        if token[0] == "{":
            opened.append(token.start())
        elif token[0] == "}":
            start, end = opened.pop(), token.end()
        position = token.end()


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


# === data ===

TEXT, WHOLE, NUMBER, YES_NO = ({"type": t} for t in ("string", "integer", "number", "boolean"))
DATE = {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"}
COLOUR, SKY = {"enum": ["red", "green", "blue", "black"]}, {"enum": ["sunny", "cloudy", "foggy"]}
NAMES = ["Ana Silva", "Ben Okafor", "Chloe Martin", "Dev Patel", "Eva Novak", "Finn Berg"]
PAIRS = [[one, other] for one in NAMES for other in NAMES if one != other]

# Kinds of texts: the properties, each with its values and schema; and the sentences, which need not
# tell all of them.
KINDS = [
    (
        {
            "guest": (NAMES, TEXT),
            "nights": (range(2, 15), WHOLE),
            "hotel": (["Hotel Aurora", "Hotel Bellevue", "Hotel Central"], TEXT),
            "breakfast": ([True, False], YES_NO),
        },
        [
            "{guest} booked {nights} nights at {hotel}.",
            "{hotel}: {nights} nights {breakfast} breakfast for {guest}.",
        ],
    ),
    (
        {
            "item": (["lamp", "chair", "mug", "blanket", "backpack"], TEXT),
            "quantity": (range(1, 10), WHOLE),
            "price": ([half / 2 for half in range(3, 200)], NUMBER),
            "colour": (COLOUR["enum"], COLOUR),
        },
        [
            "Order: {quantity} x {item}, {price} euros each.",
            "At {price} euros a {item}, I take {quantity} in {colour}.",
        ],
    ),
    (
        {
            "city": (["Oslo", "Lima", "Cairo", "Perth", "Turin", "Osaka"], TEXT),
            "degrees": ([half / 2 for half in range(-30, 80)], NUMBER),
            "sky": (SKY["enum"], SKY),
        },
        ["It is {sky} in {city}, {degrees} degrees.", "{city}: {degrees} degrees."],
    ),
    (
        {
            "people": (PAIRS + [[name] for name in NAMES], {"type": "array", "items": TEXT}),
            "topic": (["budget", "hiring", "safety", "roadmap"], TEXT),
            "date": (
                [f"2026-{month:02}-{day:02}" for month in range(1, 13) for day in (3, 17)],
                DATE,
            ),
            "room": (range(1, 41), WHOLE),
        },
        ["{people}: {topic} meeting on {date}.", "Room {room}, {date}: {topic}, with {people}."],
    ),
]


def problem(rng: random.Random) -> dict:
    properties, sentences = rng.choice(KINDS)
    sentence = rng.choice(sentences)
    told = {name: rng.choice(v) for name, (v, _) in properties.items() if f"{{{name}}}" in sentence}
    schema = {
        "type": "object",
        "properties": {name: schema for name, (_, schema) in properties.items()},
        "required": [name for name in properties if all(f"{{{name}}}" in s for s in sentences)],
        "additionalProperties": False,
    }
    text = sentence.format(**{name: spoken(value) for name, value in told.items()})
    # As texts: a table of rows (Arrow, parquet) would give every object the keys of all others.
    return {"text": text, "schema": json.dumps(schema), "gold": json.dumps(told)}


def spoken(value: object) -> str:
    if isinstance(value, bool):
        return "with" if value else "without"
    return " and ".join(value) if isinstance(value, list) else str(value)


def make_data() -> dict[str, str]:
    """File name -> contents. No text is in both files."""
    rng, rows = random.Random(0), {}
    while len(rows) < NUM_TEST + NUM_TRAIN:
        row = problem(rng)
        rows[row["text"]] = json.dumps(row) + "\n"
    lines = list(rows.values())
    return {
        "json_extract_test.jsonl": "".join(lines[:NUM_TEST]),
        "json_extract_train.jsonl": "".join(lines[NUM_TEST:]),
    }


if __name__ == "__main__":
    for name, text in make_data().items():
        Path(__file__).with_name(name).write_text(text, "utf-8")
