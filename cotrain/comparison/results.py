"""What one run of a comparison leaves, read back."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cotrain.comparison.arms import PlannedRun
from cotrain.data.interactions import InteractionData
from cotrain.errors import DataError

PRIMARY = "ndcg@10"


@dataclass(frozen=True)
class RunResult:
    """A run that has ended.

    Attributes:
        run: What was planned.
        report: Its report.json.
        ranks: (n,) of the test items under the student, over the evaluated users.
        control_ranks: The same under its twin, or None.
    """

    run: PlannedRun
    report: dict[str, Any]
    ranks: np.ndarray
    control_ranks: np.ndarray | None


def read_run(run: PlannedRun, data: InteractionData) -> RunResult:
    """Report and test ranks of a run that has ended.

    Raises:
        DataError: They cannot be read, or are of other data.
    """
    path = run.folder / "ranks.parquet"
    report = read_report(run.folder)
    users = data.evaluated_users("test").tolist()
    try:
        table = pl.read_parquet(path)
        found = table["student_test_rank"].count()
        if table["user_id"].to_list() != data.user_ids or found != len(users):
            raise DataError(
                f"{path} has {table.height:,} users with {found:,} test ranks that are not those "
                f"of the data {data.name!r}: {data.num_users:,} and {len(users):,}. The data have "
                "changed since; choose another --output."
            )
        evaluated = table[users]
        ranks = _whole(evaluated["student_test_rank"])
        control = None
        if "control_test_rank" in table.columns:
            control = _whole(evaluated["control_test_rank"])
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. Delete {run.folder} and give the same command."
        ) from error
    return RunResult(run, report, ranks, control)


def _whole(column: pl.Series) -> np.ndarray:
    if column.null_count():
        raise ValueError(f"{column.name} lacks {column.null_count()} evaluated users")
    return column.to_numpy()


def read_report(folder: Path) -> dict[str, Any]:
    """report.json of a run that has ended.

    Raises:
        DataError: It cannot be read.
    """
    path = folder / "report.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. Delete {folder} and give the same command."
        ) from error


def validation_score(folder: Path) -> float:
    """NDCG@10 on validation of a run that has ended."""
    return read_report(folder)["student"]["validation"][PRIMARY]


def training_seconds(folder: Path) -> float:
    """Seconds that a run that has ended spent in its training loop."""
    return read_report(folder)["seconds"]
