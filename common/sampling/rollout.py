"""A rollout: a prompt with a completion, its verdict, and what is logged and saved of it.

Token ids go in and come out. Text is decoded for the verifier and for people, and never encoded
again, except completions from a file (--rollouts) that has no token ids.
"""

import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from common.model.tokenizer import end_ids
from common.run.errors import check
from common.run.inputs import hash_of_source
from common.run.ranks import gather, on_first_rank
from common.tasks.data import Prompt
from common.tasks.rows import read_file
from common.tasks.task import OUTCOMES, Problem, Task, Verdict
from common.tasks.worker import is_unicode

KEY = "_problem_key"  # a row's problem; no column of a user's own is called so


@dataclass(eq=False)
class Rollout:
    """A prompt with a sampled completion of T tokens."""

    prompt_ids: list[int]
    completion_ids: list[int]  # T, the EOS token that ended it included
    logprobs: torch.Tensor  # float32 [T], at the sampling temperature
    finish: str  # "eos", "length" (cut off by max_new_tokens), or "given" (not sampled here)
    text: str  # what the verifier gets of it
    problem: Problem | None = None
    opens_thought: bool = False  # the prompt ends inside <think>
    key: tuple[int, ...] = ()  # the sample's seeds and number: the same at any number of ranks
    verdict: Verdict | None = None
    advantage: float = 0.0  # grpo.py sets this and the next three
    weight: float = 1.0  # of each of its tokens in the loss
    old_logprobs: torch.Tensor | None = None  # float32 [T], the policy's before the first update
    ref_logprobs: torch.Tensor | None = None  # float32 [T], the reference model's
    positions: list[int] | None = None  # of the tokens with a loss; None: of all
    twin: "Rollout | None" = None  # the same text in the tokens of a teacher of another vocabulary

    @property
    def loss_tokens(self) -> list[int]:
        """The tokens with a loss."""
        ids = self.completion_ids
        return ids if self.positions is None else [ids[t] for t in self.positions]

    @property
    def identity(self) -> str:
        return f"{self.prompt_ids}{self.problem.identity}{self.completion_ids}"

    def row(self) -> dict:
        """Return what is saved of it; --rollouts reads such rows back."""
        return {
            "problem": self.problem.text,
            "answer": self.problem.gold,
            KEY: self.problem.key,
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
        """Return the rollout of a saved row, with log-probs of 0."""
        return cls(
            row["prompt_ids"],
            row["completion_ids"],
            torch.zeros(len(row["completion_ids"])),
            row["finish"],
            row["completion"],
            Problem(row["problem"], row["answer"]),
            verdict=Verdict(row["outcome"], row["reward"], row["extracted"], row["message"]),
        )


def text_of(tokenizer, ids: list[int], finish: str | None) -> str:
    """Decode a completion without special tokens, and without the one that ended it: not every
    tokenizer calls that special."""
    return tokenizer.decode(ids[:-1] if finish == "eos" else ids, skip_special_tokens=True)


def verify(task: Task, rollouts: list[Rollout]) -> None:
    """Grade the rollouts and set their verdicts. A completion that never closes the thought which
    its prompt opens has no answer."""
    texts = ["<think>" * rollout.opens_thought + rollout.text for rollout in rollouts]
    verdicts = task.grade(texts, [rollout.problem for rollout in rollouts])
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        rollout.verdict = verdict


def rollout_metrics(rollouts: list[Rollout]) -> dict[str, float]:
    """Return accuracy, mean reward, mean length in tokens, and the shares that were cut off and
    that had each outcome, over the rollouts of all ranks."""
    ends = [(r.verdict, len(r.completion_ids), r.finish) for r in rollouts]
    verdicts, lengths, finishes = zip(*gather(ends), strict=True)
    outcomes = [verdict.outcome for verdict in verdicts]
    shares = {outcome: outcomes.count(outcome) / len(outcomes) for outcome in OUTCOMES}
    return {
        "rollout/accuracy": shares.pop("correct"),
        "rollout/reward": statistics.fmean(verdict.reward for verdict in verdicts),
        "rollout/length": statistics.fmean(lengths),
        "rollout/truncated": finishes.count("length") / len(finishes),
    } | {f"rollout/{outcome}": share for outcome, share in shares.items()}


def load_rollouts(
    path: str, task: Task, tokenizer, prompts: list[Prompt], max_new_tokens: int
) -> list[Rollout]:
    """Return the completions of the prompts' problems in a file with columns problem and
    completion.

    Rows of other problems (another split, an evaluation set) and completions of more than
    `max_new_tokens` are left out, with a count. Raises UserError for a malformed row, and if no
    row is left.
    """
    rows, ends = list(read_file(Path(path))), end_ids(tokenizer)
    task.sources[path] = hash_of_source(path)
    own_end = re.compile("|".join(map(re.escape, tokenizer.convert_ids_to_tokens(ends))))
    for number, row in enumerate(rows, 1):
        texts = isinstance(row.get("problem"), str) and isinstance(row.get("completion"), str)
        check(texts, f"{path}, row {number}: needs text columns problem and completion")
    found = _prompts_of(task, prompts, rows)
    rollouts, too_long = [], 0
    for number, (row, prompt) in enumerate(zip(rows, found, strict=True), 1):
        ids = _completion_ids(row, tokenizer, ends, f"{path}, row {number}")
        too_long += len(ids) > max_new_tokens
        if prompt is not None and len(ids) <= max_new_tokens:
            text = own_end.split(row["completion"], maxsplit=1)[0]
            rollout = Rollout(prompt.ids, ids, torch.zeros(len(ids)), "given", text)
            rollout.problem, rollout.opens_thought = prompt.problem, prompt.opens_thought
            rollouts.append(rollout)
    counts = (
        f"{path}: {len(rollouts)} of its {len(rows)} completions are of this run's problems and "
        f"lengths; {too_long} are over --max_new_tokens {max_new_tokens}"
    )
    check(len(rollouts) > 0, counts)
    print(counts)
    return rollouts


def _prompts_of(task: Task, prompts: list[Prompt], rows: list[dict]) -> list[Prompt | None]:
    """Return the prompt of each row: that of the key which a run has saved, else that of the text,
    said last in a few-shot prompt. A text that several prompts end with is no one's."""
    by_key = {prompt.problem.key: prompt for prompt in prompts}
    named = []
    for key, prompt in by_key.items():
        text = prompt.problem.text
        named += [(name, key) for name in {text, str(prompt.problem.row.get("problem", text))}]
    texts = [name for name, _ in named] + [row["problem"] for row in rows]
    hashes = on_first_rank(lambda: task.keys(texts))
    by_text: dict[str, set[str]] = {}
    for (_, key), of_text in zip(named, hashes, strict=False):
        by_text.setdefault(of_text, set()).add(key)
    found = []
    for row, of_text in zip(rows, hashes[len(named) :], strict=True):
        keys = {str(row[KEY])} if KEY in row else by_text.get(of_text, set())
        found.append(by_key.get(*keys) if len(keys) == 1 else None)
    return found


def _completion_ids(row: dict, tokenizer, ends: list[int], where: str) -> list[int]:
    """Return a row's token ids if they decode to its text. Else, as when a model of another
    vocabulary wrote them, encode the text, and append an EOS unless it ends with one or the row
    says that it was cut off."""
    ids, text = row.get("completion_ids"), row["completion"]
    check(is_unicode(text), f"{where}: half a surrogate pair in column completion")
    if ids is not None:
        listed = isinstance(ids, list) and len(ids) > 0
        valid = listed and all(type(token) is int and token >= 0 for token in ids)
        check(valid, f"{where}: completion_ids must be a list of one or more token ids")
        known = max(ids) < len(tokenizer)
        if known and text_of(tokenizer, ids, row.get("finish")) == text:
            return ids
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    has_ended = row.get("finish") == "length" or (ids and ids[-1] in ends)
    return ids if has_ended else [*ids, tokenizer.eos_token_id]
