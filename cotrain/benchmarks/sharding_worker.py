"""One point of `scripts/benchmark.py sharding`: some steps of one large student.

accelerate launch -m cotrain.benchmarks.sharding_worker JOB.json RESULT.json
"""

import json
import statistics
import sys
from pathlib import Path

import torch

from cotrain.benchmarks.catalogue_worker import WARMUP_STEPS, random_interactions
from cotrain.benchmarks.processes import peak_memory_mb, reset_peak_memory
from cotrain.benchmarks.training import Training, run_config
from cotrain.runtime.processes import make_accelerator
from cotrain.runtime.tracking import gather

_HISTORY = 20


def main(job_path: Path, result_path: Path) -> None:
    """Train some steps; the main process writes the largest peak of all processes."""
    job = json.loads(job_path.read_text(encoding="utf-8"))
    accelerator = make_accelerator()
    torch.set_num_threads(job["threads"])
    steps = WARMUP_STEPS + job["steps"]
    data = random_interactions(job["num_items"], steps * job["batch_size"], _HISTORY, job["seed"])
    same = {"num_layers": 2, "max_length": _HISTORY, "dropout": 0.2, "learning_rate": 1e-3}
    same |= {"loss": "sampled_softmax", "gbce_calibration": 0.75}
    config = run_config(job | same)
    on_gpu = accelerator.device.type == "cuda"
    reset_peak_memory()
    before = 0.0 if on_gpu else peak_memory_mb() * 1e6
    training = Training(data, config, accelerator)
    show = "training" if accelerator.is_main_process else None
    seconds = training.epoch(show=show).step_seconds
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory_mb() * 1e6 - before
    peaks = gather(float(peak))
    if accelerator.is_main_process:
        result = {
            "processes": accelerator.num_processes,
            "step_s": statistics.median(seconds[WARMUP_STEPS:]),
            "peak_bytes": max(peaks),
            "peaks": peaks,
            "weights": sum(weight.numel() for weight in training.model.parameters()),
        }
        result_path.write_text(json.dumps(result), encoding="utf-8")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
