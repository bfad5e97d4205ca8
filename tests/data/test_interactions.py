"""Tables become ordered histories; what cannot be used is named, what is dropped is counted."""

import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotrain.config import DataConfig
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.errors import AssetError, DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"

# Two users with three interactions each, not in time order.
ROWS = {
    "user_id": [2, 1, 1, 2, 1, 2],
    "item_id": [30, 10, 20, 10, 30, 40],
    "timestamp": [5, 3, 1, 6, 2, 7],
}


def write(path: Path, table: pl.DataFrame | dict | str) -> str:
    if isinstance(table, str):
        path.write_text(table, encoding="utf-8", newline="")
    else:
        frame = pl.DataFrame(table)
        if path.suffix == ".parquet":
            frame.write_parquet(path)
        else:
            frame.write_csv(path, separator="," if path.suffix.lower() == ".csv" else "\t")
    return str(path)


def load(folder: Path, interactions, items=None, suffix=".parquet", **settings) -> InteractionData:
    config = DataConfig(
        interactions=write(folder / f"interactions{suffix}", interactions),
        items=None if items is None else write(folder / f"items{suffix}", items),
        **settings,
    )
    return load_interactions(config)


def histories(data: InteractionData) -> dict:
    """Raw item ids of each raw user id, in order."""
    return {
        raw: [data.catalog.item_ids[item] for item in data.history(user)]
        for user, raw in enumerate(data.user_ids)
    }


def same(left: InteractionData, right: InteractionData) -> bool:
    return (
        left.user_ids == right.user_ids
        and left.catalog == right.catalog
        and np.array_equal(left.offsets, right.offsets)
        and np.array_equal(left.items, right.items)
    )


# ---- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".inter", ".txt", ".CSV"])
def test_small_table_by_hand(tmp_path, suffix):
    data = load(tmp_path, ROWS, suffix=suffix)
    assert data.user_ids == [1, 2]
    assert data.catalog.item_ids == [None, 10, 20, 30, 40]
    assert data.offsets.tolist() == [0, 3, 6]
    assert data.items.tolist() == [2, 3, 1, 3, 1, 4]
    assert data.items.dtype == data.offsets.dtype == np.int64
    assert data.items.flags.writeable
    assert (data.num_users, data.num_items, data.num_interactions) == (2, 4, 6)


def test_leave_one_out_split(tmp_path):
    data = load(tmp_path, {**ROWS, "user_id": [1] * 6})
    assert [data.catalog.item_ids[i] for i in data.history(0)] == [20, 30, 10, 30, 10, 40]
    assert data.train_history(0).tolist() == data.history(0)[:4].tolist()
    assert data.validation_target(0) == data.history(0)[4]
    assert data.test_target(0) == data.history(0)[5]


def test_text_ids_sort_as_text_and_repeats_are_kept(tmp_path):
    rows = {"user_id": ["b"] * 4, "item_id": ["9", "10", "é", "9"], "timestamp": [1, 2, 3, 4]}
    data = load(tmp_path, rows)
    assert data.catalog.item_ids == [None, "10", "9", "é"]
    assert histories(data) == {"b": ["9", "10", "é", "9"]}


def test_categorical_and_pandas_float_ids(tmp_path):
    frame = pl.DataFrame(ROWS).with_columns(
        pl.col("user_id").cast(pl.String).cast(pl.Categorical), pl.col("item_id").cast(pl.Float64)
    )
    assert histories(load(tmp_path, frame)) == {"1": [20, 30, 10], "2": [30, 10, 40]}


def test_leading_zeros_in_csv_are_part_of_the_id(tmp_path):
    table = "user_id,item_id,timestamp\n1,007,1\n1,7,2\n1,8,3\n"
    assert histories(load(tmp_path, table, suffix=".csv")) == {1: ["007", "7", "8"]}


def test_quoted_csv_and_numbers_as_text(tmp_path):
    table = 'user_id,item_id,timestamp\n"a,b","x\ny","3"\n"a,b",z, 1.5 \n"a,b",w,2e0\n'
    assert histories(load(tmp_path, table, suffix=".csv")) == {"a,b": ["z", "w", "x\ny"]}


