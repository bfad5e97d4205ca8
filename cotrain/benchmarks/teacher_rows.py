"""The rows of `scripts/benchmark.py teacher`: the same in every measuring process."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cotrain.benchmarks.settings import SHAPE_7B
from cotrain.benchmarks.teacher_shape import VOCABULARY, RandomPrompts
from cotrain.config import DataConfig, TeacherConfig
from cotrain.data.interactions import load_interactions
from cotrain.teacher.prompts import PromptBuilder, make_prompts
from cotrain.teacher.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Rows:
    """What is ranked.

    Attributes:
        prompts: Makes prompts of it.
        histories: A list of item indices a row, oldest first.
        candidates: K item indices a row.
        seeds: Of the order in which a row's candidates are shown.
    """

    prompts: PromptBuilder
    histories: list[list[int]]
    candidates: list[list[int]]
    seeds: list[tuple[int, int]]

    @property
    def shown(self) -> np.ndarray:
        """(B, K) position of each candidate as shown, as the engine draws it."""
        draws = [np.random.default_rng(seed) for seed in self.seeds]
        pairs = zip(draws, self.candidates, strict=True)
        return np.array([draw.permutation(len(items)) for draw, items in pairs])

    def tokens(self) -> list[list[int]]:
        """The prompts that the engine builds."""
        return [
            self.prompts.build(history, [items[place] for place in places])
            for history, items, places in zip(
                self.histories, self.candidates, self.shown.tolist(), strict=True
            )
        ]


def make_rows(job: dict[str, Any], settings: TeacherConfig) -> Rows:
    """Random users with their training history, and candidates drawn by popularity from what they
    have not seen; random tokens where the model is random too.

    Args:
        job: `rows`, `model`, `data` and `seed`.
        settings: K, titles, template.

    Raises:
        CotrainError: Data or tokenizer cannot be read, or K candidates do not fit the context.
    """
    count, size = job["rows"], settings.num_candidates
    seeds = [(job["seed"], row) for row in range(count)]
    if job["model"] == SHAPE_7B:
        prompts = RandomPrompts(count, size, job["seed"], VOCABULARY)
        any_items = list(range(1, size + 1))
        return Rows(prompts, [[row] for row in range(count)], [any_items] * count, seeds)
    data = load_interactions(DataConfig(name=job["data"]))
    tokenizer, max_context_tokens = load_tokenizer(job["model"])
    prompts = make_prompts(
        settings, tokenizer, data.catalog.titles, data.catalog.categories, max_context_tokens,
        data.popularity_levels.tolist(),
    )  # fmt: skip
    random = np.random.default_rng(job["seed"])
    users = np.resize(random.permutation(data.trained_users), count)  # again from the first
    histories, candidates = [], []
    for user in users.tolist():
        history = data.train_history(user)
        likelihood = data.train_counts + 1e-3  # also of items that nobody had yet
        likelihood[0] = 0
        likelihood[history] = 0
        chosen = random.choice(
            len(likelihood), size, replace=False, p=likelihood / likelihood.sum()
        )
        histories.append(history.tolist())
        candidates.append(chosen.tolist())
    return Rows(prompts, histories, candidates, seeds)
