"""Which interactions get a rationale: never one that is held out, and those that a policy means."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F

from cotrain.config import DataConfig, RationaleConfig
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.data.splits import NOT_EVALUATED
from cotrain.errors import ConfigError, DataError
from cotrain.rationale import selection
from cotrain.rationale.selection import STRATA, STRATUM_NAMES, Positions, select_positions
from cotrain.student import selection as student_selection
from cotrain.student.recommender import Recommender
from cotrain.student.sasrec import SASRec

POLICIES = ["random", "entropy", "margin", "loss", "k_center"]
Select = Callable[..., Positions]

# Shorter than most histories.
LENGTH = 7


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """With a student this small a second one costs more than it does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def few_tables(
    small_tables: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str]:
    """The first 45 interactions of 16 users, of which two have 24 and 22."""
    table = pl.read_csv(small_tables[0])
    table = table.filter(pl.col("user_id") <= 16).sort("user_id", "timestamp")
    path = tmp_path_factory.mktemp("few") / "interactions.csv"
    table.group_by("user_id", maintain_order=True).head(45).write_csv(path)
    return str(path), str(small_tables[1])


@pytest.fixture(scope="module")
def few(few_tables: tuple[str, str]) -> InteractionData:
    interactions, items = few_tables
    return load_interactions(DataConfig(name="few", interactions=interactions, items=items))


@pytest.fixture(scope="module")
def by_time(small_tables: tuple[Path, Path]) -> InteractionData:
    """Of all 60 users: most of them are there on one day, before or after the cut."""
    interactions, items = map(str, small_tables)
    return load_interactions(DataConfig(interactions=interactions, items=items, split="time"))


def student_of(data: InteractionData) -> Recommender:
    torch.manual_seed(0)
    model = SASRec(data.num_items, 16, num_layers=1, num_heads=2, max_length=LENGTH, dropout=0.3)
    with torch.no_grad():
        model.item_vectors.mul_(20)  # so that it is surer of some than of others
    return Recommender(model, data.catalog)


@pytest.fixture(scope="module")
def student(few: InteractionData) -> Recommender:
    return student_of(few)


def settings_of(**changes: Any) -> RationaleConfig:
    return RationaleConfig(**changes)


@pytest.fixture
def select(few: InteractionData, student: Recommender) -> Select:
    """`select(select="entropy", rows=9, …)`: of the small data, seed 0."""

    def chosen(seed: int = 0, data: InteractionData = few, **changes: Any) -> Positions:
        return select_positions(data, settings_of(**changes), seed, student)

    return chosen


def places_of(data: InteractionData, positions: Positions) -> np.ndarray:
    return data.offsets[positions.user] + positions.cut


def pairs_of(positions: Positions) -> list[tuple[int, int]]:
    return list(zip(positions.user.tolist(), positions.cut.tolist(), strict=True))


def all_places(data: InteractionData) -> list[int]:
    """Every interaction that may have a rationale, one user after another."""
    ends = data.held_out.train_end.tolist()
    return [
        place
        for start, end in zip(data.offsets.tolist(), ends, strict=False)
        for place in range(start + 1, end)
    ]


# ---- the leak check -----------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["leave-one-out", "time"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("strata", ["popularity", "none"])
def test_nothing_that_is_held_out_is_ever_chosen(
    few: InteractionData, by_time: InteractionData, policy: str, split: str, strata: str
):
    """Asked for everything, every policy gives the training interactions, each once."""
    data = few if split == "leave-one-out" else by_time
    settings = settings_of(select=policy, strata=strata, fraction=1.0)
    positions = select_positions(data, settings, 0, student_of(data))
    places = places_of(data, positions)
    assert sorted(places.tolist()) == all_places(data)
    assert (positions.cut >= 1).all()
    assert (places < data.held_out.train_end[positions.user]).all()
    held_out = np.concatenate([data.held_out.validation, data.held_out.test])
    held_out = held_out[held_out != NOT_EVALUATED]
    assert len(held_out) >= 10
    assert not np.isin(places, held_out).any()


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_held_out_does_not_decide_what_is_chosen(
    select: Select, few: InteractionData, policy: str
):
    before = select(select=policy, rows=60)
    items = few.items.copy()
    held_out = np.concatenate([few.held_out.validation, few.held_out.test])
    items[held_out] = np.random.default_rng(0).integers(1, few.num_items, len(held_out))
    after = select(data=dataclasses.replace(few, items=items), select=policy, rows=60)
    assert pairs_of(after) == pairs_of(before)


