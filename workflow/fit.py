"""The machine that stages run on, and whether each stage fits it: computed before anything loads.

Of the settings it chooses the share of a GPU that vLLM takes, and how many sequences it decodes at
once. What else would make a stage fit, it names: the flag, and what the stage would need with it.
Sizes are in bytes.
"""

import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.run.errors import UserError, check
from common.run.preflight import check_gpu, check_size, look
from workflow import memory
from workflow.memory import GB
from workflow.presets import Setting, ours
from workflow.stages import Stage

USABLE = 0.9  # of a GPU: the plan is a computation
ABSENT_GPU = 80 * GB  # what --dry_run plans for where there is none
ROLLOUT_BYTES = 10  # of a token: its id in JSON, and its text
LORA_RANK = 32  # what is offered where full fine-tuning does not fit


@dataclass(frozen=True)
class Machine:
    """The machine that is there, or that --gpu_memory_gb and --host_memory_gb describe."""

    ranks: int  # of a stage, on this machine
    all_ranks: int  # of a stage, on all machines
    gpu: float | None  # memory of each GPU
    host: float
    launcher: tuple[str, ...]  # python, or torchrun and its flags
    forks: bool  # one rank on a CPU can be forked from a warm Python, safely on Linux only
    elsewhere: bool = False  # planned for one that has GPUs: this one's host and disk do not count
    usable: float = USABLE  # share of each GPU: others may hold some of it
    gpu_name: str = "H100"  # what is planned for where none is there


def find_machine(args) -> Machine:
    """Return the machine of bridge.py's Args. Raises UserError for flags that do not go
    together."""
    gpu, usable, count = args.gpu_memory_gb and args.gpu_memory_gb * GB, USABLE, 0
    name = "H100"
    if args.device != "cpu" and torch.cuda.is_available():
        count = torch.cuda.device_count()
        facts = look()
        name = facts.listed
        usable = USABLE if gpu else min(USABLE, facts.free)
        gpu = gpu or facts.memory or torch.cuda.get_device_properties(0).total_memory
    check(args.nnodes == 1 or args.master_addr, "--nnodes needs --master_addr of machine 0")
    below = args.node_rank < args.nnodes
    check(below, f"--node_rank {args.node_rank} is not below --nnodes {args.nnodes}")
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    host = args.host_memory_gb * GB if args.host_memory_gb else host
    absent = count == 0 and args.device != "cpu" and not args.teacher.startswith("toy/")
    elsewhere = args.dry_run and absent
    if elsewhere and gpu is None:
        listed = look().listed
        here = f"torch cannot use {listed}" if listed else "there is no GPU here"
        print(f"{here}: planned for GPUs of 80 GB (--gpu_memory_gb, --nproc_per_node)")
        gpu = ABSENT_GPU
    host = float("inf") if elsewhere and not args.host_memory_gb else host
    alone = gpu is None and args.nnodes == 1
    check(args.jobs == 1 or alone, "--jobs is for the CPU of one machine: a stage fills a GPU")
    ranks = args.nproc_per_node or max(1, count)
    message = f"--nproc_per_node is {ranks}, and this machine has {count} GPUs"
    check(count == 0 or ranks <= count or args.dry_run, message)
    launcher = launcher_of(args, ranks)
    forks = launcher == ("python",) and count == 0 and sys.platform == "linux"
    return Machine(ranks, ranks * args.nnodes, gpu, host, launcher, forks, elsewhere, usable, name)


def check_hardware(args, machine: Machine, stages: list[Stage]) -> None:
    """Refuse what would fail later, or take weeks, on the machine that is there."""
    types = {stage.args().dtype for stage in stages}
    check_gpu(args.device, "bfloat16" if "bfloat16" in types else "float32")
    for name in (args.teacher, args.student) if machine.gpu is None else ():
        shape = memory.shape_of(name)
        check_size(name, shape.params if shape else 0, args.device)


def launcher_of(args, ranks: int) -> tuple[str, ...]:
    """Return what starts a stage: torchrun, where there are several ranks."""
    if ranks * args.nnodes == 1:
        return ("python",)
    launcher = ["torchrun", "--nproc_per_node", str(ranks)]
    launcher += ["--shutdown_timeout", "600"]  # its 30 s would kill ranks that stop after a phase
    if args.nnodes == 1:
        return (*launcher, "--standalone")
    launcher += ["--nnodes", str(args.nnodes), "--node_rank", str(args.node_rank)]
    return (*launcher, "--master_addr", args.master_addr, "--master_port", str(args.master_port))


# === what a stage needs ===


