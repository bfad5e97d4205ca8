"""Small things about files that several parts need."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from cotrain.errors import ConfigError


def sha256(path: Path) -> str:
    """Hex digest of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that, whatever happens, the old content stands there or the new."""
    with (
        written_whole(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="replace") as file,
    ):
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place where the block ends well, and is
    gone where it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new(path: Path, option: str, overwrite: bool = False) -> None:
    """Checks, before the work begins, that a file or folder can be written when it is done.

    Args:
        path: Of the file or folder.
        option: That named it, for the message.
        overwrite: Whether a file may stand there.

    Raises:
        ConfigError: Something stands there, or its folder does not exist or cannot be written to.
    """
    parent = path.absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {parent}. Make it first.")
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder that exists. Name one that does not.")
    if os.path.lexists(path) and not overwrite:
        raise ConfigError(
            f"{option} {path} exists, and nothing is overwritten unasked. Name another, or delete "
            "it."
        )
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"{option} {path}: the folder {parent} cannot be written to.")
