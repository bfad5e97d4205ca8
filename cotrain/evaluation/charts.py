"""The report's charts: which there are, from what, and what each says."""

from collections.abc import Callable, Iterable
from typing import Any

import matplotlib
import numpy as np

from cotrain.evaluation.drawing import STYLE, Chart, Series, bar_chart, line_chart

_LOSS_CAPTIONS = {
    "loss": (
        "Total training loss",
        "The weighted sum that is minimised; it may jump where the teacher starts, because terms "
        "are added there",
    ),
    "loss_ce": (
        "Next-item loss",
        "Cross-entropy of the true next item for the student and, once it exists, its control; "
        "lower is better, and a student far above its control is giving up fit for the teacher",
    ),
    "loss_rank": (
        "Ranking loss",
        "Cross-entropy between the teacher's and the student's ranking of the candidates, each row "
        "times the teacher's confidence; lower means closer, or a teacher less sure of itself",
    ),
    "loss_emb": (
        "Alignment loss",
        "Distance between the student's user state and the projected decision state of the "
        "teacher; lower means closer, but read it together with the effective ranks",
    ),
    "loss_rdr": (
        "Rationale loss",
        "How far the user states are from the vectors of their rationales, in the form that the "
        "settings name; lower means closer",
    ),
}


def read_series(curves: Iterable[dict], kind: str, key: str, model: str | None = None) -> Series:
    """The curve of one logged value.

    Args:
        curves: rows of metrics.jsonl.
        kind: "train" or "validation".
        key: the logged value; rows without it are skipped.
        model: keep only rows of this model.

    Returns:
        Points in order of step. A step logged twice, as after a resume, counts once, the later
        row winning.
    """
    points: dict[float, tuple[float, float]] = {}
    for row in curves:
        value = row.get(key)
        if row.get("kind") != kind or (model is not None and row.get("model") != model):
            continue
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            step = row.get("step", len(points))
            points[step] = (row.get("epoch", step), value)
    table = np.array([points[step] for step in sorted(points)], dtype=np.float64).reshape(-1, 2)
    finite = np.isfinite(table).all(axis=1)
    return Series(table[finite, 0], table[finite, 1], int((~finite).sum()))


def teacher_start(curves: Iterable[dict]) -> float | None:
    """Epoch of the first training step in which teacher or rationales took part; None if they never
    did."""
    keys = ("teacher_rows_per_s", "teacher_entropy", "loss_rank", "loss_emb", "loss_rdr")
    epochs = [
        row.get("epoch", row.get("step", 0))
        for row in curves
        if row.get("kind") == "train" and any(row.get(key) is not None for key in keys)
    ]
    return min(epochs, default=None)


def draw_charts(report: dict[str, Any], curves: list[dict]) -> list[Chart]:
    """Every chart for which there is data, in reading order.

    Args:
        report: as `cotrain.evaluation.report.write_report` takes it.
        curves: rows of metrics.jsonl; may be empty.
    """
    start = teacher_start(curves)
    with matplotlib.rc_context(STYLE):
        charts = [_validation_chart(curves, start), *_loss_charts(curves, start)]
        teacher = report.get("teacher")
        if teacher:
            charts += [
                _entropy_chart(teacher, curves),
                _speed_chart(curves),
                *_position_charts(teacher),
            ]
        charts.append(_rationale_chart(curves))
        charts.append(_effective_rank_chart(curves, start))
    return [chart for chart in charts if chart is not None]


def _validation_chart(curves: list[dict], start: float | None) -> Chart | None:
    lines = {
        name: read_series(curves, "validation", "ndcg@10", model=name)
        for name in ("student", "control")
    }
    caption = "Higher is better"
    if lines["control"].x.size:
        caption += "; the gap between the curves is what distillation changed"
    if start is not None:
        caption += "; the dotted line marks where it starts"
    return line_chart(
        "learning", "Validation NDCG@10", f"{caption}.", lines, start=start, from_zero=False
    )


