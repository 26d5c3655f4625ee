r"""The workflow: sparse reward on the teacher, dense transfer to the student, sparse reward again.

    route                stages (label uses in brackets), after Table 1 and 3 of the paper
    cold                 student GRPO on all data [reward]
    full                 teacher GRPO on all data [reward] -> FKL warmup -> OPD on all data
    half                 teacher GRPO on 1H [reward] -> FKL -> OPD on 1H -> GRPO on 2H [reward]
    replay               as half, but the student's GRPO reuses 1H
    sft_transfer         as half, with SFT on the teacher's samples instead of FKL -> OPD
    opd_only             as half, with OPD alone
    sft_teacher          as half, with a teacher tuned on its own right answers [filter] by SFT
    raw_teacher          FKL -> OPD on all data from the untrained teacher
    same_size            FKL -> OPD on all data from the student that `cold` has trained
    cold_matched_tokens  as cold, until it has generated as many tokens as all of `full`
    cold_matched_flops   as cold, until it has spent as many FLOPs as all of `full`

The last two are not in the paper: there labels are matched and compute is not. Stages that routes
share run once. Each stage is a child process whose printed command line can be run by itself; it
leaves a manifest and is skipped on the next call. report.py writes the end: report.md, report.png
and results.json in OUTPUT_DIR.

    python bridge.py                                             # the toy, on a CPU, in minutes
    python bridge.py --routes all --seeds 1 2 3 --jobs 2         # a study
    python bridge.py --teacher Qwen/Qwen3-8B --dry_run           # the plan: commands and settings
    python bridge.py --teacher Qwen/Qwen3-8B                     # student Qwen/Qwen3-1.7B, DAPO
"""

import importlib
import json
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal

import torch

import memory
from common.data import default_decontamination, template_fingerprint
from common.fingerprint import inputs_of
from common.model import lacks_chat_template, load_tokenizer
from common.run import FREE, ROOT, RunFailure, Stopped, UserError, check, check_ranges, start
from memory import GB
from report import Evaluation, markdown, write_report

Route = Literal[
    *("cold", "full", "half", "replay", "sft_transfer", "opd_only", "sft_teacher", "raw_teacher"),
    *("same_size", "cold_matched_tokens", "cold_matched_flops"),
]


@dataclass
class Args:
    teacher: str = "toy/teacher"
    """the large model: a local folder or a hub id"""
    student: str | None = None
    """the small model; by itself toy/student, or Qwen/Qwen3-1.7B for a larger Qwen3"""
    output_dir: str | None = None
    """by itself runs/bridge-TEACHER"""
    routes: tuple[Route | Literal["all"], ...] = ("half", "cold")
    """what to run and compare (listed above)"""
    seeds: tuple[int, ...] = (0,)
    """every trained stage is repeated with each"""
    jobs: int = 1
    """stages that run at the same time, each with its share of the CPU's threads"""
    dry_run: bool = False
    """print every command and setting, run nothing"""
    only_report: bool = False
    """run nothing; write the report of stages that are finished"""
    dataset: str | None = None
    """training problems; by itself toy, or DAPO-Math-17k for other models"""
    benchmarks: tuple[str, ...] | None = None
    """what is evaluated; by itself toy, or math500 aime24 aime25"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where every stage runs"""
    backend: Literal["auto", "torch", "vllm"] = "auto"
    """what samples: transformers or vLLM; auto takes vLLM on a GPU"""
    nproc_per_node: int | None = None
    """ranks on this machine; by itself as many as there are GPUs, or 1"""
    nnodes: int = 1
    """machines with a shared folder, each of which runs this command with its own --node_rank"""
    node_rank: int = 0
    """number of this machine: 0 also writes the report"""
    master_addr: str | None = None
    """address of machine 0, if there are several"""
    master_port: int = 29500
    """a free port of machine 0"""
    gpu_memory_gb: float | None = None
    """of each GPU; by itself what is there (to plan for other machines with --dry_run)"""
    host_memory_gb: float | None = None
    """of this machine; by itself what is there"""

    num_steps: int | None = None
    """instead of the preset's, in every training stage (as the next four)"""
    prompts_per_step: int | None = None
    """prompts per step"""
    group_size: int | None = None
    """completions per prompt"""
    micro_batch_tokens: int | None = None
    """tokens per forward and backward, padding included"""
    learning_rate: float | None = None
    """AdamW's peak rate"""
    num_minibatches: int | None = None
    """instead of the preset's, in the GRPO stages"""
    max_prompt_tokens: int | None = None
    """instead of the preset's, in every stage (as the next three)"""
    max_new_tokens: int | None = None
    """longest completion"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """compute type"""
    tensor_parallel: int | None = None
    """GPUs that share one vLLM; by itself as many as its model needs"""
    chat_template: str | None = None
    """a model whose chat template is used; by itself each model's own, or for a student without one
    the teacher's in every stage"""
    vllm_gpu_memory: float | None = None
    """share of the GPU's memory that vLLM may take while it samples"""
    num_samples: int | None = None
    """instead of the preset's, in the evaluations: completions per problem"""
    num_problems: int | None = None
    """take the first problems of each benchmark only"""


