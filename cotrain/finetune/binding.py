"""A warm-up that teaches a small model what a label is: of a few candidates one stands in the
history as well, and its label is the answer.

A small language model does not connect a label with what stands beside it. Trained on
recommendation alone, where the right label also has to be guessed, SmolLM2-135M still gave every
label the same after 500 rows; shown candidates to recognise, it named the right one of six in 81 of
100 cases after 320. From there on every row teaches about items.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cotrain.finetune.examples import Example
from cotrain.finetune.forward import identifier_logits
from cotrain.teacher.ranker import RankLLM

CANDIDATES = 6


@dataclass(frozen=True)
class BindingRow:
    """A prompt with a few candidates.

    Attributes:
        tokens: Up to the answer prefix.
        labels: Which identifiers they have.
        right: Place of the one that stands in the history.
    """

    tokens: list[int]
    labels: tuple[int, ...]
    right: int


class BindingObjective:
    """Rows whose answer is an item of the history that is shown.

    Args:
        ranker: Whose prompts are trained; of a mode that ends its prompts where the label is due.
        rows: Give the histories.
        count: Rows to make of them.
        num_items: Of the catalogue, from which the others are drawn.
        seed: Of the draws.
    """

    def __init__(
        self, ranker: RankLLM, rows: Sequence[Example], count: int, num_items: int, seed: int
    ):
        self.ranker, self.rows, self.count = ranker, rows, count
        self.num_items, self.seed = num_items, seed

    def __len__(self) -> int:
        return self.count

    def encode(self, row: int, epoch: int) -> BindingRow:
        """A drawn history item among items that are not in the history, under drawn labels."""
        draw = np.random.default_rng((self.seed, 24, epoch, row))
        prompts = self.ranker.prompts
        history = self.rows[row % len(self.rows)].history
        size = min(CANDIDATES, prompts.num_shown, self.num_items)
        recent = history[-prompts.history_length :]
        item = recent[int(draw.integers(len(recent)))]
        others: list[int] = []
        while len(others) < size - 1:
            other = int(draw.integers(1, self.num_items + 1))
            if other not in recent and other not in others:
                others.append(other)
        order = draw.permutation(size)
        shown = [[item, *others][place] for place in order]
        labels = np.sort(draw.permutation(prompts.num_shown)[:size])
        tokens = prompts.build(history, shown, labels=labels.tolist())
        return BindingRow(tokens, tuple(labels.tolist()), int(order.argmin()))

    def loss_sum(self, encoded: Sequence[BindingRow]) -> Tensor:
        """Cross-entropy among the labels that are shown."""
        logits = self._logits(encoded)
        right = torch.tensor([row.right for row in encoded], device=logits.device)
        return torch.nn.functional.cross_entropy(logits, right, reduction="sum")

    @torch.no_grad()
    def validate(self, progress: str | None) -> dict[str, float]:
        """How often the right label is first, over 64 rows that are not trained on."""
        encoded = [self.encode(row, -1 % 2**32) for row in range(64)]
        ranks = []
        for start in range(0, len(encoded), 8):
            part = encoded[start : start + 8]
            logits = self._logits(part)
            own = logits[torch.arange(len(part)), [row.right for row in part]]
            ranks += (logits >= own[:, None]).sum(1).tolist()
        found = np.array(ranks)
        return {"accuracy@1": float((found == 1).mean()), "ndcg@10": float((found == 1).mean())}

    def _logits(self, encoded: Sequence[BindingRow]) -> Tensor:
        first = self.ranker.prompts.identifiers.first_tokens
        logits = identifier_logits(self.ranker.backbone, [row.tokens for row in encoded], first)
        return logits.gather(1, torch.tensor([row.labels for row in encoded]).to(logits.device))
