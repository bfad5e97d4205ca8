"""Every measurement in a process of its own: it finds the machine, and leaves it, as it was."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cotrain.errors import CotrainError


class WorkerFailed(CotrainError):
    """A measuring process ended without a result.

    Attributes:
        killed: A signal ended it; without anybody's doing, that is the kernel out of memory.
    """

    def __init__(self, what: str, code: int):
        self.killed = code < 0
        how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        hint = " Most likely memory ran out." if code == -9 else " What it said is above."
        super().__init__(f"{what} {how}.{hint}")


def run_worker(command: Sequence[str], job: dict[str, Any], threads: int) -> dict[str, Any]:
    """Runs `command JOB.json RESULT.json` and reads the result.

    Args:
        command: Interpreter and worker.
        job: What is to be measured.
        threads: CPU threads it may use.

    Raises:
        WorkerFailed: It left no result.
    """
    # Read by OpenMP, MKL and OpenBLAS before any line of the worker runs.
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(threads))
    with tempfile.TemporaryDirectory(prefix="cotrain-benchmark-") as folder:
        job_path, result_path = Path(folder) / "job.json", Path(folder) / "result.json"
        job_path.write_text(json.dumps(job), encoding="utf-8")
        # What a worker prints is progress, and its result a file.
        code = subprocess.run(
            [*command, str(job_path), str(result_path)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
        ).returncode
        if code or not result_path.is_file():
            raise WorkerFailed(" ".join(command[-2:]), code)
        return json.loads(result_path.read_text(encoding="utf-8"))


def launch_command(
    worker: str, count: int, on_gpu: bool, repository: Path, stage: int = 0
) -> list[str]:
    """What starts a worker of this package in so many processes, as a user would.

    Args:
        worker: Name of its module.
        count: Processes of this machine.
        on_gpu: Whether each has a GPU.
        repository: Has accelerate_configs/ and ds_configs/.
        stage: Of DeepSpeed's ZeRO, or 0.
    """
    if stage:
        file = "deepspeed_zero1" if on_gpu else "deepspeed_cpu"
    elif count > 1:
        file = "multi_gpu" if on_gpu else "cpu_2_processes"
    else:
        file = "single_gpu" if on_gpu else "cpu"
    options = ["--config_file", str(repository / "accelerate_configs" / f"{file}.yaml")]
    if stage:
        name = f"zero{stage}.json" if on_gpu else f"cpu_zero{stage}.json"
        options += ["--deepspeed_config_file", str(repository / "ds_configs" / name)]
    options += ["--num_processes", str(count), "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, "-m",
            f"cotrain.benchmarks.{worker}"]  # fmt: skip


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far.

    Linux's own count where there is one: `ru_maxrss` there starts at the size of the parent.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def reset_peak_memory() -> None:
    """Let `peak_memory_mb` count from now on, where the system can (Linux)."""
    # Some containers forbid it: then the peak of loading stays in what is reported.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def machine(threads: int) -> dict[str, Any]:
    """What a timing has to be read with: processor, cores, threads, load when it began."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        named = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = named[0].partition(":")[2].strip() if named else ""
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def busy_warning(facts: dict[str, Any]) -> str | None:
    """A line for the reader when others were using the processor, else None."""
    load = facts["load_at_start"]
    if load is None or load < 0.3:
        return None
    return (
        f"The machine was busy when this began (load {load:.1f} on {facts['cores']} cores): these "
        "timings show that the benchmark works, not how fast anything is."
    )
