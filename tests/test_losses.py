"""The losses against slow loops in float64, and what must not change them."""

import math

import numpy as np
import pytest
import torch
from conftest import generate, gradients, prompts_of_many_lengths, tiny_model, torchrun

import fkl_warmup
import grpo
import opd
from common.model.head import _add_product, head_backward
from common.model.logprob import token_logprobs
from common.run.ranks import combine
from common.run.run import mean
from common.sampling import batches as batches_module
from common.sampling.batches import micro_batches, minibatches
from common.sampling.rollout import Rollout
from common.sampling.torch_engine import TorchEngine
from common.tasks.task import Verdict

N, V = 7, 11


def log_softmax_loop(row: list[float], temperature: float) -> list[float]:
    scaled = [x / temperature for x in row]
    top = max(scaled)
    log_sum = top + math.log(sum(math.exp(x - top) for x in scaled))
    return [x - log_sum for x in scaled]


def random_logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))


TOKENS = torch.arange(N) % V


# === token log-probs ===


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_and_entropy(temperature):
    logits = random_logits(0)
    logprobs, entropy = token_logprobs(logits, TOKENS, temperature)
    for n in range(N):
        row = log_softmax_loop(logits[n].double().tolist(), temperature)
        assert logprobs[n].item() == pytest.approx(row[TOKENS[n]], abs=1e-5)
        assert entropy[n].item() == pytest.approx(-sum(math.exp(x) * x for x in row), abs=1e-5)
    assert (logprobs <= 0).all()


def test_token_logprobs_survive_extremes():
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, -torch.inf, 0.0]], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([0, 2]))
    logprobs.sum().backward()
    assert logprobs.tolist() == pytest.approx([0.0, -math.log(2)])
    assert entropy.tolist() == pytest.approx([0.0, math.log(2)])
    assert not logits.grad.isnan().any()
    unlikely, _ = token_logprobs(torch.tensor([[200.0, 0.0]]), torch.tensor([1]))
    assert unlikely.tolist() == [-200.0]  # its probability is 0 in float32


# === GRPO ===


def grpo_token_loop(args, lp, advantage, rollout_lp, old_lp, ref_lp) -> float:
    """The loss of one token, from the formula in the docstring of grpo.py."""
    old_lp = lp if old_lp is None else old_lp
    ratio = math.exp(lp - old_lp)
    clipped = min(max(ratio, 1 - args.clip_low), 1 + args.clip_high)
    gain = min(ratio * advantage, clipped * advantage)
    if args.importance_cap:
        gain *= min(math.exp(old_lp - rollout_lp), args.importance_cap)
    k3 = 0.0 if ref_lp is None else math.exp(ref_lp - lp) - (ref_lp - lp) - 1
    return -gain + args.kl_coef * k3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_high": 0.28, "kl_coef": 0.1},
        {"kl_coef": 0.0},
        {"importance_cap": 1.1},
        {"temperature": 0.6, "kl_coef": 0.3, "importance_cap": 5.0},
    ],
)
@pytest.mark.parametrize("on_policy", [True, False])
def test_grpo_loss_is_the_formula(changes, on_policy):
    args = grpo.Args(**changes)
    logits, noise = random_logits(0), random_logits(1)
    advantages = torch.linspace(-1.5, 1.5, N)
    weights = torch.linspace(0.5, 1.0, N)
    lp = token_logprobs(logits, TOKENS, args.temperature)[0]
    rollout_lp, old_lp, ref_lp = (lp + 0.2 * noise[:, i] for i in range(3))
    old_lp = None if on_policy else old_lp
    ref_lp = ref_lp if args.kl_coef else None
    loss, _ = grpo.loss_fn(logits, TOKENS, advantages, weights, rollout_lp, old_lp, ref_lp, args)
    expected = 0.0
    for n in range(N):
        row = log_softmax_loop(logits[n].double().tolist(), args.temperature)
        pick = [None if x is None else x[n].item() for x in (rollout_lp, old_lp, ref_lp)]
        token = grpo_token_loop(args, row[TOKENS[n]], advantages[n].item(), *pick)
        expected += weights[n].item() * token
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_clipping_stops_the_gradient_on_the_favourable_side_only():
    args = grpo.Args(kl_coef=0.0)
    logits = torch.zeros(1, 2, requires_grad=True)
    lp = math.log(0.5)
    for advantage, ratio, moves in [
        (1, 1.5, False),
        (1, 0.5, True),
        (-1, 0.5, False),
        (-1, 1.5, True),
    ]:
        old = torch.tensor([lp - math.log(ratio)])
        ones = torch.ones(1)
        loss, metrics = grpo.loss_fn(
            logits, torch.tensor([0]), advantage * ones, ones, old, old, None, args
        )
        (grad,) = torch.autograd.grad(loss, logits)
        assert bool(grad.abs().sum() > 0) == moves
        assert bool(metrics["policy/clip_fraction"]) != moves


