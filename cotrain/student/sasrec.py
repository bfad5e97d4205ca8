"""SASRec, the student: causal self-attention over a user's item sequence.

Source: Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018. Differences:
pre-norm blocks with a final LayerNorm, GELU, a softmax over the catalogue in place of one sampled
negative, no dropout on attention weights, and no work on padding: a batch is one line of real
positions (`cotrain.data.packing`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from cotrain.data.batches import PADDING, SequenceBatch
from cotrain.data.packing import PackedSequences, RowGroup
from cotrain.errors import AssetError
from cotrain.student.losses import TrainingLoss
from cotrain.student.protocol import StudentOutput, last_states, training_output

# Of embeddings and linear weights.
INITIAL_STD = 0.02


def dropout(values: Tensor, probability: float, training: bool) -> Tensor:
    """Dropout; on a CPU with the probability rounded to 1/256.

    PyTorch draws one Bernoulli number an element on one core, which took a third of a training
    step. One byte an element, eight to a draw, is ten times as fast.
    """
    if not training or probability == 0:
        return values
    if values.device.type != "cpu":
        return F.dropout(values, probability)
    dropped = min(255, max(1, round(256 * probability)))
    count = values.numel()
    draws = torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.uint8)[:count].view(values.shape) >= dropped
    return values * kept.to(values.dtype).mul_(256 / (256 - dropped))


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward, both residual."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_out = nn.Linear(hidden_size, hidden_size)
        self.ffn_norm = nn.LayerNorm(hidden_size)
        self.ffn_in = nn.Linear(hidden_size, hidden_size)
        self.ffn_out = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor, groups: Sequence[RowGroup]) -> Tensor:
        """(N, D) to (N, D); only attention looks beyond a position."""
        qkv = self.qkv(self.attention_norm(hidden))
        # Split and cat, not slices: the gradient of a slice is a full-size tensor of zeros.
        parts = qkv.split([group.num_tokens for group in groups])
        attended = [self._attend(part, group) for part, group in zip(parts, groups, strict=True)]
        mixed = self.attention_out(torch.cat(attended))
        hidden = hidden + dropout(mixed, self.dropout, self.training)
        inner = F.gelu(self.ffn_in(self.ffn_norm(hidden)))
        inner = dropout(inner, self.dropout, self.training)
        return hidden + dropout(self.ffn_out(inner), self.dropout, self.training)

    def _attend(self, qkv: Tensor, group: RowGroup) -> Tensor:
        """(tokens, 3D) of a group's rows to (tokens, D)."""
        rows, length, size = group.num_rows, group.length, qkv.shape[1] // 3
        if group.slots is not None:
            qkv = qkv.new_zeros(rows * length, 3 * size).index_copy(0, group.slots, qkv)
        # (rows, L, 3D) -> three of (rows, heads, L, D / heads)
        query, key, value = qkv.view(rows, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        # No dropout on attention weights: drawing (rows, heads, L, L) random numbers costs as much
        # as the rest of the step on a CPU, and rules out the fused kernel.
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = attended.transpose(1, 2).reshape(rows * length, size)
        return attended if group.slots is None else attended[group.slots]


class SASRec(
    nn.Module, PyTorchModelHubMixin, library_name="cotrain", tags=["sequential-recommendation"]
):
    """The model. Item embeddings serve as input and, tied, as output.

    Args:
        num_items: Items, padding not counted; item indices run from 1 to num_items.
        hidden_size: D.
        num_layers: Blocks.
        num_heads: Attention heads.
        max_length: L, the longest sequence it can read.
        dropout: Probability.
        sparse: Gradients of item embeddings only name the rows that were looked up; for an
            optimizer that updates no others.
    """

    def __init__(
        self,
        num_items: int,
        hidden_size: int = 128,
        num_layers: int = 2,
        num_heads: int = 2,
        max_length: int = 200,
        dropout: float = 0.3,
        sparse: bool = False,
    ):
        super().__init__()
        self.hidden_size = hidden_size
        self.max_length = max_length
        self.dropout = dropout
        self.item_embedding = nn.Embedding(num_items + 1, hidden_size, PADDING, sparse=sparse)
        self.position_embedding = nn.Embedding(max_length, hidden_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, dropout) for _ in range(num_layers)
        )
        self.final_norm = nn.LayerNorm(hidden_size)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=INITIAL_STD)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()

    @classmethod
    def _load_as_safetensor(
        cls, model: Any, model_file: str, map_location: str, strict: bool
    ) -> Any:
        # The mixin's default leaves what the file lacks at random numbers.
        return super()._load_as_safetensor(model, model_file, map_location, strict=True)

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        raise AssetError(
            f"The hub has no model.safetensors for this name, only {model_file}; pickled weights "
            "are never opened."
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that it was built with."""
        assert isinstance(self._hub_mixin_config, dict)
        return dict(self._hub_mixin_config)

    @property
    def item_vectors(self) -> Tensor:
        """(V, D) output embedding of every item index, padding included."""
        return self.item_embedding.weight

    def encode(self, sequences: PackedSequences) -> Tensor:
        """States after the final norm, (N, D): each of its own row up to its own position.

        Positions count from a row's first item, so that a longer future never changes the state of
        a position.
        """
        hidden = self.item_embedding(sequences.item_ids) * self.hidden_size**0.5
        hidden = hidden + self.position_embedding(sequences.positions)
        hidden = dropout(hidden, self.dropout, self.training)
        for block in self.blocks:
            hidden = block(hidden, sequences.groups)
        return self.final_norm(hidden)

    def user_states(self, histories: Sequence[np.ndarray]) -> Tensor:
        """State after the last item of each history.

        Args:
            histories: B arrays of item indices, oldest first, any length ≥ 1; the last `max_length`
                items of each are read.

        Returns:
            (B, D) on the model's device.
        """
        return last_states(self, histories)

    def forward(
        self, batch: SequenceBatch, loss: TrainingLoss, candidate_ids: Tensor | None = None
    ) -> StudentOutput:
        """States and training loss at every position of a training batch, and the scores of (B, K)
        candidates."""
        return training_output(self, batch, loss, candidate_ids)
