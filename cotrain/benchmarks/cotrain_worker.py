"""Our side of `scripts/benchmark.py student`: one training epoch and one evaluation, timed.

python -m cotrain.benchmarks.cotrain_worker JOB.json RESULT.json
"""

import json
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from cotrain.benchmarks.processes import peak_memory_mb
from cotrain.benchmarks.training import Training, run_config
from cotrain.config import DataConfig
from cotrain.data.interactions import load_interactions
from cotrain.evaluation.evaluator import evaluate
from cotrain.evaluation.metrics import metrics_from_ranks

WARMUP_STEPS = 3


def main(job_path: Path, result_path: Path) -> None:
    """Train the warm-up, time the epoch and the evaluation of all users, write the result."""
    job = json.loads(job_path.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    started = time.perf_counter()
    data = load_interactions(
        DataConfig(name=job["data"], interactions=job["interactions"], items=job["items"])
    )
    config = run_config(job)
    # Starts thread pools and caches; what is timed begins with fresh weights.
    warm = Training(data, config)
    warm.epoch(WARMUP_STEPS)
    next(warm.top_items(10, job["eval_batch_size"]))
    training = Training(data, config)
    setup_s = time.perf_counter() - started
    epoch = training.epoch(job["max_steps"], "cotrain epoch")

    # Ranks of all targets, and the ten best unseen items of every user.
    started, cpu_started = time.perf_counter(), time.process_time()
    evaluation = evaluate(training.model, data, "test", job["eval_batch_size"])
    evaluate_s = time.perf_counter() - started
    evaluate_cpu_s = time.process_time() - cpu_started

    parameters = sum(weight.numel() for weight in training.model.parameters())
    result = {
        "library": f"cotrain {metadata.version('cotrain')}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "epoch_s": epoch.seconds,
        "epoch_cpu_s": epoch.cpu_seconds,
        "evaluate_s": evaluate_s,
        "evaluate_cpu_s": evaluate_cpu_s,
        "setup_s": setup_s,
        "steps": len(epoch.step_seconds),
        "positions": epoch.positions,
        "computed_positions": epoch.computed_positions,
        "items": data.num_items,
        "parameters": parameters,
        "parameters_beside_items": parameters - training.model.item_vectors.numel(),
        "users_ranked": len(evaluation.users),
        "train_loss": epoch.loss_sum / epoch.positions,
        "recall@10": metrics_from_ranks(evaluation.ranks)["recall@10"],
        "peak_memory_mb": peak_memory_mb(),
    }
    result_path.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