def test_nothing_counts_as_clipped_where_the_ratio_is_one():
    """On the first pass over fresh rollouts, whatever the advantages, those of 0 included."""
    ones = torch.ones(N)
    for advantage in (-1.0, 0.0, 1.0):
        _, metrics = grpo.loss_fn(
            random_logits(0), TOKENS, advantage * ones, ones, ones, None, None, grpo.Args()
        )
        assert metrics["policy/clip_fraction"] == 0


def test_how_far_the_engine_is_from_the_trainer():
    """By hand. The mean of the ratio would be 1 for any two distributions."""
    old, engine = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -2.9])
    ones = torch.ones(3)
    _, metrics = grpo.loss_fn(
        random_logits(0)[:3], TOKENS[:3], ones, ones, engine, old, None, grpo.Args()
    )
    expected = {"engine_ratio_min": math.exp(-0.1), "engine_ratio_max": math.exp(0.5)}
    expected |= {"engine_difference": 0.6}
    expected["engine_kl"] = math.exp(0.5) - 1.5 + math.exp(-0.1) - 0.9
    for name, value in expected.items():
        assert metrics[f"policy/{name}"].item() == pytest.approx(value, rel=1e-5)


def test_metrics_of_parts_and_of_updates():
    """Sums and means, but for the least and the largest; a part without a token has none."""
    parts = [{"n": 3.0, "r_min": 0.5, "r_max": 2.0}, {}, {"n": 5.0, "r_min": 0.7, "r_max": 3.0}]
    assert combine(parts) == {"n": 8.0, "r_min": 0.5, "r_max": 3.0}
    assert mean(parts) == {"n": 4.0, "r_min": 0.5, "r_max": 3.0}


@pytest.mark.parametrize("norm", ["std", "none"])
def test_advantages(rollouts, norm):
    args = grpo.Args(group_size=4, advantage_norm=norm)
    grpo.set_advantages(rollouts, args)
    for first in range(0, 20, 4):
        group = rollouts[first : first + 4]
        rewards = [rollout.verdict.reward for rollout in group]
        mean = sum(rewards) / 4
        deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / 3)
        for rollout, reward in zip(group, rewards, strict=True):
            scale = deviation + 1e-6 if norm == "std" else 1.0
            assert rollout.advantage == pytest.approx((reward - mean) / scale, rel=1e-5)
    assert [rollout.advantage for rollout in rollouts[:4]] == [0.0] * 4


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3])
def test_groups_of_equal_partial_rewards_have_no_advantage(rollouts, value):
    """In float32 the mean of equal numbers is another one, and / 1e-6 would make much of it."""
    for rollout in rollouts:
        rollout.verdict = Verdict("partial", value)
    grpo.set_advantages(rollouts, grpo.Args(group_size=20))
    assert [rollout.advantage for rollout in rollouts] == [0.0] * 20
    assert grpo.mixed_groups(rollouts, 20) == []


def test_groups_are_mixed_where_grades_differ(rollouts):
    for n, rollout in enumerate(rollouts):
        rollout.verdict = Verdict("partial", 0.25 if n in (5, 6) else 0.5)
    assert grpo.mixed_groups(rollouts, 4) == rollouts[4:8]
    grpo.set_advantages(rollouts, grpo.Args(group_size=4, advantage_norm="none"))
    assert [r.advantage for r in rollouts[4:8]] == [0.125, -0.125, -0.125, 0.125]


