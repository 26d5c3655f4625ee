"""The least time that a plan's training takes: what the published limits of a GPU allow.

A stage takes the longer of its decoding's FLOPs and bytes, and the FLOPs of its updates. Nothing
reaches these limits: half of them is good. Lengths are not known before a run: completions count as
a quarter of --max_new_tokens long, prompts as PROMPT tokens.
"""

import math
from dataclasses import replace
from typing import NamedTuple

from common.run.errors import UserError
from workflow import memory
from workflow.budget import most_flops, most_tokens, share_of_budget
from workflow.fit import Machine
from workflow.stages import Stage

PROMPT = 256  # tokens; DAPO's have about 200 with the instruction
QUARTER = 4
LONG = 3 * 86_400  # seconds


class Gpu(NamedTuple):
    """The limits of a GPU: dense bfloat16 FLOP/s, summed in float32, and bytes/s of its memory."""

    flops: float
    bandwidth: float


# From NVIDIA's data sheets; those of the data-centre GPUs print twice as many FLOP/s, of sparse
# matrices. A name of nvidia-smi contains one of these, or two: then the lesser counts.
GPUS = {
    "A100": Gpu(312e12, 2.04e12),
    "A100-PCIE-40GB": Gpu(312e12, 1.555e12),
    "A100-SXM4-40GB": Gpu(312e12, 1.555e12),
    "H100": Gpu(989e12, 3.35e12),
    "H100 PCIe": Gpu(756e12, 2.0e12),
    "H200": Gpu(989e12, 4.8e12),
    "B200": Gpu(2250e12, 8.0e12),
    "L40S": Gpu(362e12, 0.864e12),
    "4090": Gpu(165e12, 1.008e12),
}


def seconds_of(stage: Stage, gpu: Gpu, machine: Machine, length: int = 0) -> float:
    """Return the least seconds of a training stage at a GPU's limits. length: the completions', in
    tokens; default: a quarter of the longest. Raises UserError for models whose config cannot be
    read."""
    args = stage.args()
    length, prompt = length or args.max_new_tokens // QUARTER, min(PROMPT, args.max_prompt_tokens)
    args = replace(args, max_new_tokens=length, max_prompt_tokens=prompt)
    sampling, update = most_flops(stage, args)
    shape = memory.shape_of(stage.base_model(stage.models(args)[2]))
    completions = most_tokens(stage, args)[0]
    of_token = 2 * shape.layers * shape.kv  # bytes of its keys and values
    context = prompt + length / 2  # on average
    room = args.vllm_gpu_memory * (machine.gpu or math.inf)  # a CPU is not planned
    room -= 2 * shape.params / args.tensor_parallel
    of_engine = args.prompts_per_step * args.group_size / machine.all_ranks * args.tensor_parallel
    at_once = min(
        args.vllm_sequences,
        max(1, of_engine),
        max(1, room * args.tensor_parallel / of_token / context),
    )
    read = (
        completions / at_once * length * 2 * shape.params
        + completions * length * of_token * context
    )
    decoding = max(sampling / gpu.flops, read / gpu.bandwidth)
    return share_of_budget(stage) * (decoding + update / gpu.flops) / machine.all_ranks


def in_words(seconds: float) -> str:
    """Return a time of two digits, in the unit in which people would say it: `4 weeks`."""
    units = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86_400, "weeks": 604_800}
    unit = max((u for u in units if seconds >= 1.5 * units[u]), key=units.get, default="seconds")
    return f"{float(f'{seconds / units[unit]:.2g}'):g} {unit}"


def gpu_of(listed: str, tflops: float | None) -> Gpu | None:
    """Return the limits of the GPUs that nvidia-smi lists, the least of each, or of one of so many
    TFLOP/s."""
    known = [gpu for name, gpu in GPUS.items() if name in listed]
    if tflops:
        known = [gpu for gpu in GPUS.values() if round(gpu.flops / 1e12) == round(tflops)][:1]
        per_flop = GPUS["H100"].bandwidth / GPUS["H100"].flops  # of a GPU that is not in the table
        known = known or [Gpu(tflops * 1e12, tflops * 1e12 * per_flop)]
    if not known:
        return None
    return Gpu(min(gpu.flops for gpu in known), min(gpu.bandwidth for gpu in known))


def print_hours(stages: list[Stage], machine: Machine, gpu: Gpu | None) -> None:
    """Print the least time of each training stage and of all, and what is shorter."""
    if gpu is None:
        print("\nhow long it will take is not known: name the GPU's --gpu_tflops (dense bfloat16)")
        return
    limits = f"{gpu.flops / 1e12:,.0f} TFLOP/s and {gpu.bandwidth / 1e12:.2f} TB/s each"
    print(f"\n# least time, at the limits of {machine.all_ranks} GPU(s) of {limits}; half is good")
    total = 0.0
    for stage in (stage for stage in stages if stage.script != "evaluate.py"):
        try:
            seconds = seconds_of(stage, gpu, machine)
        except UserError:  # nothing is known of a model
            return
        total += seconds
        print(f"{stage.name:22} {in_words(seconds)}")
    print(
        f"{'all':22} {in_words(total)}, without evaluations, and if completions have a quarter of "
        "--max_new_tokens"
    )
    shorter = "one_gpu_day" if machine.all_ranks < 8 else "eight_gpu_day"
    if total > LONG:
        print(f"shorter: --preset {shorter} instead of --teacher; --quick: every stage, small")


def print_extrapolation(
    quick: list[Stage], whole: list[Stage], gpu: Gpu | None, machine: Machine
) -> None:
    """Print how long the whole plan's training would take, if its stages were as many times as slow
    as their least time as those of --quick were."""
    gpu, of_quick = gpu or GPUS["H100"], {stage.name: stage for stage in quick}
    seconds = 0.0
    for stage in (stage for stage in whole if stage.script != "evaluate.py"):
        small = of_quick[stage.name]
        result = small.result()
        length = round(result["generated_tokens"] / result["verifier_calls"])
        slower = result["seconds"] / seconds_of(small, gpu, machine, length)
        seconds += slower * seconds_of(stage, gpu, machine)
    print(
        f"as far from their limits, all stages without --quick would train for {in_words(seconds)} "
        "(at most: small steps are slower), if completions have a quarter of --max_new_tokens"
    )
