"""Has this teacher anything to teach? Asked on validation rows, before it teaches and later on.

A teacher that orders the student's candidates worse than the student can still know something that
the student does not. What tells is the blend, student score + β · log-probability of the teacher:
where no β beats the student's own order on rows it was not fitted on, there is nothing to absorb.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from cotrain.data.batches import left_pad
from cotrain.data.interactions import InteractionData
from cotrain.distill.querying import Ranker
from cotrain.distill.targets import logprobs, mean_spread
from cotrain.errors import DataError
from cotrain.evaluation.compare import Lift, paired_bootstrap
from cotrain.evaluation.metrics import per_user_metric
from cotrain.runtime.tracking import gather
from cotrain.student.protocol import Student
from cotrain.student.retrieval import retrieve

METRIC = "ndcg@10"
# Weights of the teacher that are tried, so that 1 gives its log-probabilities the mean spread that
# the student's scores have within a row.
WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
# λ_rank over the relative gain, and the most that it may be, by what is taught. A teacher's own
# distribution pulls away from all that the student knows; a blend holds that fast, and may weigh
# ten times as much: at 5 a student took over most of what the blend of the audit gains (README).
_LAMBDA = {"teacher": (2.5, 0.5), "blend": (250.0, 5.0)}
_BATCH = 256


@dataclass(frozen=True)
class AuditRows:
    """Validation rows whose candidates hold what was taken.

    Attributes:
        users: (N,) user indices.
        histories: N lists of item indices, oldest first.
        candidates: (N, K) item indices, the student's best first.
        scores: (N, K) the student's.
        counts: (N, K) how often each candidate was taken in training.
        places: (N,) where the true item stands, from 0.
    """

    users: np.ndarray
    histories: list[list[int]]
    candidates: Tensor
    scores: Tensor
    counts: Tensor
    places: np.ndarray


@dataclass(frozen=True)
class Audit:
    """What was found on N rows.

    Attributes:
        rows: N.
        student, teacher, blend: NDCG@10 of the true item in each order of the K candidates.
        popularity: The same by how often they were taken in training: what a teacher has to beat
            that knows more than the prompt can tell it of popularity.
        chance: The same of any order, expected.
        beta: β of the blend, mean of what was fitted on either half: scores that a nat of the
            teacher's is worth.
        teacher_lift: Teacher less student.
        blend_lift: Blend less student, on rows that β was not fitted on.
    """

    rows: int
    student: float
    teacher: float
    blend: float
    popularity: float
    chance: float
    beta: float
    teacher_lift: Lift
    blend_lift: Lift

    @property
    def teaches(self) -> bool:
        """Whether the blend's gain is above 0 with 95 % confidence."""
        return self.blend_lift.ci95[0] > 0

    def lambda_rank(self, target: str) -> float:
        """The weight of the ranking loss that `distill.lambda_rank auto` takes: it grows with the
        relative gain of the blend; 0 where no gain is shown.

        Args:
            target: As `distill.target`.
        """
        per_gain, most = _LAMBDA[target]
        gain = self.blend_lift.relative or 0.0
        return min(most, per_gain * gain) if self.teaches else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The form in which reports hold it."""
        return {
            "rows": self.rows,
            "student": self.student,
            "teacher": self.teacher,
            "blend": self.blend,
            "popularity": self.popularity,
            "chance": self.chance,
            "beta": self.beta,
            "teacher_lift": self.teacher_lift.as_dict(),
            "blend_lift": self.blend_lift.as_dict(),
            "teaches": self.teaches,
        }

    def __str__(self) -> str:
        low, high = self.blend_lift.ci95
        plain = (
            "it knows something that the student does not"
            if self.teaches
            else "these rows show nothing that it could teach"
        )
        return (
            f"Audit of the teacher on {self.rows:,} validation rows whose candidates hold the true "
            f"item, NDCG@10: student's order {self.student:.4f}, teacher's {self.teacher:.4f} "
            f"(by popularity {self.popularity:.4f}, by chance {self.chance:.4f}), "
            f"blend {self.blend:.4f} ({self.blend_lift.absolute:+.4f}, {low:+.4f} to {high:+.4f}): "
            f"{plain}."
        )


@torch.no_grad()
def audit_rows(
    model: Student, data: InteractionData, num_candidates: int, count: int, seed: int
) -> AuditRows:
    """Rows to ask on: users in a drawn order until enough have what they took among the candidates.

    Args:
        model: The student, left in the mode that it is in.
        data: Interactions.
        num_candidates: K.
        count: Rows at most.
        seed: Of the order of users.

    Raises:
        DataError: No user has it there.
    """
    device = model.item_vectors.device
    users = np.random.default_rng((seed, 8)).permutation(data.evaluated_users("validation"))
    was_training = model.training
    model.eval()
    kept, looked_at = [], 0
    for start in range(0, len(users), _BATCH):
        group = users[start : start + _BATCH]
        histories = [data.history_before(user, "validation") for user in group]
        targets = torch.tensor([data.target(user, "validation") for user in group], device=device)
        found = retrieve(
            model.user_states(histories), model.item_vectors, left_pad(histories).to(device),
            targets, num_candidates,
        ).cpu()  # fmt: skip
        good = (found.complete & (found.target_rank > 0)).nonzero().flatten()
        good = good[: count - sum(len(part[0]) for part in kept)]
        looked_at += len(group)
        kept.append((
            group[good.numpy()], [histories[row].tolist() for row in good.tolist()],
            found.item_ids[good], found.scores[good], found.target_rank[good].numpy() - 1,
        ))  # fmt: skip
        if sum(len(part[0]) for part in kept) == count:
            break
    model.train(was_training)
    chosen, lists, candidates, scores, places = zip(*kept, strict=True)
    if not sum(map(len, chosen)):
        raise DataError(
            f"Of {looked_at:,} validation users none has the true item among the student's "
            f"{num_candidates} candidates, so the teacher cannot be audited. Train longer before "
            "it starts (train.warmup_epochs), or set distill.audit off."
        )
    items = torch.cat(candidates)
    return AuditRows(
        np.concatenate(chosen), [each for part in lists for each in part], items,
        torch.cat(scores), torch.from_numpy(data.train_counts)[items], np.concatenate(places),
    )  # fmt: skip


def audit(
    rows: AuditRows, ranker: Ranker, seed: int, accelerator: Accelerator, samples: int = 10_000
) -> Audit:
    """Ask the teacher on the rows and compare; a collective, each process asks its share.

    Args:
        rows: Of the present student.
        ranker: The teacher, calibrated.
        seed: Of the orders in which candidates are shown, and of the halves.
        accelerator: Processes.
        samples: Bootstrap resamples.
    """
    own = list(range(accelerator.process_index, len(rows.users), accelerator.num_processes))
    verdict = ranker.rank(
        [rows.histories[row] for row in own], rows.candidates[own].tolist(),
        [(seed, 9, int(rows.users[row])) for row in own],
        "auditing the teacher" if accelerator.is_main_process else None,
        rows.scores[own].tolist() if ranker.wants_scores else None,
    )  # fmt: skip
    # Without a verdict all candidates are alike.
    probs = torch.where(verdict.valid[:, None], verdict.probs, 1 / verdict.probs.shape[1])
    every = torch.empty(rows.candidates.shape)
    for process, part in enumerate(gather(probs)):
        every[process :: accelerator.num_processes] = part
    return compare(rows.scores, every, rows.counts, rows.places, seed, samples)


def compare(
    scores: Tensor, probs: Tensor, counts: Tensor, places: np.ndarray, seed: int,
    samples: int = 10_000,
) -> Audit:  # fmt: skip
    """The student's order, the teacher's, and a blend of which β is fitted on the other half.

    Args:
        scores: (N, K) of the student.
        probs: (N, K) of the teacher.
        counts: (N, K) how often each candidate was taken in training.
        places: (N,) of the true item.
        seed: Of the halves.
        samples: Bootstrap resamples.
    """
    told = logprobs(probs)
    student = _per_row(scores, places)
    teacher = _per_row(told, places)
    betas = betas_tried(scores, told)
    by_beta = np.stack([_per_row(scores + beta * told, places) for beta in betas])
    half = np.random.default_rng((seed, 10)).permutation(len(places)) % 2 == 0
    blend, fits = student.copy(), []
    for fitted, held_out in ((half, ~half), (~half, half)):
        # Of equal betas the least: argmax takes the first.
        best = int(by_beta[:, fitted].mean(1).argmax()) if fitted.any() else 0
        blend[held_out] = by_beta[best, held_out]
        fits.append(betas[best])
    return Audit(
        rows=len(places),
        student=float(student.mean()),
        teacher=float(teacher.mean()),
        blend=float(blend.mean()),
        popularity=float(_per_row(counts, places).mean()),
        chance=float(per_user_metric(np.arange(1, scores.shape[1] + 1), METRIC).mean()),
        beta=float(np.mean(fits)),
        teacher_lift=paired_bootstrap(teacher, student, samples, seed),
        blend_lift=paired_bootstrap(blend, student, samples, seed),
    )


def betas_tried(scores: Tensor, told: Tensor) -> list[float]:
    """β for each of WEIGHTS, of (N, K) scores and log-probabilities; zeros where the teacher tells
    nothing apart in any row.

    One β for all rows: a teacher that is sure in one row and not in another keeps that difference,
    as does the student.
    """
    spread = mean_spread(told)
    unit = mean_spread(scores) / spread if spread > 1e-9 else 0.0
    return [weight * unit for weight in WEIGHTS]


def _per_row(scores: Tensor, places: np.ndarray) -> np.ndarray:
    """(N,) NDCG@10 of the true item; ties count against it."""
    own = scores[torch.arange(len(places)), torch.from_numpy(places)]
    return per_user_metric((scores >= own[:, None]).sum(1).numpy(), METRIC)
