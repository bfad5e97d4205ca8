"""What is trained on, what is held out, and that neither split lets the future into training."""

import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotrain.config import DataConfig
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.data.splits import SPLITS
from cotrain.errors import DataError

# User, item, time. The cuts of the tests are 10 and 20.
EVENTS = [
    ("a", "p", 1), ("a", "q", 2), ("a", "r", 10), ("a", "s", 19), ("a", "t", 20), ("a", "u", 30),
    ("b", "q", 3), ("b", "p", 4), ("b", "r", 5),
    ("c", "r", 12), ("c", "q", 13), ("c", "p", 25),
    ("d", "s", 6), ("d", "p", 21),
]  # fmt: skip


def table(events=EVENTS, **extra) -> pl.DataFrame:
    columns = ["user_id", "item_id", "timestamp"]
    return pl.DataFrame(events, schema=columns, orient="row").with_columns(**extra)


def load(folder: Path, frame: pl.DataFrame, suffix: str = ".parquet", **options) -> InteractionData:
    path = folder / f"interactions{suffix}"
    frame.write_csv(path) if suffix == ".csv" else frame.write_parquet(path)
    return load_interactions(DataConfig(interactions=str(path), **options))


def cut(folder: Path, frame: pl.DataFrame, first="10", second="20", **options) -> InteractionData:
    return load(folder, frame, split="time", validation_start=first, test_start=second, **options)


def parts(data: InteractionData) -> dict:
    """By raw user: training items, and (history, target) of each split."""

    def named(items) -> str:
        return "".join(str(data.catalog.item_ids[item]) for item in items)

    found = {}
    for user, raw in enumerate(data.user_ids):
        found[raw] = {"train": named(data.train_history(user))}
        for split in SPLITS:
            if user in data.evaluated_users(split):
                target = data.target(user, split)
                found[raw][split] = (named(data.history_before(user, split)), named([target]))
    return found


# ---- leave-one-out ------------------------------------------------------------------------------


def test_leave_one_out_holds_out_the_last_two_of_everybody(tmp_path):
    data = load(tmp_path, table())
    # Two interactions are too few for it.
    assert parts(data) == {
        "a": {"train": "pqrs", "validation": ("pqrs", "t"), "test": ("pqrst", "u")},
        "b": {"train": "q", "validation": ("q", "p"), "test": ("qp", "r")},
        "c": {"train": "r", "validation": ("r", "q"), "test": ("rq", "p")},
    }
    assert data.trained_users.tolist() == [0]
    assert data.train_counts.tolist() == [0, 1, 2, 2, 1, 0, 0]
    assert data.targets("test").tolist() == [data.test_target(user) for user in range(3)]
    assert data.targets("validation").tolist() == [data.validation_target(u) for u in range(3)]
    assert data.history_lengths("test").tolist() == [5, 2, 2]
    assert data.history_lengths("validation").tolist() == [4, 1, 1]


def test_leave_one_out_needs_no_times(tmp_path):
    frame = table(position=pl.int_range(pl.len())).drop("timestamp")
    assert parts(load(tmp_path, frame)) == parts(load(tmp_path, table()))


# ---- one cut in time ----------------------------------------------------------------------------


def test_time_split_by_hand(tmp_path):
    data = cut(tmp_path, table())
    assert parts(data) == {
        # What lies at a cut comes after it.
        "a": {"train": "pq", "validation": ("pqr", "s"), "test": ("pqrst", "u")},
        # Not seen again.
        "b": {"train": "qpr"},
        # Nothing before the cut: nobody to evaluate.
        "c": {"train": ""},
        "d": {"train": "s", "test": ("s", "p")},
    }
    assert data.trained_users.tolist() == [0, 1]
    assert data.evaluated_users("validation").tolist() == [0]
    assert data.evaluated_users("test").tolist() == [0, 3]
    assert data.history_lengths("test").tolist() == [5, 1]
    assert data.train_counts.sum() == 6
    assert data.notes[2:6] == [
        "2 of 6 items have no interaction before 10: kept in the catalogue; they can be targets, "
        "but no training step has seen them (--data.unseen_items).",
        "Kept: 4 users, 6 items, 14 interactions.",
        "Split by time: 6 interactions (42.9 %) before 10 for training, 4 interactions (28.6 %) "
        "from there for validation, 4 interactions (28.6 %) from 20 for test.",
        "Evaluated on validation: 1 user, on the last interaction of the window. 1 more user is "
        "active there, but not before, and so not evaluated.",
    ]