def test_dates_order_too_and_nanoseconds_keep_their_last_digit(tmp_path):
    days = [datetime.date(2020, 1, 3), datetime.date(2020, 1, 1), datetime.date(2020, 1, 2)]
    rows = {"user_id": [1] * 3, "item_id": [1, 2, 3], "timestamp": days}
    assert histories(load(tmp_path, rows)) == {1: [2, 3, 1]}
    start = 1_700_000_000_000_000_000
    rows["timestamp"] = [start + 2, start, start + 1]
    assert histories(load(tmp_path, rows, suffix=".csv")) == {1: [2, 3, 1]}


@settings(max_examples=30, deadline=None)
@given(
    users=st.lists(st.integers(0, 3), min_size=12, max_size=40),
    data=st.data(),
    suffix=st.sampled_from([".parquet", ".csv"]),
)
def test_ties_keep_the_order_of_the_file(tmp_path_factory, users, data, suffix):
    folder = tmp_path_factory.mktemp("ties")
    times = data.draw(st.lists(st.integers(0, 2), min_size=len(users), max_size=len(users)))
    rows = {"user_id": users, "item_id": range(len(users)), "timestamp": times}
    expected = {}
    for user in sorted(set(users)):
        own = [row for row in range(len(users)) if users[row] == user]
        if len(own) >= 3:
            expected[user] = sorted(own, key=lambda row: times[row])
    assert histories(load(folder, rows, suffix=suffix)) == expected


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(30)), suffix=st.sampled_from([".parquet", ".tsv"]))
def test_row_order_does_not_matter_when_times_differ(tmp_path_factory, order, suffix):
    folder = tmp_path_factory.mktemp("shuffle")
    table = pl.DataFrame(
        {
            "user_id": [f"u{row % 5}" for row in range(30)],
            "item_id": [row * 7 % 11 for row in range(30)],
            "timestamp": range(30),
        }
    )
    assert same(load(folder, table[list(order)], suffix=suffix), load(folder, table, suffix=suffix))


# ---- which column orders ------------------------------------------------------------------------


def test_position_goes_before_the_timestamp_and_order_column_before_both(tmp_path):
    rows = {**ROWS, "position": [2, 0, 1, 1, 2, 0], "mine": [1, 9, 8, 2, 7, 3]}
    data = load(tmp_path, rows)
    assert histories(data) == {1: [10, 20, 30], 2: [40, 10, 30]}
    assert (
        "Order within a user: column position, not the timestamp; equal values keep the order of "
        "the file." in data.notes
    )
    data = load(tmp_path, rows, order_column="mine")
    assert histories(data) == {1: [30, 20, 10], 2: [30, 10, 40]}
    assert any("column mine, not the timestamp" in note for note in data.notes)
    data = load(tmp_path, ROWS)
    assert any("column timestamp; equal values" in note for note in data.notes)


def test_timestamps_that_do_not_order_may_be_missing_wrong_or_absent(tmp_path):
    rows = {**ROWS, "position": range(6)}
    expected = histories(load(tmp_path, rows))
    for times in ([None] * 6, ["soon", None, "1", "2", "3", "4"]):
        assert histories(load(tmp_path, {**rows, "timestamp": times})) == expected
    del rows["timestamp"]
    assert histories(load(tmp_path, rows)) == expected


def test_named_columns(tmp_path):
    rows = dict(zip(["who", "what", "when"], ROWS.values(), strict=True))
    items = {"what": [10, 20, 30, 40], "name": list("abcd"), "genre": list("wxyz")}
    data = load(
        tmp_path,
        rows,
        items,
        user_column="who",
        item_column="what",
        timestamp_column="when",
        title_column="name",
        categories_column="genre",
    )
    assert histories(data) == histories(load(tmp_path, ROWS))
    assert data.catalog.titles == ["", *"abcd"]
    assert data.catalog.categories == ["", *"wxyz"]


# ---- what is dropped is counted -----------------------------------------------------------------


def test_notes_tell_the_counts(tmp_path):
    data = load(tmp_path, ROWS)
    assert data.notes[0] == "Interactions: 6 rows read from interactions.parquet."
    assert "Kept: 2 users, 4 items, 6 interactions." in data.notes
    assert data.notes[-1] == "No items table is given: ids stand in for titles."
    assert data.catalog.titles == ["", "10", "20", "30", "40"]


