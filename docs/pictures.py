"""memory.svg and phases.svg: what is on the GPU in a step of OPD, by workflow/memory.py; clip.svg:
GRPO's loss of one token over its ratio, by grpo.loss_fn.

python docs/pictures.py
"""

import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import grpo
import opd
from workflow import memory
from workflow.memory import GB, Plan

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  behind the choice of a backend

INK = "#768390"  # read on a light page and on a dark one
ARGS = opd.Args(
    model="Qwen/Qwen3-1.7B",
    teacher="Qwen/Qwen3-8B",
    dtype="bfloat16",
    activation_checkpointing=True,
    micro_batch_tokens=18432,
    max_prompt_tokens=2048,
    max_new_tokens=16384,
    chunk_size=1024,
)
GPU = 80 * GB


def draw(plans: dict[str, tuple[Plan, str]], path: Path) -> None:
    """Draw one bar a row: the items of a plan that are on the GPU in one phase, in GB."""
    figure, axis = plt.subplots(figsize=(8.5, 0.9 * len(plans) + 2.0), layout="constrained")
    names = list(dict.fromkeys(i.name for plan, phase in plans.values() for i in of(plan, phase)))
    in_plan = dict.fromkeys(item.name for plan, _ in plans.values() for item in plan.items)
    colour = {name: f"C{number}" for number, name in enumerate(in_plan)}  # the same in each picture
    for row, (plan, phase) in enumerate(plans.values()):
        left = 0.0
        for item in of(plan, phase):
            axis.barh(row, item.size / GB, left=left, height=0.6, color=colour[item.name])
            left += item.size / GB
        axis.text(left + 0.5, row, f"{left:.0f} GB", va="center")
    axis.set_yticks(range(len(plans)), plans)
    axis.invert_yaxis()
    axis.set_xlabel("GB of one GPU: computed, not measured")
    axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def of(plan: Plan, phase: str) -> list:
    return [i for i in plan.items if i.where == "device" and i.phase in ("always", phase)]


def plan_of(args: opd.Args) -> Plan:
    student, teacher = (memory.shape_of(name) for name in (args.model, args.teacher))
    return memory.plan(args, student, [teacher], student, 1, GPU, loss_is_fused=False)


def draw_clipping(path: Path) -> None:
    """Draw minus the loss of a token over its ratio, for an advantage of 1 and of -1."""
    old, ratios = torch.tensor([0.3]).log(), torch.linspace(0.4, 1.8, 141)
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 2.8), layout="constrained")
    for axis, advantage in zip(axes, (1.0, -1.0), strict=True):
        gains = []
        for ratio in ratios:
            p = old.exp() * ratio
            logits, one = torch.cat([p, 1 - p]).log()[None], torch.tensor([advantage])
            word = torch.zeros(1).long()
            loss, _ = grpo.loss_fn(logits, word, one, torch.ones(1), old, old, None, grpo.Args())
            gains.append(-loss.item())
        axis.plot(ratios, advantage * ratios, ":", color=INK, label="ratio x advantage")
        axis.plot(ratios, gains, label="what GRPO maximises")
        axis.set(title=f"advantage {advantage:+g}", xlabel="ratio: new / old probability")
        axis.title.set_color(INK)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def main(folder: Path) -> None:
    plt.rcParams |= {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK}
    plt.rcParams |= {"ytick.color": INK, "axes.edgecolor": INK, "svg.hashsalt": "fixed"}
    draw_clipping(folder / "clip.svg")
    chunked = plan_of(ARGS)
    whole = plan_of(replace(ARGS, chunk_size=ARGS.micro_batch_tokens))
    heads = {f"head in chunks of {ARGS.chunk_size:,}": (chunked, "update")}
    heads |= {"all logits at once": (whole, "update")}
    draw(heads, folder / "memory.svg")
    phases = {
        "generate (vLLM awake)": (chunked, "sampling"),
        "update (asleep)": (chunked, "update"),
    }
    draw(phases, folder / "phases.svg")


if __name__ == "__main__":
    main(Path(__file__).parent)