# === presets ===


@dataclass(frozen=True)
class Setting:
    """A flag's value and who says so: the paper, its authors' public scripts, we, or the user."""

    value: object
    source: Literal["paper", "authors' scripts", "ours", "command line"]
    note: str = ""


def paper(value: object, note: str = "") -> Setting:
    return Setting(value, "paper", note)


def scripts(value: object, note: str = "") -> Setting:
    return Setting(value, "authors' scripts", note)


def ours(value: object, note: str = "") -> Setting:
    return Setting(value, "ours", note)


Preset = dict[str, dict[str, Setting]]  # kind of stage -> flag -> setting

TOY_SHARED = {
    "prompts_per_step": ours(12, "40 steps are one epoch of 1H"),
    "group_size": ours(16),
    "micro_batch_tokens": ours(2048, "small matrices stay in a processor's cache"),
}
TOY_GRPO = TOY_SHARED | {
    "warmup_steps": ours(10),
    "kl_coef": ours(0.0, "no reference model: groups whose rewards agree cost no update"),
}
TOY_TRANSFER = TOY_SHARED | {"warmup_steps": ours(5)}
TOY: Preset = {
    "teacher_grpo": TOY_GRPO
    | {
        "num_steps": ours(40, "as many as warmup and OPD, so that cold GRPO gets as many updates"),
        "learning_rate": ours(2e-4),
    },
    "teacher_sft": TOY_TRANSFER
    | {"num_steps": ours(40, "the label uses of teacher_grpo"), "learning_rate": ours(2e-4)},
    "fkl_warmup": TOY_TRANSFER | {"num_steps": ours(15), "learning_rate": ours(7e-4)},
    "opd": TOY_TRANSFER | {"num_steps": ours(25), "learning_rate": ours(3e-4)},
    "sft_transfer": TOY_TRANSFER | {"learning_rate": ours(7e-4, "as fkl_warmup")},
    "student_grpo": TOY_GRPO | {"num_steps": ours(20), "learning_rate": ours(3e-4)},
    "evaluate": {"num_samples": paper(16), "temperature": ours(1.0, "as in training")},
}

REAL_SHARED = {
    "dtype": paper("bfloat16"),
    "activation_checkpointing": ours(True, "sequences of 19,000 tokens"),
    "learning_rate": paper(1e-6),
    "max_new_tokens": paper(16384),
    "chunk_size": ours(1024, "tokens of the head at once: 0.6 GB of float32 logits at 152k words"),
    "warmup_steps": ours(10),
}
REAL_GRPO = REAL_SHARED | {
    "num_steps": ours(660, "the paper's 10 epochs of a half of DAPO, about 8,450 problems"),
    "prompts_per_step": ours(128),
    "num_minibatches": ours(16, "the paper's mini-batch of 8, taken as prompts"),
    "group_size": scripts(8),
    "temperature": scripts(1.0),
    "max_prompt_tokens": paper(3072),
    "micro_batch_tokens": paper(3072 + 16384, "its 1 sequence, at full length"),
    "max_grad_norm": paper(1.0),
    "clip_low": paper(0.2),
    "clip_high": paper(0.2),
    "kl_coef": paper(5e-4),
}
REAL_TRANSFER = REAL_SHARED | {
    "prompts_per_step": paper(64, "its mini-batch, taken as prompts"),
    "group_size": paper(8),
    "temperature": paper(1.0),
    "max_prompt_tokens": paper(2048),
    "micro_batch_tokens": paper(4 * (2048 + 16384), "its 4 sequences, at full length"),
}
REAL: Preset = {
    "teacher_grpo": REAL_GRPO,
    "teacher_sft": REAL_TRANSFER | {"num_steps": ours(1320, "the label uses of teacher_grpo")},
    "fkl_warmup": REAL_TRANSFER | {"num_steps": ours(33, "a quarter of an epoch of a half")},
    "opd": REAL_TRANSFER | {"num_steps": ours(132, "the paper's 1 epoch of a half")},
    "sft_transfer": REAL_TRANSFER,
    "student_grpo": REAL_GRPO,
    "evaluate": {
        "dtype": paper("bfloat16"),
        "vllm_gpu_memory": ours(0.85, "nothing else is on the GPU"),
        "num_samples": paper(16),
        "max_new_tokens": paper(16384),
        "max_prompt_tokens": paper(3072),
        "temperature": scripts(0.7),
        "top_p": scripts(0.8),
        "top_k": scripts(20),
    },
}


# === plan ===


