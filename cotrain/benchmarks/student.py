"""`scripts/benchmark.py student`: our student beside RecTools' SASRec, on the same machine.

One training epoch and one evaluation of all users, with the same data, size, loss, batch, optimizer
and threads. The sides take turns, every measurement in a process of its own.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cotrain.benchmarks import processes
from cotrain.benchmarks.settings import StudentSettings
from cotrain.config import DataConfig
from cotrain.data.interactions import InteractionData, load_interactions

FOLDER = Path(__file__).parent
OURS, THEIRS = "cotrain", "RecTools"
# What each side is timed at: the key of its result, and what the table calls it.
TIMES = {"epoch_s": "Epoch", "evaluate_s": "Evaluation"}

_RECTOOLS_LOSSES = {
    "ce": "softmax",
    "chunked_ce": "softmax",
    "sampled_softmax": "sampled_softmax",
    "bce": "BCE",
    "gbce": "gBCE",
}


def run(settings: StudentSettings) -> dict[str, Any]:
    """Measure both sides in turn, print the tables.

    Returns:
        Settings, machine, every single measurement, medians and ratios.

    Raises:
        CotrainError: The data cannot be read, RecTools cannot be installed, a worker failed.
    """
    # Making the environment takes seconds of torch import, and minutes the first time.
    from cotrain.benchmarks.rectools_environment import rectools_python

    data = load_interactions(data_config(settings))
    threads = settings.threads or os.cpu_count() or 1
    python = rectools_python()
    facts = processes.machine(threads)
    print(headline(settings, data, facts), flush=True)
    results: dict[str, list[dict[str, Any]]] = {OURS: [], THEIRS: []}
    with tempfile.TemporaryDirectory(prefix="cotrain-benchmark-") as folder:
        arrays = Path(folder) / "arrays.npz"
        np.savez(arrays, items=data.items, offsets=data.offsets)
        for repeat in range(settings.repeats):
            job = dataclasses.asdict(settings) | {
                "arrays": str(arrays),
                "threads": threads,
                "seed": settings.seed + repeat,
                "item_updates": "all",  # as RecTools does
            }
            commands = {
                OURS: [sys.executable, "-m", "cotrain.benchmarks.cotrain_worker"],
                THEIRS: [str(python), str(FOLDER / "rectools_worker.py")],
            }
            for side, command in commands.items():
                own = {"loss": _RECTOOLS_LOSSES[settings.loss]} if side == THEIRS else {}
                result = processes.run_worker(command, job | own, threads)
                results[side].append(result)
                print(repeat_line(repeat, side, result), flush=True)
    summary = summarise(results)
    print(summary_table(summary, settings.repeats))
    print(work_table({side: rows[0] for side, rows in results.items()}))
    print(notes(settings, facts))
    return {
        "benchmark": "student",
        "settings": dataclasses.asdict(settings),
        "machine": facts,
        "data": {
            "name": data.name,
            "users": data.num_users,
            "items": data.num_items,
            "interactions": data.num_interactions,
        },
        "repeats": results,
        **summary,
    }


def data_config(settings: StudentSettings) -> DataConfig:
    """Where both sides' interactions come from."""
    return DataConfig(name=settings.data, interactions=settings.interactions, items=settings.items)


