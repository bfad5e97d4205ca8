"""A run is one row in every tracker, also after it was resumed; no tracker ends a run."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cotrain.config import parse, save
from cotrain.errors import ConfigError
from cotrain.runtime import trackers
from cotrain.runtime.trackers import Tracker, require_packages
from cotrain.runtime.tracking import MetricsLog

SETTINGS = {"train.epochs": 3, "data.name": "small", "train.control": True, "student.text": None}
RESULTS: dict[str, float | str] = {"shipped": "control", "lift/ndcg@10": -0.25}


def open_log(
    folder: Path, names: list[str], *resume: Any, resume_step: int | None = None
) -> tuple[MetricsLog, Accelerator]:
    accelerator = Accelerator()
    num_bytes = resume[0] if resume else 0
    return MetricsLog(folder, accelerator, num_bytes, resume_step, names, SETTINGS), accelerator


def run_and_resume(folder: Path, names: list[str]) -> None:
    """Steps 1 and 2, of which the last comes again after the checkpoint of step 1; and an end."""
    log, accelerator = open_log(folder, names)
    log.write({"kind": "train", "step": 1, "loss": 3.0})
    at_checkpoint = log.num_bytes
    log.write({"kind": "train", "step": 2, "loss": 2.0})
    accelerator.end_training()
    log, accelerator = open_log(folder, names, at_checkpoint, resume_step=1)
    log.write({"kind": "train", "step": 2, "loss": 2.0})
    log.write({"kind": "validation", "step": 2, "model": "student", "ndcg@10": 0.5})
    log.finish(RESULTS)
    accelerator.end_training()


def test_settings_are_a_list_with_a_name_that_python_keeps_for_itself(tmp_path: Path):
    config = parse(["--tracking.with", "wandb, mlflow,wandb"])
    assert config.tracking.names == ["wandb", "mlflow"]
    assert parse([]).tracking.names == ["tensorboard"]
    assert parse(["--tracking.with", "none"]).tracking.names == []
    save(config, tmp_path / "config.yaml")
    assert "with: wandb, mlflow,wandb" in (tmp_path / "config.yaml").read_text()
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config
    with pytest.raises(ConfigError, match="names 'wand'; expected of tensorboard, wandb, mlflow"):
        parse(["--tracking.with", "tensorboard,wand"])


def test_a_missing_package_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    find = trackers.importlib.util.find_spec
    monkeypatch.setattr(
        trackers.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name)
    )
    with pytest.raises(ConfigError, match=r"wandb, not installed here: .*'cotrain\[wandb\]'"):
        require_packages(["tensorboard", "wandb"])


def test_tensorboard_has_one_row_with_settings_and_results(tmp_path: Path):
    run_and_resume(tmp_path, ["tensorboard"])
    folders = {path.parent for path in tmp_path.rglob("events.out.*")}
    assert folders == {tmp_path / "tensorboard"}
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    losses = [(event.step, event.value) for event in reader.Scalars("train/loss")]
    assert losses == [(1, 3.0), (2, 2.0)]
    assert [event.value for event in reader.Scalars("lift/ndcg@10")] == [-0.25]
    plugin = reader.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    for word in (b"train.epochs", b"data.name", b"small", b"control"):
        assert word in plugin


def test_no_tracker(tmp_path: Path):
    run_and_resume(tmp_path, [])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.fixture
def tracker(tmp_path: Path) -> Tracker:
    return Tracker("tensorboard", tmp_path)


def fail(*arguments: Any, **options: Any) -> None:
    raise ConnectionError("the server is gone")


def test_what_cannot_be_started_is_an_error(tracker: Tracker):
    tracker._inner.start = fail
    with pytest.raises(ConfigError, match="cannot be started: ConnectionError: the server is gone"):
        tracker.start()


@pytest.mark.parametrize("method", ["log", "store_results", "finish"])
def test_what_fails_later_is_said_once_and_ends_nothing(
    tracker: Tracker, method: str, capsys: pytest.CaptureFixture[str]
):
    tracker.start()
    tracker.store_init_configuration({})
    setattr(tracker._inner, method, fail)
    for step in (1, 2):
        tracker.log({"loss": 1.0}, step=step)
    tracker.store_results(RESULTS)
    tracker.finish()
    said = capsys.readouterr().out
    assert said.count("warning: tensorboard is not told of this run any more") == 1
    assert "ConnectionError: the server is gone" in said


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_and_resume(tmp_path, ["wandb"])
    run_id = json.loads((tmp_path / trackers.IDS_FILE).read_text())["wandb"]
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert {path.name for path in files} == {f"run-{run_id}.wandb"}
    words = (b"train.epochs", b"train/loss", b"lift/ndcg@10", b"shipped", b"control")
    ends = time.monotonic() + 60
    missing = words
    while missing and time.monotonic() < ends:  # another process writes
        time.sleep(0.1)
        written = b"".join(path.read_bytes() for path in files)
        missing = [word for word in words if word not in written]
    assert not missing


@pytest.mark.parametrize("store", ["sqlite:///{}/mlflow.db", "file:{}/mlruns"])
def test_mlflow_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str):
    mlflow = pytest.importorskip("mlflow")
    # A file store is kept for old ones, and has to be asked for.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store.format(tmp_path))
    try:
        (tmp_path / "run").mkdir()
        run_and_resume(tmp_path / "run", ["mlflow"])
        (found,) = mlflow.search_runs(experiment_names=["cotrain"], output_format="list")
    finally:
        mlflow.set_tracking_uri(before)
    assert found.info.run_name == "run"
    assert found.info.status == "FINISHED"
    assert found.data.params["train.epochs"] == "3"
    assert found.data.params["student.text"] == "none"
    assert found.data.metrics["final/lift/ndcg_at_10"] == -0.25
    assert found.data.metrics["train/loss"] == 2.0
    assert found.data.tags["shipped"] == "control"