@pytest.mark.parametrize("agg", ["token", "sequence", "dr_grpo"])
@pytest.mark.parametrize("mask_truncated", [True, False])
def test_loss_aggregation(model, rollouts, agg, mask_truncated):
    """Weights and Z against the three definitions, spelled out."""
    args = grpo.Args(group_size=4, loss_agg=agg, mask_truncated=mask_truncated, max_new_tokens=12)
    assert {rollout.finish for rollout in rollouts} == {"eos", "length"}
    grpo.set_advantages(rollouts, args)
    denominator = grpo.denominator_of(rollouts, args)
    kept = [r for r in rollouts if not (mask_truncated and r.finish == "length")]
    for rollout in rollouts:
        share = rollout.weight * len(rollout.completion_ids) / denominator
        length = len(rollout.completion_ids)
        expected = {
            "token": length / sum(len(r.completion_ids) for r in kept),
            "sequence": 1 / len(kept),
            "dr_grpo": length / (len(rollouts) * 12),
        }[agg]
        assert share == pytest.approx(expected if rollout in kept else 0.0)


def test_masked_completions_are_not_logged_either(model, rollouts):
    """Metrics are means over the tokens that have a loss."""
    args = grpo.Args(group_size=4, mask_truncated=True)
    grpo.set_advantages(rollouts, args)
    kept = [rollout for rollout in rollouts if rollout.finish == "eos"]
    assert 0 < len(kept) < len(rollouts)
    logged, of_kept = (grpo.backward(model, part, args) for part in (rollouts, kept))
    assert logged == pytest.approx(of_kept)


def test_dynamic_sampling_keeps_groups_of_mixed_outcomes(rollouts):
    kept = grpo.mixed_groups(rollouts, 4)
    assert [id(r) for r in kept] == [id(r) for r in rollouts[4:16]]


def test_skipping_zero_advantages_changes_nothing(model, rollouts):
    """Without a KL term, the gradient equals that of all rollouts."""
    args = grpo.Args(group_size=4, kl_coef=0.0)
    grpo.set_advantages(rollouts, args)
    skipped = grpo.backward(model, rollouts, args)
    skipped_gradients = gradients(model)
    with_all = grpo.Args(group_size=4, kl_coef=1.0)  # and no ref_logprobs: nothing to weigh
    full = grpo.backward(model, rollouts, with_all)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(skipped_gradients[name], gradient, atol=1e-6, rtol=1e-4)
    assert skipped["loss/total"] == pytest.approx(full["loss/total"], abs=1e-6)


def test_groups_that_all_agree_leave_no_gradient(model, rollouts):
    args = grpo.Args(group_size=4, kl_coef=0.0)
    grpo.set_advantages(rollouts[:4], args)
    assert grpo.backward(model, rollouts[:4], args) == {"loss/total": 0.0}
    assert gradients(model) == {}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_old_logprobs_are_the_rollouts_own(model, tokenizer, temperature):
    """Same weights: the log-probs of a second pass are those that were sampled with."""
    settings = {"max_new_tokens": 12, "temperature": temperature}
    prompts = prompts_of_many_lengths(tokenizer)
    rollouts = generate(TorchEngine(model, tokenizer), prompts, 4, **settings)
    args = grpo.Args(micro_batch_tokens=60, temperature=temperature)
    grpo.set_logprobs("old_logprobs", model, rollouts, args)
    for rollout in rollouts:
        torch.testing.assert_close(rollout.old_logprobs, rollout.logprobs, atol=1e-5, rtol=1e-4)


# === distillation ===


