"""Stores on disk: read by part, matched with the data, and the guard against held-out items."""

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors import safe_open

from cotrain.config import DataConfig
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.errors import DataError
from cotrain.rationale import store
from cotrain.rationale.records import Rationale
from cotrain.rationale.store import MatchedRationales, RationaleStore


def positions(data: InteractionData) -> list[tuple[int, int]]:
    """Every user and cut that may have a rationale."""
    ends = data.held_out.train_end - data.offsets[:-1]
    return [(user, cut) for user in range(data.num_users) for cut in range(1, ends[user])]


@pytest.fixture
def some(small_data: InteractionData, make_rationale) -> list[Rationale]:
    """Twelve, in no order."""
    places = positions(small_data)
    chosen = np.random.default_rng(1).choice(len(places), 12, replace=False)
    return [make_rationale(small_data, *places[row]) for row in chosen]


def open_and_match(folder: Path, data: InteractionData) -> MatchedRationales:
    return RationaleStore.open(folder).match(data)


# ---- on disk ------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_written(make_store, some):
    vectors = np.random.default_rng(2).normal(size=(12, 5)).astype(np.float32)
    found = RationaleStore.open(make_store(some, vectors, encoder="mine"))
    assert (len(found), found.dimension, found.encoder) == (12, 5, "mine")
    rows = np.array([7, 0, 11, 7])
    assert found.vectors(rows).equal(torch.from_numpy(vectors[rows]))
    assert found.texts(rows) == [some[row] for row in rows]
    assert found.vectors(rows[:0]).shape == (0, 5)
    assert found.texts(rows[:0]) == []


def test_half_precision_is_read_as_single(tmp_path, make_store, some):
    folder = make_store(some)
    vectors = np.random.default_rng(3).normal(size=(12, 4)).astype(np.float16)
    header = store.header_bytes(12, 4, "F16", {"format": store.FORMAT, "encoder": "half"})
    (folder / store.VECTORS).write_bytes(header + vectors.tobytes())
    found = RationaleStore.open(folder).vectors(np.arange(12))
    assert found.dtype == torch.float32
    assert found.equal(torch.from_numpy(vectors).float())


@pytest.mark.parametrize("name", ["F16", "F32"])
def test_the_file_is_one_that_safetensors_reads(tmp_path, name):
    vectors = np.arange(15).reshape(3, 5).astype(store.DTYPES[name])
    facts = {"encoder": "é „quoted“", "empty": ""}
    header = store.header_bytes(3, 5, name, facts)
    assert len(header) % 8 == 0
    path = tmp_path / "vectors.safetensors"
    path.write_bytes(header + vectors.tobytes())
    with safe_open(path, "numpy") as file:
        assert file.metadata() == facts
        np.testing.assert_array_equal(file.get_tensor("vectors"), vectors)
    assert store.read_header(path) == store.Header(
        np.dtype(store.DTYPES[name]), (3, 5), len(header), facts
    )


@pytest.mark.parametrize("rows", [[-1], [12], [0, -1]])
def test_no_row_is_taken_for_another(make_store, some, rows):
    """-1 stands for no rationale; numpy would take the last one."""
    found = RationaleStore.open(make_store(some))
    with pytest.raises(IndexError, match="store of 12"):
        found.vectors(np.array(rows))


def test_opening_reads_neither_vectors_nor_rows(make_store, some):
    folder = make_store(some)
    (folder / store.ROWS).write_bytes(b"not a table")
    found = RationaleStore.open(folder)
    assert found.vectors(np.array([1])).shape == (1, 8)
    with pytest.raises(DataError, match="cannot be read as the rows of a store"):
        found.texts(np.array([1]))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / store.VECTORS).unlink(), "No such file"),
        (lambda f: (f / store.VECTORS).write_bytes(b""), "no safetensors file"),
        (lambda f: (f / store.VECTORS).write_bytes(b"\x02" + 7 * b"\0" + b"{}"), "vectors"),
        (lambda f: (f / store.VECTORS).write_bytes((f / store.VECTORS).read_bytes()[:-1]), "take"),
        (lambda f: (f / store.VECTORS).write_bytes((f / store.VECTORS).read_bytes() + b"0"), "tak"),
        (lambda f: (f / store.ROWS).unlink(), "has no rows.parquet"),
    ],
)
def test_what_is_no_whole_store_is_refused(make_store, some, damage, said):
    folder = make_store(some)
    damage(folder)
    with pytest.raises(DataError, match=said):
        RationaleStore.open(folder)


