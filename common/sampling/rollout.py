"""A rollout: one prompt with one completion, its verdict, and what is logged and saved of it.

Token ids in, token ids out. Text is decoded for the verifier and for people, and never encoded
again, but for the given completions of --rollouts that hold no ids.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from common.model.load import end_ids
from common.run.errors import check
from common.run.ranks import gather, on_first_rank
from common.tasks.data import Prompt, is_unicode, read_jsonl
from common.tasks.task import OUTCOMES, Problem, Task, Verdict


@dataclass(eq=False)
class Rollout:
    """One prompt with one sampled completion."""

    prompt_ids: list[int]
    completion_ids: list[int]  # ends with the EOS token, if it ended by one
    logprobs: torch.Tensor  # float32 [len(completion_ids)], at the sampling temperature
    finish: str  # "eos", "length" (max_new_tokens cut it off), or "given" (not sampled here)
    text: str  # the completion, decoded without special tokens
    problem: Problem | None = None
    opens_thought: bool = False  # the prompt ends inside <think>
    key: tuple[int, ...] = ()  # seeds and number of the sample: the same at any number of ranks
    verdict: Verdict | None = None
    advantage: float = 0.0  # this and the next three are set by grpo.py
    weight: float = 1.0  # of each of its tokens in the loss
    old_logprobs: torch.Tensor | None = None  # as logprobs: the policy's, before the first update
    ref_logprobs: torch.Tensor | None = None  # as logprobs: the reference's

    @property
    def identity(self) -> str:
        return f"{self.prompt_ids}{self.problem.identity}{self.completion_ids}"

    def row(self) -> dict:
        """What is saved of it: fkl_warmup.py --rollouts reads such rows back."""
        return {
            "problem": self.problem.text,
            "answer": self.problem.gold,
            "key": self.problem.key,
            "completion": self.text,
            "outcome": self.verdict.outcome,
            "reward": self.verdict.reward,
            "extracted": self.verdict.answer,
            "message": self.verdict.message,
            "finish": self.finish,
            "prompt_ids": self.prompt_ids,
            "completion_ids": self.completion_ids,
        }

    @classmethod
    def from_row(cls, row: dict) -> "Rollout":
        """A saved row again, without its log-probs."""
        return cls(
            row["prompt_ids"],
            row["completion_ids"],
            torch.zeros(len(row["completion_ids"])),
            row["finish"],
            row["completion"],
            Problem(row["problem"], row["answer"]),
            verdict=Verdict(row["outcome"], row["reward"], row["extracted"], row["message"]),
        )


def verify(task: Task, rollouts: list[Rollout]) -> None:
    """Set their verdicts. A thought that the prompt has opened and nothing has closed holds no
    answer."""
    texts = ["<think>" * rollout.opens_thought + rollout.text for rollout in rollouts]
    verdicts = task.grade(texts, [rollout.problem for rollout in rollouts])
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        rollout.verdict = verdict


def rollout_metrics(rollouts: list[Rollout]) -> dict[str, float]:
    """Accuracy, mean reward, mean length in tokens, share cut off, and the share of each verdict,
    of all ranks."""
    ends = [
        (r.verdict.outcome, r.verdict.reward, len(r.completion_ids), r.finish == "length")
        for r in rollouts
    ]
    outcomes, rewards, lengths, truncated = zip(*gather(ends), strict=True)
    return {
        "rollout/accuracy": outcomes.count("correct") / len(outcomes),
        "rollout/reward": statistics.fmean(rewards),
        "rollout/length": statistics.fmean(lengths),
        "rollout/truncated": statistics.fmean(truncated),
    } | {
        f"rollout/{outcome}": outcomes.count(outcome) / len(outcomes)
        for outcome in OUTCOMES
        if outcome != "correct"
    }


def load_rollouts(task: Task, tokenizer, prompts: list[Prompt], args) -> list[Rollout]:
    """Completions of the given prompts from --rollouts, a .jsonl file with problem and completion.

    Rows of other problems (another split, an evaluation set) and completions over --max_new_tokens
    are left out, with a count.
    """
    sampled = getattr(args, "sample_from", "policy") != "policy"  # opd.py
    check(not sampled, "--rollouts takes given completions; drop --sample_from initial")
    prompt_of = {prompt.problem.key: prompt for prompt in prompts}
    ends = end_ids(tokenizer)
    rows, rollouts, too_long = read_jsonl(Path(args.rollouts)), [], 0
    for number, row in enumerate(rows, 1):
        texts = isinstance(row.get("problem"), str) and isinstance(row.get("completion"), str)
        where = f"{args.rollouts}, row {number}"
        check(texts, f"{where}: needs text columns problem and completion")
    keys = on_first_rank(lambda: task.keys([row["problem"] for row in rows]))
    for number, (row, key) in enumerate(zip(rows, keys, strict=True), 1):
        key = row.get("key", key)  # of a conversation the text is not all
        where = f"{args.rollouts}, row {number}"
        ids = _completion_ids(row, tokenizer, ends, where)
        prompt = prompt_of.get(key)
        too_long += len(ids) > args.max_new_tokens
        if prompt is not None and len(ids) <= args.max_new_tokens:
            rollout = Rollout(prompt.ids, ids, torch.zeros(len(ids)), "given", row["completion"])
            rollout.problem = prompt.problem
            rollout.opens_thought = prompt.opens_thought
            rollouts.append(rollout)
    counts = (
        f"{args.rollouts}: {len(rollouts)} of its {len(rows)} completions are of this run's "
        f"problems and lengths; {too_long} are over --max_new_tokens {args.max_new_tokens}"
    )
    check(len(rollouts) > 0, counts)
    print(counts)
    return rollouts


def _completion_ids(row: dict, tokenizer, ends: list[int], where: str) -> list[int]:
    """A run's own rows hold token ids, which are not encoded again; a text gets an EOS, unless it
    ends with one or its row says that it was cut off."""
    ids, text, count = row.get("completion_ids"), row["completion"], len(tokenizer)
    check(is_unicode(text), f"{where}: half a surrogate pair in column completion")
    if ids is not None:
        listed = isinstance(ids, list) and len(ids) > 0
        valid = listed and all(type(token) is int and 0 <= token < count for token in ids)
        expected = f"a list of one or more ids from 0 to {count - 1}"
        check(valid, f"{where}: completion_ids must be {expected}")
        if tokenizer.decode(ids, skip_special_tokens=True) == text:
            return ids
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    has_ended = row.get("finish") == "length" or (ids and ids[-1] in ends)
    return ids if has_ended else [*ids, tokenizer.eos_token_id]
