"""What the ranking loss holds up to the student: the teacher's own distribution over the
candidates, or a blend of it with the scores of the control. Pure: tensors in, tensors out."""

import torch
from torch import Tensor


def blend_probs(scores: Tensor, probs: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """Q ∝ exp((s + β · spread(s) · t) / τ_s), t the teacher's log-probabilities in units of their
    own spread: what the audit's blend puts in order, on the scale of the student's scores.

    Where the teacher tells nothing apart, Q is the softmax of the scores themselves.

    Args:
        scores: (B, K) s, of whoever is to be improved on.
        probs: (B, K) of the teacher; rows without a verdict may hold anything finite.
        beta: β, spreads of the scores that a spread of the teacher's is worth.
        temperature: τ_s, as in the loss that takes Q.

    Returns:
        (B, K), of the dtype of `scores`.
    """
    spread = scores.std(1, correction=0, keepdim=True)
    added = beta * spread * in_spreads(logprobs(probs)).to(scores.dtype)
    return torch.softmax((scores + added) / temperature, dim=1)


def logprobs(probs: Tensor) -> Tensor:
    """Log of (B, K) probabilities, bounded where one is zero."""
    return probs.clamp(min=1e-9).log()


def in_spreads(values: Tensor) -> Tensor:
    """(B, K) float64: distance from the row's mean, in units of the row's root mean square
    distance; zeros where all are alike."""
    values = values.double()
    centred = values - values.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=1e-9)
