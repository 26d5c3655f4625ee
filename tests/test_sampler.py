"""What a training run draws: the order of prompts, given rollouts."""

from types import SimpleNamespace

import pytest
from conftest import prompt_of

from common.run.run import Progress
from common.sampling.sampler import Sampler, Stream


def test_the_stream_goes_by_the_cursor_alone():
    """Any cut gives the same order; each epoch is a permutation; epochs and seeds differ."""
    items = list(range(10))
    whole = Stream(items, 3).take(Progress(), 40)
    progress, pieces = Progress(), []
    for size in (1, 9, 4, 13, 13):
        pieces += Stream(items, 3).take(progress, size)
    assert pieces == whole
    assert progress.cursor == 40
    epochs = [whole[first : first + 10] for first in range(0, 40, 10)]
    assert all(sorted(epoch) == items for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert Stream(items, 4).take(Progress(), 40) != whole


def test_given_rollouts_are_drawn_as_they_are(model, tokenizer, task, rollouts):
    """Each once an epoch, a step's as many as it would sample, with keys of their own; only the
    verdicts are new."""
    drawn = []
    args = SimpleNamespace(seed=0, group_size=4, dtype="float32")
    run = SimpleNamespace(args=args, progress=Progress(), count_rollouts=drawn.extend)
    models = {"sampled": model, "trained": model, "tokenizer": tokenizer, "backend": "torch"}
    inputs = {"task": task, "dataset": rollouts, "eval_prompts": []}
    sampler = Sampler(run, **models, **inputs)
    steps = [sampler.draw(1, (0, step)) for step in range(1, 6)]
    assert [len(step) for step in steps] == [4] * 5
    assert len({rollout.key for rollout in drawn}) == len(rollouts)
    expected = sorted(rollout.completion_ids for rollout in rollouts)
    assert sorted(rollout.completion_ids for rollout in drawn) == expected
    assert all(rollout.verdict.outcome == "no_answer" for rollout in drawn)
    assert [r for step in steps for r in step] == drawn


@pytest.mark.parametrize(
    ("every", "steps"), [(2, [2, 4, 5]), (5, [5]), (9, [5]), (1, [1, 2, 3, 4, 5])]
)
def test_evaluations_come_every_few_steps_and_after_the_last(
    model, tokenizer, task, rollouts, every, steps
):
    phases = []
    sizes = {"max_new_tokens": 2, "temperature": 1.0, "num_steps": 5, "eval_every": every}
    args = SimpleNamespace(seed=0, group_size=4, dtype="float32", **sizes)
    run = SimpleNamespace(args=args, progress=Progress(), phase=phases.append)
    models = {"sampled": model, "trained": model, "tokenizer": tokenizer, "backend": "torch"}
    inputs = {"task": task, "dataset": rollouts, "eval_prompts": [prompt_of("p", [5, 6])]}
    sampler = Sampler(run, **models, **inputs)
    evaluated = [step for step in range(1, 6) if sampler.evaluate(step)]
    assert evaluated == steps
    assert phases == ["evaluate"] * len(steps)
