"""What is counted of the teacher, on a case worked out by hand."""

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cotrain.data.batches import SequenceBatch
from cotrain.data.packing import pack
from cotrain.distill.meters import PositionBias, TeacherMeter, expected_reciprocal
from cotrain.student.retrieval import Candidates
from cotrain.teacher.verdict import TeacherVerdict, entropy, probs_of_logits, ranks_of

LOGITS = torch.tensor([[3.0, 1.0, 2.0], [0.0, 2.0, 2.0], [0.0] * 3, [0.0] * 3])
VALID = torch.tensor([True, True, False, False])


def a_verdict(logits: torch.Tensor = LOGITS, valid: torch.Tensor = VALID) -> TeacherVerdict:
    """Four rows: two valid, of which one breaks off after a tie, one failed, one not asked."""
    return TeacherVerdict(
        identifier_logits=logits,
        ranks=ranks_of(logits) * valid[:, None],
        probs=probs_of_logits(logits, 1.0) * valid[:, None],
        decision_state=torch.ones(4, 2),
        valid=valid,
        confidence=torch.tensor([0.5, 0.3, 0.0, 0.0]),
        agreement=torch.tensor([0.9, 0.6, 0.0, 0.0]),
        shown_order=torch.tensor([[2, 0, 1], [0, 1, 2], [1, 0, 2], [0, 0, 0]]),
        failures=Counter(non_finite=1),
        partial=Counter(truncated=1),
        reasonings=["Likes crime.", "", "", ""],
        prompt_tokens=300,
        generated_tokens=40,
        seconds=2.0,
    )


CANDIDATES = Candidates(
    item_ids=torch.tensor([[5, 6, 7], [8, 9, 4], [1, 2, 3], [1, 2, 3]]),
    scores=torch.zeros(4, 3),
    target_rank=torch.tensor([3, 2, 2, 1]),
)
BATCH = SequenceBatch(
    user_index=torch.arange(4),
    sequences=pack([np.array([1])] * 4),
    target_ids=torch.tensor([7, 9, 2, 1]),
    cut=torch.arange(4),
    history=torch.tensor([[0, 9], [1, 2], [3, 4], [5, 6]]),
    first_target=torch.arange(4),
)
ASKED = torch.tensor([True, True, True, False])


def observed() -> TeacherMeter:
    meter = TeacherMeter(3)
    meter.observe(BATCH, CANDIDATES, a_verdict(), ASKED)
    return meter


def test_counts_rates_and_means():
    report = observed().as_report()
    assert (report["rows_asked"], report["rows_valid"], report["rows_full"]) == (3, 2, 1)
    assert (report["failures"], report["partial"]) == ({"non_finite": 1}, {"truncated": 1})
    assert (report["prompt_tokens"], report["generated_tokens"]) == (300, 40)
    assert report["rows_per_s"] == pytest.approx(1.5)
    assert report["prompt_tokens_per_s"] == pytest.approx(150)
    assert report["confidence"] == pytest.approx(0.4)
    assert report["agreement_of_shuffles"] == pytest.approx(0.75)
    assert report["target_in_candidates"] == pytest.approx(1)
    both = entropy(torch.softmax(LOGITS[:2], 1))
    assert report["entropy"] == pytest.approx(both.mean().item())
    assert report["entropy_uniform"] == pytest.approx(math.log(3))


def test_agreement_with_the_student_counts_ties_as_ties():
    # Ranks 1 3 2 against 1 2 3: Spearman 1/2. Ranks 3 1.5 1.5 have deviations 1, -1/2, -1/2 and
    # against -1, 0, 1 the correlation -3/2 / (sqrt(3/2) sqrt(2)).
    expected = (1 / 2 - math.sqrt(3) / 2) / 2
    assert observed().as_report()["agreement_with_student"] == pytest.approx(expected)


