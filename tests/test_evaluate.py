"""Statistics against enumeration, scipy and theory; resuming; the page of samples."""

import json
import random
from itertools import combinations, product

import numpy as np
import pytest
from conftest import SEED, grade, problem_of, prompt_of, prompts_of_many_lengths
from scipy.stats import beta, binomtest, t

import evaluate
from common.run.errors import UserError
from common.sampling.rollout import Rollout
from common.sampling.torch_engine import TorchEngine
from common.sampling.vote import majority_votes
from common.statistics import difference_interval, effective_samples, interval, pass_at
from common.tasks.task import Task, Verdict
from evaluate import paired_difference, sample_benchmark, summarise


def graded(answers: list[str | None], gold: str, task) -> list[Rollout]:
    """Rollouts that gave these answers."""
    texts = ["no answer" if a is None else rf"\boxed{{{a}}}" for a in answers]
    verdicts = grade(task, texts, [gold] * len(texts))
    return [
        Rollout([1], [2], None, "eos", text, problem_of("problem", gold), verdict=verdict)
        for text, verdict in zip(texts, verdicts, strict=True)
    ]


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


def difficulties(rng, kind: str, p: float, count: int) -> np.ndarray:
    """Each problem's probability of a right sample, p in the mean."""
    if kind == "always or never":
        return (rng.random(count) < p).astype(float)
    if kind == "all alike":
        return np.full(count, p)
    return rng.beta(float(kind) * p, float(kind) * (1 - p), count)


@pytest.mark.parametrize("kind", ["always or never", "0.3", "1", "3", "10", "all alike"])
@pytest.mark.parametrize("p", [0.03, 0.1, 0.2, 0.5])
def test_interval_covers_the_truth(p, kind):
    """30 problems, 16 samples each, as AIME has them. A bootstrap covers 85% at 3%."""
    rng = np.random.default_rng(SEED)
    covered, count = 0, 1000
    for _ in range(count):
        values = rng.binomial(16, difficulties(rng, kind, p, 30)) / 16
        low, high = interval(values, 16)
        covered += low <= p <= high
    assert covered / count >= 0.93


def test_interval_of_problems_that_are_always_right_or_wrong_is_clopper_and_pearsons():
    """Nearly: samples of one problem that agree tell no more than one of them."""
    for right, count in ((0, 30), (3, 30), (200, 500), (30, 30)):
        values = [1.0] * right + [0.0] * (count - right)
        theirs = binomtest(right, count).proportion_ci(method="exact")
        assert interval(values, 1) == pytest.approx(list(theirs), abs=0.01)
        low, high = interval(values, 16)
        assert low <= theirs.low + 1e-9
        assert high >= theirs.high - 1e-9
        assert high - low < 1.1 * (theirs.high - theirs.low)


def test_interval_of_many_like_problems_is_that_of_all_samples():
    values = np.random.default_rng(SEED).binomial(16, 0.4, 500) / 16
    right = round(values.sum() * 16)
    theirs = binomtest(right, 8000).proportion_ci(method="exact")
    assert interval(values, 16) == pytest.approx(list(theirs), abs=0.003)


def test_problems_are_never_worth_more_samples_than_they_have():
    """Not even those that came out alike by chance, whose spread is 0."""
    for count, num_samples in ((30, 16), (30, 2), (5, 4), (200, 1)):
        for right in range(1, num_samples):
            worth = effective_samples(np.full(count, right / num_samples), num_samples)
            assert count <= worth <= count * num_samples
            low, high = interval([right / num_samples] * count, num_samples)
            pooled = binomtest(right * count, num_samples * count).proportion_ci(method="exact")
            assert low <= pooled.low
            assert high >= pooled.high


@pytest.mark.parametrize("count", [3, 5, 8])
def test_interval_of_few_problems(count):
    """Korn and Graubard's, with their correction by quantiles of t for few clusters."""
    rng = np.random.default_rng(SEED)
    covered = 0
    for _ in range(500):
        values = rng.binomial(16, difficulties(rng, "3", 0.4, count)) / 16
        low, high = interval(values, 16)
        covered += low <= 0.4 <= high
        if 0 < values.mean() < 1:
            ratio = t.ppf(0.975, count * 16 - 1) / t.ppf(0.975, count - 1)
            worth = effective_samples(values, 16) * ratio**2
            right = worth * values.mean()
            expected = [beta.ppf(0.025, right, worth - right + 1)]
            expected.append(beta.ppf(0.975, right + 1, worth - right))
            assert [low, high] == pytest.approx(expected)
    assert covered >= 0.93 * 500


