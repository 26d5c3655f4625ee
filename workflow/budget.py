"""What the stages of a plan cost at most: completions, tokens, FLOPs and, at a stated rate, hours.

At most: every completion counts as --max_new_tokens long, every prompt as --max_prompt_tokens.
FLOPs are those of matrix products (2 a multiply-add); what is recomputed is left out. The rates are
the user's: nothing here was measured.
"""

from common import memory
from common.errors import UserError, check
from workflow.stages import Stage

HOURS = 3600.0


def most_tokens(stage: Stage) -> tuple[int, int]:
    """Completions and tokens that a training stage can generate."""
    args = stage.args()
    completions = args.num_steps * args.prompts_per_step * args.group_size
    return completions, completions * args.max_new_tokens


def most_flops(stage: Stage) -> tuple[float, float]:
    """FLOPs of a training stage: of sampling, and of scoring and updates. Raises UserError for
    models whose shapes are not known."""
    args = stage.args()
    trained, frozen, sampled = memory.models_of(args)

    def forward(name: str, prompts: float) -> float:
        """Of all completions once, each with so many prompts."""
        shape = memory.shape_of(stage.base_model(name))
        if shape is None:
            raise UserError(f"no config.json of {name} that can be read")
        prompt, completion = args.max_prompt_tokens, args.max_new_tokens
        body = 2 * shape.layers * shape.layer * (prompts * prompt + completion)
        head = 2 * shape.vocab * shape.hidden * completion
        pairs = prompts * prompt**2 / 2 + completion * (prompt + completion / 2)
        attention = 4 * shape.layers * (shape.qk - shape.kv / 2) * pairs
        return most_tokens(stage)[0] * (body + head + attention)

    sampling = forward(sampled, 1 / args.group_size) if sampled else 0.0
    # Forward, gradients of what goes in, and those of weights: not of frozen ones.
    passes = (2 if args.lora_rank else 3) * args.num_epochs
    if not hasattr(args, "teacher"):  # GRPO scores its reference, and before several updates itself
        passes += args.kl_coef > 0
        passes += args.num_epochs * args.num_minibatches > 1
        frozen = []
    update = passes * forward(trained, 1.0)
    return sampling, update + args.num_epochs * sum(forward(name, 1.0) for name in frozen)


def print_budget(stages: list[Stage], args, gpus: int) -> None:
    """A line for each training stage, and their sum. args: bridge.Args."""
    rates = args.tokens_per_second and args.gpu_tflops and args.mfu
    check(not rates or min(args.tokens_per_second) > 0, "--tokens_per_second must be above 0")
    print("\n# budget: at most" + (", at the stated rates" if rates else ""))
    total = 0.0
    for stage in (stage for stage in stages if stage.script != "evaluate.py"):
        completions, tokens = most_tokens(stage)
        line = f"{stage.name:22} {completions:>11,} completions {tokens:>18,} tokens"
        try:
            sampling, update = most_flops(stage)
        except UserError:
            print(line)
            continue
        line += f" {sampling + update:>9.2g} FLOPs"
        if rates:
            sampled = memory.models_of(stage.args())[2]
            is_student = sampled is None or stage.base_model(sampled) == args.student
            hours = tokens / args.tokens_per_second[is_student] / HOURS
            hours += update / (args.gpu_tflops * 1e12 * args.mfu) / HOURS
            total += hours
            line += f" {hours:>10,.1f} GPU-hours"
        print(line)
    if rates:
        days = total / gpus / 24
        print(f"{'all':22} {total:,.0f} GPU-hours: {days:,.1f} days on {gpus} GPUs, in turn")
