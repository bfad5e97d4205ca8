"""`scripts/benchmark.py processes`: the same short run by one process and by several that share the
same cores, or by one GPU and by several."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from cotrain.benchmarks.processes import busy_warning, launch_command, machine, run_worker
from cotrain.benchmarks.settings import ProcessesSettings


def run(settings: ProcessesSettings, repository: Path, recipe: Path) -> dict[str, Any]:
    """Measure both sides, print them, return everything.

    Args:
        settings: What is run, and by how many.
        repository: Has accelerate_configs/.
        recipe: Settings of the run that these override.

    Raises:
        WorkerFailed: A side ended without a result.
    """
    on_gpu = torch.cuda.is_available()
    cores = settings.threads or torch.get_num_threads()
    facts = machine(cores)
    sides = []
    for count in (1, settings.processes):
        threads = cores if on_gpu else max(1, cores // count)
        job = dataclasses.asdict(settings) | {"threads": threads, "recipe": str(recipe)}
        command = launch_command("scaling_worker", count, on_gpu, repository)
        sides.append(run_worker(command, job, threads))
    print(table(sides))
    if warning := busy_warning(facts):
        print(f"\n{warning}")
    return {"settings": dataclasses.asdict(settings), "machine": facts, "sides": sides}


def table(sides: list[dict[str, Any]]) -> str:
    """Both sides, and how much faster the second is."""
    lines = ["| processes | threads each | s a step | asked rows/s |", "|---|---|---|---|"]
    for side in sides:
        a_step = side["seconds"] / side["steps"]
        rate = side["rows"] / side["seconds"]
        lines.append(f"| {side['processes']} | {side['threads']} | {a_step:.3f} | {rate:.2f} |")
    one, many = (side["seconds"] / side["steps"] for side in sides)
    lines.append(
        f"\n{sides[1]['processes']} processes take {one / many:.2f} times as many steps in the "
        f"same time, over {sides[0]['steps']} steps that ask the teacher."
    )
    return "\n".join(lines)
