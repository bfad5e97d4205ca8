"""Random state of a process: seeding, saving, and playing it back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python, NumPy and PyTorch. Processes differ, so that their dropout does."""
    seed = seed + 100_003 * rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def torch_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of PyTorch's generators that dropout on `device` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_torch_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Undo: put `torch_state` back."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def replayed(state: dict[str, torch.Tensor], device: torch.device) -> Iterator[None]:
    """Inside, random numbers are drawn again from `state`; outside, nothing was drawn."""
    outside = torch_state(device)
    set_torch_state(state, device)
    try:
        yield
    finally:
        set_torch_state(outside, device)


def all_states(device: torch.device) -> dict[str, Any]:
    """Every generator of this process, for a checkpoint."""
    version, keys, gauss = random.getstate()
    name, numpy_keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(keys), gauss],
        # As a tensor: checkpoints are read without unpickling code.
        "numpy": [str(name), torch.from_numpy(np.asarray(numpy_keys).astype(np.int64)),
                  int(position), int(has_gauss), float(cached)],
        "torch": torch_state(device),
    }  # fmt: skip


def set_all_states(state: dict[str, Any], device: torch.device) -> None:
    """Undo: put `all_states` back."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numpy_keys, *rest = state["numpy"]
    np.random.set_state((name, numpy_keys.numpy().astype(np.uint32), *rest))
    set_torch_state(state["torch"], device)
