"""Token log-probs, and the language-model head in chunks.

With a vocabulary of 152k the logits are the memory wall of RL and distillation: those of 2,000
tokens take 1.2 GB in float32, and a loss holds several such tensors. Here no tensor of
[tokens, vocabulary] ever exists: `head_backward` cuts the hidden states from the graph, walks over
them in chunks, and runs one backward through the body at the end.

Shape key: N tokens of a micro-batch, C of a chunk, V vocabulary, D hidden size.
"""

import contextlib
from collections.abc import Callable

import torch


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each token and entropy of its distribution, in nats: logits [N, V], tokens [N] ->
    2 x [N] float32.

    Differentiable in both outputs. Accumulates in float32 whatever the dtype of the logits; a log-
    prob is never above 0.
    """
    logprobs = (logits.float() / temperature).log_softmax(-1)
    # 0 · -inf is nan: a token of probability 0 adds nothing to the entropy.
    entropy = -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(-1)
    return logprobs.gather(-1, tokens[:, None]).squeeze(-1), entropy


def kl_divergence(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each row, in nats: log-probs [C, V] -> [C]."""
    return torch.nn.functional.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)


def transfer_metrics(logq: torch.Tensor, logp: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over C tokens of what tells a healthy transfer from a failing one, in nats.

    Log-probs of student and teacher, [C, V] -> KL to the teacher both ways, the entropy and its gap
    to the teacher's, and the share of the teacher's 16 likeliest tokens among the student's 16.
    """
    entropy, teacher_entropy = -(logq.exp() * logq).sum(-1), -(logp.exp() * logp).sum(-1)
    k = min(16, logq.shape[-1])
    top, teacher_top = logq.topk(k).indices, logp.topk(k).indices
    shared = (top[:, :, None] == teacher_top[:, None]).any(-1)
    return {
        "policy/entropy": entropy.sum(),
        "policy/entropy_gap": (entropy - teacher_entropy).sum(),
        "policy/reverse_kl": kl_divergence(logq, logp).sum(),
        "policy/forward_kl": kl_divergence(logp, logq).sum(),
        "policy/topk_overlap": shared.float().mean(-1).sum(),
    }


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """bfloat16 compute over float32 weights: pure bfloat16 ones do not move at a rate of 1e-6."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def hidden_states(
    model, input_ids: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The head's inputs where `mask` is set: input_ids [B, T] right-padded, mask [B, T] with N ones
    -> [N, D] of `dtype`.

    No attention mask is needed: attention is causal, and padding stands to the right of every real
    token.
    """
    with autocast(input_ids.device, dtype):
        output = model.get_decoder()(input_ids=input_ids, use_cache=False)
    return output.last_hidden_state[mask].to(dtype)


def head_logits(hidden: torch.Tensor, model) -> torch.Tensor:
    """Logits [C, V] of a chunk of hidden states [C, D], in their dtype."""
    return hidden @ model.get_output_embeddings().weight.detach().to(hidden.dtype).T


@torch.no_grad()
def head_logprobs(
    hidden: torch.Tensor, model, tokens: torch.Tensor, temperature: float, chunk_size: int
) -> torch.Tensor:
    """Log-probs of tokens [N] from hidden states [N, D], in chunks and without gradient -> [N]."""
    chunks = zip(hidden.split(chunk_size), tokens.split(chunk_size), strict=True)
    return torch.cat([token_logprobs(head_logits(h, model), t, temperature)[0] for h, t in chunks])


def head_backward(
    hidden: torch.Tensor,
    model,
    loss_fn: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]],
    inputs: dict[str, torch.Tensor | None],
    denominator: float,
    chunk_size: int,
) -> dict[str, float]:
    """Add the gradients of (loss_fn summed over all chunks) / denominator to every .grad.

    Calls `loss_fn(logits [C, V], **inputs)` with the chunk's slice of each input [N, ...]; it
    returns the *sum* of the loss over these tokens and metrics that are such sums too, so that
    nothing depends on the chunk size. Returns the summed metrics, and the summed loss as "loss".

    Memory beyond the body's: one chunk's tensors, the hidden gradient [N, D], and the head's .grad,
    which is added to in place (a fresh [V, D] for each chunk would cost more than is saved).
    """
    weight = model.get_output_embeddings().weight
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    compute_weight = weight.detach().to(hidden.dtype)
    leaf, hidden_grad = hidden.detach(), torch.empty_like(hidden)
    sums: dict[str, float] = {}
    for first in range(0, len(hidden), chunk_size):
        chunk = slice(first, first + chunk_size)
        logits = (leaf[chunk] @ compute_weight.T).requires_grad_()
        sliced = {k: None if v is None else v[chunk] for k, v in inputs.items()}
        loss_sum, metrics = loss_fn(logits, **sliced)
        (logits_grad,) = torch.autograd.grad(loss_sum / denominator, logits)
        hidden_grad[chunk] = logits_grad @ compute_weight
        weight.grad.addmm_(logits_grad.T.to(weight.dtype), leaf[chunk].to(weight.dtype))
        for name, value in {"loss": loss_sum.detach(), **metrics}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    hidden.backward(hidden_grad)
    return sums
