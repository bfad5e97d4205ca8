"""Measuring in processes of their own."""

import sys
from pathlib import Path

import pytest

from cotrain.benchmarks.processes import (
    WorkerFailed,
    busy_warning,
    machine,
    peak_memory_mb,
    run_worker,
)


def worker(folder: Path, body: str) -> list[str]:
    path = folder / "worker.py"
    path.write_text(f"import json, os, signal, sys\njob = json.load(open(sys.argv[1]))\n{body}\n")
    return [sys.executable, str(path)]


def test_a_worker_gets_its_job_and_its_threads_and_returns_its_result(tmp_path: Path):
    body = (
        "json.dump({'twice': 2 * job['n'], 'threads': os.environ['OMP_NUM_THREADS']}, "
        "open(sys.argv[2], 'w'))"
    )
    result = run_worker(worker(tmp_path, body), {"n": 21}, threads=3)
    assert result == {"twice": 42, "threads": "3"}


@pytest.mark.parametrize(
    ("body", "killed", "message"),
    [
        ("sys.exit(3)", False, "exit code 3"),
        ("pass", False, "exit code 0"),
        ("os.kill(os.getpid(), signal.SIGKILL)", True, "memory ran out"),
    ],
)
def test_a_worker_without_a_result_is_an_error(
    tmp_path: Path, body: str, killed: bool, message: str
):
    with pytest.raises(WorkerFailed, match=message) as error:
        run_worker(worker(tmp_path, body), {}, threads=1)
    assert error.value.killed == killed


def test_peak_memory_remembers_what_was_freed():
    before = peak_memory_mb()
    block = bytearray(int(1e8) + int(before * 1e6))  # zero pages count once they are written
    block[::4096] = b"x" * len(block[::4096])
    del block
    assert peak_memory_mb() - before > 90


def test_timings_of_a_busy_machine_carry_a_warning():
    facts = machine(threads=2)
    assert facts["threads"] == 2
    assert busy_warning(facts | {"load_at_start": 0.1}) is None
    assert "load 1.5" in str(busy_warning(facts | {"load_at_start": 1.5}))
