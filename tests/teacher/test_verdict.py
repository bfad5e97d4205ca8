"""Orders, probabilities and agreement against closed forms, fractions and brute force."""

import math
from collections import Counter
from itertools import pairwise, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cotrain.teacher.verdict import (
    TeacherVerdict,
    agreement_of,
    confidence_of,
    entropy,
    probs_of_logits,
    probs_of_ranks,
    ranks_of,
    ranks_of_order,
)

# ---- ranks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "ranks"),
    [
        ([3.0, 1.0, 2.0], [1, 3, 2]),
        ([1.0, 2.0, 2.0, 0.0], [3, 1.5, 1.5, 4]),
        ([5.0, 5.0, 5.0], [2, 2, 2]),
        ([0.0, 7.0, 0.0, 0.0], [3, 1, 3, 3]),
        ([-math.inf, 0.0, -math.inf], [2.5, 1, 2.5]),
        ([4.0], [1]),
    ],
)
def test_ranks_of_scores(scores: list[float], ranks: list[float]):
    assert ranks_of(torch.tensor(scores)).tolist() == ranks


small_scores = st.lists(st.integers(0, 4), min_size=1, max_size=5)


def ways_to_break_ties(scores: list[int]) -> list[tuple[int, ...]]:
    return [
        order
        for order in permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in pairwise(order))
    ]


@given(small_scores)
def test_a_tied_rank_is_the_mean_over_all_ways_to_break_the_tie(scores: list[int]):
    size = len(scores)
    orders = ways_to_break_ties(scores)
    means = [sum(order.index(item) + 1 for order in orders) / len(orders) for item in range(size)]
    assert ranks_of(torch.tensor(scores).float()).tolist() == pytest.approx(means)


def test_ranks_keep_what_stands_before_the_candidates():
    scores = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    together = ranks_of(scores)
    assert together.shape == scores.shape
    assert together[1, 2].equal(ranks_of(scores[1, 2]))


@pytest.mark.parametrize(
    ("order", "ranks"),
    [
        ([2, 0, 1], [2, 3, 1]),
        ([2], [2.5, 2.5, 1]),  # the two that were not named share places 2 and 3
        ([], [2, 2, 2]),
    ],
)
def test_what_an_order_does_not_name_ties_behind_it(order: list[int], ranks: list[float]):
    assert ranks_of_order(order, 3).tolist() == ranks


@given(st.permutations(range(6)), st.integers(0, 6))
def test_a_partial_order_is_one_of_scores_with_the_rest_equal(order: list[int], named: int):
    scores = torch.zeros(6)
    scores[order[:named]] = torch.arange(10.0, 10 - named, -1)
    assert ranks_of_order(order[:named], 6).equal(ranks_of(scores))


# ---- Q ------------------------------------------------------------------------------------------


def test_q_of_logits_is_a_softmax_at_its_temperature():
    logits = torch.tensor([[0.0] * 4, [math.log(9.0), 0.0, -90.0, -90.0]])
    torch.testing.assert_close(probs_of_logits(logits, 1.0)[0], torch.full((4,), 1 / 4))
    torch.testing.assert_close(probs_of_logits(logits, 1.0)[1], torch.tensor([0.9, 0.1, 0, 0]))
    assert probs_of_logits(logits, 0.5)[1, 0].item() == pytest.approx(81 / 82)


def test_q_of_ranks_in_fractions():
    # τ_r = 1 / log 2 halves from place to place: 4 : 2 : 1.
    halving = 1 / math.log(2)
    full = probs_of_ranks(torch.tensor([2.0, 1.0, 3.0]), halving)
    torch.testing.assert_close(full, torch.tensor([2 / 7, 4 / 7, 1 / 7]))
    tied = probs_of_ranks(torch.tensor([2.5, 1.0, 2.5]), halving)
    torch.testing.assert_close(tied, torch.tensor([3 / 14, 4 / 7, 3 / 14]))
    torch.testing.assert_close(
        probs_of_ranks(torch.full((3,), 2.0), halving), torch.full((3,), 1 / 3)
    )


