"""The rollouts of a training step: draw prompts, sample, grade, and count the cost."""

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import torch

from common.model import flops
from common.model.shard import DTYPES
from common.run.errors import check
from common.run.ranks import gather, num_ranks, rank, share_of
from common.run.run import Progress
from common.sampling.rollout import Rollout, rollout_metrics, verify
from common.sampling.torch_engine import TorchEngine
from common.sampling.vllm_engine import VLLMEngine
from common.tasks.data import Prompt

Engine = TorchEngine | VLLMEngine
VLLM_VERSION = "0.32."  # vllm_engine.py makes its calls


class Sampler:
    """Draws a training run's rollouts and evaluates its model.

    backend: "torch" or "vllm". dataset: a list of Prompt, or of Rollout (--rollouts), which are
    drawn as they are. eval_prompts: a list of Prompt, empty without --eval_every. pair: the two
    vocabularies of student and teacher, if they have two. sampled: the model that samples: the
    trained one, a teacher, or the initial student. trained: the model that is evaluated, and whose
    weights `sync` brings to vLLM after an update.
    """

    def __init__(
        self, run, task, tokenizer, backend, dataset, eval_prompts, pair=None, *, sampled, trained
    ):
        self.args, self.run, self.task, self.eval_prompts = run.args, run, task, eval_prompts
        self.stream = Stream(dataset, run.args.seed)
        self.samples = not isinstance(dataset[0], Rollout)
        self.drawn: list[Rollout] = []  # in this step
        # One vLLM is all that there is memory for: where another model samples, or none does, the
        # trained one is evaluated by transformers.
        trained_samples = self.samples and sampled is trained
        self.eval_engine = make_engine(
            backend if trained_samples else "torch", trained, tokenizer, dataset, run.args
        )
        self.engine = self.eval_engine
        if self.samples and not trained_samples:
            tokenizer = pair.sampling if pair else tokenizer
            self.engine = make_engine(backend, sampled, tokenizer, dataset, run.args)

    def draw(self, num_prompts: int, seed: Sequence[int]) -> list[Rollout]:
        """Return this rank's share of the graded rollouts of the next prompts, --group_size of
        each; of rollouts from a file the next num_prompts · group_size."""
        group_size, progress = self.args.group_size, self.run.progress
        if self.samples:
            prompts = self.stream.take(progress, num_prompts)
            rollouts = self._sample(self.engine, prompts, group_size, seed)
            flops.count_sampling(self.engine.model, rollouts, group_size)
        else:
            rows = self.stream.take(progress, num_prompts * group_size)
            first, rows = share_of(rows, rank(), num_ranks())
            rollouts = [replace(row, key=(*seed, first + n)) for n, row in enumerate(rows)]
            verify(self.task, rollouts)
        self.run.count_rollouts(rollouts)
        self.drawn += rollouts
        return rollouts

    def metrics(self) -> dict[str, float]:
        """Return the metrics of all that was drawn in this step, trained on or not."""
        return rollout_metrics(self.drawn)

    def rows(self) -> list[dict]:
        """Return what is saved of the rollouts drawn in this step, of all ranks; the next step
        begins with none."""
        rows, self.drawn = gather([rollout.row() for rollout in self.drawn]), []
        return rows

    def _sample(self, engine: Engine, prompts: list, group_size: int, seed: Sequence[int]) -> list:
        sizes = {"max_new_tokens": self.args.max_new_tokens, "temperature": self.args.temperature}
        return sample_and_verify(engine, self.task, prompts, group_size, seed=seed, **sizes)

    def sleep(self) -> None:
        """Free the engine's GPU memory for the update."""
        self.engine.sleep()

    def sync(self) -> dict[str, float]:
        """Bring the trained weights to the engine that samples from them, and prove that it has
        them. Returns the proof's metrics."""
        return self.eval_engine.sync()

    def evaluate(self, step: int) -> dict[str, float]:
        """Return accuracy and reward on --eval_dataset, every --eval_every steps and after the
        last; else nothing."""
        if not self.eval_prompts or (step % self.args.eval_every and step < self.args.num_steps):
            return {}
        self.run.phase("evaluate")
        rollouts = self._sample(self.eval_engine, self.eval_prompts, 1, (self.args.seed, 0))
        metrics = rollout_metrics(rollouts)
        return {f"eval/{name}": metrics[f"rollout/{name}"] for name in ("accuracy", "reward")}


