import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotrain.evaluation.metrics import metrics_from_ranks, per_user_metric, target_ranks

NAN = float("nan")


def rank(scores, target, excluded=()):
    """Rank of one target; column 0 is padding."""
    ids = torch.tensor([list(excluded)], dtype=torch.int64).reshape(1, -1)
    return int(target_ranks(torch.tensor([scores]), torch.tensor([target]), ids))


def test_rank_by_hand():
    scores = [9.0, 0.1, 0.4, 0.3, 0.2]
    assert [rank(scores, target) for target in (1, 2, 3, 4)] == [4, 1, 2, 3]


def test_padding_never_outranks_the_target():
    assert rank([math.inf, 0.5, 0.1], target=1) == 1
    assert rank([NAN, 0.5, 0.1], target=1) == 1


def test_excluded_items_leave_the_catalogue():
    scores = [0.0, 5.0, 4.0, 3.0, 2.0]
    assert rank(scores, target=4) == 4
    assert rank(scores, target=4, excluded=[1, 3, 0, 0]) == 2
    assert rank(scores, target=4, excluded=[1, 1, 3, 3]) == 2


def test_an_excluded_target_stays_eligible():
    assert rank([0.0, 5.0, 4.0, 3.0], target=2, excluded=[2, 1, 0]) == 1


def test_ties_count_against_the_model():
    assert rank([0.0, 1.0, 1.0, 1.0], target=1) == 3
    assert rank([0.0, 1.0, 1.0, 1.0], target=1, excluded=[2]) == 2
    assert rank([0.0, 0.0, -1.0, 1.0], target=1) == 2


def test_nan_counts_against_the_model():
    assert rank([0.0, 1.0, NAN, 0.5], target=1) == 2
    assert rank([0.0, NAN, 1.0, 0.5], target=1) == 3
    assert rank([0.0, NAN, NAN, NAN], target=1, excluded=[3]) == 2
    assert rank([0.0, 1.0, NAN, 0.5], target=1, excluded=[2]) == 1


def test_infinite_scores():
    assert rank([0.0, -math.inf, 1.0, 0.5], target=1) == 3
    assert rank([0.0, math.inf, 1.0, 0.5], target=1) == 1
    assert rank([0.0, -math.inf, -math.inf], target=1) == 2


def test_ranks_do_not_modify_the_scores():
    scores = torch.rand(4, 11)
    before = scores.clone()
    target_ranks(
        scores, torch.tensor([1, 2, 3, 10]), torch.tensor([[1, 2], [0, 0], [4, 0], [1, 1]])
    )
    assert torch.equal(scores, before)


def test_a_batch_is_its_rows():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(32, 50, generator=generator).round(decimals=1)  # many ties
    targets = torch.randint(1, 50, (32,), generator=generator)
    excluded = torch.randint(0, 50, (32, 7), generator=generator)
    together = target_ranks(scores, targets, excluded)
    assert together.dtype == torch.int64
    alone = [
        int(target_ranks(scores[i : i + 1], targets[i : i + 1], excluded[i : i + 1]))
        for i in range(32)
    ]
    assert together.tolist() == alone


def test_half_precision_and_no_rows():
    assert target_ranks(
        torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.bfloat16),
        torch.tensor([1], dtype=torch.int32),
        torch.zeros(1, 0, dtype=torch.int64),
    ).tolist() == [2]
    empty = target_ranks(
        torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64)
    )
    assert empty.shape == (0,)


@pytest.mark.parametrize("target", [0, 3, -1])
def test_target_outside_the_catalogue_is_an_error(target):
    with pytest.raises(ValueError, match=f"between 1 and 2.*{target} to {target}"):
        rank([0.0, 1.0, 2.0], target)


def test_shapes_that_disagree_are_an_error():
    with pytest.raises(ValueError, match=r"received \(2, 3\), \(1,\) and \(2, 1\)"):
        target_ranks(torch.zeros(2, 3), torch.ones(1), torch.zeros(2, 1))


def test_metrics_by_hand():
    # Ranks 1, 3, 7, 30: log2(2) = 1, log2(4) = 2, log2(8) = 3.
    metrics = metrics_from_ranks(np.array([1, 3, 7, 30]))
    expected = {
        "recall@1": Fraction(1, 4),
        "recall@5": Fraction(2, 4),
        "recall@10": Fraction(3, 4),
        "recall@20": Fraction(3, 4),
        "ndcg@1": Fraction(1, 4),
        "ndcg@5": (1 + Fraction(1, 2)) / 4,
        "ndcg@10": (1 + Fraction(1, 2) + Fraction(1, 3)) / 4,
        "ndcg@20": (1 + Fraction(1, 2) + Fraction(1, 3)) / 4,
        "mrr": (1 + Fraction(1, 3) + Fraction(1, 7) + Fraction(1, 30)) / 4,
    }
    assert list(metrics) == list(expected)
    for name, fraction in expected.items():
        assert metrics[name] == pytest.approx(float(fraction), abs=1e-15), name
        assert type(metrics[name]) is float


def test_mrr_is_not_truncated():
    assert metrics_from_ranks(np.array([1000]))["mrr"] == pytest.approx(1 / 1000)


def test_per_user_values_average_to_the_metric():
    ranks = np.array([1, 2, 5, 6, 11, 400])
    for name, value in metrics_from_ranks(ranks, ks=(2, 5)).items():
        assert per_user_metric(ranks, name).mean() == pytest.approx(value)
    assert per_user_metric(ranks, "recall@5").tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("name", ["recall", "ndcg@", "ndcg@0", "ndcg@-1", "precision@10", "MRR"])
def test_unknown_metric_names_what_is_known(name):
    with pytest.raises(ValueError, match="expected 'recall@k'"):
        per_user_metric(np.array([1]), name)


def test_wrong_ranks_are_an_error():
    with pytest.raises(ValueError, match="no ranks"):
        metrics_from_ranks(np.array([]))
    with pytest.raises(ValueError, match="1-based; received 1"):
        metrics_from_ranks(np.array([1, 0]))
    with pytest.raises(ValueError, match="1-based"):
        metrics_from_ranks(np.array([1.0, NAN]))
    with pytest.raises(ValueError, match=r"shape \(U,\)"):
        metrics_from_ranks(np.ones((2, 2)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(2, 60))
def test_agrees_with_an_independent_library(seed, num_users, num_items):
    """ranx sees the eligible items and their scores; without ties both must agree."""
    ranx = pytest.importorskip("ranx")
    rng = np.random.default_rng(seed)
    scores = np.stack([rng.permutation(num_items + 1) for _ in range(num_users)]) / 7.0
    targets = rng.integers(1, num_items + 1, size=num_users)
    excluded = rng.integers(0, num_items + 1, size=(num_users, min(5, num_items)))
    ranks = target_ranks(*(torch.from_numpy(part) for part in (scores, targets, excluded)))
    ours = metrics_from_ranks(ranks.numpy())

    run = {
        f"u{user}": {
            f"i{item}": float(scores[user, item])
            for item in range(1, num_items + 1)
            if item == targets[user] or item not in excluded[user]
        }
        for user in range(num_users)
    }
    truth = {f"u{user}": {f"i{target}": 1} for user, target in enumerate(targets)}
    names = {name: name.replace("recall", "hit_rate") for name in ours}
    theirs = ranx.evaluate(ranx.Qrels(truth), ranx.Run(run), list(names.values()))
    assert isinstance(theirs, dict)
    for name, their_name in names.items():
        assert ours[name] == pytest.approx(theirs[their_name], abs=1e-9), name
