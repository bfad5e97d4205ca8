"""The method `bigrec`: fit the generative recommender, or the pointwise scorer, and show what it
says."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cotrain.evaluation.metrics import per_user_metric
from cotrain.finetune.examples import Example
from cotrain.finetune.quality import measure
from cotrain.finetune.run import Context, Outcome, Sample, title_lines
from cotrain.finetune.title_sft import TitleObjective, YesNoObjective
from cotrain.finetune.tuning import tune
from cotrain.teacher.bigrec import TitleReader
from cotrain.teacher.reading import Look

_SAMPLES = 10
_NEAREST = 5
# Rows whose distances to the whole catalogue are held at once.
_ROWS = 64


def bigrec(context: Context) -> Outcome:
    """Train on titles or on answers, as `bigrec.task` says.

    Raises:
        ConfigError: `teacher.mode` does not ask for that.
    """
    config, examples, ranker = context.config, context.examples, context.ranker
    if config.bigrec.task == "title":
        objective = TitleObjective(ranker, examples.train, examples.validation, config.seed)
    else:
        objective = YesNoObjective(
            ranker, examples.train, examples.validation, config.bigrec.negatives, config.seed
        )
    lengths = [len(objective.encode(row, 0).tokens) for row in range(min(64, len(objective)))]
    context.say(f"Rows: {np.mean(lengths):.0f} tokens on average, {max(lengths)} at most")
    progress = tune(
        context.adapter, objective, config.sft, context.folder, config.seed, context.accelerator,
        context.log,
    )  # fmt: skip
    facts: dict[str, Any] = {"task": config.bigrec.task}
    if isinstance(ranker.reader, TitleReader):
        looks, ranks = in_catalogue(ranker.reader, examples.validation)
        facts |= written_facts(ranker.reader, looks, ranks)
        samples = title_samples(context, ranker.reader, looks, ranks)
    else:
        facts["negatives"] = config.bigrec.negatives
        samples = yes_no_samples(context)
    return Outcome(progress, facts, samples=samples)


def in_catalogue(reader: TitleReader, rows: Sequence[Example]) -> tuple[list[Look], np.ndarray]:
    """What is written for each row, and where the target then stands among all items that the user
    has not had: (n,) int64, 1 = nearest, ties against it; last where nothing was written."""
    looks = reader.write_titles([row.history for row in rows])
    num_items = len(reader.grounding.titles)
    ranks = np.full(len(rows), num_items, dtype=np.int64)
    good = [place for place, look in enumerate(looks) if not look.failure]
    for start in range(0, len(good), _ROWS):
        some = good[start : start + _ROWS]
        distances = _unseen(reader, [looks[place] for place in some], [rows[p] for p in some])
        for place, own in zip(some, distances, strict=True):
            ranks[place] = int((own <= own[rows[place].target]).sum())
    return looks, ranks


def _unseen(reader: TitleReader, looks: Sequence[Look], rows: Sequence[Example]) -> Tensor:
    """(B, V) distances; items of the history are infinitely far, unless they are the target."""
    distances = reader.ground([look.title for look in looks])
    for own, row in zip(distances, rows, strict=True):
        seen = [item for item in row.history if item != row.target]
        own[seen] = torch.inf
    return distances


def written_facts(reader: TitleReader, looks: Sequence[Look], ranks: np.ndarray) -> dict[str, Any]:
    """How good the titles are as recommendations from the whole catalogue."""
    titles = set(reader.grounding.titles)
    return {
        "titles_of_the_catalogue": float(np.mean([look.title in titles for look in looks])),
        "different_titles": len({look.title for look in looks}),
        "whole_catalogue": {
            name: float(per_user_metric(ranks, name).mean())
            for name in ("recall@10", "ndcg@10", "mrr")
        },
    }


def title_samples(
    context: Context, reader: TitleReader, looks: Sequence[Look], ranks: np.ndarray
) -> list[Sample]:
    """The first held-out rows: what was written, the nearest items, and what was taken."""
    titles, samples = context.data.catalog.titles, []
    rows = context.examples.validation[:_SAMPLES]
    for place, (row, look) in enumerate(zip(rows, looks, strict=False)):
        lines = title_lines(context, row)
        if look.failure:
            lines.append(f"Nothing was written: {look.failure}")
        else:
            count = min(_NEAREST, len(titles) - 1)
            nearest = _unseen(reader, [look], [row])[0].topk(count, largest=False).indices
            lines.append(f"Written: {look.title}")
            lines.append("Nearest: " + "; ".join(titles[item] for item in nearest.tolist()))
            lines.append(f"Rank of what was taken, in the whole catalogue: {ranks[place]}")
        samples.append(Sample(f"Held-out row {place + 1}", lines))
    return samples


def yes_no_samples(context: Context) -> list[Sample]:
    """The first held-out rows: the candidates that got the surest yes, and what was taken."""
    rows = context.examples.validation[:_SAMPLES]
    found = measure(context.ranker, rows, context.config.seed, own_bias=False)
    logits = found.verdict.identifier_logits
    assert logits is not None  # one prompt a candidate, never by windows
    samples = []
    for place, (row, rank) in enumerate(zip(rows, found.ranks.tolist(), strict=True)):
        lines = title_lines(context, row, logits[place].argsort(descending=True).tolist())
        yes = float(logits[place, found.places[place]].sigmoid())
        lines.append(f"Rank of what was taken: {rank}, Yes rather than No: {yes:.3f}")
        samples.append(Sample(f"Held-out row {place + 1}", lines))
    return samples
