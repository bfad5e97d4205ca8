"""The report's charts: curves and position-bias bars as inline SVG.

Every colour is a CSS custom property with a fallback (`var(--student, #2563eb)`), so that one
drawing follows the page's light or dark scheme and still stands alone when it is copied out."""

import html
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

# Colour-blind safe; the control is also dashed. Keys are the CSS properties of report.html.jinja.
PALETTE = {
    "student": "#2563eb",
    "control": "#7b8794",
    "teacher": "#d9730d",
    "ink": "#27323f",
    "grid": "#dfe4ea",
}
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
        "One minus the cosine between user state and rationale embedding; lower means closer",
    ),
}
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cotrain",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "text.parse_math": False,
    **dict.fromkeys(
        ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"],
        PALETTE["ink"],
    ),
    "grid.color": PALETTE["grid"],
}
# Above this many logged steps a curve is drawn as a thin band with its moving average on top.
_SMOOTH_ABOVE = 60
_MAX_POINTS = 300
_TICK_STEPS = [1, 2, 5, 10]


@dataclass(frozen=True)
class Chart:
    """One drawing. `group` is the report section it belongs to: learning, teacher, or rank."""

    group: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Series:
    """One curve over epochs; `dropped` counts values that were NaN or infinite."""

    x: np.ndarray
    y: np.ndarray
    dropped: int = 0


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
    """Epoch of the first training step in which the teacher took part; None if it never did."""
    keys = ("teacher_rows_per_s", "teacher_entropy", "loss_rank", "loss_emb")
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
    with matplotlib.rc_context(_RC):
        charts = [_validation_chart(curves, start), *_loss_charts(curves, start)]
        teacher = report.get("teacher")
        if teacher:
            charts += [
                _entropy_chart(teacher, curves),
                _speed_chart(curves),
                _position_rank_chart(teacher),
                _position_choice_chart(teacher),
            ]
        charts.append(_effective_rank_chart(curves, start))
    return [chart for chart in charts if chart is not None]


def _validation_chart(curves: list[dict], start: float | None) -> Chart | None:
    lines = {
        name: read_series(curves, "validation", "ndcg@10", model=name)
        for name in ("student", "control")
    }
    caption = "Higher is better"
    if lines["control"].x.size:
        caption += "; the gap between the curves is what the teacher changed"
    if start is not None:
        caption += "; the dotted line marks where the teacher starts"
    return _line_chart(
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
            _line_chart("learning", title, f"{caption}.", lines, start=start, from_zero=False)
        )
    return charts


def _entropy_chart(teacher: dict[str, Any], curves: list[dict]) -> Chart | None:
    return _line_chart(
        "teacher",
        "Entropy of the teacher's distribution",
        "Nats over the candidates; at the dotted line the teacher is guessing uniformly and has "
        "nothing to teach, near 0 it is certain.",
        {"teacher": read_series(curves, "train", "teacher_entropy")},
        flat=_flat(teacher.get("entropy_uniform"), "uniform"),
    )


def _speed_chart(curves: list[dict]) -> Chart | None:
    return _line_chart(
        "teacher",
        "Teacher rows per second",
        "Rows the teacher ranks each second; a falling curve means longer prompts or a busy "
        "machine.",
        {"teacher": read_series(curves, "train", "teacher_rows_per_s")},
    )


def _position_rank_chart(teacher: dict[str, Any]) -> Chart | None:
    ranks = teacher.get("mean_rank_by_shown_position") or []
    return _bar_chart(
        "Position bias: mean rank",
        "Mean rank the teacher gives to whatever is shown at each letter (1 = best); candidates "
        "are shuffled, so bars off the dotted line are the model's bias and not the items'.",
        ranks,
        _flat((len(ranks) + 1) / 2, "no bias"),
    )


def _position_choice_chart(teacher: dict[str, Any]) -> Chart | None:
    shares = teacher.get("choice_share_by_shown_position") or []
    return _bar_chart(
        "Position bias: first choice",
        "Share of rows in which the letter was ranked first; without bias every bar would reach "
        "the dotted line.",
        shares,
        _flat(1 / len(shares) if shares else None, "no bias"),
    )


def _effective_rank_chart(curves: list[dict], start: float | None) -> Chart | None:
    return _line_chart(
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


def _line_chart(
    group: str,
    title: str,
    caption: str,
    lines: dict[str, Series],
    *,
    labels: dict[str, str] | None = None,
    start: float | None = None,
    flat: tuple[float, str] | None = None,
    from_zero: bool = True,
) -> Chart | None:
    """Curves over epochs, keyed by palette colour; None when no curve has a point."""
    dropped = sum(series.dropped for series in lines.values())
    lines = {name: series for name, series in lines.items() if series.x.size}
    if not lines:
        return None
    figure, axes = _axes()
    for name, series in lines.items():
        _draw_curve(axes, series, name, (labels or {}).get(name, name), start)
    _fit_limits(axes, list(lines.values()), from_zero)
    if flat:
        _draw_flat(axes, *flat)
    if start is not None:
        _draw_start(axes, start)
    if len(lines) > 1 or flat:
        _legend(axes)
    axes.set_xlabel("epoch")
    if any(series.x.size > _SMOOTH_ABOVE for series in lines.values()):
        caption += " Thin: logged steps; thick: their moving average."
    if dropped:
        caption += f" {dropped} value{'s' * (dropped > 1)} that {'were' if dropped > 1 else 'was'}"
        caption += " not finite cannot be drawn."
    return Chart(group, title, caption, _svg(figure, title))


def _bar_chart(
    title: str, caption: str, values: Sequence[float | None], flat: tuple[float, str] | None
) -> Chart | None:
    heights = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    if not np.isfinite(heights).any():
        return None
    figure, axes = _axes()
    axes.bar(range(len(heights)), np.nan_to_num(heights), width=0.7, color=PALETTE["teacher"])
    step = 1 + (len(heights) - 1) // 26
    shown = range(0, len(heights), step)
    axes.set_xticks(list(shown), [identifier(position) for position in shown])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.7, len(heights) - 0.3)
    axes.set_xlabel("shown position")
    if flat:
        _draw_flat(axes, *flat)
        _legend(axes)
    return Chart("teacher", title, caption, _svg(figure, title))


