"""Encoded rationales on disk, and how they are found again: a folder with two files.

- vectors.safetensors: the tensor `vectors` (n, E), memory-mapped when read; its header says by
  which encoder, from which file, and what was left out;
- rows.parquet: for each row, in the same order, what it explains and its text.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from cotrain.data.interactions import InteractionData
from cotrain.errors import DataError
from cotrain.rationale.records import Rationale, position_hashes

VECTORS = "vectors.safetensors"
ROWS = "rows.parquet"
# Raised when the columns or their meaning change: older stores have to be encoded again.
FORMAT = "1"
DTYPES = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
# Rows that are read together where some of them are wanted. The fewer the cheaper a few texts are;
# the more the smaller the table of contents, which every reading begins with.
ROW_GROUP = 4096
_KEYS = ["user_id", "item_id", "cut", "history_hash"]
_REMEDY = "Give a folder that scripts/encode_rationales.py wrote, or encode the rationales again."


def row_schema(user_id: pl.DataType, item_id: pl.DataType) -> dict[str, pl.DataType]:
    """Columns of rows.parquet, for ids of these types."""
    return {
        "row": pl.UInt32(), "user_id": user_id, "item_id": item_id, "cut": pl.Int64(),
        "history_hash": pl.String(), "rationale": pl.String(), "model": pl.String(),
        "template": pl.String(), "logprob": pl.Float64(), "tokens": pl.Int64(),
        "flags": pl.List(pl.String()),
    }  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What the first bytes of vectors.safetensors say.

    Attributes:
        dtype: Of a number on disk.
        shape: (n, E).
        start: Bytes before the first number.
        facts: The text metadata.
    """

    dtype: np.dtype
    shape: tuple[int, int]
    start: int
    facts: dict[str, str]


