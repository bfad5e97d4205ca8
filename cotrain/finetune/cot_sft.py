"""Chain-of-thought SFT: history → reasoning → item, with the tokens that a teacher in mode `cot`
writes and the one step at which its verdict is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cotrain.data.interactions import InteractionData
from cotrain.errors import ConfigError, DataError
from cotrain.finetune.examples import Example, held_out_users, rows_at
from cotrain.finetune.forward import states_at, token_losses
from cotrain.finetune.losses import ce_sum
from cotrain.finetune.quality import measure
from cotrain.finetune.rank_sft import check_one_step, ranked_samples
from cotrain.finetune.run import Context, Outcome, Sample, title_lines
from cotrain.finetune.tuning import tune
from cotrain.rationale.records import position_hash, read_rationales
from cotrain.teacher.ranker import RankLLM


@dataclass(frozen=True)
class Reasoned:
    """A row and the reasoning that leads to its item.

    Attributes:
        example: The row; its target is among the candidates.
        text: Of the reasoning, without the opening that ends the prompt.
    """

    example: Example
    text: str


@dataclass(frozen=True)
class CotRow:
    """A row as it is trained.

    Attributes:
        tokens: Prompt, reasoning, and the answer prefix.
        prompt_tokens: How many of them are the prompt's.
        relevance: (K,) of the candidates as shown; 1 for the right one alone, because the reasoning
            is about it.
    """

    tokens: list[int]
    prompt_tokens: int
    relevance: Tensor


class CotObjective:
    """Cross-entropy on the reasoning and on the identifier after it.

    Args:
        ranker: In mode `cot`.
        train: Rows with reasonings.
        validation: Rows of held-out users.
        reasoning_weight: Of the mean loss on the tokens of a reasoning, the answer prefix included,
            so that the teacher learns to come to an end.
        answer_weight: Of the loss on the identifier, among the identifiers.
        seed: Of the orders in which candidates are shown, others in each epoch.

    Raises:
        ConfigError: Identifiers of several tokens, or both weights 0.
    """

    def __init__(
        self, ranker: RankLLM, train: Sequence[Reasoned], validation: Sequence[Example],
        reasoning_weight: float, answer_weight: float, seed: int,
    ):  # fmt: skip
        check_one_step(ranker)
        if not reasoning_weight + answer_weight > 0:
            raise ConfigError(
                "sft.reasoning_weight and sft.answer_weight are both 0, so there is nothing to "
                "learn; raise one."
            )
        self.ranker, self.train, self.validation = ranker, train, validation
        self.weights, self.seed = (reasoning_weight, answer_weight), seed

    def __len__(self) -> int:
        return len(self.train)

    def encode(self, row: int, epoch: int) -> CotRow:
        """Prompt, reasoning and answer, the candidates in the order of this epoch."""
        reasoned, prompts = self.train[row], self.ranker.prompts
        example = reasoned.example
        order = np.random.default_rng((self.seed, 22, epoch, row)).permutation(
            len(example.candidates)
        )
        prompt = prompts.build(example.history, [example.candidates[place] for place in order])
        wanted = torch.tensor([float(place == example.right_place) for place in order])
        reasoning = reasoning_tokens(self.ranker, reasoned.text)
        return CotRow(prompt + reasoning + prompts.answer, len(prompt), wanted)

    def loss_sum(self, encoded: Sequence[CotRow]) -> Tensor:
        """Of each row, both parts weighted."""
        backbone = self.ranker.backbone
        places = [list(range(row.prompt_tokens - 1, len(row.tokens))) for row in encoded]
        states = states_at(backbone, [row.tokens for row in encoded], places)
        counts = [len(of_row) for of_row in places]
        last = torch.tensor(counts).cumsum(0) - 1  # the decision position of each row
        inner = torch.ones(len(states), dtype=torch.bool)
        inner[last] = False
        targets = [row.tokens[place + 1] for row, own in zip(encoded, places, strict=True)
                   for place in own[:-1]]  # fmt: skip
        each = token_losses(backbone, states[inner.to(states.device)], targets)
        means = [part.mean() for part in each.split([count - 1 for count in counts])]
        first = self.ranker.prompts.identifiers.first_tokens
        logits = backbone.token_logits(
            states[last.to(states.device)], torch.tensor(first, device=states.device)
        )
        wanted = torch.stack([row.relevance for row in encoded]).to(logits.device)
        return self.weights[0] * torch.stack(means).sum() + self.weights[1] * ce_sum(logits, wanted)

    def validate(self, progress: str | None) -> dict[str, float]:
        """On the held-out rows, the reasoning written by the teacher itself."""
        return measure(self.ranker, self.validation, self.seed, progress).summary()


def reasoning_tokens(ranker: RankLLM, text: str) -> list[int]:
    """Tokens of a reasoning behind the opening that ends the prompt, cut to
    `teacher.reasoning_tokens`."""
    return ranker.prompts.reasoning(text)[: ranker.settings.reasoning_tokens]


def without_opening(text: str, opening: str) -> str | None:
    """A rationale without the words that the prompt ends with; none where it begins otherwise."""
    text, opening = text.strip(), opening.strip()
    return text[len(opening) :].strip() if text.startswith(opening) else None


def reasoned_rows(context: Context) -> tuple[list[Reasoned], dict[str, int]]:
    """Rows of the rationale file that can be learned from, and what became of all of them.

    Raises:
        DataError: It cannot be read, is of other data, or no row is left.
    """
    config, data = context.config, context.data
    path = Path(str(config.cot.rationales)).expanduser()
    path = path / "rationales.jsonl" if path.is_dir() else path
    positions, texts, counts = _positions(context, data, path)
    if not positions:
        raise DataError(
            f"None of {counts['read']:,} rationales in {path} can be learned from: {counts}. "
            "Expected rationales of training positions of these data, by users who are not held "
            "out, without the flags of cot.drop_flags, that begin like the reasoning of the "
            f"template {config.teacher.template} ({context.ranker.prompts.opening!r}). Choose "
            "another teacher.template, or write rationales for these data."
        )
    examples = rows_at(
        data, np.array(positions), config.examples, config.teacher.num_candidates, config.seed,
        context.student,
    )  # fmt: skip
    rows = [
        Reasoned(example, text)
        for example, text in zip(examples, texts, strict=True)
        if example.target_place is not None
    ]
    counts["target_not_among_candidates"] = len(examples) - len(rows)
    if not rows:
        raise DataError(
            f"Of {len(examples):,} rationales none is about an item among the candidates. Set "
            "examples.missing inject or examples.candidates popular, or take a better "
            "examples.student."
        )
    order = np.random.default_rng((config.seed, 23)).permutation(len(rows))
    rows = [rows[place] for place in order[: config.examples.rows].tolist()]
    counts["used"] = len(rows)
    return rows, counts


def _positions(
    context: Context, data: InteractionData, path: Path
) -> tuple[list[tuple[int, int]], list[str], dict[str, int]]:
    """User and cut, and text, of every rationale that can be used."""
    config, opening = context.config, context.ranker.prompts.opening
    users = {raw: index for index, raw in enumerate(data.user_ids)}
    apart = set(held_out_users(data, config.examples.held_out, config.seed).tolist())
    dropped = set((config.cot.drop_flags or "").split(",")) - {""}
    counts: dict[str, int] = dict.fromkeys(
        ("read", "flagged", "held_out_users", "other_data", "other_opening"), 0
    )  # fmt: skip
    positions, texts = [], []
    ids = data.catalog.item_ids
    for rationale in read_rationales(path):
        counts["read"] += 1
        user = users.get(rationale.user_id)
        text = without_opening(rationale.rationale, opening)
        if dropped & set(rationale.flags):
            counts["flagged"] += 1
        elif user is None or not _is_training(data, user, rationale.cut) or (
            position_hash([ids[i] for i in data.history(user)[: rationale.cut]],
                          ids[data.history(user)[rationale.cut]]) != rationale.history_hash
        ):  # fmt: skip
            counts["other_data"] += 1
        elif user in apart:
            counts["held_out_users"] += 1
        elif not text:
            counts["other_opening"] += 1
        else:
            positions.append((user, rationale.cut))
            texts.append(text)
    return positions, texts, counts


def _is_training(data: InteractionData, user: int, cut: int) -> bool:
    return 0 < cut < len(data.train_history(user))


def cot_sft(context: Context) -> Outcome:
    """The method: fit reasoning and answer, and show what the teacher then writes."""
    config = context.config
    rows, counts = reasoned_rows(context)
    context.say(f"Rationales: {', '.join(f'{name} {count:,}' for name, count in counts.items())}")
    objective = CotObjective(
        context.ranker, rows, context.examples.validation, config.sft.reasoning_weight,
        config.sft.answer_weight, config.seed,
    )  # fmt: skip
    progress = tune(
        context.adapter, objective, config.sft, context.folder, config.seed, context.accelerator,
        context.log,
    )  # fmt: skip
    learned = [
        Sample(f"Learned from, row {place + 1}",
               [*title_lines(context, row.example), f"Reasoning: {row.text}"])
        for place, row in enumerate(rows[:5])
    ]  # fmt: skip
    return Outcome(progress, {"rationales": counts}, samples=ranked_samples(context) + learned)
