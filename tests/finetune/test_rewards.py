"""What each part of a reward says of a text, and how they are added up."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotrain.finetune import rewards
from cotrain.finetune_settings import RlConfig
from cotrain.rationale.checks import Checks

TITLES = ["", "Heat (1995)", "Fargo (1996)", "Star Wars: A New Hope (1977)", "Red Rock West (1992)"]
CATEGORIES = ["", "Crime", "Film-Noir", "Action", "Western"]
CHECKS = Checks(TITLES, CATEGORIES, min_words=0, max_words=10**9, language=None)


@pytest.mark.parametrize(
    ("scores", "place", "rank"),
    [
        ([3.0, 2.0, 1.0], 0, 1),
        ([3.0, 2.0, 1.0], 2, 3),
        ([2.0, 2.0, 1.0], 0, 2),
        ([1.0, 1.0, 1.0], 1, 3),
        ([math.nan, 2.0, 1.0], 1, 3),
        ([3.0, 2.0, -math.inf], 0, 3),
    ],
)
def test_ties_and_what_is_no_number_count_against_the_true_item(
    scores: list[float], place: int, rank: int
):
    assert rewards.worst_rank(scores, place) == rank


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8), st.data())
def test_a_rank_is_one_of_the_places(scores: list[float], data: st.DataObject):
    place = data.draw(st.integers(0, len(scores) - 1))
    rank = rewards.worst_rank(scores, place)

    assert 1 <= rank <= len(scores)
    assert rank == len(scores) or sorted(scores, reverse=True)[rank - 1] == scores[place]


def test_the_rank_reward_is_its_reciprocal():
    assert [Fraction(rewards.rank_reward(rank)).limit_denominator() for rank in (1, 2, 5)] == [
        Fraction(1), Fraction(1, 2), Fraction(1, 5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "ended", "reward"),
    [
        (" crime films.\nRanking:", True, 1),
        (" crime films.", True, 0),  # ended, but does not go on to the ranking
        (" crime films", False, 0),
        (" films such as [B].\nRanking:", True, 0),
        (" films.\nRanking: Ranking:", True, 0),
        (" films (B).\nRanking: [B", True, 1),  # what stands behind the opening is no reasoning
        (" films [Z].\nRanking:", True, 1),  # no candidate is called so
    ],
)
def test_the_format_is_reasoning_then_one_ranking(text: str, ended: bool, reward: int):
    assert rewards.format_reward(text, "Ranking:", ["A", "B", "C"], ended) == reward


@pytest.mark.parametrize(("ended", "reward"), [(True, 1), (False, 0)])
def test_without_words_to_know_a_ranking_by_any_end_is_one(ended: bool, reward: int):
    assert rewards.format_reward(" crime films.", "", ["A"], ended) == reward
    assert rewards.format_reward(" like [A].", "", ["A"], ended) == 0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("crime stories such as Fargo", 1),
        ("dark films", 1),
        ("", 1),
        ("films like Red Rock West", 0),  # in the catalogue, not in the prompt
        ('films like "The Conversation"', 0),
        ("a Western now and then", 0),  # a category of none that was shown
    ],
)
def test_a_text_is_grounded_in_what_was_shown(text: str, reward: int):
    assert rewards.grounding_reward(text, [1, 2, 3], CHECKS) == reward


def test_the_process_reward_is_the_mean_over_steps():
    assert rewards.process_reward([0.25, 0.75, 0.5]) == 0.5
    assert rewards.process_reward([]) == 0


@pytest.mark.parametrize(
    ("text", "penalty"),
    [
        ("", Fraction(0)),
        ("crime films", Fraction(0)),
        ("likes crime films and dark films", Fraction(0)),
        ("crime films again, Crime films again!", Fraction(1, 4)),
        ("so so so so so", Fraction(2, 3)),
    ],
)
def test_repetition_is_the_share_of_runs_said_before(text: str, penalty: Fraction):
    assert rewards.repetition_penalty(text) == pytest.approx(float(penalty))


@pytest.mark.parametrize(
    ("tokens", "least", "cut_off", "penalty"),
    [(8, 8, False, 0), (20, 8, False, 0), (6, 8, False, 0.25), (0, 8, False, 1), (0, 0, False, 0),
     (96, 8, True, 1), (3, 8, True, 1)],
)  # fmt: skip
def test_length_is_penalised_at_both_ends(tokens: int, least: int, cut_off: bool, penalty: float):
    assert rewards.length_penalty(tokens, least, cut_off) == penalty


def test_parts_are_weighed_and_kept_as_they_are():
    parts = {
        "rank": 0.5, "format": 1.0, "grounding": 1.0, "process": 0.25, "repetition": 0.5,
        "length": 1.0,
    }  # fmt: skip
    settings = RlConfig(
        rank_weight=1.0, format_weight=0.1, grounding_weight=0.2, process_weight=0.4,
        repetition_weight=0.2, length_weight=0.3,
    )  # fmt: skip

    scored = rewards.combined(parts, settings)

    assert scored.reward == pytest.approx(0.5 + 0.1 + 0.2 + 0.1 - 0.1 - 0.3)
    assert scored.parts == parts


def test_a_part_that_nobody_measured_counts_nothing():
    assert rewards.combined({"rank": 1.0}, RlConfig(rank_weight=2.0)).reward == 2.0
