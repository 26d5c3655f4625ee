r"""The gradient of a whole update beside TRL's own code, and beside verl's formulas.

Same weights and rollouts, of the toy models, in float32; prompts and completions of unequal lengths,
some cut off. Ours: `backward` of each trainer, in several micro-batches and chunks of the head. TRL:
`training_step` of its GRPOTrainer and DistillationTrainer, once a micro-batch: its shuffle, loss,
normaliser and backward; only what it would sample and score is given. verl is not installed: what
its verl/trainer/ppo/core_algos.py computes (verl-project/verl at 1dda039b) is written down here, over
transformers' own logits.

GRPO's policy has moved since it sampled, so that tokens are clipped. Relative difference: |ours -
theirs| / |theirs|, of the gradients of all weights as one vector. Exit code 1 if one is above 1e-5.

Shape key: N rollouts, P tokens of the longest prompt, C of the longest completion.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.agreement                                       # a minute on one core
"""

import random
import sys
import tempfile
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

import fkl_warmup
import grpo
import opd
from common import data
from common.model import load_for_training, load_tokenizer
from common.rollout import Rollout
from common.sampler import sample_and_verify
from common.start import start
from common.task import Task
from common.torch_engine import TorchEngine

LIMIT, TEACHER = 1e-5, "toy/teacher"
PROMPTS, TRL_MICRO_BATCHES = 16, 4
SIZES = {"group_size": 8, "max_new_tokens": 49, "micro_batch_tokens": 1500, "chunk_size": 100}
# --loss_agg: TRL's loss_type, verl's loss_agg_mode
NAMES = {
    "token": ("dapo", "token-mean"),
    "sequence": ("grpo", "seq-mean-token-mean"),
    "dr_grpo": ("dr_grpo", "seq-mean-token-sum-norm"),
}
GRPO = [
    {},
    {"kl_coef": 0.0},
    {"kl_coef": 0.1},
    {"loss_agg": "sequence"},
    {"loss_agg": "dr_grpo", "advantage_norm": "none"},
    {"clip_high": 0.28, "temperature": 0.7},
]
OPD = [{}, {"temperature": 0.7}, {"divergence": "forward_kl"}, {"divergence": "jsd"}]
FKL = [{}, {"temperature": 0.7}]
BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}  # DistillationTrainer's name for each
Batch = dict[str, torch.Tensor]
Update = tuple[float, torch.Tensor]  # loss and gradient


@dataclass
class Args:
    seed: int = 0
    """seed of the problems, the samples and the noise"""
    noise: float = 0.02
    """how far GRPO's policy moves after it sampled: a share of each tensor's standard deviation"""


# === models and rollouts ===


def toy_model(name: str):
    return load_for_training(name, grpo.Args(), torch.device("cpu"), trainable=True)


def moved(model, noise: float):
    """A copy with noise on every weight."""
    copy = deepcopy(model)
    with torch.no_grad():
        for weight in copy.parameters():
            weight += noise * weight.std() * torch.randn_like(weight)
    return copy


def plain(model):
    """A copy, as transformers loads it, for a peer."""
    copy = AutoModelForCausalLM.from_pretrained(model.name_or_path, dtype=torch.float32)
    copy.load_state_dict(model.state_dict())
    return copy


def sample(model, args: Args) -> list[Rollout]:
    """N graded rollouts: sums as the toy's, with some numbers of one digit for prompts of unequal
    lengths."""
    rng, flags, tokenizer = random.Random(args.seed), grpo.Args(**SIZES), load_tokenizer(TEACHER)
    sums = [[rng.randint(1, 99) for _ in range(5)] for _ in range(PROMPTS)]
    rows = [{"problem": "+".join(map(str, each)), "answer": str(sum(each))} for each in sums]
    engine = TorchEngine(deepcopy(model), tokenizer)  # it gives its model another attention
    with Task() as task:
        prompts = data.render_prompts(tokenizer, task.problems(rows, "sums"), flags)
        return sample_and_verify(engine, task, prompts, flags.group_size, flags, (args.seed,))


def padded(rollouts: list[Rollout]) -> Batch:
    """As TRL and verl lay them out: ids and masks of prompts [N, P], padded on the left, and of
    completions [N, C], padded on the right."""
    batch = {}
    for part, side in (("prompt", "left"), ("completion", "right")):
        rows = [torch.tensor(getattr(rollout, f"{part}_ids")) for rollout in rollouts]
        batch[f"{part}_ids"] = pad_sequence(rows, True, padding_side=side)
        rows = [torch.ones_like(row) for row in rows]
        batch[f"{part}_mask"] = pad_sequence(rows, True, padding_side=side)
    return batch | {"num_items_in_batch": batch["completion_mask"].sum()}


def gradient_of(model) -> torch.Tensor:
    """The gradients of all weights as one vector."""
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


# === ours ===


