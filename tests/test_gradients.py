"""Losses and their gradients against definitions: differences of a loop, autograd in float64."""

import math

import pytest
import torch
from test_losses import (
    TOKENS,
    Head,
    N,
    V,
    grpo_token_loop,
    log_softmax_loop,
    random_logits,
)

import fkl_warmup
import grpo
import opd
from common.model import head
from common.model.head import head_backward
from common.model.logprob import row_slices, token_logprobs


@pytest.mark.parametrize("on_policy", [True, False])
def test_grpo_gradient_is_that_of_the_formula(on_policy):
    """By central differences of the loop, in which old log-probs are numbers, on policy too."""
    args = grpo.Args(kl_coef=0.3, temperature=0.7, importance_cap=1.1)
    logits, noise = random_logits(0), random_logits(1)
    advantages, weights = torch.linspace(-1.5, 1.5, N), torch.linspace(0.5, 1.0, N)
    lp = token_logprobs(logits, TOKENS, args.temperature)[0]
    rollout_lp, old_lp, ref_lp = (lp + 0.2 * noise[:, i] for i in range(3))
    inputs = (TOKENS, advantages, weights, rollout_lp, None if on_policy else old_lp, ref_lp, args)
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(grpo.loss_fn(leaf, *inputs)[0], leaf)
    old_lp = lp if on_policy else old_lp

    def token_loss(n: int, row: list[float]) -> float:
        policy_lp = log_softmax_loop(row, args.temperature)[TOKENS[n]]
        pick = [x[n].item() for x in (advantages, rollout_lp, old_lp, ref_lp)]
        return weights[n].item() * grpo_token_loop(args, policy_lp, *pick)

    for n in range(N):
        for v in range(V):
            moved = [logits[n].double().tolist() for _ in range(2)]
            moved[0][v] += 1e-5
            moved[1][v] -= 1e-5
            slope = (token_loss(n, moved[0]) - token_loss(n, moved[1])) / 2e-5
            assert gradient[n, v].item() == pytest.approx(slope, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_topk_opd_is_the_formula(temperature):
    """The student's three likeliest words and one bucket of all others, spelled out."""
    args = opd.Args(estimator="topk", topk_size=3, temperature=temperature)
    student, teacher = random_logits(0), random_logits(1)
    expected = 0.0
    for n in range(N):
        s, t = (log_softmax_loop(x[n].double().tolist(), temperature) for x in (student, teacher))
        top = sorted(range(V), key=lambda v: -s[v])[:3]
        p, q = ([math.exp(row[v]) for v in top] for row in (s, t))
        p, q = ([*kept, 1 - sum(kept)] for kept in (p, q))
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    loss = opd.loss_fn(student, teacher, TOKENS, args)[0]
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_the_tail_of_a_sure_student_does_not_cancel():
    student = torch.tensor([[40.0] + [0.0] * (V - 1)])
    own, teachers = opd.top_k_buckets(student.log_softmax(-1), torch.zeros(1, V).log_softmax(-1), 1)
    assert own[0, 1].item() == pytest.approx(math.log(V - 1) - 40)
    assert teachers.exp().sum().item() == pytest.approx(1)


def test_the_loss_never_sees_more_than_a_slice_of_a_chunk(monkeypatch):
    """Slices, whose number follows from the threads and the vocabulary, do not cross chunks."""
    shapes = []

    def loss_fn(logits, teacher_logits, tokens):
        assert logits.shape == teacher_logits.shape
        shapes.append(tuple(logits.shape))
        return -token_logprobs(logits, tokens)[0].sum(), {}

    def slices(logits):
        return [slice(first, first + 2) for first in range(0, len(logits), 2)]

    def all_shapes() -> list[tuple[int, int]]:
        shapes.clear()
        hidden, teacher = torch.randn(N, 4).requires_grad_(), (torch.randn(N, 3), torch.randn(V, 3))
        how = {"inputs": {"tokens": TOKENS}, "denominator": 1.0, "teacher": teacher}
        head_backward(hidden * 1, Head(), loss_fn, chunk_size=3, **how)
        return shapes

    assert all_shapes() == [(3, V), (3, V), (1, V)]
    monkeypatch.setattr(head, "row_slices", slices)
    assert all_shapes() == [(2, V), (1, V), (2, V), (1, V), (1, V)]


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_slices_cover_all_rows_once(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for rows, words in ((0, 5), (1, 151_936), (100, 151_936), (2048, 60)):
        covered = [list(range(rows))[part] for part in row_slices(torch.empty(rows, words))]
        assert sum(covered, []) == list(range(rows))
        assert all(len(part) >= 8 * threads for part in covered[:-1])


def hard_logits(seed: int, dtype: torch.dtype, scale: float, words: int) -> torch.Tensor:
    logits = (torch.randn(4, words, generator=torch.Generator().manual_seed(seed)) * scale).to(
        dtype
    )
    if scale == 5.0:  # words that both models rule out
        logits[:, 3] = -torch.inf
        logits[0, words // 2 :] = -torch.inf
    return logits


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (5.0, 0.7), (300.0, 1.0)])
@pytest.mark.parametrize("words", [17, 3001])
def test_divergences_are_those_of_float64(kind, dtype, scale, temperature, words):
    """Losses, what is logged, and gradients, against autograd of the definitions; with words of
    probability 0, far logits, and a row in which the student is its teacher."""
    student, teacher = (hard_logits(seed, dtype, scale, words) for seed in (0, 1))
    teacher[-1] = student[-1]
    slow = (student.double() / temperature).requires_grad_()
    logp, logq = (
        x.log_softmax(-1).clamp(min=-1e300) for x in (slow, teacher.double() / temperature)
    )
    p, q, logm = logp.exp(), logq.exp(), torch.logaddexp(logp, logq) - math.log(2)
    values = {
        "reverse_kl": (p * (logp - logq)).sum(),
        "forward_kl": (q * (logq - logp)).sum(),
        "jsd": (p * (logp - logm) + q * (logq - logm)).sum() / 2,
        "entropy": -(p * logp).sum(),
        "entropy_gap": (q * logq).sum() - (p * logp).sum(),
    }
    (expected,) = torch.autograd.grad(values[kind], slow)
    leaf = student.clone().requires_grad_()
    args = opd.Args(divergence=kind, temperature=temperature)
    loss, metrics = opd.loss_fn(leaf, teacher, TOKENS[:4], args)
    (gradient,) = torch.autograd.grad(loss, leaf)
    near = max(1, scale / 10) * 1e-4  # float32 keeps that much less of a difference
    assert loss.item() == pytest.approx(values[kind].item(), rel=1e-5, abs=near)
    for name in ("reverse_kl", "forward_kl", "entropy", "entropy_gap"):
        expected_value = pytest.approx(values[name].item(), rel=1e-5, abs=near)
        assert metrics[f"policy/{name}"].item() == expected_value, name
    rounding = {torch.float32: near, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(
        gradient.double(), expected / temperature, rtol=rounding, atol=max(near, rounding)
    )
    assert gradient[-1].abs().max() < near
    if kind == "forward_kl":
        args = fkl_warmup.Args(temperature=temperature)
        leaf = student.clone().requires_grad_()
        loss, _ = fkl_warmup.loss_fn(leaf, teacher, TOKENS[:4], args)
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], gradient)


def test_overlap_is_the_share_of_the_teachers_likeliest_words_that_the_student_has():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 60, generator=generator)
    _, metrics = opd.loss_fn(student, teacher, TOKENS[:5], opd.Args())
    tops = [[set(row.topk(16).indices.tolist()) for row in x] for x in (student, teacher)]
    expected = sum(len(a & b) / 16 for a, b in zip(*tops, strict=True))
    assert 0 < expected < 5
    assert metrics["policy/topk_overlap"].item() == pytest.approx(expected)
