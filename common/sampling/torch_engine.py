"""Sampling with transformers, from the trained model itself: nothing to synchronise.

Training samples at top_p = 1 without top_k, and log-probs are those of the distribution that was
sampled from, that is, after the temperature.
"""

from collections.abc import Sequence

import numpy as np
import torch

from common.model.load import end_ids
from common.model.logprob import likeliest, row_slices
from common.model.shard import device_of, gathered
from common.run.lazy import decoding, transformers
from common.sampling.rollout import Rollout

# === one token ===


def draw(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse-CDF sampling: logits [B, V], uniforms [B] in [0, 1) -> token ids [B], log-probs [B]
    float32. Temperature 0 is greedy, with log-probs at 1. Log-probs are of the whole vocabulary,
    whatever top_p and top_k keep.

    One uniform a token, drawn ahead, makes a sample depend on its own seed alone: not on the batch
    that it shares, nor on who else has finished. It is also much faster than torch.multinomial over
    a large vocabulary.
    """
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    logprobs = torch.empty(len(logits), device=logits.device)
    for rows in row_slices(logits):
        x = logits[rows].float() / (temperature or 1.0)
        x = x.sub_(x.amax(-1, keepdim=True))
        weights = x.exp()
        log_sum = weights.sum(-1).log()
        if temperature == 0:
            drawn = x.argmax(-1)
        else:
            drawn = _invert(_kept(weights, top_p, top_k).cumsum(-1), uniforms[rows])
        tokens[rows] = drawn
        logprobs[rows] = x.gather(-1, drawn[:, None]).squeeze(-1) - log_sum
    return tokens, logprobs


def _invert(cdf: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The words [B] in which uniforms [B] fall: cdf [B, V], of any positive total."""
    # Below the last value even after rounding, so that no token of probability 0 behind it can be
    # reached.
    last = cdf[:, -1:]
    target = (uniforms[:, None] * last).minimum(torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(cdf, target, right=True).squeeze(-1)


def _kept(weights: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """Weights [B, V] with 0 for what top_k, and then top_p, leave out."""
    num_words = weights.shape[-1]
    sizes = (1024, num_words)  # of the candidates for top_p: mostly a few hold it all
    if top_k > 0:
        sizes = (min(top_k, num_words),)
        weights = weights * (weights >= likeliest(weights, sizes[0]).values[:, -1:])
    if top_p < 1.0:
        enough = top_p * weights.sum(-1)
        for size in sizes:
            ordered = likeliest(weights, min(size, num_words)).values
            before = ordered.cumsum(-1) - ordered  # the token that crosses top_p is kept
            if size == sizes[-1] or (before[:, -1] >= enough).all():
                break
        smallest = ordered.masked_fill(before >= enough[:, None], torch.inf).amin(-1, keepdim=True)
        weights = weights * (weights >= smallest)
    return weights


# === many ===


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
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(decoding.ATTENTION)
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
        cache = transformers.Cache(layer_class_to_replicate=decoding.GrowingLayer)
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
            sampled, logp = draw(logits, uniforms[rows, t], temperature, top_p, top_k)
            tokens[rows, t], logprobs[rows, t] = sampled, logp
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
