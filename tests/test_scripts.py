"""The scripts as users start them: child processes that train, resume, refuse bad input."""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys

import forked
import pytest
import torch
from safetensors.torch import load_file
from test_model import CPU, OTHER_EOS, changed_copy
from transformers import AutoModelForCausalLM

from common.model.flops import forward_flops
from common.model.load import load_model
from common.model.tokenizer import load_tokenizer
from common.run.inputs import ROOT
from common.run.log import symptoms
from common.run.process import start

SMALL = ["--prompts_per_step", "4", "--group_size", "4", "--warmup_steps", "1"]
TRAINERS = {
    "grpo": [*SMALL, "--num_steps", "2", "--eval_every", "2"],
    "opd": [*SMALL, "--num_steps", "2"],
    "fkl_warmup": [*SMALL, "--num_steps", "2"],
}


def run(script: str, *flags: object) -> subprocess.CompletedProcess:
    """As run_process, forked from one warm Python (test_processes.py: it comes to the same)."""
    words = [str(ROOT / f"{script}.py"), *map(str, flags)]
    return subprocess.CompletedProcess(words, *forked.run(words, threads=2))


def run_process(script: str, *flags: object, cwd=ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def metrics_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Each trainer's folder after two steps on the toy."""
    root = tmp_path_factory.mktemp("trained")
    for script, flags in TRAINERS.items():
        done = run(script, *flags, "--output_dir", root / script)
        assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("script", TRAINERS)
def test_two_steps_move_every_parameter(trained, script):
    folder = trained / script
    rows = metrics_of(folder)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[-1]["optim/grad_norm"] > 0
    before = load_file(
        ROOT / "toy" / ("teacher" if script == "grpo" else "student") / "model.safetensors"
    )
    after = load_file(folder / "final" / "model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if before[name].equal(after[name])] == []
    AutoModelForCausalLM.from_pretrained(folder / "final")


@pytest.mark.parametrize("script", TRAINERS)
def test_the_run_folder_is_complete(trained, script):
    folder = trained / script
    config = json.loads((folder / "config.json").read_text())
    assert config["script"] == script
    assert config["prompts_per_step"] == 4
    assert config["environment"]["torch"].startswith("2.13.0")
    samples = [
        json.loads(line) for line in (folder / "rollouts/step_2.jsonl").read_text().splitlines()
    ]
    assert len(samples) == 16
    assert {"problem", "answer", "completion", "outcome", "finish"} <= samples[0].keys()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["verifier_calls"]) == (2, 32)
    assert manifest["generated_tokens"] > 32
    assert list((folder / "tensorboard").iterdir())


@pytest.mark.parametrize("script", TRAINERS)
def test_every_logged_metric_is_documented(trained, script):
    table = (ROOT / "docs" / "runs.md").read_text()
    documented = set(re.findall(r"^\| `([a-z]+/[a-z_]+)` \|", table, re.M))
    for row in metrics_of(trained / script):
        assert row.keys() - {"step"} <= documented


def test_a_finished_run_is_left_alone(trained):
    before = (trained / "opd" / "metrics.jsonl").read_bytes()
    done = run("opd", *TRAINERS["opd"], "--output_dir", trained / "opd")
    assert done.returncode == 0
    assert "finished" in done.stdout
    assert (trained / "opd" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("script", TRAINERS)
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, script):
    """Four steps in one go, and again from the checkpoint after the second."""
    flags = [*SMALL, "--num_steps", "4", "--checkpoint_every", "2", "--keep_checkpoints", "3"]
    assert run(script, *flags, "--output_dir", tmp_path / "whole").returncode == 0
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    (cut / "manifest.json").unlink()
    shutil.rmtree(cut / "final")
    shutil.rmtree(cut / "checkpoints" / "step_4")
    done = run(script, *flags, "--output_dir", cut)
    assert done.returncode == 0, done.stderr
    assert "after step 2" in done.stdout
    name = "checkpoints/step_4/shard-00001-model-00001-of-00001.safetensors"
    resumed, expected = load_file(cut / name), load_file(tmp_path / "whole" / name)
    assert resumed.keys() == expected.keys()
    assert all(resumed[name].equal(expected[name]) for name in expected)  # the optimizer's too
    assert any(name.startswith("optimizer/") for name in expected)
    final = "final/model.safetensors"
    assert (cut / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()
    timeless = [
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in metrics_of(folder)]
        for folder in (cut, tmp_path / "whole")
    ]
    assert timeless[0] == timeless[1]


def test_a_stage_begins_at_the_weights_that_the_one_before_it_has_trained(tmp_path):
    """In bfloat16 at a rate of 1e-6, which moves no weight by half a unit of bfloat16: a final/ in
    that type would be the base again."""
    base, names = tmp_path / "base", ("one", "two")
    load_model("toy/student", "bfloat16", CPU).save_pretrained(base)
    load_tokenizer("toy/student").save_pretrained(base)
    flags = [*SMALL[:4], "--dtype", "bfloat16", "--learning_rate", "1e-6", "--warmup_steps", "0"]
    flags += ["--num_steps", "2", "--checkpoint_every", "1"]
    for name, model in zip(names, (base, tmp_path / "one" / "final"), strict=True):
        done = run("fkl_warmup", *flags, "--model", model, "--output_dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
    shard = "shard-00001-model-00001-of-00001.safetensors"
    masters = load_file(tmp_path / "one" / "checkpoints" / "step_2" / shard)
    first = load_file(tmp_path / "two" / "checkpoints" / "step_1" / shard)
    before = load_file(base / "model.safetensors")
    final = load_file(tmp_path / "one" / "final" / "model.safetensors")
    assert final.keys() == before.keys()
    for name in final:
        assert final[name].equal(masters[name]), name
        assert not final[name].equal(before[name].float()), name
        step = (first[name] - masters[name]).abs().max()  # AdamW's first moves by the rate
        assert 0.9e-6 < step < 1.1e-6, name
    rounded = sum((final[name].bfloat16() != before[name]).sum() for name in final)
    assert rounded < 0.02 * sum(map(torch.numel, final.values()))


def test_a_run_that_has_had_no_gradient_yet_is_resumed(tmp_path):
    """One token is no answer: groups agree, and AdamW has no state when the checkpoint is saved."""
    flags = [*SMALL, "--kl_coef", "0", "--max_new_tokens", "1", "--checkpoint_every", "1"]
    flags += ["--num_steps", "2", "--output_dir", tmp_path]
    assert run("grpo", *flags).returncode == 0
    assert [row["optim/grad_norm"] for row in metrics_of(tmp_path)] == [0.0, 0.0]
    (tmp_path / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "final")
    shutil.rmtree(tmp_path / "checkpoints" / "step_2")
    done = run("grpo", *flags)
    assert done.returncode == 0, done.stderr
    assert "after step 1" in done.stdout


def test_grpo_with_every_option(tmp_path):
    done = run(
        "grpo",
        *(*SMALL, "--num_steps", "2", "--model", "toy/student", "--output_dir", tmp_path / "run"),
        *("--dtype", "bfloat16", "--num_epochs", "2", "--num_minibatches", "2"),
        *("--dynamic_sampling", "--max_refills", "2", "--mask_truncated", "--importance_cap", "2"),
        *("--loss_agg", "dr_grpo", "--advantage_norm", "none", "--clip_high", "0.28"),
        *("--lr_schedule", "cosine", "--weight_decay", "0.01", "--max_new_tokens", "8"),
        *("--kl_coef", "0", "--split", "1H"),
    )
    assert done.returncode == 0, done.stderr
    rows = metrics_of(tmp_path / "run")
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert "policy/kl_ref" not in rows[0]


@pytest.mark.parametrize("script", ["opd", "fkl_warmup"])
def test_several_updates_of_one_step(trained, tmp_path, script):
    """Two passes over two minibatches: each rollout is trained on twice, and sampled once."""
    flags = [*TRAINERS[script], "--num_epochs", "2", "--num_minibatches", "2"]
    assert run(script, *flags, "--output_dir", tmp_path / "run").returncode == 0
    first, expected = (metrics_of(folder)[0] for folder in (tmp_path / "run", trained / script))
    assert first["rollout/length"] == expected["rollout/length"]
    assert first["loss/total"] != expected["loss/total"]  # of a policy that has moved meanwhile
    assert math.isfinite(first["optim/grad_norm"])


@pytest.mark.parametrize(
    ("script", "flags"), [("fkl_warmup", ["--hard_labels"]), ("fkl_warmup", []), ("opd", [])]
)
def test_given_rollouts(trained, tmp_path, script, flags):
    """Rows of another run: SFT on them, or dense supervision at their tokens. The loss falls."""
    done = run(
        script,
        *(*SMALL, "--num_steps", "15", *flags, "--output_dir", tmp_path / "run"),
        *("--rollouts", trained / "grpo" / "rollouts" / "step_1.jsonl"),
    )
    assert done.returncode == 0, done.stderr
    losses = [row["loss/total"] for row in metrics_of(tmp_path / "run")]
    assert losses[-1] < losses[0]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["generated_tokens"] == 0


@pytest.mark.parametrize("script", TRAINERS)
def test_flops_are_those_of_every_forward_and_backward(trained, script):
    """By the lengths of the saved rollouts: sampling, 1 forward and 2 for a backward of what is
    trained, 1 of the reference or the teacher."""
    lengths = [
        (len(row["prompt_ids"]), len(row["completion_ids"]))
        for step in (1, 2)
        for row in map(
            json.loads, (trained / script / f"rollouts/step_{step}.jsonl").read_text().splitlines()
        )
    ]
    names = {"policy": "toy/teacher" if script == "grpo" else "toy/student"}
    models = {
        role: AutoModelForCausalLM.from_pretrained(ROOT / name)
        for role, name in (names | {"teacher": "toy/teacher"}).items()
    }
    forward = {role: forward_flops(model, lengths) for role, model in models.items()}
    sampling = {role: forward_flops(model, lengths, shared=4) for role, model in models.items()}
    manifest = json.loads((trained / script / "manifest.json").read_text())
    expected = {
        "grpo": (sampling["policy"] + 4 * forward["policy"], 0.0),
        "opd": (sampling["policy"] + 3 * forward["policy"], forward["teacher"]),
        "fkl_warmup": (3 * forward["policy"], forward["teacher"] + sampling["teacher"]),
    }[script]
    assert (manifest["flops"], manifest["teacher_flops"]) == pytest.approx(expected, rel=1e-12)


def test_only_right_answers_teach_where_asked(tmp_path):
    """A model tuned on its own right answers: the others are not trained on, nor counted."""
    flags = [*SMALL, "--num_steps", "3", "--model", "toy/teacher", "--hard_labels"]
    done = run("fkl_warmup", *flags, "--correct_only", "--output_dir", tmp_path / "right")
    assert done.returncode == 0, done.stderr
    assert run("fkl_warmup", *flags, "--output_dir", tmp_path / "all").returncode == 0
    of = {n: json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("right", "all")}
    assert of["right"]["verifier_calls"] == of["all"]["verifier_calls"]
    assert of["right"]["flops"] < of["all"]["flops"]
    rows = metrics_of(tmp_path / "right")
    assert 0 < rows[0]["rollout/accuracy"] < 1
    assert rows[0]["loss/total"] != metrics_of(tmp_path / "all")[0]["loss/total"]


@pytest.mark.parametrize("script", TRAINERS)
def test_a_budget_ends_a_run(trained, tmp_path, script):
    """After the step that reaches it; and a resumed run does not begin another."""
    flags = [*SMALL, "--num_steps", "9"]
    spent = json.loads((trained / script / "manifest.json").read_text())  # of two steps
    tokens = spent["generated_tokens"] / 2 + 1
    flops = (spent["flops"] + spent["teacher_flops"]) / 2
    for flag, value in (("--stop_at_tokens", int(tokens)), ("--stop_at_flops", 1.5 * flops)):
        folder = tmp_path / flag
        assert run(script, *flags, flag, value, "--output_dir", folder).returncode == 0
        manifest = json.loads((folder / "manifest.json").read_text())
        used = {"--stop_at_tokens": manifest["generated_tokens"]}
        used["--stop_at_flops"] = manifest["flops"] + manifest["teacher_flops"]
        assert used[flag] >= value
        assert manifest["step"] <= 3


def test_evaluate(tmp_path):
    mine = tmp_path / "mine.jsonl"
    rows = [{"problem": f"12+34+56+78+{n}", "answer": str(180 + n)} for n in (90, 91, 92)]
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    flags = ["--benchmarks", "toy", mine, "--num_problems", "8", "--num_samples", "4"]
    done = run("evaluate", *flags, "--model", "toy/student", "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]
    assert results["toy"]["num_problems"] == 8
    assert results[str(mine)]["num_problems"] == 3
    assert "12 rows are 3 problems" in done.stdout
    low, high = results["toy"]["accuracy_interval"]
    assert 0 <= low <= results["toy"]["accuracy"] <= high <= 1
    assert results["toy"]["pass_at"]["1"] == pytest.approx(results["toy"]["accuracy"])
    for name, count in (("toy", 32), ("mine", 12)):
        assert len((tmp_path / "out/samples" / f"{name}.jsonl").read_text().splitlines()) == count


@pytest.mark.parametrize("script", ["grpo", "evaluate"])
def test_half_a_surrogate_pair_of_a_grader_ends_no_run(tmp_path, script):
    task, rows = tmp_path / "half.py", tmp_path / "rows.jsonl"
    code = "def prompt(row): return row['problem']\ndef answer(completion): return '\\ud800'\n"
    task.write_text(code + "def grade(completion, row): raise RuntimeError('half \\udfff')\n")
    rows.write_text('{"problem": "1+1"}\n')
    flags = ["--task", task, "--output_dir", tmp_path / "run", "--max_new_tokens", "4"]
    own = {"grpo": ["--dataset", rows, "--num_steps", "1", "--prompts_per_step", "1"]}
    own["evaluate"] = ["--benchmarks", rows, "--num_samples", "4"]
    done = run(script, *flags, *own[script])
    assert done.returncode == 0, done.stderr
    assert "grades failed (RuntimeError: half ?" in done.stdout


# === bad input ===

BAD = [
    ("--model no/such/model --learning_rate 1e-6", "neither a local folder nor a hub id"),
    ("--dataset columns.jsonl", "no column problem or question or prompt"),
    ("--dataset empty.jsonl", "is empty"),
    ("--task no.py", "there is no task no.py; give math or a .py file"),
    ("--task good.jsonl", "there is no task good.jsonl; give math or a .py file"),
    ("--task ungraded.py --dataset good.jsonl", "ungraded.py: it has no function grade(completi"),
    ("--task words.py --dataset good.jsonl", "good.jsonl, row 1: task words.py: KeyError: 'word'"),
    ("--task words.py", "task words.py names no datasets; set --dataset"),
    ("--task generous.py --dataset good.jsonl --num_steps 1", "returned 2; it must return a numb"),
    ("--chat_template no.jinja", "cannot read --chat_template no.jinja"),
    ("--chat_template broken.jinja", "--chat_template broken.jinja cannot be used"),
    ("--dataset missing.jsonl", "does not exist"),
    ("--max_prompt_tokens 5", "every prompt is over --max_prompt_tokens 5"),
    ("--group_size -1", "--group_size is -1; it must be above 0"),
    ("--learning_rate nan", "--learning_rate is nan"),
    ("--model copy", "set --learning_rate for copy"),
    ("--output_dir occupied", "choose another --output_dir"),
    ("--model occupied --learning_rate 1e-6", "has no config.json"),
]
CASES = [(script, *case) for script in TRAINERS for case in BAD] + [
    ("grpo", "--group_size 1", "--group_size 1 has nothing to compare"),
    ("opd", "--lora_rank 999", "--lora_rank 999 is above the width of layers.0.self_attn.q_proj"),
    ("grpo", "--lora_rank -1", "--lora_rank is -1; it must be 0 or above"),
    ("grpo", "--num_minibatches 9999", "--num_minibatches 9999 exceeds"),
    ("opd", "--teacher other --estimator topk", "two vocabularies need --estimator full"),
    ("opd", "--estimator sampled --divergence jsd", "drop --divergence jsd"),
    ("opd", "--estimator sampled --sample_from initial", "needs the policy's own samples"),
    ("opd", "--estimator sampled --rollouts good.jsonl", "needs the policy's own samples"),
    ("opd", "--rollouts r.jsonl --sample_from initial", "drop --sample_from initial"),
    ("fkl_warmup", "--rollouts columns.jsonl", "needs text columns"),
    ("evaluate", "--model no/such/model", "neither a local folder nor a hub id"),
    ("evaluate", "--top_p 0", "--top_p is 0"),
    ("evaluate", "--max_prompt_tokens 5", "over --max_prompt_tokens"),
    ("opd", "--num_steps many", "many"),
    ("opd", "--lr_schedule triangular", "triangular"),
    ("opd", "--no_such_flag 1", "no_such_flag"),
    ("evaluate", "--num_samples 2.5", "2.5"),
    ("bridge", "--seeds one", "one"),
    ("bridge", "--seeds 1 -1", "--seeds is -1; it must be 0 or above"),
    ("bridge", "--seeds 1 1", "a seed stands twice"),
    ("bridge", "--routes warm", "warm"),
    ("evaluate", "--compare a b", "a/results.json does not exist"),
    ("opd", "--dataset broken.jsonl", "broken.jsonl, line 3"),
    ("opd", "--dataset latin.jsonl", "latin.jsonl"),
    ("opd", "--dataset twice.jsonl", "twice.jsonl, line 1: not JSON (a column stands twice)"),
    ("opd", "--dataset unanswered.jsonl", "unanswered.jsonl: 2 of 3 different rows cannot be"),
    ("opd", "--dataset huge.jsonl", "every prompt is over --max_prompt_tokens 128"),
    ("opd", "--dataset table.parquet", "table.parquet"),
    ("opd", "--dataset good.jsonl --columns problem=nothing", "nothing"),
    ("grpo", "--clip_low -0.1", "--clip_low is -0.1"),
    ("grpo", "--kl_coef inf", "--kl_coef is inf"),
    ("grpo", "--backend vllm --vllm_gpu_memory 2", "--vllm_gpu_memory is 2.0"),
    ("evaluate", "--temperature -1", "--temperature is -1.0"),
    ("evaluate", "--benchmarks good.jsonl folder/good.jsonl", "one file name"),
    ("bridge", "--teacher other", "set --student"),
    ("bridge", "--num_steps 0", "--num_steps is 0; it must be above 0"),
    ("evaluate", "--benchmarks", "--benchmarks needs a value"),
    ("bridge", "--benchmarks", "--benchmarks needs a value"),
    ("opd", "--max_new_tokens 385", "and toy/student takes at most 512 tokens"),
    ("evaluate", "--max_new_tokens 385", "and toy/teacher takes at most 512 tokens"),
    ("opd", "--dataset lists.jsonl", "row 1: ValueError: a list of chat messages"),
    ("opd", "--dataset surrogate.jsonl", "row 1: half a surrogate pair"),
    ("fkl_warmup", "--rollouts ids.jsonl --dataset good.jsonl", "completion_ids must be a list"),
    ("evaluate", "--compare torn torn", "torn/results.json is damaged"),
    *((s, "--seed 99999999999999999999999", "it must be at most") for s in (*TRAINERS, "evaluate")),
    *((s, "--tensor_parallel 0", "it must be above 0") for s in (*TRAINERS, "evaluate", "bridge")),
    ("bridge", "--seeds 0 99999999999999999999999", "it must be at most 9223372036854775807"),
    ("bridge", "--preset preset.json", "--tensor_parallel is 0; it must be above 0"),
    ("bridge", "--nproc_per_node -2", "--nproc_per_node is -2; it must be above 0"),
    ("bridge", "--host_memory_gb -1", "--host_memory_gb is -1.0; it must be above 0"),
    ("bridge", "--teacher_lora_rank -3", "--teacher_lora_rank is -3; it must be above 0"),
    ("bridge", "--node_rank 5 --nnodes 2 --master_addr a", "--node_rank 5 is not below --nnodes 2"),
    ("bridge", "--node_rank -1", "--node_rank is -1; it must be 0 or above"),
    ("bridge", "--master_port 99999", "--master_port is 99999; it must be at most 65535"),
    ("evaluate", "--top_p 1.5", "--top_p is 1.5; it must be at most 1"),
    ("evaluate", "--pass_threshold 2", "--pass_threshold is 2.0; it must be at most 1"),
    ("grpo", "--task places.py", "places.py: the place of 'a' is no file and no (hub id"),
    ("opd", "--dataset deep.jsonl", "deep.jsonl, line 1: not JSON (nested too deep)"),
    ("opd", "--rollouts deep.jsonl", "deep.jsonl, line 1: not JSON (nested too deep)"),
    ("grpo", "--output_dir damaged", "damaged/config.json is damaged; restore it, or choose anot"),
    ("grpo", "--model damaged --learning_rate 1e-6", "cannot load damaged"),
    ("opd", "--model unshaped --lora_rank 2 --learning_rate 1e-6", "config.json of unshaped is of"),
]
AS_PROCESSES = [CASES[0], CASES[1], *CASES[30:33]]


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "columns.jsonl").write_text('{"text": "1+1", "label": "2"}\n')
    (folder / "empty.jsonl").write_text("")
    good = '{"problem": "1+1", "answer": "2"}\n'
    (folder / "good.jsonl").write_text(good)
    (folder / "broken.jsonl").write_text(good * 2 + '{"problem": "1+1", "ans\n' + good)
    (folder / "latin.jsonl").write_bytes('{"problem": "\u00e9", "answer": "2"}\n'.encode("latin-1"))
    (folder / "twice.jsonl").write_text('{"problem": "1+1", "answer": "2", "answer": "3"}\n')
    unanswered = '{"problem": "1+2", "answer": null}\n'
    (folder / "unanswered.jsonl").write_text(unanswered + unanswered.replace("2", "3") + good)
    (folder / "huge.jsonl").write_text(json.dumps({"problem": "1+" * 10**6, "answer": "2"}))
    (folder / "table.parquet").write_bytes(b"PAR1 and nothing more")
    (folder / "lists.jsonl").write_text('{"problem": ["1+1"], "answer": "2"}\n')
    (folder / "surrogate.jsonl").write_text('{"problem": "1+1 \\ud800", "answer": "2"}\n')
    ids = '{"problem": "1+1", "completion": "2", "completion_ids": ["2"]}\n'
    (folder / "ids.jsonl").write_text(ids)
    (folder / "torn").mkdir()
    (folder / "torn" / "results.json").write_text('{"args": {"model": "toy/tea')
    asks = "def prompt(row): return row['problem']\n"
    grades = "def grade(completion, row): return 2\n"
    (folder / "broken.jinja").write_text("{% for message in %}")
    for name, code in (("ungraded", asks), ("words", asks + grades), ("generous", asks + grades)):
        code = code.replace("problem", "word") if name == "words" else code
        (folder / f"{name}.py").write_text(code)
    (folder / "deep.jsonl").write_text('{"problem": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    (folder / "places.py").write_text(asks + grades + "datasets = {'a': 3}\n")
    (folder / "preset.json").write_text('{"evaluate": {"tensor_parallel": 0}}')
    (folder / "damaged").mkdir()
    (folder / "damaged" / "config.json").write_text('{"model_type": "qwen')
    (folder / "folder").mkdir()
    (folder / "folder" / "good.jsonl").write_text(good)
    (folder / "occupied").mkdir()
    (folder / "occupied" / "thesis.txt").write_text("mine")
    for name in ("copy", "other", "unshaped"):
        shutil.copytree(ROOT / "toy" / "student", folder / name)
    config = folder / "unshaped" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 0}))
    tokenizer = folder / "other" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"Q"', '"\u00c4"'))
    return folder


