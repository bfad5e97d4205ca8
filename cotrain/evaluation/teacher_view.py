"""What the report's page says of the teacher: its facts, its answers by outcome, and examples."""

from itertools import zip_longest
from typing import Any

from cotrain.evaluation.formats import NONE, duration, number, percent

Row = tuple[str, str, str]

_CAUSES = {
    "empty": "nothing was written",
    "no_identifier": "something was written, but no identifier",
    "unknown_identifier": "an identifier that was not shown",
    "repeated": "an identifier for the second time",
    "truncated": "stopped or was cut before all were named",
    "non_finite": "numbers that are not finite",
    "out_of_memory": "did not fit even alone",
    "too_few_candidates": "too few unseen items were left to propose, so nobody was asked",
}
_POLICIES = {
    "all": "every user in every epoch",
    "random": "users drawn anew each epoch",
    "entropy": "where the student's softmax over its candidates has the highest entropy",
    "margin": "where the student's two best candidates are nearest to each other",
    "loss": "where the item that was taken surprises the student most",
    "k-center": "users whose states are unlike each other",
}
_WHEN = {
    "live": "on what the student proposes in the step that learns",
    "offline": "once, on what the student proposed after the warm-up",
}
_CALIBRATIONS = {
    "batch": "what it gives an identifier on average over rows is subtracted",
    "content_free": "what it gives an identifier with N/A for every title is subtracted",
    "none": "nothing is subtracted",
}


def teacher_rows(report: dict[str, Any]) -> list[Row]:
    """(label, value, how to read it) for everything that is known about the teacher."""
    teacher = report.get("teacher")
    if not teacher:
        return []
    get = teacher.get
    rows = [
        ("Model", str(get("model", NONE)), ""),
        ("Adapter", get("adapter") or NONE, ""),
        ("Parameters", number(get("parameters")), ""),
        ("Quantisation", str(get("quantization", NONE)), ""),
        *_asking_rows(teacher),
        *_cost_rows(teacher, report.get("seconds")),
        *_verdict_rows(teacher),
    ]
    return [row for row in rows if row[1] != NONE]


