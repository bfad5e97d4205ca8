"""Retrieval equals sorting all scores, whatever the chunks, and never proposes what was seen."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotrain.student.retrieval import Candidates, retrieve


def brute_force(states, vectors, history, k) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and scores by sorting; -inf where nothing is left."""
    ids, scores = [], []
    for row, seen in zip(states @ vectors.T, history, strict=True):
        unseen = sorted(set(range(1, len(vectors))) - set(seen.tolist()), key=lambda i: -row[i])
        ids.append(unseen[:k])
        scores.append([float(row[item]) for item in unseen[:k]])
    return ids, scores


def setup(seed: int, users: int, items: int, seen: int, size: int = 6):
    """States, vectors and left-padded histories of 0 to `seen` items."""
    rng = np.random.default_rng(seed)
    states = torch.from_numpy(rng.normal(size=(users, size))).float()
    vectors = torch.from_numpy(rng.normal(size=(items + 1, size))).float()
    history = torch.from_numpy(rng.integers(1, items + 1, (users, seen)))
    padding = torch.from_numpy(rng.integers(0, seen + 1, (users, 1)))
    history[torch.arange(seen)[None] < padding] = 0
    return states, vectors, history


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    users=st.integers(1, 5),
    items=st.integers(2, 40),
    seen=st.integers(0, 30),
    chunk_size=st.integers(1, 45),
    data=st.data(),
)
def test_equals_sorting_whatever_the_chunks(seed, users, items, seen, chunk_size, data):
    k = data.draw(st.integers(1, items))
    states, vectors, history = setup(seed, users, items, seen)
    targets = torch.from_numpy(np.random.default_rng(seed).integers(1, items + 1, users))
    before = states.clone(), vectors.clone(), history.clone()
    found = retrieve(states, vectors, history, targets, k, chunk_size)
    ids, scores = brute_force(states, vectors, history, k)
    for row in range(users):
        count = len(ids[row])
        assert found.item_ids[row, :count].tolist() == ids[row]
        np.testing.assert_allclose(found.scores[row, :count], scores[row], rtol=1e-5, atol=1e-6)
        assert (found.scores[row, count:] == -torch.inf).all()
        assert (found.item_ids[row, count:] == 0).all()
        assert found.complete[row] == (count == k)
        target = int(targets[row])
        rank = ids[row].index(target) + 1 if target in ids[row] else 0
        assert found.target_rank[row] == rank
    # What was passed in is still what it was.
    for left, right in zip(before, (states, vectors, history), strict=True):
        assert torch.equal(left, right)


def test_neither_history_nor_padding_is_ever_proposed():
    states, vectors, history = setup(0, users=50, items=200, seen=60)
    # Padding and all that was seen would score best by far.
    direction = torch.zeros(6)
    direction[0] = 100.0
    states[:, 0] = 1.0
    vectors[0] = direction
    vectors[history.unique()] += direction
    for chunk_size in (7, 64, 201, 10_000):
        found = retrieve(states, vectors, history, torch.ones(50).long(), 20, chunk_size)
        assert found.complete.all()
        assert (found.item_ids > 0).all()
        assert not (found.item_ids[:, :, None] == history[:, None, :]).any()


@pytest.fixture
def by_hand():
    """One user whose score of item i is 10 - i; items 2 and 4 were seen."""
    return torch.ones(1, 1), torch.arange(10.0, 3, -1)[:, None], torch.tensor([[0, 2, 4]])


def ask(by_hand, target: int, k: int = 3) -> Candidates:
    states, vectors, history = by_hand
    return retrieve(states, vectors, history, torch.tensor([target]), k)


@pytest.mark.parametrize(("target", "rank"), [(1, 1), (3, 2), (5, 3), (6, 0)])
def test_target_rank(by_hand, target, rank):
    found = ask(by_hand, target)
    assert found.item_ids.tolist() == [[1, 3, 5]]
    assert found.scores.tolist() == [[9, 7, 5]]
    assert found.target_rank.tolist() == [rank]


def test_a_repeated_target_stays_masked(by_hand):
    found = ask(by_hand, target=2)
    assert 2 not in found.item_ids
    assert found.target_rank.tolist() == [0]


def test_too_few_unseen_items(by_hand):
    """Places that stayed empty held masked items, and a masked target was found there."""
    assert ask(by_hand, target=6, k=4).complete.tolist() == [True]
    found = ask(by_hand, target=2, k=5)
    assert found.item_ids.tolist() == [[1, 3, 5, 6, 0]]
    assert found.scores[0, 4] == -torch.inf
    assert found.complete.tolist() == [False]
    assert found.target_rank.tolist() == [0]


def test_no_gradient_flows():
    states, vectors, history = setup(1, users=3, items=9, seen=2)
    states.requires_grad_()
    vectors.requires_grad_()
    found = retrieve(states, vectors, history, torch.ones(3).long(), 4)
    assert not found.scores.requires_grad
