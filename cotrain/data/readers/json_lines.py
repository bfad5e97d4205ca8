"""Chosen keys out of lines that hold a JSON object each.

As with separators, polars reads whole blocks, and Python only those in which a line is wrong.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from cotrain.data.readers.lines import UNREADABLE, Malformed, cut_off
from cotrain.data.readers.sources import Block, Source


@dataclass
class JsonLines:
    """Reads chosen keys of one object a line.

    Lines that are Python literals instead of JSON, as some Amazon files of 2014 have them, are
    read too, one by one and some fifty times slower.

    Attributes:
        keys: Keys to keep, as text, whatever JSON has there: 5.0 becomes "5.0".
        lists: Keys to keep that hold lists, or lists of lists, as one list of text.
        malformed: Lines that are no objects.
        lines: How many there were, blank ones excluded.
        blank: Empty lines.
        literals: Lines that were Python literals.
        skip: Given a line as text that is no JSON, says whether nobody needs it.
    """

    keys: Sequence[str]
    lists: Sequence[str] = ()
    malformed: Malformed = field(default_factory=Malformed)
    lines: int = 0
    blank: int = 0
    literals: int = 0
    skip: Callable[[str], bool] | None = None

    def frames(self, source: Source) -> Iterator[pl.DataFrame]:
        """Columns source_row (number of the line), the keys and the lists, block by block.

        Raises:
            DataError: The file stops in the middle, or holds no such objects.
        """
        for block in source.blocks():
            count = block.data.count(b"\n")
            frame = self._strict(block.data)
            if frame is not None and frame.height == count:
                self.lines += count
                yield frame.with_row_index("source_row", offset=block.first_line)
            else:
                yield self._one_by_one(source, block)
            self.malformed.check(source, self.lines)

    def _strict(self, data: bytes) -> pl.DataFrame | None:
        """The rows if every line is an object of the expected shape; otherwise None."""
        schema: dict[str, pl.DataType] = dict.fromkeys(self.keys, pl.String())
        if not self.lists:
            return _read_ndjson(data, schema)
        # Lists of lists first: a list of text is no such thing, but the reverse would be read, as
        # text that looks like JSON.
        flat = pl.List(pl.String())
        for kind in (pl.List(flat), flat):
            frame = _read_ndjson(data, schema | dict.fromkeys(self.lists, kind))
            if frame is None:
                continue
            if kind != flat:
                frame = frame.with_columns(
                    pl.col(name).list.eval(pl.element().explode()) for name in self.lists
                )
            frame = frame.with_columns(pl.col(name).list.drop_nulls() for name in self.lists)
            deeper = pl.any_horizontal(
                pl.col(name).list.eval(pl.element().str.contains(r"^[\[{]")).list.any()
                for name in self.lists
            )
            return None if frame.select(deeper.any()).item() else frame
        return None

    def _one_by_one(self, source: Source, block: Block) -> pl.DataFrame:
        columns: dict[str, list[Any]] = {
            name: [] for name in ("source_row", *self.keys, *self.lists)
        }
        texts = block.data[:-1].decode("utf-8", errors="replace").split("\n")
        for line, text in enumerate(texts, block.first_line):
            if not text.strip():
                self.blank += 1
                continue
            self.lines += 1
            value = self._object(text)
            if value is None:
                if not block.ended and line == block.first_line + len(texts) - 1:
                    raise cut_off(source, line, text)
                self.malformed.add("no JSON object", 1, [(line, text)])
            elif value is not _SKIPPED:
                columns["source_row"].append(line)
                for key in self.keys:
                    columns[key].append(_as_text(value.get(key)))
                for key in self.lists:
                    columns[key].append(_as_list(value.get(key)))
        schema: dict[str, Any] = {"source_row": pl.get_index_type()}
        schema |= dict.fromkeys(self.keys, pl.String)
        schema |= dict.fromkeys(self.lists, pl.List(pl.String))
        return pl.DataFrame(columns, schema=schema)

    def _object(self, text: str) -> dict[str, Any] | None:
        """The object in a line, `_SKIPPED` if nobody needs it, or None if there is none."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            if not _LITERAL.match(text):
                return None
            if self.skip is not None and self.skip(text):
                self.literals += 1
                return _SKIPPED
            try:
                value = ast.literal_eval(text.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                return None
            self.literals += 1
        return value if isinstance(value, dict) else None


_SKIPPED: dict[str, Any] = {}
# A Python literal of an object begins with a quoted key; JSON has no single quotes there.
_LITERAL = re.compile(r"\s*\{\s*(u?'|\")")


def _read_ndjson(data: bytes, schema: dict[str, pl.DataType]) -> pl.DataFrame | None:
    try:
        return pl.read_ndjson(data, schema=schema)
    except UNREADABLE:
        return None


def _as_list(value: Any) -> list[str] | None:
    """The text in a list, or in lists of lists; text alone is a list of one."""
    if value is None:
        return None
    if not isinstance(value, list):
        return [str(_as_text(value))]
    found = []
    for part in value:
        found += _as_list(part) or []
    return found


def _as_text(value: Any) -> str | None:
    """A value as polars' reader gives it: text bare, the rest as JSON."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
