"""`scripts/benchmark.py sharding`: what a process holds of a large student, whole and sharded.

Random interactions, sampled softmax: only costs are measured. Every point is launched as a user
would launch it, with the files of accelerate_configs/ and ds_configs/.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from cotrain.benchmarks.processes import busy_warning, launch_command, machine, run_worker
from cotrain.benchmarks.settings import ShardingSettings

_HEAD = "| way | processes | s a step | MB of a process | bytes a weight |\n|---|---|---|---|---|"


def run(settings: ShardingSettings, repository: Path) -> dict[str, Any]:
    """Measure every way by every number of processes, print a line each.

    Args:
        settings: What is measured.
        repository: Has accelerate_configs/ and ds_configs/.

    Raises:
        WorkerFailed: A point ended without a result.
    """
    on_gpu = torch.cuda.is_available()
    cores = settings.threads or torch.get_num_threads()
    facts = machine(cores)
    print(_HEAD, flush=True)
    points = []
    for way in settings.ways:
        for count in settings.processes:
            threads = cores if on_gpu else max(1, cores // count)
            updates = "lazy" if way.endswith("lazy") else "all"
            job = dataclasses.asdict(settings) | {"threads": threads, "item_updates": updates}
            stage = int(way.removeprefix("zero")) if way.startswith("zero") else 0
            command = launch_command("sharding_worker", count, on_gpu, repository, stage)
            points.append({"way": way} | run_worker(command, job, threads))
            print(line(points[-1]), flush=True)
    if warning := busy_warning(facts):
        print(f"\n{warning}")
    return {"settings": dataclasses.asdict(settings), "machine": facts, "points": points}


def line(point: dict[str, Any]) -> str:
    """One point as a row of the table."""
    a_weight = point["peak_bytes"] / point["weights"]
    return (
        f"| {point['way']} | {point['processes']} | {point['step_s']:.3f} | "
        f"{point['peak_bytes'] / 1e6:,.0f} | {a_weight:.1f} |"
    )
