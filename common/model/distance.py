"""The distance of a student's next-token distributions from its teacher's, and of a trainer's
log-probs from its engine's, for the log."""

import torch

from common.model.logprob import likeliest


@torch.no_grad()
def transfer_metrics(logp: torch.Tensor, logq: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over C tokens of what tells a healthy transfer from a failing one, in nats.

    logp, logq: finite log-probs [C, V] of the student and of the teacher. The KL to the teacher
    both ways, the student's entropy and its gap to the teacher's, and the share of the teacher's
    16 likeliest tokens that are among the student's 16 (not of two vocabularies, where V is 16).
    """
    p, q, log_ratio = logp.exp(), logq.exp(), logp - logq
    entropy, teacher_entropy = -torch.linalg.vecdot(p, logp), -torch.linalg.vecdot(q, logq)
    metrics = {
        "policy/entropy": entropy.sum(),
        "policy/entropy_gap": (entropy - teacher_entropy).sum(),
        "policy/reverse_kl": torch.linalg.vecdot(p, log_ratio).sum(),
        "policy/forward_kl": -torch.linalg.vecdot(q, log_ratio).sum(),
    }
    if logp.shape[1] > 16:
        top, teacher_top = (likeliest(x, 16).indices for x in (logp, logq))
        shared = (teacher_top[:, :, None] == top[:, None]).any(-1)  # [C, 16]
        metrics["policy/topk_overlap"] = shared.float().mean(-1).sum()
    return metrics


def engine_metrics(trainer: torch.Tensor, engine: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over C sampled tokens of what tells an engine that computes as the trainer does, and the
    extremes of the ratio: both log-probs [C]. (The mean of the ratio is 1 for any two.)"""
    gap = trainer - engine
    ratio = gap.exp()
    return {
        "policy/engine_difference": gap.abs().sum(),
        "policy/engine_kl": (ratio - gap - 1).sum(),
        "policy/engine_ratio_min": ratio.min(),
        "policy/engine_ratio_max": ratio.max(),
    }
