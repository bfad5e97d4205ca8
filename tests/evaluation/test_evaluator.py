"""Ranks and lists of whole data sets: the same whatever is scored at once, and as by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cotrain.config import DataConfig
from cotrain.data.catalog import Catalog
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.evaluation import evaluator
from cotrain.evaluation.evaluator import Evaluation, evaluate
from cotrain.evaluation.metrics import metrics_from_ranks
from cotrain.student.sasrec import SASRec


class Bag:
    """Scores items by the sum over the last three of the history. Its vectors are small whole
    numbers: sums are exact in any order, and many items tie."""

    def __init__(self, num_items: int, size: int = 6, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.vectors = torch.randint(-3, 4, (num_items + 1, size), generator=generator).float()
        self.training = True
        self.most_users = 0

    @property
    def item_vectors(self) -> Tensor:
        return self.vectors

    def user_states(self, histories) -> Tensor:
        assert not self.training
        self.most_users = max(self.most_users, len(histories))
        return torch.stack([self.vectors[history[-3:]].sum(0) for history in histories])

    def train(self, mode: bool = True) -> None:
        self.training = mode


@pytest.fixture(scope="module")
def by_time() -> InteractionData:
    return load_interactions(DataConfig(split="time"))


def same(one: Evaluation, other: Evaluation) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("users", "ranks")
    )


@pytest.mark.parametrize("split", ["validation", "test"])
def test_ranks_and_lists_against_a_plain_loop(ml100k, split):
    model = Bag(ml100k.num_items)
    found = evaluate(model, ml100k, split)
    assert found.users.tolist() == list(range(ml100k.num_users))
    for user in range(0, ml100k.num_users, 50):
        history = ml100k.history(user)[: -2 if split == "validation" else -1]
        target = ml100k.history(user)[-2 if split == "validation" else -1]
        scores = (model.vectors @ model.vectors[history[-3:]].sum(0)).numpy()
        unseen = np.setdiff1d(np.arange(1, len(scores)), np.append(history, target))
        assert found.ranks[user] == 1 + (scores[unseen] >= scores[target]).sum()
        shown = found.recommended[user]
        assert not set(shown) & {0, *history}
        assert len(set(shown)) == 10
        # The best that there are; which of those that tie is left open.
        left = np.setdiff1d(np.arange(1, len(scores)), history)
        assert scores[shown].tolist() == sorted(scores[left], reverse=True)[:10]


@pytest.mark.parametrize(("batch_size", "max_scores"), [(1, 2**25), (7, 1), (2000, 10_000)])
def test_results_do_not_depend_on_what_is_scored_at_once(
    by_time, monkeypatch, batch_size, max_scores
):
    expected = evaluate(Bag(by_time.num_items), by_time, "test")
    monkeypatch.setattr(evaluator, "MAX_SCORES", max_scores)
    model = Bag(by_time.num_items)
    assert same(evaluate(model, by_time, "test", batch_size), expected)
    assert model.most_users == min(batch_size, len(expected.users))


@pytest.fixture
def small_student(ml100k) -> SASRec:
    torch.manual_seed(0)
    return SASRec(ml100k.num_items, hidden_size=8, num_layers=1, max_length=20).double()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_students_ranks_do_not_depend_on_the_batch_size(ml100k, small_student, batch_size):
    """In float64: what the rounding of float32 swaps are items a millionth apart."""
    expected = evaluate(small_student, ml100k, "test", 256)
    found = evaluate(small_student, ml100k, "test", batch_size)
    assert same(found, expected)
    assert np.array_equal(found.recommended, expected.recommended)


def test_a_students_metrics_do_not_depend_on_the_batch_size_in_float32(ml100k, small_student):
    one, other = (
        metrics_from_ranks(evaluate(small_student.float(), ml100k, "test", batch_size).ranks)
        for batch_size in (16, 943)
    )
    assert one == pytest.approx(other, abs=1e-4)


def test_no_more_scores_at_once_than_allowed(ml100k, monkeypatch):
    sizes, whole = [], evaluator.target_ranks
    monkeypatch.setattr(evaluator, "MAX_SCORES", 20_000)
    monkeypatch.setattr(
        evaluator,
        "target_ranks",
        lambda scores, *rest: sizes.append(scores.numel()) or whole(scores, *rest),
    )
    evaluate(Bag(ml100k.num_items), ml100k, "test", batch_size=100)
    assert max(sizes) <= 20_000
    assert sum(sizes) == ml100k.num_users * (ml100k.num_items + 1)


def test_a_model_without_an_opinion_gets_the_worst_rank(ml100k):
    model = Bag(ml100k.num_items)
    model.vectors = torch.rand(1, 6).expand_as(model.vectors)
    found = evaluate(model, ml100k, "test")
    eligible = [
        ml100k.num_items - len(set(ml100k.history(user)[:-1].tolist()) - {ml100k.test_target(user)})
        for user in range(ml100k.num_users)
    ]
    assert found.ranks.tolist() == eligible


def test_the_mode_of_the_model_is_left_alone(ml100k):
    for mode in (True, False):
        model = Bag(ml100k.num_items)
        model.train(mode)
        evaluate(model, ml100k, "validation")
        assert model.training is mode


def test_users_without_a_target_are_left_out(by_time):
    found = evaluate(Bag(by_time.num_items), by_time, "test")
    assert found.users.tolist() == by_time.evaluated_users("test").tolist()
    assert 0 < len(found.ranks) == len(found.recommended) < by_time.num_users
    for place in (0, len(found.users) - 1):
        history = by_time.history_before(found.users[place], "test")
        assert not set(found.recommended[place]) & set(history)
    by_user = found.ranks_by_user(by_time.num_users)
    assert len(by_user) == by_time.num_users
    assert [rank for rank in by_user if rank is not None] == found.ranks.tolist()
    assert [user for user, rank in enumerate(by_user) if rank is not None] == found.users.tolist()


def test_a_catalogue_smaller_than_a_list(tmp_path):
    path = tmp_path / "table.csv"
    rows = [f"{user},{(user + item) % 5},{item}" for user in range(3) for item in range(4)]
    path.write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    data = load_interactions(DataConfig(interactions=str(path)))
    found = evaluate(Bag(data.num_items), data, "test")
    assert (found.recommended[:, :2] > 0).all()
    assert (found.recommended[:, 2:] == 0).all()
    assert found.ranks.max() <= 2


def test_one_user_with_a_million_events():
    """Padded to the longest, the histories of such a batch took a gigabyte."""
    lengths = np.array([1_000_000, *[4] * 99])
    items = np.random.default_rng(0).integers(1, 51, lengths.sum())
    data = InteractionData(
        name="long",
        user_ids=list(range(100)),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        items=items,
        catalog=Catalog([None, *range(50)], [""] * 51, [""] * 51),
        notes=[],
    )
    found = evaluate(Bag(50), data, "test", batch_size=100)
    # Everything else was met: the repeated item is still the true answer.
    assert found.ranks[0] == 1
    assert (found.recommended[0] == 0).all()
