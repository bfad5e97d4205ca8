"""What a finished run says of itself in plain sentences."""

from typing import Any

import pytest

from cotrain.distill.outcome import _teacher_warnings


def report(**teacher: Any) -> dict[str, Any]:
    """A run about which there is nothing to warn, but for what is given."""
    return {
        "teacher": {
            "rows_asked": 100,
            "rows_valid": 100,
            "rows_full": 100,
            "partial": {},
            "failures": {},
            "backoffs": [],
            "audits": [],
            "confidence": 0.5,
            "entropy": 1.5,
            "entropy_uniform": 3.0,
            "target_placing": {"rows": 0, "teacher": 0.0, "student": 0.0, "random": 0.18},
            **teacher,
        },
        "effective_rank": {"collapsed": False},
    }


def backoff(before: int, after: int) -> dict[str, int]:
    return {"process": 0, "from_tokens": before, "to_tokens": after, "rows": 4, "longest": 400}


def audited(teaches: bool) -> dict[str, Any]:
    lift = {"absolute": -0.01, "ci95": [-0.03, 0.002]}
    return {"rows": 64, "student": 0.4, "blend_lift": lift, "teaches": teaches}


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ({"rows_asked": 0, "rows_valid": 0, "rows_full": 0}, ["No row asked"]),
        (
            {"rows_valid": 90, "rows_full": 90, "failures": {"empty": 7, "no_identifier": 3}},
            ["10 of 100", "empty 7, no_identifier 3"],
        ),
        (
            {"rows_full": 40, "partial": {"truncated": 50, "repeated": 10}},
            ["Only 40 of 100", "truncated 50, repeated 10", "tied"],
        ),
        ({"rows_full": 50, "partial": {"truncated": 50}}, []),
        ({"backoffs": [backoff(2048, 1024)]}, ["ran out once", "from 2,048 to 1,024"]),
        (
            {"backoffs": [backoff(2048, 1024), backoff(1024, 300)]},
            ["ran out 2 times", "from 2,048 to 300", "--teacher.batch_tokens 300"],
        ),
        ({"confidence": 0.01}, ["hardly distinguishes", "1.50 of at most 3.00 nats"]),
        (
            {"target_placing": {"rows": 9, "teacher": 0.1, "student": 0.2, "random": 0.18}},
            ["9 training rows", "0.200 against 0.100"],
        ),
        (
            {"audits": [audited(teaches=False), audited(teaches=True)]},
            ["nothing that this teacher could teach", "64 validation", "-0.0100 (-0.0300 to"],
        ),
        ({"audits": [audited(teaches=True), audited(teaches=False)]}, []),
        ({"target": "blend", "blend_beta": 0.0}, ["β of the blend is 0"]),
        (
            # A blend does not need a teacher that is better than the student.
            {
                "target": "blend",
                "blend_beta": 0.2,
                "target_placing": {"rows": 9, "teacher": 0.1, "student": 0.2, "random": 0.18},
            },
            [],
        ),
        ({}, []),
    ],
)
def test_what_a_reader_might_overlook_is_said(teacher: dict[str, Any], words: list[str]):
    warnings = _teacher_warnings(report(**teacher))
    assert len(warnings) == bool(words)
    for part in words:
        assert part in warnings[0]