# ---- budget, strata and limits ------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("strata", ["popularity", "none"])
def test_the_budget_is_kept_and_nothing_chosen_twice(select: Select, policy: str, strata: str):
    for rows in (1, 57, 300):
        positions = select(select=policy, strata=strata, rows=rows)
        assert len(set(pairs_of(positions))) == len(positions.user) == rows
        assert sum(chosen for _, _, chosen in positions.strata) == rows


def test_a_share_is_one_of_the_training_interactions(select: Select, few: InteractionData):
    total = len(all_places(few))
    assert len(select().user) == round(0.1 * total)
    assert len(select(fraction=0.5).user) == round(0.5 * total)
    assert len(select(fraction=0.5, rows=7).user) == 7
    assert len(select(rows=10 * total).user) == total


def test_strata_get_the_same_number_while_they_last(small_data: InteractionData):
    counts = small_data.train_counts
    ends = [0, *STRATA, np.inf]

    def by_stratum(places: Any) -> list[int]:
        taken = counts[small_data.items[places]]
        return [int(((taken > low) & (taken <= high)).sum())
                for low, high in itertools.pairwise(ends)]  # fmt: skip

    there_are = by_stratum(all_places(small_data))
    # With 60 users no item has over 100.
    assert there_are[3] == 0 < min(there_are[:3])
    least = min(there_are[:3])
    for rows in (1, 30, 31, 3 * least, 3 * least + 100, sum(there_are) - 5):
        positions = select_positions(small_data, RationaleConfig(rows=rows), 0)
        found = by_stratum(places_of(small_data, positions))
        assert positions.strata == list(zip(STRATUM_NAMES, there_are, found, strict=True))
        assert sum(found) == rows
        # One that has given all it has has no more than any that has some left.
        left = [given for given, total in zip(found, there_are, strict=True) if given < total]
        assert max(left) - min(left) <= 1
        assert max(found) <= max(left)


def test_without_strata_they_come_as_often_as_they_are(small_data: InteractionData):
    plain = select_positions(small_data, RationaleConfig(strata="none", rows=2000), 0)
    assert plain.strata == [("all", len(all_places(small_data)), 2000)]
    counts = small_data.train_counts
    rare = counts[small_data.items] <= STRATA[0]
    of_all, of_chosen = (
        rare[places].mean() for places in (all_places(small_data), places_of(small_data, plain))
    )
    # Three standard deviations.
    assert of_chosen == pytest.approx(of_all, abs=3 * (of_all * (1 - of_all) / 2000) ** 0.5)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_user_gets_more_than_the_limit(select: Select, few: InteractionData, policy: str):
    positions = select(select=policy, rows=30, per_user=2)
    taken = np.bincount(positions.user, minlength=few.num_users)
    assert taken.max() == 2
    assert taken.sum() == 30
    everyone = select(select=policy, rows=10_000, per_user=1)
    assert sorted(everyone.user.tolist()) == list(range(few.num_users))


def test_a_limit_leaves_the_order_of_those_within_it(select: Select):
    free = pairs_of(select(rows=10_000))
    limited = pairs_of(select(rows=10_000, per_user=3))
    taken: dict[int, int] = {}
    expected = []
    for user, cut in free:
        taken[user] = taken.get(user, 0) + 1
        if taken[user] <= 3:
            expected.append((user, cut))
    assert limited == expected


