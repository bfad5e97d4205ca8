"""Rows to train on: of training positions and of users who may be seen, and nothing that comes
later."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cotrain.config import DataConfig
from cotrain.data.catalog import Catalog
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.errors import ConfigError, DataError
from cotrain.finetune.examples import (
    Example,
    Examples,
    held_out_users,
    make_examples,
    open_student,
    rows_at,
    training_positions,
    validation_rows,
)
from cotrain.finetune_settings import ExamplesConfig
from cotrain.student.recommender import Recommender
from cotrain.student.sasrec import SASRec

K = 20
Make = Callable[..., Examples]


@pytest.fixture(scope="module")
def data(small_tables: tuple[Path, Path]) -> InteractionData:
    interactions, items = small_tables
    return load_interactions(DataConfig(interactions=str(interactions), items=str(items)))


def random_student(catalog: Catalog) -> Recommender:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SASRec(
            len(catalog) - 1, hidden_size=8, num_layers=1, num_heads=2, max_length=10, dropout=0.5
        )
        with torch.no_grad():  # scores that differ
            model.item_embedding.weight[1:].normal_()
    return Recommender(model, catalog)


@pytest.fixture(scope="module")
def student(data: InteractionData) -> Recommender:
    return random_student(data.catalog)


@pytest.fixture(scope="module")
def make(data: InteractionData, student: Recommender) -> Make:
    """`make(seed=…, **settings)`: with many held-out users and few rows."""

    def with_settings(seed: int = 0, num_candidates: int = K, **changes: Any) -> Examples:
        settings = ExamplesConfig(**{"rows": 60, "held_out": 0.5, **changes})
        return make_examples(data, settings, num_candidates, seed, student)

    return with_settings


def worth(data: InteractionData, row: Example, future: float) -> list[float]:
    """What each candidate of a training row should count, item by item."""
    history = data.train_history(row.user).tolist()
    return [
        1.0 if item == history[row.cut] else future if item in history[row.cut + 1 :] else 0.0
        for item in row.candidates
    ]


# ---- which positions ----------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", ["student", "random", "popular"])
@pytest.mark.parametrize("min_history", [1, 5])
def test_rows_are_of_training_positions_of_users_who_are_not_held_out(
    data: InteractionData, make: Make, candidates: str, min_history: int
):
    found = make(candidates=candidates, min_history=min_history)
    apart = set(held_out_users(data, 0.5, seed=0).tolist())
    assert len(apart) == 30
    assert found.train
    for row in found.train:
        assert row.user not in apart
        history = data.train_history(row.user)
        assert min_history <= row.cut < len(history)
        assert row.history == tuple(history[: row.cut].tolist())
        assert row.target == history[row.cut]
        assert len(row.candidates) == len(row.relevance) == len(set(row.candidates)) == K
        assert list(row.relevance) == worth(data, row, 0.3)
        assert sum(row.relevance) > 0
    assert {row.user for row in found.validation} <= apart
    assert len({(row.user, row.cut) for row in found.train}) == len(found.train)


def test_every_training_position_can_be_drawn_once(data: InteractionData):
    users = data.trained_users
    for min_history in (1, 3, 40):
        positions = training_positions(data, users, min_history, seed=0)
        expected = {
            (user, cut)
            for user in users.tolist()
            for cut in range(min_history, len(data.train_history(user)))
        }
        assert sorted(map(tuple, positions.tolist())) == sorted(expected)
    assert len(training_positions(data, users, 10_000, seed=0)) == 0
    assert positions.tolist() != training_positions(data, users, 40, seed=1).tolist()


def test_held_out_users_are_the_same_for_every_method_and_others_for_another_seed(
    data: InteractionData,
):
    users = held_out_users(data, 0.25, seed=0)
    assert len(users) == 15
    assert users.tolist() == sorted(set(users.tolist()))
    assert held_out_users(data, 0.25, seed=0).tolist() == users.tolist()
    assert held_out_users(data, 0.25, seed=1).tolist() != users.tolist()
    assert len(held_out_users(data, 1e-9, seed=0)) == 1


def without_targets(data: InteractionData) -> InteractionData:
    """The same, but for what is held out: every validation and test item is another one."""
    items = data.items.copy()
    for place in (*data.held_out.validation, *data.held_out.test):
        items[place] = items[place] % data.num_items + 1
    return dataclasses.replace(data, items=items)


@pytest.mark.parametrize("candidates", ["student", "random", "popular"])
def test_what_is_held_out_changes_no_training_row(
    data: InteractionData, make: Make, student: Recommender, candidates: Any
):
    settings = ExamplesConfig(rows=60, held_out=0.5, candidates=candidates, future_weight=0.5)
    found = make_examples(data, settings, 300, 0, student)
    other = make_examples(without_targets(data), settings, 300, 0, student)
    assert other.train == found.train
    assert other.validation != found.validation


def test_a_validation_target_among_the_candidates_of_a_training_row_counts_nothing(
    data: InteractionData, student: Recommender
):
    """So does the test target; both are in the user's whole history."""
    settings = ExamplesConfig(future_weight=1.0, missing="inject")
    positions = training_positions(data, data.trained_users, 1, seed=0)[:1000]
    seen = 0
    for row in rows_at(data, positions, settings, 100, 0, student):
        held_out = {data.validation_target(row.user), data.test_target(row.user)}
        for item, value in zip(row.candidates, row.relevance, strict=True):
            if item in held_out:
                seen += 1
                assert value == 0
    assert seen > 20


