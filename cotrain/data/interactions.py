"""Reads a table of interactions and a table of items, checks them, and orders every user's history.

What comes out is indexed: users 0..U-1 and items 1..V-1 in the order of their raw ids, so that the
same data in another row order gives the same indices. Whatever is dropped or replaced is counted
in `InteractionData.notes`; what cannot be repaired is a DataError that says where it is.
"""

import contextlib
import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cotrain import assets
from cotrain.config import DataConfig
from cotrain.data.catalog import Catalog
from cotrain.errors import DataError, some_of

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".inter": "\t", ".txt": "\t"}
_SUFFIXES = [".parquet", *_SEPARATORS]
# The shortest history that leaves something to train on beside validation and test.
MIN_INTERACTIONS = 3


@dataclass(frozen=True)
class InteractionData:
    """Every kept interaction, and the leave-one-out split of each user's history.

    The last interaction of a user is the test target, the one before it the validation target,
    and the rest is for training.

    Attributes:
        name: What the report calls the data.
        user_ids: Raw id of each user index, (U,).
        offsets: `items[offsets[u]:offsets[u + 1]]` is the history of user u, (U+1,) int64.
        items: Item indices 1..V-1, each user's in time order, users concatenated, (N,) int64.
        catalog: Item index to raw id, title and categories.
        notes: What was read, dropped and replaced, and why; one sentence each.
    """

    name: str
    user_ids: list[Any]
    offsets: np.ndarray
    items: np.ndarray
    catalog: Catalog
    notes: list[str]

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """Items, without the padding."""
        return len(self.catalog) - 1

    @property
    def num_interactions(self) -> int:
        return len(self.items)

    def history(self, user: int) -> np.ndarray:
        """All items of a user, oldest first."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def train_history(self, user: int) -> np.ndarray:
        """Items for training: all but the validation and the test target."""
        return self.items[self.offsets[user] : self.offsets[user + 1] - 2]

    def validation_target(self, user: int) -> int:
        """The last item but one."""
        return int(self.items[self.offsets[user + 1] - 2])

    def test_target(self, user: int) -> int:
        """The last item."""
        return int(self.items[self.offsets[user + 1] - 1])


def load_interactions(config: DataConfig) -> InteractionData:
    """Reads the named data set, or the tables that the settings point at.

    Raises:
        DataError: A table is missing, unreadable, empty, lacks a column or has values that cannot
            be used; or no user is left with 3 interactions.
        AssetError: The named data set is unknown or cannot be fetched.
    """
    if config.interactions is not None:
        interactions_path = Path(config.interactions).expanduser()
        items_path = None if config.items is None else Path(config.items).expanduser()
    elif config.items is not None:
        raise DataError(
            f"--data.items is {config.items!r}, but --data.interactions is not set. Set both for "
            f"tables of your own, or neither for the data set {config.name!r}."
        )
    else:
        folder = assets.fetch(config.name, kind="data")
        interactions_path, items_path = folder / "interactions.parquet", folder / "items.parquet"

    notes: list[str] = []
    ordered = _read_interactions(interactions_path, config, notes)
    user_ids = ordered["user"].unique(maintain_order=True)
    item_ids = ordered["item"].unique().sort()
    # Dense ranks of the raw ids are the indices: from 0 for users, from 1 for items.
    indices = ordered.select(
        pl.col("user").rank("dense").cast(pl.Int64) - 1, pl.col("item").rank("dense").cast(pl.Int64)
    )
    lengths = np.bincount(indices["user"].to_numpy(), minlength=len(user_ids))
    notes.append(
        f"Kept: {len(user_ids):,} users, {len(item_ids):,} items, {ordered.height:,} interactions."
    )
    return InteractionData(
        name=config.name,
        user_ids=user_ids.to_list(),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        # A copy of its own: arrays lent by polars cannot be written, which torch warns about.
        items=indices["item"].to_numpy().astype(np.int64, copy=True),
        catalog=_read_catalog(items_path, item_ids, config, notes),
        notes=notes,
    )


# ---- interactions -------------------------------------------------------------------------------


def _read_interactions(path: Path, config: DataConfig, notes: list[str]) -> pl.DataFrame:
    """Kept interactions as columns user and item, sorted by user and then by time."""
    option = "--data.interactions"
    table = _scan(path, option)
    present = table.collect_schema().names()
    if config.order_column is not None:
        order, order_option = config.order_column, "--data.order_column"
    elif "position" in present:
        order, order_option = "position", "--data.order_column"
    else:
        order, order_option = config.timestamp_column, "--data.timestamp_column"
    columns = {
        "--data.user_column": config.user_column,
        "--data.item_column": config.item_column,
        order_option: order,
    }
    _require(columns, present, path)
    rows = _collect(
        table.select(
            pl.col(config.user_column).alias("user"),
            pl.col(config.item_column).alias("item"),
            pl.col(order).alias("order"),
        ),
        path,
        option,
    )
    if rows.is_empty():
        raise DataError(f"{path} has no rows. Point {option} at a table with interactions.")
    notes.append(f"Interactions: {rows.height:,} rows read from {path.name}.")

    rows = rows.with_columns(
        _ids(rows["user"], path, config.user_column),
        _ids(rows["item"], path, config.item_column),
    ).with_row_index("row")
    for column, name in (("user", config.user_column), ("item", config.item_column)):
        dropped = rows[column].null_count()
        if dropped:
            rows = rows.drop_nulls(column)
            notes.append(f"{_rows(dropped)} without {name} dropped.")
    rows = rows.with_columns(_order_values(rows, path, order, order_option))
    instead = "" if order == config.timestamp_column else ", not the timestamp"
    notes.append(
        f"Order within a user: column {order}{instead}; equal values keep the order of the file."
    )
    # Stable, so that ties keep the order of the file.
    return _drop_short(rows, path, notes).sort("user", "order", maintain_order=True)


def _order_values(rows: pl.DataFrame, path: Path, column: str, option: str) -> pl.Series:
    """The order column as numbers.

    Raises:
        DataError: Some row has no number there.
    """
    given = rows["order"]
    if given.dtype == pl.String:
        text = given.str.strip_chars()
        # Integers first: nanoseconds since 1970 do not fit into a float.
        numbers = text.cast(pl.Int64, strict=False)
        if numbers.null_count():
            numbers = text.cast(pl.Float64, strict=False)
    elif given.dtype.is_temporal():
        numbers = given.to_physical()
    elif given.dtype.is_decimal():
        numbers = given.cast(pl.Float64)
    elif given.dtype.is_numeric() or given.dtype == pl.Null:
        numbers = given
    else:
        raise DataError(
            f"Column {column!r} of {path} is {given.dtype}, and interactions cannot be ordered by "
            f"it. Give a column of numbers that grow with time as {option}."
        )
    if numbers.dtype.is_float():
        numbers = pl.select(pl.when(numbers.is_finite()).then(numbers)).to_series()
    if numbers.null_count():
        bad = rows.select("row", "order").filter(numbers.is_null())
        first = bad["row"].head(5).to_list()
        where = _places(path, first)
        values = some_of([*bad["order"].head(5).to_list(), *[None] * (bad.height - 5)])
        raise DataError(
            f"Column {column!r} of {path} orders the interactions, and {_rows(bad.height)} of "
            f"{rows.height:,} have no number there. First: {where}; values: {values}. Correct or "
            f"remove these rows, or name another column that gives the order with "
            f"--data.order_column."
        )
    return numbers.alias("order")


def _places(path: Path, rows: list[int]) -> str:
    """Where data rows (from 0) stand in the file: `row 3 (line 4)`; Parquet has no lines."""
    lines: dict[int, int] = {}
    separator = _SEPARATORS.get(path.suffix.lower())
    if separator is not None:
        # A quoted value may hold line breaks, so that rows have to be read up to the last one.
        # A cell too large for the csv module costs the line numbers, not the message.
        with path.open(encoding="utf-8", newline="") as file, contextlib.suppress(csv.Error):
            reader = csv.reader(file, delimiter=separator)
            next(reader)
            start = reader.line_num + 1
            for number, _ in enumerate(reader):
                if number in rows:
                    lines[number] = start
                if number >= rows[-1]:
                    break
                start = reader.line_num + 1
    return ", ".join(
        f"row {row + 1}" + (f" (line {lines[row]})" if row in lines else "") for row in rows
    )


def _drop_short(rows: pl.DataFrame, path: Path, notes: list[str]) -> pl.DataFrame:
    lengths = rows.group_by("user").len()
    short = lengths.filter(pl.col("len") < MIN_INTERACTIONS)
    if short.height == lengths.height:
        longest = lengths["len"].max() or 0
        raise DataError(
            f"No user in {path} has {MIN_INTERACTIONS} interactions or more: of {lengths.height:,} "
            f"users the longest history has {longest}. Training, validation and test need one "
            "each; give a table with longer histories, and check --data.user_column."
        )
    if short.height:
        notes.append(
            f"{short.height:,} of {lengths.height:,} users dropped, with their "
            f"{short['len'].sum():,} interactions: fewer than {MIN_INTERACTIONS}."
        )
    return rows.join(short, on="user", how="anti", maintain_order="left")


# ---- items --------------------------------------------------------------------------------------


def _read_catalog(
    path: Path | None, item_ids: pl.Series, config: DataConfig, notes: list[str]
) -> Catalog:
    """Titles and categories of the items that occur, in the order of `item_ids`."""
    # Int and text ids meet as text; so do integers of different width.
    found = pl.DataFrame({"key": item_ids.cast(pl.String)})
    if path is None:
        notes.append("No items table is given: ids stand in for titles.")
        found = found.with_columns(title=pl.lit(None, pl.String), categories=pl.lit(""))
    else:
        known = _read_items(path, config, notes)
        if not found["key"].is_in(known["key"].implode()).any():
            raise DataError(
                f"None of the {found.height:,} item ids of the interactions is in {path}. "
                f"Interactions have {some_of(item_ids.head(3).to_list())}; the items table has "
                f"{some_of(known['key'].head(3).to_list())}. Check --data.item_column and "
                "--data.items; both tables have to use the same ids."
            )
        found = found.join(known, on="key", how="left", maintain_order="left")
        untitled = found["title"].null_count()
        if untitled:
            it = "its id stands in" if untitled == 1 else "their ids stand in"
            has = (
                "item has" if found.height == 1 else "items has" if untitled == 1 else "items have"
            )
            notes.append(f"{untitled:,} of {found.height:,} {has} no title; {it}.")
    titles = found.select(pl.coalesce("title", "key")).to_series().to_list()
    categories = found["categories"].fill_null("").to_list()
    return Catalog([None, *item_ids.to_list()], ["", *titles], ["", *categories])


def _read_items(path: Path, config: DataConfig, notes: list[str]) -> pl.DataFrame:
    """Columns key (id as text, unique), title (null if blank) and categories (null if blank)."""
    option = "--data.items"
    table = _scan(path, option)
    present = table.collect_schema().names()
    _require(
        {"--data.item_column": config.item_column, "--data.title_column": config.title_column},
        present,
        path,
    )
    columns = {"key": config.item_column, "title": config.title_column}
    if config.categories_column in present:
        columns["categories"] = config.categories_column
    elif config.categories_column is not None:
        notes.append(
            f"{path.name} has no column {config.categories_column}: items have no categories."
        )
    rows = _collect(
        table.select(pl.col(name).alias(as_name) for as_name, name in columns.items()),
        path,
        option,
    )
    if rows.is_empty():
        raise DataError(f"{path} has no rows. Point {option} at a table with items, or leave it.")
    rows = rows.with_columns(
        _ids(rows["key"], path, config.item_column).cast(pl.String),
        *[_text(rows[column], path, columns[column]) for column in columns if column != "key"],
    )
    without_id = rows["key"].null_count()
    if without_id:
        rows = rows.drop_nulls("key")
        notes.append(f"{_rows(without_id)} of {path.name} without {config.item_column} dropped.")
    unique = rows.unique("key", keep="first", maintain_order=True)
    if unique.height < rows.height:
        repeated = rows.height - unique.height
        whose = "its item id stands" if repeated == 1 else "their item ids stand"
        notes.append(f"{_rows(repeated)} of {path.name} dropped: {whose} in an earlier row.")
    if "categories" not in unique.columns:
        unique = unique.with_columns(categories=pl.lit(None, pl.String))
    return unique


def _text(column: pl.Series, path: Path, name: str) -> pl.Series:
    """A column as stripped text, blanks as null; lists of text are joined by a bar."""
    if column.dtype == pl.List(pl.String):
        column = column.list.join("|", ignore_nulls=True)
    elif column.dtype.is_nested() or column.dtype in (pl.Binary, pl.Object):
        raise DataError(
            f"Column {name!r} of {path} is {column.dtype}; text is expected. Convert it, or name "
            "another column with --data.title_column or --data.categories_column."
        )
    return _without_blanks(column.cast(pl.String).str.strip_chars())


# ---- tables -------------------------------------------------------------------------------------


def _scan(path: Path, option: str) -> pl.LazyFrame:
    """The table, unread; the columns of a CSV or TSV are all text, so that no cell is misread.

    Raises:
        DataError: No such file, no known suffix, or nothing that can be read as such a table.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(
            f"The table {path} {what}. Point {option} at a file that ends in one of "
            f"{some_of(_SUFFIXES)}."
        )
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise DataError(
            f"{path} ends in {suffix!r}; {option} reads {some_of(_SUFFIXES)}. Convert or rename it."
        )
    try:
        if suffix == ".parquet":
            table = pl.scan_parquet(path, glob=False)
        else:
            table = pl.scan_csv(path, separator=_SEPARATORS[suffix], infer_schema=False, glob=False)
        table.collect_schema()
    except _UNREADABLE as error:
        raise _unreadable(path, option, error) from error
    return table


