"""Filters keep what they should: the k-core against a loop, the rest by hand; all is counted."""

from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotrain.data import filters
from cotrain.data.cleaning import Events
from cotrain.data.filters import Filters, consecutive_repeats, k_core
from cotrain.data.ledger import Ledger
from cotrain.errors import DataError

PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60)


def naive_core(pairs: list[tuple[int, int]], min_user: int, min_item: int) -> list[int]:
    """Takes away one interaction at a time, as long as anything is wrong."""
    kept = list(range(len(pairs)))
    while True:
        users = Counter(pairs[index][0] for index in kept)
        items = Counter(pairs[index][1] for index in kept)
        for index in kept:
            user, item = pairs[index]
            if users[user] < min_user or items[item] < min_item:
                kept.remove(index)
                break
        else:
            return kept


def arrays(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(pairs, dtype=np.uint32).reshape(-1, 2)
    return table[:, 0], table[:, 1]


@settings(max_examples=200, deadline=None)
@given(pairs=PAIRS, min_user=st.integers(1, 5), min_item=st.integers(1, 5))
def test_k_core_equals_the_naive_loop(pairs, min_user, min_item):
    keep, rounds = k_core(*arrays(pairs), min_user, min_item)
    assert np.flatnonzero(keep).tolist() == naive_core(pairs, min_user, min_item)
    assert 1 <= rounds <= len(pairs) + 1


@settings(max_examples=100, deadline=None)
@given(pairs=PAIRS, minimum=st.integers(1, 5))
def test_k_core_is_stable_and_the_largest(pairs, minimum):
    users, items = arrays(pairs)
    keep, _ = k_core(users, items, minimum, minimum)
    again, rounds = k_core(users[keep], items[keep], minimum, minimum)
    assert again.all()
    assert rounds == 1
    smaller, _ = k_core(users, items, minimum + 1, minimum)
    assert not (smaller & ~keep).any()


def test_a_chain_falls_one_link_a_round():
    # User n holds items n and n + 1; the only item with one holder pulls down the rest.
    pairs = [(n, n + step) for n in range(10) for step in (0, 1)]
    keep, rounds = k_core(*arrays(pairs), 2, 2)
    assert not keep.any()
    assert rounds > 3


# ---- apply --------------------------------------------------------------------------------------


def run(
    pairs: list[tuple[int, int]], ratings: list | None = None, **options
) -> tuple[list[tuple[int, int]], Ledger]:
    """What stays of pairs that are in order, and the ledger."""
    table = pl.DataFrame(
        pairs, schema={"user": pl.UInt32, "item": pl.UInt32}, orient="row"
    ).with_columns(timestamp=pl.int_range(len(pairs)))
    if ratings is not None:
        table = table.with_columns(rating=pl.Series(ratings, dtype=pl.Float32))
    count = max((max(pair) for pair in pairs), default=0) + 1
    ids = pl.Series([f"id{number}" for number in range(count)])
    ledger = Ledger()
    ledger.read("read", len(pairs))
    kept = filters.apply(Events(ids, ids, table), Filters(**options), ledger)
    assert ledger.left == kept.height
    assert kept["timestamp"].is_sorted()
    return kept.select("user", "item").rows(), ledger


A, B, C = (0, 0), (0, 1), (0, 2)
PAIR_LIST = [A, A, B, A, B, C, (1, 0), (1, 1)]


def test_by_default_everything_stays_and_repeats_are_remarked_on():
    kept, ledger = run(PAIR_LIST)
    assert kept == PAIR_LIST
    assert len(ledger.steps) == 1
    assert (
        "3 interactions repeat an earlier one of the same user and item, 1 of them directly"
        in (ledger.notes[0])
    )


@pytest.mark.parametrize(
    ("options", "expected", "dropped"),
    [
        ({"duplicates": "first"}, [A, B, C, (1, 0), (1, 1)], 3),
        ({"duplicates": "last"}, [A, B, C, (1, 0), (1, 1)], 3),
        ({"drop_repeats": True}, [A, B, A, B, C, (1, 0), (1, 1)], 1),
        ({"max_user_interactions": 5}, [(1, 0), (1, 1)], 6),
        ({"max_user_interactions": 6}, PAIR_LIST, 0),
        ({"min_user_interactions": 3}, [A, A, B, A, B, C], 2),
        ({"min_item_interactions": 2}, [A, A, B, A, B, (1, 0), (1, 1)], 1),
    ],
)
def test_each_filter(options, expected, dropped):
    kept, ledger = run(PAIR_LIST, **options)
    assert kept == expected
    assert ledger.steps[-1].dropped == dropped


def test_first_and_last_keep_different_places():
    rows = [A, B, A]
    assert run(rows, duplicates="first")[0] == [A, B]
    assert run(rows, duplicates="last")[0] == [B, A]


@settings(max_examples=100, deadline=None)
@given(pairs=PAIRS.filter(bool), policy=st.sampled_from(["first", "last"]))
def test_duplicates_equal_the_naive_loop(pairs, policy):
    pairs = sorted(pairs, key=lambda pair: pair[0])
    last = {pair: index for index, pair in enumerate(pairs)}
    first = {pair: index for index, pair in reversed(list(enumerate(pairs)))}
    chosen = sorted((first if policy == "first" else last).values())
    assert run(pairs, duplicates=policy)[0] == [pairs[index] for index in chosen]


def test_ratings():
    kept, ledger = run([A, B, C], [4, None, 3], min_rating=4)
    assert kept == [A]
    assert [(step.text, step.dropped) for step in ledger.steps[1:]] == [
        ("no rating, and --min-rating is given", 1),
        ("rating below 4", 1),
    ]
    with pytest.raises(DataError, match="the source has no ratings"):
        run([A, B], min_rating=1)


def test_repeats_that_arise_when_an_item_goes_are_dropped_too():
    # The item between the two visits is rare; without it they are one, and the user is too short.
    pairs = [(0, 0), (0, 2), (0, 0), (1, 0), (1, 1), (1, 0), (2, 1), (2, 0), (2, 1)]
    kept, ledger = run(pairs, drop_repeats=True, min_user_interactions=2, min_item_interactions=2)
    assert kept == pairs[3:]
    assert not consecutive_repeats(*arrays(kept)).any()
    assert any(step.text == "the same item twice in a row, after that" for step in ledger.steps)


def test_a_user_with_a_million_events_is_named_and_can_be_dropped(monkeypatch):
    pairs = [(0, 0)] * 1_000_000 + [(1, 0), (1, 1)]
    kept, ledger = run(pairs)
    assert len(kept) == len(pairs)
    assert "WARNING: 1 user with more than 50,000 events, together 100.0%" in ledger.notes[-1]
    assert "user 'id0': 1,000,000 events" in ledger.notes[-1]
    kept, ledger = run(pairs, max_user_interactions=50_000)
    assert kept == [(1, 0), (1, 1)]
    assert ledger.steps[-1].examples == ["user 'id0': 1,000,000 events"]


def test_nothing_left_is_an_error_that_shows_the_steps():
    with pytest.raises(DataError, match=r"(?s)No interaction is left.*fewer than 9 events.*8"):
        run(PAIR_LIST, min_user_interactions=9)
