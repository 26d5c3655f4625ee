r"""GRPO on verifier outcomes: sparse reward (Stage 1 on the teacher, Stage 3 on the student).

The policy samples G completions of each prompt, the verifier pays R_i in {0, 1}, and with
rho_t = pi(y_t) / pi_old(y_t) and r_t = ref(y_t) / pi(y_t)

    A_i = (R_i - mean R) / std R                              over the G completions of a prompt
    L = 1/Z sum_i sum_t [ -min(rho_t A_i, clip(rho_t, 1 - clip_low, 1 + clip_high) A_i)
                          + kl_coef (r_t - log r_t - 1) ]

after DeepSeekMath (arXiv 2402.03300); clip 0.2 and kl_coef 5e-4 are the paper's (2605.12483,
Table 9). What to know:
- Z is fixed before micro-batching: neither micro-batches nor chunks change the gradient.
- On the first pass over fresh rollouts rho is 1, and the loss is minus the advantage of the mean
  token: it shows whether right completions are longer, and nothing of the gradient. Watch
  rollout/accuracy and policy/entropy instead.
- The k3 term estimates KL(pi || ref), but its gradient on policy is that of KL(ref || pi).

Shape key: P prompts per step, G completions per prompt, N = P·G sequences, T tokens,
V vocabulary, D hidden size.

    python grpo.py                                                    # the toy teacher, on a CPU
    python grpo.py --model Qwen/Qwen3-1.7B --dataset open-r1/DAPO-Math-17k-Processed:all \
        --dtype bfloat16 --learning_rate 1e-6 --max_prompt_tokens 2048 --max_new_tokens 4096 \
        --micro_batch_tokens 8192 --output_dir runs/grpo-1.7b                         # on a GPU
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from tqdm import tqdm

import memory
from common import data, logprob
from common.model import (
    DTYPES,
    check_lengths,
    clip_grad_norm,
    forward_flops,
    keep_gradients,
    load_for_training,
    load_tokenizer,
)
from common.rollout import (
    Rollout,
    make_engine,
    resolve_backend,
    rollout_metrics,
    sample_and_verify,
)
from common.run import (
    Clock,
    Run,
    check,
    check_ranges,
    gather,
    join_ranks,
    max_over_ranks,
    mean,
    rank,
    start,
    sum_dicts_over_ranks,
    sum_over_ranks,
)
from common.verifier import Verifier

WATCHED = ("rollout/accuracy", "rollout/length")  # what the progress bar shows

# === arguments ===


@dataclass
class Args:
    # --- experiment ---
    output_dir: str = "runs/grpo"
    """the run's folder; the same command on it resumes"""
    seed: int = 0
    """seed of the data order and of every sample"""
    checkpoint_every: int = 20
    """steps between checkpoints; 0 saves none before the end"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints stay on disk"""
    save_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """type of the final model; auto is that of the files of --model"""
    eval_every: int = 0
    """steps between evaluations on --eval_dataset; 0 is off"""
    track: bool = False
    """also log to Weights & Biases"""
    dry_run: bool = False
    """print how much memory it takes, and stop"""
    gpu_memory_gb: float | None = None
    """of the GPU that --dry_run plans for; by itself the one that is there"""

    # --- model ---
    model: str = "toy/teacher"
    """the policy: a local folder or a hub id"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where it runs; auto takes a GPU if there is one"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute type; the trained weights are float32 either way"""
    activation_checkpointing: bool = False
    """compute each layer again in backward instead of keeping what it made"""
    cpu_offload: bool = False
    """keep weights, gradients and optimizer in host memory, and update them there"""
    keep_gradients: bool = False
    """add a step's gradients up on the GPU, whole: with --cpu_offload they travel once a step"""

    # --- data ---
    dataset: str = "toy"
    """toy, a hub id (owner/name:config), or a .jsonl or .parquet file"""
    split: Literal["all", "1H", "2H"] = "all"
    """all problems, or one of two fixed halves"""
    problem_column: str | None = None
    """the problem's column, if it is not found by itself"""
    answer_column: str | None = None
    """the answer's column, if it is not found by itself"""
    eval_dataset: str = "toy"
    """what --eval_every evaluates on: toy (held out), a benchmark or a file"""
    decontaminate: tuple[str, ...] | None = None
    """evaluation sets whose problems are removed; by itself every benchmark, for a hub dataset"""
    max_prompt_tokens: int = 128
    """longer prompts are dropped"""
    thinking: bool = False
    """thinking mode of the chat template"""
    chat_template: str | None = None
    """a model whose chat template is used; by itself the model's own"""

    # --- rollouts ---
    prompts_per_step: int = 16
    """P: prompts per step"""
    group_size: int = 16
    """G: completions per prompt"""
    max_new_tokens: int = 64
    """longest completion"""
    temperature: float = 1.0
    """sampling temperature; log-probs are taken at it too"""
    backend: Literal["auto", "torch", "vllm"] = "auto"
    """what samples: transformers or vLLM; auto takes vLLM on a GPU"""
    vllm_gpu_memory: float = 0.4
    """share of the GPU's memory that vLLM may take while it samples"""
    enforce_eager: bool = False
    """vLLM without compilation and CUDA graphs: starts faster, samples slower"""
    tensor_parallel: int = 1
    """ranks in a row that share one vLLM, for models that do not fit one GPU"""

    # --- optimisation ---
    num_steps: int = 40
    """rollout steps"""
    stop_at_tokens: int = 0
    """end after the step that reaches this many generated tokens, if earlier; 0 is off"""
    stop_at_flops: float = 0.0
    """end after the step that reaches this many FLOPs, the teacher's included; 0 is off"""
    learning_rate: float | None = None
    """AdamW's peak rate; 2e-4 on the toy, to be set for any other model"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """what follows the warmup"""
    warmup_steps: int = 10
    """linear warmup from 0"""
    weight_decay: float = 0.0
    """AdamW's weight decay"""
    max_grad_norm: float = 1.0
    """gradient clipping"""
    skip_nonfinite: bool = False
    """leave out updates with a loss or gradient that is not finite, instead of stopping"""
    micro_batch_tokens: int = 4096
    """tokens per forward and backward, padding included; a longer sequence goes alone"""
    chunk_size: int = 2048
    """tokens per chunk of the head"""

    # --- algorithm ---
    kl_coef: float = 5e-4
    """weight of the KL to the frozen initial policy; 0 loads no reference model"""
    clip_low: float = 0.2
    """the ratio is clipped below at 1 - clip_low"""
    clip_high: float = 0.2
    """the ratio is clipped above at 1 + clip_high (DAPO: 0.28)"""
    advantage_norm: Literal["std", "none"] = "std"
    """divide the advantage by the group's standard deviation, or not (Dr. GRPO)"""
    loss_agg: Literal["token", "sequence", "dr_grpo"] = "token"
    """Z: loss tokens; sequences of equal weight; or N * max_new_tokens"""
    num_epochs: int = 1
    """passes over each step's rollouts"""
    num_minibatches: int = 1
    """optimizer steps per pass"""
    dynamic_sampling: bool = False
    """replace groups whose outcomes all agree (DAPO)"""
    max_refills: int = 3
    """how often --dynamic_sampling may draw again"""
    mask_truncated: bool = False
    """no loss on completions that max_new_tokens cut off"""
    importance_cap: float = 0.0
    """truncated importance correction of the engine's log-probs; 0 is off"""

    def __post_init__(self) -> None:
        if self.learning_rate is None and self.model.startswith("toy/"):
            self.learning_rate = 2e-4


