"""The catalogue keeps ids, titles and categories through a save and a load."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotrain.data.catalog import Catalog
from cotrain.errors import DataError

# Surrogates cannot be encoded as UTF-8, and no table can hold them.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
IDS = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, unique=True),
    st.lists(TEXT, min_size=1, unique=True),
)


@given(ids=IDS, data=st.data())
def test_save_and_load_keep_everything(tmp_path_factory, ids, data):
    same_length = st.lists(TEXT, min_size=len(ids), max_size=len(ids))
    saved = Catalog([None, *ids], ["", *data.draw(same_length)], ["", *data.draw(same_length)])
    folder = tmp_path_factory.mktemp("catalog")
    saved.save(folder)
    assert Catalog.load(folder) == saved


def test_length_counts_padding_and_titles_are_by_index():
    catalog = Catalog([None, "x", "y"], ["", "Ex", "Why"], ["", "a|b", ""])
    assert len(catalog) == 3
    assert catalog.title(2) == "Why"


@pytest.mark.parametrize("index", [-1, 0, 2])
def test_title_of_padding_or_beyond_is_an_error(index):
    with pytest.raises(IndexError, match=r"outside 1\.\.1"):
        Catalog([None, 7], ["", "t"], ["", ""]).title(index)


def test_empty_catalog_survives(tmp_path):
    empty = Catalog([None], [""], [""])
    empty.save(tmp_path)
    assert Catalog.load(tmp_path) == empty


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(DataError, match="There is no catalogue"):
        Catalog.load(tmp_path)
    (tmp_path / "items.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        Catalog.load(tmp_path)
    pl.DataFrame({"item_id": [1], "title": ["t"]}).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(DataError, match="is not a saved catalogue"):
        Catalog.load(tmp_path)
