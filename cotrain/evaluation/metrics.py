"""Ranking metrics with one relevant item a user, over the whole catalogue.

Accuracy is derived from one number a user, the 1-based rank of the true next item, so that metrics,
slices and paired comparisons all look at the same ranks. What is recommended, to anybody and
whether true or not, is described by coverage and popularity. Pure: no I/O, no distributed calls."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

DEFAULT_KS = (1, 5, 10, 20)


# Lists of this length describe what a model recommends.
LIST_LENGTH = 10
# The most popular share of the catalogue counts as its head.
HEAD_SHARE = 0.1


def target_ranks(
    scores: Tensor, target_ids: Tensor, excluded_rows: Tensor, excluded_ids: Tensor
) -> Tensor:
    """Rank of the target among all eligible items, ties and NaN counted against the model.

    Eligible are all items but the padding item 0 and the excluded ones; the target is eligible
    even where it is excluded, because a repeated item is still the true answer. The rank is the
    number of eligible items whose score is not strictly below the target's. A model that gives
    every item the same score, or NaN, therefore gets the worst rank and not the best.

    Args:
        scores: (B, V) float, column 0 is padding. Not modified.
        target_ids: (B,) item indices ≥ 1.
        excluded_rows: (P,) int64 rows in which something is excluded, in any order and number.
        excluded_ids: (P,) int64 item index that is excluded in that row; duplicates allowed.

    Returns:
        (B,) int64, from 1 to the number of eligible items.

    Raises:
        ValueError: the shapes disagree, or a target is the padding item or outside the catalogue.
    """
    num_rows, num_items = _checked_shape(scores, target_ids, excluded_rows, excluded_ids)
    targets = target_ids.to(device=scores.device, dtype=torch.int64).unsqueeze(1)  # (B, 1)
    if num_rows and not 1 <= int(targets.min()) <= int(targets.max()) < num_items:
        raise ValueError(
            f"target_ids must lie between 1 and {num_items - 1} (0 is padding); "
            f"received {int(targets.min())} to {int(targets.max())}"
        )
    # Every comparison with NaN is false: NaN is not below, and so counts against the model.
    below = scores < scores.gather(1, targets)  # (B, V)
    below[excluded_rows, excluded_ids] = True
    below[:, 0] = True
    below.scatter_(1, targets, False)
    # Booleans are summed into int32 ten times as fast as into int64.
    return num_items - below.sum(dim=1, dtype=torch.int32).long()


def top_items(scores: Tensor, excluded_rows: Tensor, excluded_ids: Tensor, k: int) -> Tensor:
    """The k best items of each row: what its user would be shown.

    Args:
        scores: (B, V) float, column 0 is padding. Overwritten where nothing can be recommended.
        excluded_rows: (P,) int64, as for `target_ranks`.
        excluded_ids: (P,) int64; excluded without exception, also where it is the target.
        k: Length of the lists.

    Returns:
        (B, k) int64, best first; 0 where no eligible item with a score above -inf is left.
    """
    scores[excluded_rows, excluded_ids] = -torch.inf
    scores[:, 0] = -torch.inf
    length = min(k, scores.shape[1])
    best, ids = scores.topk(length, dim=1)
    if bool(best.isnan().any()):  # to topk, NaN is the greatest number
        scores.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        best, ids = scores.topk(length, dim=1)
    ids = ids.masked_fill(best == -torch.inf, 0)
    return torch.nn.functional.pad(ids, (0, k - length))


def _checked_shape(
    scores: Tensor, target_ids: Tensor, excluded_rows: Tensor, excluded_ids: Tensor
) -> tuple[int, int]:
    """(B, V) after checking that the tensors describe the same B rows."""
    rows = scores.shape[0] if scores.ndim == 2 else -1
    pairs = excluded_rows.ndim == 1 and excluded_rows.shape == excluded_ids.shape
    if scores.ndim != 2 or target_ids.shape != (rows,) or not pairs:
        shapes = [tuple(t.shape) for t in (scores, target_ids, excluded_rows, excluded_ids)]
        raise ValueError(
            "target_ranks expects scores (B, V), target_ids (B,), excluded_rows and excluded_ids "
            f"(P,); received {', '.join(map(str, shapes))}"
        )
    return rows, scores.shape[1]


def per_user_metric(ranks: np.ndarray, name: str) -> np.ndarray:
    """One metric for every user, for example to compare two models on the same users.

    With a single relevant item, recall@k is the hit rate and the ideal DCG is 1. `mrr` has no
    cut-off; in `mrr@k` a rank beyond k counts as 0.

    Args:
        ranks: (U,) 1-based ranks of the true items.
        name: `recall@k`, `ndcg@k` or `mrr@k` with k ≥ 1, or `mrr`.

    Returns:
        (U,) float64 in [0, 1].

    Raises:
        ValueError: the name is unknown, or a rank is not a number ≥ 1.
    """
    ranks = _checked_ranks(ranks)
    if name == "mrr":
        return 1.0 / ranks
    family, _, cutoff = name.partition("@")
    if family not in ("recall", "ndcg", "mrr") or not cutoff.isdecimal() or int(cutoff) < 1:
        raise ValueError(
            f"unknown metric {name!r}; expected 'recall@k', 'ndcg@k' or 'mrr@k' with k ≥ 1, or "
            "'mrr'"
        )
    hit = ranks <= int(cutoff)
    if family == "mrr":
        return hit / ranks
    return hit.astype(np.float64) if family == "recall" else hit / np.log2(ranks + 1.0)


def metrics_from_ranks(ranks: np.ndarray, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """Mean over users of recall@k and ndcg@k for every k, and of the reciprocal rank.

    Args:
        ranks: (U,) 1-based ranks of the true items, U ≥ 1.
        ks: cut-offs.

    Returns:
        `recall@k` for each k, then `ndcg@k` for each k, then `mrr`.

    Raises:
        ValueError: there are no users, a rank is not a number ≥ 1, or a k is below 1.
    """
    ranks = _checked_ranks(ranks)
    if not ranks.size:
        raise ValueError("received no ranks; a metric needs at least one evaluated user")
    names = [f"{family}@{k}" for family in ("recall", "ndcg") for k in ks] + ["mrr"]
    return {name: math.fsum(per_user_metric(ranks, name)) / ranks.size for name in names}


def _checked_ranks(ranks: np.ndarray) -> np.ndarray:
    ranks = np.asarray(ranks, dtype=np.float64)
    if ranks.ndim != 1:
        raise ValueError(f"ranks must have shape (U,); received {ranks.shape}")
    if not np.all(ranks >= 1):
        wrong = ranks[~(ranks >= 1)]
        raise ValueError(f"ranks are 1-based; received {wrong.size} below 1 or NaN: {wrong[:5]}")
    return ranks


def recommendation_metrics(recommended: np.ndarray, train_counts: np.ndarray) -> dict[str, float]:
    """How much of the catalogue is recommended to anybody, and how popular that is.

    Args:
        recommended: (n, k) item indices, one list a user, 0 where a list is shorter.
        train_counts: (V,) training interactions of each item; index 0 is padding.

    Returns:
        `coverage@k`: share of the catalogue that stands in at least one list.
        `popularity@k`: mean popularity percentile of the entries. An item's percentile is the share
            of the catalogue with fewer training interactions, plus half of that with as many:
            0.5 is what lists drawn at random have.
        `head_share@k`: share of the entries among the most popular tenth of the catalogue (rounded
            up; among equals the lower index counts as more popular).
        `gini@k`: Gini coefficient of how often each item of the catalogue is recommended; 0: all
            equally often, near 1: always the same few.
        The last three are NaN where nothing is recommended.

    Raises:
        ValueError: the shapes are wrong, or an index is outside the catalogue.
    """
    num_items = len(train_counts) - 1
    if recommended.ndim != 2 or train_counts.ndim != 1 or num_items < 1:
        raise ValueError(
            "recommendation_metrics expects lists (n, k) and counts (V,) with V ≥ 2; received "
            f"{recommended.shape} and {train_counts.shape}"
        )
    entries = recommended[recommended != 0]
    if entries.size and not 1 <= entries.min() <= entries.max() <= num_items:
        raise ValueError(
            f"recommended items must lie between 1 and {num_items}, with 0 for none; received "
            f"{entries.min()} to {entries.max()}"
        )
    k, counts = recommended.shape[1], train_counts[1:]
    shown = np.bincount(entries, minlength=num_items + 1)[1:]  # (V - 1,)
    total = max(int(shown.sum()), 1)
    _, group, sizes = np.unique(counts, return_inverse=True, return_counts=True)
    percentile = ((np.cumsum(sizes) - sizes / 2) / num_items)[group]
    head = np.argsort(-counts, kind="stable")[: math.ceil(HEAD_SHARE * num_items)]
    places = np.arange(1, num_items + 1)
    gini = ((2 * places - num_items - 1) * np.sort(shown)).sum() / (num_items * total)
    metrics = {
        "popularity": float((shown * percentile).sum()) / total,
        "head_share": float(shown[head].sum()) / total,
        "gini": float(gini),
    }
    if not entries.size:
        metrics = dict.fromkeys(metrics, math.nan)
    metrics = {"coverage": np.count_nonzero(shown) / num_items} | metrics
    return {f"{name}@{k}": value for name, value in metrics.items()}
