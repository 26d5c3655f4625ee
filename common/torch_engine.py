"""Sampling with transformers, from the trained model itself: nothing to synchronise.

Training samples at top_p = 1 without top_k, and log-probs are those of the distribution that was
sampled from, that is, after the temperature.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import Cache, DynamicLayer

from common.model import end_ids
from common.rollout import Rollout
from common.sharding import device_of, gathered


def draw(logprobs: torch.Tensor, uniforms: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """Inverse-CDF sampling: logprobs [B, V] float32, uniforms [B] in [0, 1) -> token ids [B].

    One uniform a token, drawn ahead, makes a sample depend on its own seed alone: not on the batch
    that it shares, nor on who else has finished. It is also much faster than torch.multinomial over
    a large vocabulary.
    """
    weights = logprobs.exp()
    if top_k > 0:
        kept = weights.topk(min(top_k, weights.shape[-1])).values[:, -1:]
        weights = weights.masked_fill(weights < kept, 0.0)
    if top_p < 1.0:
        ordered, order = (weights / weights.sum(-1, keepdim=True)).sort(descending=True)
        # The token that crosses top_p is kept: what stands before it sums to less.
        dropped = (ordered.cumsum(-1) - ordered) >= top_p
        weights = weights.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), 0.0)
    cdf = weights.cumsum(-1)
    # Below the last value even after rounding, so that no token of probability 0 behind it can be
    # reached.
    target = (uniforms[:, None] * cdf[:, -1:]).minimum(
        torch.nextafter(cdf[:, -1:], torch.zeros_like(cdf[:, -1:]))
    )
    return torch.searchsorted(cdf, target, right=True).squeeze(-1)


class GrowingLayer(DynamicLayer):
    """transformers' cache of one layer, [B, H, T, head size], without its copy of all of it at
    every token: new tokens are written behind the old ones, where there is room for half as many
    more."""

    room: tuple[torch.Tensor, torch.Tensor] | None = None  # what keys and values are the front of

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if self.room is None or end > self.room[0].shape[-2]:
            B, H, _, head_size = key_states.shape
            room = tuple(key_states.new_empty(B, H, end + end // 2 + 16, head_size) for _ in "kv")
            if length > 0:
                room[0][:, :, :length], room[1][:, :, :length] = self.keys, self.values
            self.room = room
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, length:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.room = None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.room = None


def rows_that_fit(config, length: int, itemsize: int, free: int) -> int:
    """How many sequences of `length` tokens have their caches, which grow by half, and float32
    logits, of which there are some four at a time, in half of `free` bytes. At least 1. `itemsize`:
    bytes of a number in the cache."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * itemsize
    return max(1, int(free / 2 / (1.5 * length * cache + 16 * config.vocab_size)))


class TorchEngine:
    """Samples with the trained model itself, through transformers: nothing to synchronise.

    The prompt is computed once and shared by its G completions; finished sequences leave the batch;
    sample (p, g) of seed S is the same whatever else is in the batch.
    """

    num_ranks = 1  # that share one engine

    def __init__(self, model, tokenizer, dtype: torch.dtype = torch.float32, batch_size: int = 512):
        self.model, self.tokenizer = model, tokenizer
        self.dtype, self.batch_size = dtype, batch_size  # the type it computes in; sequences a call
        self.eos_ids = torch.tensor(end_ids(tokenizer, model), device=device_of(model))

    def sync(self) -> dict[str, float]:
        """Nothing to do, nothing to prove: the weights it samples with are the trained ones."""
        return {}

    def sleep(self) -> None:
        """Nothing to free."""

    def generate(
        self,
        prompts: Sequence[list[int]],
        group_size: int,
        *,
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[tuple[int, ...]],
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> list[Rollout]:
        """P prompts -> N = P·G rollouts, grouped. Temperature 0 is greedy, with log-probs at 1.
        seeds: one for each prompt; its samples are numbered."""
        rollouts, device = [], device_of(self.model)
        rows = self.batch_size
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            length = max(map(len, prompts), default=0) + max_new_tokens
            rows = min(rows, rows_that_fit(self.model.config, length, self.dtype.itemsize, free))
        per_batch = max(1, rows // group_size)
        with torch.no_grad(), gathered(self.model):
            for start in range(0, len(prompts), per_batch):
                batch = prompts[start : start + per_batch]
                uniforms = [
                    np.random.default_rng([*seeds[start + p], g]).random(
                        max_new_tokens, dtype=np.float32
                    )
                    for p in range(len(batch))
                    for g in range(group_size)
                ]
                uniforms = torch.from_numpy(np.stack(uniforms)).to(device)
                rollouts += self._generate_batch(
                    batch, group_size, uniforms, temperature, top_p, top_k
                )
        return rollouts

    def _generate_batch(
        self, prompts, group_size, uniforms, temperature, top_p, top_k
    ) -> list[Rollout]:
        device, pad = uniforms.device, self.tokenizer.pad_token_id
        num_rows, max_new_tokens = uniforms.shape
        # Prefill: each prompt once, left-padded so that all completions start in one column.
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        padded = bool((lengths < width).any())  # without padding attention is faster with no mask
        cache = Cache(layer_class_to_replicate=GrowingLayer)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self._forward(ids, mask if padded else None, positions, cache)
        # Share it over the group.
        cache.batch_repeat_interleave(group_size)
        logits, mask = (t.repeat_interleave(group_size, 0) for t in (logits, mask))
        positions = lengths.repeat_interleave(group_size)
        # Decode. `rows` are the sequences that are still in the shrinking batch.
        tokens = torch.full((num_rows, max_new_tokens), pad, device=device)
        logprobs = torch.zeros((num_rows, max_new_tokens), device=device)
        num_tokens = torch.full((num_rows,), max_new_tokens, device=device)
        ended = torch.zeros(num_rows, dtype=torch.bool, device=device)
        rows = torch.arange(num_rows, device=device)
        for t in range(max_new_tokens):
            logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)
            greedy = temperature == 0
            sampled = logp.argmax(-1) if greedy else draw(logp, uniforms[rows, t], top_p, top_k)
            tokens[rows, t] = sampled
            logprobs[rows, t] = logp.gather(-1, sampled[:, None]).squeeze(-1)
            just_ended = rows[torch.isin(sampled, self.eos_ids) & ~ended[rows]]
            ended[just_ended], num_tokens[just_ended] = True, t + 1
            alive = (~ended[rows]).nonzero().squeeze(-1)
            if len(alive) == 0 or t + 1 == max_new_tokens:
                break
            # To drop rows copies the cache of the others: it waits until a quarter is finished.
            if len(alive) <= 0.75 * len(rows):
                cache.batch_select_indices(alive)
                rows, sampled, mask, positions = (
                    x[alive] for x in (rows, sampled, mask, positions)
                )
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            seen = mask if padded else None
            logits = self._forward(sampled[:, None], seen, positions[:, None], cache)
            positions = positions + 1
        finish = ["eos" if e else "length" for e in ended.tolist()]
        tokens, logprobs = tokens.cpu(), logprobs.cpu()
        rollouts = []
        for n, length in enumerate(num_tokens.tolist()):
            ids = tokens[n, :length].tolist()
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            prompt_ids = prompts[n // group_size]
            rollouts.append(Rollout(prompt_ids, ids, logprobs[n, :length].clone(), finish[n], text))
        return rollouts

    def _forward(self, ids, mask, position_ids, cache) -> torch.Tensor:
        """Logits [B, V] of the last column; the cache grows by ids' columns."""
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]
