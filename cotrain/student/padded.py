"""The student as a graph: one padded tensor of histories in, the best items out.

Training reads packed lines of real positions, whose shapes follow from the rows. A server, and a
format such as ONNX, want one tensor of any batch and length; this is the same model on that.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cotrain.data.batches import PADDING
from cotrain.student.sasrec import Block, SASRec

# Added to the attention scores of what may not be seen; unlike -inf it leaves rows of padding
# without NaN, and exp of it is 0 beside any real score.
_UNSEEN = -1e9


class PaddedSASRec(nn.Module):
    """A trained student on padded histories, for inference; shares the student's weights.

    Whatever is no item index (0, negative, beyond the catalogue) is padding, and may stand anywhere
    in a row. Rows may be longer than the student's `max_length`: their last items are read, as
    everywhere else, and all of them count as seen.

    Args:
        model: The student.
        k: Items a row in the lists, at most all items.

    Raises:
        ValueError: k is below 1.
    """

    item_bias: Tensor

    def __init__(self, model: SASRec, k: int = 100):
        super().__init__()
        if k < 1:
            raise ValueError(f"k is {k}; expected 1 or more")
        self.model = model
        self.k = min(k, len(model.item_vectors) - 1)
        # So that index 0 is in no list; as a bias it costs no pass over the scores.
        bias = torch.zeros(len(model.item_vectors), device=model.item_vectors.device)
        bias[PADDING] = -torch.inf
        self.register_buffer("item_bias", bias)

    def forward(self, item_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best unseen items, and what they were chosen by.

        Args:
            item_ids: (B, L) int64 item indices, oldest first, padded.

        Returns:
            top_items: (B, k) int64 item indices that are not in the row, best first; 0 where none
                is left, and in rows without an item.
            top_scores: (B, k) their scores, -inf there.
            scores: (B, V) of all items, seen ones too; -inf of index 0, the padding.
            user_states: (B, D); a score is the inner product with an item vector.
        """
        vectors = self.model.item_vectors
        known = (item_ids > 0) & (item_ids < len(vectors))
        ids = item_ids * known
        states = self.user_states(ids)
        scores = F.linear(states, vectors, self.item_bias)  # (B, V)
        unseen = scores.scatter(1, ids, -torch.inf)
        unseen = unseen.masked_fill(~known.any(1, keepdim=True), -torch.inf)
        top_scores, top_items = unseen.topk(self.k, dim=1)
        top_items = top_items.masked_fill(top_scores == -torch.inf, 0)
        return top_items, top_scores, scores, states

    def user_states(self, ids: Tensor) -> Tensor:
        """(B, D) state after the last item of each row.

        Args:
            ids: (B, L) int64 item indices below V, 0 = padding.
        """
        model, known = self.model, ids > 0
        place = known.long().cumsum(1)  # 1, 2, … over the items of a row
        count = place[:, -1:]  # (B, 1)
        position = place - 1 - (count - model.max_length).clamp(min=0)
        read = known & (position >= 0)
        hidden = model.item_embedding(ids) * model.hidden_size**0.5
        hidden = hidden + model.position_embedding(position.clamp(min=0))
        # (B, 1, L, L) and (B, 1, 1, L): the last item may see all that is read.
        from_last = torch.where(read, 0.0, _UNSEEN)[:, None, None, :]
        order = torch.arange(ids.shape[1], device=ids.device)
        from_all = torch.where(order[None, :] > order[:, None], _UNSEEN, 0.0) + from_last
        last = ((place == count) & known).long().argmax(1)  # (B,)
        *lower, top = model.blocks
        for block in lower:
            assert isinstance(block, Block)
            hidden = _through(block, hidden, hidden, from_all)
        # Of the last block only the last item's state is wanted: a third of the work, or more.
        index = last[:, None, None].expand(-1, 1, hidden.shape[2])
        assert isinstance(top, Block)
        return model.final_norm(_through(top, hidden.gather(1, index), hidden, from_last)[:, 0])


def _through(block: Block, asking: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
    """One block without dropout.

    Args:
        block: Its weights.
        asking: (B, Q, D) positions whose new state is wanted, of those in `hidden`.
        hidden: (B, L, D) positions that may be seen.
        mask: (B, 1, Q, L) or what broadcasts to it, added to attention scores.

    Returns:
        (B, Q, D).
    """
    size = hidden.shape[2]
    weight, bias = block.qkv.weight, block.qkv.bias

    def heads(values: Tensor) -> Tensor:
        """(B, L, D) to (B, heads, L, D / heads)."""
        return values.unflatten(2, (block.num_heads, -1)).transpose(1, 2)

    normed = block.attention_norm(hidden)
    wanted = normed if asking is hidden else block.attention_norm(asking)
    query = heads(F.linear(wanted, weight[:size], bias[:size]))
    key, value = F.linear(normed, weight[size:], bias[size:]).split(size, dim=2)
    scale = (size // block.num_heads) ** -0.5
    attention = torch.softmax(query @ heads(key).transpose(2, 3) * scale + mask, dim=3)
    attended = (attention @ heads(value)).transpose(1, 2).flatten(2)
    asking = asking + block.attention_out(attended)
    return asking + block.ffn_out(F.gelu(block.ffn_in(block.ffn_norm(asking))))
