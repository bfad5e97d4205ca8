"""What a run ends with: one look at the test data, an exported model, a report."""

import shutil
from typing import Any

import numpy as np
import polars as pl

from cotrain import config as configuration
from cotrain.config import Config
from cotrain.distill.loop import Run
from cotrain.distill.meters import TeacherMeter
from cotrain.distill.state import CotrainState, Learner, fork_control
from cotrain.evaluation.compare import paired_bootstrap
from cotrain.evaluation.evaluator import evaluate
from cotrain.evaluation.metrics import metrics_from_ranks, per_user_metric
from cotrain.evaluation.report import result_table, write_report
from cotrain.runtime import tracking
from cotrain.student.sasrec import SASRec


def finish(state: CotrainState, run: Run) -> dict[str, Any]:
    """Test the best student and control once, export the better on validation, write the report."""
    config, accelerator, folder = run.config, run.accelerator, run.folder
    if config.train.control and state.control is None:  # max_steps came before the teacher
        state.control = fork_control(state, config, accelerator)
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
    meter = state.meter.merge(tracking.gather(state.meter.state_dict()))
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
            "calibration_rows": config.teacher.calibration_rows,
            "letter_bias": state.letter_bias.tolist(),
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
        for name in metrics_from_ranks(ranks["student"][split])
    }


def _effective_ranks(state: CotrainState, meter: TeacherMeter) -> dict[str, Any]:
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
    placing = teacher["target_placing"]
    if placing["rows"] and placing["teacher"] < placing["student"]:
        warnings.append(
            f"Where the true next item was among the candidates ({placing['rows']} training rows), "
            f"the student's own order places it better than the teacher: mean reciprocal rank "
            f"{placing['student']:.3f} against {placing['teacher']:.3f}; any order gives "
            f"{placing['random']:.3f}. Do not expect a lift from this teacher."
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
