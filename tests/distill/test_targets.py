"""What the ranking loss teaches, against numbers worked out by hand."""

import math

import pytest
import torch

from cotrain.distill.audit import BETAS, blends
from cotrain.distill.targets import blend_probs, in_spreads, logprobs


def test_a_row_worked_out_by_hand():
    # Scores 1, −1 spread by 1. Log-probabilities differ, so in their spread they are −1 and 1.
    found = blend_probs(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.2, 0.8]]), 0.25)
    odds = math.exp(0.75 - (-0.75))
    torch.testing.assert_close(found, torch.tensor([[odds / (1 + odds), 1 / (1 + odds)]]))
    # Scores 3, 0, 0 spread by √2; q ∝ 1, e, 1/e: t = 0, √1.5, −√1.5.
    teacher = torch.tensor([0.0, 1.0, -1.0]).softmax(0)[None]
    found = blend_probs(torch.tensor([[3.0, 0.0, 0.0]]), teacher, 0.5, temperature=2.0)
    step = 0.5 * math.sqrt(2) * math.sqrt(1.5)
    weights = [math.exp(value / 2) for value in (3.0, step, -step)]
    expected = torch.tensor([[weight / sum(weights) for weight in weights]])
    torch.testing.assert_close(found, expected)


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


def test_the_order_taught_is_the_order_audited():
    scores, probs = 7 * torch.randn(50, 20), torch.randn(50, 20).softmax(1)
    for beta, audited in zip(BETAS, blends(scores, logprobs(probs)), strict=True):
        taught = blend_probs(scores.double(), probs, beta)
        assert taught.argsort(1).equal(audited.argsort(1))


def test_spreads_are_of_one():
    values = in_spreads(5 * torch.randn(6, 9) + 3)
    torch.testing.assert_close(values.mean(1), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(values.square().mean(1), torch.ones(6, dtype=torch.float64))
    assert not in_spreads(torch.ones(1, 4)).any()
