"""A whole run: from settings to an exported student and a report."""

import json
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from accelerate import Accelerator

from cotrain import config as configuration
from cotrain.config import Config
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.distill.loop import Run, fit
from cotrain.distill.querying import RandomQuery, Teacher
from cotrain.distill.state import CotrainState, Learner, new_state, restore_checkpoint
from cotrain.errors import CheckpointError, ConfigError, TeacherError
from cotrain.evaluation.compare import paired_bootstrap
from cotrain.evaluation.evaluator import evaluate
from cotrain.evaluation.metrics import metrics_from_ranks, per_user_metric
from cotrain.evaluation.report import result_table, write_report
from cotrain.runtime import checkpoint, tracking
from cotrain.runtime.seeding import seed_everything
from cotrain.student.sasrec import SASRec
from cotrain.teacher.backbone import load_backbone
from cotrain.teacher.prompts import PromptBuilder
from cotrain.teacher.ranker import RankLLM

LIFT_METRICS = ("ndcg@10", "recall@10", "mrr")


def open_folder(config: Config) -> tuple[Config, Path]:
    """Choose the folder of a new run.

    Returns:
        The settings with `output_dir` filled in, and that folder, not yet made.

    Raises:
        ConfigError: The folder holds a run already, or something that is not a run.
    """
    if config.output_dir is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        config = replace(config, output_dir=f"runs/{config.data.name}-{stamp}")
    folder = Path(str(config.output_dir))
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file; expected a folder, or nothing yet.")
    if folder.is_dir() and any(folder.iterdir()):
        has = "a run" if (folder / "config.yaml").exists() else "other files"
        raise ConfigError(
            f"output_dir {folder} holds {has} already and nothing is overwritten. Choose another "
            f"--output_dir, or go on with an interrupted run by --resume {folder}."
        )
    return config, folder


def open_interrupted(folder: Path) -> Config:
    """Settings of a run that is to be resumed.

    Raises:
        CheckpointError: There is no run, it has no checkpoint, or it has ended.
    """
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"--resume {folder}: no config.yaml there; expected a run folder.")
    if (folder / "report.json").exists():
        raise CheckpointError(f"--resume {folder}: this run has ended; see {folder}/report.html.")
    if not checkpoint.steps(folder):
        raise CheckpointError(
            f"--resume {folder}: no checkpoint was written yet; delete the folder and start anew."
        )
    config = configuration.parse(["--config", str(folder / "config.yaml")])
    return replace(config, output_dir=str(folder))


def run(config: Config, resume: bool = False) -> dict[str, Any]:
    """Train, evaluate, export and report.

    Args:
        config: Settings; with `resume`, those of the interrupted run in `output_dir`.
        resume: Go on from the latest checkpoint.

    Returns:
        The report, as written to report.json.

    Raises:
        CotrainError: Before any training, if settings, data or teacher cannot work.
        Interrupted: After Ctrl-C or SIGTERM, with a checkpoint written.
    """
    if not resume:
        config, folder = open_folder(config)
    else:
        folder = Path(str(config.output_dir))
    accelerator = Accelerator(log_with="tensorboard", project_dir=str(folder))
    seed_everything(config.seed, accelerator.process_index)
    with accelerator.main_process_first():  # one process downloads, the others find it
        data = load_interactions(config.data)
    check_against_data(config, data)
    say = accelerator.print
    say(f"Data: {data.name}, {data.num_users:,} users, {data.num_items:,} items, "
        f"{data.num_interactions:,} interactions")  # fmt: skip
    for note in data.notes:
        say(f"  {note}")
    with accelerator.main_process_first():
        teacher = make_teacher(config, data, accelerator.device, say)
    state = new_state(data.num_items, teacher.ranker.backbone.hidden_size, config, accelerator)
    log_bytes = 0
    if resume:
        log_bytes = restore_checkpoint(state, folder, config, accelerator)
        say(f"Resuming {folder} at step {state.step}")
    elif accelerator.is_main_process:
        make_folder(folder, config, accelerator)
    accelerator.wait_for_everyone()
    log = tracking.MetricsLog(folder, accelerator, log_bytes, state.step if resume else None)
    say_plan(config, data, state, teacher, folder, say)
    this_run = Run(config, data, teacher, accelerator, log, folder)
    fit(state, this_run)
    report = finish(state, this_run)
    accelerator.end_training()
    return report


