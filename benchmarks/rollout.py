r"""Tokens a second of the two rollout engines, in alternation in one process; cost of a sync.

Every completion is sampled to its full length (no token ends one), so that both do the same work.

    python -m benchmarks.rollout --backend vllm                         # the toy student, 256 x 64
    python -m benchmarks.rollout --backend vllm --model runs/smollm2/model \
        --dataset runs/smollm2/train.jsonl --prompts 4 --group_size 8 --dtype bfloat16
"""

import statistics
import time
from dataclasses import dataclass
from typing import Literal

import torch

from common.model.load import load_model
from common.model.shard import DTYPES
from common.model.tokenizer import load_tokenizer
from common.run.process import start
from common.run.ranks import resolve_device
from common.sampling.sampler import make_engine, resolve_backend
from common.sampling.torch_engine import TorchEngine
from common.tasks import data
from common.tasks.task import Task


@dataclass
class Args:
    model: str = "toy/student"
    """a local folder or a hub id"""
    backend: Literal["torch", "vllm"] = "torch"
    """what is timed; vllm is timed beside torch"""
    dataset: str = "toy"
    """where the prompts come from"""
    prompts: int = 16
    """P: prompts"""
    group_size: int = 16
    """G: completions per prompt"""
    max_new_tokens: int = 64
    """tokens of each completion"""
    rounds: int = 5
    """timed rounds; the first comes after one that is not timed"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute type"""
    max_prompt_tokens: int = 256
    """longer prompts are dropped"""
    vllm_gpu_memory: float = 0.4
    """share of the GPU's memory that vLLM may take"""
    vllm_sequences: int = 256
    """how many sequences vLLM decodes at once"""
    enforce_eager: bool = False
    """vLLM without compilation and CUDA graphs"""
    tensor_parallel: int = 1
    """ranks that share one vLLM"""
    seed: int = 0
    """seed of the samples"""
    thinking: bool = False
    """thinking mode of the chat template"""


def sleep_and_wake(engine) -> None:
    """Seconds, and how much of the GPU is free, asleep and after the sync that wakes it."""
    for name, act in (("awake", lambda: None), ("sleep", engine.sleep), ("sync", engine.sync)):
        torch.cuda.synchronize()
        began = time.perf_counter()
        act()
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        seconds = time.perf_counter() - began
        print(f"{name}: {seconds:.2f} s, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")


def main(args: Args) -> None:
    device = resolve_device("auto")
    backend, tokenizer = resolve_backend(args, device), load_tokenizer(args.model)
    with Task() as task:
        problems = data.load_problems(task, args.dataset)
    prompts = data.render_prompts(tokenizer, problems, args)[: args.prompts]
    model = load_model(args.model, args.dtype, device).requires_grad_(True)
    engines = {"torch": TorchEngine(model, tokenizer, DTYPES[args.dtype])}
    engines["torch"].eos_ids = engines["torch"].eos_ids[:0]
    if backend == "vllm":
        engines["vllm"] = make_engine(backend, model, tokenizer, prompts, args)
        run = engines["vllm"]._run
        engines["vllm"]._run = lambda asked, sampling: run(
            asked, [own | {"ignore_eos": True, "stop_token_ids": []} for own in sampling]
        )
    rates, syncs = {name: [] for name in engines}, []
    sizes = {"group_size": args.group_size, "max_new_tokens": args.max_new_tokens}
    for number in range(args.rounds + 1):
        for name, engine in engines.items():
            seeds = [(number, p) for p in range(len(prompts))]
            began = time.perf_counter()
            rollouts = engine.generate(
                [prompt.ids for prompt in prompts], temperature=1.0, seeds=seeds, **sizes
            )
            seconds = time.perf_counter() - began
            tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
            assert tokens == len(prompts) * args.group_size * args.max_new_tokens
            rates[name].append(tokens / seconds)
        syncs.append(engine.sync())
    print(
        f"{args.model}, {len(rollouts)} sequences x {args.max_new_tokens} tokens, {args.dtype}, "
        f"{torch.get_num_threads()} threads, median of {args.rounds} rounds [least, most]"
    )
    for name, listed in rates.items():
        timed = listed[1:]
        middle = statistics.median(timed)
        print(f"{name:6} {middle:9,.0f} tokens/s [{min(timed):,.0f}, {max(timed):,.0f}]")
    if backend == "vllm":
        pairs = zip(rates["vllm"][1:], rates["torch"][1:], strict=True)
        print(f"vllm / torch: {statistics.median(v / t for v, t in pairs):.2f}")
        for key in [key for key in syncs[0] if key.endswith("seconds")]:
            print(f"{key}: {statistics.median(sync[key] for sync in syncs[1:]) * 1000:.1f} ms")
        if engines["vllm"].can_sleep:
            sleep_and_wake(engines["vllm"])


if __name__ == "__main__":
    start(main, Args, __doc__)