def header_bytes(rows: int, dimension: int, dtype: str, facts: dict[str, str]) -> bytes:
    """The beginning of a safetensors file, to be followed by rows × dimension numbers.

    Args:
        rows: n.
        dimension: E.
        dtype: F16 or F32.
        facts: Text metadata.
    """
    size = rows * dimension * DTYPES[dtype].itemsize
    tensor = {"dtype": dtype, "shape": [rows, dimension], "data_offsets": [0, size]}
    content = json.dumps({"__metadata__": facts, "vectors": tensor}).encode()
    # Blanks at the end, so that the numbers begin where a memory map likes them to.
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def read_header(path: Path) -> Header:
    """Undo `header_bytes`.

    Raises:
        DataError: No such file, or not such a beginning.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= path.stat().st_size:
                raise ValueError("it is no safetensors file")
            content = json.loads(file.read(size))
        tensor = content["vectors"]
        rows, dimension = map(int, tensor["shape"])
        facts = dict(content["__metadata__"])
        return Header(DTYPES[tensor["dtype"]], (rows, dimension), 8 + size, facts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else repr(error)
        raise DataError(f"{path} cannot be read as encoded rationales: {reason}. {_REMEDY}") from (
            error
        )


class RationaleStore:
    """Vectors and texts by row; open it with `RationaleStore.open`.

    Attributes:
        folder: Where it lies.
        facts: What the header says: encoder, data, source, counts of what was left out.
    """

    def __init__(self, folder: Path, header: Header):
        self.folder = folder
        self.facts = header.facts
        self._vectors = np.memmap(
            folder / VECTORS, header.dtype, "r", offset=header.start, shape=header.shape
        )

    @classmethod
    def open(cls, folder: Path) -> "RationaleStore":
        """Reads the header alone; vectors stay on disk until they are asked for.

        Raises:
            DataError: There is no store, or not a whole one.
        """
        folder = Path(folder).expanduser()
        path = folder / VECTORS
        header = read_header(path)
        if header.facts.get("format") != FORMAT:
            raise DataError(
                f"{path} has format {header.facts.get('format')!r}, and this version of cotrain "
                f"reads {FORMAT!r}. {_REMEDY}"
            )
        rows, dimension = header.shape
        size = header.start + rows * dimension * header.dtype.itemsize
        if rows < 1 or dimension < 1 or path.stat().st_size != size:
            raise DataError(
                f"{path} has {path.stat().st_size:,} bytes; {rows:,} vectors of {dimension} and "
                f"its header take {size:,}. {_REMEDY}"
            )
        if not (folder / ROWS).is_file():
            raise DataError(f"The store {folder} has no {ROWS}. {_REMEDY}")
        return cls(folder, header)

    def __len__(self) -> int:
        """n."""
        return len(self._vectors)

    @property
    def encoder(self) -> str:
        """Who made the vectors."""
        return self.facts["encoder"]

    @property
    def dimension(self) -> int:
        """E."""
        return self._vectors.shape[1]

    def vectors(self, rows: np.ndarray) -> Tensor:
        """(m, E) float32 of (m,) rows; nothing else is read.

        Raises:
            IndexError: A row outside 0..n-1; -1 means no row.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a store of {len(self)}")
        return torch.from_numpy(self._vectors[rows].astype(np.float32))

    def texts(self, rows: np.ndarray) -> list[Rationale]:
        """The rationales of (m,) rows, in this order; the parts of the table that hold them are
        read.

        Raises:
            DataError: The table is damaged.
        """
        wanted = np.unique(np.asarray(rows, dtype=np.int64))
        found = self._read(lambda table: table.filter(pl.col("row").is_in(wanted.tolist())))
        if found.height != len(wanted):
            raise DataError(
                f"{self.folder / ROWS} has {found.height} of {len(wanted)} rows that were looked "
                f"for. {_REMEDY}"
            )
        by_row = {row.pop("row"): Rationale(**row) for row in found.iter_rows(named=True)}
        return [by_row[row] for row in np.asarray(rows).tolist()]

    @cached_property
    def keys(self) -> pl.DataFrame:
        """What each row explains: user_id, item_id, cut and history_hash.

        Raises:
            DataError: The table is damaged, or of another number of rows than the vectors.
        """
        keys = self._read(lambda table: table.select(_KEYS))
        if keys.height != len(self):
            raise DataError(
                f"The store {self.folder} has {len(self):,} vectors and {keys.height:,} rows in "
                f"{ROWS}. {_REMEDY}"
            )
        return keys

    def _read(self, query: Callable[[pl.LazyFrame], pl.LazyFrame]) -> pl.DataFrame:
        path = self.folder / ROWS
        try:
            return query(pl.scan_parquet(path, glob=False)).collect()
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"{path} cannot be read as the rows of a store: {reason}. {_REMEDY}"
            ) from error

    def match(self, data: InteractionData) -> "MatchedRationales":
        """Find the interaction that each row explains, and make sure that it may be learned from.

        Raises:
            DataError: Some row is not of these data, not of this history, or of an interaction that
                is held out; all such rows are counted, by reason.
        """
        return _match(self, data)


@dataclass(frozen=True)
class MatchedRationales:
    """A store whose every row explains a training interaction of the data at hand.

    A place is an index into `data.items`, where the histories of all users stand end to end.

    Attributes:
        store: Vectors and texts.
        places: (n,) int64, of the explained interactions, ascending.
        rows: (n,) int64, the store's row of each.
    """

    store: RationaleStore
    places: np.ndarray
    rows: np.ndarray

    def find(self, places: np.ndarray) -> np.ndarray:
        """(m,) int64 row of each of (m,) places, -1 where there is no rationale."""
        spots = np.searchsorted(self.places, places)
        spots[spots == len(self.places)] = 0
        return np.where(self.places[spots] == places, self.rows[spots], -1)


# ---- matching -----------------------------------------------------------------------------------


def _match(store: RationaleStore, data: InteractionData) -> MatchedRationales:
    keys = store.keys
    users = _indices(keys["user_id"], data.user_ids, 0, "user", store, data)
    items = _indices(keys["item_id"], data.catalog.item_ids[1:], 1, "item", store, data)
    cuts = keys["cut"].to_numpy()
    offsets, train_end = data.offsets, data.held_out.train_end
    places = offsets[users] + cuts
    refused = _Refused(len(keys))
    refused.add("of users that the data lack", users < 0)
    refused.add(
        "with a cut outside of their user's history",
        (cuts < 1) | (cuts >= offsets[users + 1] - offsets[users]),
    )
    refused.add(
        "of interactions that are held out for validation or test", places >= train_end[users]
    )
    # What is refused already has no place; any will do.
    places[refused.rows] = 0
    refused.add("of another item than the data have at that place", data.items[places] != items)
    left = np.flatnonzero(~refused.rows)
    differ = _hashes_differ(data, users[left], cuts[left], keys["history_hash"].gather(left))
    refused.add("with another history before them than the data have", left[differ])
    left = np.flatnonzero(~refused.rows)
    order = left[np.argsort(places[left], kind="stable")]
    repeated = order[1:][np.diff(places[order]) == 0]
    refused.add("of an interaction that has one already", repeated)
    if refused.rows.any():
        raise DataError(_no_fit(refused, store, data))
    return MatchedRationales(store, places[order], order)