# ---- which candidates ---------------------------------------------------------------------------


def test_candidates_of_the_student_are_its_best_in_its_order(
    data: InteractionData, make: Make, student: Recommender
):
    for row in make().train[:20]:
        ((*items,),) = student.top_items([np.array(row.history)], K).item_ids.tolist()
        assert list(row.candidates) == items
        assert list(row.scores) == sorted(row.scores, reverse=True)
        assert not set(row.candidates) & set(row.history)


def test_rows_whose_candidates_hold_nothing_are_dropped(data: InteractionData, make: Make):
    found = make(rows=30)
    assert 0 < len(found.train) <= 30
    assert found.drawn <= 6 * 30
    positions = training_positions(
        data, np.setdiff1d(data.trained_users, held_out_users(data, 0.5, 0)), 3, seed=0
    )
    looked_at = [tuple(position) for position in positions[: found.drawn].tolist()]
    kept = [(row.user, row.cut) for row in found.train]
    assert kept == [position for position in looked_at if position in set(kept)]


def test_a_missing_target_is_put_last_where_nothing_else_is_right(
    data: InteractionData, make: Make, student: Recommender
):
    found = make(missing="inject", rows=200)
    assert len(found.train) == found.drawn == 200
    injected = future_only = 0
    for row in found.train:
        ((*items,),) = student.top_items([np.array(row.history)], K).item_ids.tolist()
        later = set(data.train_history(row.user)[row.cut :].tolist())
        if later & set(items):
            assert list(row.candidates) == items
            future_only += row.target_place is None
        else:
            injected += 1
            assert row.candidates == (*items[:-1], row.target)
            assert row.relevance == (*[0.0] * (K - 1), 1.0)
            assert row.target_place == K - 1
    assert injected > 10
    assert future_only > 10  # something else is right, so nothing is put in


@pytest.mark.parametrize("future_weight", [0.0, 0.3, 1.0])
def test_what_is_taken_later_counts_as_much_as_it_is_told(
    data: InteractionData, make: Make, future_weight: float
):
    found = make(future_weight=future_weight, rows=40)
    for row in found.train:
        assert list(row.relevance) == worth(data, row, future_weight)
    several = sum(sum(value > 0 for value in row.relevance) > 1 for row in found.train)
    if future_weight:
        assert several
    else:
        assert not several
        assert all(row.target_place is not None for row in found.train)


@pytest.mark.parametrize("candidates", ["random", "popular"])
def test_drawn_candidates_hold_the_target_and_nothing_of_the_history(
    data: InteractionData, make: Make, candidates: str
):
    found = make(candidates=candidates, rows=200)
    assert len(found.train) == found.drawn == 200
    for row in found.train:
        assert row.candidates[0] == row.target
        assert not set(row.candidates) & {0, *row.history}
        assert row.scores == ()
    counts = data.train_counts[[item for row in found.train for item in row.candidates[1:]]]
    even = np.mean(
        [np.delete(data.train_counts, [0, row.target, *row.history]).mean() for row in found.train]
    )
    if candidates == "random":
        assert counts.mean() == pytest.approx(even, rel=0.1)
    else:
        assert counts.mean() > 1.8 * even


