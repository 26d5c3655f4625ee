"""A stage: one child process, its command, the stages that it needs, and whether it is finished."""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from common.run.errors import check
from common.run.folder import may_change, read_json
from common.run.inputs import has_weights, hash_of_source, inputs_of
from workflow.presets import Preset, Setting, as_words, script_args


@dataclass
class Stage:
    """A child process: its flags, and which stages must be finished before."""

    name: str
    kind: str  # of the preset
    script: str
    folder: Path
    fixed_flags: dict[str, object]  # flags that follow from the route
    settings: dict[str, Setting]  # flags that someone chose
    needs: list["Stage"] = field(default_factory=list)
    budget_flag: str | None = None  # --stop_at_tokens or --stop_at_flops,
    budget_of: list["Stage"] = field(default_factory=list)  # at what these stages have used
    launcher: tuple[str, ...] = ("python",)  # or torchrun and its flags

    @property
    def flags(self) -> dict[str, object]:
        flags = self.fixed_flags | {name: setting.value for name, setting in self.settings.items()}
        if self.budget_flag:
            flags[self.budget_flag] = self.budget()
        return flags

    def budget(self) -> float | str:
        """Return what the stages that it must match have used; before they are finished, their
        names."""
        quantity = self.budget_flag.removeprefix("stop_at_")
        if not all(stage.manifest.exists() for stage in self.budget_of):
            return f"<{quantity} of {', '.join(stage.name for stage in self.budget_of)}>"
        return sum(stage.used()[quantity] for stage in self.budget_of)

    @property
    def is_grpo(self) -> bool:
        return self.script == "grpo.py"

    @property
    def role(self) -> str:
        """Return which of the two models it trains; flags such as --teacher_lora_rank are for
        one."""
        return "teacher" if self.kind.startswith("teacher") else "student"

    def models(self, args) -> tuple[str, list[str], str]:
        """Return the names of the models that the trainer, run with these Args, trains, holds
        frozen beside, and samples from."""
        if self.is_grpo:  # with LoRA the reference is the model with its adapters off
            frozen = [args.model] if args.kl_coef > 0 and not args.lora_rank else []
            return args.model, frozen, args.model
        if self.script == "fkl_warmup.py":
            return args.model, [args.teacher], args.teacher
        frozen = [args.teacher, *[args.model] * (args.sample_from == "initial")]
        return args.model, frozen, args.model

    def used(self) -> dict[str, float]:
        """Generated tokens and FLOPs of a finished training stage, its teacher's included."""
        done = self.result()
        flops = done["flops"] + done["teacher_flops"]
        return {"tokens": done["generated_tokens"], "flops": flops}

    def result(self) -> dict:
        """Return what a finished stage has left: a trainer's manifest, or evaluate.py's results."""
        return read_json(self.manifest)

    def args(self):
        """Return its script's Args, with these flags."""
        return script_args(self.kind)(**self.flags)

    @property
    def argv(self) -> list[str]:
        """Return its flags, as they stand on the command line."""
        return [word for name, value in self.flags.items() for word in as_words(name, value)]

    @property
    def command(self) -> str:
        return shlex.join([*self.launcher, self.script, *self.argv])

    @property
    def manifest(self) -> Path:
        return self.folder / ("results.json" if self.script == "evaluate.py" else "manifest.json")

    @property
    def final(self) -> str:
        return str(self.folder / "final")

    def trained_by(self, model: str) -> "Stage | None":
        """Return the stage before it that has trained `model`, if one has."""
        return next((stage for stage in self.needs if stage.final == model), None)

    def base_model(self, model: str) -> str:
        """Return the base model that the checkpoint `model` comes from, whose shape it has."""
        stage = self.trained_by(model)
        return model if stage is None else stage.base_model(stage.fixed_flags["model"])

    def lineage(self) -> list["Stage"]:
        """Return every training stage that its model comes from, itself included, the first one
        first."""
        stages = [ancestor for stage in self.needs for ancestor in stage.lineage()]
        stages += [] if self.script == "evaluate.py" else [self]
        return list({stage.name: stage for stage in stages}.values())

    def deleted_models(self) -> list["Stage"]:
        """Return the finished stages whose final model is gone, and is needed to run this one; the
        first one first."""
        gone = [s for s in self.needs if s.manifest.exists() and not has_weights(s.final)]
        return [stage for s in gone for stage in (*s.deleted_models(), s)]

    def is_finished(self) -> bool:
        """Tell whether it was finished before, with the data that is there now. What is gone since,
        as a model that was deleted, is taken to be what it was. Raises UserError if it was finished
        with other settings, or with another model or task.

        False too if a dataset's file or commit is another one: whether its rows are others is for
        the script to say, which reads them."""
        if not self.manifest.exists():
            return False
        config = read_json(self.folder / "config.json")
        args = self.args()
        wanted, free = json.loads(json.dumps(vars(args))), may_change(type(args))
        differing = [k for k in wanted if k not in free and config.get(k) != wanted[k]]
        check(
            not differing,
            f"{self.folder} was finished with other settings ({', '.join(differing)}); "
            "choose another --output_dir",
        )
        now = inputs_of(args)
        replaced = [name for name in now if now[name] not in (None, config.get(name))]
        check(
            not replaced,
            f"{self.folder} was finished with other files ({', '.join(replaced)}): what lies there "
            "now was put there since; choose another --output_dir",
        )
        sources = config.get("sources", {})
        moved = [name for name in sources if hash_of_source(name) not in (None, sources[name])]
        if moved:
            print(f"{', '.join(moved)}: not the file or the commit that {self.name} has read")
        return not moved


# === what --dry_run shows ===


def print_plan(stages: list[Stage], preset: Preset) -> None:
    """Print each command, then each setting with its source."""
    for stage in stages:
        print(f"\n# {stage.name}\n{stage.command}")
    print("\n# settings and who chose them; what is not listed is the script's default")
    listed = [(stage.kind, preset[stage.kind]) for stage in stages]
    for stage in stages:
        of_kind = preset[stage.kind].items()
        listed.append((stage.name, dict(s for s in stage.settings.items() if s not in of_kind)))
    lines = [
        f"{where:22} {name:18} {setting.value!s:10} {setting.source}"
        + (f": {setting.note}" if setting.note else "")
        for where, settings in listed
        for name, setting in settings.items()
    ]
    print("\n".join(dict.fromkeys(lines)))  # a kind's settings once
