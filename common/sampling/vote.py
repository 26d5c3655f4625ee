"""The majority vote over a problem's samples: maj@k of evaluate.py (arXiv 2203.11171)."""

from collections import Counter
from itertools import combinations

from common.sampling.rollout import Rollout
from common.tasks.task import Task

GOLD = None  # the candidate of all right answers


def majority_votes(task: Task, rollouts: list[Rollout], num_samples: int) -> list[float] | None:
    """Return, per problem, the reward of its most frequent answer, the mean of those that tie; None
    for a task that reads no answers.

    Answers are one candidate if their texts are, or if the task calls them the same (1/2 and 0.5);
    then all right ones are the gold answer, and one candidate too. An answer that could not be
    graded stands by its text; no answer is no vote.
    """
    if "answer" not in task.functions:
        return None
    groups = [rollouts[i : i + num_samples] for i in range(0, len(rollouts), num_samples)]
    votes, pairs = [], []  # pairs: (problem, answer, other answer) that may be the same
    for number, group in enumerate(groups):
        verdicts = [rollout.verdict for rollout in group if rollout.verdict.answer is not None]
        one_gold = "same" in task.functions
        names = [GOLD if one_gold and v.correct else v.answer for v in verdicts]
        votes.append(Counter(names))
        wrong = dict.fromkeys(v.answer for v in verdicts if v.outcome in ("wrong", "partial"))
        pairs += [(number, *pair) for pair in combinations(wrong, 2)]
    same = task.same([pair for _, *pair in pairs])
    for (number, one, other), are_same in zip(pairs, same, strict=True):
        if are_same and one in votes[number] and other in votes[number]:
            votes[number][one] += votes[number].pop(other)
    return [winners_reward(*pair) for pair in zip(groups, votes, strict=True)]


def winners_reward(group: list[Rollout], votes: Counter) -> float:
    """Return the mean reward of the answers that have the most votes; 0 without any. An answer of
    several samples has the mean of those that could be graded."""
    rewards: dict[str | None, list[float]] = {GOLD: [1.0]}
    for verdict in (rollout.verdict for rollout in group):
        if verdict.answer is not None and verdict.outcome not in ("timeout", "crash"):
            rewards.setdefault(verdict.answer, []).append(verdict.reward)
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    means = [sum(listed) / len(listed) for listed in (rewards.get(a, [0.0]) for a in winners)]
    return sum(means) / max(1, len(means))
