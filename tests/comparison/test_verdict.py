"""The answer in words: each standing, each headline, what a few runs cannot tell."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotrain.comparison.statistics import difference, holm
from cotrain.comparison.verdict import STANDINGS, standing, verdict

Interval = tuple[float, float]
ABOVE, BELOW, AROUND = (0.001, 0.049), (-0.049, -0.001), (-0.02, 0.03)


def against(
    over_users: Interval,
    seeds: Interval | None = None,
    p: float = 0.01,
    count: int = 3,
    **parts: Any,
) -> dict[str, Any]:
    """A difference with these intervals over users and over seeds."""
    middle = sum(over_users) / 2
    spread = (over_users[1] - over_users[0]) / 4
    by_seed = {seed: middle + spread * (seed - (count - 1) / 2) for seed in range(count)}
    return {
        "absolute": middle, "relative": middle / 0.1, "ci95": list(over_users), "p_value": p,
        "p_holm": p, "users": 6000, "over_seeds": {"by_seed": by_seed, "ci95": seeds}, **parts,
    }  # fmt: skip


# One difference of each standing.
OF = {
    "better": against(ABOVE, ABOVE),
    "better_here": against(ABOVE, AROUND),
    "open": against(AROUND, AROUND, 0.4),
    "worse_here": against(BELOW, AROUND),
    "worse": against(BELOW, BELOW),
}


def result(chosen: str | None = None, **arms: dict[str, Any]) -> dict[str, Any]:
    """A comparison of these arms to ce; without a word, the first is the best on validation."""
    of_arms: dict[str, Any] = {"ce": {"against_baseline": None, "test": {"ndcg@10": {"mean": 0.1}}}}
    for name, found in arms.items():
        of_arms[name] = {"against_baseline": {"ndcg@10": found}}
    return {
        "baseline": "ce", "metric": "ndcg@10", "arms": of_arms, "failed": [], "added": [],
        "chosen": chosen or next(iter(arms), None), "equal_terms": {"early": 0, "differ": 0},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("users", "words"),
    [
        (ABOVE, "live beats asking once"), (BELOW, "live is behind asking once"),
        (AROUND, "live cannot be told apart from asking once"),
    ],
)  # fmt: skip
def test_live_and_once_are_told_apart_in_a_sentence(users: Interval, words: str):
    found = result(ranking=OF["better"], offline=OF["open"])
    assert len(verdict(found).findings) == 2
    rows = {"live": 1200.0, "offline": 1200.0}
    found["live_offline"] = against(users, AROUND) | {"rows": rows}
    sentence = verdict(found).findings[-1]
    assert words in sentence
    assert sentence.endswith("with 1,200 and 1,200 rows.")


def test_what_fewer_rows_keep_is_said():
    found = result(ranking=OF["better"], fewer=OF["open"])
    found["arms"]["fewer"]["frugal"] = against(AROUND) | {"of": "ranking", "rows": 0.2, "kept": 0.9}
    expected = (
        "fewer asks 20 % of the rows of ranking and keeps 90 % of what that gains: +0.0050 to it, "
        "over users −0.0200 to +0.0300."
    )
    assert verdict(found).findings[-1] == expected
    found["arms"]["fewer"]["frugal"] |= {"kept": None, "over_seeds": {"ci95": AROUND}}
    expected = (
        "fewer asks 20 % of the rows of ranking: +0.0050 to it, over users −0.0200 to +0.0300, "
        "over seeds −0.0200 to +0.0300."
    )
    assert verdict(found).findings[-1] == expected


@pytest.mark.parametrize(
    ("users", "seeds", "p", "expected"),
    [
        (ABOVE, ABOVE, 0.01, "better"),
        (BELOW, BELOW, 0.01, "worse"),
        # the seeds do not agree
        (ABOVE, AROUND, 0.01, "better_here"),
        (ABOVE, (0.0, 0.05), 0.01, "better_here"),
        (ABOVE, BELOW, 0.01, "better_here"),
        (BELOW, AROUND, 0.01, "worse_here"),
        (BELOW, (-0.05, 0.0), 0.01, "worse_here"),
        # one seed
        (ABOVE, None, 0.0001, "better_here"),
        (BELOW, None, 0.0001, "worse_here"),
        # an interval that holds zero, be it at its end
        (AROUND, ABOVE, 0.01, "open"),
        ((0.0, 0.05), ABOVE, 0.01, "open"),
        ((-0.05, 0.0), BELOW, 0.01, "open"),
        # the correction for several arms takes it back
        (ABOVE, ABOVE, 0.05, "open"),
        (BELOW, BELOW, 0.3, "open"),
    ],
)
def test_standings(users, seeds, p, expected):
    assert standing(against(users, seeds, p)) == expected


def test_a_difference_is_judged_by_the_corrected_p_value():
    assert standing({**against(ABOVE, ABOVE), "p_value": 0.02, "p_holm": 0.06}) == "open"


@pytest.mark.parametrize(
    ("of", "tone", "headline"),
    [
        ("better", "good", "rdr, the best on validation, beats ce on test"),
        (
            "better_here",
            "neutral",
            "rdr, the best on validation, is ahead of ce on test with the seeds that were run; "
            "whether it is with others stays open",
        ),
        ("open", "neutral", "rdr, the best on validation, cannot be told apart from ce on test"),
        (
            "worse_here",
            "bad",
            "rdr, the best on validation, is behind ce on test with the seeds that were run",
        ),
        ("worse", "bad", "rdr, the best on validation, is worse than ce on test"),
    ],
)
def test_the_headline_is_about_the_best_on_validation(of, tone, headline):
    # What another arm did on test does not matter to it.
    for other in OF.values():
        found = verdict(result("rdr", full=other, rdr=OF[of]))
        assert (found.tone, found.headline) == (tone, headline)


def test_no_arm_is_credited_that_validation_did_not_choose():
    for name in ("better_here", "open", "worse_here", "worse"):
        found = verdict(result("ce", rdr=OF[name]))
        assert found.headline == "On validation, no arm is ahead of ce"
        assert found.tone == "neutral"
    found = verdict(result("ce", rdr=OF["better"], full=OF["better"], logit_kd=OF["open"]))
    assert found.tone == "neutral"
    assert found.headline == (
        "Validation prefers ce, though on test rdr and full did better: chosen honestly, nothing "
        "was gained"
    )


def test_each_arm_is_a_sentence_with_its_numbers():
    found = verdict(result(None, **OF))
    assert found.measure == (
        "Differences in NDCG@10 on test to ce, with 95 % intervals, p corrected for 5 arms (Holm):"
    )
    assert found.findings[0] == (
        "better is better than ce: +0.0250 (+25.0 %), over users +0.0010 to +0.0490, p = 0.010; "
        "over seeds +0.0010 to +0.0490, single ones +0.0130 to +0.0370."
    )
    words = (
        "better is better than ce: +",
        "better_here is ahead of ce with these seeds, and perhaps only with these: +",
        "open cannot be told apart from ce: +",
        "worse_here is behind ce with these seeds, and perhaps only with these: −",
        "worse is worse than ce: −",
    )
    assert [line[: len(start)] for line, start in zip(found.findings, words, strict=True)] == [
        *words
    ]


def test_one_seed_is_said_to_be_one():
    once = against(ABOVE, None, 0.0001, count=1)
    found = verdict(result(rdr=once, full=OF["better"]))
    assert found.findings[0].endswith("over users +0.0010 to +0.0490, p < 0.001; one seed.")
    assert any(line.startswith("With one seed (rdr), what teaching") for line in found.limits)
    alone = verdict(result(rdr=once))
    assert "Holm" not in alone.measure
    assert not any("their interval is wide" in line for line in alone.limits)


def test_without_a_hit_of_the_baseline_there_is_no_percentage():
    made = result(rdr=against(ABOVE, ABOVE, relative=None))
    made["arms"]["ce"]["test"]["ndcg@10"]["mean"] = 0.0
    found = verdict(made)
    assert " %" not in found.findings[0]
    assert any(line.startswith("With these users, differences below") for line in found.limits)
    assert not any("% of ce" in line for line in found.limits)


def test_limits_follow_from_how_much_was_run():
    few = verdict(result(rdr=against(ABOVE, ABOVE, users=943, count=3))).limits
    assert any(line.startswith("3 seeds: their interval is wide") for line in few)
    assert any(line.startswith("943 test users are few") for line in few)
    # half of the widest interval, of 0.1
    assert any("differences below about 0.0240, 24 % of ce's NDCG@10, cannot" in x for x in few)
    many = verdict(result(rdr=against(ABOVE, ABOVE, users=5000, count=5))).limits
    assert not any("seed" in line or "are few" in line for line in many)
    # of arms with different numbers of seeds, the fewest
    mixed = verdict(result(rdr=OF["better"], full=against(ABOVE, ABOVE, count=2))).limits
    assert any(line.startswith("2 seeds:") for line in mixed)
    # nothing lifts this one
    assert all(any("none was tuned for it" in x for x in lines) for lines in (few, many, mixed))


def test_what_makes_a_comparison_unfair_is_said():
    made = result(rdr=OF["better"])
    fair = verdict(made).limits
    made |= {"equal_terms": {"early": 1, "differ": 2}, "added": ["arm rdr", "seed 3"]}
    lines = verdict(made).limits[len(fair) :]
    assert lines[0].startswith("In one run, ce was best before the epoch in which the others")
    assert lines[1].startswith("In 2 runs, a twin trained on cross-entropy alone ranks test items")
    assert lines[2].startswith("Added after results had been seen: arm rdr, seed 3. p-values")
    assert len(lines) == 3


def test_failed_runs_are_named_first():
    made = result(rdr=OF["better"])
    made["failed"] = [{"arm": "rdr", "seed": 2}]
    assert verdict(made).limits[0].startswith("One run failed, missing here: rdr with seed 2. ")
    made["failed"] += [{"arm": "ce", "seed": 0}]
    limits = verdict(made).limits
    assert limits[0].startswith("2 runs failed, missing here: rdr with seed 2, ce with seed 0. ")


def test_where_nothing_can_be_compared_nothing_is_claimed():
    alone = verdict(result())
    assert (alone.tone, alone.headline) == ("neutral", "Nothing can be compared")
    assert alone.limits == ["There is one arm only."]
    made = result()
    made["arms"]["rdr"] = {"against_baseline": None}
    made["failed"] = [{"arm": "ce", "seed": 0}]
    lost = verdict(made)
    assert (lost.headline, lost.findings) == ("Nothing can be compared", [])
    assert lost.limits[0].startswith("One run failed, missing here: ce with seed 0")


bounds = st.floats(-1, 1)
intervals = st.tuples(bounds, bounds).map(lambda ends: (min(ends), max(ends)))


@given(intervals, st.none() | intervals, st.floats(0, 1), st.floats(0, 1))
def test_no_claim_goes_beyond_its_numbers(users, seeds, p_value, p_holm):
    made = against(users, seeds, p_value) | {"p_holm": p_holm}
    found = verdict(result(rdr=made))
    text = f"{found.headline}. {found.findings[0]}"
    if any(word in text for word in ("beats", "is better", "is worse", "ahead", "behind")):
        assert p_holm < 0.05
        assert users[0] > 0 or users[1] < 0
    if any(word in text for word in ("beats", "is better")):
        assert users[0] > 0
        assert seeds is not None
        assert seeds[0] > 0
    if "is worse" in text:
        assert users[1] < 0
        assert seeds is not None
        assert seeds[1] < 0
    assert (found.tone == "good") == ("beats" in text)


def test_chance_is_seldom_taken_for_a_difference():
    """Arms that differ by nothing but seed and users: one of two is called better or worse in at
    most one comparison of twenty."""
    rng, alarms, trials = np.random.default_rng(0), 0, 300
    for trial in range(trials):
        users = rng.random(80)

        def arm(users: np.ndarray = users) -> dict[int, np.ndarray]:
            return {
                seed: users + 0.02 * rng.normal() + 0.3 * rng.normal(size=len(users))
                for seed in range(3)
            }

        baseline = arm()
        found = [difference(arm(), baseline, 200, trial) for _ in range(2)]
        raised = holm([one.users.p_value for one in found if one is not None])
        standings = {
            standing({**one.users.as_dict(), "p_holm": p, "over_seeds": asdict(one.seeds)})
            for one, p in zip(found, raised, strict=True)
            if one is not None
        }
        alarms += bool(standings & {"better", "worse"})
    assert alarms / trials <= 0.05


def test_every_standing_has_a_word():
    assert list(STANDINGS) == ["better", "better_here", "open", "worse_here", "worse"]
    assert {standing(found) for found in OF.values()} == set(STANDINGS)
