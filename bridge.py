r"""The workflow: sparse reward on the teacher, dense transfer to the student, sparse reward again.

    route   stages (label uses in brackets)
    half    teacher GRPO on 1H [reward] -> FKL warmup -> OPD on 1H -> student GRPO on 2H [reward]
    cold    student GRPO on 1H and 2H, with as many label uses as both GRPO stages of `half`

Each stage is a child process whose printed command line can be run by itself. It leaves a manifest
and is skipped on the next call. Base models and every stage's result are evaluated; the end is a
table, and report.md, report.png and results.json in OUTPUT_DIR/seed_SEED.

    python bridge.py                                             # the toy, on a CPU, in minutes
    python bridge.py --teacher Qwen/Qwen3-8B --dry_run           # the plan: commands and settings
    python bridge.py --teacher Qwen/Qwen3-8B                     # student Qwen/Qwen3-1.7B, DAPO
"""

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.data import default_decontamination
from common.run import (
    ROOT,
    RunFailure,
    Stopped,
    UserError,
    check,
    check_ranges,
    start,
    write_atomic,
    write_json,
)


@dataclass
class Args:
    teacher: str = "toy/teacher"
    """the large model: a local folder or a hub id"""
    student: str | None = None
    """the small model; by itself toy/student, or Qwen/Qwen3-1.7B for a larger Qwen3"""
    output_dir: str | None = None
    """by itself runs/bridge-TEACHER"""
    seed: int = 0
    """seed of every stage"""
    dry_run: bool = False
    """print every command and setting, run nothing"""
    dataset: str | None = None
    """training problems; by itself toy, or DAPO-Math-17k for other models"""
    benchmarks: tuple[str, ...] | None = None
    """what is evaluated; by itself toy, or math500 aime24 aime25"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where every stage runs"""
    backend: Literal["auto", "torch", "vllm"] = "auto"
    """what samples: transformers or vLLM; auto takes vLLM on a GPU"""

    num_steps: int | None = None
    """instead of the preset's, in every training stage (as the next four)"""
    prompts_per_step: int | None = None
    """prompts per step"""
    group_size: int | None = None
    """completions per prompt"""
    micro_batch_size: int | None = None
    """sequences per forward and backward"""
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

TOY_SHARED = {"prompts_per_step": ours(16), "group_size": ours(16)}
TOY_GRPO = TOY_SHARED | {"warmup_steps": ours(10)}
TOY_TRANSFER = TOY_SHARED | {"warmup_steps": ours(5)}
TOY: Preset = {
    "teacher_grpo": TOY_GRPO
    | {
        "num_steps": ours(40, "as many as warmup and OPD, so that cold GRPO gets as many updates"),
        "learning_rate": ours(2e-4),
    },
    "fkl_warmup": TOY_TRANSFER | {"num_steps": ours(15), "learning_rate": ours(7e-4)},
    "opd": TOY_TRANSFER | {"num_steps": ours(25), "learning_rate": ours(3e-4)},
    "student_grpo": TOY_GRPO | {"num_steps": ours(20), "learning_rate": ours(3e-4)},
    "evaluate": {"num_samples": paper(16), "temperature": ours(1.0, "as in training")},
}

