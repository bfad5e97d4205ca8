"""An exported graph gives what PyTorch gives, or nothing is exported."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import polars as pl
import pytest
import torch

from cotrain.errors import CheckpointError, ConfigError, CotrainError
from cotrain.evaluation.evaluator import evaluate
from cotrain.evaluation.metrics import per_user_metric
from cotrain.export import onnx as module
from cotrain.export import run as runs
from cotrain.export.run import export
from cotrain.rationale.answers import FinishedRun
from cotrain.student.padded import PaddedSASRec
from cotrain.student.recommender import Recommender
from cotrain.student.sasrec import SASRec

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "export.py"


@pytest.fixture(scope="module")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("export") / "onnx"
    export(finished_run, "onnx", target, int8=True, k=12, requests=30, say=lambda line: None)
    return target


@pytest.fixture(scope="module")
def run(finished_run: Path) -> FinishedRun:
    return FinishedRun.open(finished_run)


@pytest.fixture(scope="module")
def trained(run: FinishedRun) -> SASRec:
    model = run.recommender.model
    assert isinstance(model, SASRec)
    return model


@pytest.fixture(scope="module")
def facts(exported: Path) -> dict[str, Any]:
    return json.loads((exported / "export.json").read_text())


def test_the_folder(exported: Path, facts: dict[str, Any]):
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md", "export.json", "items.parquet", "model.int8.onnx", "model.onnx",
    ]  # fmt: skip
    assert [path.name for path in exported.parent.iterdir()] == ["onnx"]
    onnx.checker.check_model(onnx.load(exported / "model.onnx"), full_check=True)
    assert facts["onnx"]["parity"]["histories"] == 60
    assert facts["onnx"]["parity"]["largest_difference"] <= 1e-4
    assert facts["onnx"]["sizes"]["int8_mb"] < facts["onnx"]["sizes"]["fp32_mb"]


def test_any_batch_and_length_padded_anywhere(exported: Path, run: FinishedRun, trained: SASRec):
    graph = module.session(exported / "model.onnx")
    model = PaddedSASRec(trained, 12).eval()
    draw = np.random.default_rng(0)
    size = run.data.num_items
    for shape in ((1, 1), (3, 50), (7, 20), (2, 300)):
        ids = draw.integers(-5, size + 9, shape)
        ids[draw.random(shape) < 0.3] = 0
        with torch.no_grad():
            expected = model(torch.from_numpy(ids))
        for found, wanted in zip(graph.run(None, {"item_ids": ids}), expected, strict=True):
            np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4, rtol=1e-4)


def test_its_lists_are_those_of_the_recommender(exported: Path, run: FinishedRun):
    graph, data = module.session(exported / "model.onnx"), run.data
    items = pl.read_parquet(exported / "items.parquet")
    for user in (0, 17, 59):
        history = data.history(user)
        (top,) = graph.run(["top_items"], {"item_ids": history[None]})
        raw = [data.catalog.item_ids[item] for item in history]
        assert (
            items["item_id"][(top[0] - 1).tolist()].to_list()
            == (run.recommender.recommend([raw], 12).item_ids[0])
        )


def test_the_cost_of_8_bits_is_that_of_full_ranking(run: FinishedRun, facts: dict[str, Any]):
    ranks = evaluate(run.recommender.model, run.data, "test").ranks
    int8 = facts["onnx"]["int8"]
    assert int8["fp32 ndcg@10"] == pytest.approx(per_user_metric(ranks, "ndcg@10").mean(), abs=1e-9)
    assert int8["difference"] == pytest.approx(int8["ndcg@10"] - int8["fp32 ndcg@10"])
    assert int8["users"] == 60


def test_the_card_says_how_to_use_it_and_what_it_costs(exported: Path, facts: dict[str, Any]):
    card = (exported / "README.md").read_text()
    int8 = facts["onnx"]["int8"]
    for part in ("(batch, 12) int64", "model.int8.onnx", f"{int8['difference']:+.4f}", "p99 ms"):
        assert part in card
    assert "0.400 s a row" in card  # 1 / 2.5 rows/s of the report
    assert "from_pretrained" not in card
    rows = facts["latency"]["rows"]
    assert [*rows] == ["PyTorch", "ONNX", "ONNX int8"]
    for row in rows.values():
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["cheaper"] == pytest.approx(400 / row["p50_ms"])


def test_the_cards_example_runs(exported: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    code = (exported / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(exported)
    exec(code, {})
    assert "title" in capsys.readouterr().out


def test_pretrained_has_the_card_of_the_report(finished_run: Path, tmp_path: Path):
    found = export(finished_run, "pretrained", tmp_path / "out", requests=5, say=lambda line: None)
    student = Recommender.from_pretrained(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert student.recommend([[50]], 3).item_ids == (
        Recommender.from_pretrained(finished_run / "student").recommend([[50]], 3).item_ids
    )
    assert "Lift over its control" in card
    assert "## Latency" in card
    assert "## ONNX" not in card
    assert [*found["latency"]["rows"]] == ["PyTorch"]


# ---- refusals -----------------------------------------------------------------------------------


def test_a_graph_that_differs_is_not_exported(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = module.write_onnx

    def damaged(model: Any, k: int, path: Path) -> None:
        with torch.no_grad():
            model.final_norm.bias[0] += 0.01
            write(model, k, path)
            model.final_norm.bias[0] -= 0.01

    monkeypatch.setattr(module, "write_onnx", damaged)
    with pytest.raises(CotrainError, match=r"differs from PyTorch by .*Nothing was exported"):
        export(finished_run, "onnx", tmp_path / "out", requests=0, say=lambda line: None)
    assert not [*tmp_path.iterdir()]


def test_lists_that_are_not_the_best_are_noticed(run: FinishedRun, trained: SASRec, exported: Path):
    graph = module.session(exported / "model.onnx")

    class Swapped:
        def run(self, names: Any, given: Any) -> Any:
            items, *others = graph.run(names, given)
            return [items[:, ::-1], *others]

    with pytest.raises(CotrainError, match="not the best of its own scores"):
        module.check_parity(trained, Swapped(), [run.data.history(0)])


def test_nan_is_a_difference(run: FinishedRun, trained: SASRec, exported: Path):
    graph = module.session(exported / "model.onnx")

    class Broken:
        def run(self, names: Any, given: Any) -> Any:
            *others, states = graph.run(names, given)
            return [*others, states * np.nan]

    with pytest.raises(CotrainError, match="differs from PyTorch by inf"):
        module.check_parity(trained, Broken(), [run.data.history(0)])


def test_without_the_packages_one_command_is_named(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"onnx, onnxruntime.*pip install 'cotrain\[export\]'"):
        export(finished_run, "onnx", tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_mistakes_are_found_first(finished_run: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="--int8 is a form of ONNX"):
        export(finished_run, "pretrained", tmp_path / "out", int8=True)
    with pytest.raises(ConfigError, match="is a folder that exists"):
        export(finished_run, "pretrained", tmp_path)
    with pytest.raises(ConfigError, match="--k is 0"):
        export(finished_run, "onnx", tmp_path / "out", k=0)
    with pytest.raises(CheckpointError, match="is no run folder"):
        export(tmp_path, "pretrained", tmp_path / "out")
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    (copy / "report.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not the report of a finished run"):
        export(copy, "pretrained", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_the_script(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    specification = importlib.util.spec_from_file_location("export_script", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    argv = ["--run", str(finished_run), "--output", str(tmp_path / "out"), "--requests", "0"]
    assert script.main(argv) == 0
    assert (tmp_path / "out" / runs.FACTS).is_file()
    with pytest.raises(ConfigError, match="exists"):
        script.main(argv)