def check_against_data(config: Config, data: InteractionData) -> None:
    """Settings that only the data can refute.

    Raises:
        ConfigError: More candidates than items.
    """
    if config.teacher.num_candidates > data.num_items:
        raise ConfigError(
            f"teacher.num_candidates is {config.teacher.num_candidates}, but the catalogue has "
            f"only {data.num_items} items; expected at most that many."
        )


def make_folder(folder: Path, config: Config, accelerator: Accelerator) -> None:
    """Make the run folder with the settings and the environment in it."""
    folder.mkdir(parents=True, exist_ok=True)
    configuration.save(config, folder / "config.yaml")
    facts = tracking.environment(accelerator.device, accelerator.num_processes)
    (folder / "environment.json").write_text(json.dumps(facts, indent=2) + "\n")


def make_teacher(config: Config, data: InteractionData, device: torch.device, say: Any) -> Teacher:
    """Load the language model and try it on a few rows.

    Raises:
        AssetError, TeacherError, ConfigError: It cannot be loaded, its identifiers are not single
            tokens, its context is too short, or it answers nothing finite.
    """
    settings = config.teacher
    say(f"Teacher: {settings.model}, {settings.quantization}, loading …")
    backbone = load_backbone(settings.model, settings.quantization, device)
    prompts = PromptBuilder(
        backbone.tokenizer,
        data.catalog.titles,
        data.catalog.categories,
        num_candidates=settings.num_candidates,
        item_noun=settings.item_noun,
        history_length=settings.history_length,
        max_title_tokens=settings.max_title_tokens,
        max_context_tokens=backbone.max_context_tokens,
    )
    ranker = RankLLM(backbone, prompts, settings.batch_tokens, config.distill.teacher_temperature)
    users = range(min(4, data.num_users))
    any_items = list(range(1, settings.num_candidates + 1))
    probe = ranker.rank(
        [data.train_history(user).tolist() for user in users],
        [any_items for _ in users],
        [(config.seed, user) for user in users],
    )
    if not probe.valid.all():
        raise TeacherError(
            f"The teacher {settings.model!r} with quantization {settings.quantization} answers "
            f"numbers that are not finite ({dict(probe.failures)} of {len(probe.valid)} rows). "
            "Try --teacher.quantization bf16 or fp32, or another model."
        )
    trained = np.flatnonzero(np.diff(data.offsets) - 2 >= 2)
    rate = len(users) / probe.seconds
    say(
        f"Teacher: {backbone.num_parameters / 1e6:,.0f} M parameters on {device}, "
        f"{rate:.2f} rows/s, about {probe.prompt_tokens // len(users)} tokens a row"
    )
    query = RandomQuery(trained, config.query.fraction, config.seed)
    return Teacher(ranker, query, settings.num_candidates, config.seed, rate)


def say_plan(
    config: Config, data: InteractionData, state: CotrainState, teacher: Teacher, folder: Path,
    say: Any,
) -> None:  # fmt: skip
    """Print what follows from the settings before the time is spent."""
    train = config.train
    asked = teacher.query.rows_per_epoch * (train.epochs - train.warmup_epochs)
    parameters = sum(p.numel() for p in state.student.model.parameters())
    say(f"Student: SASRec, {parameters / 1e6:.2f} M parameters")
    say(
        f"Plan: {train.warmup_epochs} epochs of cross-entropy, then "
        f"{train.epochs - train.warmup_epochs} with the teacher on {asked:,} rows "
        f"(about {tracking.clock(asked / teacher.probed_rows_per_s)} of teacher time)"
    )
    say(f"Run folder: {folder}\n")