def check_args(args: Args) -> None:
    check_ranges(args)
    check(args.learning_rate is not None, f"set --learning_rate for {args.model} (the paper: 1e-6)")
    check(args.group_size > 1, "--group_size 1 has nothing to compare a reward with; use 2 or more")
    rows = args.prompts_per_step * args.group_size
    check(
        args.num_minibatches <= rows,
        f"--num_minibatches {args.num_minibatches} exceeds the {rows} rollouts of a step",
    )


# === score ===


def score(rollouts: list[Rollout], args: Args) -> None:
    """Set each rollout's advantage and loss weight. Groups whose rewards agree get exactly 0."""
    rewards = torch.tensor([float(rollout.verdict.correct) for rollout in rollouts])
    rewards = rewards.view(-1, args.group_size)  # [P, G]
    advantages = rewards - rewards.mean(1, keepdim=True)
    if args.advantage_norm == "std":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-6)
    for rollout, advantage in zip(rollouts, advantages.flatten().tolist(), strict=True):
        masked = args.mask_truncated and rollout.finish == "length"
        length = len(rollout.completion_ids) if args.loss_agg == "sequence" else 1
        rollout.advantage, rollout.weight = advantage, 0.0 if masked else 1 / length


def denominator_of(rollouts: list[Rollout], args: Args) -> float:
    """Z of one optimizer step, over all ranks."""
    if args.loss_agg == "dr_grpo":
        return float(sum_over_ranks(len(rollouts)) * args.max_new_tokens)
    kept = [len(rollout.completion_ids) for rollout in rollouts if rollout.weight > 0]
    return float(max(1, sum_over_ranks(sum(kept) if args.loss_agg == "token" else len(kept))))