@dataclass
class Stage:
    """One child process: its flags, and which stages must be finished before."""

    name: str
    kind: str  # of the preset
    script: str
    folder: Path
    wiring: dict[str, object]  # flags that follow from the route
    settings: dict[str, Setting]  # flags that someone chose
    needs: list["Stage"] = field(default_factory=list)
    budget: tuple[str, list["Stage"]] | None = None  # a flag, and the stages whose use it matches
    launcher: tuple[str, ...] = ("python",)  # or torchrun and its flags

    @property
    def flags(self) -> dict[str, object]:
        flags = self.wiring | {name: setting.value for name, setting in self.settings.items()}
        if self.budget:
            flag, stages = self.budget
            flags[flag] = f"<{flag[8:]} of {', '.join(stage.name for stage in stages)}>"
            if all(stage.manifest.exists() for stage in stages):
                done = [json.loads(stage.manifest.read_text()) for stage in stages]
                tokens = sum(manifest["generated_tokens"] for manifest in done)
                flops = sum(manifest["flops"] + manifest["teacher_flops"] for manifest in done)
                flags[flag] = tokens if flag == "stop_at_tokens" else flops
        return flags

    @property
    def command(self) -> list[str]:
        words = [*self.launcher, self.script]
        for name, value in self.flags.items():
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name}"] if value is True else [f"--{name}", *map(str, values)]
        return words

    @property
    def manifest(self) -> Path:
        return self.folder / ("results.json" if self.script == "evaluate.py" else "manifest.json")

    @property
    def final(self) -> str:
        return str(self.folder / "final")

    def behind(self) -> list["Stage"]:
        """Every training stage that its model comes from, itself included, the first one first."""
        stages = [ancestor for stage in self.needs for ancestor in stage.behind()]
        stages += [] if self.script == "evaluate.py" else [self]
        return list({stage.name: stage for stage in stages}.values())


# Flags of bridge.py that replace a preset's value in every stage whose script has them.
EVERYWHERE = ("max_prompt_tokens", "max_new_tokens", "dtype", "vllm_gpu_memory")
EVERYWHERE += ("tensor_parallel", "chat_template")
TRAINING = ("num_steps", "prompts_per_step", "group_size", "micro_batch_tokens", "learning_rate")
GRPO_ONLY = ("num_minibatches",)
EVALUATION = ("num_samples", "num_problems")


def fill_in(args: Args) -> Preset:
    """Set what follows from the teacher; returns the preset under the command line's overrides."""
    toy = args.teacher.startswith("toy/")
    if args.student is None:
        known = toy or args.teacher.startswith("Qwen/Qwen3-")
        check(known, f"there is no default student for teacher {args.teacher}; set --student")
        args.student = "toy/student" if toy else "Qwen/Qwen3-1.7B"
    args.backend = "torch" if toy and args.backend == "auto" else args.backend
    args.dataset = args.dataset or ("toy" if toy else "open-r1/DAPO-Math-17k-Processed:all")
    args.benchmarks = args.benchmarks or (("toy",) if toy else ("math500", "aime24", "aime25"))
    if args.chat_template is None and lacks_chat_template(args.student):
        args.chat_template = args.teacher
    args.output_dir = args.output_dir or f"runs/bridge-{Path(args.teacher).name}"
    preset: Preset = {}
    for kind, settings in (TOY if toy else REAL).items():
        names = EVERYWHERE + (EVALUATION if kind == "evaluate" else TRAINING)
        names += GRPO_ONLY if kind.endswith("grpo") else ()
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        overrides = {name: Setting(value, "command line") for name, value in given.items()}
        preset[kind] = settings | overrides
    return preset


