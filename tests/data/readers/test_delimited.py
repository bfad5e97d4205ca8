"""Fields become rows, the same ones however the file is cut into blocks, whatever stands near."""

from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cotrain.data.readers import sources
from cotrain.data.readers.delimited import read_delimited
from cotrain.data.readers.lines import Lines
from cotrain.data.readers.sources import Source
from cotrain.errors import DataError

FIELDS = {"user": pl.Int64(), "name": pl.String(), "score": pl.Float64(), "time": pl.Int64()}
# What parsers disagree about: signs, blanks, exponents, quotes, wide numbers.
CELLS = [
    "1", "007", "-4", "+5", " 6", "7 ", "", " ", "3.5", "4.", ".5", "1e3", "1_0", "nan", "inf",
    '"8"', '"', "x", "9" * 20, "#", "é", "\x0b", "true",
]  # fmt: skip
LINES = st.lists(
    st.one_of(
        st.lists(st.sampled_from(CELLS), min_size=4, max_size=4),
        st.just(["1", "a", "2.5", "3"]),
        st.lists(st.sampled_from(CELLS), min_size=0, max_size=6),
    ),
    min_size=1,
    max_size=8,
)
SETTINGS = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def outcome(path: Path, separator: str, block_bytes: int, monkeypatch) -> tuple:
    with monkeypatch.context() as patch:
        patch.setattr(sources, "BLOCK_BYTES", block_bytes)
        # Half of the lines may be wrong; that is another test.
        patch.setattr("cotrain.data.readers.lines.Malformed.check", lambda *_: None)
        try:
            found = read_delimited(Source(path), separator, FIELDS)
        except DataError as error:
            return (str(error),)
    rows = [tuple(map(str, row)) for row in found.frame.rows()]
    return rows, found.lines, found.blank, found.malformed.counts, found.malformed.examples


@SETTINGS
@given(lines=LINES, separator=st.sampled_from([",", "\t", "::"]), ended=st.booleans())
# Regression: a cell of nothing but a vertical tab was missing only where a line nearby was bad.
@example(lines=[[], ["1", "\x0b", "1", "1"], ["1", "a", "2.5", "3"]], separator=",", ended=False)
def test_rows_do_not_depend_on_the_blocks(lines, separator, ended, tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    text = "\n".join(separator.join(cells) for cells in lines)
    path.write_bytes((text + "\n" * ended).encode())
    whole = outcome(path, separator, 1 << 20, monkeypatch)
    for block_bytes in (1, 16, 40):
        assert outcome(path, separator, block_bytes, monkeypatch) == whole


@SETTINGS
@given(lines=LINES)
def test_every_line_is_a_row_or_counted(lines, tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    path.write_bytes("".join("\t".join(cells) + "\n" for cells in lines).encode())
    found = outcome(path, "\t", 1 << 20, monkeypatch)
    if len(found) == 1:
        assert "has no rows" in found[0]
        return
    rows, count, blank, malformed, _ = found
    assert len(rows) + blank + sum(malformed.values()) == len(lines)
    assert count + blank == len(lines)
    for row in rows:
        cells = lines[int(row[0]) - 1]
        assert len(cells) == 4
        # Numbers are the ones that Python reads there; blank ones are missing.
        for value, cell, kind in ((row[1], cells[0], int), (row[3], cells[2], float)):
            expected = kind(cell) if cell.strip() else None
            assert value == str(expected)


def test_the_last_line_without_its_end_is_told(tmp_path):
    path = tmp_path / "t.csv"

    def read(text: str) -> Lines:
        path.write_text(text)
        return read_delimited(Source(path), ",", FIELDS, keep=["user"])

    assert read("1,a,1,1\n2,b,2,2\n").unended is None
    assert read("1,a,1,1\n2,b,2,2").unended == 2
    assert read("1,a,1,1\n2,b,2,2").frame.rows() == [(1, 1), (2, 2)]
    with pytest.raises(DataError, match=r"t.csv is cut off: its last line, 2, stops"):
        read("1,a,1,1\n2,b")


def test_a_file_without_line_ends_is_refused_and_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(sources, "_MAX_LINE_BYTES", 5000)
    path = tmp_path / "t.csv"
    path.write_bytes(b"1," * 10_000)
    with pytest.raises(DataError, match="line 1 has no end"):
        read_delimited(Source(path), ",", FIELDS)
