"""Holm by hand, Student by hand, and what is paired with what."""

import numpy as np
import pytest

from cotrain.comparison.statistics import difference, holm, spread
from cotrain.evaluation.compare import paired_bootstrap


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ([], []),
        ([0.03], [0.03]),
        # .01 · 4, .02 · 3, .03 · 2, .04 · 1, none below the one before it
        ([0.01, 0.02, 0.03, 0.04], [0.04, 0.06, 0.06, 0.06]),
        # in the order in which they came: .005 · 3, .03 · 2, .2 · 1
        ([0.03, 0.2, 0.005], [0.06, 0.2, 0.015]),
        ([0.6, 0.5], [1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
    ],
)
def test_holm_by_hand(p_values, expected):
    assert holm(p_values) == pytest.approx(expected)


def test_spread_by_hand():
    found = spread({4: 1.0, 5: 2.0, 6: 3.0})
    assert (found.mean, found.sd) == (2.0, 1.0)
    # Student's t of 2 degrees of freedom at .975 is 4.3027, over √3
    assert found.ci95 == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert found.by_seed == {4: 1.0, 5: 2.0, 6: 3.0}
    # of 1 degree of freedom 12.7062; sd of 0 and 2 is √2, over √2
    assert spread({0: 0.0, 1: 2.0}).ci95 == pytest.approx((1 - 12.7062, 1 + 12.7062), abs=1e-4)


def test_one_seed_has_no_spread():
    found = spread({3: 0.5})
    assert (found.mean, found.sd, found.ci95) == (0.5, None, None)


def test_users_are_averaged_over_seeds_and_then_paired():
    arm = {0: np.array([1.0, 0.0, 0.5]), 1: np.array([0.0, 0.0, 1.0])}
    baseline = {0: np.array([0.0, 0.0, 0.5]), 1: np.array([0.0, 0.5, 0.0])}
    found = difference(arm, baseline, 400, seed=7)
    assert found is not None
    # means over seeds: (.5, 0, .75) and (0, .25, .25)
    by_hand = paired_bootstrap(np.array([0.5, 0.0, 0.75]), np.array([0.0, 0.25, 0.25]), 400, 7)
    assert found.users == by_hand
    assert found.users.absolute == pytest.approx(0.75 / 3)
    # by seed: (1 + 0 + 0) / 3 and (0 − .5 + 1) / 3
    assert found.seeds.by_seed == pytest.approx({0: 1 / 3, 1: 0.5 / 3})
    assert found.seeds.mean == pytest.approx(found.users.absolute)


def test_pairing_removes_what_users_and_seeds_have_in_common():
    rng = np.random.default_rng(0)
    baseline = {seed: rng.random(200) + seed for seed in range(3)}
    arm = {seed: values + 0.01 for seed, values in baseline.items()}
    found = difference(arm, baseline, 200)
    assert found is not None
    assert found.users.ci95 == pytest.approx((0.01, 0.01))
    assert found.seeds.ci95 == pytest.approx((0.01, 0.01))
    assert found.seeds.sd == pytest.approx(0, abs=1e-12)


def test_only_seeds_of_both_are_compared():
    values = np.array([0.0, 1.0])
    arm, baseline = {0: values, 2: values + 1, 3: values + 9}, {1: values, 2: values}
    found = difference(arm, baseline, 100)
    assert found is not None
    assert found.seeds.by_seed == {2: 1.0}
    assert found.users.absolute == 1.0
    assert difference({0: values}, {1: values}) is None
