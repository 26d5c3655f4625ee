r"""GRPO on graded rollouts: sparse reward (Stage 1 on the teacher, Stage 3 on the student).

The policy samples G completions of each prompt, the task pays R_i in [0, 1], and with
rho_t = pi(y_t) / pi_old(y_t) and r_t = ref(y_t) / pi(y_t)

    A_i = (R_i - mean R) / std R                              over the G completions of a prompt
    L = 1/Z sum_i w_i sum_t [ -min(rho_t A_i, clip(rho_t, 1 - clip_low, 1 + clip_high) A_i)
                              + kl_coef (r_t - log r_t - 1) ]

after DeepSeekMath (arXiv 2402.03300); clip 0.2 and kl_coef 5e-4 are the paper's (2605.12483,
Table 9). What to know:
- w_i is 1 and Z the number of loss tokens; --loss_agg has two other choices. Z is fixed before
  micro-batching: neither micro-batches nor chunks change the gradient.
- On the first pass over fresh rollouts rho is 1, and the loss is minus the mean advantage over
  tokens: it shows whether right completions are longer, and nothing of the gradient. Watch
  rollout/accuracy and policy/entropy instead.
- The k3 term estimates KL(pi || ref), but its gradient on policy is that of KL(ref || pi).

Shape key: P prompts per step, G completions per prompt, N = P·G sequences, T tokens,
V vocabulary, D hidden size.

    python grpo.py                                                    # the toy teacher, on a CPU
    python grpo.py --model Qwen/Qwen3-1.7B --dataset open-r1/DAPO-Math-17k-Processed:all \
        --dtype bfloat16 --learning_rate 1e-6 --max_prompt_tokens 2048 --max_new_tokens 4096 \
        --micro_batch_tokens 8192 --output_dir runs/grpo-1.7b                         # on a GPU
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch

from common.model.distance import engine_metrics
from common.model.head import chunked_backward, frozen_hidden_states, head_logprobs
from common.model.load import check_shapes, load_for_training, load_reference
from common.model.logprob import token_logprobs
from common.model.lora import trained_parameters
from common.model.shard import clip_grad_norm, device_of
from common.model.tokenizer import load_tokenizer
from common.run.errors import check
from common.run.process import CHAT, MAY_CHANGE, MODEL, NOT_NEGATIVE, POSITIVE, SHARE, start
from common.run.ranks import combine, gather, join_ranks, sum_over_ranks
from common.run.run import Run, check_training, mean
from common.sampling.batches import micro_batches, minibatches
from common.sampling.rollout import Rollout
from common.sampling.sampler import Sampler, resolve_backend
from common.tasks import data
from common.tasks.task import Task

# === arguments ===


@dataclass
class Args:
    # --- experiment ---
    output_dir: Annotated[str, MAY_CHANGE] = "runs/grpo"
    """the run's folder; the same command on it resumes"""
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """seed of the data order and of every sample"""
    checkpoint_every: Annotated[int, NOT_NEGATIVE, MAY_CHANGE] = 20
    """steps between checkpoints; 0 saves none before the end"""
    keep_checkpoints: Annotated[int, POSITIVE, MAY_CHANGE] = 2
    """how many of the newest checkpoints stay on disk"""
    keep_rollouts: Annotated[int, POSITIVE, MAY_CHANGE] = 20
    """how many of the newest steps' rollouts stay on disk, beside the first and every 50th"""
    eval_every: Annotated[int, NOT_NEGATIVE] = 0
    """steps between evaluations on --eval_dataset; 0 is off"""
    track: Annotated[bool, MAY_CHANGE] = False
    """also log to Weights & Biases"""

    # --- model ---
    model: Annotated[str, MODEL] = "toy/teacher"
    """the policy: a local folder or a hub id"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where it runs; auto takes a GPU if there is one"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute type; the trained weights are float32 either way"""
    lora_rank: Annotated[int, NOT_NEGATIVE] = 0
    """R: train adapters of this rank beside the frozen weights (LoRA); 0 trains all of them"""
    activation_checkpointing: Annotated[bool, MAY_CHANGE] = False
    """compute each layer again in backward instead of keeping what it made"""
    cpu_offload: Annotated[bool, MAY_CHANGE] = False
    """keep weights, gradients and optimizer in host memory, and update them there"""

    # --- data ---
    task: str = "math"
    """what is asked and what earns a reward: math, or a .py file (docs/tasks.md)"""
    dataset: str | None = None
    """a hub id (owner/name:config:split), a file (docs/extending.md) or one that the task names"""
    split: Literal["all", "1H", "2H"] = "all"
    """all problems, or one of two fixed halves"""
    columns: tuple[str, ...] = ()
    """columns of other names than the task knows: problem=question answer=solution"""
    eval_dataset: str | None = None
    """what --eval_every evaluates on: a benchmark or a file; default: the task's first benchmark"""
    decontaminate: tuple[str, ...] | None = None
    """sets to keep out, beside --eval_dataset; default: for a hub dataset every benchmark"""
    max_prompt_tokens: Annotated[int, POSITIVE] = 128
    """longer prompts are dropped"""
    thinking: bool = False
    """thinking mode of the chat template"""
    chat_template: Annotated[str | None, CHAT] = None
    """a .jinja file, or a model whose chat template is used; default: the model's own"""

    # --- rollouts ---
    prompts_per_step: Annotated[int, POSITIVE] = 16
    """P: prompts per step"""
    group_size: Annotated[int, POSITIVE] = 16
    """G: completions per prompt"""
    max_new_tokens: Annotated[int, POSITIVE] = 64
    """longest completion"""
    temperature: Annotated[float, POSITIVE] = 1.0
    """sampling temperature; log-probs are taken at it too"""
    backend: Literal["auto", "torch", "vllm"] = "auto"
    """what samples: transformers or vLLM; auto takes vLLM on a GPU"""
    vllm_gpu_memory: Annotated[float, SHARE, MAY_CHANGE] = 0.4
    """share of the GPU's memory that vLLM may take while it samples"""
    vllm_sequences: Annotated[int, POSITIVE, MAY_CHANGE] = 256
    """how many sequences vLLM decodes at once, as far as its cache holds them"""
    enforce_eager: Annotated[bool, MAY_CHANGE] = False
    """vLLM without compilation and CUDA graphs: starts faster, samples slower"""
    tensor_parallel: Annotated[int, POSITIVE, MAY_CHANGE] = 1
    """ranks in a row that share one vLLM, for models that do not fit one GPU"""

    # --- optimisation ---
    num_steps: Annotated[int, POSITIVE] = 40
    """rollout steps"""
    stop_at_tokens: Annotated[int, NOT_NEGATIVE] = 0
    """end after the step that reaches this many generated tokens, if earlier; 0 is off"""
    stop_at_flops: Annotated[float, NOT_NEGATIVE] = 0.0
    """end after the step that reaches this many FLOPs, the teacher's included; 0 is off"""
    learning_rate: Annotated[float | None, POSITIVE] = None
    """AdamW's peak rate; default: 2e-4 on the toy, none for other models"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """what follows the warmup"""
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 10
    """linear warmup of the learning rate from 0"""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """AdamW's weight decay"""
    max_grad_norm: Annotated[float, POSITIVE] = 1.0
    """gradient clipping"""
    skip_nonfinite: Annotated[bool, MAY_CHANGE] = False
    """leave out updates with a loss or gradient that is not finite, instead of stopping"""
    num_epochs: Annotated[int, POSITIVE] = 1
    """passes over each step's rollouts"""
    num_minibatches: Annotated[int, POSITIVE] = 1
    """optimizer steps per pass"""
    micro_batch_tokens: Annotated[int, POSITIVE, MAY_CHANGE] = 4096
    """tokens per forward and backward, padding included; a longer sequence goes alone"""
    chunk_size: Annotated[int, POSITIVE] = 2048
    """tokens per chunk of the head"""

    # --- algorithm ---
    kl_coef: Annotated[float, NOT_NEGATIVE] = 5e-4
    """weight of the KL to the frozen initial policy; 0 loads no reference model"""
    clip_low: Annotated[float, NOT_NEGATIVE] = 0.2
    """the ratio is clipped below at 1 - clip_low"""
    clip_high: Annotated[float, NOT_NEGATIVE] = 0.2
    """the ratio is clipped above at 1 + clip_high (DAPO: 0.28)"""
    advantage_norm: Literal["std", "none"] = "std"
    """divide the advantage by the group's standard deviation, or not (Dr. GRPO)"""
    loss_agg: Literal["token", "sequence", "dr_grpo"] = "token"
    """average over tokens, over sequences, or divide by N * max_new_tokens (Dr. GRPO)"""
    dynamic_sampling: bool = False
    """replace groups whose grades all agree (DAPO)"""
    max_refills: Annotated[int, NOT_NEGATIVE] = 3
    """how often --dynamic_sampling may draw again"""
    mask_truncated: bool = False
    """no loss on completions that max_new_tokens cut off"""
    importance_cap: Annotated[float, NOT_NEGATIVE] = 0.0
    """truncated importance correction of the engine's log-probs; 0 is off"""

    def __post_init__(self) -> None:
        if self.learning_rate is None and self.model.startswith("toy/"):
            self.learning_rate = 2e-4