def test_no_interval_is_a_point():
    for values in ([0.0] * 30, [1.0] * 30, [0.5] * 30, [0.5], [0.0], [1.0]):
        low, high = interval(values, 16)
        assert 0 <= low <= values[0] <= high <= 1
        assert high - low > 0.05
    low, high = difference_interval([0.0] * 30, [0.0] * 30, 16)
    assert low < -0.05 < 0.05 < high


@pytest.mark.parametrize("shift", [0.0, 0.05])
@pytest.mark.parametrize("p", [0.03, 0.2, 0.5])
def test_difference_interval_covers_the_truth(p, shift):
    """Two models on the same 30 problems, one of them better at each."""
    rng = np.random.default_rng(SEED)
    covered, count = 0, 1000
    for _ in range(count):
        hard = difficulties(rng, "1", p, 30)
        a, b = (rng.binomial(16, d) / 16 for d in (hard + shift * (1 - hard), hard))
        low, high = difference_interval(a, b, 16)
        covered += low <= shift * (1 - p) <= high
    assert covered / count >= 0.93


def test_majority_is_the_enumeration_of_random_ties(task):
    """Every way in which three samples can be right (4), give one of two wrong answers, or none."""
    for answers in product(["4", "7", "9", None], repeat=3):
        votes = {a: answers.count(a) for a in answers if a is not None}
        winners = [a for a in votes if votes[a] == max(votes.values())]
        expected = winners.count("4") / len(winners) if winners else 0.0
        assert majority_votes(task, graded(list(answers), "4", task), 3) == [expected]


def test_votes_of_equal_answers_are_one_candidate(task):
    groups = [
        ["3", "1/2", "0.5", "7"],  # 2 votes for a half beat the right answer
        ["1/2", "0.5", "7", "7"],  # gold 1/2: both forms are right; a tie with 7
        ["3", "3", r"\frac{1}{2}", "0.5"],  # a tie
        ["3", "7", "x+1", "1+x"],  # two wrong votes for one expression
        ["7", "8", "9", None],
    ]
    golds = ["3", "1/2", "3", "3", "3"]
    rows = [graded(group, gold, task) for group, gold in zip(groups, golds, strict=True)]
    votes = majority_votes(task, [rollout for group in rows for rollout in group], 4)
    assert votes == [0.0, 0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("answers", [["8+4", "12", "12"], ["12", "8+4", "12"]])
def test_an_undone_sum_is_a_candidate_of_its_own_in_any_order(task, answers):
    verdicts = [Verdict("wrong", 0.0, answer) for answer in answers] + [
        Verdict("correct", 1.0, "3")
    ] * 2
    rollouts = [Rollout([1], [2], None, "eos", "", verdict=verdict) for verdict in verdicts]
    assert majority_votes(task, rollouts, 5) == [0.5]  # 12 twice and 3 twice


def test_votes_of_hostile_answers(task):
    """Wrong answers are compared with each other: each is the other's gold answer."""
    answers = ["3" * 40, r"\frac{1}{2}", r"\text{" + " " * 1980 + "(", "9^{9^{9^9}}", "1" * 3000]
    rollouts = graded([*answers, "4", "4", "4"], "4", task)
    assert majority_votes(task, rollouts, 8) == [1.0]


def test_an_answer_that_cannot_be_compared_stands_by_its_text(task):
    """It is not sent to the workers again, where it would cost its deadline once a pair."""
    answers = ["9^{9^{9^9}}", "9^{9^{9^9}}", "3", None]
    verdicts = [
        Verdict("timeout", 0.0, a) if "9" in str(a) else Verdict("correct", 1.0, a) for a in answers
    ]
    verdicts[3] = Verdict("no_answer")
    rollouts = [Rollout([1], [2], None, "eos", "", verdict=verdict) for verdict in verdicts]
    assert majority_votes(task, rollouts, 4) == [0.0]


OWN_TASK = """
def prompt(row): return row["problem"]
def grade(completion, row): return 0.5
"""


def voters(answers: list[tuple[str, float]]) -> list[Rollout]:
    verdicts = [Verdict("correct" if r == 1 else "partial", r, answer) for answer, r in answers]
    return [Rollout([1], [2], None, "eos", "", verdict=verdict) for verdict in verdicts]


def test_votes_of_a_task_with_partial_rewards(tmp_path):
    """The winner's reward. Right answers of different texts are no one candidate: a vote cannot
    know that they are right. Without answers there is no vote."""
    path = tmp_path / "own.py"
    path.write_text(OWN_TASK)
    with Task(str(path)) as task:
        assert majority_votes(task, voters([("a", 0.5), ("b", 1.0)]), 2) is None
    path.write_text(OWN_TASK + "def answer(completion): return completion\n")
    with Task(str(path)) as task:
        rollouts = voters([("a", 0.5), ("a", 0.5), ("b", 1.0), ("c", 1.0)])
        rollouts += voters([("a", 0.5), ("b", 1.0), ("b", 1.0), ("a", 0.5)])
        assert majority_votes(task, rollouts, 4) == [0.5, 0.75]


@pytest.mark.parametrize("outcome", ["timeout", "crash"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 1, 3), (3, 2, 1, 0)])
def test_a_vote_does_not_depend_on_the_order_of_the_samples(tmp_path, order, outcome):
    """An answer whose last sample could not be graded; one that earned two rewards."""
    path = tmp_path / "own.py"
    path.write_text(OWN_TASK + "def answer(completion): return completion\n")
    late = Verdict(outcome, 0.0, "42")
    right, wrong = Verdict("correct", 1.0, "42"), Verdict("wrong", 0.0, "7")
    half, some = Verdict("partial", 0.9, "x"), Verdict("partial", 0.1, "x")
    with Task(str(path)) as task:
        for verdicts, reward in (
            ([right, right, late, wrong], 1.0),
            ([half, some, wrong, late], 0.5),
        ):
            shuffled = [verdicts[i] for i in order]
            rollouts = [Rollout([1], [2], None, "eos", "", verdict=v) for v in shuffled]
            assert majority_votes(task, rollouts, 4) == [pytest.approx(reward)]


