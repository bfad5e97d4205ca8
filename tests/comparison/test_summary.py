"""Arms told apart by ranks made by hand: differences, Holm, slices, equal terms, what is chosen."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cotrain.comparison.arms import Plan
from cotrain.comparison.results import RunResult
from cotrain.comparison.runs import Failure
from cotrain.comparison.summary import summarise
from cotrain.data.interactions import InteractionData
from cotrain.evaluation.metrics import metrics_from_ranks
from cotrain.evaluation.report import json_ready
from cotrain.evaluation.slices import slices_of

USERS = 60
Summarise = Callable[..., dict[str, Any]]


def hits(count: int, first: int = 0) -> np.ndarray:
    """Ranks 1 for so many users, 20 for the others: NDCG@10 and recall@10 are count / 60."""
    ranks = np.full(USERS, 20)
    ranks[first : first + count] = 1
    return ranks


def student(validation: float, test: np.ndarray, best_epoch: int = 38) -> dict[str, Any]:
    """The part of a report, with this NDCG@10 on validation."""
    scores = metrics_from_ranks(test)
    return {
        "test": scores,
        "validation": {**scores, "ndcg@10": validation},
        "best_epoch": best_epoch,
    }


@pytest.fixture
def summed(plan, run_result, data: InteractionData) -> Summarise:
    """Sums up runs that are given as {(arm, seed): ranks, or what `run_result` takes}."""

    def do(runs: dict[tuple[str, int], Any], failures=(), added=(), seeds: int = 2):
        made: Plan = plan("ce,logit_kd,decision_state", seeds)
        results: list[RunResult] = []
        for run in made.runs:
            if (run.arm, run.seed) in runs:
                given = runs[run.arm, run.seed]
                given = {**given} if isinstance(given, dict) else {"ranks": given}
                twin_epoch = given.pop("twin_epoch", 5)
                results.append(run_result(run, **given))
                if results[-1].control_ranks is not None:
                    results[-1].report["control"]["best_epoch"] = twin_epoch
        return summarise(made, results, failures, data, added)

    return do


def test_differences_to_the_baseline_by_hand(summed: Summarise):
    found = summed(
        {
            ("ce", 0): hits(30), ("logit_kd", 0): hits(45), ("decision_state", 0): hits(30),
            ("ce", 1): hits(30), ("logit_kd", 1): hits(30), ("decision_state", 1): hits(24),
        }
    )  # fmt: skip
    arms = found["arms"]
    assert arms["ce"]["against_baseline"] is None
    assert arms["ce"]["test"]["ndcg@10"]["by_seed"] == {0: 0.5, 1: 0.5}
    better, worse = (arms[name]["against_baseline"] for name in ("logit_kd", "decision_state"))
    # 15 of 60 users with one seed of two
    assert better["ndcg@10"]["absolute"] == pytest.approx(1 / 8)
    assert better["ndcg@10"]["relative"] == pytest.approx(1 / 4)
    assert better["ndcg@10"]["over_seeds"]["by_seed"] == pytest.approx({0: 1 / 4, 1: 0})
    assert better["ndcg@10"]["users"] == USERS
    # from 1/20 to 1
    assert better["mrr"]["absolute"] == pytest.approx(19 / 20 / 8)
    assert worse["recall@10"]["absolute"] == pytest.approx(-1 / 20)
    # 15 users of 60 gain 1/2 each: a mean of binomial draws, sd √(60 · 1/4 · 3/4) / 60 / 2
    low, high = better["ndcg@10"]["ci95"]
    assert high - low == pytest.approx(2 * 1.96 * (60 * 3 / 16) ** 0.5 / 60 / 2, rel=0.15)


def test_a_point_costs_what_was_asked_for_it(summed: Summarise):
    asked = {"rows_asked": 100, "seconds": 8.0}
    found = summed(
        {
            ("ce", 0): hits(30), ("ce", 1): hits(30),
            ("logit_kd", 0): {"ranks": hits(33), "teacher": asked},
            ("logit_kd", 1): {"ranks": hits(33), "teacher": asked},
            ("decision_state", 0): {"ranks": hits(24), "teacher": asked},
        }
    )["arms"]  # fmt: skip
    # 3 of 60 users: .05 in NDCG@10, which are 50 times .001.
    assert found["logit_kd"]["per_point"] == pytest.approx({"rows": 2, "seconds": 0.16})
    assert found["decision_state"]["per_point"] is found["ce"]["per_point"] is None


def test_asking_live_and_once_are_compared_with_each_other(plan, run_result, data: InteractionData):
    made = plan("ce,ranking,offline", 2)
    ranks = {"ce": hits(30), "ranking": hits(36), "offline": hits(33)}
    asked = {"rows_asked": 90, "seconds": 1.0}
    results = [run_result(run, ranks[run.arm], teacher=asked) for run in made.runs]
    found = summarise(made, results, [], data, [])["live_offline"]
    assert found["absolute"] == pytest.approx(3 / 60)
    assert found["over_seeds"]["by_seed"] == pytest.approx({0: 3 / 60, 1: 3 / 60})
    assert found["rows"] == {"live": 90, "offline": 90}
    alone = [one for one in results if one.run.arm != "offline"]
    assert summarise(made, alone, [], data, [])["live_offline"] is None


def test_what_fewer_rows_keep_of_a_gain(plan, run_result, data: InteractionData):
    made = plan("ce,logit_kd,ranking", 1, vary=("query.reuse=4", "distill.lambda_rank=2"))
    ce, kd, ranking, reused, other = made.arms
    of = {ce: (hits(20), 0), kd: (hits(30), 8), ranking: (hits(40), 80), reused: (hits(35), 20),
          other: (hits(40), 10)}  # fmt: skip

    def frugal() -> dict[str, Any]:
        results = [
            run_result(run, of[run.arm][0], teacher={"rows_asked": of[run.arm][1], "seconds": 1.0})
            for run in made.runs
        ]
        arms = summarise(made, results, [], data, [])["arms"]
        return {name: arm["frugal"] for name, arm in arms.items() if arm["frugal"]}

    # Only what differs by query.… alone is held against each other.
    found = frugal()
    assert list(found) == [reused]
    assert (found[reused]["of"], found[reused]["rows"]) == (ranking, 0.25)
    assert found[reused]["kept"] == pytest.approx(15 / 20)
    assert found[reused]["absolute"] == pytest.approx(-5 / 60)
    # Of a gain that may be none, no share is kept.
    of[ranking] = (hits(21), 80)
    assert frugal()[reused]["kept"] is None
    of[reused] = (hits(35), 79)
    assert not frugal()


def test_p_values_are_raised_over_all_arms(summed: Summarise):
    runs = {
        ("ce", 0): hits(30),
        ("logit_kd", 0): hits(33),
        ("decision_state", 0): hits(30),
    }
    arms = summed(runs)["arms"]
    some = arms["logit_kd"]["against_baseline"]["ndcg@10"]
    none = arms["decision_state"]["against_baseline"]["ndcg@10"]
    assert 0.01 < some["p_value"] < 0.3
    assert some["p_holm"] == pytest.approx(2 * some["p_value"])
    assert (none["p_value"], none["p_holm"]) == (1, 1)
    # Only what is judged by is corrected, and only for arms that can be compared.
    assert "p_holm" not in arms["logit_kd"]["against_baseline"]["mrr"]
    del runs["decision_state", 0]
    alone = summed(runs)["arms"]["logit_kd"]["against_baseline"]["ndcg@10"]
    assert alone["p_holm"] == alone["p_value"] == some["p_value"]


def test_each_metric_is_its_mean_and_spread_over_seeds(summed: Summarise):
    found = summed(
        {
            ("ce", 0): {"ranks": hits(24), "seconds": 10.0},
            ("ce", 1): {"ranks": hits(36), "seconds": 30.0},
            ("logit_kd", 0): {"ranks": hits(30), "teacher": {"rows_asked": 100, "seconds": 8.0}},
            ("logit_kd", 1): {
                "ranks": hits(30), "teacher": {"rows_asked": 50, "seconds": 4.0},
                "rationales": {"rows": 12},
            },
        }
    )["arms"]  # fmt: skip
    score = found["ce"]["test"]["recall@10"]
    assert score["mean"] == pytest.approx(0.5)
    assert score["sd"] == pytest.approx(0.2 / 2**0.5)
    assert (found["ce"]["seconds"], found["ce"]["teacher_rows"]) == (20, 0)
    taught = found["logit_kd"]
    assert (taught["teacher_rows"], taught["teacher_seconds"]) == (75, 6)
    assert taught["rationale_rows"] == 6
    assert taught["seeds"] == [0, 1]
    empty = found["decision_state"]
    assert empty["seeds"] == []
    assert empty["test"]["mrr"] is empty["against_baseline"] is empty["seconds"] is None


def test_the_lift_over_an_own_twin_needs_every_run_to_have_one(summed: Summarise):
    runs: dict[tuple[str, int], Any] = {
        ("ce", 0): hits(30),
        ("ce", 1): hits(30),
        ("logit_kd", 0): {"ranks": hits(33), "control": hits(30)},
        ("logit_kd", 1): {"ranks": hits(30), "control": hits(36)},
        ("decision_state", 0): {"ranks": hits(33), "control": hits(30)},
        ("decision_state", 1): hits(30),
    }
    arms = summed(runs)["arms"]
    assert arms["ce"]["over_own_twin"] is arms["decision_state"]["over_own_twin"] is None
    lift = arms["logit_kd"]["over_own_twin"]["ndcg@10"]
    assert lift["by_seed"] == pytest.approx({0: 1 / 20, 1: -1 / 10})
    assert lift["mean"] == pytest.approx(-1 / 40)


def test_the_best_is_chosen_on_validation_and_not_on_test(summed: Summarise):
    def runs(*validation: float):
        tested = {"ce": hits(30), "logit_kd": hits(20), "decision_state": hits(60)}
        return {
            (name, 0): {"ranks": ranks, "student": student(score, ranks)}
            for (name, ranks), score in zip(tested.items(), validation, strict=True)
        }

    assert summed(runs(0.2, 0.3, 0.25))["chosen"] == "logit_kd"
    assert summed(runs(0.3, 0.2, 0.25))["chosen"] == "ce"
    # Who is not ahead of the baseline is not chosen over it.
    assert summed(runs(0.3, 0.3, 0.25))["chosen"] == "ce"


def test_arms_are_chosen_among_by_the_seeds_that_they_share_with_the_baseline(summed: Summarise):
    def run(score: float):
        return {"ranks": hits(30), "student": student(score, hits(30))}

    runs = {
        # a hard seed and an easy one
        ("ce", 0): run(0.1), ("ce", 1): run(0.5),
        ("logit_kd", 0): run(0.12), ("logit_kd", 1): run(0.52),
        # the mean of what is there would be the highest
        ("decision_state", 1): run(0.49),
    }  # fmt: skip
    found = summed(runs)
    assert found["chosen"] == "logit_kd"
    assert found["arms"]["decision_state"]["against_baseline"]["mrr"]["over_seeds"]["by_seed"] == {
        1: 0
    }
    # One whose seeds the baseline lacks cannot be judged, however good it is.
    runs["decision_state", 0] = run(0.9)
    del runs["ce", 0], runs["decision_state", 1]
    found = summed(runs)
    assert found["chosen"] == "logit_kd"
    assert found["arms"]["decision_state"]["against_baseline"] is None


def test_twins_are_held_against_the_baseline_of_their_seed(summed: Summarise):
    def alone(best_epoch: int, test: np.ndarray):
        return {"ranks": test, "student": student(0.5, test, best_epoch)}

    def taught(best_epoch: int, twin: np.ndarray):
        return {"ranks": hits(33), "control": twin, "twin_epoch": best_epoch}

    runs = {
        # the warm-up has 35 epochs
        ("ce", 0): alone(36, hits(30)), ("ce", 1): alone(35, hits(31)),
        ("logit_kd", 0): taught(36, hits(30)),
        # the baseline of another seed is not its own
        ("logit_kd", 1): taught(35, hits(30)),
        ("decision_state", 0): taught(38, hits(31)),
        # one that has no twin
        ("decision_state", 1): hits(31),
        # one whose seed the baseline lacks
        ("logit_kd", 2): taught(36, hits(30)),
    }  # fmt: skip
    assert summed(runs, seeds=3)["equal_terms"] == {
        "twins": 3, "same": 1, "differ": 1, "other_epoch": 1, "early": 1
    }  # fmt: skip


def test_slices_hold_the_users_that_belong_to_them(summed: Summarise, data: InteractionData):
    groups = slices_of(data, "test")
    inside = groups[0].members
    gained = np.where(inside, 1, 20)
    found = summed(
        {
            ("ce", 0): hits(0), ("ce", 1): hits(0),
            ("logit_kd", 0): gained, ("logit_kd", 1): hits(0),
        }
    )  # fmt: skip
    rows = found["slices"]
    assert [(row["view"], row["label"]) for row in rows] == [(g.view, g.label) for g in groups]
    for view in {row["view"] for row in rows}:
        of_view = [row for row in rows if row["view"] == view]
        assert sum(row["users"] for row in of_view) == USERS
        assert sum(row["share"] for row in of_view) == pytest.approx(1)
        whole = sum(row["share"] * row["arms"]["logit_kd"]["mean"] for row in of_view)
        assert whole == pytest.approx(found["arms"]["logit_kd"]["test"]["ndcg@10"]["mean"])
    for row, group in zip(rows, groups, strict=True):
        # with one seed of two
        expected = (group.members & inside).sum() / group.members.sum() / 2
        against = row["arms"]["logit_kd"]["against_baseline"]
        assert against["absolute"] == pytest.approx(expected)
        assert row["arms"]["ce"] == {"mean": 0.0, "against_baseline": None}
        assert "decision_state" not in row["arms"]


def test_without_a_baseline_nothing_is_compared(summed: Summarise):
    failure = Failure("ce", 0, "exit code 1", "ce/seed-0.log", "the end")
    found = summed({("logit_kd", 0): hits(30), ("decision_state", 0): hits(33)}, [failure], seeds=1)
    assert found["chosen"] is None
    assert all(arm["against_baseline"] is None for arm in found["arms"].values())
    assert found["failed"] == [
        {"arm": "ce", "seed": 0, "how": "exit code 1", "log": "ce/seed-0.log", "tail": "the end"}
    ]
    assert found["slices"][0]["arms"]["logit_kd"]["against_baseline"] is None


def test_nothing_at_all_can_be_summed_up(summed: Summarise):
    found = summed({})
    assert found["chosen"] is found["dataset"] is found["environment"] is None
    assert found["runs"] == []


def test_what_is_kept_can_be_repeated_and_read_by_programs(summed: Summarise):
    runs = {("ce", 0): hits(30), ("logit_kd", 0): {"ranks": hits(33), "control": hits(30)}}
    runs["logit_kd", 0] |= {"warnings": ["Look here."], "effective_rank": {"collapsed": True}}
    found = json.loads(json.dumps(json_ready(summed(runs, added=["seed 1"])), allow_nan=False))
    assert found["seeds"] == [0, 1]
    assert found["added"] == ["seed 1"]
    assert found["settings"]["teacher"]["model"] == "some-teacher"
    assert not {"seed", "output_dir"} & set(found["settings"])
    assert found["arms"]["ce"]["settings"]["teacher.model"] is None
    first, second = found["runs"]
    assert (first["arm"], first["seed"], first["folder"]) == ("ce", 0, "ce/seed-0")
    assert (first["lift"], first["teacher_rows"], first["collapsed"]) == (None, 0, False)
    assert second["lift"]["ndcg@10"]["absolute"] == pytest.approx(1 / 20)
    assert (second["warnings"], second["collapsed"]) == (["Look here."], True)
    assert second["validation"]["recall@10"] == pytest.approx(33 / 60)
