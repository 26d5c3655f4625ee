"""The machine that stages run on: how they are launched, what makes them fit, what does not fit.

All of it is computed by workflow.memory before anything is loaded. Sizes are in bytes.
"""

import os
import shutil
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from common.run.errors import UserError, check
from workflow import memory
from workflow.budget import most_tokens
from workflow.memory import GB
from workflow.presets import Setting, ours
from workflow.stages import Stage

USABLE = 0.9  # of a GPU: the plan is a computation
ABSENT_GPU = 80 * GB  # what --dry_run plans for where there is none


@dataclass(frozen=True)
class Machine:
    """What there is, or what --gpu_memory_gb and --host_memory_gb say there is."""

    ranks: int  # of a stage, on this machine
    all_ranks: int  # of a stage, on all machines
    gpu: float | None  # memory of each GPU
    host: float
    launcher: tuple[str, ...]  # python, or torchrun and its flags
    forks: bool  # one rank on a CPU can be forked from a warm Python, safely on Linux only
    elsewhere: bool = False  # planned for one that has GPUs: this one's host and disk do not count


def find_machine(args) -> Machine:
    """The machine of bridge.py's Args. Raises UserError for flags that do not go together."""
    gpu, count = args.gpu_memory_gb and args.gpu_memory_gb * GB, 0
    if args.device != "cpu" and torch.cuda.is_available():
        count = torch.cuda.device_count()
        gpu = gpu or torch.cuda.get_device_properties(0).total_memory
    check(args.nnodes == 1 or args.master_addr, "--nnodes needs --master_addr of machine 0")
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    host = args.host_memory_gb * GB if args.host_memory_gb else host
    absent = count == 0 and args.device != "cpu" and not args.teacher.startswith("toy/")
    elsewhere = args.dry_run and absent
    if elsewhere and gpu is None:
        print("there is no GPU here: planned for GPUs of 80 GB (--gpu_memory_gb, --nproc_per_node)")
        gpu = ABSENT_GPU
    host = float("inf") if elsewhere and not args.host_memory_gb else host
    alone = gpu is None and args.nnodes == 1
    check(args.jobs == 1 or alone, "--jobs is for the CPU of one machine: a stage fills a GPU")
    ranks = args.nproc_per_node or max(1, count)
    launcher = launcher_of(args, ranks)
    forks = launcher == ("python",) and count == 0 and sys.platform == "linux"
    return Machine(ranks, ranks * args.nnodes, gpu, host, launcher, forks, elsewhere)


def launcher_of(args, ranks: int) -> tuple[str, ...]:
    """What starts a stage: torchrun, where there are several ranks."""
    if ranks * args.nnodes == 1:
        return ("python",)
    launcher = ["torchrun", "--nproc_per_node", str(ranks)]
    launcher += ["--shutdown_timeout", "600"]  # its 30 s would kill ranks that stop after a phase
    if args.nnodes == 1:
        return (*launcher, "--standalone")
    launcher += ["--nnodes", str(args.nnodes), "--node_rank", str(args.node_rank)]
    return (*launcher, "--master_addr", args.master_addr, "--master_port", str(args.master_port))


# === what makes a stage fit ===


@dataclass(frozen=True)
class Load:
    """What a stage, run with these Args of its script, asks of a machine."""

    args: object
    plan: memory.Plan | None  # of a trainer
    engine: float  # what vLLM needs of each GPU at least
    room: float  # what it may take of each GPU
    host: float  # memory of this machine, for all ranks
    fits_gpus: bool


def plan_of(stage: Stage, machine: Machine, args) -> memory.Plan:
    """Return the memory plan of a training stage, run with these Args of its script."""
    trained, frozen, sampled = stage.models(args)
    names = {name: stage.base_model(name) for name in (trained, *frozen, sampled)}
    shapes = {name: memory.shape_of(base) for name, base in names.items()}
    missing = dict.fromkeys(names[name] for name, shape in shapes.items() if shape is None)
    check(not missing, f"no memory plan of {', '.join(missing)}: no config.json that it can read")
    of_frozen = [shapes[name] for name in frozen]
    models = (shapes[trained], of_frozen, shapes[sampled])
    fused = {"loss_is_fused": stage.is_grpo}
    return memory.plan(args, *models, machine.all_ranks, machine.gpu, **fused)


