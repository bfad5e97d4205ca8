"""Warm-ups for a small model, whose answers are known for certain: what a label is, what popularity
is, and what it is worth among a row's own candidates.

A small language model does not connect a label with what stands beside it. Trained on the student's
candidates alone, SmolLM2-135M still gave every label the same after 500 rows, and after 400 rows of
what was taken among others drawn evenly: a row of recommendation says little (the popularity of the
student's candidates makes the right one likelier by .04 nats), and nothing of it arrives before
labels are understood. Where the answer is certain it does. Recognition asks, among six, for the
label of the one candidate that stands in the history as well; popularity for the most popular of
six. Order shows a row's own candidates and wants a probability that doubles with each level of
popularity. After the first, every other row is one of recognition, so that it is not lost on the
way.
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
Kind = Literal["recognition", "popularity", "order"]


@dataclass(frozen=True)
class WarmUpRow:
    """A prompt and the probabilities of its answer.

    Attributes:
        tokens: Up to the answer prefix.
        labels: Which identifiers the candidates have.
        target: Probability of each.
        kind: What was asked for.
    """

    tokens: list[int]
    labels: tuple[int, ...]
    target: tuple[float, ...]
    kind: Kind


class WarmUpObjective:
    """Rows whose answer follows from the prompt.

    Args:
        ranker: Whose prompts are trained; of a mode that ends its prompts where the label is due.
        rows: Give the histories, and the candidates of `order`.
        kind: `recognition`: an item of the history, among others that are not. In every other row,
            `popularity`: the most popular of a few, `order`: all candidates by their popularity.
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
        if kind != "recognition" and not ranker.prompts.shows_popularity:
            raise ConfigError(
                f"sft.{kind}_rows is above 0, but the template {ranker.settings.template} does "
                "not show how popular a candidate is. Set teacher.template brief-popularity, or "
                f"sft.{kind}_rows 0."
            )
        self.ranker, self.rows, self.count = ranker, rows, count
        self.kind: Kind = kind
        self.levels, self.seed = levels, seed
        known = np.unique(levels[1:])
        self._by_level = [np.flatnonzero(levels == level) for level in known]
        self._by_level = [items[items > 0] for items in self._by_level]

    def __len__(self) -> int:
        return self.count

    def encode(self, row: int, epoch: int) -> WarmUpRow:
        """Candidates in a drawn order."""
        draw = np.random.default_rng((self.seed, 24, epoch, row))
        if self.kind == "order" and row % 2:
            return self._order(self.rows[row // 2 % len(self.rows)], draw)
        kind: Kind = self.kind if row % 2 else "recognition"
        return self._one_of_a_few(self.rows[row % len(self.rows)], kind, draw)

    def _order(self, row: Example, draw: np.random.Generator) -> WarmUpRow:
        shown = draw.permutation(row.candidates)
        worth = 2.0 ** self.levels[shown]
        tokens = self.ranker.prompts.build(row.history, shown.tolist())
        labels = tuple(range(len(shown)))
        return WarmUpRow(tokens, labels, tuple((worth / worth.sum()).tolist()), "order")

    def _one_of_a_few(self, row: Example, kind: Kind, draw: np.random.Generator) -> WarmUpRow:
        """Candidates of different popularity, none of the history but what is to be recognised,
        under drawn labels."""
        prompts = self.ranker.prompts
        history = row.history[-prompts.history_length :]
        shown = self._draw(history, min(CANDIDATES, prompts.num_shown), draw)
        right = int(np.argmax(self.levels[shown]))
        if kind == "recognition":
            right = int(draw.integers(len(shown)))
            shown[right] = history[int(draw.integers(len(history)))]
        labels = np.sort(draw.permutation(prompts.num_shown)[: len(shown)]).tolist()
        tokens = prompts.build(history, shown, labels=labels)
        target = tuple(float(place == right) for place in range(len(shown)))
        return WarmUpRow(tokens, tuple(labels), target, kind)

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
        """Divergence of the labels' probabilities from the target, 0 at best."""
        return torch.stack([self._divergence(*each) for each in self._read(encoded)]).sum()

    @torch.no_grad()
    def validate(self, progress: str | None) -> dict[str, float]:
        """Divergence, how often a label is first that should be, and the share of pairs in their
        right order, over 64 rows of the kind that is new, which are not trained on."""
        encoded = [self.encode(row, 2**31) for row in range(128)]
        encoded = [row for row in encoded if row.kind == self.kind][:64]
        losses, first, pairs = [], [], []
        for start in range(0, len(encoded), 8):
            for row, logits in self._read(encoded[start : start + 8]):
                target = torch.tensor(row.target, device=logits.device)
                losses.append(float(self._divergence(row, logits)))
                best = logits == logits.max()
                first.append(bool((target[best] == target.max()).all()))
                apart = target[:, None] > target[None, :]
                pairs.append(float((logits[:, None] > logits[None, :])[apart].float().mean()))
        return {
            "nll": float(np.mean(losses)),
            "accuracy@1": float(np.mean(first)),
            "concordance": float(np.nanmean(pairs)),
        }

    @staticmethod
    def _divergence(row: WarmUpRow, logits: Tensor) -> Tensor:
        target = torch.tensor(row.target, device=logits.device)
        return torch.nn.functional.kl_div(logits.log_softmax(0), target, reduction="sum")

    def _read(self, encoded: Sequence[WarmUpRow]) -> list[tuple[WarmUpRow, Tensor]]:
        """Each row with the logits of its labels."""
        first = self.ranker.prompts.identifiers.first_tokens
        logits = identifier_logits(self.ranker.backbone, [row.tokens for row in encoded], first)
        return [(row, own[list(row.labels)]) for row, own in zip(encoded, logits, strict=True)]
