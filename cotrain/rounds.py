"""Co-training both ways: between rounds of distillation the teacher is trained on the candidates of
the present student, and teaches on.

A round ends with a checkpoint and with its student in `rounds/N/student`. Then the run leaves the
memory, the teacher is trained into `rounds/N/teacher`, and the run goes on from its checkpoint with
that adapter, as a resumed one does: so it is all the same where it is killed and resumed.

Student and control keep one schedule over all rounds. The teacher learns from training positions of
the users that `tuning.held_out` leaves, the same ones in all rounds, and each round from others.
"""

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cotrain.config import Config, FinetuneConfig
from cotrain.distill import run as online
from cotrain.distill.loop import Interrupted, Run, fit, kept_out, meet_teacher
from cotrain.distill.outcome import finish
from cotrain.distill.state import CotrainState, save_checkpoint
from cotrain.errors import CheckpointError, ConfigError, CotrainError
from cotrain.finetune import methods, tuning
from cotrain.finetune_settings import ExamplesConfig, SftConfig, StarConfig
from cotrain.runtime import checkpoint
from cotrain.student.recommender import Recommender

# By which a teacher is trained, for each way to ask it.
_METHODS = {"direct": "rank-sft", "cot": "star"}
_VALIDATION_ROWS, _LR_WARMUP_STEPS, _EVAL_EVERY_STEPS = 120, 4, 10


class TuningInterrupted(Interrupted):
    """The run was asked to stop while its teacher was trained, which has written a checkpoint."""

    def __init__(self, number: int, folder: Path):
        CotrainError.__init__(
            self, f"Stopped while the teacher was trained after round {number}. Go on by"
        )
        self.folder = folder


def run(config: Config, resume: bool = False) -> dict[str, Any]:
    """A whole run in `train.rounds` rounds; arguments, result and errors as for
    `cotrain.distill.run.run`."""
    if config.train.rounds == 1:
        return online.run(config, resume)
    report = None
    while report is None:
        report, config = play_round(config, resume)
        resume = True
        gc.collect()  # a language model is full of circles
        torch.compiler.reset()  # which compiled programs hold as well
    return report


def play_round(config: Config, resume: bool) -> tuple[dict[str, Any] | None, Config]:
    """From the beginning of a round, or from the latest checkpoint, to the round's end.

    Returns:
        The report, where it was the last round; and the settings, their `output_dir` filled in.
    """
    ended = records(config) if resume else []
    between = bool(ended) and "tuning" not in ended[-1]
    failure = None
    if between:
        ended[-1]["tuning"] = train_teacher(config, len(ended))
        failure = ended[-1]["tuning"].get("failure")
    number = len(ended) + 1
    adapter = adapter_in(config, number if failure is None else number - 1)
    state, this_run = online.prepare(config, resume, adapter)
    config = this_run.config
    if between:
        state.rounds = ended
        if failure is None:
            meet_teacher(state, this_run)
            if kept_out(state, config):
                failure = "The audit finds nothing left that the trained teacher could teach"
        if failure is not None:
            state.rounds[-1]["ended"] = failure
            return conclude(state, this_run), config
    fit(state, this_run, config.train.round_end(number))
    if state.epoch <= config.train.warmup_epochs:  # max_steps came before the teacher
        return conclude(state, this_run), config
    state.rounds.append(record(state, config))
    this_run.accelerator.print(summary(state, config))
    if is_over(state, config) or "ended" in state.rounds[-1]:
        return conclude(state, this_run), config
    keep_student(state, this_run)
    save_checkpoint(state, this_run.folder, config, this_run.accelerator, this_run.log.num_bytes)
    this_run.log.close()
    return None, config


def conclude(state: CotrainState, this_run: Run) -> dict[str, Any]:
    """The end of the run; returns its report."""
    report = finish(state, this_run)
    this_run.accelerator.end_training()
    return report


# ---- where a run stands -------------------------------------------------------------------------


def round_folder(config: Config, number: int) -> Path:
    """Of what belongs to a round; absolute, so that a run may be resumed from anywhere."""
    return (Path(str(config.output_dir)) / "rounds" / str(number)).resolve()


def records(config: Config) -> list[dict[str, Any]]:
    """Of the rounds that had ended when the latest checkpoint was written."""
    return checkpoint.load_latest(Path(str(config.output_dir)))[1]["rounds"]


def adapter_in(config: Config, number: int) -> str | None:
    """The adapter that the teacher of a round, counted from 1, has on."""
    if number == 1:
        return config.teacher.adapter
    return str(round_folder(config, number - 1) / "teacher" / "adapter")


