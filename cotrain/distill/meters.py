"""What the teacher did over a run: counts, rates, position bias, and a few whole examples."""

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cotrain.data.batches import SequenceBatch
from cotrain.data.catalog import Catalog
from cotrain.distill.alignment import RecentRows
from cotrain.student.retrieval import Candidates
from cotrain.teacher.prompts import PromptBuilder
from cotrain.teacher.verdict import TeacherVerdict, entropy

NUM_EXAMPLES = 5


class PositionBias:
    """How rankings depend on the place at which a candidate was shown, whatever stood there.

    Places are shuffled in every row, so without bias all of them are ranked alike. Where K is
    ranked by windows they count through the list as it was first shown.

    Args:
        num_candidates: K.

    Attributes:
        rows: Valid rows counted.
        rank_sum: (K,) sum of the ranks (1 = best) by shown position; ties share their mean.
        first_sum: (K,) how often that shown position was ranked before all others; where the first
            place is tied, none was.
    """

    def __init__(self, num_candidates: int):
        self.rows = 0
        self.rank_sum = torch.zeros(num_candidates, dtype=torch.float64)
        self.first_sum = torch.zeros(num_candidates, dtype=torch.float64)

    def observe(self, verdict: TeacherVerdict) -> None:
        """Count the valid rows of a verdict."""
        shown_ranks = verdict.ranks.gather(1, verdict.shown_order)[verdict.valid]  # (n, K)
        self.rows += len(shown_ranks)
        self.rank_sum += shown_ranks.double().sum(0)
        best = shown_ranks == shown_ranks.amin(1, keepdim=True)
        self.first_sum += (best & (best.sum(1, keepdim=True) == 1)).sum(0)

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint or another process."""
        return {"rows": self.rows, "rank_sum": self.rank_sum, "first_sum": self.first_sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.rows = state["rows"]
        self.rank_sum, self.first_sum = state["rank_sum"], state["first_sum"]

    def add(self, state: dict[str, Any]) -> None:
        """Count what another process counted."""
        self.rows += state["rows"]
        self.rank_sum += state["rank_sum"]
        self.first_sum += state["first_sum"]

    def as_report(self) -> dict[str, list[float]]:
        """Means over rows; empty where there were none."""
        sums = {
            "mean_rank_by_shown_position": self.rank_sum,
            "choice_share_by_shown_position": self.first_sum,
        }
        return {
            key: (total / self.rows).tolist() if self.rows else [] for key, total in sums.items()
        }


class TeacherMeter:
    """Running totals over all asked rows of one process.

    Args:
        num_candidates: K.

    Attributes:
        totals: Sums by name; `as_report` turns them into means and rates.
        failures: Rows without a valid verdict, by cause.
        partial: Valid rows whose answer stopped being an order too early, by cause.
        bias: By shown position, over the asked rows.
        bias_before: The same over the calibration rows, before calibration.
        student_states, decision_states: The latest rows of each, for effective ranks.
        examples: The first few asked rows, raw.
    """

    def __init__(self, num_candidates: int):
        self.num_candidates = num_candidates
        self.totals: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.partial: Counter[str] = Counter()
        self.bias = PositionBias(num_candidates)
        self.bias_before = PositionBias(num_candidates)
        self.student_states = RecentRows()
        self.decision_states = RecentRows()
        self.examples: list[dict[str, Any]] = []

    def observe_calibration(self, verdict: TeacherVerdict) -> None:
        """Count the verdict on the calibration rows, given before the calibration. These rows are
        the same on every process, and nobody learns from them."""
        self.bias_before.observe(verdict)

    def observe(
        self, batch: SequenceBatch, candidates: Candidates, verdict: TeacherVerdict, asked: Tensor
    ) -> None:
        """Count one step; all arguments on the CPU, `asked` (B,) bool."""
        valid = verdict.valid
        self.failures.update(verdict.failures)
        self.partial.update(verdict.partial)
        self.bias.observe(verdict)
        held = valid & (candidates.target_rank > 0)
        place = (candidates.target_rank - 1).clamp(min=0)[:, None]
        reciprocal = expected_reciprocal(verdict.ranks).gather(1, place).flatten()
        self.totals.update(
            {
                "rows_asked": int(asked.sum()),
                "rows_valid": int(valid.sum()),
                "seconds": verdict.seconds,
                "prompt_tokens": verdict.prompt_tokens,
                "generated_tokens": verdict.generated_tokens,
                "entropy": float(entropy(verdict.probs)[valid].sum()),
                "confidence": float(verdict.confidence[valid].sum()),
                "agreement_of_shuffles": float(verdict.agreement[valid].sum()),
                "agreement_with_student": float(_with_student(verdict.ranks)[valid].sum()),
                "target_in_candidates": int((candidates.target_rank[asked] > 0).sum()),
                "rows_with_target": int(held.sum()),
                "teacher_reciprocal": float(reciprocal[held].sum()),
                "student_reciprocal": float((1 / candidates.target_rank[held]).sum()),
            }
        )
        self.decision_states.add(verdict.decision_state[valid])
        prompted = asked & candidates.complete
        for row in prompted.nonzero().flatten().tolist()[: NUM_EXAMPLES - len(self.examples)]:
            self.examples.append(
                {
                    "user": int(batch.user_index[row]),
                    "history": batch.history[row][batch.history[row] != 0].tolist(),
                    "target": int(batch.cut_target[row]),
                    "candidates": candidates.item_ids[row].tolist(),
                    "shown_order": verdict.shown_order[row].tolist(),
                    "ranking": verdict.ranking[row].tolist(),
                    "ranks": verdict.ranks[row].tolist(),
                    "probs": verdict.probs[row].tolist(),
                    "reasoning": verdict.reasonings[row] if verdict.reasonings else "",
                    "valid": bool(valid[row]),
                }
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint or another process."""
        return {
            "totals": dict(self.totals),
            "failures": dict(self.failures),
            "partial": dict(self.partial),
            "bias": self.bias.state_dict(),
            "bias_before": self.bias_before.state_dict(),
            "student_states": self.student_states.rows,
            "decision_states": self.decision_states.rows,
            "examples": self.examples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        for name in ("totals", "failures", "partial"):
            setattr(self, name, Counter(state[name]))
        self.bias.load_state_dict(state["bias"])
        self.bias_before.load_state_dict(state["bias_before"])
        self.student_states.rows = state["student_states"]
        self.decision_states.rows = state["decision_states"]
        self.examples = state["examples"]

    def merge(self, states: list[dict[str, Any]]) -> "TeacherMeter":
        """One meter over the states of all processes."""
        merged = TeacherMeter(self.num_candidates)
        for state in states:
            for name in ("totals", "failures", "partial"):
                for key, value in state[name].items():
                    getattr(merged, name)[key] += value
            merged.bias.add(state["bias"])
            for name in ("student_states", "decision_states"):
                if state[name] is not None:
                    getattr(merged, name).add(state[name])
            merged.examples += state["examples"][: NUM_EXAMPLES - len(merged.examples)]
        # All processes calibrate on the same rows.
        merged.bias_before.add(states[0]["bias_before"])
        # Processes ask at the same time: the run waits for their mean, not for their sum.
        merged.totals.update({"seconds": merged.totals["seconds"] * (1 / len(states) - 1)})
        return merged

    @property
    def rows_per_s(self) -> float:
        """Rows asked per second of teacher time."""
        return self.totals["rows_asked"] / max(self.totals["seconds"], 1e-9)

    def as_report(self) -> dict[str, Any]:
        """The `teacher` part of a run's report."""
        totals = self.totals
        valid = max(totals["rows_valid"], 1)
        before = {"rows": self.bias_before.rows, **self.bias_before.as_report()}
        return {
            "rows_asked": totals["rows_asked"],
            "rows_valid": totals["rows_valid"],
            "rows_full": totals["rows_valid"] - sum(self.partial.values()),
            "partial": dict(self.partial),
            "failures": dict(self.failures),
            "seconds": totals["seconds"],
            "prompt_tokens": totals["prompt_tokens"],
            "generated_tokens": totals["generated_tokens"],
            "rows_per_s": self.rows_per_s,
            "prompt_tokens_per_s": totals["prompt_tokens"] / max(totals["seconds"], 1e-9),
            "entropy": totals["entropy"] / valid,
            "entropy_uniform": float(np.log(self.num_candidates)),
            "confidence": totals["confidence"] / valid,
            "agreement_of_shuffles": totals["agreement_of_shuffles"] / valid,
            "agreement_with_student": totals["agreement_with_student"] / valid,
            "target_in_candidates": totals["target_in_candidates"] / max(totals["rows_asked"], 1),
            "target_placing": {
                "rows": totals["rows_with_target"],
                "teacher": totals["teacher_reciprocal"] / max(totals["rows_with_target"], 1),
                "student": totals["student_reciprocal"] / max(totals["rows_with_target"], 1),
                "random": float((1 / np.arange(1, self.num_candidates + 1)).mean()),
            },
            **self.bias.as_report(),
            "before_calibration": before if self.bias_before.rows else None,
        }

    def readable_examples(
        self, catalog: Catalog, user_ids: list, prompts: PromptBuilder | None, history_length: int
    ) -> list[dict[str, Any]]:
        """The examples with titles in place of indices and the prompt as the teacher read it, where
        it reads any; of several windows the first prompt, over the candidates that were shown
        last."""
        readable = []
        for example in self.examples:
            candidates, ranking = example["candidates"], example["ranking"]
            shown = [candidates[place] for place in example["shown_order"]]
            identifiers, prompt = [], ""
            if prompts is not None:
                tokens = prompts.build(example["history"], shown[-prompts.num_shown :])
                prompt = prompts.tokenizer.decode(tokens)
                if len(shown) <= prompts.num_shown:  # in windows a candidate goes by several
                    identifiers = list(prompts.identifiers.texts)
            readable.append(
                {
                    "user": str(user_ids[example["user"]]),
                    "history": [
                        catalog.title(item) for item in example["history"][-history_length:]
                    ],
                    "target": catalog.title(example["target"]),
                    "shown": [catalog.title(item) for item in shown],
                    "identifiers": identifiers,
                    "teacher_ranking": [catalog.title(candidates[place]) for place in ranking],
                    "teacher_ranks": [example["ranks"][place] for place in ranking],
                    "teacher_probs": [example["probs"][place] for place in ranking],
                    "student_ranking": [catalog.title(item) for item in candidates],
                    "prompt": prompt,
                    "reasoning": example["reasoning"],
                    "valid": example["valid"],
                }
            )
        return readable


def expected_reciprocal(ranks: Tensor) -> Tensor:
    """(…, K) float64 mean of 1 / place over all ways to break the ties of (…, K) ranks, so that an
    order which says nothing has what any order has."""
    size = ranks.shape[-1]
    worth = 1 / torch.arange(1, size + 1, dtype=torch.float64)
    up_to = torch.cat([worth.new_zeros(1), worth.cumsum(0)])
    before = (ranks[..., None, :] < ranks[..., :, None]).sum(-1)
    equal = (ranks[..., None, :] == ranks[..., :, None]).sum(-1)
    return (up_to[before + equal] - up_to[before]) / equal


def _with_student(ranks: Tensor) -> Tensor:
    """(B,) Spearman correlation of (B, K) ranks with the student's, 1…K by construction; 0 where
    all are tied."""
    teacher = ranks.double() - ranks.double().mean(1, keepdim=True)
    student = torch.arange(ranks.shape[1], dtype=torch.float64)
    student = student - student.mean()
    return teacher @ student / (teacher.norm(dim=1) * student.norm()).clamp(min=1e-12)