def _collect(table: pl.LazyFrame, path: Path, option: str) -> pl.DataFrame:
    try:
        return table.collect()
    except _UNREADABLE as error:
        raise _unreadable(path, option, error) from error


# Polars answers some damaged files with a panic of its Rust side, which is no PolarsError.
_UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError)


def _unreadable(path: Path, option: str, error: BaseException) -> DataError:
    if isinstance(error, pl.exceptions.NoDataError):
        return DataError(f"{path} is empty. Point {option} at a table with a header and rows.")
    kind = "Parquet" if path.suffix.lower() == ".parquet" else "a UTF-8 table with a header"
    # Polars goes on with advice about its own parameters, which nobody can set from here.
    reason = " ".join(str(error).split("\n\n")[0].split())
    return DataError(
        f"{path} cannot be read as {kind}; it may be cut off or of another format: {reason[:300]}. "
        f"Write it again, or point {option} at another file."
    )


def _require(columns: dict[str, str], present: list[str], path: Path) -> None:
    """Checks that the table has the columns, given as option: column name."""
    missing = {option: name for option, name in columns.items() if name not in present}
    if missing:
        listed = ", ".join(f"{name!r} ({option})" for option, name in missing.items())
        raise DataError(
            f"{path} lacks the column{'s' if len(missing) > 1 else ''} {listed}. It has "
            f"{some_of(present, limit=20)}. Name the right ones with these options."
        )


