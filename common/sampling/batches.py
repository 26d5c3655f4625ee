"""Rollouts as minibatches, one an optimizer step, and as micro-batches, one a forward pass."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from common.run.ranks import gather, num_ranks, rank
from common.sampling.rollout import Rollout


def minibatches(
    rollouts: list[Rollout], seed: str, num_epochs: int, num_minibatches: int
) -> Iterator[list[Rollout]]:
    """Yield this rank's part of each minibatch: `num_epochs` passes, each shuffled by the seed and
    its number, the same at any number of ranks."""
    rollout_of = {rollout.key: rollout for rollout in rollouts}
    keys = sorted(gather(list(rollout_of)))
    for epoch in range(num_epochs):
        shuffled = random.Random(f"{seed}-{epoch}").sample(keys, len(keys))
        for first in range(num_minibatches):
            part = shuffled[first::num_minibatches]
            yield [rollout_of[key] for key in part if key in rollout_of]


def cut(rollouts: list[Rollout], max_tokens: int) -> list[list[Rollout]]:
    """Return the rollouts in slices of like length, the shortest first, in whatever order they
    come."""
    slices: list[list[Rollout]] = []
    lengths = [len(row.prompt_ids) + len(row.completion_ids) for row in rollouts]
    order = sorted(range(len(rollouts)), key=lambda i: (lengths[i], rollouts[i].key))
    for length, row in ((lengths[i] - 1, rollouts[i]) for i in order):  # the last predicts nothing
        if not slices or (len(slices[-1]) + 1) * length > max_tokens:
            slices.append([])
        slices[-1].append(row)
    return slices


def _of_all_ranks(rollouts: list[Rollout]) -> list[Rollout]:
    """Return the rollouts of all ranks, with what a forward and backward need of them."""
    if num_ranks() == 1:
        return rollouts
    return gather([replace(rollout, problem=None, verdict=None, text="") for rollout in rollouts])


@dataclass
class MicroBatch:
    """B right-padded sequences with N loss tokens: the completions', EOS included, no prompt's."""

    rollouts: list[Rollout]  # B
    input_ids: torch.Tensor  # [B, T]
    mask: torch.Tensor  # bool [B, T]: this position predicts a loss token
    tokens: torch.Tensor  # [N]: the loss tokens

    def per_token(self, name: str) -> torch.Tensor | None:
        """Return a field of the rollouts, float32 [N]: a number counts for all of a rollout's
        tokens, a tensor [T] has one for each. None if they have none."""
        pairs = [(getattr(rollout, name), len(rollout.completion_ids)) for rollout in self.rollouts]
        if not pairs or pairs[0][0] is None:
            return None
        return torch.cat([torch.as_tensor(v).expand(n) for v, n in pairs]).to(self.tokens.device)

    def per_rollout(self, values: torch.Tensor) -> dict[tuple[int, ...], torch.Tensor]:
        """Return values [N] of the loss tokens as each rollout's own [T], by its key."""
        parts = values.cpu().split([len(rollout.completion_ids) for rollout in self.rollouts])
        return dict(zip([rollout.key for rollout in self.rollouts], parts, strict=True))


def micro_batches(
    rollouts: list[Rollout], max_tokens: int, device: torch.device
) -> Iterator[MicroBatch]:
    """Yield this rank's micro-batches of all ranks' rollouts: slices of like length, of at most
    `max_tokens` tokens with their padding, or of one sequence. Masks go by length, so EOS keeps its
    loss where pad equals EOS.

    A sharded model's forward and backward need all ranks: each yields equally many, and those that
    wait for one another have slices of like length. Rank r's rollouts need not be those that it
    sampled. The last of them may be none (B = 1, T = 1, N = 0).
    """
    slices = cut(_of_all_ranks(rollouts), max_tokens)
    slices += [[]] * (-len(slices) % num_ranks())
    for rows in slices[rank() :: num_ranks()]:
        yield micro_batch(rows, device)


def micro_batch(rollouts: list[Rollout], device: torch.device) -> MicroBatch:
    """Return rollouts as one micro-batch."""
    inputs = [(row.prompt_ids + row.completion_ids)[:-1] for row in rollouts]
    input_ids = torch.zeros(max(1, len(rollouts)), max(map(len, inputs), default=1)).long()
    mask = torch.zeros(input_ids.shape, dtype=torch.bool)
    for b, row in enumerate(rollouts):
        input_ids[b, : len(inputs[b])] = torch.tensor(inputs[b])
        of_completion = mask[b, len(row.prompt_ids) - 1 : len(inputs[b])]
        of_completion[slice(None) if row.positions is None else row.positions] = True
    tokens = torch.tensor([token for row in rollouts for token in row.loss_tokens]).long()
    return MicroBatch(rollouts, input_ids.to(device), mask.to(device), tokens.to(device))