def test_the_first_interaction_of_a_window_as_target(tmp_path):
    found = parts(cut(tmp_path, table(), time_target="first"))
    assert found["a"]["validation"] == ("pq", "r")
    assert found["a"]["test"] == ("pqrs", "t")
    assert found["a"]["train"] == "pq"


def test_asking_for_a_target_that_is_not_there_is_an_error(tmp_path):
    data = cut(tmp_path, table())
    for ask in (data.target, data.history_before):
        with pytest.raises(ValueError, match="user 1 has no test target"):
            ask(1, "test")


def test_unseen_items_leave_with_their_interactions(tmp_path):
    data = cut(tmp_path, table(), unseen_items="drop")
    assert data.catalog.item_ids == [None, "p", "q", "r", "s"]
    assert parts(data)["a"] == {"train": "pq", "validation": ("pqr", "s")}
    assert parts(data)["d"] == {"train": "s", "test": ("s", "p")}
    note = "2 of 6 items have no interaction before 10: dropped with their 2 interactions"
    assert any(note in line for line in data.notes)


def test_time_orders_before_position_and_ties_keep_it(tmp_path):
    events = [("a", "x", 5), ("a", "y", 1), ("a", "z", 10), ("a", "w", 10), ("a", "v", 20)]
    frame = table(events, position=pl.Series([0, 1, 3, 2, 4]))
    data = cut(tmp_path, frame)
    assert parts(data)["a"] == {"train": "yx", "validation": ("yxw", "z"), "test": ("yxwz", "v")}
    assert "column timestamp, then column position" in data.notes[1]


def test_one_interaction_in_training_and_one_after_it_are_enough(tmp_path):
    events = [("a", "x", 1), ("a", "y", 12), ("b", "y", 1), ("b", "x", 25), ("c", "z", 3)]
    data = cut(tmp_path, table(events))
    assert data.user_ids == ["a", "b"]
    assert "1 of 3 users dropped, with their 1 interactions: fewer than 2." in data.notes


def test_shares_are_of_interactions(tmp_path):
    events = [(f"u{i % 5}", f"i{i % 7}", 100 + i) for i in range(100)]
    data = load(tmp_path, table(events), split="time", validation_share=0.2, test_share=0.1)
    assert sum(len(data.train_history(user)) for user in range(5)) == 70
    line = next(note for note in data.notes if note.startswith("Split by time"))
    assert "70 interactions (70.0 %) before 170" in line
    assert "10 interactions (10.0 %) from 190" in line


def test_whatever_is_tied_at_a_cut_comes_after_it(tmp_path):
    # The share of 10 % ends among five interactions of the same time.
    times = [*range(10), *[10] * 5, *range(11, 16)]
    events = [(f"u{i % 2}", f"i{i % 3}", time) for i, time in enumerate(times)]
    data = load(tmp_path, table(events), split="time", validation_share=0.4, test_share=0.1)
    assert sum(len(data.train_history(user)) for user in range(2)) == 10


@settings(max_examples=30, deadline=None)
@given(
    events=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 30)), min_size=8, max_size=60
    ),
    first=st.integers(1, 20),
    length=st.integers(1, 15),
    target=st.sampled_from(["first", "last"]),
    unseen=st.sampled_from(["keep", "drop"]),
)
def test_no_future_is_trained_on(tmp_path_factory, events, first, length, target, unseen):
    """Against a plain reading of the rule, event by event."""
    second = first + length
    options = {"time_target": target, "unseen_items": unseen}
    try:
        data = cut(
            tmp_path_factory.mktemp("cut"), table(events), str(first), str(second), **options
        )
    except DataError:
        return
    counts = {user: sum(e[0] == user for e in events) for user, *_ in events}
    events = [event for event in events if counts[event[0]] >= 2]
    known = {item for _, item, time in events if time < first}
    if unseen == "drop":
        events = [event for event in events if event[1] in known]
    for user, raw in enumerate(data.user_ids):
        own = sorted((event for event in events if event[0] == raw), key=lambda event: event[2])
        past = [item for _, item, time in own if time < first]
        raw_items = [data.catalog.item_ids[item] for item in data.train_history(user)]
        assert raw_items == past
        for split in SPLITS:
            low, high = (first, second) if split == "validation" else (second, 99)
            window = [place for place, event in enumerate(own) if low <= event[2] < high]
            evaluated = user in data.evaluated_users(split)
            assert evaluated == bool(window and past)
            if evaluated:
                place = window[0 if target == "first" else -1]
                history = [data.catalog.item_ids[i] for i in data.history_before(user, split)]
                assert history == [event[1] for event in own[:place]]
                assert data.catalog.item_ids[data.target(user, split)] == own[place][1]
    trained = [item for _, item, time in events if time < first]
    assert data.train_counts.sum() == len(trained)
    for index, raw in enumerate(data.catalog.item_ids[1:], 1):
        assert data.train_counts[index] == trained.count(raw)


