"""What the ranking loss holds up to the student: the teacher's own distribution over the
candidates, or a blend of it with the scores of the control. Pure: tensors in, tensors out."""

import torch
from torch import Tensor


def blend_probs(scores: Tensor, probs: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """Q ∝ exp((s + β · log q) / τ_s): what the audit's blend puts in order.

    Where the teacher tells nothing apart, Q is the softmax of the scores themselves; where it tells
    little apart, little is added, and where the student is sure, little is changed. (Measured in
    spreads of each row instead, a blend of SASRec and text nearness gains a quarter to two
    thirds less.)

    Args:
        scores: (B, K) s, of whoever is to be improved on.
        probs: (B, K) q of the teacher; rows without a verdict may hold anything finite.
        beta: β, scores that a nat of the teacher's is worth.
        temperature: τ_s, as in the loss that takes Q.

    Returns:
        (B, K), of the dtype of `scores`.
    """
    return torch.softmax((scores + beta * logprobs(probs)) / temperature, dim=1)


def logprobs(probs: Tensor) -> Tensor:
    """Log of (B, K) probabilities, bounded where one is zero."""
    return probs.clamp(min=1e-9).log()


def mean_spread(values: Tensor) -> float:
    """Mean over rows of the root mean square distance from the row's mean, of (B, K)."""
    return float(values.double().std(1, correction=0).mean())
