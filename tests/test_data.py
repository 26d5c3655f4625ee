"""Loading, splitting and cleaning of problems; rendering of prompts."""

import copy
import dataclasses
import json
import random
import re
import shutil
from pathlib import Path

import datasets
import pytest
from conftest import SEED, problem_of
from huggingface_hub import constants

import evaluate
import opd
from common.model.tokenizer import load_tokenizer
from common.run.errors import UserError
from common.run.inputs import ROOT, hash_of_source, hash_of_task, inputs_of
from common.tasks import data
from common.tasks.math import instruction, key
from common.tasks.task import Task


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Args:
    max_prompt_tokens, thinking, system, instruction = 128, False, None, None


def pairs(problems: list) -> list[tuple[str, str]]:
    return [(problem.text, problem.gold) for problem in problems]


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "1+1", "answer": "2"},
        {"question": "1+1", "answer": "One and one.\n#### 2"},
        {"prompt": "1+1", "solution": r"Add: \boxed{2}"},
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1"}],
            "reward_model": {"ground_truth": "2", "style": "rule"},
        },
        {"problem": "1+1", "answer": 2},
        {"problem": "1+1", "answer": r"so it is \boxed 2."},
    ],
)
def test_the_columns_of_the_real_datasets_are_found(task, tmp_path, row):
    path = write(tmp_path / "d.jsonl", [row])
    assert pairs(data.load_problems(task, path)) == [("1+1", "2")]


def test_columns_by_name(task, tmp_path):
    path = write(tmp_path / "d.jsonl", [{"a": "1+1", "b": {"c": "2"}}])
    renamed = ["problem=a", "answer=b.c"]
    assert pairs(data.load_problems(task, path, renamed)) == [("1+1", "2")]
    for bad in ("problem", "problem=", "solution=a"):
        with pytest.raises(UserError, match=bad):
            data.load_problems(task, path, [bad, "answer=b.c"])
    with pytest.raises(UserError, match="no column nothing, only a, b"):
        data.load_problems(task, path, ["problem=nothing", "answer=b.c"])


def test_a_column_with_a_point_in_its_name(task, tmp_path):
    rows = [{"problem": "1+1", "reward_model.ground_truth": "2"}]
    assert pairs(data.load_problems(task, write(tmp_path / "d.jsonl", rows))) == [("1+1", "2")]


