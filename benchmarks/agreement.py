r"""The gradient of a whole update beside TRL's own code, and beside verl's formulas.

Ours is `backward` of each trainer, over several micro-batches and chunks of the head. TRL's is
`training_step` of its GRPOTrainer or DistillationTrainer, once a micro-batch: its shuffle, loss,
normaliser and backward; only what it would sample and score is given. verl is not installed: what
its verl/trainer/ppo/core_algos.py computes (verl-project/verl at 1dda039b) is written down here.

All get the same weights and the same rollouts of the toy models. GRPO's policy has moved since it
sampled, so that tokens are clipped. Relative difference: |ours - theirs| / |theirs|, of the
gradients of all weights as one vector. In float32 it is mostly the rounding of the models' layers,
so it is taken with layers in float64 too. Exit code 1 if a row is above 1e-5 there, or above 1e-4
in float32.

Shape key: N rollouts, C tokens of the longest completion.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.agreement                               # a good minute on one core
"""

import random
import sys
import tempfile
from collections.abc import Iterator
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
from common.model.load import load_for_training
from common.model.tokenizer import load_tokenizer
from common.run.process import start
from common.sampling.rollout import Rollout
from common.sampling.sampler import sample_and_verify
from common.sampling.torch_engine import TorchEngine
from common.tasks import data
from common.tasks.task import Task

LIMITS = {torch.float32: 1e-4, torch.float64: 1e-5}  # by the type of the layers
PROMPTS, TRL_STEPS = 16, 4
SIZES = {"group_size": 8, "micro_batch_tokens": 1500, "chunk_size": 100}
GRPO = [{}, {"kl_coef": 0.0}, {"kl_coef": 0.1}, {"loss_agg": "sequence"}]
GRPO += [{"loss_agg": "dr_grpo", "advantage_norm": "none"}, {"clip_high": 0.28, "temperature": 0.7}]
OPD = [{}, {"temperature": 0.7}, {"divergence": "forward_kl"}, {"divergence": "jsd"}]
FKL = [{}, {"temperature": 0.7}]
LOSS_TYPE = {"token": "dapo", "sequence": "grpo", "dr_grpo": "dr_grpo"}  # TRL's name of --loss_agg
BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}  # TRL's number for --divergence
AS_OURS = ("loss_type", "scale_rewards", "importance_sampling_level", "epsilon", "temperature")
Batch = dict[str, torch.Tensor]
Update = tuple[float, torch.Tensor]  # a loss, and the gradients of all weights as one vector
Row = tuple[str, Update, Update]  # algorithm, peer and setting; ours; theirs


@dataclass
class Args:
    seed: int = 0
    """seed of the problems, the samples and the noise"""
    noise: float = 0.02
    """how far GRPO's policy moves after it sampled: a share of each tensor's standard deviation"""


# === models and rollouts ===


def moved(model, noise: float):
    """A copy with noise on every weight."""
    copy = deepcopy(model)
    with torch.no_grad():
        for weight in copy.parameters():
            weight += noise * weight.std() * torch.randn_like(weight)
    return copy


def float32_output(layers, args, output):
    """A hook: what layers in another type hand to the head."""
    output.last_hidden_state = output.last_hidden_state.float()
    return output


