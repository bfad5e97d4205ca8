"""RecBole's atomic files, as its wheel and its downloads have them."""

import shutil
from pathlib import Path

import polars as pl
import pytest

from cotrain import assets
from cotrain.data.readers import recbole
from cotrain.data.readers.raw import Columns, RawData
from cotrain.errors import DataError

# The first lines of ml-100k in the wheel of RecBole.
INTER = (
    "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "196\t242\t3\t881250949\n186\t302\t3\t891717742\n22\t377\t1\t878887116\n"
)
ITEM = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "242\tKolya\t1996\tComedy\n302\tL.A. Confidential\t1997\tCrime Film-Noir Mystery Thriller\n"
    "377\tHeavyweights\tV\t\n"
)


def write(folder: Path, inter: str = INTER, item: str | None = ITEM, name: str = "ml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.inter").write_text(inter, encoding="utf-8")
    if item is not None:
        (folder / f"{name}.item").write_text(item, encoding="utf-8")
    return folder


def read(path: Path, items: Path | None = None, **columns: str) -> RawData:
    return recbole.read(path, items, Columns(**columns))


@pytest.mark.parametrize("kind", ["file", "folder", "zip"])
def test_a_data_set_as_file_folder_or_archive(tmp_path, kind):
    path = write(tmp_path / "ml")
    if kind == "file":
        path = path / "ml.inter"
    if kind == "zip":
        path = Path(shutil.make_archive(str(path), "zip", path))
    raw = read(path)
    assert raw.interactions.select("user_id", "item_id", "rating", "timestamp").rows() == [
        ("196", "242", 3.0, 881250949.0),
        ("186", "302", 3.0, 891717742.0),
        ("22", "377", 1.0, 878887116.0),
    ]
    assert raw.items is not None
    assert raw.items.rows() == [
        ("242", "Kolya (1996)", "Comedy"),
        ("302", "L.A. Confidential (1997)", "Crime|Film-Noir|Mystery|Thriller"),
        ("377", "Heavyweights", None),
    ]


def test_the_real_ml_100k_as_recbole_writes_it(tmp_path):
    interactions = pl.read_parquet(assets.fetch("ml-100k") / "interactions.parquet")
    names = ["user_id", "item_id", "rating", "timestamp"]
    body = interactions.select(names).write_csv(separator="\t", include_header=False)
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    raw = read(write(tmp_path, header + body, None))
    assert (
        raw.interactions.select(names)
        .cast(pl.Int64)
        .equals(interactions.select(names).cast(pl.Int64))
    )
    assert any("items have no titles" in note for note in raw.ledger.notes)


def test_other_columns_and_sequences(tmp_path):
    inter = (
        "session:token\tproduct:token\tstep:float\tseen:token_seq\tembedding:float_seq\n"
        "a b\t007\t1\tx y\t0.1 0.2\na b\t7\t2\t\t\n"
    )
    item = "product:token\tlabel:token_seq\tkind:token\n007\tBond, James\tspy film\n7\tSeven\t\n"
    raw = read(
        write(tmp_path, inter, item),
        user="session", item="product", order="step", title="label", categories="kind",
    )  # fmt: skip
    assert raw.interactions.select("user_id", "item_id", "order").rows() == [
        ("a b", "007", 1.0),
        ("a b", "7", 2.0),
    ]
    assert raw.order_column == "step"
    assert raw.items is not None
    # A single token may hold blanks; only sequences are split at them.
    assert raw.items.rows() == [("007", "Bond, James", "spy film"), ("7", "Seven", None)]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("user_id\titem_id\ttimestamp", "no header of a RecBole atomic file: 'user_id'"),
        ("user_id:token,item_id:token", "no header"),
        ("user_id:token\titem_id:text\ttimestamp:float", "'item_id:text'"),
        ("user_id:token\tuser_id:token\titem_id:token\ttimestamp:float", "unique columns"),
        ("user_id:token\titem_id:token", "lacks the columns 'timestamp'"),
        ("uid:token\tiid:token\ttimestamp:float", "lacks the columns 'user_id', 'item_id'"),
    ],
)
def test_headers_that_do_not_do(tmp_path, header, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path, header + "\n1\t2\t3\n"))


def test_damaged_lines(tmp_path):
    lines = INTER.splitlines()
    text = "\n".join([*lines, "1\t2\t3", lines[0], "1\t2\tgood\t881250949", lines[1]]) + "\n"
    raw = read(write(tmp_path, text))
    assert raw.interactions["source_row"].to_list() == [2, 3, 4, 8]
    assert [(step.text, step.examples[0][:7]) for step in raw.ledger.steps[1:]] == [
        ("another number of fields than 4", "line 5:"),
        ("the header again", "line 6:"),
        ("no number in field 'rating'", "line 7:"),
    ]


def test_several_data_sets_in_a_folder(tmp_path):
    write(tmp_path, name="a")
    write(tmp_path, name="b")
    with pytest.raises(DataError, match=r"2 .inter files: 'a.inter', 'b.inter'"):
        read(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no .inter files"):
        read(tmp_path / "empty")