def our_grpo(models: dict, rollouts: list[Rollout], args: grpo.Args) -> tuple[Update, int]:
    """The update, and how many tokens it clipped."""
    rollouts, policy = [replace(rollout) for rollout in rollouts], deepcopy(models["policy"])
    grpo.set_advantages(rollouts, args)
    grpo.set_logprobs("old_logprobs", models["old"], rollouts, args)
    if args.kl_coef > 0:
        grpo.set_logprobs("ref_logprobs", models["ref"], rollouts, args)
    metrics = grpo.backward(policy, rollouts, args)
    used = grpo.with_gradient(rollouts, args)
    clipped = metrics["policy/clip_fraction"] * sum(len(r.completion_ids) for r in used)
    return (metrics["loss/total"], gradient_of(policy)), round(clipped)


def our_distillation(module, student, teacher, rollouts: list[Rollout], args) -> Update:
    student = deepcopy(student)
    loss = module.backward(student, teacher, rollouts, args)["loss/total"]
    return loss, gradient_of(student)


# === what the peers are given ===


def logprobs_of(model, batch: Batch, temperature: float) -> torch.Tensor:
    """Log-probs [N, C] of the completions' tokens, from transformers' own logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    logits = logits[:, batch["prompt_ids"].shape[1] - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, batch["completion_ids"][:, :, None]).squeeze(-1)


def advantages_of(rollouts: list[Rollout], args: grpo.Args, epsilon: float) -> torch.Tensor:
    """[N], after verl's compute_grpo_outcome_advantage."""
    rewards = torch.tensor([r.verdict.reward for r in rollouts]).view(-1, args.group_size)
    scale = rewards.std(1, keepdim=True) + epsilon if args.advantage_norm == "std" else 1.0
    return ((rewards - rewards.mean(1, keepdim=True)) / scale).flatten()


@torch.no_grad()
def scored(models: dict, rollouts: list[Rollout], args: grpo.Args, epsilon=1e-6) -> Batch:
    """`padded`, with advantages [N] and the log-probs [N, C] of two models."""
    batch = padded(rollouts)
    old, ref = (logprobs_of(plain(models[k]), batch, args.temperature) for k in ("old", "ref"))
    own = {"old_per_token_logps": old, "ref_per_token_logps": ref}
    return batch | own | {"advantages": advantages_of(rollouts, args, epsilon)}


# === TRL ===


def trl_update(kind: type, config: type, batch: Batch, args, own: dict, **models) -> Update:
    """One optimizer step's worth of TRL's training_step. `own`: what only this config has."""
    size = len(batch["prompt_ids"]) // TRL_MICRO_BATCHES
    with tempfile.TemporaryDirectory() as folder:
        settings = config(
            output_dir=folder,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=TRL_MICRO_BATCHES,
            max_completion_length=args.max_new_tokens,
            temperature=args.temperature,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            **own,
        )
        unused, tokenizer = Dataset.from_dict({"prompt": [""]}), load_tokenizer(TEACHER)
        trainer = kind(args=settings, train_dataset=unused, processing_class=tokenizer, **models)
    trainer._generate_and_score_completions = lambda _: batch
    trainer.current_gradient_accumulation_steps = TRL_MICRO_BATCHES
    losses = [trainer.training_step(trainer.model, None, None) for _ in range(TRL_MICRO_BATCHES)]
    return sum(losses).item(), gradient_of(trainer.model)


def trl_grpo(model, batch: Batch, args: grpo.Args, **changes) -> Update:
    own = {
        "num_generations": args.group_size,
        "loss_type": NAMES[args.loss_agg][0],
        "beta": args.kl_coef,
        "epsilon": args.clip_low,
        "epsilon_high": args.clip_high,
        "use_bias_correction_kl": False,
    }
    models = {"model": plain(model), "reward_funcs": len}  # a reward that nothing calls
    return trl_update(GRPOTrainer, GRPOConfig, batch, args, own | changes, **models)


def trl_distillation(student, teacher, batch: Batch, args) -> Update:
    own = {"beta": BETA[getattr(args, "divergence", "forward_kl")]}
    models = {"model": plain(student), "teacher_model": plain(teacher)}
    return trl_update(DistillationTrainer, DistillationConfig, batch, args, own, **models)


# === verl ===


def verl_grpo(model, batch: Batch, args: grpo.Args, clip_c=1e9, k3_limit=1e9) -> Update:
    """After compute_policy_loss_vanilla, kl_penalty_forward (low_var_kl) and agg_loss, the whole
    batch at once. verl's own clip_c (dual clip) is 3, and its k3_limit 10."""
    model, mask = plain(model), batch["completion_mask"]
    logprobs, advantages = logprobs_of(model, batch, args.temperature), batch["advantages"][:, None]
    ratio = (logprobs - batch["old_per_token_logps"]).clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped)
    dual = torch.minimum(losses, -advantages * clip_c)
    losses = torch.where(advantages < 0, dual, losses)
    log_ratio = (batch["ref_per_token_logps"] - logprobs).clamp(-20, 20)
    k3 = (log_ratio.exp() - log_ratio - 1).clamp(-k3_limit, k3_limit)
    losses = (losses + args.kl_coef * k3) * mask
    if args.loss_agg == "token":
        loss = losses.sum() / mask.sum()
    elif args.loss_agg == "sequence":
        loss = (losses.sum(1) / (mask.sum(1) + 1e-8)).mean()
    else:  # loss_scale_factor: as ours and TRL's
        loss = losses.sum(1).mean() / args.max_new_tokens
    loss.backward()
    return loss.item(), gradient_of(model)


