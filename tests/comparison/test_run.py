"""Whole comparisons through the script: with a stand-in for training, and once with training."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from cotrain.comparison.run import compare
from cotrain.data.interactions import InteractionData
from cotrain.errors import CotrainError, DataError

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "compare.py"
specification = importlib.util.spec_from_file_location("compare_script", SCRIPT)
assert specification is not None
assert specification.loader is not None
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)

Calls = Callable[[], list[str]]


def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "comparison.json").read_text(encoding="utf-8"))


@pytest.fixture
def main(stand_in: Path, recipe: Path, tmp_path: Path, monkeypatch) -> Callable[..., int]:
    """The script's main on two arms, with the stand-in where it looks for train_online.py."""
    stand_in.rename(tmp_path / "train_online.py")
    monkeypatch.setattr(script, "HERE", tmp_path)
    words = ["--recipe", str(recipe), "--arms", "ce,logit_kd", "--output", str(tmp_path / "out")]
    return lambda *options: script.main([*words, *options])


def test_a_comparison_is_completed_and_added_to_by_later_commands(
    main: Callable[..., int], calls: Calls, tmp_path: Path, monkeypatch, capsys
):
    folder = tmp_path / "out"
    monkeypatch.setenv("FAIL", "logit_kd/seed-0")
    assert main("--seeds", "1") == 1
    assert [run["arm"] for run in found(folder)["failed"]] == ["logit_kd"]
    said = capsys.readouterr().out
    assert "Nothing can be compared. " in said
    assert "One run failed, missing here: logit_kd with seed 0" in said
    assert f"Page: {folder / 'comparison.html'}" in said
    assert "ValueError: &lt;it&gt; went wrong" in (folder / "comparison.html").read_text()

    monkeypatch.delenv("FAIL")
    assert main("--seeds", "1") == 0
    whole = found(folder)
    assert (whole["failed"], whole["added"], len(whole["runs"])) == ([], [], 2)
    assert "logit_kd cannot be told apart from ce" in capsys.readouterr().out

    assert main("--seeds", "2") == 0
    assert found(folder)["added"] == ["seed 1"]
    assert "Added after results had been seen: seed 1." in capsys.readouterr().out
    assert calls() == [
        "--config ce/seed-0", "--config logit_kd/seed-0", "--config logit_kd/seed-0",
        "--config ce/seed-1", "--config logit_kd/seed-1",
    ]  # fmt: skip


def test_a_stopped_comparison_says_so_and_has_no_result_yet(
    main: Callable[..., int], as_soon_as, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setenv("HANG", "ce/seed-0")
    as_soon_as("hanging", lambda: os.kill(os.getpid(), signal.SIGINT))
    assert main("--seeds", "1") == 130
    assert "Stopped with 0 of 2 runs done" in capsys.readouterr().err
    assert not (tmp_path / "out" / "comparison.json").exists()


def test_rationales_that_do_not_fit_are_refused_before_anything_starts(
    plan, stand_in: Path, calls: Calls, data: InteractionData, write_store, tmp_path: Path
):
    leak = data.held_out.test[:1]
    store = write_store(tmp_path / "store", data, leak)
    made = plan("ce,rdr", 1, "--distill.rationales", str(store))
    with pytest.raises(DataError, match="held out for validation or test"):
        compare(made, [sys.executable, str(stand_in)], print)
    assert calls() == []
    assert not made.output.exists()


def test_the_command_line_makes_the_plan(recipe: Path, tmp_path: Path):
    made = script.parse(
        ["--recipe", str(recipe), "--arms", "ce, logit_kd", "--seeds", "2", "--first_seed", "5",
         "--output", str(tmp_path / "out"), "--train.epochs", "50"]
    )  # fmt: skip
    assert (made.arms, made.seeds) == (("ce", "logit_kd"), (5, 6))
    assert made.output == tmp_path / "out"
    assert [run.config.train.epochs for run in made.runs] == [50] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds is '0'; expected a whole number, 1 or more"),
        (["--seeds", "three"], "--seeds is 'three'"),
        (["--first_seed", "-1"], "--first_seed is '-1'; expected a whole number, 0 or more"),
        # not taken for an abbreviation of --seeds
        (["--seed", "3"], "--seed cannot be set here"),
        (["--arms", ""], "unknown arms ''"),
        (["--recipe", "no/such.yaml"], "no/such.yaml"),
        (["--arm", "ce"], "unknown setting 'arm'"),
    ],
)
def test_mistakes_on_the_command_line_are_told(options: list[str], message: str):
    with pytest.raises(CotrainError, match=message):
        script.parse(options)


def test_a_mistake_is_printed_without_a_traceback():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--seeds", "0"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: --seeds is '0'")
    assert "Traceback" not in done.stderr


