r"""Forward-KL warmup: dense supervision on the teacher's rollouts (Stage 2a).

The teacher samples, and the student learns its whole next-token distribution at each of these
tokens (paper eq. 5):

    L = 1/Z sum_i sum_t KL(teacher(. | x, y_<t) || pi(. | x, y_<t))               Z = loss tokens

What to know:
- Soft targets: the teacher's full distribution. Token ids are kept and the logits recomputed;
  stored, they would take 300 KB a token.
- --hard_labels learns the sampled tokens only: supervised fine-tuning (SFT) on teacher samples.
- --rollouts FILE trains on given completions (rows as in any run's rollouts/*.jsonl) and samples
  nothing. With --hard_labels this is plain SFT: the teacher only measures how far the student has
  come from it, and may be the student's own model.
- --correct_only keeps what the verifier calls correct. A model that is its own teacher, with
  --hard_labels, is then fine-tuned on its own right answers (rejection sampling).
- The states are the teacher's, so the student is never shown its own mistakes: opd.py comes next.

Shape key: P prompts per step, G completions per prompt, N = P·G sequences, T tokens,
V vocabulary, D hidden size.

    python fkl_warmup.py                                  # the toy student and teacher, on a CPU
    python fkl_warmup.py --model Qwen/Qwen3-1.7B --teacher runs/grpo-8B/final \
        --dataset open-r1/DAPO-Math-17k-Processed:all --dtype bfloat16 --learning_rate 1e-6 \
        --prompts_per_step 128 --group_size 1 --max_prompt_tokens 2048 --max_new_tokens 4096 \
        --micro_batch_tokens 8192 --output_dir runs/fkl-1.7B                          # on a GPU
"""

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
    output_dir: Annotated[str, MAY_CHANGE] = "runs/fkl_warmup"
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
    hard_labels: bool = False
    """learn the sampled tokens instead of the teacher's distribution (SFT)"""
    correct_only: bool = False
    """leave out what the verifier does not call correct: its verdicts are labels then"""
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
    """Sum the forward KL over a slice of C tokens: both logits [C, V], tokens [C]. Returns the
    sum, and the sums of what is logged.

    A vocabulary padded beyond the other model's is cut to the shorter one. Log-probs are kept
    finite, so that a word of probability 0 adds 0 and not nan.
    """
    if pair and args.hard_labels:  # the text alone: its tokens are the student's
        logp = (logits.float() / args.temperature).log_softmax(-1)
        return -logp.gather(1, tokens[:, None]).sum(), {}
    if pair:  # two vocabularies: the likeliest of the tokens that both have
        logits, teacher_logits = logits[:, pair.student], teacher_logits[:, pair.teacher]
        top = likeliest(teacher_logits.detach(), min(PAIR_TOP, logits.shape[1])).indices
        logits, teacher_logits = logits.gather(1, top), teacher_logits.gather(1, top)
    size = min(logits.shape[-1], teacher_logits.shape[-1])
    logp, logq = (
        (x[:, :size].float() / args.temperature).log_softmax(-1).clamp(min=LOWEST)
        for x in (logits, teacher_logits)
    )
    metrics = transfer_metrics(logp.detach(), logq)
    if args.hard_labels:
        loss = -logp.gather(1, tokens[:, None]).squeeze(1)
    else:
        loss = (logq.exp() * (logq - logp)).sum(-1)
    return loss.sum(), metrics


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
    device = join_ranks(args.device, args.dtype, args.cpu_offload)
    backend = resolve_backend(args, device)
    torch.manual_seed(args.seed)
    length = args.max_prompt_tokens + args.max_new_tokens
    check_shapes(
        args.model, args.teacher, length=length, lora_rank=args.lora_rank, device=args.device
    )
    tokenizer = load_tokenizer(args.model, args.teacher, args.chat_template)
    pair = load_pair(tokenizer, args.teacher, device, not args.rollouts, args.hard_labels)

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
    share_end_ids(tokenizer, model, *([] if pair else [teacher]))
    optimizer = torch.optim.AdamW(
        trained_parameters(model), betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True
    )
    run.restore(model, optimizer)
    sampler = Sampler(
        run, task, tokenizer, backend, dataset, eval_prompts, pair, sampled=teacher, trained=model
    )

    # --- loop ---
    with run, task:
        for step in run.steps():
            # --- generate ---
            run.phase("generate")
            rollouts, metrics = sampler.draw(args.prompts_per_step, (args.seed, step)), {}
            if args.correct_only:
                rollouts = [rollout for rollout in rollouts if rollout.verdict.correct]
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