# === score ===


def reward(rollout: Rollout) -> float:
    """Return what a rollout earns: its grade, in [0, 1]. A length penalty or a bonus goes here
    (docs/variants has DAPO's)."""
    return rollout.verdict.reward


def set_advantages(rollouts: list[Rollout], args: Args) -> None:
    """Set each rollout's advantage and loss weight. Groups whose rewards agree get exactly 0."""
    rewards = torch.tensor([reward(r) for r in rollouts]).view(-1, args.group_size)  # [P, G]
    differ = (rewards != rewards[:, :1]).any(1, keepdim=True)  # the mean of sixteen 0.1 is not 0.1
    advantages = (rewards - rewards.mean(1, keepdim=True)) * differ
    if args.advantage_norm == "std":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-6)
    for rollout, advantage in zip(rollouts, advantages.flatten().tolist(), strict=True):
        masked = args.mask_truncated and rollout.finish == "length"
        length = len(rollout.completion_ids) if args.loss_agg == "sequence" else 1
        rollout.advantage, rollout.weight = advantage, 0.0 if masked else 1 / length


def set_logprobs(name: str, model, rollouts: list[Rollout], args: Args) -> None:
    """Set each rollout's `name` (old_logprobs, ref_logprobs) to `model`'s log-probs of it."""
    found: dict[tuple, torch.Tensor] = {}  # by the rollout's key; also of other ranks' rollouts
    for batch in micro_batches(rollouts, args.micro_batch_tokens, device_of(model)):
        hidden = frozen_hidden_states(model, batch.input_ids, batch.mask)
        logprobs = head_logprobs(hidden, model, batch.tokens, args.temperature, args.chunk_size)
        found |= batch.per_rollout(logprobs)
    found = dict(gather(list(found.items())))
    for rollout in rollouts:
        setattr(rollout, name, found[rollout.key])