def test_a_store_of_another_format_is_refused(make_store, some):
    with pytest.raises(DataError, match=r"format '0'.* reads '1'"):
        RationaleStore.open(make_store(some, format="0"))


def test_tables_of_other_lengths_are_refused(make_store, some, small_data):
    folder = make_store(some)
    table = pl.read_parquet(folder / store.ROWS)
    table.head(10).write_parquet(folder / store.ROWS)
    with pytest.raises(DataError, match="12 vectors and 10 rows"):
        open_and_match(folder, small_data)
    with pytest.raises(DataError, match="1 of 2 rows"):
        RationaleStore.open(folder).texts(np.array([0, 11]))


# ---- matching -----------------------------------------------------------------------------------


def test_places_lead_to_the_rows_that_explain_them(make_store, some, small_data):
    matched = open_and_match(make_store(some), small_data)
    assert (np.diff(matched.places) > 0).all()
    expected = {
        small_data.offsets[small_data.user_ids.index(r.user_id)] + r.cut: row
        for row, r in enumerate(some)
    }
    everything = np.arange(len(small_data.items))
    found = matched.find(everything)
    assert {place: row for place, row in enumerate(found) if row >= 0} == expected
    for place, row in expected.items():
        assert small_data.catalog.item_ids[small_data.items[place]] == some[row].item_id
    # In any order, more than once, or none, and beyond either end.
    places = np.array([[max(expected), -1, min(expected)], [10**9, max(expected), 0]])
    assert matched.find(places).tolist() == [
        [expected[max(expected)], -1, expected[min(expected)]],
        [-1, expected[max(expected)], -1],
    ]
    assert matched.find(places[:0]).shape == (0, 3)


def test_every_training_position_may_have_one_and_nothing_else(
    make_store, make_rationale, small_data
):
    """The leak guard, over every interaction of these data."""
    allowed = positions(small_data)
    clean = [make_rationale(small_data, *position) for position in allowed]
    matched = open_and_match(make_store(clean), small_data)
    held_out = {
        small_data.offsets[user] + len(small_data.history(user)) - back
        for user in range(small_data.num_users)
        for back in (1, 2)
    }
    assert not held_out & set(matched.places.tolist())
    firsts = small_data.offsets[:-1]
    assert len(matched.places) == len(small_data.items) - len(held_out) - len(firsts)
    wrong = [
        make_rationale(small_data, user, cut)
        for user in range(small_data.num_users)
        for cut in (0, *range(len(small_data.history(user)) - 2, len(small_data.history(user))))
    ]
    with pytest.raises(DataError) as caught:
        open_and_match(make_store([*clean, *wrong], name="leaking"), small_data)
    said = str(caught.value)
    assert f"{len(wrong)} of {len(clean) + len(wrong):,} are refused" in said
    assert f"{2 * small_data.num_users} of interactions that are held out" in said
    assert f"{small_data.num_users} with a cut outside" in said
    for number, leak in enumerate(wrong):
        with pytest.raises(DataError, match="1 of 3 are refused"):
            open_and_match(make_store([*clean[:2], leak], name=f"leak {number}"), small_data)


def test_rationales_of_another_split_are_refused(
    make_store, make_rationale, small_data, small_tables
):
    """What one split trains on is what another is tested on."""
    interactions, items = map(str, small_tables)
    by_time = load_interactions(
        DataConfig(interactions=interactions, items=items, split="time", unseen_items="keep")
    )
    of_one = [make_rationale(small_data, *position) for position in positions(small_data)]
    of_other = [make_rationale(by_time, *position) for position in positions(by_time)]
    open_and_match(make_store(of_other, name="other"), by_time)
    with pytest.raises(DataError, match="held out for validation or test"):
        open_and_match(make_store(of_one, name="one"), by_time)


