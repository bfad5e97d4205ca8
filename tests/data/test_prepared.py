"""Prepared sets are found by name or path, believed only when whole, and written at once or not."""

import json
from pathlib import Path

import polars as pl
import pytest

from cotrain.config import DataConfig
from cotrain.data import prepared
from cotrain.data.interactions import load_interactions
from cotrain.errors import AssetError, DataError

INTERACTIONS = pl.DataFrame(
    {
        "user_id": [1, 1, 1, 2, 2, 2],
        "item_id": ["a", "b", "c", "c", "b", "a"],
        "position": pl.Series([0, 1, 2, 0, 1, 2], dtype=pl.Int32),
        # The order is the position's, whatever the time says.
        "timestamp": [3, 2, 1, None, None, 0],
    }
)
ITEMS = pl.DataFrame(
    {"item_id": ["a", "b", "c"], "title": ["A", None, "C"], "categories": ["x|y", None, None]}
)
RECORD = {
    "name": "mine",
    "source": "tables",
    "inputs": [{"file": "t.csv", "sha256": "0"}],
    "steps": [
        {"step": "t.csv: rows read", "dropped": 0, "left": 7},
        {"step": "negative timestamp", "dropped": 1, "left": 6},
    ],
    "notes": ["One thing."],
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COTRAIN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def write(folder: Path) -> Path:
    prepared.write(folder, INTERACTIONS, ITEMS, RECORD)
    return folder


# ---- finding ------------------------------------------------------------------------------------


def test_a_set_is_found_by_name_and_by_path(home, tmp_path, monkeypatch):
    write(prepared.root() / "mine")
    write(tmp_path / "elsewhere" / "set")
    monkeypatch.chdir(tmp_path)
    for name in ("mine", str(tmp_path / "elsewhere" / "set"), "./elsewhere/set"):
        data = load_interactions(DataConfig(name=name))
        assert data.name == "mine"
        assert data.user_ids == [1, 2]
        assert data.items.tolist() == [1, 2, 3, 3, 2, 1]
        assert data.catalog.titles == ["", "A", "b", "C"]
        assert data.catalog.categories == ["", "x|y", "", ""]


def test_what_the_preparation_dropped_goes_into_the_notes_of_a_run():
    write(prepared.root() / "mine")
    assert load_interactions(DataConfig(name="mine")).notes[:4] == [
        "Prepared from t.csv (tables).",
        "Preparation: t.csv: rows read: 7 left.",
        "Preparation: negative timestamp: 1 dropped, 6 left.",
        "Preparation: One thing.",
    ]


def test_an_unknown_name_lists_assets_and_prepared_sets():
    with pytest.raises(AssetError, match=r"'nothing'.*'ml-100k'.*prepared in .*: none"):
        prepared.find("nothing")
    write(prepared.root() / "mine")
    with pytest.raises(AssetError, match=r"Did you mean 'mine'\?.*prepared in .*: 'mine'"):
        prepared.find("mint")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("ml-1m", r"prepare_data\.py movielens --input ml-1m\.zip --name ml-1m --min-user"),
        ("amazon-beauty", r"prepare_data\.py amazon --input reviews_Beauty_5\.json\.gz --items"),
    ],
)
def test_the_sets_of_the_recipes_say_what_makes_them(name, command):
    with pytest.raises(AssetError, match=rf"(?s)'{name}' is not prepared yet.*{command}"):
        load_interactions(DataConfig(name=name))


@pytest.mark.parametrize("what", ["no folder", "no record", "torn", "bytes", "format", "gone"])
def test_a_folder_that_is_no_whole_set(what, tmp_path):
    folder = tmp_path / "set"
    if what != "no folder":
        write(folder)
    record = folder / prepared.MANIFEST
    if what == "no record":
        record.unlink()
    elif what == "torn":
        record.write_text(record.read_text()[:50])
    elif what == "bytes":
        path = folder / prepared.INTERACTIONS
        path.write_bytes(path.read_bytes()[:-1])
    elif what == "format":
        record.write_text(json.dumps({**json.loads(record.read_text()), "format": 99}))
    elif what == "gone":
        (folder / prepared.ITEMS).unlink()
    with pytest.raises(DataError, match=r"prepare_data.py"):
        prepared.find(str(folder))


# ---- writing ------------------------------------------------------------------------------------


def test_the_same_content_gives_the_same_bytes(tmp_path):
    one, two = write(tmp_path / "a"), write(tmp_path / "b")
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


def test_a_set_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    folder = write(tmp_path / "in" / "set")
    before = pl.scan_parquet(folder / prepared.INTERACTIONS)
    prepared.write(folder, INTERACTIONS.head(3), ITEMS, RECORD)
    assert pl.read_parquet(folder / prepared.INTERACTIONS).height == 3
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["set"]
    del before


def test_a_failure_while_writing_leaves_the_old_set(tmp_path, monkeypatch):
    folder = write(tmp_path / "in" / "set")
    old = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared, "sha256", full)
    with pytest.raises(DataError, match="No space left on device"):
        prepared.write(folder, INTERACTIONS.head(3), ITEMS, RECORD)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["set"]


def test_names_and_folders_that_a_set_cannot_have(tmp_path):
    for name in ("", "a/b", ".hidden", "~x", " a", "a\n"):
        with pytest.raises(DataError, match="cannot be the name of a set"):
            prepared.check_free(name, tmp_path / "new", overwrite=True)
    with pytest.raises(DataError, match="is the name of an asset"):
        prepared.check_free("ml-100k", tmp_path / "new", overwrite=True)
    folder = write(tmp_path / "set")
    with pytest.raises(DataError, match=r"holds a prepared set already. Give --overwrite"):
        prepared.check_free("a", folder, overwrite=False)
    prepared.check_free("a", folder, overwrite=True)
    (tmp_path / "other").mkdir()
    prepared.check_free("a", tmp_path / "other", overwrite=False)
    (tmp_path / "other" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for path in ("other", "file"):
        with pytest.raises(DataError, match="nothing of it is touched"):
            prepared.check_free("a", tmp_path / path, overwrite=True)
