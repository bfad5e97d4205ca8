"""`scripts/benchmark.py teacher`: the engine beside the plain loop that everyone writes.

Both get the same model, quantisation, prompts, threads and machine, and take turns; every
measurement is a process of its own. `--exactness`, `--memory` and `--loop` answer what is left:
what other settings would cost and change, what fits a GPU, and what a run adds to the teacher.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cotrain.benchmarks import processes
from cotrain.benchmarks import teacher_tables as tables
from cotrain.benchmarks.settings import TeacherSettings

ENGINE, PLAIN = "engine", "plain"
EXACT_ENOUGH = 0.98
WORKERS = "cotrain.benchmarks"


@dataclass(frozen=True)
class Point:
    """One thing that is measured, as often as there are repeats.

    Attributes:
        side: ENGINE or PLAIN.
        rows: Ranked at once.
        quantization, compute, compile: As the teacher's settings of these names.
    """

    side: str
    rows: int
    quantization: str
    compute: str = "auto"
    compile: str = "off"


@dataclass
class Measured:
    """What a point gave: numbers of each repeat; states (B, H) and logits (B, K) of the last."""

    repeats: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    states: np.ndarray = dataclasses.field(default_factory=lambda: np.empty((0, 0)))
    logits: np.ndarray = dataclasses.field(default_factory=lambda: np.empty((0, 0)))
    error: str | None = None

    def median(self, key: str) -> float:
        """Over the repeats."""
        return statistics.median(row[key] for row in self.repeats)

    @property
    def rows_per_s(self) -> float:
        """Of the median time."""
        return self.repeats[0]["rows"] / self.median("seconds")


def run(settings: TeacherSettings, recipe: Path) -> dict[str, Any]:
    """Measure what was asked for, print the tables.

    Args:
        settings: The options.
        recipe: Settings of the run that `--loop` times.

    Returns:
        Settings, machine, every single measurement, and what the tables say.

    Raises:
        CotrainError: Data or model cannot be read, a worker failed.
    """
    threads = settings.threads or os.cpu_count() or 1
    facts = processes.machine(threads)
    result = {
        "benchmark": "teacher",
        "settings": dataclasses.asdict(settings),
        "machine": facts,
    }
    job = dataclasses.asdict(settings) | {"threads": threads, "recipe": str(recipe)}
    if settings.memory:
        command = _command("teacher_memory_worker")
        found = processes.run_worker(command, job | {"traced": True}, threads)
        found["measured"] = processes.run_worker(command, job | {"traced": False}, threads)
        print(tables.memory_table(found))
        return result | {"memory": found}
    if settings.loop:
        found = processes.run_worker(_command("teacher_loop_worker"), job, threads)
        print(tables.loop_table(found, facts))
        return result | {"loop": found}
    print(tables.headline(settings, facts), flush=True)
    bench = Bench(job, threads)
    result["comparison"] = compare(settings, bench)
    if settings.exactness:
        result["exactness"] = exactness(settings, bench)
    print(tables.notes(facts, exact=settings.exactness))
    return result


class Bench:
    """Measures points, and halves the plain loop's batch where it does not fit memory.

    Args:
        job: Settings that all points share.
        threads: Of each measuring process.
    """

    def __init__(self, job: dict[str, Any], threads: int):
        self.job, self.threads = job, threads
        self._batch_rows: dict[tuple[int, str], int] = {}

    def measure(self, point: Point, into: Measured) -> None:
        """Measure a point once more.

        Raises:
            WorkerFailed: Without a result, for another reason than memory.
        """
        key = (point.rows, point.quantization)
        with tempfile.TemporaryDirectory(prefix="cotrain-benchmark-") as folder:
            arrays = str(Path(folder) / "arrays.npz")
            while True:
                rows = self._batch_rows.setdefault(key, point.rows)
                job = self.job | dataclasses.asdict(point) | {"batch_rows": rows, "arrays": arrays}
                try:
                    found = processes.run_worker(_command("teacher_worker"), job, self.threads)
                except processes.WorkerFailed as error:
                    # On a CPU the kernel ends a process that takes too much.
                    if not (error.killed and point.side == PLAIN and rows > 1):
                        raise
                    found = {"out_of_memory": True}
                if not found.get("out_of_memory"):
                    break
                if point.side != PLAIN or rows == 1:
                    raise processes.WorkerFailed(f"{point}: memory ran out; it", 1)
                self._batch_rows[key] = (rows + 1) // 2
                print(tables.halved_line(point, self._batch_rows[key]), flush=True)
            into.repeats.append(found)
            with np.load(arrays) as saved:
                into.states, into.logits = saved["states"], saved["logits"]


def compare(settings: TeacherSettings, bench: Bench) -> list[dict[str, Any]]:
    """Both sides in turn, at every number of rows and every quantisation."""
    found = []
    print(tables.measure_head(), flush=True)
    for rows in settings.rows:
        for quantization in settings.quantization:
            point = Point(ENGINE, rows, quantization, settings.compute, settings.compile)
            sides = {ENGINE: Measured(), PLAIN: Measured()}
            for repeat in range(settings.repeats):
                bench.measure(point, sides[ENGINE])
                # What `auto` came to is known now; the plain loop computes in the same.
                compute = sides[ENGINE].repeats[-1]["compute"]
                bench.measure(Point(PLAIN, rows, quantization, compute), sides[PLAIN])
                for side, measured in sides.items():
                    line = tables.measure_line(repeat + 1, side, quantization, measured.repeats[-1])
                    print(line, flush=True)
            found.append(
                {
                    "rows": rows,
                    "quantization": quantization,
                    "repeats": {side: measured.repeats for side, measured in sides.items()},
                    **summarise(sides[ENGINE], sides[PLAIN]),
                }
            )
            print(tables.summary(found[-1], settings.repeats), flush=True)
            print(tables.work_table(found[-1]), flush=True)
    return found


def summarise(ours: Measured, theirs: Measured) -> dict[str, Any]:
    """Ratios of the median times and of each repeat, and how far the states are apart."""
    pairs = zip(ours.repeats, theirs.repeats, strict=True)
    gaps = relative_gaps(ours.states, theirs.states)
    return {
        "ratio": ours.rows_per_s / theirs.rows_per_s,
        "cpu_ratio": theirs.median("cpu_seconds") / ours.median("cpu_seconds"),
        "ratios": [slow["seconds"] / fast["seconds"] for fast, slow in pairs],
        "median_gap": float(np.median(gaps)),
        "largest_gap": float(gaps.max()),
    }


# ---- exactness ----------------------------------------------------------------------------------


def exactness_points(rows: int) -> Iterable[Point]:
    """The plain loop, and all settings of the engine that compute something else or otherwise."""
    yield Point(PLAIN, rows, "fp32", "fp32")
    for quantization, compute in [("bf16", "bf16"), ("nf4", "fp32"), ("nf4", "bf16")]:
        yield Point(PLAIN, rows, quantization, compute)
    for quantization, compute in [
        ("fp32", "fp32"), ("bf16", "bf16"), ("nf4", "fp32"), ("nf4", "bf16"), ("int8", "auto"),
    ]:  # fmt: skip
        for compile in ("off", "on"):
            yield Point(ENGINE, rows, quantization, compute, compile)


def exactness(settings: TeacherSettings, bench: Bench) -> dict[str, Any]:
    """Rate of every setting, and how near it is to the plain loop in fp32, the first point."""
    points = {point: Measured() for point in exactness_points(settings.rows[0])}
    for _ in range(settings.repeats):
        for point, measured in points.items():
            if measured.error:
                continue
            try:
                bench.measure(point, measured)
            except processes.WorkerFailed as error:  # the other settings are worth having
                measured.error = str(error)
                continue
            print(tables.progress_line(point, measured.repeats[-1]), flush=True)
    reference = next(iter(points.values()))
    lines = [
        dataclasses.asdict(point)
        | {"error": measured.error, "repeats": measured.repeats}
        | ({} if measured.error or reference.error else nearness(measured, reference))
        for point, measured in points.items()
    ]
    best = fastest(lines)
    print(tables.exactness_table(lines, best))
    return {"lines": lines, "fastest": best}


def nearness(measured: Measured, reference: Measured) -> dict[str, float]:
    """Rate, and distance to the reference: of states, and of rankings before and after removing
    what each identifier gets on average."""
    ours, theirs = measured.logits, reference.logits
    return {
        "rows_per_s": measured.rows_per_s,
        "spearman": float(spearman(ours, theirs).mean()),
        "spearman_calibrated": float(spearman(ours - ours.mean(0), theirs - theirs.mean(0)).mean()),
        "gap": float(np.median(relative_gaps(measured.states, reference.states))),
    }


def fastest(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest setting of ours that ranks as fp32 does, and its ratio to the plain loop."""
    measured = [line for line in lines if "rows_per_s" in line]
    exact = [
        line
        for line in measured
        if line["side"] == ENGINE and line["spearman_calibrated"] >= EXACT_ENOUGH
    ]
    if not exact:
        return None
    best = max(exact, key=lambda line: line["rows_per_s"])
    ratios = {}
    for quantization in ("nf4", "bf16", "fp32"):
        rates = [
            line["rows_per_s"]
            for line in measured
            if line["side"] == PLAIN and line["quantization"] == quantization
        ]
        if rates:  # against the faster of its dtypes
            ratios[quantization] = best["rows_per_s"] / max(rates)
    return best | {"ratios": ratios}


def relative_gaps(states: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(B,) ‖difference‖ / ‖other‖ of (B, H) states."""
    return np.linalg.norm(states - others, axis=1) / np.linalg.norm(others, axis=1)


def spearman(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(B,) rank correlations between the lines of two (B, K) arrays; ties share their rank."""

    def centred_ranks(lines: np.ndarray) -> np.ndarray:
        smaller = (lines[:, None, :] < lines[:, :, None]).sum(2)
        smaller_or_equal = (lines[:, None, :] <= lines[:, :, None]).sum(2)
        ranks = (smaller + smaller_or_equal) / 2
        return ranks - ranks.mean(1, keepdims=True)

    a, b = centred_ranks(values), centred_ranks(others)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(norms, 1e-12)


def _command(worker: str) -> list[str]:
    return [sys.executable, "-m", f"{WORKERS}.{worker}"]
