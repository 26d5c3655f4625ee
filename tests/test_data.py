"""Loading, splitting and cleaning of problems; rendering of prompts."""

import copy
import json
import shutil

import pytest
from conftest import problem_of

import opd
from common.run.errors import UserError
from common.run.inputs import ROOT, inputs_of
from common.tasks import data
from common.tasks.math import instruction, key


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
        ("[1]\n", "line 1: not a JSON object"),
        (
            '{"problem": "a", "answer": "1"}\n{"problem": "b", "answer": null}\n',
            "row 2: .* no answer",
        ),
        ('{"problem": "a", "answer": "1"}\n{"problem": "", "answer": "1"}\n', "row 2: .* no text"),
        (
            '{"problem": "a", "answer": "work ####"}\n',
            "row 1: task math: .* no answer",
        ),
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


@pytest.mark.parametrize("source", ["no/such/file.jsonl", "no/file.parquet", "mathh500"])
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
    ],
)
def test_problems_are_the_same_by_letters_numbers_and_operators(one, other, same):
    assert (key(one) == key(other)) == same


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


def test_fingerprint_changes_with_the_data(tokenizer):
    prompts = data.render_prompts(tokenizer, [problem_of("1+1", "2")], Args)
    other = data.render_prompts(tokenizer, [problem_of("1+1", "3")], Args)
    before = data.fingerprint(tokenizer, prompts, Args)
    assert data.fingerprint(tokenizer, prompts, Args) == before
    assert data.fingerprint(tokenizer, other, Args) != before


def templated(tokenizer, template: str):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_fingerprint_goes_by_what_the_template_writes(tokenizer):
    """A template may write today's date: the same prompts a day later are others."""
    problems, prints = [problem_of("1+1", "2")], []
    for date in ("24 Nov 2026", "25 Nov 2026"):
        dated = templated(tokenizer, date + tokenizer.chat_template)
        prompts = data.render_prompts(dated, problems, Args)
        prints.append(data.fingerprint(dated, prompts, Args))
    assert prints[0]["prompts_fingerprint"] != prints[1]["prompts_fingerprint"]
    assert prints[0]["template_fingerprint"] != prints[1]["template_fingerprint"]


def test_fingerprints_of_models_and_files(tmp_path):
    """By what lies there, not by its name."""
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(ROOT / "toy" / "student", model)
    rows.write_text("{}")
    args = opd.Args(model=str(model), teacher="owner/name", dataset=str(rows))
    before = inputs_of(args)
    assert before["teacher_fingerprint"] is None  # nothing of it is on this machine
    assert inputs_of(args) == before
    (model / "notes.txt").write_text("new")
    assert inputs_of(args) == before
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    replaced = inputs_of(args)
    assert replaced["model_fingerprint"] != before["model_fingerprint"]
    rows.write_text("{} ")
    assert inputs_of(args) != replaced


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
