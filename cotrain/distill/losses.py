"""Distillation losses. Each returns a sum over rows and leaves the division to the step, which
knows how many rows the whole update has over all processes."""

import torch
import torch.nn.functional as F
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


def cosine_sum(predicted: Tensor, targets: Tensor) -> Tensor:
    """Σ 1 − cos(W_r u, v) over rows.

    Args:
        predicted: (M, E) W_r u, of any length.
        targets: (M, E) v, of unit length.
    """
    return (1 - (F.normalize(predicted, dim=1) * targets).sum(1)).sum()


def gram_sum(user_states: Tensor, targets: Tensor) -> Tensor:
    """How differently user states and rationales lie to each other, summed over rows: for each row
    the mean over the others of (cos(u_i, u_j) − cos(v_i, v_j))². 0 for a row alone. Of more than
    1,024 rows each is compared with those of its own thousand.

    Args:
        user_states: (M, D) u.
        targets: (M, E) v, of unit length.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019; on angles at the origin, as
    in similarity-preserving distillation (Tung and Mori, ICCV 2019).
    """
    total = user_states.new_zeros(())
    for states, vectors in zip(user_states.split(1024), targets.split(1024), strict=True):
        states = F.normalize(states, dim=1)
        apart = (states @ states.T - vectors @ vectors.T).square()
        others = 1 - torch.eye(len(states), device=states.device)
        total = total + (apart * others).sum() / max(1, len(states) - 1)
    return total


def scaled_gradient(values: Tensor, scale: float) -> Tensor:
    """The same values, whose gradient is multiplied by `scale`."""
    return values.detach() + scale * (values - values.detach()) if scale else values.detach()
