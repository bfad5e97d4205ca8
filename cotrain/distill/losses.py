"""Distillation losses. Each returns a sum over rows and leaves the division to the step, which
knows how many rows the whole update has over all processes."""

import torch
from torch import Tensor


def listnet_sum(
    student_scores: Tensor, teacher_probs: Tensor, weight: Tensor, temperature: float = 1.0
) -> Tensor:
    """ListNet top-1 cross-entropy, −Σ_k Q_k log P_k with P = softmax(scores / τ_s).

    Args:
        student_scores: (B, K).
        teacher_probs: (B, K) Q.
        weight: (B,) what a row's verdict counts, 0 for rows without one.
        temperature: τ_s.

    Returns:
        () weighted sum over rows.

    Source: Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach", ICML 2007.
    """
    log_p = torch.log_softmax(student_scores / temperature, dim=1)
    return (weight * -(teacher_probs * log_p).sum(1)).sum()


def alignment_sum(projected: Tensor, user_state: Tensor, weight: Tensor) -> Tensor:
    """‖W_p ĥ − u‖², summed over rows.

    Args:
        projected: (B, D) projected decision state W_p ĥ.
        user_state: (B, D) u of the student.
        weight: (B,) what a row's verdict counts, 0 for rows without one.
    """
    return (weight * (projected - user_state).square().sum(1)).sum()
