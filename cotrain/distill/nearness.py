"""The yardstick of a teacher: the same loop with a sentence encoder in the language model's place.

What a language model teaches has to be more than that its candidates sound like what was taken;
this ranks by nothing else, thousands of rows a second.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cotrain.config import TeacherConfig
from cotrain.teacher.verdict import TeacherVerdict, confidence_of, probs_of_logits, ranks_of

# What cosines are multiplied by before the softmax that sentence encoders are trained with.
_SCALE = 20.0


class NearnessRanker:
    """Ranks candidates by how near their text is to those of the items last taken, in the place of
    `RankLLM`.

    Args:
        vectors: (V-1, E) text embedding of every item, 1..V-1.
        settings: K, how many items of the history count, the encoder's name.
        temperature: τ_t of Q.

    Source of the scale of cosines: MultipleNegativesRankingLoss of sentence-transformers.
    """

    prompts = None
    wants_scores = False

    def __init__(self, vectors: Tensor, settings: TeacherConfig, temperature: float = 1.0):
        self.vectors = F.pad(F.normalize(vectors, dim=1), (0, 0, 1, 0))
        self.settings = settings
        self.temperature = temperature
        self.identifier_bias = torch.zeros(settings.num_shown)
        self.backoffs: list[dict[str, Any]] = []

    @property
    def state_size(self) -> int:
        """E, width of the decision state."""
        return self.vectors.shape[1]

    @property
    def facts(self) -> dict[str, Any]:
        """What a report says of it, under the names of a language model's."""
        without = (
            "quantization", "parameters", "adapter", "decision_position", "identifiers",
            "template", "window", "stride", "shuffles", "calibration",
        )  # fmt: skip
        return {
            "model": self.settings.grounding_encoder,
            "mode": "nearness",
            "num_candidates": self.settings.num_candidates,
            **dict.fromkeys(without),
        }

    def cost(self, history: Sequence[int], candidates: Sequence[int]) -> int:
        """The same for all rows."""
        return 1

    def calibrate(
        self, histories: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]], progress: str | None = None,
    ) -> TeacherVerdict:  # fmt: skip
        """Nothing to remove: no candidate stands anywhere. Arguments as for `rank`."""
        return self.rank(histories, candidates, seeds)

    def rank(
        self, histories: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]], progress: str | None = None, scores: Any = None,
    ) -> TeacherVerdict:  # fmt: skip
        """Rank each row's candidates.

        Args:
            histories: B lists of item indices, oldest first.
            candidates: B lists of K item indices.
            seeds: Without meaning here, like the rest.

        Returns:
            The verdict, on the CPU; its decision state is the (E,) mean of the texts last taken.
        """
        started, count, size = time.perf_counter(), len(histories), self.settings.num_candidates
        states = torch.zeros(count, self.state_size)
        for state, history in zip(states, histories, strict=True):
            state += self.vectors[list(history[-self.settings.history_length :])].mean(0)
        states = F.normalize(states, dim=1)
        shown = self.vectors[torch.tensor(candidates, dtype=torch.int64).view(count, size)]
        logits = _SCALE * torch.einsum("be,bke->bk", states, shown)
        probs = probs_of_logits(logits, self.temperature)
        return TeacherVerdict(
            identifier_logits=logits,
            ranks=ranks_of(logits),
            probs=probs,
            decision_state=states,
            valid=torch.ones(count, dtype=torch.bool),
            confidence=confidence_of(probs),
            agreement=torch.zeros(count),
            shown_order=torch.arange(size).repeat(count, 1),
            seconds=time.perf_counter() - started,
        )