@dataclass(frozen=True)
class Need:
    """The memory that a stage needs on a machine, run with these Args of its script."""

    args: object
    plan: memory.Plan | None  # of a trainer
    update: float  # of each GPU
    engine: float  # of each GPU, for vLLM at least
    host: float  # of this machine, for all its ranks

    def problem(self, machine: Machine, jobs: int = 1) -> str | None:
        """Return the first thing that the machine does not have."""
        if machine.gpu and self.update > machine.usable * machine.gpu:
            there = f"{machine.all_ranks} GPU(s) of {_gb(machine.gpu)}"
            if machine.usable < USABLE:
                there += f", of which {_gb(machine.usable * machine.gpu)} are free (nvidia-smi)"
            return f"{_gb(self.update)} on each of {there}"
        if machine.gpu and self.engine > (share := self.args.vllm_gpu_memory * machine.gpu):
            whole = f"{memory.SEQUENCES} whole sequences"
            return f"{_gb(self.engine)} of each GPU for vLLM ({whole}), where {_gb(share)} are left"
        if jobs * self.host > machine.host:
            return f"{_gb(jobs * self.host)} of host memory, where there are {_gb(machine.host)}"
        return None


def _gb(size: float) -> str:
    return f"{size / GB:.0f} GB"


def need_of(stage: Stage, machine: Machine, args) -> Need:
    """Return what a stage needs with these Args, in which vLLM gets the share that the update
    leaves and the sequences that this share holds, where none were named. Raises UserError where
    the shape of a model is not known."""
    plan, sampled, update, host = None, args.model, 0.0, 0.0
    if stage.kind != "evaluate":
        plan, sampled = plan_of(stage, machine, args), stage.models(args)[2]
        if machine.gpu and not _is_named(stage, "vllm_gpu_memory"):
            share = min(0.85, machine.usable - plan.peak("always") / machine.gpu)
            args = replace(args, vllm_gpu_memory=round(max(0.05, share), 2))
        update = plan.peak("update")
        host = (plan.host + (0.0 if machine.gpu else plan.device)) * machine.ranks
    shape = sampled and memory.shape_of(stage.base_model(sampled))
    others_hold_some = stage.kind == "evaluate" and machine.usable < USABLE
    if others_hold_some and not _is_named(stage, "vllm_gpu_memory"):
        share = min(args.vllm_gpu_memory, machine.usable - 0.02)
        args = replace(args, vllm_gpu_memory=round(max(0.05, share), 2))
    uses_vllm = machine.gpu and shape and args.backend != "torch"
    engine = memory.engine_size(args, shape) if uses_vllm else 0.0
    if uses_vllm and not _is_named(stage, "vllm_sequences"):
        share = args.vllm_gpu_memory * machine.gpu
        args = replace(args, vllm_sequences=most_sequences(args, shape, share))
    return Need(args, plan, update, engine, host)


def plan_of(stage: Stage, machine: Machine, args) -> memory.Plan:
    """Return the memory plan of a training stage, run with these Args of its script."""
    trained, frozen, sampled = stage.models(args)
    names = {name: stage.base_model(name) for name in (trained, *frozen, sampled)}
    shapes = {name: memory.shape_of(base) for name, base in names.items()}
    missing = dict.fromkeys(names[name] for name, shape in shapes.items() if shape is None)
    check(not missing, f"no memory plan of {', '.join(missing)}: no config.json that it can read")
    models = (shapes[trained], [shapes[name] for name in frozen], shapes[sampled])
    fused = {"loss_is_fused": stage.is_grpo}
    return memory.plan(args, *models, machine.all_ranks, machine.gpu, **fused)


def most_sequences(args, shape: memory.Shape, share: float) -> int:
    """Return how many sequences, on average half of their longest, vLLM's share of a GPU holds: up
    to 1,024, its own default, but no fewer than the script's."""
    for number in (1024, 512):
        several = replace(args, vllm_sequences=number)
        if memory.engine_size(several, shape, whole=number / 2) <= share:
            return number
    return args.vllm_sequences


def vllm_settings(stage: Stage, machine: Machine) -> dict[str, Setting]:
    """Return what is chosen of vLLM for a stage on GPUs, as far as no one has named it."""
    if machine.gpu is None:
        return {}
    try:
        args = need_of(stage, machine, stage.args()).args
    except UserError:  # check_fit says so
        return {}
    left = "what others leave" if stage.kind == "evaluate" else "what the update leaves"
    notes = {"vllm_gpu_memory": left, "vllm_sequences": "what its cache holds"}
    return {
        name: ours(getattr(args, name), note)
        for name, note in notes.items()
        if getattr(args, name) != getattr(stage.args(), name)
    }


def _is_named(stage: Stage, flag: str) -> bool:
    setting = stage.settings.get(flag)
    return setting is not None and setting.source != "ours"


# === what would make it fit ===


def remedies(stage: Stage, machine: Machine, args) -> list[str]:
    """Name the flags each of which would make a stage fit, with what it would need then; if none
    does alone, those that do beside LoRA."""
    named = _remedies(stage, machine, args)
    if named or stage.kind == "evaluate":
        return named
    with_lora = _remedies(stage, machine, replace(args, lora_rank=LORA_RANK))
    return [f"--{stage.role}_lora_rank {LORA_RANK} {words}" for words in with_lora]


