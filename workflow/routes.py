"""The routes, in three literal tables: the training stages, the routes, and the report's rows.

A stage names the model that it trains and its teacher. Each is one of the two base models or what
another stage has trained, so that a route's last stage says all that must run before. A stage that
several routes need runs once.

To add a route, write its stages into RECIPES, its line into ROUTES and its rows into ROWS: its flag
of bridge.py, its line in --help and its place in the report follow.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from common.run.errors import check
from workflow.fit import Machine, vllm_settings
from workflow.paper_results import routes_of
from workflow.presets import KINDS, Preset, Setting, ours
from workflow.stages import Stage

TEACHER, STUDENT = "raw teacher", "untrained student"  # the models that the workflow begins with


class Recipe(NamedTuple):
    """A training stage, before it has a seed and a folder."""

    kind: str  # its settings are those of the preset's kind (presets.KINDS)
    split: str
    model: str  # what it trains: a base model or another recipe
    teacher: str | None = None
    budget_flag: str | None = None  # ends it when it has used what all of `full` has


RECIPES = {
    "teacher_grpo": Recipe("teacher_grpo", "1H", TEACHER),
    "full_teacher_grpo": Recipe("teacher_grpo", "all", TEACHER),
    "teacher_sft": Recipe("teacher_sft", "1H", TEACHER, TEACHER),
    "cold": Recipe("cold_grpo", "all", STUDENT),
    "cold_matched_tokens": Recipe("cold_grpo", "all", STUDENT, None, "stop_at_tokens"),
    "cold_matched_flops": Recipe("cold_grpo", "all", STUDENT, None, "stop_at_flops"),
    "full_fkl_warmup": Recipe("fkl_warmup", "all", STUDENT, "full_teacher_grpo"),
    "full_opd": Recipe("opd", "all", "full_fkl_warmup", "full_teacher_grpo"),
    "fkl_warmup": Recipe("fkl_warmup", "1H", STUDENT, "teacher_grpo"),
    "opd": Recipe("opd", "1H", "fkl_warmup", "teacher_grpo"),
    "student_grpo": Recipe("student_grpo", "2H", "opd"),
    "replay_grpo": Recipe("student_grpo", "1H", "opd"),
    "sft_transfer": Recipe("sft_transfer", "1H", STUDENT, "teacher_grpo"),
    "sft_transfer_grpo": Recipe("student_grpo", "2H", "sft_transfer"),
    "opd_only": Recipe("opd", "1H", STUDENT, "teacher_grpo"),
    "opd_only_grpo": Recipe("student_grpo", "2H", "opd_only"),
    "semi_opd": Recipe("semi_opd", "1H", "fkl_warmup", "teacher_grpo"),
    "semi_opd_grpo": Recipe("student_grpo", "2H", "semi_opd"),
    "sft_teacher_fkl_warmup": Recipe("fkl_warmup", "1H", STUDENT, "teacher_sft"),
    "sft_teacher_opd": Recipe("opd", "1H", "sft_teacher_fkl_warmup", "teacher_sft"),
    "sft_teacher_grpo": Recipe("student_grpo", "2H", "sft_teacher_opd"),
    "raw_teacher_fkl_warmup": Recipe("fkl_warmup", "all", STUDENT, TEACHER),
    "raw_teacher_opd": Recipe("opd", "all", "raw_teacher_fkl_warmup", TEACHER),
    "raw_teacher_grpo": Recipe("student_grpo", "2H", "raw_teacher_opd"),
    "same_size_fkl_warmup": Recipe("fkl_warmup", "all", STUDENT, "cold"),
    "same_size_opd": Recipe("opd", "all", "same_size_fkl_warmup", "cold"),
}


# What --trained_teacher stands for.
RL_TEACHERS = ("teacher_grpo", "full_teacher_grpo")


class Route(NamedTuple):
    last: str  # its last training stage
    colour: str  # in the report's figure
    stages: str  # in words; what pays labels has brackets


ROUTES = {
    "cold": Route("cold", "#d9762b", "student GRPO on all data [reward]"),
    "full": Route("full_opd", "#11457e", "teacher GRPO on all data [reward], FKL, OPD on all"),
    "half": Route("student_grpo", "#1f6fb4", "as full, but on 1H; then GRPO on 2H [reward]"),
    "replay": Route("replay_grpo", "#6aa6d8", "as half, but the student's GRPO reuses 1H"),
    "sft_transfer": Route("sft_transfer_grpo", "#2f8f5b", "as half, SFT instead of FKL and OPD"),
    "opd_only": Route("opd_only_grpo", "#86bf6a", "as half, without FKL"),
    "semi_opd": Route("semi_opd_grpo", "#5fb0b7", "as half, OPD on rollouts of the frozen student"),
    "sft_teacher": Route("sft_teacher_grpo", "#8057a8", "as half, teacher tuned by SFT [filter]"),
    "raw_teacher": Route("raw_teacher_opd", "#b03a48", "FKL, OPD on all, untrained teacher"),
    "raw_then_grpo": Route(
        "raw_teacher_grpo", "#d98a93", "as raw_teacher, then GRPO on 2H [reward]"
    ),
    "same_size": Route("same_size_opd", "#c7a423", "FKL, OPD on all, cold's student as teacher"),
    "cold_matched_tokens": Route("cold_matched_tokens", "#e39a5f", "cold with the tokens of full"),
    "cold_matched_flops": Route("cold_matched_flops", "#edbe98", "cold with the FLOPs of full"),
}

# Rows of the report: route/stage -> title. "models" are no students of a route.
ROWS = {
    "models/untrained_student": "untrained student",
    "models/raw_teacher": "raw teacher",
    "models/trained_teacher": "given RL teacher",
    "models/teacher_grpo": "RL teacher (1H)",
    "models/full_teacher_grpo": "RL teacher (all)",
    "models/teacher_sft": "SFT teacher (1H)",
    "cold/cold": "cold: GRPO (all)",
    "cold_matched_tokens/cold_matched_tokens": "cold: GRPO (all), tokens of full",
    "cold_matched_flops/cold_matched_flops": "cold: GRPO (all), flops of full",
    "full/full_opd": "RL teacher: FKL, OPD (all)",
    "half/fkl_warmup": "RL teacher: FKL (1H)",
    "half/opd": "RL teacher: FKL, OPD (1H)",
    "half/student_grpo": "RL teacher: FKL, OPD (1H), GRPO (2H)",
    "replay/replay_grpo": "RL teacher: FKL, OPD (1H), GRPO (1H)",
    "sft_transfer/sft_transfer": "RL teacher: SFT (1H)",
    "sft_transfer/sft_transfer_grpo": "RL teacher: SFT (1H), GRPO (2H)",
    "opd_only/opd_only": "RL teacher: OPD (1H)",
    "opd_only/opd_only_grpo": "RL teacher: OPD (1H), GRPO (2H)",
    "semi_opd/semi_opd": "RL teacher: FKL, semi-OPD (1H)",
    "semi_opd/semi_opd_grpo": "RL teacher: FKL, semi-OPD (1H), GRPO (2H)",
    "sft_teacher/sft_teacher_opd": "SFT teacher: FKL, OPD (1H)",
    "sft_teacher/sft_teacher_grpo": "SFT teacher: FKL, OPD (1H), GRPO (2H)",
    "raw_teacher/raw_teacher_opd": "raw teacher: FKL, OPD (all)",
    "raw_then_grpo/raw_teacher_grpo": "raw teacher: FKL, OPD (all), GRPO (2H)",
    "same_size/same_size_opd": "RL student as teacher: FKL, OPD (all)",
}


def table_of_routes() -> str:
    """Return the routes and their stages, a line each, for --help and docs/bridge.md."""
    return "\n".join(f"    {name:20} {route.stages}" for name, route in ROUTES.items())


def num_steps_of(name: str, preset: Preset) -> dict[str, Setting]:
    """Return --num_steps, where it is not the preset's: every route pays the labels of `half`, in
    GRPO's steps, and a transfer of one stage has the updates of one of two."""

    def steps(*kinds: str) -> int:
        return sum(preset[kind]["num_steps"].value for kind in kinds)

    recipe, labels = RECIPES[name], steps("teacher_grpo", "student_grpo")
    kind = recipe.kind
    if recipe.budget_flag:
        return {"num_steps": ours(50 * labels, f"an upper bound: --{recipe.budget_flag} ends it")}
    if recipe.split == "all" and recipe.teacher:  # longer by the share of labels
        longer = labels / steps("teacher_grpo")
        return {"num_steps": ours(round(longer * steps(kind)), f"as {kind}")}
    if recipe.split == "all":
        return {"num_steps": ours(labels, "as teacher_grpo and student_grpo")}
    if kind in ("opd", "sft_transfer") and recipe.model == STUDENT:  # without a warmup
        return {"num_steps": ours(steps("fkl_warmup", "opd"), "as fkl_warmup and opd")}
    return {}