def test_a_teacher_that_ties_everything_agrees_with_nobody_and_favours_no_position():
    meter = TeacherMeter(3)
    meter.observe(BATCH, CANDIDATES, a_verdict(torch.zeros(4, 3)), ASKED)
    report = meter.as_report()
    assert report["agreement_with_student"] == 0
    assert report["mean_rank_by_shown_position"] == [2, 2, 2]
    assert report["choice_share_by_shown_position"] == [0, 0, 0]
    assert report["target_placing"]["teacher"] == pytest.approx(report["target_placing"]["random"])


def test_position_bias_is_by_the_letter_and_not_by_the_candidate():
    report = observed().as_report()
    # Row 0 shows candidates 2, 0, 1 of ranks 2, 1, 3; row 1 shows 0, 1, 2 of ranks 3, 1.5, 1.5,
    # where two tie for the first place and so nobody has it.
    assert report["mean_rank_by_shown_position"] == [2.5, 1.25, 2.25]
    assert report["choice_share_by_shown_position"] == [0, 0.5, 0]


def test_ranks_that_are_means_of_several_rankings_choose_who_is_before_all_others():
    bias = PositionBias(3)
    means = torch.tensor([[4 / 3, 5 / 3, 3.0], [4 / 3, 4 / 3, 10 / 3]])
    two = a_verdict().spread(torch.tensor([0, 1, 2, 3]), 4)
    bias.observe(
        TeacherVerdict(
            identifier_logits=None, ranks=means, probs=two.probs[:2],
            decision_state=two.decision_state[:2], valid=torch.tensor([True, True]),
            confidence=two.confidence[:2], agreement=two.agreement[:2],
            shown_order=torch.tensor([[1, 0, 2], [0, 1, 2]]),
        )
    )  # fmt: skip
    assert bias.as_report()["choice_share_by_shown_position"] == [0, 0.5, 0]


def test_the_bias_before_calibration_is_kept_apart():
    meter = observed()
    assert meter.as_report()["before_calibration"] is None
    meter.observe_calibration(a_verdict(-LOGITS))
    report = meter.as_report()
    assert report["rows_asked"] == 3
    assert report["mean_rank_by_shown_position"] == [2.5, 1.25, 2.25]
    # Shown ranks 2, 3, 1 and 1, 2.5, 2.5.
    assert report["before_calibration"] == {
        "rows": 2,
        "mean_rank_by_shown_position": [1.5, 2.75, 1.75],
        "choice_share_by_shown_position": [0.5, 0, 0.5],
    }


