"""Reads a table of interactions and a table of items, checks them, and orders every user's history.

What comes out is indexed: users 0..U-1 and items 1..V-1 in the order of their raw ids, so that the
same data in another row order gives the same indices. Whatever is dropped or replaced is counted
in `InteractionData.notes`; what cannot be repaired is a DataError that says where it is.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cotrain.config import DataConfig
from cotrain.data import prepared, splits, tables
from cotrain.data.catalog import Catalog
from cotrain.data.splits import NOT_EVALUATED, HeldOut, Split
from cotrain.errors import DataError, some_of

# The shortest history that leaves something to train on beside validation and test. Under the split
# by time one interaction to train on and one to predict are enough.
MIN_INTERACTIONS = {"leave-one-out": 3, "time": 2}


@dataclass(frozen=True)
class InteractionData:
    """Every kept interaction, and which of them are held out.

    Attributes:
        name: What the report calls the data.
        user_ids: Raw id of each user index, (U,).
        offsets: `items[offsets[u]:offsets[u + 1]]` is the history of user u, (U+1,) int64.
        items: Item indices 1..V-1, each user's in time order, users concatenated, (N,) int64.
        catalog: Item index to raw id, title and categories.
        notes: What was read, dropped and replaced, and why; one sentence each.
        time_split: Training end and targets of each user; None: leave-one-out.
    """

    name: str
    user_ids: list[Any]
    offsets: np.ndarray
    items: np.ndarray
    catalog: Catalog
    notes: list[str]
    time_split: HeldOut | None = None

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

    @cached_property
    def held_out(self) -> HeldOut:
        """Where training ends and the targets stand."""
        return self.time_split or splits.leave_one_out(self.offsets)

    @property
    def trained_users(self) -> np.ndarray:
        """(n,) users with two training items or more; one item has nothing after it to learn."""
        return np.flatnonzero(self.held_out.train_end - self.offsets[:-1] >= 2)

    @cached_property
    def train_counts(self) -> np.ndarray:
        """(V,) int64: training interactions of each item, 0 for the padding."""
        ends = np.repeat(self.held_out.train_end, np.diff(self.offsets))
        trained = self.items[np.arange(len(self.items)) < ends]
        return np.bincount(trained, minlength=len(self.catalog))

    @cached_property
    def popularity_levels(self) -> np.ndarray:
        """(V,) int64 from 0 to 9: items by training interactions, each level holding a tenth of
        them, so that most levels are of items that are taken often."""
        order = np.argsort(self.train_counts, kind="stable")
        counts = self.train_counts[order]
        middle = np.cumsum(counts) - counts / 2
        levels = np.empty(len(counts), np.int64)
        levels[order] = np.minimum(10 * middle / max(1, counts.sum()), 9).astype(np.int64)
        return levels

    def evaluated_users(self, split: Split) -> np.ndarray:
        """(n,) users with a target in this split, ascending."""
        return np.flatnonzero(self._places(split) != NOT_EVALUATED)

    def targets(self, split: Split) -> np.ndarray:
        """(n,) the item to be predicted for each of `evaluated_users`."""
        return self.items[self._places(split)[self.evaluated_users(split)]]

    def history_lengths(self, split: Split) -> np.ndarray:
        """(n,) how many items are known before the target of each of `evaluated_users`."""
        users = self.evaluated_users(split)
        return self._places(split)[users] - self.offsets[users]

    def history(self, user: int) -> np.ndarray:
        """All items of a user, oldest first."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def train_history(self, user: int) -> np.ndarray:
        """Items for training, oldest first."""
        return self.items[self.offsets[user] : self.held_out.train_end[user]]

    def history_before(self, user: int, split: Split) -> np.ndarray:
        """What is known of a user when the split's target is to be predicted, oldest first."""
        return self.items[self.offsets[user] : self._place(user, split)]

    def target(self, user: int, split: Split) -> int:
        """The item to be predicted."""
        return int(self.items[self._place(user, split)])

    def _places(self, split: Split) -> np.ndarray:
        return self.held_out.validation if split == "validation" else self.held_out.test

    def _place(self, user: int, split: Split) -> int:
        place = int(self._places(split)[user])
        if place == NOT_EVALUATED:
            raise ValueError(f"user {user} has no {split} target; see evaluated_users({split!r})")
        return place

    def validation_target(self, user: int) -> int:
        """The item to be predicted on validation."""
        return self.target(user, "validation")

    def test_target(self, user: int) -> int:
        """The item to be predicted on test."""
        return self.target(user, "test")


