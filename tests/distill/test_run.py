"""Whole runs through the script: the folder they leave, killing and resuming, bad input."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from cotrain.errors import CotrainError
from cotrain.rationale.answers import FinishedRun
from cotrain.runtime import checkpoint
from cotrain.student.recommender import Recommender

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "train_online.py"
specification = importlib.util.spec_from_file_location("train_online", SCRIPT)
assert specification is not None
assert specification.loader is not None
train_online = importlib.util.module_from_spec(specification)
specification.loader.exec_module(train_online)
Options = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def waiting_threads_sleep() -> Iterator[None]:
    """In the runs that are launched: models this small leave a second thread waiting most of the
    time, and one that spins takes the core from whatever else runs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_WAIT_POLICY", "PASSIVE")
        yield


@pytest.fixture
def options(settings: Options, tmp_path: Path) -> Options:
    return {**settings, "output_dir": tmp_path / "run"}


@pytest.fixture(scope="module")
def settings(tiny_teacher: str, small_tables: tuple[Path, Path]) -> Options:
    """A run of 24 steps on 60 users."""
    return {
        "data.interactions": small_tables[0],
        "data.items": small_tables[1],
        "teacher.model": tiny_teacher,
        "teacher.quantization": "nf4",
        "teacher.num_candidates": 5,
        "teacher.calibration_rows": 4,
        "teacher.compile": "off",
        "student.hidden_size": 16,
        "student.max_length": 20,
        "train.epochs": 6,
        "train.warmup_epochs": 2,
        "train.batch_size": 16,
        "train.checkpoint_every_steps": 3,
        "train.learning_rate": 0.01,
        "distill.teacher_temperature": 0.1,
        "query.fraction": 0.5,
        "eval.bootstrap_samples": 500,
    }


def command(options: Options) -> list[str]:
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(SCRIPT), *words]


def launch(options: Options, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(options), capture_output=True, text=True, env={**os.environ, **environment},
        timeout=300, check=False,
    )  # fmt: skip


def results(folder: Path) -> dict[str, Any]:
    """All that a run found out, without its times."""
    report = json.loads((folder / "report.json").read_text())
    of_time = ("rows_per_s", "prompt_tokens_per_s")
    teacher = {key: value for key, value in report["teacher"].items() if key not in of_time}
    teacher.pop("seconds")
    kept = ("student", "control", "lift", "shipped", "effective_rank", "examples", "dataset")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("teacher_rows_per_s", None)
    return {key: report[key] for key in kept} | {"teacher": teacher, "metrics": rows}


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)


def test_a_run_leaves_what_the_readme_promises(options: Options):
    done = launch(options)
    assert done.returncode == 0, done.stderr
    folder = options["output_dir"]
    report = json.loads((folder / "report.json").read_text())
    assert report["dataset"]["users"] == 60
    for model in ("student", "control"):
        for split in ("validation", "test"):
            scores = report[model][split]
            assert {"recall@10", "ndcg@10", "mrr"} <= scores.keys()
            assert all(0 <= value <= 1 for value in scores.values())
    lift = report["lift"]["ndcg@10"]
    assert lift["ci95"][0] <= lift["absolute"] <= lift["ci95"][1]
    expected = report["student"]["test"]["ndcg@10"] - report["control"]["test"]["ndcg@10"]
    assert lift["absolute"] == pytest.approx(expected)
    teacher = report["teacher"]
    assert teacher["rows_asked"] == teacher["rows_valid"] == 30 * 4
    assert (teacher["mode"], teacher["decision_position"]) == ("direct", "predict")
    better = report["student"]["validation"]["ndcg@10"] > report["control"]["validation"]["ndcg@10"]
    assert report["shipped"] == ("student" if better else "control")
    assert len(report["examples"]) == 5
    assert {"seed", "seconds", "environment", "config"} <= report.keys()
    page = (folder / "report.html").read_text()
    assert "Toy Story" in page or report["examples"][0]["target"].split("&")[0] in page
    assert list(folder.glob("tensorboard/**/events*"))
    assert report["environment"]["torch"] == torch.__version__
    assert (folder / "environment.json").is_file()
    assert len(checkpoint.steps(folder)) == 2

    # The exported student is the model that was tested.
    student = Recommender.from_pretrained(folder / "student")
    assert student.model.settings["num_items"] == report["dataset"]["items"]
    card = (folder / "student/README.md").read_text()
    assert f"| ndcg@10 | {report[report['shipped']]['test']['ndcg@10']:.4f} |" in card
    assert len(student.recommend([student.catalog.item_ids[1:4]]).item_ids[0]) == 10
    ranks = pl.read_parquet(folder / "ranks.parquet")[f"{report['shipped']}_test_rank"]
    recall = report[report["shipped"]]["test"]["recall@10"]
    assert (ranks <= 10).mean() == pytest.approx(recall)
    # The other one is kept too, and each is what its name says.
    run = FinishedRun.open(folder)
    users = run.data.evaluated_users("test").tolist()
    for name in ("student", "control"):
        histories = [run.data.history_before(user, "test") for user in users]
        found, _ = run.models[name].top_indices(histories, 10)
        hits = (found == run.data.targets("test")[:, None]).any(1).mean()
        assert hits == pytest.approx(report[name]["test"]["recall@10"])


