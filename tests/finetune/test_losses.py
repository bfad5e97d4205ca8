"""Losses on identifier logits: fractions by hand, plain formulas in float64, where they push."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cotrain.finetune.losses import RANKING_LOSSES, ce_sum, listmle_sum, ranknet_sum

Loss = Callable[[Tensor, Tensor], Tensor]

WORTH = st.sampled_from([0.0, 0.3, 1.0])


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """(B, K) scores and relevance, in float64, with something relevant in each row."""
    count, size = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    values = st.floats(-8, 8, width=32)
    scores = [draw(st.lists(values, min_size=size, max_size=size)) for _ in range(count)]
    worth = st.lists(WORTH, min_size=size, max_size=size).filter(lambda row: sum(row) > 0)
    return (
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor([draw(worth) for _ in range(count)], dtype=torch.float64),
    )


def of(loss: Loss, odds: list[list[int]], relevance: list[list[float]]) -> float:
    """The loss at scores log odds, which make fractions of softmaxes."""
    scores = torch.tensor(odds, dtype=torch.float64).log()
    return float(loss(scores, torch.tensor(relevance, dtype=torch.float64)))


def logs(*fractions: Fraction) -> float:
    """−Σ log of fractions."""
    return -sum(math.log(fraction) for fraction in fractions)


# ---- by hand ------------------------------------------------------------------------------------


def test_cross_entropy_by_hand():
    assert of(ce_sum, [[1, 2, 5]], [[0, 1, 0]]) == pytest.approx(logs(Fraction(2, 8)))
    # Half as relevant: two thirds of the target and one.
    expected = Fraction(2, 3) * math.log(8 / 2) + Fraction(1, 3) * math.log(8 / 5)
    assert of(ce_sum, [[1, 2, 5]], [[0, 1, 0.5]]) == pytest.approx(expected)
    twice = of(ce_sum, [[1, 2, 5], [3, 1, 1]], [[0, 1, 0], [1, 0, 0]])
    assert twice == pytest.approx(logs(Fraction(1, 4), Fraction(3, 5)))


def test_ranknet_by_hand():
    # P(i before j) = odds_i / (odds_i + odds_j).
    assert of(ranknet_sum, [[1, 2, 5]], [[0, 1, 0]]) == pytest.approx(
        logs(Fraction(2, 3), Fraction(2, 7)) / 2
    )
    # Of three pairs the one of two relevant ones weighs as much as they differ.
    parts = [(1, Fraction(2, 3)), (0.25, Fraction(5, 6)), (0.75, Fraction(2, 7))]
    expected = sum(weight * logs(chance) for weight, chance in parts) / 2
    assert of(ranknet_sum, [[1, 2, 5]], [[0, 1, 0.25]]) == pytest.approx(expected)
    # Where all are worth the same there is no pair.
    assert of(ranknet_sum, [[1, 2, 5]], [[1, 1, 1]]) == 0


def test_listmle_by_hand():
    assert of(listmle_sum, [[1, 2, 5]], [[0, 1, 0]]) == pytest.approx(logs(Fraction(2, 8)))
    # The target among all, then the other among what is left; the order of the rest is free.
    expected = logs(Fraction(2, 9), Fraction(5, 7)) / 2
    assert of(listmle_sum, [[1, 2, 5, 1]], [[0, 1, 0.3, 0]]) == pytest.approx(expected)
    # Equal ones in the order in which they are given.
    expected = logs(Fraction(2, 9), Fraction(1, 7), Fraction(5, 6)) / 3
    assert of(listmle_sum, [[1, 2, 5, 1]], [[0.3, 1, 0.3, 0]]) == pytest.approx(expected)
    turned = logs(Fraction(2, 9), Fraction(5, 7), Fraction(1, 2)) / 3
    assert of(listmle_sum, [[5, 2, 1, 1]], [[0.3, 1, 0.3, 0]]) == pytest.approx(turned)


def test_a_plackett_luce_model_takes_some_order():
    """Over all orders of three relevant ones behind each other the likelihoods sum to one."""
    scores = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    worths = torch.tensor(list(itertools.permutations([1.0, 0.5, 0.2])), dtype=torch.float64)
    total = sum(math.exp(-3 * float(listmle_sum(scores, worth[None]))) for worth in worths)
    assert total == pytest.approx(1)


# ---- plain formulas -----------------------------------------------------------------------------


def plain_ce(scores: list[float], relevance: list[float]) -> float:
    below = math.log(sum(math.exp(score) for score in scores))
    pairs = zip(scores, relevance, strict=True)
    return sum(worth / sum(relevance) * (below - score) for score, worth in pairs)


def plain_ranknet(scores: list[float], relevance: list[float]) -> float:
    total = weight = 0.0
    for i, j in itertools.permutations(range(len(scores)), 2):
        if relevance[i] > relevance[j]:
            more = relevance[i] - relevance[j]
            total += more * math.log1p(math.exp(scores[j] - scores[i]))
            weight += more
    return total / weight if weight else 0.0


def plain_listmle(scores: list[float], relevance: list[float]) -> float:
    left = sorted(range(len(scores)), key=lambda place: -relevance[place])
    count = sum(worth > 0 for worth in relevance)
    total = 0.0
    for _ in range(count):
        total += math.log(sum(math.exp(scores[place]) for place in left)) - scores[left[0]]
        left = left[1:]
    return total / count


PLAIN: dict[str, Callable[[list[float], list[float]], float]] = {
    "ce": plain_ce, "ranknet": plain_ranknet, "listmle": plain_listmle,
}  # fmt: skip


@pytest.mark.parametrize("name", RANKING_LOSSES)
@settings(max_examples=60, deadline=None)
@given(batch=rows())
def test_a_loss_is_the_plain_formula_summed_over_rows(name: str, batch: tuple[Tensor, Tensor]):
    scores, relevance = batch
    pairs = zip(scores.tolist(), relevance.tolist(), strict=True)
    expected = sum(PLAIN[name](*pair) for pair in pairs)
    assert float(RANKING_LOSSES[name](scores, relevance)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", RANKING_LOSSES)
@settings(max_examples=25, deadline=None)
@given(batch=rows(), shift=st.floats(-50, 50))
def test_what_all_scores_have_in_common_is_nothing(name: str, batch: Any, shift: float):
    scores, relevance = batch
    loss = RANKING_LOSSES[name]
    assert float(loss(scores + shift, relevance)) == pytest.approx(
        float(loss(scores, relevance)), abs=1e-9
    )


@pytest.mark.parametrize("name", ["ce", "ranknet"])
@settings(max_examples=25, deadline=None)
@given(batch=rows(), seed=st.integers(0, 99))
def test_the_order_in_which_candidates_are_given_is_no_matter(name: str, batch: Any, seed: int):
    scores, relevance = batch
    order = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(seed))
    loss = RANKING_LOSSES[name]
    assert float(loss(scores[:, order], relevance[:, order])) == pytest.approx(
        float(loss(scores, relevance)), abs=1e-9
    )


def test_with_one_relevant_candidate_cross_entropy_and_listmle_are_the_plain_one():
    scores = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 6, 3, 3, 1])
    one = torch.nn.functional.one_hot(target, 7).double()
    expected = torch.nn.functional.cross_entropy(scores, target, reduction="sum")
    for loss in (ce_sum, listmle_sum):
        torch.testing.assert_close(loss(scores, one), expected)
        # How much it is worth is no matter where nothing else is.
        torch.testing.assert_close(loss(scores, 0.3 * one), expected)


# ---- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RANKING_LOSSES)
@settings(max_examples=30, deadline=None)
@given(batch=rows())
def test_the_most_relevant_go_up_and_the_irrelevant_down(name: str, batch: tuple[Tensor, Tensor]):
    scores, relevance = batch
    scores = scores.clone().requires_grad_()
    RANKING_LOSSES[name](scores, relevance).backward()
    assert scores.grad is not None
    gradient = scores.grad
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient.sum(1), torch.zeros(len(scores)).double())
    assert (gradient[relevance == 0] >= 0).all()
    for row, worth in zip(gradient, relevance, strict=True):
        best = worth == worth.max()
        if (worth > 0).sum() == 1:
            assert row[best] <= 0
    if name == "ranknet":
        assert (gradient[relevance == relevance.max(1, keepdim=True).values] <= 0).all()


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_steps_against_the_gradient_sort_by_relevance(name: str):
    scores = torch.tensor([[3.0, 0.0, -1.0, 1.0]], requires_grad=True)
    relevance = torch.tensor([[0.0, 0.3, 1.0, 0.0]])
    optimizer = torch.optim.Adam([scores], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        RANKING_LOSSES[name](scores, relevance).backward()
        optimizer.step()
    assert scores[0].argsort(descending=True)[:2].tolist() == [2, 1]


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_scores_far_apart_stay_finite(name: str):
    scores = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
    loss = RANKING_LOSSES[name](scores, torch.tensor([[0.0, 1.0, 0.3]]))
    loss.backward()
    assert loss.isfinite()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
