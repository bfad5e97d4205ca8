"""Sequences of unlike length side by side, without padding.

A batch of histories is one line of N items. Everything that looks at one position at a time (norms,
projections, logits) works on these N and on nothing else; only attention needs rows beside each
other, and gets them in groups of like length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

# Rows attend together while the longest is at most this much longer than the shortest. Tighter
# groups waste less, and are more and smaller calls.
_GROUP_RATIO, _GROUP_SLACK = 1.25, 2


@dataclass(frozen=True)
class RowGroup:
    """Neighbouring rows that attend together, as a right-padded grid.

    Padding is on the right, where no real position can see it under a causal mask.

    Attributes:
        num_rows: Rows of the grid.
        length: Its columns: the longest row.
        num_tokens: Real positions, at most num_rows × length.
        slots: (num_tokens,) int64 cell of each position in the grid read row by row; None where
            the grid has no empty cell.
    """

    num_rows: int
    length: int
    num_tokens: int
    slots: Tensor | None


@dataclass(frozen=True)
class PackedSequences:
    """B sequences, N items in all, rows one after another.

    Rows are packed by length; `starts` finds them in the order in which they were given.

    Attributes:
        item_ids: (N,) int64 item indices, each row oldest first; no padding among them.
        positions: (N,) int64 place within the row, from 0.
        starts: (B,) int64 index of each row's first item.
        lengths: (B,) int64.
        groups: Partition of the N positions, in their order.
    """

    item_ids: Tensor
    positions: Tensor
    starts: Tensor
    lengths: Tensor
    groups: tuple[RowGroup, ...]

    @property
    def last(self) -> Tensor:
        """(B,) index of each row's last item."""
        return self.starts + self.lengths - 1

    def to(self, device: torch.device) -> "PackedSequences":
        """The same on a device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        groups = tuple(
            group if group.slots is None else replace(group, slots=moved(group.slots))
            for group in self.groups
        )
        return PackedSequences(
            moved(self.item_ids), moved(self.positions), moved(self.starts), moved(self.lengths),
            groups,
        )  # fmt: skip


def pack(rows: Sequence[np.ndarray]) -> PackedSequences:
    """Packs item sequences, each with one item or more; `pack_together` without others."""
    packed, _ = pack_together(rows)
    return packed


def pack_together(
    rows: Sequence[np.ndarray], *others: Sequence[np.ndarray]
) -> tuple[PackedSequences, list[Tensor]]:
    """Packs item sequences, and other values of the same shapes into the same places.

    Args:
        rows: B arrays of item indices, each with one or more.
        others: Further lists of B arrays, of the lengths of `rows`.

    Returns:
        The packed rows, and one (N,) int64 tensor for each of `others`.

    Raises:
        ValueError: An empty row.
    """
    lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    if not lengths.all():
        # Its last item would silently be another row's.
        raise ValueError(
            f"{(lengths == 0).sum()} of {len(rows)} sequences to pack are empty; expected one item "
            "or more in each"
        )
    order = np.argsort(lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    starts = np.empty_like(lengths)
    starts[order] = ends - lengths[order]

    def line(values: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([values[row] for row in order], dtype=np.int64))

    packed = PackedSequences(
        item_ids=line(rows),
        positions=torch.from_numpy(_within(lengths[order])),
        starts=torch.from_numpy(starts),
        lengths=torch.from_numpy(lengths),
        groups=tuple(_groups(lengths[order])),
    )
    return packed, [line(values) for values in others]


def _within(lengths: np.ndarray) -> np.ndarray:
    """0, 1, … of every row, rows one after another."""
    first = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(first, lengths)


def _groups(ascending: np.ndarray) -> list[RowGroup]:
    groups = []
    row = 0
    while row < len(ascending):
        limit = int(ascending[row] * _GROUP_RATIO) + _GROUP_SLACK
        end = int(np.searchsorted(ascending, limit, side="right"))
        lengths = ascending[row:end]
        length, tokens = int(lengths[-1]), int(lengths.sum())
        slots = None
        if tokens < length * len(lengths):
            row_start = np.arange(len(lengths), dtype=np.int64) * length
            slots = torch.from_numpy(np.repeat(row_start, lengths) + _within(lengths))
        groups.append(RowGroup(len(lengths), length, tokens, slots))
        row = end
    return groups
