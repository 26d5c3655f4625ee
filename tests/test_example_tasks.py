"""The example tasks: what each grades as right, wrong and partly right, and what cheats get."""

import ctypes
import http.server
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common.tasks.task import Task

TASKS = Path(__file__).parents[1] / "examples" / "tasks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"example_task_{name}", TASKS / f"{name}.py")
    task = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task)
    return task


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (TASKS / name).read_text().splitlines()]


countdown, code, json_extract = load("countdown"), load("code"), load("json_extract")
instructions = load("instructions")


# === all tasks ===


@pytest.mark.parametrize("task", [countdown, json_extract, instructions])
def test_the_files_are_what_the_task_makes(task):
    for name, text in task.make_data().items():
        assert (TASKS / name).read_text() == text, f"run {task.__file__}"


@pytest.mark.parametrize("task", [countdown, code, json_extract, instructions])
def test_a_task_has_what_the_trainers_read(task):
    files = [*task.datasets.values(), *task.benchmarks.values()]
    rows = [row for file in files if isinstance(file, str) for row in rows_of(file)]
    for row in rows:
        assert task.instruction not in task.prompt(row)
        assert isinstance(task.prompt(row), str)
        assert isinstance(task.gold(row), str)
    prompts = [task.prompt(row) for row in rows]
    assert len(set(prompts)) == len(prompts)  # so that no held-out problem is trained on
    lines = Path(task.__file__).read_text().splitlines()
    imported = [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
    assert "common" not in {name.partition(".")[0] for name in imported}  # it stands alone


# === countdown ===


def tagged(expression: str) -> str:
    return f"Let me see. <answer>{expression}</answer>"


THREE = {"numbers": [3, 5, 12], "target": 24}
EIGHTS = {"numbers": [8, 3, 8, 3], "target": 24}


@pytest.mark.parametrize(
    ("expression", "row"),
    [
        ("(5 - 3) * 12", THREE),
        (" 12*(5-3) ", THREE),
        ("-(3 - 5) * 12", THREE),
        ("((((5 - 3)))) * 12", THREE),
        ("8 / (3 - 8 / 3)", EIGHTS),
        ("1</answer> no, <answer>(5 - 3) * 12", THREE),
    ],
)
def test_countdown_right(expression, row):
    assert countdown.grade(tagged(expression), row) == 1.0


@pytest.mark.parametrize(
    "expression",
    [
        "3 + 5 + 12",  # another value
        "24",
        "12 + 12",
        "(5 - 3) * 12 * 1",
        "12 * 5 - 3 * 12",  # a number twice
        "12 + 5 + 3 + 4",
        "35 - 12 + 1",  # numbers joined
        "(5 - 3) * 12 = 24",
        "(5 - 3) * 12, 1",
        "(5.0 - 3) * 12",
        "(5 - 3) * 1_2",
        "(5 - 3) * 0xC",
        "(True + 1) * 12",
        "(5 - 3) * １２",
        "(٥ - 3) * 12",
        "(5 - 3) * 012",
        "5 ** 3 - 12",
        "9**9**9**9",
        "12 // 5 // 3",
        "12 / (5 - 5)",
        "12 / (3 - 3)",
        "5 - 3 12",
        "12 (5 - 3)",
        "(5 - 3) *\n12",
        "__import__('os').system('true')",
        "(" * 100_000 + "5" + ")" * 100_000,
        "-" * 99 + "5",
        "(" * 49 + "5" + ")" * 49,
        "(" * 99,
        "9" * 100_000,
        "(5 - 3) * 12 # \0",
        "\ud800",
        "(25 - 4) * 2",
        "(5 - 3) * 12</answer> or <answer>1",
        "<answer>(5 - 3) * 12</answer>",
    ],
)
def test_countdown_wrong(expression):
    assert countdown.grade(tagged(expression), THREE) == 0.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>1 + 2</answer>", "1 + 2"),
        ("<answer>1</answer> <answer>2</answer>.", "2"),
        ("<answer>1</answer> <answer>2", "1"),
        ("<answer><answer>1</answer>", "1"),
        ("1 + 2", None),
        ("<answer> </answer>", None),
        ("1</answer>", None),
        ("</answer>1<answer>", None),
        ("", None),
        ("<answer>" * 200_000, None),
        ("</answer>" * 200_000, None),
    ],
)
def test_countdown_answer(completion, answer):
    assert countdown.answer(completion) == answer


