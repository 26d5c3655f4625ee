"""Which stages a workflow has: each route is the recipe of its last training stage.

A recipe names the model that it trains and its teacher; each is a base model or what another
recipe ends with, so that one recipe says all that must run before. Stages of one name run once.

To add a route: write its recipes below and its line in ROUTES. Its stages, its flags on the command
line and its rows in the report follow. (Describe it in bridge.py's table, too.)
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from common.run.errors import check
from workflow.machine import Machine, settings_that_fit
from workflow.paper_results import routes_of
from workflow.presets import KINDS, Preset, Setting, ours
from workflow.stages import Stage

TEACHER, STUDENT = "raw teacher", "untrained student"  # the models that the workflow begins with


@dataclass(frozen=True)
class Recipe:
    """A training stage, before it has a seed and a folder."""

    name: str
    kind: str  # its settings are those of the preset's kind (presets.KINDS)
    split: Literal["1H", "2H", "all"]
    model: "Recipe | str"  # what it trains
    teacher: "Recipe | str | None" = None
    route: str | None = None  # under which the report evaluates it; "models": no student of one
    budget_flag: str | None = None  # --stop_at_tokens or --stop_at_flops,
    budget_of: "Recipe | None" = None  # at what this recipe and all before it have used


def fkl_then_opd(prefix: str, teacher: Recipe | str, split: str, route: str) -> Recipe:
    evaluated = "half" if route == "half" else None  # the warmups of other routes are not
    warmup = Recipe(f"{prefix}fkl_warmup", "fkl_warmup", split, STUDENT, teacher, evaluated)
    return Recipe(f"{prefix}opd", "opd", split, warmup, teacher, route)


def last_grpo(name: str, student: Recipe, split: str, route: str) -> Recipe:
    return Recipe(name, "student_grpo", split, student, route=route)


def cold_with_budget(quantity: str) -> Recipe:
    name, flag = f"cold_matched_{quantity}", f"stop_at_{quantity}"
    return replace(COLD, name=name, route=name, budget_flag=flag, budget_of=FULL)


RL_TEACHER_1H = Recipe("teacher_grpo", "teacher_grpo", "1H", TEACHER, route="models")
RL_TEACHER_ALL = Recipe("full_teacher_grpo", "teacher_grpo", "all", TEACHER, route="models")
SFT_TEACHER = Recipe("teacher_sft", "teacher_sft", "1H", TEACHER, TEACHER, route="models")
COLD = Recipe("cold", "cold_grpo", "all", STUDENT, route="cold")
FULL = fkl_then_opd("full_", RL_TEACHER_ALL, "all", "full")
HALF = fkl_then_opd("", RL_TEACHER_1H, "1H", "half")
SFT_1H = Recipe("sft_transfer", "sft_transfer", "1H", STUDENT, RL_TEACHER_1H, "sft_transfer")
OPD_1H = Recipe("opd_only", "opd", "1H", STUDENT, RL_TEACHER_1H, "opd_only")
SEMI_HALF = replace(HALF, name="semi_opd", kind="semi_opd", route="semi_opd")
SFT_HALF = fkl_then_opd("sft_teacher_", SFT_TEACHER, "1H", "sft_teacher")


class Route(NamedTuple):
    last: Recipe
    colour: str  # in the report's figure


ROUTES = {
    "cold": Route(COLD, "#d9762b"),
    "full": Route(FULL, "#11457e"),
    "half": Route(last_grpo("student_grpo", HALF, "2H", "half"), "#1f6fb4"),
    "replay": Route(last_grpo("replay_grpo", HALF, "1H", "replay"), "#6aa6d8"),
    "sft_transfer": Route(last_grpo("sft_transfer_grpo", SFT_1H, "2H", "sft_transfer"), "#2f8f5b"),
    "opd_only": Route(last_grpo("opd_only_grpo", OPD_1H, "2H", "opd_only"), "#86bf6a"),
    "semi_opd": Route(last_grpo("semi_opd_grpo", SEMI_HALF, "2H", "semi_opd"), "#5fb0b7"),
    "sft_teacher": Route(last_grpo("sft_teacher_grpo", SFT_HALF, "2H", "sft_teacher"), "#8057a8"),
    "raw_teacher": Route(fkl_then_opd("raw_teacher_", TEACHER, "all", "raw_teacher"), "#b03a48"),
    "same_size": Route(fkl_then_opd("same_size_", COLD, "all", "same_size"), "#c7a423"),
    "cold_matched_tokens": Route(cold_with_budget("tokens"), "#e39a5f"),
    "cold_matched_flops": Route(cold_with_budget("flops"), "#edbe98"),
}

TEACHER_NAMES = {"teacher_grpo": "RL teacher", "teacher_sft": "SFT teacher"}
TEACHER_NAMES |= {"cold_grpo": "RL student as teacher"}
METHODS = {
    "fkl_warmup": "FKL",
    "opd": "OPD",
    "semi_opd": "semi-OPD",
    "sft_transfer": "SFT",
    "student_grpo": "GRPO",
    "cold_grpo": "GRPO",
}


def title_of(recipe: Recipe) -> str:
    """A row's name in the report: who teaches, then what was done on which problems, for example
    "RL teacher: FKL, OPD (1H), GRPO (2H)"."""
    if recipe.route == "models":
        return f"{TEACHER_NAMES[recipe.kind]} ({recipe.split})"
    chain = [recipe]
    while isinstance(chain[0].model, Recipe):
        chain.insert(0, chain[0].model)
    transfers = [step for step in chain if step.teacher]
    teacher = transfers[0].teacher if transfers else "cold"
    name = TEACHER_NAMES[teacher.kind] if isinstance(teacher, Recipe) else teacher
    parts = [f"{METHODS[step.kind]} ({step.split})" for step in chain if not step.teacher]
    if transfers:
        methods = ", ".join(METHODS[step.kind] for step in transfers)
        parts.insert(0, f"{methods} ({transfers[0].split})")
    if recipe.budget_flag:
        parts.append(f"{recipe.budget_flag.removeprefix('stop_at_')} of full")
    return f"{name}: {', '.join(parts)}"


def num_steps_of(recipe: Recipe, preset: Preset) -> dict[str, Setting]:
    """--num_steps, where it is not the preset's: every route pays the labels of `half`, in GRPO's
    steps, and a transfer of one stage has the updates of one of two."""

    def steps(*kinds: str) -> int:
        return sum(preset[kind]["num_steps"].value for kind in kinds)

    kind = recipe.kind
    labels = steps("teacher_grpo", "student_grpo")
    if recipe.budget_flag:
        setting = ours(50 * labels, f"an upper bound: --{recipe.budget_flag} ends it")
    elif recipe.split == "all" and recipe.teacher:  # longer by the share of labels
        setting = ours(round(labels / steps("teacher_grpo") * steps(kind)), f"as {kind}")
    elif recipe.split == "all":
        setting = ours(labels, "as teacher_grpo and student_grpo")
    elif kind in ("opd", "sft_transfer") and recipe.model == STUDENT:  # without a warmup
        setting = ours(steps("fkl_warmup", "opd"), "as fkl_warmup and opd")
    else:
        return {}
    return {"num_steps": setting}


@dataclass
class Evaluation:
    """A row of the report: the model that `stage` evaluates."""

    id: str  # route/stage, for example half/student_grpo
    title: str
    route: str  # "models": no student of a route
    seed: int | None  # None: nothing has trained it
    stage: Stage


@dataclass
class Workflow:
    """The stages, in an order in which they can run, and the rows of the report."""

    args: object  # bridge.Args
    preset: Preset
    machine: Machine
    stages: dict[Path, Stage] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)

    def add(self, folder: Path, kind: str, models: dict, wiring: dict, **more) -> Stage:
        """A stage with the settings of its kind, and with what makes it fit the machine. models: a
        flag -> a name, or the stage whose final model it is."""
        args = self.args
        needs = [model for model in models.values() if isinstance(model, Stage)]
        names = {f: m.final if isinstance(m, Stage) else m for f, m in models.items()}
        script, flags = KINDS[kind]
        wiring = names | flags | wiring
        wiring |= {"device": args.device, "backend": args.backend, "output_dir": str(folder)}
        settings = self.preset[kind] | more.pop("settings", {})
        taken = ", ".join(wiring.keys() & settings.keys())
        check(not taken, f"a preset cannot set {taken} of {kind}: the workflow does")
        more |= {"launcher": self.machine.launcher}
        stage = Stage(folder.name, kind, script, folder, wiring, settings, needs, **more)
        stage = replace(stage, settings=settings | settings_that_fit(stage, self.machine))
        self.stages[folder] = stage
        return stage

    def train(self, recipe: Recipe, seed: int) -> Stage:
        """The stage of a recipe, after all that it needs; once, however often it is asked for."""
        args = self.args
        folder = Path(args.output_dir) / f"seed_{seed}" / recipe.name
        if folder in self.stages:
            return self.stages[folder]
        bases = {TEACHER: args.teacher, STUDENT: args.student}
        sources = {"model": recipe.model} | ({"teacher": recipe.teacher} if recipe.teacher else {})
        models = {
            flag: self.train(source, seed) if isinstance(source, Recipe) else bases[source]
            for flag, source in sources.items()
        }
        wiring = {"dataset": args.dataset, "split": recipe.split}
        wiring |= {"decontaminate": args.decontaminate}
        wiring |= {"eval_dataset": args.benchmarks[0], "seed": seed}
        more = {"settings": num_steps_of(recipe, self.preset)}
        if recipe.budget_of:
            more |= {"budget_flag": recipe.budget_flag}
            more |= {"budget_of": self.train(recipe.budget_of, seed).lineage()}
        stage = self.add(folder, recipe.kind, models, wiring, **more)
        if recipe.route:
            self.evaluate(recipe.route, recipe.name, title_of(recipe), seed, stage)
        return stage

    def evaluate(self, route: str, name: str, title: str, seed: int | None, model) -> None:
        """A row of the report. model: its name, or the stage whose final model it is."""
        root = Path(self.args.output_dir) / ("base" if seed is None else f"seed_{seed}")
        wiring = {"benchmarks": self.args.benchmarks, "seed": seed or 0}
        stage = self.add(root / f"eval_{name}", "evaluate", {"model": model}, wiring)
        self.evaluations.append(Evaluation(f"{route}/{name}", title, route, seed, stage))


def plan(args, preset: Preset, machine: Machine) -> tuple[list[Stage], list[Evaluation]]:
    """The stages of all routes and seeds, and the rows of the report."""
    planned = Workflow(args, preset, machine)
    for title, model in ((STUDENT, args.student), (TEACHER, args.teacher)):
        planned.evaluate("models", title.replace(" ", "_"), title, None, model)
    names = dict.fromkeys(args.routes)
    if "paper" in names:
        names |= dict.fromkeys(routes_of(args.teacher, ROUTES))
    names = ROUTES if "all" in names else [name for name in names if name != "paper"]
    for seed in args.seeds:
        for name in names:
            planned.train(ROUTES[name].last, seed)
    return list(planned.stages.values()), planned.evaluations
