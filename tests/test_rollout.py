"""Rollouts: their log-probs, their seeds, how they end, and what they do not depend on."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import (
    SAMPLED,
    SEED,
    generate,
    problem_of,
    prompt_of,
    prompts_of_many_lengths,
    tiny_model,
)
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from common.model.logprob import likeliest, token_logprobs
from common.model.tokenizer import end_ids
from common.run.errors import UserError
from common.run.folder import write_jsonl
from common.sampling import decoding
from common.sampling.rollout import KEY, Rollout, load_rollouts, rollout_metrics, verify
from common.sampling.sampler import sample_and_verify
from common.sampling.torch_engine import TorchEngine, _kept, draw, rows_that_fit
from common.tasks.data import Prompt
from common.tasks.task import OUTCOMES, Task


def same(a, b) -> bool:
    pairs = zip(a, b, strict=True)
    return all(x.completion_ids == y.completion_ids and x.finish == y.finish for x, y in pairs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_sampling_distribution(model, tokenizer, temperature):
    """Against transformers' logits of each whole sequence by itself: no cache, padding or batch."""
    prompts = prompts_of_many_lengths(tokenizer)
    sampled = SAMPLED | {"temperature": temperature}
    for rollout in generate(TorchEngine(model, tokenizer), prompts, 3, **sampled):
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        logits = model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
        expected = token_logprobs(logits, torch.tensor(rollout.completion_ids), temperature)[0]
        torch.testing.assert_close(rollout.logprobs, expected, atol=1e-5, rtol=1e-4)
        assert (rollout.logprobs <= 0).all()


def test_greedy_is_transformers_generate(model, tokenizer):
    prompts = prompts_of_many_lengths(tokenizer)
    rollouts = generate(TorchEngine(model, tokenizer), prompts, 1, **SAMPLED | {"temperature": 0.0})
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=SAMPLED["max_new_tokens"],
        )
        assert rollout.completion_ids == expected[0, len(prompt) :].tolist()


def test_a_sample_depends_on_its_seed_alone(model, tokenizer):
    """Not on the batch size, on who shares the batch, or on who has finished."""
    prompts = prompts_of_many_lengths(tokenizer)
    whole = generate(TorchEngine(model, tokenizer), prompts, 4, **SAMPLED)
    small = generate(TorchEngine(model, tokenizer, batch_size=4), prompts, 4, **SAMPLED)
    assert same(whole, small)
    fewer = generate(TorchEngine(model, tokenizer), prompts[:2], 2, **SAMPLED)
    assert same(fewer, [whole[0], whole[1], whole[4], whole[5]])
    other = generate(TorchEngine(model, tokenizer), prompts, 4, **SAMPLED | {"seed": (SEED, 1)})
    assert not same(whole, other)
    groups = [whole[first : first + 4] for first in range(0, len(whole), 4)]
    assert any(len({tuple(r.completion_ids) for r in group}) == 4 for group in groups)


def test_every_eos_id_ends_a_completion(model, tokenizer):
    ends = set(end_ids(tokenizer, model))
    assert ends == {tokenizer.eos_token_id, *range(10, 20)}
    rollouts = generate(
        TorchEngine(model, tokenizer), prompts_of_many_lengths(tokenizer), 8, **SAMPLED
    )
    for rollout in rollouts:
        *before, last = rollout.completion_ids
        assert not ends.intersection(before)
        assert (rollout.finish == "eos") == (last in ends)
        assert rollout.finish == "eos" or len(rollout.completion_ids) == SAMPLED["max_new_tokens"]
    assert Counter(rollout.finish for rollout in rollouts).keys() == {"eos", "length"}
    seen = {rollout.completion_ids[-1] for rollout in rollouts if rollout.finish == "eos"}
    assert len(seen) > 1


def test_sampling_follows_the_distribution():
    """20,000 stratified uniforms: each token's share is its probability to 1e-3."""
    logits = torch.tensor([2.0, 0.0, -torch.inf, 1.0, -3.0])
    count = 20_000
    uniforms = (torch.arange(count) + 0.5) / count
    tokens = draw(logits.expand(count, -1), uniforms, 1.0, 1.0, 0)[0]
    shares = torch.bincount(tokens, minlength=5) / count
    torch.testing.assert_close(shares, logits.softmax(-1), atol=1e-3, rtol=0)
    assert shares[2] == 0


def test_a_uniform_next_to_one_stays_in_the_support():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]]).log_softmax(-1)
    largest = torch.tensor([math.nextafter(1.0, 0.0)], dtype=torch.float32).clamp(max=1 - 2**-24)
    assert draw(logits, largest, 1.0, 1.0, 0)[0].item() == 1
    assert draw(logits, torch.ones(1), 1.0, 1.0, 0)[0].item() == 1


