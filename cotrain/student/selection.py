"""Where a student is least sure, and which of its states are unlike each other: what policies
choose by, of rows that are to be asked about and of interactions that are to be explained."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

Unsureness = Literal["entropy", "margin", "loss"]
# Rows among which farthest-first chooses, at most.
POOL = 100_000
# Scores held at once.
_SCORES = 2**24


def unsure_of(logits: Tensor, by: Unsureness, targets: Tensor | None = None) -> Tensor:
    """(m,) how unsure softmax is: its entropy, minus the margin between its two best logits, or the
    cross-entropy of what was taken.

    Args:
        logits: (m, n), -inf where there is nothing to choose.
        by: Which of the three.
        targets: (m,) columns of what was taken, for the loss.
    """
    logprobs = torch.log_softmax(logits, dim=1)
    if by == "entropy":
        return torch.special.entr(logprobs.exp()).sum(1)
    if by == "loss":
        assert targets is not None
        return -logprobs.gather(1, targets[:, None])[:, 0]
    best = logprobs.topk(2, dim=1).values
    return best[:, 1] - best[:, 0]


@torch.no_grad()
def unsure_over_items(
    states: Tensor, item_vectors: Tensor, targets: Tensor, by: Unsureness
) -> Tensor:
    """(m,) as `unsure_of`, over all items.

    Args:
        states: (m, D).
        item_vectors: (V, D), row 0 = padding.
        targets: (m,) item indices that were taken.
        by: Which of the three.
    """
    items = item_vectors[1:]
    step = max(1, _SCORES // len(items))
    parts = zip(states.split(step), (targets - 1).split(step), strict=True)
    return torch.cat([unsure_of(part @ items.T, by, wanted) for part, wanted in parts])


@torch.no_grad()
def farthest_first(vectors: Tensor, count: int, progress: bool = False) -> list[int]:
    """Rows in an order in which each is the one that is least like all before it, by angle; the
    first row comes first.

    Args:
        vectors: (n, D) on the CPU, of any length.
        count: How many rows.
        progress: Show a bar.

    Source: Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985; Sener and
    Savarese, "Active Learning for Convolutional Neural Networks: A Core-Set Approach", ICLR 2018.
    """
    vectors = F.normalize(vectors, dim=1)
    likeness = torch.full((len(vectors),), -2.0)
    order, row = [], 0
    for _ in tqdm(range(min(count, len(vectors))), desc="k-center", disable=not progress):
        order.append(row)
        likeness = torch.maximum(likeness, vectors @ vectors[row])
        likeness[row] = 2
        row = int(likeness.argmin())
    return order
