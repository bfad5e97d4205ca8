"""Files of histories give the same rows in every format, and say where they are wrong."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cotrain.data import histories as module
from cotrain.data.histories import HistoryFile
from cotrain.errors import DataError

ROWS = [("u1", ["a", "b"]), ("u2", []), ("ü", ["c", "who", "a"])]


def write(path: Path, rows: Any = ROWS) -> Path:
    users, lists = zip(*rows, strict=True)
    if path.suffix == ".jsonl":
        lines = [json.dumps({"user_id": u, "item_ids": i, "more": 1}) for u, i in rows]
        path.write_text("\n".join(lines) + "\n\n")
        return path
    table = pl.DataFrame({"more": 1, "user_id": users, "item_ids": lists})
    if path.suffix == ".parquet":
        table.write_parquet(path)
    else:
        joined = pl.col("item_ids").cast(pl.List(pl.String)).list.join("|")
        table.with_columns(joined).write_csv(path, separator="\t" if path.suffix == ".tsv" else ",")
    return path


def read(file: HistoryFile) -> list[tuple[Any, list[Any]]]:
    rows = []
    for piece in file:
        items = piece.items.to_pylist()
        assert piece.first_row == len(rows) + 1
        for user, length in zip(piece.users.to_pylist(), piece.lengths, strict=True):
            rows.append((user, [items.pop(0) for _ in range(length)]))
        assert not items
        assert piece.done <= file.total
    return rows


@pytest.mark.parametrize("suffix", module.SUFFIXES)
@pytest.mark.parametrize("size", [1, 2, 100])
def test_every_format_gives_the_same_rows(suffix, size, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", size)
    assert read(HistoryFile(write(tmp_path / f"h{suffix}"))) == ROWS


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_numbers_stay_numbers(suffix, tmp_path):
    rows = [(7, [3, 5]), (-1, [2**62])]
    file = HistoryFile(write(tmp_path / f"h{suffix}", rows))
    assert file.user_type == pa.int64()
    assert read(file) == rows


def test_other_columns_by_name(tmp_path):
    pl.DataFrame({"who": [1], "took": [[2, 3]]}).write_parquet(tmp_path / "h.parquet")
    assert read(HistoryFile(tmp_path / "h.parquet", "who", "took")) == [(1, [2, 3])]
    with pytest.raises(DataError, match=r"lacks the columns 'user_id', 'item_ids'. It has 'who'"):
        HistoryFile(tmp_path / "h.parquet")


def test_dictionaries_nulls_and_text_in_parquet(tmp_path):
    table = pa.table(
        {
            "user_id": pa.array(["x", "y", "z"]).dictionary_encode(),
            "item_ids": pa.array([["a", None], None, []], pa.list_(pa.string())),
        }
    )
    pq.write_table(table, tmp_path / "h.parquet")
    assert read(HistoryFile(tmp_path / "h.parquet")) == [("x", ["a", None]), ("y", []), ("z", [])]
    pl.DataFrame({"user_id": [1, 2], "item_ids": ["3| 5||", None]}).write_parquet(
        tmp_path / "t.parquet"
    )
    assert read(HistoryFile(tmp_path / "t.parquet")) == [(1, ["3", "5"]), (2, [])]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is no JSON"),
        ("[" * 100_000, "line 2 is no JSON"),
        ("[1, 2]", "line 2 has list; expected"),
        ('{"user_id": 1}', "line 2 has 'user_id'; expected"),
        ('{"user_id": 1.5, "item_ids": []}', "line 2 has the user 1.5"),
        ('{"user_id": true, "item_ids": []}', "line 2 has the user True"),
        ('{"user_id": 1, "item_ids": "a"}', "line 2 has the items 'a'"),
        ('{"user_id": 1, "item_ids": [[1]]}', r"line 2 has the items \[\[1\]\]"),
        ('{"user_id": "x", "item_ids": []}', "line 2 has the user 'x', and line 1 one of another"),
    ],
)
def test_a_wrong_line_is_named(line, said, tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_text('{"user_id": 1, "item_ids": [3]}\n' + line + "\n")
    with pytest.raises(DataError, match=said):
        read(HistoryFile(path))


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LINE", 2**20)
    (tmp_path / "h.jsonl").write_text("[" + "1, " * 2**20)
    with pytest.raises(DataError, match="line 1 is longer than 1 MiB"):
        HistoryFile(tmp_path / "h.jsonl")


def test_what_is_no_file_of_histories(tmp_path):
    for path, said in (
        (tmp_path, "is a folder"), (tmp_path / "no.csv", "does not exist"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=said):
            HistoryFile(path)
    (tmp_path / "h.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"ends in '.xlsx'; expected '.parquet'"):
        HistoryFile(tmp_path / "h.xlsx")
    for suffix in (".parquet", ".csv", ".jsonl"):
        (tmp_path / f"empty{suffix}").write_bytes(b"")
        with pytest.raises(DataError):
            HistoryFile(tmp_path / f"empty{suffix}")
    (tmp_path / "torn.parquet").write_bytes(write(tmp_path / "h.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cannot be read as parquet; it may be cut off"):
        HistoryFile(tmp_path / "torn.parquet")
    (tmp_path / "wide.csv").write_text("user_id,item_ids\n1,2\n1,2,3\n")
    with pytest.raises(DataError, match="cannot be read as csv"):
        read(HistoryFile(tmp_path / "wide.csv"))


def test_columns_of_the_wrong_type(tmp_path):
    pl.DataFrame({"user_id": [1], "item_ids": [3]}).write_parquet(tmp_path / "long.parquet")
    with pytest.raises(DataError, match="one item a row; expected one user a row"):
        HistoryFile(tmp_path / "long.parquet")
    pl.DataFrame({"user_id": [1.5], "item_ids": [[3]]}).write_parquet(tmp_path / "f.parquet")
    with pytest.raises(DataError, match=r"'user_id' of .* is double; expected integers or text"):
        HistoryFile(tmp_path / "f.parquet")
    pl.DataFrame({"user_id": [1, None], "item_ids": [[3], [4]]}).write_parquet(
        tmp_path / "n.parquet"
    )
    with pytest.raises(DataError, match="row 2 has no user_id"):
        read(HistoryFile(tmp_path / "n.parquet"))
