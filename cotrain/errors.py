"""Errors that a user can act on. Each message says what is wrong, what was received, what is
expected, and what to do; scripts print it without a traceback."""

from collections.abc import Iterable


class CotrainError(Exception):
    """Base of every error that cotrain raises on purpose."""


class ConfigError(CotrainError):
    """A setting, or a combination of settings, cannot work."""


class AssetError(CotrainError):
    """A named model or data set cannot be found, fetched or believed."""


class DataError(CotrainError):
    """A table cannot be read as interactions or items."""


class TeacherError(CotrainError):
    """The language model cannot serve as a ranker."""


class CheckpointError(CotrainError):
    """A checkpoint or run folder cannot be written, found or believed."""


def some_of(values: Iterable[object], limit: int = 5) -> str:
    """First `limit` values, and how many there are in all, for use inside an error message."""
    listed = list(values)
    text = ", ".join(repr(value) for value in listed[:limit])
    return text if len(listed) <= limit else f"{text}, … ({len(listed)} in all)"
