"""Amazon reviews of 2014, 2018 and 2023: JSON lines (or the CSV of 2023) and metadata, gzip or not.

The editions are told apart by their keys. Metadata of 2014, and some of its reviews, are Python
literals instead of JSON; those lines are read one by one, metadata only for items that occur.
"""

import re
from pathlib import Path

import polars as pl

from cotrain.data.ledger import Ledger, counted
from cotrain.data.readers.delimited import read_delimited
from cotrain.data.readers.json_lines import JsonLines
from cotrain.data.readers.lines import Lines
from cotrain.data.readers.raw import Columns, RawData, lines_ledger, where_lines, without_repeats
from cotrain.data.readers.sources import Source
from cotrain.errors import DataError, some_of

# Keys of user, item, rating and time, by edition.
_KEYS = {
    "2014 or 2018": ("reviewerID", "asin", "overall", "unixReviewTime"),
    "2023": ("user_id", "parent_asin", "rating", "timestamp"),
}
_HEADER_CSV = "user_id,parent_asin,rating,timestamp"
_META_KEYS = ["asin", "parent_asin", "title"]
_META_LISTS = ["categories", "category"]
# Where a Python literal of metadata says whose it is. A title that talks like this is none.
_LITERAL_ID = re.compile(r"""['"]asin['"]: *['"]([^'"]*)['"]""")


def read(path: Path, items_path: Path | None, columns: Columns) -> RawData:
    """Reviews of one category, and its metadata if `items_path` is given.

    Args:
        path: reviews_X.json.gz, reviews_X_5.json.gz, X.json.gz, X.jsonl.gz or X.csv.gz, as
            downloaded, or unpacked.
        items_path: meta_X.json.gz or meta_X.jsonl.gz; none: ids will stand in for titles.
        columns: Not used: the editions have no choice of columns.

    Raises:
        DataError: A file is missing, cut off, or of another layout.
    """
    source = Source(_file(path, "--input"))
    first = source.first_line()
    if first == _HEADER_CSV:
        edition, found = "2023", _read_csv(source)
        literals = 0
    else:
        edition = _edition(source, first)
        found, literals = _read_json(source, _KEYS[edition])
    ledger = lines_ledger(source, found, f"reviews ({edition}) read")
    if literals:
        ledger.note(f"{counted(literals, 'line')} of {source.name} read as Python, not JSON.")
    files = [source.path]
    items = None
    if items_path is None:
        ledger.note("No --items given: items have no titles.")
    else:
        meta = Source(_file(items_path, "--items"))
        files.append(meta.path)
        items = _items(meta, found.frame["item_id"].unique(), ledger)
    return RawData(
        interactions=found.frame,
        items=items,
        ledger=ledger,
        files=files,
        where=where_lines,
        unended=found.unended,
    )


def _file(path: Path, option: str) -> Path:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(
            f"{path} {what}; {option} takes one file of one category, such as "
            f"{'reviews_Beauty_5.json.gz' if option == '--input' else 'meta_Beauty.json.gz'}."
        )
    return path


def _edition(source: Source, first: str) -> str:
    """Which edition the first line belongs to; a damaged first line is not the judge of that."""
    for edition, keys in _KEYS.items():
        if all(re.search(rf"""['"]{key}['"] *:""", first) for key in keys[:2]):
            return edition
    raise DataError(
        f"{source.name} holds no Amazon reviews: its first line is {first[:100]!r}. Expected are "
        f"JSON lines with {' or '.join(some_of(keys) for keys in _KEYS.values())}, or CSV with "
        f"the header {_HEADER_CSV!r}. Metadata belongs to --items."
    )


def _read_csv(source: Source) -> Lines:
    fields = {
        "user_id": pl.String(),
        "item_id": pl.String(),
        "rating": pl.Float32(),
        "timestamp": pl.Int64(),
    }
    return read_delimited(source, ",", fields, _HEADER_CSV)


def _read_json(source: Source, keys: tuple[str, str, str, str]) -> tuple[Lines, int]:
    """The rows, and how many of them were Python literals."""
    reader = JsonLines(keys)
    user, item, rating, timestamp = (pl.col(key) for key in keys)
    time = timestamp.str.strip_chars()
    frames = [
        frame.select(
            "source_row",
            user.alias("user_id"),
            item.alias("item_id"),
            rating.cast(pl.Float32, strict=False).alias("rating"),
            pl.coalesce(
                time.cast(pl.Int64, strict=False),
                # 1.4e9 is a whole number too.
                time.cast(pl.Float64, strict=False).cast(pl.Int64, strict=False),
            ).alias("timestamp"),
        )
        for frame in reader.frames(source)
    ]
    if not reader.lines:
        raise DataError(f"{source.name} has no lines. Give a file with reviews as --input.")
    found = Lines(pl.concat(frames), reader.lines, reader.malformed, reader.blank, None)
    return found, reader.literals


def _items(source: Source, needed: pl.Series, ledger: Ledger) -> pl.DataFrame:
    """item_id, title and categories of those items that the reviews mention."""
    mentioned = set(needed.drop_nulls().to_list())

    def skip(text: str) -> bool:
        found = _LITERAL_ID.search(text)
        return found is not None and found.group(1) not in mentioned

    reader = JsonLines(_META_KEYS, _META_LISTS, skip=skip)
    # Items of 2023 are the parents of what was reviewed; the earlier editions know no parents.
    item = pl.coalesce("parent_asin", "asin")
    wanted = pl.DataFrame({"item_id": needed.drop_nulls()})
    names = pl.coalesce(_META_LISTS).list.eval(pl.element().str.strip_chars())
    names = names.list.eval(pl.element().filter(pl.element() != ""))
    joined = names.list.unique(maintain_order=True).list.join("|")
    table = pl.concat(
        frame.select(
            item.alias("item_id"), "title", pl.when(joined != "").then(joined).alias("categories")
        ).join(wanted, on="item_id", how="semi", maintain_order="left")
        for frame in reader.frames(source)
    )
    bad = reader.malformed.counts.total()
    ledger.note(
        f"{source.name}: {reader.lines:,} items read, {table['item_id'].n_unique():,} of the "
        f"{len(wanted):,} with reviews among them."
    )
    if reader.literals:
        literals = counted(reader.literals, "line")
        ledger.note(f"{literals} of {source.name} read as Python, not JSON.")
    if bad:
        shown = "; ".join(reader.malformed.examples["no JSON object"])
        ledger.note(f"{counted(bad, 'line')} of {source.name} dropped, no objects: {shown}.")
    return without_repeats(table, source.name, ledger)