@given(small_scores, st.floats(0.2, 20))
def test_q_of_ties_is_the_mean_over_all_ways_to_break_them(scores: list[int], temperature: float):
    size = len(scores)
    ranks = ranks_of(torch.tensor(scores).float())
    orders = ways_to_break_ties(scores)
    worth = torch.exp(-torch.arange(1, size + 1, dtype=torch.float64) / temperature)
    mean = torch.zeros(size, dtype=torch.float64)
    for order in orders:
        mean[list(order)] += worth / worth.sum() / len(orders)
    found = probs_of_ranks(ranks, temperature)
    torch.testing.assert_close(found, mean.float(), atol=1e-6, rtol=1e-4)
    assert found.sum().item() == pytest.approx(1, abs=1e-5)


def test_q_of_a_very_low_temperature_is_finite():
    probs = probs_of_ranks(torch.arange(1.0, 201), 0.01)
    assert probs.isfinite().all()
    assert probs[0] == 1


def test_an_order_at_its_temperature_teaches_and_the_log_discount_does_not():
    """METHOD.md: softmax(1 / log2(rank + 2)) is 99.3 % of uniform over 20 candidates."""
    ranks = torch.arange(1.0, 21)
    ours = entropy(probs_of_ranks(ranks, 3.0)).item() / math.log(20)
    # Hardly cut off at 20: the entropy of the geometric series with ratio q = e^(-1/3) is
    # -log(1 - q) - q log(q) / (1 - q).
    ratio = math.exp(-1 / 3)
    geometric = -math.log(1 - ratio) - ratio * math.log(ratio) / (1 - ratio)
    assert ours == pytest.approx(geometric / math.log(20), abs=0.01)
    assert ours < 0.71
    discount = torch.softmax(1 / torch.log2(ranks + 1), 0)  # rank counted from 0, as there
    assert entropy(discount).item() / math.log(20) == pytest.approx(0.993, abs=0.001)


# ---- entropy, confidence, agreement -------------------------------------------------------------


def test_entropy_and_confidence_in_closed_form():
    probs = torch.tensor([[1 / 4] * 4, [1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0]])
    nats = [math.log(4), 0, math.log(2)]
    assert entropy(probs).tolist() == pytest.approx(nats)
    assert confidence_of(probs).tolist() == pytest.approx([0, 1, 1 / 2], abs=1e-6)


@given(st.integers(2, 26), st.integers(0, 2**31), st.floats(0.01, 100))
def test_entropy_lies_between_zero_and_uniform(size: int, seed: int, temperature: float):
    logits = 20 * torch.randn(4, size, generator=torch.Generator().manual_seed(seed))
    probs = probs_of_logits(logits, temperature)
    assert (entropy(probs) >= 0).all()
    assert (entropy(probs) <= math.log(size) + 1e-5).all()
    assert ((confidence_of(probs) >= 0) & (confidence_of(probs) <= 1)).all()


def ranks(*rows: list[float]) -> torch.Tensor:
    """m rankings of one row."""
    return torch.tensor(rows, dtype=torch.float32)[:, None, :]


def spearman(one: list[float], other: list[float]) -> float:
    """Pearson's correlation of ranks, written out."""
    mean = (len(one) + 1) / 2
    together = sum((a - mean) * (b - mean) for a, b in zip(one, other, strict=True))
    alone = [math.sqrt(sum((a - mean) ** 2 for a in row)) for row in (one, other)]
    return together / (alone[0] * alone[1]) if all(alone) else 0.0