@dataclass
class Evaluation:
    """A row of the report: the model that `stage` evaluates."""

    id: str  # of ROWS
    seed: int | None  # None: nothing has trained it
    stage: Stage

    @property
    def title(self) -> str:
        return ROWS[self.id]

    @property
    def route(self) -> str:
        return self.id.partition("/")[0]


@dataclass
class Workflow:
    """The stages, in an order in which they can run, and the rows of the report."""

    args: object  # bridge.Args
    preset: Preset
    machine: Machine
    stages: dict[Path, Stage] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)

    def add(self, folder: Path, kind: str, models: dict, fixed_flags: dict, **more) -> Stage:
        """Add a stage with the settings of its kind. models: a flag -> a name, or the stage whose
        final model it is."""
        args = self.args
        needs = [model for model in models.values() if isinstance(model, Stage)]
        names = {f: m.final if isinstance(m, Stage) else m for f, m in models.items()}
        script, flags = KINDS[kind]
        fixed_flags = names | flags | fixed_flags
        fixed_flags |= {"device": args.device, "backend": args.backend, "output_dir": str(folder)}
        settings = self.preset[kind] | more.pop("settings", {})
        taken = ", ".join(fixed_flags.keys() & settings.keys())
        check(not taken, f"a preset cannot set {taken} of {kind}: the workflow does")
        more |= {"launcher": self.machine.launcher}
        stage = Stage(folder.name, kind, script, folder, fixed_flags, settings, needs, **more)
        stage = replace(stage, settings=settings | vllm_settings(stage, self.machine))
        self.stages[folder] = stage
        return stage

    def train(self, name: str, seed: int) -> Stage:
        """Add the stage of a recipe after all that it needs, and return it; once, however often it
        is asked for."""
        args, recipe = self.args, RECIPES[name]
        folder = Path(args.output_dir) / f"seed_{seed}" / name
        if folder in self.stages:
            return self.stages[folder]
        bases = {TEACHER: args.teacher, STUDENT: args.student}
        sources = {"model": recipe.model} | ({"teacher": recipe.teacher} if recipe.teacher else {})
        if args.trained_teacher:
            bases |= dict.fromkeys(RL_TEACHERS, args.trained_teacher)
        models = {
            flag: bases[source] if source in bases else self.train(source, seed)
            for flag, source in sources.items()
        }
        fixed_flags = {"dataset": args.dataset, "split": recipe.split}
        fixed_flags |= {"decontaminate": args.decontaminate}
        fixed_flags |= {"eval_dataset": args.benchmarks[0], "seed": seed}
        more = {"settings": num_steps_of(name, self.preset)}
        if recipe.budget_flag:
            more["budget_flag"] = recipe.budget_flag
            more["budget_of"] = self.train(ROUTES["full"].last, seed).lineage()
        stage = self.add(folder, recipe.kind, models, fixed_flags, **more)
        for row in ROWS:
            if row.endswith(f"/{name}"):
                self.evaluate(row, seed, stage)
        return stage

    def evaluate(self, row: str, seed: int | None, model: Stage | str) -> None:
        """Add a row of the report. model: its name, or the stage whose final model it is."""
        root = Path(self.args.output_dir) / ("base" if seed is None else f"seed_{seed}")
        fixed_flags = {"benchmarks": self.args.benchmarks, "seed": seed or 0}
        folder = root / f"eval_{row.partition('/')[2]}"
        stage = self.add(folder, "evaluate", {"model": model}, fixed_flags)
        self.evaluations.append(Evaluation(row, seed, stage))


def plan(args, preset: Preset, machine: Machine) -> tuple[list[Stage], list[Evaluation]]:
    """Return the stages of all routes and seeds, and the rows of the report."""
    planned = Workflow(args, preset, machine)
    planned.evaluate("models/untrained_student", None, args.student)
    planned.evaluate("models/raw_teacher", None, args.teacher)
    if args.trained_teacher:
        planned.evaluate("models/trained_teacher", None, args.trained_teacher)
    names = dict.fromkeys(args.routes)
    if "paper" in names:
        names |= dict.fromkeys(routes_of(args.teacher, ROUTES))
    names = ROUTES if "all" in names else [name for name in names if name != "paper"]
    for seed in args.seeds:
        for name in names:
            planned.train(ROUTES[name].last, seed)
    return list(planned.stages.values()), planned.evaluations
