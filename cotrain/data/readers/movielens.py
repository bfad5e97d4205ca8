"""MovieLens as GroupLens ships it: 100K, 1M, 10M, 20M, 25M, 32M and the "latest" ones.

Three layouts, told apart by the file that holds the ratings: `u.data` (tabs; items in `u.item`,
bars, a column of 0 or 1 for each genre), `ratings.dat` and `movies.dat` (`::`), `ratings.csv` and
`movies.csv`.
"""

import io
from pathlib import Path

import polars as pl

from cotrain.asset_builders import articles_first
from cotrain.data.ledger import Ledger, counted
from cotrain.data.readers.delimited import read_delimited
from cotrain.data.readers.raw import Columns, RawData, lines_ledger, where_lines, without_repeats
from cotrain.data.readers.sources import Source, beside, locate
from cotrain.errors import DataError

# The genres of u.item, in the order of its columns (u.genre); the first one stands for none.
_GENRES_100K = [
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
]  # fmt: skip
_HEADER_CSV = "userId,movieId,rating,timestamp"
_ITEMS_CSV = ["movieId", "title", "genres"]
# By the name of the ratings: separator, header, files that may hold the items.
_LAYOUTS = {
    "ratings.csv": (",", _HEADER_CSV, ["movies.csv"]),
    "ratings.dat": ("::", None, ["movies.dat"]),
    "u.data": ("\t", None, ["u.item"]),
}


def read(path: Path, items_path: Path | None, columns: Columns) -> RawData:
    """Ratings and movies of the unpacked folder, the .zip, or the file of ratings.

    Args:
        path: As downloaded.
        items_path: Only if the movies stand elsewhere.
        columns: Not used: the layouts have no choice of columns.

    Raises:
        DataError: A file is missing, cut off, or of another layout.
    """
    source = locate(path, list(_LAYOUTS), "MovieLens")
    name = Path(source.member or source.path.name).name
    if name not in _LAYOUTS:
        raise DataError(
            f"{source.name} is no file of MovieLens ratings; expected one of {list(_LAYOUTS)}, the "
            "folder that holds it, or the .zip. Rename it if it is one, or use the source "
            "'tables'."
        )
    separator, header, item_files = _LAYOUTS[name]
    first = source.first_line()
    if header is not None and first != header:
        raise DataError(
            f"{source.name} begins with {first[:100]!r}; expected {header!r}. Give the file as "
            "GroupLens ships it, or use the source 'tables' with column names."
        )
    found = read_delimited(
        source,
        separator,
        {
            "user_id": pl.Int64(),
            "item_id": pl.Int64(),
            "rating": pl.Float32(),
            "timestamp": pl.Int64(),
        },
        header,
    )
    ledger = lines_ledger(source, found)
    movies = Source(items_path) if items_path is not None else beside(source, item_files)
    if movies is None:
        ledger.note(f"No {item_files[0]} stands beside {source.name}: items have no titles.")
    return RawData(
        interactions=found.frame,
        items=None if movies is None else _items(movies, ledger),
        ledger=ledger,
        files=list(dict.fromkeys([source.path, *([movies.path] if movies else [])])),
        where=where_lines,
        unended=found.unended,
    )


def _items(source: Source, ledger: Ledger) -> pl.DataFrame:
    """item_id, title with the article in front, and genres."""
    text, encoding = source.text()
    if not text.endswith("\n"):
        ledger.note(f"The last line of {source.name} has no line end; the file may be cut off.")
    first = text.partition("\n")[0].rstrip("\r")
    if first.replace('"', "") == ",".join(_ITEMS_CSV):
        table = _movies_csv(text, source)
    else:
        separator = "::" if "::" in first else "|"
        table = _movies_lines(text, separator, source, ledger)
    ledger.note(f"{source.name}: {table.height:,} items read as {encoding}.")
    moved = articles_first(pl.col("title"))
    changed = table.select((moved != pl.col("title")).sum()).item()
    if changed:
        ledger.note(
            f'{counted(changed, "title")} changed: article moved to the front ("Matrix, The").'
        )
    return without_repeats(
        table.select(
            "item_id",
            # Item 267 of 100K is unknown even to the data set.
            pl.when(pl.col("title") != "unknown").then(moved).alias("title"),
            pl.when(~pl.col("categories").is_in(["(no genres listed)", "unknown", ""]))
            .then("categories")
            .alias("categories"),
        ),
        source.name,
        ledger,
    )


def _movies_csv(text: str, source: Source) -> pl.DataFrame:
    try:
        table = pl.read_csv(io.StringIO(text), infer_schema=False)
        ids = table["movieId"].cast(pl.Int64)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        reason = str(error).splitlines()[0][:200]
        raise DataError(
            f"{source.name} cannot be read as CSV with the columns {_ITEMS_CSV}: {reason}. "
            "Download it again."
        ) from error
    return table.select(ids.alias("item_id"), pl.col("title"), pl.col("genres").alias("categories"))


def _movies_lines(text: str, separator: str, source: Source, ledger: Ledger) -> pl.DataFrame:
    """movies.dat or u.item; lines of another shape are dropped and counted."""
    fields = 3 if separator == "::" else 5 + len(_GENRES_100K)
    lines = pl.DataFrame({"line": [line.rstrip("\r") for line in text.split("\n")]})
    lines = lines.with_row_index("number", offset=1).filter(pl.col("line").str.strip_chars() != "")
    lines = lines.with_columns(pl.col("line").str.split(separator).alias("parts"))
    parts = pl.col("parts")
    ids = parts.list.get(0, null_on_oob=True).str.strip_chars().cast(pl.Int64, strict=False)
    lines = lines.with_columns(ids.alias("item_id"))
    bad = lines.filter((parts.list.len() != fields) | pl.col("item_id").is_null())
    if bad.height > lines.height / 2:
        raise DataError(
            f"{source.name} is no list of movies: {bad.height:,} of {lines.height:,} lines have no "
            f"{fields} fields between {separator!r} with an id in front. First: "
            f"{bad['line'][0][:80]!r}. Give the file as GroupLens ships it."
        )
    if bad.height:
        ledger.note(
            f"{bad.height:,} of {lines.height:,} lines of {source.name} dropped, no movies: "
            f"{', '.join(where_lines(bad['number'].head(5).to_list()))}."
        )
    lines = lines.join(bad, on="number", how="anti", maintain_order="left")
    if separator == "::":
        categories = parts.list.get(2)
    else:
        categories = pl.concat_str(
            [
                pl.when(parts.list.get(5 + index) == "1").then(pl.lit(genre))
                for index, genre in enumerate(_GENRES_100K)
                if index
            ],
            separator="|",
            ignore_nulls=True,
        )
    return lines.select("item_id", parts.list.get(1).alias("title"), categories.alias("categories"))
