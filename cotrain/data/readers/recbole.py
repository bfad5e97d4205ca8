"""RecBole's atomic files: tabs, and a header that types every column, such as `user_id:token`."""

from pathlib import Path

import polars as pl

from cotrain.data.ledger import Ledger, counted
from cotrain.data.readers.delimited import read_delimited
from cotrain.data.readers.raw import Columns, RawData, lines_ledger, where_lines, without_repeats
from cotrain.data.readers.sources import Source, beside, locate
from cotrain.errors import DataError, some_of

# By the types of RecBole's documentation; sequences are kept as the text they are.
_TYPES = {
    "token": pl.String(),
    "token_seq": pl.String(),
    "float": pl.Float64(),
    "float_seq": pl.String(),
}
# Columns that hold titles and categories in the files that RecBole offers, the likelier one first.
_TITLES = ["title", "movie_title", "item_title", "item_name", "name", "tracks", "business_name"]
_CATEGORIES = ["categories", "category", "class", "genre", "genres", "tags"]


def read(path: Path, items_path: Path | None, columns: Columns) -> RawData:
    """The .inter file, or the folder or .zip that holds it, and the .item file beside it.

    Args:
        path: File, folder or archive.
        items_path: Only if the .item file stands elsewhere.
        columns: Names without their type; by default user_id, item_id, timestamp, rating, and what
            usually holds titles and categories.

    Raises:
        DataError: A file is missing, cut off, or of another layout.
    """
    source = _locate(path)
    types = _header(source)
    names = {
        "user_id": columns.user or "user_id",
        "item_id": columns.item or "item_id",
        "timestamp": columns.timestamp or "timestamp",
        "rating": columns.rating or "rating",
        "order": columns.order,
    }
    needed = ["user_id", "item_id", "order" if columns.order else "timestamp"]
    if columns.rating:
        needed.append("rating")
    missing = [str(names[key]) for key in needed if names[key] not in types]
    if missing:
        raise DataError(
            f"{source.name} lacks the columns {some_of(missing)}. It has "
            f"{some_of(types, limit=20)}. Name the right ones with --user-column, --item-column, "
            "--timestamp-column, --order-column and --rating-column."
        )
    present = {key: name for key, name in names.items() if name in types}
    found = read_delimited(
        source,
        "\t",
        {name: _TYPES[kind] for name, kind in types.items()},
        source.first_line(),
        list(dict.fromkeys(present.values())),
    )
    ledger = lines_ledger(source, found)
    stem = Path(source.member or source.path.name).stem
    item_file = Source(items_path) if items_path else beside(source, [f"{stem}.item"])
    if item_file is None:
        ledger.note(f"No {stem}.item stands beside {source.name}: items have no titles.")
    frame = found.frame.select("source_row", **{key: pl.col(name) for key, name in present.items()})
    return RawData(
        interactions=frame,
        items=None if item_file is None else _items(item_file, columns, ledger),
        ledger=ledger,
        files=list(dict.fromkeys([source.path, *([item_file.path] if item_file else [])])),
        where=where_lines,
        order_column=columns.order,
        unended=found.unended,
        free_ids=True,
    )


def _locate(path: Path) -> Source:
    if path.is_dir():
        found = sorted(path.glob("*.inter"))
        if len(found) != 1:
            raise DataError(
                f"{path} holds {len(found) or 'no'} .inter files"
                + (f": {some_of(entry.name for entry in found)}" if found else "")
                + ". Give the one file as --input."
            )
        return Source(found[0])
    return locate(path, [f"{path.stem}.inter"], "RecBole's data set")


def _header(source: Source) -> dict[str, str]:
    """Name and type of every column."""
    line = source.first_line()
    types: dict[str, str] = {}
    wrong = []
    for cell in line.split("\t"):
        name, _, kind = cell.rpartition(":")
        if not name or ":" in name or kind not in _TYPES or name in types:
            wrong.append(cell)
        types[name] = kind
    if wrong:
        raise DataError(
            f"{source.name} has no header of a RecBole atomic file: {some_of(wrong)} of "
            f"{line[:100]!r}. Expected are tabs and unique columns such as user_id:token, with a "
            f"type of {list(_TYPES)}. Use the source 'tables' for headers without types."
        )
    return types


def _items(source: Source, columns: Columns, ledger: Ledger) -> pl.DataFrame:
    types = _header(source)
    item = columns.item or "item_id"
    title = columns.title or next((name for name in _TITLES if name in types), None)
    categories = columns.categories or next((name for name in _CATEGORIES if name in types), None)
    wanted = [name for name in (item, columns.title, columns.categories) if name]
    missing = [name for name in wanted if name not in types]
    if missing:
        raise DataError(
            f"{source.name} lacks the columns {some_of(missing)}. It has "
            f"{some_of(types, limit=20)}. Name the right ones with --item-column, --title-column "
            "and --categories-column."
        )
    # Text throughout: nothing of an item is computed with.
    fields: dict[str, pl.DataType] = dict.fromkeys(types, pl.String())
    found = read_delimited(source, "\t", fields, source.first_line())
    ledger.note(
        f"{source.name}: {found.lines:,} items read; title from {title or 'no column'}, categories "
        f"from {categories or 'no column'}."
    )
    for cause, count in found.malformed.counts.items():
        shown = "; ".join(found.malformed.examples[cause])
        ledger.note(f"{counted(count, 'line')} of {source.name} dropped, {cause}: {shown}.")
    nothing = pl.lit(None, pl.String)
    name = pl.col(title) if title else nothing
    if title == "movie_title" and "release_year" in types:
        # RecBole cuts the year out of MovieLens titles.
        year = pl.col("release_year")
        dated = year.str.contains(r"^\d{4}$") & name.is_not_null()
        name = pl.when(dated).then(pl.format("{} ({})", name, year)).otherwise(name)
    kinds = pl.col(categories) if categories else nothing
    if categories and types[categories] == "token_seq":
        kinds = kinds.str.strip_chars().str.replace_all(" +", "|")
    return without_repeats(
        found.frame.select(
            pl.col(item).alias("item_id"), name.alias("title"), kinds.alias("categories")
        ),
        source.name,
        ledger,
    )
