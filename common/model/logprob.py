"""Token log-probs and entropies, fused on a GPU; the likeliest words of a large vocabulary.

Shape key: N tokens of a micro-batch, C of a chunk, V vocabulary.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no build for this platform: PyTorch does the same, in more passes
    triton = None

BLOCK = 4096  # logits of a row that a program holds at once


# === token log-probs ===


def token_logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float = 1.0,
    overwrite_logits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each token and entropy of its distribution, in nats: logits [N, V] in float32,
    bfloat16 or float16, tokens [N] -> 2 x [N] float32.

    Differentiable in both outputs. Accumulates in float32; a log-prob is never above 0; a logit of
    -inf is a word of probability 0. Rows with a negative token are skipped: both outputs and the
    gradient are 0. On a GPU one kernel reads each logit once, and `overwrite_logits` lets backward
    write the gradient over them instead of into a second buffer of their size.
    """
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    return _TokenLogprobs.apply(logits, tokens, temperature, overwrite_logits)


class _TokenLogprobs(torch.autograd.Function):
    """Saves per row the largest scaled logit and the log of the sum beside it, not their total:
    that would round away small differences between large logits."""

    @staticmethod
    def forward(ctx, logits, tokens, temperature, overwrite_logits):
        forward = _forward_triton if logits.is_cuda and triton else _forward_torch
        logprobs, entropy, largest, log_sum = forward(logits, tokens, temperature)
        ctx.save_for_backward(logits, tokens, entropy, largest, log_sum)
        ctx.temperature, ctx.overwrite = temperature, overwrite_logits
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, logprobs_grad, entropy_grad):
        logits, *rest = ctx.saved_tensors
        backward = _backward_triton if logits.is_cuda and triton else _backward_torch
        # Detached: a gradient that is its own leaf is never freed.
        out = logits.detach() if ctx.overwrite else torch.empty_like(logits)
        backward(logits, *rest, logprobs_grad, entropy_grad, ctx.temperature, out)
        return out, None, None, None


