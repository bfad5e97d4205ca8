"""Checks of ids, times and ratings: what cannot be used is dropped, counted and shown."""

import datetime
from pathlib import Path

import polars as pl
import pytest

from cotrain.data.cleaning import Events, clean
from cotrain.data.ledger import Ledger
from cotrain.data.readers.raw import RawData, where_lines
from cotrain.errors import DataError

NOW = 1_700_000_000.0
T = 1_600_000_000
DAY = 86_400


def raw(columns: dict, suffix: str = ".csv", **settings) -> RawData:
    """Rows of one user, unless said otherwise."""
    count = len(next(iter(columns.values())))
    columns = {"user_id": [1] * count, "item_id": list(range(count)), **columns}
    ledger = Ledger()
    ledger.read("read", count)
    frame = pl.DataFrame(columns, strict=False).with_row_index("source_row", offset=1)
    settings = {"where": where_lines, "items": None, **settings}
    return RawData(interactions=frame, ledger=ledger, files=[Path(f"t{suffix}")], **settings)


def cleaned(columns: dict, share: float = 1.0, **settings) -> tuple[Events, Ledger]:
    given = raw(columns, **settings)
    return clean(given, share, NOW), given.ledger


def ordered(events: Events) -> list:
    """Raw item ids in the order of the events."""
    return events.items.gather(events.table["item"]).to_list()


# ---- order --------------------------------------------------------------------------------------


def test_time_orders_within_a_user_and_ties_keep_the_file():
    users = [2, 1, 2, 1, 1, 2]
    events, _ = cleaned({"user_id": users, "timestamp": [T + 1, T + 5, T, T + 5, T, T + 1]})
    assert events.users.to_list() == [1, 2]
    assert events.table["user"].to_list() == [0, 0, 0, 1, 1, 1]
    assert ordered(events) == [4, 1, 3, 2, 0, 5]


def test_a_column_of_its_own_orders_and_times_may_then_be_missing():
    times = [T, None, -5, int(NOW) + 2 * DAY]
    events, ledger = cleaned({"order": [3, 1, 2, 0], "timestamp": times}, order_column="position")
    assert ordered(events) == [3, 1, 2, 0]
    assert events.table["timestamp"].to_list() == [None, None, None, T]
    assert len(ledger.steps) == 1
    notes = "\n".join(ledger.notes)
    assert "1 × negative timestamp: set to missing, and the row kept" in notes
    assert "1 × timestamp in the future (read as seconds): set to missing" in notes
    assert "3 of 4 rows have no timestamp" in notes
    events, ledger = cleaned({"order": ["3", "x", "2", ""]}, order_column="position")
    assert ordered(events) == [2, 0]
    assert ledger.steps[-1].examples == ["line 2: 'x'", "line 4: ''"]


# ---- times --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "note"),
    [
        (1, None),
        (10**3, "Timestamps are in milliseconds"),
        (10**6, "Timestamps are in microseconds"),
        (10**9, "Timestamps are in nanoseconds"),
    ],
)
@pytest.mark.parametrize("text", [False, True])
def test_units_are_noticed_and_the_full_value_orders(scale, note, text):
    times = [T * scale + 1, T * scale, (T - 1) * scale]
    events, ledger = cleaned({"timestamp": [str(time) for time in times] if text else times})
    assert ordered(events) == [2, 1, 0]
    assert events.table["timestamp"].to_list() == [T - 1, T, T + (scale == 1)]
    assert any(line.startswith(note or "Order") for line in ledger.notes)
    assert any("Timestamps are in" in line for line in ledger.notes) == (scale > 1)


@pytest.mark.parametrize(
    "times",
    [
        [datetime.date(2020, 9, 14), datetime.date(2020, 9, 13)],
        [datetime.datetime(2020, 9, 14), datetime.datetime(2020, 9, 13)],
        ["2020-09-14", "2020-09-13"],
        ["2020-09-14 00:00:00", "2020-09-13 00:00:00"],
        ["2020-09-14T00:00:00", "2020-09-13T00:00:00.000"],
    ],
)
def test_dates_become_seconds(times):
    events, ledger = cleaned({"timestamp": times})
    assert ordered(events) == [1, 0]
    assert events.table["timestamp"].to_list() == [1599955200, 1600041600]
    assert "Timestamps are dates; stored in seconds since 1970." in ledger.notes


def test_numbers_that_are_no_clock_times_are_kept_as_they_are():
    events, ledger = cleaned({"timestamp": [0.5, 2.0, 1.0]})
    assert events.table["timestamp"].to_list() == [0.5, 1.0, 2.0]
    assert "Timestamps are no clock times; they are kept as they are." in ledger.notes
    events, _ = cleaned({"timestamp": [3.0, 2.0, 1.0]})
    assert events.table["timestamp"].dtype == pl.Int64


