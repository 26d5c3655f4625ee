"""Rollouts: token ids in, token ids out. Text is decoded for the verifier and for people, and never
encoded again.

Training samples at top_p = 1 without top_k, and log-probs are those of the distribution that was
sampled from, that is, after the temperature.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache

from common.data import Problem, Prompt, read_jsonl
from common.logprob import autocast, token_logprobs
from common.run import check
from common.verifier import OUTCOMES, Verdict, Verifier


@dataclass(eq=False)
class Rollout:
    """One prompt with one sampled completion."""

    prompt_ids: list[int]
    completion_ids: list[int]  # ends with the EOS token, if it ended by one
    logprobs: torch.Tensor  # float32 [len(completion_ids)], at the sampling temperature
    finish: str  # "eos", "length" (max_new_tokens cut it off), or "given" (not sampled here)
    text: str  # the completion, decoded without special tokens
    problem: str = ""
    gold: str = ""
    verdict: Verdict | None = None
    advantage: float = 0.0  # this and the next two are set by grpo.py
    weight: float = 1.0  # of each of its tokens in the loss
    old_logprobs: torch.Tensor | None = None  # the trainer's own, before the first update

    def row(self) -> dict:
        """What is saved of it: fkl_warmup.py --rollouts reads such rows back."""
        return {
            "problem": self.problem,
            "answer": self.gold,
            "completion": self.text,
            "outcome": self.verdict.outcome,
            "extracted": self.verdict.answer,
            "finish": self.finish,
            "prompt_ids": self.prompt_ids,
            "completion_ids": self.completion_ids,
        }


def eos_token_ids(model, tokenizer) -> set[int]:
    """Every id that ends a completion: the tokenizer's and all of generation_config's."""
    listed = model.generation_config.eos_token_id if model.generation_config else None
    ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    return ids - {None}


def draw(logits: torch.Tensor, uniforms: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """Inverse-CDF sampling: logits [B, V] float32 after the temperature, uniforms [B] in [0, 1) ->
    token ids [B].

    One uniform a token, drawn ahead, makes a sample depend on its own seed alone: not on the batch
    that it shares, nor on who else has finished. It is also much faster than torch.multinomial over
    a large vocabulary.
    """
    if top_k > 0:
        kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kept, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.softmax(-1).sort(descending=True)
        # The token that crosses top_p is kept: what stands before it sums to less.
        dropped = (ordered.cumsum(-1) - ordered) >= top_p
        logits = logits.masked_fill(
            torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf
        )
    cdf = logits.softmax(-1).cumsum(-1)
    # Below the last value even after rounding, so that no token of probability 0 behind it can be
    # reached.
    target = (uniforms[:, None] * cdf[:, -1:]).minimum(
        torch.nextafter(cdf[:, -1:], torch.zeros_like(cdf[:, -1:]))
    )
    return torch.searchsorted(cdf, target, right=True).squeeze(-1)


class TorchEngine:
    """Samples with the trained model itself, through transformers: nothing to synchronise.

    The prompt is computed once and shared by its G completions; finished sequences leave the batch;
    sample (p, g) of seed S is the same whatever else is in the batch.
    """

    def __init__(self, model, tokenizer, dtype: torch.dtype = torch.float32, batch_size: int = 512):
        self.model, self.tokenizer, self.dtype, self.batch_size = (
            model,
            tokenizer,
            dtype,
            batch_size,
        )
        self.eos_ids = torch.tensor(sorted(eos_token_ids(model, tokenizer)), device=model.device)

    def sync(self) -> None:
        """Nothing to do: the weights it samples with are the trained ones."""

    def generate(
        self,
        prompts: Sequence[list[int]],
        group_size: int,
        *,
        max_new_tokens: int,
        temperature: float,
        seed: Sequence[int],
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> list[Rollout]:
        """P prompts -> N = P·G rollouts, grouped. Temperature 0 is greedy, with log-probs at 1."""
        rollouts = []
        per_batch = max(1, self.batch_size // group_size)
        with torch.no_grad(), autocast(self.model.device, self.dtype):
            for start in range(0, len(prompts), per_batch):
                batch = prompts[start : start + per_batch]
                uniforms = [
                    np.random.default_rng([*seed, start + p, g]).random(
                        max_new_tokens, dtype=np.float32
                    )
                    for p in range(len(batch))
                    for g in range(group_size)
                ]
                uniforms = torch.from_numpy(np.stack(uniforms)).to(self.model.device)
                rollouts += self._generate_batch(
                    batch, group_size, uniforms, temperature, top_p, top_k
                )
        return rollouts

    def _generate_batch(
        self, prompts, group_size, uniforms, temperature, top_p, top_k
    ) -> list[Rollout]:
        device, pad = self.model.device, self.tokenizer.pad_token_id
        num_rows, max_new_tokens = uniforms.shape
        # Prefill: each prompt once, left-padded so that all completions start in one column.
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        padded = bool((lengths < width).any())  # without padding attention is faster with no mask
        cache = DynamicCache()
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
            scaled = logits.float() / (temperature or 1.0)
            greedy = temperature == 0
            sampled = scaled.argmax(-1) if greedy else draw(scaled, uniforms[rows, t], top_p, top_k)
            tokens[rows, t] = sampled
            logprobs[rows, t] = token_logprobs(scaled, sampled)[0]
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


def sample_and_verify(
    engine: TorchEngine,
    verifier: Verifier,
    prompts: list[Prompt],
    group_size: int,
    args,
    seed: Sequence[int],
) -> list[Rollout]:
    """P·G graded rollouts, at `args`' length and temperature (and top_p and top_k, if it has)."""
    rollouts = engine.generate(
        [prompt.ids for prompt in prompts],
        group_size,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=seed,
        top_p=getattr(args, "top_p", 1.0),
        top_k=getattr(args, "top_k", 0),
    )
    for n, rollout in enumerate(rollouts):
        problem = prompts[n // group_size].problem
        rollout.problem, rollout.gold = problem.problem, problem.answer
    verify(verifier, rollouts)
    return rollouts


def verify(verifier: Verifier, rollouts: list[Rollout]) -> None:
    verdicts = verifier.grade(
        [rollout.text for rollout in rollouts], [rollout.gold for rollout in rollouts]
    )
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        rollout.verdict = verdict


def rollout_metrics(rollouts: list[Rollout]) -> dict[str, float]:
    """Accuracy, mean length in tokens, share cut off, and the share of each verdict."""
    outcomes = [rollout.verdict.outcome for rollout in rollouts]
    return {
        "rollout/accuracy": outcomes.count("correct") / len(outcomes),
        "rollout/length": statistics.fmean(len(rollout.completion_ids) for rollout in rollouts),
        "rollout/truncated": statistics.fmean(rollout.finish == "length" for rollout in rollouts),
    } | {
        f"rollout/{outcome}": outcomes.count(outcome) / len(outcomes)
        for outcome in OUTCOMES
        if outcome != "correct"
    }


def load_rollouts(tokenizer, prompts: list[Prompt], args) -> list[Rollout]:
    """Completions of the given prompts from --rollouts, a .jsonl file with problem and completion.

    Rows of other problems (another split, an evaluation set) and completions over --max_new_tokens
    are left out, with a count. A run's own rows hold token ids, which are not encoded again.
    """
    by_key = {prompt.problem.key: prompt for prompt in prompts}
    rows, rollouts, too_long = read_jsonl(Path(args.rollouts)), [], 0
    for number, row in enumerate(rows, 1):
        texts = isinstance(row.get("problem"), str) and isinstance(row.get("completion"), str)
        check(texts, f"{args.rollouts}, row {number}: needs text columns problem and completion")
        prompt = by_key.get(Problem(row["problem"], "").key)
        ids, text = row.get("completion_ids"), row["completion"]
        if ids is None or tokenizer.decode(ids, skip_special_tokens=True) != text:
            encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = [*encoded, tokenizer.eos_token_id]
        too_long += len(ids) > args.max_new_tokens
        if prompt is not None and len(ids) <= args.max_new_tokens:
            rollout = Rollout(prompt.ids, ids, torch.zeros(len(ids)), "given", text)
            rollout.problem, rollout.gold = prompt.problem.problem, prompt.problem.answer
            rollouts.append(rollout)
    counts = (
        f"{len(rollouts)} of its {len(rows)} completions are of this run's problems and lengths"
    )
    print(f"{args.rollouts}: {counts}; {too_long} are over --max_new_tokens {args.max_new_tokens}")
    check(len(rollouts) > 0, f"{args.rollouts}: {counts}; {too_long} are over --max_new_tokens")
    return rollouts