def test_agreement_by_hand():
    assert agreement_of(ranks([1, 2, 3], [1, 2, 3])).tolist() == pytest.approx([1])
    # 1 - 6 * 2 / (3 * 8): two neighbours change places.
    assert agreement_of(ranks([1, 2, 3], [2, 1, 3])).tolist() == pytest.approx([1 / 2])
    # The opposite order is -1 and counts as none.
    assert agreement_of(ranks([1, 2, 3], [3, 2, 1])).tolist() == [0]
    # Three rankings, pairs 1, 1/2 and 1/2.
    three = ranks([1, 2, 3], [1, 2, 3], [2, 1, 3])
    assert agreement_of(three).tolist() == pytest.approx([2 / 3])
    # (1, 2.5, 2.5) has deviations (-1, 1/2, 1/2): 3/2 over sqrt(3/2) sqrt(2).
    assert agreement_of(ranks([1, 2.5, 2.5], [1, 2, 3])).tolist() == pytest.approx([3**0.5 / 2])
    # A ranking that says nothing agrees with nobody.
    assert agreement_of(ranks([2, 2, 2], [1, 2, 3])).tolist() == [0]


@given(st.integers(2, 5), st.integers(2, 9), st.integers(0, 2**31))
def test_agreement_is_the_mean_over_pairs(shuffles: int, size: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    rankings = ranks_of(torch.randint(0, 6, (shuffles, 3, size), generator=generator).float())
    found = agreement_of(rankings)
    for row in range(3):
        lists = rankings[:, row].tolist()
        pairs = [(a, b) for a in range(shuffles) for b in range(a)]
        mean = sum(spearman(lists[a], lists[b]) for a, b in pairs) / len(pairs)
        assert found[row].item() == pytest.approx(max(mean, 0), abs=1e-5)


# ---- a verdict ----------------------------------------------------------------------------------


def verdict(reasonings: list[str], logits: bool = True) -> TeacherVerdict:
    """Two rows of three candidates."""
    found = torch.tensor([[3.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    return TeacherVerdict(
        identifier_logits=found if logits else None,
        ranks=ranks_of(found),
        probs=probs_of_logits(found, 1.0),
        decision_state=torch.ones(2, 4),
        valid=torch.tensor([True, True]),
        confidence=torch.tensor([0.5, 0.25]),
        agreement=torch.tensor([0.75, 0.125]),
        shown_order=torch.tensor([[2, 0, 1], [0, 1, 2]]),
        failures=Counter(non_finite=1),
        partial=Counter(truncated=1),
        reasonings=reasonings,
        prompt_tokens=300,
        generated_tokens=20,
        seconds=2.0,
    )


def test_the_ranking_is_best_first_with_ties_in_the_students_order():
    assert verdict([]).ranking.tolist() == [[0, 1, 2], [2, 1, 0]]


def test_a_spread_verdict_leaves_the_rows_that_did_not_ask_invalid_and_zero():
    asked = verdict(["first", "second"])
    spread = asked.spread(torch.tensor([3, 1]), 5)
    assert spread.valid.tolist() == [False, True, False, True, False]
    assert spread.reasonings == ["", "second", "", "first", ""]
    for name in ("identifier_logits", "ranks", "probs", "decision_state", "confidence",
                 "agreement", "shown_order"):  # fmt: skip
        value, source = getattr(spread, name), getattr(asked, name)
        assert (value.dtype, value.shape) == (source.dtype, (5, *source.shape[1:]))
        assert value[[3, 1]].equal(source)
        assert not value[[0, 2, 4]].any()
    for name in ("failures", "partial", "prompt_tokens", "generated_tokens", "seconds"):
        assert getattr(spread, name) == getattr(asked, name)


def test_a_spread_verdict_has_no_logits_and_no_reasonings_where_there_were_none():
    spread = verdict([], logits=False).spread(torch.tensor([0, 1]), 3)
    assert spread.identifier_logits is None
    assert list(spread.reasonings) == []


def test_nobody_asked_is_a_verdict_too():
    nobody = verdict([]).spread(torch.tensor([0, 1]), 2)
    empty = TeacherVerdict(
        **{
            name: getattr(nobody, name)[:0]
            for name in ("identifier_logits", "ranks", "probs", "decision_state", "valid",
                         "confidence", "agreement", "shown_order")
        }
    )  # fmt: skip
    assert not empty.spread(torch.zeros(0, dtype=torch.int64), 4).valid.any()