REAL_SHARED = {
    "dtype": paper("bfloat16"),
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
    "micro_batch_size": paper(1),
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
    "micro_batch_size": paper(4),
}
REAL: Preset = {
    "teacher_grpo": REAL_GRPO,
    "fkl_warmup": REAL_TRANSFER | {"num_steps": ours(33, "a quarter of an epoch of a half")},
    "opd": REAL_TRANSFER | {"num_steps": ours(132, "the paper's 1 epoch of a half")},
    "student_grpo": REAL_GRPO,
    "evaluate": {
        "dtype": paper("bfloat16"),
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
    """One child process: its flags, and what the report needs to know of an evaluation."""

    name: str
    script: str
    folder: Path
    wiring: dict[str, object]  # flags that follow from the route
    settings: dict[str, Setting]  # flags that someone chose
    title: str = ""  # what the report calls the evaluated model
    route: str = ""
    trained_by: tuple[str, ...] = ()  # the stages behind it

    @property
    def flags(self) -> dict[str, object]:
        return self.wiring | {name: setting.value for name, setting in self.settings.items()}

    @property
    def command(self) -> list[str]:
        words = ["python", self.script]
        for name, value in self.flags.items():
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name}", *map(str, values)]
        return words

    @property
    def manifest(self) -> Path:
        return self.folder / ("results.json" if self.script == "evaluate.py" else "manifest.json")

    @property
    def final(self) -> str:
        return str(self.folder / "final")


# Flags of bridge.py that replace a preset's value in every stage whose script has them.
EVERYWHERE = ("max_prompt_tokens", "max_new_tokens", "dtype", "vllm_gpu_memory")
TRAINING = ("num_steps", "prompts_per_step", "group_size", "micro_batch_size", "learning_rate")
GRPO_ONLY = ("num_minibatches",)
EVALUATION = ("num_samples", "num_problems")


def fill_in(args: Args) -> Preset:
    """Set what follows from the teacher; returns the preset under the command line's overrides."""
    toy = args.teacher.startswith("toy/")
    if args.student is None:
        known = toy or args.teacher.startswith("Qwen/Qwen3-")
        check(known, f"there is no default student for teacher {args.teacher}; set --student")
        args.student = "toy/student" if toy else "Qwen/Qwen3-1.7B"
    args.dataset = args.dataset or ("toy" if toy else "open-r1/DAPO-Math-17k-Processed:all")
    args.benchmarks = args.benchmarks or (("toy",) if toy else ("math500", "aime24", "aime25"))
    args.output_dir = args.output_dir or f"runs/bridge-{Path(args.teacher).name}"
    preset: Preset = {}
    for kind, settings in (TOY if toy else REAL).items():
        names = EVERYWHERE + (EVALUATION if kind == "evaluate" else TRAINING)
        names += GRPO_ONLY if kind.endswith("grpo") else ()
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        overrides = {name: Setting(value, "command line") for name, value in given.items()}
        preset[kind] = settings | overrides
    return preset


def plan(args: Args, preset: Preset) -> list[Stage]:
    """The stages in order."""
    root = Path(args.output_dir) / f"seed_{args.seed}"
    held_out = (*args.benchmarks, *default_decontamination(args.dataset))
    held_out = tuple(dict.fromkeys(held_out))
    stages: list[Stage] = []
    places = {"device": args.device, "backend": args.backend}

    def train(name: str, kind: str, script: str, model: str, split: str, **own) -> Stage:
        wiring = {"model": model, **own, "dataset": args.dataset, "split": split}
        wiring |= {"decontaminate": held_out, "eval_dataset": args.benchmarks[0]}
        wiring |= {"seed": args.seed, **places, "output_dir": str(root / name)}
        stages.append(Stage(name, script, root / name, wiring, dict(preset[kind])))
        return stages[-1]

    def evaluate(name: str, model: str, title: str, route: str, *behind: Stage) -> None:
        wiring = {"model": model, "benchmarks": args.benchmarks, "seed": args.seed}
        wiring |= {**places, "output_dir": str(root / name)}
        names = tuple(stage.name for stage in behind)
        stage = Stage(name, "evaluate.py", root / name, wiring, preset["evaluate"])
        stage.title, stage.route, stage.trained_by = title, route, names
        stages.append(stage)

    evaluate("eval_student", args.student, "untrained student", "models")
    evaluate("eval_teacher", args.teacher, "raw teacher", "models")
    teacher = train("teacher_grpo", "teacher_grpo", "grpo.py", args.teacher, "1H")
    evaluate("eval_teacher_grpo", teacher.final, "RL teacher (1H)", "models", teacher)
    target = {"teacher": teacher.final}
    warmup = train("fkl_warmup", "fkl_warmup", "fkl_warmup.py", args.student, "1H", **target)
    evaluate("eval_fkl_warmup", warmup.final, "bridge: FKL warmup (1H)", "half", teacher, warmup)
    opd = train("opd", "opd", "opd.py", warmup.final, "1H", **target)
    evaluate("eval_opd", opd.final, "bridge: + OPD (1H)", "half", teacher, warmup, opd)
    last = train("student_grpo", "student_grpo", "grpo.py", opd.final, "2H")
    behind = (teacher, warmup, opd, last)
    evaluate("eval_student_grpo", last.final, "bridge: + GRPO (2H)", "half", *behind)
    cold = train("cold", "student_grpo", "grpo.py", args.student, "all")
    label_steps = sum(stage.flags["num_steps"] for stage in (teacher, last))
    cold.settings["num_steps"] = ours(label_steps, "the label uses of both GRPO stages")
    evaluate("eval_cold", cold.final, "cold GRPO (1H + 2H)", "cold", cold)
    return stages


def print_plan(stages: list[Stage]) -> None:
    for stage in stages:
        print(f"\n# {stage.name}\n{shlex.join(stage.command)}")
    print("\n# settings and who chose them; what is not listed is the script's default")
    seen = set()
    for stage in stages:
        kind = "evaluate" if stage.script == "evaluate.py" else stage.name
        for name, setting in stage.settings.items() if kind not in seen else ():
            why = f"{setting.source}: {setting.note}" if setting.note else setting.source
            print(f"{kind:14} {name:18} {setting.value!s:10} {why}")
        seen.add(kind)


def print_budget(stages: list[Stage]) -> None:
    """The most tokens that each training stage can generate."""
    print("\n# token budget: at most")
    for stage in stages:
        if stage.script != "evaluate.py":
            flags = {"max_new_tokens": 64} | stage.flags
            rollouts = flags["num_steps"] * flags["prompts_per_step"] * flags["group_size"]
            tokens = rollouts * flags["max_new_tokens"]
            print(f"{stage.name:14} {rollouts:>11,} completions {tokens:>18,} tokens")


# === run ===


def run_stage(stage: Stage) -> None:
    """Run one stage, its output on the terminal and in stage.log; stop the workflow if it fails."""
    shown = shlex.join(stage.command)
    if stage.manifest.exists():
        config = json.loads((stage.folder / "config.json").read_text())
        wanted = json.loads(json.dumps(stage.flags))
        differing = [name for name, value in wanted.items() if config.get(name) != value]
        check(
            not differing,
            f"{stage.folder} was finished with other settings ({', '.join(differing)}); "
            "choose another --output_dir",
        )
        print(f"\n# {stage.name}: finished before\n{shown}")
        return
    print(f"\n# {stage.name}\n{shown}", flush=True)
    log = stage.folder.with_name(stage.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / stage.script), *stage.command[2:]]
    with open(log, "ab") as file:
        # In a session of its own, so that Ctrl-C reaches it once: through us.
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        child = subprocess.Popen(command, **pipes, start_new_session=True)
        try:
            while piece := child.stdout.read1():
                file.write(piece)
                sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
            code = child.wait()
        except Stopped as stop:
            child.send_signal(stop.number)
            child.communicate()
            raise
    if code != 0 or not stage.manifest.exists():
        last = log.read_text(errors="replace").strip().splitlines()[-5:]
        kind = UserError if code == 2 else RunFailure
        raise kind(
            f"stage {stage.name} failed with exit code {code} ({' / '.join(last)}); log: {log}; "
            f"to retry: {shown}"
        )


