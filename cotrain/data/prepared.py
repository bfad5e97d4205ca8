"""Prepared sets: what `scripts/prepare_data.py` writes, and how a run finds them by name or path.

A prepared set is a folder with three files:

- interactions.parquet: user_id, item_id, position (0 = oldest, within the user), timestamp (seconds
  since 1970, or the number given where it is no clock time; null where unknown) and, where the
  source has one, rating; sorted by user and position;
- items.parquet: every item that occurs, with title and categories (joined by a bar; null: unknown);
- prepared.json: source, options, checksums of what was read, and what each step dropped.

Nothing in it holds a date or a path, so that the same input gives the same bytes.
"""

import difflib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from cotrain import assets
from cotrain.errors import AssetError, DataError, some_of
from cotrain.files import sha256

INTERACTIONS = "interactions.parquet"
ITEMS = "items.parquet"
MANIFEST = "prepared.json"
# Raised when the columns or their meaning change: older folders have to be prepared again.
FORMAT = 1

# Sets that recipes use and nobody may pass on: the commands that make them from their publishers'
# files.
_COMMANDS = {
    "ml-1m": "python scripts/prepare_data.py movielens --input ml-1m.zip --name ml-1m "
    "--min-user-interactions 5 --min-item-interactions 5",
    "amazon-beauty": "python scripts/prepare_data.py amazon --input reviews_Beauty_5.json.gz "
    "--items meta_Beauty.json.gz --name amazon-beauty",
}
_SOURCES = {
    "ml-1m": "ml-1m.zip is MovieLens 1M as GroupLens ships it",
    "amazon-beauty": "both files are of the Amazon reviews of 2014 (Beauty, 5-core)",
}


@dataclass(frozen=True)
class DataSet:
    """A data set that stands ready.

    Attributes:
        name: What the report calls it.
        folder: Holds `INTERACTIONS` and `ITEMS`.
        notes: What its preparation dropped and why; nothing for an asset.
    """

    name: str
    folder: Path
    notes: list[str]


# ---- finding ------------------------------------------------------------------------------------


def root() -> Path:
    """Folder of the prepared sets that have a name."""
    return assets.cache_root() / "prepared"


def names() -> list[str]:
    """Prepared sets that can be given by name."""
    return sorted(path.parent.name for path in root().glob(f"*/{MANIFEST}"))


def is_path(name: str) -> bool:
    """Whether `data.name` is the path of a prepared folder and no name."""
    return name.startswith((".", "~")) or "/" in name or os.sep in name


def find(name: str) -> DataSet:
    """The data set that a run names: an asset, a prepared set, or a path to one.

    An asset is fetched if the cache lacks it.

    Raises:
        DataError: A prepared folder is missing, incomplete or damaged.
        AssetError: No asset and no prepared set has the name, or the asset cannot be fetched.
    """
    if is_path(name):
        folder = Path(name).expanduser()
    elif name in assets.ASSETS:
        return DataSet(name, assets.fetch(name, kind="data"), [])
    else:
        folder = root() / name
        if not folder.is_dir():
            raise AssetError(_unknown(name))
    manifest = read_manifest(folder)
    return DataSet(manifest.get("name", folder.name), folder, _notes(manifest))


def _notes(manifest: dict[str, Any]) -> list[str]:
    """What the preparation did, for the report of a run."""
    steps = manifest.get("steps", [])
    inputs = ", ".join(record["file"] for record in manifest.get("inputs", []))
    notes = [f"Prepared from {inputs} ({manifest.get('source')})."]
    for step in steps:
        dropped = f"{step['dropped']:,} dropped, " if step is not steps[0] else ""
        notes.append(f"Preparation: {step['step']}: {dropped}{step['left']:,} left.")
    return notes + [f"Preparation: {note}" for note in manifest.get("notes", [])]