def _remedies(stage: Stage, machine: Machine, args) -> list[str]:
    whole = args.max_prompt_tokens + args.max_new_tokens
    trials = []  # (flag, its value, the Args with it, the machine)
    for n in (2, 4, 8):
        if n > args.tensor_parallel and machine.ranks % n == 0:
            trials.append(("--tensor_parallel", n, replace(args, tensor_parallel=n), machine))
    for n in (args.max_new_tokens // 2**i for i in range(1, 5)):
        trials.append(("--max_new_tokens", n, replace(args, max_new_tokens=n), machine))
    if stage.kind != "evaluate":
        role, n = stage.role, min(whole, args.micro_batch_tokens)
        lora, offload = replace(args, lora_rank=LORA_RANK), replace(args, cpu_offload=True)
        trials.append((f"--{role}_lora_rank", LORA_RANK, lora, machine))
        trials.append((f"--{role}_cpu_offload", "", offload, machine))
        trials.append(("--micro_batch_tokens", n, replace(args, micro_batch_tokens=n), machine))
    for n in (2, 4, 8, 16, 32):
        if n > machine.ranks and stage.kind != "evaluate":
            more = replace(machine, ranks=n, all_ranks=machine.all_ranks // machine.ranks * n)
            trials.append(("more GPUs: --nproc_per_node", n, args, more))
    named: dict[str, str] = {}  # a flag's first value that is enough
    for flag, value, with_flag, there in trials:
        need = need_of(stage, there, with_flag)
        if flag not in named and need.problem(there) is None:
            sizes = [_gb(need.update)] * (need.update > 0) + [f"vLLM {_gb(need.engine)}"]
            sizes += [f"host {_gb(need.host)}"] * (need.host > 0)
            named[flag] = " ".join([flag, str(value)]).strip() + f" ({', '.join(sizes)})"
    return list(named.values())


# === the table ===

FIT_HEADER = ["stage", "model", "GPUs", "states", "update, GB", "vLLM needs, GB", "its share"]
FIT_HEADER += ["sequences", "fits"]


def check_fit(args, machine: Machine, stages: list[Stage]) -> tuple[list, list, list]:
    """Compare what the unfinished stages need with what there is. Return the problems, a row of
    cells (FIT_HEADER) for each training stage, and the memory tables behind them."""
    problems, rows, details, disk = [], [], [], 0.0
    for stage in (stage for stage in stages if not stage.manifest.exists()):
        model = stage.base_model(stage.fixed_flags["model"])
        problems += [
            f"{gone.final} was deleted, and what is to run needs it: delete {gone.folder} too, and "
            f"{gone.name} runs again"
            for gone in stage.deleted_models()
        ]
        try:
            need = need_of(stage, machine, stage.args())
        except UserError as error:  # there is no plan of a model
            details.append(str(error))
            continue
        if problem := need.problem(machine, args.jobs):
            if machine.gpu:
                ways = " or ".join(remedies(stage, machine, stage.args()))
                problem += f"; it would fit with {ways}" if ways else "; no flag makes it fit"
            problems.append(f"{stage.kind} of {model} needs {problem}")
        if stage.kind == "evaluate":
            continue
        if not stage.folder.exists():  # checkpoints, the final model, rollouts
            shape, every = memory.shape_of(model), need.args.checkpoint_every
            saved = min(need.args.keep_checkpoints, need.args.num_steps // every if every else 0)
            disk += saved * 12 * memory.moved_parameters(need.args, shape) + 4 * shape.params
            kept = need.args.keep_rollouts * need.args.prompts_per_step * need.args.group_size
            disk += ROLLOUT_BYTES * kept * need.args.max_new_tokens
        place = f"host, {_gb(need.host)}" if need.args.cpu_offload else "GPU"
        cells = [stage.name, model, str(machine.all_ranks), place if machine.gpu else "host"]
        cells += [f"{need.update / GB:.0f}", f"{need.engine / GB:.0f}"]
        cells += [f"{need.args.vllm_gpu_memory:.0%}", str(need.args.vllm_sequences)]
        rows.append([*cells, "NO" if problem else "yes"])
        of_model = f"{stage.kind} of {model}, GB for each of {machine.all_ranks} ranks"
        details.append(f"\n# memory of {of_model}: computed\n{need.plan.table(machine.gpu)}")
    if disk:
        details.append(f"\n# disk: at most {_gb(disk)} of checkpoints, final models and rollouts")
    folder = next(f for f in (Path(args.output_dir) / "x").absolute().parents if f.exists())
    free = shutil.disk_usage(folder).free
    if disk > free and not machine.elsewhere:
        needed = f"checkpoints, final models and rollouts need {_gb(disk)} of disk"
        larger = "choose an --output_dir on a larger disk"
        problems.append(f"{needed}, and {folder} has {_gb(free)}; {larger}")
    return list(dict.fromkeys(problems)), rows, list(dict.fromkeys(details))
