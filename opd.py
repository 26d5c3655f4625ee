r"""On-policy distillation: dense supervision on the student's own rollouts (Stage 2b).

The student samples, and at each of its tokens the frozen teacher's whole next-token distribution
is the target (paper eq. 4; the reverse KL is its objective):

    L = 1/Z sum_i sum_t D(pi(. | x, y_<t), teacher(. | x, y_<t))                   Z = loss tokens
    D = KL(pi || teacher)  |  KL(teacher || pi)  |  JSD                            --divergence

What to know:
- The gradient goes through the student's logits, not through its choice of what to sample: the
  discount-0 semi-gradient of the trajectory KL (eq. 1), without the score-function term.
- --estimator sampled is the policy-gradient form: advantage log teacher - log pi of the sampled
  token, detached. Its expected gradient is the full reverse KL's; its variance is far larger.
- --estimator topk compares the student's k likeliest tokens and one bucket for all others. That
  tail needs its own logsumexp: without a bucket, mass leaves the top k; log(1 - sum) cancels.

Shape key: P prompts per step, G completions per prompt, N = P·G sequences, T tokens,
V vocabulary, D hidden size.

    python opd.py                                         # the toy student and teacher, on a CPU
    python opd.py --model Qwen/Qwen3-1.7B --teacher runs/grpo-8B/final \
        --dataset open-r1/DAPO-Math-17k-Processed:all --dtype bfloat16 --learning_rate 1e-6 \
        --max_prompt_tokens 2048 --max_new_tokens 4096 --micro_batch_tokens 8192 \
        --output_dir runs/opd-1.7B                                                    # on a GPU
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
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
    share_end_ids,
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
    join_ranks,
    max_over_ranks,
    rank,
    start,
    sum_dicts_over_ranks,
    sum_over_ranks,
)
from common.verifier import Verifier

WATCHED = ("policy/reverse_kl", "rollout/accuracy")  # what the progress bar shows

# === arguments ===


@dataclass
class Args:
    # --- experiment ---
    output_dir: str = "runs/opd"
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
    model: str = "toy/student"
    """the policy: a local folder or a hub id"""
    teacher: str = "toy/teacher"
    """the frozen teacher, of the same vocabulary"""
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
    """AdamW's peak rate; 3e-4 on the toy, to be set for any other model"""
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
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """what is minimised at each token"""
    estimator: Literal["full", "sampled", "topk"] = "full"
    """whole vocabulary, the sampled token only, or the student's top k (reverse KL)"""
    topk_size: int = 16
    """k of --estimator topk"""

    def __post_init__(self) -> None:
        if self.learning_rate is None and self.model.startswith("toy/"):
            self.learning_rate = 3e-4


def check_args(args: Args) -> None:
    check_ranges(args)
    check(args.learning_rate is not None, f"set --learning_rate for {args.model} (the paper: 1e-6)")
    check(
        args.estimator == "full" or args.divergence == "reverse_kl",
        f"--estimator {args.estimator} is of the reverse KL; drop --divergence {args.divergence}",
    )


# === score ===


@torch.no_grad()
def score(teacher, batch: "MicroBatch", args: Args) -> torch.Tensor:
    """The teacher's hidden states [N, D_teacher] at a micro-batch's loss tokens.

    Not its logits: they would be [N, V]. Its head is applied chunk by chunk, beside the student's.
    """
    return logprob.hidden_states(teacher, batch.input_ids, batch.mask, DTYPES[args.dtype])


# === loss ===