class Plan:
    """The stages of one seed, in order. Asked twice for one stage, it plans it once."""

    def __init__(self, args: Args, preset: Preset, seed: int):
        self.args, self.preset, self.seed = args, preset, seed
        self.root = Path(args.output_dir)
        self.stages: dict[str, Stage] = {}
        self.evaluations: list[Evaluation] = []

    def train(self, name: str, kind: str, model: str | Stage, split: str, **own) -> Stage:
        """own: further flags; a Stage among them is its final model, and is waited for."""
        if name in self.stages:
            return self.stages[name]
        args, script = self.args, SCRIPTS[kind]
        folder = self.root / f"seed_{self.seed}" / name
        given = {"model": model, **own}
        needs = [value for value in given.values() if isinstance(value, Stage)]
        wiring = {k: v.final if isinstance(v, Stage) else v for k, v in given.items()}
        held_out = (*args.benchmarks, *default_decontamination(args.dataset))
        wiring |= {"dataset": args.dataset, "split": split}
        wiring |= {"decontaminate": tuple(dict.fromkeys(held_out))}
        wiring |= {"eval_dataset": args.benchmarks[0], "seed": self.seed}
        wiring |= {"device": args.device, "backend": args.backend, "output_dir": str(folder)}
        settings = dict(self.preset[kind])
        stage = Stage(name, kind, script, folder, wiring, settings, needs)
        self.stages[name] = stage
        return stage

    def steps(self, *kinds: str, share: float = 1.0) -> Setting:
        """As many steps as these kinds of stages have together, times `share`."""
        steps = sum(self.preset[kind]["num_steps"].value for kind in kinds)
        return ours(round(share * steps), f"as {' and '.join(kinds)}")

    def evaluate(self, title: str, route: str, model: str | Stage) -> None:
        """A row of the report. Models that are not trained are evaluated once for all seeds."""
        args, trained = self.args, isinstance(model, Stage)
        name = f"eval_{model.name}" if trained else f"eval_{title.replace(' ', '_')}"
        if name in self.stages:
            return
        folder = self.root / (f"seed_{self.seed}" if trained else "base") / name
        wiring = {"model": model.final if trained else model, "benchmarks": args.benchmarks}
        wiring |= {"seed": self.seed if trained else 0, "device": args.device}
        wiring |= {"backend": args.backend, "output_dir": str(folder)}
        needs = [model] if trained else []
        settings = dict(self.preset["evaluate"])
        stage = Stage(name, "evaluate", "evaluate.py", folder, wiring, settings, needs)
        self.stages[name] = stage
        self.evaluations.append(Evaluation(title, route, self.seed if trained else None, stage))

    # --- stages that several routes share ---

    def teacher_1h(self) -> Stage:
        teacher = self.train("teacher_grpo", "teacher_grpo", self.args.teacher, "1H")
        self.evaluate("RL teacher (1H)", "models", teacher)
        return teacher

    def cold(self, name: str = "cold") -> Stage:
        stage = self.train(name, "student_grpo", self.args.student, "all")
        stage.settings["num_steps"] = self.steps("teacher_grpo", "student_grpo")
        return stage

    def bridge(self, prefix: str, teacher: str | Stage, split: str, route: str) -> Stage:
        """FKL warmup, then OPD. On all data both are longer by the share of labels."""
        own, label = {"teacher": teacher}, f"{TITLES[route]}: "
        warmup = self.train(f"{prefix}fkl_warmup", "fkl_warmup", self.args.student, split, **own)
        opd = self.train(f"{prefix}opd", "opd", warmup, split, **own)
        if split == "all":
            used = self.steps("teacher_grpo", "student_grpo").value
            share = used / self.preset["teacher_grpo"]["num_steps"].value
            for stage in (warmup, opd):
                stage.settings["num_steps"] = self.steps(stage.kind, share=share)
        if route == "half":
            self.evaluate(f"{label}FKL ({split})", route, warmup)
        self.evaluate(f"{label}FKL, OPD ({split})", route, opd)
        return opd

    def last_grpo(self, name: str, student: Stage, split: str, route: str, after: str) -> None:
        """Sparse reward on the student, at the end of a route."""
        last = self.train(name, "student_grpo", student, split)
        self.evaluate(f"{TITLES[route]}: {after}, GRPO ({split})", route, last)

    # --- routes ---

    def add(self, route: Route) -> None:
        args = self.args
        if route == "cold":
            self.evaluate("cold: GRPO (all)", route, self.cold())
        elif route in ("half", "replay"):
            opd = self.bridge("", self.teacher_1h(), "1H", "half")
            name, split = ("student_grpo", "2H") if route == "half" else ("replay_grpo", "1H")
            self.last_grpo(name, opd, split, route, "FKL, OPD (1H)")
        elif route == "sft_transfer":
            own = {"teacher": self.teacher_1h(), "hard_labels": True}
            student = self.train("sft_transfer", "sft_transfer", args.student, "1H", **own)
            student.settings["num_steps"] = self.steps("fkl_warmup", "opd")
            self.evaluate(f"{TITLES[route]}: SFT (1H)", route, student)
            self.last_grpo("sft_transfer_grpo", student, "2H", route, "SFT (1H)")
        elif route == "opd_only":
            teacher = self.teacher_1h()
            student = self.train("opd_only", "opd", args.student, "1H", teacher=teacher)
            student.settings["num_steps"] = self.steps("fkl_warmup", "opd")
            self.evaluate(f"{TITLES[route]}: OPD (1H)", route, student)
            self.last_grpo("opd_only_grpo", student, "2H", route, "OPD (1H)")
        elif route == "sft_teacher":
            own = {"teacher": args.teacher, "hard_labels": True, "correct_only": True}
            teacher = self.train("teacher_sft", "teacher_sft", args.teacher, "1H", **own)
            self.evaluate("SFT teacher (1H)", "models", teacher)
            opd = self.bridge("sft_teacher_", teacher, "1H", route)
            self.last_grpo("sft_teacher_grpo", opd, "2H", route, "FKL, OPD (1H)")
        elif route == "raw_teacher":
            self.bridge("raw_teacher_", args.teacher, "all", route)
        elif route == "same_size":
            self.evaluate("cold: GRPO (all)", "cold", self.cold())
            self.bridge("same_size_", self.cold(), "all", route)
        else:
            opd = self.full()
            if route != "full":
                matched, flag = self.cold(route), route.replace("cold_matched", "stop_at")
                matched.budget = (flag, opd.behind())
                bound = self.steps("teacher_grpo", "student_grpo", share=50)
                matched.settings["num_steps"] = ours(
                    bound.value, f"an upper bound: --{flag} ends it"
                )
                self.evaluate(f"cold: GRPO (all), {flag[8:]} of full", route, matched)

    def full(self) -> Stage:
        teacher = self.train("full_teacher_grpo", "teacher_grpo", self.args.teacher, "all")
        teacher.settings["num_steps"] = self.steps("teacher_grpo", "student_grpo")
        self.evaluate("RL teacher (all)", "models", teacher)
        return self.bridge("full_", teacher, "all", "full")