def test_short_users_are_dropped_with_the_items_only_they_have(tmp_path):
    rows = {
        "user_id": [1, 1, 1, 2, 2, 3],
        "item_id": [5, 6, 7, 8, 5, 9],
        "timestamp": range(6),
    }
    data = load(tmp_path, rows)
    assert data.user_ids == [1]
    assert data.catalog.item_ids == [None, 5, 6, 7]
    assert "2 of 3 users dropped, with their 3 interactions: fewer than 3." in data.notes


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_rows_without_ids_are_dropped_and_counted(tmp_path, suffix):
    rows = {
        "user_id": ["a", None, "a", "a", "a", " "],
        "item_id": ["x", "y", None, "y", "z", "x"],
        # Nothing to order by in a row that is dropped anyway.
        "timestamp": [1, None, None, 2, 3, 4],
    }
    data = load(tmp_path, rows, suffix=suffix)
    assert histories(data) == {"a": ["x", "y", "z"]}
    assert "2 rows without user_id dropped." in data.notes
    assert "1 row without item_id dropped." in data.notes


# ---- items --------------------------------------------------------------------------------------


@pytest.mark.parametrize("blank", [None, "", "  "])
def test_untitled_items_are_counted_and_called_by_their_id(tmp_path, blank):
    items = {"item_id": [10, 20, 30, 40], "title": [blank, "b", " c ", "d"]}
    data = load(tmp_path, ROWS, items)
    assert data.catalog.titles == ["", "10", "b", "c", "d"]
    assert "1 of 4 items has no title; its id stands in." in data.notes
    assert "items.parquet has no column categories: items have no categories." in data.notes
    assert data.catalog.categories == [""] * 5


def test_items_without_a_row_and_repeated_rows(tmp_path):
    items = {
        "item_id": [10, 10, 99, None],
        "title": ["first", "second", "never met", "no id"],
        "categories": ["a|b", "c", None, None],
    }
    data = load(tmp_path, ROWS, items)
    assert data.catalog.titles == ["", "first", "20", "30", "40"]
    assert data.catalog.categories == ["", "a|b", "", "", ""]
    assert "3 of 4 items have no title; their ids stand in." in data.notes
    assert "1 row of items.parquet dropped: its item id stands in an earlier row." in data.notes
    assert "1 row of items.parquet without item_id dropped." in data.notes


def test_categories_can_be_lists_or_not_wanted(tmp_path):
    items = {"item_id": [10, 20], "title": ["a", "b"], "categories": [["x", "y"], []]}
    assert load(tmp_path, ROWS, items).catalog.categories[1:3] == ["x|y", ""]
    data = load(tmp_path, ROWS, items, categories_column=None)
    assert data.catalog.categories == [""] * 5
    assert not any("categories" in note for note in data.notes)


@pytest.mark.parametrize("kind", [pl.Int8, pl.Int64, pl.UInt32, pl.Float64, pl.String])
@pytest.mark.parametrize("item_kind", [pl.Int8, pl.Int64, pl.UInt32, pl.String])
def test_the_two_tables_may_hold_ids_in_different_types(tmp_path, kind, item_kind):
    rows = pl.DataFrame(ROWS).cast({"item_id": kind})
    expected = ["10", "20", "30", "40"] if kind == pl.String else [10, 20, 30, 40]
    items = pl.DataFrame({"item_id": [40, 30, 20, 10], "title": list("dcba")})
    data = load(tmp_path, rows, items.cast({"item_id": item_kind}))
    assert data.catalog.item_ids == [None, *expected]
    assert data.catalog.titles == ["", *"abcd"]


# ---- errors -------------------------------------------------------------------------------------


def test_missing_file_folder_and_unknown_suffix(tmp_path):
    with pytest.raises(DataError, match=r"no\.csv does not exist.*--data\.interactions"):
        load_interactions(DataConfig(interactions=str(tmp_path / "no.csv")))
    with pytest.raises(DataError, match="is a folder"):
        load_interactions(DataConfig(interactions=str(tmp_path)))
    with pytest.raises(DataError, match=r"'\.xlsx'; --data\.interactions reads '\.parquet'"):
        load(tmp_path, "whatever", suffix=".xlsx")
    good = write(tmp_path / "good.parquet", ROWS)
    with pytest.raises(DataError, match=r"gone\.csv does not exist.*--data\.items"):
        load_interactions(DataConfig(interactions=good, items=str(tmp_path / "gone.csv")))


