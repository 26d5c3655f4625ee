"""What makes a step's rollouts: draws prompts, samples, grades, and counts what that takes."""

import random
from collections.abc import Sequence
from dataclasses import replace

from common.model import flops
from common.model.shard import DTYPES
from common.run.ranks import num_ranks, rank, share_of
from common.run.run import Progress, Run
from common.sampling.rollout import Rollout, rollout_metrics, verify
from common.sampling.torch_engine import TorchEngine
from common.sampling.vllm_engine import VLLMEngine
from common.tasks.data import Prompt
from common.tasks.task import Task


class Sampler:
    """The rollouts of a training run.

    `sampled` is the model that samples, `trained` the one that is evaluated: the same, but for the
    rollouts of a teacher or of the initial student. `dataset`: prompts, or given rollouts
    (--rollouts), which are drawn as they are. With vLLM the weights of `trained` must come through
    `sync` after each update.
    """

    def __init__(
        self,
        backend: str,
        sampled,
        trained,
        tokenizer,
        task: Task,
        dataset: list,
        eval_prompts: list,
        run: Run,
    ):
        self.args, self.run, self.task, self.eval_prompts = run.args, run, task, eval_prompts
        self.stream = Stream(dataset, run.args.seed)
        self.gives = isinstance(dataset[0], Rollout)
        self.engine = self.eval_engine = TorchEngine(trained, tokenizer, DTYPES[run.args.dtype])
        if not self.gives:
            self.engine = make_engine(backend, sampled, tokenizer, dataset, run.args)
        if sampled is trained:  # else with transformers: no second vLLM beside that of `sampled`
            self.eval_engine = self.engine

    def __enter__(self) -> "Sampler":
        return self

    def __exit__(self, *exc) -> None:
        self.task.pool.close()

    def draw(self, num_prompts: int, seed: Sequence[int]) -> list[Rollout]:
        """--group_size graded completions of each of the next prompts; of several ranks this one's
        share. Of given rollouts the next num_prompts · group_size."""
        group_size, progress = self.args.group_size, self.run.progress
        if self.gives:
            rows = self.stream.take(progress, num_prompts * group_size)
            first, rows = share_of(rows, rank(), num_ranks())
            rollouts = [replace(row, key=(*seed, first + n)) for n, row in enumerate(rows)]
            verify(self.task, rollouts)
        else:
            prompts = self.stream.take(progress, num_prompts)
            rollouts = sample_and_verify(
                self.engine, self.task, prompts, group_size, self.args, seed
            )
            flops.count_sampling(self.engine.model, rollouts, group_size)
        self.run.add_drawn(rollouts)
        return rollouts

    def sleep(self) -> None:
        """Free the engine's GPU memory for the update."""
        self.engine.sleep()

    def sync(self) -> dict[str, float]:
        """Bring the trained weights to the engine that samples from them, with proof."""
        return self.eval_engine.sync()

    def evaluate(self, step: int) -> dict[str, float]:
        """Accuracy and reward on --eval_dataset, every --eval_every steps and after the last."""
        if not self.eval_prompts or (step % self.args.eval_every and step < self.args.num_steps):
            return {}
        self.run.phase("evaluate")
        rollouts = sample_and_verify(
            self.eval_engine, self.task, self.eval_prompts, 1, self.args, (self.args.seed, 0)
        )
        metrics = rollout_metrics(rollouts)
        return {f"eval/{name}": metrics[f"rollout/{name}"] for name in ("accuracy", "reward")}


class Stream:
    """Shuffled items without end. What comes next depends on the cursor alone, so that a resumed
    run draws what the uninterrupted one would have drawn."""

    def __init__(self, items: list, seed: int):
        self.items, self.seed = items, seed

    def take(self, progress: Progress, count: int) -> list:
        """The next `count` items; moves progress.cursor past them."""
        taken = []
        for position in range(progress.cursor, progress.cursor + count):
            epoch, index = divmod(position, len(self.items))
            if index == 0 or not taken:
                order = random.Random(f"{self.seed}-{epoch}").sample(self.items, len(self.items))
            taken.append(order[index])
        progress.cursor += count
        return taken


def make_engine(
    backend: str, model, tokenizer, prompts: list[Prompt], args
) -> TorchEngine | VLLMEngine:
    """What samples from `model`; some of `prompts` become vLLM's canary."""
    if backend == "torch":
        return TorchEngine(model, tokenizer, DTYPES[args.dtype])
    return VLLMEngine(model.name_or_path, tokenizer, args, model, [p.ids for p in prompts[:4]])


def sample_and_verify(
    engine: TorchEngine | VLLMEngine,
    task: Task,
    prompts: list[Prompt],
    group_size: int,
    args,
    seed: Sequence[int],
) -> list[Rollout]:
    """P·G graded rollouts, at `args`' length and temperature (and top_p and top_k, if it has). Of
    several ranks each samples its share of the prompts, with the seeds that one rank would use: the
    seed of the run, its step and refill, and the prompt's number; the engine adds the sample's.
    (Ranks that share an engine ask it the same, and then keep their shares.)"""
    shared = engine.num_ranks
    first, prompts = share_of(prompts, rank() // shared, num_ranks() // shared)
    rollouts = engine.generate(
        [prompt.ids for prompt in prompts],
        group_size,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seeds=[(*seed, first + p) for p in range(len(prompts))],
        top_p=getattr(args, "top_p", 1.0),
        top_k=getattr(args, "top_k", 0),
    )
    begin, prompts = share_of(prompts, rank() % shared, shared)
    rollouts = rollouts[begin * group_size : (begin + len(prompts)) * group_size]
    for n, rollout in enumerate(rollouts):
        rollout.problem = prompts[n // group_size].problem
        rollout.opens_thought = prompts[n // group_size].opens_thought
        rollout.key = (*seed, (first + begin) * group_size + n)
    verify(task, rollouts)
    return rollouts
