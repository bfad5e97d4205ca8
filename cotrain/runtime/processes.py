"""The processes of a run: an accelerator for those that were launched, and a check that everybody
counts the same number of them.

Where they do not, each process would train a run of its own and nobody would notice. On a CPU that
is what DeepSpeed does unless it is told of the CPU, and Accelerate of gloo; both are done here.
"""

import importlib
import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, is_deepspeed_available
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from cotrain.errors import ConfigError

# Where launchers say how many processes they started: torchrun and accelerate launch, and MPI.
_LAUNCHERS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def make_accelerator(**options: Any) -> Accelerator:
    """The accelerator that the launcher asks for.

    Args:
        options: Passed on to `Accelerator`.

    Raises:
        ConfigError: DeepSpeed is asked for and missing, or processes do not find each other.
    """
    handlers = []
    if _asks_for_deepspeed():
        if not is_deepspeed_available():
            raise ConfigError(
                "The accelerate file asks for DeepSpeed, which is not installed: pip install "
                "'cotrain[deepspeed]', or launch with accelerate_configs/multi_gpu.yaml."
            )
        if not torch.cuda.is_available():
            _use_deepspeed_on_cpu()
            handlers.append(InitProcessGroupKwargs(backend="gloo"))
    elif os.environ.get("LOCAL_RANK") and not torch.cuda.is_available():
        # Else Accelerate takes each of several processes without a GPU for the only one.
        options |= {"cpu": True}
    accelerator = Accelerator(kwargs_handlers=handlers, **options)
    # Else transformers would shard every language model that is loaded from here on as ZeRO-3 does,
    # and a teacher in 4 bits cannot be.
    unset_hf_deepspeed_config()
    check_processes(accelerator)
    return accelerator


def check_processes(accelerator: Accelerator) -> None:
    """Launcher, PyTorch, DeepSpeed and Accelerate count the same processes.

    Raises:
        ConfigError: They do not, or DeepSpeed was asked for and is not used.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    counts = {
        "Accelerate": accelerator.num_processes,
        "torch.distributed": torch.distributed.get_world_size() if distributed else 1,
    }
    for name in _LAUNCHERS:
        if os.environ.get(name, "").isdecimal():
            counts[f"the launcher ({name})"] = int(os.environ[name])
    if accelerator.distributed_type == "DEEPSPEED":
        comm = importlib.import_module("deepspeed.comm")
        counts["DeepSpeed"] = comm.get_world_size() if comm.is_initialized() else 1
    if len(counts) == 2 and accelerator.num_processes == 1 and _asks_for_several():
        raise ConfigError(
            "Several processes were asked for and this one was started alone: accelerate launch "
            "does that on a CPU, except through mpirun. Launch with "
            "accelerate_configs/cpu_2_processes.yaml, or unset MASTER_ADDR and MASTER_PORT if they "
            "are left over from something else."
        )
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{who} {count}" for who, count in counts.items())
        raise ConfigError(
            f"The processes of this run do not find each other: they are counted as {told}. Each "
            "would train alone. Launch with one of accelerate_configs/ that fits this machine (on "
            "a CPU cpu_2_processes.yaml or deepspeed_cpu.yaml), or unset the variable if it is "
            "left over from something else."
        )
    if _asks_for_deepspeed() and accelerator.distributed_type != "DEEPSPEED":
        raise ConfigError(
            f"The accelerate file asks for DeepSpeed, but Accelerate chose "
            f"{accelerator.distributed_type}. Set use_cpu: false in it, also on a CPU, as "
            "accelerate_configs/deepspeed_cpu.yaml does."
        )


def _asks_for_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def _asks_for_several() -> bool:
    """Whether accelerate launch left what several processes find each other by."""
    return {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def _use_deepspeed_on_cpu() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Else the first start compiles a collective in C++ for minutes, and a process that is killed
    # meanwhile leaves a lock for which all later ones wait for ever.
    vars(importlib.import_module("deepspeed.ops"))["__compatible_ops__"] = {}
