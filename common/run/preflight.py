"""The machine, looked at before anything is loaded: what would fail minutes later, in one line."""

import math
import os
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.run.errors import check

BFLOAT16 = 8.0  # the compute capability from which a GPU has it; torch emulates it below
MOST_ON_CPU = 1e9  # parameters


@dataclass(frozen=True)
class Facts:
    """What decides whether a machine's GPUs can be used, as nvidia-smi and torch tell it."""

    usable: bool = False  # by this torch
    listed: str = ""  # name and driver of each
    memory: float = 80e9  # bytes of the smallest
    free: float = 1.0  # share of the memory of the fullest
    capability: float = math.inf  # of the oldest
    compiler: str | None = None  # Triton builds its launchers with it,
    has_headers: bool = False  # from Python.h


def look() -> Facts:
    """Return the facts of this machine. (torch knows most of them too, but takes GPU memory to
    tell.)"""
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    facts = Facts(
        usable=torch.cuda.is_available(),
        compiler=next(filter(None, map(shutil.which, compilers)), None),
        has_headers=Path(sysconfig.get_path("include"), "Python.h").exists(),
    )
    tool, visible = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if tool is None or visible == "":
        return facts
    query = "--query-gpu=memory.total,memory.free,compute_cap,name,driver_version"
    command = [tool, query, "--format=csv,noheader,nounits", *(["-i", visible] if visible else [])]
    lines = subprocess.run(command, capture_output=True, encoding="utf-8").stdout.splitlines()
    rows = [line.split(", ", 3) for line in lines if line.count(", ") == 4]
    if not rows:
        return facts
    totals, frees, capabilities = zip(*(map(float, row[:3]) for row in rows), strict=True)
    return replace(
        facts,
        listed="; ".join(dict.fromkeys(row[3] for row in rows)),
        memory=2**20 * min(totals),
        free=min(free / total for free, total in zip(frees, totals, strict=True)),
        capability=min(capabilities),
    )


def check_gpu(device: str, dtype: str, facts: Facts) -> None:
    """Refuse a GPU on which a run with these flags would fail later. device: --device; auto takes
    the CPU, with a word, where torch cannot use the GPU that is there."""
    if device == "cpu":
        return
    if not facts.usable:
        why = "torch sees no GPU"
        if facts.listed:
            why = (
                f"nvidia-smi lists {facts.listed}, which torch {torch.__version__} cannot use: "
                "update the driver (CUDA 13: 580 or newer, for GPUs newer than a V100), or pip "
                "install -r requirements-gpu.txt, if that torch is a CPU build"
            )
        check(device == "auto", f"--device cuda, but {why}; or use --device cpu")
        if facts.listed:
            print(f"{why}; running on the CPU")
        return
    check(
        dtype != "bfloat16" or facts.capability >= BFLOAT16,
        f"this GPU, of compute capability {facts.capability}, has no bfloat16; use --dtype float32",
    )
    check(
        facts.compiler is not None and facts.has_headers,
        "on a GPU Triton needs a C compiler and Python.h: apt install gcc python3-dev, or name a "
        "compiler in CC",
    )


def check_size(name: str, num_parameters: int, device: str) -> None:
    """Refuse a large model where auto has found no GPU: a step would take hours."""
    slow = device == "auto" and not torch.cuda.is_available()
    check(
        not slow or num_parameters <= MOST_ON_CPU,
        f"{name} has {num_parameters / 1e9:.1f}B parameters, and torch sees no GPU; --device cpu "
        "insists",
    )
