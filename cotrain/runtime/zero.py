"""What a model whose training DeepSpeed shards (ZeRO) needs beyond `accelerator.prepare`.

Each process holds a share of the optimizer state, in ZeRO-3 of the weights too. Shares are saved
and restored as they are: a run is resumed by as many processes as wrote its checkpoint.
"""

import importlib
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cotrain.errors import ConfigError


def stage(accelerator: Accelerator) -> int:
    """1 to 3 under DeepSpeed, else 0."""
    if accelerator.distributed_type != "DEEPSPEED":
        return 0
    plugin: Any = accelerator.state.deepspeed_plugin
    return int(plugin.zero_stage)


def fill_in(accelerator: Accelerator, rows: int, max_grad_norm: float) -> None:
    """Say what DeepSpeed's settings leave to the run (`auto`).

    Args:
        accelerator: Of a run under DeepSpeed.
        rows: Of one forward pass of one process.
        max_grad_norm: Gradient norm is clipped to this.

    Raises:
        ConfigError: Its settings ask for what this package does not do.
    """
    plugin: Any = accelerator.state.deepspeed_plugin
    settings = plugin.deepspeed_config
    sharding = settings.get("zero_optimization", {})
    if not 1 <= stage(accelerator) <= 3:
        raise ConfigError(
            f"zero_optimization.stage is {stage(accelerator)}; expected 1, 2 or 3. Without "
            "sharding launch with accelerate_configs/multi_gpu.yaml."
        )
    half = [name for name in ("fp16", "bf16") if settings.get(name, {}).get("enabled") is True]
    if half or accelerator.mixed_precision != "no":
        raise ConfigError(
            f"Mixed precision ({', '.join(half) or accelerator.mixed_precision}) under DeepSpeed: "
            "the student is small and is sharded in fp32 only. Leave mixed_precision and the "
            "fp16 and bf16 blocks out, or launch with accelerate_configs/multi_gpu.yaml."
        )
    if sharding.get("offload_optimizer", {}).get("device") == "nvme" or "offload_param" in sharding:
        raise ConfigError(
            "zero_optimization offloads weights, or anything to nvme; expected at most "
            "offload_optimizer to cpu, as in ds_configs/zero2_offload.json."
        )
    # One step is one batch: its parts are counted by the loop, not by DeepSpeed.
    settings["train_micro_batch_size_per_gpu"] = rows
    settings["gradient_accumulation_steps"] = 1
    settings["gradient_clipping"] = max_grad_norm


def let_item_embedding_be_read(engine: Any, weight: nn.Parameter) -> None:
    """In ZeRO-3 keep a weight together for the whole forward, since the loss reads it as well."""
    if hasattr(weight, "ds_id"):
        _deepspeed().zero.register_external_parameter(engine.module, weight)


@torch.no_grad()
def copy_weights(engine: Any, target: nn.Module) -> None:
    """Write an engine's weights into a plain model of the same shape; a collective in ZeRO-3."""
    sources = list(engine.module.parameters())
    with _deepspeed().zero.GatheredParameters(sources):
        for source, copy in zip(sources, target.parameters(), strict=True):
            copy.copy_(source)


@torch.no_grad()
def load_weights(engine: Any, source: nn.Module) -> None:
    """Undo `copy_weights`; a collective in ZeRO-3, where the main process's weights count."""
    targets = list(engine.module.parameters())
    with _deepspeed().zero.GatheredParameters(targets, modifier_rank=0):
        for target, weight in zip(targets, source.parameters(), strict=True):
            target.data.copy_(weight)


def shard_state(engine: Any) -> list[dict[str, Tensor]]:
    """This process's share: of each partition the fp32 weights and, after a step, the moments."""
    moments = engine.optimizer.optimizer.state
    return [
        {"weights": flat.detach().cpu().clone()}
        | {name: value.cpu().clone() for name, value in moments.get(flat, {}).items()}
        for flat in _partitions(engine)
    ]


@torch.no_grad()
def load_shard_state(engine: Any, saved: list[dict[str, Tensor]]) -> None:
    """Undo `shard_state`, in an engine of the same shape and number of processes."""
    moments = engine.optimizer.optimizer.state
    for flat, share in zip(_partitions(engine), saved, strict=True):
        flat.data.copy_(share["weights"])
        found = {k: v.to(flat.device).clone() for k, v in share.items() if k != "weights"}
        if found:
            moments[flat] = found


def _partitions(engine: Any) -> list[Tensor]:
    optimizer = engine.optimizer
    name = "fp32_partitioned_groups_flat"
    if not hasattr(optimizer, name):  # ZeRO-1 and 2
        name = "single_partition_of_fp32_groups"
    return getattr(optimizer, name)


def _deepspeed() -> Any:
    """The package, which need not be installed."""
    return importlib.import_module("deepspeed")
