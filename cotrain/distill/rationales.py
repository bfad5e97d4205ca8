"""What rationales teach in a step: which positions of a batch have one, and how far off."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cotrain.config import DistillConfig
from cotrain.data.batches import SequenceBatch
from cotrain.data.interactions import InteractionData
from cotrain.distill.losses import cosine_sum, gram_sum, scaled_gradient
from cotrain.rationale.head import RationaleHead
from cotrain.rationale.store import MatchedRationales

# Positions of a batch that have a rationale, (M,) among its N, and their vectors (M, E).
Found = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class RationaleTerms:
    """Losses of one process's rows, each () and not yet divided.

    Attributes:
        head_sum: 1 − cos(W_r u, v), which the head always learns by.
        student_sum: What the student learns by, before its weight: the same, or the relational
            form.
        n_rows: Rows that have a rationale.
        gradient_sum: To be minimised: carries the head's gradient, and λ_rdr × the student's.
    """

    head_sum: Tensor
    student_sum: Tensor
    n_rows: Tensor
    gradient_sum: Tensor | float = 0.0


class Rationales:
    """The rationales of the training data, as a step uses them.

    W_r learns from the first step on, so that it leads somewhere when the student begins to follow:
    a random one would pull it anywhere. Every position of a sequence that has a rationale learns
    from it in every epoch, not only the cut: a position's rationale is a function of its history
    and target, which stay what they are.

    Args:
        matched: Rationales, each at its place in the data.
        settings: λ_rdr and the form.
    """

    def __init__(self, matched: MatchedRationales, settings: DistillConfig):
        self.matched = matched
        self.settings = settings

    def facts(self, data: InteractionData) -> dict[str, Any]:
        """What they are, for the report."""
        store, places = self.matched.store, self.matched.places
        users = np.searchsorted(data.offsets, places, side="right") - 1
        trainable = int((data.held_out.train_end - data.offsets[:-1] - 1).clip(min=0).sum())
        return {
            "store": str(store.folder),
            "encoder": store.encoder,
            "dimension": store.dimension,
            "rows": len(places),
            "users": len(np.unique(users)),
            "share_of_positions": len(places) / trainable,
            "items": len(np.unique(data.items[places])),
        }

    def of_batch(self, batch: SequenceBatch, device: torch.device) -> Found:
        """What a CPU batch has, on a device; nothing where its row is borrowed."""
        rows = self.matched.find(batch.target_places.numpy())
        positions = (rows >= 0).nonzero()[0][: 0 if batch.borrowed else None]
        vectors = self.matched.store.vectors(rows[positions])
        return torch.from_numpy(positions).to(device), vectors.to(device)

    def terms(
        self, head: RationaleHead | None, states: Tensor, found: Found, weight: float
    ) -> RationaleTerms:
        """Losses of a model's states. Only `gram` compares rows with each other, those that one
        forward pass takes; so it depends a little on processes and accumulation steps.

        Args:
            head: W_r of the model; called once whatever was found, because processes must agree on
                what has a gradient.
            states: (N, D) of all positions of the batch.
            found: Of the same batch.
            weight: λ_rdr, or 0: the states are left alone.
        """
        assert head is not None  # made where there are rationales
        positions, vectors = found
        targets, own = head.targets(vectors), states[positions]
        relational = self.settings.rdr_form == "gram"
        # λ weighs what reaches the student, not how fast the head learns.
        head_sum = cosine_sum(head(scaled_gradient(own, 0 if relational else weight)), targets)
        student_sum, gradient_sum = head_sum, head_sum
        if relational:
            student_sum = gram_sum(own, targets)
            gradient_sum = head_sum + weight * student_sum if weight else head_sum
        n_rows = torch.tensor(len(positions), device=states.device)
        return RationaleTerms(head_sum, student_sum, n_rows, gradient_sum)
