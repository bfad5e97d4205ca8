"""Which rows ask the teacher, which process answers them, and how much each verdict counts."""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from cotrain.data.batches import SequenceBatch
from cotrain.distill.nearness import NearnessRanker
from cotrain.runtime.tracking import gather
from cotrain.student.retrieval import Candidates
from cotrain.teacher.ranker import RankLLM
from cotrain.teacher.verdict import TeacherVerdict

Ranker = RankLLM | NearnessRanker
Policy = Literal["all", "random", "entropy", "margin", "loss", "k_center"]


class Query:
    """An exact number of users that ask in an epoch, independent of batches and processes.

    Args:
        users: (n,) user indices that are trained.
        fraction: Share that asks.
        seed: Seed of the draw.
        policy: As `query.policy`.

    Attributes:
        rows_per_epoch: How many ask.
    """

    def __init__(self, users: np.ndarray, fraction: float, seed: int, policy: Policy = "random"):
        self.users = users
        self.rows_per_epoch = len(users) if policy == "all" else round(fraction * len(users))
        self.seed = seed
        self.policy: Policy = policy
        self._chosen: tuple[int, np.ndarray] = (-1, users[:0])

    @property
    def follows_student(self) -> bool:
        """Whether a pass of the student decides; then `settle` comes before each epoch."""
        return self.policy not in ("all", "random")

    def drawn(self, epoch: int) -> np.ndarray:
        """(n,) the users in the order in which they are drawn for an epoch."""
        return np.random.default_rng((self.seed, epoch, 1)).permutation(self.users)

    def settle(self, epoch: int, users: np.ndarray) -> None:
        """These users ask in this epoch."""
        self._chosen = (epoch, users)

    def choose(self, user_index: Tensor, epoch: int) -> Tensor:
        """(B,) bool: which of these users ask in this epoch."""
        if self._chosen[0] != epoch:
            assert not self.follows_student  # or it is settled
            self.settle(epoch, self.drawn(epoch)[: self.rows_per_epoch])
        return torch.from_numpy(np.isin(user_index.cpu().numpy(), self._chosen[1]))


class Question(NamedTuple):
    """A row for the teacher: items of its history, its K candidates, the seed of the order in which
    they are shown, and the student's scores of them."""

    history: list[int]
    candidates: list[int]
    seed: tuple[int, ...]
    scores: list[float]


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

    ranker: Ranker
    query: Query
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
            **self._scores(candidates.scores[complete].tolist()),
        )

    def ask(
        self, batch: SequenceBatch, candidates: Candidates, epoch: int
    ) -> tuple[TeacherVerdict, Tensor]:
        """Verdict on the rows of a CPU batch that ask in this epoch, spread over the whole batch,
        and the (B,) bool of those rows. A row with fewer than K unseen items is not asked but
        counted as failed. A collective; counts and seconds are of the rows that this process
        ranked, for whichever process."""
        chosen = self.query.choose(batch.user_index, epoch)
        if batch.borrowed:
            chosen = torch.zeros_like(chosen)
        asked = chosen & candidates.complete
        rows = asked.nonzero().flatten()
        own = [
            Question(
                batch.history[row][batch.history[row] != 0].tolist(),
                candidates.item_ids[row].tolist(),
                (self.seed, epoch, int(batch.user_index[row])),
                candidates.scores[row].tolist(),
            )
            for row in rows.tolist()
        ]
        verdict = self._answer(own)
        if too_few := int((chosen & ~candidates.complete).sum()):
            verdict.failures["too_few_candidates"] += too_few
        return verdict.spread(rows, len(chosen)), chosen

    def _answer(self, own: list[Question]) -> TeacherVerdict:
        """Verdict on this process's questions. All processes pool theirs and take equal shares by
        prompt length, for a step lasts as long as its slowest process."""
        processes = PartialState()
        if processes.num_processes == 1:
            return self._rank(own)
        lengths = [self.ranker.cost(asked.history, asked.candidates) for asked in own]
        pooled = gather((own, lengths))
        questions = [question for asked, _ in pooled for question in asked]
        shares = equal_shares([n for _, tokens in pooled for n in tokens], len(pooled))
        verdict = self._rank([questions[place] for place in shares[processes.process_index]])
        if not questions:
            return verdict
        # Where in the answers, one process's after another's, each of the questions is.
        place_of = {place: n for n, place in enumerate(itertools.chain(*shares))}
        first = sum(len(asked) for asked, _ in pooled[: processes.process_index])
        mine = [place_of[first + n] for n in range(len(own))]
        return verdict.with_rows(gather(verdict), torch.tensor(mine, dtype=torch.int64))

    def _rank(self, questions: Sequence[Question]) -> TeacherVerdict:
        return self.ranker.rank(
            [question.history for question in questions],
            [question.candidates for question in questions],
            [question.seed for question in questions],
            **self._scores([question.scores for question in questions]),
        )

    def _scores(self, scores: list[list[float]]) -> dict[str, Any]:
        return {"scores": scores} if self.passes_scores else {}


def equal_shares(costs: Sequence[float], count: int) -> list[list[int]]:
    """Indices of `costs` in `count` shares of about the same sum, the same whoever asks.

    The dearest first, each to the share that has least: at most a third above the best there is.

    Source: Graham, "Bounds on Multiprocessing Timing Anomalies", 1969.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    heap = [(0.0, share) for share in range(count)]
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        total, share = heapq.heappop(heap)
        shares[share].append(place)
        heapq.heappush(heap, (total + costs[place], share))
    return shares


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
