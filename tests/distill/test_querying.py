"""Who asks, and what a verdict counts."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cotrain.data.batches import SequenceBatch
from cotrain.distill.querying import Policy, Query, Teacher, equal_shares, verdict_weight
from cotrain.student.retrieval import Candidates
from cotrain.teacher.verdict import TeacherVerdict


def test_an_exact_share_asks_each_epoch_whatever_the_batches():
    users = np.arange(10, 110)
    query = Query(users, 0.23, seed=3)
    assert query.rows_per_epoch == 23
    whole = query.choose(torch.from_numpy(users), epoch=4)
    assert int(whole.sum()) == 23
    parts = [query.choose(torch.from_numpy(users[i : i + 7]), epoch=4) for i in range(0, 100, 7)]
    assert torch.cat(parts).equal(whole)
    assert not query.choose(torch.from_numpy(users), epoch=5).equal(whole)


@pytest.mark.parametrize(
    ("fraction", "policy", "count"), [(0.0, "random", 0), (1.0, "random", 100), (0.1, "all", 100)]
)
def test_nobody_or_everybody(fraction: float, policy: Policy, count: int):
    users = np.arange(100)
    query = Query(users, fraction, seed=0, policy=policy)
    assert query.rows_per_epoch == count
    assert int(query.choose(torch.from_numpy(users), epoch=0).sum()) == count


def test_every_user_is_as_likely_over_epochs():
    users = np.arange(20)
    query = Query(users, 0.25, seed=0)
    times = sum(query.choose(torch.from_numpy(users), epoch).long() for epoch in range(2000))
    assert isinstance(times, torch.Tensor)
    # 2000 draws of 1/4: mean 500, standard deviation 19.
    assert times.min() > 500 - 5 * 19
    assert times.max() < 500 + 5 * 19


def test_weights_follow_confidence_only_where_the_verdict_is_valid():
    verdict = TeacherVerdict(
        identifier_logits=torch.zeros(3, 2),
        ranks=torch.full((3, 2), 1.5),
        probs=torch.full((3, 2), 0.5),
        decision_state=torch.zeros(3, 4),
        valid=torch.tensor([True, False, True]),
        confidence=torch.tensor([0.25, 0.9, 1.0]),
        agreement=torch.tensor([0.5, 0.9, 0.0]),
        shown_order=torch.zeros(3, 2, dtype=torch.int64),
    )
    assert verdict_weight(verdict, "entropy").tolist() == [0.25, 0.0, 1.0]
    assert verdict_weight(verdict, "agreement").tolist() == [0.5, 0.0, 0.0]
    assert verdict_weight(verdict, "none").tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("passes_scores", [False, True])
def test_scores_go_with_the_rows_that_ask_where_they_are_wanted(passes_scores: bool):
    asked: list[Any] = []

    class Ranker:
        def rank(self, *rows: Any, **more: Any) -> TeacherVerdict:
            asked.append((rows, more))
            nothing = torch.zeros(len(rows[0]), 2)
            flags = torch.ones(len(rows[0]), dtype=torch.bool)
            size = torch.zeros(len(rows[0]))
            return TeacherVerdict(None, nothing, nothing, nothing, flags, size, size, nothing)

        def calibrate(self, *rows: Any, **more: Any) -> TeacherVerdict:
            return self.rank(*rows, **more)

    ranker: Any = Ranker()
    query = Query(np.arange(4), 1.0, seed=0)
    teacher = Teacher(ranker, query, 2, 0, 1.0, passes_scores)
    history = torch.tensor([[0, 9], [8, 7], [0, 6], [5, 4]])
    batch: Any = SequenceBatch.__new__(SequenceBatch)
    object.__setattr__(batch, "history", history)
    object.__setattr__(batch, "user_index", torch.arange(4))
    candidates = Candidates(
        torch.tensor([[1, 2], [3, 4], [5, 0], [1, 3]]),
        torch.tensor([[0.5, 0.25], [4.0, 2.0], [1.0, -torch.inf], [8.0, 7.0]]),
        torch.zeros(4, dtype=torch.int64),
    )
    teacher.calibrate(batch, candidates)
    teacher.ask(batch, candidates, 3)
    expected = {"scores": [[0.5, 0.25], [4.0, 2.0], [8.0, 7.0]]} if passes_scores else {}
    for rows, more in asked:
        assert rows[1] == [[1, 2], [3, 4], [1, 3]]
        assert more == expected


@given(costs=st.lists(st.integers(1, 500), max_size=40), count=st.integers(1, 5))
def test_shares_hold_everything_once_and_weigh_alike(costs: list[int], count: int):
    shares = equal_shares(costs, count)
    assert len(shares) == count
    assert sorted(place for share in shares for place in share) == list(range(len(costs)))
    sums = [sum(costs[place] for place in share) for share in shares]
    # Whoever has most was the lightest before it got its last row.
    assert max(sums) - min(sums) <= max(costs, default=0)


def test_shares_are_the_same_for_everybody_also_among_equals():
    assert equal_shares([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]
    assert equal_shares([1, 9, 2, 8], 2) == [[1, 0], [3, 2]]
    assert equal_shares([], 3) == [[], [], []]
