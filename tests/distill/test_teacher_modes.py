"""Whole runs with every way of asking the teacher, on a few users: what it says is learned from,
counted and shown."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cotrain.distill.loop import Run, fit
from cotrain.distill.outcome import finish
from cotrain.distill.state import CotrainState
from cotrain.errors import TeacherError
from cotrain.teacher.passes import Passes

Prepare = Callable[..., tuple[CotrainState, Run]]
SHORT = ["--train.epochs", "2", "--eval.bootstrap_samples", "100", "--train.learning_rate", "0.01",
         "--distill.lambda_rank", "1"]  # fmt: skip


def of_teacher(**settings: object) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--teacher.{name}", str(value))]


def finished(state: CotrainState, run: Run) -> dict[str, Any]:
    fit(state, run)
    finish(state, run)
    return json.loads((run.folder / "report.json").read_text())


def weights(state: CotrainState) -> list[torch.Tensor]:
    return [learner.model.state_dict()["item_embedding.weight"] for learner in state.learners]


MODES: dict[str, list[str]] = {
    "numbers, emit": of_teacher(
        identifiers="numbers", num_candidates=11, decision_position="emit"
    ),
    "windows and shuffles": [
        *of_teacher(num_candidates=6, window=4, stride=3, shuffles=2),
        "--distill.confidence", "agreement",
    ],
    "cot": of_teacher(mode="cot", reasoning_tokens=4),
    "content free, memo": of_teacher(calibration="content_free", memo_rows=100, batch_tokens=300),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_a_run_in_this_mode_learns_from_every_row(prepared: Prepare, mode: str):
    state, run = prepared(*SHORT, *MODES[mode])
    report = finished(state, run)
    teacher, settings = report["teacher"], run.config.teacher
    assert teacher["rows_asked"] == teacher["rows_valid"] == teacher["rows_full"] == 30
    assert teacher["failures"] == teacher["partial"] == {}
    assert teacher["backoffs"] == []
    for name in ("mode", "decision_position", "identifiers", "window", "stride", "shuffles"):
        assert teacher[name] == getattr(settings, name)
    assert len(teacher["mean_rank_by_shown_position"]) == settings.num_candidates
    assert len(teacher["identifier_bias"]) == settings.num_shown
    assert any(teacher["identifier_bias"])
    assert (teacher["agreement_of_shuffles"] > 0) == (settings.shuffles > 1)
    assert (teacher["generated_tokens"] > 0) == (settings.mode == "cot")
    rows = [row for row in run.log.rows() if row.get("teacher_rows")]
    assert rows
    assert all(row["loss_rank"] > 0 for row in rows)
    student, control = weights(state)
    assert not student.equal(control)
    assert len(report["examples"]) == 5
    for example in report["examples"]:
        assert sorted(example["teacher_ranking"]) == sorted(example["student_ranking"])
        assert (example["reasoning"] != "") == (settings.mode == "cot") or settings.mode == "cot"
    page = (run.folder / "report.html").read_text()
    assert settings.mode in page
    assert Path(run.folder / "student" / "model.safetensors").is_file()


@pytest.mark.parametrize(("position", "window"), [("predict", None), ("emit", 4)])
def test_a_teacher_who_writes_is_learned_from_as_far_as_he_writes(
    prepared: Prepare, writing_teacher: str, position: str, window: int | None
):
    state, run = prepared(
        *SHORT, "--teacher.model", writing_teacher,
        *of_teacher(mode="generate", decision_position=position, window=window),
    )  # fmt: skip
    teacher = finished(state, run)["teacher"]
    assert teacher["rows_asked"] == teacher["rows_valid"] == 30
    assert 0 < sum(teacher["partial"].values()) == 30 - teacher["rows_full"]
    assert teacher["generated_tokens"] > 30
    assert not any(teacher["identifier_bias"])
    assert teacher["entropy"] < teacher["entropy_uniform"]
    student, control = weights(state)
    assert not student.equal(control)


def test_a_teacher_who_never_writes_an_identifier_is_refused_at_once(prepared: Prepare):
    with pytest.raises(TeacherError, match=r"no verdict on any of 8 rows: .*--teacher.mode direct"):
        prepared(*of_teacher(mode="generate"))


def test_a_run_that_runs_out_of_memory_backs_off_and_ends(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    decode = Passes._decode

    def little(self: Passes, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        if ids.numel() > 600:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return decode(self, ids, **options)

    monkeypatch.setattr(Passes, "_decode", little)
    state, run = prepared(*SHORT)
    report = finished(state, run)
    backoffs = report["teacher"]["backoffs"]
    assert backoffs
    assert all(entry["to_tokens"] < entry["from_tokens"] for entry in backoffs)
    assert "ran out of memory" in capsys.readouterr().err
    assert "Memory ran out" in (run.folder / "report.html").read_text()
    assert report["teacher"]["rows_valid"] == report["teacher"]["rows_asked"] == 30
