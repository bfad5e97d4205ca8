"""One rationale as it lies on disk: a line of JSON, keyed by the position that it explains."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cotrain.errors import DataError

RawId = int | str


@dataclass(frozen=True)
class Rationale:
    """Why a user took an item, in the words of a language model.

    Attributes:
        user_id: Raw id.
        item_id: Raw id of the target, the item that was taken.
        cut: How many interactions of the user lie before the target.
        history_hash: `position_hash` of what lies before the target, and the target.
        rationale: The text.
        model: Who wrote it.
        template: By which words it was asked.
        logprob: Mean log-probability of a written token, in nats; None: not known.
        tokens: Written; None: not known.
        flags: What `cotrain.rationale.checks` found; empty: nothing.
    """

    user_id: RawId
    item_id: RawId
    cut: int
    history_hash: str
    rationale: str
    model: str
    template: str
    logprob: float | None = None
    tokens: int | None = None
    flags: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @property
    def key(self) -> tuple[RawId, int]:
        """User and cut: of each there is one rationale in a file."""
        return self.user_id, self.cut


_NAMES = [f.name for f in fields(Rationale)]
_TYPES: dict[str, Any] = {
    "user_id": (int, str), "item_id": (int, str), "cut": int, "history_hash": str,
    "rationale": str, "model": str, "template": str, "logprob": (float, int, type(None)),
    "tokens": (int, type(None)), "flags": list,
}  # fmt: skip


def parse_line(line: str) -> Rationale:
    """Undo `Rationale.to_json`.

    Raises:
        ValueError: Not such a line; says why.
    """
    content = json.loads(line)
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}, not an object")
    missing = [name for name in _NAMES if name not in content]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    for name in _NAMES:
        if not isinstance(content[name], _TYPES[name]) or isinstance(content[name], bool):
            raise ValueError(f"its {name} is {content[name]!r}")
    return Rationale(**{name: content[name] for name in _NAMES})


def read_rationales(path: Path) -> Iterator[Rationale]:
    """Every rationale of a file, in its order, one at a time.

    Raises:
        DataError: The file cannot be read, or a line is not a rationale.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield parse_line(line)
                except ValueError as error:
                    raise DataError(
                        f"Line {number} of {path} is not a rationale: {error}. Expected a JSON "
                        f"object with {', '.join(_NAMES)}, as scripts/generate_rationales.py "
                        "writes it. If that was killed, run it again: it mends its file."
                    ) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not UTF-8 ({error})"
        raise DataError(
            f"The rationales {path} cannot be read: {reason}. Give a file that "
            "scripts/generate_rationales.py wrote."
        ) from error


def position_hash(history: Sequence[RawId], target: RawId) -> str:
    """32 hex digits that stand for a history and what was taken after it.

    Ids count with their type: 1 and "1" differ.
    """
    return position_hashes([*history, target])[-1]


def position_hashes(ids: Sequence[RawId]) -> list[str]:
    """The hash of every position of one user: entry `cut` has `ids[:cut]` as its history and
    `ids[cut]` as its target. One pass, whatever the length."""
    running = hashlib.sha256()
    hashes = []
    for item in ids:
        text = json.dumps(item).encode()
        with_target = running.copy()
        with_target.update(b"> " + text)
        hashes.append(with_target.hexdigest()[:32])
        running.update(text + b"\n")
    return hashes
