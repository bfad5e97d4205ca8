"""The page's parts as HTML. Every value is escaped; only the SVG drawings are not."""

from pathlib import Path
from typing import Any

from cotrain.evaluation.drawing import PALETTE, Chart
from cotrain.evaluation.formats import page_template
from cotrain.evaluation.report import verdict
from cotrain.rationale.explain import Explanation, Reason
from cotrain.serving.inspector import Inspector, one_line
from cotrain.serving.records import SEARCHED, TOP, Answer, Lists, Person

_FOLDER = Path(__file__).parent
# Items of a history that are shown at once, and at all.
_FIRST, _MOST = 12, 200
# Of the lines between the lists: a row's height, the space between rows, the width.
_ROW, _GAP, _WIDTH = 56, 6, 72
_METRICS = ("ndcg@10", "recall@10", "mrr")
_GROUPS = {
    "learning": "Learning", "teacher": "The teacher", "rationales": "Rationales",
    "rank": "Representations",
}  # fmt: skip


def stylesheet() -> str:
    """CSS of the parts, with the colours of the drawings."""
    light = "; ".join(f"--{name}: {colour}" for name, colour in PALETTE.items())
    return f":root {{ {light}; }}\n" + (_FOLDER / "page.css").read_text("utf-8")


def notice(text: object, tone: str = "error") -> str:
    """One line that says what is wrong, or what is not there.

    Args:
        text: Or the error.
        tone: error, or quiet.
    """
    return _part("notice", text=one_line(text), tone=tone)


def head(inspector: Inspector) -> str:
    """Which run this is, and what came of it."""
    report = inspector.report
    models = {name: report.get(name) for name in ("student", "control") if report.get(name)}
    return _part(
        "head", name=report.get("name") or "run", folder=inspector.run.folder.name,
        verdict=verdict(report) if report.get("student") else None, models=models,
        metrics=_METRICS, lift=(report.get("lift") or {}).get("ndcg@10"),
    )  # fmt: skip


def person_view(inspector: Inspector, person: Person, lists: Lists) -> str:
    """Somebody's history and what both models recommend."""
    titles = inspector.catalog.titles
    latest = [titles[item] for item in person.history[::-1][:_MOST].tolist()]
    return _part(
        "person", person=person, latest=latest, first=_FIRST, total=len(person.history),
        taken_next=None if person.taken_next is None else titles[person.taken_next],
        lists=lists, shipped=inspector.report["shipped"], no_control=inspector.no_control,
        lines=_lines(lists), row=_ROW, gap=_GAP, width=_WIDTH, top=TOP, searched=SEARCHED,
        height=TOP * (_ROW + _GAP) - _GAP,
    )  # fmt: skip


def answer_view(inspector: Inspector, answer: Answer) -> str:
    """The teacher's order, with the probability of each identifier."""
    teacher = inspector.report["teacher"]
    return _part(
        "answer", answer=answer, teacher=teacher, model=Path(str(teacher.get("model"))).name,
        highest=max(row.prob for row in answer.rows) or 1,
        even=1 / len(answer.rows),
    )  # fmt: skip


def reasons_view(inspector: Inspector, found: Explanation) -> str:
    """The nearest reasons, and those of the recommended items: one that stands for several items
    is shown once."""
    of_items: dict[int, tuple[Reason, list[str]]] = {}
    for place, item in enumerate(found.items, start=1):
        for reason in item.reasons:
            _, titles = of_items.setdefault(reason.row, (reason, []))
            titles.append(f"{place}. {item.title}")
    shipped = inspector.report["shipped"]
    return _part("reasons", nearest=found.nearest, of_items=of_items.values(), shipped=shipped)


def charts_view(charts: list[Chart]) -> str:
    """The run's curves."""
    groups = {
        name: [chart for chart in charts if chart.group == group] for group, name in _GROUPS.items()
    }
    return _part("charts", groups={name: found for name, found in groups.items() if found})


def _part(macro: str, /, **values: Any) -> str:
    template = page_template(_FOLDER / "views.html.jinja")
    return str(getattr(template.module, macro)(**values))


def _lines(lists: Lists) -> list[tuple[float, float, str]]:
    """Heights at which each item stands in the control's and in the student's list, and whether it
    rose, fell or stayed."""
    if len(lists.of) < 2:
        return []

    def height(place: int) -> float:
        return (place - 1) * (_ROW + _GAP) + _ROW / 2

    lines = []
    for placed in lists.of["student"]:
        before = placed.elsewhere
        if before is not None and before <= TOP:
            moved = "rose" if placed.place < before else "fell" if placed.place > before else "same"
            lines.append((height(before), height(placed.place), moved))
    return lines
