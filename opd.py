r"""On-policy distillation: dense supervision on the student's own rollouts (Stage 2b).

The student samples, and at each of its tokens the frozen teacher's whole next-token distribution
is the target (paper eq. 4; the reverse KL is its objective):

    L = 1/Z sum_i sum_t D(pi(. | x, y_<t), teacher(. | x, y_<t))                   Z = loss tokens
    D = KL(pi || teacher)  |  KL(teacher || pi)  |  JSD                            --divergence

What to know:
- The gradient goes through the student's logits, not through its choice of what to sample: the
  discount-0 semi-gradient of the trajectory KL (eq. 1), without the score-function term.
- --estimator sampled is the policy-gradient form: advantage log teacher - log pi of the sampled
  token, detached. In the first update on the policy's own rollouts its expected gradient is that of
  the full reverse KL; its variance is far larger.
- --estimator topk compares the student's k likeliest tokens and one bucket of all others. The
  bucket's mass is a logsumexp of its own, since log(1 - sum) cancels. Without a bucket the student
  could lower its loss by moving mass out of the top k.
- --sample_from initial samples from the frozen student of the start: its rollouts could be drawn
  once, ahead ("semi-on-policy", arXiv 2610.11291). --rollouts FILE takes given ones.

Shape key: P prompts per step, G completions per prompt, N = P·G sequences, T tokens,
V vocabulary, D hidden size.

    python opd.py                                         # the toy student and teacher, on a CPU
    python opd.py --model Qwen/Qwen3-1.7B --teacher runs/grpo-8B/final \
        --dataset open-r1/DAPO-Math-17k-Processed:all --dtype bfloat16 --learning_rate 1e-6 \
        --prompts_per_step 128 --group_size 1 --max_prompt_tokens 2048 --max_new_tokens 4096 \
        --micro_batch_tokens 8192 --output_dir runs/opd-1.7B                          # on a GPU
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch

from common.model.distance import transfer_metrics
from common.model.head import chunked_backward, frozen_hidden_states, head_weight
from common.model.load import check_shapes, load_for_training
from common.model.logprob import LOWEST, likeliest
from common.model.lora import trained_parameters
from common.model.shard import clip_grad_norm, device_of
from common.model.tokenizer import load_tokenizer, share_end_ids
from common.run.errors import check
from common.run.process import CHAT, MAY_CHANGE, MODEL, NOT_NEGATIVE, POSITIVE, SHARE, start
from common.run.ranks import combine, gather, join_ranks, sum_over_ranks
from common.run.run import Run, check_training, mean
from common.sampling.batches import micro_batch, micro_batches, minibatches
from common.sampling.pair import PAIR_TOP, Pair, load_pair
from common.sampling.rollout import Rollout, load_rollouts
from common.sampling.sampler import Sampler, resolve_backend
from common.tasks import data
from common.tasks.task import Task

# === arguments ===


@dataclass
class Args:
    # --- experiment ---
    output_dir: Annotated[str, MAY_CHANGE] = "runs/opd"
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
    model: Annotated[str, MODEL] = "toy/student"
    """the policy: a local folder or a hub id"""
    teacher: Annotated[str, MODEL] = "toy/teacher"
    """the frozen teacher; of another vocabulary: docs/extending.md"""
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
    """AdamW's peak rate; default: 3e-4 on the toy, none for other models"""
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
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """what is minimised at each token"""
    estimator: Literal["full", "sampled", "topk"] = "full"
    """whole vocabulary, the sampled token only, or the student's top k (reverse KL)"""
    topk_size: Annotated[int, POSITIVE] = 16
    """k of --estimator topk"""
    sample_from: Literal["policy", "initial"] = "policy"
    """what samples: the policy, or the policy as it was at the start"""
    rollouts: str | None = None
    """draw the completions of this .jsonl file instead of sampling"""

    def __post_init__(self) -> None:
        if self.learning_rate is None and self.model.startswith("toy/"):
            self.learning_rate = 3e-4


# === loss ===