def is_over(state: CotrainState, config: Config) -> bool:
    """Whether all epochs are done, or as many steps as there may be."""
    train = config.train
    return state.epoch == train.epochs or state.step >= (train.max_steps or state.step + 1)


# ---- between two rounds -------------------------------------------------------------------------


def keep_student(state: CotrainState, this_run: Run) -> None:
    """Write the present student, whose candidates the teacher will learn from."""
    if this_run.accelerator.is_main_process:
        folder = round_folder(this_run.config, len(state.rounds)) / "student"
        shutil.rmtree(folder, ignore_errors=True)
        Recommender(state.student.bare, this_run.data.catalog).save_pretrained(folder)


def train_teacher(config: Config, number: int) -> dict[str, Any]:
    """Train the teacher on the candidates of the student that a round left, or go on with it.

    Returns:
        For the round's record: what came of it, or as `failure` why nothing did.

    Raises:
        TuningInterrupted: After Ctrl-C or SIGTERM.
        ConfigError, CheckpointError: Its folder holds something else, or cannot be written.
    """
    settings = tuning_settings(config, number)
    folder = Path(str(settings.output))
    names = (
        "method", "rows", "validation_rows", "steps", "best_step", "validation_start",
        "validation_best", "seconds",
    )  # fmt: skip
    if (folder / "report.json").is_file():
        report = json.loads((folder / "report.json").read_text("utf-8"))
        return {name: report[name] for name in names}
    if not (folder / "config.yaml").is_file():  # killed before it had begun
        shutil.rmtree(folder, ignore_errors=True)
    try:
        report = methods.train(_METHODS[config.teacher.mode], settings, last=False)
    except tuning.Interrupted as stop:
        raise TuningInterrupted(number, Path(str(config.output_dir))) from stop
    except (ConfigError, CheckpointError):
        raise
    except CotrainError as error:  # too few rows, say, on small data: the run is not lost
        return {"failure": f"The teacher could not be trained after round {number}: {error}"}
    return {name: report[name] for name in names}


def tuning_settings(config: Config, number: int) -> FinetuneConfig:
    """Of the teacher's training after a round."""
    folder, own = round_folder(config, number), config.tuning
    return FinetuneConfig(
        data=config.data,
        teacher=replace(config.teacher, adapter=adapter_in(config, number)),
        examples=ExamplesConfig(
            student=str(folder / "student"), rows=own.rows, draw=number, held_out=own.held_out,
            validation_rows=_VALIDATION_ROWS,
        ),
        sft=SftConfig(
            epochs=1, learning_rate=own.learning_rate, lr_warmup_steps=_LR_WARMUP_STEPS,
            eval_every_steps=_EVAL_EVERY_STEPS,
        ),
        star=StarConfig(rounds=1),
        output=str(folder / "teacher"),
        seed=config.seed,
    )  # fmt: skip


# ---- what is told of a round --------------------------------------------------------------------


def record(state: CotrainState, config: Config) -> dict[str, Any]:
    """Of the round that has just ended.

    `ended` is there, and says why, where no other is to follow that could.
    """
    before = state.rounds
    first_epoch = before[-1]["epochs"][1] if before else config.train.warmup_epochs
    audits = state.audits
    start = audit_at(state, before[-1]["step"]) if before else (audits[0] if audits else None)
    found: dict[str, Any] = {
        "round": len(before) + 1,
        "epochs": [first_epoch + 1, state.epoch],
        "step": state.step,
        "seconds": round(state.seconds - sum(one["seconds"] for one in before), 1),
        "adapter": adapter_in(config, len(before) + 1),
        "student": state.student.last_metric,
        "student_best": state.student.best_metric,
        "control": state.control.last_metric if state.control else None,
        "control_best": state.control.best_metric if state.control else None,
        "audit_start": start,
        "audit_end": audit_at(state, state.step),
    }
    risen = not before or found["student_best"] > before[-1]["student_best"]
    if not risen and not is_over(state, config):
        found["ended"] = (
            "The student's best NDCG@10 on validation did not rise above the "
            f"{found['student_best']:.4f} of the round before"
        )
    return found


def audit_at(state: CotrainState, step: int) -> dict[str, Any] | None:
    """The latest audit of those after so many steps."""
    return next((one for one in reversed(state.audits) if one["step"] == step), None)


def summary(state: CotrainState, config: Config) -> str:
    """A line about the round that has just ended."""
    found = state.rounds[-1]
    control = "" if found["control"] is None else f", control {found['control']:.4f}"
    line = (
        f"Round {found['round']} of {config.train.rounds} ended with epoch {state.epoch}: NDCG@10 "
        f"on validation, student {found['student']:.4f} (best {found['student_best']:.4f})"
        f"{control}."
    )
    return f"{line} {found['ended']}: no other round." if "ended" in found else line