def test_parquet(task, tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "d.parquet"
    rows = [{"problem": "1+1", "reward_model": {"ground_truth": "2"}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert pairs(data.load_problems(task, str(path))) == [("1+1", "2")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"text": "1+1", "label": "2"}\n', "no column problem or question or prompt, only text"),
        ('{"problem": "1+1"}\n', "no column answer or solution"),
        ('{"problem": "a", "answer": "1"}\n{"problem": \n', "line 2: not JSON"),
        ('{"problem": "a", "problem": "b"}\n', "line 1: not JSON .a column stands twice"),
        pytest.param("[" * 100_000, "line 1: not JSON .nested too deep", id="nested"),
        ("[1]\n", "line 1: not a JSON object"),
        ('[["a", "1"]]\n', 'name the columns, as {"problem": "1'),
        ('{"problem": "a", "answer": "work ####"}\n', "1 of 1 .* row 1: .*no answer"),
        ('{"problem": ["a", "b"], "answer": "1"}\n', "row 1: .*: a list of chat"),
        ('{"problem": [{"content": "a"}], "answer": "1"}\n', "must have role and content"),
        ('{"problem": [{"role": "system", "content": "a"}], "answer": "1"}\n', "no text"),
        ('{"problem": [{"role": "user", "content": ["a"]}], "answer": "1"}\n', "no text"),
        ('{"problem": "a \\ud800", "answer": "1"}\n', "row 1: half a surrogate pair"),
        ('{"problem": "a", "answer": "\\udfff"}\n', "row 1: half a surrogate pair"),
    ],
)
def test_bad_files_are_named_with_their_line(task, tmp_path, content, message):
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        data.load_problems(task, str(path))


ROW = {"problem": "1+1", "answer": "2"}
BOM = "\ufeff"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", BOM + json.dumps(ROW)),
        ("d.json", BOM + json.dumps([ROW, ROW | {"more": [1]}], indent=2)),
        ("d.json", json.dumps(ROW) + "\n" + json.dumps({"level": 3, **ROW})),
        ("d.csv", BOM + "problem,answer\r\n1+1,2\r\n"),
        ("d.csv", 'level,problem,answer\n3,"1+1",2\n'),
    ],
)
def test_files(task, tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    found = data.load_problems(task, str(tmp_path / name))
    assert {*pairs(found)} == {("1+1", "2")}


def test_csv_keeps_texts_as_they_stand(task, tmp_path):
    path = tmp_path / "d.csv"
    long = "f" * 200_000  # csv's own limit is 131,072
    path.write_text(f'problem,answer\n"a, b\nor c",0.50\nd,NA\ne,007\n{long},1\n')
    assert pairs(data.load_problems(task, str(path))) == [
        ("a, b\nor c", "0.50"),
        ("d", "NA"),
        ("e", "007"),
        (long, "1"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "d.csv",
            "problem,answer\na,1,2\n",
            "line 2: more fields than columns; quote those with commas",
        ),
        ("d.csv", "problem,answer,answer\na,1,2\n", "a column stands twice"),
        ("d.csv", "problem,answer\n\xff,1\n", "after line 0: not CSV .*utf-8"),
        ("d.parquet", "PAR1", "d.parquet is no parquet file: "),
        ("d.json", '[["1+1", "2"]]', 'row 1: not a JSON object; name the columns, as {"problem"'),
        ("d.json", '[{"problem": "a",', "line 1: not JSON"),
        ("d.json", '{"data": [{"problem": "a"}]}', "no column problem .* only data"),
    ],
)
def test_files_that_cannot_be_read(task, tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        data.load_problems(task, str(tmp_path / name))


def test_rows_that_cannot_be_used_are_left_out_and_counted(task, tmp_path, capsys):
    rows = [{"problem": f"p{i}", "answer": str(i)} for i in range(10)]
    rows[0]["answer"] = rows[4]["problem"] = None
    rows[6]["answer"], rows[7]["problem"] = "work ####", " "
    rows.append(rows[6])
    path = write(tmp_path / "d.jsonl", rows)
    kept = data.load_training_problems(task, path, "all", [])
    assert [p.text for p in kept] == [f"p{i}" for i in (1, 2, 3, 5, 8, 9)]
    assert kept[0].where.endswith("row 2")
    printed = capsys.readouterr().out
    assert "4 of 10 different rows cannot be used, the first: row 1: no answer" in printed
    assert '{"problem": "p0", "answer": null}' in printed
    assert "7 rows, 1 duplicates merged" in printed
    with pytest.raises(UserError, match="2 of 3 different rows cannot be used, .* name other"):
        data.load_problems(task, write(tmp_path / "e.jsonl", rows[:2] + rows[6:8][:1]))


def test_gold_answers_that_cannot_be_read_are_counted(task, tmp_path, capsys):
    rows = [ROW, {"problem": "a", "answer": "@@@"}, {"problem": "b", "answer": "@@"}]
    assert len(data.load_problems(task, write(tmp_path / "d.jsonl", rows))) == 3
    assert "2 rows with a warning, the first: gold answer '@@@'" in capsys.readouterr().out


def test_a_column_is_there_if_any_row_has_a_value(task, tmp_path):
    rows = [{"problem": "a", "answer": None, "solution": "1"}, {"problem": "b", "solution": "2"}]
    path = write(tmp_path / "d.jsonl", rows)
    assert pairs(data.load_problems(task, path)) == [("a", "1"), ("b", "2")]
    path = write(tmp_path / "e.jsonl", [{"problem": "a", "answer": None}, ROW])
    assert pairs(data.load_problems(task, path)) == [("1+1", "2")]


def on_hub(monkeypatch, **splits) -> list:
    """A hub whose sets have these splits; returns what is asked of it."""
    whole = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    asked = []

    def load_dataset(hub_id, config, split=None):
        asked.append((hub_id, config, split))
        return whole[split] if split else datasets.DatasetDict(whole)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_splits(task, monkeypatch):
    other = {"problem": "1+2", "answer": "3"}
    asked = on_hub(monkeypatch, train=[ROW], test=[other])
    assert pairs(data.load_problems(task, "a/b")) == [("1+1", "2")]
    assert pairs(data.load_evaluation_problems(task, "a/b:main")) == [("1+2", "3")]
    assert pairs(data.load_evaluation_problems(task, "a/b:main:train")) == [("1+1", "2")]
    assert pairs(data.load_problems(task, "a/b::test")) == [("1+2", "3")]
    assert asked == [
        *(("a/b", None, None), ("a/b", "main", None)),
        *(("a/b", "main", "train"), ("a/b", None, "test")),
    ]
    on_hub(monkeypatch, train=[ROW])  # as AIME 2024 has it
    assert pairs(data.load_evaluation_problems(task, "a/b")) == [("1+1", "2")]
    on_hub(monkeypatch, math=[ROW], code=[other])
    for load, usual in ((data.load_problems, "train"), (data.load_evaluation_problems, "test")):
        message = f"a/b has no split {usual}, only math, code; name one, as a/b::math"
        with pytest.raises(UserError, match=message):
            load(task, "a/b")
    on_hub(monkeypatch, test=[ROW])
    with pytest.raises(UserError, match="no split train, only test"):
        data.load_problems(task, "a/b")


def test_a_folder_with_splits(task, tmp_path, monkeypatch):
    """The real datasets: it reads a local folder as it reads a set of the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write(tmp_path / "owner" / "name" / "train.jsonl", [ROW] * 3)
    write(tmp_path / "owner" / "name" / "test.jsonl", [{"problem": "1+2", "answer": "3"}])
    assert pairs(data.load_problems(task, "owner/name")) == [("1+1", "2")]
    assert pairs(data.load_evaluation_problems(task, "owner/name")) == [("1+2", "3")]
    assert pairs(data.load_evaluation_problems(task, "owner/name::train")) == [("1+1", "2")]
    with pytest.raises(UserError, match="cannot load dataset owner/name::math .*math"):
        data.load_problems(task, "owner/name::math")


def test_rows_of_equal_content_are_described_once(tmp_path, monkeypatch):
    calls = []
    with Task() as task:
        ask = task.pool.call
        monkeypatch.setattr(task.pool, "call", lambda *a: calls.append(len(a[1])) or ask(*a))
        rows = [{"problem": f"p{i % 5}", "answer": "1", "more": {"x": [1]}} for i in range(500)]
        kept = data.load_training_problems(task, write(tmp_path / "d.jsonl", rows), "all", [])
    assert len(kept) == 5
    assert sum(calls) == 5 + 1  # and grade() is tried


@pytest.mark.parametrize(
    "source", ["no/such/file.jsonl", "no/file.parquet", "no.csv", "no.json", "mathh500"]
)
def test_unknown_sources(task, source):
    with pytest.raises(UserError, match="does not exist|unknown dataset"):
        data.load_problems(task, source)


def test_duplicates_conflicts_and_contamination(task, tmp_path, capsys):
    rows = [
        {"problem": "a", "answer": "1"},
        {"problem": " a\n", "answer": "1"},  # the same up to white space
        {"problem": "b", "answer": "1"},
        {"problem": "b", "answer": "2"},  # a conflict: neither can be trusted
        {"problem": "c", "answer": "3"},
        {"problem": "d", "answer": "4"},
    ]
    training = write(tmp_path / "train.jsonl", rows)
    held_out = write(tmp_path / "test.jsonl", [{"problem": "c  ", "answer": "3"}])
    kept = data.load_training_problems(task, training, "all", [held_out])
    assert pairs(kept) == [("a", "1"), ("d", "4")]
    printed = capsys.readouterr().out
    counts = (
        "2 duplicates merged, 1 with conflicting answers, 1 of the evaluation sets and 0 with 13"
    )
    assert counts in printed
    with pytest.raises(UserError, match="no problem of .* is left"):
        data.load_training_problems(task, held_out, "all", [held_out])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Find the value of $x$.", "Find the value of $x$", True),
        (r"Find \(x^{2}+1\).", "find $x^2 + 1$", True),
        ("Find x.", "Find x. Express your answer as an integer.", True),
        ("Find x.", "Find x. Please provide the final answer in simplest form.", True),
        ("A two-digit number", "A two digit number", True),
        ("What is 2+3?", "What is 2-3?", False),
        ("What is 12+3?", "What is 1+23?", False),
        ("What is 1 2?", "What is 12?", False),
        ("??", "???", False),
        ("求 x 的值。", "求x的值", True),
        ("6 × 3", "6 ÷ 3", False),
        ("6 × 3", "6 − 3", False),
        ("6 ÷ 3", "6 − 3", False),
        ("2*(3+4)", "(2*3)+4", False),
        ("f'(2)", "f(2)", False),
        (r"\dfrac{1}{2}", r"\frac{1}{2}", True),
        ("0.5*4", "0 5*4", False),
        ("x ≤ 3", "x ≥ 3", False),
        ("x ≤ 3", r"$x \leq 3$", True),
        ("A ⊂ B", "A ⊃ B", False),
        ("¬p ∧ q", "¬p ∨ q", False),
        ("x²", "$x^{2}$", True),
        (r"\sqrt{x+1}", r"\sqrt{x}+1", False),
        ("x^{2+1}", "x^{2}+1", False),
        (r"\{1, 2\}", "(1, 2)", False),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2&3&4\end{pmatrix}", False),
        ("x-y", "xy", False),
        ("y'' = y", "y' = y", False),
        ("The students' x", "The students x", True),
        ("a_n", "an", False),
        ("1, 2, ..., 10", "1, 2, 10", False),
        ("5+7? Give your answer in base 8.", "5+7? Give your answer in base 9.", False),
        ("x" * 20_001, "x" * 20_001 + ".", False),  # so long, it is compared as it stands
    ],
)
def test_problems_are_the_same_by_letters_numbers_brackets_and_signs(one, other, same):
    assert (key(one) == key(other)) == same


def bracketed(rng: random.Random, depth: int = 0) -> str:
    if depth == 3 or rng.random() < 0.3:
        return str(rng.randint(1, 99))
    text = f"{bracketed(rng, depth + 1)} {rng.choice('+-*/')} {bracketed(rng, depth + 1)}"
    return f"({text})" if rng.random() < 0.6 else text


def test_2000_bracketed_sums_are_2000_problems():
    rng, sums = random.Random(SEED), set()
    while len(sums) < 2000:
        sums.add(bracketed(rng))
    assert len({key(text) for text in sums}) == 2000


def test_thirteen_words_of_a_benchmark_are_contamination(task, tmp_path, capsys):
    words = [f"word{i}" for i in range(40)]
    rows = [
        {"problem": " ".join(["Other", *words[5:18], "end"]), "answer": "1"},  # 13 of them
        {"problem": " ".join(["Other", *words[5:17], "end"]), "answer": "1"},  # 12
        {"problem": " ".join(["And", *words[0:12], *words[13:25]]), "answer": "1"},
    ]
    held_out = write(tmp_path / "test.jsonl", [{"problem": " ".join(words).upper(), "answer": "1"}])
    kept = data.load_training_problems(task, write(tmp_path / "d.jsonl", rows), "all", [held_out])
    assert [problem.text for problem in kept] == [row["problem"] for row in rows[1:]]
    assert "0 of the evaluation sets and 1 with 13 words in a row" in capsys.readouterr().out


def test_words_of_a_template_are_no_contamination(task, tmp_path):
    """A prompt's own words stand in each problem; what three held-out problems share is such."""
    template = " ".join(f"word{i}" for i in range(20))
    problems = [f"{template} {name}" for name in ("a", "b", "c", "d")]
    rows = [{"problem": problem, "answer": "1"} for problem in problems]
    training = write(tmp_path / "d.jsonl", rows[:1])
    for held_out, num_kept in ((rows[1:], 1), (rows[1:3], 0)):
        path = write(tmp_path / "test.jsonl", held_out)
        if num_kept:
            assert len(data.load_training_problems(task, training, "all", [path])) == num_kept
        else:
            with pytest.raises(UserError, match="is left"):
                data.load_training_problems(task, training, "all", [path])


def of_words(number: int, count: int = 20) -> str:
    return " ".join(f"word{number}x{i}" for i in range(count))


STEPS = "Solve the following math problem step by step. The answer stands in the last line."
NO_TEXT = ""


@pytest.mark.parametrize("before", [NO_TEXT, STEPS])
@pytest.mark.parametrize("behind", [NO_TEXT, instruction])
@pytest.mark.parametrize("held_out_behind", [NO_TEXT, instruction])
def test_an_instruction_is_no_contamination_and_hides_none(
    task, tmp_path, before, behind, held_out_behind
):
    """The last word of a problem and the 12 of the instruction are 13. Problem 0 is held out as it
    is, the short 3+4 too, and of problem 1 thirteen words are."""
    held_out = [of_words(0), of_words(1), "3+4", *(f"{of_words(i)} end" for i in range(10, 20))]
    rows = [of_words(0), of_words(1, 13), "3 + 4"]
    rows += [of_words(1, 12), *(f"{of_words(i)} end" for i in range(30, 40))]
    held_out = [{"problem": f"{text}\n{held_out_behind}", "answer": "1"} for text in held_out]
    rows = [{"problem": f"{before}\n{text}\n{behind}", "answer": "1"} for text in rows]
    path = write(tmp_path / "test.jsonl", held_out)
    kept = data.load_training_problems(task, write(tmp_path / "d.jsonl", rows), "all", [path])
    assert [problem.text for problem in kept] == [row["problem"].strip() for row in rows[3:]]


def test_a_problem_of_nothing_but_the_shared_words_keeps_them(task):
    problems = [problem_of(f"Say{word}", "1") for word in (" a", " b", " c", "")]
    assert [text for text, _ in data.without_prompt(task, problems)] == ["a", "b", "c", "Say"]


@pytest.mark.parametrize("copies", [1, 3, 32])
def test_repeated_rows_of_an_evaluation_set_count_once(task, tokenizer, tmp_path, capsys, copies):
    """A template is what three problems share, not what three copies of one do."""
    rows = [{"problem": of_words(i), "answer": str(i)} for i in range(5)]
    repeated = [row | {"sample": i} for i in range(copies) for row in rows]
    held_out = write(tmp_path / "test.jsonl", repeated)
    training = [{"problem": f"Or: {row['problem']}?", "answer": "1"} for row in rows]
    path = write(tmp_path / "d.jsonl", [*training, ROW])
    args = evaluate.Args(max_prompt_tokens=512)
    asked = evaluate.benchmark_prompts(task, held_out, tokenizer, args)
    assert pairs([prompt.problem for prompt in asked]) == pairs_of(rows)
    assert (f"{5 * copies} rows are 5 problems\n" in capsys.readouterr().out) == (copies > 1)
    kept = data.load_training_problems(task, path, "all", [held_out])
    assert pairs(kept) == [("1+1", "2")]


def pairs_of(rows: list[dict]) -> list[tuple[str, str]]:
    return [(row["problem"], row["answer"]) for row in rows]


def test_a_problem_with_two_gold_answers_is_evaluated_as_two(task, tmp_path, capsys):
    rows = [ROW, {"problem": "a", "answer": "1"}, ROW | {"answer": "3"}, ROW]
    found = data.load_evaluation_problems(task, write(tmp_path / "test.jsonl", rows))
    assert pairs(found) == pairs_of(rows[:3])
    told = "4 rows are 3 problems, 1 of them with another gold answer to the same"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("decontaminate", "eval_dataset", "left"),
    [
        (None, None, ["1+1", "1+2"]),  # the task's first benchmark, which --eval_every would take
        (None, "mine.jsonl", ["1+2", "of the toy"]),
        (("mine.jsonl",), None, ["1+2"]),
        ((), "mine.jsonl", ["1+2", "of the toy"]),
    ],
)
def test_training_leaves_out_what_is_named_or_evaluated(
    task, tokenizer, tmp_path, monkeypatch, decontaminate, eval_dataset, left
):
    monkeypatch.chdir(tmp_path)
    toy = json.loads((ROOT / "toy" / "test.jsonl").read_text().splitlines()[0])
    write(tmp_path / "mine.jsonl", [ROW])
    write(tmp_path / "d.jsonl", [ROW, {"problem": "1+2", "answer": "3"}, toy])
    args = opd.Args(dataset="d.jsonl", decontaminate=decontaminate, eval_dataset=eval_dataset)
    texts = [prompt.problem.text for prompt in data.training_prompts(task, tokenizer, args)]
    assert texts == [toy["problem"] if text == "of the toy" else text for text in left]
    assert data.evaluation_prompts(task, tokenizer, args) == []
    args.eval_every = 1
    assert len(data.evaluation_prompts(task, tokenizer, args)) == (1 if eval_dataset else 512)


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.json", "mine.csv", "mine.parquet", "toy"])
def test_a_local_file_is_checked_against_what_its_owner_names(task, name):
    assert data.default_decontamination(task, name) == ()
    assert "math500" in data.default_decontamination(task, "owner/name:main")