def test_summary_of_partial_rewards():
    rollouts = voters([("a", 0.5), ("b", 1.0), ("c", 0.25), ("d", 0.25)])
    for rollout in rollouts:
        rollout.problem = problem_of("p", "1")
    result = summarise(rollouts, None, 2, 0.5)
    assert result["accuracy"] == 0.5
    assert result["averages"] == [0.75, 0.25]
    assert result["rollout/accuracy"] == 0.25  # the share of full rewards
    assert result["pass_counts"] == [2, 0]
    assert result["pass_at"][1] == 0.5
    assert result["majority"] is None
    assert list(paired_difference(result, result)) == ["avg@2"]


def test_paired_difference_is_narrower_than_two_intervals():
    """Two models whose problems are hard or easy together: the pairing takes that out."""
    rng = np.random.default_rng(SEED)
    difficulty = rng.beta(0.5, 0.5, size=200)
    counts = [rng.binomial(16, np.clip(difficulty + shift, 0, 1)) for shift in (0.05, 0.0)]
    a, b = (
        {
            "num_samples": 16,
            "averages": (c / 16).tolist(),
            "majority_votes": (1.0 * (c > 8)).tolist(),
        }
        for c in counts
    )
    difference, (low, high) = paired_difference(a, b)["avg@16"]
    assert difference == pytest.approx((counts[0] - counts[1]).mean() / 16)
    assert low < difference < high
    alone = interval(counts[0] / 16, 16)
    assert high - low < 0.5 * (alone[1] - alone[0])


class Cut(Exception):
    pass