SCRIPTS = {
    **dict.fromkeys(("teacher_grpo", "student_grpo"), "grpo.py"),
    **dict.fromkeys(("fkl_warmup", "teacher_sft", "sft_transfer"), "fkl_warmup.py"),
    "opd": "opd.py",
}
TITLES = {
    **dict.fromkeys(("full", "half", "sft_transfer", "opd_only"), "RL teacher"),
    "replay": "RL teacher",
    "sft_teacher": "SFT teacher",
    "raw_teacher": "raw teacher",
    "same_size": "RL student as teacher",
}


def plan(args: Args, preset: Preset) -> tuple[list[Stage], list[Evaluation]]:
    """The stages in order, and the rows of the report."""
    routes = Route.__args__ if "all" in args.routes else dict.fromkeys(args.routes)
    stages: dict[Path, Stage] = {}
    evaluations: list[Evaluation] = []
    for seed in args.seeds:
        planned = Plan(args, preset, seed)
        planned.evaluate("untrained student", "models", args.student)
        planned.evaluate("raw teacher", "models", args.teacher)
        for route in routes:
            planned.add(route)
        evaluations += [row for row in planned.evaluations if row.stage.folder not in stages]
        for stage in planned.stages.values():
            stages.setdefault(stage.folder, stage)  # base models are planned by every seed
    return list(stages.values()), evaluations


# === machine ===

USABLE = 0.9  # of a GPU: the plan is a computation


@dataclass(frozen=True)
class Machine:
    """What there is, or what --gpu_memory_gb and --host_memory_gb say there is. Bytes."""

    ranks: int  # on this machine
    gpu: float | None  # memory of each GPU
    host: float
    elsewhere: bool = False  # planned for one that has GPUs: this one's host and disk do not count


def find_machine(args: Args) -> Machine:
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
        gpu, host = 80 * GB, host if args.host_memory_gb else float("inf")
    machine = Machine(args.nproc_per_node or max(1, count), gpu, host, elsewhere)
    alone = gpu is None and args.nnodes == 1
    check(args.jobs == 1 or alone, "--jobs is for the CPU of one machine: a stage fills a GPU")
    return machine


def launch_with(args: Args, machine: Machine, stages: list[Stage]) -> None:
    """torchrun, where there are several ranks."""
    if machine.ranks * args.nnodes == 1:
        return
    launcher = ["torchrun", "--nproc_per_node", str(machine.ranks)]
    launcher += ["--shutdown_timeout", "600"]  # its 30 s would kill ranks that stop after a phase
    if args.nnodes == 1:
        launcher += ["--standalone"]
    else:
        launcher += ["--nnodes", str(args.nnodes), "--node_rank", str(args.node_rank)]
        launcher += ["--master_addr", args.master_addr, "--master_port", str(args.master_port)]
    for stage in stages:
        stage.launcher = tuple(launcher)


def base_model(stage: Stage, flag: str) -> str:
    """The model that a flag's checkpoint comes from: it has its shape."""
    source = next((need for need in stage.needs if need.final == stage.flags[flag]), None)
    return stage.flags[flag] if source is None else base_model(source, "model")


@dataclass
class Fit:
    """What was found of a machine's memory: with the numbers, what does not fit; a row a training
    stage; what was chosen, and each stage's plan."""

    problems: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    details: list[str] = field(default_factory=list)


FIT_HEADER = ["stage", "model", "GPUs", "states", "update, GB", "vLLM needs, GB", "its share"]
FIT_HEADER += ["tokens at most", "fits"]


