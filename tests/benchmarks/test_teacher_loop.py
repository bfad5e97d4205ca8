"""A run's loop beside its teacher alone."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cotrain.benchmarks import teacher_tables as tables
from cotrain.benchmarks.settings import TeacherSettings
from cotrain.benchmarks.teacher_loop_worker import Recorder, run_config

RECIPE = Path(__file__).parents[2] / "scripts" / "recipes" / "quickstart.yaml"

FOUND = {
    "epochs": 2, "steps": 30, "rows": 150, "wall_s": 50.0, "teacher_s": 46.0, "alone_s": 45.0,
    "wall_cpu_s": 90.0, "teacher_cpu_s": 80.0, "alone_cpu_s": 80.0, "programs_compiled": 0,
}  # fmt: skip


def test_the_recipe_is_cut_short_and_follows_the_options(tmp_path: Path):
    job = dataclasses.asdict(TeacherSettings(model="some/model", quantization=("bf16", "nf4")))
    config = run_config(job | {"recipe": str(RECIPE)}, tmp_path)
    assert config.teacher.model == "some/model"
    assert config.teacher.quantization == "bf16"
    assert config.teacher.batch_tokens is None
    assert config.query.fraction == 0.08
    assert config.train.control
    assert config.train.epochs - config.train.warmup_epochs == 2


def test_what_a_ranker_was_asked_is_remembered():
    class Ranker:
        identifier_bias = "bias"

        def calibrate(self, *args: Any) -> str:
            return "calibrated"

        def rank(self, *args: Any) -> str:
            return "ranked"

    ranker: Any = Ranker()
    recorder = Recorder(ranker)
    begun = recorder.calibrated_at
    assert recorder.calibrate([], [], []) == "calibrated"
    assert recorder.calibrated_at.seconds > begun.seconds
    assert recorder.rank([[1]], [[2, 3]], [(0, 1)]) == "ranked"
    assert recorder.asks == [([[1]], [[2, 3]], [(0, 1)])]
    assert recorder.seconds > 0
    assert recorder.identifier_bias == "bias"


def test_the_table_says_what_share_of_the_teachers_rate_is_left():
    text = tables.loop_table(FOUND, {"load_at_start": 0.0, "cores": 2})
    assert "reaches 90% of the rate" in text
    assert "92% of its time" in text


@pytest.mark.parametrize("load", [0.0, 3.0])
def test_a_busy_machine_is_mentioned(load: float):
    assert ("busy" in tables.loop_table(FOUND, {"load_at_start": load, "cores": 2})) == (load > 1)
