"""The machine that stages run on: how they are launched, what makes them fit, what does not fit.

All of it is computed by common.memory before anything is loaded. Sizes are in bytes.
"""

import os
import shutil
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import torch

from common import memory
from common.errors import UserError, check
from common.memory import GB
from workflow.presets import Setting, ours
from workflow.stages import Stage, most_tokens

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
    elsewhere = args.dry_run and absent and gpu is None
    if elsewhere:
        print("there is no GPU here: planned for GPUs of 80 GB (--gpu_memory_gb, --nproc_per_node)")
        gpu, host = ABSENT_GPU, host if args.host_memory_gb else float("inf")
    alone = gpu is None and args.nnodes == 1
    check(args.jobs == 1 or alone, "--jobs is for the CPU of one machine: a stage fills a GPU")
    ranks = args.nproc_per_node or max(1, count)
    return Machine(ranks, ranks * args.nnodes, gpu, host, launcher_of(args, ranks), elsewhere)


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


@dataclass(frozen=True)
class Demand:
    """What a stage, run with these Args of its script, asks of a machine."""

    stage: Stage
    args: object
    machine: Machine

    def changed(self, **flags) -> "Demand":
        return replace(self, args=replace(self.args, **flags))

    @property
    def plan(self) -> memory.Plan:
        ranks, gpu = self.machine.all_ranks, self.machine.gpu
        return memory.plan_of(self.args, ranks, gpu, self.stage.base_model)

    @property
    def engine(self) -> float:
        """What vLLM needs of each GPU at least."""
        evaluates = self.stage.kind == "evaluate"
        sampled = self.args.model if evaluates else memory.models_of(self.args)[2]
        shape = sampled and memory.shape_of(self.stage.base_model(sampled))
        uses_vllm = self.machine.gpu and self.args.backend != "torch" and shape
        return memory.smallest_engine(self.args, shape) if uses_vllm else 0.0

    @property
    def room(self) -> float:
        """What vLLM may take of each GPU."""
        return self.args.vllm_gpu_memory * (self.machine.gpu or 0.0)

    @property
    def update_fits(self) -> bool:
        return self.plan.peak("update") <= USABLE * self.machine.gpu

    @property
    def host(self) -> float:
        """Memory of this machine, for all ranks."""
        on_device = 0.0 if self.machine.gpu else self.plan.device
        return (self.plan.host + on_device) * self.machine.ranks

    @property
    def model(self) -> str:
        return self.stage.base_model(self.args.model)


# === what makes a stage fit ===

# Flags that change no result, in the order in which they stand in a command.
CHOSEN = ("vllm_gpu_memory", "micro_batch_tokens", "cpu_offload", "keep_gradients")
CHOSEN += ("tensor_parallel",)


def settings_that_fit(stage: Stage, machine: Machine) -> dict[str, Setting]:
    """The first settings with which a stage fits the machine's GPUs, or the smallest there are.
    None changes a result, and what the user has set stays."""
    if machine.gpu is None:
        return {}
    demand = Demand(stage, stage.args(), machine)
    fixed = {name for name, setting in stage.settings.items() if setting.is_users}
    change = share_engine if stage.kind == "evaluate" else smallest_change
    try:
        before, after = vars(demand.args), vars(change(demand, fixed).args)
    except UserError:  # there is no plan of a model: check_fit says so
        return {}
    changed = [name for name in CHOSEN if name in after and after[name] != before[name]]
    return {name: ours(after[name], "so that it fits") for name in changed}


def smallest_change(demand: Demand, fixed: set[str]) -> Demand:
    """A training stage with less on the GPU: micro-batches of one sequence of full length; then
    weights and optimizer in host memory, which is much slower, less so with the gradients on the
    GPU. vLLM gets the rest of the GPU."""
    args, gpu = demand.args, demand.machine.gpu
    whole_sequence = args.max_prompt_tokens + args.max_new_tokens
    micro_batches = (args.micro_batch_tokens, min(args.micro_batch_tokens, whole_sequence))
    offload = (args.cpu_offload,) if "cpu_offload" in fixed else (False, True)
    micro_batches = micro_batches[:1] if "micro_batch_tokens" in fixed else micro_batches
    for cpu_offload, micro_batch_tokens in product(offload, micro_batches):
        demand = demand.changed(cpu_offload=cpu_offload, micro_batch_tokens=micro_batch_tokens)
        if "vllm_gpu_memory" not in fixed:
            kept = demand.plan.peak("always")
            share = round(max(0.05, min(0.85, USABLE - kept / gpu)), 2)
            demand = demand.changed(vllm_gpu_memory=share)
        demand = share_engine(demand, fixed)
        if demand.update_fits and demand.engine <= demand.room:
            break
    if demand.args.cpu_offload and "keep_gradients" not in fixed:
        kept = demand.changed(keep_gradients=True)
        return kept if kept.update_fits else demand
    return demand


