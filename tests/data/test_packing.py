"""Packed rows lose nothing, stay apart, and waste little where they meet in a grid."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cotrain.data.packing import PackedSequences, pack, pack_together

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def rows_of(sizes: list[int]) -> list[np.ndarray]:
    """Rows of these lengths whose items are 1, 2, … through all of them, none twice."""
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end) + 1 for size, end in zip(sizes, ends, strict=True)]


def unpacked(values: Tensor, packed: PackedSequences) -> list[list]:
    starts, sizes = packed.starts.tolist(), packed.lengths.tolist()
    return [
        values[start : start + size].tolist() for start, size in zip(starts, sizes, strict=True)
    ]


def test_three_rows_by_hand():
    packed = pack([np.array([5, 6, 7]), np.array([1]), np.array([2, 3])])
    assert packed.item_ids.tolist() == [1, 2, 3, 5, 6, 7]
    assert packed.positions.tolist() == [0, 0, 1, 0, 1, 2]
    assert packed.starts.tolist() == [3, 0, 1]
    assert packed.lengths.tolist() == [3, 1, 2]
    assert packed.last.tolist() == [5, 0, 2]
    (group,) = packed.groups
    assert (group.num_rows, group.length, group.num_tokens) == (3, 3, 6)
    assert group.slots is not None
    assert group.slots.tolist() == [0, 3, 4, 6, 7, 8]  # 1 . . | 2 3 . | 5 6 7


@given(lengths)
def test_every_row_is_found_again_in_the_order_given(sizes):
    rows = rows_of(sizes)
    packed, (negated, squared) = pack_together(
        rows, [-row for row in rows], [row.astype(np.int32) ** 2 for row in rows]
    )
    assert unpacked(packed.item_ids, packed) == [row.tolist() for row in rows]
    assert unpacked(packed.positions, packed) == [list(range(size)) for size in sizes]
    assert packed.item_ids[packed.last].tolist() == [row[-1] for row in rows]
    assert len(packed.item_ids) == sum(sizes)
    assert negated.equal(-packed.item_ids)
    assert squared.equal(packed.item_ids**2)
    assert squared.dtype == torch.int64


@given(lengths)
def test_groups_are_right_padded_grids_that_hold_every_position_once(sizes):
    packed = pack(rows_of(sizes))
    assert sum(group.num_rows for group in packed.groups) == len(sizes)
    parts = packed.item_ids.split([group.num_tokens for group in packed.groups])
    seen = []
    for group, items in zip(packed.groups, parts, strict=True):
        cells = torch.zeros(group.num_rows * group.length, dtype=torch.int64)
        # Only a full grid can do without slots: its positions are its cells.
        cells[slice(None) if group.slots is None else group.slots] = items
        grid = cells.view(group.num_rows, group.length)
        assert (grid != 0).sum() == group.num_tokens
        assert (grid[:, 0] != 0).all()
        assert ((grid[:, 1:] != 0) <= (grid[:, :-1] != 0)).all()
        seen += [row[row != 0].tolist() for row in grid]
    assert sorted(seen) == sorted(row.tolist() for row in rows_of(sizes))


@given(lengths)
def test_grids_are_little_larger_than_what_they_hold(sizes):
    packed = pack(rows_of(sizes))
    for group in packed.groups:
        cells = group.num_rows * group.length
        assert cells <= 1.25 * group.num_tokens + 2 * group.num_rows
        assert (group.slots is None) == (cells == group.num_tokens)


def test_grids_of_real_data_are_less_than_a_tenth_empty(ml100k):
    rows = [ml100k.train_history(user)[-200:] for user in range(256)]
    packed = pack(rows)
    cells = sum(group.num_rows * group.length for group in packed.groups)
    assert cells < 1.1 * len(packed.item_ids)
    # One padded grid would be more than half empty.
    assert max(map(len, rows)) * len(rows) > 2 * len(packed.item_ids)
    assert len(packed.groups) < 25


def test_to_device_moves_every_tensor():
    packed = pack(rows_of([1, 2, 30, 30])).to(torch.device("meta"))
    tensors = [packed.item_ids, packed.positions, packed.starts, packed.lengths]
    tensors += [group.slots for group in packed.groups if group.slots is not None]
    assert len(tensors) == 5
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_an_empty_row_is_refused():
    """It has no last item: `last` pointed at another row's."""
    with pytest.raises(ValueError, match="1 of 3 sequences to pack are empty"):
        pack([np.array([1]), np.array([], dtype=np.int64), np.array([2])])
