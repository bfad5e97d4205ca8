"""Top-K candidates of the student, with the user's history masked."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """The student's proposal for B users.

    Attributes:
        item_ids: (B, K) int64 item indices, best first; 0 where no unseen item was left.
        scores: (B, K) scores of the student; -inf there.
        target_rank: (B,) int64, 1-based place of the true next item, 0 = absent.
    """

    item_ids: Tensor
    scores: Tensor
    target_rank: Tensor

    def cpu(self) -> "Candidates":
        """The same on the CPU."""
        return Candidates(self.item_ids.cpu(), self.scores.cpu(), self.target_rank.cpu())

    @property
    def complete(self) -> Tensor:
        """(B,) bool: K unseen items were found."""
        return self.scores[:, -1].isfinite()


@torch.no_grad()
def retrieve(
    user_state: Tensor,
    item_vectors: Tensor,
    history: Tensor,
    target_ids: Tensor,
    k: int,
    chunk_size: int = 262_144,
    excluded: Tensor | None = None,
) -> Candidates:
    """The K best unseen items of each user.

    Args:
        user_state: (B, D).
        item_vectors: (V, D), row 0 = padding, never retrieved.
        history: (B, M) item indices never retrieved, 0-padded.
        target_ids: (B,) true next items, only to report their place; one that is in the history
            (a repeated interaction) stays masked like everything seen.
        k: K ≤ V - 1.
        chunk_size: Items scored at once; bounds memory to B × chunk_size scores.
        excluded: (V,) bool, items that nobody gets.
    """
    best_scores = user_state.new_full((len(user_state), k), -torch.inf)
    best_ids = torch.zeros_like(best_scores, dtype=torch.int64)
    for start in range(0, len(item_vectors), chunk_size):
        scores = user_state @ item_vectors[start : start + chunk_size].T  # (B, chunk)
        inside = (history >= start) & (history < start + scores.shape[1])
        rows, columns = inside.nonzero(as_tuple=True)
        scores[rows, history[rows, columns] - start] = -torch.inf
        if start == 0:
            scores[:, 0] = -torch.inf
        if excluded is not None:
            scores.masked_fill_(excluded[start : start + chunk_size], -torch.inf)
        ids = torch.arange(start, start + scores.shape[1], device=scores.device)
        scores = torch.cat([best_scores, scores], 1)
        ids = torch.cat([best_ids, ids.expand(len(scores), -1)], 1)
        best_scores, places = scores.topk(k, dim=1)
        best_ids = ids.gather(1, places)
    # Among equal -inf, topk picks masked items as well; they, and a masked target, stay out.
    best_ids = best_ids.masked_fill(best_scores == -torch.inf, 0)
    hit = best_ids == target_ids[:, None]
    place = torch.where(hit.any(1), hit.int().argmax(1) + 1, 0)
    return Candidates(best_ids, best_scores, place)
