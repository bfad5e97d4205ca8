"""Tables of the user's own: Parquet, CSV or TSV with a header; columns are named by options."""

from pathlib import Path

import polars as pl

from cotrain.data import tables
from cotrain.data.ledger import Ledger
from cotrain.data.readers.raw import Columns, RawData, without_repeats
from cotrain.errors import DataError, some_of

_SUFFIXES = (".parquet", ".csv", ".tsv")


def read(path: Path, items_path: Path | None, columns: Columns) -> RawData:
    """A table of interactions and, if there is one, a table of items.

    The order is the order column, by default `position` where the table has it, else the timestamp.

    Args:
        path: The table, or a folder with interactions.* and items.*.
        items_path: Table of items; none: items.* of the folder, if `path` is one.
        columns: By default user_id, item_id, timestamp, rating; title, categories.

    Raises:
        DataError: A table is missing, unreadable, empty, or lacks a column.
    """
    if path.is_dir():
        items_path = items_path or _in_folder(path, "items")
        interactions = _in_folder(path, "interactions")
        if interactions is None:
            raise DataError(
                f"{path} holds no interactions{' or interactions'.join(_SUFFIXES)}. Give the table "
                "itself as --input."
            )
        path = interactions
    table = tables.scan(path, "--input")
    present = table.collect_schema().names()
    names = _columns(columns, present, path)
    rows = tables.collect(
        table.select(pl.col(name).alias(key) for key, name in names.items()), path, "--input"
    ).with_row_index("source_row")
    if rows.is_empty():
        raise DataError(f"{path} has no rows. Point --input at a table with interactions.")
    ledger = Ledger()
    ledger.read(f"{path.name}: rows read", rows.height)
    text_file = path.suffix.lower() != ".parquet"
    if text_file:
        rows = _without_headers(rows, names, path, ledger)
    items = None
    if items_path is None:
        ledger.note("No --items given: items have no titles.")
    else:
        items = _items(items_path, columns, ledger)
    return RawData(
        interactions=rows,
        items=items,
        ledger=ledger,
        files=[path, *([items_path] if items_path else [])],
        where=lambda found: tables.place_of_each(path, found),
        order_column=names.get("order"),
        unended=rows.height - 1 if text_file and not _ends_with_line_end(path) else None,
        free_ids=True,
    )


def _in_folder(folder: Path, stem: str) -> Path | None:
    found = [folder / f"{stem}{suffix}" for suffix in _SUFFIXES]
    found = [path for path in found if path.is_file()]
    if len(found) > 1:
        raise DataError(
            f"{folder} holds {some_of(path.name for path in found)}. Give the one that is meant."
        )
    return found[0] if found else None


def _columns(columns: Columns, present: list[str], path: Path) -> dict[str, str]:
    """Key of `RawData.interactions`: name in the table."""
    order = columns.order
    if order is None and columns.timestamp is None and "position" in present:
        order = "position"
    names = {"user_id": columns.user or "user_id", "item_id": columns.item or "item_id"}
    options = {"--user-column": names["user_id"], "--item-column": names["item_id"]}
    if order is not None:
        names["order"] = options["--order-column"] = order
    timestamp = columns.timestamp or "timestamp"
    if columns.timestamp is not None or order is None:
        options["--timestamp-column"] = timestamp
    if columns.rating is not None:
        options["--rating-column"] = columns.rating
    tables.require(options, present, path)
    doubled = [name for name in options.values() if f"{name}_duplicated_0" in present]
    if doubled:
        raise DataError(
            f"The header of {path} has {some_of(doubled)} more than once. Rename or remove the "
            "columns that are not meant."
        )
    rating = columns.rating or "rating"
    names |= {"timestamp": timestamp, "rating": rating}
    return {key: name for key, name in names.items() if name in present}


def _without_headers(
    rows: pl.DataFrame, names: dict[str, str], path: Path, ledger: Ledger
) -> pl.DataFrame:
    """Drops rows that repeat the header, as files have them that were joined end to end."""
    again = pl.all_horizontal(pl.col(key).eq_missing(name) for key, name in names.items())
    found = rows.filter(again)["source_row"]
    if found.is_empty():
        return rows
    examples = tables.place_of_each(path, found.head(5).to_list())
    ledger.damage("the header again", found.len(), examples)
    return rows.filter(~again)


def _ends_with_line_end(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) in (b"\n", b"\r")


def _items(path: Path, columns: Columns, ledger: Ledger) -> pl.DataFrame:
    table = tables.scan(path, "--items")
    present = table.collect_schema().names()
    names = {
        "item_id": columns.item or "item_id",
        "title": columns.title or "title",
        "categories": columns.categories or "categories",
    }
    needed = {"--item-column": names["item_id"], "--title-column": names["title"]}
    if columns.categories is not None:
        needed["--categories-column"] = columns.categories
    tables.require(needed, present, path)
    if names["categories"] not in present:
        ledger.note(f"{path.name} has no column {names['categories']!r}: items have no categories.")
        del names["categories"]
    rows = tables.collect(
        table.select(pl.col(name).alias(key) for key, name in names.items()), path, "--items"
    )
    ledger.note(f"{path.name}: {rows.height:,} items read.")
    rows = rows.with_columns(
        tables.ids(rows["item_id"], path, names["item_id"], "--item-column"),
        *[
            tables.text(rows[key], path, names[key], "--title-column or --categories-column")
            for key in names
            if key != "item_id"
        ],
    )
    if "categories" not in rows.columns:
        rows = rows.with_columns(categories=pl.lit(None, pl.String))
    return without_repeats(rows, path.name, ledger)
