"""Reads a table of interactions and a table of items, checks them, and orders every user's history.

What comes out is indexed: users 0..U-1 and items 1..V-1 in the order of their raw ids, so that the
same data in another row order gives the same indices. Whatever is dropped or replaced is counted
in `InteractionData.notes`; what cannot be repaired is a DataError that says where it is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cotrain import assets
from cotrain.config import DataConfig
from cotrain.data import tables
from cotrain.data.catalog import Catalog
from cotrain.errors import DataError, some_of

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

    @property
    def trained_users(self) -> np.ndarray:
        """(n,) users with two training items or more; one item has nothing after it to learn."""
        return np.flatnonzero(np.diff(self.offsets) - 2 >= 2)

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
    table = tables.scan(path, option)
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
    tables.require(columns, present, path)
    rows = tables.collect(
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
        tables.ids(rows["user"], path, config.user_column),
        tables.ids(rows["item"], path, config.item_column),
    ).with_row_index("row")
    for column, name in (("user", config.user_column), ("item", config.item_column)):
        dropped = rows[column].null_count()
        if dropped:
            rows = rows.drop_nulls(column)
            notes.append(f"{tables.rows_text(dropped)} without {name} dropped.")
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
        where = tables.places(path, first)
        values = some_of([*bad["order"].head(5).to_list(), *[None] * (bad.height - 5)])
        raise DataError(
            f"Column {column!r} of {path} orders the interactions, and "
            f"{tables.rows_text(bad.height)} of {rows.height:,} have no number there. First: "
            f"{where}; values: {values}. Correct or remove these rows, or name another column that "
            "gives the order with --data.order_column."
        )
    return numbers.alias("order")


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
    table = tables.scan(path, option)
    present = table.collect_schema().names()
    tables.require(
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
    rows = tables.collect(
        table.select(pl.col(name).alias(as_name) for as_name, name in columns.items()),
        path,
        option,
    )
    if rows.is_empty():
        raise DataError(f"{path} has no rows. Point {option} at a table with items, or leave it.")
    rows = rows.with_columns(
        tables.ids(rows["key"], path, config.item_column).cast(pl.String),
        *[tables.text(rows[name], path, columns[name]) for name in columns if name != "key"],
    )
    without_id = rows["key"].null_count()
    if without_id:
        rows = rows.drop_nulls("key")
        notes.append(
            f"{tables.rows_text(without_id)} of {path.name} without {config.item_column} dropped."
        )
    unique = rows.unique("key", keep="first", maintain_order=True)
    if unique.height < rows.height:
        repeated = rows.height - unique.height
        whose = "its item id stands" if repeated == 1 else "their item ids stand"
        notes.append(
            f"{tables.rows_text(repeated)} of {path.name} dropped: {whose} in an earlier row."
        )
    if "categories" not in unique.columns:
        unique = unique.with_columns(categories=pl.lit(None, pl.String))
    return unique
