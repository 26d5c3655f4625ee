"""LoRA: against the explicit sum, peft's own reading, and what must not move."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import gradients, tiny_model, torchrun
from safetensors.torch import load_file
from test_scripts import SMALL, metrics_of, run
from torch import nn
from transformers import AutoModelForCausalLM

import fkl_warmup
import grpo
import opd
from common.model.load import load_for_training
from common.model.lora import (
    AdaptersOff,
    LoRALinear,
    add_adapters,
    init_adapters,
    layers_of,
    trained_parameters,
    weight_names,
    whole_weights,
)
from common.model.save import save_final
from common.run.checkpoint import prepare_state, training_state
from common.run.errors import UserError
from common.run.inputs import ROOT

CPU = torch.device("cpu")
IDS = torch.arange(3, 19)[None]


def adapted(tokenizer, rank: int = 4, moved: bool = True, **changes):
    model = tiny_model(tokenizer, **changes)
    add_adapters(model, rank)
    init_adapters(model, seed=3)
    if moved:
        with torch.no_grad():
            for layer in layers_of(model).values():
                layer.lora_B.normal_(0, 0.1)
    return model


def test_every_linear_layer_of_the_decoder_is_adapted_and_nothing_else(tokenizer):
    model = adapted(tokenizer, tie_word_embeddings=False)
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(layers_of(model)) == linear - {"lm_head"}
    assert len(layers_of(model)) == 2 * 7
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"{layer}.{kind}" for layer in layers_of(model) for kind in ("lora_A", "lora_B")
    }
    assert weight_names(model) == [
        n for n, _ in tiny_model(tokenizer, tie_word_embeddings=False).named_parameters()
    ]


def test_the_model_computes_with_the_merged_weights(tokenizer):
    """In float64: W + alpha / R B A, by hand."""
    model, plain = adapted(tokenizer), tiny_model(tokenizer).double()
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            added = 32 / 4 * layer.lora_B.double() @ layer.lora_A.double()
            plain.get_submodule(name).weight += added
        expected = plain(IDS).logits
        torch.testing.assert_close(model(IDS).logits.double(), expected, atol=1e-4, rtol=1e-4)
    for name, weight in whole_weights(model, torch.float32):
        torch.testing.assert_close(weight.double(), plain.get_parameter(name), atol=1e-6, rtol=1e-6)
    for dtype in (torch.bfloat16, torch.float32):  # made in float32 and rounded once
        exact = dict(whole_weights(model, torch.float32))
        assert all(torch.equal(w, exact[n].to(dtype)) for n, w in whole_weights(model, dtype))


def test_the_start_is_the_base_to_the_bit_and_so_is_the_reference(tokenizer):
    with torch.no_grad():
        base, fresh = tiny_model(tokenizer)(IDS).logits, adapted(tokenizer, moved=False)
        assert torch.equal(fresh(IDS).logits, base)
        moved = adapted(tokenizer)
        assert not torch.equal(moved(IDS).logits, base)
        assert torch.equal(AdaptersOff(moved)(input_ids=IDS).logits, base)
        assert not torch.equal(moved(IDS).logits, base)  # they are on again


@pytest.mark.parametrize("chunk_size", [3, 100])
def test_gradients_are_the_adapters_and_no_others(tokenizer, rollouts, chunk_size):
    """grpo.backward against one backward of the whole; nothing is allocated for what is frozen."""
    model = adapted(tokenizer)
    args = grpo.Args(group_size=4, kl_coef=0.0, chunk_size=chunk_size, lora_rank=4)
    grpo.set_advantages(rollouts, args)
    grpo.backward(model, rollouts, args)
    frozen = [n for n, p in model.named_parameters() if p.grad is not None and not p.requires_grad]
    assert frozen == []
    chunked = gradients(model)
    loss = torch.zeros(())
    for rollout in grpo.with_gradient(rollouts, args):
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        logits = model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
        count = len(rollout.completion_ids)
        ones = torch.ones(count)
        loss = (
            loss
            + grpo.loss_fn(
                logits,
                torch.tensor(rollout.completion_ids),
                rollout.advantage * ones,
                rollout.weight * ones,
                rollout.logprobs,
                None,
                None,
                args,
            )[0]
        )
    (loss / grpo.denominator_of(rollouts, args)).backward()
    whole = gradients(model)
    assert chunked.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(chunked[name], whole[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_layer_against_autograd_of_the_sum_in_float64(dtype, near):
    layer = LoRALinear(nn.Linear(48, 24).to(dtype).requires_grad_(False), 4)
    nn.init.normal_(layer.lora_A), nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 5, 48, dtype=dtype, requires_grad=True)
    ours = (x, layer.lora_A, layer.lora_B)
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    weight = layer.weight.double() + 32 / 4 * exact[2] @ exact[1]
    expected = exact[0] @ weight.T + layer.bias.double()
    slope = torch.randn_like(expected)
    expected.backward(slope)
    out = layer(x)
    out.backward(slope.to(dtype))
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    for actual, wanted in pairs:
        assert (actual - wanted).norm() < near * wanted.norm()


EXACT = """
from pathlib import Path
import torch
import grpo
from common.model.head import head_logprobs, hidden_states
from common.model.load import load_for_training, load_model
from common.model.lora import AdaptersOff, trained_parameters
from common.model.save import save_final
from common.model.tokenizer import load_tokenizer
from common.run.ranks import gather, join_ranks, rank
from common.sampling.torch_engine import TorchEngine

