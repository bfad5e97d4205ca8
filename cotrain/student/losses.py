"""What the student is trained by beside any teacher: to find the next item in the catalogue.

Every loss takes states at real positions, (N, D), and returns a sum over them. The (N, items)
logits never exist whole, save in `full_cross_entropy`: positions are taken in chunks, and a chunk's
gradient is computed together with its loss, while its logits are still in the cache. So memory does
not grow with positions × items, and nothing is computed twice.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LossName = Literal["ce", "chunked_ce", "sampled_softmax", "bce", "gbce"]

# Logits held at once. On a CPU 2 M of them are 8 MB; larger chunks leave the cache and run at half
# the speed. A GPU wants more work in one kernel.
_CPU_LOGITS, _GPU_LOGITS = 2**21, 2**26


def full_cross_entropy(
    states: Tensor, item_vectors: Tensor, targets: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Softmax cross-entropy over the whole catalogue, by way of all (N, V) logits at once.

    Args:
        states: (N, D).
        item_vectors: (V, D); row 0 is padding and takes no part.
        targets: (N,) item indices ≥ 1.
        label_smoothing: Share of a target's mass that is spread evenly over all items.

    Returns:
        () summed over positions.
    """
    logits = states @ item_vectors[1:].T
    return F.cross_entropy(logits, targets - 1, reduction="sum", label_smoothing=label_smoothing)


