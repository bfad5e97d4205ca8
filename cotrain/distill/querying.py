"""Which rows ask the teacher, and how much each verdict counts."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cotrain.data.batches import SequenceBatch
from cotrain.student.retrieval import Candidates
from cotrain.teacher.ranker import RankLLM
from cotrain.teacher.verdict import TeacherVerdict


class RandomQuery:
    """An exact share of the users, drawn anew each epoch, independent of batches and processes.

    Args:
        users: (n,) user indices that are trained.
        fraction: Share that asks.
        seed: Seed of the draw.
    """

    def __init__(self, users: np.ndarray, fraction: float, seed: int):
        self.users = users
        self.rows_per_epoch = round(fraction * len(users))
        self.seed = seed
        self._drawn: tuple[int, np.ndarray] = (-1, users[:0])

    def choose(self, user_index: Tensor, epoch: int) -> Tensor:
        """(B,) bool: which of these users ask in this epoch."""
        if self._drawn[0] != epoch:
            order = np.random.default_rng((self.seed, epoch, 1)).permutation(self.users)
            self._drawn = (epoch, order[: self.rows_per_epoch])
        return torch.from_numpy(np.isin(user_index.cpu().numpy(), self._drawn[1]))


@dataclass(frozen=True)
class Teacher:
    """The ranker and who asks it.

    Attributes:
        ranker: Gives verdicts.
        query: Chooses rows.
        num_candidates: K.
        seed: Of the order in which candidates are shown.
        probed_rows_per_s: Its rate on a few rows before the run.
        passes_scores: Whether the ranker gets the student's scores.
    """

    ranker: RankLLM
    query: RandomQuery
    num_candidates: int
    seed: int
    probed_rows_per_s: float
    passes_scores: bool = False

    def calibrate(
        self, rows: SequenceBatch, candidates: Candidates, progress: str | None = None
    ) -> TeacherVerdict:
        """Measure what each identifier gets whatever stands behind it, on rows of the student on
        the CPU, and remove it; returns the verdict on these rows before."""
        complete = candidates.complete.nonzero().flatten()
        return self.ranker.calibrate(
            [rows.history[row][rows.history[row] != 0].tolist() for row in complete],
            candidates.item_ids[complete].tolist(),
            [(self.seed, 4, int(row)) for row in complete],
            progress,
            **self._scores(candidates, complete),
        )

    def ask(
        self, batch: SequenceBatch, candidates: Candidates, epoch: int
    ) -> tuple[TeacherVerdict, Tensor]:
        """Verdict on the rows of a CPU batch that ask in this epoch, spread over the whole batch,
        and the (B,) bool of those rows. A row with fewer than K unseen items is not asked but
        counted as failed."""
        chosen = self.query.choose(batch.user_index, epoch)
        asked = chosen & candidates.complete
        rows = asked.nonzero().flatten()
        histories = [batch.history[row][batch.history[row] != 0].tolist() for row in rows]
        verdict = self.ranker.rank(
            histories,
            candidates.item_ids[rows].tolist(),
            [(self.seed, epoch, int(batch.user_index[row])) for row in rows],
            **self._scores(candidates, rows),
        )
        if too_few := int((chosen & ~candidates.complete).sum()):
            verdict.failures["too_few_candidates"] += too_few
        return verdict.spread(rows, len(chosen)), chosen

    def _scores(self, candidates: Candidates, rows: Tensor) -> dict[str, Any]:
        return {"scores": candidates.scores[rows].tolist()} if self.passes_scores else {}


def verdict_weight(verdict: TeacherVerdict, confidence: str) -> Tensor:
    """(B,) float32 weight of each row's distillation terms, 0 where the verdict is not valid.

    Args:
        verdict: On B rows.
        confidence: As `distill.confidence`: by `entropy`, by `agreement` of several shuffles, or
            `none`, the same for every valid row.
    """
    valid = verdict.valid.float()
    weights = {"entropy": verdict.confidence, "agreement": verdict.agreement}
    return valid * weights[confidence] if confidence in weights else valid