# === report ===


def collect(stages: list[Stage]) -> list[dict]:
    """One row per evaluation: accuracy by benchmark, and what the stages behind it have used."""
    manifests = {
        stage.name: json.loads(stage.manifest.read_text()) | {"script": stage.script}
        for stage in stages
    }
    rows = []
    for stage in stages:
        if stage.script == "evaluate.py":
            behind = [manifests[name] for name in stage.trained_by]
            grpo = [manifest for manifest in behind if manifest["script"] == "grpo.py"]
            students = [
                m for n, m in zip(stage.trained_by, behind, strict=True) if "teacher" not in n
            ]
            benchmarks = manifests[stage.name]["benchmarks"]
            rows.append(
                {
                    "title": stage.title,
                    "route": stage.route,
                    "label_uses": sum(manifest["verifier_calls"] for manifest in grpo),
                    "student_steps": sum(manifest["step"] for manifest in students),
                    "generated_tokens": sum(manifest["generated_tokens"] for manifest in behind),
                    "seconds": sum(manifest["seconds"] for manifest in behind),
                    "benchmarks": benchmarks,
                }
            )
    return rows


NOTES = """
avg@k with 95% intervals over problems (cluster bootstrap); they do not hold the spread of training
seeds. Label uses: completions whose verdict was a reward. Student steps: rollout steps of the
student's stages. Tokens and seconds: all training stages behind the row.
"""
TOY_NOTE = """
The toy is built so that the paper's premise holds: it illustrates the mechanism, it is no evidence.
"""