def fit(args: Args, machine: Machine, stages: list[Stage]) -> Fit:
    """Choose for each stage what makes it fit."""
    ranks, disk, found = machine.ranks * args.nnodes, 0.0, Fit()
    said, problems = found.details, found.problems
    for stage in stages:
        if stage.manifest.exists():
            continue
        if stage.script == "evaluate.py":
            problems += fit_evaluation(stage, machine)
            continue
        problem_count = len(problems)
        names = {
            flag: base_model(stage, flag) for flag in ("model", "teacher") if flag in stage.flags
        }
        shapes = {flag: memory.shape_of(name) for flag, name in names.items()}
        unknown = [names[flag] for flag, shape in shapes.items() if shape is None]
        if unknown:
            said.append(f"no memory plan of {', '.join(unknown)}: no config.json that it can read")
            continue
        flags = importlib.import_module(stage.script.removesuffix(".py")).Args(**stage.flags)
        planned, engine = smallest_change(stage, flags, shapes, ranks, machine)
        if not stage.folder.exists():
            disk += (2 * 12 + 4) * shapes["model"].params  # two checkpoints and the final model
        on_device = 0.0 if machine.gpu else planned.device
        on_host = (planned.host + on_device) * machine.ranks * args.jobs
        update, what = planned.peak("update"), f"{stage.kind} of {names['model']} needs"
        if machine.gpu and update > USABLE * machine.gpu:
            problems.append(
                f"{what} {update / GB:.0f} GB on each of {ranks} GPUs (weights in host memory), "
                f"and they have {machine.gpu / GB:.0f} GB"
            )
        elif machine.gpu and engine > flags.vllm_gpu_memory * machine.gpu:
            problems.append(
                f"{what} {engine / GB:.0f} GB of each GPU for vLLM ({memory.SEQUENCES} sequences), "
                f"and {flags.vllm_gpu_memory * machine.gpu / GB:.0f} GB are left"
            )
        elif on_host > machine.host:
            problems.append(
                f"{what} {on_host / GB:.0f} GB of host memory, and there are "
                f"{machine.host / GB:.0f} GB"
            )
        elif machine.gpu:
            said.append(choose(stage, flags, planned, machine, ranks))
        fits = "yes" if len(problems) == problem_count else "NO"
        place = f"host, {planned.host * machine.ranks / GB:.0f} GB" if flags.cpu_offload else "GPU"
        cells = [stage.name, names["model"], str(ranks), place if machine.gpu else "host"]
        cells += [f"{update / GB:.0f}", f"{engine / GB:.0f}", f"{flags.vllm_gpu_memory:.0%}"]
        found.rows.append([*cells, f"{most_tokens(stage)[1]:,}", fits])
        if args.dry_run:
            title = f"# memory of {stage.kind} of {names['model']}, GB for each of {ranks} ranks"
            said.append(f"\n{title}: computed\n{planned.table(machine.gpu)}")
    folder = next(f for f in (Path(args.output_dir) / "x").absolute().parents if f.exists())
    free = shutil.disk_usage(folder).free
    if disk > free and not machine.elsewhere:
        problems.append(
            f"checkpoints and final models need {disk / GB:.0f} GB of disk, and {folder} has "
            f"{free / GB:.0f} GB"
        )
    found.problems = list(dict.fromkeys(problems))
    return found


def fit_evaluation(stage: Stage, machine: Machine) -> list[str]:
    """Let as many GPUs share a vLLM as its model needs; what does not fit even so."""
    shape = memory.shape_of(base_model(stage, "model"))
    if machine.gpu is None or shape is None:
        return []
    flags = importlib.import_module("evaluate").Args(**stage.flags)
    if flags.backend == "torch":
        return []
    room = flags.vllm_gpu_memory * machine.gpu
    engine = share_engine(stage, flags, shape, machine, room)
    if flags.tensor_parallel > 1 and "tensor_parallel" not in stage.settings:
        stage.settings["tensor_parallel"] = ours(flags.tensor_parallel, "so that it fits")
    if engine <= room:
        return []
    needs = f"{engine / GB:.0f} GB of each GPU for vLLM, and {room / GB:.0f} GB are left"
    return [f"{stage.name} needs {needs}"]


def share_engine(
    stage: Stage, flags, sampled: memory.Shape, machine: Machine, room: float
) -> float:
    """Set tensor_parallel to the fewest GPUs of a machine whose parts of vLLM fit in `room` bytes,
    or to what the user has set. Returns the bytes that it needs of each."""
    given = stage.settings.get("tensor_parallel")
    counts = [n for n in (1, 2, 4, 8, 16) if n <= machine.ranks and machine.ranks % n == 0]
    for flags.tensor_parallel in [given.value] if given else counts:
        engine = memory.smallest_engine(flags, sampled)
        if engine <= room:
            break
    return engine


def smallest_change(
    stage: Stage, flags, shapes: dict, ranks: int, machine: Machine
) -> tuple[memory.Plan, float]:
    """Set micro_batch_tokens, cpu_offload and tensor_parallel of a trainer's Args to the first that
    fit (none changes a result; the second is much slower, less so with keep_gradients, where they
    fit), and give vLLM the rest of the GPU. What the user has set stays. Returns the plan, and the
    bytes that vLLM needs at least."""
    gpu = machine.gpu
    model, teacher = shapes["model"], shapes.get("teacher")
    frozen = [model] if getattr(flags, "kl_coef", 0) > 0 else [teacher] if teacher else []
    sampled = teacher if hasattr(flags, "correct_only") else model
    planned = memory.plan(flags, model, frozen, sampled, ranks, gpu)
    if gpu is None:
        return planned, 0.0
    engine = 0.0
    given = {name for name, s in stage.settings.items() if s.source == "command line"}
    micro = flags.micro_batch_tokens
    one = min(micro, flags.max_prompt_tokens + flags.max_new_tokens)  # sequence of full length
    smaller = (micro,) if "micro_batch_tokens" in given else (micro, one)
    for flags.cpu_offload, flags.micro_batch_tokens in product((False, True), smaller):
        planned = memory.plan(flags, model, frozen, sampled, ranks, gpu)
        if "vllm_gpu_memory" not in given:
            kept = sum(i.size for i in planned.items if i.where == "device" and i.phase == "always")
            flags.vllm_gpu_memory = round(max(0.05, min(0.85, USABLE - kept / gpu)), 2)
        room = flags.vllm_gpu_memory * gpu
        if flags.backend != "torch":
            engine = share_engine(stage, flags, sampled, machine, room)
        if planned.peak("update") <= USABLE * gpu and engine <= room:
            break
    if flags.cpu_offload:
        flags.keep_gradients = True
        kept = memory.plan(flags, model, frozen, sampled, ranks, gpu).peak("update")
        flags.keep_gradients = kept <= USABLE * gpu
    return memory.plan(flags, model, frozen, sampled, ranks, gpu), engine


