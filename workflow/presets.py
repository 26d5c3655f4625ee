"""The settings of each kind of stage, with their source, for the toy and for the paper's models.

Another preset is a JSON file, one of workflow/presets/ or a user's, laid over the one that fits the
teacher:

    python bridge.py --preset mine.json     # {"student_grpo": {"num_steps": 100, "kl_coef": 0.0}}

It names kinds of stages (KINDS) and flags of their scripts, {"value": ..., "source": ...} where
someone else chose a value; and teacher and student, for which it was made. Flags of bridge.py come
last.
"""

import importlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.model.tokenizer import lacks_chat_template
from common.run.errors import UserError, check, one_line
from common.run.process import parse
from common.tasks.data import default_decontamination, default_of
from common.tasks.task import Task

# Kind of stage -> its script, and the flags that make the kind.
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "teacher_grpo": ("grpo.py", {}),
    "teacher_sft": ("fkl_warmup.py", {"hard_labels": True, "correct_only": True}),
    "fkl_warmup": ("fkl_warmup.py", {}),
    "opd": ("opd.py", {}),
    "semi_opd": ("opd.py", {"sample_from": "initial"}),
    "sft_transfer": ("fkl_warmup.py", {"hard_labels": True}),
    "student_grpo": ("grpo.py", {}),
    "cold_grpo": ("grpo.py", {}),
    "evaluate": ("evaluate.py", {}),
}

FILES = Path(__file__).with_name("presets")  # presets by name: FILES/NAME.json
MODELS = ("teacher", "student")  # what a preset may name beside kinds of stages

# Of these kinds a user's file sets what it sets of the other, if it does not name them.
SET_LIKE = {"semi_opd": "opd", "cold_grpo": "student_grpo"}


@dataclass(frozen=True)
class Setting:
    """A flag's value, and who says so: the paper, its authors' public scripts, we, the command line
    or a user's file."""

    value: object
    note: str = ""
    source: str = "ours"


ours = Setting
paper = partial(Setting, source="paper")
scripts = partial(Setting, source="authors' scripts")

Preset = dict[str, dict[str, Setting]]  # kind of stage -> flag -> setting

TOY_SHARED = {
    "prompts_per_step": ours(12, "36 steps see most of 1H once"),
    "group_size": ours(16),
    "micro_batch_tokens": ours(2048, "small matrices stay in a processor's cache"),
    "warmup_steps": ours(5),
}
TOY_GRPO = TOY_SHARED | {
    "kl_coef": ours(0.0, "no reference model: groups whose rewards agree cost no update"),
}
TOY_TRANSFER = TOY_SHARED | {  # uses no labels: its prompts cost nothing
    "prompts_per_step": ours(192, "with 12 x 16, 24 x 8 and 48 x 4 every stage ended lower"),
    "group_size": ours(1),
}
TOY_UPDATES = ours(36, "as many as warmup and OPD, so that cold GRPO gets as many updates")
TOY_OPD = {"num_steps": ours(24), "learning_rate": ours(3e-4)}
TOY: Preset = {
    "teacher_grpo": TOY_GRPO | {"num_steps": TOY_UPDATES, "learning_rate": ours(3e-4)},
    "teacher_sft": TOY_SHARED
    | {"num_steps": ours(36, "the label uses of teacher_grpo"), "learning_rate": ours(2e-4)},
    "fkl_warmup": TOY_TRANSFER | {"num_steps": ours(12), "learning_rate": ours(5e-4)},
    "opd": TOY_TRANSFER | TOY_OPD,
    "semi_opd": TOY_TRANSFER | TOY_OPD,
    "sft_transfer": TOY_TRANSFER | {"learning_rate": ours(4e-4, "5e-4 was worse")},
    "student_grpo": TOY_GRPO
    | {"num_steps": ours(12), "learning_rate": ours(5e-5, "more costs skill that is there")},
    "cold_grpo": TOY_GRPO | {"learning_rate": ours(4e-4, "less and more were worse")},
    "evaluate": {"num_samples": paper(16), "temperature": ours(1.0, "as in training")},
}

