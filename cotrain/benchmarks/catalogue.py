"""`scripts/benchmark.py catalogue`: what a step, a retrieval and the memory cost as items grow.

The interactions are random, with Zipf's popularity: only costs are measured here, and they do not
depend on who likes what. Every point is a process of its own, so that its peak memory is its own.
"""

import dataclasses
import os
import sys
from typing import Any

from cotrain.benchmarks import processes
from cotrain.benchmarks.settings import CatalogueSettings


def run(settings: CatalogueSettings) -> dict[str, Any]:
    """Measure every loss at every size, print a line each.

    Returns:
        Settings, machine and every point. A point whose process was killed has only its error.

    Raises:
        WorkerFailed: A point failed for another reason than a signal.
    """
    threads = settings.threads or os.cpu_count() or 1
    facts = processes.machine(threads)
    print(headline(settings, facts), flush=True)
    points = []
    for size in settings.sizes:
        for loss in settings.losses:
            updates = "all" if loss in ("ce", "chunked_ce") else settings.item_updates
            point = {"items": size, "loss": loss, "item_updates": updates}
            job = dataclasses.asdict(settings) | point | {"threads": threads}
            command = [sys.executable, "-m", "cotrain.benchmarks.catalogue_worker"]
            try:
                point |= processes.run_worker(command, job, threads)
            except processes.WorkerFailed as error:
                # Where memory ends is a result; the smaller points are worth keeping.
                if not error.killed:
                    raise
                point["error"] = str(error)
            points.append(point)
            print(point_line(point), flush=True)
    if warning := processes.busy_warning(facts):
        print(f"\n{warning}")
    return {
        "benchmark": "catalogue",
        "settings": dataclasses.asdict(settings),
        "machine": facts,
        "points": points,
    }


def headline(settings: CatalogueSettings, facts: dict[str, Any]) -> str:
    """What is measured, before the first point."""
    users = settings.batch_size
    return "\n".join(
        [
            "Random interactions of Zipf popularity: only cost is measured here, not quality.",
            f"Model: SASRec, {settings.num_layers} layers, width {settings.hidden_size}, "
            f"{settings.num_heads} heads, fp32",
            f"Step: {users} users with {settings.history_length} positions each, forward to "
            f"optimizer, median of {settings.steps}; {settings.num_negatives:,} negatives in the "
            "sampled losses",
            "Updates: item vectors that a step changes, all or (lazy) those that it looked up",
            f"Retrieval: the exact top {settings.k} of {users} users, history to list",
            "Memory: largest resident size of the process; `before`, of it: libraries and data",
            f"Machine: {facts['processor'] or 'unknown processor'}, {facts['cores']} cores, "
            f"{facts['threads']} threads",
            "",
            f"{'items':>10}  {'loss':<16}{'updates':<9}{'step s':>9}{'retrieval s':>13}"
            f"{'before MB':>11}{'peak MB':>9}",
        ]
    )


def point_line(point: dict[str, Any]) -> str:
    """One point, under the headline's columns."""
    head = f"{point['items']:>10,}  {point['loss']:<16}{point['item_updates']:<9}"
    if "error" in point:
        return f"{head}{point['error']}"
    return (
        f"{head}{point['step_s']:>9.3f}{point['retrieval_s']:>13.3f}"
        f"{point['before_mb']:>11,.0f}{point['peak_mb']:>9,.0f}"
    )
