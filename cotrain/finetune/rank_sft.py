"""Ranking SFT: a loss on the identifier logits at the decision position, so that the one pass that
`direct` mode makes is the pass that is trained.

Source: the single-token objective of FIRST (Reddy et al., 2024), on rows of recommendation; the
labels are items that were taken, not a larger model's order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cotrain.errors import ConfigError
from cotrain.finetune.examples import Example
from cotrain.finetune.forward import identifier_logits
from cotrain.finetune.losses import RANKING_LOSSES
from cotrain.finetune.quality import measure
from cotrain.finetune.run import Context, Outcome, Sample, title_lines
from cotrain.finetune.tuning import tune
from cotrain.finetune.warm_up import Kind, WarmUpObjective
from cotrain.teacher.ranker import RankLLM


@dataclass(frozen=True)
class RankingRow:
    """A prompt and what its identifiers are worth.

    Attributes:
        tokens: Up to the answer prefix.
        relevance: (K,) of the candidates as shown.
    """

    tokens: list[int]
    relevance: Tensor


class RankObjective:
    """Rank-SFT of one ranker's prompts.

    Args:
        ranker: Whose prompts are trained, and who is validated.
        train: Rows to learn from.
        validation: Rows of held-out users.
        loss: ce, ranknet or listmle.
        seed: Of the orders in which candidates are shown, others in each epoch.

    Raises:
        ConfigError: Identifiers of several tokens, or candidates by windows.
    """

    def __init__(
        self, ranker: RankLLM, train: Sequence[Example], validation: Sequence[Example], loss: str,
        seed: int,
    ):  # fmt: skip
        check_one_step(ranker)
        self.ranker, self.train, self.validation = ranker, train, validation
        self.loss, self.seed = RANKING_LOSSES[loss], seed

    def __len__(self) -> int:
        return len(self.train)

    def encode(self, row: int, epoch: int) -> RankingRow:
        """The prompt with its candidates in the order of this epoch."""
        example = self.train[row]
        order = np.random.default_rng((self.seed, 22, epoch, row)).permutation(
            len(example.candidates)
        )
        shown = [example.candidates[place] for place in order]
        tokens = self.ranker.prompts.build(example.history, shown)
        return RankingRow(tokens, torch.tensor(example.relevance)[torch.from_numpy(order)])

    def loss_sum(self, encoded: Sequence[RankingRow]) -> Tensor:
        """Of the identifiers alone: what else the model might say there is left as it is."""
        backbone, identifiers = self.ranker.backbone, self.ranker.prompts.identifiers
        logits = identifier_logits(
            backbone, [row.tokens for row in encoded], identifiers.first_tokens
        )
        relevance = torch.stack([row.relevance for row in encoded]).to(logits.device)
        return self.loss(logits, relevance)

    def validate(self, progress: str | None) -> dict[str, float]:
        """On the held-out rows, letter bias taken out as a run does."""
        return measure(self.ranker, self.validation, self.seed, progress).summary()


def check_one_step(ranker: RankLLM) -> None:
    """Whether one token decides between all candidates of a row.

    Raises:
        ConfigError: It does not.
    """
    prompts, size = ranker.prompts, ranker.settings.num_candidates
    if not prompts.identifiers.are_single_tokens or prompts.num_shown < size:
        raise ConfigError(
            f"The teacher is trained on one step that decides between all {size} candidates, but "
            f"teacher.identifiers {ranker.settings.identifiers} take several, or teacher.window "
            f"{ranker.settings.window} shows fewer. Set teacher.identifiers letters and "
            "teacher.window none, with at most 26 teacher.num_candidates."
        )


def rank_sft(context: Context) -> Outcome:
    """The method: fit the one pass, and show what it does to ten held-out rows."""
    config, examples = context.config, context.examples
    objective = RankObjective(
        context.ranker, examples.train, examples.validation, config.sft.loss, config.seed
    )
    lengths = [len(objective.encode(row, 0).tokens) for row in range(min(64, len(objective)))]
    warm_ups = warm_up(context)
    context.say(f"Prompts: {np.mean(lengths):.0f} tokens on average, {max(lengths)} at most")
    progress = tune(
        context.adapter, objective, config.sft, context.folder, config.seed, context.accelerator,
        context.log,
    )  # fmt: skip
    facts = {"loss": config.sft.loss, "warm_ups": warm_ups}
    return Outcome(progress, facts, samples=ranked_samples(context))


def warm_up(context: Context) -> dict[str, Any]:
    """The warm-ups that the settings ask for; how each did, by kind."""
    config, sft = context.config, context.config.sft
    found: dict[str, Any] = {}
    kinds: list[tuple[Kind, int, float]] = [
        ("recognition", sft.recognition_rows, sft.recognition_learning_rate),
        ("popularity", sft.popularity_rows, sft.popularity_learning_rate),
        ("order", sft.order_rows, sft.popularity_learning_rate),
    ]
    for kind, count, rate in kinds:
        if not count:
            continue
        context.say(f"Warm-up: {count:,} rows of {kind}")
        objective = WarmUpObjective(
            context.ranker, context.examples.train, kind, count,
            context.data.popularity_levels, config.seed,
        )  # fmt: skip
        once = replace(
            sft, learning_rate=rate, epochs=1, max_steps=None, patience=1000, best_by="nll"
        )
        done = tune(
            context.adapter, objective, once, context.folder / kind, config.seed,
            context.accelerator,
        )  # fmt: skip
        found[kind] = {
            "rows": done.rows,
            "before": {name: done.start[name] for name in ("nll", "accuracy@1", "concordance")},
            "after": {name: done.best[name] for name in ("nll", "accuracy@1", "concordance")},
            "seconds": round(done.seconds, 1),
        }
    return found


def ranked_samples(context: Context, count: int = 10) -> list[Sample]:
    """What the teacher says of the first held-out rows."""
    rows = context.examples.validation[:count]
    found = measure(context.ranker, rows, context.config.seed)
    samples = []
    for place, (row, rank) in enumerate(zip(rows, found.ranks.tolist(), strict=True)):
        lines = title_lines(context, row, found.probs[place].argsort(descending=True).tolist())
        chance = float(found.probs[place, found.places[place]])
        lines.append(f"Rank of what was taken: {rank}, probability {chance:.3f}")
        if found.verdict.reasonings:
            lines.insert(2, f"Reasoning: {found.verdict.reasonings[place]}")
        samples.append(Sample(f"Held-out row {place + 1}", lines))
    return samples
