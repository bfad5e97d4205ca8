"""One process beside several: what is timed, and what the table says."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from cotrain.benchmarks.processes import launch_command
from cotrain.benchmarks.scaling import table
from cotrain.benchmarks.scaling_worker import TimedLog, run_config
from cotrain.benchmarks.settings import ProcessesSettings
from cotrain.benchmarks.sharding import line

REPOSITORY = Path(__file__).parents[2]
RECIPE = REPOSITORY / "scripts" / "recipes" / "quickstart.yaml"


def test_only_steps_that_ask_are_timed_and_not_the_first_of_an_epoch():
    written = []

    class Log:
        def write(self, row: dict[str, Any]) -> None:
            written.append(row)

    log: Any = Log()
    timed = TimedLog(log)
    asking = {"kind": "train", "teacher_rows": 5.0}
    rows = [{"kind": "train"}, asking, asking, asking, {"kind": "validation"}, asking, asking]
    for row in rows:
        time.sleep(0.002)
        timed.write(row)
    assert written == rows
    assert len(timed.seconds) == 3
    assert timed.rows == 15
    assert min(timed.seconds) >= 0.002


def test_the_recipe_is_cut_short(tmp_path: Path):
    job = dataclasses.asdict(ProcessesSettings(fraction=0.3)) | {"recipe": str(RECIPE)}
    config = run_config(job, tmp_path)
    assert (config.train.epochs, config.train.warmup_epochs) == (2, 1)
    assert (config.query.fraction, config.train.max_steps) == (0.3, None)
    assert config.train.batch_size == 64


def test_the_table_shows_both_sides():
    sides = [
        {"processes": 1, "threads": 2, "steps": 10, "seconds": 20.0, "rows": 64},
        {"processes": 2, "threads": 1, "steps": 10, "seconds": 12.5, "rows": 64},
    ]
    text = table(sides)
    assert "| 1 | 2 | 2.000 | 3.20 |" in text
    assert "| 2 | 1 | 1.250 | 5.12 |" in text
    assert "2 processes take 1.60 times as many steps" in text


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize(("count", "stage"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_processes_are_launched_with_files_that_are_there(on_gpu: bool, count: int, stage: int):
    command = launch_command("scaling_worker", count, on_gpu, REPOSITORY, stage)
    files = [Path(word) for word in command if word.endswith((".yaml", ".json"))]
    assert len(files) == (2 if stage else 1)
    assert all(file.is_file() for file in files)
    assert command[command.index("--num_processes") + 1] == str(count)


def test_a_point_of_the_sharding_table():
    point = {"way": "zero1", "processes": 2, "step_s": 0.5, "peak_bytes": 24e6, "weights": 10**6}
    assert line(point) == "| zero1 | 2 | 0.500 | 24 | 24.0 |"
