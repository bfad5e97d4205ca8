"""One process beside several: what is timed, and what the table says."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from cotrain.benchmarks.scaling import launch_command, table
from cotrain.benchmarks.scaling_worker import TimedLog, run_config
from cotrain.benchmarks.settings import ProcessesSettings

RECIPE = Path(__file__).parents[2] / "scripts" / "recipes" / "quickstart.yaml"


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


def test_processes_are_launched_where_the_models_run():
    assert "--cpu" in launch_command(2, on_gpu=False)
    assert "--multi_gpu" in launch_command(2, on_gpu=True)
    assert not {"--cpu", "--multi_gpu"} & set(launch_command(1, on_gpu=True))
