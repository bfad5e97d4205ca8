"""GRU4Rec as the student: the example of a student of one's own.

    accelerate launch scripts/train_online.py --student.architecture scripts.recipes.gru4rec:GRU4Rec

Source: Hidasi et al., "Session-based Recommendations with Recurrent Neural Networks", ICLR 2016.
Differences: a user's whole history is the session, item embeddings are input and output, and the
loss is what `train.loss` names.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from cotrain.data.batches import PADDING, SequenceBatch
from cotrain.data.packing import PackedSequences
from cotrain.student.losses import TrainingLoss
from cotrain.student.protocol import StudentOutput, last_states, training_output


class GRU4Rec(nn.Module):
    """A recurrent student.

    Args:
        num_items: Items, padding not counted; item indices run from 1 to num_items.
        hidden_size: D.
        num_layers: GRUs on top of each other.
        max_length: L, the longest sequence it reads.
        dropout: Probability, before and behind the GRUs.
    """

    def __init__(
        self,
        num_items: int,
        hidden_size: int = 128,
        num_layers: int = 1,
        max_length: int = 200,
        dropout: float = 0.3,
    ):
        super().__init__()
        self.settings: dict[str, Any] = {
            "num_items": num_items, "hidden_size": hidden_size, "num_layers": num_layers,
            "max_length": max_length, "dropout": dropout,
        }  # fmt: skip
        self.hidden_size = hidden_size
        self.max_length = max_length
        self.dropout = dropout
        self.item_embedding = nn.Embedding(num_items + 1, hidden_size, PADDING)
        self.gru = nn.GRU(hidden_size, hidden_size, num_layers)
        self.output = nn.Linear(hidden_size, hidden_size)
        with torch.no_grad():
            self.item_embedding.weight.mul_(0.1)

    @property
    def item_vectors(self) -> Tensor:
        """(V, D)."""
        return self.item_embedding.weight

    def encode(self, sequences: PackedSequences) -> Tensor:
        """(N, D) states."""
        # Rows lie shortest first. A GRU wants all first items, then all second ones, …, longest row
        # first.
        order = sequences.positions.flip(0).argsort(stable=True)
        order = len(order) - 1 - order  # (N,) of the positions
        items = self.item_embedding(sequences.item_ids[order])
        rows_of_step = torch.bincount(sequences.positions).cpu()  # (longest row,)
        hidden = F.dropout(items, self.dropout, self.training)
        hidden = self.gru(PackedSequence(hidden, rows_of_step))[0].data
        states = self.output(F.dropout(hidden, self.dropout, self.training))
        return states[order.argsort()]

    def user_states(self, histories: Sequence[np.ndarray]) -> Tensor:
        """(B, D) state after the last item of each history."""
        return last_states(self, histories)

    def forward(
        self, batch: SequenceBatch, loss: TrainingLoss, candidate_ids: Tensor | None = None
    ) -> StudentOutput:
        """States, training loss, and scores of (B, K) candidates."""
        return training_output(self, batch, loss, candidate_ids)
