"""What a run says while it runs: metrics.jsonl, trackers, and one live line."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from cotrain.errors import CheckpointError
from cotrain.runtime.trackers import PROJECT, Tracker


class MetricsLog:
    """metrics.jsonl and the trackers, written by the main process only.

    Args:
        folder: Run folder.
        accelerator: Knows the main process and holds the trackers.
        resume_bytes: Length of metrics.jsonl at the checkpoint; what came after is cut off,
            because it will be written again.
        resume_step: Step of that checkpoint.
        trackers: Names of `cotrain.runtime.trackers`.
        settings: Hyper-parameters by dotted name.

    Raises:
        CheckpointError: metrics.jsonl lost what the checkpoint relies on.
        ConfigError: A tracker cannot be started.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        resume_bytes: int = 0,
        resume_step: int | None = None,
        trackers: Sequence[str] = ("tensorboard",),
        settings: dict[str, Any] | None = None,
    ):
        self.path = folder / "metrics.jsonl"
        self._accelerator = accelerator
        if accelerator.is_main_process:
            self.path.touch()
            if (found := self.path.stat().st_size) < resume_bytes:
                raise CheckpointError(
                    f"{self.path} has {found} bytes; when the checkpoint was written it had "
                    f"{resume_bytes}. Bring the file back, or start anew with another output_dir."
                )
            os.truncate(self.path, resume_bytes)
        own: list[Any] = [Tracker(name, folder, resume_step) for name in trackers]
        accelerator.log_with = own
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value).lower()
            for name, value in (settings or {}).items()
        }
        accelerator.init_trackers(PROJECT, plain)

    def write(self, row: dict[str, Any]) -> None:
        """One row; `kind` and `step` are required, numbers go to the trackers as well."""
        if not self._accelerator.is_main_process:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        prefix = "/".join(str(row[key]) for key in ("kind", "model") if key in row)
        numbers = {
            f"{prefix}/{key}": value
            for key, value in row.items()
            if isinstance(value, int | float) and key != "step"
        }
        self._accelerator.log(numbers, step=row["step"])

    def close(self) -> None:
        """Nothing more is written; the processes go on, which `end_training` would part."""
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def finish(self, results: dict[str, float | str]) -> None:
        """What the run ends with, which trackers show in one row with its settings."""
        for tracker in self._accelerator.trackers:  # none, but on the main process
            assert isinstance(tracker, Tracker)
            tracker.store_results(results)

    @property
    def num_bytes(self) -> int:
        """Length of metrics.jsonl, for a checkpoint; flushed to disk, as the checkpoint is."""
        if not self._accelerator.is_main_process:
            return 0
        with self.path.open("ab") as file:
            os.fsync(file.fileno())
        return self.path.stat().st_size

    def rows(self) -> list[dict[str, Any]]:
        """Everything written so far."""
        return [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]


def gather(value: Any) -> list[Any]:
    """One entry a process, on every process."""
    return gather_object([value])


def progress_bar(total: int, done: int, shown: bool) -> tqdm:
    """The live line. tqdm's own estimate is left out: steps that ask the teacher are many times
    slower than the others, so the loop brings an estimate that knows which are to come."""
    return tqdm(
        total=total,
        initial=done,
        disable=not shown,
        # A log file is no terminal: a line every 10 s there instead of ten a second.
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
        bar_format="{desc} {percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
    )


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def use_all_cores(num_local_processes: int) -> None:
    """Share this machine's cores between its processes.

    accelerate launch sets OMP_NUM_THREADS to 1 wherever the user has not set it, which leaves every
    core but one idle. A larger number set by the user stays.
    """
    if torch.get_num_threads() == 1:
        # Where the system tells (not on macOS), the cores this process may use, not all there are.
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // num_local_processes))


def environment(device: torch.device, num_processes: int) -> dict[str, Any]:
    """Versions, commit and device, for environment.json and the report."""
    packages = ("cotrain", "torch", "transformers", "accelerate", "bitsandbytes", "numpy", "polars")
    facts: dict[str, Any] = {name: metadata.version(name) for name in packages}
    facts |= {
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "num_processes": num_processes,
    }
    return facts


def _commit() -> str | None:
    """Commit of the source tree this package runs from, marked where it was changed; None where
    the package is installed outside of its repository."""

    def git(*arguments: str) -> str | None:
        here = Path(__file__)
        command = ["git", "-C", str(here.parent), *arguments]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError:  # no git on this machine
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    # A virtual environment may lie inside some other repository, whose commit says nothing.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    head = git("rev-parse", "HEAD")
    return f"{head}-changed" if head and git("status", "--porcelain", "-uno") else head


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((li.partition(":")[2].strip() for li in lines if li.startswith("model name")), "")
