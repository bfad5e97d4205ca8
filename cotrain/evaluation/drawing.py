"""How a chart is drawn: curves over epochs and values by shown position, as inline SVG.

Every colour is a CSS custom property with a fallback (`var(--student, #2563eb)`), so that one
drawing follows the page's light or dark scheme and still stands alone when it is copied out.
Draw within `matplotlib.rc_context(STYLE)`."""

import html
import io
import re
from dataclasses import dataclass
from typing import Any

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
STYLE: dict[Any, Any] = {
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
_LETTERS = 26


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


def line_chart(
    group: str,
    title: str,
    caption: str,
    lines: dict[str, Series],
    *,
    labels: dict[str, str] | None = None,
    start: float | None = None,
    flat: tuple[float, str] | None = None,
    from_zero: bool = True,
    across: str = "epoch",
) -> Chart | None:
    """Curves over epochs, or what else `across` says, keyed by palette colour; None when no curve
    has a point."""
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
    axes.set_xlabel(across)
    if any(series.x.size > _SMOOTH_ABOVE for series in lines.values()):
        caption += " Thin: logged steps; thick: their moving average."
    if dropped:
        caption += f" {dropped} value{'s' * (dropped > 1)} that {'were' if dropped > 1 else 'was'}"
        caption += " not finite cannot be drawn."
    return Chart(group, title, caption, _svg(figure, title))


def bar_chart(
    title: str,
    caption: str,
    bars: dict[str, list[float | None]],
    *,
    labels: dict[str, str],
    flat: tuple[float, str],
    lettered: bool,
) -> Chart | None:
    """Values by shown position, keyed by palette colour; None when there is none."""
    heights = {name: np.array(values, dtype=np.float64) for name, values in bars.items()}
    heights = {name: values for name, values in heights.items() if np.isfinite(values).any()}
    if not heights:
        return None
    figure, axes = _axes()
    size = max(map(len, heights.values()))
    width = 0.7 / len(heights)
    for place, (name, values) in enumerate(heights.items()):
        style = {"color": PALETTE[name], "label": labels.get(name)}
        if size <= _LETTERS:
            x = np.arange(len(values)) + width * (place - (len(heights) - 1) / 2)
            axes.bar(x, np.nan_to_num(values), width=width, **style)
        else:  # bars would be too thin to tell apart
            axes.plot(values, lw=1.6, **style)
            axes.set_ylim(bottom=0)
    shown = range(0, size, 1 if size <= _LETTERS else -(-size // 10))
    axes.set_xticks(list(shown), [position_label(position, lettered) for position in shown])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.7, size - 0.3)
    axes.set_xlabel("shown position")
    _draw_flat(axes, *flat)
    _legend(axes)
    return Chart("teacher", title, caption, _svg(figure, title))


def position_label(position: int, lettered: bool = True) -> str:
    """How a shown position is called: by its letter, or counted from 1."""
    return chr(ord("A") + position) if lettered and position < _LETTERS else str(position + 1)


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
