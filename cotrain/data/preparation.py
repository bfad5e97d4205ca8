"""From a publisher's files to a prepared set: read, check, filter, order, write.

`prepare` is what `scripts/prepare_data.py` calls.
"""

import dataclasses
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from cotrain.config import Leaf, option
from cotrain.data import filters, prepared
from cotrain.data.cleaning import Events, clean
from cotrain.data.filters import Filters
from cotrain.data.ledger import Ledger
from cotrain.data.readers import READERS
from cotrain.data.readers.raw import Columns
from cotrain.errors import ConfigError, DataError
from cotrain.files import sha256


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """Every option of `prepare_data.py`."""

    source: str
    input: str = option("", "Folder, archive or file, as the publisher ships it.")
    items: str | None = option(
        None,
        "File of items, where it does not stand beside the input: Amazon's meta_X.json.gz, a table "
        "of items.",
    )
    name: str = option("", "Name of the set, for --data.name of a run.")
    output: str | None = option(
        None, "Folder to write; none: a folder NAME where runs find it by that name."
    )
    overwrite: bool = option(False, "Replace a prepared set that stands there.")
    user_column: str | None = option(None, "tables, recbole: column of the user id; none: user_id.")
    item_column: str | None = option(
        None, "tables, recbole: column of the item id, in both tables; none: item_id."
    )
    timestamp_column: str | None = option(
        None, "tables, recbole: column of the time; none: timestamp."
    )
    order_column: str | None = option(
        None,
        "tables, recbole: column that orders a user's interactions; none: `position` where a table "
        "has it and no timestamp column is named, else the timestamp.",
    )
    rating_column: str | None = option(None, "tables, recbole: column of the rating; none: rating.")
    title_column: str | None = option(
        None, "tables, recbole: column of the item's title; none: title, or what RecBole calls it."
    )
    categories_column: str | None = option(
        None, "tables, recbole: column of its categories; none: categories, likewise."
    )
    min_rating: float | None = option(
        None, "Lowest rating that counts as an interaction; none: every rating does."
    )
    duplicates: Literal["all", "first", "last"] = option(
        "all", "Which interactions of a user with the same item stay."
    )
    drop_repeats: bool = option(
        False, "Drop interactions with the same item as the one just before."
    )
    max_user_interactions: int | None = option(
        None, "Drop users with more interactions than this (bots); none: keep, and warn.", ge=1
    )
    min_user_interactions: int = option(
        1,
        "Drop users with fewer interactions. This and the next are repeated until both hold: 5 and "
        "5 is the 5-core.",
        ge=1,
    )
    min_item_interactions: int = option(1, "Drop items with fewer interactions.", ge=1)
    max_bad_share: float = option(
        0.001, "Share of damaged rows that is dropped; more is an error. 0: any is.", ge=0, le=1
    )

    @property
    def folder(self) -> Path:
        """Where the set goes."""
        if self.output is not None:
            return Path(self.output).expanduser().absolute()
        return prepared.root() / self.name

    def part(self, cls: type) -> Any:
        """The options that belong to `Columns` or `Filters`."""
        suffix = "_column" if cls is Columns else ""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(self, name + suffix) for name in names})


def prepare(options: PrepareOptions, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Makes a prepared set.

    Args:
        options: As on the command line.
        say: Takes the lines about what is going on.

    Returns:
        The record, as in prepared.json.

    Raises:
        ConfigError: An option is out of range; names every one.
        DataError: The input cannot be used, the filters leave nothing, or the set cannot be
            written. Nothing is written then.
    """
    _check(options)
    folder = options.folder
    prepared.check_free(options.name, folder, options.overwrite)
    paths = [Path(path).expanduser() if path else None for path in (options.input, options.items)]
    say(f"Reading {options.input} as {options.source}")
    raw = READERS[options.source](paths[0] or Path(), paths[1], options.part(Columns))
    ledger, items = raw.ledger, raw.items
    say(f"Checking and ordering {ledger.left:,} interactions")
    events = clean(raw, options.max_bad_share)
    say("Filtering")
    table = filters.apply(events, options.part(Filters), ledger)
    interactions, items = _finished(table, events, items, ledger)
    del events, table
    statistics = _statistics(interactions, items)
    say(f"Writing {folder}")
    record = {
        "name": options.name,
        "source": options.source,
        "inputs": [{"file": path.name, "sha256": sha256(path)} for path in raw.files],
        "options": _recorded(options),
        **ledger.record(),
        "statistics": statistics,
    }
    prepared.write(folder, interactions, items, record)
    say(f"\n{ledger.table()}\n\n{_summary(options.name, statistics)}\n")
    use = folder if options.output is not None else options.name
    say(f"Written to {folder}. Use it with --data.name {use}")
    return prepared.read_manifest(folder)


def _check(options: PrepareOptions) -> None:
    problems = []
    for field in dataclasses.fields(options)[1:]:
        name = "--" + field.name.replace("_", "-")
        problem = Leaf(name, field.type, field).range_problem(getattr(options, field.name))
        if problem:
            problems.append(f"  - {problem}")
    if problems:
        raise ConfigError(f"{len(problems)} option(s) cannot be used:\n" + "\n".join(problems))


def _finished(
    table: pl.DataFrame, events: Events, items: pl.DataFrame | None, ledger: Ledger
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Both tables of the prepared set, from the events that stayed."""
    users = table["user"].to_numpy()
    starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]])
    lengths = np.diff(np.r_[starts, len(users)])
    position = np.arange(len(users)) - np.repeat(starts, lengths)
    interactions = table.select(
        events.users.gather(table["user"]).alias("user_id"),
        events.items.gather(table["item"]).alias("item_id"),
        pl.Series("position", position, pl.Int32),
        # A source that has an order and no times has no times here either.
        pl.col("timestamp") if "timestamp" in table.columns
        else pl.lit(None, pl.Int64).alias("timestamp"),
        *[name for name in ("rating",) if name in table.columns],
    )  # fmt: skip
    present = events.items.gather(table["item"].unique().sort())
    return interactions, _catalog(present, items, ledger)