def choose(stage: Stage, flags, planned: memory.Plan, machine: Machine, ranks: int) -> str:
    """Put what was found to fit into the stage's command, and say so."""
    chosen = ("vllm_gpu_memory", "micro_batch_tokens", "cpu_offload", "keep_gradients")
    for name in (*chosen, "tensor_parallel"):
        default = type(flags).__dataclass_fields__[name].default
        given = stage.settings.get(name, Setting(default, "ours"))
        if getattr(flags, name) != given.value and given.source != "command line":
            stage.settings[name] = ours(getattr(flags, name), "so that it fits")
    place = "host memory, since the GPU is too small" if flags.cpu_offload else "the GPU"
    host = f" ({planned.host * machine.ranks / GB:.0f} GB)" if flags.cpu_offload else ""
    return (
        f"{stage.kind} on {ranks} GPU(s) of {machine.gpu / GB:.0f} GB: weights, gradients and "
        f"optimizer in {place}{host}; micro-batches of {flags.micro_batch_tokens:,} tokens; "
        f"{planned.peak('update') / GB:.0f} GB in the update; vLLM takes "
        f"{flags.vllm_gpu_memory:.0%} of {flags.tensor_parallel} GPU(s) while it samples (computed)"
    )


def print_plan(stages: list[Stage], preset: Preset) -> None:
    for stage in stages:
        print(f"\n# {stage.name}\n{shlex.join(stage.command)}")
    print("\n# settings and who chose them; what is not listed is the script's default")
    kinds = dict.fromkeys(stage.kind for stage in stages)
    listed = [(kind, setting) for kind in kinds for setting in preset[kind].items()]
    listed += [
        (stage.name, setting)
        for stage in stages
        for setting in stage.settings.items()
        if setting not in preset[stage.kind].items()
    ]
    for where, (name, setting) in listed:
        why = f"{setting.source}: {setting.note}" if setting.note else setting.source
        print(f"{where:22} {name:18} {setting.value!s:10} {why}")


def print_budget(stages: list[Stage]) -> None:
    """What the training stages can generate at most."""
    print("\n# token budget: at most")
    for stage in stages:
        if stage.script != "evaluate.py":
            rollouts, tokens = most_tokens(stage)
            print(f"{stage.name:22} {rollouts:>11,} completions {tokens:>18,} tokens")


def most_tokens(stage: Stage) -> tuple[int, int]:
    """Completions and tokens that a training stage can generate."""
    flags = {"max_new_tokens": 64} | stage.flags
    rollouts = flags["num_steps"] * flags["prompts_per_step"] * flags["group_size"]
    return rollouts, rollouts * flags["max_new_tokens"]


# === run ===


@cache
def template_of(model: str, chat_template: str | None, teacher: str | None, thinking: bool) -> str:
    return template_fingerprint(load_tokenizer(model, teacher, chat_template), thinking)


def is_finished(stage: Stage) -> bool:
    """Whether it was finished before. Raises UserError if that was with other settings, or with
    other files than those that lie there now."""
    if not stage.manifest.exists():
        return False
    config = json.loads((stage.folder / "config.json").read_text())
    flags = importlib.import_module(stage.script.removesuffix(".py")).Args(**stage.flags)
    wanted = json.loads(json.dumps(vars(flags)))
    differing = [k for k, value in wanted.items() if k not in FREE and config.get(k) != value]
    check(
        not differing,
        f"{stage.folder} was finished with other settings ({', '.join(differing)}); "
        "choose another --output_dir",
    )
    teacher = getattr(flags, "teacher", None)
    template = template_of(flags.model, flags.chat_template, teacher, flags.thinking)
    found = inputs_of(flags) | {"template_fingerprint": template}
    replaced = [name for name, value in found.items() if config.get(name) != value]
    check(
        not replaced,
        f"{stage.folder} was finished with other files ({', '.join(replaced)}): what lies there "
        "now was put there since; choose another --output_dir",
    )
    return True


