"""The student as an ONNX graph, believed only after it gave what PyTorch gives."""

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cotrain.data.interactions import InteractionData
from cotrain.errors import ConfigError, CotrainError
from cotrain.evaluation.compare import paired_bootstrap
from cotrain.evaluation.metrics import per_user_metric, target_ranks
from cotrain.student.padded import PaddedSASRec
from cotrain.student.sasrec import SASRec

INPUT = "item_ids"
OUTPUTS = ["top_items", "top_scores", "scores", "user_states"]
# Of scores and states, relative to the larger of 1 and the value itself.
TOLERANCE = 1e-4
# Operators of this version are in every onnxruntime of the last years.
_OPSET = 18
# Users of one batch of the checks, scores of one batch.
_BATCH, _MAX_SCORES = 64, 2**25


def require_packages() -> None:
    """Checks that the optional packages are there.

    Raises:
        ConfigError: They are not.
    """
    missing = [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]
    if missing:
        raise ConfigError(
            f"--format onnx needs packages that are not installed: {', '.join(missing)}. Install "
            "the extra: pip install 'cotrain[export]'"
        )


def write_onnx(model: SASRec, k: int, path: Path) -> None:
    """Writes the graph of `PaddedSASRec`, batch and length left open.

    Args:
        model: The student, on the CPU and in evaluation mode.
        k: Items a row in `top_items`.
        path: Of the file.
    """
    free = {name: {0: "batch"} for name in OUTPUTS} | {INPUT: {0: "batch", 1: "length"}}
    # Two rows of three, so that nothing looks like 1.
    example = torch.ones(2, 3, dtype=torch.int64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The tracing exporter: the newer one takes thirty times as long for this graph and needs
        # one package more. What a trace could miss is what the comparison afterwards would find.
        torch.onnx.export(
            PaddedSASRec(model, k).eval(), (example,), str(path), dynamo=False,
            input_names=[INPUT], output_names=OUTPUTS, dynamic_axes=free, opset_version=_OPSET,
        )  # fmt: skip


def write_int8(source: Path, target: Path) -> None:
    """Writes the graph with weights in 8 bits; activations are quantised as they come.

    Args:
        source: Of `write_onnx`.
        target: Of the file.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises steps that change nothing here
    try:
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)
    finally:
        root.setLevel(level)


def session(path: Path, threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        path: Of the graph.
        threads: That it may use; None: its own choice.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def padded(histories: Sequence[np.ndarray], left: bool = True) -> np.ndarray:
    """(B, L) int64 of histories, with padding on one side."""
    length = max(map(len, histories))
    ids = np.zeros((len(histories), length), np.int64)
    for row, history in enumerate(histories):
        place = slice(length - len(history), None) if left else slice(0, len(history))
        ids[row, place] = history
    return ids


@dataclass(frozen=True)
class Parity:
    """How near a graph is to PyTorch.

    Attributes:
        histories: Compared.
        largest_difference: Of any score or state, relative to the larger of 1 and the value.
    """

    histories: int
    largest_difference: float


def check_parity(model: SASRec, graph: Any, histories: Sequence[np.ndarray]) -> Parity:
    """Compares a graph with the student that it was made of, on batches of unlike size and length,
    padded on either side.

    Args:
        model: The student, in evaluation mode.
        graph: Of `session`.
        histories: Real ones.

    Raises:
        CotrainError: They differ by more than TOLERANCE, or the lists are not those of the scores.
    """
    largest = 0.0
    start, size = 0, 1
    while start < len(histories):
        some = histories[start : start + size]
        ids = padded(some, left=bool(size % 2))
        top_items, top_scores, scores, states = graph.run(OUTPUTS, {INPUT: ids})
        with torch.no_grad():
            of_torch = model.user_states(some)
            expected = (of_torch @ model.item_vectors.T).numpy()
        for found, wanted in ((scores[:, 1:], expected[:, 1:]), (states, of_torch.numpy())):
            difference = np.abs(found - wanted) / np.maximum(1, np.abs(wanted))
            # NaN counts as the largest.
            largest = max(largest, float(np.nan_to_num(difference, nan=np.inf).max()))
        for history, items, best, row in zip(some, top_items, top_scores, scores, strict=True):
            _check_list(history, items, best, row)
        start, size = start + size, min(2 * size + 1, _BATCH)
    if not largest <= TOLERANCE:
        raise CotrainError(
            f"The ONNX graph differs from PyTorch by {largest:.1e} on {len(histories):,} test "
            f"histories; expected at most {TOLERANCE:.0e}. Nothing was exported. Try another "
            "version of onnxruntime, and please report it."
        )
    return Parity(len(histories), largest)


def _check_list(
    history: np.ndarray, items: np.ndarray, best: np.ndarray, scores: np.ndarray
) -> None:
    """That a list is the best of what its scores leave."""
    scores = scores.copy()
    scores[history] = scores[0] = -np.inf
    expected = np.sort(scores)[::-1][: len(items)]
    listed = items[items > 0]
    wrong = not np.array_equal(expected, best) or not np.array_equal(
        scores[listed], best[: len(listed)]
    )
    if wrong:
        raise CotrainError(
            f"The ONNX graph lists items {items[:5].tolist()}, … which are not the best of its "
            "own scores. Nothing was exported. Try another version of onnxruntime, and please "
            "report it."
        )


def measure_int8(
    graph: Any, reference: Any, data: InteractionData, samples: int = 10_000
) -> dict[str, Any]:
    """What 8 bits cost in NDCG@10 on test, full ranking as in the report.

    Args:
        graph: The session in 8 bits.
        reference: The session in full.
        data: Of the run.
        samples: Of the bootstrap.

    Returns:
        `ndcg@10`, `fp32 ndcg@10`, `difference`, `ci95` and `users`.
    """
    users = data.evaluated_users("test")
    ndcg = [
        per_user_metric(np.concatenate([*_ranks(one, data, users)]), "ndcg@10")
        for one in (graph, reference)
    ]
    lift = paired_bootstrap(ndcg[0], ndcg[1], samples)
    return {
        "ndcg@10": float(ndcg[0].mean()),
        "fp32 ndcg@10": float(ndcg[1].mean()),
        "difference": lift.absolute,
        "ci95": list(lift.ci95),
        "users": len(users),
    }


def _ranks(graph: Any, data: InteractionData, users: np.ndarray) -> Iterator[np.ndarray]:
    """Ranks of the test targets, in the order of users of like history length."""
    order = users[np.argsort(data.history_lengths("test"), kind="stable")]
    step = max(1, min(_BATCH, _MAX_SCORES // len(data.catalog)))
    for start in range(0, len(order), step):
        group = order[start : start + step]
        histories = [data.history_before(user, "test") for user in group]
        (scores,) = graph.run(["scores"], {INPUT: padded(histories)})
        targets = torch.tensor([data.target(user, "test") for user in group])
        rows = np.repeat(np.arange(len(group)), [len(history) for history in histories])
        seen = torch.from_numpy(np.concatenate(histories))
        yield target_ranks(torch.from_numpy(scores), targets, torch.from_numpy(rows), seen).numpy()
