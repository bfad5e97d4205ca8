"""The warm-up of one run as the beginning of others, which differ in what comes after it.

Whoever teaches, the student starts, drops out and learns from the data alike until then: what a run
takes over is, bit for bit, what it would have come to by itself.
"""

import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cotrain import config as configuration
from cotrain.config import Config
from cotrain.distill.state import CotrainState, save_checkpoint, take_over
from cotrain.errors import CheckpointError, ConfigError
from cotrain.runtime import checkpoint

FOLDER = "warm_up"
# Settings that a warm-up does not know of, by their beginnings.
_LATER = (
    "teacher.", "distill.", "query.", "tuning.", "eval.", "tracking.", "output_dir",
    "train.rounds", "train.control", "train.checkpoint_every_steps", "train.keep_checkpoints",
    "train.warm_start", "train.keep_warm_up",
)  # fmt: skip


def decides(config: Config) -> dict[str, Any]:
    """The settings that a warm-up depends on, by dotted name."""
    flat = configuration.flat(configuration.to_dict(config))
    # As many counters as candidates.
    found = {"teacher.num_candidates": flat["teacher.num_candidates"]}
    found |= {name: value for name, value in flat.items() if not name.startswith(_LATER)}
    if config.student.item_text == "teacher":
        found |= {name: value for name, value in flat.items() if name.startswith("teacher.")}
    # The head that explains learns from the first step on, in one optimizer with the projector.
    found["distill.rationales"] = config.distill.rationales
    if config.distill.rationales is not None:
        found["distill.rdr_targets"] = config.distill.rdr_targets
        found["has a teacher"] = config.has_teacher
    return found


def require(config: Config) -> None:
    """Make sure that the run which `train.warm_start` names has the warm-up of these settings.

    Raises:
        ConfigError: It has none, or another one.
    """
    source = Path(str(config.train.warm_start))
    if not checkpoint.steps(source / FOLDER):
        raise ConfigError(
            f"train.warm_start {source} keeps no warm-up; expected the folder of a run with "
            "train.keep_warm_up that has come to the end of it."
        )
    theirs = decides(configuration.parse(["--config", str(source / "config.yaml")]))
    differing = [
        f"{name}: {theirs.get(name)!r} there, {value!r} here"
        for name, value in decides(config).items()
        if theirs.get(name) != value
    ]
    if differing:
        listed = "\n".join(f"  - {line}" for line in differing)
        raise ConfigError(
            f"train.warm_start {source} has a warm-up of other settings:\n{listed}\nSet them "
            "alike, or leave train.warm_start none."
        )


def keep(
    state: CotrainState, folder: Path, config: Config, accelerator: Accelerator, log_bytes: int
) -> None:
    """Write the state at the end of the warm-up; a collective. Arguments and errors as for
    `save_checkpoint`."""
    save_checkpoint(state, folder / FOLDER, config, accelerator, log_bytes)


def start(state: CotrainState, folder: Path, config: Config, accelerator: Accelerator) -> int:
    """Bring a fresh state to the end of the warm-up of another run, and begin metrics.jsonl with
    what that run had logged of it.

    Returns:
        Length of metrics.jsonl.

    Raises:
        CheckpointError: The warm-up or its log cannot be read, or is of other processes.
    """
    source = Path(str(config.train.warm_start))
    log_bytes = take_over(state, source / FOLDER, accelerator)
    if accelerator.is_main_process:
        with (source / "metrics.jsonl").open("rb") as file:
            logged = file.read(log_bytes)
        if len(logged) < log_bytes:
            raise CheckpointError(
                f"{source}/metrics.jsonl has {len(logged)} bytes, and had {log_bytes} at the end "
                "of the warm-up. Bring the file back, or leave train.warm_start none."
            )
        with (folder / "metrics.jsonl").open("wb") as file:
            file.write(logged)
            file.flush()
            os.fsync(file.fileno())
    return log_bytes
