"""A checkpoint is whole, verified and free of code, or it does not count."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cotrain.errors import CheckpointError
from cotrain.files import sha256
from cotrain.runtime.checkpoint import load_latest, save, steps

REPOSITORY = Path(__file__).parents[2]


def weights_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "student": {"embedding": torch.full((3, 4), float(step)), "count": torch.tensor(step)},
        "projector": {"weight": torch.arange(6.0).view(2, 3).T * step},  # not contiguous
    }


def write(run: Path, *numbers: int, keep: int = 10) -> None:
    for step in numbers:
        save(run, step, weights_of(step), {"step": step}, keep)


def leftovers(run: Path) -> list[str]:
    return [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


# ---- what comes back ----------------------------------------------------------------------------


def test_weights_and_state_come_back(tmp_path):
    state: dict[str, Any] = {
        "step": 7,
        "seconds": 1.5,
        "name": "τ",
        "nothing": None,
        "flags": [True, False],
        "optimizer": {
            "state": {0: {"exp_avg": torch.randn(5), "step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}],
        },
        "integers": torch.arange(4),
    }
    weights = weights_of(7)
    weights["half"] = {"x": torch.randn(3).bfloat16()}
    weights["trained"] = {"x": torch.randn(3, requires_grad=True)}
    folder = save(tmp_path, 7, weights, state, keep=2)
    assert folder == tmp_path / "checkpoints" / "step_7"
    loaded, loaded_state = load_latest(tmp_path)
    assert loaded.keys() == weights.keys()
    for name, tensors in weights.items():
        assert loaded[name].keys() == tensors.keys()
        for key, value in tensors.items():
            assert loaded[name][key].dtype == value.dtype
            assert torch.equal(loaded[name][key], value)
            assert not loaded[name][key].requires_grad
    moments = loaded_state["optimizer"]["state"][0]
    for name, value in state["optimizer"]["state"].pop(0).items():
        assert torch.equal(moments[name], value)
    assert torch.equal(loaded_state.pop("integers"), state.pop("integers"))
    loaded_state["optimizer"]["state"].clear()
    assert loaded_state == state


def test_optimizer_state_comes_back(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    save(tmp_path, 1, {"student": model.state_dict()}, {"o": optimizer.state_dict()}, keep=1)
    weights, state = load_latest(tmp_path)
    twin = torch.nn.Linear(3, 2)
    twin.load_state_dict(weights["student"])
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=0.5)
    twin_optimizer.load_state_dict(state["o"])
    batch = torch.randn(5, 3)
    for one, its in ((model, optimizer), (twin, twin_optimizer)):
        its.zero_grad()
        one(batch).square().sum().backward()
        its.step()
    assert torch.equal(model.weight, twin.weight)


def test_the_latest_is_the_largest_number(tmp_path):
    write(tmp_path, 9, 10, 100, 11)
    assert steps(tmp_path) == [9, 10, 11, 100]
    assert load_latest(tmp_path)[1] == {"step": 100}


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_only_the_last_ones_are_kept(tmp_path, keep):
    write(tmp_path, 1, 2, 3, 20, keep=keep)
    assert steps(tmp_path) == [1, 2, 3, 20][-keep:]
    assert len(list((tmp_path / "checkpoints").iterdir())) == min(keep, 4)


def test_same_step_again_replaces_it(tmp_path):
    write(tmp_path, 5)
    save(tmp_path, 5, {"other": {"x": torch.ones(1)}}, {"again": True}, keep=1)
    weights, state = load_latest(tmp_path)
    assert (list(weights), state) == (["other"], {"again": True})


def test_no_checkpoint(tmp_path):
    for run in (tmp_path, tmp_path / "nowhere"):
        assert steps(run) == []
        with pytest.raises(CheckpointError, match=r"holds no checkpoint to resume from"):
            load_latest(run)


def test_state_is_read_without_running_code(tmp_path):
    write(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "step_1"
    assert torch.load(folder / "state.pt", weights_only=True) == {"step": 1}

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    save(tmp_path, 2, weights_of(2), {"payload": Payload()}, keep=2)
    with pytest.raises(CheckpointError, match=r"step_2 cannot be read"):
        load_latest(tmp_path)
    assert not (tmp_path / "ran").exists()


# ---- what must not count ------------------------------------------------------------------------


def test_partial_folder_never_counts_and_is_removed(tmp_path):
    write(tmp_path, 3)
    partial = tmp_path / "checkpoints" / ".step_4.123.tmp"
    partial.mkdir()
    (partial / "student.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoints" / "step_5.old").mkdir()
    assert steps(tmp_path) == [3]
    assert load_latest(tmp_path)[1] == {"step": 3}
    write(tmp_path, 6)
    assert leftovers(tmp_path) == []
    assert steps(tmp_path) == [3, 6]


def test_killed_while_writing(tmp_path):
    """SIGKILL when every file is written and only the renaming is left."""
    write(tmp_path, 1)
    code = """