def mixed_groups(rollouts: list[Rollout], group_size: int) -> list[Rollout]:
    """The groups with right and wrong outcomes. Binary outcomes, not shaped rewards, decide."""
    groups = [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]
    mixed = [group for group in groups if len({rollout.verdict.correct for rollout in group}) == 2]
    return [rollout for group in mixed for rollout in group]


# === loss ===


def loss_fn(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    args: Args,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped surrogate and KL term, summed over a slice of C tokens: logits [C, V], all else [C].

    `old_logprobs` None: the policy has not moved since it sampled, so the ratio is 1 (its gradient
    is not 0). Returns the weighted sum and the unweighted sums of what is logged.
    """
    logprobs, entropy = logprob.token_logprobs(logits, tokens, args.temperature, True)
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    engine_ratio = (old_logprobs - rollout_logprobs).exp()  # trainer / engine: 1 if they agree
    if args.importance_cap > 0:
        surrogate = surrogate * engine_ratio.clamp(max=args.importance_cap)
    loss = -surrogate
    metrics = {
        "policy/entropy": entropy.detach().sum(),
        "policy/engine_ratio": engine_ratio.sum(),
        "policy/clip_fraction": (clipped * advantages < ratio * advantages).float().sum(),
    }
    if ref_logprobs is not None:
        log_ratio = ref_logprobs - logprobs
        k3 = log_ratio.exp() - log_ratio - 1
        loss = loss + args.kl_coef * k3
        metrics["policy/kl_ref"] = k3.detach().sum()
    return (weights * loss).sum(), metrics


# === micro-batches ===


@dataclass
class MicroBatch:
    """B right-padded sequences with N loss tokens: the completions', EOS included, no prompt's."""

    rollouts: list[Rollout]  # B
    input_ids: torch.Tensor  # [B, T]
    mask: torch.Tensor  # bool [B, T]: this position predicts a loss token
    tokens: torch.Tensor  # [N]: the loss tokens


def micro_batches(
    rollouts: list[Rollout], max_tokens: int, device: torch.device
) -> Iterator[MicroBatch]:
    """Slices of like length, of at most `max_tokens` tokens with their padding, or of one sequence.
    Masks go by length, so EOS keeps its loss where pad equals EOS.

    All ranks yield equally many, for a sharded model's forward and backward need all of them: the
    last ones of a rank may have no rollouts (B = 1, T = 1, N = 0).
    """
    slices: list[list[Rollout]] = []
    for row in sorted(rollouts, key=lambda row: len(row.prompt_ids) + len(row.completion_ids)):
        length = len(row.prompt_ids) + len(row.completion_ids) - 1  # the last predicts nothing
        if not slices or (len(slices[-1]) + 1) * length > max_tokens:
            slices.append([])
        slices[-1].append(row)
    slices += [[]] * (max_over_ranks(len(slices)) - len(slices))
    for rows in slices:
        inputs = [(row.prompt_ids + row.completion_ids)[:-1] for row in rows]
        input_ids = torch.zeros(max(1, len(rows)), max(map(len, inputs), default=1)).long()
        mask = torch.zeros(input_ids.shape, dtype=torch.bool)
        for b, row in enumerate(rows):
            input_ids[b, : len(inputs[b])] = torch.tensor(inputs[b])
            mask[b, len(row.prompt_ids) - 1 : len(inputs[b])] = True
        tokens = torch.tensor([token for row in rows for token in row.completion_ids]).long()
        yield MicroBatch(rows, input_ids.to(device), mask.to(device), tokens.to(device))


# === gradients ===


def minibatches(rollouts: list[Rollout], seed: tuple, args: Args) -> list[list[Rollout]]:
    """This rank's part of each minibatch of a shuffled pass, which are the same at any number of
    ranks."""
    own = {rollout.key: rollout for rollout in rollouts}
    keys = sorted(gather(list(own)))
    shuffled = random.Random("-".join(map(str, seed))).sample(keys, len(keys))
    parts = [shuffled[first :: args.num_minibatches] for first in range(args.num_minibatches)]
    return [[own[key] for key in part if key in own] for part in parts]


def with_gradient(rollouts: list[Rollout], ref_model) -> list[Rollout]:
    """Without a KL term an advantage of 0 has no gradient: its tokens count in Z only."""
    return [r for r in rollouts if r.weight > 0 and (r.advantage != 0 or ref_model is not None)]


def backward(model, ref_model, rollouts: list[Rollout], args: Args) -> dict[str, float]:
    """Add the gradients of one optimizer step to .grad; returns its metrics, means over tokens."""
    dtype, denominator = DTYPES[args.dtype], denominator_of(rollouts, args)
    trained = with_gradient(rollouts, ref_model)
    num_tokens = sum_over_ranks(sum(len(rollout.completion_ids) for rollout in trained))
    sums = {"loss": 0.0}
    batches = list(micro_batches(trained, args.micro_batch_tokens, logprob.device_of(model)))
    for number, batch in enumerate(batches, 1):
        keep_gradients(model, args.keep_gradients and number < len(batches))
        hidden = logprob.hidden_states(model, batch.input_ids, batch.mask, dtype)
        inputs = {
            "tokens": batch.tokens,
            "advantages": spread(batch, "advantage"),
            "weights": spread(batch, "weight"),
            "rollout_logprobs": joined(batch, "logprobs"),
            "old_logprobs": joined(batch, "old_logprobs"),
            "ref_logprobs": None,
        }
        if ref_model is not None:
            inputs["ref_logprobs"] = frozen_logprobs(ref_model, batch, args)
        chunk_loss = partial(loss_fn, args=args)
        head_sums = logprob.head_backward(
            hidden, model, chunk_loss, inputs, denominator, args.chunk_size
        )
        for name, value in head_sums.items():  # none of an empty micro-batch
            sums[name] = sums.get(name, 0.0) + value
    sums = sum_dicts_over_ranks(sums)
    loss = sums.pop("loss") / denominator
    return {"loss/total": loss} | {name: value / num_tokens for name, value in sums.items()}


def spread(batch: MicroBatch, name: str) -> torch.Tensor:
    """A number of each rollout -> one a loss token, float32 [N]."""
    values = [[getattr(row, name)] * len(row.completion_ids) for row in batch.rollouts]
    return torch.tensor([value for row in values for value in row]).to(batch.tokens.device)


def joined(batch: MicroBatch, name: str) -> torch.Tensor | None:
    """A tensor [T] of each rollout -> one a loss token, [N]; None if they have none."""
    values = [getattr(row, name) for row in batch.rollouts]
    if not values or values[0] is None:
        return None
    return torch.cat([value.to(batch.tokens.device) for value in values])


@torch.no_grad()
def frozen_logprobs(model, batch: MicroBatch, args: Args) -> torch.Tensor:
    """Log-probs [N] of a micro-batch's loss tokens, without gradient."""
    hidden = logprob.hidden_states(model, batch.input_ids, batch.mask, DTYPES[args.dtype])
    return logprob.head_logprobs(hidden, model, batch.tokens, args.temperature, args.chunk_size)


def set_old_logprobs(model, rollouts: list[Rollout], args: Args) -> None:
    """The trainer's own log-probs of each rollout, before the first of several updates on it."""
    for batch in micro_batches(rollouts, args.micro_batch_tokens, logprob.device_of(model)):
        lengths = [len(rollout.completion_ids) for rollout in batch.rollouts]
        logprobs = frozen_logprobs(model, batch, args).split(lengths)
        for rollout, row_logprobs in zip(batch.rollouts, logprobs, strict=True):
            rollout.old_logprobs = row_logprobs


# === schedule ===


def learning_rate_at(step: int, args: Args) -> float:
    """The rate of step 1, 2, ...: linear warmup, then constant or down to 0 after the last."""
    if step <= args.warmup_steps:
        return args.learning_rate * step / args.warmup_steps
    left = (args.num_steps - step + 1) / (args.num_steps - args.warmup_steps)
    cosine = 0.5 - 0.5 * math.cos(math.pi * left)
    factor = {"constant": 1.0, "linear": left, "cosine": cosine}[args.lr_schedule]
    return args.learning_rate * factor


# === main ===


def main(args: Args) -> None:
    # --- setup ---
    check_args(args)
    if args.dry_run:
        frozen = [args.model] if args.kl_coef > 0 else []
        memory.print_plan(args, args.model, frozen, sampled=args.model)
        return
    device = join_ranks(args)
    backend = resolve_backend(args, device)
    torch.manual_seed(args.seed)
    check_lengths(args, args.model)
    tokenizer = load_tokenizer(args.model, chat_template=args.chat_template)

    # --- data ---
    dataset = data.training_prompts(tokenizer, args)
    stream = data.Stream(dataset, args.seed)
    eval_prompts = data.evaluation_prompts(tokenizer, args) if args.eval_every else []

    # --- model ---
    run = Run(__file__, args, data.fingerprint(tokenizer, dataset, args))
    if run.finished:
        return
    model = load_for_training(args.model, args, device, trainable=True)
    ref_model = load_for_training(args.model, args, device) if args.kl_coef > 0 else None
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True
    )
    run.restore(model, optimizer)
    engine = eval_engine = make_engine(backend, model, tokenizer, dataset, args)

    # --- loop ---
    verifier = Verifier()
    bar = tqdm(total=args.num_steps, initial=run.progress.step, desc=run.script, disable=rank() > 0)
    with run.guard(model, optimizer), verifier, bar:
        for step in range(run.progress.step + 1, args.num_steps + 1):
            if run.budget_is_spent():
                break
            clock = Clock()

            # --- learning rate ---
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, args)

            # --- generate ---
            rollouts, sampled = [], []
            for refill in range(args.max_refills + 1):
                groups = sum_over_ranks(len(rollouts) // args.group_size)
                missing = args.prompts_per_step - groups
                prompts = stream.take(run.progress, missing)
                seed = (args.seed, step, refill)
                drawn = sample_and_verify(engine, verifier, prompts, args.group_size, args, seed)
                sampled += drawn
                keep_all = not args.dynamic_sampling or refill == args.max_refills
                rollouts += drawn if keep_all else mixed_groups(drawn, args.group_size)
                if sum_over_ranks(len(rollouts)) == args.prompts_per_step * args.group_size:
                    break
            metrics = rollout_metrics(sampled) | {"rollout/refills": refill}
            engine.sleep()
            clock.lap("generate")
            run.begin_update()

            # --- score ---
            score(rollouts, args)
            mixed = sum_over_ranks(len(mixed_groups(rollouts, args.group_size)))
            metrics["rollout/mixed_groups"] = mixed / sum_over_ranks(len(rollouts))
            if args.num_epochs * args.num_minibatches > 1:
                set_old_logprobs(model, rollouts, args)
            clock.lap("score")

            # --- update ---
            updates = []
            for epoch in range(args.num_epochs):
                for minibatch in minibatches(rollouts, (args.seed, step, epoch), args):
                    update = backward(model, ref_model, minibatch, args)
                    grad_norm = clip_grad_norm(parameters, args.max_grad_norm)
                    if run.is_finite(update["loss/total"], grad_norm.item(), minibatch):
                        optimizer.step()
                    optimizer.zero_grad()
                    updates.append(update | {"optim/grad_norm": grad_norm.item()})
            metrics |= mean(updates)
            run.progress.flops += forward_flops(model, sampled, shared=args.group_size)
            passes = args.num_epochs * (3 if ref_model is None else 4)
            run.progress.flops += passes * forward_flops(model, with_gradient(rollouts, ref_model))
            if args.num_epochs * args.num_minibatches > 1:
                run.progress.flops += forward_flops(model, rollouts)
            clock.lap("update")

            # --- sync ---
            metrics |= eval_engine.sync()
            clock.lap("sync")

            # --- log ---
            run.progress.add_step(rollouts=sampled)
            metrics["optim/learning_rate"] = learning_rate_at(step, args)
            metrics |= clock.metrics()
            bar.set_postfix({name: f"{metrics[name]:.3f}" for name in WATCHED}, refresh=False)
            bar.update()

            # --- evaluate and checkpoint ---
            if args.eval_every and (step % args.eval_every == 0 or step == args.num_steps):
                seed = (args.seed, 0)
                evaluated = sample_and_verify(eval_engine, verifier, eval_prompts, 1, args, seed)
                metrics["eval/accuracy"] = rollout_metrics(evaluated)["rollout/accuracy"]
            run.end_step(metrics, sampled, model, optimizer)
    run.finish(model, tokenizer)


if __name__ == "__main__":
    start(main, Args, __doc__)
