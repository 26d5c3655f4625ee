import random
import signal
import subprocess
import sys

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from common.model.tokenizer import load_tokenizer
from common.run.inputs import ROOT
from common.sampling.rollout import Rollout
from common.sampling.torch_engine import TorchEngine
from common.tasks import math as math_task
from common.tasks.data import Prompt
from common.tasks.task import Problem, Task, Verdict
from common.tasks.worker import identify

SEED = 20260512
SAMPLED = {"max_new_tokens": 12, "temperature": 1.0}


def generate(engine, prompts: list[list[int]], group_size: int, seed=(SEED,), **settings):
    """engine.generate, with the seeds and keys that common.sampling.sampler gives."""
    seeds = [(*seed, number) for number in range(len(prompts))]
    rollouts = engine.generate(prompts, group_size, seeds=seeds, **settings)
    for number, rollout in enumerate(rollouts):
        rollout.key = (*seed, number)
    return rollouts


def pytest_configure() -> None:
    """A shell ignores SIGINT for what a script runs in the background, and children inherit that:
    tests that send it would wait for ever."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    return f"seed: {SEED}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("toy/student")


@pytest.fixture(scope="session")
def task():
    with Task() as task:
        yield task


def grade(task: Task, completions: list[str], golds: list[str]) -> list[Verdict]:
    return task.grade(completions, [problem_of("p", gold) for gold in golds])


def tiny_model(tokenizer, seed: int = 0, **changes) -> Qwen3ForCausalLM:
    """A random Qwen3; far enough from uniform to tell errors from noise, and with many EOS ids."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = Qwen3Config(vocab_size=len(tokenizer), **shape | changes)
    model = Qwen3ForCausalLM(config).eval()
    model.generation_config.eos_token_id = list(range(10, 20))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(12)
    return model


@pytest.fixture
def model(tokenizer):
    return tiny_model(tokenizer)


@pytest.fixture
def teacher(tokenizer):
    return tiny_model(tokenizer, seed=1, hidden_size=48)


def prompts_of_many_lengths(tokenizer, count: int = 5) -> list[list[int]]:
    rng = random.Random(SEED)
    return [
        [rng.randrange(3, len(tokenizer)) for _ in range(rng.randint(3, 11))] for _ in range(count)
    ]


@pytest.fixture
def rollouts(model, tokenizer) -> list[Rollout]:
    """5 x 4 rollouts of unequal lengths with made-up verdicts, some groups of which agree."""
    engine = TorchEngine(model, tokenizer)
    sampled = generate(engine, prompts_of_many_lengths(tokenizer), 4, **SAMPLED)
    for n, rollout in enumerate(sampled):
        right = n % 4 < n // 4 < 4  # 0, 1, 2, 3 and 0 right in the five groups
        rollout.verdict = Verdict("correct", 1.0) if right else Verdict("wrong")
        rollout.problem = problem_of("p", "1")
    return sampled


def problem_of(text: str, gold: str) -> Problem:
    """As the math task makes it."""
    messages = [{"role": "user", "content": f"{text}\n{math_task.instruction}"}]
    return Problem(
        text, gold, identify(math_task, text), messages, {"problem": text, "answer": gold}, "row 1"
    )


def prompt_of(problem: str, ids: list[int], answer: str = "1") -> Prompt:
    return Prompt(problem_of(problem, answer), ids)


def gradients(model) -> dict[str, torch.Tensor]:
    taken = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return taken


def torchrun(code: str, folder, ranks: int = 2) -> str:
    """What `code` prints under gloo ranks on this machine."""
    # Threads of a process group were seen to abort the interpreter's own way out.
    leave = "import os, sys\nsys.stdout.flush()\nos._exit(0)\n"
    (folder / "ranks.py").write_text(code + leave)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc_per_node", str(ranks), str(folder / "ranks.py")],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
