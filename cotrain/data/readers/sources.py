"""Files of lines as they were downloaded: plain, gzip, or inside a zip; read block by block.

A block ends at a line end, so that each can be parsed alone, in bounded memory, and a line number
is known everywhere. A file that stops in the middle is a DataError that says where.
"""

import gzip
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

from cotrain.errors import DataError, some_of

# Large enough that starting the parser costs nothing, small enough to hold several in memory.
BLOCK_BYTES = 1 << 25
# A line longer than this is no line: the file is of another kind.
_MAX_LINE_BYTES = 1 << 28
# What gzip and zip raise on damaged bytes; NotImplementedError is zip's for an unknown method.
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, NotImplementedError)


class Block(NamedTuple):
    """Whole lines of a file.

    Attributes:
        first_line: Number of the first one, from 1.
        data: The lines; each ends with a line end, one that was missing at the end of the file
            included.
        ended: False if that last line end was missing.
    """

    first_line: int
    data: bytes
    ended: bool


@dataclass(frozen=True)
class Source:
    """A file, or a member of a zip archive.

    Attributes:
        path: The file or the archive.
        member: Name inside the archive; none: the file itself.
    """

    path: Path
    member: str | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.path.name if self.member is None else f"{self.path.name}/{self.member}"

    @contextmanager
    def open(self) -> Iterator[tuple[IO[bytes], IO[bytes], int]]:
        """The content, and the raw stream under it whose position shows how far reading is.

        Raises:
            DataError: The file cannot be opened, or stops in the middle.
        """
        try:
            with self.path.open("rb") as raw:
                if self.member is not None:
                    with zipfile.ZipFile(raw) as archive, archive.open(self.member) as content:
                        yield content, content, archive.getinfo(self.member).file_size
                    return
                size = self.path.stat().st_size
                # By its first bytes: browsers unpack some downloads and keep the name.
                packed = raw.read(2) == b"\x1f\x8b"
                raw.seek(0)
                if packed:
                    with gzip.open(raw) as content:
                        yield content, raw, size  # pyright: ignore[reportReturnType]
                else:
                    yield raw, raw, size
        except _DAMAGED as error:
            raise DataError(
                f"{self.name} is cut off or damaged: {error}. Download it again."
            ) from error
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}.") from error

    def first_line(self) -> str:
        """The first line, without its line end and byte-order mark.

        Raises:
            DataError: The file is empty or holds no text.
        """
        with self.open() as (content, _, _):
            line = content.readline(_MAX_LINE_BYTES)
        if not line:
            raise DataError(f"{self.name} is empty. Download it again, or give another --input.")
        if line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in line:
            raise DataError(
                f"{self.name} is no UTF-8 text (UTF-16, or not text at all): it begins with "
                f"{line[:20]!r}. Convert it, for instance with `iconv -t UTF-8`."
            )
        return line.decode("utf-8-sig", errors="replace").rstrip("\r\n")

    def text(self) -> tuple[str, str]:
        """The whole of a small file, and its encoding: UTF-8, else Latin-1 as GroupLens once used.

        Raises:
            DataError: The file cannot be read.
        """
        with self.open() as (content, _, _):
            data = content.read()
        try:
            return data.decode("utf-8-sig"), "UTF-8"
        except UnicodeDecodeError:
            return data.decode("latin-1"), "Latin-1"

    def blocks(self) -> Iterator[Block]:
        """The lines, in order, with a live line about the progress after two seconds.

        Raises:
            DataError: The file stops in the middle of a compressed stream, or has no lines.
        """
        rest, line = b"", 1
        with self.open() as (content, raw, size), _progress(self.name, size) as bar:
            while data := self._read(content, line):
                bar.update(raw.tell() - bar.n)
                end = data.rfind(b"\n") + 1
                if end:
                    whole, rest = rest + data[:end], data[end:]
                    yield Block(line, whole, ended=True)
                    line += whole.count(b"\n")
                else:
                    rest += data
                if len(rest) > _MAX_LINE_BYTES:
                    raise DataError(
                        f"{self.name}: line {line:,} has no end within "
                        f"{_MAX_LINE_BYTES >> 20} MiB; a text file of one row a line is expected."
                    )
        if rest:
            yield Block(line, rest + b"\n", ended=False)

    def _read(self, content: IO[bytes], line: int) -> bytes:
        try:
            return content.read(BLOCK_BYTES)
        except _DAMAGED as error:
            raise DataError(
                f"{self.name} is cut off or damaged somewhere after line {line:,}: {error}. "
                "Download it again."
            ) from error


def _progress(name: str, size: int) -> tqdm:
    return tqdm(
        total=size,
        desc=f"reading {name}",
        unit="B",
        unit_scale=True,
        delay=2,
        leave=False,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
        file=sys.stderr,
    )


def locate(path: Path, names: list[str], what: str) -> Source:
    """The first of some file names in a folder (or one folder below) or in a zip archive.

    Args:
        path: Folder, .zip, or the file itself.
        names: Base names, the preferred one first.
        what: What is looked for, for the message.

    Raises:
        DataError: There is none, or several that could be meant.
    """
    if not path.exists():
        raise DataError(f"There is no {path}. Give the folder or .zip of {what} as --input.")
    if path.is_dir():
        entries = {str(entry.relative_to(path)): entry for entry in _two_levels(path)}
        sources = {name: Source(entry) for name, entry in entries.items()}
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # The Finder adds a shadow of every file under __MACOSX.
            members = [name for name in archive.namelist() if not name.startswith("__MACOSX")]
        sources = {name: Source(path, name) for name in members}
    elif path.suffix.lower() == ".zip":
        raise DataError(f"{path} is no whole zip archive; it may be cut off. Download it again.")
    else:
        return Source(path)
    for wanted in names:
        found = [key for key in sources if Path(key).name == wanted]
        if len(found) > 1:
            raise DataError(
                f"{path} holds {wanted} {len(found)} times: {some_of(sorted(found))}. Give the "
                "folder of one data set as --input."
            )
        if found:
            return sources[found[0]]
    held = sorted(name for name in sources if not name.endswith("/"))
    raise DataError(
        f"{path} holds none of {some_of(names)}, which {what} has. It holds "
        f"{some_of(held) or 'nothing'}. Give the unpacked folder or the .zip as --input."
    )


def beside(source: Source, names: list[str]) -> Source | None:
    """The first of some file names in the place where another file stands, or None."""
    for name in names:
        if source.member is None:
            path = source.path.with_name(name)
            if path.is_file():
                return Source(path)
        else:
            member = str(Path(source.member).with_name(name).as_posix())
            with zipfile.ZipFile(source.path) as archive:
                if member in archive.namelist():
                    return Source(source.path, member)
    return None


def _two_levels(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.is_file():
            yield entry
        elif entry.is_dir():
            yield from sorted(inner for inner in entry.iterdir() if inner.is_file())
