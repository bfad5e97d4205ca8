"""Verdicts: independent of batch and shown order, windows that find the best, shuffles, bias."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cotrain.data.interactions import InteractionData
from cotrain.teacher.ranker import RankLLM, window_starts
from cotrain.teacher.reading import Ask, Look, Reader
from cotrain.teacher.verdict import (
    TeacherVerdict,
    agreement_of,
    probs_of_logits,
    probs_of_ranks,
    ranks_of,
    ranks_of_order,
)

K = 3
MakeRanker = Callable[..., RankLLM]
Rows = tuple[list[list[int]], list[list[int]], list[tuple[int, ...]]]


@pytest.fixture(scope="module")
def ranker(make_ranker: MakeRanker) -> RankLLM:
    return make_ranker(num_candidates=K)


def logits_of(verdict: TeacherVerdict) -> Tensor:
    assert verdict.identifier_logits is not None
    return verdict.identifier_logits


def rows_of(data: InteractionData, count: int, size: int) -> Rows:
    draw = np.random.default_rng(7)
    return (
        [data.train_history(user)[: 1 + user].tolist() for user in range(count)],
        [(draw.choice(data.num_items, size, False) + 1).tolist() for _ in range(count)],
        [(0, user) for user in range(count)],
    )


def assert_same(one: TeacherVerdict, other: TeacherVerdict) -> None:
    assert (one.identifier_logits is None) == (other.identifier_logits is None)
    if one.identifier_logits is not None:
        torch.testing.assert_close(
            one.identifier_logits, other.identifier_logits, atol=1e-4, rtol=1e-4
        )
    torch.testing.assert_close(one.decision_state, other.decision_state, atol=1e-4, rtol=1e-4)
    for name in ("ranks", "valid", "shown_order", "agreement"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))
    assert (one.failures, one.partial) == (other.failures, other.partial)
    assert list(one.reasonings) == list(other.reasonings)


# ---- rows, orders, batches ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"decision_position": "emit"},
        {"identifiers": "numbers", "num_candidates": 12, "decision_position": "emit"},
        {"window": 3, "stride": 1},
        {"shuffles": 3},
        {"mode": "cot", "reasoning_tokens": 6},
        {"mode": "generate"},
        {"window": 2, "shuffles": 2, "mode": "cot", "reasoning_tokens": 3},
    ],
    ids=str,
)
def test_a_verdict_depends_on_nothing_else_in_its_batch(
    make_ranker: MakeRanker, ml100k: InteractionData, settings: dict[str, Any]
):
    settings = {"num_candidates": 5, **settings}
    histories, candidates, seeds = rows_of(ml100k, 7, settings["num_candidates"])
    whole = make_ranker(**settings).rank(histories, candidates, seeds)
    ranker = make_ranker(batch_tokens=1, **settings)
    assert_same(ranker.rank(histories, candidates, seeds), whole)
    order = [3, 0, 6]
    some = ranker.rank(
        [histories[row] for row in order],
        [candidates[row] for row in order],
        [seeds[row] for row in order],
    )
    for name in ("ranks", "valid", "shown_order"):
        torch.testing.assert_close(getattr(some, name), getattr(whole, name)[order])
    torch.testing.assert_close(
        some.decision_state, whole.decision_state[order], atol=1e-4, rtol=1e-4
    )


def test_a_verdict_follows_the_titles_and_not_the_students_order(ranker: RankLLM):
    # Every order of 3 candidates, each with the seed that shows the same prompt in the end: what
    # comes back must be the same judgement of the same items, in the order they were given.
    seed_showing = {}
    for seed in range(200):
        order = tuple(np.random.default_rng((seed,)).permutation(K).tolist())
        seed_showing.setdefault(order, (seed,))
    assert len(seed_showing) == 6
    items, history = [50, 100, 200], [1, 2, 3]
    reference = ranker.rank([history], [items], [seed_showing[0, 1, 2]])
    for given_order in itertools.permutations(range(K)):
        candidates = [items[place] for place in given_order]
        shown = tuple(candidates.index(item) for item in items)
        verdict = ranker.rank([history], [candidates], [seed_showing[shown]])
        assert logits_of(verdict).equal(logits_of(reference)[:, list(given_order)])
        assert verdict.ranks.equal(reference.ranks[:, list(given_order)])
        best_first = [candidates[place] for place in verdict.ranking[0]]
        assert best_first == [items[place] for place in reference.ranking[0]]
        assert [candidates[place] for place in verdict.shown_order[0]] == items


def test_shown_orders_differ_between_rows_and_favour_no_place():
    rows = 600
    seeds = [(0, 1, user) for user in range(rows)]
    orders = np.stack([np.random.default_rng(seed).permutation(K) for seed in seeds])
    share = np.stack([(orders == place).mean(0) for place in range(K)])
    assert abs(share - 1 / K).max() < 4 * (1 / K * (1 - 1 / K) / rows) ** 0.5


def test_all_else_follows_from_the_logits(make_ranker: MakeRanker):
    ranker = make_ranker(num_candidates=K)
    ranker.temperature = 0.5
    verdict = ranker.rank([[1], [2, 3]], [[4, 5, 6], [7, 8, 9]], [(0,), (1,)])
    assert verdict.valid.all()
    assert not verdict.failures
    assert not verdict.partial
    for logits, ranking in zip(logits_of(verdict), verdict.ranking, strict=True):
        assert ranking.tolist() == sorted(range(K), key=lambda k: -logits[k].item())
    assert verdict.ranks.equal(ranks_of(logits_of(verdict)))
    assert verdict.probs.equal(probs_of_logits(logits_of(verdict), 0.5))
    probs = verdict.probs.double()
    expected = 1 + (probs * probs.log()).sum(1) / np.log(K)
    torch.testing.assert_close(verdict.confidence.double(), expected, atol=1e-6, rtol=1e-5)
    lengths = [
        len(ranker.prompts.build([1], [4, 5, 6])), len(ranker.prompts.build([2, 3], [7, 8, 9]))
    ]  # fmt: skip
    assert verdict.prompt_tokens == sum(lengths)
    assert verdict.generated_tokens == 0
    assert verdict.seconds > 0
    assert not verdict.agreement.any()


@pytest.mark.parametrize("mode", ["direct", "generate", "cot"])
@pytest.mark.parametrize("window", [None, 2])
def test_no_rows_is_an_empty_verdict(make_ranker: MakeRanker, mode: Any, window: int | None):
    ranker = make_ranker(num_candidates=K, mode=mode, window=window, shuffles=2)
    verdict = ranker.rank([], [], [])
    assert verdict.ranks.shape == verdict.shown_order.shape == (0, K)
    assert (verdict.identifier_logits is None) == (mode == "generate" or window is not None)
    spread = verdict.spread(torch.tensor([], dtype=torch.int64), 4)
    assert spread.decision_state.shape == (4, ranker.backbone.hidden_size)
    assert not spread.valid.any()


def test_spreading_puts_rows_where_they_were_asked(ranker: RankLLM):
    verdict = ranker.rank([[1], [2]], [[4, 5, 6], [7, 8, 9]], [(0,), (1,)])
    spread = verdict.spread(torch.tensor([3, 1]), 5)
    assert spread.valid.tolist() == [False, True, False, True, False]
    assert logits_of(spread)[3].equal(logits_of(verdict)[0])
    assert logits_of(spread)[1].equal(logits_of(verdict)[1])
    assert not spread.decision_state[[0, 2, 4]].any()


def test_a_row_that_is_not_finite_is_counted_and_silenced_alone(make_ranker: MakeRanker):
    ranker = make_ranker(num_candidates=K)
    poisoned, clean = 50, 100
    tokens = set(ranker.prompts.build([], [poisoned] * K)) - set(
        ranker.prompts.build([], [clean] * K)
    )
    embedding = ranker.backbone.model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    with torch.no_grad():
        embedding.weight[list(tokens)] = torch.nan
    verdict = ranker.rank([[], []], [[poisoned, clean, clean], [clean] * K], [(0,), (1,)])
    assert verdict.valid.tolist() == [False, True]
    assert verdict.failures == {"non_finite": 1}
    for name in ("identifier_logits", "ranks", "probs", "decision_state", "confidence"):
        values = getattr(verdict, name)
        assert values.isfinite().all()
        assert not values[0].any()
    # Every candidate is the same item, so only identifiers and places tell them apart.
    assert verdict.ranks[1].sum() == 6


# ---- a planted teacher --------------------------------------------------------------------------


class Planted:
    """In place of `Reader.read`: a teacher who knows how good each item is, and says what it saw.

    Args:
        worth: Score of an item.
        order: Give an order in place of logits.
        failing: Whether a list that holds this item gets no verdict.
    """

    def __init__(
        self, worth: Callable[[int], float], order: bool = False, failing: int | None = None
    ):
        self.worth, self.order, self.failing = worth, order, failing
        self.seen: list[list[Ask]] = []

    def __call__(self, asks: Sequence[Ask], progress: str | None = None) -> list[Look]:
        self.seen.append([(list(history), list(shown)) for history, shown in asks])
        return [self.look(*ask) for ask in asks]

    def look(self, history: Sequence[int], shown: Sequence[int]) -> Look:
        # The state tells which look it is of.
        state = torch.zeros(32)
        state[: len(shown)] = torch.tensor(shown, dtype=torch.float32)
        look = Look(state=state, prompt_tokens=10, generated_tokens=2)
        if self.failing in shown:
            look.failure = "empty"
        logits = torch.tensor([float(self.worth(item)) for item in shown])
        if self.order:
            look.ranks = ranks_of(logits)
        else:
            look.logits = logits
        return look


def plant(ranker: RankLLM, monkeypatch: pytest.MonkeyPatch, **planted: Any) -> Planted:
    teacher = Planted(**{"worth": float, **planted})
    monkeypatch.setattr(ranker.reader, "read", teacher)
    return teacher


@given(st.integers(2, 60), st.data())
def test_windows_cover_every_candidate_and_end_at_the_front(size: int, data: st.DataObject):
    window = data.draw(st.integers(1, size))
    stride = data.draw(st.integers(1, window))
    starts = window_starts(size, window, stride)
    assert starts[0] == size - window or starts == [0]
    assert starts[-1] == 0
    assert starts == sorted(set(starts), reverse=True)
    assert {place for start in starts for place in range(start, start + window)} == set(range(size))


@pytest.mark.parametrize("order", [False, True], ids=["logits", "orders"])
@pytest.mark.parametrize(("window", "stride"), [(4, 2), (4, 1), (4, 3), (4, None), (3, 2), (9, 1)])
def test_the_best_item_is_found_from_any_start(
    make_ranker: MakeRanker, monkeypatch: pytest.MonkeyPatch, window: int, stride: int | None,
    order: bool,
):  # fmt: skip
    size, best = 10, 777
    ranker = make_ranker(num_candidates=size, window=window, stride=stride)
    plant(ranker, monkeypatch, order=order, worth=lambda item: item == best)
    # Wherever the student puts it, and wherever the seed shows it.
    candidates = [[*range(1, 1 + place), best, *range(1 + place, size)] for place in range(size)]
    seeds = [(3, row) for row in range(size)]
    verdict = ranker.rank([[1]] * size, candidates, seeds)
    assert verdict.valid.all()
    assert verdict.ranks.diagonal().tolist() == [1.0] * size
    assert verdict.identifier_logits is None
    # A window gives places and nothing else, so Q is made of these.
    assert verdict.probs.equal(probs_of_ranks(verdict.ranks, ranker.order_temperature))
    assert sorted(verdict.ranks[0].tolist()) == list(range(1, size + 1))
    assert {tuple(sorted(line)) for line in verdict.shown_order.tolist()} == {tuple(range(size))}


def test_a_stride_of_half_a_window_sorts_as_many_at_the_front(
    make_ranker: MakeRanker, monkeypatch: pytest.MonkeyPatch
):
    rows = 50
    ranker = make_ranker(num_candidates=20, window=8)
    plant(ranker, monkeypatch)
    items = [(np.random.default_rng(row).permutation(20) + 1).tolist() for row in range(rows)]
    verdict = ranker.rank([[1]] * rows, items, [(row,) for row in range(rows)])
    for row, ranking in zip(items, verdict.ranking.tolist(), strict=True):
        # A window carries its better half on to the next one.
        assert [row[place] for place in ranking[:4]] == [20, 19, 18, 17]


def test_every_candidate_is_shown_and_no_window_shows_the_order_that_it_found(
    make_ranker: MakeRanker, monkeypatch: pytest.MonkeyPatch
):
    rows, size, window = 400, 6, 4
    ranker = make_ranker(num_candidates=size, window=window, stride=2)
    # A teacher who cannot tell: where he is shown something says nothing of what he thinks.
    teacher = plant(ranker, monkeypatch, worth=lambda item: 0.0)
    candidates = [list(range(1, size + 1))] * rows
    verdict = ranker.rank([[9]] * rows, candidates, [(0, row) for row in range(rows)])
    back, front = teacher.seen
    for row in range(rows):
        shown = [candidates[row][place] for place in verdict.shown_order[row]]
        assert back[row] == ([9], shown[-window:])
        assert set(front[row][1]) >= set(shown[:2])
        assert len(set(front[row][1])) == window
    # Item i is the student's i-th choice. In no place of a prompt is it likelier than in others.
    for asks in (back, front):
        places = np.array([shown for _, shown in asks])
        for place in range(window):
            share = np.bincount(places[:, place], minlength=size + 1)[1:] / rows
            assert abs(share - 1 / size).max() < 4 * (1 / size * (1 - 1 / size) / rows) ** 0.5
    # And none comes out before others on the average.
    assert abs(verdict.ranks.mean(0) - (size + 1) / 2).max() < 0.35


def test_where_the_best_is_put_in_a_later_window_is_chance(
    make_ranker: MakeRanker, monkeypatch: pytest.MonkeyPatch
):
    """Shown in the order that the last window left, the best would always stand at one place."""
    rows, size, window = 400, 6, 4
    ranker = make_ranker(num_candidates=size, window=window, stride=2)
    teacher = plant(ranker, monkeypatch)
    ranker.rank([[9]] * rows, [list(range(1, 7))] * rows, [(1, row) for row in range(rows)])
    _, front = teacher.seen
    of_best = [shown.index(max(shown)) for _, shown in front]
    share = np.bincount(of_best, minlength=window) / rows
    assert abs(share - 1 / window).max() < 4 * (1 / window * (1 - 1 / window) / rows) ** 0.5


def test_the_state_is_that_of_the_last_window(
    make_ranker: MakeRanker, monkeypatch: pytest.MonkeyPatch
):
    ranker = make_ranker(num_candidates=7, window=3, stride=2)
    teacher = plant(ranker, monkeypatch)
    verdict = ranker.rank([[9], [8]], [list(range(1, 8)), list(range(11, 18))], [(0,), (1,)])
    assert len(teacher.seen) == 3
    for state, (_, shown) in zip(verdict.decision_state, teacher.seen[-1], strict=True):
        assert state[:3].tolist() == shown
    assert verdict.prompt_tokens == 2 * 3 * 10
    assert verdict.generated_tokens == 2 * 3 * 2


@pytest.mark.parametrize("shuffles", [1, 2])
def test_a_row_of_which_a_window_fails_is_a_failure(
    make_ranker: MakeRanker, monkeypatch: pytest.MonkeyPatch, shuffles: int
):
    ranker = make_ranker(num_candidates=6, window=4, shuffles=shuffles)
    plant(ranker, monkeypatch, failing=3)
    verdict = ranker.rank([[9], [9]], [list(range(1, 7)), list(range(11, 17))], [(0,), (1,)])
    assert verdict.valid.tolist() == [False, True]
    assert verdict.failures == {"empty": 1}
    assert not verdict.ranks[0].any()
    assert not verdict.probs[0].any()
    assert not verdict.decision_state[0].any()


def test_windows_as_wide_as_the_list_are_one_prompt(
    make_ranker: MakeRanker, ml100k: InteractionData
):
    rows = rows_of(ml100k, 3, 5)
    assert_same(
        make_ranker(num_candidates=5, window=9).rank(*rows),
        make_ranker(num_candidates=5).rank(*rows),
    )


# ---- shuffles -----------------------------------------------------------------------------------


def test_shuffles_are_the_mean_of_single_ones(make_ranker: MakeRanker, ml100k: InteractionData):
    histories, candidates, seeds = rows_of(ml100k, 5, 6)
    verdict = make_ranker(num_candidates=6, shuffles=3).rank(histories, candidates, seeds)
    plain = make_ranker(num_candidates=6)
    single = [
        plain.rank(histories, candidates, more)
        for more in (seeds, [(*seed, 1) for seed in seeds], [(*seed, 2) for seed in seeds])
    ]
    assert not single[0].shown_order.equal(single[1].shown_order)
    assert verdict.shown_order.equal(single[0].shown_order)
    mean = torch.stack([logits_of(one) for one in single]).mean(0)
    torch.testing.assert_close(logits_of(verdict), mean, atol=1e-4, rtol=1e-4)
    assert verdict.ranks.equal(ranks_of(logits_of(verdict)))
    states = torch.stack([one.decision_state for one in single]).mean(0)
    torch.testing.assert_close(verdict.decision_state, states, atol=1e-4, rtol=1e-4)
    agreement = agreement_of(torch.stack([one.ranks for one in single]))
    torch.testing.assert_close(verdict.agreement, agreement)
    assert verdict.agreement.unique().numel() > 1
    assert verdict.prompt_tokens == sum(one.prompt_tokens for one in single)


def test_shuffles_of_orders_are_ranked_by_their_mean_rank(
    make_ranker: MakeRanker, monkeypatch: pytest.MonkeyPatch
):
    ranker = make_ranker(num_candidates=4, shuffles=2, mode="generate")
    looks = iter([ranks_of_order([2, 0], 4), ranks_of_order([0, 1, 2, 3], 4)])

    def read(asks: Sequence[Ask], progress: str | None = None) -> list[Look]:
        return [
            Look(ranks=next(looks), state=torch.ones(32), partial=cause)
            for (_, _), cause in zip(asks, ["truncated", "repeated"], strict=True)
        ]

    monkeypatch.setattr(ranker.reader, "read", read)
    verdict = ranker.rank([[1]], [[4, 5, 6, 7]], [(0,)])
    first, second = (
        np.random.default_rng(seed).permutation(4) for seed in ((0,), (0, 1))
    )  # fmt: skip
    mean = np.zeros(4)
    mean[first] += np.array([2.0, 3.5, 1.0, 3.5]) / 2
    mean[second] += np.array([1.0, 2.0, 3.0, 4.0]) / 2
    assert verdict.ranks[0].tolist() == ranks_of(-torch.tensor(mean)).tolist()
    assert verdict.probs.equal(probs_of_ranks(verdict.ranks, 3.0))
    assert verdict.identifier_logits is None
    # One row, counted once, by what stopped the first of its orders.
    assert verdict.partial == {"truncated": 1}


def test_a_shuffle_that_fails_leaves_the_mean_to_the_others(
    make_ranker: MakeRanker, monkeypatch: pytest.MonkeyPatch
):
    ranker = make_ranker(num_candidates=2, shuffles=2)
    good = torch.tensor([3.0, 1.0])

    def read(asks: Sequence[Ask], progress: str | None = None) -> list[Look]:
        assert len(asks) == 4
        return [
            Look(logits=good, state=torch.full((32,), 5.0)),
            Look(failure="non_finite"),
            Look(failure="out_of_memory"),
            Look(logits=torch.full((2,), torch.nan), state=torch.zeros(32), failure="non_finite"),
        ]

    monkeypatch.setattr(ranker.reader, "read", read)
    verdict = ranker.rank([[1], [1]], [[4, 5], [4, 5]], [(0,), (1,)])
    assert verdict.valid.tolist() == [True, False]
    assert logits_of(verdict)[0].gather(0, verdict.shown_order[0]).equal(good)
    assert verdict.decision_state[0].unique().tolist() == [5.0]
    assert verdict.failures == {"non_finite": 1}
    # One order alone agrees with nothing.
    assert verdict.agreement.tolist() == [0.0, 0.0]
    assert logits_of(verdict)[1].tolist() == [0.0, 0.0]


# ---- orders -------------------------------------------------------------------------------------


def test_orders_that_stop_early_are_kept_tied_and_counted(
    make_ranker: MakeRanker, monkeypatch: pytest.MonkeyPatch
):
    ranker = make_ranker(num_candidates=4, mode="generate", window=None)
    said: list[tuple[list[int], str | None]] = [
        ([3, 1, 0, 2], None), ([3], "truncated"), ([1, 0], "repeated"), ([], "empty"),
        ([2], "truncated"),
    ]  # fmt: skip

    def read(asks: Sequence[Ask], progress: str | None = None) -> list[Look]:
        return [
            Look(ranks=ranks_of_order(order, 4), state=torch.ones(32), partial=cause)
            if order
            else Look(state=torch.ones(32), failure=cause)
            for order, cause in said
        ]

    monkeypatch.setattr(ranker.reader, "read", read)
    verdict = ranker.rank([[1]] * 5, [[4, 5, 6, 7]] * 5, [(0, row) for row in range(5)])
    shown = verdict.ranks.gather(1, verdict.shown_order)
    assert shown.tolist() == [
        [3, 2, 4, 1], [3, 3, 3, 1], [2, 1, 3.5, 3.5], [0, 0, 0, 0], [3, 3, 1, 3]
    ]  # fmt: skip
    assert verdict.valid.tolist() == [True, True, True, False, True]
    assert verdict.partial == Counter(truncated=2, repeated=1)
    assert verdict.failures == {"empty": 1}
    assert verdict.probs.sum(1).tolist() == pytest.approx([1, 1, 1, 0, 1])
    assert verdict.identifier_logits is None
    assert not verdict.decision_state[3].any()


# ---- calibration --------------------------------------------------------------------------------


def biased(make_ranker: MakeRanker, letter: int, **settings: Any) -> RankLLM:
    """One letter pushed by a bias in the output head."""
    ranker = make_ranker(num_candidates=K, **settings)
    head = ranker.backbone.model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features), requires_grad=False)
    head.bias[ranker.prompts.identifiers.first_tokens[letter]] = 50.0
    return ranker


@pytest.mark.parametrize("calibration", ["batch", "content_free"])
def test_calibration_removes_the_bias_of_a_letter_and_nothing_else(
    make_ranker: MakeRanker, ml100k: InteractionData, calibration: Any
):
    plain = make_ranker(num_candidates=K, calibration=calibration)
    pushed = biased(make_ranker, 1, calibration=calibration)
    rows = rows_of(ml100k, 40, K)
    before = pushed.calibrate(*rows)
    shown_first = before.shown_order.gather(1, torch.ones(40, 1, dtype=torch.int64)).flatten()
    assert before.ranking[:, 0].equal(shown_first)
    plain.calibrate(*rows)
    after, calibrated = pushed.rank(*rows), plain.rank(*rows)
    assert after.ranking.equal(calibrated.ranking)
    torch.testing.assert_close(after.decision_state, calibrated.decision_state)
    shown = logits_of(calibrated).gather(1, calibrated.shown_order)
    centred = (shown - shown.mean(1, keepdim=True)).mean(0)
    assert (abs(centred).max() < 1e-5) == (calibration == "batch")
    # Anew, and not on top of the last one.
    bias = plain.identifier_bias.clone()
    plain.calibrate(*rows)
    torch.testing.assert_close(plain.identifier_bias, bias)


def test_content_free_calibration_is_the_mean_over_empty_prompts(
    make_ranker: MakeRanker, ml100k: InteractionData
):
    ranker = make_ranker(num_candidates=K, calibration="content_free", history_length=4)
    ranker.calibrate(*rows_of(ml100k, 3, K))
    prompts = [ranker.prompts.build_content_free(count) for count in (1, 2, 3, 4)]
    looks = ranker.reader.read_prompts(prompts)
    logits = torch.stack([look.logits for look in looks if look.logits is not None])
    assert logits.shape == (4, K)
    expected = (logits - logits.mean(1, keepdim=True)).mean(0)
    torch.testing.assert_close(ranker.identifier_bias, expected)


def test_without_calibration_the_bias_is_seen_and_stays(
    make_ranker: MakeRanker, ml100k: InteractionData
):
    ranker = biased(make_ranker, 2, calibration="none")
    rows = rows_of(ml100k, 10, K)
    verdict = ranker.calibrate(*rows)
    assert not ranker.identifier_bias.any()
    assert_same(ranker.rank(*rows), verdict)
    best = verdict.ranking[:, 0]
    assert best.equal(verdict.shown_order[:, 2])


def test_rows_without_a_verdict_calibrate_nothing(
    make_ranker: MakeRanker, monkeypatch: pytest.MonkeyPatch
):
    ranker = make_ranker(num_candidates=2)

    def read(asks: Sequence[Ask], progress: str | None = None) -> list[Look]:
        bad = Look(logits=torch.tensor([torch.nan, 9.0]), failure="non_finite")
        good = Look(logits=torch.tensor([3.0, 1.0]), state=torch.zeros(32))
        return [bad, good][: len(asks)]

    monkeypatch.setattr(ranker.reader, "read", read)
    ranker.calibrate([[1], [1]], [[4, 5], [4, 5]], [(0,), (1,)])
    assert ranker.identifier_bias.tolist() == [1.0, -1.0]
    ranker.calibrate([[1]], [[4, 5]], [(0,)])
    assert ranker.identifier_bias.tolist() == [0.0, 0.0]


def test_a_teacher_who_writes_orders_has_no_bias_to_remove(
    make_ranker: MakeRanker, ml100k: InteractionData
):
    ranker = make_ranker(num_candidates=K, mode="generate")
    ranker.calibrate(*rows_of(ml100k, 3, K))
    assert not ranker.identifier_bias.any()


def test_calibration_with_windows_counts_every_window(
    make_ranker: MakeRanker, monkeypatch: pytest.MonkeyPatch
):
    ranker = make_ranker(num_candidates=6, window=3, stride=2)

    def read(asks: Sequence[Ask], progress: str | None = None) -> list[Look]:
        return [Look(logits=torch.tensor([4.0, 0.0, 2.0]), state=torch.zeros(32)) for _ in asks]

    monkeypatch.setattr(ranker.reader, "read", read)
    ranker.calibrate([[1]], [list(range(1, 7))], [(0,)])
    assert ranker.identifier_bias.tolist() == [2.0, -2.0, 0.0]


# ---- items --------------------------------------------------------------------------------------


def test_item_embeddings_are_mean_states_of_title_and_categories_one_by_one(
    make_ranker: MakeRanker, ml100k: InteractionData
):
    # A small budget, so that texts of unlike length share a pass with padding, and many passes.
    ranker = make_ranker(num_candidates=K, batch_tokens=500)
    vectors = ranker.embed_items()
    assert vectors.shape == (ml100k.num_items, 32)
    assert vectors.dtype == torch.float32
    catalog, backbone = ml100k.catalog, ranker.backbone
    for item in (1, 2, 3, 500, 1000):  # none is cut to its first 16 tokens
        ids = ranker.prompts.item_tokens()[item - 1]
        text = f" {catalog.title(item)} | {', '.join(catalog.categories[item].split('|'))}"
        assert backbone.tokenizer.decode(ids) == text
        output = backbone.model(torch.tensor([ids]), output_hidden_states=True)
        plain = output.hidden_states[-1][0].mean(0)
        torch.testing.assert_close(vectors[item - 1], plain, atol=1e-5, rtol=1e-5)


def test_the_reader_is_asked_for_whole_rows_at_once(
    make_ranker: MakeRanker, ml100k: InteractionData, monkeypatch: pytest.MonkeyPatch
):
    """Shuffles of all rows go in one call, so that micro-batches are full."""
    ranker = make_ranker(num_candidates=K, shuffles=3)
    sizes = []
    read = Reader.read

    def counting(self: Reader, asks: Sequence[Ask], progress: str | None = None) -> list[Look]:
        sizes.append(len(asks))
        return read(self, asks, progress)

    monkeypatch.setattr(Reader, "read", counting)
    ranker.rank(*rows_of(ml100k, 4, K))
    assert sizes == [12]
