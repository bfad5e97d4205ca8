"""What a comparison leaves: comparison.json, a page, and a table on the console."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cotrain.comparison.charts import draw_charts
from cotrain.comparison.verdict import STANDINGS, Verdict, standing, verdict
from cotrain.evaluation.drawing import PALETTE
from cotrain.evaluation.formats import (
    NONE,
    duration,
    number,
    p_text,
    page_template,
    signed,
)
from cotrain.evaluation.report import flattened, json_ready
from cotrain.files import write_whole


def write(result: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write comparison.json, then a self-contained comparison.html.

    Args:
        result: As `summarise` returns it.
        folder: Of the comparison.

    Returns:
        Paths of the JSON and of the HTML file.
    """
    found = verdict(result)
    plain = json_ready({**result, "verdict": asdict(found)})
    json_path, html_path = folder / "comparison.json", folder / "comparison.html"
    write_whole(json_path, json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(html_path, render(plain, found))
    return json_path, html_path


def render(result: dict[str, Any], found: Verdict) -> str:
    """The page as text.

    Args:
        result: What comparison.json holds.
        found: The verdict on it.
    """
    views: dict[str, list[dict[str, Any]]] = {}
    for row in result["slices"]:
        views.setdefault(row["view"], []).append(row)
    metric = result["metric"]
    return page_template(Path(__file__).with_name("page.html.jinja")).render(
        result=result,
        verdict=found,
        metric=metric,
        charts=draw_charts(result),
        slice_views=list(views.items()),
        sliced=[name for name, arm in result["arms"].items() if arm["seeds"]],
        standings={
            name: STANDINGS[standing(arm["against_baseline"][metric])]
            for name, arm in result["arms"].items()
            if arm["against_baseline"]
        },
        settings=flattened(result["settings"]),
        environment=flattened(result["environment"] or {}),
        palette=PALETTE,
    )


def console_table(result: dict[str, Any]) -> str:
    """The result as plain ASCII text, with the headline and what cannot be told.

    Args:
        result: As `summarise` returns it.
    """
    found, metric, baseline = verdict(result), result["metric"], result["baseline"]
    heads = (
        "arm", "seeds", "ndcg@10", "sd", "recall@10", f"to {baseline}", "95 % interval", "p (Holm)",
        "to twin", "validation", "teacher rows", "time",
    )  # fmt: skip
    rows = [list(heads)]
    for name, arm in result["arms"].items():
        test, against, twin = arm["test"], arm["against_baseline"], arm["over_own_twin"]
        row = [name, str(len(arm["seeds"]))]
        if not arm["seeds"]:
            rows.append(row + [NONE] * (len(heads) - 2))
            continue
        row += [number(test[metric]["mean"]), number(test[metric]["sd"])]
        row += [number(test["recall@10"]["mean"])]
        row += [NONE] * 3
        if against:
            low, high = against[metric]["ci95"]
            row[-3:] = [
                signed(against[metric]["absolute"]),
                f"{signed(low)} to {signed(high)}",
                p_text(against[metric]["p_holm"]).removeprefix("p ").removeprefix("= "),
            ]
        row += [signed(twin[metric]["mean"]) if twin else NONE]
        row += [number(arm["validation"][metric]["mean"])]
        row += [number(round(arm["teacher_rows"])), duration(arm["seconds"])]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    words = [f"{found.headline}. {found.measure}", *(f"- {line}" for line in found.findings)]
    words += ["What this cannot tell:", *(f"- {line}" for line in found.limits)]
    # A console in the C locale cannot print typographic signs.
    text = "\n".join([*lines, "", *words]).replace("−", "-").replace(NONE, "-")
    return text.replace("’", "'")
