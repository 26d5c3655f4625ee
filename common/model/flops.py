"""FLOPs of matrix products (2 a multiply-add), counted where they are spent: in sampling, forward
and backward. What checkpointed activations compute again is left out, and the products of LoRA's
factors with each other: both depend on micro-batches, and nothing else here does.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from common.model.lora import layers_of

# Of this rank, since the last `take`: those of the trained model and its reference, and those of
# the frozen teacher.
_spent = {"policy": 0.0, "teacher": 0.0}


def take(role: str) -> float:
    """Return what was spent on the policy or the teacher since the last call, and reset it."""
    spent, _spent[role] = _spent[role], 0.0
    return spent


def count_forward(model, mask: torch.Tensor, backward: bool = False) -> None:
    """Count a forward pass over right-padded sequences, where mask [B, T] is set at positions that
    predict a loss token: the last ones of each sequence."""
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    ends = (mask * positions).amax(1).tolist()  # the last token of a completion predicts nothing
    completions = mask.sum(1).tolist()
    lengths = [(end - n + 1, n) for end, n in zip(ends, completions, strict=True) if n > 0]
    _spent[role_of(model)] += (update_flops if backward else forward_flops)(model, lengths)


def count_sampling(model, rollouts: Sequence, group_size: int) -> None:
    """Count completions of which `group_size` have their prompt computed once."""
    lengths = [(len(rollout.prompt_ids), len(rollout.completion_ids)) for rollout in rollouts]
    _spent[role_of(model)] += forward_flops(model, lengths, group_size)


def role_of(model) -> str:
    return getattr(model, "flops_role", "policy")


def update_flops(model, lengths: Iterable[tuple[int, int]]) -> float:
    """Return the FLOPs of a forward pass and its backward, which counts as two more: one for the
    gradients of what goes in, and one for those of weights, if they are trained."""
    return 2 * forward_flops(model, lengths) + forward_flops(model, lengths, trained_only=True)


def forward_flops(
    model, lengths: Iterable[tuple[int, int]], shared: int = 1, trained_only: bool = False
) -> float:
    """Return the FLOPs of a dense model over sequences of so many prompt and completion tokens.

    The head counts at the tokens that predict a completion token, attention at pairs of a query and
    a key that it may see. shared: so many completions have their prompt computed once.
    trained_only: leave out frozen weights; adapters, which backward alone multiplies by, twice.
    """
    config, head = model.config, model.get_output_embeddings()
    weights = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    counted = {w for w in weights if w.requires_grad or not trained_only}
    body = sum(w.numel() for w in counted if w is not head.weight)
    if trained_only:
        body += sum(2 * (m.lora_A.numel() + m.lora_B.numel()) for m in layers_of(model).values())
    pair = 4 * config.num_hidden_layers * config.num_attention_heads * head_size(config)
    flops = 0.0
    for prompt, completion in lengths:
        length = prompt + completion - 1
        prompt_pairs, all_pairs = prompt * (prompt + 1) / 2, length * (length + 1) / 2
        flops += 2 * body * (prompt / shared + completion - 1)
        flops += 2 * head.weight.numel() * completion * (head.weight in counted)
        flops += pair * (prompt_pairs / shared + all_pairs - prompt_pairs)
    return flops


def head_size(config) -> int:
    """Return the width of an attention head, which not every config names."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
