"""What a run wrote can be read back, once, also after it went on from a checkpoint."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cotrain.errors import CheckpointError
from cotrain.runtime.tracking import (
    MetricsLog,
    clock,
    environment,
    gather,
    progress_bar,
    use_all_cores,
)


def open_log(folder: Path, *resume: Any) -> tuple[MetricsLog, Accelerator]:
    accelerator = Accelerator(log_with="tensorboard", project_dir=str(folder))
    return MetricsLog(folder, accelerator, *resume), accelerator


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: (step, value) by name."""
    found = {}
    for events in {path.parent for path in folder.rglob("events.out.*")}:
        reader = EventAccumulator(str(events))
        reader.Reload()
        for tag in reader.Tags()["scalars"]:
            found[tag] = [(event.step, event.value) for event in reader.Scalars(tag)]
    return found


def train(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss}


def test_rows_are_lines_of_json_and_numbers_go_to_tensorboard(tmp_path):
    log, accelerator = open_log(tmp_path)
    rows = [
        train(1, 2.5),
        {"kind": "validation", "step": 1, "model": "student", "ndcg@10": 0.25, "note": "τ"},
        {"kind": "validation", "step": 1, "model": "control", "ndcg@10": 0.5, "ranks": [1, 2]},
    ]
    for row in rows:
        log.write(row)
    accelerator.end_training()
    assert log.rows() == rows
    lines = (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert log.num_bytes == (tmp_path / "metrics.jsonl").stat().st_size
    assert scalars(tmp_path) == {
        "train/loss": [(1, 2.5)],
        "validation/student/ndcg@10": [(1, 0.25)],
        "validation/control/ndcg@10": [(1, 0.5)],
    }


def test_a_new_log_is_empty(tmp_path):
    log, accelerator = open_log(tmp_path)
    assert log.rows() == []
    assert log.num_bytes == 0
    accelerator.end_training()


def test_what_came_after_the_checkpoint_is_written_again(tmp_path):
    """TensorBoard lost the row of the checkpoint's own step."""
    log, accelerator = open_log(tmp_path)
    for step in (1, 2):
        log.write(train(step, float(step)))
    at_checkpoint = log.num_bytes
    for step in (3, 4):
        log.write(train(step, float(step)))
    accelerator.end_training()
    log, accelerator = open_log(tmp_path, at_checkpoint, 2)
    assert [row["step"] for row in log.rows()] == [1, 2]
    for step in (3, 4, 5):
        log.write(train(step, 10.0 * step))
    accelerator.end_training()
    expected = [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    assert [(row["step"], row["loss"]) for row in log.rows()] == expected
    assert scalars(tmp_path) == {"train/loss": expected}


def test_half_a_line_after_the_checkpoint_is_cut_off(tmp_path):
    log, accelerator = open_log(tmp_path)
    log.write(train(1, 1.0))
    at_checkpoint = log.num_bytes
    with log.path.open("a") as file:
        file.write('{"kind": "tra')
    accelerator.end_training()
    log, accelerator = open_log(tmp_path, at_checkpoint, 1)
    log.write(train(2, 2.0))
    accelerator.end_training()
    assert [row["step"] for row in log.rows()] == [1, 2]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"), (0.4, "0:00"), (9, "0:09"), (59.4, "0:59"), (59.6, "1:00"), (61, "1:01"),
        (3599.6, "1:00:00"), (3661, "1:01:01"), (360_000, "100:00:00"),
    ],
)  # fmt: skip
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_gather_has_one_entry_a_process():
    Accelerator()
    assert gather({"a": 1}) == [{"a": 1}]


def test_hidden_bar_prints_nothing(capfd):
    with progress_bar(10, 3, shown=False) as bar:
        bar.update()
    assert capfd.readouterr() == ("", "")


def test_bar_shows_where_the_run_stands(capfd):
    with progress_bar(10, 3, shown=True) as bar:
        bar.set_description_str("epoch 1/2", refresh=False)
        bar.set_postfix({"left": clock(61)})
    shown = capfd.readouterr().err
    assert re.search(r"epoch 1/2 +30%\|.*\| step 3/10 \[0?0:00, left=1:01\]", shown), shown


@pytest.mark.parametrize("processes", [1, 2, 1000])
def test_cores_are_shared_by_the_processes(processes):
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        torch.set_num_threads(1)
        use_all_cores(processes)
        assert torch.get_num_threads() == max(1, (cores or 1) // processes)
        # More than one is what the user asked for.
        torch.set_num_threads(3)
        use_all_cores(processes)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_environment_names_what_numbers_depend_on():
    facts = environment(torch.device("cpu"), num_processes=1)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["torch"] == torch.__version__
    assert facts["device"] == "cpu"
    assert facts["torch_threads"] == torch.get_num_threads()
    assert facts["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-changed)?", facts["commit"])


def test_a_log_shorter_than_at_the_checkpoint_is_refused(tmp_path: Path):
    # Regression: it was filled up with null bytes, and the report failed at the end of the run.
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    with pytest.raises(CheckpointError, match="bytes; when the checkpoint was written it had 1000"):
        open_log(tmp_path, 1000, 7)