def test_items_without_interactions_and_unknown_names(tmp_path):
    with pytest.raises(DataError, match=r"--data\.interactions is not set"):
        load_interactions(DataConfig(items="items.csv"))
    with pytest.raises(AssetError, match="Did you mean 'ml-100k'"):
        load_interactions(DataConfig(name="ml-100"))
    with pytest.raises(AssetError, match="data set is needed"):
        load_interactions(DataConfig(name="all-minilm-l6-v2"))


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_missing_columns_are_named_with_the_ones_there_are(tmp_path, suffix):
    rows = {"user": [1], "item_id": [1], "time": [1]}
    with pytest.raises(DataError) as caught:
        load(tmp_path, rows, suffix=suffix)
    message = str(caught.value)
    assert "'user_id' (--data.user_column), 'timestamp' (--data.timestamp_column)" in message
    assert "It has 'user', 'item_id', 'time'" in message
    with pytest.raises(DataError, match=r"'rank' \(--data\.order_column\)"):
        load(tmp_path, ROWS, suffix=suffix, order_column="rank")
    with pytest.raises(DataError, match=r"'title' \(--data\.title_column\)"):
        load(tmp_path, ROWS, {"item_id": [10], "name": ["a"]}, suffix=suffix)


def test_non_numeric_timestamp_names_file_row_line_and_value(tmp_path):
    # The bad cell comes late, and a line break in an id moves the lines away from the rows.
    lines = ["user_id,item_id,timestamp", '1,"a\nb",1']
    lines += [f"1,i{row},{row}" for row in range(2, 2001)] + ["1,z,yesterday", "1,z,9", "1,z,"]
    with pytest.raises(DataError) as caught:
        load(tmp_path, "\n".join(lines) + "\n", suffix=".csv")
    message = str(caught.value)
    assert "interactions.csv" in message
    assert "'timestamp'" in message
    assert "row 2001 (line 2003), row 2003 (line 2005); values: 'yesterday', None" in message
    assert "2 rows of 2,003" in message


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_null_or_endless_order_values_in_parquet(tmp_path, bad):
    with pytest.raises(DataError, match=r"1 row of 6 have no number there. First: row 4; values"):
        load(tmp_path, {**ROWS, "timestamp": [1.0, 2, 3, bad, 5, 6]})
    with pytest.raises(DataError, match="Column 'position'"):
        load(tmp_path, {**ROWS, "position": [0.0, 1, 2, bad, 1, 2]})


def test_many_bad_values_are_cut_to_five(tmp_path):
    with pytest.raises(DataError, match=r"row 5; values: 'a', 'b', 'c', 'd', 'e', … \(6 in all\)"):
        load(tmp_path, {**ROWS, "timestamp": list("abcdef")})


def test_column_types_that_cannot_serve(tmp_path):
    with pytest.raises(DataError, match=r"'timestamp' .* is Boolean"):
        load(tmp_path, {**ROWS, "timestamp": [True] * 6})
    with pytest.raises(DataError, match=r"'user_id' .* is List"):
        load(tmp_path, {**ROWS, "user_id": [[1]] * 6})
    with pytest.raises(DataError, match=r"'item_id' .* is Float64"):
        load(tmp_path, {**ROWS, "item_id": [0.5] * 6})
    with pytest.raises(DataError, match="beyond 64-bit"):
        load(tmp_path, {**ROWS, "user_id": pl.Series([2**64 - 1] * 6, dtype=pl.UInt64)})
    with pytest.raises(DataError, match=r"'title' .* is List"):
        load(tmp_path, ROWS, {"item_id": [10], "title": [[1]]})


def test_no_user_is_long_enough(tmp_path):
    rows = {"user_id": [1, 1, 2], "item_id": [1, 2, 3], "timestamp": [1, 2, 3]}
    with pytest.raises(DataError, match="of 2 users the longest history has 2"):
        load(tmp_path, rows)
    with pytest.raises(DataError, match="of 0 users the longest history has 0"):
        load(tmp_path, {**rows, "user_id": [None] * 3})


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_empty_tables(tmp_path, suffix):
    empty = {name: [] for name in ROWS}
    with pytest.raises(DataError, match="has no rows"):
        load(tmp_path, empty, suffix=suffix)
    with pytest.raises(DataError, match=r"has no rows.*--data\.items"):
        load(tmp_path, ROWS, {"item_id": [], "title": []}, suffix=suffix)
    with pytest.raises(DataError, match=r"is empty|cannot be read"):
        load(tmp_path, "", suffix=suffix)


