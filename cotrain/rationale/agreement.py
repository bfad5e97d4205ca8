"""Whether the reasons that are found fit what is recommended, against reasons drawn at random."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cotrain.errors import DataError
from cotrain.rationale.explain import Explainer


@dataclass(frozen=True)
class Agreement:
    """How often a reason's source item shares a category with the recommended item, one that at
    most half of the items have: every item of Amazon Beauty is in "Beauty".

    All arrays are (U,) float64: of each user the share among the recommended items that have
    such a category.

    Attributes:
        users: (U,) int64 index of the users.
        nearest: By the reason nearest to W_r u.
        nearest_random: By reasons drawn at random; the mean over a pool of them.
        shown: By the reason that is shown for the item.
        shown_random: By the one that is chosen in the same way from that random pool.
        k: Items recommended to a user.
        pool: Reasons of a user from which those for an item are chosen.
        own_excluded: Whether reasons written for the same user were left out, of either kind.
    """

    users: np.ndarray
    nearest: np.ndarray
    nearest_random: np.ndarray
    shown: np.ndarray
    shown_random: np.ndarray
    k: int
    pool: int
    own_excluded: bool

    def as_report(
        self, compare: Callable[[np.ndarray, np.ndarray], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Means, and how sure their difference is.

        Args:
            compare: Of found and random: `absolute`, `ci95` and `p_value`, such as
                `lambda a, b: paired_bootstrap(a, b).as_dict()`.
        """
        report: dict[str, Any] = {
            "k": self.k, "pool": self.pool, "own_excluded": self.own_excluded
        }  # fmt: skip
        pairs = {
            "nearest": (self.nearest, self.nearest_random),
            "shown": (self.shown, self.shown_random),
        }
        for name, (found, random) in pairs.items():
            lift = compare(found, random)
            report[name] = {
                "users": len(found),
                "share": float(found.mean()),
                "random": float(random.mean()),
                "difference": lift["absolute"],
                "ci95": lift["ci95"],
                "p_value": lift["p_value"],
            }
        return report


def measure_agreement(
    explainer: Explainer,
    k: int = 10,
    *,
    limit: int = 1000,
    pool: int = 50,
    exclude_own: bool = True,
    seed: int = 0,
) -> Agreement:
    """How often reasons fit, on test users.

    Items are recommended as on test: to each user by what lies before the test target.

    Args:
        explainer: Student, head and rationales.
        k: Items a user.
        limit: Users, drawn from all test users; all, where there are no more.
        pool: Rationales of a user, nearest or drawn, from which those of an item are chosen.
        exclude_own: Leave out rationales written for the same user, whose source items they took:
            of either kind, so that both are drawn from the same rationales.
        seed: Of users and rationales drawn.

    Raises:
        DataError: The items have no categories that tell them apart, or no user can be judged.
    """
    data, draw = explainer.data, np.random.default_rng(seed)
    categories = _telling_categories(data.catalog.categories)
    if not any(categories):
        raise DataError(
            f"The items of {data.name!r} have no categories, or only such as more than half of "
            "them have, so nothing can be said about whether reasons fit recommendations. Name "
            "others with --data.categories_column."
        )
    users = data.evaluated_users("test")
    if len(users) > limit:
        users = np.sort(draw.choice(users, limit, replace=False))
    made = list(explainer.recommended([data.history_before(u, "test") for u in users], k))
    states = torch.stack([state for state, _, _ in made])
    found, _ = explainer.nearest(states, pool, users.tolist() if exclude_own else None)
    judged, shares = [], []
    for user, (_, items, _), rows in zip(users.tolist(), made, found, strict=True):
        items = np.array([item for item in items if categories[item]], dtype=np.int64)
        random = explainer.random_rows(user if exclude_own else None, pool, draw)
        if len(items) and len(random):
            judged.append(user)
            shares.append(_shares(explainer, items, rows[rows >= 0], random, categories))
    if not judged:
        raise DataError(
            f"None of {len(users)} test users is recommended an item with a category and has a "
            "rationale of another user to compare with. Encode more rationales."
        )
    nearest, nearest_random, shown, shown_random = np.array(shares).T
    return Agreement(
        np.array(judged), nearest, nearest_random, shown, shown_random, k, pool, exclude_own
    )


def _telling_categories(joined: Sequence[str]) -> list[frozenset[str]]:
    """Of each item the categories, without those of more than half of the items that have any."""
    categories = [frozenset(text.split("|")) - {""} for text in joined]
    counts = Counter(name for names in categories for name in names)
    most = sum(map(bool, categories)) / 2
    common = {name for name, count in counts.items() if count > most}
    return [names - common for names in categories]


def _shares(
    explainer: Explainer, items: np.ndarray, found: np.ndarray, random: np.ndarray,
    categories: list[frozenset[str]],
) -> tuple[float, float, float, float]:  # fmt: skip
    """One user's share of items that are in a category of the source: of the nearest reason, of
    random ones, of the one shown for the item, and of the one shown from the random ones."""

    def agrees(item: int, row: int) -> bool:
        return not categories[item].isdisjoint(categories[explainer.source_items[row]])

    best = found[explainer.fitting(items, found)[0][:, 0]]
    of_random = random[explainer.fitting(items, random)[0][:, 0]]
    return (
        float(np.mean([agrees(item, found[0]) for item in items])),
        float(np.mean([agrees(item, row) for item in items for row in random])),
        float(np.mean([agrees(*pair) for pair in zip(items, best, strict=True)])),
        float(np.mean([agrees(*pair) for pair in zip(items, of_random, strict=True)])),
    )
