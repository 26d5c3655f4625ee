"""Report of SmolLM2 on examples/tasks/instructions.py: what each stage learned, what it forgot.

    python examples/smollm2.py
    TASK="--task examples/tasks/instructions.py --dtype bfloat16 --max_prompt_tokens 256"
    python grpo.py $TASK --model runs/smollm2/model --learning_rate 2e-5 --warmup_steps 3 \
        --temperature 0.7 --max_new_tokens 48 --kl_coef 0 --prompts_per_step 12 --group_size 8 \
        --num_steps 40 --output_dir runs/instructions_teacher
    python bridge.py $TASK --teacher runs/smollm2/model --student runs/smollm2/model \
        --trained_teacher runs/instructions_teacher/final --preset examples/instructions.json \
        --routes half --seeds 0 1 2 --output_dir runs/instructions
    python examples/instructions_report.py       # resumes

Prints two tables. One has the share of constraints that each model meets, by kind. The other has
two skills that no reward asked for: the sums and differences of examples/smollm2.py, avg@4 on 50
problems, and the mean log-prob of a token of Python's own documentation, in nats.
"""

import importlib
import inspect
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "tasks")]

from instructions import CONSTRAINTS, verdicts  # noqa: E402

from common.statistics import t_interval  # noqa: E402
from workflow.report import markdown  # noqa: E402

MODULES = """argparse bisect calendar cmd codeop collections contextlib copy csv datetime decimal
dis email enum fractions functools getpass glob heapq http imaplib inspect io ipaddress json locale
logging mailbox mimetypes numbers optparse os pathlib pickle platform pprint queue random re sched
secrets shelve shutil smtplib socket statistics string struct subprocess tempfile textwrap threading
timeit tokenize trace types typing unittest uuid warnings weakref xml zipfile"""
MAX_TOKENS = 128  # of each text


@dataclass
class Args:
    runs: Path = Path("runs/instructions")
    """what bridge.py has left"""
    model: Path = Path("runs/smollm2/model")
    """the untrained model"""
    teacher: Path = Path("runs/instructions_teacher/final")
    """its copy after GRPO"""
    problems: Path = Path("runs/smollm2/test.jsonl")
    """the sums and differences"""


def by_kind(evaluation: Path) -> dict[str, float]:
    """Return the share of constraints that are met in %: of all, and of each kind."""
    met: dict[str, list[bool]] = {"all": []} | {kind: [] for kind in CONSTRAINTS}
    for line in (evaluation / "samples" / "instructions.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        for kind, is_met in verdicts(row["completion"], row["answer"]).items():
            met[kind].append(is_met)
            met["all"].append(is_met)
    return {kind: 100 * statistics.fmean(values) for kind, values in met.items()}


def arithmetic(model: Path, problems: Path, folder: Path) -> float:
    flags = "--num_problems 50 --num_samples 4 --temperature 0.7 --max_new_tokens 48"
    flags += f" --dtype bfloat16 --model {model} --benchmarks {problems} --output_dir {folder}"
    subprocess.run([sys.executable, str(ROOT / "evaluate.py"), *flags.split()], check=True)
    (of_set,) = json.loads((folder / "results.json").read_bytes())["benchmarks"].values()
    return 100 * of_set["accuracy"]


@torch.no_grad()
def log_prob_of_prose(model_folder: Path) -> float:
    """Return the mean log-prob of a token in the first MAX_TOKENS of each module's docstring."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    logprobs = []
    for name in MODULES.split():
        text = inspect.getdoc(importlib.import_module(name)) or ""
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :MAX_TOKENS]
        if ids.shape[1] >= 32:
            logits = model(ids).logits[0, :-1]
            logprobs.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None]).flatten())
    return torch.cat(logprobs).mean().item()


def cell(values: list[float], digits: int = 1) -> str:
    """The mean over seeds, with its 95% interval if there are several."""
    reach = t_interval(values)
    shown = f" [{reach[0]:.{digits}f}, {reach[1]:.{digits}f}]" if reach else ""
    return f"{statistics.fmean(values):.{digits}f}{shown}"


def main(args: Args) -> None:
    seeds = sorted(args.runs.glob("seed_*"))
    stages = {
        "untrained": [(args.model, args.runs / "base" / "eval_untrained_student")],
        "GRPO (the teacher)": [(args.teacher, args.runs / "base" / "eval_trained_teacher")],
    }
    for stage in ("fkl_warmup", "opd", "student_grpo"):
        stages[stage] = [(seed / stage / "final", seed / f"eval_{stage}") for seed in seeds]
    shares = {name: [by_kind(e) for _, e in runs] for name, runs in stages.items()}
    rows = [
        [kind, *(cell([share[kind] for share in of_stage]) for of_stage in shares.values())]
        for kind in ("all", *CONSTRAINTS)
    ]
    print(markdown(["constraints met, %", *stages], rows))
    rows = []
    for name, runs in stages.items():
        sums = [arithmetic(m, args.problems, e.with_name(f"{e.name}_sums")) for m, e in runs]
        rows.append([name, cell(sums), cell([log_prob_of_prose(m) for m, _ in runs], 3)])
    print(markdown(["model", "arithmetic, avg@4 in %", "log-prob of a token of prose"], rows))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
