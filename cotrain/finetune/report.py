"""The page of a teacher's training or evaluation: numbers, curves, and things to read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cotrain.evaluation.charts import read_series
from cotrain.evaluation.drawing import Chart, line_chart
from cotrain.evaluation.formats import number, page_template
from cotrain.evaluation.report import flattened, json_ready
from cotrain.files import write_whole

TEMPLATE = Path(__file__).with_name("report.html.jinja")
# Shown by themselves, and so not again among the facts.
_APART = {"tables", "method", "data", "title"}
_METRICS = ("accuracy@1", "ndcg@10", "mrr")
_ORDERS = {
    "any_order": "Any order (expected)",
    "student_order": "The student's own order",
    "validation_start": "Teacher before",
    "validation_best": "Teacher after",
}


def write_report(
    report: dict[str, Any], samples: Sequence[Any], settings: dict[str, Any],
    curves: list[dict[str, Any]], folder: Path,
) -> Path:  # fmt: skip
    """Write report.json and report.html.

    Args:
        report: Facts, and `tables` by heading.
        samples: With `heading` and `lines`.
        settings: Of the training.
        curves: Rows of metrics.jsonl.
        folder: Where to.

    Returns:
        The page.
    """
    plain = json_ready(report)
    plain["samples"] = [
        {"heading": sample.heading, "lines": list(sample.lines)} for sample in samples
    ]
    page = folder / "report.html"
    write_whole(page, render(plain, settings, curves))
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(folder / "report.json", text + "\n")  # last: it says that the training has ended
    return page


def render(report: dict[str, Any], settings: dict[str, Any], curves: list[dict[str, Any]]) -> str:
    """The page as text; `report` as it lies in report.json."""
    facts = {
        name: value
        for name, value in report.items()
        if name not in _APART | {"samples"} | set(_ORDERS)
    }
    return page_template(TEMPLATE).render(
        title=report.get("title") or f"{report['method']} on {report['data']}",
        orders=[
            (label, [number(report[name].get(metric)) for metric in _METRICS])
            for name, label in _ORDERS.items()
            if report.get(name)
        ],
        validation_rows=report.get("validation_rows", 0),
        metrics=_METRICS,
        charts=[chart for chart in charts(curves) if chart is not None],
        tables={
            heading: (list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])
            for heading, rows in report.get("tables", {}).items()
            if rows
        },
        samples=report["samples"],
        facts=[(name, _cell_text(value)) for name, value in flattened(facts)],
        settings=flattened(settings),
    )


def charts(curves: list[dict[str, Any]]) -> list[Chart | None]:
    """Loss, held-out NDCG@10 and rewards over steps, those that there are."""

    def of(title: str, caption: str, kind: str, key: str, zero: bool) -> Chart | None:
        series = read_series(curves, kind, key)
        return line_chart(
            "learning", title, caption, {"student": series}, from_zero=zero, across="step"
        )

    return [
        of("Loss", "Of the rows of each step.", "train", "loss", False),
        of("Held-out NDCG@10", "Of the teacher's order, where the true item is among the "
           "candidates.", "validation", "ndcg@10", False),
        of("Reward", "Mean of each step's completions.", "rl", "reward", False),
        of("KL divergence", "From where it started, in nats a token.", "rl", "kl", True),
    ]  # fmt: skip


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return "–" if value is None else str(value)
    return number(value)


def _cell_text(text: str) -> str:
    """A fact without a float's last digits."""
    try:
        return number(float(text)) if "." in text else text
    except ValueError:
        return text
