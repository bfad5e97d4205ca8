"""Where a model is good: the users of a split in groups, and two models compared in each.

Three views, each of which holds every evaluated user:

- popularity of the target: items are cut into quartiles of the training interactions, so that the
  items of each quartile together have about a quarter of them. The first quartile is most of the
  catalogue, the last one a few hits.
- length of the history before the target, whole, not as much of it as the model reads.
- cold targets: no training interaction, 1 to 5, more.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cotrain.data.interactions import InteractionData
from cotrain.data.splits import Split
from cotrain.evaluation.compare import paired_bootstrap
from cotrain.evaluation.metrics import per_user_metric

METRICS = ("recall@10", "ndcg@10")
# First length of each group of histories.
LENGTHS = (1, 5, 10, 20, 50)
# A target with at most so many training interactions is cold.
COLD = 5


@dataclass(frozen=True)
class Slice:
    """Some of the evaluated users.

    Attributes:
        view: What the users are grouped by.
        label: Which group this is.
        detail: What belongs to it, where the label does not say it; or "".
        members: (n,) bool over the evaluated users.
    """

    view: str
    label: str
    detail: str
    members: np.ndarray


def popularity_quartiles(train_counts: np.ndarray) -> np.ndarray:
    """(V,) quartile 0 (least popular) to 3 of every item by training interactions.

    Items with equally many interactions share a quartile: the one in which the middle of their
    joint interactions falls when all are lined up from the least popular on. Where a few items
    dominate, a quartile can stay empty.
    """
    counts, group, sizes = np.unique(train_counts[1:], return_inverse=True, return_counts=True)
    held = counts * sizes
    middle = np.cumsum(held) - held / 2
    quartiles = np.minimum(4 * middle // max(int(held.sum()), 1), 3).astype(np.int64)
    return np.concatenate([[0], quartiles[group]])


def slices_of(data: InteractionData, split: Split) -> list[Slice]:
    """The groups of a split's evaluated users, without the empty ones.

    Args:
        data: The interactions and their split.
        split: Which held-out items; popularity is counted in training either way.
    """
    targets = data.targets(split)
    found = [
        *_by_popularity(targets, data.train_counts),
        *_by_length(data.history_lengths(split)),
        *_by_coldness(data.train_counts[targets]),
    ]
    return [group for group in found if group.members.any()]


def _by_popularity(targets: np.ndarray, train_counts: np.ndarray) -> Iterator[Slice]:
    quartiles = popularity_quartiles(train_counts)
    names = ("least popular quarter", "second quarter", "third quarter", "most popular quarter")
    for quartile, name in enumerate(names):
        inside = quartiles[1:] == quartile
        if inside.any():
            counts = train_counts[1:][inside]
            span = _span(int(counts.min()), int(counts.max()))
            items = f"{inside.sum():,} item{'' if inside.sum() == 1 else 's'}"
            yield Slice(
                "Popularity of the target",
                name,
                f"{items}, {span} interactions each",
                quartiles[targets] == quartile,
            )


def _by_length(lengths: np.ndarray) -> Iterator[Slice]:
    group = np.searchsorted(LENGTHS, lengths, side="right") - 1
    for index, low in enumerate(LENGTHS):
        high = LENGTHS[index + 1] - 1 if index + 1 < len(LENGTHS) else None
        yield Slice("Length of the history", f"{_span(low, high)} items", "", group == index)


def _by_coldness(counts: np.ndarray) -> Iterator[Slice]:
    view = "Cold targets"
    yield Slice(view, "no training interaction", "", counts == 0)
    yield Slice(view, f"1–{COLD} training interactions", "", (counts > 0) & (counts <= COLD))
    yield Slice(view, f"more than {COLD} training interactions", "", counts > COLD)


def _span(low: int, high: int | None) -> str:
    if high is None:
        return f"{low:,} or more"
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def slice_table(
    groups: list[Slice],
    student: np.ndarray,
    control: np.ndarray | None,
    samples: int = 10_000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Metrics in every group, and how far the student is from its control there.

    Args:
        groups: As `slices_of` gives them.
        student: (n,) ranks of the student for the evaluated users.
        control: (n,) ranks of the control, or None.
        samples: Resamples of the paired bootstrap, within the group.
        seed: Of the resampling.

    Returns:
        One row a group: view, label, detail, users, share (of the evaluated users), student and
        control (metric: mean) and lift (metric: as `Lift.as_dict`); the last two are None without a
        control.
    """
    table = []
    for group in groups:
        of_student = {name: per_user_metric(student[group.members], name) for name in METRICS}
        row: dict[str, Any] = {
            "view": group.view,
            "label": group.label,
            "detail": group.detail,
            "users": int(group.members.sum()),
            "share": float(group.members.mean()),
            "student": {name: float(values.mean()) for name, values in of_student.items()},
            "control": None,
            "lift": None,
        }
        if control is not None:
            of_control = {name: per_user_metric(control[group.members], name) for name in METRICS}
            row["control"] = {name: float(values.mean()) for name, values in of_control.items()}
            row["lift"] = {
                name: paired_bootstrap(of_student[name], of_control[name], samples, seed).as_dict()
                for name in METRICS
            }
        table.append(row)
    return table