def divergence_loop(kind: str, student: list[float], teacher: list[float]) -> float:
    def kl(a: list[float], b: list[float]) -> float:
        return sum(math.exp(x) * (x - y) for x, y in zip(a, b, strict=True))

    if kind == "reverse_kl":
        return kl(student, teacher)
    if kind == "forward_kl":
        return kl(teacher, student)
    middle = [
        math.log((math.exp(x) + math.exp(y)) / 2) for x, y in zip(student, teacher, strict=True)
    ]
    return (kl(student, middle) + kl(teacher, middle)) / 2


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_opd_divergences(kind, temperature):
    args = opd.Args(divergence=kind, temperature=temperature)
    student, teacher = random_logits(0), random_logits(1)
    loss, metrics = opd.loss_fn(student, teacher, TOKENS, args)
    rows = [
        [log_softmax_loop(x[n].double().tolist(), temperature) for x in (student, teacher)]
        for n in range(N)
    ]
    assert loss.item() == pytest.approx(sum(divergence_loop(kind, *row) for row in rows), rel=1e-4)
    for name in ("reverse_kl", "forward_kl"):
        expected = sum(divergence_loop(name, *row) for row in rows)
        assert metrics[f"policy/{name}"].item() == pytest.approx(expected, rel=1e-4)
    entropies = [[-sum(math.exp(x) * x for x in logp) for logp in row] for row in rows]
    gap = sum(of_student - of_teacher for of_student, of_teacher in entropies)
    assert abs(gap) > 0.1
    assert metrics["policy/entropy"].item() == pytest.approx(sum(e for e, _ in entropies), rel=1e-4)
    assert metrics["policy/entropy_gap"].item() == pytest.approx(gap, rel=1e-3)