def draw_groups(sampler: Sampler, step: int, args: Args) -> tuple[list[Rollout], dict[str, float]]:
    """Draw a step's rollouts; return them with their metrics. With --dynamic_sampling groups whose
    grades all agree are drawn anew."""
    rollouts: list[Rollout] = []
    for refill in range(args.max_refills + 1):
        missing = args.prompts_per_step - sum_over_ranks(len(rollouts)) // args.group_size
        drawn = sampler.draw(missing, (args.seed, step, refill))
        keep_all = not args.dynamic_sampling or refill == args.max_refills
        rollouts += drawn if keep_all else mixed_groups(drawn, args.group_size)
        if sum_over_ranks(len(rollouts)) == args.prompts_per_step * args.group_size:
            break
    mixed = sum_over_ranks(len(mixed_groups(rollouts, args.group_size)))
    share = mixed / sum_over_ranks(len(rollouts))
    return rollouts, {"rollout/refills": refill, "rollout/mixed_groups": share}


def mixed_groups(rollouts: list[Rollout], group_size: int) -> list[Rollout]:
    """Return the groups whose grades differ. Grades, not shaped rewards, decide."""
    groups = [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]
    return [r for group in groups if len({r.verdict.reward for r in group}) > 1 for r in group]


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
    """Sum the clipped surrogate and the KL term over a slice of C tokens: logits [C, V], all else
    [C]. Returns the weighted sum, and the unweighted sums (least, largest) of what is logged.

    `old_logprobs` None: the policy has not moved since it sampled, so the ratio is 1 (its gradient
    is not 0). The entropy has no gradient. On a GPU backward writes over the logits: use them once.
    """
    logprobs, entropy = token_logprobs(logits, tokens, args.temperature)
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    engine_ratio = (old_logprobs - rollout_logprobs).exp()  # trainer / engine: 1 if they agree
    if args.importance_cap > 0:
        loss = loss * engine_ratio.clamp(max=args.importance_cap)
    metrics = {
        "policy/entropy": entropy.sum(),
        "policy/clip_fraction": (clipped * advantages < ratio * advantages).float().sum(),
    } | engine_metrics(old_logprobs, rollout_logprobs)
    if ref_logprobs is not None:
        log_ratio = ref_logprobs - logprobs
        k3 = log_ratio.exp() - log_ratio - 1
        loss = loss + args.kl_coef * k3
        metrics["policy/kl_ref"] = k3.detach().sum()
    return (weights * loss).sum(), metrics


# === gradients ===