def test_countdown_example_solves_nothing_and_the_solutions_do():
    for row in rows_of("countdown_train.jsonl") + rows_of("countdown_test.jsonl"):
        assert countdown.grade(countdown.instruction, row) == 0.0
        assert countdown.grade(tagged(countdown.gold(row)), row) == 1.0


def test_countdown_sets_are_disjoint():
    train, test = (
        {(tuple(sorted(row["numbers"])), row["target"]) for row in rows_of(name)}
        for name in ("countdown_train.jsonl", "countdown_test.jsonl")
    )
    assert (len(train), len(test), len(train & test)) == (1000, 200, 0)


# === JSON ===

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "count": {"type": "integer"},
        "open": {"type": "boolean"},
        "colour": {"enum": ["red", "blue"]},
        "tags": {"$ref": "#/$defs/tags"},
    },
    "required": ["name", "count", "open", "colour"],
    "additionalProperties": False,
    "$defs": {"tags": {"type": "array", "items": {"type": "string"}}},
}
GOLD = {"name": "Ana Silva", "count": 1, "open": True, "colour": "red"}


def json_row(gold: dict = GOLD, **changes) -> dict:
    return {"text": "", "schema": json.dumps(SCHEMA | changes), "gold": json.dumps(gold)}


def changed(**values) -> str:
    return json.dumps(GOLD | values)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (changed(), 1.0),
        (f"Here:\n```json\n{changed()}\n```\nDone.", 1.0),
        (f"```json\n{changed()}", 1.0),
        (f"```\n{changed()}\n```", 1.0),
        (changed(name=" ana  SILVA"), 1.0),
        (changed(count=1.0), 1.0),
        (changed(name="Ana"), 0.75),
        (changed(count=True), 0.75),
        (changed(count="1"), 0.75),
        (changed(count=2), 0.75),
        (changed(count=10**4000), 0.75),
        (changed(open=1), 0.75),
        (changed(open="true"), 0.75),
        (changed(colour="Red"), 0.75),  # equal, but no value of the enum
        (changed(colour=None), 0.75),
        (changed(name=["Ana Silva"]), 0.75),
        (changed(tags=["a"]), 0.8),  # made up
        (changed(other=1), 0.8),
        (changed(**{str(n): n for n in range(36)}), 0.1),
        (changed().replace('"count": 1', '"count": 1e999'), 0.75),
        ('{"name": "Ana Silva"}', 0.25),
        ("{}", 0.0),
        (json.dumps({"object": GOLD}), 0.0),
        (f"{changed(name='Eva')} or {changed()}", 1.0),
        (f"{changed()} or {changed(name='Eva')}", 0.75),
        (f"```json\n{changed()}\n``` that is {{}}", 1.0),
    ],
)
def test_json_reward(completion, reward):
    assert json_extract.grade(completion, json_row()) == pytest.approx(reward)


def test_json_other_rules():
    tagged_row = json_row(GOLD | {"tags": ["a", "b"]})
    assert json_extract.grade(changed(tags=["a", "b"]), tagged_row) == 1.0  # behind a $ref
    assert json_extract.grade(changed(tags=["b", "a"]), tagged_row) == 0.8
    assert json_extract.grade(changed(), tagged_row) == 0.8
    assert json_extract.grade(changed(other=1), json_row(additionalProperties=True)) == 1.0
    assert json_extract.grade("{}", json_row(gold={})) == 1.0
    # Equal to a wrong gold value is not enough: it must fit the schema as well.
    assert json_extract.grade(changed(count=1.5), json_row(GOLD | {"count": 1.5})) == 0.75


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ('{"b": 1, "a": {"c": []}}', '{"a": {"c": []}, "b": 1}'),
        ('a {brace and "5" {"a": 1}', '{"a": 1}'),
        ('a 5" pipe: {"a": "}{"}', '{"a": "}{"}'),
        (r'{"a": "\"}"} and }', r'{"a": "\"}"}'),
        ('{"a": {"b": 1}} {', '{"a": {"b": 1}}'),
        ('{"a": "```"}', '{"a": "```"}'),
        ("no object", None),
        ("", None),
        ("{a: 1}", None),
        ("{'a': 1}", None),
        ('{"a": 1,}', None),
        ('{"a": 1', None),
        ('```json\n[{"a": 1}]\n```', None),
        ('{"a": 1}\n```json\nnothing\n```', None),
        ("```json\nnull\n```", None),
        ('{"a": 1, "a": 2}', None),
        ('{"b": {"a": 1, "a": 2}}', None),
        ('{"a": NaN}', None),
        ('{"a": -Infinity}', None),
        ('{"a": ' + "9" * 5000 + "}", None),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", None),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, None),
    ],
)
def test_json_answer(completion, answer):
    assert json_extract.answer(completion) == answer


