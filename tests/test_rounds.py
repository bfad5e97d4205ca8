"""Co-training both ways on few users, with a tiny random teacher."""

import json
import shutil
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cotrain import config as configuration
from cotrain import rounds
from cotrain.config import Config, parse
from cotrain.data.interactions import load_interactions
from cotrain.distill import loop
from cotrain.distill import run as online
from cotrain.errors import ConfigError, DataError
from cotrain.finetune import methods, tuning
from cotrain.finetune.examples import held_out_users, make_examples
from cotrain.runtime import checkpoint, tracking
from cotrain.teacher.ranker import RankLLM

Settings = Callable[..., Config]
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """With models this small a second thread costs more than it does; and few steps of training a
    teacher are to have checkpoints."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "_EVAL_EVERY_STEPS", 1)
        patch.setattr(tracking, "use_all_cores", lambda processes: torch.set_num_threads(1))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def settings(tiny_teacher: str, small_tables: tuple[Path, Path]) -> Settings:
    """Of a run on 60 users in two rounds; options override others."""
    interactions, items = small_tables

    def with_options(folder: Path, *options: str) -> Config:
        return parse(
            [
                "--data.interactions", str(interactions), "--data.items", str(items),
                "--teacher.model", tiny_teacher, "--teacher.quantization", "fp32",
                "--teacher.template", "brief", "--teacher.max_title_tokens", "6",
                "--teacher.history_length", "3", "--teacher.calibration_rows", "4",
                "--student.hidden_size", "16", "--student.max_length", "20",
                "--train.epochs", "6", "--train.warmup_epochs", "2", "--train.rounds", "2",
                "--train.batch_size", "16", "--train.checkpoint_every_steps", "3",
                "--train.learning_rate", "0.01", "--distill.teacher_temperature", "0.1",
                "--distill.audit_rows", "8", "--query.fraction", "0.3",
                "--tuning.rows", "48", "--tuning.learning_rate", "0.01",
                "--tuning.held_out", "0.8", "--eval.bootstrap_samples", "200",
                "--output_dir", str(folder), *options,
            ]
        )  # fmt: skip

    return with_options


@pytest.fixture(scope="module")
def undisturbed(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run in two rounds."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    rounds.run(settings(folder))
    return folder


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def results(folder: Path) -> dict[str, Any]:
    """All that a run found out, without its times and places."""
    report = report_of(folder)
    kept = {name: report[name] for name in ("student", "control", "lift", "shipped", "rounds")}
    for one in kept["rounds"]:
        for row in (one, one.get("tuning", {})):
            for name in ("seconds", "adapter"):
                row.pop(name, None)
    return kept | {"audits": report["teacher"]["audits"]}


def test_each_round_has_a_teacher_that_has_learned_from_the_student_before(undisturbed: Path):
    report = report_of(undisturbed)
    first, second = report["rounds"]
    assert (first["epochs"], second["epochs"]) == ([3, 4], [5, 6])
    assert first["adapter"] is None
    assert second["adapter"] == str(undisturbed / "rounds/1/teacher/adapter")
    assert not (undisturbed / "rounds/2").exists()

    # The same student on the same rows: what may differ is the teacher.
    before, after = first["audit_end"], second["audit_start"]
    assert (before["student"], before["rows"]) == (after["student"], after["rows"])
    assert report["teacher"]["audits"] == [
        one[name] for one in (first, second) for name in ("audit_start", "audit_end")
    ]
    assert 0 < first["tuning"]["rows"] <= 48
    assert "tuning" not in second
    assert second["student_best"] == report["student"]["validation"]["ndcg@10"]
    assert second["student_best"] >= first["student_best"] >= first["student"]


def test_the_control_notices_nothing_of_rounds(
    undisturbed: Path, settings: Settings, tmp_path: Path
):
    alone = settings(tmp_path / "run", "--train.rounds", "1", "--distill.audit", "off")
    report = rounds.run(alone)
    assert report["rounds"] == []
    found = report_of(undisturbed)["control"]
    assert found == json.loads(json.dumps(report["control"]))


def test_the_page_tells_of_rounds(undisturbed: Path):
    page = (undisturbed / "report.html").read_text()
    first, second = report_of(undisturbed)["rounds"]
    assert "<h2>Rounds</h2>" in page
    for one in (first, second):
        for value in (one["student"], one["control"], one["audit_end"]["blend"]):
            assert f"{value:.4f}" in page
    assert f"rank-sft, {first['tuning']['rows']} rows" in page


@pytest.mark.parametrize("step", [0, 2], ids=["before the first step", "after a checkpoint"])
def test_killed_while_the_teacher_is_trained(
    undisturbed: Path,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
):
    folder, steps = tmp_path / "run", []
    real = tuning._Loop.train_step

    def train_step(self: Any) -> dict[str, float]:
        if len(steps) == step:
            raise KeyboardInterrupt
        steps.append(1)
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(tuning._Loop, "train_step", train_step)
        with pytest.raises(KeyboardInterrupt):
            rounds.run(settings(folder))
    assert bool(checkpoint.steps(folder / "rounds/1/teacher")) == bool(step)
    rounds.run(online.open_interrupted(folder), resume=True)
    assert results(folder) == results(undisturbed)


def test_killed_in_every_round_of_training(
    undisturbed: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    real = loop.cotrain_step

    def go_on() -> None:
        if folder.exists():
            rounds.run(online.open_interrupted(folder), resume=True)
        else:
            rounds.run(settings(folder))

    # Of 24 steps: in the warm-up, in either round, and before the second has begun.
    for limit in (5, 11, 16, 17, 20):

        def step(state: Any, *arguments: Any, limit: int = limit, **named: Any) -> dict[str, float]:
            if state.step == limit:
                raise KeyboardInterrupt
            return real(state, *arguments, **named)

        monkeypatch.setattr(loop, "cotrain_step", step)
        with pytest.raises(KeyboardInterrupt):
            go_on()
    monkeypatch.setattr(loop, "cotrain_step", real)
    go_on()
    assert results(folder) == results(undisturbed)
    weights = "student/model.safetensors"
    one, other = load_file(folder / weights), load_file(undisturbed / weights)
    assert all(one[name].equal(other[name]) for name in one)


def test_asked_to_stop_while_the_teacher_is_trained(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: Any, **__: Any) -> None:
        raise tuning.Interrupted("Stopped at step 3.")

    monkeypatch.setattr(methods, "train", interrupted)
    with pytest.raises(loop.Interrupted, match="trained after round 1") as caught:
        rounds.run(settings(tmp_path / "run"))
    assert caught.value.folder == tmp_path / "run"


def test_one_teacher_at_a_time_is_in_memory(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    models: list[weakref.ref[Any]] = []
    versions: list[str] = []
    make_teacher, train = online.make_teacher, methods.train

    def made(*arguments: Any) -> Any:
        teacher = make_teacher(*arguments)
        assert isinstance(teacher.ranker, RankLLM)
        models.append(weakref.ref(teacher.ranker.backbone.model))
        versions.append(teacher.ranker.backbone.adapter_version)
        return teacher

    def trained(*arguments: Any, **named: Any) -> Any:
        assert [model() for model in models] == [None]
        return train(*arguments, **named)

    monkeypatch.setattr(online, "make_teacher", made)
    monkeypatch.setattr(methods, "train", trained)
    rounds.run(settings(tmp_path / "run"))
    assert len(models) == 2
    assert versions[0] == "base"
    assert versions[1] != "base"


def test_no_other_round_where_the_student_has_stopped_to_rise(settings: Settings, tmp_path: Path):
    still = ["--train.rounds", "4", "--train.learning_rate", "1e-12", "--distill.audit", "off"]
    report = rounds.run(settings(tmp_path / "run", *still))
    assert [one["round"] for one in report["rounds"]] == [1, 2]
    assert "did not rise" in report["rounds"][-1]["ended"]
    assert report["rounds"][-1]["epochs"] == [4, 4]
    assert "did not rise" in (tmp_path / "run/report.html").read_text()


def test_a_teacher_that_cannot_be_trained_ends_the_rounds_and_not_the_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def nothing(*_: Any, **__: Any) -> None:
        raise DataError("No held-out user has the true item.")

    monkeypatch.setattr(methods, "train", nothing)
    report = rounds.run(settings(tmp_path / "run"))
    (only,) = report["rounds"]
    assert "No held-out user" in only["ended"]
    assert report["lift"]["ndcg@10"]["absolute"] is not None
    assert "No held-out user" in (tmp_path / "run/report.html").read_text()


def test_a_trained_teacher_that_the_audit_refuses_does_not_teach(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loop, "audit_teacher", lambda state, run: state.audits.append(
        {**AUDIT, "step": state.step, "teaches": not state.rounds}
    ))  # fmt: skip
    report = rounds.run(settings(tmp_path / "run", "--distill.audit", "stop"))
    (only,) = report["rounds"]
    assert "nothing left that the trained teacher could teach" in only["ended"]
    assert [one["teaches"] for one in report["teacher"]["audits"]] == [True, True, False]


AUDIT = {
    "epoch": 0, "rows": 8, "student": 0.4, "teacher": 0.2, "blend": 0.4,
    "popularity": 0.3, "chance": 0.23, "beta": 0.1,
    "teacher_lift": {"absolute": -0.2, "relative": -0.5, "ci95": [-0.3, -0.1], "p_value": 0.01},
    "blend_lift": {"absolute": 0.0, "relative": 0.0, "ci95": [-0.1, 0.1], "p_value": 1.0},
}  # fmt: skip


def test_the_blend_keeps_the_weight_that_was_fitted_before_the_student_learned(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Later, a student that has learned what the teacher adds would be pulled back to its control.
    betas = iter([0.4, 0.0])
    monkeypatch.setattr(loop, "audit_teacher", lambda state, run: state.audits.append(
        {**AUDIT, "step": state.step, "teaches": True, "beta": next(betas)}
    ))  # fmt: skip
    state, this_run = online.prepare(settings(tmp_path / "run", "--distill.target", "blend"))
    loop.start_distilling(state, this_run)
    loop.meet_teacher(state, this_run)
    assert len(state.audits) == 2
    assert state.blend_beta == 0.4


def test_steps_that_run_out_end_the_rounds(settings: Settings, tmp_path: Path):
    in_round_1 = settings(tmp_path / "one", "--train.max_steps", "10")
    assert [one["epochs"] for one in rounds.run(in_round_1)["rounds"]] == [[3, 3]]
    before = settings(tmp_path / "two", "--train.max_steps", "3", "--distill.audit", "off")
    assert rounds.run(before)["rounds"] == []


def test_epochs_are_divided_evenly(settings: Settings, tmp_path: Path):
    config = settings(tmp_path, "--train.epochs", "12", "--train.rounds", "4")
    assert [config.train.round_end(number) for number in range(5)] == [2, 4, 7, 9, 12]


def test_rounds_learn_from_other_positions_of_the_same_users(undisturbed: Path, settings: Settings):
    config = settings(undisturbed)
    data = load_interactions(config.data)
    settings_of = [rounds.tuning_settings(config, number).examples for number in (1, 2)]
    found = [
        make_examples(data, replace(own, candidates="random"), 20, config.seed, None)
        for own in settings_of
    ]
    apart = set(held_out_users(data, config.tuning.held_out, config.seed).tolist())
    keys = []
    for one in found:
        assert {row.user for row in one.validation} <= apart
        assert not {row.user for row in one.train} & apart
        # Neither a validation nor a test target.
        assert all(row.target == data.train_history(row.user)[row.cut] for row in one.train)
        keys.append({(row.user, row.cut) for row in one.train})
    assert len(keys[0] & keys[1]) < len(keys[0]) / 4


@pytest.mark.slow
def test_two_processes_play_rounds_together(settings: Settings, tmp_path: Path):
    folder, file = tmp_path / "run", tmp_path / "run.yaml"
    configuration.save(settings(folder), file)
    accelerate = shutil.which("accelerate", path=str(Path(sys.executable).parent)) or "accelerate"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    done = subprocess.run(
        [
            accelerate, "launch", "--config_file", "accelerate_configs/cpu_2_processes.yaml",
            "--main_process_port", port, "scripts/train_online.py", "--config", str(file),
        ],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = report_of(folder)
    assert report["environment"]["num_processes"] == 2
    assert [one["round"] for one in report["rounds"]] == [1, 2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--teacher.model", "none"], "train.rounds 2 trains the teacher"),
        (["--train.rounds", "5"], "train.rounds 5 are more than the 4 epochs"),
        (["--teacher.mode", "generate"], "teacher.mode generate has no way for"),
        (["--teacher.identifiers", "numbers"], "one step that decides between all"),
        (["--teacher.window", "10"], "one step that decides between all"),
        (["--query.when", "offline"], "set query.when live"),
    ],
)
def test_what_rounds_cannot_do_is_told_at_once(
    settings: Settings, tmp_path: Path, options: list[str], expected: str
):
    with pytest.raises(ConfigError, match=expected):
        settings(tmp_path, *options)
