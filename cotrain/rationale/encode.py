"""Rationales to vectors: from JSON lines to a store, in bounded memory, and on from where it was
killed.

The lines are read once into a table (`rows.parquet`), then encoded a chunk at a time. Until the
last chunk everything stands in a hidden folder beside the output, which at the end is renamed.
"""

import itertools
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from cotrain.config import EncodeConfig
from cotrain.data.item_text import identity
from cotrain.errors import CotrainError, DataError
from cotrain.files import sha256, write_whole
from cotrain.rationale import store
from cotrain.rationale.encoders import TextEncoder, load_encoder
from cotrain.rationale.records import Rationale, read_rationales
from cotrain.rationale.store import RationaleStore

# In the folder that scripts/generate_rationales.py writes.
RATIONALES = "rationales.jsonl"
# Rows encoded between two notes of how far it is: the most that a kill costs.
CHUNK = 1024
# Lines held in memory at once.
LINES = 32_768
_DTYPES = {"float16": "F16", "float32": "F32"}
_STATE = "state.json"
# Prints a line.
Say = Callable[[str], Any]


def encode(config: EncodeConfig, say: Say = print) -> RationaleStore:
    """Encode a file of rationales, or go on with it.

    Args:
        config: Settings of the encoding.
        say: Prints a line.

    Raises:
        DataError: No rationales, or none left; an output that is there already, or was begun from
            other lines or with other settings; vectors that are not finite.
        AssetError, TeacherError: The encoder cannot be loaded.
    """
    source = _find_source(str(config.rationales))
    output = _output(config, source)
    if output.exists():
        raise DataError(
            f"{output} is there already and is not touched. Name another folder with --output, or "
            "delete it first."
        )
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = FileLock(partial / "lock")
        with lock.acquire(blocking=False):
            _encode_in(partial, source, config, say)
        partial.rename(output)
        # Only now: until it has its name, it could still be killed.
        for leftover in ("lock", _STATE):
            (output / leftover).unlink(missing_ok=True)
    except CotrainError:
        if not (partial / _STATE).exists():  # nothing was begun
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except Timeout:
        raise DataError(
            f"Another process is encoding into {output}. Wait for it, or name another --output."
        ) from None
    except OSError as error:
        raise DataError(
            f"The store {output} cannot be written: {error}. Make room, or name another --output; "
            "the same command goes on from where it was."
        ) from error
    made = RationaleStore.open(output)
    say(f"Store: {output}, {len(made):,} vectors of {made.dimension} by {made.encoder}")
    return made


def _find_source(given: str) -> Path:
    path = Path(given).expanduser()
    source = path / RATIONALES if path.is_dir() else path
    if not source.is_file():
        raise DataError(
            f"There are no rationales at {source}. Give --rationales the folder or the JSON lines "
            "file that scripts/generate_rationales.py wrote."
        )
    return source


def _output(config: EncodeConfig, source: Path) -> Path:
    if config.output is not None:
        return Path(config.output).expanduser().absolute()
    named = config.encoder
    if named == "teacher":
        named = f"teacher-{Path(str(config.teacher.model)).name}"
    stem = "" if source.name == RATIONALES else f"{source.stem}-"
    return source.parent.absolute() / f"{stem}{Path(named).name}"