def load_interactions(config: DataConfig) -> InteractionData:
    """Reads the named data set, or the tables that the settings point at.

    Raises:
        DataError: A table is missing, unreadable, empty, lacks a column or has values that cannot
            be used; no user is left with 3 interactions; or the split by time leaves nothing to
            train on or to evaluate.
        AssetError: The named data set is unknown or cannot be fetched.
    """
    name, notes = config.name, []
    if config.interactions is not None:
        interactions_path = Path(config.interactions).expanduser()
        items_path = None if config.items is None else Path(config.items).expanduser()
    elif config.items is not None:
        raise DataError(
            f"--data.items is {config.items!r}, but --data.interactions is not set. Set both for "
            f"tables of your own, or neither for the data set {config.name!r}."
        )
    else:
        found = prepared.find(config.name)
        name, notes = found.name, [*found.notes]
        interactions_path = found.folder / prepared.INTERACTIONS
        items_path = found.folder / prepared.ITEMS

    ordered = _read_interactions(interactions_path, config, notes)
    cuts = None
    if config.split == "time":
        cuts = splits.find_cuts(ordered["time"], config)
        ordered = splits.handle_unseen_items(ordered, cuts, config, notes)
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
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    time_split = None
    if cuts is not None:
        times = ordered["time"].to_physical().to_numpy()
        time_split = splits.split_by_time(offsets, times, cuts, config, notes)
    return InteractionData(
        name=name,
        user_ids=user_ids.to_list(),
        offsets=offsets,
        # A copy of its own: arrays lent by polars cannot be written, which torch warns about.
        items=indices["item"].to_numpy().astype(np.int64, copy=True),
        catalog=_read_catalog(items_path, item_ids, config, notes),
        notes=notes,
        time_split=time_split,
    )


# ---- interactions -------------------------------------------------------------------------------


def _read_interactions(path: Path, config: DataConfig, notes: list[str]) -> pl.DataFrame:
    """Kept interactions as columns user and item, sorted by user and then by time.

    For the split by time they have a column time, and that comes first in the order.
    """
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
    wanted = {"user": config.user_column, "item": config.item_column, "order": order}
    if config.split == "time":
        columns["--data.timestamp_column"] = wanted["time"] = config.timestamp_column
    tables.require(columns, present, path)
    rows = tables.collect(
        table.select(pl.col(name).alias(as_name) for as_name, name in wanted.items()),
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
    rows = rows.with_columns(_numbers(rows, "order", path, order, order_option))
    sorting, told = ["order"], f"column {order}"
    if config.split == "time":
        column = config.timestamp_column
        times = _numbers(rows, "time", path, column, "--data.timestamp_column")
        # Dates stay dates, so that a cut can be given and shown as one.
        rows = rows if rows["time"].dtype.is_temporal() else rows.with_columns(times)
        sorting = ["time", "order"]
        told = f"column {column}" + (f", then column {order}" if order != column else "")
    elif order != config.timestamp_column:
        told += ", not the timestamp"
    notes.append(f"Order within a user: {told}; equal values keep the order of the file.")
    # Stable, so that ties keep the order of the file.
    shortest = MIN_INTERACTIONS[config.split]
    return _drop_short(rows, shortest, path, notes).sort("user", *sorting, maintain_order=True)


def _numbers(rows: pl.DataFrame, role: str, path: Path, column: str, option: str) -> pl.Series:
    """The column that orders the interactions, or that tells their time, as numbers.

    Args:
        rows: All rows, with their number in `row`.
        role: `order` or `time`, the name of the column in `rows`.
        path: Of the table, for errors, like the two that follow.
        column: What the table calls the column.
        option: The option that names it.

    Raises:
        DataError: Some row has no number there.
    """
    given = rows[role]
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
        bad = rows.select("row", role).filter(numbers.is_null())
        first = bad["row"].head(5).to_list()
        where = tables.places(path, first)
        values = some_of([*bad[role].head(5).to_list(), *[None] * (bad.height - 5)])
        purpose, other = {
            "order": (
                "orders the interactions",
                "name another column that gives the order with --data.order_column",
            ),
            "time": (
                "gives the time at which --data.split time cuts",
                "use --data.split leave-one-out, which needs an order but no times",
            ),
        }[role]
        raise DataError(
            f"Column {column!r} of {path} {purpose}, and "
            f"{tables.rows_text(bad.height)} of {rows.height:,} have no number there. First: "
            f"{where}; values: {values}. Correct or remove these rows, or {other}."
        )
    return numbers.alias(role)


def _drop_short(rows: pl.DataFrame, shortest: int, path: Path, notes: list[str]) -> pl.DataFrame:
    lengths = rows.group_by("user").len()
    short = lengths.filter(pl.col("len") < shortest)
    if short.height == lengths.height:
        longest = lengths["len"].max() or 0
        raise DataError(
            f"No user in {path} has {shortest} interactions or more: of {lengths.height:,} "
            f"users the longest history has {longest}. Training and what is held out need one "
            "each; give a table with longer histories, and check --data.user_column."
        )
    if short.height:
        notes.append(
            f"{short.height:,} of {lengths.height:,} users dropped, with their "
            f"{short['len'].sum():,} interactions: fewer than {shortest}."
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
