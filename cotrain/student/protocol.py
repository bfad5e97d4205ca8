"""What training, evaluation and recommending need of a student, SASRec or one of your own.

A student is an `nn.Module` with the members of `Student`. Its model is `encode`; `user_states` and
`forward` are a line each, by `last_states` and `training_output` below. It is built from those of
the settings of `student` that its `__init__` names, besides `num_items`, which it has to take.

What a run relies on, and `architectures.new_student` tries on every student of your own:
- A state depends on its own row up to its own position, on no other row and no later item.
- Scores are inner products of states and item vectors.

And what cannot be tried:
- Random numbers come from torch's own generators only (`F.dropout`, not the dropout inside of
  `nn.GRU`), so that the control drops out alike and a resumed run goes on to the bit.
- Training changes parameters, not buffers: no batch norm.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cotrain.data.batches import SequenceBatch
from cotrain.data.packing import PackedSequences, pack
from cotrain.student.losses import TrainingLoss


@dataclass
class StudentOutput:
    """What one training forward gives.

    Attributes:
        states: (N, D) state at every position.
        user_state: (B, D) state at the batch's cut.
        loss_sum: () the training loss summed over all positions.
        n_targets: () int64, how many there are.
        candidate_scores: (B, K) of the candidates that were given, by the state at the cut.
    """

    states: Tensor
    user_state: Tensor
    loss_sum: Tensor
    n_targets: Tensor
    candidate_scores: Tensor | None = None


class Student(Protocol):
    """A sequential recommender; also an `nn.Module`, of which the last methods are.

    Attributes:
        hidden_size: D, width of states and item vectors.
        max_length: L, the longest sequence that it reads.
        item_embedding: (V, D) of item indices, row 0 = padding; the same table is looked up by the
            losses and scored by. Made with `sparse=True` where `__init__` has that argument and
            `train.item_updates` is lazy.
    """

    training: bool
    hidden_size: int
    max_length: int
    item_embedding: nn.Embedding

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that it was built with, plain values; saved, and given to `__init__`
        again when it is loaded."""
        ...

    @property
    def item_vectors(self) -> Tensor:
        """(V, D) what states are scored against: `item_embedding.weight`."""
        ...

    def encode(self, sequences: PackedSequences) -> Tensor:
        """(N, D) state at each of N positions, `sequences.item_ids` in their order."""
        ...

    def user_states(self, histories: Sequence[np.ndarray]) -> Tensor:
        """(B, D) state after the last item of each of B histories, any length ≥ 1."""
        ...

    def forward(
        self, batch: SequenceBatch, loss: TrainingLoss, candidate_ids: Tensor | None = None
    ) -> StudentOutput:
        """States and loss of a training batch, and scores of (B, K) candidates. The one method that
        is called through DDP or DeepSpeed: all that has a gradient comes out of it."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...
    def to(self, *args: Any, **kwargs: Any) -> Any: ...
    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


def last_states(student: Student, histories: Sequence[np.ndarray]) -> Tensor:
    """`user_states` by way of `encode`: the last `max_length` items of each history are read.

    Args:
        student: Whose states.
        histories: B arrays of item indices, oldest first, any length ≥ 1.

    Returns:
        (B, D) on the student's device.
    """
    sequences = pack([history[-student.max_length :] for history in histories])
    sequences = sequences.to(student.item_vectors.device)
    return student.encode(sequences)[sequences.last]


def training_output(
    student: Student, batch: SequenceBatch, loss: TrainingLoss, candidate_ids: Tensor | None
) -> StudentOutput:
    """`forward` by way of `encode`, to be called inside of it.

    Args:
        student: Whose forward it is.
        batch: N positions of B users.
        loss: What the data teach by.
        candidate_ids: (B, K) items to score at the cuts, or None.
    """
    states = student.encode(batch.sequences)
    output = StudentOutput(
        states=states,
        user_state=states[batch.cut],
        loss_sum=loss(states, student.item_embedding, batch.target_ids),
        n_targets=torch.tensor(len(states), device=states.device),
    )
    if candidate_ids is not None:
        # Computed again although retrieval did, because that keeps no graph.
        with torch.autocast(states.device.type, enabled=False):
            item_vectors = student.item_embedding(candidate_ids)  # (B, K, D)
            output.candidate_scores = torch.einsum(
                "bd,bkd->bk", output.user_state.to(item_vectors.dtype), item_vectors
            )
    return output
