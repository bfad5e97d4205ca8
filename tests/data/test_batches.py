"""Every row of a batch follows from (seed, epoch, user), and holds training items only."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotrain.data.batches import (
    EpochSampler,
    SequenceBatch,
    SequenceDataset,
    collate,
    left_pad,
    make_loader,
)
from cotrain.data.catalog import Catalog
from cotrain.data.interactions import InteractionData


def interactions(*histories: list[int]) -> InteractionData:
    size = 1 + max(max(history) for history in histories)
    return InteractionData(
        name="small",
        user_ids=list(range(len(histories))),
        offsets=np.cumsum([0, *map(len, histories)]),
        items=np.array(list(itertools.chain(*histories)), dtype=np.int64),
        catalog=Catalog([None, *range(1, size)], [""] * size, [""] * size),
        notes=[],
    )


@pytest.fixture(scope="module")
def places(ml100k) -> InteractionData:
    """ML-100K with every interaction under an id of its own, 1 + its place, so that a leak shows
    even where a user met an item twice."""
    count = ml100k.num_interactions
    names = [""] * (count + 1)
    return replace(
        ml100k, items=np.arange(1, count + 1), catalog=Catalog([None] * (count + 1), names, names)
    )


def epoch_of(
    data, epoch=0, max_length=50, batch_size=64, seed=0, step=0, windows: Any = "last", **share
) -> list[SequenceBatch]:
    dataset = SequenceDataset(data, max_length, seed, windows)
    sampler = EpochSampler(dataset.users, batch_size, seed, **share)
    sampler.start_at(epoch, step)
    return list(make_loader(dataset, sampler))


def unpacked(values: torch.Tensor, batch: SequenceBatch) -> list[list[int]]:
    """(N,) values as a list for each row."""
    starts, lengths = batch.sequences.starts.tolist(), batch.sequences.lengths.tolist()
    return [
        values[start : start + length].tolist()
        for start, length in zip(starts, lengths, strict=True)
    ]


def rows_by_user(batches) -> dict[int, dict]:
    """Each user's row; the cut counted from the row's first item."""
    rows = {}
    for batch in batches:
        items = unpacked(batch.sequences.item_ids, batch)
        targets = unpacked(batch.target_ids, batch)
        cuts = (batch.cut - batch.sequences.starts).tolist()
        for row, user in enumerate(batch.user_index.tolist()):
            rows[user] = {
                "items": items[row],
                "targets": targets[row],
                "cut": cuts[row],
                "history": batch.history[row][batch.history[row] != 0].tolist(),
            }
    return rows


def tensors_of(batch: SequenceBatch) -> dict[str, torch.Tensor]:
    packed = batch.sequences
    slots = {f"slots {at}": group.slots for at, group in enumerate(packed.groups)}
    return {
        "user_index": batch.user_index, "target_ids": batch.target_ids, "cut": batch.cut,
        "history": batch.history, "item_ids": packed.item_ids, "positions": packed.positions,
        "starts": packed.starts, "lengths": packed.lengths,
        **{name: tensor for name, tensor in slots.items() if tensor is not None},
    }  # fmt: skip


# ---- one row ------------------------------------------------------------------------------------


def test_small_batch_by_hand():
    data = interactions([1, 2, 3, 4, 5, 6], [7, 8, 9, 1], [2, 3, 4], [5, 6, 7, 8, 9, 1, 2, 3])
    dataset = SequenceDataset(data, max_length=3, seed=0)
    # The third user has one training item, with nothing after it.
    assert dataset.users.tolist() == [0, 1, 3]
    assert len(dataset) == 3
    batch = collate([dataset[user, 0] for user in (0, 1, 3)])
    assert batch.user_index.tolist() == [0, 1, 3]
    # Training items: 1 2 3 4; 7 8; 5 6 7 8 9 1. The last max_length + 1 of them make a row.
    # Packed shortest first; `starts` says where each row is.
    assert batch.sequences.item_ids.tolist() == [7, 1, 2, 3, 7, 8, 9]
    assert batch.target_ids.tolist() == [8, 2, 3, 4, 8, 9, 1]
    assert batch.sequences.starts.tolist() == [1, 0, 4]
    assert batch.cut[1] == 0
    assert batch.cut_target[1] == 8
    assert {tensor.dtype for tensor in tensors_of(batch).values()} == {torch.int64}


def test_only_the_history_is_padded_on_the_left_to_the_longest_and_no_further(ml100k):
    for batch in epoch_of(ml100k, max_length=200, batch_size=7):
        real = batch.history != 0
        # Once real, real to the end.
        assert (real[:, 1:] >= real[:, :-1]).all()
        assert real[:, -1].all()
        assert real[:, 0].any()
        # Nothing is computed at padding, for there is none.
        assert (batch.sequences.item_ids > 0).all()
        assert (batch.target_ids > 0).all()
        lengths = [min(200, len(ml100k.train_history(user)) - 1) for user in batch.user_index]
        assert batch.sequences.lengths.tolist() == lengths
        assert len(batch.target_ids) == len(batch.sequences.item_ids) == sum(lengths)


@pytest.mark.parametrize("windows", ["last", "random"])
def test_target_is_the_next_item(ml100k, windows):
    for row in rows_by_user(epoch_of(ml100k, windows=windows)).values():
        assert row["targets"][:-1] == row["items"][1:]


def test_every_row_is_the_end_of_the_training_items(ml100k):
    for user, row in rows_by_user(epoch_of(ml100k, max_length=30)).items():
        items = ml100k.train_history(user).tolist()[-31:]
        assert row["items"] == items[:-1]
        assert row["targets"] == items[1:]


@pytest.mark.parametrize("windows", ["last", "random"])
@pytest.mark.parametrize("max_length", [1, 5, 1000])
def test_history_is_everything_up_to_the_cut(ml100k, max_length, windows):
    """Also what is older than the row, because none of it may be retrieved again."""
    for batch in epoch_of(ml100k, max_length=max_length, windows=windows):
        # The cut lies within its row, and the history ends with the item there.
        starts, lengths = batch.sequences.starts, batch.sequences.lengths
        assert ((batch.cut >= starts) & (batch.cut < starts + lengths)).all()
        assert torch.equal(batch.history[:, -1], batch.sequences.item_ids[batch.cut])
        assert torch.equal(batch.cut_target, batch.target_ids[batch.cut])
        for row, user in enumerate(batch.user_index.tolist()):
            history = batch.history[row][batch.history[row] != 0].tolist()
            items = ml100k.train_history(user).tolist()
            assert history == items[: len(history)]
            assert items[len(history)] == batch.cut_target[row]


def test_left_pad():
    padded = left_pad([np.array([1]), np.array([2, 3, 4]), np.array([], dtype=int)])
    assert padded.tolist() == [[0, 0, 1], [2, 3, 4], [0, 0, 0]]


def test_to_device_moves_every_tensor(ml100k):
    batch = epoch_of(ml100k)[0].to(torch.device("meta"))
    assert {tensor.device.type for tensor in tensors_of(batch).values()} == {"meta"}


# ---- what must never be in a row ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_length", "windows"), [(3, "last"), (3, "random"), (1000, "last"), (1000, "random")]
)
def test_no_validation_or_test_interaction_in_any_batch(places, ml100k, max_length, windows):
    ends = places.offsets[1:]
    held_out = np.concatenate([ends - 2, ends - 1]) + 1
    assert held_out.tolist() == [
        *map(places.validation_target, range(places.num_users)),
        *map(places.test_target, range(places.num_users)),
    ]
    seen = torch.zeros(places.num_interactions + 1, dtype=torch.bool)
    starts, held = torch.from_numpy(places.offsets[:-1]), torch.from_numpy(ends - 2)
    for epoch in range(2):
        for batch in epoch_of(places, epoch, max_length=max_length, windows=windows):
            first, end = starts[batch.user_index], held[batch.user_index]
            for values in (batch.sequences.item_ids, batch.target_ids, batch.history):
                seen[values.flatten()] = True
            # And nothing of another user.
            for values in (batch.sequences.item_ids, batch.target_ids):
                for row, mine in enumerate(unpacked(values - 1, batch)):
                    assert min(mine) >= first[row]
                    assert max(mine) < end[row]
            place = batch.history - 1
            inside = (place >= first[:, None]) & (place < end[:, None])
            assert (inside | (batch.history == 0)).all()
    assert not seen[held_out].any()
    if max_length == 1000:
        # Everything else is there, so that a leak would have shown.
        assert seen.sum() == 1 + places.num_interactions - len(held_out)
    # Ids do not change which places are drawn: the same rows are read under the real ids.
    by_place, by_item = (
        rows_by_user(epoch_of(data, 0, windows=windows)) for data in (places, ml100k)
    )
    for user, row in by_place.items():
        assert ml100k.items[np.array(row["items"]) - 1].tolist() == by_item[user]["items"]
        assert row["cut"] == by_item[user]["cut"]


# ---- cuts ---------------------------------------------------------------------------------------


def test_cut_depends_on_seed_epoch_and_user_only(ml100k):
    expected = rows_by_user(epoch_of(ml100k, epoch=3, batch_size=64))
    assert rows_by_user(epoch_of(ml100k, epoch=3, batch_size=5)) == expected
    shares = [epoch_of(ml100k, 3, batch_size=100, rank=r, world_size=3) for r in range(3)]
    assert rows_by_user(itertools.chain(*shares)) == expected
    dataset = SequenceDataset(ml100k, 50, seed=0)
    alone = {user: rows_by_user([collate([dataset[user, 3]])])[user] for user in (0, 7, 942)}
    assert alone == {user: expected[user] for user in alone}


def test_cut_differs_over_epochs_seeds_and_users(ml100k):
    def cuts(**where):
        rows = rows_by_user(epoch_of(ml100k, **where))
        return np.array([rows[user]["cut"] for user in range(ml100k.num_users)])

    first, second, other = cuts(epoch=0), cuts(epoch=1), cuts(epoch=0, seed=1)
    for left, right in [(first, second), (first, other), (second, other)]:
        # By chance a row keeps its cut in one of its number of positions, 1 / 50 for most.
        assert (left == right).mean() < 0.1


def test_cuts_are_uniform_over_the_positions():
    dataset = SequenceDataset(interactions([1, 2, 3, 4, 5, 6, 7]), max_length=10, seed=0)
    cuts = [dataset[0, epoch]["cut"] for epoch in range(4000)]
    assert set(cuts) == {0, 1, 2, 3}
    counts = np.array([cuts.count(cut) for cut in range(4)])
    # 1000 ± 27 (standard deviation of a share of 1/4 in 4000).
    assert (abs(counts - 1000) < 5 * 27).all()


# ---- windows ------------------------------------------------------------------------------------


def test_random_windows_are_any_stretch_of_a_long_history_and_all_of_it_in_time():
    # 20 training items under the ids 1 to 20; rows of 5 positions are 6 items: 15 windows.
    dataset = SequenceDataset(interactions(list(range(1, 23))), 5, seed=0, windows="random")
    starts, trained = [], set()
    for epoch in range(3000):
        row: dict[str, Any] = dataset[0, epoch]
        window = row["window"].tolist()
        assert window == list(range(window[0], window[0] + 6))
        assert 0 <= row["cut"] < 5
        assert row["history"].tolist() == list(range(1, window[row["cut"]] + 1))
        starts.append(window[0])
        trained |= {*itertools.pairwise(window)}
    assert trained == {(item, item + 1) for item in range(1, 20)}
    counts = np.bincount(starts, minlength=16)[1:]
    assert len(counts) == 15
    # 200 ± 13.7 each, from the first item on to the last one.
    assert (abs(counts - 200) < 5 * 13.7).all()
    # The cut does not follow from the window.
    cuts = np.array([dataset[0, epoch]["cut"] for epoch in range(3000)])
    assert abs(np.corrcoef(starts, cuts)[0, 1]) < 5 / np.sqrt(3000)


def test_a_history_that_fits_is_one_window_either_way(ml100k):
    # The longest has 735 training items.
    last, other = (
        rows_by_user(epoch_of(ml100k, max_length=734, windows=windows))
        for windows in ("last", "random")
    )
    for user, row in last.items():
        assert row["items"] == other[user]["items"] == ml100k.train_history(user)[:-1].tolist()


def test_random_windows_depend_on_seed_epoch_and_user_only(ml100k):
    expected = rows_by_user(epoch_of(ml100k, epoch=3, batch_size=64, windows="random"))
    assert rows_by_user(epoch_of(ml100k, epoch=3, batch_size=5, windows="random")) == expected
    assert rows_by_user(epoch_of(ml100k, epoch=4, windows="random")) != expected
    assert rows_by_user(epoch_of(ml100k, epoch=3, seed=1, windows="random")) != expected


# ---- epochs -------------------------------------------------------------------------------------


def keys(sampler: EpochSampler, epoch: int, step: int = 0) -> list[list[Any]]:
    sampler.start_at(epoch, step)
    batches: list[list[Any]] = list(sampler)
    assert len(sampler) == len(batches)
    return batches


def test_every_user_exactly_once_an_epoch_in_another_order(ml100k):
    orders = []
    for epoch in range(3):
        users = torch.cat([batch.user_index for batch in epoch_of(ml100k, epoch)]).tolist()
        assert sorted(users) == list(range(ml100k.num_users))
        orders.append(users)
    assert len({tuple(order) for order in orders}) == 3
    again = torch.cat([batch.user_index for batch in epoch_of(ml100k, 1)]).tolist()
    assert again == orders[1]
    other_seed = torch.cat([batch.user_index for batch in epoch_of(ml100k, 1, seed=9)]).tolist()
    assert other_seed != orders[1]


def test_loader_goes_on_in_the_middle_of_an_epoch(ml100k):
    whole, tail = epoch_of(ml100k, 2), epoch_of(ml100k, 2, step=11)
    assert len(tail) == len(whole) - 11
    for left, right in zip(whole[11:], tail, strict=True):
        ours, theirs = tensors_of(left), tensors_of(right)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours)


@settings(deadline=None)
@given(
    count=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 3),
    data=st.data(),
)
def test_processes_partition_every_global_batch(count, batch_size, world_size, epoch, data):
    users = np.arange(count) * 3
    whole = keys(EpochSampler(users, batch_size, seed=5), epoch)
    shares = []
    for rank in range(world_size):
        sampler = EpochSampler(users, batch_size, 5, rank, world_size)
        shares.append(keys(sampler, epoch))
        step = data.draw(st.integers(0, sampler.steps_per_epoch))
        assert keys(sampler, epoch, step) == shares[rank][step:]
    # All processes take the same number of steps: one more would wait for the others for ever.
    assert len({len(share) for share in shares}) == 1
    steps = len(shares[0])
    assert steps == len(whole)
    for step in range(steps):
        rows = [row for share in shares for row in share[step] if len(row) == 2]
        assert sorted(rows) == sorted(whole[step])
        assert {key[1] for key in rows} == {epoch}
        # Who has no row keeps up with one of another's, which is marked.
        for share in (share[step] for share in shares if len(share[step][0]) == 3):
            assert share == [(*whole[step][0], True)]
            assert len(whole[step]) < world_size


@pytest.mark.parametrize(
    ("count", "batch_size", "world_size", "steps"),
    [(10, 5, 1, 2), (11, 5, 1, 3), (11, 5, 2, 3), (12, 5, 2, 3), (4, 5, 1, 1), (943, 64, 2, 15)],
)
def test_steps_per_epoch_with_a_short_last_batch(count, batch_size, world_size, steps):
    sampler = EpochSampler(np.arange(count), batch_size, 0, 0, world_size)
    assert sampler.steps_per_epoch == len(list(sampler)) == steps
    sampler.start_at(0, steps)
    assert len(sampler) == len(list(sampler)) == 0


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_a_batch_in_parts_has_the_same_rows(ml100k, parts):
    batch = epoch_of(ml100k, 0)[0]
    pieces = batch.split(parts)
    assert len(pieces) == parts
    sizes = [len(piece.user_index) for piece in pieces]
    assert max(sizes) - min(sizes) <= 1
    for name in ("user_index", "first_target", "cut_target"):
        together = torch.cat([getattr(piece, name) for piece in pieces])
        assert together.equal(getattr(batch, name))
    for name in ("target_ids", "target_places"):
        together = torch.cat([getattr(piece, name) for piece in pieces])
        assert together.sort().values.equal(getattr(batch, name).sort().values)
    histories = [row[row != 0].tolist() for piece in pieces for row in piece.history]
    assert histories == [row[row != 0].tolist() for row in batch.history]


def test_a_borrowed_row_stays_borrowed(ml100k):
    users = ml100k.trained_users[:3]
    dataset = SequenceDataset(ml100k, 50, 0)
    own, other = (
        next(iter(make_loader(dataset, EpochSampler(users[:1], 4, 0, rank, 2)))) for rank in (0, 1)
    )
    assert (own.borrowed, other.borrowed) == (False, True)
    assert own.user_index.equal(other.user_index)
    assert other.to(torch.device("cpu")).borrowed
