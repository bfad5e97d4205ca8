"""Ranking metrics with one relevant item a user, over the whole catalogue.

Everything is derived from one number a user, the 1-based rank of the true next item, so that
metrics, slices and paired comparisons all look at the same ranks. Pure: no I/O, no distributed
calls."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

DEFAULT_KS = (1, 5, 10, 20)


def target_ranks(scores: Tensor, target_ids: Tensor, excluded: Tensor) -> Tensor:
    """Rank of the target among all eligible items, ties and NaN counted against the model.

    Eligible are all items but the padding item 0 and the excluded ones; the target is eligible
    even where it is excluded, because a repeated item is still the true answer. The rank is the
    number of eligible items whose score is not strictly below the target's. A model that gives
    every item the same score, or NaN, therefore gets the worst rank and not the best.

    Args:
        scores: (B, V) float, column 0 is padding. Not modified.
        target_ids: (B,) item indices ≥ 1.
        excluded: (B, M) item indices, padded with 0, duplicates allowed; M may be 0.

    Returns:
        (B,) int64, from 1 to the number of eligible items.

    Raises:
        ValueError: the shapes disagree, or a target is the padding item or outside the catalogue.
    """
    num_rows, num_items = _checked_shape(scores, target_ids, excluded)
    targets = target_ids.to(device=scores.device, dtype=torch.int64).unsqueeze(1)  # (B, 1)
    if num_rows and not 1 <= int(targets.min()) <= int(targets.max()) < num_items:
        raise ValueError(
            f"target_ids must lie between 1 and {num_items - 1} (0 is padding); "
            f"received {int(targets.min())} to {int(targets.max())}"
        )
    # "not below" instead of "at or above": every comparison with NaN is false, so this counts NaN.
    counted = ~(scores < scores.gather(1, targets))  # (B, V)
    counted.scatter_(1, excluded.to(device=scores.device, dtype=torch.int64), False)
    counted[:, 0] = False
    counted.scatter_(1, targets, True)
    return counted.sum(dim=1)


def _checked_shape(scores: Tensor, target_ids: Tensor, excluded: Tensor) -> tuple[int, int]:
    """(B, V) after checking that the three tensors describe the same B rows."""
    rows = scores.shape[0] if scores.ndim == 2 else -1
    if scores.ndim != 2 or target_ids.shape != (rows,) or excluded.shape[:-1] != (rows,):
        raise ValueError(
            "target_ranks expects scores (B, V), target_ids (B,) and excluded (B, M); received "
            f"{tuple(scores.shape)}, {tuple(target_ids.shape)} and {tuple(excluded.shape)}"
        )
    return rows, scores.shape[1]


def per_user_metric(ranks: np.ndarray, name: str) -> np.ndarray:
    """One metric for every user, for example to compare two models on the same users.

    With a single relevant item, recall@k is the hit rate, the ideal DCG is 1, and the reciprocal
    rank is not cut off.

    Args:
        ranks: (U,) 1-based ranks of the true items.
        name: `recall@k` or `ndcg@k` with k ≥ 1, or `mrr`.

    Returns:
        (U,) float64 in [0, 1].

    Raises:
        ValueError: the name is unknown, or a rank is not a number ≥ 1.
    """
    ranks = _checked_ranks(ranks)
    if name == "mrr":
        return 1.0 / ranks
    family, _, cutoff = name.partition("@")
    if family not in ("recall", "ndcg") or not cutoff.isdecimal() or int(cutoff) < 1:
        raise ValueError(
            f"unknown metric {name!r}; expected 'recall@k' or 'ndcg@k' with k ≥ 1, or 'mrr'"
        )
    hit = ranks <= int(cutoff)
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
