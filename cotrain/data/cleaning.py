"""Raw interactions become events that can be used: ids, times and ratings are checked.

Whatever cannot be used is dropped, counted and shown with its place in the file; more of it than a
small share is an error, because it means that the file is not what it is taken for.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from cotrain.data import tables
from cotrain.data.ledger import EXAMPLES, Ledger, counted
from cotrain.data.readers.raw import RawData
from cotrain.errors import DataError, some_of

# Clock times lie between March 1973 and 2100 in one of these units; everything else that numbers
# may mean (days, positions) is smaller. The four ranges do not overlap.
_EARLIEST_S, _LATEST_S = 100_000_000, 4_102_444_800
_UNITS = {1: "seconds", 10**3: "milliseconds", 10**6: "microseconds", 10**9: "nanoseconds"}
# Clocks of other machines may run ahead.
_FUTURE_S = 86_400
_DATE_FORMATS = ["%Y-%m-%d", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M"]
# A column of both numbers and other ids is worth a remark if one kind is rarer than this.
_RARE = 0.01


@dataclass
class Events:
    """Interactions by code, each user's in time order.

    Attributes:
        users: Raw ids, sorted; a user's code is the place here.
        items: Likewise.
        table: user and item (codes, uint32), timestamp (seconds since 1970, or the number given;
            null where unknown) and rating (null where unknown), each if the source has it; sorted
            by user and time, equal times in the order of the file.
    """

    users: pl.Series
    items: pl.Series
    table: pl.DataFrame


def clean(raw: RawData, max_bad_share: float, now: float | None = None) -> Events:
    """Checks, drops what cannot be used, and orders.

    Args:
        raw: What a reader found; its interactions are taken out, so that they need not be held
            twice.
        max_bad_share: Share of the rows that may be dropped because they are damaged.
        now: Seconds since 1970 that no timestamp can be later than; none: the clock.

    Raises:
        DataError: Too many rows are damaged, nothing is left, or a column has no usable type.
    """
    ledger, path = raw.ledger, raw.files[0]
    rows, raw.interactions = raw.interactions, pl.DataFrame()
    for column, option in (("user_id", "--user-column"), ("item_id", "--item-column")):
        rows = rows.with_columns(tables.ids(rows[column], path, column, option))
        rows = _drop(rows, rows[column].is_null(), f"no {column}", column, raw)
    rows = _times(rows, raw, time.time() if now is None else now)
    _check_damages(ledger, max_bad_share)
    if "rating" in rows.columns:
        rows = rows.with_columns(_ratings(rows["rating"], ledger))
    if raw.free_ids:
        for column in ("user_id", "item_id"):
            _remark_on_mixture(rows[column], column, ledger)
    rows = rows.drop("source_row")
    users, rows = _coded(rows, "user_id", "user")
    items, rows = _coded(rows, "item_id", "item")
    order = raw.order_column or "the timestamp"
    ledger.note(f"Order within a user: {order}; equal values keep the order of the file.")
    # Stable, so that ties keep the order of the file.
    rows = rows.sort("user", "order", maintain_order=True).drop("order")
    return Events(users, items, rows)


def _drop(
    rows: pl.DataFrame, bad: pl.Series, cause: str, column: str, raw: RawData
) -> pl.DataFrame:
    """Rows without the bad ones, which are counted and shown."""
    count = int(bad.sum() or 0)
    if not count:
        return rows
    first = rows.filter(bad).select("source_row", column).head(EXAMPLES)
    places = raw.where(first["source_row"].to_list())
    examples = [
        place + ("" if value is None else f": {value!r}")
        for place, value in zip(places, first[column].to_list(), strict=True)
    ]
    raw.ledger.damage(cause, count, examples)
    return rows.filter(~bad)


def _check_damages(ledger: Ledger, max_bad_share: float) -> None:
    if ledger.damaged <= max_bad_share * ledger.rows:
        if not ledger.left:
            raise DataError(f"No interaction is left:\n{ledger.damages()}\nGive another --input.")
        return
    share = ledger.damaged / ledger.rows
    raise DataError(
        f"{ledger.damaged:,} of {ledger.rows:,} rows ({share:.2%}) cannot be used, more than the "
        f"share of {max_bad_share:g} that --max-bad-share allows:\n{ledger.damages()}\nCorrect the "
        f"file, or have them dropped with --max-bad-share {min(1.0, share * 1.1):.2g}."
    )


# ---- times --------------------------------------------------------------------------------------


def _times(rows: pl.DataFrame, raw: RawData, now: float) -> pl.DataFrame:
    """Adds the column order, by which events are sorted; timestamp becomes seconds."""
    if "order" in rows.columns:
        numbers, _ = _numbers(rows["order"], str(raw.order_column), "--order-column")
        rows = rows.rename({"order": "given"}).with_columns(numbers.alias("order"))
        _check_last(rows, None, raw)
        cause = f"no number in column {raw.order_column}"
        rows = _drop(rows, numbers.is_null(), cause, "given", raw).drop("given")
        if "timestamp" not in rows.columns:
            return rows
        return rows.with_columns(_timestamps_beside_order(rows["timestamp"], raw, now))

    numbers, dates = _numbers(rows["timestamp"], "timestamp", "--timestamp-column")
    rows = rows.with_columns(numbers.alias("order"))
    scale = _scale(numbers)
    _check_last(rows, scale, raw)
    rows = _drop(rows, numbers.is_null(), "no timestamp that is a number", "timestamp", raw)
    for cause, test in _implausible(scale, now):
        rows = _drop(rows, test(rows["order"]), cause, "timestamp", raw)
    return rows.with_columns(_seconds(rows["order"], scale, dates, raw.ledger))


def _timestamps_beside_order(given: pl.Series, raw: RawData, now: float) -> pl.Series:
    """Timestamps that order nothing: those that cannot be right are missing, and said so."""
    numbers, dates = _numbers(given, "timestamp", "--timestamp-column")
    scale = _scale(numbers)
    for cause, test in _implausible(scale, now):
        bad = test(numbers).fill_null(False)
        if count := int(bad.sum()):
            numbers = pl.select(pl.when(~bad).then(numbers)).to_series()
            raw.ledger.note(
                f"{count:,} × {cause}: set to missing, and the row kept, as {raw.order_column} "
                "gives the order."
            )
    if missing := numbers.null_count():
        raw.ledger.note(f"{missing:,} of {numbers.len():,} rows have no timestamp.")
    return _seconds(numbers, scale, dates, raw.ledger)


def _numbers(given: pl.Series, column: str, option: str) -> tuple[pl.Series, bool]:
    """A column as finite numbers, null where there is none, and whether it held dates.

    Raises:
        DataError: The type of the column tells no time.
    """
    if given.dtype == pl.String:
        numbers, given = _from_text(given.str.strip_chars())
    else:
        numbers = given
    dates = given.dtype.is_temporal() and given.dtype != pl.Time and given.dtype != pl.Duration
    if dates:
        numbers = given.cast(pl.Datetime("ms") if given.dtype == pl.Date else given.dtype)
        numbers = numbers.to_physical()
    elif not (numbers.dtype.is_numeric() or numbers.dtype == pl.Null):
        raise DataError(
            f"Column {column!r} is {given.dtype}, and interactions cannot be ordered by it. Give "
            f"a column of numbers or dates as {option}."
        )
    elif not numbers.dtype.is_float():
        whole = not numbers.dtype.is_decimal()
        numbers = numbers.cast(pl.Int64 if whole else pl.Float64, strict=False)
    if numbers.dtype.is_float():
        numbers = pl.select(pl.when(numbers.is_finite()).then(numbers)).to_series()
        whole = numbers.cast(pl.Int64, strict=False)
        if whole.null_count() == numbers.null_count() and (whole == numbers).all():
            numbers = whole
    return numbers, dates


def _from_text(text: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Text as numbers, and as dates if that is what most of it is (else the same numbers)."""
    # Integers first: nanoseconds since 1970 do not fit into a float.
    numbers = text.cast(pl.Int64, strict=False)
    if numbers.null_count() > text.null_count():
        numbers = text.cast(pl.Float64, strict=False)
    if numbers.null_count() > text.len() / 2:
        for pattern in _DATE_FORMATS:
            dates = text.str.to_datetime(pattern, strict=False, time_unit="ms")
            if dates.null_count() <= text.len() / 2:
                return numbers, dates
    return numbers, numbers