def finish(state: CotrainState, run: Run) -> dict[str, Any]:
    """Test the best student and control once, export the better on validation, write the report."""
    config, accelerator, folder = run.config, run.accelerator, run.folder
    ranks: dict[str, dict[str, np.ndarray]] = {}
    for learner in state.learners:
        model = accelerator.unwrap_model(learner.model)
        model.load_state_dict(learner.best_weights)
        ranks[learner.name] = {
            "validation": evaluate(
                model, run.data, "validation", config.eval.batch_size, accelerator
            ),
            "test": evaluate(model, run.data, "test", config.eval.batch_size, accelerator),
        }
    meters = tracking.gather(state.meter.state_dict())
    meter = state.meter.merge(meters)
    shipped = state.student
    if state.control is not None and state.student.best_metric <= state.control.best_metric:
        shipped = state.control
    teacher = run.teacher.ranker.backbone
    report = {
        "name": config.data.name,
        "seed": config.seed,
        "seconds": round(state.seconds, 1),
        "shipped": shipped.name,
        "dataset": {
            "name": run.data.name,
            "users": run.data.num_users,
            "items": run.data.num_items,
            "interactions": run.data.num_interactions,
            "notes": run.data.notes,
        },
        "student": _results(state.student, ranks),
        "control": _results(state.control, ranks) if state.control else None,
        "lift": _lifts(ranks, "test", config),
        "lift_validation": _lifts(ranks, "validation", config),
        "teacher": {
            "model": teacher.name,
            "quantization": teacher.quantization,
            "mode": config.teacher.mode,
            "decision_position": config.teacher.decision_position,
            "parameters": teacher.num_parameters,
            **meter.as_report(),
        },
        "effective_rank": _effective_ranks(state, meter),
        "examples": meter.readable_examples(
            run.data.catalog, run.data.user_ids, run.teacher.ranker.prompts
        ),
        "config": configuration.to_dict(config),
        "environment": tracking.environment(accelerator.device, accelerator.num_processes),
    }
    report["warnings"] = _warnings(report)
    if accelerator.is_main_process:
        _export(shipped, ranks, run)
        _, page = write_report(report, run.log.rows(), folder)
        accelerator.print(f"\n{result_table(report)}\n\nReport: {page}")
    return report


def _results(learner: Learner, ranks: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    of_learner = ranks[learner.name]
    return {
        "validation": metrics_from_ranks(of_learner["validation"]),
        "test": metrics_from_ranks(of_learner["test"]),
        "best_epoch": learner.best_epoch,
        "parameters": sum(p.numel() for p in learner.model.parameters()),
    }


def _lifts(
    ranks: dict[str, dict[str, np.ndarray]], split: str, config: Config
) -> dict[str, Any] | None:
    if "control" not in ranks:
        return None
    return {
        name: paired_bootstrap(
            per_user_metric(ranks["student"][split], name),
            per_user_metric(ranks["control"][split], name),
            config.eval.bootstrap_samples,
            config.seed,
        ).as_dict()
        for name in LIFT_METRICS
    }


def _effective_ranks(state: CotrainState, meter: Any) -> dict[str, Any]:
    end = meter.student_states.effective_rank()
    start = state.start_effective_rank
    return {
        "student_state_start": start,
        "student_state": end,
        "decision_state": meter.decision_states.effective_rank(),
        # Half of the directions gone since the teacher came is no drift of training.
        "collapsed": bool(start and end < 0.5 * start),
    }


def _warnings(report: dict[str, Any]) -> list[str]:
    """Plain sentences about what a reader might overlook."""
    warnings = []
    teacher = report["teacher"]
    if not teacher["rows_asked"]:
        warnings.append("No row asked the teacher, so this run says nothing about it.")
    elif teacher["rows_valid"] < teacher["rows_asked"]:
        failed = teacher["rows_asked"] - teacher["rows_valid"]
        warnings.append(
            f"{failed} of {teacher['rows_asked']} asked rows got no valid verdict: "
            f"{teacher['failures']}."
        )
    if teacher["rows_valid"] and teacher["confidence"] < 0.05:
        warnings.append(
            f"The teacher hardly distinguishes the candidates: the entropy of its answers is "
            f"{teacher['identifier_entropy']:.2f} of at most {teacher['entropy_uniform']:.2f} nats."
        )
    if report["effective_rank"]["collapsed"]:
        warnings.append(
            "The student's states collapsed: their effective rank fell from "
            f"{report['effective_rank']['student_state_start']:.1f} to "
            f"{report['effective_rank']['student_state']:.1f}. Lower distill.lambda_emb."
        )
    if report["dataset"]["users"] < 5000:
        warnings.append(
            f"{report['dataset']['users']:,} users are few: between seeds NDCG@10 moves by several "
            "percent on such data, more than most lifts. Use it as a smoke test."
        )
    return warnings


def _export(shipped: Learner, ranks: dict[str, dict[str, np.ndarray]], run: Run) -> None:
    """Write the shipped model with its catalogue, and every user's ranks."""
    target = run.folder / "student"
    shutil.rmtree(target, ignore_errors=True)
    model = run.accelerator.unwrap_model(shipped.model)
    assert isinstance(model, SASRec)
    model.save_pretrained(target)
    run.data.catalog.save(target)
    columns = {"user_id": run.data.user_ids}
    for name, of_learner in ranks.items():
        columns |= {f"{name}_{split}_rank": values for split, values in of_learner.items()}
    pl.DataFrame(columns).write_parquet(run.folder / "ranks.parquet")
