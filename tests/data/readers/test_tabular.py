"""Tables of the user's own, in every format, and what may be wrong with them."""

from pathlib import Path

import polars as pl
import pytest

from cotrain.data.readers import tabular
from cotrain.data.readers.raw import Columns, RawData
from cotrain.errors import DataError

ROWS = {
    "user_id": [1, 1, 2],
    "item_id": ["a", "b", "a"],
    "timestamp": [1_000_000_002, 1_000_000_001, 1_000_000_000],
}
ITEMS = {"item_id": ["a", "b"], "title": ["Alpha", "Beta"], "categories": ["x|y", None]}


def write(path: Path, table: dict | str | bytes) -> Path:
    if isinstance(table, bytes):
        path.write_bytes(table)
    elif isinstance(table, str):
        path.write_text(table, encoding="utf-8", newline="")
    elif path.suffix == ".parquet":
        pl.DataFrame(table).write_parquet(path)
    else:
        pl.DataFrame(table).write_csv(path, separator="," if path.suffix == ".csv" else "\t")
    return path


def read(path: Path, items: Path | None = None, **columns: str) -> RawData:
    return tabular.read(path, items, Columns(**columns))


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv"])
@pytest.mark.parametrize("kind", ["folder", "files"])
def test_every_format(tmp_path, suffix, kind):
    interactions = write(tmp_path / f"interactions{suffix}", ROWS)
    items = write(tmp_path / f"items{suffix}", ITEMS)
    raw = read(tmp_path) if kind == "folder" else read(interactions, items)
    rows = raw.interactions.select("user_id", "item_id", "timestamp").cast(pl.String)
    assert rows.rows() == list(pl.DataFrame(ROWS).cast(pl.String).rows())
    assert raw.interactions["source_row"].to_list() == [0, 1, 2]
    assert raw.items is not None
    assert raw.items.rows() == [("a", "Alpha", "x|y"), ("b", "Beta", None)]
    assert raw.files == [interactions, items]
    place = raw.where([1])
    assert place == ["row 2" if suffix == ".parquet" else "row 2 (line 3)"]


def test_position_orders_where_it_stands_unless_something_else_is_named(tmp_path):
    table = {**ROWS, "position": [1, 0, 0], "step": [5, 6, 7]}
    path = write(tmp_path / "t.parquet", table)
    assert read(path).order_column == "position"
    assert read(path, order="step").interactions["order"].to_list() == [5, 6, 7]
    assert read(path, timestamp="timestamp").order_column is None
    del table["timestamp"]
    assert "timestamp" not in read(write(path, table)).interactions.columns


def test_columns_of_other_names(tmp_path):
    table = {"u": [1], "i": ["a"], "t": [5], "stars": ["4"]}
    items = write(tmp_path / "i.csv", {"i": ["a"], "name": [" Alpha "], "kind": ["x"]})
    raw = read(
        write(tmp_path / "t.csv", table), items,
        user="u", item="i", timestamp="t", rating="stars", title="name", categories="kind",
    )  # fmt: skip
    assert raw.interactions.columns == ["source_row", "user_id", "item_id", "timestamp", "rating"]
    assert raw.items is not None
    assert raw.items.rows() == [("a", "Alpha", "x")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (b"user_id,item_id,timestamp\n", "no rows"),
        (b"user_id;item_id;timestamp\n1;a;1\n", r"'timestamp'.*split at ','"),
        (b"user_id,item_id\n1,a\n", r"lacks the column 'timestamp' \(--timestamp-column\)"),
        (b"user_id,item_id,timestamp\n1,a,1\n1,a,2,3\n", "line 3 has 4 fields instead of 3"),
        (b"user_id,item_id,timestamp\n1,a,1\n1,\xff,2\n", "line 3 is not UTF-8"),
        (b'user_id,item_id,timestamp\n1,a,1\n1,"a,2\n1,b,3\n', "begins in line 3 has a quote"),
        (b"user_id,item_id,user_id,timestamp\n1,a,2,3\n", "'user_id' more than once"),
    ],
)
def test_tables_that_do_not_do(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "t.csv", text))


def test_a_header_in_the_middle_is_dropped_and_counted(tmp_path):
    part = "user_id,item_id,timestamp\n1,a,1\n1,b,2\n"
    raw = read(write(tmp_path / "joined.csv", part * 2))
    assert raw.interactions["source_row"].to_list() == [0, 1, 3, 4]
    assert raw.ledger.steps[1].text == "the header again"
    assert raw.ledger.steps[1].examples == ["row 3 (line 4)"]


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_parquet_file_that_is_cut_off(tmp_path, share):
    path = write(tmp_path / "t.parquet", ROWS)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(path)


def test_items_tables_that_do_not_do(tmp_path):
    table = write(tmp_path / "t.csv", ROWS)
    with pytest.raises(DataError, match=r"lacks the column 'title' \(--title-column\)"):
        read(table, write(tmp_path / "i.csv", {"item_id": ["a"]}))
    with pytest.raises(DataError, match="--title-column or --categories-column"):
        read(table, write(tmp_path / "i.parquet", {"item_id": ["a"], "title": [[1]]}))
    raw = read(
        table, write(tmp_path / "j.csv", {"item_id": ["a", "a", None], "title": list("xyz")})
    )
    assert raw.items is not None
    assert raw.items.rows() == [("a", "x", None)]
    noted = "\n".join(raw.ledger.notes)
    assert "1 row of j.csv without an item id dropped" in noted
    assert "1 row of j.csv dropped: the item id stands in an earlier row" in noted
    assert "j.csv has no column 'categories'" in noted


def test_an_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r"holds no interactions.parquet or interactions.csv"):
        read(tmp_path)
    for suffix in (".csv", ".parquet"):
        write(tmp_path / f"interactions{suffix}", ROWS)
    with pytest.raises(DataError, match="Give the one that is meant"):
        read(tmp_path)