def identifier(position: int) -> str:
    """Letter under which a candidate is shown; numbers from the 27th on."""
    return chr(ord("A") + position) if position < 26 else str(position + 1)


def _axes() -> tuple[Figure, Axes]:
    # Drawn small, so that 10 pt labels stay readable when a phone shows it 330 px wide.
    figure = Figure(figsize=(4.9, 2.8), layout="constrained")
    axes = figure.add_subplot()
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=_TICK_STEPS))
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=_TICK_STEPS))
    plain = ScalarFormatter(useOffset=False)
    plain.set_powerlimits((-4, 6))
    axes.yaxis.set_major_formatter(plain)
    return figure, axes


def _draw_curve(axes: Axes, series: Series, name: str, label: str, start: float | None) -> None:
    # The control lies on top: where both agree, the student shows through its gaps.
    line = (0, (3, 2)) if name == "control" else "-"
    above = 3.5 if name == "control" else 3
    style: dict[str, Any] = {"color": PALETTE[name], "zorder": above}
    if series.x.size <= _SMOOTH_ABOVE:
        size = 3 if series.x.size > 1 else 6
        axes.plot(series.x, series.y, marker="o", ms=size, lw=1.6, ls=line, label=label, **style)
        return
    axes.plot(*_thinned(series.x, series.y), lw=0.8, alpha=0.35, **style)
    # Averaged on either side of the teacher's start, where a loss may truly jump.
    split = 0 if start is None else int(np.searchsorted(series.x, start))
    window = max(1, series.x.size // 25)
    for part in (slice(0, split), slice(split, None)):
        if series.x[part].size:
            x, y = _thinned(series.x[part], _moving_average(series.y[part], window))
            marker = "o" if x.size == 1 else None
            axes.plot(x, y, lw=1.9, ls=line, marker=marker, ms=3, label=label, **style)
            label = "_nolegend_"


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean that uses fewer values near the ends instead of inventing some."""
    ones = np.ones(min(window, values.size))
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_MAX_POINTS` points, each the mean of its bin: a page must not weigh megabytes."""
    bins = min(_MAX_POINTS, x.size)
    starts = np.linspace(0, x.size, bins, endpoint=False).astype(np.int64)
    sizes = np.diff(np.append(starts, x.size))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def _fit_limits(axes: Axes, lines: list[Series], from_zero: bool) -> None:
    """Leave room for the markers and, unless the shape matters more, start at zero."""
    x = np.concatenate([series.x for series in lines])
    y = np.concatenate([series.y for series in lines])
    if from_zero and y.min() >= 0:
        axes.set_ylim(0, 1.12 * y.max() if y.max() > 0 else 1)
    if x.min() == x.max():  # a single point gets an epoch of space around it
        axes.set_xlim(max(0.0, x.min() - 1), x.max() + 1)
        if not from_zero:
            half = abs(y.max()) / 2 or 0.5
            axes.set_ylim(y.min() - half, y.max() + half)


def _draw_flat(axes: Axes, value: float, label: str) -> None:
    line = (0, (1, 2))
    axes.axhline(value, color=PALETTE["ink"], lw=1.3, ls=line, zorder=4, label=label)
    axes.set_ylim(top=max(axes.get_ylim()[1], 1.12 * value))


def _draw_start(axes: Axes, epoch: float) -> None:
    low, high = axes.get_xlim()
    if not low <= epoch <= high:
        return
    axes.axvline(epoch, color=PALETTE["teacher"], lw=1.3, ls=(0, (1, 2)), zorder=2)
    right_half = epoch > (low + high) / 2
    axes.annotate(
        "teacher starts",
        (epoch, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-4 if right_half else 4, -1),
        textcoords="offset points",
        ha="right" if right_half else "left",
        va="top",
        fontsize=9,
        color=PALETTE["teacher"],
    )


def _legend(axes: Axes) -> None:
    """Above the plot, where it can hide no point."""
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1.0),
        ncols=3,
        frameon=False,
        borderaxespad=0.2,
        handlelength=2.4,
    )


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element that scales with its box and takes its colours from CSS."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]),
    )
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box, "matplotlib writes a viewBox"
    body = text[text.index(">", view_box.end()) + 1 :]
    # Several drawings share one page, so their ids must not clash.
    prefix = re.sub(r"\W+", "-", title.lower()).strip("-")
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", body)
    for name, colour in PALETTE.items():
        body = body.replace(colour, f"var(--{name}, {colour})")
    # No namespaces, which HTML implies, and no fixed size, which would defeat scaling.
    label = html.escape(title)
    return (
        f'<svg role="img" aria-label="{label}" {view_box[0]} stroke-linejoin="round">{body.strip()}'
    )