class Child:
    """One running stage; what it prints goes to NAME.log beside its folder."""

    def __init__(self, stage: Stage, jobs: int):
        self.stage, self.shown = stage, shlex.join(stage.command)
        self.log = stage.folder.with_name(stage.name + ".log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.log, "ab")  # noqa: SIM115
        self.begin = self.file.tell()
        threads = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))}
        # In a session of its own, so that Ctrl-C reaches it once: through us.
        python, own = [sys.executable], stage.command[len(stage.launcher) + 1 :]
        if stage.launcher[0] == "torchrun":
            python += ["-m", "torch.distributed.run", *stage.launcher[1:]]
        self.process = subprocess.Popen(
            [*python, str(ROOT / stage.script), *own],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=threads | os.environ,
        )

    def read(self, echo: bool) -> bool:
        """Pass on what it has printed; False at its end."""
        piece = self.process.stdout.read1()
        self.file.write(piece)
        if echo:
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
        return piece != b""

    def finish(self) -> None:
        """Raise if it has failed."""
        code = self.process.wait()
        self.file.close()
        if code != 0 or not self.stage.manifest.exists():
            text = self.log.read_bytes()[self.begin :].decode(errors="replace").strip()
            # torchrun ends with a table of its own, and with code 1.
            errors = re.findall(r"^(?:rank \d+: )?error: .*", text, re.MULTILINE)
            shown = errors[:1] or text.splitlines()[-5:]
            bad_input = code == 2 or re.search(r"^ *exitcode *: 2 ", text, re.MULTILINE)
            raise (UserError if bad_input else RunFailure)(
                f"stage {self.stage.name} failed with exit code {code} ({' / '.join(shown)}); log: "
                f"{self.log}; to retry: {self.shown}"
            )


def run_stages(stages: list[Stage], jobs: int) -> None:
    """Run each stage once what it needs is finished, `jobs` at a time. If one fails, or a signal
    comes, the others are stopped: they save what they have done."""
    waiting, done = list(stages), set()
    with selectors.DefaultSelector() as running:
        try:
            while waiting or running.get_map():
                for stage in list(waiting):
                    needs = [*stage.needs, *(stage.budget[1] if stage.budget else ())]
                    ready = all(need.folder in done for need in needs)
                    if not ready or len(running.get_map()) == jobs:
                        continue
                    waiting.remove(stage)
                    if is_finished(stage):
                        print(f"\n# {stage.name}: finished before\n{shlex.join(stage.command)}")
                        done.add(stage.folder)
                        continue
                    child = Child(stage, jobs)
                    print(f"\n# {stage.name}\n{child.shown}", flush=True)
                    running.register(child.process.stdout, selectors.EVENT_READ, child)
                for key, _ in running.select() if running.get_map() else ():
                    if not key.data.read(echo=jobs == 1):
                        running.unregister(key.fileobj)
                        key.data.finish()
                        done.add(key.data.stage.folder)
        except BaseException as error:
            number = error.number if isinstance(error, Stopped) else signal.SIGTERM
            for key in running.get_map().values():
                key.data.process.send_signal(number)
            for key in list(running.get_map().values()):
                key.data.file.write(key.data.process.communicate()[0])
            raise


def check_folder(folder: Path) -> None:
    """The report must not replace the files of another run."""
    there = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    own = there and any((folder / "base").glob("eval_*"))
    check(own or not there, f"{folder} exists and is no study's; choose another --output_dir")


def main(args: Args) -> None:
    check_ranges(args)
    check(args.seeds and args.routes, "--seeds and --routes need a value each")
    check(args.benchmarks != (), "--benchmarks needs a value, for example toy or math500")
    check(min(args.seeds) >= 0, f"--seeds {min(args.seeds)} is negative")
    check(len(set(args.seeds)) == len(args.seeds), "a seed stands twice in --seeds")
    preset = fill_in(args)
    stages, evaluations = plan(args, preset)
    check_folder(Path(args.output_dir))
    machine = find_machine(args)
    launch_with(args, machine, stages)
    found = fit(args, machine, stages)
    problems = found.problems
    if args.dry_run and found.rows:
        print(f"\n{markdown(FIT_HEADER, found.rows)}\n(for each GPU; computed, not measured)\n")
    print("".join(f"{line}\n" for line in dict.fromkeys(found.details)), end="")
    if args.dry_run:
        print_plan(stages, preset)
        print_budget(stages)
        print("".join(f"\nthis would not run: {problem}" for problem in problems))
        return
    hint = "; use more GPUs, smaller models or another --output_dir"
    check(args.only_report or not problems, "; ".join(problems) + hint)
    began = time.perf_counter()
    if args.only_report:
        missing = [stage.name for stage in stages if not is_finished(stage)]
        names = ", ".join(missing[:3])
        message = f"{len(missing)} of {len(stages)} stages are not finished ({names} ...)"
        check(not missing, f"{message}; the same command without --only_report runs them")
    else:
        print_budget(stages)
        run_stages(stages, args.jobs)
    if args.node_rank == 0:
        write_report(Path(args.output_dir), args, evaluations)
    print(f"total: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    start(main, Args, __doc__)
