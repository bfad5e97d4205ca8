"""The mode `bigrec`: the teacher writes the title of the next item, and candidates are scored by
how near theirs are to it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cotrain.config import TeacherConfig
from cotrain.errors import TeacherError
from cotrain.teacher.grounding import Grounding, SentenceEmbedder, TeacherEmbedder
from cotrain.teacher.item_prompts import ItemPrompts
from cotrain.teacher.memory import TokenBudget
from cotrain.teacher.passes import Passes
from cotrain.teacher.reading import Ask, Look, Reader
from cotrain.teacher.writing import write

# Rows whose distances to the whole catalogue are held at once.
_ROWS = 64


class TitleReader(Reader):
    """Writes titles and grounds them; with a memory, a history's title is written once.

    Args:
        passes: The decoder.
        prompts: Prompts for a title.
        settings: Length of titles, encoder, weight.
        budget: Prompt tokens of one pass.
        train_counts: (V,) how often each item was taken in training; needed where
            `grounding_weight` is popularity.

    Attributes:
        grounding: Finds the items that a text means.

    Raises:
        TeacherError: The counts are missing.

    Source: as `Grounding`. The paper ranks the whole catalogue, `ground`; a look scores the
    candidates that the student proposed. Its decision state is the one that chooses the title's
    first token.
    """

    def __init__(
        self, passes: Passes, prompts: ItemPrompts, settings: TeacherConfig, budget: TokenBudget,
        train_counts: np.ndarray | None = None,
    ):  # fmt: skip
        super().__init__(passes, prompts, settings, budget)
        by_popularity = settings.grounding_weight == "popularity"
        if by_popularity and train_counts is None:
            raise TeacherError(
                "teacher.grounding_weight is popularity, but no training counts were given. "
                "Expected train_counts, one for each item index, as InteractionData has them; or "
                "set teacher.grounding_weight none."
            )
        self._titles = prompts
        encoder = settings.grounding_encoder
        embedder = (
            TeacherEmbedder(passes, budget, prompts.encode_titles)
            if encoder == "teacher"
            else SentenceEmbedder(encoder, passes.backbone.device)
        )
        self.grounding = Grounding(
            prompts.written_titles(), embedder, train_counts if by_popularity else None,
            settings.grounding_power,
        )  # fmt: skip

    def read(
        self, asks: Sequence[Ask], progress: str | None = None,
        scores: Sequence[Sequence[float]] | None = None,
    ) -> list[Look]:  # fmt: skip
        """One look for each ask, in their order.

        Args:
            asks: Histories, and the candidates to score.
            progress: What a bar says; none: no bar.
            scores: The student's, of each candidate.

        Raises:
            TeacherError: They are to be the weight and were not given.
        """
        by_student = self.settings.grounding_weight == "student"
        if by_student and scores is None:
            raise TeacherError(
                "teacher.grounding_weight is student, but the candidates came without the "
                "student's scores. Expected one for each: candidates that a student retrieved, "
                "with `scores` given to rank; or set teacher.grounding_weight none or popularity."
            )
        looks = self.write_titles([history for history, _ in asks], progress)
        good = [row for row, look in enumerate(looks) if not look.failure]
        for start in range(0, len(good), _ROWS):
            rows = good[start : start + _ROWS]
            weights = None
            if by_student and scores is not None:
                weights = torch.tensor([scores[row] for row in rows], dtype=torch.float32)
            logits = self.grounding.logits(
                [looks[row].title for row in rows],
                torch.tensor([list(asks[row][1]) for row in rows]),
                weights,
            )
            for row, own in zip(rows, logits, strict=True):
                broken = not own.isfinite().all()
                # Copies, because a look that is remembered knows of no candidates.
                failure = "non_finite" if broken else None
                looks[row] = replace(looks[row], logits=own, failure=failure)
        return looks

    def write_titles(
        self, histories: Sequence[Sequence[int]], progress: str | None = None
    ) -> list[Look]:
        """A look with the title that is written after each history, and no logits."""
        return self.read_prompts([self._titles.build_title(row) for row in histories], progress)

    def ground(self, texts: Sequence[str]) -> Tensor:
        """(B, V) float32 distances of all items to texts, as `Grounding.ground`."""
        return self.grounding.ground(texts)

    def nearest(self, texts: Sequence[str], count: int) -> Tensor:
        """(B, count) int64 items nearest to texts, the nearest first."""
        return self.ground(texts).topk(count, dim=1, largest=False).indices

    def _modes(self):
        return {"bigrec": self._write}

    def _write(self, prompts: Sequence[list[int]], looks: Sequence[Look]) -> None:
        written, states = write(
            self.passes, prompts, self.settings.title_tokens, self._titles.is_over
        )
        for answer, look, state in zip(written, looks, states, strict=True):
            look.state = state
            look.title = self._titles.written(answer.tokens)
            look.generated_tokens = len(answer.tokens)
            look.failure = None if look.title else "empty"