def test_a_run_split_by_time_evaluates_whom_it_can(options: Options):
    options |= {"data.split": "time", "data.validation_share": 0.3, "data.test_share": 0.3}
    assert launch(options).returncode == 0
    report = json.loads((options["output_dir"] / "report.json").read_text())
    evaluated = report["dataset"]["evaluated_users"]
    assert 0 < evaluated["test"] < report["dataset"]["users"]
    ranks = pl.read_parquet(options["output_dir"] / "ranks.parquet")
    assert ranks.height == report["dataset"]["users"]
    for split, users in evaluated.items():
        column = ranks[f"student_{split}_rank"]
        assert column.null_count() == ranks.height - users
        recall = report["student"][split]["recall@10"]
        assert (column.drop_nulls() <= 10).mean() == pytest.approx(recall)
    views = {row["view"] for row in report["slices"]}
    for view in views:
        rows = [row for row in report["slices"] if row["view"] == view]
        assert sum(row["users"] for row in rows) == evaluated["test"]
    assert 0 < report["student"]["recommended"]["coverage@10"] <= 1
    page = (options["output_dir"] / "report.html").read_text()
    assert "Slices of the test users" in page


def test_a_student_can_be_trained_alone(options: Options):
    options |= {"teacher.model": "none", "train.epochs": 2}  # fewer than the warm-up with a teacher
    options |= {"train.loss": "sampled_softmax", "train.item_updates": "lazy"}
    done = launch(options)
    assert done.returncode == 0, done.stderr
    assert "without a teacher" in done.stdout
    folder = options["output_dir"]
    report = json.loads((folder / "report.json").read_text())
    assert report["teacher"] is report["control"] is report["lift"] is None
    assert 0 < report["student"]["test"]["mrr"] < 1
    assert f"{report['student']['test']['mrr']:.4f}" in (folder / "report.html").read_text()
    assert pl.read_parquet(folder / "ranks.parquet").columns == [
        "user_id", "student_validation_rank", "student_test_rank",
    ]  # fmt: skip
    student = Recommender.from_pretrained(folder / "student")
    assert len(student.recommend([student.catalog.item_ids[1:4]]).item_ids[0]) == 10