def test_no_item_in_common(tmp_path):
    with pytest.raises(DataError, match=r"None of the 4 item ids .* 10, 20, 30; .* 'i10'"):
        load(tmp_path, ROWS, {"item_id": ["i10"], "title": ["a"]})


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_cut_off_parquet(tmp_path, keep):
    path = tmp_path / "interactions.parquet"
    rows = {name: list(values) * 500 for name, values in ROWS.items()}
    write(path, rows)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load_interactions(DataConfig(interactions=str(path)))


def test_parquet_with_damaged_pages(tmp_path):
    path = tmp_path / "interactions.parquet"
    rng = np.random.default_rng(0)
    write(path, {name: rng.integers(0, 50, 3000) for name in ROWS})
    damaged = bytearray(path.read_bytes())
    damaged[4 : len(damaged) // 3] = bytes(len(damaged) // 3 - 4)
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load_interactions(DataConfig(interactions=str(path)))


@pytest.mark.parametrize(
    "text", ["1,2,3,4\n", '1,"2,3\n4,5,6\n', "1,\udcff\udcfe,3\n"], ids=["ragged", "quote", "bytes"]
)
def test_damaged_csv(tmp_path, text):
    path = tmp_path / "interactions.csv"
    header = "user_id,item_id,timestamp\n"
    path.write_bytes((header + text).encode("utf-8", errors="surrogateescape"))
    with pytest.raises(DataError, match="cannot be read as a UTF-8 table"):
        load_interactions(DataConfig(interactions=str(path)))


# ---- real tables --------------------------------------------------------------------------------


def test_ml_100k_by_name():
    data = load_interactions(DataConfig())
    assert (data.num_users, data.num_items, data.num_interactions) == (943, 1682, 100_000)
    assert data.catalog.title(1) == "Toy Story (1995)"
    assert data.catalog.categories[1] == "Animation|Children's|Comedy"
    assert data.catalog.title(267) == "267"
    assert "1 of 1,682 items has no title; its id stands in." in data.notes


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("ml-1m", (6_040, 3_416, 999_611)), ("amazon-beauty", (22_363, 12_101, 198_502))],
)
def test_shared_tables(tmp_path, name, sizes):
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"the shared table {name} is not on this machine")
    paths = {"interactions": folder / "interactions.parquet", "items": folder / "items.parquet"}
    data = load_interactions(
        DataConfig(name, interactions=str(paths["interactions"]), items=str(paths["items"]))
    )
    assert (data.num_users, data.num_items, data.num_interactions) == sizes
    assert any("column position" in note for note in data.notes)
    table = pl.read_parquet(paths["interactions"])
    for user in (0, data.num_users // 2, data.num_users - 1):
        own = table.filter(pl.col("user_id") == data.user_ids[user]).sort("position")
        assert raw_history(data, user) == own["item_id"].to_list()
    # The same tables as CSV give the same data.
    as_csv = {key: tmp_path / f"{key}.csv" for key in paths}
    for key, path in paths.items():
        pl.read_parquet(path).write_csv(as_csv[key])
    again = DataConfig(interactions=str(as_csv["interactions"]), items=str(as_csv["items"]))
    assert same(data, load_interactions(again))


def raw_history(data: InteractionData, user: int) -> list:
    return [data.catalog.item_ids[item] for item in data.history(user)]


def test_popularity_levels_hold_a_tenth_of_the_interactions_each(ml100k: InteractionData):
    levels, counts = ml100k.popularity_levels, ml100k.train_counts
    held = np.bincount(levels, weights=counts, minlength=10) / counts.sum()
    # An item's interactions cannot be parted: the most popular one holds half a percent.
    assert np.abs(held - 0.1).max() < 0.005
    order = np.argsort(counts, kind="stable")
    assert (np.diff(levels[order]) >= 0).all()
    assert levels[0] == 0
    assert levels[counts.argmax()] == 9
