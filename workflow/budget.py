"""What the stages of a plan cost at most: completions, tokens, FLOPs and, at a stated rate, hours.

At most: every completion counts as --max_new_tokens long, every prompt as --max_prompt_tokens, and
--dynamic_sampling draws as often as it may. FLOPs are those of matrix products (2 a multiply-add);
what is recomputed is left out. The rates are the user's: nothing here was measured.
"""

from common.run.errors import UserError, check
from workflow import memory
from workflow.stages import Stage

HOURS = 3600.0


def most_tokens(stage: Stage) -> tuple[int, int]:
    """Completions and tokens that a training stage can generate."""
    args = stage.args()
    draws = 1 + args.max_refills if stage.is_grpo and args.dynamic_sampling else 1
    completions = args.num_steps * args.prompts_per_step * args.group_size * draws
    return completions, completions * args.max_new_tokens


def most_flops(stage: Stage) -> tuple[float, float]:
    """FLOPs of a training stage: of sampling, and of scoring and updates. Raises UserError for
    models whose shapes are not known."""
    args = stage.args()
    trained, _, sampled = stage.models(args)
    sequences = args.num_steps * args.prompts_per_step * args.group_size

    def forward(name: str, completions: int, prompts: float = 1.0) -> tuple[float, float]:
        """Of completions with so many prompts each: products with weights, and attention."""
        shape = shape_of(stage, name)
        prompt, completion = args.max_prompt_tokens, args.max_new_tokens
        weights = 2 * shape.layers * shape.layer * (prompts * prompt + completion)
        weights += 2 * shape.vocab * shape.hidden * completion
        pairs = prompts * prompt**2 / 2 + completion * (prompt + completion / 2)
        attention = 4 * shape.layers * (shape.qk - shape.kv / 2) * pairs
        return completions * weights, completions * attention

    sampling = sum(forward(sampled, most_tokens(stage)[0], 1 / args.group_size))
    weights, attention = forward(trained, sequences)
    # Forward; backward to what goes in, and to the weights, if they are trained.
    update = args.num_epochs * ((2 if args.lora_rank else 3) * weights + 3 * attention)
    shape = shape_of(stage, trained)
    adapters = 2 * args.lora_rank * shape.lora * shape.layers
    tokens = sequences * (args.max_prompt_tokens + args.max_new_tokens)
    update += args.num_epochs * 3 * adapters * tokens
    if not stage.is_grpo:
        update += args.num_epochs * sum(forward(args.teacher, sequences))
    else:  # GRPO scores its reference, and before several updates itself
        scored = (args.kl_coef > 0) + (args.num_epochs * args.num_minibatches > 1)
        update += scored * (weights + attention)
    return sampling, update


def shape_of(stage: Stage, name: str) -> memory.Shape:
    shape = memory.shape_of(stage.base_model(name))
    if shape is None:
        raise UserError(f"no config.json of {name} that can be read")
    return shape


def share_of_budget(stage: Stage) -> float:
    """Of what --num_steps allows, what --stop_at_tokens or --stop_at_flops leaves of it."""
    if stage.budget_flag == "stop_at_tokens":
        return sum(most_tokens(other)[1] for other in stage.budget_of) / most_tokens(stage)[1]
    if stage.budget_flag == "stop_at_flops":
        return sum(sum(most_flops(other)) for other in stage.budget_of) / sum(most_flops(stage))
    return 1.0


def print_budget(stages: list[Stage], args, gpus: int) -> None:
    """A line for each training stage, and their sum. args: bridge.Args."""
    rates = args.tokens_per_second and args.gpu_tflops and args.mfu
    check(not rates or min(args.tokens_per_second) > 0, "--tokens_per_second must be above 0")
    print("\n# budget: at most" + (", at the stated rates" if rates else ""))
    total = 0.0
    for stage in (stage for stage in stages if stage.script != "evaluate.py"):
        completions, tokens = most_tokens(stage)
        try:
            share = share_of_budget(stage)
            sampling, update = most_flops(stage)
        except UserError:  # nothing is known of a model
            print(f"{stage.name:22} {completions:>11,} completions {tokens:>18,} tokens")
            continue
        completions, tokens = round(share * completions), round(share * tokens)
        line = f"{stage.name:22} {completions:>11,} completions {tokens:>18,} tokens"
        line += f" {share * (sampling + update):>9.2g} FLOPs"
        if rates:
            hours = share * update / (args.gpu_tflops * 1e12 * args.mfu) / HOURS
            is_student = stage.base_model(stage.models(stage.args())[2]) == args.student
            hours += tokens / args.tokens_per_second[is_student] / HOURS
            total += hours
            line += f" {hours:>10,.1f} GPU-hours"
        print(line)
    if rates:
        days = total / gpus / 24
        print(f"{'all':22} {total:,.0f} GPU-hours: {days:,.1f} days on {gpus} GPUs, in turn")
