"""`scripts/export.py`: a finished run to a folder that somebody else runs."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from cotrain.errors import ConfigError
from cotrain.evaluation.card import card_facts
from cotrain.evaluation.report import json_ready
from cotrain.export import onnx
from cotrain.export.latency import latency_text, measure_latency
from cotrain.files import check_new
from cotrain.rationale.answers import FinishedRun
from cotrain.student.sasrec import SASRec

FACTS, GRAPH, GRAPH_INT8 = "export.json", "model.onnx", "model.int8.onnx"
# Test histories that a graph is compared with PyTorch on.
_COMPARED = 512


def export(
    run_folder: Path,
    form: Literal["pretrained", "onnx"],
    output: Path,
    *,
    int8: bool = False,
    k: int = 100,
    requests: int = 1000,
    say: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Writes the shipped student of a run, its card, and `export.json` with what was measured.

    Args:
        run_folder: Of a finished run.
        form: pretrained: what `Recommender.from_pretrained` reads. onnx: a graph, and the
            catalogue.
        output: Folder that does not exist yet; it appears when it is whole.
        int8: Also a graph with weights in 8 bits, and what that costs.
        k: Items a row in the graph's lists.
        requests: That latency is measured by; 0: it is not.
        say: Prints a line.

    Returns:
        What export.json holds.

    Raises:
        ConfigError: The output exists, packages are missing, int8 without onnx.
        CotrainError: No finished run, or the graph does not give what PyTorch gives.
    """
    if int8 and form != "onnx":
        raise ConfigError(
            f"--int8 is a form of ONNX and --format is {form!r}; use --format onnx, or leave it."
        )
    if k < 1 or requests < 0:
        raise ConfigError(f"--k is {k} and --requests {requests}; expected 1 and 0, or more.")
    if form == "onnx":
        onnx.require_packages()
    check_new(output, "--output")
    run = FinishedRun.open(run_folder)
    if form == "onnx" and not isinstance(run.recommender.model, SASRec):
        raise ConfigError(
            f"--format onnx has a graph for SASRec and the student of {run_folder} is a "
            f"{type(run.recommender.model).__name__}; use --format pretrained."
        )
    facts = card_facts(run.report)
    folder = output.with_name(f".{output.name}.{os.getpid()}.partial")
    folder.mkdir()
    try:
        result = _fill(folder, run, form, facts, int8, k, requests, say)
        text = json.dumps(json_ready(result), indent=2, ensure_ascii=False)
        (folder / FACTS).write_text(text + "\n", encoding="utf-8")
        os.rename(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    say(f"Written: {output}")
    return result


def _fill(
    folder: Path, run: FinishedRun, form: str, facts: dict[str, Any], int8: bool, k: int,
    requests: int, say: Callable[[str], Any],
) -> dict[str, Any]:  # fmt: skip
    """Writes everything but export.json."""
    model = run.recommender.model
    result: dict[str, Any] = {"format": form, "run": run.folder.name, "card": facts}
    graphs: dict[str, Path] = {}
    if form == "onnx":
        result["onnx"] = _graphs(folder, run, int8, min(k, len(run.recommender.catalog) - 1), say)
        graphs = {"ONNX": folder / GRAPH} | ({"ONNX int8": folder / GRAPH_INT8} if int8 else {})
    if requests:
        latency = measure_latency(run.recommender, graphs, run.data, run.report, requests)
        result["latency"] = latency
        say(latency_text(latency))
    card = {**facts, "onnx": result.get("onnx"), "latency": result.get("latency")}
    if form == "pretrained":
        run.recommender.save_pretrained(folder, model_card_kwargs=card)
    else:
        run.recommender.catalog.save(folder)
        run.recommender.generate_model_card(**card).save(folder / "README.md")
    result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return result


def _graphs(
    folder: Path, run: FinishedRun, int8: bool, k: int, say: Callable[[str], Any]
) -> dict[str, Any]:
    """Writes the graphs and says what they are worth."""
    data, model = run.data, run.recommender.model
    assert isinstance(model, SASRec)  # checked before
    users = data.evaluated_users("test")
    users = users[:: max(1, len(users) // _COMPARED)][:_COMPARED]
    histories = [data.history_before(user, "test") for user in users]
    onnx.write_onnx(model, k, folder / GRAPH)
    graph = onnx.session(folder / GRAPH)
    parity = onnx.check_parity(model, graph, histories)
    say(
        f"ONNX: differs from PyTorch by at most {parity.largest_difference:.1e} on "
        f"{parity.histories:,} test histories"
    )
    result: dict[str, Any] = {"k": k, "parity": asdict(parity), "int8": None}
    result["sizes"] = {"fp32_mb": _megabytes(folder / GRAPH)}
    if int8:
        onnx.write_int8(folder / GRAPH, folder / GRAPH_INT8)
        found = onnx.measure_int8(onnx.session(folder / GRAPH_INT8), graph, data)
        result["int8"] = found
        result["sizes"]["int8_mb"] = _megabytes(folder / GRAPH_INT8)
        low, high = found["ci95"]
        say(
            f"int8: NDCG@10 on test {found['ndcg@10']:.4f} in place of "
            f"{found['fp32 ndcg@10']:.4f}, {found['difference']:+.4f} (95 % {low:+.4f} to "
            f"{high:+.4f})"
        )
    return result


def _megabytes(path: Path) -> float:
    return round(path.stat().st_size / 1e6, 2)