def row_blocks(logits: torch.Tensor) -> list[slice]:
    """Rows whose temporaries stay in a processor's cache: four times as fast as whole chunks. At
    least one a thread: sums and maxima of a row are one thread's."""
    size = max(torch.get_num_threads(), 2**19 // logits.shape[-1])
    return [slice(first, first + size) for first in range(0, len(logits), size)]


def weighted_sum(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Of each row, [R, V] -> [R]. 0 · -inf counts 0: a word of probability 0 adds nothing."""
    total = torch.linalg.vecdot(weights, values)
    if total.isnan().any():
        total = torch.linalg.vecdot(weights, values.masked_fill(weights == 0, 0.0))
    return total


def scaled(logits, temperature):
    return logits if temperature == 1 else logits.float() / temperature


def _forward_torch(logits, tokens, temperature):
    outputs = torch.zeros(4, len(logits), dtype=torch.float32, device=logits.device)
    logprobs, entropy, largest, log_sum = outputs
    for rows in row_blocks(logits):
        x = scaled(logits[rows], temperature)
        largest[rows] = x.amax(-1)
        shifted = x - largest[rows, None]
        weights = shifted.exp()
        total = weights.sum(-1)
        log_sum[rows] = total.log()
        index = tokens[rows].clamp(min=0)[:, None]
        logprobs[rows] = shifted.gather(-1, index).squeeze(-1) - log_sum[rows]
        entropy[rows] = log_sum[rows] - weighted_sum(weights, shifted) / total
    skipped = tokens < 0
    return logprobs.masked_fill(skipped, 0.0), entropy.masked_fill(skipped, 0.0), largest, log_sum


def _backward_torch(
    logits, tokens, entropy, largest, log_sum, logprobs_grad, entropy_grad, temperature, out
) -> None:
    grads = [torch.zeros_like(entropy) if g is None else g for g in (logprobs_grad, entropy_grad)]
    rate, entropy_rate = (g.masked_fill(tokens < 0, 0.0)[:, None] / temperature for g in grads)
    for rows in row_blocks(logits):
        # One subtraction after the other: their sum would round.
        logp = (scaled(logits[rows], temperature) - largest[rows, None]).sub_(log_sum[rows, None])
        grad = logp.exp()
        if entropy_grad is None:
            grad.mul_(-rate[rows])
        else:
            logp.masked_fill_(grad == 0, 0.0)  # 0 · -inf again
            surprise = logp.add_(entropy[rows, None])
            grad.mul_(surprise.mul_(entropy_rate[rows]).add_(rate[rows]).neg_())
        index = tokens[rows].clamp(min=0)[:, None]
        out[rows] = grad.scatter_add_(-1, index, rate[rows])


if triton:

    @triton.jit
    def _forward_kernel(
        logits,
        tokens,
        logprobs,
        entropy,
        largest,
        log_sum,
        row_stride,
        temperature,
        num_words,
        BLOCK: tl.constexpr,
    ):
        """One program a row. Reads V logits and one more (the token's); writes 4 floats. The least
        possible is V logits and 2 floats: 99.99% of the bytes at 152k words in bfloat16."""
        row = tl.program_id(0).to(tl.int64)  # row * row_stride passes 2^31 at 14,100 rows of 152k
        token = tl.load(tokens + row)
        if token < 0:
            tl.store(logprobs + row, 0.0)
            tl.store(entropy + row, 0.0)
            return
        logits += row * row_stride
        top = float("-inf")  # of the logits seen so far
        total = 0.0  # sum of exp(x - top)
        moment = 0.0  # sum of exp(x - top) (x - top)
        for start in range(0, num_words, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(logits + columns, mask=columns < num_words, other=float("-inf"))
            x = x.to(tl.float32) / temperature
            new_top = tl.maximum(top, tl.max(x, 0))
            # Nothing but -inf so far: any finite value serves, and -inf - -inf would be nan.
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            shifted = x - base
            weights = tl.exp(shifted)
            drop = tl.where(top == float("-inf"), 0.0, top - base)
            scale = tl.where(top == float("-inf"), 0.0, tl.exp(drop))
            moment = (moment + total * drop) * scale
            moment += tl.sum(tl.where(weights > 0, weights * shifted, 0.0), 0)
            total = total * scale + tl.sum(weights, 0)
            top = new_top
        x_token = tl.load(logits + token).to(tl.float32) / temperature
        tl.store(logprobs + row, tl.minimum(x_token - top - tl.log(total), 0.0))
        tl.store(entropy + row, tl.log(total) - moment / total)
        tl.store(largest + row, top)
        tl.store(log_sum + row, tl.log(total))

    @triton.jit
    def _backward_kernel(
        logits,
        tokens,
        entropy,
        largest,
        log_sum,
        logprobs_grad,
        entropy_grad,
        out,
        row_stride,
        out_stride,
        temperature,
        num_words,
        BLOCK: tl.constexpr,
    ):
        """One program a row and block of words. Reads V logits, writes V gradients: the least
        possible, but for 6 numbers a program (6 in 4,096 a side)."""
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < num_words
        out += row * out_stride
        token = tl.load(tokens + row)
        if token < 0:
            tl.store(out + columns, tl.zeros([BLOCK], tl.float32), mask=inside)
            return
        x = tl.load(logits + row * row_stride + columns, mask=inside, other=float("-inf"))
        logp = x.to(tl.float32) / temperature - tl.load(largest + row) - tl.load(log_sum + row)
        p = tl.exp(logp)
        rate = tl.load(logprobs_grad + row) / temperature
        entropy_rate = tl.load(entropy_grad + row) / temperature
        surprise = tl.where(p > 0, logp + tl.load(entropy + row), 0.0)
        grad = tl.where(columns == token, rate, 0.0) - p * (rate + entropy_rate * surprise)
        tl.store(out + columns, grad, mask=inside)


def _forward_triton(logits, tokens, temperature):
    logprobs, entropy, largest, log_sum = torch.zeros(
        4, len(logits), dtype=torch.float32, device=logits.device
    )
    sizes = (logits.stride(0), temperature, logits.shape[-1])
    _forward_kernel[(len(logits),)](
        logits, tokens, logprobs, entropy, largest, log_sum, *sizes, BLOCK=BLOCK, num_warps=8
    )
    return logprobs, entropy, largest, log_sum


def _backward_triton(
    logits, tokens, entropy, largest, log_sum, logprobs_grad, entropy_grad, temperature, out
) -> None:
    zeros = torch.zeros_like(entropy)
    grads = [zeros if grad is None else grad.contiguous() for grad in (logprobs_grad, entropy_grad)]
    sizes = (logits.stride(0), out.stride(0), temperature, logits.shape[-1])
    _backward_kernel[(len(logits), triton.cdiv(logits.shape[-1], BLOCK))](
        logits,
        tokens,
        entropy,
        largest,
        log_sum,
        *grads,
        out,
        *sizes,
        BLOCK=BLOCK,
        num_warps=8,
    )


# === likeliest words ===


def likeliest(x: torch.Tensor, k: int, block: int = 64) -> torch.return_types.topk:
    """x.topk(k) of each row, [R, V] -> values and indices [R, k], in one pass over a large
    vocabulary: the k largest stand in the k blocks with the largest maxima."""
    num_words = x.shape[-1]
    if num_words < 4 * k * block:
        return x.topk(k)
    whole = num_words - num_words % block
    blocks = x[:, :whole].unflatten(-1, (-1, block)).amax(-1).topk(k).indices
    inside = torch.arange(block, device=x.device)
    candidates = (blocks[:, :, None] * block + inside).flatten(1)
    rest = torch.arange(whole, num_words, device=x.device).expand(len(x), -1)
    candidates = torch.cat([candidates, rest], 1)
    values, where = x.gather(1, candidates).topk(k)
    return torch.return_types.topk((values, candidates.gather(1, where)))
