"""`scripts/benchmark.py bulk`: recommendations for a file of a million users.

The users are drawn from those of a run's data, with replacement, so that histories have the lengths
and items that they have in life.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cotrain.benchmarks import processes
from cotrain.benchmarks.settings import BulkSettings
from cotrain.errors import CotrainError
from cotrain.rationale.answers import FinishedRun

# Users of the file that are made at once.
_PIECE = 50_000


def run(settings: BulkSettings, script: Path) -> dict[str, Any]:
    """Make the file, let scripts/recommend.py answer it in a process of its own.

    Args:
        settings: Run, users, kind of file.
        script: scripts/recommend.py.

    Returns:
        Settings, machine, mean history length, seconds, users/s and peak memory.

    Raises:
        CotrainError: No finished run, or the script failed.
    """
    found = FinishedRun.open(Path(settings.run).expanduser())
    threads = settings.threads or os.cpu_count() or 1
    facts = processes.machine(threads)
    with tempfile.TemporaryDirectory(prefix="cotrain-bulk-") as folder:
        source = Path(folder) / f"histories.{settings.kind}"
        target = Path(folder) / f"lists.{settings.kind}"
        length = write_histories(found, settings, source)
        command = [
            sys.executable, str(script), "--run", settings.run, "--histories", str(source),
            "--output", str(target), "--k", str(settings.k), "--json",
        ]  # fmt: skip
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        with subprocess.Popen(
            command, env=os.environ | dict.fromkeys(names, str(threads)), stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            printed = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise CotrainError(f"{script} failed with exit code {process.returncode}, as above.")
        answer = json.loads(printed)
        sizes = {"read_mb": source.stat().st_size / 1e6, "written_mb": target.stat().st_size / 1e6}
    result = {
        "benchmark": "bulk",
        "settings": dataclasses.asdict(settings),
        "machine": facts,
        "history_length": length,
        "users": answer["users"],
        "seconds": answer["seconds"],
        "users_per_s": answer["users"] / answer["seconds"],
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        # Linux counts in KiB.
        "peak_mb": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6,
        **sizes,
    }
    print(text(result))
    return result


def write_histories(run: FinishedRun, settings: BulkSettings, path: Path) -> float:
    """The file of users, made in pieces.

    Returns:
        Mean length of a history.
    """
    data = run.data
    ids = np.array(data.catalog.item_ids[1:])
    users = np.random.default_rng(settings.seed).integers(data.num_users, size=settings.users)
    total = 0
    pieces = []
    for start in range(0, settings.users, _PIECE):
        some = users[start : start + _PIECE]
        lists = [ids[data.history(user) - 1] for user in some]
        total += sum(map(len, lists))
        table = pl.DataFrame({"user_id": range(start, start + len(some)), "item_ids": lists})
        if settings.kind == "csv":
            joined = pl.col("item_ids").cast(pl.List(pl.String)).list.join("|")
            table = table.with_columns(joined)
        piece = path.with_name(f"piece-{start}.{settings.kind}")
        pieces.append(piece)
        if settings.kind == "parquet":
            table.write_parquet(piece)
        elif settings.kind == "csv":
            table.write_csv(piece, include_header=start == 0)
        else:
            table.write_ndjson(piece)
    if settings.kind == "parquet":
        pl.scan_parquet(pieces).sink_parquet(path, row_group_size=_PIECE)
    else:
        with path.open("wb") as file:
            for piece in pieces:
                file.write(piece.read_bytes())
    for piece in pieces:
        piece.unlink()
    return total / settings.users


def text(result: dict[str, Any]) -> str:
    """What came of it."""
    facts = result["machine"]
    lines = [
        f"{result['users']:,} users with {result['history_length']:.0f} items on average, "
        f"{result['settings']['kind']}: {result['seconds']:,.1f} s, {result['users_per_s']:,.0f} "
        f"users/s, {result['cpu_seconds']:,.0f} CPU seconds with the start",
        f"Peak memory {result['peak_mb']:,.0f} MB; read {result['read_mb']:,.0f} MB, written "
        f"{result['written_mb']:,.0f} MB",
        f"Machine: {facts['processor'] or 'unknown processor'}, {facts['cores']} cores, "
        f"{facts['threads']} threads, load {facts['load_at_start']:.1f} when it began",
    ]
    return "\n".join(lines)
