"""The machine, looked at before anything is loaded: what would fail minutes later, in one line."""

import contextlib
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.run.errors import check

BFLOAT16 = 8.0  # the compute capability from which a GPU has it; torch emulates it below
MOST_ON_CPU = 1e9  # parameters


@dataclass(frozen=True)
class Facts:
    """The facts that decide whether a machine's GPUs can be used, by nvidia-smi and torch."""

    usable: bool = False  # by this torch
    listed: str = ""  # name and driver of each
    memory: float | None = None  # bytes of the smallest; None: not known
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
    rows = _rows_of_nvidia_smi()
    totals, frees, capabilities = ([_number(row[i]) for row in rows] for i in range(3))
    shares = [f / t for f, t in zip(frees, totals, strict=True) if f is not None and t]
    known = [2**20 * total for total in totals if total]
    return replace(
        facts,
        listed="; ".join(dict.fromkeys(row[3] for row in rows)),
        memory=min(known, default=None),
        free=min(shares, default=1.0),
        capability=min((c for c in capabilities if c), default=math.inf),
    )


def _rows_of_nvidia_smi() -> list[list[str]]:
    """Return memory, free memory, compute capability, and name with driver, of each visible GPU
    that is whole. Of a GPU in MIG mode torch alone knows its slices."""
    whole = _ask_nvidia_smi("mig.mode.current,memory.total,memory.free,compute_cap,name")
    if whole:
        return [fields for mig, *fields in whole if mig != "Enabled"]
    # An old driver refuses fields that it does not know.
    return [["", "", "", row[0]] for row in _ask_nvidia_smi("name")]


def _ask_nvidia_smi(fields: str) -> list[list[str]]:
    """Return the fields of each visible GPU, the driver's version with the last one; no rows
    without the tool, or if it does not know a field."""
    tool, visible = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if tool is None or visible == "":
        return []
    command = [tool, f"--query-gpu={fields},driver_version", "--format=csv,noheader,nounits"]
    command += ["-i", visible] if visible else []
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    commas = fields.count(",")
    lines = [line for line in done.stdout.splitlines() if line.count(", ") == commas + 1]
    return [line.split(", ", commas) for line in lines]


def _number(text: str) -> float | None:
    """Return a field's number; None for [N/A], as shared memory and slices of a GPU have."""
    with contextlib.suppress(ValueError):
        return float(text)
    return None


def check_gpu(device: str, dtype: str, facts: Facts | None = None) -> None:
    """Refuse a GPU on which a run with these flags would fail later. device: --device; auto takes
    the CPU, with a word, where torch cannot use the GPU that is there. facts: this machine's."""
    if device == "cpu":
        return
    facts = facts or look()
    if not facts.usable:
        why = why_unusable(facts)
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
        "on a GPU Triton needs a C compiler and Python.h: apt install gcc "
        f"python{sys.version_info.major}.{sys.version_info.minor}-dev, or name a compiler in CC",
    )


def why_unusable(facts: Facts) -> str:
    if not facts.listed:
        return "torch sees no GPU"
    return (
        f"nvidia-smi lists {facts.listed}, which torch {torch.__version__} cannot use: update the "
        "driver (CUDA 13: 580 or newer, for GPUs newer than a V100), or pip install -r "
        "requirements-gpu.txt, if that torch is a CPU build"
    )


def check_size(name: str, num_parameters: int, device: str) -> None:
    """Refuse a large model where auto has found no GPU: a step would take hours."""
    slow = device == "auto" and not torch.cuda.is_available()
    check(
        not slow or num_parameters <= MOST_ON_CPU,
        f"{name} has {num_parameters / 1e9:.1f}B parameters, and {why_unusable(look())}; --device "
        "cpu runs it here all the same",
    )
