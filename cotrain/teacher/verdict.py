"""What the teacher says of a batch of rows, and the arithmetic of orders that it is made of.

Pure: tensors in, tensors out. R teacher rankings of K candidates are (…, K) `ranks`: 1 is best, and
candidates that the teacher did not tell apart share the mean of the places that they fill.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TeacherVerdict:
    """What the teacher says of B rows, candidates in the student's order.

    Attributes:
        identifier_logits: (B, K) float32, less the calibration; with identifiers of several tokens
            sums of log-probabilities. None where only an order was written (`generate`), or K was
            ranked by windows.
        ranks: (B, K) float32, 1 = best; ties share their mean.
        probs: (B, K) float32 Q, what the student is to learn, from logits or else from ranks.
        decision_state: (B, H) float32; at `predict` the state whose logits choose the first-ranked
            identifier, at `emit` the state at that identifier.
        valid: (B,) bool; an invalid row's other values are zeros and mean nothing.
        confidence: (B,) float32 in [0, 1], 1 − entropy of Q / log K.
        agreement: (B,) float32 in [0, 1], between the rankings of several shuffles; 0 without.
        shown_order: (B, K) int64, the candidate position behind each identifier as first shown.
        failures: Invalid rows by cause.
        partial: Valid rows whose answer stopped being an order too early, by cause.
        reasonings: B texts in `cot`; empty in other modes.
        prompt_tokens: Tokens of all prompts, without padding, counted once a pass.
        generated_tokens: Tokens that the teacher wrote.
        seconds: Wall-clock time of all this.
    """

    identifier_logits: Tensor | None
    ranks: Tensor
    probs: Tensor
    decision_state: Tensor
    valid: Tensor
    confidence: Tensor
    agreement: Tensor
    shown_order: Tensor
    failures: Counter = dataclasses.field(default_factory=Counter)
    partial: Counter = dataclasses.field(default_factory=Counter)
    reasonings: Sequence[str] = ()
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0

    @property
    def ranking(self) -> Tensor:
        """(B, K) int64 positions in the candidates, best first. Ties stand in the student's order,
        so a loss has to read `ranks` or `probs` instead."""
        return self.ranks.argsort(dim=1, stable=True)

    def spread(self, rows: Tensor, size: int) -> "TeacherVerdict":
        """The same verdict in a batch of `size`, of which only `rows` were asked."""
        spread = {}
        for name, value in self._tensors().items():
            full = value.new_zeros(size, *value.shape[1:])
            full[rows] = value
            spread[name] = full
        reasonings = [""] * size if self.reasonings else []
        for row, text in zip(rows.tolist(), self.reasonings, strict=False):
            reasonings[row] = text
        return dataclasses.replace(self, **spread, reasonings=reasonings)

    def with_rows(self, parts: Sequence["TeacherVerdict"], rows: Tensor) -> "TeacherVerdict":
        """The counts of this verdict, over `rows` of other verdicts one after another."""
        taken = {
            name: torch.cat([getattr(part, name) for part in parts])[rows]
            for name in self._tensors()
        }
        reasonings = [text for part in parts for text in part.reasonings]
        reasonings = [reasonings[row] for row in rows.tolist()] if reasonings else []
        return dataclasses.replace(self, **taken, reasonings=reasonings)

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def ranks_of(scores: Tensor) -> Tensor:
    """Ranks of (…, K) scores, higher is better; ties share the mean of their places."""
    before = (scores[..., None, :] > scores[..., :, None]).sum(-1)
    equal = (scores[..., None, :] == scores[..., :, None]).sum(-1)
    return before + (equal + 1) / 2


def ranks_of_order(order: Sequence[int], size: int) -> Tensor:
    """(K,) ranks from the positions that were named, best first; the others tie behind them."""
    ranks = torch.full((size,), (len(order) + 1 + size) / 2)
    ranks[list(order)] = torch.arange(1, len(order) + 1, dtype=torch.float32)
    return ranks


def probs_of_logits(logits: Tensor, temperature: float) -> Tensor:
    """Q: softmax of (…, K) logits / τ_t."""
    return torch.softmax(logits / temperature, dim=-1)


def probs_of_ranks(ranks: Tensor, temperature: float) -> Tensor:
    """Q ∝ exp(−rank / τ_r) of (…, K) ranks; ties share equally what their places are worth."""
    size = ranks.shape[-1]
    worth = torch.exp(-torch.arange(size, dtype=torch.float64, device=ranks.device) / temperature)
    up_to = torch.cat([worth.new_zeros(1), worth.cumsum(0)])
    before = (ranks[..., None, :] < ranks[..., :, None]).sum(-1)
    equal = (ranks[..., None, :] == ranks[..., :, None]).sum(-1)
    return ((up_to[before + equal] - up_to[before]) / equal / up_to[-1]).float()


def entropy(probs: Tensor) -> Tensor:
    """Entropy in nats of (…, K) probabilities."""
    return -torch.xlogy(probs, probs).sum(-1)


def confidence_of(probs: Tensor) -> Tensor:
    """1 − entropy / log K, in [0, 1]: 0 of even, 1 of certain (…, K) probabilities."""
    return (1 - entropy(probs) / np.log(probs.shape[-1])).clamp(0, 1)


def agreement_of(ranks: Tensor) -> Tensor:
    """(B,) mean Spearman correlation between all pairs of m rankings (m, B, K), negative as 0.

    Source: permutation self-consistency (Tang et al., NAACL 2024) aggregates such rankings; how
    much they agree tells how far the order in which candidates are shown decides.
    """
    shuffles = ranks.shape[0]
    centred = ranks - ranks.mean(-1, keepdim=True)
    unit = centred / centred.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    together = unit.sum(0).square().sum(-1) - unit.square().sum((0, -1))  # twice the sum over pairs
    return (together / (shuffles * (shuffles - 1))).clamp(0, 1)
