"""Two warm-ups for a small model, with a few candidates each, whose answers are known for certain:
what a label is, and what popularity is worth.

A small language model does not connect a label with what stands beside it. Trained on the student's
candidates alone, SmolLM2-135M still gave every label the same after 500 rows, and after 400 rows of
what was taken among others drawn evenly: a row of recommendation says little (the popularity of the
student's candidates makes the right one likelier by .04 nats), and nothing of it arrives before
labels are understood. Where the answer is certain it does. Recognition asks for the label of the
one candidate that stands in the history as well; popularity for the most popular one, in every
other row, so that recognition is not lost on the way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cotrain.errors import ConfigError
from cotrain.finetune.examples import Example
from cotrain.finetune.forward import identifier_logits
from cotrain.teacher.ranker import RankLLM

CANDIDATES = 6
Kind = Literal["recognition", "popularity"]


@dataclass(frozen=True)
class WarmUpRow:
    """A prompt with a few candidates.

    Attributes:
        tokens: Up to the answer prefix.
        labels: Which identifiers they have.
        right: Place of the one that is the answer.
        kind: What was asked for.
    """

    tokens: list[int]
    labels: tuple[int, ...]
    right: int
    kind: Kind


class WarmUpObjective:
    """Rows with one answer among a few candidates, no two of which are equally popular.

    Args:
        ranker: Whose prompts are trained; of a mode that ends its prompts where the label is due.
        rows: Give the histories.
        kind: `recognition`: an item of the history that is shown. `popularity`: in every other row
            the most popular candidate, none of which is in the history then.
        count: Rows to make of them.
        levels: (V,) popularity of each item index.
        seed: Of the draws.

    Raises:
        ConfigError: Popularity is to be learned from prompts that do not show it.
    """

    def __init__(
        self, ranker: RankLLM, rows: Sequence[Example], kind: Kind, count: int,
        levels: np.ndarray, seed: int,
    ):  # fmt: skip
        if kind == "popularity" and not ranker.prompts.shows_popularity:
            raise ConfigError(
                f"sft.popularity_rows is above 0, but the template {ranker.settings.template} does "
                "not show how popular a candidate is. Set teacher.template brief-popularity, or "
                "sft.popularity_rows 0."
            )
        self.ranker, self.rows, self.kind, self.count = ranker, rows, kind, count
        self.levels, self.seed = levels, seed
        known = np.unique(levels[1:])
        self._by_level = [np.flatnonzero(levels == level) for level in known]
        self._by_level = [items[items > 0] for items in self._by_level]

    def __len__(self) -> int:
        return self.count

    def encode(self, row: int, epoch: int) -> WarmUpRow:
        """Candidates of different popularity, none of the history but the answer, under drawn
        labels."""
        draw = np.random.default_rng((self.seed, 24, epoch, row))
        kind: Kind = "popularity" if self.kind == "popularity" and row % 2 else "recognition"
        prompts = self.ranker.prompts
        history = self.rows[row % len(self.rows)].history[-prompts.history_length :]
        shown = self._draw(history, min(CANDIDATES, prompts.num_shown), draw)
        right = int(np.argmax(self.levels[shown]))
        if kind == "recognition":
            right = int(draw.integers(len(shown)))
            shown[right] = history[int(draw.integers(len(history)))]
        labels = np.sort(draw.permutation(prompts.num_shown)[: len(shown)])
        tokens = prompts.build(history, shown, labels=labels.tolist())
        return WarmUpRow(tokens, tuple(labels.tolist()), right, kind)

    def _draw(self, history: Sequence[int], size: int, draw: np.random.Generator) -> list[int]:
        """Items that are not in the history, of as many levels as there are."""
        items: list[int] = []
        while len(items) < size:
            for level in draw.permutation(len(self._by_level)).tolist():
                left = np.setdiff1d(self._by_level[level], [*history, *items])
                if len(left) and len(items) < size:
                    items.append(int(draw.choice(left)))
        return items

    def loss_sum(self, encoded: Sequence[WarmUpRow]) -> Tensor:
        """Cross-entropy among the labels that are shown."""
        logits = self._logits(encoded)
        right = torch.tensor([row.right for row in encoded], device=logits.device)
        return torch.nn.functional.cross_entropy(logits, right, reduction="sum")

    @torch.no_grad()
    def validate(self, progress: str | None) -> dict[str, float]:
        """How often the right label is first, over 64 rows that are not trained on; of the kind
        that is new."""
        encoded = [self.encode(row, 2**31) for row in range(128)]
        encoded = [row for row in encoded if row.kind == self.kind][:64]
        right = []
        for start in range(0, len(encoded), 8):
            part = encoded[start : start + 8]
            logits = self._logits(part)
            own = logits[torch.arange(len(part)), [row.right for row in part]]
            right += ((logits >= own[:, None]).sum(1) == 1).tolist()
        accuracy = float(np.mean(right))
        return {"accuracy@1": accuracy, "ndcg@10": accuracy}

    def _logits(self, encoded: Sequence[WarmUpRow]) -> Tensor:
        first = self.ranker.prompts.identifiers.first_tokens
        logits = identifier_logits(self.ranker.backbone, [row.tokens for row in encoded], first)
        return logits.gather(1, torch.tensor([row.labels for row in encoded]).to(logits.device))