def _ids(column: pl.Series, path: Path, name: str) -> pl.Series:
    """Ids as Int64 or text, blanks as null.

    Text from CSV becomes integers only if every value is one as Python would write it: "007" and
    "7" stay two ids.

    Raises:
        DataError: The column holds neither integers nor text.
    """
    dtype = column.dtype
    if isinstance(dtype, (pl.Categorical, pl.Enum)):
        column = column.cast(pl.String)
    if column.dtype == pl.String:
        column = _without_blanks(column)
        if path.suffix.lower() != ".parquet":
            integers = column.cast(pl.Int64, strict=False)
            if (integers.cast(pl.String).eq_missing(column)).all():
                return integers
        return column
    if dtype == pl.Null:
        return column.cast(pl.String)
    try:
        # A float column is what an integer column with gaps turns into in pandas.
        if dtype.is_float() and bool((column.fill_nan(None) % 1 == 0).all()):
            return column.fill_nan(None).cast(pl.Int64)
        if dtype.is_integer():
            return column.cast(pl.Int64)
    except pl.exceptions.InvalidOperationError as error:
        raise DataError(
            f"Column {name!r} of {path} has ids beyond 64-bit integers. Store them as text."
        ) from error
    raise DataError(
        f"Column {name!r} of {path} is {dtype}; ids have to be integers or text. Convert it, or "
        "name another column with --data.user_column or --data.item_column."
    )


def _without_blanks(column: pl.Series) -> pl.Series:
    blank = column.str.strip_chars() == ""
    return pl.select(pl.when(~blank).then(column)).to_series().alias(column.name)


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"