def count_positions(layers, args, kwargs):
    """A hook: positions without the padding on the left. In exact arithmetic to count it changes
    nothing, but transformers' rotary angles are float32."""
    positions = (kwargs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return args, kwargs | {"position_ids": positions}


def for_peer(model):
    """A copy as transformers loads it, for rows with padding on the left."""
    copy = AutoModelForCausalLM.from_pretrained(model.name_or_path, dtype=torch.float32)
    copy.load_state_dict(model.state_dict())
    copy.base_model.register_forward_pre_hook(count_positions, with_kwargs=True)
    copy.base_model.register_forward_hook(float32_output)
    return copy.to(model.dtype)


def sample(model, seed: int) -> list[Rollout]:
    """N graded rollouts: of sums as the toy's, but some numbers have one digit, so that prompts are
    of unequal lengths."""
    rng, tokenizer, args = random.Random(seed), load_tokenizer("toy/teacher"), grpo.Args(**SIZES)
    sums = [[rng.randint(1, 99) for _ in range(5)] for _ in range(PROMPTS)]
    rows = [{"problem": "+".join(map(str, each)), "answer": str(sum(each))} for each in sums]
    engine = TorchEngine(deepcopy(model), tokenizer)  # it gives its model another attention
    with Task() as task:
        prompts = data.render_prompts(tokenizer, task.problems(rows, "sums"), args)
        sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
        return sample_and_verify(engine, task, prompts, args.group_size, seed=(seed,), **sampling)


def padded(rollouts: list[Rollout]) -> Batch:
    """Ids and masks of N prompts, padded on the left, and of N completions, on the right."""
    batch = {}
    for part, side in (("prompt", "left"), ("completion", "right")):
        rows = [torch.tensor(getattr(rollout, f"{part}_ids")) for rollout in rollouts]
        batch[f"{part}_ids"] = pad_sequence(rows, True, padding_side=side)
        rows = [torch.ones_like(row) for row in rows]
        batch[f"{part}_mask"] = pad_sequence(rows, True, padding_side=side)
    return batch | {"num_items_in_batch": batch["completion_mask"].sum()}


def logprobs_of(model, batch: Batch, temperature: float) -> torch.Tensor:
    """Log-probs [N, C] of the completions' tokens, without chunks."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    hidden = hidden[:, batch["prompt_ids"].shape[1] - 1 : -1]
    logits = hidden @ model.get_output_embeddings().weight.T.to(hidden.dtype) / temperature
    return logits.log_softmax(-1).gather(-1, batch["completion_ids"][:, :, None]).squeeze(-1)


@torch.no_grad()
def scored(models: dict, rollouts: list[Rollout], args: grpo.Args, epsilon: float = 1e-6) -> Batch:
    """Return the inputs of GRPO's peers: `padded`, log-probs of two models [N, C], and advantages
    [N] after verl's compute_grpo_outcome_advantage."""
    batch = padded(rollouts)
    for name in ("old", "ref"):
        logprobs = logprobs_of(for_peer(models[name]), batch, args.temperature)
        batch[f"{name}_per_token_logps"] = logprobs
    rewards = torch.tensor([r.verdict.reward for r in rollouts]).view(-1, args.group_size)
    scale = rewards.std(1, keepdim=True) + epsilon if args.advantage_norm == "std" else 1.0
    return batch | {"advantages": ((rewards - rewards.mean(1, keepdim=True)) / scale).flatten()}


# === updates ===


def gradient_of(model) -> torch.Tensor:
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


def our_grpo(models: dict, rollouts: list[Rollout], args: grpo.Args) -> tuple[Update, int]:
    """Also how many tokens were clipped."""
    policy, rollouts = deepcopy(models["policy"]), [replace(rollout) for rollout in rollouts]
    grpo.set_advantages(rollouts, args)
    grpo.set_logprobs("old_logprobs", models["old"], rollouts, args)
    if args.kl_coef > 0:
        grpo.set_logprobs("ref_logprobs", models["ref"], rollouts, args)
    metrics = grpo.backward(policy, rollouts, args)
    tokens = sum(len(rollout.completion_ids) for rollout in grpo.with_gradient(rollouts, args))
    clipped = round(metrics["policy/clip_fraction"] * tokens)
    return (metrics["loss/total"], gradient_of(policy)), clipped


def trl_update(kind: type, config: type, batch: Batch, args, own: dict, **models) -> Update:
    """`own`: the settings that only this config has."""
    size = len(batch["prompt_ids"]) // TRL_STEPS
    own |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": TRL_STEPS}
    own |= {"max_completion_length": args.max_new_tokens, "temperature": args.temperature}
    own |= {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none"}
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(
            args=config(output_dir=folder, **own),
            train_dataset=Dataset.from_dict({"prompt": [""]}),
            processing_class=load_tokenizer("toy/teacher"),
            **models,
        )
    trainer._generate_and_score_completions = lambda _: batch
    trainer.current_gradient_accumulation_steps = TRL_STEPS
    losses = [trainer.training_step(trainer.model, None, None) for _ in range(TRL_STEPS)]
    return sum(losses).item(), gradient_of(trainer.model)


def trl_grpo(model, batch: Batch, args: grpo.Args, bias_correction: bool = False) -> Update:
    own = {"loss_type": LOSS_TYPE[args.loss_agg], "num_generations": args.group_size}
    own |= {"epsilon": args.clip_low, "epsilon_high": args.clip_high}
    own |= {"beta": args.kl_coef, "use_bias_correction_kl": bias_correction}
    models = {"model": for_peer(model), "reward_funcs": len}  # a reward that nothing calls
    return trl_update(GRPOTrainer, GRPOConfig, batch, args, own, **models)


def verl_grpo(model, batch: Batch, args: grpo.Args, dual_clip=1e9, k3_limit=1e9) -> Update:
    """After compute_policy_loss_vanilla, kl_penalty_forward (low_var_kl) and agg_loss. verl's own
    limits are 3 (clip_ratio_c) and 10; its loss_scale_factor is max_new_tokens here."""
    model, mask, advantages = for_peer(model), batch["completion_mask"], batch["advantages"]
    logprobs, gain = logprobs_of(model, batch, args.temperature), advantages[:, None]
    ratio = (logprobs - batch["old_per_token_logps"]).clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    losses = torch.maximum(-gain * ratio, -gain * clipped)
    losses = torch.where(gain < 0, torch.minimum(losses, -gain * dual_clip), losses)
    log_ratio = (batch["ref_per_token_logps"] - logprobs).clamp(-20, 20)
    k3 = (log_ratio.exp() - log_ratio - 1).clamp(-k3_limit, k3_limit)
    losses = (losses + args.kl_coef * k3) * mask
    loss = {
        "token": losses.sum() / mask.sum(),  # token-mean
        "sequence": (losses.sum(1) / (mask.sum(1) + 1e-8)).mean(),  # seq-mean-token-mean
        "dr_grpo": losses.sum(1).mean() / args.max_new_tokens,  # seq-mean-token-sum-norm
    }[args.loss_agg]
    loss.backward()
    return loss.item(), gradient_of(model)


# === comparisons ===


def compare_grpo(models: dict, rollouts: list[Rollout]) -> Iterator[Row]:
    for changes in GRPO:
        args = grpo.Args(**SIZES, **changes)
        (ours, clipped), batch = our_grpo(models, rollouts, args), scored(models, rollouts, args)
        setting = f"{shown(changes)} ({clipped} tokens clipped)"
        yield f"GRPO | TRL | {setting}", ours, trl_grpo(models["policy"], batch, args)
        yield f"GRPO | verl | {setting}", ours, verl_grpo(models["policy"], batch, args)


def compare_distillation(module, models: dict, rollouts: list[Rollout]) -> Iterator[Row]:
    batch, name = padded(rollouts), "OPD" if module is opd else "FKL"
    for changes in OPD if module is opd else FKL:
        args, student = module.Args(**SIZES, **changes), deepcopy(models["student"])
        loss = module.backward(student, models["teacher"], rollouts, args)["loss/total"]
        own = {"beta": BETA[getattr(args, "divergence", "forward_kl")]}
        peers = {"model": for_peer(student), "teacher_model": for_peer(models["teacher"])}
        theirs = trl_update(DistillationTrainer, DistillationConfig, batch, args, own, **peers)
        yield f"{name} | TRL | {shown(changes)}", (loss, gradient_of(student)), theirs


def compare_defaults(models: dict, rollouts: list[Rollout]) -> Iterator[Row]:
    """Compare what a peer does by default and the other comparisons leave out, each alone."""
    args, policy = grpo.Args(**SIZES, kl_coef=0.1), models["policy"]
    (ours, _), batch = our_grpo(models, rollouts, args), scored(models, rollouts, args)
    yield "GRPO | TRL | KL times the ratio", ours, trl_grpo(policy, batch, args, True)
    other = scored(models, rollouts, args, 1e-4)
    yield "GRPO | TRL | std + 1e-4, not 1e-6", ours, trl_grpo(policy, other, args)
    yield "GRPO | verl | dual clip at 3", ours, verl_grpo(policy, batch, args, dual_clip=3.0)
    yield "GRPO | verl | k3 clamped at 10", ours, verl_grpo(policy, batch, args, k3_limit=10.0)


def shown(changes: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in changes.items()) or "defaults"


def measured(rows: Iterator[Row]) -> dict[str, tuple[float, float, float]]:
    """Relative difference of the gradients, and both losses."""
    return {
        name: (((ours[1] - theirs[1]).norm() / theirs[1].norm()).item(), ours[0], theirs[0])
        for name, ours, theirs in rows
    }


def show(found: list[dict[str, tuple[float, float, float]]]) -> None:
    print("\n| algorithm | beside | setting | difference | float64 layers | loss ours | theirs |")
    print("|---|---|---|---|---|---|---|")
    for name, (relative, ours, theirs) in found[0].items():
        print(f"| {name} | {relative:.1e} | {found[1][name][0]:.1e} | {ours:.6f} | {theirs:.6f} |")


def main(args: Args) -> None:
    torch.manual_seed(args.seed)
    models = {
        name: load_for_training(f"toy/{name}", grpo.Args(), torch.device("cpu"), trainable=True)
        for name in ("teacher", "student")
    }
    models["ref"], models["old"] = models["teacher"], moved(models["teacher"], args.noise)
    models["policy"] = moved(models["old"], args.noise)
    drawn = {name: sample(models[name], args.seed) for name in ("old", "student", "teacher")}
    tokens = [sum(len(rollout.completion_ids) for rollout in rows) for rows in drawn.values()]
    print(f"seed {args.seed}, noise {args.noise}; tokens of GRPO, OPD and FKL: {tokens}")
    agree, differ = [], []
    for dtype in LIMITS:
        cast = {name: deepcopy(model).to(dtype) for name, model in models.items()}
        for name in ("ref", "old", "policy"):  # grpo.py's loss takes no float64
            cast[name].base_model.register_forward_hook(float32_output)
        agree.append(measured(compare_grpo(cast, drawn["old"])))
        agree[-1] |= measured(compare_distillation(opd, cast, drawn["student"]))
        agree[-1] |= measured(compare_distillation(fkl_warmup, cast, drawn["teacher"]))
        differ.append(measured(compare_defaults(cast, drawn["old"])))
    show(agree)
    print("\nOn purpose otherwise, each alone, kl_coef 0.1:")
    show(differ)
    print(f"\nkl_coef by default {grpo.Args.kl_coef}, TRL's beta {GRPOConfig.beta}, verl's none")
    print("TRL's as ours:", ", ".join(f"{name} {getattr(GRPOConfig, name)}" for name in AS_OURS))
    for (dtype, limit), rows in zip(LIMITS.items(), agree, strict=True):
        above = [f"{name}: {row[0]:.1e}" for name, row in rows.items() if not row[0] <= limit]
        if above:
            sys.exit(f"above {limit} in {dtype}: {'; '.join(above)}")


if __name__ == "__main__":
    start(main, Args, __doc__)
