"""Groups of users and what is said of each."""

import numpy as np
import pytest

from cotrain.config import DataConfig
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.evaluation.compare import paired_bootstrap
from cotrain.evaluation.metrics import metrics_from_ranks, per_user_metric
from cotrain.evaluation.slices import popularity_quartiles, slice_table, slices_of


@pytest.fixture(scope="module")
def by_time() -> InteractionData:
    return load_interactions(DataConfig(split="time"))


def test_quartiles_by_hand():
    # 4 × 1, 2 × 2, 1 × 4 and 1 × 4: sixteen interactions, four in each quarter.
    counts = np.array([0, 4, 1, 2, 1, 1, 2, 1, 4])
    assert popularity_quartiles(counts).tolist() == [0, 3, 0, 1, 0, 0, 1, 0, 3]


def test_quartiles_hold_about_a_quarter_of_the_interactions_and_keep_equals_together(ml100k):
    counts = ml100k.train_counts
    quartiles = popularity_quartiles(counts)
    held = [counts[quartiles == quartile].sum() / counts.sum() for quartile in range(4)]
    assert held == pytest.approx([0.25] * 4, abs=0.01)
    for count in np.unique(counts[1:]):
        assert len(set(quartiles[1:][counts[1:] == count])) == 1
    order = np.argsort(counts[1:], kind="stable")
    assert (np.diff(quartiles[1:][order]) >= 0).all()


def test_quartiles_at_their_ends():
    assert popularity_quartiles(np.array([0, 0, 0])).tolist() == [0, 0, 0]
    # One item is all there is: it lies in the middle, and no quarter is an error.
    assert popularity_quartiles(np.array([0, 9, 0])).tolist() == [0, 2, 0]
    assert popularity_quartiles(np.array([0, 3, 3, 3])).tolist() == [0, 2, 2, 2]


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("name", ["ml100k", "by_time"])
def test_every_evaluated_user_is_in_one_group_of_each_view(request, name, split):
    data = request.getfixturevalue(name)
    groups = slices_of(data, split)
    for view in ("Popularity of the target", "Length of the history", "Cold targets"):
        members = np.sum([group.members for group in groups if group.view == view], axis=0)
        assert members.tolist() == [1] * len(data.evaluated_users(split))
    assert all(group.members.any() for group in groups)


def test_groups_hold_what_they_say(by_time):
    groups = {group.label: group.members for group in slices_of(by_time, "test")}
    users, counts = by_time.evaluated_users("test"), by_time.train_counts
    for place, user in enumerate(users):
        length = len(by_time.history_before(user, "test"))
        label = next(
            text
            for low, text in (
                (50, "50 or more"),
                (20, "20–49"),
                (10, "10–19"),
                (5, "5–9"),
                (1, "1–4"),
            )
            if length >= low
        )
        assert groups[f"{label} items"][place]
        count = counts[by_time.target(user, "test")]
        cold = "no" if not count else "1–5" if count <= 5 else "more than 5"
        assert groups[f"{cold} training interaction{'s' if count else ''}"][place]
    (rare,) = [g for g in slices_of(by_time, "test") if g.label == "least popular quarter"]
    assert rare.detail.startswith("1,")
    assert " items, 0–" in rare.detail


def test_table_rows_are_the_metrics_of_their_users(ml100k):
    rng = np.random.default_rng(0)
    student, control = rng.integers(1, 40, size=(2, ml100k.num_users))
    groups = slices_of(ml100k, "test")
    table = slice_table(groups, student, control, samples=200, seed=3)
    assert [row["label"] for row in table] == [group.label for group in groups]
    for row, group in zip(table, groups, strict=True):
        inside = group.members
        assert row["users"] == inside.sum()
        assert row["share"] == pytest.approx(inside.mean())
        for name in ("recall@10", "ndcg@10"):
            for model, ranks in (("student", student), ("control", control)):
                expected = metrics_from_ranks(ranks[inside])[name]
                assert row[model][name] == pytest.approx(expected)
            one, other = (per_user_metric(ranks[inside], name) for ranks in (student, control))
            assert row["lift"][name] == paired_bootstrap(one, other, 200, 3).as_dict()
    alone = slice_table(groups, student, None)
    assert all(row["control"] is None and row["lift"] is None for row in alone)
    assert [row["student"] for row in alone] == [row["student"] for row in table]
