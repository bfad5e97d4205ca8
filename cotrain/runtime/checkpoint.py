"""Checkpoints on disk: whole or absent, verified when read.

A checkpoint is the folder `checkpoints/step_N/` of a run: `*.safetensors` with weights, `state.pt`
with everything else, and `manifest.json` with the sha256 of each. It is written under a temporary
name, flushed, and renamed, so a folder of that name is complete.
"""

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cotrain.errors import CheckpointError
from cotrain.files import sha256

_NAME = re.compile(r"step_(\d+)")


def save(
    run: Path, step: int, weights: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Write a checkpoint and drop older ones.

    Args:
        run: Run folder.
        step: Optimizer steps done.
        weights: State dict of each model, by name.
        state: Tensors, numbers, strings, lists and dicts; nothing that needs code to be read.
        keep: Latest checkpoints that stay.

    Raises:
        CheckpointError: The disk refused; what was there before is untouched.
    """
    final = run / "checkpoints" / f"step_{step}"
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        for leftover in final.parent.glob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, tensors in weights.items():
            # Tied tensors may not share memory in safetensors; contiguous copies on the CPU.
            copies = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(copies, temporary / f"{name}.safetensors")
        torch.save(state, temporary / "state.pt")
        manifest = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in [*temporary.iterdir(), temporary]:
            _flush(path)
        replaced = temporary.with_suffix(".replaced.tmp")
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        _flush(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    # A full disk is an OSError to Python, and something else to each library that writes.
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"Cannot write checkpoint {final}: {error}. Earlier checkpoints are untouched; free "
            "space or permissions there, then go on with --resume."
        ) from error
    for old in steps(run)[:-keep]:
        shutil.rmtree(run / "checkpoints" / f"step_{old}", ignore_errors=True)
    return final


def steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending."""
    folders = [path for path in (run / "checkpoints").glob("step_*") if path.is_dir()]
    matches = [_NAME.fullmatch(path.name) for path in folders]
    return sorted(int(match[1]) for match in matches if match)


def load_latest(run: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Weights and state of a run's latest checkpoint.

    Raises:
        CheckpointError: There is none, or its files are not the ones that were written.
    """
    found = steps(run)
    if not found:
        raise CheckpointError(
            f"{run} holds no checkpoint to resume from (expected {run}/checkpoints/step_N). "
            "Start it anew with another output_dir."
        )
    folder = run / "checkpoints" / f"step_{found[-1]}"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        wrong = [name for name, digest in manifest.items() if sha256(folder / name) != digest]
        if wrong:
            raise CheckpointError(
                f"{folder} was changed or cut off after it was written ({', '.join(wrong)}). "
                f"Delete that folder to resume from the one before: {found[:-1] or 'none is left'}."
            )
        weights = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{folder} cannot be read: {error}. Delete it to resume from an earlier one."
        ) from error
    return weights, state


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
