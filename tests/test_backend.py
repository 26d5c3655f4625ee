"""What of the vLLM backend needs no vLLM: choosing it, the order of its calls, gathering weights.
test_vllm.py has the real engine."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import generate, prompt_of, torchrun

import grpo
from common.model.lora import whole_weights
from common.run.errors import RunFailure, UserError
from common.run.process import start
from common.sampling import sampler, sync_proof
from common.sampling import vllm_engine as module
from common.sampling.sampler import make_engine, resolve_backend
from common.sampling.sync_proof import (
    WeightSyncError,
    check_canary,
    same_bits,
    stale_parameters,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def arguments(**own) -> SimpleNamespace:
    shared = {"backend": "auto", "vllm_gpu_memory": 0.4, "enforce_eager": False, "seed": 0}
    shared |= {"tensor_parallel": 1, "vllm_sequences": 256}
    sizes = {"max_prompt_tokens": 32, "max_new_tokens": 8, "dtype": "float32"}
    return SimpleNamespace(**{"model": "Qwen/Qwen3-1.7B"} | shared | sizes | own)


@pytest.fixture
def installed(monkeypatch):
    """Pretends that vLLM of a version, or none, is there."""

    def pretend(version: str | None, llm=None) -> None:
        monkeypatch.setattr(sampler, "find_spec", lambda name: version)
        vllm = SimpleNamespace(__version__=version, LLM=llm, SamplingParams=SimpleNamespace)
        monkeypatch.setitem(sys.modules, "vllm", vllm)

    return pretend


# === the choice ===


@pytest.mark.parametrize(
    ("version", "device", "own", "expected"),
    [
        (None, CPU, {}, "torch"),
        ("0.32.0", CPU, {}, "torch"),
        ("0.32.0", CPU, {"backend": "vllm"}, "vllm"),
        ("0.32.0", CUDA, {}, "vllm"),
        ("0.32.0+cpu", CUDA, {"backend": "torch"}, "torch"),
        (None, CUDA, {"model": "toy/teacher"}, "torch"),
        ("0.32.0", CUDA, {"model": "toy/teacher"}, "torch"),
        (None, CUDA, {"backend": "torch"}, "torch"),
    ],
)
def test_the_backend(version, device, own, expected, installed, capsys):
    installed(version)
    assert resolve_backend(arguments(**own), device) == expected
    assert capsys.readouterr().out == f"rollouts: {expected}\n"


@pytest.mark.parametrize(
    ("version", "device", "own", "message"),
    [
        (None, CPU, {"backend": "vllm"}, "not installed: pip install -r requirements-gpu.txt"),
        (None, CUDA, {}, "pip install -r requirements-gpu.txt; or insist with --backend torch"),
        ("0.31.2", CPU, {"backend": "vllm"}, "vLLM 0.31.2 is installed, 0.32.0 is needed"),
        ("0.33.0", CUDA, {}, "vLLM 0.33.0 is installed, 0.32.0 is needed"),
    ],
)
def test_the_backend_cannot_be_had(version, device, own, message, installed):
    installed(version)
    with pytest.raises(UserError, match=message):
        resolve_backend(arguments(**own), device)


# === the order of calls ===


class FakeLLM:
    """Records vLLM's calls; its model is the trained one, unless it slept with level 2."""

    def __init__(self, name, **settings):
        self.settings, self.calls, self.asleep = settings, [], set()
        torch.set_num_threads(1)  # as vLLM does
        torch.backends.cuda.enable_cudnn_sdp(False)

    def apply_model(self, function):
        assert "weights" not in self.asleep
        return [function(self)]

    def load_weights(self, pairs):
        self.calls.append("load")
        self.weights = {name: weight.clone() for name, weight in pairs}

    def get_submodule(self, name):
        return None  # shared with no other rank

    def named_parameters(self):
        self.calls.append("prove")
        return self.weights.items()

    def sleep(self, level):
        self.calls.append(f"sleep {level}")
        self.asleep = {"weights", "kv_cache"}

    def wake_up(self, tags=("weights", "kv_cache")):
        self.calls.append(f"wake {'+'.join(tags)}")
        self.asleep -= set(tags)

    def reset_prefix_cache(self):
        self.calls.append("reset")
        return True

    def generate(self, prompts, sampling, use_tqdm):
        assert not self.asleep
        self.calls.append("generate")
        sample = SimpleNamespace(token_ids=[3, 4], logprobs=SimpleNamespace(logprobs=[-1.0, -2.0]))
        return [SimpleNamespace(outputs=[sample]) for _ in prompts]


