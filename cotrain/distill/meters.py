"""What the teacher did over a run: counts, rates, position bias, and a few whole examples."""

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cotrain.data.batches import SequenceBatch
from cotrain.data.catalog import Catalog
from cotrain.distill.alignment import RecentRows
from cotrain.distill.losses import entropy
from cotrain.student.retrieval import Candidates
from cotrain.teacher.prompts import PromptBuilder
from cotrain.teacher.ranker import TeacherVerdict

NUM_EXAMPLES = 5


class TeacherMeter:
    """Running totals over all asked rows of one process.

    Args:
        num_candidates: K.

    Attributes:
        totals: Sums by name; `as_report` turns them into means and rates.
        failures: Rows without a valid verdict, by cause.
        rank_by_position: (K,) sum of the teacher's ranks (1 = best) by shown position.
        first_by_position: (K,) how often the identifier at that shown position was ranked first.
        student_states, decision_states: The latest rows of each, for effective ranks.
        examples: The first few asked rows, raw.
    """

    def __init__(self, num_candidates: int):
        self.num_candidates = num_candidates
        self.totals: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.rank_by_position = torch.zeros(num_candidates, dtype=torch.float64)
        self.first_by_position = torch.zeros(num_candidates, dtype=torch.float64)
        self.student_states = RecentRows()
        self.decision_states = RecentRows()
        self.examples: list[dict[str, Any]] = []

    def observe(
        self,
        batch: SequenceBatch,
        candidates: Candidates,
        verdict: TeacherVerdict,
        asked: Tensor,
        teacher_probs: Tensor,
    ) -> None:
        """Count one step; all arguments on the CPU, `asked` (B,) bool."""
        valid = verdict.valid
        ranks = verdict.ranking.argsort(1) + 1  # (B, K) rank of each candidate, 1 = best
        shown_ranks = ranks.gather(1, verdict.shown_order)[valid]
        self.rank_by_position += shown_ranks.sum(0)
        self.first_by_position += (shown_ranks == 1).sum(0)
        # The student's order is 1…K by construction: Spearman from the rank differences.
        size = self.num_candidates
        distance = (ranks - torch.arange(1, size + 1)).double().square().sum(1)
        agreement = 1 - 6 * distance / (size * (size**2 - 1))
        self.failures.update(verdict.failures)
        held = valid & (candidates.target_rank > 0)
        place = (candidates.target_rank - 1).clamp(min=0)[:, None]
        self.totals.update(
            {
                "rows_asked": int(asked.sum()),
                "rows_valid": int(valid.sum()),
                "seconds": verdict.seconds,
                "prompt_tokens": verdict.prompt_tokens,
                "entropy": float(entropy(teacher_probs)[valid].sum()),
                "confidence": float(verdict.confidence[valid].sum()),
                "target_in_candidates": int((candidates.target_rank[asked] > 0).sum()),
                "agreement": float(agreement[valid].sum()),
                "rows_with_target": int(held.sum()),
                "teacher_reciprocal": float((1 / ranks.gather(1, place).flatten()[held]).sum()),
                "student_reciprocal": float((1 / candidates.target_rank[held]).sum()),
            }
        )
        self.decision_states.add(verdict.decision_state[valid])
        for row in asked.nonzero().flatten().tolist()[: NUM_EXAMPLES - len(self.examples)]:
            self.examples.append(
                {
                    "user": int(batch.user_index[row]),
                    "history": batch.history[row][batch.history[row] != 0].tolist(),
                    "target": int(batch.cut_target[row]),
                    "candidates": candidates.item_ids[row].tolist(),
                    "shown_order": verdict.shown_order[row].tolist(),
                    "ranking": verdict.ranking[row].tolist(),
                    "probs": teacher_probs[row].tolist(),
                    "valid": bool(valid[row]),
                }
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint or another process."""
        return {
            "totals": dict(self.totals),
            "failures": dict(self.failures),
            "rank_by_position": self.rank_by_position,
            "first_by_position": self.first_by_position,
            "student_states": self.student_states.rows,
            "decision_states": self.decision_states.rows,
            "examples": self.examples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.totals = Counter(state["totals"])
        self.failures = Counter(state["failures"])
        self.rank_by_position = state["rank_by_position"]
        self.first_by_position = state["first_by_position"]
        self.student_states.rows = state["student_states"]
        self.decision_states.rows = state["decision_states"]
        self.examples = state["examples"]

    def merge(self, states: list[dict[str, Any]]) -> "TeacherMeter":
        """One meter over the states of all processes."""
        merged = TeacherMeter(self.num_candidates)
        for state in states:
            for name in ("totals", "failures"):
                for key, value in state[name].items():
                    getattr(merged, name)[key] += value
            merged.rank_by_position += state["rank_by_position"]
            merged.first_by_position += state["first_by_position"]
            for name in ("student_states", "decision_states"):
                if state[name] is not None:
                    getattr(merged, name).add(state[name])
            merged.examples += state["examples"][: NUM_EXAMPLES - len(merged.examples)]
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
        return {
            "rows_asked": totals["rows_asked"],
            "rows_valid": totals["rows_valid"],
            "failures": dict(self.failures),
            "seconds": totals["seconds"],
            "prompt_tokens": totals["prompt_tokens"],
            "rows_per_s": self.rows_per_s,
            "prompt_tokens_per_s": totals["prompt_tokens"] / max(totals["seconds"], 1e-9),
            "identifier_entropy": totals["entropy"] / valid,
            "entropy_uniform": float(np.log(self.num_candidates)),
            "confidence": totals["confidence"] / valid,
            "target_in_candidates": totals["target_in_candidates"] / max(totals["rows_asked"], 1),
            "agreement": totals["agreement"] / valid,
            "target_placing": {
                "rows": totals["rows_with_target"],
                "teacher": totals["teacher_reciprocal"] / max(totals["rows_with_target"], 1),
                "student": totals["student_reciprocal"] / max(totals["rows_with_target"], 1),
                "random": float((1 / np.arange(1, self.num_candidates + 1)).mean()),
            },
            "mean_rank_by_shown_position": (self.rank_by_position / valid).tolist(),
            "choice_share_by_shown_position": (self.first_by_position / valid).tolist(),
        }

    def readable_examples(
        self, catalog: Catalog, user_ids: list, prompts: PromptBuilder
    ) -> list[dict[str, Any]]:
        """The examples with titles in place of indices and the prompt as the teacher read it."""
        readable = []
        for example in self.examples:
            candidates = example["candidates"]
            shown = [candidates[place] for place in example["shown_order"]]
            prompt = prompts.build(example["history"], shown)
            ranking = example["ranking"]
            readable.append(
                {
                    "user": str(user_ids[example["user"]]),
                    "history": [
                        catalog.title(item)
                        for item in example["history"][-prompts.history_length :]
                    ],
                    "target": catalog.title(example["target"]),
                    "shown": [catalog.title(item) for item in shown],
                    "teacher_ranking": [catalog.title(candidates[place]) for place in ranking],
                    "teacher_probs": [example["probs"][place] for place in ranking],
                    "student_ranking": [catalog.title(item) for item in candidates],
                    "prompt": prompts.tokenizer.decode(prompt),
                    "valid": example["valid"],
                }
            )
        return readable