def test_rationales_of_another_order_are_refused(make_store, some, small_data):
    items = small_data.items.copy()
    user = small_data.user_ids.index(some[0].user_id)
    start, cut = int(small_data.offsets[user]), some[0].cut
    swapped = dataclasses.replace(small_data, items=items)
    assert cut >= 2
    items[[start, start + 1]] = items[[start + 1, start]]
    touched = sum(r.user_id == some[0].user_id for r in some)
    with pytest.raises(DataError, match=f"{touched} with another history before them"):
        open_and_match(make_store(some), swapped)


def test_rationales_of_another_filter_are_refused(make_store, some, small_data):
    """One item less in one history: what comes after it stands at other cuts."""
    user = small_data.user_ids.index(some[0].user_id)
    offsets = small_data.offsets.copy()
    offsets[user + 1 :] -= 1
    items = np.delete(small_data.items, small_data.offsets[user])
    fewer = dataclasses.replace(small_data, items=items, offsets=offsets)
    with pytest.raises(DataError, match=r"of another item than the data have|held out"):
        open_and_match(make_store(some), fewer)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"user_id": 10**9}, "1 of users that the data lack: user 1000000000, cut"),
        ({"item_id": 10**9}, "1 of another item than the data have"),
        ({"cut": 10**6}, "1 with a cut outside of their user's history"),
        ({"cut": -1}, "1 with a cut outside of their user's history"),
        ({"history_hash": 32 * "0"}, "1 with another history before them"),
        ({"history_hash": ""}, "1 with another history before them"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(make_store, some, small_data, changes, said):
    some[4] = dataclasses.replace(some[4], **changes)
    with pytest.raises(DataError, match=said) as caught:
        open_and_match(make_store(some, data="other"), small_data)
    assert "1 of 12 are refused" in str(caught.value)
    assert "written for ('other')" in str(caught.value)


def test_all_reasons_are_named_with_five_examples_each(make_store, some, small_data):
    for row in range(7):
        some[row] = dataclasses.replace(some[row], user_id=10**9 + row)
    some[7] = dataclasses.replace(some[7], cut=0)
    with pytest.raises(DataError) as caught:
        open_and_match(make_store(some), small_data)
    said = str(caught.value)
    assert "8 of 12 are refused" in said
    assert "7 of users that the data lack" in said
    assert said.count("user 10000000") == 5
    assert "1 with a cut outside" in said


def test_two_for_one_position_are_refused(make_store, some, small_data):
    twice = [*some, dataclasses.replace(some[3], rationale="Another reason.")]
    with pytest.raises(DataError, match="1 of an interaction that has one already"):
        open_and_match(make_store(twice), small_data)


@pytest.mark.parametrize("name", ["user_id", "item_id"])
def test_ids_of_another_type_are_refused(make_store, some, small_data, name):
    """ "1" and 1 would meet by accident only."""
    as_text = [dataclasses.replace(r, **{name: str(getattr(r, name))}) for r in some]
    said = f"have text as {name[:4]} ids, such as '{getattr(some[0], name)}'.*have integers"
    with pytest.raises(DataError, match=said):
        open_and_match(make_store(as_text), small_data)


def test_ids_that_are_text_match(make_store, make_rationale, small_data):
    catalog = small_data.catalog
    as_text = dataclasses.replace(
        small_data,
        user_ids=[f"user {user}" for user in small_data.user_ids],
        catalog=dataclasses.replace(
            catalog, item_ids=[None, *(f"item {item}" for item in catalog.item_ids[1:])]
        ),
    )
    rationales = [make_rationale(as_text, *position) for position in positions(as_text)[::50]]
    assert len(open_and_match(make_store(rationales), as_text).places) == len(rationales)
    with pytest.raises(DataError, match="have text as user ids"):
        open_and_match(make_store(rationales, name="again"), small_data)