class Stream:
    """An endless stream of shuffled items. The cursor alone determines the next ones, so that a
    resumed run draws those that it would have drawn uninterrupted."""

    def __init__(self, items: list, seed: int):
        self.items, self.seed = items, seed

    def take(self, progress: Progress, count: int) -> list:
        """Return the next `count` items, and move progress.cursor past them."""
        taken = []
        for position in range(progress.cursor, progress.cursor + count):
            epoch, index = divmod(position, len(self.items))
            if index == 0 or not taken:
                order = random.Random(f"{self.seed}-{epoch}").sample(self.items, len(self.items))
            taken.append(order[index])
        progress.cursor += count
        return taken


def resolve_backend(args, device: torch.device) -> str:
    """Return "vllm" or "torch" for --backend; auto is vLLM on a GPU. Prepares vLLM's environment.

    Raises UserError if vLLM is wanted and not installed, or of another version.
    """
    installed, install = find_spec("vllm") is not None, "requirements-gpu.txt"
    backend = args.backend
    if backend == "auto":
        # For the toy, starting an engine takes longer than all of its sampling.
        on_gpu = device.type == "cuda" and not args.model.startswith("toy/")
        backend, slow = "vllm" if on_gpu and installed else "torch", on_gpu and not installed
        install_line = f"pip install -r {install}; or insist with --backend torch"
        check(not slow, f"vLLM is missing, and without it rollouts take days: {install_line}")
    if backend == "vllm":
        check(installed, f"--backend vllm, but vLLM is not installed: pip install -r {install}")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: weights by reference
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # Else attention multiplies float32 in TF32, which the canary sees (2e-3 to 4e-3).
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
        version = import_module("vllm").__version__
        known = version.startswith(VLLM_VERSION)
        check(known, f"vLLM {version} is installed, 0.32.0 is needed: pip install -r {install}")
    print(f"rollouts: {backend}")
    return backend


def make_engine(backend: str, model, tokenizer, prompts: list[Prompt], args) -> Engine:
    """Return an engine that samples from `model`; the first prompts become vLLM's canary."""
    if backend == "torch":
        return TorchEngine(model, tokenizer, DTYPES[args.dtype])
    canary = [prompt.ids for prompt in prompts[:4]]
    return VLLMEngine(model.name_or_path, tokenizer, args, model, canary)


def sample_and_verify(
    engine, task, prompts, group_size, *, seed, max_new_tokens, temperature, top_p=1.0, top_k=0
) -> list[Rollout]:
    """Sample G completions of each of P prompts and grade them -> P·G rollouts, grouped by prompt.

    prompts: a list of Prompt. seed: a tuple of the run's seed with its step and refill; the
    prompt's number is added, and by the engine the sample's. Each rank samples its share of the
    prompts, with the seeds that a single rank would use. Ranks that share an engine give it the
    same prompts, and then grade their shares.
    """
    shared = engine.num_ranks
    first, prompts = share_of(prompts, rank() // shared, num_ranks() // shared)
    rollouts = engine.generate(
        [prompt.ids for prompt in prompts],
        group_size,
        seeds=[(*seed, first + p) for p in range(len(prompts))],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
    )
    begin, prompts = share_of(prompts, rank() % shared, shared)
    rollouts = rollouts[begin * group_size : (begin + len(prompts)) * group_size]
    for n, rollout in enumerate(rollouts):
        prompt = prompts[n // group_size]
        rollout.problem, rollout.opens_thought = prompt.problem, prompt.opens_thought
        rollout.key = (*seed, (first + begin) * group_size + n)
    verify(task, rollouts)
    return rollouts