@pytest.mark.parametrize(
    "unit",
    ["{", "}", "{}", '{"', '"', '{"\\"', '\\"', '{"a":', "```json", "{ ", '{"a": "\n', "{\\"],
)
def test_json_takes_linear_time(unit):
    began = time.process_time()
    json_extract.grade(unit * 100_000, json_row())
    json_extract.grade("{" + unit * 100_000, json_row())
    assert time.process_time() - began < 2


def test_json_values_that_are_deep_or_long_meet_no_validator():
    deep = "[" * 400 + "]" * 400
    nested = changed().replace('"Ana Silva"', deep)
    assert json_extract.grade(nested, json_row()) == 0.75
    assert json_extract.grade(changed(name="a" * 1_000_000), json_row()) == 0.75


def test_json_gold_objects_get_all():
    rows = rows_of("json_extract_train.jsonl") + rows_of("json_extract_test.jsonl")
    assert len(rows) == 600
    for row in rows:
        assert json_extract.grade(f"```json\n{json_extract.gold(row)}\n```", row) == 1.0
        assert json_extract.grade("{}", row) == 0.0


# === instructions ===

# Kind of constraint, parameter, answers that meet it, answers that do not.
CHECKED = [
    (
        "max_words",
        "4",
        ["One two three four.", "it's a well-made thing"],
        ["One, two, three, 4, 5"],
    ),
    ("min_words", "4", ["One two three four."], ["One two three", "One two well-made"]),
    (
        "sentences",
        "2",
        ["It is 3.5 km away. Go there now!", 'He said "go there." She went', "Is it so?! It is."],
        ["It is far away.", "It is. It was. It will be.", "So it is... and was... and was."],
    ),
    (
        "bullets",
        "2",
        ["- one two\n- three", "Here:\n  * one two\n  * three"],
        ["- one two - three", "-one two\n-three four", "- one\n- two\n- three"],
    ),
    (
        "json",
        "name and size",
        ['{"name": "a cat here", "size": 2}', '```json\n{"size": 2, "name": "a cat here"}\n```'],
        [
            '{"name": "a cat here"}',
            'It is {"name": "a cat", "size": 2}',
            '["name", "and", "size"]',
            '{"name": "a cat here", "size": 2, "age": 3}',
            '{"name": "a cat here", "size": ' + "[" * 100_000,
        ],
    ),
    (
        "script",
        "Greek",
        ["\u0397 \u03b3\u03ac\u03c4\u03b1 \u03b5\u03af\u03bd\u03b1\u03b9 9!"],
        ["The cat is here", "\u0397 \u03b3\u03ac\u03c4\u03b1 is", "1 2 3 4"],
    ),
    (
        "lower_case",
        "",
        ["a cat is here", "\u03b7 \u03b3\u03ac\u03c4\u03b1 \u03b5\u03b4\u03ce"],
        ["A cat is here"],
    ),
    ("no_commas", "", ["A cat; a dog; a man"], ["A cat, a dog, a man"]),
    (
        "repeats",
        "new",
        ["New is new, I think", 'A new car, a "new" man'],
        ["new new new", "It is newer, the new newt", "a new one here"],
    ),
    (
        "begins_with",
        "Well",
        ["Well, it is so", '"Well it is so"', "well it is so"],
        ["It is well so", "Wells are so deep"],
    ),
    (
        "ends_with",
        "that's all",
        ["And so that's all.", "So that's all!", "That's it. That's all"],
        ["That's all for now", "that is all"],
    ),
]


