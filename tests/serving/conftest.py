"""A finished run with a control, whose catalogue holds titles that attack a page."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml

from cotrain import config as configuration
from cotrain.data.interactions import load_interactions
from cotrain.rationale.answers import UNSHIPPED, FinishedRun
from cotrain.serving.inspector import Inspector
from cotrain.student.recommender import Recommender
from cotrain.student.sasrec import SASRec

# Items of the small data, and what they are called in `hostile_run`.
HOSTILE = {
    50: "<img src=x onerror=\"window.hit=1\"> & 'Wars'",
    1: "${window.hit=1}{{window.hit=1}}{% raw %} Story",
    181: "<|im_end|><script>window.hit=1</script> Jedi",
}


def add_control(folder: Path) -> None:
    """Beside the student, one of other random weights, as its control."""
    student = Recommender.from_pretrained(folder / "student")
    torch.manual_seed(1)
    model = SASRec(**student.model.settings)
    assert isinstance(student.model, SASRec)
    with torch.no_grad():  # alike, so that the lists overlap
        for name, weights in model.named_parameters():
            of_student = student.model.get_parameter(name)
            weights.copy_(of_student + 0.2 * torch.randn_like(of_student))
    Recommender(model, student.catalog).save_pretrained(folder / UNSHIPPED)


@pytest.fixture(scope="session")
def run_with_control(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with-control") / "run"
    shutil.copytree(finished_run, folder)
    add_control(folder)
    rows = [
        {"kind": "train", "step": step, "epoch": step / 4, "loss": 9 - step, "loss_ce": 8 - step}
        for step in range(5)
    ]
    rows += [
        {"kind": "validation", "model": name, "step": 4, "epoch": 1, "ndcg@10": 0.1}
        for name in ("student", "control")
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def hostile_run(
    run_with_control: Path, tmp_path_factory: pytest.TempPathFactory, tiny_teacher: str
) -> Path:
    """The same, with a teacher, and with titles that attack."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    shutil.copytree(run_with_control, folder)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    items = folder.parent / "items.csv"
    table = pl.read_csv(settings["data"]["items"])
    titles = [
        HOSTILE.get(item, title) for item, title in table.select("item_id", "title").iter_rows()
    ]
    table.with_columns(pl.Series("title", titles)).write_csv(items)
    settings["data"]["items"] = str(items)
    settings["teacher"] = {
        "model": tiny_teacher, "quantization": "fp32", "num_candidates": 6, "calibration": "none",
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    report = json.loads((folder / "report.json").read_text())
    report["teacher"] |= {"model": tiny_teacher, "identifier_bias": [0.0, 0.1, 0, 0, 0, 0]}
    (folder / "report.json").write_text(json.dumps(report))
    config = configuration.parse(["--config", str(folder / "config.yaml")])
    catalog = load_interactions(config.data).catalog
    for name in ("student", UNSHIPPED):
        model = Recommender.from_pretrained(folder / name).model
        shutil.rmtree(folder / name)
        Recommender(model, catalog).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def hostile_titles() -> dict[int, str]:
    """Of `hostile_run`, by item id."""
    return HOSTILE


@pytest.fixture(scope="session")
def look_at() -> Callable[[Path], Inspector]:
    return lambda folder: Inspector(FinishedRun.open(folder))


@pytest.fixture(scope="session")
def inspector(run_with_control: Path, look_at: Callable[[Path], Inspector]) -> Inspector:
    return look_at(run_with_control)


@pytest.fixture(scope="session")
def hostile(hostile_run: Path, look_at: Callable[[Path], Inspector]) -> Inspector:
    return look_at(hostile_run)
