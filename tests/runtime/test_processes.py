"""Everybody counts the same processes, or nothing starts."""

import pytest
import torch
from accelerate import Accelerator

from cotrain.errors import ConfigError
from cotrain.runtime.processes import check_processes, make_accelerator

LAUNCHERS = ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"]


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_one_process_that_nobody_launched_is_fine(accelerator: Accelerator):
    check_processes(accelerator)
    assert make_accelerator(cpu=True).num_processes == 1


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_that_started_more_is_believed(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, name: str
):
    """Regression: each of two processes took itself for the only one and trained alone."""
    monkeypatch.setenv(name, "1")
    check_processes(accelerator)
    monkeypatch.setenv(name, "2")
    with pytest.raises(ConfigError) as raised:
        check_processes(accelerator)
    told = f"Accelerate 1, torch.distributed 1, the launcher ({name}) 2"
    assert told in str(raised.value)
    assert "accelerate_configs/" in str(raised.value)


def test_one_that_was_started_alone_of_several_stops(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
):
    """Regression: `accelerate launch --cpu --num_processes 2` starts one process and says nothing
    of it."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    check_processes(accelerator)  # not by accelerate launch
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(ConfigError, match=r"cpu_2_processes\.yaml"):
        check_processes(accelerator)


def test_what_is_no_number_is_passed_over(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "")
    check_processes(accelerator)


def test_deepspeed_that_is_asked_for_and_not_used_is_no_silent_ddp(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="use_cpu: false"):
        check_processes(accelerator)


def test_deepspeed_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("cotrain.runtime.processes.is_deepspeed_available", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'cotrain\[deepspeed\]'"):
        make_accelerator()


def test_processes_are_counted_where_they_met(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
):
    """Accelerate was made before the others were found, so to say."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(ConfigError, match=r"Accelerate 1, torch\.distributed 4"):
        check_processes(accelerator)