def test_halves_are_fixed_by_the_text_alone(task, tmp_path):
    rows = [{"problem": f"p{i}", "answer": "1"} for i in range(400)]
    path = write(tmp_path / "d.jsonl", rows)
    shuffled = write(tmp_path / "s.jsonl", rows[::-1][:300])
    first, second, every = (
        data.load_training_problems(task, path, s, []) for s in ("1H", "2H", "all")
    )
    assert sorted(p.text for p in first + second) == sorted(p.text for p in every)
    assert 150 < len(first) < 250
    again = data.load_training_problems(task, shuffled, "1H", [])
    assert set(pairs(again)) < set(pairs(first))
    path = write(tmp_path / "one.jsonl", [{"problem": first[0].text, "answer": "1"}])
    with pytest.raises(UserError, match="no problem of .* falls into --split 2H"):
        data.load_training_problems(task, path, "2H", [])


def test_the_toys_halves_do_not_meet_each_other_or_the_test_set(task):
    halves = [data.load_training_problems(task, "toy", split, []) for split in ("1H", "2H")]
    sets = [set(pairs(rows)) for rows in (*halves, data.load_evaluation_problems(task, "toy"))]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 1024 + 512


def test_prompts_go_through_the_chat_template_once(tokenizer):
    prompt = data.render_prompts(tokenizer, [problem_of("12+34", "46")], Args)[0]
    assert tokenizer.decode(prompt.ids) == (
        f"<|im_start|>user\n12+34\n{instruction}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2


def test_long_prompts_are_dropped_and_counted(tokenizer, capsys):
    problems = [problem_of("1+1", "2"), problem_of("1+" * 100 + "1", "101")]

    class Short(Args):
        max_prompt_tokens = 30

    assert [p.problem for p in data.render_prompts(tokenizer, problems, Short)] == problems[:1]
    assert "1 prompts over --max_prompt_tokens 30 dropped" in capsys.readouterr().out
    with pytest.raises(UserError, match="every prompt is over --max_prompt_tokens 30"):
        data.render_prompts(tokenizer, problems[1:], Short)


def test_fingerprint_changes_with_the_data(task, tokenizer):
    prompts = data.render_prompts(tokenizer, [problem_of("1+1", "2")], Args)
    other = data.render_prompts(tokenizer, [problem_of("1+1", "3")], Args)
    before = data.fingerprint(task, prompts)
    assert data.fingerprint(task, prompts) == before
    assert data.fingerprint(task, other) != before
    assert data.fingerprint(task, prompts, other) != before


def templated(tokenizer, template: str):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_fingerprint_goes_by_what_the_template_writes(task, tokenizer):
    """A template may write today's date: the same prompts a day later are others."""
    problems, prints = [problem_of("1+1", "2")], []
    for date in ("24 Nov 2026", "25 Nov 2026"):
        dated = templated(tokenizer, date + tokenizer.chat_template)
        prompts = data.render_prompts(dated, problems, Args)
        prints.append(data.fingerprint(task, prompts))
    assert prints[0]["prompts_fingerprint"] != prints[1]["prompts_fingerprint"]


@pytest.mark.parametrize("written", ["{{ strftime_now('%d %B %Y') }}", "{{ date_string }}"])
def test_templates_are_told_one_fixed_day(tokenizer, written):
    """Mistral's and Granite's ask for today's date, and a run of yesterday would not go on."""
    dated = templated(tokenizer, written + tokenizer.chat_template)
    (prompt,) = data.render_prompts(dated, [problem_of("1+1", "2")], Args)
    assert re.match("26 Jul(y)? 2024<", dated.decode(prompt.ids))


def test_a_teacher_without_a_chat_template(tmp_path):
    """The student's own is used."""
    bare = tmp_path / "bare"
    shutil.copytree(ROOT / "toy" / "student", bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer("toy/student", str(bare)).chat_template


def test_a_template_that_refuses_a_system_message(tokenizer):
    refuses = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}"
    )
    changed = templated(tokenizer, refuses + tokenizer.chat_template)
    data.render_prompts(changed, [problem_of("1+1", "2")], Args)
    briefed = dataclasses.replace(
        problem_of("1+1", "2"),
        messages=({"role": "system", "content": "s"}, {"role": "user", "content": "1+1"}),
    )
    message = r"refuses messages of system, user \(System role not supported\); change"
    with pytest.raises(UserError, match=message):
        data.render_prompts(changed, [briefed], Args)