def test_every_constraint_is_tested():
    assert [kind for kind, *_ in CHECKED] == list(instructions.CONSTRAINTS)


@pytest.mark.parametrize(("kind", "value", "met", "missed"), CHECKED, ids=lambda x: str(x)[:12])
def test_constraints(kind, value, met, missed):
    row = {"constraints": json.dumps([[kind, value]])}
    assert [instructions.grade(text, row) for text in met] == [1.0] * len(met)
    assert [instructions.grade(text, row) for text in missed] == [0.0] * len(missed)


def test_the_reward_is_the_share_of_constraints():
    row = {"constraints": json.dumps([["lower_case", ""], ["no_commas", ""], ["max_words", "4"]])}
    assert instructions.grade("a cat is here", row) == 1.0
    assert instructions.grade("a cat, is here", row) == pytest.approx(2 / 3)
    assert instructions.verdicts("A cat, a dog", row["constraints"]) == {
        "lower_case": False,
        "no_commas": False,
        "max_words": True,
    }


@pytest.mark.parametrize("answer", ["", "ok", "\n- -\n", "no. no."])
def test_an_answer_of_two_words_earns_nothing(answer):
    for row in rows_of("instructions_train.jsonl"):
        assert instructions.grade(answer, row) == 0.0


def test_parameters_and_subjects_are_held_out():
    used = {}
    for name in ("train", "test"):
        rows = rows_of(f"instructions_{name}.jsonl")
        listed = [pair for row in rows for pair in json.loads(row["constraints"])]
        used[name] = {tuple(pair) for pair in listed if pair[1]}
        assert {kind for kind, _ in listed} == set(instructions.CONSTRAINTS)
    assert used["train"].isdisjoint(used["test"])


# === code ===

DOUBLE = {
    "tests": ["assert double(3) == 6", "assert double(-1) == -2", "assert double(0) == 0"]
    + ["assert double(50) == 100"]
}
RIGHT = "def double(n):\n    return 2 * n\n"


def fenced(text: str) -> str:
    return f"So:\n```python\n{text}\n```\n"


def grade(text: str, row: dict = DOUBLE) -> float:
    return code.grade(fenced(text), row)


def unshares() -> bool:
    """Whether this kernel gives a process network and process namespaces of its own."""
    child = os.fork()
    if child == 0:
        os._exit(ctypes.CDLL(None).unshare(0x70000000) != 0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (RIGHT, 1.0),
        (f"{RIGHT}print(double(1), end='')\nimport sys; print(1, file=sys.stderr)", 1.0),
        ("double = lambda n: n + n", 1.0),
        ("def double(n):\n    return 2.0 * n", 1.0),  # as in Python, 6.0 == 6
        ("def double(n):\n    return 6", 0.25),
        ("def double(n):\n    return 2 * n if n > 0 else None", 0.5),
        ("def double(n):\n    return 2 * n if n > 0 else 1 / 0", 0.5),
        ("def double(n):\n    return 2 * n if n > 0 else exit(0)", 0.5),
        ("def double(n):\n    print(2 * n)", 0.0),
        ("def triple(n):\n    return 3 * n", 0.0),
        ("def double(n) return 2 * n", 0.0),
        ("\0", 0.0),
        ("\ud800", 0.0),
        (f"{RIGHT}raise ValueError", 0.0),
    ],
)
def test_code_reward(text, reward):
    assert grade(text) == reward


