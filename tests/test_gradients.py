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

import grpo
import opd
from common.model.divergence import divergence
from common.model.head import head_backward
from common.model.logprob import token_logprobs


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
    args = opd.Args(estimator="topk", topk_size=1)
    own, teachers = opd.top_k_buckets(student, torch.zeros(1, V), args)
    assert own[0, 1].item() == pytest.approx(math.log(V - 1) - 40)
    assert teachers.exp().sum().item() == pytest.approx(1)


def test_the_head_never_sees_more_than_a_chunk():
    shapes = []

    def loss_fn(logits, tokens):
        shapes.append(tuple(logits.shape))
        return -token_logprobs(logits, tokens)[0].sum(), {}

    hidden = torch.randn(N, 4).requires_grad_()
    head_backward(hidden * 1, Head(), loss_fn, {"tokens": TOKENS}, 1.0, 3)
    assert shapes == [(3, V), (3, V), (1, V)]


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_of_the_divergences(kind, temperature):
    """Against autograd of the definition, in float64."""
    student, teacher = random_logits(0), random_logits(1)
    leaf = student.clone().requires_grad_()
    up = torch.linspace(0.5, 1.5, N)
    (gradient,) = torch.autograd.grad(
        (divergence(kind, leaf, teacher, temperature)[0] * up).sum(), leaf
    )
    slow = student.double().requires_grad_()
    p, q = ((x / temperature).softmax(-1) for x in (slow, teacher.double()))
    m = (p + q) / 2
    value = {
        "reverse_kl": (p * (p / q).log()).sum(-1),
        "forward_kl": (q * (q / p).log()).sum(-1),
        "jsd": ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2,
    }[kind]
    (expected,) = torch.autograd.grad((value * up).sum(), slow)
    torch.testing.assert_close(gradient.double(), expected, atol=1e-5, rtol=1e-4)
