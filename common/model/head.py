"""The language-model head in chunks: no tensor of [tokens, vocabulary] ever exists.

Hidden states are cut from the graph, the head walks over them a chunk at a time, and one backward
runs through the body. The trainers' gradients are made here, of whatever `loss_fn` they bring.
"""

from collections.abc import Callable

import torch

from common.model import flops
from common.model.logprob import token_logprobs
from common.model.shard import full_weight
from common.run.lazy import dtensor


def hidden_states(model, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The head's inputs where `mask` is set: input_ids [B, T] right-padded, mask [B, T] with N ones
    -> [N, D], in the type that the model computes in.

    No attention mask is needed: attention is causal, and padding stands to the right of every real
    token. The model is entered by its root, so that FSDP2 gathers what is sharded; its head, which
    would make [B, T, V] logits, hands the hidden states through.
    """
    head = model.get_output_embeddings()
    head.forward = torch.clone
    try:
        hidden = model(input_ids=input_ids, use_cache=False).logits
    finally:
        del head.forward
    return hidden[mask]


@torch.no_grad()
def frozen_hidden_states(model, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As hidden_states, of a model that is not trained (or not now): without gradient."""
    flops.count_forward(model, mask)
    return hidden_states(model, input_ids, mask)


def head_weight(model, dtype: torch.dtype) -> torch.Tensor:
    """The head [V, D], without gradient. A sharded one is gathered: call this outside the loop over
    chunks, whose number may differ between ranks."""
    return full_weight(model.get_output_embeddings().weight, dtype)


@torch.no_grad()
def head_logprobs(
    hidden: torch.Tensor, model, tokens: torch.Tensor, temperature: float, chunk_size: int
) -> torch.Tensor:
    """Log-probs of tokens [N] from hidden states [N, D], in chunks and without gradient -> [N]."""
    weight = head_weight(model, hidden.dtype)
    if len(hidden) == 0:
        return hidden.new_empty(0, dtype=torch.float32)
    chunks = zip(hidden.split(chunk_size), tokens.split(chunk_size), strict=True)
    return torch.cat([token_logprobs(h @ weight.T, t, temperature)[0] for h, t in chunks])


def chunked_backward(
    model,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    loss_fn: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]],
    inputs: dict[str, torch.Tensor | None],
    denominator: float,
    chunk_size: int,
) -> dict[str, float]:
    """What `(loss_fn(model(input_ids).logits[mask], **inputs)[0] / denominator).backward()` does,
    in chunks of the head; see head_backward. Shapes: hidden_states'."""
    flops.count_forward(model, mask, backward=True)
    hidden = hidden_states(model, input_ids, mask)
    return head_backward(hidden, model, loss_fn, inputs, denominator, chunk_size)


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
    which is added to in place (a fresh [V, D] for each chunk would cost more than is saved). Of a
    sharded head (FSDP2) the whole is gathered before the loop and its gradient, summed over ranks,
    scattered after it: the loop itself has no collective. A frozen head gets no gradient.
    """
    weight, compute_weight = model.get_output_embeddings().weight, head_weight(model, hidden.dtype)
    trained, sharded = weight.requires_grad, isinstance(weight, dtensor.DTensor)
    if trained:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        total = torch.zeros_like(compute_weight, dtype=weight.dtype) if sharded else weight.grad
    leaf, hidden_grad = hidden.detach(), torch.empty_like(hidden)
    # Every chunk's logits in turn.
    room = leaf.new_empty(min(chunk_size, len(leaf)), len(compute_weight))
    sums: dict[str, torch.Tensor] = {}
    for first in range(0, len(hidden), chunk_size):
        chunk = slice(first, first + chunk_size)
        logits = torch.mm(leaf[chunk], compute_weight.T, out=room[: len(leaf[chunk])])
        logits = logits.detach().requires_grad_()
        sliced = {k: None if v is None else v[chunk] for k, v in inputs.items()}
        loss_sum, metrics = loss_fn(logits, **sliced)
        (logits_grad,) = torch.autograd.grad(loss_sum / denominator, logits)
        hidden_grad[chunk] = logits_grad @ compute_weight
        if trained:
            _add_product(total, logits_grad, leaf[chunk])
        for name, value in {"loss": loss_sum.detach(), **metrics}.items():
            sums[name] = sums.get(name, 0.0) + value.double()
        del logits, logits_grad, loss_sum  # else they would stand beside the next chunk's
    if trained and sharded:
        mesh = weight.device_mesh
        partial = dtensor.DTensor.from_local(
            total, mesh, [dtensor.Partial()] * mesh.ndim, run_check=False
        )
        local = partial.redistribute(placements=weight.placements).to_local()
        # Not DTensor.from_local: it would move an offloaded shard to the device that computes.
        shard_grad = weight.grad.to_local()
        shard_grad += local.to(shard_grad.device)
    hidden.backward(hidden_grad)
    # Read once: to read a number of a GPU waits for all that it was given to do.
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)) if sums else {}


def _add_product(total: torch.Tensor, logits_grad: torch.Tensor, hidden: torch.Tensor) -> None:
    """total [V, D] float32 += logits_grad [C, V].T @ hidden [C, D], in place.

    In bfloat16 the product is made in bfloat16, some words at a time: in float32 it would miss the
    matrix units, and at once it would need a second [V, D].
    """
    if logits_grad.dtype == total.dtype:
        total.addmm_(logits_grad.T, hidden)
        return
    for first in range(0, len(total), 4096):
        words = slice(first, first + 4096)
        total[words] += logits_grad[:, words].T @ hidden
