"""Prints the first prompts of a run as its teacher would read them, without loading its weights."""

import os
from collections.abc import Iterator

import numpy as np
import torch

from cotrain.config import Config
from cotrain.data.batches import EpochSampler, SequenceDataset
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.distill.querying import Query
from cotrain.distill.run import check_against_data
from cotrain.errors import ConfigError
from cotrain.teacher.prompts import PromptBuilder, make_prompts
from cotrain.teacher.tokenizer import load_tokenizer


def show_prompts(config: Config, count: int) -> None:
    """Print the prompts of the first rows that ask the teacher.

    Users, histories and the order of candidates are those of the run; which candidates there are
    only its student will know, so the most popular unseen items stand in for them.

    Args:
        config: Settings of the run.
        count: Prompts to print.

    Raises:
        CotrainError: The settings, the data or the teacher's tokenizer cannot work.
    """
    if os.environ.get("RANK", "0") != "0":  # of several processes one prints
        return
    settings = config.teacher
    if settings.model is None:
        raise ConfigError("There are no prompts to show: teacher.model is none. Name a model.")
    data = load_interactions(config.data)
    check_against_data(config, data, 1)
    tokenizer, max_context_tokens = load_tokenizer(settings.model)
    catalog = data.catalog
    prompts = make_prompts(
        settings, tokenizer, catalog.titles, catalog.categories, max_context_tokens,
        data.popularity_levels.tolist(),
    )  # fmt: skip
    print(
        f"Prompts of mode {settings.mode}, template {settings.template}, for {settings.model} "
        f"(context {max_context_tokens:,} tokens); data: {data.name}.\n"
        "No student is trained yet: the candidates are the most popular items that the user has "
        "not had."
    )
    if prompts.num_shown < settings.num_candidates:
        print(
            f"{settings.num_candidates} candidates are ranked {prompts.num_shown} at a time; shown "
            "is the first window, at the back."
        )
    shown = 0
    for user, history in _asking_rows(config, data):
        if shown == count:
            break
        shown += 1
        print(_one(config, data, prompts, user, history, f"Prompt {shown} of {count}"))
    if shown < count:
        print(f"\nOnly {shown} rows ask the teacher in an epoch; see query.fraction.")


def _asking_rows(config: Config, data: InteractionData) -> Iterator[tuple[int, list[int]]]:
    """(user, history) of the rows of the first epoch with the teacher, in the order of the run;
    where a student is to choose them, of rows drawn at random."""
    epoch = config.train.warmup_epochs
    dataset = SequenceDataset(data, config.student.max_length, config.seed, config.train.windows)
    query = Query(dataset.users, config.query.fraction, config.seed)
    sampler = EpochSampler(dataset.users, config.train.batch_size, config.seed)
    sampler.start_at(epoch)
    for keys in sampler:
        chosen = query.choose(torch.tensor([key[0] for key in keys]), epoch)
        for key, asks in zip(keys, chosen.tolist(), strict=True):
            if asks:
                history = dataset[key]["history"]
                assert isinstance(history, np.ndarray)
                yield key[0], history.tolist()


def _one(
    config: Config, data: InteractionData, prompts: PromptBuilder, user: int, history: list[int],
    heading: str,
) -> str:  # fmt: skip
    """A prompt with a line above it, and what the teacher goes on to write."""
    unseen = np.setdiff1d(np.arange(1, data.num_items + 1), history)
    popular = unseen[np.argsort(-data.train_counts[unseen], kind="stable")]
    window = popular[: config.teacher.num_candidates][-prompts.num_shown :]
    seed = (config.seed, config.train.warmup_epochs, user)
    order = np.random.default_rng(seed).permutation(len(window))
    tokens = prompts.build(history, window[order].tolist())
    facts = (
        f"{heading}: user {data.user_ids[user]}, {len(history)} items before the cut, "
        f"{len(tokens)} tokens, the first {len(prompts.prefix)} shared by all prompts"
    )
    lines = ["", f"──── {facts} ────", str(prompts.tokenizer.decode(tokens))]
    if config.teacher.mode == "cot":
        lines += [
            f"──── up to {config.teacher.reasoning_tokens} tokens of reasoning, then "
            f"{len(prompts.answer)} tokens ────",
            str(prompts.tokenizer.decode(prompts.answer)).strip("\n"),
        ]
    elif config.teacher.mode == "generate":
        lines.append(f"──── up to {prompts.answer_tokens} tokens of ranking ────")
    return "\n".join(lines)