args = grpo.Args(model="toy/student", dtype="bfloat16", lora_rank=8, **FLAGS)
device, tokenizer = join_ranks("cpu", args.dtype), load_tokenizer(args.model)
model = load_for_training(args.model, args, device, trainable=True)
optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-6, fused=True)
ids = torch.arange(3, 99)[None]
mask = torch.ones_like(ids, dtype=torch.bool)

def scored(model):
    with torch.no_grad():
        return head_logprobs(hidden_states(model, ids, mask), model, ids[0], 1.0, 1024)

def sampled(model):
    options = dict(seeds=[(0,)], max_new_tokens=8, temperature=1.0)
    (rollout,) = TorchEngine(model, tokenizer).generate([ids[0, :9].tolist()], 1, **options)
    return torch.tensor(rollout.completion_ids), rollout.logprobs

for step in range(20):
    hidden_states(model, ids, mask).float().pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
save_final(model, tokenizer, Path("FINAL"))
gather([])  # the first rank has written it
anew, base = (load_model(name, args.dtype, device) for name in ("FINAL", args.model))
assert torch.equal(scored(model), scored(anew))
assert all(map(torch.equal, sampled(model), sampled(anew)))
assert torch.equal(scored(AdaptersOff(model)), scored(base))
changed = [(a != b).sum() for a, b in zip(anew.parameters(), base.parameters())]
if rank() == 0:
    print(sum(count > 0 for count in changed).item(), sum(changed).item())
