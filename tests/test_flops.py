"""FLOPs: against torch's own counter, and counted where they are spent."""

import pytest
import torch
from conftest import tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks import on_paper
from common.model import flops
from common.model.flops import forward_flops
from common.model.head import chunked_backward, frozen_hidden_states
from common.model.lora import add_adapters, init_adapters
from workflow import memory


def test_flops_are_those_that_torch_counts(tokenizer):
    """torch counts all T x T pairs of the eager attention; a causal one needs T (T + 1) / 2."""
    model = tiny_model(tokenizer, attn_implementation="eager")
    for prompt, completion in ((5, 9), (7, 1)):
        T = prompt + completion - 1
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            hidden = model.model(torch.arange(T)[None]).last_hidden_state
            model.lm_head(hidden[:, prompt - 1 :])
        attention = 4 * 2 * 4 * 8  # layers, heads, head size
        expected = counter.get_total_flops() - attention * (T**2 - T * (T + 1) / 2)
        assert forward_flops(model, [(prompt, completion)]) == expected
    shared = forward_flops(model, [(7, 1)] * 6, shared=6)
    assert forward_flops(model, [(7, 1)]) < shared < 6 * forward_flops(model, [(7, 1)])


def test_micro_batches_count_as_their_sequences(model):
    """Whatever the padding; a backward is worth two forwards; a filled-up micro-batch nothing."""
    lengths, loss = [(3, 4), (2, 1), (5, 2)], lambda logits: (logits.sum(), {})
    input_ids, mask = torch.ones(3, 9).long(), torch.zeros(3, 9, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(lengths):
        mask[row, prompt - 1 : prompt + completion - 1] = True
    flops.take("policy")
    frozen_hidden_states(model, input_ids, mask)
    frozen_hidden_states(model, torch.zeros(1, 1).long(), torch.zeros(1, 1, dtype=torch.bool))
    assert flops.take("policy") == forward_flops(model, lengths)
    chunked_backward(model, input_ids, mask, loss, inputs={}, denominator=1.0, chunk_size=4)
    assert flops.take("policy") == 3 * forward_flops(model, lengths)
    assert flops.take("policy") == flops.take("teacher") == 0.0


def test_an_update_of_adapters_counts_as_torch_counts_it(tokenizer):
    """It leaves out the products of the factors with each other, too: addmm_ is none of its kinds.
    Attention is as above, and backward computes it twice."""
    model = tiny_model(tokenizer, attn_implementation="eager")
    add_adapters(model, 4)
    init_adapters(model, 0)
    T, attention = 13, 4 * 2 * 4 * 8
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(torch.arange(T)[None]).last_hidden_state
        model.lm_head(hidden[:, 4:]).sum().backward()
    expected = counter.get_total_flops() - 3 * attention * (T**2 - T * (T + 1) / 2)
    assert flops.update_flops(model, [(5, 9)]) == expected


def test_flops_on_paper_are_those_that_are_counted():
    """benchmarks/on_paper.py goes by a config; the counter walks over a model's layers."""
    args = on_paper.Args(prompt=256, length=4096)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(memory.config_of("Qwen/Qwen3-1.7B"))
    shape = memory.shape_of("Qwen/Qwen3-1.7B")
    parts = on_paper.passes(shape, 1, args, 1, "score")
    counted = flops.forward_flops(model, [(args.prompt, args.length)])
    assert sum(part.flops for part in parts) == pytest.approx(counted, rel=1e-3)