MODEL_FILES = ["config.json", "generation_config.json", "special_tokens_map.json", "vocab.json"]
MODEL_FILES += ["added_tokens.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"]
MODEL_FILES += ["chat_template.jinja", "merges.txt", "model-00002-of-00002.safetensors"]


def test_a_model_is_all_files_that_change_a_rollout_or_a_weight(tmp_path):
    model, file = tmp_path / "model", tmp_path / "other.jinja"
    shutil.copytree(ROOT / "toy" / "student", model)
    file.write_text("one")
    args = opd.Args(model=str(model), teacher="owner/name", chat_template=str(file))
    before = inputs_of(args)
    assert before["teacher_fingerprint"] is None  # nothing of it is on this machine
    for name in ("notes.txt", "config.json~", "tokenizer.json.bak", "run.log"):
        (model / name).write_text("new")
    assert inputs_of(args) == before
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    seen = [before["model_fingerprint"], inputs_of(args)["model_fingerprint"]]
    for name in MODEL_FILES:
        (model / name).write_text("{}")
        seen.append(inputs_of(args)["model_fingerprint"])
    assert len(set(seen)) == len(seen)
    file.write_text("two")
    assert inputs_of(args)["chat_template_fingerprint"] != before["chat_template_fingerprint"]


TASK = """
import helper, json
datasets = {"train": "rows.jsonl", "hub": ("owner/name", None, None)}
benchmarks = {"held out": "held_out.jsonl"}
def prompt(row): return row["problem"]
def grade(completion, row):
    from package.late import right
    return right(completion, row["answer"])
"""
IMPORTED = {
    "helper.py": "from deeper import *",
    "deeper.py": "",
    "package/late.py": "from . import relative\nright = str.__eq__",  # without an __init__.py
    "package/relative.py": "def broken(:",
}
BESIDE = {"mine.log": "", "my[v2].py~": "", "my[v2]_notes.jsonl": "{}", "json.py": "", "run.py": ""}