def answer_rows(teacher: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(outcome, rows, share of the asked ones, what it means) of the teacher's answers."""
    asked, valid = teacher.get("rows_asked"), teacher.get("rows_valid")
    if not asked or valid is None:
        return []

    def row(label: str, count: int | None, hint: str) -> tuple[str, str, str, str]:
        return (label, number(count), percent(None if count is None else count / asked), hint)

    rows = [
        row("Asked", asked, ""),
        row("Valid", valid, "only these teach the student"),
        row("Whole order", teacher.get("rows_full"), "all candidates in one order"),
    ]
    kinds = (
        ("Partial", "partial", "; what was named counts, the rest is tied behind it"),
        ("Failed", "failures", ""),
    )
    for label, key, more in kinds:
        for cause, count in (teacher.get(key) or {}).items():
            hint = _CAUSES.get(cause, "") + more
            rows.append(row(f"{label}: {cause.replace('_', ' ')}", count, hint.lstrip("; ")))
    return [row for row in rows if row[1] != NONE]


def _reuse(epochs: int) -> tuple[str, str]:
    if epochs == 1:
        return "in one epoch", "the one it is asked in"
    return f"in {epochs} epochs", "only the first of them asks; the others repeat its rows"


def _asking_rows(teacher: dict[str, Any]) -> list[Row]:
    """How it is asked."""
    get = teacher.get
    window, stride = get("window"), get("stride")
    query = get("query") or {}
    policy = str(query.get("policy", NONE)).replace("_", "-")
    rows = [
        ("Who asks", policy, _POLICIES.get(policy, "")),
        ("When", str(query.get("when", NONE)), _WHEN.get(str(query.get("when")), "")),
        ("Rows an epoch", number(query.get("rows_per_epoch")), "by that policy"),
        ("A verdict teaches", *_reuse(query.get("reuse", 1))),
        ("Mode", str(get("mode", NONE)), "how the verdict is read"),
        ("Decision state", str(get("decision_position", NONE)), "position it is taken from"),
        ("Identifiers", str(get("identifiers", NONE)), "what candidates are called in the prompt"),
        ("Template", str(get("template", NONE)), "the words of the prompt"),
        ("Candidates", number(get("num_candidates")), "ranked in each row"),
    ]
    if window:
        moved = f"moving on by {stride}" if stride else "moving on by half a window"
        rows.append(("Window", number(window), f"candidates in one prompt, {moved}"))
    if (get("shuffles") or 1) > 1:
        agreement = number(get("agreement_of_shuffles"), 3)
        hint = f"ranks are their mean; they agree by {agreement}, 1 would be always alike"
        rows.append(("Orders shown", number(get("shuffles")), hint))
    kind = get("calibration")
    rows.append(("Teaches", *_target(teacher)))
    rows.append(("Calibration", str(kind or NONE), _CALIBRATIONS.get(str(kind), "")))
    bias, before = get("identifier_bias") or [], get("before_calibration") or {}
    if any(bias):
        hint = "between its dearest and its least loved identifier"
        if kind == "batch" and before.get("rows"):
            hint += f", on {number(before['rows'])} rows"
        rows.append(("Identifier bias removed", f"{number(max(bias) - min(bias), 1)} nats", hint))
    return rows


def _target(teacher: dict[str, Any]) -> tuple[str, str]:
    if teacher.get("target") != "blend":
        return str(teacher.get("target", NONE)), "its own distribution over the candidates"
    beta = number(float(teacher["blend_beta"]), 2)
    return f"blend, β {beta}", "the control's scores + β · the teacher's log-probabilities"


def _cost_rows(teacher: dict[str, Any], total: float | None) -> list[Row]:
    get = teacher.get
    seconds, written, asked = get("seconds"), get("generated_tokens"), get("rows_asked")
    share = f"{percent(seconds / total)} of the run" if seconds is not None and total else ""
    rows = [
        ("Teacher time", duration(seconds), share),
        ("Rows per second", number(get("rows_per_s"), 2), ""),
        ("Prompt tokens per second", number(get("prompt_tokens_per_s"), 0), ""),
        ("Prompt tokens", number(get("prompt_tokens")), ""),
    ]
    if written and asked:
        rows.append(("Tokens written", number(written), f"{number(written / asked, 1)} a row"))
    backoffs = get("backoffs") or []
    if backoffs:
        most = max(backoff["from_tokens"] for backoff in backoffs)
        least = min(backoff["to_tokens"] for backoff in backoffs)
        hint = f"prompt tokens in one pass went from {number(most)} down to {number(least)}"
        rows.append(("Memory ran out", f"{len(backoffs)} ×", hint))
    return rows


def _verdict_rows(teacher: dict[str, Any]) -> list[Row]:
    """What its verdicts are worth."""
    get = teacher.get
    rows = []
    entropy, uniform = get("entropy"), get("entropy_uniform")
    if entropy is not None:
        hint = f"{percent(entropy / uniform)} of uniform guessing" if uniform else ""
        rows.append(("Mean entropy", f"{number(entropy, 2)} nats", hint))
    placing = get("target_placing") or {}
    if placing.get("rows"):
        rows.append(
            (
                "Mean reciprocal rank of the true item",
                number(placing["teacher"], 3),
                f"student's own order {number(placing['student'], 3)}, any order "
                f"{number(placing['random'], 3)}; on {number(placing['rows'])} rows that hold it",
            )
        )
    for audit in get("audits") or []:
        rows.append(_audit_row(audit))
    return [
        *rows,
        ("Mean confidence", number(get("confidence"), 3), "0 guesses, 1 is certain"),
        (
            "True next item among candidates",
            percent(get("target_in_candidates")),
            "of asked rows; elsewhere no ranking can put it first",
        ),
        (
            "Agreement with the student",
            number(get("agreement_with_student"), 3),
            "mean Spearman; 1 repeats the student's order, 0 is unrelated to it",
        ),
    ]


def _audit_row(audit: dict[str, Any]) -> Row:
    low, high = audit["blend_lift"]["ci95"]
    found = "teaches" if audit["teaches"] else "nothing shown to teach"
    return (
        f"Audit at step {number(audit['step'])}, NDCG@10",
        f"blend {number(audit['blend'], 4)}, teacher {number(audit['teacher'], 4)}, student "
        f"{number(audit['student'], 4)}, popularity {number(audit['popularity'], 4)}, chance "
        f"{number(audit['chance'], 4)}",
        f"{found}: the blend's gain lies in {low:+.4f} to {high:+.4f}, on {number(audit['rows'])} "
        "validation rows that hold the true item",
    )


def example_view(example: dict[str, Any]) -> dict[str, Any]:
    """One example with its three orders side by side, row by row."""
    shown = example.get("shown") or []
    valid = example.get("valid", True)
    teacher = (example.get("teacher_ranking") or []) if valid else []
    ranks = (example.get("teacher_ranks") or []) if valid else []
    probs = (example.get("teacher_probs") or []) if valid else []
    target = example.get("target")
    columns = (
        (example.get("identifiers") or [])[: len(shown)], shown, teacher,
        [ranks.count(rank) > 1 for rank in ranks], probs, example.get("student_ranking") or [],
    )  # fmt: skip
    place = None
    if target in teacher:
        index = teacher.index(target)
        place = ranks[index] if ranks else index + 1
    return {
        "user": example.get("user"),
        "history": example.get("history") or [],
        "rows": list(zip_longest(*columns)),
        "target": target,
        "target_shown": target in shown,
        "teacher_place": None if place is None else f"{place:g}",
        "teacher_tied": place is not None and ranks.count(place) > 1,
        "valid": valid,
        "has_probs": bool(probs),
        "top_prob": max((prob for prob in probs if prob is not None), default=0) or 1,
        "prompt": example.get("prompt"),
        "one_prompt": bool(example.get("identifiers")),
        "reasoning": example.get("reasoning"),
    }
