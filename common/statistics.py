"""Intervals and tests: of shares over problems, and of differences over seeds (Holm's levels).

Two sources of chance are kept apart: which problems a benchmark has, and which seed has trained
the model. A percentile bootstrap is too narrow for either: of 0 right in 30 it makes a point, and
of ten seeds it sees too little.
"""

import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy.special import betaincinv, stdtrit

# === over problems ===


def pass_at(j: int, num_correct: int, num_samples: int) -> float:
    """Return the probability that j of the samples, drawn without replacement, hold a right one."""
    return 1.0 - math.comb(num_samples - num_correct, j) / math.comb(num_samples, j)


def interval(values: Sequence[float], num_samples: int, level: float = 0.95) -> list[float]:
    """Return the two-sided interval of the mean over problems of a share in [0, 1]: one value per
    problem, each of `num_samples` samples.

    It is Clopper and Pearson's for an effective number of independent samples (Korn and Graubard
    1998): between the number of problems, if each is always right or always wrong, and that of all
    samples, if all are equally hard. It is never a point, as a bootstrap's of 0 right in 30 is.
    """
    values = np.asarray(values, dtype=float)
    mean, tail = float(values.mean()), (1 - level) / 2
    effective = effective_samples(values, num_samples)
    if len(values) > 1:  # the spread of few problems is itself uncertain
        all_samples = max(2, len(values) * num_samples)
        effective *= (stdtrit(all_samples - 1, tail) / stdtrit(len(values) - 1, tail)) ** 2
    right = effective * mean
    low = betaincinv(right, effective - right + 1, tail) if mean > 0 else 0.0
    high = betaincinv(right + 1, effective - right, 1 - tail) if mean < 1 else 1.0
    return [float(low), float(high)]


def effective_samples(values: np.ndarray, num_samples: int) -> float:
    """Return how many independent samples have the variance of the mean of these clusters.

    One more problem, of the largest spread there is, counts with those that were neither always
    right nor always wrong: a few of them seldom show how much problems differ.
    """
    count, mean = len(values), values.mean()
    if count == 1 or mean in (0, 1):
        return float(count)
    seen = min((values > 0).sum(), (values < 1).sum())
    spread = max(values.var(ddof=1) / (mean * (1 - mean)), 1 / num_samples)
    return float(count / min(1, (seen * spread + 1) / (seen + 1)))


def difference_interval(a: Sequence[float], b: Sequence[float], num_samples: int) -> list[float]:
    """Return the 95% interval of mean a - mean b on the same problems: Newcombe's of paired
    proportions (1998, method 10; MOVER), from both intervals and the correlation over problems."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    (low_a, high_a), (low_b, high_b) = interval(a, num_samples), interval(b, num_samples)
    vary = len(a) > 1 and a.std() > 0 and b.std() > 0
    correlation = float(np.corrcoef(a, b)[0, 1]) if vary else 0.0

    def distance(of_a: float, of_b: float) -> float:
        return math.sqrt(max(0.0, of_a**2 + of_b**2 - 2 * correlation * of_a * of_b))

    mean_a, mean_b = float(a.mean()), float(b.mean())
    below = distance(mean_a - low_a, high_b - mean_b)
    above = distance(high_a - mean_a, mean_b - low_b)
    return [mean_a - mean_b - below, mean_a - mean_b + above]


# === over seeds ===


def t_interval(values: list[float], level: float = 0.95) -> list[float] | None:
    """Return the two-sided t-interval of the mean of independent repetitions; None for a single
    value, and for values that do not differ."""
    if len(set(values)) < 2:
        return None
    from scipy import stats  # here: it takes a second

    return list(stats.ttest_1samp(values, 0.0).confidence_interval(level))


def t_test(values: list[float]) -> float:
    """Return the two-sided p of a mean of 0; 1 for a single value, and for values that do not
    differ: their spread is not known to be 0."""
    if len(set(values)) < 2:
        return 1.0
    from scipy import stats

    return float(stats.ttest_1samp(values, 0.0).pvalue)


def judge(differences: list[list[float]], alpha: float = 0.05) -> list[dict[str, object]]:
    """Judge claims, each a list of seed-level differences, better when positive, by Holm's
    procedure. The m claims are tested in order of p at alpha / m, alpha / (m - 1), ... until one
    fails. Returns mean, interval at the claim's own level, p and verdict, in the given order."""
    order = sorted(range(len(differences)), key=lambda i: t_test(differences[i]))
    results, all_passed = {}, True
    for rank, i in enumerate(order):
        values = differences[i]
        mean, p = statistics.fmean(values), t_test(values)
        if all_passed:  # after the first failure the level stays, so that intervals hold 0
            level = alpha / (len(order) - rank)
            all_passed = p < level
        verdict = ("supported" if mean > 0 else "not supported") if all_passed else "undecided"
        if len(values) > 1 and len(set(values)) == 1:
            verdict = "no verdict: the seeds do not differ"
        results[i] = {"difference": mean, "interval": t_interval(values, 1 - level)}
        results[i] |= {"level": 1 - level, "p": p, "num_seeds": len(values), "verdict": verdict}
    return [results[i] for i in range(len(differences))]