@pytest.fixture
def own_task(tmp_path):
    for name, text in {"my[v2].py": TASK, **IMPORTED}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    write(tmp_path / "rows.jsonl", [{"problem": "1+1", "answer": "2"}])
    write(tmp_path / "held_out.jsonl", [{"problem": "1+2", "answer": "3"}])
    return tmp_path / "my[v2].py"


def test_a_task_is_its_file_and_what_that_imports_from_its_folder(own_task):
    before = hash_of_task(str(own_task))
    for name, text in BESIDE.items():
        (own_task.parent / name).write_text(text)
    assert hash_of_task(str(own_task)) == before
    seen = [before]
    for name, text in {own_task.name: TASK, **IMPORTED}.items():
        (own_task.parent / name).write_text(text + "\n# changed")
        seen.append(hash_of_task(str(own_task)))
    assert len(set(seen)) == len(seen)


def test_a_task_remembers_what_its_rows_were_read_from(own_task, tmp_path, monkeypatch):
    """Names are resolved: to files by their content, to the commit in the hub's local cache."""
    on_hub(monkeypatch, train=[ROW])
    ref = tmp_path / "hub" / "datasets--owner--name" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("1a2b")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    rows, held_out = (str(own_task.parent / name) for name in ("rows.jsonl", "held_out.jsonl"))
    with Task(str(own_task)) as task:
        data.load_problems(task, "train")
        data.load_evaluation_problems(task, "held out")
        data.load_problems(task, "hub")
    assert set(task.sources) == {rows, held_out, "owner/name"}
    assert {name: hash_of_source(name) for name in task.sources} == task.sources
    assert task.sources["owner/name"] == "1a2b"
    ref.write_text("3c4d")
    write(Path(rows), [{"problem": "1+1", "answer": "999"}])
    moved = {name for name in task.sources if hash_of_source(name) != task.sources[name]}
    assert moved == {rows, "owner/name"}


SWITCH = "{% if not enable_thinking %}<think>\n\n</think>{% endif %}"


@pytest.mark.parametrize(
    ("ending", "thinking", "opens", "told"),
    [
        ("", False, False, ""),
        ("", True, False, "has no switch for thinking and opens no thought"),
        ("<think>\n", False, True, "has no switch for thinking and opens a thought in each prompt"),
        ("<think>\n", True, True, "has no switch for thinking and opens a thought in each prompt"),
        (SWITCH, False, False, ""),
        (SWITCH, True, False, ""),
    ],
)
def test_thoughts_that_the_template_opens(tokenizer, capsys, ending, thinking, opens, told):
    class Thinking(Args):
        pass

    Thinking.thinking = thinking
    changed = templated(tokenizer, tokenizer.chat_template + ending)
    problems = [problem_of("What does <think> mean?", "2")]
    assert data.render_prompts(changed, problems, Thinking)[0].opens_thought == opens
    printed = capsys.readouterr().out
    assert told in printed
    assert (told == "") == (printed == "")
