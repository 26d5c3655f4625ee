"""The shipped checkpoints: small, rebuilt by toy/make.py, and with something left to discover."""

import json
import random

import pytest

from common.run.inputs import ROOT
from common.tasks import data
from toy import make

TOY = ROOT / "toy"


def test_the_checkpoints_are_small_and_safe():
    files = [path for name in ("teacher", "student") for path in (TOY / name).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 3_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja"}


def test_the_data_are_what_the_script_makes(tmp_path):
    make.make_data(make.Args(output_dir=tmp_path))
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (TOY / name).read_bytes()


def test_the_tokenizer_is_what_the_script_makes(tokenizer):
    made = make.make_tokenizer()
    assert made.get_vocab() == tokenizer.get_vocab()
    assert made.chat_template == tokenizer.chat_template
    text = make.completion_text([12, 34, 56, 78, 90], step_by_step=True)
    assert text == r"12+34=46;46+56=102;102+78=180;180+90=270;\boxed{270}"
    assert tokenizer.decode(made.encode(text)) == text
    assert tokenizer.encode(text) == made.encode(text)


def test_completions_are_right():
    rng = random.Random(0)
    for _ in range(100):
        terms = make.sample_terms(rng)
        assert eval(make.problem_text(terms)) == sum(terms)
        text = make.completion_text(terms, step_by_step=True)
        *steps, last = text.split(";")
        assert all(eval(step.replace("=", "==")) for step in steps)
        assert last == make.completion_text(terms, step_by_step=False) == rf"\boxed{{{sum(terms)}}}"
        assert make.is_step_by_step(text)
        assert not make.is_step_by_step(last)


def test_an_answer_at_once_that_runs_away_is_not_step_by_step():
    assert not make.is_step_by_step(r"\boxed{35;335+43=78;78+69=147;147+87=234;\boxed{234}")


@pytest.fixture(scope="module")
def reports(task):
    problems = data.load_evaluation_problems(task, "toy")[:256]
    return {name: make.report(TOY / name, problems) for name in ("teacher", "student")}


@pytest.mark.slow
def test_there_is_something_to_discover(reports):
    teacher, student = reports["teacher"], reports["student"]
    print(json.dumps(reports))
    assert teacher["accuracy_step_by_step"] >= 0.95
    assert teacher["accuracy_at_once"] <= 0.45
    assert 0.05 <= teacher["step_by_step_use"] <= 0.25
    assert student["accuracy_step_by_step"] >= 0.75  # of the few that there are: about 20
    assert student["step_by_step_use"] <= teacher["step_by_step_use"] / 4
    assert student["parameters"] * 4 <= teacher["parameters"]