@pytest.fixture
def made(model, tokenizer, installed, monkeypatch):
    """An engine over a FakeLLM, as on a GPU."""

    def make(trained: bool = True):
        installed("0.32.0", FakeLLM)
        monkeypatch.setattr(module.VLLMEngine, "canary_difference", lambda self: (0.0, 0.0))
        monkeypatch.setattr(module, "device_of", lambda model: CUDA)
        policy = model.requires_grad_(trained)
        return make_engine("vllm", policy, tokenizer, [prompt_of("1", [5, 6])], arguments())

    return make


SAMPLE = {"max_new_tokens": 2, "temperature": 1.0}


def test_a_trained_engine_wakes_for_new_weights_only(made):
    engine = made()
    generate(engine, [[5, 6]], 1, **SAMPLE)
    generate(engine, [[5, 6]], 1, **SAMPLE)  # a refill
    engine.sleep()
    engine.sync()
    generate(engine, [[5, 6]], 1, **SAMPLE)
    start_up = ["load", "prove", "reset"]
    step = ["generate", "generate", "sleep 2"]
    sync = ["wake weights", "load", "prove", "wake kv_cache", "reset"]
    assert engine.llm.calls == [*start_up, *step, *sync, "generate"]


def test_a_trained_engine_that_slept_refuses_to_sample_before_a_sync(made):
    engine = made()
    engine.sleep()
    with pytest.raises(WeightSyncError, match="before a sync"):
        generate(engine, [[5, 6]], 1, **SAMPLE)


def test_a_frozen_engine_gets_its_weights_back_when_it_samples(made):
    """From the trainer's model, not from a copy in host memory; and proven again."""
    engine = made(trained=False)
    for _ in range(2):
        generate(engine, [[5, 6]], 1, **SAMPLE)
        engine.sleep()
    start_up, step = ["load", "prove", "reset"], ["generate", "sleep 2"]
    sync = ["wake weights", "load", "prove", "wake kv_cache", "reset"]
    assert engine.llm.calls == [*start_up, *step, *sync, *step]


def test_a_prefix_cache_that_stays_is_an_error(made, monkeypatch):
    engine = made()
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(WeightSyncError, match="keeps prefixes"):
        engine.sync()


def test_vllm_does_not_take_the_trainers_threads_and_attention(made):
    torch.set_num_threads(2)
    made()
    assert torch.get_num_threads() == 2
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_attention_multiplies_float32_as_such(installed, monkeypatch):
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    installed("0.32.0")
    resolve_backend(arguments(backend="vllm"), CPU)
    code = "import os; print(os.environ['TRITON_F32_DEFAULT'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "ieee\n"


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_only_ranks_that_share_an_engine_schedule_in_step(monkeypatch, tensor_parallel):
    monkeypatch.setattr(module, "num_ranks", lambda: 2)
    core = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "vllm.v1.engine", SimpleNamespace(core=core))
    settings = module._inside_ranks(tensor_parallel)
    assert settings["tensor_parallel_size"] == tensor_parallel
    assert ("async_scheduling" in settings) == (tensor_parallel == 2)
    assert ("disable_custom_all_reduce" in settings) == (tensor_parallel == 2)


