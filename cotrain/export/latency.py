"""What one request costs, beside what the teacher took for the same question."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cotrain.data.interactions import InteractionData
from cotrain.export.onnx import INPUT, session
from cotrain.student.recommender import Recommender

_WARM_UP = 20


def measure_latency(
    recommender: Recommender,
    graphs: Mapping[str, Path],
    data: InteractionData,
    report: Mapping[str, Any],
    requests: int = 1000,
) -> dict[str, Any]:
    """Times one request after another: a real test history to its ten best items.

    Args:
        recommender: The student, on the CPU.
        graphs: ONNX files by name.
        data: Where the histories come from.
        report: Of the run; its teacher's seconds a row are what requests are compared with.
        requests: Of each.

    Returns:
        `rows` (name to p50_ms, p99_ms, cheaper), `teacher_s` (None without a teacher),
        `teacher_device`, `requests`, `threads`, `processor`, `load`.
    """
    users = np.resize(data.evaluated_users("test"), requests + _WARM_UP)
    histories = [data.history_before(user, "test") for user in users]
    raw = [[data.catalog.item_ids[item] for item in history] for history in histories]
    threads = torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    found = {"PyTorch": _timed(lambda row: recommender.recommend([row], 10), raw)}
    for name, path in graphs.items():
        graph = session(path, threads)
        found[name] = _timed(
            lambda row, graph=graph: graph.run(["top_items", "top_scores"], {INPUT: row[None]}),
            histories,
        )
    teacher = report.get("teacher") or {}
    teacher_s = 1 / teacher["rows_per_s"] if teacher.get("rows_per_s") else None
    rows = {
        name: {
            "p50_ms": 1e3 * float(np.percentile(seconds, 50)),
            "p99_ms": 1e3 * float(np.percentile(seconds, 99)),
            "cheaper": teacher_s / float(np.percentile(seconds, 50)) if teacher_s else None,
        }
        for name, seconds in found.items()
    }
    return {
        "rows": rows,
        "teacher_s": teacher_s,
        "teacher_device": (report.get("environment") or {}).get("device"),
        "requests": requests,
        "threads": threads,
        "processor": _processor(),
        "load": load,
    }


def _timed(ask: Callable[[Any], Any], questions: Sequence[Any]) -> list[float]:
    """Seconds of each question after the first few."""
    seconds = []
    for question in questions:
        started = time.perf_counter()
        ask(question)
        seconds.append(time.perf_counter() - started)
    return seconds[_WARM_UP:]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "an unknown processor"


def latency_text(latency: Mapping[str, Any]) -> str:
    """The table, for a console."""
    lines = [f"{'one request':<12}{'p50 ms':>9}{'p99 ms':>9}"]
    for name, row in latency["rows"].items():
        line = f"{name:<12}{row['p50_ms']:>9.2f}{row['p99_ms']:>9.2f}"
        if row["cheaper"]:
            line += f"   {row['cheaper']:,.0f} times cheaper than the teacher"
        lines.append(line)
    if latency["teacher_s"]:
        lines.append(f"{'teacher':<12}{1e3 * latency['teacher_s']:>9.0f}   (mean of the run)")
    lines.append(
        f"{latency['requests']:,} requests each, {latency['threads']} threads, load "
        f"{latency['load']:.1f}"
    )
    return "\n".join(lines)
