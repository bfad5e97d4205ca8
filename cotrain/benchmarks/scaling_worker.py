"""One side of `scripts/benchmark.py processes`: times those steps of a short run that ask.

accelerate launch -m cotrain.benchmarks.scaling_worker JOB.json RESULT.json
"""

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cotrain import config as configuration
from cotrain.config import Config
from cotrain.distill.loop import fit
from cotrain.distill.run import prepare
from cotrain.runtime.tracking import MetricsLog


class TimedLog:
    """A run's log that remembers how long each step took that asked the teacher.

    Attributes:
        seconds: Of each, from the end of the step before to its own; the first of an epoch, which
            an evaluation or a calibration precedes, is left out.
        rows: That asked in these steps.
    """

    def __init__(self, log: MetricsLog):
        self.log = log
        self.seconds: list[float] = []
        self.rows = 0
        self._before: float | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.log, name)

    def write(self, row: dict[str, Any]) -> None:
        """As the log."""
        now = time.perf_counter()
        asked = row["kind"] == "train" and "teacher_rows" in row
        if asked and self._before is not None:
            self.seconds.append(now - self._before)
            self.rows += int(row["teacher_rows"])
        self.log.write(row)
        self._before = time.perf_counter() if asked else None


def run_config(job: dict[str, Any], folder: Path) -> Config:
    """The recipe's settings, cut short: an epoch without the teacher, then steps with it."""
    options = {
        "data.name": job["data"],
        "teacher.model": job["model"],
        "teacher.quantization": job["quantization"],
        "teacher.compile": "off",
        "distill.audit": "off",
        "query.fraction": job["fraction"],
        "train.epochs": 2,
        "train.warmup_epochs": 1,
        "train.max_steps": job["steps"],
        "train.checkpoint_every_steps": 10**9,
        "seed": job["seed"],
        "output_dir": folder / "run",
    }
    argv = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return configuration.parse(argv, Path(job["recipe"]))


def main(job_path: Path, result_path: Path) -> None:
    """Run, and let the main process write the result."""
    job = json.loads(job_path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="cotrain-benchmark-") as folder:
        state, run = prepare(run_config(job, Path(folder)))
        torch.set_num_threads(job["threads"])
        log: Any = TimedLog(run.log)
        fit(state, dataclasses.replace(run, log=log))
        result = {
            "processes": run.accelerator.num_processes,
            "threads": job["threads"],
            "steps": len(log.seconds),
            "seconds": sum(log.seconds),
            "rows": log.rows,
        }
        if run.accelerator.is_main_process:
            result_path.write_text(json.dumps(result), encoding="utf-8")
        run.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
