"""Reads tables of interactions and items: Parquet, CSV and TSV.

Columns are checked and brought to one form here, ids as integers or text and text without blanks;
every failure is a DataError that names file, column or line, and the option that leads elsewhere.
"""

import contextlib
import csv
from pathlib import Path

import polars as pl

from cotrain.errors import DataError, some_of

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".inter": "\t", ".txt": "\t"}
_SUFFIXES = [".parquet", *_SEPARATORS]
# Polars answers some damaged files with a panic of its Rust side, which is no PolarsError.
_UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError)


def scan(path: Path, option: str) -> pl.LazyFrame:
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


def collect(table: pl.LazyFrame, path: Path, option: str) -> pl.DataFrame:
    """Reads what `scan` found.

    Raises:
        DataError: A part of the file that the scan did not look at cannot be read.
    """
    try:
        return table.collect()
    except _UNREADABLE as error:
        raise _unreadable(path, option, error) from error


def _unreadable(path: Path, option: str, error: BaseException) -> DataError:
    if isinstance(error, pl.exceptions.NoDataError):
        return DataError(f"{path} is empty. Point {option} at a table with a header and rows.")
    kind = "Parquet" if path.suffix.lower() == ".parquet" else "a UTF-8 table with a header"
    # Polars goes on with advice about its own parameters, which nobody can set from here.
    reason = _damaged_line(path) or " ".join(str(error).split("\n\n")[0].split())
    return DataError(
        f"{path} cannot be read as {kind}; it may be cut off or of another format: {reason[:300]}. "
        f"Write it again, or point {option} at another file."
    )


def _damaged_line(path: Path) -> str | None:
    """Where a CSV or TSV goes wrong: too many fields, an open quote, no UTF-8; None if nowhere."""
    separator = _SEPARATORS.get(path.suffix.lower())
    if separator is None:
        return None
    start = 1
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, delimiter=separator, strict=True)
            expected = len(next(reader, []))
            start = reader.line_num + 1
            for row in reader:
                if len(row) > expected:
                    return f"line {start:,} has {len(row)} fields instead of {expected}"
                start = reader.line_num + 1
    except UnicodeDecodeError:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError:
                    return f"line {number:,} is not UTF-8"
    except csv.Error as error:
        return f"the row that begins in line {start:,} has a quote out of place ({error})"
    except OSError:
        pass
    return None


def require(columns: dict[str, str], present: list[str], path: Path) -> None:
    """Checks that the table has the columns, given as option: column name.

    Raises:
        DataError: Names every missing column and its option.
    """
    missing = {option: name for option, name in columns.items() if name not in present}
    if missing:
        listed = ", ".join(f"{name!r} ({option})" for option, name in missing.items())
        separator = _SEPARATORS.get(path.suffix.lower())
        if separator is not None and len(present) == 1:
            listed += f" (a {path.suffix} file is split at {separator!r})"
        raise DataError(
            f"{path} lacks the column{'s' if len(missing) > 1 else ''} {listed}. It has "
            f"{some_of(present, limit=20)}. Name the right ones with these options."
        )


def ids(
    column: pl.Series,
    path: Path,
    name: str,
    options: str = "--data.user_column or --data.item_column",
) -> pl.Series:
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
        f"name another column with {options}."
    )


def text(
    column: pl.Series,
    path: Path,
    name: str,
    options: str = "--data.title_column or --data.categories_column",
) -> pl.Series:
    """A column as stripped text, blanks as null; lists of text are joined by a bar.

    Raises:
        DataError: The column holds neither text nor anything that is written as text.
    """
    if column.dtype == pl.List(pl.String):
        column = column.list.join("|", ignore_nulls=True)
    elif column.dtype.is_nested() or column.dtype in (pl.Binary, pl.Object):
        raise DataError(
            f"Column {name!r} of {path} is {column.dtype}; text is expected. Convert it, or name "
            f"another column with {options}."
        )
    return _without_blanks(column.cast(pl.String).str.strip_chars())


def _without_blanks(column: pl.Series) -> pl.Series:
    blank = column.str.strip_chars() == ""
    return pl.select(pl.when(~blank).then(column)).to_series().alias(column.name)


def rows_text(count: int) -> str:
    """`1 row`, `1,234 rows`."""
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


def places(path: Path, rows: list[int]) -> str:
    """Where data rows (from 0, ascending) stand in the file, as `place_of_each` says it."""
    return ", ".join(place_of_each(path, rows))


def place_of_each(path: Path, rows: list[int]) -> list[str]:
    """`row 3 (line 4)` for each data row (from 0, ascending); Parquet has no lines."""
    lines: dict[int, int] = {}
    separator = _SEPARATORS.get(path.suffix.lower())
    if separator is not None and rows:
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
    return [f"row {row + 1}" + (f" (line {lines[row]})" if row in lines else "") for row in rows]
