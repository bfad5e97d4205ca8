import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotrain.evaluation.metrics import (
    metrics_from_ranks,
    per_user_metric,
    recommendation_metrics,
    target_ranks,
    top_items,
)

NAN = float("nan")


def rank(scores, target, excluded=()):
    """Rank of one target; column 0 is padding."""
    return int(target_ranks(torch.tensor([scores]), torch.tensor([target]), *pairs([excluded])))


def pairs(excluded):
    """Rows and ids, flat, of what each row excludes."""
    flat = [(row, item) for row, items in enumerate(excluded) for item in items]
    return tuple(torch.tensor(flat, dtype=torch.int64).reshape(-1, 2).T)


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
    target_ranks(scores, torch.tensor([1, 2, 3, 10]), *pairs([[1, 2], [], [4], [1, 1]]))
    assert torch.equal(scores, before)


def test_a_batch_is_its_rows():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(32, 50, generator=generator).round(decimals=1)  # many ties
    targets = torch.randint(1, 50, (32,), generator=generator)
    excluded = torch.randint(0, 50, (32, 7), generator=generator).tolist()
    together = target_ranks(scores, targets, *pairs(excluded))
    assert together.dtype == torch.int64
    alone = [
        int(target_ranks(scores[i : i + 1], targets[i : i + 1], *pairs(excluded[i : i + 1])))
        for i in range(32)
    ]
    assert together.tolist() == alone


def test_half_precision_and_no_rows():
    assert target_ranks(
        torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.bfloat16),
        torch.tensor([1], dtype=torch.int32),
        *pairs([[]]),
    ).tolist() == [2]
    empty = target_ranks(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), *pairs([]))
    assert empty.shape == (0,)


@pytest.mark.parametrize("target", [0, 3, -1])
def test_target_outside_the_catalogue_is_an_error(target):
    with pytest.raises(ValueError, match=f"between 1 and 2.*{target} to {target}"):
        rank([0.0, 1.0, 2.0], target)


def test_shapes_that_disagree_are_an_error():
    with pytest.raises(ValueError, match=r"received \(2, 3\), \(1,\), \(0,\), \(0,\)"):
        target_ranks(torch.zeros(2, 3), torch.ones(1), *pairs([]))
    with pytest.raises(ValueError, match=r"received \(2, 3\), \(2,\), \(1,\), \(2,\)"):
        target_ranks(torch.zeros(2, 3), torch.ones(2), torch.zeros(1), torch.zeros(2))


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


def test_mrr_with_a_cut_off():
    assert per_user_metric(np.array([1, 2, 5, 6]), "mrr@5").tolist() == [1, 1 / 2, 1 / 5, 0]


def test_per_user_values_average_to_the_metric():
    ranks = np.array([1, 2, 5, 6, 11, 400])
    for name, value in metrics_from_ranks(ranks, ks=(2, 5)).items():
        assert per_user_metric(ranks, name).mean() == pytest.approx(value)
    assert per_user_metric(ranks, "recall@5").tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    "name", ["recall", "ndcg@", "ndcg@0", "mrr@0", "ndcg@-1", "precision@10", "MRR"]
)
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


def their_metrics(cases, names):
    """The same by ranx, which is given the eligible items and their scores.

    Args:
        cases: (scores, target, excluded) of each user.
        names: Our name of each metric: theirs.
    """
    ranx = pytest.importorskip("ranx")
    run, truth = {}, {}
    for user, (scores, target, excluded) in enumerate(cases):
        eligible = set(range(1, len(scores))) - set(excluded) | {target}
        run[f"u{user}"] = {f"i{item}": float(scores[item]) for item in eligible}
        truth[f"u{user}"] = {f"i{target}": 1}
    # Always several metrics: for one alone it returns a number and no dictionary.
    found = ranx.evaluate(ranx.Qrels(truth), ranx.Run(run), list(names.values()))
    assert isinstance(found, dict)
    return {name: found[theirs] for name, theirs in names.items()}


@pytest.mark.parametrize("ties", [False, True])
def test_agrees_with_an_independent_library(ties):
    """Where scores tie, ranx takes any order; it is given the one that is worst for the model, each
    target just below its equals, which is how we count."""
    rng = np.random.default_rng(0)
    cases, ordered, ranks = [], [], []
    for _ in range(300):
        num_items = int(rng.integers(2, 60))
        scores = rng.permutation(num_items + 1)
        if ties:
            scores //= 5
        target = int(rng.integers(1, num_items + 1))
        excluded = rng.integers(0, num_items + 1, size=min(5, num_items)).tolist()
        cases.append((scores, target, excluded))
        ranks.append(rank(scores.tolist(), target, excluded))
        below_its_equals = scores.astype(float)
        below_its_equals[target] -= 0.5
        ordered.append((below_its_equals, target, excluded))
    ours = metrics_from_ranks(np.array(ranks))
    ours |= {"mrr@7": float(per_user_metric(np.array(ranks), "mrr@7").mean())}
    names = {name: name.replace("recall", "hit_rate") for name in ours}
    assert ours == pytest.approx(their_metrics(ordered, names), abs=1e-9)
    if ties:
        theirs = their_metrics(cases, names)
        assert all(ours[name] < theirs[name] for name in ours)