def read_manifest(folder: Path) -> dict[str, Any]:
    """What prepared.json says, after a look at the sizes of the files that it lists.

    Raises:
        DataError: The folder is no prepared set, or not a whole one.
    """
    remedy = (
        "Prepare it again with `python scripts/prepare_data.py` and --overwrite, or point "
        "--data.name elsewhere."
    )
    if not folder.is_dir():
        raise DataError(f"There is no prepared set {folder}. {remedy}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format"]
        sizes = {name: record["bytes"] for name, record in manifest["files"].items()}
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} is no prepared set: it has no {MANIFEST}. For tables of your own set "
            f"--data.interactions FILE, or prepare them. {remedy}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read: {error!r}. {remedy}") from error
    if version != FORMAT:
        raise DataError(
            f"{folder} has format {version}, and this version of cotrain reads {FORMAT}. {remedy}"
        )
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else "no"
        if found != size:
            raise DataError(f"{path} has {found} bytes instead of {size}. {remedy}")
    return manifest


def _unknown(name: str) -> str:
    if name in _COMMANDS:
        return (
            f"The data set {name!r} is not prepared yet: its licence leaves that to you. Where "
            f"{_SOURCES[name]}:\n  {_COMMANDS[name]}\nFrom tables that have its order in a column "
            f"`position`:\n  python scripts/prepare_data.py tables --input FOLDER --order-column "
            f"position --name {name}"
        )
    known = [key for key, asset in assets.ASSETS.items() if asset.kind == "data"]
    prepared = names()
    near = difflib.get_close_matches(name.lower(), [*known, *prepared, *_COMMANDS], n=3)
    hint = f"Did you mean {some_of(near)}? " if near else ""
    return (
        f"No data set is called {name!r}. {hint}Known: {some_of(known)}; prepared in {root()}: "
        f"{some_of(prepared, limit=20) or 'none'}. Make one with `python scripts/prepare_data.py`, "
        "or set --data.interactions FILE for tables of your own."
    )


# ---- writing ------------------------------------------------------------------------------------


def check_free(name: str, folder: Path, overwrite: bool) -> None:
    """Refuses, before any work, a name or folder that the set cannot have.

    Raises:
        DataError: The name is an asset's or unusable, or something stands in the folder.
    """
    if not name or is_path(name) or name != name.strip() or not name.isprintable():
        raise DataError(
            f"--name {name!r} cannot be the name of a set: it becomes a folder and is given to "
            "--data.name. Give one without slashes, blanks at the ends or a leading dot, and "
            "--output FOLDER to choose where it stands."
        )
    if name in assets.ASSETS:
        raise DataError(
            f"--name {name!r} is the name of an asset, and --data.name {name} has to mean one of "
            f"the two. Choose another name. Assets: {some_of(assets.ASSETS)}."
        )
    if not folder.exists():
        return
    ours = folder.is_dir() and ((folder / MANIFEST).is_file() or not any(folder.iterdir()))
    if not ours:
        raise DataError(
            f"{folder} exists and is no prepared set; nothing of it is touched. Choose another "
            "--name or --output."
        )
    if not overwrite and any(folder.iterdir()):
        raise DataError(
            f"{folder} holds a prepared set already. Give --overwrite to replace it, or another "
            "--name or --output."
        )


def write(
    folder: Path, interactions: pl.DataFrame, items: pl.DataFrame, record: dict[str, Any]
) -> None:
    """Writes a prepared set beside its place and moves it there when it is whole.

    Args:
        folder: Where the set goes; a set that stands there is replaced.
        interactions: As described at the top of this file.
        items: Likewise.
        record: What prepared.json is to say beside format and files.

    Raises:
        DataError: The folder cannot be written, or the disk is full.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}.partial-", dir=folder.parent
        ) as work:
            target = Path(work) / "set"
            target.mkdir()
            interactions.write_parquet(target / INTERACTIONS)
            items.write_parquet(target / ITEMS)
            files = {
                name: {
                    "bytes": (target / name).stat().st_size,
                    "sha256": sha256(target / name),
                }
                for name in (INTERACTIONS, ITEMS)
            }
            manifest = {"format": FORMAT, **record, "files": files}
            (target / MANIFEST).write_text(
                json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            if folder.exists():
                # Renamed, not deleted: a process that has the old files open keeps them.
                os.replace(folder, Path(work) / "replaced")
            os.replace(target, folder)
    except OSError as error:
        raise DataError(
            f"The prepared set could not be written to {folder}: {error}. If that folder cannot "
            "be written or is full, choose another one with --output, or point COTRAIN_HOME "
            "elsewhere."
        ) from error