def _encode_in(partial: Path, source: Path, config: EncodeConfig, say: Say) -> None:
    """Everything but the renaming."""
    state = _State.open(partial / _STATE, _fingerprint(config, source))
    if state.counts is None:
        state.counts = _collect_rows(source, partial, _drop_flags(config))
        state.save()
    counts = state.counts
    say(_account(source, counts))
    encoder = load_encoder(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    facts = {
        "format": store.FORMAT,
        "encoder": encoder.name,
        "source": source.name,
        "source_sha256": state.fingerprint["source"],
        "data": _data_name(source),
        "counts": json.dumps(counts),
    }
    if state.done:
        say(f"Going on at row {state.done:,} of {counts['rows']:,}")
    _write_vectors(partial, encoder, config.dtype, facts, state)


# ---- what was begun -----------------------------------------------------------------------------


@dataclass
class _State:
    """How far an encoding is, as it stands in a file.

    Attributes:
        path: The file.
        fingerprint: What is encoded, by what.
        counts: What became of the lines; None: they are not collected yet.
        done: Rows whose vectors are on disk.
    """

    path: Path
    fingerprint: dict[str, Any]
    counts: dict[str, Any] | None = None
    done: int = 0

    @classmethod
    def open(cls, path: Path, fingerprint: dict[str, Any]) -> "_State":
        """That of the file, or a new one.

        Raises:
            DataError: It was begun with something else.
        """
        if not path.is_file():
            return cls(path, fingerprint)
        found = json.loads(path.read_text(encoding="utf-8"))
        if not found["done"] and fingerprint != found["fingerprint"]:
            return cls(path, fingerprint)
        before = found["fingerprint"]
        other = [name for name, value in fingerprint.items() if value != before.get(name)]
        if other:
            listed = "; ".join(
                f"{name} was {before.get(name)!r} and is {fingerprint[name]!r}" for name in other
            )
            raise DataError(
                f"{path.parent} holds an encoding that was begun with something else: {listed}. "
                "Run it as it was begun, name another --output, or delete that folder to start "
                "anew."
            )
        return cls(path, fingerprint, found["counts"], found["done"])

    def save(self) -> None:
        """Whole or not at all, whatever happens meanwhile."""
        content = {name: value for name, value in asdict(self).items() if name != "path"}
        write_whole(self.path, json.dumps(content))


def _fingerprint(config: EncodeConfig, source: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "source": sha256(source),
        "encoder": config.encoder,
        "dtype": config.dtype,
        "drop_flags": sorted(_drop_flags(config)),
    }
    if config.encoder != "teacher":
        return facts | {"model": identity(config.encoder)}
    teacher = config.teacher
    adapter = None if teacher.adapter is None else identity(teacher.adapter)
    settings = [teacher.quantization, teacher.compute, adapter]
    return facts | {"model": identity(str(teacher.model)), "teacher": settings}


def _drop_flags(config: EncodeConfig) -> set[str]:
    return {name.strip() for name in (config.drop_flags or "").split(",")} - {""}


def _data_name(source: Path) -> str:
    """What the settings beside the rationales call their data; empty where there are none."""
    path = source.with_name("config.yaml")
    if source.name != RATIONALES or not path.is_file():
        return ""
    try:
        return str(yaml.safe_load(path.read_text(encoding="utf-8"))["data"]["name"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return ""


# ---- lines --------------------------------------------------------------------------------------


def _collect_rows(source: Path, partial: Path, drop_flags: set[str]) -> dict[str, Any]:
    """Write rows.parquet, a part at a time.

    Returns:
        What became of the lines.

    Raises:
        DataError: Lines that are no rationales or have ids of two types, or none left.
    """
    parts = partial / "parts"
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    count, left_out, first = 0, Counter(), None
    files = []
    bar = tqdm(
        read_rationales(source), "reading", unit=" lines", mininterval=_interval(), leave=False
    )
    lines = iter(bar)
    while chunk := list(itertools.islice(lines, LINES)):
        count += len(chunk)
        reasons = [_reason_to_leave_out(rationale, drop_flags) for rationale in chunk]
        left_out.update(reason for reason in reasons if reason)
        kept = [line for line, reason in zip(chunk, reasons, strict=True) if not reason]
        if kept:
            first = first or kept[0]
            files.append(parts / f"{len(files):08}.parquet")
            _table(kept, first, source).write_parquet(files[-1])
    if not files:
        raise DataError(
            f"{source} leaves nothing to encode: {count:,} lines, left out: "
            f"{_listed(left_out) or 'none'}. Generate more, or set --drop_flags none to encode "
            "flagged rationales as well."
        )
    repeated, rows = _join(files, partial / store.ROWS)
    shutil.rmtree(parts)
    return {"lines": count, "rows": rows, "repeated": repeated, "left_out": dict(left_out)}


def _reason_to_leave_out(rationale: Rationale, drop_flags: set[str]) -> str | None:
    """The first of its flags that asks for it; `blank` where there is nothing to encode."""
    for flag in rationale.flags:
        if flag in drop_flags:
            return flag
    return None if rationale.rationale.strip() else "blank"


def _table(rationales: list[Rationale], first: Rationale, source: Path) -> pl.DataFrame:
    """Columns of rows.parquet, without the number of the row.

    Raises:
        DataError: Ids that are not of the type that they have in the first line.
    """
    types = {name: type(getattr(first, name)) for name in ("user_id", "item_id")}
    for rationale in rationales:
        for name, expected in types.items():
            if type(value := getattr(rationale, name)) is not expected:
                raise DataError(
                    f"{source} has {name} {getattr(first, name)!r} in one line and {value!r} in "
                    "another; expected all numbers or all text, as the data have them."
                )
    ids = [pl.String() if kind is str else pl.Int64() for kind in types.values()]
    schema = store.row_schema(*ids)
    del schema["row"]
    try:
        return pl.DataFrame([asdict(rationale) for rationale in rationales], schema=schema)
    except (OverflowError, TypeError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"{source} has values that no table can hold: {error}. Expected ids and cuts below "
            "2^63, and flags that are text."
        ) from error


def _join(files: list[Path], path: Path) -> tuple[int, int]:
    """Write the parts as one table, of several lines for one position only the first.

    Returns:
        Lines left out for that, and rows written.
    """
    parts = pl.scan_parquet(files, glob=False)
    # The keys of a million rows are some 16 MB; their texts never come together.
    keys = parts.select("user_id", "cut").collect().with_row_index("line")
    first = keys.unique(["user_id", "cut"], keep="first")["line"]
    if len(first) < keys.height:
        parts = parts.with_row_index("line").filter(pl.col("line").is_in(first.implode()))
        parts = parts.drop("line")
    temporary = path.with_suffix(".new")
    parts.with_row_index("row").sink_parquet(temporary, row_group_size=store.ROW_GROUP)
    temporary.replace(path)
    return keys.height - len(first), len(first)


def _account(source: Path, counts: dict[str, Any]) -> str:
    left_out = sum(counts["left_out"].values())
    why = f" ({_listed(counts['left_out'])})" if left_out else ""
    return (
        f"Rationales: {counts['lines']:,} lines in {source.name}, {left_out:,} left out{why}, "
        f"{counts['repeated']:,} repeated, {counts['rows']:,} to encode"
    )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items()))


# ---- vectors ------------------------------------------------------------------------------------


def _write_vectors(
    partial: Path, encoder: TextEncoder, dtype: str, facts: dict[str, str], state: _State
) -> None:
    """Write vectors.safetensors from row `state.done` on.

    Raises:
        DataError: Vectors that are not finite, or a file that is not the one that was begun.
    """
    assert state.counts is not None
    rows = state.counts["rows"]
    header = store.header_bytes(rows, encoder.dimension, _DTYPES[dtype], facts)
    path = partial / store.VECTORS
    end = len(header) + state.done * encoder.dimension * np.dtype(dtype).itemsize
    with path.open("r+b" if state.done else "w+b") as file:
        if not state.done:
            file.write(header)
        elif file.read(len(header)) != header or path.stat().st_size < end:
            raise DataError(
                f"{path} is not what was begun there, or the encoder is another one than then. "
                f"Delete {partial} to start anew."
            )
        file.seek(end)
        file.truncate()  # what was written after the last note of how far it is
        bar = tqdm(
            total=rows, initial=state.done, desc="encoding", unit=" rows", mininterval=_interval()
        )
        with bar:
            for texts in _texts(partial / store.ROWS, state.done, rows):
                vectors = _narrowed(encoder.encode(texts), dtype, partial, state.done)
                file.write(vectors.tobytes())
                file.flush()
                os.fsync(file.fileno())
                state.done += len(texts)
                state.save()
                bar.update(len(texts))


def _texts(path: Path, start: int, rows: int) -> Iterator[list[str]]:
    """The texts from a row on, a chunk at a time, each part of the table read once."""
    table = pl.scan_parquet(path, glob=False).select("rationale")
    for group in range(start - start % store.ROW_GROUP, rows, store.ROW_GROUP):
        texts = table.slice(group, store.ROW_GROUP).collect()["rationale"].to_list()
        for place in range(max(0, start - group), len(texts), CHUNK):
            yield texts[place : place + CHUNK]


def _narrowed(vectors: Tensor, dtype: str, partial: Path, first_row: int) -> np.ndarray:
    """(n, E) as they go to disk.

    Raises:
        DataError: Some are not finite.
    """
    with np.errstate(over="ignore"):  # counted below
        narrow = vectors.numpy().astype(dtype)
    bad = np.flatnonzero(~np.isfinite(narrow).all(1))
    if not len(bad):
        return narrow
    table = pl.scan_parquet(partial / store.ROWS, glob=False).slice(first_row, len(vectors))
    named = table.select("user_id", "cut").collect()[bad[:5].tolist()]
    listed = ", ".join(f"user {user!r} cut {cut}" for user, cut in named.iter_rows())
    remedy = "Choose another encoder."
    if vectors.isfinite().all():
        largest = vectors.abs().max().item()
        remedy = f"float16 holds up to 65,504 and there are {largest:,.0f}: set --dtype float32."
    raise DataError(
        f"The encoder gives vectors that are not finite to {len(bad)} of {len(vectors)} rationales "
        f"from row {first_row:,} on: {listed}. {remedy}"
    )


def _interval() -> float:
    # A log file is no terminal: a line every 10 s there instead of ten a second.
    return 0.1 if sys.stderr.isatty() else 10.0
