"""What a run ends with: one look at the test data, an exported model, a report."""

import shutil
from typing import Any

import numpy as np
import polars as pl

from cotrain import config as configuration
from cotrain.config import Config
from cotrain.data.interactions import InteractionData
from cotrain.data.splits import SPLITS, Split
from cotrain.distill.learner import Learner, fork_control
from cotrain.distill.loop import Run
from cotrain.distill.meters import TeacherMeter
from cotrain.distill.state import CotrainState
from cotrain.errors import DataError
from cotrain.evaluation.card import card_facts
from cotrain.evaluation.compare import paired_bootstrap
from cotrain.evaluation.evaluator import Evaluation, evaluate
from cotrain.evaluation.metrics import (
    metrics_from_ranks,
    per_user_metric,
    recommendation_metrics,
)
from cotrain.evaluation.report import json_ready, result_table, write_report
from cotrain.evaluation.slices import slice_table, slices_of
from cotrain.rationale.agreement import measure_agreement
from cotrain.rationale.answers import SHIPPED, UNSHIPPED
from cotrain.rationale.explain import Explainer
from cotrain.rationale.head import FOLDER as HEAD
from cotrain.runtime import tracking
from cotrain.student.recommender import Recommender

# Evaluations by model and split.
Found = dict[str, dict[Split, Evaluation]]


def finish(state: CotrainState, run: Run) -> dict[str, Any]:
    """Test the best student and control once, export the better on validation, write the report."""
    config, accelerator, folder = run.config, run.accelerator, run.folder
    # Where max_steps came before the teacher or the rationales did.
    if config.distills and config.train.control and state.control is None:
        state.control = fork_control(state.student)
    found: Found = {}
    for learner in state.learners:
        learner.restore_best()
        found[learner.name] = {
            split: evaluate(learner.bare, run.data, split, config.eval.batch_size, accelerator)
            for split in SPLITS
        }
    meter = state.meter.merge(tracking.gather(state.meter.state_dict()))
    shipped = state.student
    if state.control is not None and state.student.best_metric <= state.control.best_metric:
        shipped = state.control
    report = {
        "name": run.data.name,
        "seed": config.seed,
        "seconds": round(state.seconds, 1),
        "shipped": shipped.name,
        "dataset": _dataset(run.data, config),
        "student": _results(state.student, found, run.data),
        "control": _results(state.control, found, run.data) if state.control else None,
        "lift": _lifts(found, "test", config),
        "lift_validation": _lifts(found, "validation", config),
        "slices": slice_table(
            slices_of(run.data, "test"),
            found["student"]["test"].ranks,
            found["control"]["test"].ranks if state.control else None,
            config.eval.bootstrap_samples,
            config.seed,
        ),
        "teacher": _teacher(state, run, meter),
        "rounds": state.rounds,
        "rationales": _rationales(state, run),
        "effective_rank": _effective_ranks(state, meter) if config.distills else None,
        "examples": []
        if run.teacher is None
        else meter.readable_examples(
            run.data.catalog,
            run.data.user_ids,
            run.teacher.ranker.prompts,
            config.teacher.history_length,
        ),
        "config": configuration.to_dict(config),
        "environment": tracking.environment(accelerator.device, accelerator.num_processes),
    }
    report["warnings"] = _warnings(report)
    if accelerator.is_main_process:
        _export(state, shipped, found, run, report)
        _, page = write_report(report, run.log.rows(), folder)
        run.log.finish(_tracked(report))
        accelerator.print(f"\n{result_table(report)}\n\nReport: {page}")
    return report


def _tracked(report: dict[str, Any]) -> dict[str, float | str]:
    """The row of a run among others, as trackers show it."""
    row: dict[str, float | str] = {"shipped": report["shipped"], "seconds": report["seconds"]}
    for split in ("test", "validation"):
        for model in ("student", "control"):
            for metric in ("ndcg@10", "recall@10") if report[model] else ():
                row[f"{split}/{model}/{metric}"] = report[model][split][metric]
    if report["lift"] is not None:
        lift = report["lift"]["ndcg@10"]
        row["lift/ndcg@10"], row["lift/p_value"] = lift["absolute"], lift["p_value"]
        row["lift/low"], row["lift/high"] = lift["ci95"]
    return row