@pytest.mark.parametrize(
    "text",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "class Equal:\n    __eq__ = lambda self, other: True\ndouble = lambda n: Equal()",
        "class Equal(int):\n    __eq__ = lambda self, other: True\ndouble = lambda n: Equal(1)",
        "import builtins\nbuiltins.AssertionError = None\ndouble = lambda n: 1",
        "import builtins\nbuiltins.repr = lambda value: 'True'\ndouble = lambda n: 1",
        "double = lambda n: type('Sly', (), {'__repr__': lambda self: '6 or 1'})()",
        "double = lambda n: type('Sly', (), {'__repr__': lambda self: '1\\n6\\n-2\\n0\\n'})()",
        "print('1\\n' * 9)",
        "import os\nfor fd in range(9):\n    try: os.write(fd, b'1\\n' * 9)\n    except OSError: 0",
        "import os\nos.write(3, b'\\xff\\n' + b'-' * 9999 + b'1\\n' + b'(' * 9999 + b'\\n')",
        "double = lambda n: '#' * 50_000",
        "double = lambda n: 9**99999",
        "double = lambda n: {n: [{n}]}",
    ],
)
def test_code_cheats_get_nothing(text):
    assert grade(text) == 0.0


def test_code_cannot_find_what_the_tests_expect():
    text = "import sys\nframe, seen = sys._getframe(), ''\n"
    text += "while frame := frame.f_back: seen += str([frame.f_locals, frame.f_globals])\n"
    text += "assert 'double(3888)' in seen and str(2 * 3888) not in seen\n"
    assert grade(text + RIGHT, {"tests": ["assert double(3888) == 7776"]}) == 1.0


