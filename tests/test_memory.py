"""The memory plan against what is measured on a CPU, with the shapes of two real models."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

import grpo
import opd
from common.run.inputs import ROOT
from workflow import memory

SHAPES = {
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=10,  # of 30
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "Qwen3-0.6B": Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=8,  # of 28
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
}
# sequences, prompt tokens, completion tokens, activation checkpointing
BATCHES = {"SmolLM2-135M": (3, 64, 448, False), "Qwen3-0.6B": (1, 64, 192, True)}

UPDATE = """
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
import grpo
from common.model.load import _recompute_activations
from common.sampling.rollout import Rollout

def peak():  # of resident memory, bytes
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

config, (count, prompt, completion), flags = json.loads(sys.argv[1])
args = grpo.Args(**flags)
before = peak()
config = AutoConfig.for_model(**config)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
_recompute_activations(model, args)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
rollouts = []
for i in range(count):
    ids = torch.randint(config.vocab_size, (prompt + completion,)).tolist()
    rollouts.append(Rollout(ids[:prompt], ids[prompt:], -torch.ones(completion), "eos", ""))
    rollouts[-1].advantage = 1.0 if i % 2 else -1.0
for _ in range(2):
    grpo.backward(model, rollouts, args)
    optimizer.step()
    optimizer.zero_grad()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_the_plan_is_within_15_percent_of_the_measured_peak(name):
    count, prompt, completion, again = BATCHES[name]
    flags = {
        "max_prompt_tokens": prompt,
        "max_new_tokens": completion,
        "micro_batch_tokens": count * (prompt + completion),
    }
    flags |= {"kl_coef": 0.0, "chunk_size": 512, "activation_checkpointing": again}
    sizes = (count, prompt, completion)
    done = subprocess.run(
        [sys.executable, "-c", UPDATE, json.dumps([SHAPES[name].to_dict(), sizes, flags])],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    measured = float(done.stdout)
    with torch.device("meta"):
        shape = memory.shape_of_model(AutoModelForCausalLM.from_config(SHAPES[name]))
    planned = memory.plan(grpo.Args(**flags), shape, [], shape, ranks=1, loss_is_fused=True).peak(
        "update"
    )
    print(f"{name}: {measured / 1e9:.2f} GB measured, {planned / 1e9:.2f} GB planned")
    assert planned == pytest.approx(measured, rel=0.15)


def test_known_shapes_have_their_size():
    """Parameters as their model cards say."""
    for name, params in (("0.6B", 0.596), ("1.7B", 1.72), ("8B", 8.19), ("14B", 14.77)):
        shape = memory.shape_of(f"Qwen/Qwen3-{name}")
        assert shape.params / 1e9 == pytest.approx(params, rel=0.01)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2"},  # its layers have other names
        {"model_type": "unheard_of"},
        {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}},
        {},
        [],
        {"model_type": "qwen3", "hidden_size": None},
        {"model_type": "qwen3", "num_attention_heads": 0},
        {"model_type": "qwen3", "vocab_size": -1},
    ],
)
def test_a_config_that_it_cannot_read_has_no_plan_and_runs_no_code(tmp_path, config):
    (tmp_path / "code.py").write_text("raise SystemExit('the code of a model ran')")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert memory.shape_of(str(tmp_path)) is None
    assert memory.shape_of("/no/such/folder") is None


def plan_of(name: str, ranks: int, **flags) -> memory.Plan:
    shape = memory.shape_of(name)
    own = {"dtype": "bfloat16", "max_prompt_tokens": 3072, "max_new_tokens": 16384}
    own |= {"micro_batch_tokens": 1, "activation_checkpointing": True, "chunk_size": 1024}
    args = grpo.Args(**own | flags)
    return memory.plan(args, shape, [shape], shape, ranks, gpu_memory=80e9, loss_is_fused=True)


def test_an_8b_teacher_fits_one_gpu_with_its_states_in_host_memory_only():
    states = 16 * memory.shape_of("Qwen/Qwen3-8B").params
    assert states / 1e9 == pytest.approx(131, rel=0.01)
    assert plan_of("Qwen/Qwen3-8B", 1).device > 80e9
    offloaded = plan_of("Qwen/Qwen3-8B", 1, cpu_offload=True)
    assert offloaded.device < 80e9
    assert offloaded.host > states
    assert plan_of("Qwen/Qwen3-8B", 8).device < 80e9


def test_ranks_divide_what_is_sharded_and_nothing_else():
    one, eight = plan_of("Qwen/Qwen3-8B", 2), plan_of("Qwen/Qwen3-8B", 16)
    for a, b in zip(one.items, eight.items, strict=True):
        divided = any(word in a.name for word in ("float32", "frozen")) and "head" not in a.name
        assert b.size == pytest.approx(a.size / 8 if divided else a.size), a.name


def test_what_vllm_needs_is_more_than_weights():
    """Qwen3-8B at 19,456 tokens: 16.4 GB of weights, 2.9 GB of cache a sequence, and buffers."""
    shape = memory.shape_of("Qwen/Qwen3-8B")
    own = {"dtype": "bfloat16", "max_prompt_tokens": 3072, "max_new_tokens": 16384}
    needs = memory.engine_size(grpo.Args(**own), shape)
    cache = 4 * 19_456 * 36 * 2 * 8 * 128 * 2
    sampler = 4 * 4 * 256 * 151_936
    assert needs > 2 * shape.params + cache + sampler
    assert needs < 1.1 * (2 * shape.params + cache + sampler + memory.GRAPHS)
    shared = memory.engine_size(grpo.Args(**own, tensor_parallel=4), shape)
    assert (2 * shape.params + cache) / 4 + sampler < shared < needs / 2


def test_losses_of_plain_torch_take_copies_of_a_chunk_on_a_gpu():
    """On a CPU they are made of a few rows at a time."""
    shape, args = memory.shape_of("Qwen/Qwen3-1.7B"), opd.Args(chunk_size=1024)
    for gpu_memory, copies in ((80e9, memory.LOSS_COPIES), (None, 0)):
        fused, plain = (
            memory.plan(args, shape, [shape], shape, 1, gpu_memory, loss_is_fused=fused)
            for fused in (True, False)
        )
        assert plain.peak("update") - fused.peak("update") == 1024 * 151_936 * copies


def test_adapters_take_megabytes():
    """Qwen3-8B, rank 32: 87.3 million adapters of 8.2 billion weights, by hand; no second copy as
    reference, no gradient of head or embedding."""
    base = {"dtype": "bfloat16", "max_prompt_tokens": 3072, "max_new_tokens": 16384}
    args = grpo.Args(model="Qwen/Qwen3-8B", lora_rank=32, **base)
    shape = memory.shape_of(args.model)
    plan = memory.plan(args, shape, [], shape, 1, 80e9, loss_is_fused=True)
    sizes = {item.name: item.size for item in plan.items}
    q_and_o, k_and_v, mlp = 2 * (4096 + 4096), 2 * (4096 + 1024), 3 * (4096 + 12288)
    adapters = 32 * 36 * (q_and_o + k_and_v + mlp)
    assert sizes["weights, float32"] == 4 * adapters
    assert sizes["AdamW's moments, float32"] == 8 * adapters
    assert sizes["merged weight of a linear layer"] == (4 + 2) * 4096 * 12288
    assert sizes["frozen weights"] == 2 * memory.shape_of("Qwen/Qwen3-8B").params
    assert "frozen model" not in sizes
