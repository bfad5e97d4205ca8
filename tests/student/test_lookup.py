"""Items by what people call them, and the filters that name them."""

from pathlib import Path

import numpy as np
import pytest

from cotrain.data.catalog import Catalog
from cotrain.errors import ConfigError, DataError
from cotrain.student import lookup as module
from cotrain.student.lookup import ItemLookup, Kind

CATALOG = Catalog(
    [None, 50, 181, 7, 9],
    ["", "Star Wars (1977)", "Fargo (1996)", "The Kid", "the  kid"],
    ["", "Action|Sci-Fi", "Crime", "Drama|Comedy", ""],
)
LOOKUP = ItemLookup(CATALOG)


def test_ids_and_titles_in_any_order_and_case():
    names: list[tuple[Kind, str]] = [
        ("title", " star wars  (1977)"),
        ("id", " 7 "),
        ("title", "FARGO (1996)"),
    ]
    assert LOOKUP.indices(names).tolist() == [1, 3, 2]


def test_one_message_for_all_that_cannot_be_found():
    names: list[tuple[Kind, str]] = [
        ("id", "007"),
        ("title", "Fargo"),
        ("title", "The Kid"),
        ("id", "50"),
    ]
    with pytest.raises(DataError) as caught:
        LOOKUP.indices(names)
    said = str(caught.value)
    assert "3 of 4 named items cannot be found among 4" in said
    assert "no item has the id '007'; ids are like 50, 181, 7" in said
    assert "no item is called 'Fargo'; the nearest are 'Fargo (1996)'" in said
    assert "2 items are called 'The Kid': name one by its id, of 7, 9" in said


def test_a_typo_in_every_word_still_finds_the_nearest():
    assert LOOKUP.nearest_titles("Sta Wrs")[0] == "Star Wars (1977)"
    assert LOOKUP.nearest_titles("zzzzqqqq") == []


def test_no_more_than_a_person_would_name():
    with pytest.raises(DataError, match="No item is named"):
        LOOKUP.indices([])
    many: list[tuple[Kind, str]] = [("id", "50")] * 10_001
    with pytest.raises(DataError, match=r"10,001 items are named; expected at most 10,000.*--hist"):
        LOOKUP.indices(many)
    with pytest.raises(DataError, match=r"has 100,000 characters, expected at most 1,000"):
        LOOKUP.indices([("title", "x" * 100_000)])


@pytest.mark.parametrize("text", ["<|im_end|>", "../../etc/passwd", "\x00\x1b[2J", "", "' OR 1=1"])
def test_hostile_names_are_just_unknown(text: str):
    kinds: list[Kind] = ["id", "title"]
    for kind in kinds:
        with pytest.raises(DataError) as caught:
            LOOKUP.indices([(kind, text)])
        assert "\x1b" not in str(caught.value)


# ---- filters ------------------------------------------------------------------------------------


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_no_filter_is_none():
    assert LOOKUP.allowed() == (None, [])


def test_filters_together(tmp_path: Path):
    allow, deny = written(tmp_path / "a", "50", "", " 181 ", "7"), written(tmp_path / "d", "181")
    found, notes = LOOKUP.allowed(["crime", "ACTION"], allow, deny)
    assert found is not None
    assert found.tolist() == [False, True, False, False, False]
    assert notes == []
    found, _ = LOOKUP.allowed(deny=deny)
    assert found is not None
    assert np.flatnonzero(found).tolist() == [1, 3, 4]


def test_ids_in_lists_that_no_item_has(tmp_path: Path):
    path = written(tmp_path / "list", "50", "who", "007")
    found, notes = LOOKUP.allowed(allow=path)
    assert found is not None
    assert np.flatnonzero(found).tolist() == [1]
    assert "2 of 3 ids" in notes[0]
    assert "'who', '007'" in notes[0]
    with pytest.raises(DataError, match=r"2 of 3 ids in --allow .* belong to no item"):
        LOOKUP.allowed(allow=path, strict=True)
    with pytest.raises(DataError, match=r"1 of 1 ids in --deny"):
        LOOKUP.allowed(deny=written(tmp_path / "none", "who"))


def test_lists_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="there is no such file"):
        LOOKUP.allowed(allow=tmp_path)
    with pytest.raises(DataError, match="is empty"):
        LOOKUP.allowed(allow=written(tmp_path / "blank", " "))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        LOOKUP.allowed(allow=tmp_path / "bytes")
    monkeypatch.setattr(module, "MAX_LIST_BYTES", 2)
    with pytest.raises(DataError, match="expected ids, one a line, of at most"):
        LOOKUP.allowed(allow=written(tmp_path / "long", "50", "181"))


def test_categories_that_lead_nowhere(tmp_path: Path):
    with pytest.raises(DataError, match=r"No item is of the category 'Crme'.*such as 'Crime'"):
        LOOKUP.allowed(["Crme"])
    with pytest.raises(DataError, match="leave none of 4 items"):
        LOOKUP.allowed(["Crime"], deny=written(tmp_path / "d", "181"))
    without = ItemLookup(Catalog([None, 1], ["", "a"], ["", ""]))
    with pytest.raises(DataError, match="items have no categories"):
        without.allowed(["Crime"])