def test_the_engine_starts_without_weights_and_compiles(made, capsys):
    settings = made().llm.settings
    assert "starting vLLM for" in capsys.readouterr().out  # minutes of silence otherwise
    assert settings["load_format"] == "dummy"
    assert settings["enable_sleep_mode"]
    assert not settings["enforce_eager"]
    assert settings["gpu_memory_utilization"] == 0.4
    assert settings["max_model_len"] == 40


def test_a_nan_in_the_canary_is_an_error(made, monkeypatch):
    engine = made()
    monkeypatch.setattr(engine, "canary_difference", lambda: (float("nan"), float("nan")))
    with pytest.raises(WeightSyncError, match="nan in the mean"):
        engine.sync()


CANARY_DIFFERENCE = module.VLLMEngine.canary_difference


def test_the_canary_compares_sampled_tokens_alone(made, model):
    """FakeLLM samples 3, 4 behind every prompt, with log-probs of -1 and -2."""
    engine = made()
    engine.canary = [[5, 6], [7, 8, 9, 10]]
    differences = []
    for prompt in engine.canary:
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + [3]])).logits[0, -2:].log_softmax(-1)
        differences += [abs(logprobs[0, 3].item() + 1), abs(logprobs[1, 4].item() + 2)]
    expected = (sum(differences) / 4, max(differences))
    assert CANARY_DIFFERENCE(engine) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("dtype", "mean", "outcome"),
    [
        (torch.float32, 9e-4, ""),
        (torch.float32, 2e-3, "error"),
        (torch.bfloat16, 0.09, ""),
        (torch.bfloat16, 0.2, "warning"),
        (torch.bfloat16, 0.6, "error"),
        (torch.bfloat16, float("nan"), "error"),
    ],
)
def test_how_far_the_canary_may_be(dtype, mean, outcome, capsys):
    sync_proof._warn.cache_clear()
    for _ in range(3):
        if outcome == "error":
            with pytest.raises(WeightSyncError, match="computes with others"):
                check_canary(mean, 1.0, dtype)
        else:
            check_canary(mean, 1.0, dtype)
    assert capsys.readouterr().out.count("\n") == (outcome == "warning")  # once


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RunFailure("vLLM stopped"), ["vLLM stopped; the same command goes on"]),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.50 GiB.\nGPU 0 has"),
            ["allocate 9.50 GiB", "lower --micro_batch_tokens", "--cpu_offload"],
        ),
    ],
    ids=["failure", "memory"],
)
def test_a_failed_run_is_one_line_and_exit_code_1(monkeypatch, capsys, error, said):
    def main(args):
        raise error

    monkeypatch.setattr(sys, "argv", ["grpo.py"])
    with pytest.raises(SystemExit) as stop:
        start(main, grpo.Args, "")
    assert stop.value.code == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert [words for words in said if words not in printed] == []


# === weights ===


