"""A file of rationales that grows row by row and survives being killed at any moment."""

import os
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout

from cotrain.data.interactions import InteractionData
from cotrain.errors import DataError, some_of
from cotrain.rationale.records import Rationale, RawId, position_hash, read_rationales


class Journal:
    """JSON lines, appended and flushed to the disk; each position at most once.

    Opening it mends what a kill left: a last line without its end is cut off. A line that is whole
    but no rationale is an error, because nothing of ours writes such a line.

    Args:
        path: The file; made where it is missing.

    Attributes:
        written: Keys of all rows.
        mended: What was cut off or left out when it was opened; empty: nothing.

    Raises:
        DataError: The file cannot be read or written, or another process writes it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.mended = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(path.with_name(f".{path.name}.lock"))
            self._lock.acquire(blocking=False)
            self._file = path.open("r+b" if path.exists() else "w+b")
        except Timeout:
            raise DataError(
                f"{path} is being written by another process. Wait for it, or choose another "
                "--output."
            ) from None
        except OSError as error:
            raise DataError(
                f"{path} cannot be written: {error.strerror}. Choose another --output."
            ) from error
        self._cut_torn_line()
        self.written = self._keys()
        self._file.seek(0, os.SEEK_END)

    def _cut_torn_line(self) -> None:
        size = end = self._file.seek(0, os.SEEK_END)
        while end > 0:  # backwards, a piece at a time, to the last line end
            start = max(0, end - 2**16)
            self._file.seek(start)
            found = self._file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            self._file.truncate(end)
            self.mended = f"a line that had not been finished, {size - end} bytes, was cut off"

    def _keys(self) -> set[tuple[RawId, int]]:
        keys: set[tuple[RawId, int]] = set()
        for rationale in read_rationales(self.path):
            if rationale.key in keys:
                raise DataError(
                    f"{self.path} has two rationales for user {rationale.user_id!r}, cut "
                    f"{rationale.cut}; expected one a position. Remove one of them."
                )
            keys.add(rationale.key)
        return keys

    def check(self, data: InteractionData) -> None:
        """Whether every row is of these data.

        Raises:
            DataError: Some are not; says which.
        """
        users = {user: index for index, user in enumerate(data.user_ids)}
        ids = data.catalog.item_ids
        wrong = []
        for rationale in read_rationales(self.path):
            items = data.history(users[rationale.user_id]) if rationale.user_id in users else []
            past = [ids[item] for item in items[: rationale.cut + 1]]
            known = 0 < rationale.cut < len(items)
            if not known or position_hash(past[:-1], past[-1]) != rationale.history_hash:
                wrong.append(rationale.key)
        if wrong:
            raise DataError(
                f"{self.path} holds rationales of other data: {some_of(wrong)} (user, cut) are not "
                f"in {data.name} with the same history. Choose another --output, or the data that "
                "it was begun with."
            )

    def append(self, rows: Iterable[Rationale]) -> None:
        """Add rows whose position is not there yet; on the disk when this returns.

        Raises:
            DataError: The disk refused; what had been written before is whole.
        """
        new: list[Rationale] = []
        for row in rows:
            if row.key not in self.written:
                self.written.add(row.key)
                new.append(row)
        text = "".join(f"{row.to_json()}\n" for row in new)
        try:
            self._file.write(text.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be written: {error.strerror}. Make room and run the same "
                "command again; it goes on."
            ) from error

    def close(self) -> None:
        """Let another process have it."""
        self._file.close()
        self._lock.release()