def make_table(rows: list[dict]) -> str:
    """A markdown table that also reads well in a terminal."""
    names = list(rows[0]["benchmarks"])
    k = rows[0]["benchmarks"][names[0]]["num_samples"]
    header = ["model", *(f"{Path(name).stem} avg@{k}" for name in names)]
    header += ["label uses", "student steps", "tokens", "seconds"]
    lines = [header]
    for row in rows:
        cells = [row["title"]]
        for name in names:
            result = row["benchmarks"][name]
            low, high = result["accuracy_interval"]
            cells.append(f"{result['accuracy']:.1%} [{low:.1%}, {high:.1%}]")
        numbers = ("label_uses", "student_steps", "generated_tokens", "seconds")
        lines.append(cells + [f"{row[number]:,.0f}" for number in numbers])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy of each model with its interval, one panel a benchmark."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"models": "#8c8c8c", "half": "#1f6fb4", "cold": "#d9762b"}
    names = list(rows[0]["benchmarks"])
    height = 1.2 + 0.42 * len(rows)
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(2.6 + 4.6 * len(names), height), sharey=True, squeeze=False
    )
    for panel, name in zip(panels[0], names, strict=True):
        for y, row in enumerate(rows):
            result = row["benchmarks"][name]
            value, (low, high) = 100 * result["accuracy"], result["accuracy_interval"]
            errors = [[value - 100 * low], [100 * high - value]]
            panel.barh(y, value, xerr=errors, color=colours[row["route"]], height=0.62, capsize=3)
            panel.text(100 * high + 1.5, y, f"{value:.1f}", va="center", fontsize=9)
        panel.set_xlim(0, 112)
        panel.set_xticks(range(0, 101, 20))
        panel.set_xlabel(f"avg@{result['num_samples']} on {Path(name).stem}, %")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(rows)), [row["title"] for row in rows])
    panels[0][0].invert_yaxis()
    figure.suptitle("Accuracy after each stage, 95% intervals over problems", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def report(args: Args, stages: list[Stage], seconds: float) -> None:
    rows, folder = collect(stages), stages[0].folder.parent
    notes = NOTES + (TOY_NOTE if args.teacher.startswith("toy/") else "")
    table = make_table(rows)
    commands = "\n".join(shlex.join(stage.command) for stage in stages)
    title = f"# {args.teacher} to {args.student}, seed {args.seed}"
    text = f"{title}\n\n{table}\n{notes}\n![accuracy](report.png)\n\n```\n{commands}\n```\n"
    write_json(folder / "results.json", {"args": vars(args), "rows": rows})
    write_atomic(folder / "report.md", text)
    draw(rows, folder / "report.png")
    print(f"\n{table}\n{notes}\nreport: {folder}/report.md, report.png, results.json")
    print(f"total: {seconds:.0f} s")


def main(args: Args) -> None:
    check_ranges(args)
    stages = plan(args, fill_in(args))
    if args.dry_run:
        print_plan(stages)
        print_budget(stages)
        return
    began = time.perf_counter()
    print_budget(stages)
    for stage in stages:
        run_stage(stage)
    report(args, stages, time.perf_counter() - began)


if __name__ == "__main__":
    start(main, Args, __doc__)
