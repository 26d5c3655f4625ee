"""Token log-probs with their entropies, fused on a GPU; slices of rows that fit a cache.

Shape key: C tokens of a slice, V vocabulary.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no build for this platform: PyTorch does the same, in more passes
    triton = None

BLOCK = 4096  # logits of a row that a program holds at once
LOWEST = torch.finfo(torch.float32).min


def row_slices(logits: torch.Tensor) -> list[slice]:
    """Slices of the rows of [N, V] logits whose temporaries stay in a processor's cache: four
    times as fast as all rows at once. (Fewer rows a thread would be slow again: small parallel
    loops wait for one another.) On a GPU all rows are one slice."""
    size = max(8 * torch.get_num_threads(), 2**19 // logits.shape[1])
    size = len(logits) if logits.is_cuda else size
    return [slice(first, first + size) for first in range(0, len(logits), size or 1)]


# === token log-probs ===


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-prob of each token and the entropy of its distribution, in nats: logits [C, V] in
    float32, bfloat16 or float16, tokens [C] -> 2 x [C] float32.

    Differentiable in the log-probs; the entropy is for the log. Accumulates in float32. A log-prob
    is never above 0; a logit of -inf is a word of probability 0. On a GPU one kernel reads each
    logit once, and backward *writes the gradient over the logits*, which saves a second [C, V].
    """
    if logits.is_cuda and triton:
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        return _Fused.apply(logits, tokens, temperature)
    logp = (logits.float() / temperature).log_softmax(-1)
    with torch.no_grad():
        p = logp.exp()  # sums to 1 but for the rounding of a sum over V
        entropy = -(p * logp.clamp(min=LOWEST)).sum(-1) / p.sum(-1)  # 0 · -inf counts 0
    return logp.gather(-1, tokens[:, None]).squeeze(-1), entropy


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, tokens, temperature):
        logprobs, entropy, largest, log_sum = forward_triton(logits, tokens, temperature)
        ctx.save_for_backward(logits, tokens, largest, log_sum)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        logits, tokens, largest, log_sum = ctx.saved_tensors
        out = logits.detach()  # a gradient that is its own leaf would never be freed
        backward_triton(logits, tokens, largest, log_sum, grad, ctx.temperature, out)
        return out, None, None


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
        """Compute one row a program. Reads V logits and one more (the token's); writes 4 floats.
        The least possible is V logits and 2 floats: 99.99% of the bytes at 152k words in
        bfloat16."""
        row = tl.program_id(0).to(tl.int64)  # row * row_stride passes 2^31 at 14,100 rows of 152k
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
        x_token = tl.load(logits + tl.load(tokens + row)).to(tl.float32) / temperature
        tl.store(logprobs + row, tl.minimum(x_token - top - tl.log(total), 0.0))
        tl.store(entropy + row, tl.log(total) - moment / total)
        # Apart: their sum would round away small differences between large logits.
        tl.store(largest + row, top)
        tl.store(log_sum + row, tl.log(total))

    @triton.jit
    def _backward_kernel(
        logits,
        tokens,
        largest,
        log_sum,
        grad,
        out,
        row_stride,
        out_stride,
        temperature,
        num_words,
        BLOCK: tl.constexpr,
    ):
        """Compute one row and block of words a program. Reads V logits, writes V gradients: the
        least possible, but for 4 numbers a program (4 in 4,096 a side)."""
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < num_words
        x = tl.load(logits + row * row_stride + columns, mask=inside, other=float("-inf"))
        logp = x.to(tl.float32) / temperature - tl.load(largest + row) - tl.load(log_sum + row)
        one_hot = tl.where(columns == tl.load(tokens + row), 1.0, 0.0)
        slope = (one_hot - tl.exp(logp)) * tl.load(grad + row) / temperature
        tl.store(out + row * out_stride + columns, slope, mask=inside)


def forward_triton(logits, tokens, temperature) -> torch.Tensor:
    """Log-probs, entropies, largest logits and log-sums beside them: [4, C] float32."""
    outputs = torch.empty(4, len(logits), dtype=torch.float32, device=logits.device)
    sizes = (logits.stride(0), temperature, logits.shape[-1])
    _forward_kernel[(len(logits),)](logits, tokens, *outputs, *sizes, BLOCK=BLOCK, num_warps=8)
    return outputs


def backward_triton(logits, tokens, largest, log_sum, grad, temperature, out) -> None:
    sizes = (logits.stride(0), out.stride(0), temperature, logits.shape[-1])
    _backward_kernel[(len(logits), triton.cdiv(logits.shape[-1], BLOCK))](
        logits, tokens, largest, log_sum, grad.contiguous(), out, *sizes, BLOCK=BLOCK, num_warps=8
    )


# === likeliest words ===


def likeliest(x: torch.Tensor, k: int, block: int = 64) -> torch.return_types.topk:
    """Return x.topk(k) of each row, [R, V] -> values and indices [R, k], in one pass over a large
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