# ---- what is recommended ------------------------------------------------------------------------


def best(scores, excluded=(), k=2):
    return top_items(torch.tensor([scores]), *pairs([excluded]), k=k).tolist()[0]


def test_top_items_by_hand():
    assert best([9.0, 1.0, 3.0, 2.0]) == [2, 3]
    assert best([9.0, 1.0, 3.0, 2.0], excluded=[2, 2]) == [3, 1]
    assert best([9.0, 1.0, 3.0], excluded=[1], k=4) == [2, 0, 0, 0]
    assert best([9.0, 1.0, 3.0], excluded=[1, 2]) == [0, 0]


def test_scores_without_a_number_are_never_recommended():
    assert best([NAN, 1.0, NAN, 2.0]) == [3, 1]
    assert best([0.0, NAN, NAN, 2.0]) == [3, 0]
    assert best([0.0, math.inf, NAN, -math.inf]) == [1, 0]


def test_the_first_item_of_a_list_is_the_one_of_rank_1():
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(50, 30, generator=generator)
    excluded = pairs(torch.randint(1, 30, (50, 6), generator=generator).tolist())
    lists = top_items(scores.clone(), *excluded, k=10)
    for place in range(10):
        assert target_ranks(scores, lists[:, place], *excluded).tolist() == [place + 1] * 50


def test_recommendation_metrics_by_hand():
    # Four items with 5, 1, 1 and 0 training interactions; two lists of two.
    counts, lists = np.array([0, 5, 1, 1, 0]), np.array([[1, 2], [1, 3]])
    found = recommendation_metrics(lists, counts)
    expected = {
        "coverage@2": Fraction(3, 4),
        # Percentiles 7/8, 1/2, 1/2 and 1/8.
        "popularity@2": (2 * Fraction(7, 8) + Fraction(1, 2) + Fraction(1, 2)) / 4,
        # The head is one item of four, the first.
        "head_share@2": Fraction(2, 4),
        # Shown 0, 1, 1 and 2 times: half the mean difference of all pairs, over the mean.
        "gini@2": Fraction(0 + 2 * (1 + 1 + 2 + 0 + 1 + 1), 2 * 4 * 4 * 1),
    }
    assert list(found) == list(expected)
    for name, fraction in expected.items():
        assert found[name] == pytest.approx(float(fraction), abs=1e-15), name


def test_recommendation_metrics_at_their_ends():
    counts = np.arange(101)
    everything = np.arange(1, 101).reshape(10, 10)
    found = recommendation_metrics(everything, counts)
    assert found == pytest.approx(
        {"coverage@10": 1, "popularity@10": 0.5, "head_share@10": 0.1, "gini@10": 0}
    )
    one = recommendation_metrics(np.full((9, 1), 100), counts)
    assert one == pytest.approx(
        {"coverage@1": 0.01, "popularity@1": 0.995, "head_share@1": 1, "gini@1": 0.99}
    )
    assert recommendation_metrics(np.full((9, 1), 1), np.full(101, 7))["popularity@1"] == 0.5
    nothing = recommendation_metrics(np.zeros((3, 10), dtype=int), counts)
    assert nothing["coverage@10"] == 0
    assert math.isnan(nothing["gini@10"])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_gini_and_popularity_against_their_definitions(seed, num_items):
    rng = np.random.default_rng(seed)
    lists = rng.integers(0, num_items + 1, size=(rng.integers(1, 9), 3))
    lists[0, 0] = 1
    counts = rng.integers(0, 5, size=num_items + 1)
    found = recommendation_metrics(lists, counts)
    shown = np.array([(lists == item).sum() for item in range(1, num_items + 1)])
    differences = np.abs(shown[:, None] - shown).mean()
    assert found["gini@3"] == pytest.approx(differences / (2 * shown.mean()))
    percentiles = [
        ((counts[1:] < counts[item]).sum() + (counts[1:] == counts[item]).sum() / 2) / num_items
        for item in lists[lists != 0]
    ]
    assert found["popularity@3"] == pytest.approx(np.mean(percentiles))
    assert found["coverage@3"] == len(set(lists[lists != 0].tolist())) / num_items


def test_recommendations_outside_the_catalogue_are_an_error():
    with pytest.raises(ValueError, match="between 1 and 3, with 0 for none; received 1 to 4"):
        recommendation_metrics(np.array([[1, 4]]), np.zeros(4))
    with pytest.raises(ValueError, match=r"received \(2,\) and \(4,\)"):
        recommendation_metrics(np.array([1, 2]), np.zeros(4))
