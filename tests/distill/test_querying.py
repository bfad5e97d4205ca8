"""Who asks, and what a verdict counts."""

import numpy as np
import pytest
import torch

from cotrain.distill.querying import RandomQuery, verdict_weight
from cotrain.teacher.verdict import TeacherVerdict


def test_an_exact_share_asks_each_epoch_whatever_the_batches():
    users = np.arange(10, 110)
    query = RandomQuery(users, 0.23, seed=3)
    assert query.rows_per_epoch == 23
    whole = query.choose(torch.from_numpy(users), epoch=4)
    assert int(whole.sum()) == 23
    parts = [query.choose(torch.from_numpy(users[i : i + 7]), epoch=4) for i in range(0, 100, 7)]
    assert torch.cat(parts).equal(whole)
    assert not query.choose(torch.from_numpy(users), epoch=5).equal(whole)


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (1.0, 100)])
def test_nobody_or_everybody(fraction: float, count: int):
    users = np.arange(100)
    chosen = RandomQuery(users, fraction, seed=0).choose(torch.from_numpy(users), epoch=0)
    assert int(chosen.sum()) == count


def test_every_user_is_as_likely_over_epochs():
    users = np.arange(20)
    query = RandomQuery(users, 0.25, seed=0)
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
