"""One update of a trainer on random rollouts: its time, and its peak memory beside the plan's.

python -m benchmarks.step --trainer grpo --model FOLDER --tokens 2048
"""

import importlib
import json
import resource
import statistics
import time
from dataclasses import dataclass
from typing import Literal

import torch

from common.model.load import load_for_training
from common.run.process import start
from common.run.ranks import join_ranks, max_over_ranks, num_ranks, rank
from common.sampling.rollout import Rollout
from workflow import memory


@dataclass
class Args:
    trainer: Literal["grpo", "opd"] = "grpo"
    """whose update"""
    model: str = "toy/teacher"
    """the policy; its teacher or reference model is a copy"""
    tokens: int = 2048
    """of each sequence, a quarter of them the prompt's"""
    sequences: int = 4
    """of an update, on each rank"""
    steps: int = 3
    """updates; the first is not timed"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """compute type"""
    cpu_offload: bool = False
    """weights, gradients and optimizer in host memory"""


def random_rollouts(args: Args, words: int) -> list[Rollout]:
    torch.manual_seed(rank())
    rollouts = []
    for number in range(args.sequences):
        ids = torch.randint(words, (args.tokens,)).tolist()
        prompt, completion = ids[: args.tokens // 4], ids[args.tokens // 4 :]
        rollout = Rollout(prompt, completion, -torch.ones(len(completion)), "eos", "")
        rollout.advantage = 1.0 if number % 2 else -1.0
        rollouts.append(rollout)
    return rollouts


def main(args: Args) -> None:
    module = importlib.import_module(args.trainer)
    own = {} if args.trainer == "grpo" else {"teacher": args.model}
    prompt = args.tokens // 4
    flags = module.Args(
        model=args.model,
        dtype=args.dtype,
        cpu_offload=args.cpu_offload,
        learning_rate=1e-6,
        activation_checkpointing=True,
        max_prompt_tokens=prompt,
        max_new_tokens=args.tokens - prompt,
        micro_batch_tokens=args.tokens,
        chunk_size=1024,
        **own,
    )
    device = join_ranks(flags.device, flags.dtype, flags.cpu_offload)
    model = load_for_training(args.model, flags, device, trainable=True)
    frozen = load_for_training(args.model, flags, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    rollouts = random_rollouts(args, model.config.vocab_size)
    seconds = []
    for _ in range(args.steps):
        began = time.perf_counter()
        if args.trainer == "grpo":
            module.set_logprobs("ref_logprobs", frozen, rollouts, flags)
            module.backward(model, rollouts, flags)
        else:
            module.backward(model, frozen, rollouts, flags)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    shape = memory.shape_of(args.model)
    plan = memory.plan(
        flags, shape, [shape], shape, num_ranks(), None, loss_is_fused=args.trainer == "grpo"
    )
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:  # of the whole process, host memory included
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = max_over_ranks(peak)
    if rank() == 0:
        result = {"seconds": statistics.median(seconds[1:] or seconds)}
        result["tokens_per_second"] = args.sequences * args.tokens * num_ranks() / result["seconds"]
        result |= {"peak_gb": peak / 1e9, "planned_gb": plan.peak("update") / 1e9}
        print(json.dumps({name: round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    start(main, Args, __doc__)
