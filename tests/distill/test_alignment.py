"""The projector's running statistics and the collapse meter."""

import math

import pytest
import torch

from cotrain.distill.alignment import Projector, RecentRows, effective_rank


def test_running_moments_equal_those_of_all_valid_rows_whatever_the_batches():
    generator = torch.Generator().manual_seed(0)
    # A mean far from zero, as LLM states have in single dimensions, is where naive sums lose.
    rows = torch.randn(100, 6, generator=generator) * 0.1 + 300
    valid = torch.rand(100, generator=generator) < 0.7
    by_batches, at_once = Projector(6, 3), Projector(6, 3)
    for start, end in [(0, 1), (1, 1), (1, 40), (40, 41), (41, 100)]:
        by_batches.observe(rows[start:end], valid[start:end])
    at_once.observe(rows, valid)
    kept = rows[valid].double()
    for projector in (by_batches, at_once):
        torch.testing.assert_close(projector.mean, kept.mean(0))
        torch.testing.assert_close(
            projector.squares / projector.count, kept.var(0, correction=0), rtol=1e-6, atol=0
        )


def test_two_processes_summing_see_what_one_would():
    rows = torch.randn(20, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    valid = torch.ones(20, dtype=torch.bool)
    one, two = Projector(4, 2), Projector(4, 2)
    for half in (slice(0, 10), slice(10, 20)):
        one.observe(rows[half], valid[half])
        mine, theirs = rows[half][:3], rows[half][3:]
        # The other process's sums, taken at the same running mean.
        centred = theirs.double() - two.mean
        other = torch.cat(
            [torch.stack([centred.sum(0), centred.square().sum(0)]), torch.full((1, 4), 7.0)]
        )
        two.observe(mine, valid[half][:3], lambda sums, other=other: sums + other)
    torch.testing.assert_close(one.mean, two.mean)
    torch.testing.assert_close(one.squares, two.squares)
    assert one.count == two.count == 20


def test_projection_is_the_linear_map_of_standardised_states():
    projector = Projector(5, 2)
    rows = torch.randn(50, 5, generator=torch.Generator().manual_seed(2)) * 3 + 7
    projector.observe(rows, torch.ones(50, dtype=torch.bool))
    standard = (rows - rows.mean(0)) / rows.std(0, correction=0)
    torch.testing.assert_close(projector(rows), projector.linear(standard), rtol=1e-4, atol=1e-5)


def test_no_valid_row_yet_gives_finite_values():
    projector = Projector(5, 2)
    projector.observe(torch.zeros(3, 5), torch.zeros(3, dtype=torch.bool))
    assert projector(torch.zeros(3, 5)).isfinite().all()


def test_effective_rank_closed_forms():
    # ±e1, ±e2, ±e3: three equal singular values.
    rows = torch.cat([torch.eye(3), -torch.eye(3)])
    assert effective_rank(rows) == pytest.approx(3)
    assert effective_rank(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])) == pytest.approx(1)
    # Singular values 3 : 1, entropy of (3/4, 1/4).
    rows = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(rows) == pytest.approx(expected)
    assert effective_rank(torch.ones(4, 3)) == 0
    assert effective_rank(torch.ones(1, 3)) == 0


def test_recent_rows_keep_the_latest():
    recent = RecentRows(capacity=3)
    assert recent.effective_rank() == 0
    recent.add(torch.arange(4.0)[:, None])
    recent.add(torch.tensor([[9.0]]))
    assert recent.rows is not None
    assert recent.rows.flatten().tolist() == [2, 3, 9]
