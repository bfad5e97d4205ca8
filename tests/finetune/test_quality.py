"""Where the true item stands in a verdict: ties and silence count against the teacher."""

import math
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cotrain.finetune.examples import Example
from cotrain.finetune.quality import Measured, measure, metrics_of, true_ranks, unbiased
from cotrain.teacher.verdict import TeacherVerdict, probs_of_logits, ranks_of


def verdict_of(
    logits: Tensor, shown: Tensor | None = None, valid: Tensor | None = None
) -> TeacherVerdict:
    """(N, K) logits in the order of the candidates."""
    count, size = logits.shape
    order = torch.arange(size).expand(count, size) if shown is None else shown
    said = torch.ones(count, dtype=torch.bool) if valid is None else valid
    return TeacherVerdict(
        identifier_logits=logits * said[:, None], ranks=ranks_of(logits) * said[:, None],
        probs=probs_of_logits(logits, 1.0) * said[:, None], decision_state=torch.zeros(count, 4),
        valid=said, confidence=torch.zeros(count), agreement=torch.zeros(count), shown_order=order,
    )  # fmt: skip


# ---- ranks --------------------------------------------------------------------------------------


def test_ties_and_rows_without_a_verdict_count_against_the_teacher():
    logits = torch.tensor([[4.0, 3, 2, 1], [4, 4, 2, 1], [1, 4, 4, 4], [5, 5, 5, 5], [9, 3, 2, 1]])
    valid = torch.tensor([True, True, True, True, False])
    found = [true_ranks(ranks_of(logits), valid, np.full(5, place)).tolist() for place in range(4)]
    assert found == [[1, 2, 4, 4, 4], [2, 2, 3, 4, 4], [3, 3, 3, 4, 4], [4, 4, 3, 4, 4]]


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=5),
    data=st.data(),
)
def test_a_rank_is_how_many_are_at_least_as_good(rows: list[list[int]], data: st.DataObject):
    places = [data.draw(st.integers(0, 3)) for _ in rows]
    found = true_ranks(
        ranks_of(torch.tensor(rows, dtype=torch.float32)),
        torch.ones(len(rows), dtype=torch.bool), np.array(places),
    )  # fmt: skip
    expected = [
        sum(value >= row[place] for value in row) for row, place in zip(rows, places, strict=True)
    ]
    assert found.tolist() == expected


def test_metrics_by_hand():
    found = metrics_of(np.array([1, 3, 1, 20]))
    assert found["accuracy@1"] == 0.5
    assert found["mrr"] == pytest.approx((1 + Fraction(1, 3) + 1 + Fraction(1, 20)) / 4)
    assert found["ndcg@10"] == pytest.approx((1 + 1 / math.log2(4) + 1 + 0) / 4)


def test_a_summary_takes_the_probability_of_the_true_item():
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.0, 0.0, 0.0]])
    verdict = verdict_of(probs)
    found = Measured(verdict, np.array([1, 2, 3]), probs, np.array([1, 2, 0])).summary()
    # Without a verdict: no more surprised than by one in a million.
    expected = -(math.log(0.25) + math.log(0.8) + math.log(1e-6)) / 3
    assert found["nll"] == pytest.approx(expected, rel=1e-5)


# ---- the bias of letters ------------------------------------------------------------------------

BIAS = torch.tensor([2.0, -1.0, 0.5, 0.0])


def planted(items: Tensor, shown: Tensor) -> Tensor:
    """(N, K) logits of items that are worth (N, K), each with what its letter has."""
    return torch.empty_like(items).scatter_(1, shown, items.gather(1, shown) + BIAS)


def turned(size: int) -> Tensor:
    """(K, K) orders in which each candidate stands once behind each letter."""
    return torch.stack([torch.arange(size).roll(turn) for turn in range(size)])


