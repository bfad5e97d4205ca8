"""The student on padded histories is the student on packed ones, wherever the padding stands."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotrain.student.padded import PaddedSASRec
from cotrain.student.retrieval import retrieve
from cotrain.student.sasrec import SASRec

NUM_ITEMS, MAX_LENGTH = 40, 8


def make(num_layers: int = 3) -> SASRec:
    torch.manual_seed(0)
    model = SASRec(NUM_ITEMS, 12, num_layers, num_heads=3, max_length=MAX_LENGTH, dropout=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.eval()


MODEL = make()


def spread(rows: list[list[int]], gaps: list[int], length: int) -> torch.Tensor:
    """Rows in a grid of zeros, each item moved right by what the gaps say."""
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    draw = np.random.default_rng(gaps)
    for number, row in enumerate(rows):
        places = np.sort(draw.choice(length, len(row), replace=False))
        ids[number, places] = torch.tensor(row)
    return ids


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.integers(1, NUM_ITEMS), min_size=1, max_size=20), min_size=1, max_size=6
    ),
    gaps=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    more=st.integers(0, 5),
)
@torch.no_grad()
def test_states_are_those_of_the_packed_student(rows, gaps, more):
    """Longer than the model reads, of any length, padded anywhere."""
    ids = spread(rows, gaps, max(map(len, rows)) + more)
    expected = MODEL.user_states([np.array(row) for row in rows])
    found = PaddedSASRec(MODEL)(ids)
    torch.testing.assert_close(found[3], expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found[2][:, 1:], (expected @ MODEL.item_vectors.T)[:, 1:])


@torch.no_grad()
def test_one_block_is_enough():
    model = make(num_layers=1)
    ids = torch.tensor([[0, 3, 4], [5, 0, 0]])
    expected = model.user_states([np.array([3, 4]), np.array([5])])
    torch.testing.assert_close(PaddedSASRec(model)(ids)[3], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_lists_are_those_of_retrieval():
    rows = [[3, 4, 5], [7], list(range(1, 39))]
    ids = spread(rows, [0], 40)
    items, scores, _, states = PaddedSASRec(MODEL, k=5)(ids)
    nobody = torch.zeros(len(rows), dtype=torch.int64)
    expected = retrieve(states, MODEL.item_vectors, ids, nobody, 5)
    assert torch.equal(items, expected.item_ids)
    torch.testing.assert_close(scores, expected.scores)
    # 2 of 40 items are left for the last.
    assert items[2, 2:].tolist() == [0, 0, 0]
    assert scores[2, 2:].tolist() == [-torch.inf] * 3


@torch.no_grad()
def test_what_is_no_item_is_padding():
    model = PaddedSASRec(MODEL, k=1000)
    assert model.k == NUM_ITEMS
    hostile = torch.tensor([[-1, 3, NUM_ITEMS + 1, 4, 2**62, -(2**62)]])
    plain = torch.tensor([[0, 3, 0, 4, 0, 0]])
    for left, right in zip(model(hostile), model(plain), strict=True):
        assert torch.equal(left, right)
    items, scores, *others = model(torch.tensor([[0, 0], [-7, 10**12]]))
    assert not items.any()
    assert (scores == -torch.inf).all()
    assert not any(tensor.isnan().any() for tensor in others)


@torch.no_grad()
def test_other_rows_change_nothing():
    alone = PaddedSASRec(MODEL)(torch.tensor([[3, 4]]))[3]
    beside = PaddedSASRec(MODEL)(torch.tensor([[0, 0, 3, 4], [9, 8, 7, 6]]))[3][:1]
    torch.testing.assert_close(alone, beside, atol=1e-6, rtol=1e-5)


def test_k_is_at_least_one():
    with pytest.raises(ValueError, match="k is 0; expected 1 or more"):
        PaddedSASRec(MODEL, k=0)
