"""Proof that an engine holds the trained weights and computes with them: else an engine that keeps
old weights samples from another policy, and no other sign shows it."""

from functools import cache

import torch

from common.model.logprob import token_logprobs
from common.model.lora import weight_names, whole_weight
from common.model.shard import device_of
from common.run.errors import RunFailure
from common.run.ranks import gather
from common.sampling.rollout import Rollout

# Limits of the mean |log-prob difference|. bfloat16 rounds a logit of 16 to 32 by up to 0.06, on
# both sides: a healthy model may pass 0.1, which is worth a warning.
CANARY_LIMIT, CANARY_WARNING = {torch.float32: 1e-3, torch.bfloat16: 0.5}, 0.1


class WeightSyncError(RunFailure):
    """The engine does not hold the trained weights, or does not compute with them."""


def check_fresh(stale: list[str]) -> None:
    """Raise WeightSyncError if the engine of any rank has stale parameters, on all ranks."""
    names = list(dict.fromkeys(gather(stale)))
    if names:
        listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise WeightSyncError(
            f"after the sync {len(names)} of vLLM's parameters differ from the trained ones "
            f"({listed}); --backend torch samples with the trained model itself"
        )


def check_canary(mean: float, largest: float, dtype: torch.dtype) -> None:
    """Raise WeightSyncError if the engine's log-probs are too far from the trainer's; warn if they
    are farther than usual."""
    limit = CANARY_LIMIT[dtype]
    if not mean <= limit:  # NaN too
        raise WeightSyncError(
            f"vLLM holds the trained weights but computes with others: its canary log-probs "
            f"differ from the trainer's by {mean:.2g} in the mean (limit {limit:g}) and by "
            f"{largest:.2g} at most; try --enforce_eager, or --backend torch"
        )
    if mean > CANARY_WARNING:
        _warn()


@cache
def _warn() -> None:
    """Print the warning once: sync/canary_mean has every sync's number."""
    print(
        f"warning: vLLM's log-probs differ from the trainer's by more than {CANARY_WARNING} in the "
        "mean; watch sync/canary_mean and grpo.py's policy/engine_kl (--importance_cap corrects it)"
    )


@torch.no_grad()
def logprob_differences(model, rollouts: list[Rollout]) -> torch.Tensor:
    """Return |trainer's - engine's log-prob| of every token that was sampled, at temperature 1."""
    differences, device = [], device_of(model)
    for rollout in rollouts:  # by the model's own head: another copy of it may not fit beside vLLM
        ids = torch.tensor([(rollout.prompt_ids + rollout.completion_ids)[:-1]], device=device)
        tokens = torch.tensor(rollout.completion_ids, device=device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(tokens)).logits[0]
        logprobs, _ = token_logprobs(logits, tokens)
        differences.append((logprobs.cpu() - rollout.logprobs).abs())
    return torch.cat(differences)


def stale_parameters(engine, model, dtype: torch.dtype) -> tuple[list[str], int]:
    """Return the names of the parameters that are not bit by bit the model's in `dtype`, and how
    many of the model's were compared.

    Reads the engine's parameters, not the load's report: q, k and v are rows of one qkv_proj, and a
    vocabulary may be padded. A parameter that the engine has packed away is stale.
    """
    trained = weight_names(model)
    unseen = set(trained)
    stale = []
    for name, parameter in engine.named_parameters():
        module = name.split(".")[-2]
        start = 0
        for part in getattr(engine, "packed_modules_mapping", {}).get(module, [module]):
            part_name = name.replace(f".{module}.", f".{part}.")
            if part_name not in trained:
                stale.append(f"{part_name} (not in the model)")
                continue
            whole = whole_weight(model, part_name, dtype)
            expected = part_of_rank(engine.get_submodule(name.rpartition(".")[0]), part, whole)
            actual = parameter[start : start + len(expected)]
            if not same_bits(actual, expected):
                stale.append(part_name)
            start += len(expected)
            unseen.discard(part_name)
        if start < len(parameter) and module not in ("embed_tokens", "lm_head"):
            stale.append(f"{name} (rows beyond the model's)")
    return stale + [f"{name} (not in vLLM)" for name in sorted(unseen)], len(trained) - len(unseen)


def part_of_rank(module, part: str, whole: torch.Tensor) -> torch.Tensor:
    """Return the slice of a parameter that this rank holds of an engine that ranks share."""
    if getattr(module, "tp_size", 1) == 1:
        return whole
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if isinstance(module, VocabParallelEmbedding):
        rows = module.shard_indices
        return whole[rows.org_vocab_start_index : rows.org_vocab_end_index]
    if isinstance(module, linear.QKVParallelLinear) and part in ("k_proj", "v_proj"):
        size = module.num_kv_heads * module.head_size
        first = module.tp_rank // module.num_kv_head_replicas * size
        return whole[first : first + size]
    if isinstance(module, linear.RowParallelLinear):  # its weight, by columns; a bias stays whole
        return whole.chunk(module.tp_size, 1)[module.tp_rank] if whole.dim() == 2 else whole
    if isinstance(module, linear.ColumnParallelLinear):
        return whole.chunk(module.tp_size)[module.tp_rank]
    return whole


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare as bits: NaN equals itself, and 0 is not -0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))