def test_help_tells_the_arms(capsys):
    with pytest.raises(SystemExit) as caught:
        script.parse(["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert "ce              cross-entropy on the data and nothing else" in said
    assert "rdr_whitened" in said


# ---- with training ------------------------------------------------------------------------------


def command(
    recipe: Path, data: InteractionData, write_store, training_places, tmp_path: Path, epochs: int
) -> list[str]:
    """Compares ce and rdr on 60 users, with random rationales of a fifth of the interactions."""
    places = np.random.default_rng(1).permutation(training_places(data))
    store = write_store(tmp_path / "store", data, places[: len(places) // 5])
    return [
        sys.executable, str(SCRIPT), "--recipe", str(recipe), "--arms", "ce,rdr", "--seeds", "1",
        "--output", str(tmp_path / "out"), "--teacher.model", "none",
        "--distill.rationales", str(store), "--distill.lambda_rdr", "0.5",
        "--train.epochs", str(epochs), "--train.warmup_epochs", "1", "--train.batch_size", "16",
        "--train.learning_rate", "0.01", "--student.hidden_size", "16",
        "--student.max_length", "20",
    ]  # fmt: skip


@pytest.fixture
def waiting_threads_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models this small leave a second thread waiting, which takes the core from whatever else
    runs."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


def launch(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.usefixtures("waiting_threads_sleep")
def test_a_comparison_with_training(
    recipe: Path, data: InteractionData, write_store, training_places, tmp_path: Path
):
    words = command(recipe, data, write_store, training_places, tmp_path, epochs=3)
    done = launch(words)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out"
    whole = found(folder)
    assert (whole["seeds"], whole["failed"], list(whole["arms"])) == ([0], [], ["ce", "rdr"])
    taught = whole["arms"]["rdr"]
    assert taught["rationale_rows"] > 100
    assert taught["over_own_twin"] is not None

    # It says of each run what that run's own report says.
    for run in whole["runs"]:
        report = json.loads((folder / run["folder"] / "report.json").read_text())
        assert run["test"]["ndcg@10"] == report["student"]["test"]["ndcg@10"]
        assert (folder / run["folder"] / "report.html").is_file()
    scores = [run["test"]["ndcg@10"] for run in whole["runs"]]
    against = taught["against_baseline"]["ndcg@10"]
    assert against["absolute"] == pytest.approx(scores[1] - scores[0])
    assert against["over_seeds"]["ci95"] is None

    # The twin of rdr learned as ce did. Where validation took ce from another epoch, as it may from
    # the warm-up, they are two epochs of the same training.
    ranks = {
        arm: pl.read_parquet(folder / arm / "seed-0" / "ranks.parquet") for arm in ("ce", "rdr")
    }
    terms = whole["equal_terms"]
    assert (terms["twins"], terms["differ"]) == (1, 0)
    same = ranks["ce"]["student_test_rank"].equals(ranks["rdr"]["control_test_rank"])
    assert terms["same"] == same
    assert not ranks["rdr"]["student_test_rank"].equals(ranks["rdr"]["control_test_rank"])

    assert whole["verdict"]["headline"] in done.stdout
    assert "With one seed (rdr)" in done.stdout
    assert f"Page: {folder / 'comparison.html'}" in done.stdout
    page = (folder / "comparison.html").read_text()
    assert "no live teacher" in page
    assert str(tmp_path / "store") in page

    # The same command trains nothing again and comes to the same.
    once = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/report.json")}
    again = launch(words)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("there already") == 2
    assert {path: path.stat().st_mtime_ns for path in once} == once
    assert found(folder) == whole


@pytest.mark.slow
@pytest.mark.usefixtures("waiting_threads_sleep")
def test_ctrl_c_on_a_terminal_loses_nothing(
    recipe: Path, data: InteractionData, write_store, training_places, tmp_path: Path
):
    words = command(recipe, data, write_store, training_places, tmp_path, epochs=60)
    # A terminal sends its signal to the whole group of processes.
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    run = tmp_path / "out" / "rdr" / "seed-0"
    log = run / "metrics.jsonl"
    for _ in range(6000):
        if log.exists() and log.read_text().count('"train"') > 8:
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Stopped with 1 of 2 runs done" in said
    assert "Traceback" not in said + run.with_suffix(".log").read_text()
    assert list((run / "checkpoints").glob("step_*"))
    assert not (run / "report.json").exists()

    done = launch(words)
    assert done.returncode == 0, done.stderr
    assert "rdr, seed 0, going on" in done.stderr
    terms = found(tmp_path / "out")["equal_terms"]
    # The twin is the baseline still, which was not interrupted.
    assert (terms["twins"], terms["differ"]) == (1, 0)