# ---- times --------------------------------------------------------------------------------------


def test_dates_as_times_and_as_cuts(tmp_path):
    zero = datetime.datetime(2020, 1, 1)
    days = pl.Series([zero + datetime.timedelta(days=time) for *_, time in EVENTS])
    expected = parts(cut(tmp_path, table()))
    for kind in (pl.Datetime("us"), pl.Datetime("ns"), pl.Datetime("ms", "UTC"), pl.Date):
        moments = days.dt.replace_time_zone("UTC") if kind == pl.Datetime("ms", "UTC") else days
        frame = table(timestamp=moments.cast(kind))
        data = cut(tmp_path, frame, "2020-01-11", "2020-01-21")
        assert parts(data) == expected, kind
        assert any("before 2020-01-11" in note for note in data.notes)
    aware = table(timestamp=days.dt.replace_time_zone("UTC"))
    data = cut(tmp_path, aware, "2020-01-11T01:00+01:00", "2020-01-20 23:00-01:00")
    assert parts(data) == expected
    shares = load(tmp_path, table(timestamp=days), split="time", validation_share=0.3)
    assert any(note.startswith("Split by time") for note in shares.notes)


def test_nanoseconds_are_cut_exactly(tmp_path):
    zero = 1_700_000_000_000_000_000
    frame = table(timestamp=pl.col("timestamp") + zero)
    data = cut(tmp_path, frame, str(zero + 10), str(zero + 20))
    assert parts(data) == parts(cut(tmp_path, table()))


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_missing_time_refuses_the_time_split_and_nothing_else(tmp_path, suffix):
    times = [None if time == 13 else time for *_, time in EVENTS]
    frame = table(timestamp=pl.Series(times), position=pl.int_range(pl.len()))
    with pytest.raises(DataError) as caught:
        cut(tmp_path, frame, suffix=suffix)
    message = str(caught.value)
    assert "'timestamp'" in message
    assert "gives the time at which --data.split time cuts, and 1 row of 14" in message
    assert "row 11" in message
    assert "--data.split leave-one-out, which needs an order but no times" in message
    assert load(tmp_path, frame, suffix=suffix).num_users == 3
    with pytest.raises(DataError, match=r"'timestamp' \(--data.timestamp_column\)"):
        cut(tmp_path, frame.drop("timestamp"), suffix=suffix)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("2020-01-01", "20", r"--data.validation_start is '2020-01-01'; .*from 1 to 30.*a number"),
        ("10", "soon", r"--data.test_start is 'soon'.*expected a number"),
        ("20", "10", "validation start at 20 and test at 10; expected validation to start before"),
        ("10", "10", "expected validation to start before test"),
        ("nan", "20", "expected validation to start before test"),
        ("0", "20", "no user to evaluate on validation: of 4 users 0 have interactions before 0"),
        ("10", "99", "no user to evaluate on test: .* 0 in the window .* times from 1 to 30"),
        ("6", "10", "no user to evaluate on validation: .* 2 have .*none has both"),
    ],
)
def test_cuts_that_cannot_be(tmp_path, first, second, expected):
    with pytest.raises(DataError, match=expected):
        cut(tmp_path, table(), first, second)


def test_a_number_is_no_date(tmp_path):
    frame = table(timestamp=pl.from_epoch("timestamp"))
    with pytest.raises(DataError, match="expected an ISO date like these"):
        cut(tmp_path, frame)


def test_equal_times_leave_no_room_for_a_cut(tmp_path):
    with pytest.raises(DataError, match="Many interactions have the same time"):
        load(tmp_path, table(timestamp=pl.lit(7)), split="time")


# ---- real data ----------------------------------------------------------------------------------


def test_ml_100k_by_time(ml100k):
    data = load_interactions(DataConfig(split="time"))
    assert data.num_interactions == ml100k.num_interactions
    trained = sum(len(data.train_history(user)) for user in range(data.num_users))
    assert trained == data.train_counts.sum()
    assert abs(trained - 80_000) < 50
    # The last interaction of all is the test target in both splits, where there is one.
    users = data.evaluated_users("test")
    assert len(users) > 50
    # Raw ids are the same, and so are the indices.
    assert data.catalog == ml100k.catalog
    assert np.array_equal(data.targets("test"), [ml100k.test_target(user) for user in users])
    assert all(data.held_out.train_end[users] <= data.held_out.test[users])