def backward(model, rollouts: list[Rollout], args: Args) -> dict[str, float]:
    """Add the gradients of one optimizer step to .grad; return its metrics, means over the tokens
    that have a gradient.

    Over all micro-batches and ranks together this does what
    `(loss_fn(model(ids).logits[mask], ...)[0] / denominator).backward()` does:
    tests/test_losses.py, test_grpo_backward.
    """
    denominator = denominator_of(rollouts, args)
    rollouts = with_gradient(rollouts, args)
    num_tokens = max(1, sum_over_ranks(sum(len(rollout.completion_ids) for rollout in rollouts)))
    parts = [{"loss": 0.0}]
    for batch in micro_batches(rollouts, args.micro_batch_tokens, device_of(model)):
        inputs = {
            "tokens": batch.tokens,
            "advantages": batch.per_token("advantage"),
            "weights": batch.per_token("weight"),
            "rollout_logprobs": batch.per_token("logprobs"),
            "old_logprobs": batch.per_token("old_logprobs"),
            "ref_logprobs": batch.per_token("ref_logprobs"),
        }
        parts.append(
            chunked_backward(
                model,
                batch.input_ids,
                batch.mask,
                partial(loss_fn, args=args),
                inputs=inputs,
                denominator=denominator,
                chunk_size=args.chunk_size,
            )
        )
    means = combine(gather(parts), lambda values: sum(values) / num_tokens)
    loss = means.pop("loss") * num_tokens / denominator
    return {"loss/total": loss} | means


def denominator_of(rollouts: list[Rollout], args: Args) -> float:
    """Sum the tokens' weights of one optimizer step, or return Dr. GRPO's constant: Z."""
    if args.loss_agg == "dr_grpo":
        return float(sum_over_ranks(len(rollouts)) * args.max_new_tokens)
    weights = [r.weight * len(r.completion_ids) for r in rollouts]
    return sum_over_ranks(float(sum(weights))) or 1.0


def with_gradient(rollouts: list[Rollout], args: Args) -> list[Rollout]:
    """Leave out rollouts without a gradient: without a KL term those with an advantage of 0, whose
    tokens count in Z only."""
    return [r for r in rollouts if r.weight > 0 and (r.advantage != 0 or args.kl_coef > 0)]


# === main ===


def main(args: Args) -> None:
    # --- setup ---
    check_training(args)
    check(args.group_size > 1, "--group_size 1 has nothing to compare a reward with; use 2 or more")
    device = join_ranks(args.device, args.dtype, args.cpu_offload)
    backend = resolve_backend(args, device)
    torch.manual_seed(args.seed)
    length = args.max_prompt_tokens + args.max_new_tokens
    check_shapes(args.model, length=length, lora_rank=args.lora_rank, device=args.device)
    tokenizer = load_tokenizer(args.model, chat_template=args.chat_template)

    # --- data ---
    task = Task(args.task)
    dataset = data.training_prompts(task, tokenizer, args)
    eval_prompts = data.evaluation_prompts(task, tokenizer, args)

    # --- model ---
    run = Run(__file__, args, data.fingerprint(task, dataset, eval_prompts))
    if run.finished:
        return
    model = load_for_training(args.model, args, device, trainable=True)
    ref_model = load_reference(model, args, device) if args.kl_coef > 0 else None
    optimizer = torch.optim.AdamW(
        trained_parameters(model), betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True
    )
    run.restore(model, optimizer)
    sampler = Sampler(
        run, task, tokenizer, backend, dataset, eval_prompts, sampled=model, trained=model
    )

    # --- loop ---
    with run, task:
        for step in run.steps():
            # --- generate ---
            run.phase("generate")
            rollouts, metrics = draw_groups(sampler, step, args)
            sampler.sleep()

            # --- score ---
            run.phase("score")
            set_advantages(rollouts, args)
            if ref_model is not None:
                set_logprobs("ref_logprobs", ref_model, with_gradient(rollouts, args), args)
            if args.num_epochs * args.num_minibatches > 1:
                set_logprobs("old_logprobs", model, rollouts, args)

            # --- update ---
            run.phase("update")
            updates = []
            passes = (args.num_epochs, args.num_minibatches)
            for minibatch in minibatches(rollouts, f"{args.seed}-{step}", *passes):
                update = backward(model, minibatch, args)
                grad_norm = clip_grad_norm(model, args.max_grad_norm)
                if run.is_finite(update["loss/total"], grad_norm, minibatch):
                    optimizer.step()
                optimizer.zero_grad()
                updates.append(update | {"optim/grad_norm": grad_norm})

            # --- sync, evaluate, log ---
            run.phase("sync")
            metrics |= mean(updates) | sampler.sync() | sampler.evaluate(step)
            run.log(sampler.metrics() | metrics, sampler.rows())
    run.finish(tokenizer)


if __name__ == "__main__":
    start(main, Args, __doc__)