def summarise(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Median of every time and side; ratio of the medians, and the ratio of each repeat."""
    medians = {
        side: {
            key: statistics.median(row[key] for row in rows) for key in [*TIMES, "peak_memory_mb"]
        }
        for side, rows in results.items()
    }
    ratios = {
        key: {
            "of_medians": medians[THEIRS][key] / medians[OURS][key],
            "of_repeats": [
                theirs[key] / ours[key]
                for ours, theirs in zip(results[OURS], results[THEIRS], strict=True)
            ],
        }
        for key in TIMES
    }
    return {"medians": medians, "ratios": ratios}


# ---- what is printed ----------------------------------------------------------------------------


def headline(settings: StudentSettings, data: InteractionData, facts: dict[str, Any]) -> str:
    """What is compared, before the first measurement."""
    theirs = _RECTOOLS_LOSSES[settings.loss]
    negatives = "" if theirs == "softmax" else f", {settings.num_negatives} negatives a position"
    return "\n".join(
        [
            f"{data.name}: {data.num_users:,} users, {data.num_items:,} items, "
            f"{data.num_interactions:,} interactions",
            f"Loss: {settings.loss}, in RecTools {theirs}{negatives}",
            f"Both sides: {settings.num_layers} layers, width {settings.hidden_size}, "
            f"{settings.num_heads} heads, length {settings.max_length}, dropout "
            f"{settings.dropout:g}, {settings.batch_size} users a step, Adam "
            f"{settings.learning_rate:g}, fp32",
            f"Machine: {facts['processor'] or 'unknown processor'}, {facts['cores']} cores, "
            f"{facts['threads']} threads",
            "",
            f"{'repeat':<8}{'':<12}{'epoch s':>10}{'evaluation s':>14}{'peak MB':>10}",
        ]
    )


def repeat_line(repeat: int | str, side: str, result: dict[str, float]) -> str:
    """One measurement, or the medians, under the headline's columns."""

    shown = repeat + 1 if isinstance(repeat, int) else repeat
    return (
        f"{shown:<8}{side:<12}{result['epoch_s']:>10,.2f}{result['evaluate_s']:>14,.2f}"
        f"{result['peak_memory_mb']:>10,.0f}"
    )


def summary_table(summary: dict[str, Any], repeats: int) -> str:
    """Medians and ratios."""
    lines = [repeat_line("median", side, row) for side, row in summary["medians"].items()]
    lines.append("")
    for key, ratio in summary["ratios"].items():
        low, high = min(ratio["of_repeats"]), max(ratio["of_repeats"])
        spread = f", from {low:.2f} to {high:.2f} over {repeats} repeats" if repeats > 1 else ""
        lines.append(f"{TIMES[key]:<11} {OURS} is {ratio['of_medians']:.2f} × as fast{spread}")
    return "\n".join(lines)


def work_table(results: dict[str, dict[str, Any]]) -> str:
    """Whether both sides did the same work; from the first repeat.

    CPU seconds tell a busy machine: far below seconds × threads, others had the processor.
    """
    rows = {
        "library": "",
        "torch": "",
        "threads": "",
        "epoch_cpu_s": "CPU seconds of the epoch",
        "evaluate_cpu_s": "CPU seconds of the evaluation",
        "positions": "real positions trained",
        "computed_positions": "positions computed, with padding",
        "steps": "optimizer steps",
        "items": "items in the catalogue",
        "parameters_beside_items": "parameters beside item vectors",
        "users_ranked": "users evaluated",
        "train_loss": "mean training loss",
        "recall@10": "test Recall@10 after this epoch",
    }
    lines = ["", f"{'The same work?':<36}{OURS:>18}{THEIRS:>18}"]
    for key, label in rows.items():
        cells = []
        for side in (OURS, THEIRS):
            value = results[side].get(key, "–")
            if isinstance(value, float):
                value = f"{value:.2f}" if key.endswith("_s") else f"{value:.4f}"
            cells.append(f"{value:,}" if isinstance(value, int) else str(value))
        lines.append(f"{label or key:<36}{cells[0]:>18}{cells[1]:>18}")
    return "\n".join(lines)


def notes(settings: StudentSettings, facts: dict[str, Any]) -> str:
    """What each side really does where they differ; printed, because a ratio hides it."""
    lines = [
        "",
        "How to read this",
        "- Both sides train the same positions: of every user all interactions but the last two, "
        "of these the latest length + 1. The epoch is timed from its first batch to the end of "
        "its last step; preparing data, logging and checkpoints are left out on both sides.",
        "- RecTools is used as it is published, its defaults beside the settings above: every user "
        "padded to the full length, logits and loss at padded positions too (masked afterwards), "
        "dropout on attention weights, torch's unfused Adam, no gradient clipping.",
        "- cotrain runs the step of its own training loop: real positions only, no dropout on "
        "attention weights and a cheaper random generator for the rest, the fused AdamW (without "
        "decay, the same formula), gradients clipped. --dropout 0 takes dropout out of both.",
        "- RecTools' catalogue is what occurs in the trained windows; cotrain's is the whole "
        "table of interactions, and therefore a little larger.",
        "- RecTools' evaluation is `recommend` (the top 10 of all users, seen items filtered; its "
        "torch ranker, with pandas around it), without any metric. cotrain's makes the same lists "
        "and ranks every target against the whole catalogue besides.",
    ]
    if _RECTOOLS_LOSSES[settings.loss] != "softmax":
        lines.append(
            "- RecTools draws negatives anew for each position, padded ones too; in cotrain all "
            "positions of a step share them. Every position is held against as many on both sides."
        )
    if settings.max_steps is not None:
        lines.append(
            f"- Only the first {settings.max_steps} steps of the epoch were timed, and the sides "
            "draw other users: no result."
        )
    if warning := processes.busy_warning(facts):
        lines.append(f"- {warning}")
    return "\n".join(lines)