import os, signal, sys
from pathlib import Path
import torch
from cotrain.runtime import checkpoint
checkpoint._flush = lambda path: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save(Path(sys.argv[1]), 2, {"student": {"x": torch.ones(9)}}, {"step": 2}, 2)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(leftovers(tmp_path)) == 1
    assert load_latest(tmp_path)[1] == {"step": 1}
    write(tmp_path, 2)
    assert leftovers(tmp_path) == []
    assert load_latest(tmp_path)[1] == {"step": 2}


FILES = ["manifest.json", "projector.safetensors", "state.pt", "student.safetensors"]


@pytest.mark.parametrize("damage", ["one byte", "cut off", "empty", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_named(tmp_path, name, damage):
    write(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints" / "step_2"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    path = folder / name
    data = path.read_bytes()
    if damage == "one byte":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else data[:-1])
    with pytest.raises(CheckpointError) as caught:
        load_latest(tmp_path)
    message = str(caught.value)
    assert str(folder) in message
    assert "elete" in message
    if name != "manifest.json":
        assert name in message
    # What the message advises works.
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    assert load_latest(tmp_path)[1] == {"step": 1}


def test_damaged_message_tells_what_is_left(tmp_path):
    write(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "step_2" / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"changed or cut off .*\(state\.pt\).*: \[1\]"):
        load_latest(tmp_path)
    write(tmp_path, 3, keep=1)
    (tmp_path / "checkpoints" / "step_3" / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"none is left"):
        load_latest(tmp_path)


def test_manifest_covers_every_file(tmp_path):
    write(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "step_1"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted([*manifest, "manifest.json"]) == FILES
    assert manifest["state.pt"] == sha256(folder / "state.pt")


# ---- a disk that refuses ------------------------------------------------------------------------


@contextlib.contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """Every file that grows beyond `size` bytes fails, as it does when the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("large", ["weights", "state"])
def test_full_disk_leaves_the_earlier_checkpoints(tmp_path, large):
    """Neither safetensors nor torch.save raises OSError then, and both got through."""
    write(tmp_path, 1)
    block = {"x": torch.zeros(100_000)}
    weights = {"student": block if large == "weights" else {"x": torch.zeros(1)}}
    state = block if large == "state" else {}
    with disk_full_after(20_000), pytest.raises(CheckpointError) as caught:
        save(tmp_path, 2, weights, state, keep=1)
    message = str(caught.value)
    assert f"Cannot write checkpoint {tmp_path / 'checkpoints' / 'step_2'}" in message
    assert "--resume" in message
    assert leftovers(tmp_path) == []
    assert load_latest(tmp_path)[1] == {"step": 1}
    save(tmp_path, 2, weights, {"step": 2}, keep=1)
    assert steps(tmp_path) == [2]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "checkpoints").write_text("a file stands here")
    with pytest.raises(CheckpointError, match=r"Cannot write checkpoint .*step_1"):
        write(tmp_path, 1)
    assert (tmp_path / "checkpoints").read_text() == "a file stands here"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_may_not_be_written(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "checkpoints").chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match=r"Permission denied"):
            write(tmp_path, 2)
        assert load_latest(tmp_path)[1] == {"step": 1}
    finally:
        (tmp_path / "checkpoints").chmod(0o700)
