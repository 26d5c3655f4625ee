"""How far a student's next-token distributions are from a teacher's: divergences and what is logged
of them, fused.

With p the student's distribution, q the teacher's, m = (p + q) / 2, and x the student's logits:

    reverse_kl    R = sum p log(p / q)                        dR/dx = p (log(p / q) - R)
    forward_kl    F = sum q log(q / p)                        dF/dx = p - q
    jsd           J = (K + sum q log(q / m)) / 2              dJ/dx = p (log(p / m) - K) / 2
                  K = sum p log(p / m)

Shape key: C tokens of a chunk, V vocabulary.
"""

import math
from typing import Literal

import torch

from common.model.logprob import likeliest, row_blocks, scaled, triton, weighted_sum

if triton:
    import triton.language as tl

Kind = Literal["reverse_kl", "forward_kl", "jsd"]
BLOCK = 2048  # logits of a row, of each model, that a program holds at once
LOG_2 = math.log(2)
# What forward finds of each row. Tops are the largest scaled logits, log-sums the logs of the sums
# beside them: their total would round away small differences between large logits. The last two are
# K and J, for jsd.
ROW = ("top", "log_sum", "teacher_top", "teacher_log_sum", "entropy", "teacher_entropy")
ROW += ("reverse_kl", "forward_kl", "to_mixture", "jsd")