# ---- validation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", ["student", "random"])
def test_validation_shows_what_the_student_retrieves_whatever_training_shows(
    data: InteractionData, make: Make, student: Recommender, candidates: str
):
    found = make(candidates=candidates, num_candidates=100)
    users = held_out_users(data, 0.5, 0)
    assert found.num_validation == len(users)
    assert found.validation
    for row in found.validation:
        history = data.history_before(row.user, "validation")
        assert row.history == tuple(history.tolist())
        assert row.cut == len(history)
        assert row.target == data.validation_target(row.user)
        ((*items,),) = student.top_items([history], 100).item_ids.tolist()
        assert list(row.candidates) == items
        assert row.relevance == tuple(float(item == row.target) for item in items)
        assert row.target_place is not None
    hits = [
        user
        for user in users.tolist()
        if data.validation_target(user)
        in student.top_items([data.history_before(user, "validation")], 100).item_ids
    ]
    assert sorted(row.user for row in found.validation) == hits


def test_validation_rows_are_capped_and_not_the_first_users(make: Make):
    """Regression: they were sorted before they were cut, which left the first ones."""
    whole = make(num_candidates=300).validation
    some = make(num_candidates=300, validation_rows=3).validation
    assert len(some) == 3
    assert [row for row in whole if row in some] == sorted(some, key=lambda row: row.user)
    assert some != whole[:3]


def test_a_validation_row_is_given_also_where_the_target_is_not_retrieved(
    data: InteractionData, student: Recommender
):
    users = data.evaluated_users("validation")
    rows = validation_rows(data, users, K, student, ExamplesConfig(), 0)
    assert [row.user for row in rows] == users.tolist()
    missed = [row for row in rows if row.target_place is None]
    assert missed
    assert {sum(row.relevance) for row in missed} == {0.0}
    # Without a student the target is drawn among others.
    drawn = validation_rows(data, users, K, None, ExamplesConfig(candidates="random"), 0)
    assert all(row.candidates[0] == row.target for row in drawn)


# ---- seeds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", ["student", "random", "popular"])
def test_a_seed_draws_the_same_rows_and_another_one_others(make: Make, candidates: str):
    found = make(candidates=candidates)
    assert make(candidates=candidates) == found
    other = make(candidates=candidates, seed=1)
    assert other.train != found.train
    assert {row.user for row in other.train} != {row.user for row in found.train}


def test_rows_at_stand_in_the_order_of_their_positions(data: InteractionData, student: Recommender):
    positions = training_positions(data, data.trained_users, 1, seed=3)[:300]
    rows = rows_at(data, positions, ExamplesConfig(), K, 0, student)
    assert [[row.user, row.cut] for row in rows] == positions.tolist()
    assert any(sum(row.relevance) == 0 for row in rows)  # nothing is dropped


# ---- errors -------------------------------------------------------------------------------------


def test_what_leaves_no_row_says_what_to_do(data: InteractionData, make: Make):
    with pytest.raises(
        DataError, match=r"None of 0 training positions has the true .*missing inject"
    ):
        make(min_history=100_000)
    with pytest.raises(DataError, match=r"Raise examples\.held_out \(now 0\.01\)"):
        make(held_out=0.01, num_candidates=2, missing="inject")
    for candidates in ("student", "random"):
        with pytest.raises(DataError, match=r"fewer than 1\d\d\d unseen items; lower"):
            make(candidates=candidates, num_candidates=data.num_items - 2, missing="inject")


def test_a_student_is_opened_from_its_folder_or_its_run(
    data: InteractionData, student: Recommender, tmp_path: Path
):
    student.save_pretrained(tmp_path / "run" / "student")
    for path in (tmp_path / "run", tmp_path / "run" / "student"):
        found = open_student(ExamplesConfig(student=str(path)), data)
        assert found is not None
        history = [np.array([1, 2, 3])]
        assert found.top_items(history, 5).item_ids.equal(student.top_items(history, 5).item_ids)
    assert open_student(ExamplesConfig(candidates="popular"), data) is None
    with pytest.raises(ConfigError, match=r"examples\.student is none; name a run"):
        open_student(ExamplesConfig(), data)


def test_a_student_of_other_items_is_refused(
    data: InteractionData, ml100k: InteractionData, tmp_path: Path
):
    random_student(ml100k.catalog).save_pretrained(tmp_path / "student")
    with pytest.raises(DataError, match=r"knows 1,682 items, which are not the 1,\d\d\d of"):
        open_student(ExamplesConfig(student=str(tmp_path / "student")), data)
