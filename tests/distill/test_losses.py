"""Distillation losses against values worked out by hand."""

import math

import pytest
import torch

from cotrain.distill.losses import alignment_sum, listnet_sum
from cotrain.teacher.verdict import entropy


def test_listnet_by_hand():
    # P = (1/2, 1/4, 1/4) from scores log 2, 0, 0; Q = (1/4, 1/2, 1/4).
    scores = torch.tensor([[math.log(2.0), 0.0, 0.0]])
    probs = torch.tensor([[0.25, 0.5, 0.25]])
    expected = 0.25 * math.log(2) + 0.75 * math.log(4)
    assert listnet_sum(scores, probs, torch.ones(1)).item() == pytest.approx(expected)


def test_listnet_temperature_divides_the_students_scores():
    # τ_s = 2 turns log 16 into log 4: P = (4/5, 1/5).
    scores = torch.tensor([[math.log(16.0), 0.0]])
    probs = torch.tensor([[1.0, 0.0]])
    value = listnet_sum(scores, probs, torch.ones(1), temperature=2.0).item()
    assert value == pytest.approx(math.log(5 / 4))


def test_listnet_is_least_where_the_student_agrees_and_its_gradient_is_p_minus_q():
    probs = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    agreeing = probs.log().requires_grad_()
    loss = listnet_sum(agreeing, probs, torch.ones(1, dtype=torch.float64))
    assert loss.item() == pytest.approx(entropy(probs).item())
    loss.backward()
    assert agreeing.grad is not None
    torch.testing.assert_close(agreeing.grad, torch.zeros_like(probs), atol=1e-12, rtol=0)
    other = torch.zeros_like(probs).requires_grad_()
    listnet_sum(other, probs, torch.ones(1, dtype=torch.float64)).backward()
    torch.testing.assert_close(other.grad, torch.full_like(probs, 1 / 3) - probs)


def test_weights_scale_rows_and_zero_silences_them():
    scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    probs = torch.softmax(torch.arange(15.0).view(3, 5), 1)
    one_by_one = [
        listnet_sum(scores[i : i + 1], probs[i : i + 1], torch.ones(1)).item() for i in range(3)
    ]
    total = listnet_sum(scores, probs, torch.tensor([1.0, 0.0, 0.5]))
    assert total.item() == pytest.approx(one_by_one[0] + 0.5 * one_by_one[2], rel=1e-5)
    total.backward()
    assert scores.grad is not None
    assert not scores.grad[1].any()


def test_alignment_by_hand():
    projected = torch.tensor([[1.0, 2.0], [0.0, 0.0], [5.0, 5.0]])
    state = torch.tensor([[0.0, 4.0], [3.0, 4.0], [9.0, 9.0]])
    # 1 + 4 = 5, weight 1; 9 + 16 = 25, weight 1/5; silenced.
    value = alignment_sum(projected, state, torch.tensor([1.0, 0.2, 0.0]))
    assert value.item() == pytest.approx(10.0)
