"""How good a teacher's verdicts are: where it puts the true item, on rows whose candidates hold
it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cotrain.evaluation.metrics import per_user_metric
from cotrain.finetune.examples import Example
from cotrain.teacher.ranker import RankLLM
from cotrain.teacher.verdict import TeacherVerdict, probs_of_logits, ranks_of


@dataclass(frozen=True)
class Measured:
    """A teacher on N rows.

    Attributes:
        verdict: What it said.
        ranks: (N,) int64, where it puts the true item; ties, and rows without a verdict, count
            against it (K of these).
        probs: (N, K) its probabilities.
        places: (N,) where the true item stands among the candidates.
    """

    verdict: TeacherVerdict
    ranks: np.ndarray
    probs: Tensor
    places: np.ndarray

    def summary(self) -> dict[str, float]:
        """accuracy@1, NDCG@10, MRR, and the mean −log probability of the true item."""
        chosen = self.probs[torch.arange(len(self.places)), torch.from_numpy(self.places)]
        return {**metrics_of(self.ranks), "nll": float(-chosen.clamp(min=1e-6).log().mean())}


def metrics_of(ranks: np.ndarray) -> dict[str, float]:
    """accuracy@1, NDCG@10 and MRR of ranks of the true item."""
    return {
        "accuracy@1": float((ranks == 1).mean()),
        "ndcg@10": float(per_user_metric(ranks, "ndcg@10").mean()),
        "mrr": float((1 / ranks).mean()),
    }


def measure(
    ranker: RankLLM, rows: Sequence[Example], seed: int, progress: str | None = None,
    own_bias: bool = True,
) -> Measured:  # fmt: skip
    """Rank rows whose candidates hold the true item.

    Args:
        ranker: The teacher.
        rows: Such rows.
        seed: Of the orders in which candidates are shown.
        progress: What a bar says; none: no bar.
        own_bias: Take out the mean logit of each identifier over these rows, as calibration in
            batches would; false: the ranker's calibration stands.
    """
    verdict = ranker.rank(
        [row.history for row in rows], [row.candidates for row in rows],
        [(seed, 15, row.user, row.cut) for row in rows], progress,
        [row.scores for row in rows] if ranker.wants_scores else None,
    )  # fmt: skip
    ranks, probs = verdict.ranks, verdict.probs
    if own_bias and verdict.identifier_logits is not None and ranker.settings.shuffles == 1:
        logits = unbiased(verdict)
        ranks, probs = ranks_of(logits), probs_of_logits(logits, ranker.temperature)
    places = np.array([row.target_place for row in rows], dtype=np.int64)
    return Measured(verdict, true_ranks(ranks, verdict.valid, places), probs, places)


def true_ranks(ranks: Tensor, valid: Tensor, places: np.ndarray) -> np.ndarray:
    """(N,) int64 place of the true item of (N, K) ranks; ties broken against the teacher."""
    own = ranks[torch.arange(len(places)), torch.from_numpy(places)]
    worst = (ranks <= own[:, None]).sum(1)
    return torch.where(valid, worst, ranks.shape[1]).numpy()


def unbiased(verdict: TeacherVerdict) -> Tensor:
    """(N, K) logits without what each identifier has above the others over all rows."""
    logits = verdict.identifier_logits
    assert logits is not None
    shown = logits.gather(1, verdict.shown_order)
    good = shown[verdict.valid]
    bias = (good - good.mean(1, keepdim=True)).mean(0) if len(good) else 0.0
    return torch.empty_like(logits).scatter_(1, verdict.shown_order, shown - bias)