def _scale(numbers: pl.Series) -> int | None:
    """Units a second, judged by the median; None if the numbers are no clock times."""
    median = numbers.gather_every(max(1, numbers.len() // 100_000)).median()
    if isinstance(median, (int, float)):
        for scale in _UNITS:
            if _EARLIEST_S <= median / scale < _LATEST_S:
                return scale
    return None


def _implausible(
    scale: int | None, now: float
) -> list[tuple[str, Callable[[pl.Series], pl.Series]]]:
    """Causes why a time cannot be right, and the test of each."""
    tests: list[tuple[str, Callable[[pl.Series], pl.Series]]] = [
        ("negative timestamp", lambda numbers: numbers < 0)
    ]
    if scale is not None:
        early, late = _EARLIEST_S * scale, int((now + _FUTURE_S) * scale)
        unit = _UNITS[scale]
        tests += [
            (
                f"timestamp before March 1973 (read as {unit})",
                lambda numbers: (numbers >= 0) & (numbers < early),
            ),
            (f"timestamp in the future (read as {unit})", lambda numbers: numbers > late),
        ]
    return tests


def _seconds(numbers: pl.Series, scale: int | None, dates: bool, ledger: Ledger) -> pl.Series:
    """The column timestamp of a prepared set."""
    if dates and scale is not None:
        ledger.note("Timestamps are dates; stored in seconds since 1970.")
    elif scale is None:
        if numbers.null_count() < numbers.len():
            ledger.note("Timestamps are no clock times; they are kept as they are.")
        return numbers.alias("timestamp")
    elif scale > 1:
        ledger.note(
            f"Timestamps are in {_UNITS[scale]}; stored in seconds, after ordering by the full "
            "value."
        )
    elif numbers.dtype.is_float():
        ledger.note("Fractions of a second order the events; timestamps are stored without them.")
    return (numbers // scale).cast(pl.Int64).alias("timestamp")


def _check_last(rows: pl.DataFrame, scale: int | None, raw: RawData) -> None:
    """A last row without a line end may lack its last digits; then its time is far off."""
    if raw.unended is None:
        return
    name = raw.files[0].name
    place = raw.where([raw.unended])[0]
    last = rows.filter(pl.col("source_row") == raw.unended)["order"]
    value = last[0] if last.len() else None
    median = rows["order"].median()
    far = False
    if scale is not None and value is not None and isinstance(median, (int, float)):
        far = not median / 2 < value < median * 2
    if value is None or far:
        raise DataError(
            f"{name} is cut off: its last row ({place}) has no line end, and "
            + ("is incomplete." if value is None else f"its timestamp is {value}.")
            + " Get the file again; if that row is meant, end it with a line end."
        )
    raw.ledger.note(
        f"WARNING: {name} has no line end after its last row ({place}). If the file is cut off "
        "there, what followed is missing."
    )


# ---- ratings and ids ----------------------------------------------------------------------------


def _ratings(given: pl.Series, ledger: Ledger) -> pl.Series:
    """Ratings as Float32; what is no number is missing, and said so."""
    if given.dtype == pl.String:
        given = given.str.strip_chars()
        given = pl.select(pl.when(given != "").then(given)).to_series().alias("rating")
    numbers = given.cast(pl.Float32, strict=False)
    numbers = pl.select(pl.when(numbers.is_finite()).then(numbers)).to_series().alias("rating")
    missing, odd = given.null_count(), numbers.null_count() - given.null_count()
    if missing:
        ledger.note(f"{missing:,} of {given.len():,} rows have no rating; they are kept.")
    if odd:
        wrong = given.filter(numbers.is_null() & given.is_not_null())
        ledger.note(
            f"{counted(odd, 'rating')} set to missing, no numbers "
            f"({some_of(wrong.head(3).to_list())}); the rows are kept."
        )
    return numbers


def _remark_on_mixture(ids: pl.Series, column: str, ledger: Ledger) -> None:
    """Says so where a few ids are not like the others, as a damaged or joined file has them."""
    if ids.dtype != pl.String:
        return
    unique = ids.unique()
    number = unique.str.contains(r"^[0-9]+$")
    numbers = int(number.sum())
    rare = min(numbers, unique.len() - numbers)
    if 0 < rare <= max(1, _RARE * unique.len()):
        odd = unique.filter(number if rare == numbers else ~number).sort()
        kind, rest = ("numbers", "text") if rare == numbers else ("text", "numbers")
        # Numbers among text are common (ISBNs among Amazon's ids); text among numbers is odd.
        warning = "" if kind == "numbers" else "WARNING: "
        ledger.note(
            f"{warning}{column} mixes kinds: {rare:,} of {unique.len():,} ids are {kind} and the "
            f"rest {rest} ({some_of(odd.to_list())}). All are kept as text."
        )
    padded = int((unique != unique.str.strip_chars()).sum())
    if padded:
        ledger.note(
            f"WARNING: {column} has {counted(padded, 'value')} with blanks at an end; kept as ids."
        )


def _coded(rows: pl.DataFrame, column: str, code: str) -> tuple[pl.Series, pl.DataFrame]:
    """The sorted unique ids, and the rows with the ids replaced by their places among them."""
    unique = rows[column].unique().sort()
    codes = pl.DataFrame({column: unique}).with_row_index(code)
    joined = rows.join(codes, on=column, how="left", maintain_order="left").drop(column)
    return unique, joined
