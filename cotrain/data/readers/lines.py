"""What reading a file of lines gives: the rows, and the lines that are none, by cause."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import polars as pl

from cotrain.data.ledger import EXAMPLES
from cotrain.data.readers.sources import Source
from cotrain.errors import DataError

# Polars answers some damaged text with a panic of its Rust side, which is no PolarsError.
UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, ValueError)
# Characters of a damaged line that a message shows.
_SHOWN = 60


@dataclass
class Malformed:
    """Lines that are no rows, by what is wrong with them.

    Attributes:
        counts: How many, for each cause.
        examples: The first of them with their numbers, for each cause.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, cause: str, count: int, first: Iterable[tuple[int, str]]) -> None:
        """Counts lines, of which the first few are given with number and text."""
        self.counts[cause] += count
        shown = self.examples.setdefault(cause, [])
        for line, text in first:
            if len(shown) < EXAMPLES:
                cut = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
                shown.append(f"line {line:,}: {cut!r}")

    def check(self, source: Source, read: int) -> None:
        """Stops early where the file is plainly of another format.

        Raises:
            DataError: More than half of the lines so far are no rows.
        """
        bad = self.counts.total()
        if bad > read / 2:
            causes = "; ".join(
                f"{count:,} × {cause} ({'; '.join(self.examples[cause][:2])})"
                for cause, count in self.counts.most_common()
            )
            raise DataError(
                f"{source.name} is not what it is taken for: {bad:,} of the first {read:,} lines "
                f"are no rows: {causes}. Check the SOURCE that prepare_data.py is given, the "
                "separator and the encoding of the file."
            )


@dataclass(frozen=True)
class Lines:
    """What was found in a file of lines.

    Attributes:
        frame: The fields, and `source_row`, the number of the line.
        lines: How many there were, header and blank ones excluded.
        malformed: Those that are no rows.
        blank: Empty lines.
        unended: Number of the last line if it is a row, but without a line end.
    """

    frame: pl.DataFrame
    lines: int
    malformed: Malformed
    blank: int
    unended: int | None


def cut_off(source: Source, line: int, text: str) -> DataError:
    """The error for a file whose last line is only the beginning of one."""
    return DataError(
        f"{source.name} is cut off: its last line, {line:,}, stops in the middle: {text[-80:]!r}. "
        "Download it again."
    )
