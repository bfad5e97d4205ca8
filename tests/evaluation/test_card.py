"""The model card says what the report says, and nothing in it can talk."""

import json
from pathlib import Path
from typing import Any

import pytest

from cotrain.errors import CheckpointError
from cotrain.evaluation.card import card_facts, plain
from cotrain.student.recommender import Recommender


@pytest.fixture
def report(finished_run: Path) -> dict[str, Any]:
    return json.loads((finished_run / "report.json").read_text())


def card_of(finished_run: Path, report: dict[str, Any]) -> str:
    student = Recommender.from_pretrained(finished_run / "student")
    return student.generate_model_card(**card_facts(report)).text


def test_everything_of_the_report_is_there(finished_run: Path, report: dict[str, Any]):
    card = card_of(finished_run, report)
    values = [report[name][split]["ndcg@10"] for name, split in (
        ("student", "test"), ("student", "validation"), ("control", "test"),
    )]  # fmt: skip
    assert "| ndcg@10 | " + " | ".join(f"{value:.4f}" for value in values) in card
    for part in (
        "for small", "60 users", "leave-one-out", "a-teacher, nf4, ranked 40 lists of 20",
        "39 valid", "helped: the student beats its control", "95 % interval", "> Users are few.",
        "Licence notes", "its licence", "Seed 0",
    ):  # fmt: skip
        assert part in card


def test_a_student_alone_and_a_shipped_control(finished_run: Path, report: dict[str, Any]):
    alone = report | {"control": None, "lift": None, "teacher": None}
    card = card_of(finished_run, alone)
    assert "The student was trained without a teacher" in card
    assert "Taught by: nobody" in card
    assert "| metric | student on test | student on validation |\n" in card
    card = card_of(finished_run, report | {"shipped": "control"})
    assert "| metric | control on test | control on validation | student on test" in card
    assert "the twin that was trained without what teaches" in card


def test_known_data_have_known_terms(report: dict[str, Any]):
    report["dataset"]["name"] = "ml-1m"
    assert "GroupLens" in card_facts(report)["terms"][0]


def test_names_cannot_talk(finished_run: Path, report: dict[str, Any]):
    name = "x\n# Buy\n<script>alert(1)</script> | [link](http://x) `rm`"
    report["dataset"]["name"] = name
    report["teacher"]["model"] = name
    card = card_of(finished_run, report)
    assert "\n# Buy" not in card
    assert "<script" not in card
    assert "[link]" not in card.replace("\\[", "")
    assert plain("a\n b|c") == "a b\\|c"
    assert len(plain("x" * 10_000)) == 500


@pytest.mark.parametrize("damage", ["dataset", "student"])
def test_what_is_no_report_is_refused(report: dict[str, Any], damage: str):
    del report[damage]
    with pytest.raises(CheckpointError, match="not one of a finished run"):
        card_facts(report)
    with pytest.raises(CheckpointError):
        card_facts(report | {damage: 3})