def load_of(stage: Stage, machine: Machine, args) -> Load:
    """Raises UserError for a trainer whose models' shapes are not known."""
    gpu = machine.gpu
    if stage.kind == "evaluate":
        plan, sampled, update, host = None, args.model, 0.0, 0.0
    else:
        plan = plan_of(stage, machine, args)
        sampled, update = stage.models(args)[2], plan.peak("update")
        host = (plan.host + (0.0 if gpu else plan.device)) * machine.ranks
    shape = sampled and memory.shape_of(stage.base_model(sampled))
    uses_vllm = gpu and shape and args.backend != "torch"
    engine = memory.smallest_engine(args, shape) if uses_vllm else 0.0
    room = args.vllm_gpu_memory * (gpu or 0.0)
    fits_gpus = gpu is None or (update <= USABLE * gpu and engine <= room)
    return Load(args, plan, engine, room, host, fits_gpus)


# Flags that change no result, in the order in which they stand in a command.
CHOSEN = ("vllm_gpu_memory", "micro_batch_tokens", "cpu_offload", "tensor_parallel")


def settings_that_fit(stage: Stage, machine: Machine) -> dict[str, Setting]:
    """The first settings with which a stage fits the machine's GPUs, or the smallest there are.
    None changes a result, and what the user has set stays."""
    if machine.gpu is None:
        return {}
    args = stage.args()
    fixed = {name for name, setting in stage.settings.items() if setting.is_users}
    change = share_engine if stage.kind == "evaluate" else smallest_change
    try:
        before, after = vars(args), vars(change(stage, machine, args, fixed).args)
    except UserError:  # there is no plan of a model: check_fit says so
        return {}
    changed = [name for name in CHOSEN if name in after and after[name] != before[name]]
    return {name: ours(after[name], "so that it fits") for name in changed}


def smallest_change(stage: Stage, machine: Machine, args, fixed: set[str]) -> Load:
    """A training stage with less on the GPU: micro-batches of one sequence of full length; then
    weights and optimizer in host memory, which is much slower, vLLM gets the rest of the GPU."""
    sequence = args.max_prompt_tokens + args.max_new_tokens
    sizes = [args.micro_batch_tokens, min(args.micro_batch_tokens, sequence)]
    sizes = sizes[:1] if "micro_batch_tokens" in fixed else sizes
    places = [args.cpu_offload] if "cpu_offload" in fixed else [False, True]
    for cpu_offload, micro_batch_tokens in product(places, sizes):
        args = replace(args, cpu_offload=cpu_offload, micro_batch_tokens=micro_batch_tokens)
        if "vllm_gpu_memory" not in fixed:
            kept = load_of(stage, machine, args).plan.peak("always")
            share = round(max(0.05, min(0.85, USABLE - kept / machine.gpu)), 2)
            args = replace(args, vllm_gpu_memory=share)
        load = share_engine(stage, machine, args, fixed)
        if load.fits_gpus:
            break
    return load


def share_engine(stage: Stage, machine: Machine, args, fixed: set[str]) -> Load:
    """With the fewest GPUs of a machine that share one vLLM so that its parts fit."""
    counts = [n for n in (1, 2, 4, 8, 16) if machine.ranks % n == 0]
    for count in [args.tensor_parallel] if "tensor_parallel" in fixed else counts:
        load = load_of(stage, machine, replace(args, tensor_parallel=count))
        if load.engine <= load.room:
            break
    return load


# === what does not fit ===

FIT_HEADER = ["stage", "model", "GPUs", "states", "update, GB", "vLLM needs, GB", "its share"]
FIT_HEADER += ["tokens at most", "fits"]