def test_a_share_of_the_users_is_all_that_get_some(select: Select, few: InteractionData):
    some = set(select(fraction=1.0, user_fraction=0.2).user.tolist())
    more = set(select(fraction=1.0, user_fraction=0.5).user.tolist())
    assert len(some) == round(0.2 * few.num_users)
    assert len(more) == round(0.5 * few.num_users)
    assert some < more
    assert some != set(select(seed=1, fraction=1.0, user_fraction=0.2).user.tolist())
    assert len(set(select(fraction=1.0, user_fraction=1e-9).user.tolist())) == 1


# ---- draws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_chooses_the_same(select: Select, policy: str):
    assert pairs_of(select(select=policy, rows=80)) == pairs_of(select(select=policy, rows=80))


def test_another_seed_draws_others(select: Select):
    first, second = (set(pairs_of(select(seed=seed, rows=100))) for seed in (0, 1))
    assert len(first & second) < 50


@pytest.mark.parametrize("strata", ["popularity", "none"])
def test_a_larger_random_budget_begins_with_the_smaller(select: Select, strata: str):
    budgets = [pairs_of(select(strata=strata, rows=rows)) for rows in (10, 75, 600)]
    for small, large in itertools.pairwise(budgets):
        assert large[: len(small)] == small


def test_more_users_do_not_change_what_is_drawn_of_the_others(select: Select):
    """A larger share of the users is a larger budget, too."""
    some = select(fraction=1.0, user_fraction=0.3, strata="none")
    more = select(fraction=1.0, user_fraction=0.8, strata="none")
    kept = [pair for pair in pairs_of(more) if pair[0] in set(some.user.tolist())]
    assert kept == pairs_of(some)


# ---- by what a student makes of them ------------------------------------------------------------


