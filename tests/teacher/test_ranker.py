"""Verdicts: independent of batch and shown order, never an exception, never a guess."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cotrain.data.interactions import InteractionData
from cotrain.teacher.backbone import load_backbone
from cotrain.teacher.prompts import PromptBuilder
from cotrain.teacher.ranker import RankLLM, plan_micro_batches

K = 3


@pytest.fixture(scope="module")
def ranker(tiny_teacher: str, ml100k: InteractionData) -> RankLLM:
    return make_ranker(tiny_teacher, ml100k, K)


def make_ranker(teacher: str, data: InteractionData, k: int, batch_tokens: int = 8192) -> RankLLM:
    backbone = load_backbone(teacher, "fp32", torch.device("cpu"))
    prompts = PromptBuilder(
        backbone.tokenizer, data.catalog.titles, data.catalog.categories, num_candidates=k,
        item_noun="movie", history_length=5, max_title_tokens=16, max_context_tokens=2048,
    )  # fmt: skip
    return RankLLM(backbone, prompts, batch_tokens)


@given(st.lists(st.integers(1, 500), max_size=60), st.integers(1, 2000))
def test_micro_batches_partition_the_rows_within_the_budget(lengths: list[int], budget: int):
    groups = plan_micro_batches(lengths, budget)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[row] for row in group) <= budget


def test_the_budget_changes_no_verdict(tiny_teacher: str, ml100k: InteractionData):
    rows = 7
    histories = [ml100k.train_history(user)[: 1 + user].tolist() for user in range(rows)]
    candidates = [list(range(1 + 5 * user, 6 + 5 * user)) for user in range(rows)]
    seeds = [(0, user) for user in range(rows)]
    whole = make_ranker(tiny_teacher, ml100k, 5).rank(histories, candidates, seeds)
    single = make_ranker(tiny_teacher, ml100k, 5, batch_tokens=1).rank(histories, candidates, seeds)
    torch.testing.assert_close(whole.identifier_logits, single.identifier_logits)
    torch.testing.assert_close(whole.decision_state, single.decision_state)
    assert whole.ranking.equal(single.ranking)


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
        expected = reference.identifier_logits[:, list(given_order)]
        assert verdict.identifier_logits.equal(expected)
        best_first = [candidates[place] for place in verdict.ranking[0]]
        assert best_first == [items[place] for place in reference.ranking[0]]
        assert [candidates[place] for place in verdict.shown_order[0]] == items


def test_shown_orders_differ_between_rows_and_favour_no_place(ranker: RankLLM):
    rows = 600
    seeds = [(0, 1, user) for user in range(rows)]
    orders = np.stack([np.random.default_rng(seed).permutation(K) for seed in seeds])
    share = np.stack([(orders == place).mean(0) for place in range(K)])
    assert abs(share - 1 / K).max() < 4 * (1 / K * (1 - 1 / K) / rows) ** 0.5


def test_ranking_confidence_and_counts_follow_from_the_logits(ranker: RankLLM):
    verdict = ranker.rank([[1], [2, 3]], [[4, 5, 6], [7, 8, 9]], [(0,), (1,)])
    assert verdict.valid.all()
    assert not verdict.failures
    for logits, ranking in zip(verdict.identifier_logits, verdict.ranking, strict=True):
        assert ranking.tolist() == sorted(range(K), key=lambda k: -logits[k].item())
    probs = torch.softmax(verdict.identifier_logits.double(), 1)
    expected = 1 + (probs * probs.log()).sum(1) / np.log(K)
    torch.testing.assert_close(verdict.confidence.double(), expected, atol=1e-6, rtol=1e-5)
    prompts = ranker.prompts
    lengths = [len(prompts.build([1], [4, 5, 6])), len(prompts.build([2, 3], [7, 8, 9]))]
    assert verdict.prompt_tokens == sum(lengths)


def test_no_rows_is_an_empty_verdict(ranker: RankLLM):
    verdict = ranker.rank([], [], [])
    assert verdict.identifier_logits.shape == (0, K)
    spread = verdict.spread(torch.tensor([], dtype=torch.int64), 4)
    assert spread.decision_state.shape == (4, ranker.backbone.hidden_size)
    assert not spread.valid.any()


def test_spreading_puts_rows_where_they_were_asked(ranker: RankLLM):
    verdict = ranker.rank([[1], [2]], [[4, 5, 6], [7, 8, 9]], [(0,), (1,)])
    spread = verdict.spread(torch.tensor([3, 1]), 5)
    assert spread.valid.tolist() == [False, True, False, True, False]
    assert spread.identifier_logits[3].equal(verdict.identifier_logits[0])
    assert spread.identifier_logits[1].equal(verdict.identifier_logits[1])
    assert not spread.decision_state[[0, 2, 4]].any()


def test_a_row_that_is_not_finite_is_counted_and_silenced_alone(
    tiny_teacher: str, ml100k: InteractionData
):
    ranker = make_ranker(tiny_teacher, ml100k, K)
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
    assert verdict.identifier_logits.isfinite().all()
    assert verdict.decision_state.isfinite().all()
    assert not verdict.decision_state[0].any()
    assert verdict.confidence[0] == 0


def test_calibration_removes_the_bias_of_a_letter_and_nothing_else(
    tiny_teacher: str, ml100k: InteractionData
):
    # Push one letter by a bias in the output head: calibrated verdicts must not notice.
    plain, biased = (make_ranker(tiny_teacher, ml100k, K) for _ in range(2))
    head = biased.backbone.model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features), requires_grad=False)
    head.bias[biased.prompts.identifier_ids[1]] = 50.0
    draw = np.random.default_rng(0)
    rows = (
        [ml100k.train_history(user)[:4].tolist() for user in range(40)],
        [(draw.choice(ml100k.num_items, K, False) + 1).tolist() for _ in range(40)],
        [(0, row) for row in range(40)],
    )
    before = biased.calibrate(*rows)
    shown_first = before.shown_order.gather(1, torch.ones(40, 1, dtype=torch.int64)).flatten()
    assert before.ranking[:, 0].equal(shown_first)
    plain.calibrate(*rows)
    torch.testing.assert_close(
        biased.rank(*rows).ranking, plain.rank(*rows).ranking, rtol=0, atol=0
    )
    calibrated = plain.rank(*rows)
    shown = calibrated.identifier_logits.gather(1, calibrated.shown_order)
    centred = (shown - shown.mean(1, keepdim=True)).mean(0)
    torch.testing.assert_close(centred, torch.zeros(K), atol=1e-5, rtol=0)


def test_item_embeddings_are_mean_states_of_title_and_categories_one_by_one(
    tiny_teacher: str, ml100k: InteractionData
):
    # A small budget, so that texts of unlike length share a pass with padding, and many passes.
    ranker = make_ranker(tiny_teacher, ml100k, K, batch_tokens=500)
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