class CutEngine(TorchEngine):
    """Dies in its third batch."""

    calls = 0

    def generate(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 3:
            raise Cut
        return super().generate(*args, **kwargs)


@pytest.mark.parametrize(
    ("num_rows", "torn"),
    [(8, ""), (8, '{"problem": "1+1", "answ'), (8, "\0" * 40), (7, ""), (6, ""), (5, '{"probl')],
)
def test_a_run_that_was_cut_off_goes_on_where_it_stopped(
    model, tokenizer, task, tmp_path, num_rows, torn
):
    """At the batch that was not written whole: the seeds of a batch are those of its first."""
    prompts = [
        prompt_of(f"p{i}", ids) for i, ids in enumerate(prompts_of_many_lengths(tokenizer, 9))
    ]
    args = evaluate.Args(num_samples=2, max_new_tokens=6)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    engine = TorchEngine(model, tokenizer, batch_size=4)
    expected = sample_benchmark(engine, task, prompts, args, (1, 0), whole)
    with pytest.raises(Cut):
        sample_benchmark(
            CutEngine(model, tokenizer, batch_size=4), task, prompts, args, (1, 0), cut
        )
    kept = cut.read_text()
    assert kept.count("\n") == 8
    assert whole.read_text().startswith(kept)
    cut.write_text("".join(kept.splitlines(True)[:num_rows]) + torn)
    engine = CutEngine(model, tokenizer, batch_size=4)
    engine.calls = 3  # counts the batches that are left
    resumed = sample_benchmark(engine, task, prompts, args, (1, 0), cut)
    batches = 6 if num_rows == 8 else 7
    assert engine.calls == batches
    assert cut.read_bytes() == whole.read_bytes()
    assert [r.row() for r in resumed] == [r.row() for r in expected]
    sample_benchmark(engine, task, prompts, args, (1, 0), cut)
    assert engine.calls == batches  # nothing is left to sample


def test_each_batch_has_seeds_of_its_own(model, tokenizer, task, tmp_path):
    """So that a prompt asked in two batches is answered anew."""
    prompts = [prompt_of("p", prompts_of_many_lengths(tokenizer, 1)[0])] * 4
    args = evaluate.Args(num_samples=2, max_new_tokens=12, temperature=5.0)
    engine = TorchEngine(model, tokenizer, batch_size=4)
    rollouts = sample_benchmark(engine, task, prompts, args, (1, 0), tmp_path / "samples.jsonl")
    assert len({tuple(rollout.completion_ids) for rollout in rollouts}) == 8


def test_compare_wants_the_same_problems(tmp_path, capsys):
    results = {}
    for name, problems in (("a", ["p", "q"]), ("b", ["p", "q"]), ("c", ["p", "r"])):
        rng = random.Random(name)
        counts = [rng.randrange(5) for _ in problems]
        results[name] = {"num_samples": 4, "num_problems": 2, "problems": problems}
        results[name] |= {"golds": ["1", "2"]}
        averages = [count / 4 for count in counts]
        results[name] |= {"averages": averages, "majority_votes": [0.0, 1.0]}
        (tmp_path / name).mkdir()
        settings = {"temperature": 0.7 if name == "b" else 1.0, "seed": 0}
        text = json.dumps({"args": settings, "benchmarks": {"toy": results[name]}})
        (tmp_path / name / "results.json").write_text(text)
    evaluate.main(evaluate.Args(compare=(str(tmp_path / "a"), str(tmp_path / "b"))))
    expected = sum(results["a"]["averages"]) - sum(results["b"]["averages"])
    printed = capsys.readouterr().out
    assert f"= {100 * expected / 2:+.1f} points" in printed
    assert "differ in more than the model: temperature (1.0, 0.7)\n" in printed
    fewer = {"args": {}, "benchmarks": {"toy": results["b"] | {"num_samples": 2}}}
    golds = {"args": {}, "benchmarks": {"toy": results["b"] | {"golds": ["1", "3"]}}}
    texts = {"study": '{"rows": []}', "fewer": json.dumps(fewer), "golds": json.dumps(golds)}
    texts |= {
        "torn": text[: len(text) // 2],
        "list": "[]",
        "bare": '{"args": {}, "benchmarks": [1]}',
    }
    nulls = {"averages": [0.5, None], "num_samples": None, "golds": None, "problems": ["p"]}
    nulls |= {"majority_votes": [None, 1.0], "num_problems": None}
    for key, value in nulls.items():
        damaged = {"args": {}, "benchmarks": {"toy": results["b"] | {key: value}}}
        texts[f"null {key}"] = json.dumps(damaged)
    for name, content in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(content)
    for other, message in (
        ("c", "did not ask the same problems"),
        ("d", "does not exist"),
        ("fewer", "4 and 2 samples a problem"),
        ("golds", "1 problems had another gold answer"),
        *(
            (name, "damaged or no result of evaluate.py")
            for name in ("study", "torn", "list", "bare", *(f"null {key}" for key in nulls))
        ),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main(evaluate.Args(compare=(str(tmp_path / "a"), str(tmp_path / other))))


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
        verdict = Verdict(outcome, float(outcome == "correct"))
        problem = problem_of("p", "1")
        rollouts.append(Rollout([1], [2] * (n + 1), None, finish, "", problem, verdict=verdict))
    result = summarise(rollouts, [1.0, 0.5], 4, 1.0)
    assert result["accuracy"] == 0.5
    assert result["pass_at"][1] == 0.5
    assert result["pass_at"][2] == pytest.approx((1.0 + 0.5) / 2)
    assert result["pass_at"][4] == 1.0
    assert result["rollout/truncated"] == 1 / 8
    assert result["rollout/wrong"] == 2 / 8
    assert result["rollout/timeout"] == 1 / 8
    assert result["generated_tokens"] == 36
    assert result["pass_counts"] == [3, 1]
    assert result["majority"] == 0.75
    low, high = result["accuracy_interval"]
    assert 0 <= low < 0.25 < 0.75 < high <= 1  # two problems say little
