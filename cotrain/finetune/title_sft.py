"""What the modes without labels are trained on: the title of the next item (BIGRec), and yes or no
for one item (TALLRec).

Source: Bao et al., "A Bi-Step Grounding Paradigm for Large Language Models in Recommendation
Systems", 2023, first step; Bao et al., "TALLRec", RecSys 2023, whose rows are single ratings, where
ours are the item that was taken and candidates that were not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cotrain.errors import ConfigError
from cotrain.finetune.examples import Example
from cotrain.finetune.forward import states_at, token_losses
from cotrain.finetune.quality import measure
from cotrain.teacher.item_prompts import ItemPrompts
from cotrain.teacher.item_templates import Mode
from cotrain.teacher.ranker import RankLLM


@dataclass(frozen=True)
class TitleRow:
    """A prompt and the title after it.

    Attributes:
        tokens: What is read: the prompt, and the title without its last token.
        answer: What is to be written, one token after each of the last of these.
    """

    tokens: list[int]
    answer: list[int]


@dataclass(frozen=True)
class YesNoRow:
    """Questions about candidates of one row.

    Attributes:
        prompts: One for each.
        answers: Whether it was taken, 1 or 0.
    """

    prompts: list[list[int]]
    answers: list[float]

    @property
    def tokens(self) -> list[int]:
        """Of all questions: what a pass over the row holds."""
        return [token for prompt in self.prompts for token in prompt]


class TitleObjective:
    """The title of the next item, as `bigrec` writes it.

    Args:
        ranker: Whose prompts are trained, and who is validated.
        train: Rows to learn from; only their history and target are read.
        validation: Rows of held-out users.
        seed: Of the validation.

    Raises:
        ConfigError: The ranker has another mode.
    """

    def __init__(
        self, ranker: RankLLM, train: Sequence[Example], validation: Sequence[Example], seed: int
    ):
        self.ranker, self.prompts = ranker, prompts_of(ranker, "bigrec")
        self.train, self.validation, self.seed = train, validation, seed

    def __len__(self) -> int:
        return len(self.train)

    def encode(self, row: int, epoch: int) -> TitleRow:
        """The same in every epoch: nothing in it is drawn."""
        example = self.train[row]
        answer = self.prompts.title_answer(example.target)
        return TitleRow(self.prompts.build_title(example.history) + answer[:-1], answer)

    def loss_sum(self, encoded: Sequence[TitleRow]) -> Tensor:
        """() cross-entropy in nats, mean over a row's tokens, so that a long title counts no more
        than a short one."""
        backbone = self.ranker.backbone
        places = [range(len(row.tokens) - len(row.answer), len(row.tokens)) for row in encoded]
        states = states_at(backbone, [row.tokens for row in encoded], places)
        targets = [token for row in encoded for token in row.answer]
        losses = token_losses(backbone, states, targets)
        shares = [1 / len(row.answer) for row in encoded for _ in row.answer]
        return losses @ torch.tensor(shares, device=losses.device)

    def validate(self, progress: str | None) -> dict[str, float]:
        """On the held-out rows, with titles that are written and grounded."""
        return validated(self.ranker, self.validation, self.seed, progress)


class YesNoObjective:
    """Yes for the item that was taken, no for candidates that were not, as `pointwise` asks.

    Args:
        ranker: Whose prompts are trained, and who is validated.
        train: Rows to learn from.
        validation: Rows of held-out users.
        negatives: Candidates drawn for each row, others in each epoch; fewer where a row has fewer
            that the user does not take.
        seed: Of the draw.

    Raises:
        ConfigError: The ranker has another mode.
    """

    def __init__(
        self, ranker: RankLLM, train: Sequence[Example], validation: Sequence[Example],
        negatives: int, seed: int,
    ):  # fmt: skip
        self.ranker, self.prompts = ranker, prompts_of(ranker, "pointwise")
        self.train, self.validation = train, validation
        self.negatives, self.seed = negatives, seed

    def __len__(self) -> int:
        return len(self.train)

    def encode(self, row: int, epoch: int) -> YesNoRow:
        """The target and candidates drawn for this epoch."""
        example = self.train[row]
        others = [
            item
            for item, worth in zip(example.candidates, example.relevance, strict=True)
            if not worth and item != example.target
        ]
        draw = np.random.default_rng((self.seed, 22, epoch, row))
        drawn = draw.permutation(len(others))[: self.negatives]
        items = [example.target, *(others[place] for place in drawn)]
        prompts = [self.prompts.build_question(example.history, item) for item in items]
        return YesNoRow(prompts, [1.0] + [0.0] * (len(items) - 1))

    def loss_sum(self, encoded: Sequence[YesNoRow]) -> Tensor:
        """() binary cross-entropy of logit(Yes) − logit(No), mean over a row's questions."""
        backbone = self.ranker.backbone
        prompts = [prompt for row in encoded for prompt in row.prompts]
        states = states_at(backbone, prompts, [[len(prompt) - 1] for prompt in prompts])
        answers = torch.tensor(self.prompts.answer_ids, device=states.device)
        logits = backbone.token_logits(states, answers)
        wanted = [answer for row in encoded for answer in row.answers]
        losses = F.binary_cross_entropy_with_logits(
            logits[:, 0] - logits[:, 1], logits.new_tensor(wanted), reduction="none"
        )
        shares = [1 / len(row.prompts) for row in encoded for _ in row.prompts]
        return losses @ losses.new_tensor(shares)

    def validate(self, progress: str | None) -> dict[str, float]:
        """On all candidates of the held-out rows."""
        return validated(self.ranker, self.validation, self.seed, progress)


def validated(
    ranker: RankLLM, rows: Sequence[Example], seed: int, progress: str | None
) -> dict[str, float]:
    """Measures of a teacher without labels, which have no bias to take out."""
    return measure(ranker, rows, seed, progress, own_bias=False).summary()


def prompts_of(ranker: RankLLM, mode: Mode) -> ItemPrompts:
    """The prompts of a ranker in this mode.

    Raises:
        ConfigError: It is in another.
    """
    prompts = ranker.prompts
    if not isinstance(prompts, ItemPrompts) or prompts.mode != mode:
        raise ConfigError(
            f"The teacher is in teacher.mode {ranker.settings.mode}, but what it is to learn is "
            f"asked for in {mode}. Set teacher.mode {mode}, or another bigrec.task."
        )
    return prompts
