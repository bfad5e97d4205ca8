"""Recommendations for a file of users, in bounded memory.

A piece of the file is read, answered and written before the next one is read; the result appears
under its name when it is whole.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from cotrain.data.histories import SUFFIXES, HistoryFile, HistoryPiece
from cotrain.errors import ConfigError, DataError, some_of
from cotrain.files import check_new, written_whole
from cotrain.student.recommender import Recommender

# Of a longer history the last items are read: what lies before changes no state, and a row as long
# as a catalogue would make the table of what others have seen as wide.
MAX_HISTORY = 10_000
# Joins ids in CSV and TSV, in and out.
BAR = "|"


@dataclass
class BulkSummary:
    """What came of a file.

    Attributes:
        users: Rows.
        seconds: Wall-clock time, reading and writing included.
        unknown: Ids that no item has, which were skipped.
        unknown_rows: Rows that have such ids.
        examples: The first few of these ids.
        without: Rows of which no known item is left, so that nothing is recommended.
        cut: Histories of more than MAX_HISTORY items, whose last ones were read.
    """

    users: int = 0
    seconds: float = 0.0
    unknown: int = 0
    unknown_rows: int = 0
    examples: list[Any] = field(default_factory=list)
    without: int = 0
    cut: int = 0

    @property
    def users_per_s(self) -> float:
        return self.users / max(self.seconds, 1e-9)

    def text(self) -> str:
        """In sentences."""
        said = [f"{self.users:,} users in {self.seconds:,.1f} s, {self.users_per_s:,.0f} users/s."]
        if self.unknown:
            said.append(
                f"{self.unknown:,} ids in {self.unknown_rows:,} rows belong to no item and were "
                f"skipped, such as {some_of(self.examples)}."
            )
        if self.without:
            said.append(f"{self.without:,} rows have no known item and got no recommendations.")
        if self.cut:
            said.append(
                f"{self.cut:,} histories have more than {MAX_HISTORY:,} items; the last "
                f"{MAX_HISTORY:,} were read."
            )
        return "\n".join(said)


class RawIds:
    """Raw ids of a catalogue and of Arrow columns: found, and given back, many at once.

    Args:
        ids: (V,) of the catalogue, None at index 0.
    """

    def __init__(self, ids: list[Any]):
        self.values = pa.array(ids[1:])
        self.numbers = pa.types.is_integer(self.values.type)
        if self.numbers:
            numbers = np.array(ids[1:], np.int64)
            self._order = np.argsort(numbers)
            self._sorted = numbers[self._order]
        self._text = pl.Series([str(item) for item in ids[1:]], dtype=pl.String)
        self._index = pl.Series(range(1, len(ids)), dtype=pl.Int64)

    def indices(self, column: pa.Array) -> np.ndarray:
        """(M,) int64 item index of each id, 0 where no item has it."""
        if self.numbers and pa.types.is_signed_integer(column.type):
            # Nulls become a number first, and are put out at the end.
            wanted = column.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
            places = np.searchsorted(self._sorted, wanted).clip(max=len(self._sorted) - 1)
            found = np.where(self._sorted[places] == wanted, self._order[places] + 1, 0)
            found[column.is_null().to_numpy(zero_copy_only=False)] = 0
            return found
        text = pl.Series(pl.from_arrow(column)).cast(pl.String)
        return text.replace_strict(
            self._text, self._index, default=0, return_dtype=pl.Int64
        ).fill_null(0).to_numpy()  # fmt: skip

    def lists(self, indices: np.ndarray, scores: np.ndarray) -> tuple[pa.Array, pa.Array]:
        """Lists of raw ids and of scores from (n, k) indices, 0 = none, and their scores."""
        shown = indices > 0
        offsets = pa.array(np.concatenate([[0], np.cumsum(shown.sum(1))]), pa.int32())
        ids = self.values.take(pa.array(indices[shown] - 1))
        return (
            pa.ListArray.from_arrays(offsets, ids),
            pa.ListArray.from_arrays(offsets, pa.array(scores[shown])),
        )


def recommend_file(
    recommender: Recommender,
    source: HistoryFile,
    target: Path,
    k: int = 10,
    *,
    exclude_seen: bool = True,
    allowed: np.ndarray | None = None,
    strict: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> BulkSummary:
    """Recommend to every user of a file.

    Args:
        recommender: The student.
        source: The histories.
        target: File for the answers; ends in .parquet, .csv, .tsv or .jsonl. A row for each row of
            the source, in its order: `user_id`, `item_ids` and `scores` (best first; lists, in CSV
            and TSV joined by bars), and `unknown`, how many ids of the row were skipped.
        k: Items a user.
        exclude_seen: As for `Recommender.recommend`, like the next.
        allowed: As there.
        strict: Ids that no item has are an error.
        overwrite: A file that stands there already may go.
        progress: Show a bar with rate and time left.

    Raises:
        ConfigError: The target exists, or cannot be written, or is of no such kind.
        DataError: The source cannot be read, or has unknown ids under `strict`. There is no target
            then.
    """
    write_piece = _writer(target, recommender, source, overwrite)
    ids = RawIds(recommender.catalog.item_ids)
    summary = BulkSummary()
    started = time.perf_counter()
    bar = tqdm(
        total=source.total, unit=source.unit, unit_scale=True, disable=not progress,
        mininterval=0.2 if sys.stderr.isatty() else 10.0, dynamic_ncols=True,
    )  # fmt: skip
    with bar, written_whole(target) as temporary, write_piece(temporary) as writer:
        for piece in source:
            histories, unknown = _known(piece, ids, summary, strict, source.path)
            indices, scores = recommender.top_indices(
                histories, k, exclude_seen=exclude_seen, allowed=allowed
            )
            writer.write(_table(piece, ids, indices, scores, unknown))
            summary.users += len(histories)
            summary.seconds = time.perf_counter() - started
            bar.set_postfix_str(f"{summary.users_per_s:,.0f} users/s", refresh=False)
            bar.update(piece.done - bar.n)
    summary.seconds = time.perf_counter() - started
    return summary


def _known(
    piece: HistoryPiece, ids: RawIds, summary: BulkSummary, strict: bool, path: Path
) -> tuple[list[np.ndarray], np.ndarray]:
    """Item indices of each row, and (n,) how many of its ids no item has."""
    indices = ids.indices(piece.items)
    ends = np.cumsum(piece.lengths)
    before = np.concatenate([[0], np.cumsum(indices > 0)])
    stops = before[ends]
    starts = before[ends - piece.lengths]
    unknown = piece.lengths - (stops - starts)
    if unknown.any():
        some = piece.items.take(pa.array(np.flatnonzero(indices == 0)[:5])).to_pylist()
        if strict:
            row = piece.first_row + int(np.flatnonzero(unknown)[0])
            raise DataError(
                f"--histories {path} has ids that no item has, first in row {row:,}: "
                f"{some_of(str(item)[:80] for item in some)}. Correct them, or leave --strict to "
                "skip and count them."
            )
        summary.examples = (summary.examples + [str(item)[:80] for item in some])[:5]
        summary.unknown += int(unknown.sum())
        summary.unknown_rows += int((unknown > 0).sum())
    summary.without += int((stops == starts).sum())
    summary.cut += int((stops - starts > MAX_HISTORY).sum())
    starts = np.maximum(starts, stops - MAX_HISTORY)
    known = indices[indices > 0]
    return [known[start:stop] for start, stop in zip(starts, stops, strict=True)], unknown


def _table(
    piece: HistoryPiece, ids: RawIds, indices: np.ndarray, scores: np.ndarray, unknown: np.ndarray
) -> pa.Table:
    items, of_items = ids.lists(indices, scores)
    columns = {
        "user_id": piece.users, "item_ids": items, "scores": of_items,
        "unknown": pa.array(unknown, pa.int64()),
    }  # fmt: skip
    return pa.table(columns)


# ---- writing ------------------------------------------------------------------------------------


class _Writer(Protocol):
    def write(self, table: pa.Table) -> None:
        """Adds rows."""
        ...

    def __enter__(self) -> "_Writer": ...

    def __exit__(self, *error: Any) -> None: ...


class _ParquetWriter:
    def __init__(self, path: Path, schema: pa.Schema):
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self.write = self._writer.write_table

    def __enter__(self) -> "_ParquetWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.close()


class _TextWriter:
    """CSV, TSV and JSON lines."""

    def __init__(self, path: Path, suffix: str):
        self._file = path.open("wb")
        self._suffix = suffix
        self._header = True

    def write(self, table: pa.Table) -> None:
        rows = pl.DataFrame(pl.from_arrow(table))
        if self._suffix == ".jsonl":
            rows.write_ndjson(self._file)
            return
        lists = pl.col("item_ids", "scores").cast(pl.List(pl.String)).list.join(BAR)
        rows.with_columns(lists).write_csv(
            self._file,
            include_header=self._header,
            separator="\t" if self._suffix == ".tsv" else ",",
        )
        self._header = False

    def __enter__(self) -> "_TextWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()


def _writer(
    target: Path, recommender: Recommender, source: HistoryFile, overwrite: bool
) -> Callable[[Path], _Writer]:
    """What opens a file of the target's kind."""
    suffix = target.suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(
            f"--output {target} ends in {target.suffix!r}; expected {some_of(SUFFIXES)}."
        )
    check_new(target, "--output", overwrite)
    if target.exists() and target.samefile(source.path):
        raise ConfigError(f"--output {target} is the file of --histories. Name another.")
    ids = recommender.catalog.item_ids[1:]
    if suffix == ".parquet":
        of_ids = pa.array(ids[:1]).type
        schema = pa.schema(
            {
                "user_id": source.user_type, "item_ids": pa.list_(of_ids),
                "scores": pa.list_(pa.float32()), "unknown": pa.int64(),
            }
        )  # fmt: skip
        return lambda path: _ParquetWriter(path, schema)
    barred = [item for item in ids if isinstance(item, str) and BAR in item]
    if barred and suffix != ".jsonl":
        raise ConfigError(
            f"--output {target}: ids are joined by {BAR!r} there, and {len(barred):,} items have "
            f"it in their id: {some_of(barred)}. Write .parquet or .jsonl."
        )
    return lambda path: _TextWriter(path, suffix)