class Engine(torch.nn.Module):
    """A stand-in for vLLM's module: q, k and v packed into one parameter, a padded vocabulary."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self, tensors):
        super().__init__()
        self.tensors = tensors

    def named_parameters(self):
        return self.tensors.items()

    def get_submodule(self, name):
        return None  # shared with no other rank


def packed(model, dtype=torch.float32) -> dict[str, torch.Tensor]:
    tensors = dict(whole_weights(model, dtype))
    for layer in range(2):
        stem = f"model.layers.{layer}.self_attn."
        parts = [tensors.pop(f"{stem}{part}_proj.weight") for part in "qkv"]
        tensors[f"{stem}qkv_proj.weight"] = torch.cat(parts)
    padding = torch.full((24, 32), 7.0, dtype=dtype)
    name = "model.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], padding])
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_parameters(model, dtype):
    stale, count = stale_parameters(Engine(packed(model, dtype)), model, dtype)
    assert stale == []
    assert count == len(list(model.parameters()))


def test_one_bit_is_enough(model):
    tensors = packed(model)
    rows = tensors["model.layers.1.self_attn.qkv_proj.weight"]
    queries = dict(model.named_parameters())["model.layers.1.self_attn.q_proj.weight"]
    rows[len(queries), 3] = torch.nextafter(rows[len(queries), 3], torch.tensor(9.0))
    stale, _ = stale_parameters(Engine(tensors), model, torch.float32)
    assert stale == ["model.layers.1.self_attn.k_proj.weight"]


def test_what_cannot_be_compared_is_stale(model):
    tensors = packed(model)
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.empty(0)  # packed away
    tensors["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(99, 32)
    tensors["model.norm.bias"] = torch.zeros(32)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    stale, count = stale_parameters(Engine(tensors), model, torch.float32)
    assert set(stale) == {
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.self_attn.o_proj.weight (rows beyond the model's)",
        "model.norm.bias (not in the model)",
        "model.norm.bias (rows beyond the model's)",
        "model.layers.1.mlp.up_proj.weight (not in vLLM)",
    }
    assert count == len(list(model.parameters())) - 1


def test_same_bits():
    one, nan = torch.tensor([1.0]), torch.tensor([float("nan")])
    assert same_bits(one, one.clone())
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(one, one.bfloat16())
    assert not same_bits(one, torch.ones(2))


SHARDED = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3Config, Qwen3ForCausalLM
from common.model.lora import whole_weights
from common.sampling.sync_proof import same_bits

dist.init_process_group("gloo")
torch.manual_seed(0)
shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=101, tie_word_embeddings=True, **shape))
plain = {name: weight.clone() for name, weight in whole_weights(model, torch.bfloat16)}
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
gathered = dict(whole_weights(model, torch.bfloat16))
assert plain.keys() == gathered.keys() and "lm_head.weight" not in plain
assert all(same_bits(gathered[name], plain[name]) for name in plain)
if dist.get_rank() == 0:
    print("equal", len(plain))
dist.destroy_process_group()
"""


OFFLOADED = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from common.model import head as chunked

dist.init_process_group("gloo")
torch.manual_seed(0)
shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=101, tie_word_embeddings=False, **shape))
policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
for module in (*model.model.layers, model):
    own = {"mp_policy": policy, "offload_policy": CPUOffloadPolicy(pin_memory=False)}
    fully_shard(module, reshard_after_forward=True, **own)
original, moved = DTensor.from_local, []

def planted(tensor, mesh, placements, **own):
    # On a GPU this moves `tensor`, a shard of a gradient in host memory, to the device.
    if tensor.dtype == torch.float32 and all(placement.is_shard() for placement in placements):
        moved.append(tensor.shape)
    return original(tensor, mesh, placements, **own)

DTensor.from_local = planted
ids, mask = torch.arange(12)[None] % 101, torch.ones(1, 12, dtype=torch.bool)
for number in (1, 2):
    hidden = chunked.hidden_states(model, ids, mask)
    assert hidden.dtype == torch.bfloat16
    loss = lambda logits: (logits.float().logsumexp(-1).sum(), {})
    chunked.head_backward(hidden, model, loss, inputs={}, denominator=1.0, chunk_size=5)
head = model.get_output_embeddings().weight
assert head.grad.to_local().device == head.to_local().device and not moved, moved
logits = (hidden @ chunked.head_weight(model, torch.bfloat16).T).float()
expected = 2 * logits.softmax(-1).T @ hidden.float()
error = (head.grad.full_tensor() - expected).abs().max() / expected.abs().max()
assert error < 0.02, error
print("same")
dist.destroy_process_group()
"""


def test_an_offloaded_gradient_stays_in_host_memory(tmp_path):
    """DTensor.from_local moves its tensor to the mesh's device: on a GPU a crash."""
    assert torchrun(OFFLOADED, tmp_path, ranks=1) == "same\n"


def test_a_sharded_model_is_gathered_whole(tmp_path):
    """Two gloo ranks, FSDP2, tied embeddings, sizes that do not divide by two."""
    assert torchrun(SHARDED, tmp_path) == "equal 24\n"