def test_the_true_item_is_placed_only_where_a_valid_verdict_holds_it():
    placing = observed().as_report()["target_placing"]
    assert placing["rows"] == 2
    # Places 2, and 1 or 2.
    assert placing["teacher"] == pytest.approx((1 / 2 + (1 + 1 / 2) / 2) / 2)
    assert placing["student"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert placing["random"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_expected_reciprocal_in_fractions():
    ranks = torch.tensor([[1.0, 2.0, 3.0], [1.5, 1.5, 3.0], [1.0, 2.5, 2.5], [2.0, 2.0, 2.0]])
    torch.testing.assert_close(
        expected_reciprocal(ranks),
        torch.tensor(
            [[1, 1 / 2, 1 / 3], [3 / 4, 3 / 4, 1 / 3], [1, 5 / 12, 5 / 12], [11 / 18] * 3],
            dtype=torch.float64,
        ),
    )


def plain(report: Any) -> Any:
    """With floats to compare up to rounding."""
    if isinstance(report, dict):
        return {key: plain(value) for key, value in report.items()}
    return pytest.approx(report) if isinstance(report, (float, list)) else report


def test_state_survives_a_checkpoint_and_processes_add_up():
    meter, restored = observed(), TeacherMeter(3)
    meter.observe_calibration(a_verdict(-LOGITS))
    restored.load_state_dict(meter.state_dict())
    assert restored.as_report() == meter.as_report()
    assert restored.examples == meter.examples
    one = meter.as_report()
    merged = TeacherMeter(3).merge([meter.state_dict(), meter.state_dict()]).as_report()
    for key in ("rows_asked", "rows_valid", "rows_full", "prompt_tokens", "generated_tokens"):
        assert merged[key] == 2 * one[key]
    assert (merged["failures"], merged["partial"]) == ({"non_finite": 2}, {"truncated": 2})
    # Two processes work at the same time: twice the rows in the same seconds.
    assert merged["rows_per_s"] == pytest.approx(3.0)
    one["target_placing"]["rows"] = 4
    # All processes calibrate on the same rows: counted once.
    means = ("agreement_of_shuffles", "agreement_with_student", "mean_rank_by_shown_position",
             "choice_share_by_shown_position", "before_calibration", "target_placing")  # fmt: skip
    for key in means:
        assert merged[key] == plain(one[key]), key


def test_merging_leaves_the_states_as_they_were():
    states = [observed().state_dict(), observed().state_dict()]
    TeacherMeter(3).merge(states)
    assert states[0]["bias"]["rank_sum"].tolist() == states[1]["bias"]["rank_sum"].tolist()
    assert states[0]["bias"]["rows"] == 2


def test_a_meter_that_saw_nothing_reports_zeros():
    report = TeacherMeter(3).as_report()
    assert report["rows_asked"] == 0
    assert report["rows_per_s"] == 0
    assert report["mean_rank_by_shown_position"] == []
    assert report["before_calibration"] is None


# ---- examples -----------------------------------------------------------------------------------


def prompts(num_shown: int) -> Any:
    """Says what it was asked to build."""
    return SimpleNamespace(
        num_shown=num_shown,
        history_length=1,
        identifiers=SimpleNamespace(texts=("A", "B", "C")[:num_shown]),
        build=lambda history, shown: (history, shown),
        tokenizer=SimpleNamespace(decode=str),
    )


CATALOG: Any = SimpleNamespace(title=lambda item: f"item {item}")


def test_examples_are_of_rows_that_were_prompted():
    meter = TeacherMeter(3)
    scores = torch.zeros(4, 3)
    scores[2, -1] = -math.inf  # too few candidates: counted as asked, but nobody was
    candidates = Candidates(CANDIDATES.item_ids, scores, CANDIDATES.target_rank)
    meter.observe(BATCH, candidates, a_verdict(), ASKED)
    assert [example["user"] for example in meter.examples] == [0, 1]
    for _ in range(4):
        meter.observe(BATCH, candidates, a_verdict(), ASKED)
    assert len(meter.examples) == 5


def test_a_readable_example_says_what_was_shown_ranked_tied_and_written():
    examples = observed().readable_examples(CATALOG, ["u", "v", "w", "x"], prompts(3), 10)
    first, second = examples[:2]
    assert first["user"] == "u"
    assert first["history"] == ["item 9"]
    assert first["shown"] == ["item 7", "item 5", "item 6"]
    assert first["identifiers"] == ["A", "B", "C"]
    assert first["teacher_ranking"] == ["item 5", "item 7", "item 6"]
    assert first["teacher_ranks"] == [1, 2, 3]
    assert first["teacher_probs"] == sorted(first["teacher_probs"], reverse=True)
    assert (first["prompt"], first["reasoning"]) == ("([9], [7, 5, 6])", "Likes crime.")
    assert second["teacher_ranks"] == [1.5, 1.5, 3]
    assert second["reasoning"] == ""
    assert [example["valid"] for example in examples] == [True, True, False]


def test_of_windows_the_first_prompt_is_shown():
    first = observed().readable_examples(CATALOG, ["u"] * 4, prompts(2), 10)[0]
    assert first["prompt"] == "([9], [5, 6])"  # the last of 7, 5, 6
    assert first["identifiers"] == []
