"""The page's drawings: NDCG@10 of every run, and every arm's difference with its intervals."""

from collections.abc import Collection
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cotrain.evaluation.drawing import PALETTE, STYLE, Chart
from cotrain.evaluation.drawing import _svg as as_svg

_ROW = 0.34
_BUDGETS = ("query.fraction", "query.reuse")  # how many rows ask


def draw_charts(result: dict[str, Any]) -> list[Chart]:
    """Every chart for which there is data.

    Args:
        result: As `summarise` returns it.
    """
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        return [
            chart
            for chart in (_score_chart(result), _difference_chart(result), _rows_chart(result))
            if chart is not None
        ]


def _score_chart(result: dict[str, Any]) -> Chart | None:
    scores = {
        name: of["test"][result["metric"]]
        for name, of in result["arms"].items()
        if of["test"][result["metric"]]
    }
    if not scores:
        return None
    title = "NDCG@10 on test"
    figure, axes = _rows(list(scores))
    for place, (name, score) in enumerate(scores.items()):
        colour = PALETTE["control" if name == result["baseline"] else "student"]
        _seeds(axes, place, score, colour)
        axes.plot([score["mean"]], [place], "|", ms=16, mew=2.4, color=colour)
        if score["sd"] is not None:
            ends = (score["mean"] - score["sd"], score["mean"] + score["sd"])
            axes.plot(ends, [place] * 2, lw=1.6, color=colour)
    return Chart(
        "results", title,
        "A point is a run, the upright stroke the mean over seeds, the line one standard deviation "
        "to either side. Arms share what is hard about these users and seeds: whether they differ "
        "is told by the differences.",
        as_svg(figure, title),
    )  # fmt: skip


def _difference_chart(result: dict[str, Any]) -> Chart | None:
    found = {
        name: of["against_baseline"][result["metric"]]
        for name, of in result["arms"].items()
        if of["against_baseline"]
    }
    if not found:
        return None
    title = f"NDCG@10 on test, difference to {result['baseline']}"
    figure, axes = _rows(list(found))
    axes.axvline(0, color=PALETTE["control"], lw=1.3, ls=(0, (3, 2)), zorder=2)
    for place, against in enumerate(found.values()):
        axes.plot(against["ci95"], [place] * 2, lw=5, color=PALETTE["student"], alpha=0.35,
                  solid_capstyle="butt")  # fmt: skip
        if against["over_seeds"]["ci95"] is not None:
            axes.plot(against["over_seeds"]["ci95"], [place] * 2, lw=1.3, color=PALETTE["ink"])
        axes.plot([against["absolute"]], [place], "|", ms=16, mew=2.4, color=PALETTE["student"])
        _seeds(axes, place, against["over_seeds"], PALETTE["student"])
    caption = "Broad: 95 % interval over users, without correction for several arms. "
    if any(against["over_seeds"]["ci95"] is not None for against in found.values()):
        caption += "Thin: that of the mean over seeds. "
    return Chart(
        "results", title, f"{caption}Points are seeds. Right of the dashed line is better.",
        as_svg(figure, title),
    )  # fmt: skip


def _rows_chart(result: dict[str, Any]) -> Chart | None:
    """Where at least two arms asked for different numbers of rows."""
    found = {
        name: (of["teacher_rows"], of["against_baseline"][result["metric"]])
        for name, of in result["arms"].items()
        if of["against_baseline"] and of["teacher_rows"]
    }
    if len({rows for rows, _ in found.values()}) < 2:
        return None
    title = "NDCG@10 gained, by rows that asked the teacher"
    figure = Figure(figsize=(4.9, 3.1), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color=PALETTE["control"], lw=1.3, ls=(0, (3, 2)), zorder=2)
    for knob in _BUDGETS:
        for curve in _alike_but(result, found, knob):
            points = sorted((found[name][0], found[name][1]["absolute"]) for name in curve)
            axes.plot(*zip(*points, strict=True), lw=1.3, color=PALETTE["student"], alpha=0.6)
    for name, (rows, against) in found.items():
        axes.plot([rows] * 2, against["ci95"], lw=1.3, color=PALETTE["student"], alpha=0.35)
        axes.plot([rows], [against["absolute"]], "o", ms=5, color=PALETTE["student"], mew=0)
        axes.annotate(name, (rows, against["absolute"]), xytext=(5, -9), fontsize=8,
                      textcoords="offset points")  # fmt: skip
    axes.set_xlim(0, 1.6 * max(rows for rows, _ in found.values()))  # names stand on the right
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.set_xlabel("rows asked in a run")
    return Chart(
        "results", title,
        f"Difference to {result['baseline']} on test, with 95 % intervals over users. Arms that "
        f"differ in nothing but {' or '.join(_BUDGETS)} are joined.",
        as_svg(figure, title),
    )  # fmt: skip


def _alike_but(result: dict[str, Any], names: Collection[str], knob: str) -> list[list[str]]:
    """Names of arms that differ in one setting only."""
    groups: dict[str, list[str]] = {}
    for name in names:
        settings = result["arms"][name]["settings"]
        others = {key: value for key, value in settings.items() if key != knob}
        groups.setdefault(repr(sorted(others.items())), []).append(name)
    return list(groups.values())


def _rows(names: list[str]) -> tuple[Figure, Axes]:
    """Axes with a row for each name, the first on top."""
    figure = Figure(figsize=(4.9, 0.75 + _ROW * max(len(names), 2)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    return figure, axes


def _seeds(axes: Axes, place: int, values: dict[str, Any], colour: str) -> None:
    shown = list(values["by_seed"].values())
    axes.plot(shown, [place] * len(shown), "o", ms=4, color=colour, alpha=0.75, mew=0, zorder=4)