def share_engine(demand: Demand, fixed: set[str]) -> Demand:
    """With the fewest GPUs of a machine that share one vLLM so that its parts fit."""
    ranks = demand.machine.ranks
    counts = [count for count in (1, 2, 4, 8, 16) if ranks % count == 0]
    for count in () if "tensor_parallel" in fixed else counts:
        demand = demand.changed(tensor_parallel=count)
        if demand.engine <= demand.room:
            break
    return demand


# === what does not fit ===


@dataclass
class Fit:
    """What does not fit; a row a training stage; the sentences and tables behind them."""

    problems: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    details: list[str] = field(default_factory=list)


FIT_HEADER = ["stage", "model", "GPUs", "states", "update, GB", "vLLM needs, GB", "its share"]
FIT_HEADER += ["tokens at most", "fits"]


def check_fit(args, machine: Machine, stages: list[Stage]) -> Fit:
    """Compare what the unfinished stages need with what there is."""
    fit, disk = Fit(), 0.0
    for stage in stages:
        if stage.manifest.exists():
            continue
        demand = Demand(stage, stage.args(), machine)
        if stage.kind == "evaluate":
            fit.problems += engine_problem(demand, stage.name)
            continue
        try:
            table = demand.plan.table(machine.gpu)
        except UserError as error:  # there is no plan of a model
            fit.details.append(str(error))
            continue
        if not stage.folder.exists():  # two checkpoints and the final model
            disk += (2 * 12 + 4) * memory.shape_of(demand.model).params
        problems = training_problem(demand, args.jobs)
        fit.problems += problems
        fit.rows.append(cells_of(demand, "NO" if problems else "yes"))
        if machine.gpu and not problems:
            fit.details.append(sentence_of(demand))
        if args.dry_run:
            of_model = f"{stage.kind} of {demand.model}, GB for each of {machine.all_ranks} ranks"
            fit.details.append(f"\n# memory of {of_model}: computed\n{table}")
    folder = next(f for f in (Path(args.output_dir) / "x").absolute().parents if f.exists())
    free = shutil.disk_usage(folder).free
    if disk > free and not machine.elsewhere:
        needed = f"checkpoints and final models need {disk / GB:.0f} GB of disk"
        fit.problems.append(f"{needed}, and {folder} has {free / GB:.0f} GB")
    fit.problems = list(dict.fromkeys(fit.problems))
    return fit


def training_problem(demand: Demand, jobs: int) -> list[str]:
    """The first thing that a training stage needs and the machine does not have, if any."""
    machine, name = demand.machine, f"{demand.stage.kind} of {demand.model}"
    if machine.gpu and not demand.update_fits:
        return [
            f"{name} needs {demand.plan.peak('update') / GB:.0f} GB on each of {machine.all_ranks} "
            f"GPUs (weights in host memory), and they have {machine.gpu / GB:.0f} GB"
        ]
    too_large = engine_problem(demand, name)
    if too_large or demand.host * jobs <= machine.host:
        return too_large
    there = f"{machine.host / GB:.0f} GB"
    return [f"{name} needs {demand.host * jobs / GB:.0f} GB of host memory, and there are {there}"]


def engine_problem(demand: Demand, name: str) -> list[str]:
    if demand.engine <= demand.room:
        return []
    needs = f"{demand.engine / GB:.0f} GB of each GPU for vLLM ({memory.SEQUENCES} sequences)"
    return [f"{name} needs {needs}, and {demand.room / GB:.0f} GB are left"]


def cells_of(demand: Demand, fits: str) -> list[str]:
    """A stage's row of the table that --dry_run begins with (FIT_HEADER)."""
    machine, states = demand.machine, "GPU"
    if machine.gpu is None or demand.args.cpu_offload:
        states = f"host, {demand.host / GB:.0f} GB" if machine.gpu else "host"
    cells = [demand.stage.name, demand.model, str(machine.all_ranks), states]
    cells += [f"{demand.plan.peak('update') / GB:.0f}", f"{demand.engine / GB:.0f}"]
    cells += [f"{demand.args.vllm_gpu_memory:.0%}", f"{most_tokens(demand.stage)[1]:,}"]
    return [*cells, fits]


def sentence_of(demand: Demand) -> str:
    """Where a stage's memory goes."""
    args, machine, place = demand.args, demand.machine, "the GPU"
    if args.cpu_offload:
        place = f"host memory, since the GPU is too small ({demand.host / GB:.0f} GB)"
    return (
        f"{demand.stage.kind} on {machine.all_ranks} GPU(s) of {machine.gpu / GB:.0f} GB: weights, "
        f"gradients and optimizer in {place}; micro-batches of {args.micro_batch_tokens:,} tokens; "
        f"{demand.plan.peak('update') / GB:.0f} GB in the update; vLLM takes "
        f"{args.vllm_gpu_memory:.0%} of {args.tensor_parallel} GPU(s) while it samples (computed)"
    )
