"""What the ranking loss teaches, against numbers worked out by hand."""

import math

import pytest
import torch

from cotrain.distill.targets import blend_probs, mean_spread


def test_a_row_worked_out_by_hand():
    found = blend_probs(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.2, 0.8]]), 0.25)
    odds = math.exp(2) * (0.2 / 0.8) ** 0.25
    torch.testing.assert_close(found, torch.tensor([[odds / (1 + odds), 1 / (1 + odds)]]))
    teacher = torch.tensor([0.0, 1.0, -1.0]).softmax(0)[None]
    found = blend_probs(torch.tensor([[3.0, 0.0, 0.0]]), teacher, 0.5, temperature=2.0)
    weights = [math.exp(value / 2) for value in (3.0, 0.5, -0.5)]
    expected = torch.tensor([[weight / sum(weights) for weight in weights]])
    torch.testing.assert_close(found, expected)


def test_who_is_unsure_changes_less_than_who_is_sure():
    scores = torch.tensor([[0.4, 0.0]]).expand(2, 2)
    sure, unsure = blend_probs(scores, torch.tensor([[0.1, 0.9], [0.45, 0.55]]), 0.5)
    assert sure[1] > 0.5 > unsure[1]


@pytest.mark.parametrize("probs", [[0.25] * 4, [0.0] * 4], ids=["even", "no verdict"])
def test_a_teacher_that_tells_nothing_apart_adds_nothing(probs: list[float]):
    scores = torch.tensor([[0.3, 2.0, -1.0, 0.9]])
    found = blend_probs(scores, torch.tensor([probs]), 1.6)
    torch.testing.assert_close(found, scores.softmax(1))


def test_without_weight_the_scores_alone_are_taught():
    scores, probs = torch.randn(8, 5), torch.rand(8, 5).softmax(1)
    torch.testing.assert_close(blend_probs(scores, probs, 0.0, 0.5), (scores / 0.5).softmax(1))


def test_a_certain_teacher_stays_finite():
    found = blend_probs(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0]]), 1.0)
    assert found.isfinite().all()


def test_spread_is_the_mean_over_rows():
    assert mean_spread(torch.tensor([[1.0, -1.0], [5.0, 11.0]])) == pytest.approx(2)