class _Refused:
    """Rows that do not fit, each under the first reason that holds: after that no other can be
    looked for.

    Attributes:
        rows: (n,) bool.
        by_reason: The rows of each reason.
    """

    def __init__(self, count: int):
        self.rows = np.zeros(count, dtype=bool)
        self.by_reason: dict[str, np.ndarray] = {}

    def add(self, reason: str, wrong: np.ndarray) -> None:
        """Rows as (n,) bool, or by number."""
        new = np.zeros_like(self.rows)
        new[wrong] = True
        new &= ~self.rows
        self.rows |= new
        if new.any():
            self.by_reason[reason] = np.flatnonzero(new)


def _indices(
    column: pl.Series,
    ids: list[Any],
    first: int,
    what: str,
    store: RationaleStore,
    data: InteractionData,
) -> np.ndarray:
    """(n,) int64 index of each raw id, -1 where the data lack it.

    Raises:
        DataError: Numbers on one side and text on the other, which are never the same ids.
    """
    names = {True: "text", False: "integers"}
    in_store, in_data = column.dtype == pl.String, isinstance(ids[0], str)
    if in_store != in_data:
        raise DataError(
            f"The rationales in {store.folder} have {names[in_store]} as {what} ids, such as "
            f"{column[0]!r}, and the data {data.name!r} have {names[in_data]}, such as {ids[0]!r}. "
            f"Expected the same ids on both sides. {_of_other_data(store)}"
        )
    known = pl.DataFrame({"id": pl.Series(ids, dtype=column.dtype)}).with_row_index("index", first)
    found = column.to_frame("id").join(known, on="id", how="left", maintain_order="left")
    return found["index"].cast(pl.Int64).fill_null(-1).to_numpy()


def _hashes_differ(
    data: InteractionData, users: np.ndarray, cuts: np.ndarray, hashes: pl.Series
) -> np.ndarray:
    """(m,) bool: what the hash stands for is not what the data have before the cut, and at it."""
    differ = np.zeros(len(users), dtype=bool)
    order = np.argsort(users, kind="stable")
    starts = np.flatnonzero(np.diff(users[order], prepend=-1))
    raw_ids = data.catalog.item_ids
    for rows in np.split(order, starts[1:]):
        if not len(rows):
            continue
        history = data.history(int(users[rows[0]]))[: cuts[rows].max() + 1]
        found = position_hashes([raw_ids[item] for item in history])
        given = hashes.gather(rows).to_list()
        differ[rows] = [
            found[cut] != text for cut, text in zip(cuts[rows].tolist(), given, strict=True)
        ]
    return differ


def _no_fit(refused: _Refused, store: RationaleStore, data: InteractionData) -> str:
    lines = []
    for reason, rows in refused.by_reason.items():
        shown = store.keys[rows[:5].tolist()].select("user_id", "cut", "item_id")
        examples = "; ".join(
            f"user {user!r}, cut {cut}, item {item!r}" for user, cut, item in shown.iter_rows()
        )
        lines.append(f"  - {len(rows):,} {reason}: {examples}{'; …' if len(rows) > 5 else ''}")
    listed = "\n".join(lines)
    return (
        f"The rationales in {store.folder} do not fit the data {data.name!r}; "
        f"{refused.rows.sum():,} of {len(store):,} are refused:\n{listed}\nExpected at most one "
        "for each training interaction, of the same tables, filters, order and split. "
        f"{_of_other_data(store)}"
    )


def _of_other_data(store: RationaleStore) -> str:
    named = store.facts.get("data")
    of = f"the data that they were written for ({named!r})" if named else "their own data"
    return f"Use them with {of}, or generate and encode rationales of these."
