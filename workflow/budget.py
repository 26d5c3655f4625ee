"""The cost of a plan's training stages at most: completions, tokens and FLOPs.

At most: every completion counts as --max_new_tokens long, every prompt as --max_prompt_tokens, and
--dynamic_sampling draws as often as it may. FLOPs are counted as training counts them
(common.model.flops).
"""

from functools import cache

from common.model.flops import forward_flops, update_flops
from common.run.errors import UserError, check
from workflow.memory import model_of
from workflow.stages import Stage


def most_tokens(stage: Stage, args=None) -> tuple[int, int]:
    """Return how many completions and tokens a training stage can generate, with its own Args or
    others."""
    args = args or stage.args()
    draws = 1 + args.max_refills if stage.is_grpo and args.dynamic_sampling else 1
    completions = args.num_steps * args.prompts_per_step * args.group_size * draws
    return completions, completions * args.max_new_tokens


def most_flops(stage: Stage, args=None) -> tuple[float, float]:
    """Return the FLOPs of a training stage, with its own Args or others: of sampling, and of
    scoring and updates. Raises UserError for models whose config cannot be read."""
    args = args or stage.args()
    trained, _, sampled = stage.models(args)
    sequence = ((args.max_prompt_tokens, args.max_new_tokens),)
    once = forward_flops(_model(stage.base_model(sampled)), sequence, args.group_size)
    sampling = most_tokens(stage, args)[0] * once
    model = _model(stage.base_model(trained), args.lora_rank)
    update = args.num_epochs * update_flops(model, sequence)
    if not stage.is_grpo:
        update += args.num_epochs * forward_flops(_model(stage.base_model(args.teacher)), sequence)
    else:  # GRPO scores its reference, and before several updates itself
        scored = (args.kl_coef > 0) + (args.num_epochs * args.num_minibatches > 1)
        update += scored * forward_flops(model, sequence)
    return sampling, args.num_steps * args.prompts_per_step * args.group_size * update


@cache
def _model(name: str, lora_rank: int = 0):
    model = model_of(name, lora_rank)
    check(model is not None, f"no config.json of {name} that can be read")
    return model


def share_of_budget(stage: Stage) -> float:
    """Return what --stop_at_tokens or --stop_at_flops leaves of what --num_steps allows."""
    if stage.budget_flag == "stop_at_tokens":
        return sum(most_tokens(other)[1] for other in stage.budget_of) / most_tokens(stage)[1]
    if stage.budget_flag == "stop_at_flops":
        return sum(sum(most_flops(other)) for other in stage.budget_of) / sum(most_flops(stage))
    return 1.0


def print_budget(stages: list[Stage]) -> None:
    """Print a line for each training stage."""
    print("\n# budget: at most")
    for stage in (stage for stage in stages if stage.script != "evaluate.py"):
        completions, tokens = most_tokens(stage)
        try:
            share = share_of_budget(stage)
            flops = f"{share * sum(most_flops(stage)):9.2g}"
        except UserError:  # nothing is known of a model
            share, flops = 1.0, "unknown"
        print(
            f"{stage.name:22} {round(share * completions):>11,} completions "
            f"{round(share * tokens):>18,} tokens {flops} FLOPs"
        )
