"""The rows of an evaluation on disk, for comparisons of one's own and `measure.against`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch

from cotrain.data.interactions import InteractionData
from cotrain.errors import DataError
from cotrain.finetune.examples import Example
from cotrain.finetune.quality import Measured
from cotrain.student.recommender import Recommender

_NAME = "rows.parquet"


def write_rows(
    folder: Path, data: InteractionData, rows: Sequence[Example], measured: Measured,
    student: Recommender | None,
) -> None:  # fmt: skip
    """One line a row."""
    places = torch.from_numpy(measured.places)
    table = pl.DataFrame(
        {
            "user_id": pl.Series([data.user_ids[row.user] for row in rows]),
            "item_id": pl.Series([data.catalog.item_ids[row.target] for row in rows]),
            "teacher_rank": measured.ranks,
            "student_rank": None if student is None else measured.places + 1,
            "probability": measured.probs[torch.arange(len(places)), places].numpy(),
            "valid": measured.verdict.valid.numpy(),
        }
    )
    table.write_parquet(folder / _NAME)


def read_rows(
    folder: Path, rows: Sequence[Example], data: InteractionData
) -> dict[str, np.ndarray]:
    """What another evaluation found on these rows, in their order.

    Raises:
        DataError: It is not there, or was of other rows.
    """
    path = folder.expanduser() / _NAME
    try:
        table = pl.read_parquet(path)
        users, items, ranks = (table[name] for name in ("user_id", "item_id", "teacher_rank"))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"measure.against {folder} cannot be read: {error}. Expected the folder of an "
            "evaluation by scripts/evaluate.py teacher."
        ) from error
    known = {(user, item): rank for user, item, rank in zip(users, items, ranks, strict=True)}
    keys = [(data.user_ids[row.user], data.catalog.item_ids[row.target]) for row in rows]
    missing = sum(key not in known for key in keys)
    if missing:
        raise DataError(
            f"measure.against {folder} lacks {missing:,} of these {len(keys):,} rows. Expected an "
            "evaluation with the same data, examples.student, measure.users, measure.rows and seed."
        )
    return {"teacher_rank": np.array([known[key] for key in keys], np.int64)}