@pytest.mark.parametrize("hard_labels", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fkl_loss(hard_labels, temperature):
    args = fkl_warmup.Args(hard_labels=hard_labels, temperature=temperature)
    student, teacher = random_logits(0), random_logits(1)
    loss, _ = fkl_warmup.loss_fn(student, teacher, TOKENS, args)
    expected = 0.0
    for n in range(N):
        s, t = (log_softmax_loop(x[n].double().tolist(), temperature) for x in (student, teacher))
        expected += -s[TOKENS[n]] if hard_labels else divergence_loop("forward_kl", s, t)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_opd_has_the_expected_gradient_of_the_full_reverse_kl(temperature):
    """Enumerated: the sampled gradients of all tokens, weighted by the student's probabilities."""
    student, teacher = random_logits(0)[:1], random_logits(1)[:1]

    def loss_and_gradient(token: int, args: opd.Args) -> tuple[float, torch.Tensor]:
        logits = student.clone().requires_grad_()
        loss, _ = opd.loss_fn(logits, teacher, torch.tensor([token]), args)
        return loss.item(), torch.autograd.grad(loss, logits)[0]

    full, full_gradient = loss_and_gradient(0, opd.Args(temperature=temperature))
    expected_gradient, expected_loss = torch.zeros_like(student), 0.0
    logp, logq = ((x[0] / temperature).log_softmax(-1) for x in (student, teacher))
    args = opd.Args(estimator="sampled", temperature=temperature)
    for token, probability in enumerate(logp.exp()):
        loss, gradient = loss_and_gradient(token, args)
        # The advantage is detached. (If it is not, a term is added whose expectation is 0.)
        score = (torch.eye(V)[token] - logp.exp()) / temperature  # the gradient of log pi
        of_token = (logp - logq)[token] * score
        torch.testing.assert_close(gradient[0], of_token, atol=1e-6, rtol=1e-4)
        expected_gradient += probability * gradient
        expected_loss += probability.item() * loss
    torch.testing.assert_close(expected_gradient, full_gradient, atol=1e-6, rtol=1e-4)
    assert expected_loss == pytest.approx(full, rel=1e-4)


def test_topk_opd_approaches_the_full_reverse_kl_from_below():
    student, teacher = random_logits(0), random_logits(1)
    full = opd.loss_fn(student, teacher, TOKENS, opd.Args())[0].item()
    values = [
        opd.loss_fn(student, teacher, TOKENS, opd.Args(estimator="topk", topk_size=k))[0].item()
        for k in range(1, V)
    ]
    assert values == sorted(values)  # merging buckets can only lose divergence
    assert 0 < values[0] < values[-1]
    assert values[-1] == pytest.approx(full, rel=1e-4)  # V - 1 tokens and a bucket of one
    args = opd.Args(estimator="topk", topk_size=V + 5)
    assert opd.loss_fn(student, teacher, TOKENS, args)[0].item() == pytest.approx(values[-1])


def test_topk_opd_pulls_mass_into_the_teachers_tokens():
    """Without the tail bucket the loss falls by moving mass out of the top k: it must not here."""
    args = opd.Args(estimator="topk", topk_size=3)
    student, teacher = random_logits(0).requires_grad_(), random_logits(1)
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(300):
        loss, _ = opd.loss_fn(student, teacher, TOKENS, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before, after = (
        opd.loss_fn(x, teacher, TOKENS, opd.Args())[0].item()
        for x in (random_logits(0), student.detach())
    )
    assert loss.item() < 1e-2
    assert after < before / 2


def test_padded_vocabulary_is_cut_to_the_shorter():
    student, teacher = random_logits(0), random_logits(1)
    padded = torch.cat([teacher, torch.full((N, 5), 9.0)], 1)
    for module in (opd, fkl_warmup):
        plain = module.loss_fn(student, teacher, TOKENS, module.Args())[0]
        assert module.loss_fn(student, padded, TOKENS, module.Args())[0] == plain


@pytest.mark.parametrize("module", [opd, fkl_warmup])
def test_a_student_that_is_its_teacher_learns_nothing(model, rollouts, module):
    """Same weights, apart: zero loss and zero gradient."""
    teacher = type(model)(model.config).eval()
    teacher.load_state_dict(model.state_dict())
    metrics = module.backward(model, teacher, rollouts, module.Args())
    assert metrics["loss/total"] == pytest.approx(0.0, abs=1e-6)
    assert max(gradient.abs().max().item() for gradient in gradients(model).values()) < 1e-6
    assert metrics["policy/topk_overlap"] == pytest.approx(1.0)


# === what must not matter ===


def run_backward(module, model, frozen, rollouts, **changes):
    args = module.Args(**changes)
    if module is grpo:
        args.group_size, args.kl_coef = 4, 0.1
        grpo.set_advantages(rollouts, args)
        grpo.set_logprobs("ref_logprobs", frozen, rollouts, args)
        metrics = grpo.backward(model, rollouts, args)
    else:
        metrics = module.backward(model, frozen, rollouts, args)
    return metrics, gradients(model)


@pytest.mark.parametrize("module", [grpo, opd, fkl_warmup])
@pytest.mark.parametrize("tied", [True, False])
def test_micro_batch_and_chunk_size_do_not_matter(tokenizer, teacher, rollouts, module, tied):
    model = tiny_model(tokenizer, tie_word_embeddings=tied)
    whole, expected = run_backward(module, model, teacher, rollouts)
    for micro_batch_tokens, chunk_size in [(1, 4096), (60, 5), (150, 1), (4096, 17)]:
        sizes = {"micro_batch_tokens": micro_batch_tokens, "chunk_size": chunk_size}
        metrics, actual = run_backward(module, model, teacher, rollouts, **sizes)
        assert metrics == pytest.approx(whole, rel=1e-4, abs=1e-6)
        assert actual.keys() == expected.keys() == dict(model.named_parameters()).keys()
        for name, gradient in expected.items():
            atol = 1e-5 * gradient.abs().max().item()
            torch.testing.assert_close(actual[name], gradient, atol=atol, rtol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_the_chunked_head_has_the_gradients_of_the_plain_model(tokenizer, teacher, rollouts, tied):
    """SFT on the rollouts against transformers' own logits and one ordinary backward."""
    model = tiny_model(tokenizer, tie_word_embeddings=tied)
    args = fkl_warmup.Args(hard_labels=True, chunk_size=4)
    loss = fkl_warmup.backward(model, teacher, rollouts, args)["loss/total"]
    actual = gradients(model)
    total, count = 0.0, 0
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        for t, token in enumerate(rollout.completion_ids):
            total = total - logprobs[len(rollout.prompt_ids) + t - 1, token]
            count += 1
    (total / count).backward()
    assert loss == pytest.approx((total / count).item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(actual[name], gradient, atol=2e-6, rtol=1e-3)


def check_against_plain(model, loss_sum: torch.Tensor, denominator: float, total: float, actual):
    """(loss_sum / denominator).backward() has the gradients `actual` and the loss `total`."""
    (loss_sum / denominator).backward()
    assert total == pytest.approx((loss_sum / denominator).item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(actual[name], gradient, atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        (opd, {}),
        (opd, {"divergence": "jsd"}),
        (opd, {"estimator": "sampled"}),
        (opd, {"estimator": "topk"}),
        (fkl_warmup, {}),
        (fkl_warmup, {"hard_labels": True}),
    ],
)
def test_dense_backward(model, teacher, rollouts, module, changes):
    """As the docstring of `backward` says: transformers' own logits, one loss, one backward."""
    args = module.Args(chunk_size=4, micro_batch_tokens=60, **changes)
    total = module.backward(model, teacher, rollouts, args)["loss/total"]
    actual = gradients(model)
    (batch,) = micro_batches(rollouts, 10**6, torch.device("cpu"))
    logits, teacher_logits = (m(batch.input_ids).logits[batch.mask] for m in (model, teacher))
    loss_sum, _ = module.loss_fn(logits, teacher_logits.detach(), batch.tokens, args)
    check_against_plain(model, loss_sum, len(batch.tokens), total, actual)


@pytest.mark.parametrize("loss_agg", ["token", "sequence", "dr_grpo"])
def test_grpo_backward(model, teacher, rollouts, loss_agg):
    """The same, off policy and with a reference model."""
    sizes = {"group_size": 4, "chunk_size": 4, "micro_batch_tokens": 60}
    args = grpo.Args(kl_coef=0.3, loss_agg=loss_agg, importance_cap=1.5, **sizes)
    grpo.set_advantages(rollouts, args)
    grpo.set_logprobs("ref_logprobs", teacher, rollouts, args)
    for rollout in rollouts:
        rollout.old_logprobs = rollout.logprobs + 0.1 * torch.randn(len(rollout.logprobs))
    total = grpo.backward(model, rollouts, args)["loss/total"]
    actual = gradients(model)
    (batch,) = micro_batches(rollouts, 10**6, torch.device("cpu"))
    names = ("advantage", "weight", "logprobs", "old_logprobs", "ref_logprobs")
    logits, inputs = model(batch.input_ids).logits[batch.mask], [batch.tokens]
    inputs += [batch.per_token(name) for name in names]
    loss_sum, _ = grpo.loss_fn(logits, *inputs, args)
    check_against_plain(model, loss_sum, grpo.denominator_of(rollouts, args), total, actual)


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, V, bias=False)

    def get_output_embeddings(self):
        return self.head


def test_every_row_of_the_head_buffer_is_added_to_not_replaced():
    """Two calls accumulate, as micro-batches must."""
    model, hidden = Head(), torch.randn(N, 4)

    def loss_fn(logits, tokens):
        return -token_logprobs(logits, tokens)[0].sum(), {}

    for _ in range(2):
        leaf = hidden.clone().requires_grad_()
        head_backward(
            leaf * 1, model, loss_fn, inputs={"tokens": TOKENS}, denominator=1.0, chunk_size=3
        )
    once = Head()
    once.load_state_dict(model.state_dict())
    (-token_logprobs(once.head(hidden), TOKENS)[0].sum()).backward()
    torch.testing.assert_close(model.head.weight.grad, 2 * once.head.weight.grad)


def test_a_float32_head_adds_up_the_gradients_of_bfloat16_logits():
    """Of every chunk and call, block by block of its words."""
    logits_grad, hidden = torch.randn(6, 9000).bfloat16(), torch.randn(6, 4).bfloat16()
    total = torch.zeros(9000, 4)
    for rows in (slice(0, 4), slice(4, 6)):
        _add_product(total, logits_grad[rows], hidden[rows])
    expected = logits_grad.float().T @ hidden.float()
    torch.testing.assert_close(total, expected, atol=0.1, rtol=0.02)


# === which tokens are in the loss ===


def test_the_loss_tokens_are_the_completions(rollouts):
    """EOS included, nothing of a prompt, each predicted from the position before it."""
    batches = list(micro_batches(rollouts, 60, torch.device("cpu")))
    assert sum(len(batch.rollouts) for batch in batches) == len(rollouts)
    for batch in batches:
        expected = [token for rollout in batch.rollouts for token in rollout.completion_ids]
        assert batch.tokens.tolist() == expected
        assert int(batch.mask.sum()) == len(expected)
        for b, rollout in enumerate(batch.rollouts):
            sequence = rollout.prompt_ids + rollout.completion_ids
            positions = batch.mask[b].nonzero().squeeze(-1).tolist()
            assert [sequence[t + 1] for t in positions] == rollout.completion_ids
            assert batch.input_ids[b, : len(sequence) - 1].tolist() == sequence[:-1]
            rollout.advantage = float(b)
        assert batch.per_token("advantage").tolist() == [
            float(i) for i, rollout in enumerate(batch.rollouts) for _ in rollout.completion_ids
        ]
        sampled = torch.cat([rollout.logprobs for rollout in batch.rollouts])
        assert batch.per_token("logprobs").equal(sampled)
        assert batch.per_token("old_logprobs") is None


def test_micro_batches_hold_no_more_tokens_than_they_may(rollouts):
    """Short sequences share one; one that is too long goes alone."""
    lengths = [len(r.prompt_ids) + len(r.completion_ids) - 1 for r in rollouts]
    for most in (1, 20, 60, 150, 10**6):
        batches = list(micro_batches(rollouts, most, torch.device("cpu")))
        assert sorted(id(r) for b in batches for r in b.rollouts) == sorted(map(id, rollouts))
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            count, longest = batch.input_ids.shape
            assert count * longest <= most or count == 1
            if following is not None:  # no room for the next one
                first = following.rollouts[0]
                length = len(first.prompt_ids) + len(first.completion_ids) - 1
                assert (count + 1) * length > most
    assert len(batches) == 1
    assert batches[0].input_ids.shape == (len(rollouts), max(lengths))


def dealt(rollouts, ranks: int, most: int, monkeypatch) -> list[list]:
    """Each rank's micro-batches, of rollouts that lie on the ranks in equal parts."""
    of_ranks = []
    monkeypatch.setattr(batches_module, "num_ranks", lambda: ranks)
    monkeypatch.setattr(batches_module, "gather", lambda _: rollouts)
    for number in range(ranks):
        monkeypatch.setattr(batches_module, "rank", lambda number=number: number)
        of_ranks.append(list(micro_batches(rollouts[number::ranks], most, torch.device("cpu"))))
    return of_ranks


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_ranks_share_out_all_rollouts_in_equally_many_micro_batches(rollouts, ranks, monkeypatch):
    of_ranks = dealt(rollouts, ranks, 60, monkeypatch)
    assert len({len(batches) for batches in of_ranks}) == 1
    taken = [id(r) for batches in of_ranks for batch in batches for r in batch.rollouts]
    assert sorted(taken) == sorted(map(id, rollouts))


@pytest.mark.parametrize(("count", "share"), [(64, 0.68), (512, 0.88)])
def test_ranks_that_wait_for_each_other_have_as_much_to_do(count, share, monkeypatch):
    """Log-normal lengths of 16,384 tokens at most on 8 ranks, a sequence at a time: of what the
    ranks could do in a minibatch of GRPO's and of OPD's preset, so much is done (with each rank's
    own rollouts: 58% and 75%)."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(4000), 0.9, count).clip(50, 16_384).astype(int).tolist()
    rollouts = [
        Rollout([3] * 200, [4] * length, torch.zeros(length), "eos", "", key=(n,))
        for n, length in enumerate(lengths)
    ]
    work = [[len(b.tokens) for b in batches] for batches in dealt(rollouts, 8, 19_456, monkeypatch)]
    longest = [max(of_ranks) for of_ranks in zip(*work, strict=True)]
    assert sum(lengths) > share * 8 * sum(longest)


def test_eos_keeps_its_loss_where_pad_is_eos(rollouts, tokenizer):
    """Masking by `token != pad` would drop these, and the model would forget how to stop."""
    eos = tokenizer.eos_token_id
    for rollout in rollouts:
        rollout.completion_ids[-1] = eos
    batches = list(micro_batches(rollouts, 150, torch.device("cpu")))
    assert sum(int((batch.tokens == eos).sum()) for batch in batches) >= len(rollouts)


def test_minibatches_are_shuffled_passes(rollouts):
    """Each pass has every rollout once, and another order; a seed gives the same again."""
    for n, rollout in enumerate(rollouts):
        rollout.key = (0, n)
    passes = list(minibatches(rollouts, "0-1", 2, 3))
    assert [len(part) for part in passes] == [7, 7, 6] * 2
    for first in (0, 3):
        keys = [rollout.key for part in passes[first : first + 3] for rollout in part]
        assert sorted(keys) == [rollout.key for rollout in rollouts]
    assert passes[:3] != passes[3:]
    assert list(minibatches(rollouts[::-1], "0-1", 2, 3)) == passes
    assert list(minibatches(rollouts, "0-2", 2, 3)) != passes


def test_a_mean_is_over_the_updates_that_have_the_metric():
    updates = [{"a": 1.0}, {"a": 3.0, "b": 4.0}, {"a": 5.0, "b": 6.0}]
    assert mean(updates) == {"a": 3.0, "b": 5.0}


def test_no_gradient_reaches_an_unused_word(tokenizer, teacher, rollouts):
    """A token that only stands in prompts is read, not predicted: its head row learns from the
    softmax alone, that is, only downwards."""
    model = tiny_model(tokenizer, tie_word_embeddings=False)
    word = rollouts[0].prompt_ids[-1]
    others = [r for r in rollouts if word not in r.completion_ids]
    fkl_warmup.backward(model, teacher, others, fkl_warmup.Args(hard_labels=True))
    hidden_direction = model.lm_head.weight.grad[word]
    logits_gradient_sum = 0.0
    for rollout in others:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        with torch.no_grad():
            output = model(input_ids=ids, output_hidden_states=True)
        states = output.hidden_states[-1][0][len(rollout.prompt_ids) - 1 : -1]
        probabilities = output.logits[0].softmax(-1)[len(rollout.prompt_ids) - 1 : -1, word]
        logits_gradient_sum = logits_gradient_sum + (probabilities[:, None] * states).sum(0)
    count = sum(len(rollout.completion_ids) for rollout in others)
    torch.testing.assert_close(hidden_direction, logits_gradient_sum / count, atol=1e-6, rtol=1e-3)


SHARDED = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from common.model.head import head_backward, head_logprobs
from common.model.logprob import token_logprobs

dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))

class Model:
    def __init__(self, weight):
        self.weight = torch.nn.Parameter(weight)

    def get_output_embeddings(self):
        return self

def loss_fn(logits, tokens):
    logprobs, entropy = token_logprobs(logits, tokens)
    return -logprobs.sum(), {"entropy": entropy.sum()}

generator = torch.Generator().manual_seed(0)
weight = torch.randn(101, 8, generator=generator)
hidden = [torch.randn(n, 8, generator=generator) for n in (30, 7)]  # 8 chunks and 2
tokens = [torch.randint(101, (len(h),), generator=generator) for h in hidden]
plain = Model(weight.clone())
for h, t in zip(hidden, tokens):
    leaf, how = h.clone().requires_grad_(), {"inputs": {"tokens": t}, "chunk_size": 4}
    head_backward(leaf, plain, loss_fn, denominator=37.0, **how)
sharded = Model(distribute_tensor(weight.clone(), mesh, [Shard(0)]))
mine = hidden[rank].clone().requires_grad_()
for _ in range(2):  # a second micro-batch adds to the first
    how = {"inputs": {"tokens": tokens[rank]}, "chunk_size": 4}
    head_backward(mine, sharded, loss_fn, denominator=74.0, **how)
torch.testing.assert_close(sharded.weight.grad.full_tensor(), plain.weight.grad)
torch.testing.assert_close(
    head_logprobs(hidden[rank], sharded, tokens[rank], 1.0, 4),
    head_logprobs(hidden[rank], plain, tokens[rank], 1.0, 4),
)
if rank == 0:
    print("equal")
dist.destroy_process_group()
"""


def test_a_sharded_head(tmp_path):
    """Two gloo ranks with unequal numbers of chunks, a vocabulary that does not divide by two."""
    assert torchrun(SHARDED, tmp_path) == "equal\n"