def chunked_cross_entropy(
    states: Tensor,
    item_vectors: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    chunk_logits: int | None = None,
) -> Tensor:
    """The value and gradients of `full_cross_entropy` in memory that stays flat.

    Args:
        states: As there.
        item_vectors: As there.
        targets: As there.
        label_smoothing: As there.
        chunk_logits: Logits held at once; none: what suits the device.
    """
    rows = _chunk_rows(states, len(item_vectors), chunk_logits)
    # Mixed precision stays outside: what is computed in place has one precision.
    with torch.autocast(states.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(states, item_vectors, targets, label_smoothing, rows)


def sampled_loss(
    states: Tensor,
    target_vectors: Tensor,
    negative_vectors: Tensor,
    collisions_with: tuple[Tensor, Tensor],
    kind: Literal["softmax", "bce"],
    negative_bias: Tensor | None = None,
    positive_weight: float = 1.0,
    chunk_logits: int | None = None,
) -> Tensor:
    """A loss of each target against S negatives that all positions share.

    A negative that is a position's own target takes no part there.

    softmax: −log(e^p / (e^p + Σ_j e^(n_j + b_j))). With b_j = −log(S q_j), q the sampling
    distribution, the sum is an unbiased estimate of the sum over the catalogue.
    bce: −[β log σ(p) + Σ_j log(1 − σ(n_j))].

    Args:
        states: (N, D).
        target_vectors: (N, D), each position's target.
        negative_vectors: (S, D).
        collisions_with: Item indices (N,) of the targets and (S,) of the negatives.
        kind: Which of the two.
        negative_bias: (S,) b of the softmax; none: 0.
        positive_weight: β of bce.
        chunk_logits: Logits held at once; none: what suits the device.

    Returns:
        () summed over positions.

    Source: Bengio and Senécal, "Adaptive Importance Sampling to Accelerate Training of a Neural
    Probabilistic Language Model", 2008, for the correction; Petrov and Macdonald, "gSASRec",
    RecSys 2023, for β.
    """
    if negative_bias is None:
        negative_bias = torch.zeros_like(negative_vectors[:, 0])
    rows = _chunk_rows(states, len(negative_vectors), chunk_logits)
    with torch.autocast(states.device.type, enabled=False):  # as above
        return _SampledLoss.apply(
            states, target_vectors, negative_vectors, *collisions_with, kind, negative_bias,
            positive_weight, rows,
        )  # fmt: skip


def gbce_beta(num_negatives: int, num_items: int, calibration: float) -> float:
    """β of gBCE: 1 at calibration t = 0 (plain BCE), the sampling rate α at t = 1.

    Source: Petrov and Macdonald, "gSASRec", RecSys 2023, equation 10.
    """
    rate = min(1.0, num_negatives / max(1, num_items - 1))
    return rate * (calibration * (1 - 1 / rate) + 1 / rate)


@dataclass(frozen=True)
class TrainingLoss:
    """A loss with its settings, as the student's forward calls it.

    Attributes:
        name: ce, chunked_ce: softmax over the catalogue. sampled_softmax, bce, gbce: the target
            against `num_negatives` drawn items, the same for all positions of a step.
        label_smoothing: Of ce and chunked_ce.
        num_negatives: S.
        logq_correction: Of sampled_softmax.
        calibration: t of gbce.
        cumulative: (V,) float64 cumulative sampling distribution, 0 at padding.
        log_probs: (V,) its logarithm.
    """

    name: LossName = "chunked_ce"
    label_smoothing: float = 0.0
    num_negatives: int = 0
    logq_correction: bool = True
    calibration: float = 0.75
    cumulative: Tensor | None = None
    log_probs: Tensor | None = None

    @property
    def sampled(self) -> bool:
        """Whether only some items of the catalogue take part in a step."""
        return self.name not in ("ce", "chunked_ce")

    def __call__(self, states: Tensor, embedding: torch.nn.Embedding, targets: Tensor) -> Tensor:
        """Sum over positions.

        Args:
            states: (N, D).
            embedding: The item vectors, looked up with its own `sparse` setting.
            targets: (N,) item indices ≥ 1.
        """
        if self.name == "ce":
            return full_cross_entropy(states, embedding.weight, targets, self.label_smoothing)
        if self.name == "chunked_ce":
            return chunked_cross_entropy(states, embedding.weight, targets, self.label_smoothing)
        assert self.cumulative is not None  # filled in by `make_loss`
        assert self.log_probs is not None
        draws = torch.rand(self.num_negatives, dtype=torch.float64, device=states.device)
        negatives = torch.searchsorted(self.cumulative, draws, right=True)
        negatives = negatives.clamp_(max=len(self.cumulative) - 1)
        bias, beta = None, 1.0
        if self.name == "sampled_softmax" and self.logq_correction:
            bias = -(math.log(self.num_negatives) + self.log_probs[negatives]).to(states.dtype)
        if self.name == "gbce":
            beta = gbce_beta(self.num_negatives, len(self.cumulative) - 1, self.calibration)
        return sampled_loss(
            states,
            embedding(targets),
            embedding(negatives),
            (targets, negatives),
            "softmax" if self.name == "sampled_softmax" else "bce",
            bias,
            beta,
        )


def make_loss(
    name: LossName,
    item_counts: np.ndarray,
    device: torch.device,
    label_smoothing: float = 0.0,
    num_negatives: int = 1024,
    popularity_power: float = 0.0,
    logq_correction: bool = True,
    calibration: float = 0.75,
) -> TrainingLoss:
    """A loss for a catalogue.

    Args:
        name: Which one.
        item_counts: (V,) how often each item occurs in training, 0 at padding.
        device: Where it will be computed.
        label_smoothing: Of ce and chunked_ce.
        num_negatives: S of the sampled ones.
        popularity_power: Negatives are drawn ∝ (count + 1)^power; 0 draws evenly.
        logq_correction: Of sampled_softmax.
        calibration: t of gbce.
    """
    if name in ("ce", "chunked_ce"):
        return TrainingLoss(name, label_smoothing)
    # + 1, so that an item that training never shows can be a negative as well.
    weights = (item_counts.astype(np.float64) + 1) ** popularity_power
    weights[0] = 0
    probs = weights / weights.sum()
    with np.errstate(divide="ignore"):
        log_probs = np.log(probs)
    return TrainingLoss(
        name,
        0.0,
        num_negatives,
        logq_correction,
        calibration,
        torch.from_numpy(probs.cumsum()).to(device),
        torch.from_numpy(log_probs).to(device),
    )


# ---- gradients with the loss, a chunk at a time -------------------------------------------------


def _chunk_rows(states: Tensor, num_columns: int, chunk_logits: int | None) -> int:
    if chunk_logits is None:
        chunk_logits = _CPU_LOGITS if states.device.type == "cpu" else _GPU_LOGITS
    return max(16, chunk_logits // num_columns)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, vectors: Tensor, targets: Tensor, smoothing: float, rows: int
    ) -> Tensor:
        grad_states, grad_vectors = torch.empty_like(states), torch.zeros_like(vectors)
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        spread = smoothing / (len(vectors) - 1)
        for start in range(0, len(states), rows):
            chunk, target = states[start : start + rows], targets[start : start + rows, None]
            logits = chunk @ vectors.T  # (rows, V)
            wanted = (1 - smoothing) * logits.gather(1, target)
            if smoothing:
                wanted += spread * logits[:, 1:].sum(1, keepdim=True)
            logits[:, 0] = -torch.inf  # padding is no item
            peak = logits.amax(1, keepdim=True)
            probs = logits.sub_(peak).exp_()
            mass = probs.sum(1, keepdim=True)
            total += (peak + mass.log() - wanted).sum().double()
            # From here on `probs` is the gradient of the loss by the logits.
            probs.div_(mass)
            if smoothing:
                probs[:, 1:] -= spread
            probs.scatter_add_(1, target, torch.full_like(wanted, smoothing - 1))
            torch.mm(probs, vectors, out=grad_states[start : start + rows])
            grad_vectors.addmm_(probs.T, chunk)
        ctx.save_for_backward(grad_states, grad_vectors)
        return total.to(states.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        grad_states, grad_vectors = ctx.saved_tensors
        return grad * grad_states, grad * grad_vectors, None, None, None


class _SampledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, positives: Tensor, negatives: Tensor, target_ids: Tensor,
        negative_ids: Tensor, kind: str, bias: Tensor, beta: float, rows: int,
    ) -> Tensor:  # fmt: skip
        grad_states, grad_positives = torch.empty_like(states), torch.empty_like(positives)
        grad_negatives = torch.zeros_like(negatives)
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        terms = _softmax_terms if kind == "softmax" else _bce_terms
        for start in range(0, len(states), rows):
            part = slice(start, start + rows)
            chunk, positive = states[part], positives[part]
            scores = torch.addmm(bias, chunk, negatives.T)  # (rows, S)
            scores.masked_fill_(target_ids[part, None] == negative_ids, -torch.inf)
            of_target = (chunk * positive).sum(1, keepdim=True)  # (rows, 1)
            loss, by_target, by_negative = terms(of_target, scores, beta)
            total += loss.double()
            torch.mm(by_negative, negatives, out=grad_states[part])
            grad_states[part].addcmul_(by_target, positive)
            torch.mul(by_target, chunk, out=grad_positives[part])
            grad_negatives.addmm_(by_negative.T, chunk)
        ctx.save_for_backward(grad_states, grad_positives, grad_negatives)
        return total.to(states.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        return *(grad * saved for saved in ctx.saved_tensors), *(None,) * 6


def _softmax_terms(of_target: Tensor, scores: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, and its gradients by target and negative scores; changes `scores`."""
    peak = torch.maximum(of_target, scores.amax(1, keepdim=True))
    target_mass = (of_target - peak).exp_()
    masses = scores.sub_(peak).exp_()
    mass = masses.sum(1, keepdim=True) + target_mass
    loss = (peak + mass.log() - of_target).sum()
    return loss, target_mass / mass - 1, masses.div_(mass)


def _bce_terms(of_target: Tensor, scores: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `_softmax_terms`."""
    loss = -beta * F.logsigmoid(of_target).sum() + F.softplus(scores).sum()
    return loss, beta * (of_target.sigmoid() - 1), scores.sigmoid_()