def _catalog(present: pl.Series, items: pl.DataFrame | None, ledger: Ledger) -> pl.DataFrame:
    """item_id, title and categories of every item that occurs.

    Raises:
        DataError: The items table has none of the ids.
    """
    # Integers and text meet as text.
    found = pl.DataFrame({"item_id": present, "key": present.cast(pl.String)})
    if items is None:
        nothing = pl.lit(None, pl.String)
        return found.select("item_id", title=nothing, categories=nothing)
    known = items.select(
        pl.col("item_id").cast(pl.String).alias("key"),
        *[pl.col(name).cast(pl.String).str.strip_chars() for name in ("title", "categories")],
    ).with_columns(
        pl.when(pl.col(name) != "").then(name).alias(name) for name in ("title", "categories")
    )
    joined = found.join(known, on="key", how="left", maintain_order="left").drop("key")
    matched = found.join(known, on="key", how="semi").height
    if not matched:
        raise DataError(
            f"None of the {found.height:,} item ids of the interactions is in the table of items. "
            f"Interactions have {present.head(3).to_list()}; the items have "
            f"{known['key'].head(3).to_list()}. Both have to use the same ids."
        )
    unused = known.height - matched
    if unused:
        ledger.note(f"{unused:,} of {known.height:,} items have no interaction; they are left out.")
    unknown = found.height - matched
    untitled = joined["title"].null_count()
    if untitled:
        ledger.note(
            f"{untitled:,} of {found.height:,} items have no title ({unknown:,} are not in the "
            "table of items); their ids will stand in."
        )
    return joined


# ---- what is said and recorded ------------------------------------------------------------------


def _recorded(options: PrepareOptions) -> dict[str, Any]:
    """The options that shape the set; neither where it came from nor where it went."""
    elsewhere = {"source", "input", "items", "name", "output", "overwrite"}
    return {
        name: value for name, value in dataclasses.asdict(options).items() if name not in elsewhere
    }


def _statistics(interactions: pl.DataFrame, items: pl.DataFrame) -> dict[str, Any]:
    lengths = np.bincount(interactions["user_id"].rle_id().to_numpy())
    times = interactions["timestamp"]
    return {
        "users": len(lengths),
        "items": items.height,
        "interactions": interactions.height,
        "density": interactions.height / (len(lengths) * items.height),
        "mean_length": float(lengths.mean()),
        "median_length": float(np.median(lengths)),
        "max_length": int(lengths.max()),
        "items_with_title": items["title"].count(),
        "items_with_categories": items["categories"].count(),
        "first_timestamp": times.min(),
        "last_timestamp": times.max(),
    }


def _summary(name: str, statistics: dict[str, Any]) -> str:
    times = [_date(statistics[key]) for key in ("first_timestamp", "last_timestamp")]
    rows = {
        "users": f"{statistics['users']:,}",
        "items": f"{statistics['items']:,}",
        "  with title": f"{statistics['items_with_title']:,}",
        "  with categories": f"{statistics['items_with_categories']:,}",
        "interactions": f"{statistics['interactions']:,}",
        "density": f"{statistics['density']:.4%}",
        "length, mean": f"{statistics['mean_length']:.2f}",
        "length, median": f"{statistics['median_length']:g}",
        "length, max": f"{statistics['max_length']:,}",
        "time": f"{times[0]} to {times[1]}",
    }
    width = max(map(len, rows))
    return "\n".join([name, *(f"  {key:<{width}}  {value}" for key, value in rows.items())])


def _date(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    # Smaller numbers are no clock times.
    if seconds < 100_000_000:
        return f"{seconds:g}"
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%d")