REAL_SHARED = {
    "dtype": paper("bfloat16"),
    "activation_checkpointing": ours(True, "sequences of 19,000 tokens"),
    "learning_rate": paper(1e-6),
    "max_new_tokens": paper(16384),
    "chunk_size": ours(1024, "tokens of the head at once: 0.3 GB of logits at 152k words"),
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
    "group_size": paper(8, "later published transfers mostly take 1"),
    "temperature": paper(1.0),
    "max_prompt_tokens": paper(2048),
    "micro_batch_tokens": ours(2048 + 16384, "the paper's 4 sequences take 4 times the memory"),
}
OPD_STEPS = "the paper's 1 epoch of a half; Simple-OPD (2608.06802) settles in about 100"
REAL_OPD = {"num_steps": ours(132, OPD_STEPS)}
REAL: Preset = {
    "teacher_grpo": REAL_GRPO,
    "teacher_sft": REAL_TRANSFER | {"num_steps": ours(1320, "the label uses of teacher_grpo")},
    "fkl_warmup": REAL_TRANSFER
    | {"num_steps": ours(33, "a quarter of an epoch of a half; Simple-OPD: 40 to 175, of SFT")},
    "opd": REAL_TRANSFER | REAL_OPD,
    "semi_opd": REAL_TRANSFER | REAL_OPD,
    "sft_transfer": REAL_TRANSFER,
    "student_grpo": REAL_GRPO,
    "cold_grpo": REAL_GRPO,
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

# Flags of bridge.py that the workflow gives to each stage itself. Its others replace a preset's
# value, in every stage whose script has them.
GIVEN = {
    "teacher",
    "trained_teacher",
    "output_dir",
    "dataset",
    "benchmarks",
    "decontaminate",
    "device",
    "backend",
}


# Teacher, or how its name begins -> the student that the paper (or the toy) pairs it with.
STUDENTS = {
    "toy/": "toy/student",
    "Qwen/Qwen3-": "Qwen/Qwen3-1.7B",
    "meta-llama/Llama-3.3-70B-Instruct": "meta-llama/Llama-3.1-8B-Instruct",
}


def fill_in(args) -> None:
    """Set the flags of bridge.py whose default follows from the teacher."""
    if args.preset and args.teacher == "toy/teacher":
        named = read_file(args.preset)
        args.teacher = named.get("teacher", args.teacher)
        args.student = args.student or named.get("student")
    toy = args.teacher.startswith("toy/")
    if args.student is None:
        students = [s for family, s in STUDENTS.items() if args.teacher.startswith(family)]
        check(students, f"there is no default student for teacher {args.teacher}; set --student")
        args.student = students[0]
    if toy:  # on a GPU machine too: to start there takes longer than all of its sampling
        args.backend = "torch" if args.backend == "auto" else args.backend
        args.device = "cpu" if args.device == "auto" else args.device
    fill_in_data(args, toy)
    if args.chat_template is None and lacks_chat_template(args.student):
        args.chat_template = args.teacher
    named = (
        args.preset if args.preset and (FILES / f"{args.preset}.json").exists() else args.teacher
    )
    quick = "-quick" if args.quick else ""
    args.output_dir = args.output_dir or f"runs/bridge-{Path(named).name}{quick}"


def fill_in_data(args, toy: bool) -> None:
    """Set what is trained and evaluated on: the task's first dataset and benchmark; for mathematics
    and real models the paper's."""
    with Task(args.task or "math") as task:
        if args.task in (None, "math") and not toy:
            args.dataset = args.dataset or "open-r1/DAPO-Math-17k-Processed:all"
            args.benchmarks = args.benchmarks or ("math500", "aime24", "aime25")
        args.dataset = args.dataset or default_of(task, "datasets")
        args.benchmarks = args.benchmarks or (default_of(task, "benchmarks"),)
        held_out = args.decontaminate
        held_out = default_decontamination(task, args.dataset) if held_out is None else held_out
    args.decontaminate = tuple(dict.fromkeys((*args.benchmarks, *held_out)))


# With LoRA a script's rate is so many times the preset's.
LORA_RATES = {
    "grpo.py": (10, "LoRA Without Regret (Schulman et al., 2025)"),
    "fkl_warmup.py": (10, "LoRA Without Regret (Schulman et al., 2025)"),
    "opd.py": (2, "no source; more was better on the toy"),
}


def flags_of_role(args, kind: str, preset: dict[str, Setting]) -> dict[str, Setting]:
    """--teacher_lora_rank, --student_cpu_offload and so on, for a stage that trains the teacher or
    the student: the flags of its script, and with LoRA a rate that suits it."""
    rank, offload = args.student_lora_rank, args.student_cpu_offload
    if kind.startswith("teacher"):
        rank, offload = args.teacher_lora_rank, args.teacher_cpu_offload
    chosen: dict[str, Setting] = {}
    if kind == "evaluate":
        return chosen
    if offload:
        chosen["cpu_offload"] = Setting(True, source="command line")
    if rank:
        times, source = LORA_RATES[KINDS[kind][0]]
        chosen["lora_rank"] = Setting(rank, source="command line")
        if rate := preset.get("learning_rate"):
            note = f"{times} times {rate.value:g}: {source}"
            chosen["learning_rate"] = ours(float(f"{rate.value * times:g}"), note)
    return chosen


def preset_of(args) -> Preset:
    """Return the built-in preset, under the user's file, under the flags of bridge.py."""
    built_in = TOY if args.teacher.startswith("toy/") else REAL
    from_file = read_preset(args.preset) if args.preset else {}
    for kind, settings in read_preset("quick").items() if args.quick else ():
        from_file[kind] = from_file.get(kind, {}) | settings
    for kind, like in SET_LIKE.items():
        from_file[kind] = from_file.get(like, {}) | from_file.get(kind, {})
    chosen = {n: v for n, v in vars(args).items() if v is not None and n not in GIVEN}
    preset: Preset = {}
    for kind, settings in built_in.items():
        known = script_args(kind).__dataclass_fields__
        flags = {n: Setting(v, source="command line") for n, v in chosen.items() if n in known}
        of_role = flags_of_role(args, kind, settings)
        preset[kind] = settings | of_role | from_file.get(kind, {}) | flags
    return preset


def read_file(name: str) -> dict[str, object]:
    """Read a preset by its name or path. Raises UserError if it is none."""
    named = FILES / f"{name}.json"
    path = named if named.exists() else Path(name)
    try:
        content = json.loads(path.read_bytes())
        return {key: value if key in MODELS else dict(value) for key, value in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        names = ", ".join(sorted(file.stem for file in FILES.glob("*_day.json")))
        form = f"{names}, or a JSON object: kind of stage -> flag -> value"
        raise UserError(f"--preset {name} is not {form} ({one_line(error)})") from error


def read_preset(path: str) -> Preset:
    """Read the settings of a preset's file. Raises UserError for kinds and flags that there are
    not, and for values that a script would refuse."""
    preset: Preset = {}
    kinds = {key: value for key, value in read_file(path).items() if key not in MODELS}
    for kind, listed in kinds.items():
        pairs = {name: v if isinstance(v, dict) else {"value": v} for name, v in listed.items()}
        flags = {name: pair["value"] for name, pair in pairs.items()}
        there = f"there is no kind of stage {kind}; there are {', '.join(KINDS)}"
        check(kind in KINDS, f"{path}: {there}")
        try:
            words = [word for name, value in flags.items() for word in as_words(name, value)]
            parsed = parse(script_args(kind), "", words)
        except UserError as error:
            raise UserError(f"{path}: {kind}: {error}") from None
        preset[kind] = {
            flag: Setting(getattr(parsed, flag), pair.get("source", ""), Path(path).name)
            for flag, pair in pairs.items()
        }
    return preset


def script_args(kind: str) -> type:
    """Return the Args of the script of a kind of stage."""
    return importlib.import_module(KINDS[kind][0].removesuffix(".py")).Args


def as_words(flag: str, value: object) -> list[str]:
    """Return a flag as it stands on the command line."""
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no_{flag}"]
    return [f"--{flag}", *map(str, value if isinstance(value, tuple | list) else (value,))]