# === tables ===


class Table:
    def __init__(self):
        self.differences: dict[str, float] = {}
        print("| algorithm | beside | setting | relative difference | loss, ours | loss, theirs |")
        print("|---|---|---|---|---|---|")

    def add(self, algorithm: str, beside: str, setting: dict | str, ours: Update, theirs: Update):
        if isinstance(setting, dict):
            setting = ", ".join(f"{k} {v}" for k, v in setting.items()) or "defaults"
        name = f"{algorithm} | {beside} | {setting}"
        difference = ((ours[1] - theirs[1]).norm() / theirs[1].norm()).item()
        self.differences[name] = difference
        print(f"| {name} | {difference:.1e} | {ours[0]:.7f} | {theirs[0]:.7f} |", flush=True)


def compare_grpo(table: Table, models: dict, rollouts: list[Rollout]) -> list[int]:
    """Returns how many tokens each setting clips."""
    counts = []
    for changes in GRPO:
        args = grpo.Args(**SIZES, **changes)
        ours, clipped = our_grpo(models, rollouts, args)
        batch = scored(models, rollouts, args)
        table.add("GRPO", "TRL", changes, ours, trl_grpo(models["policy"], batch, args))
        of_verl = f"verl, {NAMES[args.loss_agg][1]}"
        table.add("GRPO", of_verl, changes, ours, verl_grpo(models["policy"], batch, args))
        counts.append(clipped)
    return counts


def compare_distillation(table: Table, args: Args) -> None:
    student, teacher = toy_model("toy/student"), toy_model(TEACHER)
    cases = [
        ("OPD", opd, OPD, sample(student, args)),
        ("FKL", fkl_warmup, FKL, sample(teacher, args)),
    ]
    for name, module, settings, rollouts in cases:
        for changes in settings:
            flags = module.Args(**SIZES, **changes)
            ours = our_distillation(module, student, teacher, rollouts, flags)
            theirs = trl_distillation(student, teacher, padded(rollouts), flags)
            table.add(name, "TRL", changes, ours, theirs)


def what_differs(models: dict, rollouts: list[Rollout]) -> None:
    """What the settings above keep apart: its effect on this batch, with kl_coef 0.1."""
    print("\nOn purpose otherwise, each alone, kl_coef 0.1:\n")
    args, table, policy = grpo.Args(**SIZES, kl_coef=0.1), Table(), models["policy"]
    (ours, _), batch = our_grpo(models, rollouts, args), scored(models, rollouts, args)
    theirs = trl_grpo(policy, batch, args, use_bias_correction_kl=True)
    table.add("GRPO", "TRL", "its use_bias_correction_kl", ours, theirs)
    theirs = trl_grpo(policy, scored(models, rollouts, args, 1e-4), args)
    table.add("GRPO", "TRL", "its 1e-4 beside the standard deviation", ours, theirs)
    theirs = verl_grpo(policy, batch, args, clip_c=3.0)
    table.add("GRPO", "verl", "its dual clip at 3", ours, theirs)
    theirs = verl_grpo(policy, batch, args, k3_limit=10.0)
    table.add("GRPO", "verl", "its clamp of k3 at 10", ours, theirs)


def main(args: Args) -> None:
    torch.manual_seed(args.seed)
    models = {"ref": toy_model(TEACHER)}
    models["old"] = moved(models["ref"], args.noise)
    models["policy"] = moved(models["old"], args.noise)
    rollouts = sample(models["old"], args)
    tokens = [len(rollout.completion_ids) for rollout in rollouts]
    cut = sum(rollout.finish == "length" for rollout in rollouts)
    print(f"seed {args.seed}, noise {args.noise}; GRPO: {len(tokens)} rollouts, {cut} cut off")
    print(f"{sum(tokens)} tokens\n")
    table = Table()
    clipped = compare_grpo(table, models, rollouts)
    compare_distillation(table, args)
    print(f"\ntokens clipped in GRPO's rows: {clipped}")
    what_differs(models, rollouts)
    above = {k: v for k, v in table.differences.items() if not v <= LIMIT}
    if above:
        sys.exit("; ".join(f"{k}: {v:.1e} is above {LIMIT}" for k, v in above.items()))


if __name__ == "__main__":
    start(main, Args, __doc__)