def loss_fn(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    tokens: torch.Tensor,
    args: Args,
    pair: Pair | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the divergence over a slice of C tokens: both logits [C, V], tokens [C]. Returns the
    sum, and the sums of what is logged.

    A vocabulary padded beyond the other model's is cut to the shorter one. Log-probs are kept
    finite, so that a word of probability 0 adds 0 and not nan.
    """
    if pair:  # two vocabularies: the likeliest of the tokens that both have
        logits, teacher_logits = logits[:, pair.student], teacher_logits[:, pair.teacher]
        top = likeliest(logits.detach(), min(PAIR_TOP, logits.shape[1])).indices
        logits, teacher_logits = logits.gather(1, top), teacher_logits.gather(1, top)
    size = min(logits.shape[-1], teacher_logits.shape[-1])
    logp, logq = (
        (x[:, :size].float() / args.temperature).log_softmax(-1).clamp(min=LOWEST)
        for x in (logits, teacher_logits)
    )
    metrics = transfer_metrics(logp.detach(), logq)
    p, q = logp.exp(), logq.exp()
    if args.estimator == "sampled":
        student, teacher = (x.gather(1, tokens[:, None]).squeeze(1) for x in (logp, logq))
        advantages = (teacher - student).detach()
        # exp(x - x) is 1 with the gradient of x: the loss shown is the reverse KL's estimate.
        loss = -advantages * (student - student.detach()).exp()
    elif args.estimator == "topk":
        student, teacher = top_k_buckets(logp, logq, args.topk_size)
        loss = (student.exp() * (student - teacher)).sum(-1)
    elif args.divergence == "reverse_kl":
        loss = (p * (logp - logq)).sum(-1)
    elif args.divergence == "forward_kl":
        loss = (q * (logq - logp)).sum(-1)
    else:
        logm = torch.logaddexp(logp, logq) - math.log(2)  # of the mixture m = (p + q) / 2
        loss = (p * (logp - logm) + q * (logq - logm)).sum(-1) / 2
    return loss.sum(), metrics


def top_k_buckets(
    logp: torch.Tensor, logq: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probs [C, k + 1] of student and teacher of the student's k likeliest tokens,
    and of one bucket of all others."""
    top = likeliest(logp.detach(), min(k, logp.shape[1] - 1)).indices  # leaves one for the bucket
    in_top = torch.zeros_like(logp, dtype=torch.bool).scatter(1, top, True)
    buckets = []
    for x in (logp, logq):
        tail = x.masked_fill(in_top, -torch.inf).logsumexp(-1, True)
        buckets.append(torch.cat([x.gather(1, top), tail], 1))
    return buckets[0], buckets[1]


# === gradients ===


def backward(
    model, teacher, rollouts: list[Rollout], args: Args, pair: Pair | None = None
) -> dict[str, float]:
    """Add the gradients of one optimizer step to .grad; return its metrics, means over tokens.

    Over all micro-batches and ranks together this does what
    `(loss_fn(model(ids).logits[mask], ...)[0] / denominator).backward()` does:
    tests/test_losses.py, test_dense_backward.
    """
    num_tokens = max(1, sum_over_ranks(sum(len(rollout.loss_tokens) for rollout in rollouts)))
    denominator = num_tokens
    teacher_head = head_weight(teacher, teacher.dtype)
    parts = [{"loss": 0.0}]
    for batch in micro_batches(rollouts, args.micro_batch_tokens, device_of(model)):
        # Hidden states [N, D_teacher], not logits [N, V]: its head is applied beside the student's.
        read = micro_batch([r.twin for r in batch.rollouts], device_of(model)) if pair else batch
        hidden = frozen_hidden_states(teacher, read.input_ids, read.mask)
        parts.append(
            chunked_backward(
                model,
                batch.input_ids,
                batch.mask,
                partial(loss_fn, args=args, pair=pair),
                inputs={"tokens": batch.tokens},
                teacher=(hidden, teacher_head),
                denominator=denominator,
                chunk_size=args.chunk_size,
            )
        )
    means = combine(gather(parts), lambda values: sum(values) / num_tokens)
    loss = means.pop("loss") * num_tokens / denominator
    return {"loss/total": loss} | means


# === main ===


def main(args: Args) -> None:
    # --- setup ---
    check_training(args)
    check(
        args.estimator == "full" or args.divergence == "reverse_kl",
        f"--estimator {args.estimator} has only reverse KL; drop --divergence {args.divergence}",
    )
    check(
        not args.rollouts or args.sample_from == "policy",
        "--rollouts takes given completions; drop --sample_from initial",
    )
    check(
        args.estimator != "sampled" or (args.sample_from == "policy" and not args.rollouts),
        "--estimator sampled needs the policy's own samples; drop --rollouts and --sample_from",
    )
    device = join_ranks(args.device, args.dtype, args.cpu_offload)
    backend = resolve_backend(args, device)
    torch.manual_seed(args.seed)
    length = args.max_prompt_tokens + args.max_new_tokens
    check_shapes(
        args.model, args.teacher, length=length, lora_rank=args.lora_rank, device=args.device
    )
    tokenizer = load_tokenizer(args.model, args.teacher, args.chat_template)
    pair = load_pair(tokenizer, args.teacher, device)
    check(not pair or args.estimator == "full", "two vocabularies need --estimator full")

    # --- data ---
    task = Task(args.task)
    dataset = data.training_prompts(task, pair.sampling if pair else tokenizer, args)
    dataset = pair.render(dataset, args) if pair else dataset
    if args.rollouts:
        dataset = load_rollouts(args.rollouts, task, tokenizer, dataset, args.max_new_tokens)
    eval_prompts = data.evaluation_prompts(task, tokenizer, args)

    # --- model ---
    run = Run(__file__, args, data.fingerprint(task, dataset, eval_prompts))
    if run.finished:
        return
    model = load_for_training(args.model, args, device, trainable=True)
    teacher = load_for_training(args.teacher, args, device, flops_role="teacher")
    sampled = model if args.sample_from == "policy" else load_for_training(args.model, args, device)
    share_end_ids(tokenizer, model, sampled, *([] if pair else [teacher]))
    optimizer = torch.optim.AdamW(
        trained_parameters(model), betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True
    )
    run.restore(model, optimizer)
    sampler = Sampler(
        run, task, tokenizer, backend, dataset, eval_prompts, pair, sampled=sampled, trained=model
    )

    # --- loop ---
    with run, task:
        for step in run.steps():
            # --- generate ---
            run.phase("generate")
            rollouts, metrics = sampler.draw(args.prompts_per_step, (args.seed, step)), {}
            if pair:
                rollouts, metrics = pair.twins(rollouts), pair.metrics()
            sampler.sleep()

            # --- update ---
            run.phase("update")
            updates = []
            passes = (args.num_epochs, args.num_minibatches)
            for minibatch in minibatches(rollouts, f"{args.seed}-{step}", *passes):
                update = backward(model, teacher, minibatch, args, pair)
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