def _teacher(state: CotrainState, run: Run, meter: TeacherMeter) -> dict[str, Any] | None:
    """Who taught and what came of it; None where the student learned alone."""
    if run.teacher is None:
        return None
    ranker = run.teacher.ranker
    return {
        **ranker.facts,
        "identifier_bias": state.identifier_bias.tolist(),
        "query": {
            "policy": run.config.query.policy,
            "when": run.config.query.when,
            "rows_per_epoch": run.teacher.query.rows_per_epoch,
            "reuse": run.config.query.reuse,
        },
        "target": run.config.distill.target,
        "blend_beta": state.blend_beta if run.config.distill.target == "blend" else None,
        "lambda_rank": state.lambda_rank,
        "audits": state.audits,
        **meter.as_report(),
        "backoffs": [
            {"process": process, **backoff}
            for process, backoffs in enumerate(tracking.gather(ranker.backoffs))
            for backoff in backoffs
        ],
    }


def _rationales(state: CotrainState, run: Run) -> dict[str, Any] | None:
    """What rationales there were and what came of them; None without."""
    if run.rationales is None:
        return None
    settings = run.config.distill
    return {
        **run.rationales.facts(run.data),
        "lambda_rdr": settings.lambda_rdr,
        "form": settings.rdr_form,
        "targets": settings.rdr_targets,
        "agreement": _agreement(state, run),
    }


def _agreement(state: CotrainState, run: Run) -> dict[str, Any] | None:
    """Of each model, how often the reasons that are found for its recommendations fit them; None
    where the items have no categories to tell by."""
    assert run.rationales is not None
    if not run.accelerator.is_main_process:
        return None

    def compare(found: np.ndarray, random: np.ndarray) -> dict[str, Any]:
        samples = run.config.eval.bootstrap_samples
        return paired_bootstrap(found, random, samples, run.config.seed).as_dict()

    agreement = {}
    for learner in state.learners:
        assert learner.head is not None  # made where there are rationales
        recommender = Recommender(learner.bare, run.data.catalog)
        explainer = Explainer(recommender, learner.head, run.rationales.matched, run.data)
        try:
            found = measure_agreement(explainer, seed=run.config.seed)
        except DataError:  # no category tells items apart, or no user can be judged
            return None
        agreement[learner.name] = found.as_report(compare)
    return agreement


def _dataset(data: InteractionData, config: Config) -> dict[str, Any]:
    of_targets = recommendation_metrics(data.targets("test")[:, None], data.train_counts)
    return {
        "name": data.name,
        "users": data.num_users,
        "items": data.num_items,
        "interactions": data.num_interactions,
        "split": config.data.split,
        "evaluated_users": {split: len(data.evaluated_users(split)) for split in SPLITS},
        # What users really took next, to compare with what they are shown.
        "targets": {name: of_targets[f"{name}@1"] for name in ("popularity", "head_share")},
        "notes": data.notes,
    }


def _results(learner: Learner, found: Found, data: InteractionData) -> dict[str, Any]:
    of_learner = found[learner.name]
    return {
        "validation": metrics_from_ranks(of_learner["validation"].ranks),
        "test": metrics_from_ranks(of_learner["test"].ranks),
        "recommended": recommendation_metrics(of_learner["test"].recommended, data.train_counts),
        "best_epoch": learner.best_epoch,
        "parameters": sum(p.numel() for p in learner.bare.parameters()),
    }


def _lifts(found: Found, split: Split, config: Config) -> dict[str, Any] | None:
    if "control" not in found:
        return None
    student, control = found["student"][split].ranks, found["control"][split].ranks
    return {
        name: paired_bootstrap(
            per_user_metric(student, name),
            per_user_metric(control, name),
            config.eval.bootstrap_samples,
            config.seed,
        ).as_dict()
        for name in metrics_from_ranks(student)
    }


def _effective_ranks(state: CotrainState, meter: TeacherMeter) -> dict[str, Any]:
    end = meter.student_states.effective_rank()
    start = state.start_effective_rank
    asked = meter.decision_states.rows is not None
    return {
        "student_state_start": start,
        "student_state": end,
        "decision_state": meter.decision_states.effective_rank() if asked else None,
        # Half of the directions gone since the teacher came is no drift of training.
        "collapsed": bool(start and end < 0.5 * start),
    }


