"""Completions of the policy as it is, the verdicts that they lead to, and what they are worth."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cotrain.errors import ConfigError, CotrainError, DataError
from cotrain.finetune import rewards
from cotrain.finetune.examples import Example
from cotrain.finetune.quality import Measured
from cotrain.finetune.rewards import Scored
from cotrain.finetune.run import Context
from cotrain.rationale.checks import Checks
from cotrain.teacher.backbone import Backbone
from cotrain.teacher.passes import Passes
from cotrain.teacher.process_reward import ProcessReward
from cotrain.teacher.search import Thought, tokens_until
from cotrain.teacher.steps import split_steps
from cotrain.teacher.writing import Sampling, write

# Prompts over which the mean logit of each identifier is taken, about.
_BIAS_PROMPTS = 200

Value = TypeVar("Value")


@dataclass(frozen=True)
class Task:
    """One prompt of a step.

    Attributes:
        example: Its row.
        shown: Candidates in the order in which they are labelled.
        place: Of the true item among them.
        tokens: The prompt, up to the opening of the reasoning.
    """

    example: Example
    shown: list[int]
    place: int
    tokens: list[int]


@dataclass(frozen=True)
class Rollout:
    """One completion of a task.

    Attributes:
        task: Its prompt.
        completion: The tokens that were drawn, through the one that decided that the reasoning is
            over: what is learned from. Without that one a policy could not learn when to stop.
        reasoning: Those of them that a verdict is read after, as in a run.
        text: Of the reasoning.
        ended: Whether it ended by itself, and not at the limit.
        logits: (K,) float32 of identifiers as shown, before their mean is taken out.
        rank: Of the true item.
        scored: Its reward.
    """

    task: Task
    completion: list[int]
    reasoning: list[int]
    text: str
    ended: bool
    logits: Tensor
    rank: int
    scored: Scored


class _Unstopped(Backbone):
    """The same model, to which the token that ends an answer is a token like any other: ending is a
    decision that is drawn, and it has to be among what is learned from."""

    @property
    def stop_ids(self) -> set[int]:
        """None."""
        return set()


class Actor:
    """Draws completions from the policy as it is, and rewards them.

    Args:
        context: Ranker, examples, settings.
        bias: (K,) what each identifier's logit has above the others', over prompts.

    Attributes:
        rows: Training rows whose candidates hold the true item.
        bias: A running mean, so that what is rewarded is not the letter that the policy likes.

    Raises:
        DataError: No row holds the true item.
    """

    def __init__(self, context: Context, bias: Tensor):
        self.settings, self.bias = context.config.rl, bias
        self.seed, self.limit = context.config.seed, context.config.teacher.reasoning_tokens
        self.ranker = context.ranker
        self.rows = [row for row in context.examples.train if row.target_place is not None]
        if not self.rows:
            raise DataError(
                f"None of {len(context.examples.train):,} training rows has the true item among "
                "its candidates, only items taken later. Expected some: set "
                "examples.future_weight 0, or examples.missing inject."
            )
        backbone, prompts = self.ranker.backbone, self.ranker.prompts
        self.stops = backbone.stop_ids
        parts = {f.name: getattr(backbone, f.name) for f in dataclasses.fields(Backbone)}
        self.passes = Passes(_Unstopped(**parts), prompts.prefix)
        catalog = context.data.catalog
        self.checks = Checks(
            catalog.titles, catalog.categories, min_words=0, max_words=10**9, language=None
        )
        self.process = _process_reward(context)

    def task(self, step: int, place: int) -> Task:
        """The prompt at a place of a step, the same whenever it is asked for."""
        number = step * self.settings.prompts_per_step + place
        epoch, inside = divmod(number, len(self.rows))
        order = np.random.default_rng((self.seed, 51, epoch)).permutation(len(self.rows))
        example = self.rows[order[inside]]
        mixed = np.random.default_rng((self.seed, 52, step, place)).permutation(
            len(example.candidates)
        )
        shown = [example.candidates[index] for index in mixed]
        tokens = self.ranker.prompts.build(example.history, shown)
        return Task(example, shown, shown.index(example.target), tokens)

    def draw(self, step: int, places: Sequence[int]) -> list[Rollout]:
        """A group of completions of each task, those of one beside each other.

        Raises:
            CotrainError: One group alone does not fit the memory.
        """
        tasks = [self.task(step, place) for place in places]
        found: list[list[Rollout]] = [[] for _ in tasks]
        size = self.settings.group_size

        def work(group: list[int]) -> None:
            seeds = [
                (self.seed, 53, step, places[row], copy) for row in group for copy in range(size)
            ]
            for row, rollouts in zip(
                group, self._groups([tasks[row] for row in group], seeds), strict=True
            ):
                found[row] = rollouts

        # Every copy of a prompt keeps its keys and values.
        lengths = [size * (len(task.tokens) + self.limit) for task in tasks]
        for group, done in self.ranker.budget.groups(lengths, work):
            if not done:
                raise CotrainError(
                    f"There is no memory to draw {size} reasonings of {self.limit} tokens for one "
                    f"prompt of {len(tasks[group[0]].tokens)} tokens. Lower rl.group_size, "
                    "teacher.reasoning_tokens or teacher.history_length."
                )
        self._follow(found)
        return [rollout for group in found for rollout in group]

    def _groups(self, tasks: Sequence[Task], seeds: list[tuple[int, ...]]) -> list[list[Rollout]]:
        size, thinker = self.settings.group_size, self.ranker.reader.thinker
        prompts = [task.tokens for task in tasks]

        def over(tokens: list[int]) -> bool:
            opened = bool(thinker.ranking) and thinker.ranking in thinker.text_of(tokens)
            return opened or not self.stops.isdisjoint(tokens)

        written, _ = write(
            self.passes, prompts, self.limit, over,
            Sampling(self.settings.temperature, 1.0, seeds), size,
        )  # fmt: skip
        ends = [self._end(row.tokens) for row in written]
        thoughts = [
            [Thought(reasoning, len(completion), ended) for completion, reasoning, ended in group]
            for group in in_groups(ends, size)
        ]
        backbone = self.ranker.backbone
        states = thinker.states_after(prompts, thoughts, self.ranker.prompts.answer)
        first = torch.tensor(self.ranker.prompts.identifiers.first_tokens, device=states.device)
        logits = backbone.token_logits(states, first).cpu()  # (B·G, K)
        drawn = [task for task in tasks for _ in range(size)]
        steps = self._step_scores(drawn, [reasoning for _, reasoning, _ in ends])
        rollouts = [
            self._rewarded(task, end, row, scores)
            for task, end, row, scores in zip(drawn, ends, logits, steps, strict=True)
        ]
        return in_groups(rollouts, size)

    def _end(self, tokens: list[int]) -> tuple[list[int], list[int], bool]:
        """Completion and reasoning among tokens that may go on behind their end, and whether they
        have one."""
        thinker = self.ranker.reader.thinker
        stop = next((place for place, token in enumerate(tokens) if token in self.stops), None)
        said = tokens if stop is None else tokens[:stop]
        text = thinker.text_of(said)
        if thinker.ranking and thinker.ranking in text:
            before, opening, _ = text.partition(thinker.ranking)
            count = tokens_until(said, thinker.text_of, len(before) + len(opening))
            kept = tokens_until(said, thinker.text_of, len(before.rstrip()))
            return said[:count], said[:kept], True
        return (said, said, False) if stop is None else (tokens[: stop + 1], said, True)

    def _step_scores(
        self, tasks: Sequence[Task], reasonings: Sequence[list[int]]
    ) -> list[list[float] | None]:
        """Of the steps of each, by the process reward model; none without one."""
        if self.process is None:
            return [None] * len(tasks)
        ends = [split_steps(self.ranker.backbone.tokenizer, tokens) for tokens in reasonings]
        prefixes = [
            task.tokens + tokens[:end]
            for task, tokens, of_row in zip(tasks, reasonings, ends, strict=True)
            for end in of_row
        ]
        left = iter(self.process.score(prefixes).tolist() if prefixes else [])
        return [[next(left) for _ in of_row] for of_row in ends]

    def _rewarded(
        self, task: Task, end: tuple[list[int], list[int], bool], logits: Tensor,
        steps: list[float] | None,
    ) -> Rollout:  # fmt: skip
        completion, reasoning, ended = end
        thinker, prompts, settings = self.ranker.reader.thinker, self.ranker.prompts, self.settings
        text = thinker.text_of(reasoning).strip()
        whole = thinker.text_of(completion)
        shown = [*task.example.history[-prompts.history_length :], *task.shown]
        rank = rewards.worst_rank((logits - self.bias).tolist(), task.place)
        parts = {
            "rank": rewards.rank_reward(rank),
            "format": rewards.format_reward(
                whole, thinker.ranking, prompts.identifiers.texts, ended
            ),
            "grounding": rewards.grounding_reward(text, shown, self.checks),
            "repetition": rewards.repetition_penalty(text),
            "length": rewards.length_penalty(len(reasoning), settings.min_tokens, not ended),
        }
        if steps is not None:
            parts["process"] = rewards.process_reward(steps)
        scored = rewards.combined(parts, settings)
        return Rollout(task, completion, reasoning, text, ended, logits, rank, scored)

    def _follow(self, groups: Sequence[Sequence[Rollout]]) -> None:
        """Move the mean logits to those of a step, after its ranks were read with the mean before:
        a prompt's own logits are not taken out of themselves."""
        shown = torch.stack([torch.stack([row.logits for row in rows]).mean(0) for rows in groups])
        good = shown[shown.isfinite().all(1)]
        if len(good):
            mean = (good - good.mean(1, keepdim=True)).mean(0)
            share = len(good) / (len(good) + _BIAS_PROMPTS)
            self.bias = (1 - share) * self.bias + share * mean


