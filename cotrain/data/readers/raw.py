"""The one form that every reader brings its files to."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from cotrain.data.ledger import Ledger, counted
from cotrain.data.readers.lines import Lines
from cotrain.data.readers.sources import Source


@dataclass(frozen=True)
class Columns:
    """What the columns of tables with names of their own are called; none: as each reader says."""

    user: str | None = None
    item: str | None = None
    timestamp: str | None = None
    order: str | None = None
    rating: str | None = None
    title: str | None = None
    categories: str | None = None


@dataclass
class RawData:
    """What a reader found, in the order of the file, unchecked.

    Attributes:
        interactions: user_id and item_id (integers or text), timestamp (number, text or date; may
            be absent beside order), rating (likewise; may be absent), order (only where a column
            other than the timestamp gives the order), source_row.
        items: item_id, title and categories (text, joined by a bar), in the order of the file; None
            without a table of items. Ids may be repeated.
        ledger: What was read and which lines were no rows.
        files: Every file that was read.
        where: Says of each of some rows, given by their source_row ascending, where it stands.
        order_column: What the column `order` is called in the file.
        unended: source_row of a last row without a line end: the file may be cut off there.
        free_ids: Whether ids are the user's own, so that a mixture of numbers and text is worth a
            remark; Amazon's ids mix by design.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame | None
    ledger: Ledger
    files: list[Path]
    where: Callable[[list[int]], list[str]]
    order_column: str | None = None
    unended: int | None = None
    free_ids: bool = False


# A reader: (--input, --items, column names) -> what was found.
Reader = Callable[[Path, Path | None, Columns], RawData]


def where_lines(lines: list[int]) -> list[str]:
    """`RawData.where` for files of one row a line."""
    return [f"line {line:,}" for line in lines]


def lines_ledger(source: Source, found: Lines, noun: str = "lines") -> Ledger:
    """The first steps of a file of lines: what was read, and the lines that are no rows."""
    ledger = Ledger()
    ledger.read(f"{source.name}: {noun} read", found.lines)
    for cause, count in found.malformed.counts.items():
        ledger.damage(cause, count, found.malformed.examples[cause])
    if found.blank:
        ledger.note(f"{counted(found.blank, 'line')} of {source.name} passed over: blank.")
    return ledger


def without_repeats(items: pl.DataFrame, name: str, ledger: Ledger) -> pl.DataFrame:
    """Items without those that have no id, or whose id stands in an earlier row."""
    known = items.drop_nulls("item_id")
    if known.height < items.height:
        dropped = counted(items.height - known.height, "row")
        ledger.note(f"{dropped} of {name} without an item id dropped.")
    unique = known.unique("item_id", keep="first", maintain_order=True)
    if unique.height < known.height:
        dropped = counted(known.height - unique.height, "row")
        ledger.note(f"{dropped} of {name} dropped: the item id stands in an earlier row.")
    return unique