def loss_fn(
    logits: torch.Tensor, teacher_logits: torch.Tensor, tokens: torch.Tensor, args: Args
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The divergence summed over a slice of C tokens: both logits [C, V], tokens [C].

    A vocabulary padded beyond the other model's is cut to the shorter one.
    """
    size = min(logits.shape[-1], teacher_logits.shape[-1])
    logq = (logits[:, :size].float() / args.temperature).log_softmax(-1)  # the student's
    logp = (teacher_logits[:, :size].float() / args.temperature).log_softmax(-1)  # the teacher's
    if args.estimator == "sampled":
        logprobs = logq.gather(-1, tokens[:, None]).squeeze(-1)
        advantages = logp.gather(-1, tokens[:, None]).squeeze(-1) - logprobs.detach()
        # exp(x - x) is 1 with the gradient of x: the loss shown is the reverse KL's estimate.
        loss = -advantages * (logprobs - logprobs.detach()).exp()
    elif args.estimator == "topk":
        loss = logprob.kl_divergence(*top_k_buckets(logq, logp, args.topk_size))
    elif args.divergence == "reverse_kl":
        loss = logprob.kl_divergence(logq, logp)
    elif args.divergence == "forward_kl":
        loss = logprob.kl_divergence(logp, logq)
    else:
        mixture = torch.logaddexp(logq, logp) - math.log(2)
        loss = (logprob.kl_divergence(logq, mixture) + logprob.kl_divergence(logp, mixture)) / 2
    return loss.sum(), logprob.transfer_metrics(logq.detach(), logp)


def top_k_buckets(
    logq: torch.Tensor, logp: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher over the student's k likeliest tokens and one bucket of all others."""
    top = logq.topk(min(k, logq.shape[-1] - 1)).indices  # the bucket must hold something
    in_top = torch.zeros_like(logq, dtype=torch.bool).scatter(1, top, True)
    buckets = [
        torch.cat([x.gather(1, top), x.masked_fill(in_top, -torch.inf).logsumexp(-1, True)], 1)
        for x in (logq, logp)
    ]
    return buckets[0], buckets[1]


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


def backward(model, teacher, rollouts: list[Rollout], args: Args) -> dict[str, float]:
    """Add the gradients of one optimizer step to .grad; returns its metrics, means over tokens."""
    num_tokens = sum_over_ranks(sum(len(rollout.completion_ids) for rollout in rollouts))
    dtype, denominator = DTYPES[args.dtype], max(1, num_tokens)
    teacher_head = logprob.head_weight(teacher, dtype)

    def chunk_loss(logits: torch.Tensor, teacher_hidden: torch.Tensor, tokens: torch.Tensor):
        return loss_fn(logits, teacher_hidden @ teacher_head.T, tokens, args)

    sums = {"loss": 0.0}
    batches = list(micro_batches(rollouts, args.micro_batch_tokens, logprob.device_of(model)))
    for number, batch in enumerate(batches, 1):
        keep_gradients(model, args.keep_gradients and number < len(batches))
        hidden = logprob.hidden_states(model, batch.input_ids, batch.mask, dtype)
        inputs = {"teacher_hidden": score(teacher, batch, args), "tokens": batch.tokens}
        head_sums = logprob.head_backward(
            hidden, model, chunk_loss, inputs, denominator, args.chunk_size
        )
        for name, value in head_sums.items():  # none of an empty micro-batch
            sums[name] = sums.get(name, 0.0) + value
    sums = sum_dicts_over_ranks(sums)
    loss = sums.pop("loss") / denominator
    return {"loss/total": loss} | {name: value / denominator for name, value in sums.items()}


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
        memory.print_plan(args, args.model, [args.teacher], sampled=args.model)
        return
    device = join_ranks(args)
    backend = resolve_backend(args, device)
    torch.manual_seed(args.seed)
    check_lengths(args, args.model, args.teacher)
    tokenizer = load_tokenizer(args.model, args.teacher, args.chat_template)

    # --- data ---
    dataset = data.training_prompts(tokenizer, args)
    stream = data.Stream(dataset, args.seed)
    eval_prompts = data.evaluation_prompts(tokenizer, args) if args.eval_every else []

    # --- model ---
    run = Run(__file__, args, data.fingerprint(tokenizer, dataset, args))
    if run.finished:
        return
    model = load_for_training(args.model, args, device, trainable=True)
    teacher = load_for_training(args.teacher, args, device)
    share_end_ids(tokenizer, model, teacher)
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
            prompts = stream.take(run.progress, args.prompts_per_step)
            seed = (args.seed, step)
            sampled = sample_and_verify(engine, verifier, prompts, args.group_size, args, seed)
            metrics = rollout_metrics(sampled)
            engine.sleep()
            clock.lap("generate")
            run.begin_update()

            # --- score ---
            # A micro-batch at a time, inside `backward`: a step's teacher states would not fit.

            # --- update ---
            metrics |= backward(model, teacher, sampled, args)
            grad_norm = clip_grad_norm(parameters, args.max_grad_norm)
            metrics["optim/grad_norm"] = grad_norm.item()
            if run.is_finite(metrics["loss/total"], grad_norm.item(), sampled):
                optimizer.step()
            optimizer.zero_grad()
            run.progress.flops += forward_flops(model, sampled, shared=args.group_size)
            run.progress.flops += 3 * forward_flops(model, sampled)
            run.progress.teacher_flops += forward_flops(teacher, sampled)
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