def test_a_uniform_of_zero_stays_in_the_support():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0]])
    assert draw(logits, torch.zeros(1), 1.0, 1.0, 0)[0].item() == 1


def test_logprobs_are_of_the_whole_vocabulary_under_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for top_p, top_k in ((0.6, 0), (1.0, 2)):
        tokens, logprobs = draw(logits.expand(2, -1), torch.tensor([0.1, 0.9]), 1.0, top_p, top_k)
        assert tokens.tolist() == [0, 1]
        torch.testing.assert_close(logprobs, logits[:2])


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"), [(0.6, 0, {0, 1}), (1.0, 1, {0}), (0.99, 3, {0, 1, 2})]
)
def test_top_p_and_top_k_keep_the_likeliest(top_p, top_k, kept):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    uniforms = torch.linspace(0, 0.999, 500)
    tokens = draw(logits.expand(500, -1), uniforms, 1.0, top_p, top_k)[0]
    assert set(tokens.tolist()) == kept


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, 0), (0.9, 50), (1.0, 50), (0.999, 9000)])
def test_a_large_vocabulary_is_cut_as_by_sorting_it(flat, top_p, top_k):
    """Candidates are found by the maxima of blocks, and only as many as top_p needs."""
    torch.manual_seed(0)
    weights = (torch.randn(3, 9001) * (0.1 if flat else 4.0)).softmax(-1)
    expected = torch.zeros_like(weights)
    for row, out in zip(weights, expected, strict=True):
        values, words = row.double().sort(descending=True)
        values, words = values[: top_k or None], words[: top_k or None]
        before = values.cumsum(0) - values
        keep = before < top_p * values.sum()
        out[words[keep]] = row[words[keep]]
    kept = _kept(weights, top_p, top_k)
    assert ((kept > 0) == (expected > 0)).double().mean() > 0.9999  # sums of float32 at the edge
    torch.testing.assert_close(kept[expected > 0], expected[expected > 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_words", [5, 4097, 50_000])
def test_the_likeliest_words_are_topks(num_words):
    torch.manual_seed(0)
    x = torch.randn(4, num_words).masked_fill(torch.rand(4, num_words) < 0.5, -torch.inf)
    for k in (1, 5):
        expected, found = x.topk(k), likeliest(x, k)
        assert torch.equal(expected.values, found.values)
        assert torch.equal(x.gather(1, found.indices), found.values)
    x[:, -1] = 9.0  # in no whole block of a large vocabulary
    assert likeliest(x, 1).indices.tolist() == [[num_words - 1]] * 4


@pytest.mark.parametrize("layout", ["as the query", "transposed"])
def test_one_query_attends_as_through_transformers(tokenizer, monkeypatch, layout):
    """Heads that share keys and values, behind padding and not; some GPU kernels lay their output
    out as [B, T, H, head size]."""
    if layout == "transposed":
        monkeypatch.setattr(
            decoding,
            "scaled_dot_product_attention",
            lambda *args, **options: (
                scaled_dot_product_attention(*args, **options)
                .transpose(1, 2)
                .contiguous()
                .transpose(1, 2)
            ),
        )
    model = tiny_model(tokenizer)
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    layer, mask = model.get_decoder().layers[0].self_attn, torch.ones(3, 1, 1, 7).bool()
    mask[0, ..., :4] = False
    query = torch.randn(3, model.config.num_attention_heads, 1, 16)
    key, value = torch.randn(2, 3, model.config.num_key_value_heads, 7, 16)
    for seen in (mask, None):
        inputs = (layer, query, key, value, seen)
        expected, _ = sdpa_attention_forward(*inputs, scaling=0.25)
        found, _ = decoding.grouped_attention(*inputs, scaling=0.25)
        torch.testing.assert_close(found, expected)


def test_a_batch_is_as_large_as_memory_takes():
    """Qwen3-1.7B at 19,456 tokens in bfloat16: 2.2 GB of cache a sequence, and half as much."""
    shape = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
    config = Qwen3Config(vocab_size=151_936, hidden_size=2048, head_dim=128, **shape)
    for free, rows in ((80e9, 11), (20e9, 2), (1e9, 1)):
        assert rows_that_fit(config, 19_456, 2, int(free)) == rows
    assert rows_that_fit(config, 192, 2, int(80e9)) > 512


def test_a_frozen_head_is_not_copied_for_each_prompt(tokenizer):
    """F.linear turns [B, 1, D], a slice of [B, T, D], times a frozen [V, D] into a batched product,
    which has B copies of the head: of Gemma's 262,144 words that was nine tenths of the time."""
    shapes = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
                shapes.append(tuple(result.shape))
            return result

    model = tiny_model(tokenizer).requires_grad_(False)
    prompts = prompts_of_many_lengths(tokenizer, 3)
    with Products():
        generate(TorchEngine(model, tokenizer), prompts, 2, **SAMPLED)
    words = model.config.vocab_size
    assert {len(shape) for shape in shapes if shape[-1] == words} == {2}


def test_text_and_verdicts(task, tokenizer):
    model = tiny_model(tokenizer)
    prompts = [prompt_of("p", ids) for ids in prompts_of_many_lengths(tokenizer, 2)]
    engine, sizes = TorchEngine(model, tokenizer), {"max_new_tokens": 6, "temperature": 1.0}
    rollouts = sample_and_verify(engine, task, prompts, 2, seed=(SEED,), **sizes)
    for rollout in rollouts:
        ids = rollout.completion_ids[: -1 if rollout.finish == "eos" else None]
        assert rollout.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert (rollout.problem.text, rollout.problem.gold) == ("p", "1")
    metrics = rollout_metrics(rollouts)
    shares = sum(metrics[f"rollout/{name}"] for name in OUTCOMES[1:])
    assert shares + metrics["rollout/accuracy"] == pytest.approx(1)


def test_given_rollouts_are_read_back(task, tmp_path, tokenizer):
    """Token ids as they were, text with an EOS, and nothing of other problems."""
    ids = tokenizer("1+1=2;", add_special_tokens=False)["input_ids"]
    rows = [
        {"problem": "1+1", "completion": "1+1=2;", "completion_ids": ids},
        {"problem": "1+1", "completion": r"\boxed{2}"},
        {"problem": "2+2", "completion": r"\boxed{4}"},
        {"problem": "1+1", "completion": "1" * 40},
    ]
    path, prompts = str(tmp_path / "rows.jsonl"), [prompt_of("1+1", [5, 6])]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    rollouts = load_rollouts(path, task, tokenizer, prompts, 20)
    assert [rollout.completion_ids for rollout in rollouts] == [
        ids,
        [*tokenizer(r"\boxed{2}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows[2:3])
    with pytest.raises(UserError, match="0 of its 1 completions"):
        load_rollouts(path, task, tokenizer, prompts, 20)


def test_sampled_and_given_rollouts_know_that_their_prompt_opened_a_thought(
    model, task, tmp_path, tokenizer
):
    prompts = [replace(prompt_of("1+1", [5, 6]), opens_thought=opens) for opens in (True, False)]
    engine, sizes = TorchEngine(model, tokenizer), {"max_new_tokens": 2, "temperature": 1.0}
    rollouts = sample_and_verify(engine, task, prompts, 2, seed=(SEED,), **sizes)
    assert [rollout.opens_thought for rollout in rollouts] == [True, True, False, False]
    write_jsonl(tmp_path / "rows.jsonl", [{"problem": "1+1", "completion": "2"}])
    for prompt in prompts:
        path = str(tmp_path / "rows.jsonl")
        (rollout,) = load_rollouts(path, task, tokenizer, [prompt], 20)
        assert rollout.opens_thought == prompt.opens_thought


def test_a_given_row_of_a_conversation_is_found_by_its_key(task, tmp_path, tokenizer):
    """Its text, the last message, is not all of it."""
    prompt = prompt_of("Alice: 1+1", [5, 6])
    row = {"problem": "Go on.", "completion": "2", KEY: prompt.problem.key}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    assert len(load_rollouts(str(tmp_path / "rows.jsonl"), task, tokenizer, [prompt], 20)) == 1


@pytest.mark.parametrize("key", ["x", 7, None, [1], {"a": 1}])
def test_a_users_own_column_called_key_says_nothing(task, tmp_path, tokenizer, key):
    assert given(task, tmp_path, tokenizer, {"key": key})


def test_a_users_rows_are_found_by_what_a_few_shot_prompt_says_last(tmp_path, tokenizer):
    """Or by the dataset's own problem; but not where several conversations end so."""
    (tmp_path / "shots.py").write_text(
        "def prompt(row):\n"
        "    turns = [row.get('first', '1+1'), '2', row.get('last') or 'Now: ' + row['problem']]\n"
        "    roles = ['user', 'assistant', 'user']\n"
        "    return [{'role': r, 'content': c} for r, c in zip(roles, turns)]\n"
        "def grade(completion, row): return 1\n"
    )
    rows = [{"problem": "3+4"}, {"problem": "5+6"}]
    rows += [{"problem": f"Alice: {n}", "first": str(n), "last": "Go on."} for n in (1, 2)]
    path, texts = tmp_path / "rows.jsonl", ["Now: 3+4", "5+6", "Go on.", "7+8"]
    write_jsonl(path, [{"problem": text, "completion": "2"} for text in texts])
    with Task(str(tmp_path / "shots.py")) as shots:
        problems = shots.problems(rows, "d")
        prompts = [Prompt(problem, [n]) for n, problem in enumerate(problems)]
        found = load_rollouts(str(path), shots, tokenizer, prompts, 20)
    assert [rollout.problem for rollout in found] == problems[:2]


def test_a_completion_ends_where_its_own_model_ends_it(task, model, tmp_path, tokenizer):
    """Not at what ends the text of another model; tokens that end it need not be special ones."""
    path, prompts = str(tmp_path / "rows.jsonl"), [prompt_of("1+1", [5, 6])]
    texts = ["2</s>3", "2<|end|>3", f"2{tokenizer.eos_token}3"]
    rows = [{"problem": "1+1", "completion": text} for text in texts]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    given = load_rollouts(path, task, tokenizer, prompts, 20)
    assert [rollout.text for rollout in given] == ["2</s>3", "2<|end|>3", "2"]
    ends = end_ids(tokenizer, model)
    sampled = generate(
        TorchEngine(model, tokenizer), prompts_of_many_lengths(tokenizer), 8, **SAMPLED
    )
    ordinary = [r for r in sampled if r.completion_ids[-1] in set(ends) - {tokenizer.eos_token_id}]
    assert ordinary
    for rollout in ordinary:
        ids = rollout.completion_ids[:-1]
        assert rollout.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_given_token_ids_of_another_text_are_encoded_from_the_text(task, tmp_path, tokenizer):
    """An edited completion, or ids of another tokenizer."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("3", "2")]
    row = {"completion": "2", "completion_ids": ids[0]}
    assert given(task, tmp_path, tokenizer, row) == [*ids[1], tokenizer.eos_token_id]
    larger = row | {"completion_ids": [len(tokenizer)]}
    assert given(task, tmp_path, tokenizer, larger) == [*ids[1], tokenizer.eos_token_id]


def given(task, tmp_path, tokenizer, row: dict) -> list[int]:
    path, prompts = str(tmp_path / "row.jsonl"), [prompt_of("1+1", [5, 6])]
    write_jsonl(tmp_path / "row.jsonl", [{"problem": "1+1", "completion": "2"} | row])
    (rollout,) = load_rollouts(path, task, tokenizer, prompts, 20)
    return rollout.completion_ids


def test_given_rollouts_end_once_or_not_at_all(task, tmp_path, tokenizer):
    (two,), end = tokenizer("2", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
    assert given(task, tmp_path, tokenizer, {}) == [two, end]
    assert given(task, tmp_path, tokenizer, {"completion": "2<|im_end|>"}) == [two, end]
    assert given(task, tmp_path, tokenizer, {"finish": "length"}) == [two]
    assert given(task, tmp_path, tokenizer, {"completion_ids": [two]}) == [two]
    assert given(task, tmp_path, tokenizer, {"completion_ids": [two, end]}) == [two, end]
    assert given(task, tmp_path, tokenizer, {"completion": ""}) == [end]


@pytest.mark.parametrize("ids", [[], ["2"], [2.0], [True], [-1], "22", {"2": 2}, [[2]]])
def test_given_token_ids_must_be_ids(task, tmp_path, tokenizer, ids):
    with pytest.raises(UserError, match="row 1: completion_ids must be a list of one or more"):
        given(task, tmp_path, tokenizer, {"completion_ids": ids})


def test_half_a_surrogate_pair_in_a_given_completion(task, tmp_path, tokenizer):
    with pytest.raises(UserError, match="half a surrogate pair in column completion"):
        given(task, tmp_path, tokenizer, {"completion": "2 \ud800"})


def test_a_thought_that_the_prompt_has_opened_holds_no_answer(task):
    texts = [r"It may be \boxed{1}.", r"maybe \boxed{2}</think>\boxed{1}", r"</think>\boxed{2}"]
    problem = problem_of("p", "1")
    rollouts = [Rollout([5], [6], None, "eos", text, problem) for text in texts]
    for opens, outcomes in (
        (False, ["correct", "correct", "wrong"]),
        (True, ["no_answer", "correct", "wrong"]),
    ):
        for rollout in rollouts:
            rollout.opens_thought = opens
        verify(task, rollouts)
        assert [rollout.verdict.outcome for rollout in rollouts] == outcomes