def check_refusal(folder, before, code: int, stderr: str, message: str) -> None:
    """One line, exit code 2, and not a file touched."""
    assert code == 2, stderr
    (error,) = [line for line in stderr.splitlines() if line.strip()]
    assert error.startswith("error: ")
    assert message in error
    assert stamps(folder) == before


def stamps(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(("script", "flags", "message"), CASES)
def test_bad_input(bad_inputs, monkeypatch, capsys, script, flags, message):
    monkeypatch.chdir(bad_inputs)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
    module, before = importlib.import_module(script), stamps(bad_inputs)
    with pytest.raises(SystemExit) as stop:
        start(module.main, module.Args, module.__doc__)
    check_refusal(bad_inputs, before, stop.value.code, capsys.readouterr().err, message)


@pytest.mark.parametrize(("script", "flags", "message"), AS_PROCESSES)
def test_bad_input_of_a_child_process(bad_inputs, script, flags, message):
    before = stamps(bad_inputs)
    done = run_process(script, *flags.split(), cwd=bad_inputs)
    check_refusal(bad_inputs, before, done.returncode, done.stderr, message)


def test_the_initial_student_may_do_all_the_sampling(tmp_path):
    """--sample_from initial: the last step's samples are those of a student that has not moved."""
    drawn = {}
    for name, flags, rate in (
        ("policy", [], 1e-2),
        ("initial", ["--sample_from", "initial"], 1e-2),
        ("unmoved", [], 1e-30),
    ):
        flags = [*SMALL, *flags, "--warmup_steps", "0", "--num_steps", "3"]
        flags += ["--learning_rate", rate, "--output_dir", tmp_path / name]
        assert run("opd", *flags).returncode == 0
        lines = (tmp_path / name / "rollouts" / "step_3.jsonl").read_text().splitlines()
        drawn[name] = [json.loads(line)["completion_ids"] for line in lines]
    assert drawn["initial"] == drawn["unmoved"] != drawn["policy"]


def test_a_replaced_teacher_is_noticed(tmp_path):
    teacher, flags = tmp_path / "teacher", [*SMALL, "--num_steps", "2", "--output_dir"]
    shutil.copytree(ROOT / "toy" / "teacher", teacher)
    flags += [tmp_path / "run", "--teacher", teacher]
    assert run("opd", *flags).returncode == 0
    weights = bytearray((teacher / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (teacher / "model.safetensors").write_bytes(weights)
    done = run("opd", *flags)
    assert done.returncode == 2
    assert "teacher_fingerprint: " in done.stderr


def test_a_warmup_that_is_longer_than_the_run_is_told(tmp_path):
    flags = ["--prompts_per_step", "2", "--group_size", "2", "--num_steps", "1"]
    done = run("opd", *flags, "--output_dir", tmp_path / "run")
    assert done.returncode == 0
    told = "--warmup_steps 10 is above --num_steps 1: the rate ends at 10% of --learning_rate"
    assert told in done.stdout


def test_a_base_student_learns_to_stop(tmp_path):
    """Another EOS than its teacher's, and no template: warmup and OPD end turns at either."""
    student = changed_copy(tmp_path / "base", template=None, eos=OTHER_EOS)
    flags = [*SMALL, "--num_steps", "2", "--learning_rate", "1e-4"]
    warmup, final = tmp_path / "fkl", tmp_path / "fkl" / "final"
    done = run("fkl_warmup", *flags, "--model", student, "--output_dir", warmup)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((final / "generation_config.json").read_text())["eos_token_id"]) == 2
    done = run("opd", *flags, "--model", final, "--output_dir", tmp_path / "opd")
    assert done.returncode == 0, done.stderr
    assert metrics_of(tmp_path / "opd")[0]["rollout/truncated"] < 0.5


def test_another_config_leaves_the_folder_alone(trained):
    folder = trained / "grpo"
    before = stamps(folder)
    done = run("grpo", *TRAINERS["grpo"], "--output_dir", folder, "--temperature", "0.9")
    message = "temperature: 1.0 there, 0.9 here"
    check_refusal(folder, before, done.returncode, done.stderr, message)


def test_other_code_is_told(trained, tmp_path):
    folder = shutil.copytree(trained / "grpo", tmp_path / "grpo")
    told = f"the code has changed since {folder} was begun"
    assert told not in run("grpo", *TRAINERS["grpo"], "--output_dir", folder).stdout
    config = json.loads((folder / "config.json").read_text())
    config["environment"]["source_hash"] = "0123456789abcdef"
    (folder / "config.json").write_text(json.dumps(config))
    done = run("grpo", *TRAINERS["grpo"], "--output_dir", folder)
    assert done.returncode == 0
    assert told in done.stdout


HEALTHY = {"rollout/truncated": 0.1, "rollout/no_answer": 0.1, "rollout/length": 20.0}
HEALTHY |= {"rollout/accuracy": 0.5, "policy/entropy": 1.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"rollout/truncated": 1.0, "rollout/no_answer": 1.0}, ["--max_new_tokens"]),
        ({"rollout/no_answer": 1.0}, ["boxed"]),
        ({"policy/entropy": 0.09}, ["--learning_rate"]),
        ({"policy/entropy": 0.11}, []),
        ({"policy/entropy": None}, []),
        ({"rollout/length": 41.0}, ["longer is not better"]),
        ({"rollout/length": 41.0, "rollout/accuracy": 0.6}, []),
    ],
)
def test_what_goes_wrong_is_told(changes, said):
    told = [" ".join(pair) for pair in symptoms(HEALTHY, HEALTHY | changes)]
    assert len(told) == len(said)
    assert all(word in line for word, line in zip(said, told, strict=True))


def test_a_run_tells_it_once_with_the_flag(tmp_path):
    flags = ["--max_new_tokens", "1", "--num_steps", "3", "--output_dir", tmp_path / "run"]
    done = run("grpo", *SMALL, *flags)
    assert done.returncode == 0, done.stderr
    line = "step 1: every completion was cut off; raise --max_new_tokens"
    assert done.stdout.count("every completion was cut off") == done.stdout.count(line) == 1


def test_a_python_without_file_locks_is_one_line():
    code = "import sys, runpy; sys.modules['fcntl'] = None; sys.argv = ['grpo.py']; "
    code += f"runpy.run_path({str(ROOT / 'grpo.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    message = "error: this Python has no file locks; use Linux, macOS or WSL"
    assert done.stderr.splitlines()[-1] == message
