"""Every row of a batch follows from (seed, epoch, user), and holds training items only."""

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotrain.data.batches import EpochSampler, SequenceDataset, collate, left_pad, make_loader
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


def epoch_of(data, epoch=0, max_length=50, batch_size=64, seed=0, step=0, **share):
    dataset = SequenceDataset(data, max_length, seed)
    sampler = EpochSampler(dataset.users, batch_size, seed, **share)
    sampler.start_at(epoch, step)
    return list(make_loader(dataset, sampler))


def rows_by_user(batches) -> dict[int, dict]:
    """Each user's row without its padding; the cut counted from the first item."""
    rows = {}
    for batch in batches:
        for row, user in enumerate(batch.user_index.tolist()):
            items = batch.item_ids[row]
            rows[user] = {
                "items": items[items != 0].tolist(),
                "targets": batch.target_ids[row][batch.target_ids[row] != 0].tolist(),
                "cut": int(batch.cut[row] - (items == 0).sum()),
                "history": batch.history[row][batch.history[row] != 0].tolist(),
            }
    return rows


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
    assert batch.item_ids.tolist() == [[1, 2, 3], [0, 0, 7], [7, 8, 9]]
    assert batch.target_ids.tolist() == [[2, 3, 4], [0, 0, 8], [8, 9, 1]]
    assert batch.cut[1] == 2
    assert batch.cut_target[1] == 8
    for field in fields(batch):
        assert getattr(batch, field.name).dtype == torch.int64


def test_rows_are_padded_on_the_left_to_the_longest_and_no_further(ml100k):
    for batch in epoch_of(ml100k, max_length=200, batch_size=7):
        for values in (batch.item_ids, batch.target_ids, batch.history):
            real = values != 0
            # Once real, real to the end.
            assert (real[:, 1:] >= real[:, :-1]).all()
            assert real[:, -1].all()
            assert real[:, 0].any()
        assert torch.equal(batch.item_ids != 0, batch.target_ids != 0)


def test_target_is_the_next_item(ml100k):
    for batch in epoch_of(ml100k):
        follows = batch.item_ids[:, :-1] != 0
        assert torch.equal(batch.target_ids[:, :-1][follows], batch.item_ids[:, 1:][follows])
        for row, user in enumerate(batch.user_index.tolist()):
            assert batch.target_ids[row, -1] == ml100k.train_history(user)[-1]


def test_every_row_is_the_end_of_the_training_items(ml100k):
    for user, row in rows_by_user(epoch_of(ml100k, max_length=30)).items():
        items = ml100k.train_history(user).tolist()[-31:]
        assert row["items"] == items[:-1]
        assert row["targets"] == items[1:]


@pytest.mark.parametrize("max_length", [1, 5, 1000])
def test_history_is_everything_up_to_the_cut(ml100k, max_length):
    """Also what is older than max_length, because none of it may be retrieved again."""
    for batch in epoch_of(ml100k, max_length=max_length):
        rows = torch.arange(len(batch.cut))
        # The cut lies on a real position, and the history ends with the item there.
        assert (batch.item_ids[rows, batch.cut] != 0).all()
        assert torch.equal(batch.history[:, -1], batch.item_ids[rows, batch.cut])
        assert torch.equal(batch.cut_target, batch.target_ids[rows, batch.cut])
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
    assert {getattr(batch, field.name).device.type for field in fields(batch)} == {"meta"}


# ---- what must never be in a row ----------------------------------------------------------------


@pytest.mark.parametrize("max_length", [3, 1000])
def test_no_validation_or_test_interaction_in_any_batch(places, ml100k, max_length):
    ends = places.offsets[1:]
    held_out = np.concatenate([ends - 2, ends - 1]) + 1
    assert held_out.tolist() == [
        *map(places.validation_target, range(places.num_users)),
        *map(places.test_target, range(places.num_users)),
    ]
    seen = torch.zeros(places.num_interactions + 1, dtype=torch.bool)
    starts, held = torch.from_numpy(places.offsets[:-1]), torch.from_numpy(ends - 2)
    for epoch in range(2):
        for batch in epoch_of(places, epoch, max_length=max_length):
            first, end = starts[batch.user_index], held[batch.user_index]
            for values in (batch.item_ids, batch.target_ids, batch.history):
                seen[values.flatten()] = True
                # And nothing of another user.
                place = values - 1
                inside = (place >= first[:, None]) & (place < end[:, None])
                assert (inside | (values == 0)).all()
    assert not seen[held_out].any()
    if max_length == 1000:
        # Everything else is there, so that a leak would have shown.
        assert seen.sum() == 1 + places.num_interactions - len(held_out)
    # Ids do not change which places are drawn: the same rows are read under the real ids.
    by_place, by_item = (rows_by_user(epoch_of(data, 0)) for data in (places, ml100k))
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


# ---- epochs -------------------------------------------------------------------------------------


def keys(sampler: EpochSampler, epoch: int, step: int = 0) -> list[list[tuple[int, int]]]:
    sampler.start_at(epoch, step)
    batches = list(sampler)
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
        for field in fields(left):
            assert torch.equal(getattr(left, field.name), getattr(right, field.name))


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
    for step in range(steps):
        rows = [row for share in shares for row in share[step]]
        assert sorted(rows) == sorted(whole[step])
        assert {key[1] for key in rows} == {epoch}
    # What is left over is less than one row a process.
    assert len(whole) - steps in (0, 1)
    if steps < len(whole):
        assert len(whole[-1]) < world_size


@pytest.mark.parametrize(
    ("count", "batch_size", "world_size", "steps"),
    [(10, 5, 1, 2), (11, 5, 1, 3), (11, 5, 2, 2), (12, 5, 2, 3), (4, 5, 1, 1), (943, 64, 2, 15)],
)
def test_steps_per_epoch_with_a_short_last_batch(count, batch_size, world_size, steps):
    sampler = EpochSampler(np.arange(count), batch_size, 0, 0, world_size)
    assert sampler.steps_per_epoch == len(list(sampler)) == steps
    sampler.start_at(0, steps)
    assert len(sampler) == len(list(sampler)) == 0