def test_fractions_of_a_second_order_only():
    events, ledger = cleaned({"timestamp": [T + 0.75, T + 0.5, float(T)]})
    assert ordered(events) == [2, 1, 0]
    assert events.table["timestamp"].to_list() == [T] * 3
    assert any("Fractions of a second" in line for line in ledger.notes)


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        (-1, "negative timestamp"),
        (0, "timestamp before March 1973 (read as seconds)"),
        (int(NOW) + 2 * DAY, "timestamp in the future (read as seconds)"),
        (T * 1000, "timestamp in the future (read as seconds)"),
        (None, "no timestamp that is a number"),
        (float("nan"), "no timestamp that is a number"),
        (float("inf"), "no timestamp that is a number"),
    ],
)
def test_times_that_cannot_be_are_dropped_and_shown(bad, cause):
    events, ledger = cleaned({"timestamp": [T, T + 1, bad, T + 2]})
    assert ordered(events) == [0, 1, 3]
    step = ledger.steps[-1]
    assert (step.text, step.dropped, step.left) == (cause, 1, 3)
    assert step.examples[0].startswith("line 3")
    assert ledger.damaged == 1


def test_a_few_seconds_among_milliseconds_are_not_taken_for_1970():
    _, ledger = cleaned({"timestamp": [T * 1000, T * 1000 + 1, T]})
    assert ledger.steps[-1].text == "timestamp before March 1973 (read as milliseconds)"


def test_a_clock_that_runs_ahead_by_hours_is_no_future():
    events, _ = cleaned({"timestamp": [T, int(NOW) + DAY // 2]})
    assert events.table.height == 2


@pytest.mark.parametrize("values", [[True, False], [[1], [2]], [datetime.time(1), None]])
def test_columns_that_tell_no_time(values):
    with pytest.raises(DataError, match=r"'timestamp' is .* --timestamp-column"):
        cleaned({"timestamp": values})


# ---- ids and ratings ----------------------------------------------------------------------------


def test_rows_without_ids_are_dropped():
    rows = {"user_id": ["1", "", " ", None, "2"], "item_id": ["a", "b", "c", "d", None]}
    events, ledger = cleaned({**rows, "timestamp": [T] * 5})
    assert ordered(events) == ["a"]
    assert [(step.text, step.dropped) for step in ledger.steps[1:]] == [
        ("no user_id", 3),
        ("no item_id", 1),
    ]
    assert ledger.steps[1].examples == ["line 2", "line 3", "line 4"]


def test_ids_of_numbers_and_text_stay_text_with_a_warning():
    users = [str(number) for number in range(200)] + ["guest"]
    events, ledger = cleaned({"user_id": users, "timestamp": [T] * 201}, free_ids=True)
    assert events.users.dtype == pl.String
    warned = [line for line in ledger.notes if "mixes" in line]
    assert warned == [
        "WARNING: user_id mixes kinds: 1 of 201 ids are text and the rest numbers ('guest'). "
        "All are kept as text."
    ]
    events, ledger = cleaned({"user_id": users[:-1], "timestamp": [T] * 200}, free_ids=True)
    assert events.users.dtype == pl.Int64
    assert not any("mixes" in line for line in ledger.notes)


def test_blanks_around_ids_are_remarked_on():
    _, ledger = cleaned({"user_id": ["a", "a "], "timestamp": [T] * 2}, free_ids=True)
    assert any("user_id has 1 value with blanks at an end" in line for line in ledger.notes)


def test_ratings_that_are_none_are_missing_and_their_rows_stay():
    ratings = [5.0, float("nan"), None, float("inf")]
    events, ledger = cleaned({"timestamp": [T, T + 1, T + 2, T + 3], "rating": ratings})
    assert events.table["rating"].to_list() == [5.0, None, None, None]
    assert ledger.notes[:2] == [
        "1 of 4 rows have no rating; they are kept.",
        "2 ratings set to missing, no numbers (nan, inf); the rows are kept.",
    ]
    events, ledger = cleaned({"timestamp": [T] * 3, "rating": ["4.5", " ", "good"]})
    assert events.table["rating"].to_list() == [4.5, None, None]
    assert "1 rating set to missing, no numbers ('good')" in ledger.notes[1]


# ---- how much is too much -----------------------------------------------------------------------


def test_the_share_of_damaged_rows_that_is_allowed():
    times = [T] * 999 + [-1]
    assert cleaned({"timestamp": times}, share=0.001)[0].table.height == 999
    with pytest.raises(DataError, match=r"(?s)1 of 1,000 rows \(0\.10%\).*line 1,000: -1.*0\.0011"):
        cleaned({"timestamp": times}, share=0)
    with pytest.raises(DataError, match=r"No interaction is left"):
        cleaned({"timestamp": [-1, -2]}, share=1)