"""


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, {"activation_checkpointing": True}),
        pytest.param(1, {"cpu_offload": True}, marks=pytest.mark.slow),
        pytest.param(2, {}, marks=pytest.mark.slow),
    ],
)
def test_what_is_trained_samples_and_is_saved_to_the_bit(tmp_path, ranks, flags):
    """In bfloat16 at a rate of 1e-6: updates add up in the factors until weights change."""
    code = EXACT.replace("FLAGS", repr(flags)).replace("FINAL", str(tmp_path / "final"))
    layers, weights = map(int, torchrun(code, tmp_path, ranks).split()[-2:])
    assert layers == 14
    assert weights > 100


def test_the_base_never_moves(tokenizer):
    """200 optimizer steps and syncs at a high rate: equal to the bit to what was loaded."""
    model, before = adapted(tokenizer), dict(tiny_model(tokenizer).named_parameters())
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-2, fused=True)
    for _ in range(200):
        model(IDS).logits.logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        sent = dict(whole_weights(model, torch.bfloat16))
    assert all(torch.equal(before[name], model.get_parameter(name)) for name in before)
    assert any(not torch.equal(sent[name], before[name].bfloat16()) for name in before)


def test_a_checkpoint_holds_adapters_only(tokenizer):
    model = adapted(tokenizer)
    optimizer = torch.optim.AdamW(trained_parameters(model))
    prepare_state(optimizer)
    state = training_state(model, optimizer)
    assert len(state) == len(trained_parameters(model)) * 4
    assert all(".lora_" in name for name in state)


def test_the_final_model_is_merged_and_peft_reads_the_adapter(tokenizer, tmp_path):
    from peft import PeftModel

    model = adapted(tokenizer)
    model.name_or_path = str(tmp_path / "base")
    tiny_model(tokenizer).save_pretrained(tmp_path / "base")
    save_final(model, tokenizer, tmp_path / "final")
    final = load_file(tmp_path / "final" / "model.safetensors")
    expected = dict(whole_weights(model, torch.float32))
    assert final.keys() == expected.keys()
    assert all(torch.equal(final[name], expected[name]) for name in final)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        logits = model(IDS).logits
        theirs = PeftModel.from_pretrained(base, tmp_path / "final" / "adapter").eval()(IDS).logits
        torch.testing.assert_close(theirs, logits, atol=1e-5, rtol=1e-5)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()(IDS).logits
        torch.testing.assert_close(merged, logits, atol=1e-5, rtol=1e-4)


def test_ranks_that_are_too_large(tokenizer):
    with pytest.raises(UserError, match="--lora_rank 17 is above the width of .*, 16"):
        add_adapters(tiny_model(tokenizer), 17)


@pytest.mark.parametrize("module", [grpo, opd, fkl_warmup])
def test_adapters_begin_alike_whatever_else_was_drawn(module):
    args = module.Args(lora_rank=2)
    torch.rand(17)
    one = load_for_training("toy/student", args, CPU, trainable=True)
    torch.rand(3)
    other = load_for_training("toy/student", args, CPU, trainable=True)
    seeded = load_for_training(
        "toy/student", dataclasses.replace(args, seed=1), CPU, trainable=True
    )
    pairs = [(one.get_parameter(n), other.get_parameter(n)) for n, _ in one.named_parameters()]
    assert all(torch.equal(a, b) for a, b in pairs)
    layers, others = layers_of(one), layers_of(seeded)
    assert len({layer.in_features / layer.out_features for layer in layers.values()}) > 1
    starts = {layer.lora_A.flatten()[0].item() for layer in layers.values()}
    assert len(starts) == len(layers)  # each from a seed of its own
    for name, layer in layers.items():
        assert not torch.equal(layer.lora_A, others[name].lora_A)
        # Uniform in +-1/sqrt(in): the largest of so many is just below.
        assert 0.9 < layer.lora_A.abs().max() * layer.in_features**0.5 <= 1
        assert layer.lora_B.count_nonzero() == 0


@pytest.mark.parametrize(
    "script",
    ["grpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("opd", "fkl_warmup"))],
)
def test_a_run_resumes_exactly_and_starts_at_its_base(tmp_path, script):
    flags = [*SMALL, "--lora_rank", "4", "--learning_rate", "2e-3", "--checkpoint_every", "1"]
    flags += ["--num_steps", "3", "--output_dir"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(script, *flags, whole).returncode == 0
    shutil.copytree(whole, cut)
    (cut / "manifest.json").unlink()
    shutil.rmtree(cut / "checkpoints" / "step_3")
    shutil.rmtree(cut / "final")
    again = run(script, *flags, cut)
    assert "after step 2" in again.stdout
    for name in ("final/model.safetensors", "final/adapter/adapter_model.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    base = load_file(
        ROOT / "toy" / ("teacher" if script == "grpo" else "student") / "model.safetensors"
    )
    final = load_file(whole / "final" / "model.safetensors")
    moved = {name for name in base if not torch.equal(base[name], final[name])}
    assert moved == {name for name in base if "proj" in name}
    adapters = load_file(whole / "final" / "adapter" / "adapter_model.safetensors")
    saved = sum(path.stat().st_size for path in (cut / "checkpoints" / "step_3").iterdir())
    assert saved < 1.5 * 3 * 4 * sum(t.numel() for t in adapters.values())
    assert json.loads((whole / "final/adapter/adapter_config.json").read_text())["r"] == 4
    if script == "grpo":
        distance = [row["policy/kl_ref"] for row in metrics_of(whole)]
        assert distance[0] == 0.0
        assert distance[-1] > 0
