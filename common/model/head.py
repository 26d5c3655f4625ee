"""The language-model head in chunks: no tensor of [tokens, vocabulary] ever exists.

Hidden states are cut from the graph, the head walks over them a chunk at a time, and one backward
runs through the body. The trainers' gradients are made here, of whatever `loss_fn` they bring.
"""

from collections.abc import Callable

import torch

from common.model import flops
from common.model.logprob import row_slices, token_logprobs
from common.model.shard import full_weight, is_sharded
from common.run.ranks import combine

Loss = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]


def hidden_states(model, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the head's inputs where `mask` is set: input_ids [B, T] right-padded, mask [B, T] with
    N ones -> [N, D], in the type that the model computes in.

    No attention mask is needed: attention is causal, and padding stands to the right of every real
    token. The model is entered by its root, so that FSDP2 gathers what is sharded; its head, which
    would make [B, T, V] logits, hands the hidden states through.
    """
    head = model.get_output_embeddings()
    head.forward = torch.clone  # the identity
    try:
        hidden = model(input_ids=input_ids, use_cache=False).logits
    finally:
        del head.forward
    return hidden[mask]


@torch.no_grad()
def frozen_hidden_states(model, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return hidden_states of a model that is not trained (or not now): without gradient."""
    flops.count_forward(model, mask)
    return hidden_states(model, input_ids, mask)


def head_weight(model, dtype: torch.dtype) -> torch.Tensor:
    """Return the head [V, D], without gradient. A sharded one is gathered: call this outside the
    loop over chunks, whose number may differ between ranks."""
    return full_weight(model.get_output_embeddings().weight, dtype)


@torch.no_grad()
def head_logprobs(
    hidden: torch.Tensor, model, tokens: torch.Tensor, temperature: float, chunk_size: int
) -> torch.Tensor:
    """Return the log-probs [N] of tokens [N], from hidden states [N, D], without gradient."""
    weight, logprobs = head_weight(model, hidden.dtype), hidden.new_empty(len(hidden)).float()
    for first in range(0, len(hidden), chunk_size):
        chunk = slice(first, first + chunk_size)
        logits, of_chunk = hidden[chunk] @ weight.T, logprobs[chunk]
        for rows in row_slices(logits):
            of_chunk[rows] = token_logprobs(logits[rows], tokens[chunk][rows], temperature)[0]
    return logprobs


def chunked_backward(
    model, input_ids: torch.Tensor, mask: torch.Tensor, loss_fn: Loss, **options
) -> dict[str, float]:
    """Do what `(loss_fn(model(input_ids).logits[mask], ...)[0] / denominator).backward()` does, in
    chunks of the head. Shapes: hidden_states'; the other arguments: head_backward's."""
    flops.count_forward(model, mask, backward=True)
    return head_backward(hidden_states(model, input_ids, mask), model, loss_fn, **options)


def head_backward(
    hidden: torch.Tensor,
    model,
    loss_fn: Loss,
    *,
    inputs: dict[str, torch.Tensor | None],
    denominator: float,
    chunk_size: int,
    teacher: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> dict[str, float]:
    """Add the gradients of (loss_fn summed over all N tokens) / denominator to every .grad.

    The head multiplies a chunk of hidden states [C, D]. `loss_fn(logits, **inputs)` is called on
    slices of its rows that fit a processor's cache, with the same slice of each input [N, ...]; it
    returns the *sum* of the loss over these tokens and metrics that are such sums too (named _min
    or _max: the least, the largest), so that nothing depends on the sizes. teacher: hidden states
    [N, D'] and a head [V', D'] whose logits loss_fn gets as `teacher_logits`. Returns the metrics
    of all tokens, and the summed loss as "loss".

    Memory beyond the body's: one chunk's logits, over which their gradient is written, the hidden
    gradient [N, D], and the head's .grad, which is added to in place (a fresh [V, D] for each chunk
    would cost more than is saved). Of a sharded head (FSDP2) the whole is gathered before the loop
    and its gradient, summed over ranks, scattered after it: the loop has no collective. A frozen
    head gets no gradient.
    """
    weight, compute_weight = model.get_output_embeddings().weight, head_weight(model, hidden.dtype)
    trained, sharded = weight.requires_grad, is_sharded(weight)
    if trained:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        total = torch.zeros_like(compute_weight, dtype=weight.dtype) if sharded else weight.grad
    leaf, hidden_grad = hidden.detach(), torch.empty_like(hidden)
    size = min(chunk_size, len(leaf))
    buffers = [leaf.new_empty(size, len(compute_weight))]  # every chunk's logits in turn
    if teacher:
        buffers.append(teacher[0].new_empty(size, len(teacher[1])))
    parts: list[dict[str, torch.Tensor]] = []
    for first in range(0, len(hidden), chunk_size):
        chunk = slice(first, first + chunk_size)
        of_chunk = {name: None if v is None else v[chunk] for name, v in inputs.items()}
        logits = _logits(leaf[chunk], compute_weight, buffers[0])
        if teacher:
            of_chunk["teacher_logits"] = _logits(teacher[0][chunk], teacher[1], buffers[1])
        for rows in row_slices(logits):
            part = logits[rows].detach().requires_grad_()
            of_rows = {name: None if v is None else v[rows] for name, v in of_chunk.items()}
            loss_sum, metrics = loss_fn(part, **of_rows)
            (gradient,) = torch.autograd.grad(loss_sum / denominator, part)
            logits[rows] = gradient
            parts.append({"loss": loss_sum.detach(), **metrics})
            del part, gradient, loss_sum, metrics  # else they would stand beside the next ones
        hidden_grad[chunk] = logits @ compute_weight
        if trained:
            _add_product(total, logits, leaf[chunk])
    if trained and sharded:
        _add_shard(weight, total)
    hidden.backward(hidden_grad)
    if not parts:
        return {}
    # Read once: to read a number of a GPU waits for all that it was given to do.
    rows = torch.stack([torch.stack([*part.values()]).double() for part in parts]).tolist()
    return combine([dict(zip(parts[0], row, strict=True)) for row in rows])


def _logits(hidden: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    return torch.mm(hidden, weight.T, out=buffer[: len(hidden)])


def _add_shard(weight: torch.Tensor, total: torch.Tensor) -> None:
    """Add this rank's shard of the sum over ranks of `total` [V, D] to a sharded weight's .grad."""
    from torch.distributed.tensor import DTensor, Partial

    mesh = weight.device_mesh
    partial = DTensor.from_local(total, mesh, [Partial()] * mesh.ndim, run_check=False)
    local = partial.redistribute(placements=weight.placements).to_local()
    # Not DTensor.from_local: it would move an offloaded shard to the device that computes.
    shard_grad = weight.grad.to_local()
    shard_grad += local.to(shard_grad.device)


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