BOMBS = {
    "memory": "x = bytearray(10**10)",
    "memory_by_steps": "x = []\nwhile True: x.append(bytearray(10**6))",
    "recursion": "double = lambda n: double(n)",
    "crash": "import ctypes\nctypes.string_at(0)",
    "stdin": "double = lambda n: input()",
    "big_file": "open('big', 'wb').write(b'0' * 2**22)",
    "forks": "import os\nfor _ in range(50):\n    if os.fork() == 0: os._exit(0)\n1 / 0",
    "threads": "import threading, time\n"
    "for _ in range(50): threading.Thread(target=time.sleep, args=(60,)).start()\n1 / 0",
    "kills_its_group": "import os\nos.killpg(0, 9)\nwhile True: pass",
    "closes_all": "import os\nos.closerange(0, 99)",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_code_bombs_cost_their_own_grade(bomb, monkeypatch):
    monkeypatch.setattr(code, "TIME_LIMIT_S", 1.5)
    began = time.monotonic()
    assert grade(BOMBS[bomb]) == 0.0
    assert time.monotonic() - began < 4
    assert grade(RIGHT) == 1.0


def test_code_before_an_endless_loop_counts(monkeypatch):
    monkeypatch.setattr(code, "TIME_LIMIT_S", 0.7)
    began = time.monotonic()
    assert grade("def double(n):\n    while n == 0: pass\n    return 2 * n") == 0.5
    assert time.monotonic() - began < 3


def test_code_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(code, "TIME_LIMIT_S", 1.5)
    monkeypatch.setattr(code.tempfile, "tempdir", str(tmp_path))
    text = "import os, tempfile\nos.mkdir('a')\nopen('a/b', 'w').write('x')\nos.chmod('a', 0)\n"
    assert grade(f"{text}open(tempfile.mkstemp()[1], 'w')\n{RIGHT}") == 1.0
    assert list(tmp_path.iterdir()) == []
    environment = "import os\ndouble = lambda n: 2 * n if len(os.environ) < 4 else 0"
    assert grade(environment) == 1.0


def daemon(marker: Path) -> str:
    """Code whose grandchild leaves the process group and writes a file a second later."""
    return (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(1)\n"
        f"        open({str(marker)!r}, 'w')\n"
        "    os._exit(0)\n" + RIGHT
    )


def test_code_daemons_and_network(tmp_path):
    if not unshares():
        pytest.skip("no namespaces on this kernel")
    grade(daemon(tmp_path / "alive"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        connect = f"import socket\nsocket.create_connection({address}, timeout=1)\n{RIGHT}"
        assert grade(connect) == 0.0
    time.sleep(1.5)
    assert not (tmp_path / "alive").exists()


def test_code_dies_with_the_process_that_grades(tmp_path):
    text = f"import time\nopen({str(tmp_path / 'began')!r}, 'w')\ntime.sleep(1)\n"
    text = fenced(f"{text}open({str(tmp_path / 'alive')!r}, 'w')")
    load_task = "import importlib.util as u, sys\ns = u.spec_from_file_location('t', sys.argv[1])\n"
    load_task += "t = u.module_from_spec(s)\ns.loader.exec_module(t)\n"
    grader = subprocess.Popen(
        [sys.executable, "-c", f"{load_task}t.grade({text!r}, {DOUBLE})", code.__file__],
        env={"TMPDIR": str(tmp_path)},
    )
    deadline = time.monotonic() + 10
    while not (tmp_path / "began").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    grader.send_signal(signal.SIGKILL)
    grader.wait()
    assert (tmp_path / "began").exists()
    time.sleep(1.5)
    assert not (tmp_path / "alive").exists()


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("```python\nx = 1\n```", "x = 1"),
        ("```python\nx = 1\n``` or\n```python\nx = 2\n```", "x = 2"),
        ("```python\nx = 1\n```\n```\nother\n```", "x = 1"),
        ("```python\nx = '```'\n```", "x = '```'"),
        ("```python\nx = 1", None),
        ("```python\nx = 1\n```\n```python\nx = 2", None),
        ("```python\n\n```", None),
        ("x = 1", None),
        ("", None),
        ("```python" * 100_000, None),
    ],
)
def test_code_answer(completion, answer):
    assert code.answer(completion) == answer


@pytest.mark.parametrize(
    "test",
    ["assert double(3)", "assert double(3) is 6", "assert double(3) == six", "double(3) == 6", ""],
)
def test_code_refuses_other_forms_of_tests(test):
    with pytest.raises(ValueError, match="not of the form|malformed"):
        code.grade(fenced(RIGHT), {"tests": [test]})


def test_code_solutions_pass_their_tests():
    rows = rows_of("code_train.jsonl") + rows_of("code_test.jsonl")
    assert len(rows) == 80
    for row in rows:
        assert grade(code.gold(row), row) == 1.0, row["problem"]
        expected = [test.rpartition(" == ")[2] for test in row["tests"]]
        share = max(expected.count(value) for value in expected) / len(expected)
        assert share <= 0.5, f"a constant earns {share}: {row['problem']}"


# === a judge ===


class Judge(http.server.BaseHTTPRequestHandler):
    """Replies what the server's list says, in turn: a text, or a status code."""

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        self.server.asked.append(json.loads(self.rfile.read(length)))
        reply = self.server.replies.pop(0)
        self.send_response(reply if isinstance(reply, int) else 200)
        self.end_headers()
        message = {"message": {"content": reply}}
        self.wfile.write(json.dumps({"choices": [message]}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def judge():
    server = http.server.HTTPServer(("127.0.0.1", 0), Judge)
    server.asked, server.replies = [], []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_judge_of_the_docs(judge, tmp_path, monkeypatch):
    page = (TASKS.parents[1] / "docs" / "tasks.md").read_text()
    code = page.partition("## A judge")[2].partition("```python\n")[2].partition("```")[0]
    file = tmp_path / "judge.py"
    assert "(0, 1, 3)" in code
    file.write_text(code.replace("(0, 1, 3)", "(0, 0, 0)"))  # no pauses
    monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{judge.server_port}/v1/chat/completions")
    with Task(str(file)) as task:
        judge.replies += [503] * 3  # grade() is tried once with an empty completion
        (problem,) = task.problems([{"question": "Why?"}], "mine")
        assert problem.messages[-1]["content"] == "Why?"
        for replies, reward, outcome in [
            (["7"], 0.7, "partial"),
            (["A grade of 10."], 1.0, "correct"),
            (["100"], 1.0, "correct"),
            ([503, "4"], 0.4, "partial"),
            (["no"], 0.0, "crash"),
            ([503, 503, 503], 0.0, "crash"),
        ]:
            judge.asked.clear()
            judge.replies[:] = replies
            (verdict,) = task.grade(["Because."], [problem])
            assert (verdict.reward, verdict.outcome) == (reward, outcome)
            assert len(judge.asked) == len(replies)
            assert "Because." in judge.asked[0]["messages"][0]["content"]
        assert "no grade from http" in verdict.message
