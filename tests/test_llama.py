"""What is Llama's own: its tokens, its template, its place in the workflow."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import problem_of, tiny_model
from huggingface_hub.errors import GatedRepoError
from llama import BEGIN, END, make_llama
from safetensors.torch import load_file
from test_bridge import TINY
from test_report import planned
from test_scripts import run_process
from transformers import AutoTokenizer

import bridge
from common.model import load as model
from common.model.load import load_model
from common.model.tokenizer import end_ids, load_tokenizer
from common.run.errors import UserError
from common.sampling.pair import load_pair
from common.tasks import data
from workflow import memory
from workflow.paper_results import results_of

TEACHER, STUDENT = "meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("llama")
    teacher = make_llama(root / "teacher", 64, seed=0, padding="right")
    return teacher, make_llama(root / "student", 32, seed=1)


def test_prompts_begin_once_and_stay_from_day_to_day(llamas, capsys):
    tokenizer = load_tokenizer(llamas[1], llamas[0])
    assert tokenizer("1").input_ids[0] == tokenizer.bos_token_id  # it would add another one
    args = SimpleNamespace(max_prompt_tokens=512, thinking=False)
    (prompt,) = data.render_prompts(tokenizer, [problem_of("1+1", "2")], args)
    assert prompt.ids.count(tokenizer.bos_token_id) == 1
    text = tokenizer.decode(prompt.ids)
    assert text.startswith(BEGIN)
    assert "Today Date: 26 Jul 2024" in text
    unpinned = AutoTokenizer.from_pretrained(llamas[1]).apply_chat_template(
        [{"role": "user", "content": "1+1"}], tokenize=False
    )
    assert "26 Jul 2024" not in unpinned  # the template writes today's date
    args.thinking = True
    assert data.render_prompts(tokenizer, [problem_of("1+1", "2")], args)[0].ids == prompt.ids
    assert "the chat template has no switch for thinking" in capsys.readouterr().out


def test_each_of_the_three_ids_ends_a_completion(llamas):
    tokenizer = load_tokenizer(llamas[1])
    loaded = load_model(llamas[1], "float32", torch.device("cpu"))
    assert set(tokenizer.convert_tokens_to_ids(list(END))) <= set(end_ids(tokenizer, loaded))


def test_the_papers_student_routes_and_numbers():
    args = bridge.Args(teacher=TEACHER, routes=("paper",), nproc_per_node=8, gpu_memory_gb=141)
    stages, evaluations = planned(args)
    assert args.student == STUDENT
    routes = {evaluation.route for evaluation in evaluations} - {"models"}
    assert routes == {"cold", "raw_teacher", "full"}
    assert {stage.args().model for stage in stages if stage.name == "cold"} == {STUDENT}
    reported = results_of(TEACHER, STUDENT)
    assert reported["full/full_opd"] == {"math500": 62.1, "aime24": 14.9, "aime25": 9.2}
    assert set(reported) <= {evaluation.id for evaluation in evaluations}
    qwen = bridge.Args(teacher="Qwen/Qwen3-8B", routes=("paper",))
    routes = {evaluation.route for evaluation in planned(qwen)[1]} - {"models"}
    assert len(routes) == 9
    assert not any("matched" in route for route in routes)


def test_scaled_rotations_are_planned_and_lengths_are_those_of_the_config(llamas):
    shape = memory.shape_of(llamas[0])
    loaded = load_model(llamas[0], "float32", torch.device("cpu"))
    assert shape.params == sum(parameter.numel() for parameter in loaded.parameters())
    model.check_shapes(*llamas, length=1024)
    with pytest.raises(UserError, match="takes at most 1024 tokens"):
        model.check_shapes(*llamas, length=1025)


def test_shapes_are_those_of_the_published_configs():
    """By their published counts: 8,030,261,248 and 70,553,706,496 parameters."""
    assert memory.shape_of(STUDENT).params == 8_030_261_248
    assert memory.shape_of(TEACHER).params == 70_553_706_496


def test_key_value_heads_are_not_divided():
    """8 of them: with 16 GPUs that share an engine each holds one, as with 8."""
    shape = memory.shape_of(TEACHER)
    args = {"dtype": "bfloat16", "max_prompt_tokens": 3072, "max_new_tokens": 16384}
    args |= {"vllm_sequences": 256}
    one, eight, sixteen = (
        memory.engine_size(SimpleNamespace(tensor_parallel=count, **args), shape)
        for count in (1, 8, 16)
    )
    cache = memory.SEQUENCES * 19_456 * shape.layers * shape.kv * 2
    assert sixteen > cache / 8
    assert one > eight > sixteen > eight / 2


def test_a_download_says_how_much_it_is(monkeypatch, capsys):
    files = [("model-1.safetensors", 4e9), ("model-2.safetensors", 1.2e9), ("other.bin", 7e9)]
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files]
    info = SimpleNamespace(siblings=siblings)
    monkeypatch.setattr(model.HfApi, "model_info", lambda *_, **__: info)
    assert model.find("someone/model") == "someone/model"
    assert capsys.readouterr().out.startswith("downloading someone/model: 5.2 GB,")


def test_a_gated_model_says_what_to_do(monkeypatch):
    response = SimpleNamespace(status_code=403, headers={}, request=None, text="")

    def refuse(*_, **__):
        raise GatedRepoError("403 Client Error", response=response)

    monkeypatch.setattr(model.HfApi, "model_info", refuse)
    with pytest.raises(UserError, match="a gated one needs its licence"):
        load_tokenizer(TEACHER)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "routes", "rows", "last"),
    [(1, "paper", 6, "full_opd"), (2, "raw_teacher", 3, "raw_teacher_opd")],
)
def test_every_stage(llamas, tmp_path, ranks, routes, rows, last):
    flags = [*TINY, "--teacher", llamas[0], "--student", llamas[1], "--learning_rate", "1e-4"]
    flags += ["--dataset", "toy", "--benchmarks", "toy", "--max_prompt_tokens", "512"]
    flags += ["--max_new_tokens", "12", "--dtype", "float32", "--num_minibatches", "1"]
    flags += ["--routes", routes, "--nproc_per_node", str(ranks), "--output_dir", tmp_path / "out"]
    done = run_process("bridge", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["rows"]) == rows
    final = tmp_path / "out" / "seed_0" / last / "final"
    before, after = (
        load_file(f"{llamas[1]}/model.safetensors"),
        load_file(final / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    config = json.loads((final / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "llama3"
    ends = json.loads((final / "generation_config.json").read_text())["eos_token_id"]
    assert set(load_tokenizer(llamas[1]).convert_tokens_to_ids(list(END))) <= set(ends)


def test_a_teacher_of_another_family_makes_a_pair(llamas, tokenizer, tmp_path):
    tiny_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    student, cpu = load_tokenizer(llamas[1], str(tmp_path)), torch.device("cpu")
    pair = load_pair(student, str(tmp_path), cpu)
    own, other = (
        [tokenizer.decode([i]) for i in ids.tolist()]
        for tokenizer, ids in zip(pair.tokenizers, (pair.student, pair.teacher), strict=True)
    )
    assert len(own) > 50
    assert own[1:] == other[1:]  # the first are the ends of a turn
    assert load_pair(student, llamas[0], cpu) is None
