import math

import numpy as np
import pytest

from cotrain.evaluation import compare
from cotrain.evaluation.compare import Lift, paired_bootstrap
from cotrain.evaluation.metrics import per_user_metric


def test_point_estimates_by_hand():
    lift = paired_bootstrap(np.array([1.0, 0.5, 0.0, 0.5]), np.array([0.5, 0.5, 0.0, 0.25]))
    assert lift.absolute == pytest.approx(3 / 16)
    assert lift.relative == pytest.approx((3 / 16) / (5 / 16))


def test_relative_lift_is_undefined_over_a_control_of_zero():
    lift = paired_bootstrap(np.array([1.0, 0.0]), np.zeros(2))
    assert lift.relative is None
    assert lift.absolute == 0.5


def test_identical_inputs_are_no_lift():
    values = np.random.default_rng(0).random(50)
    assert paired_bootstrap(values, values.copy()) == Lift(0.0, 0.0, (0.0, 0.0), 1.0)


def test_large_sample_agrees_with_the_normal_approximation():
    rng = np.random.default_rng(1)
    control = rng.random(4000)
    student = control + rng.normal(0.006, 0.2, size=4000)
    difference = student - control
    mean, error = difference.mean(), difference.std() / math.sqrt(4000)
    lift = paired_bootstrap(student, control)
    assert lift.ci95 == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.06 * error)
    p_normal = math.erfc(abs(mean) / error / math.sqrt(2))
    assert 0.01 < p_normal < 0.99
    assert lift.p_value == pytest.approx(p_normal, abs=0.015)


def test_pairing_removes_what_both_models_share():
    """Users differ a lot, the models by a constant: the interval must be that constant."""
    control = np.random.default_rng(2).random(100)
    lift = paired_bootstrap(control + 0.01, control)
    assert lift.ci95 == pytest.approx((0.01, 0.01))
    assert lift.p_value == pytest.approx(2 / 10_001)


def test_swapping_the_models_mirrors_the_result():
    rng = np.random.default_rng(3)
    a, b = rng.random(40), rng.random(40)
    forward, backward = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert backward.absolute == pytest.approx(-forward.absolute)
    assert backward.ci95 == pytest.approx((-forward.ci95[1], -forward.ci95[0]))
    assert backward.p_value == pytest.approx(forward.p_value)


def test_differences_that_cancel_on_paper_give_p_of_one():
    """0.1 + 0.2 - 0.3 is not 0 in floating point; the sign of the dust must not decide."""
    student = np.array([0.1, 0.2, 0.0])
    control = np.array([0.0, 0.0, 0.3])
    assert paired_bootstrap(student, control, samples=500).p_value == 1.0


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(4)
    covered = 0
    for trial in range(200):
        student, control = rng.random((2, 150)) < [[0.30], [0.25]]
        low, high = paired_bootstrap(student, control, samples=400, seed=trial).ci95
        covered += low <= 0.05 <= high
    assert 180 <= covered <= 199  # 95 % of 200, give or take three standard deviations


def test_deterministic_and_independent_of_the_chunk_size(monkeypatch):
    rng = np.random.default_rng(5)
    a, b = rng.random((2, 37))
    first = paired_bootstrap(a, b, samples=1000, seed=7)
    assert paired_bootstrap(a, b, samples=1000, seed=7) == first
    assert paired_bootstrap(a, b, samples=1000, seed=8) != first
    monkeypatch.setattr(compare, "_CHUNK_INDICES", 100)
    assert paired_bootstrap(a, b, samples=1000, seed=7) == first


@pytest.mark.parametrize("name", ["recall@10", "ndcg@10"])
def test_drawing_counts_of_equal_values_is_drawing_users(monkeypatch, name):
    """The short cut for metrics with few values gives what drawing every user gives, up to the
    noise of the draw, in either size of chunk."""
    rng = np.random.default_rng(6)
    control = rng.integers(1, 60, size=3000)
    student = np.maximum(1, control - rng.integers(-2, 4, size=3000))
    values = per_user_metric(student, name), per_user_metric(control, name)
    short = paired_bootstrap(*values)
    monkeypatch.setattr(compare, "_CHUNK_INDICES", 1000)
    assert paired_bootstrap(*values) == short
    monkeypatch.undo()
    monkeypatch.setattr(compare, "_COUNT_COST", math.inf)
    long = paired_bootstrap(*values)
    assert short != long
    assert (short.absolute, short.relative) == (long.absolute, long.relative)
    width = long.ci95[1] - long.ci95[0]
    assert short.ci95 == pytest.approx(long.ci95, abs=0.03 * width)
    assert short.p_value == pytest.approx(long.p_value, abs=0.01)


def test_as_dict_is_what_reports_hold():
    assert Lift(0.1, None, (-0.1, 0.3), 0.4).as_dict() == {
        "absolute": 0.1,
        "relative": None,
        "ci95": [-0.1, 0.3],
        "p_value": 0.4,
    }


@pytest.mark.parametrize(
    ("student", "control", "match"),
    [
        (np.ones(3), np.ones(4), r"\(3,\) and \(4,\)"),
        (np.ones((2, 2)), np.ones((2, 2)), "one value a user"),
        (np.ones(0), np.ones(0), "one value a user"),
        (np.array([1.0, np.nan]), np.ones(2), "1 of 2 users"),
    ],
)
def test_wrong_input_is_an_error(student, control, match):
    with pytest.raises(ValueError, match=match):
        paired_bootstrap(student, control)


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="received 0"):
        paired_bootstrap(np.ones(2), np.ones(2), samples=0)


def test_a_lift_is_made_of_plain_numbers():
    # A p-value of NumPy's own type was written into checkpoints, which then could not be read.
    lift = paired_bootstrap(np.array([0.5, 0.2, 0.1]), np.array([0.4, 0.2, 0.2]), samples=100)
    numbers = [lift.absolute, lift.relative, *lift.ci95, lift.p_value]
    assert [type(value) for value in numbers] == [float] * 5