def measures(groups: Sequence[Sequence[Rollout]], bias: Tensor) -> dict[str, Any]:
    """What a step's completions are like; every number that tells when a policy games a part."""
    rollouts = [rollout for rows in groups for rollout in rows]
    found: dict[str, Any] = {}
    values = {"reward": [rollout.scored.reward for rollout in rollouts]}
    for name in rollouts[0].scored.parts:
        values[name] = [rollout.scored.parts[name] for rollout in rollouts]
    for name, numbers in values.items():
        found[name] = float(np.mean(numbers))
        found[f"{name}_std"] = float(np.std(numbers))
    spreads = [np.ptp([rollout.scored.reward for rollout in rows]) for rows in groups]
    found |= {
        "completion_tokens": float(np.mean([len(rollout.completion) for rollout in rollouts])),
        "cut_off": float(np.mean([not rollout.ended for rollout in rollouts])),
        "zero_spread": float(np.mean([spread < 1e-6 for spread in spreads])),
        "distinct": len({rollout.text for rollout in rollouts}) / len(rollouts),
        "no_verdict": float(np.mean([not r.logits.isfinite().all() for r in rollouts])),
        "letter_bias": [round(value, 4) for value in bias.tolist()],
        "letter_bias_spread": float(bias.max() - bias.min()),
    }
    return found


def mean_logits(measured: Measured) -> Tensor:
    """(K,) what each identifier's logit has above the others', over validation rows: the running
    mean begins with more prompts than a step has."""
    verdict = measured.verdict
    assert verdict.identifier_logits is not None  # one step decides between all candidates
    shown = verdict.identifier_logits.gather(1, verdict.shown_order)[verdict.valid]
    return (shown - shown.mean(1, keepdim=True)).mean(0)


def _process_reward(context: Context) -> ProcessReward | None:
    """The process reward model that the settings name; none where it weighs nothing.

    Raises:
        ConfigError: It weighs something, and they name none.
    """
    named, weight = context.config.rl.process_reward, context.config.rl.process_weight
    if not weight:
        return None
    if named is None:
        raise ConfigError(
            f"rl.process_weight is {weight}, but rl.process_reward is none; name the folder that "
            "scripts/train_teacher.py process-reward wrote, or set rl.process_weight 0."
        )
    ranker = context.ranker
    return ProcessReward.load(Path(named).expanduser(), ranker.passes, ranker.budget)


def in_groups(values: Sequence[Value], size: int) -> list[list[Value]]:
    """So many values each, in their order."""
    return [list(values[start : start + size]) for start in range(0, len(values), size)]
