"""What is counted of the teacher, on a case worked out by hand."""

from collections import Counter

import numpy as np
import pytest
import torch

from cotrain.data.batches import SequenceBatch
from cotrain.data.packing import pack
from cotrain.distill.losses import entropy
from cotrain.distill.meters import TeacherMeter
from cotrain.student.retrieval import Candidates
from cotrain.teacher.ranker import TeacherVerdict


def observed() -> TeacherMeter:
    """Four rows: two valid, one failed, one that did not ask."""
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0] * 3, [0.0] * 3])
    valid = torch.tensor([True, True, False, False])
    verdict = TeacherVerdict(
        identifier_logits=logits,
        ranking=logits.argsort(dim=1, descending=True, stable=True) * valid[:, None],
        decision_state=torch.ones(4, 2),
        valid=valid,
        confidence=torch.tensor([0.5, 0.3, 0.0, 0.0]),
        shown_order=torch.tensor([[2, 0, 1], [0, 1, 2], [1, 0, 2], [0, 0, 0]]),
        failures=Counter(non_finite=1),
        prompt_tokens=300,
        seconds=2.0,
    )
    candidates = Candidates(
        item_ids=torch.tensor([[5, 6, 7], [8, 9, 4], [1, 2, 3], [1, 2, 3]]),
        scores=torch.zeros(4, 3),
        target_rank=torch.tensor([3, 0, 2, 1]),
    )
    batch = SequenceBatch(
        user_index=torch.arange(4),
        sequences=pack([np.array([1])] * 4),
        target_ids=torch.tensor([7, 3, 2, 1]),
        cut=torch.arange(4),
        history=torch.tensor([[0, 9], [1, 2], [3, 4], [5, 6]]),
    )
    meter = TeacherMeter(3)
    asked = torch.tensor([True, True, True, False])
    meter.observe(batch, candidates, verdict, asked, torch.softmax(logits, 1))
    return meter


def test_counts_rates_and_means():
    report = observed().as_report()
    assert (report["rows_asked"], report["rows_valid"]) == (3, 2)
    assert report["failures"] == {"non_finite": 1}
    assert report["rows_per_s"] == pytest.approx(1.5)
    assert report["prompt_tokens_per_s"] == pytest.approx(150)
    assert report["confidence"] == pytest.approx(0.4)
    assert report["target_in_candidates"] == pytest.approx(2 / 3)
    both = entropy(torch.softmax(torch.tensor([[3.0, 1, 2], [0, 1, 2]]), 1))
    assert report["identifier_entropy"] == pytest.approx(both.mean().item())
    # Teacher's ranks are 1 3 2 and 3 2 1; Spearman with 1 2 3 is 1/2 and -1.
    assert report["agreement"] == pytest.approx(-0.25)


def test_position_bias_is_by_the_letter_and_not_by_the_candidate():
    report = observed().as_report()
    # Row 0 shows candidates 2, 0, 1 of ranks 2, 1, 3; row 1 shows 0, 1, 2 of ranks 3, 2, 1.
    assert report["mean_rank_by_shown_position"] == [2.5, 1.5, 2.0]
    assert report["choice_share_by_shown_position"] == [0, 0.5, 0.5]


def test_the_true_item_is_placed_only_where_a_valid_verdict_holds_it():
    placing = observed().as_report()["target_placing"]
    assert placing["rows"] == 1
    assert placing["teacher"] == pytest.approx(1 / 2)
    assert placing["student"] == pytest.approx(1 / 3)
    assert placing["random"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_state_survives_a_checkpoint_and_processes_add_up():
    meter, restored = observed(), TeacherMeter(3)
    restored.load_state_dict(meter.state_dict())
    assert restored.as_report() == meter.as_report()
    merged = TeacherMeter(3).merge([meter.state_dict(), meter.state_dict()]).as_report()
    assert merged["rows_asked"] == 6
    # Two processes work at the same time: twice the rows in the same seconds.
    assert merged["rows_per_s"] == pytest.approx(3.0)
    for key in ("agreement", "mean_rank_by_shown_position", "target_placing"):
        expected = meter.as_report()[key]
        if key == "target_placing":
            expected["rows"] = 2
        assert merged[key] == expected


def test_a_meter_that_saw_nothing_reports_zeros():
    report = TeacherMeter(3).as_report()
    assert report["rows_asked"] == 0
    assert report["rows_per_s"] == 0
