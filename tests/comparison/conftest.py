"""Comparisons on few users: plans, results made by hand, and a stand-in for training."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from cotrain.comparison.arms import Plan, PlannedRun, make_plan
from cotrain.comparison.results import RunResult
from cotrain.config import DataConfig
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.evaluation.compare import paired_bootstrap
from cotrain.evaluation.metrics import metrics_from_ranks, per_user_metric

MakePlan = Callable[..., Plan]
# No test needs more seeds.
_MOST = 3


@pytest.fixture(scope="session")
def data(small_tables: tuple[Path, Path]) -> InteractionData:
    """Of 60 users."""
    interactions, items = small_tables
    return load_interactions(DataConfig(interactions=str(interactions), items=str(items)))


@pytest.fixture
def recipe(tmp_path: Path, small_tables: tuple[Path, Path]) -> Path:
    interactions, items = small_tables
    path = tmp_path / "recipe.yaml"
    text = f"data:\n  interactions: {interactions}\n  items: {items}\n"
    path.write_text(text + "teacher:\n  model: some-teacher\neval:\n  bootstrap_samples: 500\n")
    return path


@pytest.fixture(scope="session")
def plans() -> dict[Any, Plan]:
    """Those made so far: checking the settings of one takes seconds."""
    return {}


@pytest.fixture
def plan(recipe: Path, tmp_path: Path, plans: dict[Any, Plan]) -> MakePlan:
    """Makes a plan in the folder `out`."""
    output = tmp_path / "out"

    def make(
        arms: str = "ce,logit_kd,decision_state",
        seeds: int = 2,
        *options: str,
        vary: tuple[str, ...] = (),
        vary_arm: str | None = None,
    ) -> Plan:
        asked = (arms, options, vary, vary_arm)
        if asked not in plans:
            names = arms.split(",")
            plans[asked] = make_plan(recipe, options, names, range(_MOST), output, vary, vary_arm)
        whole = plans[asked]
        runs = [replace(run, output=output) for run in whole.runs if run.seed < seeds]
        runs = [
            replace(run, config=replace(run.config, output_dir=str(run.folder))) for run in runs
        ]
        return replace(whole, seeds=whole.seeds[:seeds], output=output, runs=tuple(runs))

    return make


def result_of(
    run: PlannedRun, ranks: np.ndarray, control: np.ndarray | None = None, **report: Any
) -> RunResult:
    """A run with these test ranks, the same on validation; keywords replace parts of the report."""
    scores = metrics_from_ranks(ranks)
    taught = run.arm != "ce"
    lift = None
    if control is not None:
        lift = {
            name: paired_bootstrap(
                per_user_metric(ranks, name), per_user_metric(control, name), 200
            ).as_dict()
            for name in scores
        }
    content = {
        "seconds": 60.0,
        "shipped": "student",
        "dataset": {"name": "small", "users": len(ranks)},
        "environment": {"device": "cpu"},
        "student": {"test": scores, "validation": scores, "best_epoch": 5},
        "control": {"best_epoch": 5} if control is not None else None,
        "lift": lift,
        "teacher": {"rows_asked": 120, "seconds": 30.0} if taught else None,
        "effective_rank": {"collapsed": False} if taught else None,
        "warnings": [],
        **report,
    }
    return RunResult(run, json.loads(json.dumps(content)), ranks, control)


@pytest.fixture(scope="session")
def run_result() -> Callable[..., RunResult]:
    return result_of


# Trains nothing: leaves what a run leaves. FAIL, KILL and HANG each name a run that does so; LINGER
# is how many seconds one that hangs goes on after a signal.
_STAND_IN = """
import json, os, shutil, signal, sys, time
from pathlib import Path

import yaml

word, value = sys.argv[1:]
path = Path(value) / "config.yaml" if word == "--resume" else Path(value)
config = yaml.safe_load(path.read_text())
folder = Path(config["output_dir"])
with open(os.environ["CALLS"], "a") as file:
    file.write(f"{word} {folder.parent.name}/{folder.name}\\n")
name = f"{folder.parent.name}/{folder.name}"
print(f"training {name}", flush=True)
if word == "--config":
    folder.mkdir(parents=True)
    shutil.copy(path, folder / "config.yaml")
if os.environ.get("FAIL") == name:
    print("epoch 1/3  10%|\\repoch 1/3  20%|", end="", flush=True)
    sys.exit("ValueError: <it> went wrong")
if os.environ.get("KILL") == name:
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ.get("HANG") == name and word == "--config":
    (folder / "checkpoints" / "step_3").mkdir(parents=True)
    def stop(number, frame):
        with open(os.environ["CALLS"], "a") as file:
            file.write("signal\\n")
        time.sleep(float(os.environ.get("LINGER", "0")))
        sys.exit(130)
    signal.signal(signal.SIGINT, stop)
    print("epoch 1/3  10%|\\repoch 2/3  40%|", end="", flush=True)
    with open(os.environ["CALLS"], "a") as file:
        file.write("hanging\\n")
    time.sleep(60)

metrics = {"ndcg@10": 0.1, "recall@10": 0.2, "mrr": 0.1}
student = {"test": metrics, "validation": metrics, "best_epoch": 3}
report = {
    "seconds": 1.0, "shipped": "student", "dataset": {}, "environment": {}, "student": student,
    "control": None, "lift": None, "teacher": None, "effective_rank": None, "warnings": [],
}
shutil.copy(Path(os.environ["RANKS"]) / f"{config['seed']}.parquet", folder / "ranks.parquet")
(folder / "report.json").write_text(json.dumps(report))
"""


@pytest.fixture
def stand_in(tmp_path: Path, data: InteractionData, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script in place of scripts/train_online.py; what it was called for is in calls.txt."""
    script = tmp_path / "stand_in.py"
    script.write_text(_STAND_IN)
    # Written here: libraries that write tables take a second to import in every run.
    for seed in range(2):
        ranks = np.random.default_rng(seed).integers(1, 40, data.num_users)
        table = pl.DataFrame({"user_id": data.user_ids, "student_test_rank": ranks})
        table.write_parquet(tmp_path / f"{seed}.parquet")
    monkeypatch.setenv("RANKS", str(tmp_path))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.txt"))
    return script


@pytest.fixture
def calls(tmp_path: Path) -> Callable[[], list[str]]:
    """What the stand-in was called for so far."""

    def read() -> list[str]:
        path = tmp_path / "calls.txt"
        return path.read_text().splitlines() if path.exists() else []

    return read


@pytest.fixture
def as_soon_as(calls: Callable[[], list[str]]) -> Callable[[str, Callable[[], None]], None]:
    """Does something, in a thread, when the stand-in has written this word."""

    def start(word: str, act: Callable[[], None]) -> None:
        def wait() -> None:
            for _ in range(3000):
                if word in calls():
                    act()
                    return
                time.sleep(0.01)

        threading.Thread(target=wait, daemon=True).start()

    return start