def check_fit(args, machine: Machine, stages: list[Stage]) -> tuple[list, list, list]:
    """Compare what the unfinished stages need with what there is: the problems, a row of cells
    (FIT_HEADER) for each training stage, and the sentences and tables behind them."""
    problems, rows, details, disk = [], [], [], 0.0
    for stage in (stage for stage in stages if not stage.manifest.exists()):
        model = stage.base_model(stage.wiring["model"])
        try:
            load = load_of(stage, machine, stage.args())
        except UserError as error:  # there is no plan of a model
            details.append(str(error))
            continue
        problem = problem_of(stage, machine, load, args.jobs)
        problems += [problem] if problem else []
        if stage.kind == "evaluate":
            continue
        if not stage.folder.exists():  # two checkpoints and the final model
            shape = memory.shape_of(model)
            disk += 2 * 12 * memory.moved_parameters(load.args, shape) + 4 * shape.params
        place = f"host, {load.host / GB:.0f} GB" if load.args.cpu_offload else "GPU"
        cells = [stage.name, model, str(machine.all_ranks), place if machine.gpu else "host"]
        cells += [f"{load.plan.peak('update') / GB:.0f}", f"{load.engine / GB:.0f}"]
        cells += [f"{load.args.vllm_gpu_memory:.0%}", f"{most_tokens(stage)[1]:,}"]
        rows.append([*cells, "NO" if problem else "yes"])
        if machine.gpu and not problem:
            details.append(sentence_of(stage, machine, load))
        if args.dry_run and machine.gpu and (problem or load.args.cpu_offload):
            details += what_lora_takes(stage, machine)
        if args.dry_run:
            of_model = f"{stage.kind} of {model}, GB for each of {machine.all_ranks} ranks"
            details.append(f"\n# memory of {of_model}: computed\n{load.plan.table(machine.gpu)}")
    folder = next(f for f in (Path(args.output_dir) / "x").absolute().parents if f.exists())
    free = shutil.disk_usage(folder).free
    if disk > free and not machine.elsewhere:
        needed = f"checkpoints and final models need {disk / GB:.0f} GB of disk"
        problems.append(f"{needed}, and {folder} has {free / GB:.0f} GB")
    return list(dict.fromkeys(problems)), rows, list(dict.fromkeys(details))


LORA_RANK = 32  # what is offered where full fine-tuning does not fit the GPUs


def what_lora_takes(stage: Stage, machine: Machine) -> list[str]:
    """A sentence on the same stage with adapters, unless it has them."""
    args = stage.args()
    if args.lora_rank:
        return []
    args = replace(args, lora_rank=LORA_RANK, cpu_offload=False)
    load = smallest_change(stage, machine, args, set())
    place = f"{load.host / GB:.0f} GB in host memory" if load.args.cpu_offload else "all on the GPU"
    fits = "" if load.fits_gpus else ": it would not fit either"
    role = "teacher" if stage.kind.startswith("teacher") else "student"
    update, engine = load.plan.peak("update") / GB, load.engine / GB
    return [
        f"{stage.kind} with --{role}_lora_rank {LORA_RANK}: {place}, {update:.0f} GB in the "
        f"update, vLLM needs {engine:.0f} of {load.room / GB:.0f} GB{fits} (computed)"
    ]


def problem_of(stage: Stage, machine: Machine, load: Load, jobs: int) -> str | None:
    """The first thing that a stage needs and the machine does not have."""
    model = stage.base_model(load.args.model)
    needs = f"{stage.name if load.plan is None else f'{stage.kind} of {model}'} needs"
    update = load.plan.peak("update") if load.plan else 0.0
    if machine.gpu and update > USABLE * machine.gpu:
        size = f"{update / GB:.0f} GB on each of {machine.all_ranks} GPUs (weights in host memory)"
        return f"{needs} {size}, and they have {machine.gpu / GB:.0f} GB"
    if load.engine > load.room:
        size = f"{load.engine / GB:.0f} GB of each GPU for vLLM ({memory.SEQUENCES} sequences)"
        return f"{needs} {size}, and {load.room / GB:.0f} GB are left"
    if load.host * jobs > machine.host:
        size = f"{load.host * jobs / GB:.0f} GB of host memory"
        return f"{needs} {size}, and there are {machine.host / GB:.0f} GB"
    return None


def sentence_of(stage: Stage, machine: Machine, load: Load) -> str:
    """Where a stage's memory goes."""
    args, place = load.args, "the GPU"
    if args.cpu_offload:
        place = f"host memory, since the GPU is too small ({load.host / GB:.0f} GB)"
    return (
        f"{stage.kind} on {machine.all_ranks} GPU(s) of {machine.gpu / GB:.0f} GB: weights, "
        f"gradients and optimizer in {place}; micro-batches of {args.micro_batch_tokens:,} tokens; "
        f"{load.plan.peak('update') / GB:.0f} GB in the update; vLLM takes "
        f"{args.vllm_gpu_memory:.0%} of {args.tensor_parallel} GPU(s) while it samples (computed)"
    )
