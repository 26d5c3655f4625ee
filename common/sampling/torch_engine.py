"""Sampling through transformers, with the trained model itself: there is nothing to synchronise."""

from collections.abc import Sequence

import numpy as np
import torch

from common.model.flops import head_size
from common.model.logprob import likeliest, row_slices
from common.model.lora import merged_weights
from common.model.shard import device_of, gathered
from common.model.tokenizer import end_ids
from common.sampling.rollout import Rollout, text_of

# === a token ===


def draw(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample by the inverse CDF: logits [B, V], uniforms [B] in [0, 1) -> token ids [B], log-probs
    [B] float32.

    Log-probs are taken after the temperature and over the whole vocabulary, whatever top_p and
    top_k keep. Temperature 0 is greedy, with log-probs at 1. Exactly one uniform a token, drawn
    beforehand, makes a sample depend on its seed alone: neither on the other sequences of its batch
    nor on which of them have ended. It is also faster than torch.multinomial over many words.
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
    """Return the token ids [B] at which an unnormalised CDF [B, V] passes uniforms [B] times its
    total."""
    # Rounding must not lift a target to the last value: behind it are tokens of probability 0.
    last = cdf[:, -1:]
    target = (uniforms[:, None] * last).minimum(torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(cdf, target, right=True).squeeze(-1)


def _kept(weights: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """Set the weights [B, V] of the words that top_k, and then top_p, leave out to 0."""
    num_words = weights.shape[-1]
    sizes = (1024, num_words)  # candidates for top_p: a few words mostly hold all of it
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


# === completions ===


def rows_that_fit(config, length: int, itemsize: int, free: int) -> int:
    """Return how many sequences of `length` tokens fit in half of `free` bytes, at least 1: their
    caches, of numbers of `itemsize` bytes, grow by half, and of their float32 logits [V] some four
    copies exist at a time."""
    config = config.get_text_config()
    width = config.num_key_value_heads * head_size(config)
    cache = 2 * config.num_hidden_layers * width * itemsize
    return max(1, int(free / 2 / (1.5 * length * cache + 16 * config.vocab_size)))


class TorchEngine:
    """Samples from a model in this process.

    A prompt is computed once for its G completions, and completions that have ended leave the
    batch. dtype: the type that the model computes in. batch_size: sequences in a batch at most.
    """

    num_ranks = 1  # that share an engine

    def __init__(self, model, tokenizer, dtype: torch.dtype = torch.float32, batch_size: int = 512):
        from common.sampling import decoding  # imports transformers' models, which takes seconds

        self.model, self.tokenizer, self.new_cache = model, tokenizer, decoding.new_cache
        self.dtype, self.batch_size = dtype, batch_size
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(decoding.ATTENTION)
        self.eos_ids = torch.tensor(end_ids(tokenizer, model), device=device_of(model))

    def sync(self) -> dict[str, float]:
        """Do nothing, and prove nothing: the engine samples from the trained weights themselves."""
        return {}

    def sleep(self) -> None:
        """Do nothing: the engine holds no memory between calls."""

    def generate(
        self,
        prompts: Sequence[list[int]],
        group_size: int,
        *,
        seeds: Sequence[tuple[int, ...]],
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> list[Rollout]:
        """Sample G completions of each of P prompts -> P·G rollouts, grouped by prompt.

        Sample (p, g) depends on the seed (*seeds[p], g) alone. Temperature 0 is greedy, with
        log-probs at 1.
        """
        rollouts, device, rows = [], device_of(self.model), self.batch_size
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            length = max(map(len, prompts), default=0) + max_new_tokens
            rows = min(rows, rows_that_fit(self.model.config, length, self.dtype.itemsize, free))
        per_batch = max(1, rows // group_size)
        with torch.no_grad(), gathered(self.model), merged_weights(self.model):
            for start in range(0, len(prompts), per_batch):
                batch = slice(start, start + per_batch)
                keys = [(*seed, g) for seed in seeds[batch] for g in range(group_size)]
                size = {"size": max_new_tokens, "dtype": np.float32}
                uniforms = np.stack([np.random.default_rng(key).random(**size) for key in keys])
                uniforms = torch.from_numpy(uniforms).to(device)
                rollouts += self._generate(prompts[batch], uniforms, temperature, top_p, top_k)
        return rollouts

    def _generate(self, prompts, uniforms, temperature, top_p, top_k) -> list[Rollout]:
        device, (num_rows, max_new_tokens) = uniforms.device, uniforms.shape
        group_size = num_rows // len(prompts)
        # Prefill: each prompt once, left-padded, so that all completions begin in one column.
        pad, width = self.tokenizer.pad_token_id, max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        padding = torch.tensor([[width - len(p)] for p in prompts], device=device)
        masked = bool(padding.any())  # attention is faster without a mask
        cache = self.new_cache()
        logits = self._forward(ids, padding if masked else None, cache)
        cache.batch_repeat_interleave(group_size)
        logits, padding = (x.repeat_interleave(group_size, 0) for x in (logits, padding))
        # Decode. `rows` are the sequences that are still in the batch.
        tokens = torch.full((num_rows, max_new_tokens), pad, device=device)
        logprobs = torch.zeros((num_rows, max_new_tokens), device=device)
        ended = torch.zeros(num_rows, dtype=torch.bool, device=device)
        rows = torch.arange(num_rows, device=device)
        for t in range(max_new_tokens):
            sampled, logp = draw(logits, uniforms[rows, t], temperature, top_p, top_k)
            tokens[rows, t], logprobs[rows, t] = sampled, logp
            ended[rows] |= torch.isin(sampled, self.eos_ids)
            alive = (~ended[rows]).nonzero().squeeze(-1)
            if len(alive) == 0 or t + 1 == max_new_tokens:
                break
            # Dropping rows copies the cache of the others: it waits until a quarter has ended.
            if len(alive) <= 0.75 * len(rows):
                cache.batch_select_indices(alive)
                rows, sampled, padding = rows[alive], sampled[alive], padding[alive]
            logits = self._forward(sampled[:, None], padding if masked else None, cache)
        lengths = (torch.isin(tokens, self.eos_ids).cumsum(1) == 0).sum(1) + ended
        rollouts, tokens, logprobs = [], tokens.cpu(), logprobs.cpu()
        for n, length in enumerate(lengths.tolist()):
            ids, finish = tokens[n, :length].tolist(), "eos" if ended[n] else "length"
            text = text_of(self.tokenizer, ids, finish)
            logp = logprobs[n, :length].clone()
            rollouts.append(Rollout(prompts[n // group_size], ids, logp, finish, text))
        return rollouts

    def _forward(self, ids, padding, cache) -> torch.Tensor:
        """Return the logits [B, V] of the last of the columns ids [B, T], which the cache takes in.
        padding: None, or [B, 1], how many columns of padding each row begins with."""
        # By a slice (logits_to_keep=1) F.linear would copy a frozen head for each of the prompts.
        last = torch.arange(ids.shape[1] - 1, ids.shape[1], device=ids.device)
        where = {"past_key_values": cache, "logits_to_keep": last}
        if padding is not None:
            first = cache.get_seq_length()
            columns = torch.arange(first + ids.shape[1], device=ids.device)
            where["attention_mask"] = columns >= padding
            where["position_ids"] = (columns[first:] - padding).clamp(min=0)
        return self.model(input_ids=ids, use_cache=True, **where).logits[:, -1]
