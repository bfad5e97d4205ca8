"""The folder of a comparison: whose it is, what it was made with, and how far its runs are."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml

from cotrain import config as configuration
from cotrain.comparison.arms import Plan, PlannedRun
from cotrain.config import Config
from cotrain.errors import ConfigError, some_of
from cotrain.files import write_whole
from cotrain.runtime import checkpoint

MEMORY = "comparison.yaml"
RESULT = "comparison.json"
# How runs share their warm-up, and with it all that differs between runs of one comparison.
_SHARING = ("train.warm_start", "train.keep_warm_up")
_OF_A_RUN = ("seed", "output_dir", *_SHARING)
Stage = Literal["new", "begun", "interrupted", "finished"]


@contextmanager
def locked(output: Path) -> Iterator[int]:
    """Nobody else works in the folder meanwhile; gives the lock's file descriptor.

    A run that inherits the descriptor holds the lock as long as it lives, even where whoever
    started it was killed: two runs in one folder would destroy each other's files.

    Raises:
        ConfigError: Somebody does.
    """
    path = output / ".lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{output} is in use: another comparison, or a run that a killed one left behind, "
                "is still at work there. Wait for it or end it, or choose another --output."
            ) from error
        yield file.fileno()


def remember(plan: Plan) -> list[str]:
    """Write what a new comparison is made with, or make sure that an old one is gone on with.

    More arms and more seeds may be added to it, and are noted where results had been seen.

    Returns:
        What was added after results had been seen, in words.

    Raises:
        ConfigError: The folder holds something else, or was made with other settings.
    """
    output, path = plan.output, plan.output / MEMORY
    settings = _comparable(plan.base)
    memory: dict[str, Any] = {
        "settings": settings,
        "arms": {name: plan.settings[name] for name in plan.arms},
        "seeds": list(plan.seeds),
        "added": [],
    }
    if path.is_file():
        memory["added"] = _added(_read(path), memory, path)
        if not (output / RESULT).exists():
            memory["added"] = _read(path)["added"]
    elif any(not entry.name.startswith(".") for entry in output.iterdir()):
        raise ConfigError(
            f"--output {output} holds other files and no {MEMORY}; choose a folder that is empty "
            "or not yet there."
        )
    write_whole(path, yaml.safe_dump(memory, sort_keys=False))
    return memory["added"]


def _read(path: Path) -> dict[str, Any]:
    try:
        memory = yaml.safe_load(path.read_text(encoding="utf-8"))
        if {"settings", "arms", "seeds", "added"} <= memory.keys():
            return memory
        raise ValueError("something is missing in it")
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} cannot be read as what a comparison was made with: {error}. Choose another "
            "--output."
        ) from error


def _added(before: dict[str, Any], now: dict[str, Any], path: Path) -> list[str]:
    """What `now` adds, after what was added before.

    Raises:
        ConfigError: It does not only add.
    """
    differing = _differing(before["settings"], now["settings"])
    differing += [
        f"{name} of arm {arm}: {before['arms'][arm].get(name)!r} there, {value!r} now"
        for arm, settings in now["arms"].items()
        if arm in before["arms"]
        for name, value in settings.items()
        if before["arms"][arm].get(name) != value
    ]
    for what in ("arms", "seeds"):
        if gone := [one for one in before[what] if one not in now[what]]:
            differing.append(f"{what}: {some_of(gone)} there, not now")
    if differing:
        listed = "\n".join(f"  - {line}" for line in differing)
        raise ConfigError(
            f"{path} was made with other settings, and a comparison goes on only with its own:\n"
            f"{listed}\nSet them as they were, or choose another --output."
        )
    new = [f"arm {arm}" for arm in now["arms"] if arm not in before["arms"]]
    new += [f"seed {seed}" for seed in now["seeds"] if seed not in before["seeds"]]
    return [*before["added"], *new]


def _comparable(config: Config) -> dict[str, Any]:
    """Settings by dotted name, without those that differ between runs of one comparison."""
    values = configuration.flat(configuration.to_dict(config))
    return {name: value for name, value in values.items() if name not in _OF_A_RUN}


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    # A setting that came with a later version had its default before.
    defaults = {leaf.name: leaf.field.default for leaf in configuration.leaves(Config)}
    return [
        f"{name}: {before.get(name, defaults[name])!r} there, {value!r} now"
        for name, value in now.items()
        if before.get(name, defaults[name]) != value
    ]


def stage(run: PlannedRun) -> Stage:
    """How far a run is: `begun` is one without anything to go on from.

    Raises:
        ConfigError: The run folder was made with other settings.
    """
    saved = run.folder / "config.yaml"
    if not saved.is_file():
        return "begun" if run.folder.exists() else "new"
    _require_settings(run, saved)
    if (run.folder / "report.json").is_file():
        return "finished"
    return "interrupted" if checkpoint.steps(run.folder) else "begun"


def _require_settings(run: PlannedRun, saved: Path) -> None:
    # Parsing takes seconds, and a file that was written for these very settings needs none.
    try:
        written = configuration.flat(yaml.safe_load(saved.read_text(encoding="utf-8")))
    except (ValueError, AttributeError, yaml.YAMLError):
        written = {}  # parsing tells what is wrong with it
    own = configuration.flat(configuration.to_dict(run.config))
    shared = dict.fromkeys(_SHARING)
    if written | shared == own | shared:
        return
    found = configuration.parse(["--config", str(saved)])
    differing = _differing(_comparable(found), _comparable(run.config))
    if found.seed != run.seed:
        differing.append(f"seed: {found.seed} there, {run.seed} now")
    if differing:
        listed = "\n".join(f"  - {line}" for line in differing)
        raise ConfigError(
            f"{run.folder} holds a run with other settings:\n{listed}\nMove it away, or choose "
            "another --output."
        )
