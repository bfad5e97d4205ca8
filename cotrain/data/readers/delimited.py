"""Rows out of lines whose fields stand between separators, without quoting.

Every block of lines is given to polars first, which is fast and strict. Only a block in which it
finds something wrong is looked at line by line, so that each line that is no row can be named, with
its number, and the others are kept.
"""

from collections.abc import Sequence

import polars as pl

from cotrain.data.ledger import EXAMPLES
from cotrain.data.readers.lines import UNREADABLE, Lines, Malformed, cut_off
from cotrain.data.readers.sources import Block, Source
from cotrain.errors import DataError


def read_delimited(
    source: Source,
    separator: str,
    fields: dict[str, pl.DataType],
    header: str | None = None,
    keep: Sequence[str] | None = None,
) -> Lines:
    """Rows of fields without quoting.

    Args:
        source: The file.
        separator: Between two fields; one character or the same one twice.
        fields: Name and type of every field of a line, in order.
        header: The first line, if it is one; it is passed over, and dropped where it is repeated.
        keep: Fields to keep; none: all.

    Raises:
        DataError: The file stops in the middle, has no rows, or is of another format.
    """
    wanted = list(fields) if keep is None else list(keep)
    parts: list[pl.DataFrame] = []
    malformed, blank, lines, unended = Malformed(), 0, 0, None
    for block in source.blocks():
        if header is not None and block.first_line == 1:
            block = _without_first_line(block)
        count = block.data.count(b"\n")
        frame = _strict(block.data, separator, fields, count)
        if frame is None:
            bad_before = malformed.counts.total()
            frame, empty = _one_by_one(block, separator, fields, header, malformed)
            blank += empty
            count -= empty
            if not block.ended and malformed.counts.total() > bad_before:
                last = block.first_line + block.data.count(b"\n") - 1
                text = block.data[:-1].rpartition(b"\n")[2].decode("utf-8", "replace")
                if text.strip() and (frame.is_empty() or frame["source_row"][-1] != last):
                    raise cut_off(source, last, text)
        else:
            frame = frame.with_row_index("source_row", offset=block.first_line)
        lines += count
        malformed.check(source, lines)
        if not block.ended and frame.height:
            unended = int(frame["source_row"][-1])
        parts.append(frame.select("source_row", *wanted))
    if not lines:
        raise DataError(f"{source.name} has no rows. Give a file with interactions as --input.")
    return Lines(pl.concat(parts), lines, malformed, blank, unended)


def _without_first_line(block: Block) -> Block:
    return Block(2, block.data[block.data.index(b"\n") + 1 :], block.ended)


def _strict(
    data: bytes, separator: str, fields: dict[str, pl.DataType], lines: int
) -> pl.DataFrame | None:
    """The rows if each line has every field and each field its type; otherwise None."""
    if not lines:
        return pl.DataFrame(schema=fields)
    schema: dict[str, pl.DataType] = {}
    for name, dtype in fields.items():
        # Polars splits at one character: between two of them stands an empty field.
        if len(separator) == 2 and schema:
            schema[f"\n{name}"] = pl.String()
        schema[name] = dtype
    try:
        frame = pl.read_csv(
            data, separator=separator[0], has_header=False, schema=schema, quote_char=None
        )
    except UNREADABLE:
        return None
    between = [name for name in schema if name not in fields]
    if (
        frame.height != lines
        # Polars fills up lines that are too short without a word.
        or data.count(separator[0].encode()) != lines * (len(schema) - 1)
        or any(frame[name].null_count() != lines for name in between)
    ):
        return None
    # Polars takes a blank for missing but not, say, a lone vertical tab.
    return frame.select(
        pl.when(pl.col(name).str.strip_chars() != "").then(pl.col(name)).alias(name)
        if dtype == pl.String
        else name
        for name, dtype in fields.items()
    )


def _one_by_one(
    block: Block,
    separator: str,
    fields: dict[str, pl.DataType],
    header: str | None,
    malformed: Malformed,
) -> tuple[pl.DataFrame, int]:
    """The rows of a block in which some line is wrong, and the number of blank lines."""
    try:
        content, undecoded = block.data[:-1].decode("utf-8"), False
    except UnicodeDecodeError:
        content, undecoded = block.data[:-1].decode("utf-8", errors="replace"), True
    text = pl.col("text")
    names = list(fields)
    numeric = [name for name, dtype in fields.items() if dtype.is_numeric()]
    part = {name: pl.col("parts").struct.field(name).str.strip_chars() for name in names}
    value = {
        name: part[name].cast(dtype, strict=False)
        if name in numeric
        else pl.when(part[name] != "").then(pl.col("parts").struct.field(name))
        for name, dtype in fields.items()
    }
    cause = (
        pl.when(text.str.strip_chars() == "")
        .then(pl.lit(""))
        .when(text == pl.lit(header, pl.String))
        .then(pl.lit("the header again"))
        .when(text.str.contains("\ufffd", literal=True) & undecoded)
        .then(pl.lit("not UTF-8"))
        .when(text.str.count_matches(separator, literal=True) != len(fields) - 1)
        .then(pl.lit(f"another number of fields than {len(fields)}"))
    )
    for name in numeric:
        unread = (part[name] != "") & value[name].is_null()
        cause = cause.when(unread).then(pl.lit(f"no number in field {name!r}"))
    frame = (
        pl.DataFrame({"text": pl.Series([content]).str.split("\n").explode()})
        .with_row_index("source_row", offset=block.first_line)
        .with_columns(text.str.strip_suffix("\r"))
        .with_columns(
            text.str.split_exact(separator, len(fields) - 1)
            .struct.rename_fields(names)
            .alias("parts")
        )
        .with_columns(cause.otherwise(None).alias("cause"))
    )
    for (name,), group in frame.filter(pl.col("cause") != "").group_by(
        ["cause"], maintain_order=True
    ):
        first = group.select("source_row", "text").head(EXAMPLES)
        malformed.add(str(name), group.height, first.iter_rows())
    rows = frame.filter(pl.col("cause").is_null()).select(
        "source_row", *[value[name].alias(name) for name in names]
    )
    return rows, frame.filter(pl.col("cause") == "").height
