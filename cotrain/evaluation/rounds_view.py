"""What the report's page says of rounds: how student and teacher did in each, and what the training
of the teacher between two of them changed."""

from typing import Any

from cotrain.evaluation.formats import NONE, duration, number


def round_rows(rounds: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A row of texts for each round, by column."""
    return [
        {
            "round": number(one["round"]),
            "epochs": "–".join(number(epoch) for epoch in one["epochs"]),
            "student": number(one["student"]),
            "student_best": number(one["student_best"]),
            "control": number(one["control"]),
            "audit_start": _audit(one["audit_start"]),
            "audit_end": _audit(one["audit_end"]),
            "seconds": duration(one["seconds"]),
            "tuning": _tuning(one.get("tuning")),
        }
        for one in rounds
    ]


def rounds_ended(rounds: list[dict[str, Any]]) -> str:
    """Why there was no other round where there could have been one; empty: all were played."""
    return rounds[-1].get("ended", "") if rounds else ""


def _audit(found: dict[str, Any] | None) -> str:
    if found is None:
        return NONE
    return " / ".join(number(found[name]) for name in ("student", "teacher", "blend"))


def _tuning(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if "failure" in found:
        return "failed"
    before, after = found["validation_start"], found["validation_best"]
    return (
        f"{found['method']}, {number(found['rows'])} rows: −log p {number(before['nll'], 3)} → "
        f"{number(after['nll'], 3)}, NDCG@10 {number(before['ndcg@10'], 3)} → "
        f"{number(after['ndcg@10'], 3)} on {number(found['validation_rows'])} rows of held-out "
        f"users, step {number(found['best_step'])} of {number(found['steps'])} the best; "
        f"{duration(found['seconds'])}"
    )