@pytest.fixture(scope="module")
def undisturbed(settings: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = launch({**settings, "output_dir": folder})
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_repeats_itself_and_another_seed_differs(options: Options, undisturbed: Path):
    assert launch(options).returncode == 0
    assert results(options["output_dir"]) == results(undisturbed)
    other = {**options, "output_dir": options["output_dir"].with_name("other"), "seed": 1}
    assert launch(other).returncode == 0
    assert results(other["output_dir"])["student"] != results(undisturbed)["student"]


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    for _ in range(3000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("the run never came to the point at which it was to be stopped")


@pytest.mark.parametrize("stop_step", [6, 15], ids=["in warm-up", "with the teacher"])
def test_a_killed_run_that_is_resumed_ends_like_one_left_alone(
    options: Options, undisturbed: Path, stop_step: int
):
    folder = options["output_dir"]
    process = subprocess.Popen(
        command(options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: (folder / "checkpoints" / f"step_{stop_step}").exists(), process)
    process.kill()
    process.communicate()
    assert not (folder / "report.json").exists()
    resumed = launch({"resume": folder})
    assert resumed.returncode == 0, resumed.stderr
    assert results(folder) == results(undisturbed)
    weights = "student/model.safetensors"
    assert same_weights(folder / weights, undisturbed / weights)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_writes_a_checkpoint_and_says_how_to_go_on(
    options: Options, undisturbed: Path, number: int
):
    folder = options["output_dir"]
    options["train.checkpoint_every_steps"] = 1000
    process = subprocess.Popen(
        command(options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = folder / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count('"train"') > 4, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume {folder}" in said
    assert "Traceback" not in said
    assert len(checkpoint.steps(folder)) == 1
    assert launch({"resume": folder}).returncode == 0
    assert results(folder) == results(undisturbed)


def test_a_run_that_ends_before_the_teacher_starts_says_so(options: Options):
    options["train.max_steps"] = 2
    assert launch(options).returncode == 0
    report = json.loads((options["output_dir"] / "report.json").read_text())
    assert report["lift"]["ndcg@10"]["absolute"] == 0
    assert report["shipped"] == "control"
    assert any("No row asked" in warning for warning in report["warnings"])


def test_without_a_control_there_is_no_lift(options: Options):
    options["train.control"] = "false"
    assert launch(options).returncode == 0
    report = json.loads((options["output_dir"] / "report.json").read_text())
    assert report["control"] is None
    assert report["lift"] is None
    assert report["shipped"] == "student"


def copied_teacher(options: Options, tmp_path: Path, only: str = "*") -> Path:
    """A folder of its own with the teacher's files, set as the teacher."""
    source, folder = Path(options["teacher.model"]), tmp_path / "teacher"
    folder.mkdir()
    for file in source.glob(only):
        (folder / file.name).write_bytes(file.read_bytes())
    options["teacher.model"] = folder
    return folder


def single_letters_broken(options: Options, tmp_path: Path) -> None:
    """A tokenizer that has a token for '[B' and so no single B after a bracket."""
    folder = copied_teacher(options, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[B"])
    tokenizer.save_pretrained(folder)


def without_weights(options: Options, tmp_path: Path) -> None:
    copied_teacher(options, tmp_path, only="config.json")


def short_context(options: Options, tmp_path: Path) -> None:
    path = copied_teacher(options, tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 100}))


def nan_weights(options: Options, tmp_path: Path) -> None:
    path = copied_teacher(options, tmp_path) / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"].fill_(torch.nan)
    save_file(weights, path, metadata={"format": "pt"})


def existing_run(options: Options, tmp_path: Path) -> None:
    options["output_dir"].mkdir()
    (options["output_dir"] / "config.yaml").write_text("seed: 0\n")


def below_a_file(options: Options, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options["output_dir"] = tmp_path / "file" / "run"


def setting(name: str, value: object) -> Callable[[Options, Path], None]:
    def change(options: Options, tmp_path: Path) -> None:
        options[name] = value

    return change


def edited(old: str, new: str) -> Callable[[Options, Path], None]:
    def change(options: Options, tmp_path: Path) -> None:
        path = tmp_path / "interactions.csv"
        path.write_text(Path(options["data.interactions"]).read_text().replace(old, new, 1))
        options["data.interactions"] = path

    return change


BAD_INPUT = {
    "unknown key": (setting("teacher.modell", "x"), ["teacher.modell", "'teacher.model'"]),
    "missing file": (setting("data.interactions", "no/such.csv"), ["no/such.csv"]),
    "missing column": (
        setting("data.user_column", "person"),
        ["person", "user_id", "--data.user_column"],
    ),
    "timestamp": (edited(",88", ",x88"), ["interactions.csv", "x88", "timestamp"]),
    "too many candidates": (setting("teacher.num_candidates", 201), ["≤ 200"]),
    "too many letters": (setting("teacher.num_candidates", 27), ["27", "teacher.window"]),
    "no model folder": (setting("teacher.model", "./no-such-model"), ["no-such-model"]),
    "no weights": (without_weights, ["no weights", "config.json"]),
    "letters": (single_letters_broken, ["'B'", "single"]),
    "context": (short_context, ["99", "teacher.max_title_tokens"]),
    "not finite": (nan_weights, ["non_finite", "quantization"]),
    "no folder possible": (below_a_file, ["cannot be made", "is a file", "--output_dir"]),
    "existing run": (existing_run, ["holds a run", "--resume"]),
    "teacher never starts": (setting("train.warmup_epochs", 6), ["train.warmup_epochs"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_error_before_anything_is_written(
    options: Options, tmp_path: Path, case: str
):
    change, expected = BAD_INPUT[case]
    change(options, tmp_path)
    with pytest.raises(CotrainError) as raised:
        train_online.main(command(options)[2:])
    for part in expected:
        assert part in str(raised.value)
    assert not (options["output_dir"] / "metrics.jsonl").exists()


def test_an_error_is_printed_without_a_traceback(options: Options):
    options["teacher.num_candidates"] = 27
    done = launch(options)
    assert done.returncode == 1
    assert done.stderr.startswith("error: The configuration has 1 mistake(s):")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused_before_the_teacher_is_loaded(
    options: Options, tmp_path: Path
):
    options["output_dir"] = tmp_path / "locked" / "run"
    options["teacher.model"] = "./no-such-model"  # would be the next complaint
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CotrainError, match="is read-only"):
        train_online.main(command(options)[2:])


def only_these(options: Options, tmp_path: Path, rows: list[str]) -> list[str]:
    """Arguments of a run on a table of these rows, without item titles."""
    table = tmp_path / "table.csv"
    table.write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    options["data.interactions"] = table
    del options["data.items"]
    return command(options)[2:]


def test_more_candidates_than_items_is_refused(options: Options, tmp_path: Path):
    rows = [f"{user},{item},{item}" for user in range(4) for item in range(4)]
    arguments = only_these(options, tmp_path, rows)
    with pytest.raises(CotrainError, match="only 4 items"):
        train_online.main(arguments)


def test_histories_too_short_to_train_on_are_refused(options: Options, tmp_path: Path):
    rows = [f"{user},{3 * user + item},{item}" for user in range(9) for item in range(3)]
    arguments = only_these(options, tmp_path, rows)
    with pytest.raises(CotrainError, match="0 of 9 users have two interactions"):
        train_online.main(arguments)


@pytest.mark.parametrize("content", ["nothing", "no checkpoint", "ended"])
def test_resuming_what_cannot_be_resumed_is_refused(tmp_path: Path, content: str):
    folder = tmp_path / "run"
    folder.mkdir()
    if content != "nothing":
        (folder / "config.yaml").write_text("seed: 0\n")
    if content == "ended":
        (folder / "report.json").write_text("{}")
    reason = {"nothing": "config.yaml", "no checkpoint": "no checkpoint", "ended": "has ended"}
    with pytest.raises(CotrainError, match=reason[content]):
        train_online.main(["--resume", str(folder)])


def test_resume_takes_no_other_option(tmp_path: Path):
    with pytest.raises(CotrainError, match="nothing else"):
        train_online.main(["--resume", str(tmp_path), "--seed", "1"])
