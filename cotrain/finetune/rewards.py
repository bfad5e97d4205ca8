"""What a reasoning is worth to reinforcement learning, by parts; each from plain values.

Rewards lie in [0, 1] and penalties too. A part says one thing, so that the log shows which of them
a policy has learned to please.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cotrain.finetune_settings import RlConfig
from cotrain.rationale.checks import Checks, words_of

# Parts that are added and taken off, with the settings that weigh them.
REWARDS = {
    "rank": "rank_weight",
    "format": "format_weight",
    "grounding": "grounding_weight",
    "process": "process_weight",
}
PENALTIES = {"repetition": "repetition_weight", "length": "length_weight"}
_FOREIGN = {"foreign_title", "foreign_category"}
_RUN_WORDS = 3


@dataclass(frozen=True)
class Scored:
    """One reasoning.

    Attributes:
        reward: Weighted sum of the parts.
        parts: By the names in `REWARDS` and `PENALTIES`, before they are weighed.
    """

    reward: float
    parts: dict[str, float]


def worst_rank(scores: Sequence[float], place: int) -> int:
    """Where the item at `place` stands, 1 = best; ties count against it, and where its score or
    another is no number it is last."""
    if not all(map(math.isfinite, scores)):
        return len(scores)
    return sum(score >= scores[place] for score in scores)


def rank_reward(rank: int) -> float:
    """1 / rank of the true item. A reward for the first place alone would be the same for most
    groups of completions, and so teach nothing."""
    return 1 / rank


def format_reward(text: str, opening: str, labels: Sequence[str], ended: bool) -> float:
    """1 if a completion goes on to the ranking by itself, once, and speaks of no label before.

    Args:
        text: All that was written, up to its end.
        opening: What opens the ranking; where a template has nothing to know it by, any end by
            itself does.
        labels: Of candidates, without their brackets.
        ended: Whether it ended by itself.
    """
    if not opening:
        before, found, again = text, ended, False
    else:
        before, found, after = text.partition(opening)
        again = opening in after
    named = any(f"[{label}]" in before for label in labels)
    return float(bool(found) and not again and not named)


def grounding_reward(text: str, shown: Sequence[int], checks: Checks) -> float:
    """1 if a text names no titles or categories but those of the prompt.

    Args:
        text: The reasoning.
        shown: Item indices of history and candidates, one or more.
        checks: Of the catalogue.
    """
    flags = checks.flags(text, shown[:-1], shown[-1], ended=True)
    return float(not _FOREIGN & set(flags))


def process_reward(step_scores: Sequence[float]) -> float:
    """Mean of the scores of a reasoning's steps; 0 without any step."""
    return sum(step_scores) / len(step_scores) if step_scores else 0.0


def repetition_penalty(text: str) -> float:
    """Share of the runs of three words that were there before."""
    words = words_of(text)
    runs = [words[start : start + _RUN_WORDS] for start in range(len(words) - _RUN_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def length_penalty(num_tokens: int, min_tokens: int, cut_off: bool) -> float:
    """1 for a reasoning that was cut off at the limit, else the share by which it is shorter than
    `min_tokens`.

    An empty one says nothing foreign and nothing twice: without this it would be the safest.
    """
    if cut_off:
        return 1.0
    return max(0, min_tokens - num_tokens) / min_tokens if min_tokens else 0.0


def combined(parts: Mapping[str, float], settings: RlConfig) -> Scored:
    """Rewards less penalties, by the weights of the settings.

    Args:
        parts: By name; one that is missing, such as `process` without such a model, counts 0.
        settings: Weights.
    """
    gained = sum(parts.get(name, 0.0) * getattr(settings, key) for name, key in REWARDS.items())
    lost = sum(parts.get(name, 0.0) * getattr(settings, key) for name, key in PENALTIES.items())
    return Scored(gained - lost, dict(parts))
