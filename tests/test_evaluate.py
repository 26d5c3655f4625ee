"""Statistics against enumeration and theory."""

from itertools import combinations

import numpy as np
import pytest

from common.rollout import Rollout
from common.verifier import Verdict
from evaluate import cluster_interval, pass_at, summarise


@pytest.mark.parametrize("num_samples", [1, 4, 6])
def test_pass_at_is_the_share_of_subsets_with_a_right_sample(num_samples):
    for num_correct in range(num_samples + 1):
        samples = [True] * num_correct + [False] * (num_samples - num_correct)
        for j in range(1, num_samples + 1):
            subsets = list(combinations(samples, j))
            assert pass_at(j, num_correct, num_samples) == pytest.approx(
                sum(map(any, subsets)) / len(subsets)
            )


def test_best_of_all_is_certain_with_one_right_sample():
    """A bootstrap with replacement would say 0.644."""
    assert pass_at(16, 1, 16) == 1.0


def test_interval_is_over_problems_not_samples():
    """Sixteen samples of problems that are all right or all wrong tell no more than one would."""
    values = [float(i % 4 == 0) for i in range(400)]
    low, high = cluster_interval(values)
    standard_error = np.std(values) / np.sqrt(len(values))
    assert low == pytest.approx(0.25 - 1.96 * standard_error, abs=0.004)
    assert high == pytest.approx(0.25 + 1.96 * standard_error, abs=0.004)
    assert cluster_interval([0.5] * 30) == [0.5, 0.5]


def test_interval_covers_the_truth():
    """Intervals of 200 simulated benchmarks of 60 problems: 90 to 99% of them hold the mean."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        difficulty = rng.beta(0.7, 0.7, size=60)
        values = rng.binomial(8, difficulty) / 8
        low, high = cluster_interval(values.tolist(), draws=1000)
        covered += low <= 0.5 <= high
    assert 180 <= covered <= 198


def test_summary():
    """Two problems, four samples: 3 and 1 right."""
    outcomes = [
        "correct",
        "correct",
        "correct",
        "wrong",
        "correct",
        "no_answer",
        "wrong",
        "timeout",
    ]
    rollouts = []
    for n, outcome in enumerate(outcomes):
        finish = "length" if outcome == "no_answer" else "eos"
        rollouts.append(Rollout([1], [2] * (n + 1), None, finish, "", verdict=Verdict(outcome)))
    result = summarise(rollouts, 4)
    assert result["accuracy"] == 0.5
    assert result["pass_at"][1] == 0.5
    assert result["pass_at"][2] == pytest.approx((1.0 + 0.5) / 2)
    assert result["pass_at"][4] == 1.0
    assert result["rollout/truncated"] == 1 / 8
    assert result["rollout/wrong"] == 2 / 8
    assert result["rollout/timeout"] == 1 / 8
    assert result["generated_tokens"] == 36
    assert result["accuracy_interval"] == [0.25, 0.75]
