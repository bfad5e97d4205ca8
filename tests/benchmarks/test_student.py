"""The comparison with RecTools: its arithmetic, its tables, and both workers on real data."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cotrain.benchmarks import student
from cotrain.benchmarks.processes import run_worker
from cotrain.benchmarks.rectools_environment import requirements
from cotrain.benchmarks.settings import StudentSettings

ROOT = Path(__file__).parents[2]
TINY = StudentSettings(
    hidden_size=16, num_heads=2, max_length=20, batch_size=16, threads=1, max_steps=2, repeats=1
)


def measured(epoch_s: float, evaluate_s: float) -> dict[str, float]:
    return {"epoch_s": epoch_s, "evaluate_s": evaluate_s, "peak_memory_mb": 100.0}


def test_ratios_are_of_medians_with_the_range_of_the_repeats():
    summary = student.summarise(
        {
            student.OURS: [measured(2, 1), measured(4, 1), measured(3, 1)],
            student.THEIRS: [measured(12, 5), measured(12, 5), measured(90, 5)],
        }
    )
    assert summary["medians"][student.THEIRS]["epoch_s"] == 12
    assert summary["ratios"]["epoch_s"] == {"of_medians": 4, "of_repeats": [6, 3, 30]}
    text = student.summary_table(summary, repeats=3)
    assert "4.00 × as fast, from 3.00 to 30.00 over 3 repeats" in text
    assert "5.00 × as fast" in text


def test_a_table_shows_both_sides_work_beside_each_other():
    ours = {"positions": 131_413, "train_loss": 9.12345, "library": "cotrain 1"}
    theirs = {"positions": 131_412, "train_loss": 9.2, "library": "RecTools 2"}
    lines = student.work_table({student.OURS: ours, student.THEIRS: theirs}).splitlines()
    row = next(line for line in lines if line.startswith("real positions"))
    assert row.split()[-2:] == ["131,413", "131,412"]
    row = next(line for line in lines if line.startswith("mean training loss"))
    assert row.split()[-2:] == ["9.1235", "9.2000"]


def test_rectools_is_installed_with_our_version_of_torch():
    assert "torch==2.13.0" in requirements("2.13.0+cpu")
    assert any(line.startswith("rectools[torch]==") for line in requirements("2.13.0"))


def test_our_side_measures_itself(small_tables: tuple[Path, Path]):
    interactions, items = map(str, small_tables)
    settings = dataclasses.replace(TINY, interactions=interactions, items=items)
    command = [sys.executable, "-m", "cotrain.benchmarks.cotrain_worker"]
    job = dataclasses.asdict(settings) | {"item_updates": "all"}
    result = run_worker(command, job, threads=1)
    assert result["steps"] == 2
    # Two steps of 16 users, none with more than 20 positions.
    assert 32 <= result["positions"] <= result["computed_positions"] <= 2 * 16 * 20
    assert result["epoch_s"] > 0
    assert result["evaluate_s"] > 0
    assert result["users_ranked"] == 60


@pytest.mark.slow  # installs RecTools on a machine that never ran it
def test_both_sides_train_the_same_positions(small_tables: tuple[Path, Path], tmp_path: Path):
    out = tmp_path / "result.json"
    interactions, items = map(str, small_tables)
    command = [
        sys.executable, str(ROOT / "scripts" / "benchmark.py"), "student",
        "--interactions", interactions, "--items", items, "--hidden-size", "16", "--num-heads", "2",
        "--max-length", "20", "--batch-size", "16", "--threads", "1", "--repeats", "1",
        "--json", str(out),
    ]  # fmt: skip
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert "× as fast" in text
    repeats = json.loads(out.read_text())["repeats"]
    ours, theirs = repeats[student.OURS][0], repeats[student.THEIRS][0]
    for key in ("positions", "steps", "users_ranked", "threads", "parameters_beside_items"):
        assert ours[key] == theirs[key], key
