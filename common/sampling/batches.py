"""Rollouts as minibatches, one an optimizer step, and as micro-batches, one a forward pass."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from common.run.ranks import gather, max_over_ranks
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


def micro_batches(
    rollouts: list[Rollout], max_tokens: int, device: torch.device
) -> Iterator[MicroBatch]:
    """Yield slices of like length, of at most `max_tokens` tokens with their padding, or of one
    sequence. Masks go by length, so EOS keeps its loss where pad equals EOS.

    All ranks yield equally many, for a sharded model's forward and backward need all of them: the
    last ones of a rank may have no rollouts (B = 1, T = 1, N = 0).
    """
    slices: list[list[Rollout]] = []
    for row in sorted(rollouts, key=lambda row: len(row.prompt_ids) + len(row.completion_ids)):
        length = len(row.prompt_ids) + len(row.completion_ids) - 1  # the last predicts nothing
        if not slices or (len(slices[-1]) + 1) * length > max_tokens:
            slices.append([])
        slices[-1].append(row)
    slices += [[]] * (max_over_ranks(len(slices)) - len(slices))
    for rows in slices:
        inputs = [(row.prompt_ids + row.completion_ids)[:-1] for row in rows]
        input_ids = torch.zeros(max(1, len(rows)), max(map(len, inputs), default=1)).long()
        mask = torch.zeros(input_ids.shape, dtype=torch.bool)
        for b, row in enumerate(rows):
            input_ids[b, : len(inputs[b])] = torch.tensor(inputs[b])
            mask[b, len(row.prompt_ids) - 1 : len(inputs[b])] = True
        tokens = torch.tensor([token for row in rows for token in row.completion_ids]).long()
        yield MicroBatch(rows, input_ids.to(device), mask.to(device), tokens.to(device))