def _loss_charts(curves: list[dict], start: float | None) -> list[Chart | None]:
    keys = {
        key: None
        for row in curves
        if row.get("kind") == "train"
        for key in row
        if key == "loss" or key.startswith("loss_")
    }
    known = [key for key in _LOSS_CAPTIONS if key in keys]
    charts = []
    for key in known + [key for key in keys if key not in _LOSS_CAPTIONS]:
        title, caption = _LOSS_CAPTIONS.get(key, (key, "One term of the training loss"))
        lines = {
            "student": read_series(curves, "train", key),
            "control": read_series(curves, "train", f"control_{key}"),
        }
        charts.append(
            line_chart("learning", title, f"{caption}.", lines, start=start, from_zero=False)
        )
    return charts


def _rationale_chart(curves: list[dict]) -> Chart | None:
    lines = {
        "student": read_series(curves, "train", "rationale_cosine"),
        "control": read_series(curves, "train", "control_rationale_cosine"),
    }
    return line_chart(
        "rationales", "Closeness to the rationales",
        "Cosine between W_r u and the vector of the rationale, mean over the rows of a step; the "
        "control's W_r learns beside a model that never saw a rationale.",
        lines, from_zero=False,
    )  # fmt: skip


def _entropy_chart(teacher: dict[str, Any], curves: list[dict]) -> Chart | None:
    return line_chart(
        "teacher",
        "Entropy of the teacher's distribution",
        "Nats over the candidates; at the dotted line the teacher is guessing uniformly and has "
        "nothing to teach, near 0 it is certain.",
        {"teacher": read_series(curves, "train", "teacher_entropy")},
        flat=_flat(teacher.get("entropy_uniform"), "uniform"),
    )


def _speed_chart(curves: list[dict]) -> Chart | None:
    return line_chart(
        "teacher",
        "Teacher rows per second",
        "Rows the teacher ranks each second; a falling curve means longer prompts or a busy "
        "machine.",
        {"teacher": read_series(curves, "train", "teacher_rows_per_s")},
    )


def _position_charts(teacher: dict[str, Any]) -> list[Chart | None]:
    before = teacher.get("before_calibration") or {}
    more, labels = "", {}
    if before.get("rows"):
        calibrated = teacher.get("calibration", "batch") != "none"
        labels = {
            "control": "before calibration" if calibrated else "where it starts",
            "teacher": "after" if calibrated else "over the run",
        }
        more = f" Grey: {before['rows']:,} rows, ranked once where the teacher starts."
    if (teacher.get("shuffles") or 1) > 1:
        more += " Each row is ranked in several orders; the position is that in the first."
    lettered = teacher.get("identifiers", "letters") == "letters" and not teacher.get("window")

    def chart(title: str, caption: str, key: str, flat: Callable[[int], float]) -> Chart | None:
        bars = {"control": before.get(key) or [], "teacher": teacher.get(key) or []}
        size = max(map(len, bars.values()))
        return bar_chart(
            f"Position bias: {title}", caption + more, bars,
            labels=labels, flat=(flat(max(size, 1)), "no bias"), lettered=lettered,
        )  # fmt: skip

    return [
        chart(
            "mean rank",
            "Mean rank the teacher gives to whatever is shown at each position (1 = best); "
            "candidates are shuffled, so what is off the dotted line is the model's bias and not "
            "the items'.",
            "mean_rank_by_shown_position",
            lambda size: (size + 1) / 2,
        ),
        chart(
            "first choice",
            "Share of rows in which what is shown there was ranked first; without bias every "
            "position would reach the dotted line.",
            "choice_share_by_shown_position",
            lambda size: 1 / size,
        ),
    ]


def _effective_rank_chart(curves: list[dict], start: float | None) -> Chart | None:
    return line_chart(
        "rank",
        "Effective rank of the representations",
        "Number of directions the states really use; a fall towards 1 is a collapse, in which "
        "alignment succeeds by making all users alike.",
        {
            "student": read_series(curves, "train", "student_state_effective_rank"),
            "teacher": read_series(curves, "train", "decision_state_effective_rank"),
        },
        labels={"student": "student's user state", "teacher": "teacher's decision state"},
        start=start,
    )


def _flat(value: float | None, label: str) -> tuple[float, str] | None:
    return None if value is None else (value, label)