def _teacher_warnings(report: dict[str, Any]) -> list[str]:
    warnings = []
    teacher = report["teacher"]
    if not teacher["rows_asked"]:
        warnings.append("No row asked the teacher, so this run says nothing about it.")
    elif teacher["rows_valid"] < teacher["rows_asked"]:
        failed = teacher["rows_asked"] - teacher["rows_valid"]
        warnings.append(
            f"{failed} of {teacher['rows_asked']} asked rows got no valid verdict: "
            f"{_causes(teacher['failures'])}."
        )
    if 2 * teacher["rows_full"] < teacher["rows_valid"]:
        warnings.append(
            f"Only {teacher['rows_full']} of {teacher['rows_valid']} valid answers rank all "
            f"candidates ({_causes(teacher['partial'])}). What an answer names counts; the rest is "
            "tied behind it."
        )
    if teacher["backoffs"]:
        most = max(backoff["from_tokens"] for backoff in teacher["backoffs"])
        least = min(backoff["to_tokens"] for backoff in teacher["backoffs"])
        count = len(teacher["backoffs"])
        warnings.append(
            f"Memory for the teacher ran out {'once' if count == 1 else f'{count} times'}: its "
            f"prompt tokens in one forward pass were lowered from {most:,} to {least:,} and the "
            f"rows ranked again. --teacher.batch_tokens {least} saves that."
        )
    if teacher["rows_valid"] and teacher["confidence"] < 0.05:
        warnings.append(
            f"The teacher hardly distinguishes the candidates: the entropy of its answers is "
            f"{teacher['entropy']:.2f} of at most {teacher['entropy_uniform']:.2f} nats."
        )
    if teacher["audits"] and not teacher["audits"][0]["teaches"]:
        first = teacher["audits"][0]
        low, high = first["blend_lift"]["ci95"]
        warnings.append(
            "The audit before it taught found nothing that this teacher could teach: on "
            f"{first['rows']} validation rows that hold the true item, the best blend with its "
            f"verdict changes the NDCG@10 of the student's order ({first['student']:.4f}) by "
            f"{first['blend_lift']['absolute']:+.4f} ({low:+.4f} to {high:+.4f})."
        )
    if teacher.get("blend_beta") == 0:
        warnings.append(
            "β of the blend is 0: the ranking loss only held the student to its control's scores, "
            "and taught nothing of the teacher."
        )
    placing = teacher["target_placing"]
    worse = placing["rows"] and placing["teacher"] < placing["student"]
    if worse and teacher.get("target") != "blend":
        warnings.append(
            f"Where the true next item was among the candidates ({placing['rows']} training rows), "
            f"the student's own order places it better than the teacher: mean reciprocal rank "
            f"{placing['student']:.3f} against {placing['teacher']:.3f}; any order gives "
            f"{placing['random']:.3f}. Do not expect a lift from this teacher."
        )
    return warnings


def _causes(counts: dict[str, int]) -> str:
    return ", ".join(f"{cause} {count:,}" for cause, count in counts.items())


def _warnings(report: dict[str, Any]) -> list[str]:
    """Plain sentences about what a reader might overlook."""
    warnings = [] if report["teacher"] is None else _teacher_warnings(report)
    ranks = report["effective_rank"]
    if ranks is not None and ranks["collapsed"]:
        warnings.append(
            "The student's states collapsed: their effective rank fell from "
            f"{ranks['student_state_start']:.1f} to {ranks['student_state']:.1f}. Lower "
            "distill.lambda_emb, or distill.lambda_rdr."
        )
    users = report["dataset"]["evaluated_users"]["test"]
    if users < 5000:
        warnings.append(
            f"{users:,} test users are few: between seeds NDCG@10 moves by several percent on such "
            "data, more than most lifts. Use it as a smoke test."
        )
    return warnings


def _export(
    state: CotrainState, shipped: Learner, found: Found, run: Run, report: dict[str, Any]
) -> None:
    """Write the shipped model and the other one, each with its catalogue, and every user's ranks,
    null where a user is not evaluated."""
    for learner in state.learners:
        target = run.folder / (SHIPPED if learner is shipped else UNSHIPPED)
        shutil.rmtree(target, ignore_errors=True)
        # The report's results and licence notes are those of the shipped one.
        facts = card_facts(json_ready(report)) if learner is shipped else {}
        Recommender(learner.bare, run.data.catalog).save_pretrained(target, model_card_kwargs=facts)
    if run.rationales is not None and shipped.head is not None:
        shipped.head.save(run.folder / HEAD, {"store": run.rationales.facts(run.data)["store"]})
    table = pl.DataFrame({"user_id": run.data.user_ids})
    for name, of_learner in found.items():
        for split, evaluation in of_learner.items():
            ranks = evaluation.ranks_by_user(run.data.num_users)
            table = table.with_columns(pl.Series(f"{name}_{split}_rank", ranks, pl.Int64))
    table.write_parquet(run.folder / "ranks.parquet")
