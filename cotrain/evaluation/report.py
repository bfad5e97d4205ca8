"""What a run leaves for people and programs: `report.html`, `report.json` and a console table.

The words are generated from the numbers and claim no more than these do: a teacher helped or hurt
only where the paired interval of the lift excludes zero."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from cotrain.evaluation.charts import draw_charts
from cotrain.evaluation.drawing import PALETTE
from cotrain.evaluation.formats import (
    NONE,
    number,
    p_text,
    page_template,
    percent,
    signed,
)
from cotrain.evaluation.rationale_view import rationale_rows
from cotrain.evaluation.rounds_view import round_rows, rounds_ended
from cotrain.evaluation.teacher_view import answer_rows, example_view, teacher_rows
from cotrain.files import write_whole

PRIMARY_METRIC = "ndcg@10"
_CONSOLE_METRICS = ("recall@10", "ndcg@10", "mrr")


@dataclass(frozen=True)
class Verdict:
    """The answer in words. `tone` is good, bad or neutral; `detail` holds the numbers."""

    tone: str
    headline: str
    detail: str


def write_report(report: dict[str, Any], curves: list[dict], folder: Path) -> tuple[Path, Path]:
    """Write `report.json` and a self-contained `report.html`.

    The JSON is written first and each file is renamed into place when complete, so that the
    numbers survive whatever happens to the page.

    Args:
        report: the run's results; keys this module does not know are kept in the JSON. Numbers
            that are not finite become null.
        curves: rows of metrics.jsonl; may be empty.
        folder: run folder; created when missing.

    Returns:
        Paths of the JSON and of the HTML file.
    """
    plain = json_ready(report)
    folder.mkdir(parents=True, exist_ok=True)
    json_path, html_path = folder / "report.json", folder / "report.html"
    write_whole(json_path, json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(html_path, render_html(plain, curves))
    return json_path, html_path


def json_ready(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinity become None, unknown objects their text."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [json_ready(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return json_ready(asdict(value))
    as_list = getattr(value, "tolist", None)  # numpy scalars and arrays, tensors
    if callable(as_list):
        return json_ready(as_list())
    return str(value)


def verdict(report: dict[str, Any]) -> Verdict:
    """Whether distillation helped, in words that follow from the interval of the lift."""
    teacher, lift = report.get("teacher"), _primary_lift(report)
    taught = _taught_by(report)
    student = report["student"].get("test", {}).get(PRIMARY_METRIC)
    if not report.get("control") or lift is None:
        if not taught:
            headline = "The student was trained without a teacher"
        else:
            missing = "its lift was not measured" if report.get("control") else "it has no control"
            headline = f"This run cannot say whether {_lower(taught)} helped: {missing}"
        return Verdict(
            "neutral", headline, f"NDCG@10 on test {number(student)}. {_shipped(report)}"
        )

    low, high = lift["ci95"]
    tone = "neutral"
    reasons = (report.get("rationales") or {}).get("lambda_rdr")
    if not reasons and not (teacher or {}).get("rows_asked"):
        headline = "Nobody taught the student, so this run says nothing about distillation"
        if teacher:
            headline = "The teacher was never asked, so this run says nothing about it"
    elif not reasons and not (teacher or {}).get("rows_valid"):
        headline = "The teacher gave no usable answer, so this run says nothing about it"
    elif low is None or high is None:
        headline = f"The lift has no interval, so this run says nothing about {_lower(taught)}"
    elif low > 0:
        tone, headline = "good", f"{taught} helped: the student beats its control"
    elif high < 0:
        tone, headline = "bad", f"{taught} hurt: the student is worse than its control"
    else:
        headline = "The student is not distinguishable from its control"
    control = report["control"].get("test", {}).get(PRIMARY_METRIC)
    detail = (
        f"NDCG@10 on test {number(student)} against {number(control)}: "
        f"{lift_text(lift)}. {_shipped(report)}"
    )
    return Verdict(tone, headline, detail)


def _taught_by(report: dict[str, Any]) -> str:
    """Who is to be credited or blamed, at the beginning of a sentence; empty: nobody."""
    teacher, rationales = report.get("teacher"), report.get("rationales") or {}
    # Without weight rationales are there to explain and not to teach.
    if not rationales.get("lambda_rdr"):
        return "The teacher" if teacher else ""
    return "Teacher and rationales" if teacher else "The rationales"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _primary_lift(report: dict[str, Any]) -> dict[str, Any] | None:
    lift = (report.get("lift") or {}).get(PRIMARY_METRIC)
    return lift if lift and lift.get("absolute") is not None else None


def _shipped(report: dict[str, Any]) -> str:
    """Which model is exported, with the validation scores it was chosen by."""
    scores = {
        name: (report.get(name) or {}).get("validation", {}).get(PRIMARY_METRIC)
        for name in ("student", "control")
    }
    text = f"Shipped: {report['shipped']}"
    if None in scores.values():
        return f"{text}."
    return (
        f"{text} (NDCG@10 on validation: student {number(scores['student'])}, "
        f"control {number(scores['control'])})."
    )


def lift_text(lift: dict[str, Any]) -> str:
    """One lift as a phrase: difference, relative difference, interval, p."""
    parts = [f"lift {signed(lift['absolute'])}"]
    if lift.get("relative") is not None:
        parts[0] += f" ({signed(100 * lift['relative'], 1)} %)"
    low, high = lift.get("ci95") or (None, None)
    if low is not None and high is not None:
        parts.append(f"95 % interval {signed(low)} to {signed(high)}")
    if lift.get("p_value") is not None:
        parts.append(p_text(lift["p_value"]))
    return ", ".join(parts)


def result_table(report: dict[str, Any]) -> str:
    """The result as plain ASCII text for the console, with lift and shipped model."""
    report = json_ready(report)
    models = [name for name in ("student", "control") if report.get(name)]
    rows = [[""] + [f"{split} {name}" for split in ("test", "validation") for name in models]]
    for metric in _CONSOLE_METRICS:
        rows.append([metric])
        for split in ("test", "validation"):
            rows[-1] += [number(report[name].get(split, {}).get(metric)) for name in models]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lift = _primary_lift(report)
    if lift:
        lines.append(f"{PRIMARY_METRIC} on test: {lift_text(lift)}")
    lines.append(f"shipped: {report['shipped']}")
    # A console in the C locale cannot print typographic signs.
    return "\n".join(lines).replace("−", "-").replace(NONE, "-")


def render_html(report: dict[str, Any], curves: list[dict]) -> str:
    """The page as text.

    Args:
        report: as `json_ready` returns it.
        curves: rows of metrics.jsonl.
    """
    charts = draw_charts(report, curves)
    return page_template(Path(__file__).with_name("report.html.jinja")).render(
        report=report,
        verdict=verdict(report),
        metrics=_metric_names(report),
        recommended_rows=_recommended_rows(report),
        slice_views=_slice_views(report.get("slices") or []),
        teacher_rows=teacher_rows(report),
        answer_rows=answer_rows(report.get("teacher") or {}),
        round_rows=round_rows(report.get("rounds") or []),
        rounds_ended=rounds_ended(report.get("rounds") or []),
        rationale_rows=rationale_rows(report.get("rationales") or {}),
        rank_rows=_rank_rows(report.get("effective_rank") or {}),
        charts={
            group: [chart for chart in charts if chart.group == group]
            for group in ("learning", "teacher", "rationales", "rank")
        },
        examples=[example_view(example) for example in report.get("examples") or []],
        config=flattened(report.get("config") or {}),
        environment=flattened(report.get("environment") or {}),
        palette=PALETTE,
    )


def _metric_names(report: dict[str, Any]) -> list[str]:
    """Metrics of any model and split, in reported order; nested slices are left to the JSON."""
    names = {}
    for model in ("student", "control"):
        for split in ("test", "validation"):
            scores = (report.get(model) or {}).get(split) or {}
            names.update(
                (name, None) for name, value in scores.items() if isinstance(value, float | None)
            )
    return list(names)


def _recommended_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a figure about what is recommended: label, hint, each model's value, and that of the
    items that users really took."""
    models = [report.get(name) or {} for name in ("student", "control")]
    taken = (report.get("dataset") or {}).get("targets") or {}
    labels = {
        "coverage@10": ("Catalogue coverage", "share of the catalogue that anybody is shown"),
        "popularity@10": (
            "Popularity percentile",
            "of the items shown, by training interactions; 50 % is what a random draw has",
        ),
        "head_share@10": ("Share of the head", "of all places, on the most popular 10 % of items"),
        "gini@10": ("Gini of exposure", "0: every item equally often, 1: one item for all"),
    }
    rows = []
    for name, (label, hint) in labels.items():
        student, control = [(model.get("recommended") or {}).get(name) for model in models]
        if student is None and control is None:
            continue
        real = taken.get(name.partition("@")[0])
        show = number if name.startswith("gini") else percent
        values = {"student": show(student), "control": show(control)}
        rows.append({"label": label, "hint": hint, "taken": percent(real), **values})
    return rows


def _slice_views(slices: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The rows of the slice table by what they group users by, in reported order."""
    views: dict[str, list[dict[str, Any]]] = {}
    for row in slices:
        views.setdefault(row["view"], []).append(row)
    return list(views.items())


def _rank_rows(ranks: dict[str, Any]) -> list[tuple[str, str]]:
    labels = {
        "student_state_start": "Student's user state, where the teacher starts",
        "student_state": "Student's user state, at the end",
        "decision_state_start": "Teacher's decision state, where it starts",
        "decision_state": "Teacher's decision state, at the end",
    }
    return [
        (label, number(float(ranks[key]), 1))
        for key, label in labels.items()
        if ranks.get(key) is not None
    ]


def flattened(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (dotted key, value text) pairs."""
    pairs = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            pairs += flattened(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            pairs.append((f"{prefix}{key}", text))
    return pairs
