"""A file of histories, one user a row, read in pieces: Parquet, CSV, TSV or JSON lines.

Each row has a user and the ids of items taken, oldest first: a list in Parquet and JSON lines, text
joined by bars (`a|b|c`) in CSV and TSV. No more than one piece is ever in memory.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet as pq

from cotrain.errors import DataError, some_of

SUFFIXES = [".parquet", ".csv", ".tsv", ".jsonl"]
# Its functions are made when it is imported, so that a type checker knows none of them.
pc: Any = pyarrow.compute

# Rows of a piece, bytes of a piece of CSV, and of one line of JSON.
_ROWS, _BLOCK, _LINE = 4096, 2**22, 2**24
_UNREADABLE = (pa.ArrowException, OSError, ValueError)


@dataclass(frozen=True)
class HistoryPiece:
    """Some rows of the file.

    Attributes:
        first_row: Of the file, from 1.
        users: (n,) integers or text.
        items: (M,) ids of all rows, integers or text; nulls where a list has one.
        lengths: (n,) int64, ids of each row.
        done: How much of the file has been read so far, of `HistoryFile.total`.
    """

    first_row: int
    users: pa.Array
    items: pa.Array
    lengths: np.ndarray
    done: int


class HistoryFile:
    """A file of histories; iterate for its pieces.

    Args:
        path: Ends in .parquet, .csv, .tsv or .jsonl.
        user_column: Names the user of a row.
        items_column: Has the ids of items, oldest first.

    Attributes:
        total: What `HistoryPiece.done` grows to.
        unit: Of `total`: "rows" or "B".
        user_type: Of users, what they are in Parquet; text in CSV and TSV, and in JSON lines what
            the first row has.

    Raises:
        DataError: No such file, not of such a kind, without these columns; and, while it is read,
            where a part of it cannot be read.
    """

    def __init__(self, path: Path, user_column: str = "user_id", items_column: str = "item_ids"):
        self.path = path
        self.columns = [user_column, items_column]
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise DataError(
                f"--histories {path} {what}. Expected a file that ends in {some_of(SUFFIXES)}."
            )
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(
                f"--histories {path} ends in {path.suffix!r}; expected {some_of(SUFFIXES)}. "
                "Convert or rename it."
            )
        self.suffix = path.suffix.lower()
        self.total, self.unit = path.stat().st_size, "B"
        self.user_type: pa.DataType = pa.string()
        with self._errors():
            if self.suffix == ".parquet":
                with pq.ParquetFile(path) as file:
                    self.total, self.unit = file.metadata.num_rows, "rows"
                    schema = file.schema_arrow
                self._require(schema.names)
                self.user_type = _plain(schema.field(user_column).type)
                self._check_types(schema)
            elif self.suffix == ".jsonl":
                with path.open("rb") as file:
                    user, _ = self._json_row(1, file.readline(_LINE + 1))
                self.user_type = pa.int64() if isinstance(user, int) else pa.string()
            else:
                with path.open("rb") as file, self._csv(file) as reader:
                    self._require(reader.schema.names)

    def __iter__(self) -> Iterator[HistoryPiece]:
        first_row = 1
        with self._errors():
            for users, lists, done in self._pieces():
                piece = self._piece(first_row, users, lists, done)
                first_row += len(users)
                yield piece

    def _pieces(self) -> Iterator[tuple[pa.Array, pa.Array, int]]:
        """Users, lists (or joined text) and what has been read."""
        if self.suffix == ".parquet":
            done = 0
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(_ROWS, columns=self.columns):
                    done += len(batch)
                    yield batch.column(self.columns[0]), batch.column(self.columns[1]), done
        elif self.suffix == ".jsonl":
            yield from self._json_pieces()
        else:
            with self.path.open("rb") as file, self._csv(file) as reader:
                for batch in reader:
                    for start in range(0, len(batch), _ROWS):
                        part = batch.slice(start, _ROWS)
                        yield (
                            part.column(self.columns[0]),
                            part.column(self.columns[1]),
                            file.tell(),
                        )

    def _csv(self, file: IO[bytes]) -> Any:
        names = self.columns
        return pyarrow.csv.open_csv(
            file,
            pyarrow.csv.ReadOptions(use_threads=False, block_size=_BLOCK),
            pyarrow.csv.ParseOptions(delimiter="\t" if self.suffix == ".tsv" else ","),
            pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )

    def _json_pieces(self) -> Iterator[tuple[pa.Array, pa.Array, int]]:
        number, done = 0, 0
        with self.path.open("rb") as file:
            while True:
                users: list[Any] = []
                lists: list[list[Any]] = []
                while len(users) < _ROWS and done < self.total + 1:
                    line = file.readline(_LINE + 1)
                    if not line:
                        break
                    number, done = number + 1, done + len(line)
                    if line.isspace():
                        continue
                    user, ids = self._json_row(number, line)
                    users.append(user)
                    lists.append(ids)
                if not users:
                    return
                kind = pa.int64() if all(isinstance(i, int) for row in lists for i in row) else None
                if kind is None:
                    lists = [[None if i is None else str(i) for i in row] for row in lists]
                yield (
                    pa.array(users, self.user_type),
                    pa.array(lists, pa.list_(kind or pa.string())),
                    done,
                )

    def _json_row(self, number: int, line: bytes) -> tuple[Any, list[Any]]:
        """User and ids of one line."""
        example = f'{{"{self.columns[0]}": 1, "{self.columns[1]}": [3, 5]}}'
        if len(line) > _LINE:
            raise self._problem(f"line {number:,} is longer than {_LINE >> 20} MiB")
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"line {number:,} is no JSON: {str(error)[:120]}; expected {example}"
            raise self._problem(reason) from error
        if not isinstance(row, dict) or not {*self.columns} <= row.keys():
            names = some_of(row) if isinstance(row, dict) else type(row).__name__
            raise self._problem(f"line {number:,} has {names}; expected {example}")
        user, ids = row[self.columns[0]], row[self.columns[1]]
        is_id = (int, str)
        if not isinstance(user, is_id) or isinstance(user, bool):
            raise self._problem(f"line {number:,} has the user {user!r:.80}; expected {example}")
        if not isinstance(ids, list) or any(
            isinstance(item, bool) or not (item is None or isinstance(item, is_id)) for item in ids
        ):
            raise self._problem(f"line {number:,} has the items {ids!r:.80}; expected {example}")
        if number > 1 and isinstance(user, int) != pa.types.is_integer(self.user_type):
            raise self._problem(
                f"line {number:,} has the user {user!r:.80}, and line 1 one of another type; "
                "expected all numbers or all text"
            )
        return user, ids

    def _piece(self, first_row: int, users: Any, lists: Any, done: int) -> HistoryPiece:
        users = _decoded(users)
        if users.null_count:
            row = first_row + int(np.flatnonzero(users.is_null().to_numpy(False))[0])
            raise self._problem(f"row {row:,} has no {self.columns[0]}")
        lists = _decoded(lists)
        if pa.types.is_string(lists.type) or pa.types.is_large_string(lists.type):
            lists = pc.split_pattern(pc.utf8_trim_whitespace(lists), "|")
            items = pc.utf8_trim_whitespace(lists.flatten())
            lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
            # Between two bars there may be nothing, and a blank cell is split into one blank.
            filled = pc.not_equal(items, "")
            kept = np.concatenate([[0], np.cumsum(filled.to_numpy(zero_copy_only=False))])
            ends = np.cumsum(lengths)
            return HistoryPiece(
                first_row, users, items.filter(filled), kept[ends] - kept[ends - lengths], done
            )
        lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
        items = _decoded(lists.flatten())
        return HistoryPiece(first_row, users, items, lengths.astype(np.int64), done)

    # ---- errors ---------------------------------------------------------------------------------

    def _require(self, names: list[str]) -> None:
        missing = [name for name in self.columns if name not in names]
        if missing:
            raise DataError(
                f"--histories {self.path} lacks the column{'s' * (len(missing) > 1)} "
                f"{some_of(missing)}. It has {some_of(names, limit=20)}. Name the right ones with "
                "--user-column and --items-column."
            )

    def _check_types(self, schema: pa.Schema) -> None:
        user, items = (schema.field(name).type for name in self.columns)
        inner = items
        if pa.types.is_list(items) or pa.types.is_large_list(items):
            inner = items.value_type
        for name, kind in zip(self.columns, (user, inner), strict=True):
            if not (pa.types.is_integer(_plain(kind)) or _is_text(_plain(kind))):
                raise DataError(
                    f"Column {name!r} of {self.path} is {schema.field(name).type}; expected "
                    "integers or text for users, and lists of them for items."
                )
        if inner is items and not _is_text(_plain(items)):
            raise DataError(
                f"Column {self.columns[1]!r} of {self.path} is {items}, one item a row; expected "
                "one user a row with a list of items. Group it by user first."
            )

    def _problem(self, reason: str) -> DataError:
        return DataError(f"--histories {self.path}: {reason}. Correct the file.")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except _UNREADABLE as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"--histories {self.path} cannot be read as {self.suffix[1:]}; it may be cut off "
                f"or of another format: {reason}. Write it again."
            ) from error


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _plain(kind: pa.DataType) -> pa.DataType:
    """What a dictionary is of."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _decoded(values: Any) -> Any:
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