def divergence(
    kind: Kind,
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 1.0,
    overwrite_logits: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The divergence of each of C tokens, in nats: both logits [C, V] in float32, bfloat16 or
    float16 -> float32 [C]; and what transfer_metrics makes of them.

    Differentiable in the student's logits; accumulates in float32; a logit of -inf is a word of
    probability 0. On a GPU a kernel reads each logit once forward (twice for jsd, whose mixture
    needs both normalisers first) and once backward, where `overwrite_logits` lets it write the
    gradient over the student's logits instead of into a second buffer of their size.
    """
    logits, teacher_logits = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (logits, teacher_logits)
    )
    loss, found = _Divergence.apply(logits, teacher_logits, kind, temperature, overwrite_logits)
    return loss, transfer_metrics(found, logits.detach(), teacher_logits)


def transfer_metrics(
    found: torch.Tensor, logits: torch.Tensor, teacher_logits: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Sums over C tokens of what tells a healthy transfer from a failing one, in nats: KL to the
    teacher both ways, the entropy and its gap to the teacher's, and the share of the teacher's 16
    likeliest tokens among the student's 16. found: [len(ROW), C]."""
    sums = dict(zip(ROW, found.sum(1), strict=True))
    k = min(16, logits.shape[-1])
    top, teacher_top = likeliest(logits, k).indices, likeliest(teacher_logits, k).indices
    shared = (teacher_top[:, :, None] == top[:, None]).any(-1)  # [C, k]
    return {
        "policy/entropy": sums["entropy"],
        "policy/entropy_gap": sums["entropy"] - sums["teacher_entropy"],
        "policy/reverse_kl": sums["reverse_kl"],
        "policy/forward_kl": sums["forward_kl"],
        "policy/topk_overlap": shared.float().mean(-1).sum(),
    }


class _Divergence(torch.autograd.Function):
    """Saves the numbers of ROW beside the logits, and computes all else again."""

    @staticmethod
    def forward(ctx, logits, teacher_logits, kind, temperature, overwrite_logits):
        forward = _forward_triton if logits.is_cuda and triton else _forward_torch
        found = forward(logits, teacher_logits, kind, temperature)
        ctx.save_for_backward(logits, teacher_logits, found)
        ctx.kind, ctx.temperature, ctx.overwrite = kind, temperature, overwrite_logits
        ctx.mark_non_differentiable(found)
        return found[ROW.index(kind)].clone(), found

    @staticmethod
    def backward(ctx, grad, _):
        logits, teacher_logits, found = ctx.saved_tensors
        backward = _backward_triton if logits.is_cuda and triton else _backward_torch
        # Detached: a gradient that is its own leaf is never freed.
        out = logits.detach() if ctx.overwrite else torch.empty_like(logits)
        backward(logits, teacher_logits, found, grad.contiguous(), ctx.kind, ctx.temperature, out)
        return out, None, None, None, None


# === PyTorch: in blocks of rows ===


def _forward_torch(logits, teacher_logits, kind, temperature) -> torch.Tensor:
    found = torch.zeros(len(ROW), len(logits), dtype=torch.float32, device=logits.device)
    for rows in row_blocks(logits):
        x, top = _below_top(logits[rows], temperature)
        y, teacher_top = _below_top(teacher_logits[rows], temperature)
        p, q, gap = x.exp(), y.exp(), x - y  # p and q not normalised yet
        total, teacher_total = p.sum(-1), q.sum(-1)
        log_sum, teacher_log_sum = total.log(), teacher_total.log()
        offset = log_sum - teacher_log_sum
        found[:8, rows] = torch.stack(
            [
                top,
                log_sum,
                teacher_top,
                teacher_log_sum,
                log_sum - weighted_sum(p, x) / total,
                teacher_log_sum - weighted_sum(q, y) / teacher_total,
                weighted_sum(p, gap) / total - offset,
                offset - weighted_sum(q, gap) / teacher_total,
            ]
        )
        if kind == "jsd":
            logp, logq = x.sub_(log_sum[:, None]), y.sub_(teacher_log_sum[:, None])
            logm = torch.logaddexp(logp, logq).sub_(LOG_2)
            to_mixture = weighted_sum(p, logp - logm) / total
            from_teacher = weighted_sum(q, logq - logm) / teacher_total
            found[8:, rows] = torch.stack([to_mixture, (to_mixture + from_teacher) / 2])
    return found


def _backward_torch(logits, teacher_logits, found, grad, kind, temperature, out) -> None:
    row = dict(zip(ROW, found[:, :, None], strict=True))
    rate = grad[:, None] / temperature
    for rows in row_blocks(logits):
        # One subtraction after the other: their sum would round.
        logp = (scaled(logits[rows], temperature) - row["top"][rows]).sub_(row["log_sum"][rows])
        logq = scaled(teacher_logits[rows], temperature) - row["teacher_top"][rows]
        logq = logq.sub_(row["teacher_log_sum"][rows])
        p = logp.exp()
        if kind == "forward_kl":
            out[rows] = p.sub_(logq.exp_()).mul_(rate[rows])
            continue
        if kind == "reverse_kl":
            excess = logp.sub_(logq).sub_(row["reverse_kl"][rows])
        else:
            logm = torch.logaddexp(logp, logq).sub_(LOG_2)
            excess = logp.sub_(logm).sub_(row["to_mixture"][rows]).div_(2)
        if not excess.sum().isfinite():
            excess = excess.masked_fill(p == 0, 0.0)  # 0 · -inf counts 0
        out[rows] = excess.mul_(p).mul_(rate[rows])


def _below_top(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled logits less the largest of their row, float32 [R, V], and the largest [R]."""
    x = scaled(logits, temperature)
    top = x.amax(-1).float()
    return x - top[:, None], top


# === Triton ===

if triton:

    @triton.jit
    def _load_scaled(logits, columns, num_words, temperature):
        """A block of a row in float32; -inf beyond its end."""
        x = tl.load(logits + columns, mask=columns < num_words, other=float("-inf"))
        return x.to(tl.float32) / temperature

    @triton.jit
    def _add_block(x, other, top, total, moment, gap):
        """Sums over a row so far, with weights w = exp(x - top), and one more block: of w, of
        w (x - top) and of w (x - other)."""
        new_top = tl.maximum(top, tl.max(x, 0))
        # Nothing but -inf so far: any finite value serves, and -inf - -inf would be nan.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(x - base)
        drop = tl.where(top == float("-inf"), 0.0, top - base)
        scale = tl.where(top == float("-inf"), 0.0, tl.exp(drop))
        moment = (moment + total * drop) * scale
        moment += tl.sum(tl.where(weights > 0, weights * (x - base), 0.0), 0)
        gap = gap * scale + tl.sum(tl.where(weights > 0, weights * (x - other), 0.0), 0)
        total = total * scale + tl.sum(weights, 0)
        return new_top, total, moment, gap

    @triton.jit
    def _over_mixture(logp, logq):
        """log(p / m) = log 2 - log(1 + q / p)."""
        d = logq - logp
        return 0.6931471805599453 - (tl.maximum(d, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(d))))

    @triton.jit
    def _forward_kernel(
        logits,
        teacher_logits,
        found,
        row_stride,
        teacher_stride,
        temperature,
        num_rows,
        num_words,
        JSD: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program a row. Reads 2 V logits (4 V for jsd) and writes 8 floats (10)."""
        row = tl.program_id(0).to(tl.int64)  # row * row_stride passes 2^31 at 14,100 rows of 152k
        logits += row * row_stride
        teacher_logits += row * teacher_stride
        top = float("-inf")
        total = 0.0
        moment = 0.0
        gap = 0.0
        teacher_top = float("-inf")
        teacher_total = 0.0
        teacher_moment = 0.0
        teacher_gap = 0.0
        for start in range(0, num_words, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = _load_scaled(logits, columns, num_words, temperature)
            y = _load_scaled(teacher_logits, columns, num_words, temperature)
            top, total, moment, gap = _add_block(x, y, top, total, moment, gap)
            teacher_top, teacher_total, teacher_moment, teacher_gap = _add_block(
                y, x, teacher_top, teacher_total, teacher_moment, teacher_gap
            )
        log_sum = tl.log(total)
        teacher_log_sum = tl.log(teacher_total)
        offset = (top - teacher_top) + (log_sum - teacher_log_sum)
        found += row  # in the order of ROW
        tl.store(found, top)
        tl.store(found + num_rows, log_sum)
        tl.store(found + 2 * num_rows, teacher_top)
        tl.store(found + 3 * num_rows, teacher_log_sum)
        tl.store(found + 4 * num_rows, log_sum - moment / total)
        tl.store(found + 5 * num_rows, teacher_log_sum - teacher_moment / teacher_total)
        tl.store(found + 6 * num_rows, gap / total - offset)
        tl.store(found + 7 * num_rows, teacher_gap / teacher_total + offset)
        if JSD:
            to_mixture = 0.0
            from_teacher = 0.0
            for start in range(0, num_words, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                x = _load_scaled(logits, columns, num_words, temperature)
                y = _load_scaled(teacher_logits, columns, num_words, temperature)
                logp = x - top - log_sum
                logq = y - teacher_top - teacher_log_sum
                p = tl.exp(logp)
                q = tl.exp(logq)
                to_mixture += tl.sum(tl.where(p > 0, p * _over_mixture(logp, logq), 0.0), 0)
                from_teacher += tl.sum(tl.where(q > 0, q * _over_mixture(logq, logp), 0.0), 0)
            tl.store(found + 8 * num_rows, to_mixture)
            tl.store(found + 9 * num_rows, (to_mixture + from_teacher) / 2)

    @triton.jit
    def _backward_kernel(
        logits,
        teacher_logits,
        found,
        grad,
        out,
        row_stride,
        teacher_stride,
        out_stride,
        temperature,
        num_rows,
        num_words,
        KIND: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program a row and block of words. Reads 2 V logits and writes V gradients."""
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < num_words
        x = tl.load(logits + row * row_stride + columns, mask=inside, other=float("-inf"))
        y = tl.load(teacher_logits + row * teacher_stride + columns, mask=inside, other=0.0)
        found += row
        logp = x.to(tl.float32) / temperature - tl.load(found) - tl.load(found + num_rows)
        logq = y.to(tl.float32) / temperature
        logq = logq - tl.load(found + 2 * num_rows) - tl.load(found + 3 * num_rows)
        p = tl.exp(logp)
        if KIND == "forward_kl":
            slope = p - tl.exp(logq)
        elif KIND == "reverse_kl":
            slope = tl.where(p > 0, p * (logp - logq - tl.load(found + 6 * num_rows)), 0.0)
        else:
            over_mean = _over_mixture(logp, logq) - tl.load(found + 8 * num_rows)
            slope = tl.where(p > 0, p * over_mean / 2, 0.0)
        rate = tl.load(grad + row) / temperature
        tl.store(out + row * out_stride + columns, slope * rate, mask=inside)


def _forward_triton(logits, teacher_logits, kind, temperature) -> torch.Tensor:
    found = torch.zeros(len(ROW), len(logits), dtype=torch.float32, device=logits.device)
    _forward_kernel[(len(logits),)](
        logits,
        teacher_logits,
        found,
        logits.stride(0),
        teacher_logits.stride(0),
        temperature,
        *logits.shape,
        JSD=kind == "jsd",
        BLOCK=BLOCK,
        num_warps=8,
    )
    return found


def _backward_triton(logits, teacher_logits, found, grad, kind, temperature, out) -> None:
    _backward_kernel[(len(logits), triton.cdiv(logits.shape[-1], BLOCK))](
        logits,
        teacher_logits,
        found,
        grad,
        out,
        logits.stride(0),
        teacher_logits.stride(0),
        out.stride(0),
        temperature,
        *logits.shape,
        KIND=kind,
        BLOCK=BLOCK,
        num_warps=8,
    )