def states_one_by_one(data: InteractionData, student: Recommender) -> torch.Tensor:
    """(n, D) state before each training interaction, each by itself.

    Of a history longer than `LENGTH` a position is seen with the half that lies before it at least.
    """
    model = student.model.eval()
    states = []
    with torch.no_grad():
        for place in all_places(data):
            user = int(np.searchsorted(data.offsets, place, "right")) - 1
            before = data.items[data.offsets[user] : place]
            new = LENGTH - LENGTH // 2  # that a window after the first shows
            begin = max(0, -(-(len(before) - LENGTH) // new) * new)
            states.append(model.user_states([before[begin:]])[0])
    return torch.stack(states)


@pytest.fixture(scope="module")
def plain_states(few: InteractionData, student: Recommender) -> torch.Tensor:
    return states_one_by_one(few, student)


@pytest.mark.parametrize("policy", ["entropy", "margin", "loss"])
@pytest.mark.parametrize("scores_at_once", [2**24, 5000])
def test_those_come_first_that_the_student_is_least_sure_of(
    select: Select, few: InteractionData, student: Recommender, plain_states: torch.Tensor,
    policy: str, scores_at_once: int, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(student_selection, "_SCORES", scores_at_once)
    assert max(len(few.train_history(user)) for user in range(16)) > 5 * LENGTH
    places = np.array(all_places(few))
    scores = plain_states.double() @ student.model.item_vectors[1:].detach().double().T
    probs = torch.softmax(scores, dim=1)
    if policy == "entropy":
        unsure = torch.special.entr(probs).sum(1)
    elif policy == "margin":
        best = scores.topk(2, dim=1).values
        unsure = best[:, 1] - best[:, 0]
    else:
        unsure = F.cross_entropy(scores, torch.from_numpy(few.items[places] - 1), reduction="none")
    of_place = dict(zip(places.tolist(), unsure.tolist(), strict=True))
    positions = select(select=policy, strata="none", fraction=1.0)
    found = np.array([of_place[place] for place in places_of(few, positions).tolist()])
    # In single precision those that are as good as equal may change places.
    np.testing.assert_allclose(found, -np.sort(-unsure.numpy()), atol=1e-4)
    assert (np.diff(found) <= 1e-4).all()
    assert found[0] - found[-1] > 1


def test_within_each_stratum_the_least_sure_come_first(select: Select, few: InteractionData):
    order = {pair: rank for rank, pair in enumerate(pairs_of(select(
        select="loss", strata="none", fraction=1.0)))}  # fmt: skip
    positions = select(select="loss", rows=90)
    stratum = np.digitize(few.train_counts[few.items[places_of(few, positions)]], STRATA, True)
    for number in np.unique(stratum):
        ranks = [order[pair] for pair, of in zip(pairs_of(positions), stratum, strict=True)
                 if of == number]  # fmt: skip
        assert ranks == sorted(ranks)


def assert_farthest_first(vectors: np.ndarray, order: list[int]) -> None:
    """By every pair: each is the one whose nearest among all before it is farthest away. Those
    that are as far to seven digits may come in any order."""
    cosines = vectors @ vectors.T
    for count in range(1, len(order)):
        nearest = cosines[:, order[:count]].max(1)
        nearest[order[:count]] = np.inf
        assert nearest[order[count]] <= nearest.min() + 1e-6


def test_k_center_is_farthest_first(
    select: Select, few: InteractionData, plain_states: torch.Tensor
):
    vectors = F.normalize(plain_states.double(), dim=1).numpy()
    index = {place: row for row, place in enumerate(all_places(few))}
    positions = select(select="k_center", strata="none", rows=80)
    found = [index[place] for place in places_of(few, positions).tolist()]
    # It begins where the random policy does.
    random = places_of(few, select(strata="none", rows=1))
    assert found[0] == index[int(random[0])]
    assert_farthest_first(vectors, found)


def test_k_center_chooses_from_a_pool_where_there_are_too_many(
    select: Select, few: InteractionData, plain_states: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(selection, "POOL", 100)
    drawn = pairs_of(select(strata="none", fraction=1.0))
    found = pairs_of(select(select="k_center", strata="none", rows=130))
    assert set(found[:100]) == set(drawn[:100])
    # What is beyond the pool comes as it was drawn.
    assert found[100:] == drawn[100:130]
    places = np.array(all_places(few))
    pool = [int(few.offsets[user]) + cut for user, cut in drawn[:100]]
    vectors = F.normalize(plain_states, dim=1).double().numpy()[np.searchsorted(places, pool)]
    order = [drawn.index(pair) for pair in found[:100]]
    assert order[0] == 0
    assert_farthest_first(vectors, order)


@pytest.mark.parametrize("policy", ["entropy", "k_center"])
def test_the_student_is_asked_without_dropout_and_how_many_users_at_once_does_not_matter(
    select: Select, student: Recommender, policy: str, monkeypatch: pytest.MonkeyPatch
):
    expected = pairs_of(select(select=policy, rows=40))
    student.model.train()
    monkeypatch.setattr(selection, "_USERS", 1)
    assert pairs_of(select(select=policy, rows=40)) == expected


# ---- what cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_a_policy_that_needs_a_student_says_so(few: InteractionData, policy: str):
    with pytest.raises(ConfigError, match=rf"select {policy} asks .* with rationale\.student"):
        select_positions(few, settings_of(select=policy), 0)


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_a_student_of_other_items_is_refused(
    select: Select, few: InteractionData, ml100k: InteractionData, policy: str
):
    catalog = few.catalog
    ids = [None, *reversed(catalog.item_ids[1:])]
    other_order = dataclasses.replace(few, catalog=dataclasses.replace(catalog, item_ids=ids))
    for data in (ml100k, other_order):
        with pytest.raises(DataError) as caught:
            select(data=data, select=policy, student="runs/other/student")
        said = str(caught.value)
        assert "runs/other/student recommends other items" in said
        assert f"against {data.num_items:,} such as" in said


def test_a_budget_of_nothing_is_refused(select: Select):
    with pytest.raises(ConfigError, match=r"fraction 1e-06 of [\d,]+ training.* is none"):
        select(fraction=1e-6)


def test_data_without_anything_to_explain_are_refused(few: InteractionData):
    """Of three interactions two are held out, and nothing lies before the one that is left."""
    items = np.concatenate([few.history(user)[:3] for user in range(16)])
    short = dataclasses.replace(few, items=items, offsets=np.arange(0, 49, 3))
    with pytest.raises(DataError, match="No user of 'few' has two training interactions"):
        select_positions(short, RationaleConfig(), 0)
