"""SASRec, the student: causal self-attention over a user's item sequence.

Source: Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018. Differences:
softmax cross-entropy over the whole catalogue instead of one
sampled negative, pre-norm blocks with a final LayerNorm, GELU, no dropout on attention weights.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from cotrain.data.batches import PADDING, SequenceBatch


@dataclass
class StudentOutput:
    """What one training forward gives.

    Attributes:
        states: (B, L, D) state at every position; meaningless at padding.
        user_state: (B, D) state at the batch's cut.
        loss_sum: () cross-entropy summed over all real targets.
        n_targets: () int64, how many there are.
    """

    states: Tensor
    user_state: Tensor
    loss_sum: Tensor
    n_targets: Tensor


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

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        batch, length, size = hidden.shape
        qkv = self.qkv(self.attention_norm(hidden))
        # (B, L, 3D) -> three of (B, heads, L, D / heads)
        query, key, value = qkv.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        # No dropout on attention weights: drawing (B, heads, L, L) random numbers costs as much as
        # the rest of the step on a CPU, and rules out the fused kernel.
        attended = F.scaled_dot_product_attention(query, key, value, mask)
        attended = attended.transpose(1, 2).reshape(batch, length, size)
        hidden = hidden + F.dropout(self.attention_out(attended), self.dropout, self.training)
        inner = F.gelu(self.ffn_in(self.ffn_norm(hidden)))
        inner = F.dropout(inner, self.dropout, self.training)
        return hidden + F.dropout(self.ffn_out(inner), self.dropout, self.training)


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
    """

    def __init__(
        self,
        num_items: int,
        hidden_size: int = 128,
        num_layers: int = 2,
        num_heads: int = 2,
        max_length: int = 200,
        dropout: float = 0.3,
    ):
        super().__init__()
        self.hidden_size = hidden_size
        self.max_length = max_length
        self.dropout = dropout
        self.item_embedding = nn.Embedding(num_items + 1, hidden_size, padding_idx=PADDING)
        self.position_embedding = nn.Embedding(max_length, hidden_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, dropout) for _ in range(num_layers)
        )
        self.final_norm = nn.LayerNorm(hidden_size)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()

    @property
    def item_vectors(self) -> Tensor:
        """(V, D) output embedding of every item index, padding included."""
        return self.item_embedding.weight

    def encode(self, item_ids: Tensor) -> Tensor:
        """States of left-padded sequences.

        Positions count from a sequence's first real item, so that neither more padding nor a
        longer future changes the state of a position.

        Args:
            item_ids: (B, L) int64, 0 = padding on the left, L ≤ max_length.

        Returns:
            (B, L, D) float32 states after the final norm.
        """
        real = item_ids != PADDING
        positions = (real.cumsum(1) - 1).clamp(min=0)
        hidden = self.item_embedding(item_ids) * self.hidden_size**0.5
        hidden = hidden + self.position_embedding(positions)
        hidden = F.dropout(hidden, self.dropout, self.training)
        length = item_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=item_ids.device).tril()
        # Padding looks at itself: a row without any key would be NaN.
        itself = torch.eye(length, dtype=torch.bool, device=item_ids.device)
        mask = (causal & real[:, None, :]) | itself  # (B, L, L)
        for block in self.blocks:
            hidden = block(hidden, mask[:, None])
        return self.final_norm(hidden)

    def forward(self, batch: SequenceBatch) -> StudentOutput:
        """States and full-softmax cross-entropy at every real position of a training batch."""
        states = self.encode(batch.item_ids)
        has_target = batch.target_ids != PADDING
        logits = states[has_target] @ self.item_vectors.T  # (n_targets, V)
        # Padding is no item: it must not share in the softmax.
        logits = logits[:, 1:]
        targets = batch.target_ids[has_target] - 1
        rows = torch.arange(len(states), device=states.device)
        return StudentOutput(
            states=states,
            user_state=states[rows, batch.cut],
            loss_sum=F.cross_entropy(logits, targets, reduction="sum"),
            n_targets=has_target.sum(),
        )
