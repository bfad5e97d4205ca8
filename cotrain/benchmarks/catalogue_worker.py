"""One point of `scripts/benchmark.py catalogue`: one catalogue size, one loss.

python -m cotrain.benchmarks.catalogue_worker JOB.json RESULT.json
"""

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from cotrain.benchmarks.processes import peak_memory_mb
from cotrain.benchmarks.training import Training, run_config
from cotrain.data.catalog import Catalog
from cotrain.data.interactions import InteractionData

WARMUP_STEPS = 2


def random_interactions(
    num_items: int, num_users: int, history_length: int, seed: int
) -> InteractionData:
    """Users with `history_length` positions to train on, items drawn by Zipf's law.

    Item ranks are shuffled into indices, so that popular items do not share memory pages.

    Args:
        num_items: Size of the catalogue; most items of a large one never occur, as in life.
        num_users: Users.
        history_length: Positions to train on; a history has three items more, for the last target
            and for validation and test.
        seed: Of the draw.
    """
    random = np.random.default_rng(seed)
    mass = np.cumsum(1 / np.arange(1, num_items + 1))
    length = history_length + 3
    ranks = np.searchsorted(mass, random.random(num_users * length) * mass[-1])
    indices = random.permutation(num_items).astype(np.int64) + 1
    ids = range(1, num_items + 1)
    return InteractionData(
        name="random",
        user_ids=list(range(num_users)),
        offsets=np.arange(num_users + 1, dtype=np.int64) * length,
        items=indices[ranks],
        # Titles are part of what a run holds in memory.
        catalog=Catalog([None, *ids], ["", *(f"item {i}" for i in ids)], [""] * (num_items + 1)),
        notes=[],
    )


def main(job_path: Path, result_path: Path) -> None:
    """Train a few steps, retrieve for one batch of users, write the result."""
    job = json.loads(job_path.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    steps = WARMUP_STEPS + job["steps"]
    data = random_interactions(
        job["items"], steps * job["batch_size"], job["history_length"], job["seed"]
    )
    config = run_config(
        job
        | {
            "max_length": job["history_length"],
            "dropout": 0.2,
            "learning_rate": 1e-3,
            "gbce_calibration": 0.75,
        }
    )
    before_mb = peak_memory_mb()
    training = Training(data, config)
    seconds = training.epoch(show=f"{job['items']:,} items, {job['loss']}").step_seconds
    trained_mb = peak_memory_mb()
    retrievals = []
    batches = training.top_items(job["k"], job["batch_size"])
    for _ in range(3):  # the first starts caches
        started = time.perf_counter()
        next(batches)
        retrievals.append(time.perf_counter() - started)
    result = {
        "step_s": statistics.median(seconds[WARMUP_STEPS:]),
        "step_seconds": seconds,
        "retrieval_s": min(retrievals[1:]),
        "before_mb": before_mb,
        "trained_mb": trained_mb,
        "peak_mb": peak_memory_mb(),
    }
    result_path.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