def test_a_planted_letter_bias_is_taken_out():
    """Each candidate was once behind each letter, so nothing but the bias is taken out."""
    items = torch.tensor([3.0, 1.0, 2.0, -4.0]).expand(4, 4)
    shown = turned(4)
    logits = planted(items, shown)
    verdict = verdict_of(logits, shown)
    assert not ranks_of(logits).equal(ranks_of(items))
    found = unbiased(verdict)
    # What is common to a row remains, and is nothing to a softmax.
    torch.testing.assert_close(found, items + BIAS.mean())
    torch.testing.assert_close(probs_of_logits(found, 1.0), probs_of_logits(items, 1.0))


def test_how_sure_a_row_is_of_any_letter_is_no_bias():
    items = torch.tensor([3.0, 1.0, 2.0, -4.0]).expand(4, 4)
    shown = turned(4)
    shift = torch.tensor([[100.0], [0.0], [-50.0], [7.0]])
    found = unbiased(verdict_of(planted(items, shown) + shift, shown))
    torch.testing.assert_close(found, items + BIAS.mean() + shift, atol=1e-4, rtol=1e-5)


def test_a_row_without_a_verdict_says_nothing_of_letters():
    items = torch.tensor([3.0, 1.0, 2.0, -4.0]).expand(5, 4)
    shown = torch.cat([turned(4), torch.tensor([[0, 1, 2, 3]])])
    logits = planted(items, shown)
    logits[4] = torch.tensor([900.0, 0.0, 0.0, 0.0])
    valid = torch.tensor([True] * 4 + [False])
    found = unbiased(verdict_of(logits, shown, valid))
    torch.testing.assert_close(found[:4], (items + BIAS.mean())[:4])
    nothing = verdict_of(logits, shown, torch.zeros(5, dtype=torch.bool))
    assert unbiased(nothing).equal(torch.zeros(5, 4))


# ---- measuring ----------------------------------------------------------------------------------


class Said:
    """In place of a ranker: what it says is known, and what it was asked."""

    def __init__(self, verdict: TeacherVerdict, shuffles: int = 1):
        self.verdict, self.temperature = verdict, 2.0
        self.settings = SimpleNamespace(shuffles=shuffles)
        self.wants_scores = False
        self.asked: tuple[Any, ...] = ()

    def rank(self, *asked: Any) -> TeacherVerdict:
        self.asked = asked
        return self.verdict


def rows_with_targets_at(places: list[int]) -> list[Example]:
    return [
        Example(user, 7, (9, 8), (1, 2, 3, 4), (0.0,) * 4, target=place + 1)
        for user, place in enumerate(places)
    ]


def test_measured_with_and_without_the_bias_of_these_rows():
    items = torch.tensor([3.0, 1.0, 2.0, -4.0]).expand(4, 4)
    shown = turned(4)
    verdict = verdict_of(planted(items, shown), shown)
    rows = rows_with_targets_at([0, 1, 2, 3])
    ranker: Any = Said(verdict)
    found = measure(ranker, rows, seed=5)
    assert found.ranks.tolist() == [1, 3, 2, 4]
    assert found.places.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(found.probs, probs_of_logits(items, 2.0))
    histories, candidates, seeds, *_ = ranker.asked
    assert (histories[0], candidates[3]) == ((9, 8), (1, 2, 3, 4))
    assert len(set(seeds)) == 4
    assert seeds == [(5, 15, user, 7) for user in range(4)]

    as_it_is = measure(ranker, rows, seed=5, own_bias=False)
    assert as_it_is.probs is verdict.probs
    worst = [int((row >= row[place]).sum()) for place, row in enumerate(planted(items, shown))]
    assert as_it_is.ranks.tolist() == worst != [1, 3, 2, 4]


@pytest.mark.parametrize("why", ["an order without logits", "several shuffles"])
def test_without_logits_of_one_order_nothing_is_taken_out(why: str):
    verdict = verdict_of(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    if why == "an order without logits":
        verdict = TeacherVerdict(**{**vars(verdict), "identifier_logits": None})
    ranker: Any = Said(verdict, shuffles=1 + (why == "several shuffles"))
    found = measure(ranker, rows_with_targets_at([1]), seed=0)
    assert found.ranks.tolist() == [3]
    assert found.probs is verdict.probs
