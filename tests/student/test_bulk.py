"""A file of users gets what each of them would get alone, whole or not at all."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch

from cotrain.data import histories
from cotrain.data.catalog import Catalog
from cotrain.data.histories import HistoryFile
from cotrain.errors import ConfigError, DataError
from cotrain.student import bulk
from cotrain.student.bulk import RawIds, recommend_file
from cotrain.student.recommender import Recommender
from cotrain.student.sasrec import SASRec

ROWS: list[tuple[str, list[Any]]] = [
    ("a", [3, 4, 5]), ("b", [9]), ("c", [99, 1, None, 99]), ("d", []), ("e", list(range(1, 30))),
    ("f", [77]),
]  # fmt: skip


def make(ids: list[Any]) -> Recommender:
    torch.manual_seed(0)
    model = SASRec(len(ids), hidden_size=8, num_layers=1, num_heads=2, max_length=6)
    with torch.no_grad():
        model.item_embedding.weight[1:].normal_()
    return Recommender(model, Catalog([None, *ids], ["", *map(str, ids)], [""] * (len(ids) + 1)))


RECOMMENDER = make(list(range(1, 31)))


@pytest.fixture
def source(tmp_path: Path) -> HistoryFile:
    users, lists = zip(*ROWS, strict=True)
    pl.DataFrame({"user_id": users, "item_ids": lists}).write_parquet(tmp_path / "in.parquet")
    return HistoryFile(tmp_path / "in.parquet")


def answers(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pl.read_parquet(path).to_dicts()
    if path.suffix == ".jsonl":
        return pl.read_ndjson(path, infer_schema_length=None).to_dicts()
    table = pl.read_csv(path, separator="\t" if path.suffix == ".tsv" else ",")
    rows = table.to_dicts()
    for row in rows:
        for name, kind in (("item_ids", int), ("scores", float)):
            row[name] = [kind(part) for part in (row[name] or "").split("|") if part]
    return rows


@pytest.mark.parametrize("suffix", histories.SUFFIXES)
@pytest.mark.parametrize("piece", [1, 4, 100])
def test_every_user_gets_what_they_would_get_alone(suffix, piece, source, tmp_path, monkeypatch):
    monkeypatch.setattr(histories, "_ROWS", piece)
    target = tmp_path / f"out{suffix}"
    summary = recommend_file(RECOMMENDER, source, target, 4, progress=False)
    found = answers(target)
    expected = RECOMMENDER.recommend([row for _, row in ROWS], 4, unknown="skip")
    assert [row["user_id"] for row in found] == [user for user, _ in ROWS]
    assert [row["item_ids"] for row in found] == expected.item_ids
    assert [row["unknown"] for row in found] == expected.unknown.tolist() == [0, 0, 3, 0, 0, 1]
    for row, scores in zip(found, expected.scores, strict=True):
        assert row["scores"] == pytest.approx(scores, abs=1e-5)
    assert (summary.users, summary.unknown, summary.unknown_rows) == (6, 4, 2)
    assert (summary.without, summary.cut) == (2, 0)
    assert set(summary.examples) == {"99", "None", "77"}
    said = summary.text()
    assert "4 ids in 2 rows belong to no item and were skipped, such as '99'" in said
    assert "2 rows have no known item" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", target.name]


def test_filters_and_seen_items(source, tmp_path):
    allowed = np.zeros(31, bool)
    allowed[[3, 4, 5, 30]] = True
    recommend_file(
        RECOMMENDER, source, tmp_path / "o.parquet", 9, exclude_seen=False, allowed=allowed,
        progress=False,
    )  # fmt: skip
    assert {*answers(tmp_path / "o.parquet")[0]["item_ids"]} == {3, 4, 5, 30}
    recommend_file(RECOMMENDER, source, tmp_path / "p.parquet", 9, allowed=allowed, progress=False)
    assert [row["item_ids"] for row in answers(tmp_path / "p.parquet")[:1]] == [[30]]


def test_the_last_of_a_long_history_are_read(source, tmp_path, monkeypatch):
    monkeypatch.setattr(bulk, "MAX_HISTORY", 7)
    summary = recommend_file(RECOMMENDER, source, tmp_path / "o.parquet", 3, progress=False)
    assert summary.cut == 1
    expected = RECOMMENDER.recommend([list(range(23, 30))], 3).item_ids[0]
    assert answers(tmp_path / "o.parquet")[4]["item_ids"] == expected


def test_strict_leaves_nothing_behind(source, tmp_path):
    with pytest.raises(DataError, match=r"first in row 3: '99', 'None', '99', '77'.*--strict"):
        recommend_file(RECOMMENDER, source, tmp_path / "o.csv", strict=True, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_a_torn_source_leaves_nothing_behind(tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_text('{"user_id": 1, "item_ids": [3]}\n{"user_id": 2, "it')
    with pytest.raises(DataError, match="line 2"):
        recommend_file(RECOMMENDER, HistoryFile(path), tmp_path / "o.parquet", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["h.jsonl"]


def test_nothing_is_overwritten_unasked(source, tmp_path):
    target = tmp_path / "o.parquet"
    target.write_text("precious")
    with pytest.raises(ConfigError, match="exists, and nothing is overwritten unasked"):
        recommend_file(RECOMMENDER, source, target, progress=False)
    assert target.read_text() == "precious"
    recommend_file(RECOMMENDER, source, target, overwrite=True, progress=False)
    assert len(answers(target)) == len(ROWS)
    with pytest.raises(ConfigError, match="is the file of --histories"):
        recommend_file(RECOMMENDER, source, source.path, overwrite=True, progress=False)


def test_targets_that_cannot_be(source, tmp_path):
    for name, said in (
        ("o.txt", "ends in '.txt'; expected"), ("no/o.csv", "there is no folder"),
        ("o.csv", "is a folder that exists"),
    ):  # fmt: skip
        if name == "o.csv":
            (tmp_path / name).mkdir()
        with pytest.raises(ConfigError, match=said):
            recommend_file(RECOMMENDER, source, tmp_path / name, progress=False)
    barred = make(["x|y", "z"])
    with pytest.raises(ConfigError, match=r"1 items have it in their id: 'x\|y'. Write .parquet"):
        recommend_file(barred, source, tmp_path / "b.csv", progress=False)


@pytest.mark.parametrize(
    ("ids", "column", "expected"),
    [
        ([5, -3, 2**62], [2**62, 4, None, -3, 5], [3, 0, 0, 2, 1]),
        ([5, -3], ["5", "05", "-3", None, "x"], [1, 0, 2, 0, 0]),
        (["5", "x"], [5, 6, None], [1, 0, 0]),
        (["5", "x"], ["x", "5", "", None], [2, 1, 0, 0]),
    ],
)
def test_raw_ids_of_any_type(ids, column, expected):
    raw = RawIds([None, *ids])
    assert raw.indices(pa.array(column)).tolist() == expected
    assert raw.indices(pa.array(column)[:0]).tolist() == []
