"""How good a teacher is, on validation rows: beside the student's own order and beside any order,
with intervals; how honest its probabilities are, what is left of its letter bias, what it costs."""

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cotrain import config as configuration
from cotrain.config import EvaluateConfig, TeacherConfig
from cotrain.contradictions import contradictions
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.errors import ConfigError, DataError
from cotrain.evaluation.compare import paired_bootstrap
from cotrain.evaluation.metrics import per_user_metric
from cotrain.finetune.evaluated_rows import read_rows, write_rows
from cotrain.finetune.examples import (
    Example,
    held_out_users,
    open_student,
    rows_at,
    training_positions,
    validation_rows,
)
from cotrain.finetune.quality import Measured, measure, metrics_of
from cotrain.finetune.report import write_report
from cotrain.finetune.run import Sample, any_order, check_verdicts, peak_memory
from cotrain.runtime.tracking import use_all_cores
from cotrain.student.recommender import Recommender
from cotrain.teacher.backbone import load_backbone
from cotrain.teacher.prompts import make_prompts
from cotrain.teacher.ranker import RankLLM
from cotrain.teacher.tokenizer import load_tokenizer

METRICS = ("accuracy@1", "ndcg@10", "mrr")
_COUNT = r"([1-9]\d*)"
_SEARCH = re.compile(f"greedy|sc{_COUNT}|tree{_COUNT}x{_COUNT}x{_COUNT}")


@dataclass(frozen=True)
class Interval:
    """A mean over rows with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} ({self.low:.4f} to {self.high:.4f})"


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure the teacher that the settings name.

    Returns:
        The report, as written to report.json.

    Raises:
        CotrainError: Settings, data, student or teacher cannot work, or no row can be measured.
    """
    use_all_cores(1)
    folder = open_output(config)
    data = load_interactions(config.data)
    print(f"Data: {data.name}, {data.num_users:,} users, {data.num_items:,} items", flush=True)
    student = open_student(config.examples, data)
    rows, looked_at = make_rows(data, config, student)
    print(
        f"Rows: {len(rows):,} whose candidates hold the true item; {looked_at:,} validation rows "
        "were looked at"
    )
    before = read_rows(Path(config.measure.against), rows, data) if config.measure.against else None
    searches = parse_searches(config)
    ranker = make_ranker(data, config)
    labels = config.teacher.mode not in ("bigrec", "pointwise")  # of which alone there is a bias
    if labels and config.teacher.calibration != "none" and config.teacher.calibration_rows:
        calibrate(ranker, data, config, student)
    found = {}
    for name, settings in searches.items():
        if config.measure.searches is not None:
            ranker.use_search(settings)
        started = time.perf_counter()
        measured = measure(ranker, rows, config.seed, name, own_bias=False)
        found[name] = (measured, time.perf_counter() - started)
        check_verdicts(int(measured.verdict.valid.sum()), len(rows),
                       dict(measured.verdict.failures), config)  # fmt: skip
    report, samples = make_report(config, data, rows, looked_at, found, student, before)
    folder.mkdir(parents=True, exist_ok=True)
    measured = next(iter(found.values()))[0]
    write_rows(folder, data, rows, measured, student)
    page = write_report(report, samples, configuration.to_dict(config), [], folder)
    say(report)
    print(f"\nReport: {page}")
    return report


def open_output(config: EvaluateConfig) -> Path:
    """The folder of the report.

    Raises:
        ConfigError: There is something already, or nothing can be written there.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = Path(
        config.output or f"teachers/{Path(config.data.name).name}-evaluation-{stamp}"
    ).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"output {folder} is there already and nothing is overwritten. Choose another --output."
        )
    there = next(path for path in [folder, *folder.parents] if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):  # told now, not after hours
        raise ConfigError(
            f"output {folder} cannot be written: {there} is no folder, or is read-only. Choose "
            "another --output."
        )
    return folder


def make_rows(
    data: InteractionData, config: EvaluateConfig, student: Recommender | None
) -> tuple[list[Example], int]:
    """Validation rows whose candidates hold the true item, and of how many.

    Raises:
        DataError: There is none.
    """
    users = data.evaluated_users("validation")
    if config.measure.users == "held_out":
        apart = held_out_users(data, config.examples.held_out, config.seed)
        users = np.intersect1d(users, apart)
    rows = validation_rows(
        data, users, config.teacher.num_candidates, student, config.examples, config.seed
    )
    hits = [row for row in rows if row.target_place is not None]
    if not hits:
        raise DataError(
            f"None of {len(rows):,} validation rows has the true item among its candidates. Take a "
            "better examples.student, more teacher.num_candidates, or examples.candidates popular."
        )
    if config.measure.rows is not None and config.measure.rows < len(hits):
        draw = np.random.default_rng((config.seed, 17)).permutation(len(hits))
        hits = [hits[place] for place in sorted(draw[: config.measure.rows].tolist())]
    return hits, len(rows)


def make_ranker(data: InteractionData, config: EvaluateConfig) -> RankLLM:
    """The teacher, as a run would load it."""
    settings = config.teacher
    assert settings.model is not None  # checked with the settings
    tokenizer, max_context_tokens = load_tokenizer(settings.model)
    prompts = make_prompts(
        settings, tokenizer, data.catalog.titles, data.catalog.categories, max_context_tokens,
        data.popularity_levels.tolist(),
    )  # fmt: skip
    print(
        f"Teacher: {settings.model}, {settings.quantization}, adapter "
        f"{settings.adapter or 'none'}, loading …", flush=True,
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = load_backbone(
        settings.model, settings.quantization, device, settings.compute, settings.adapter
    )
    ranker = RankLLM(backbone, prompts, settings, train_counts=data.train_counts)
    ranker.prepare()
    return ranker


def calibrate(
    ranker: RankLLM, data: InteractionData, config: EvaluateConfig, student: Recommender | None
) -> None:
    """Measure the letter bias on training rows, as a run does before its teacher teaches."""
    positions = training_positions(data, data.trained_users, config.examples.min_history,
                                   config.seed)[: config.teacher.calibration_rows]  # fmt: skip
    rows = rows_at(
        data, positions, config.examples, config.teacher.num_candidates, config.seed, student
    )
    ranker.calibrate(
        [row.history for row in rows], [row.candidates for row in rows],
        [(config.seed, 18, place) for place in range(len(rows))], "calibrating",
    )  # fmt: skip


# ---- ways to search -----------------------------------------------------------------------------


def parse_searches(config: EvaluateConfig) -> dict[str, TeacherConfig]:
    """Settings of the teacher by name of a search; one without a name where none are asked for.

    Raises:
        ConfigError: An unknown one, or a tree without a process reward model, or not in `cot`, or
            one that the other settings do not allow.
    """
    teacher, text = config.teacher, config.measure.searches
    if text is None:
        return {"ranking": teacher}
    if teacher.mode != "cot":
        raise ConfigError(
            f"measure.searches is {text!r}, but teacher.mode is {teacher.mode}; only cot searches."
        )
    searches = {}
    for name in map(str.strip, text.split(",")):
        match = _SEARCH.fullmatch(name)
        if match is None:
            raise ConfigError(
                f"measure.searches has {name!r}; expected greedy, scN (self-consistency over N "
                "samples) or treeAxBxC (A branches of B kept, C steps), such as "
                "greedy,sc4,tree2x2x3."
            )
        if name.startswith("tree"):
            if teacher.process_reward is None:
                raise ConfigError(
                    f"measure.searches has {name!r}, but teacher.process_reward is none; name the "
                    "folder that scripts/train_teacher.py process-reward wrote."
                )
            branches, samples, steps = (int(match[group]) for group in (2, 3, 4))
            changes = {"branches": branches, "samples": samples, "search_steps": steps}
            searches[name] = replace(teacher, search="tree", **changes)
        elif name == "greedy":
            searches[name] = replace(teacher, search="none")
        else:
            searches[name] = replace(teacher, search="self_consistency", samples=int(match[1]))
        if problems := contradictions(replace(config, teacher=searches[name])):
            raise ConfigError(f"measure.searches has {name!r}, but {problems[0]}")
    return searches


# ---- numbers ------------------------------------------------------------------------------------


def intervals(ranks: np.ndarray, samples: int) -> dict[str, Interval]:
    """Each metric with its interval over rows."""
    return {name: _interval(per_row(ranks, name), samples) for name in METRICS}


def per_row(ranks: np.ndarray, metric: str) -> np.ndarray:
    """(N,) values of one metric."""
    return per_user_metric(ranks, "recall@1" if metric == "accuracy@1" else metric)


def _interval(values: np.ndarray, samples: int) -> Interval:
    found = paired_bootstrap(values, np.zeros_like(values), samples)
    return Interval(found.absolute, *found.ci95)


def expected_calibration_error(probs: torch.Tensor, places: np.ndarray, bins: int = 10) -> float:
    """Mean gap, over bins of equal width, between how sure the teacher is of its first and how
    often that is the true item. Source: Guo et al., ICML 2017."""
    sure, first = probs.max(1)
    right = (first.numpy() == places).astype(float)
    where = np.minimum((sure.numpy() * bins).astype(int), bins - 1)
    gaps = [
        (where == b).mean() * abs(right[where == b].mean() - sure.numpy()[where == b].mean())
        for b in range(bins)
        if (where == b).any()
    ]
    return float(sum(gaps))


def position_bias(measured: Measured) -> list[float]:
    """Mean rank by shown position; flat without a bias."""
    verdict = measured.verdict
    shown = verdict.ranks.gather(1, verdict.shown_order)[verdict.valid]
    return shown.mean(0).tolist()


def facts_of(
    measured: Measured, seconds: float, samples: int, num_candidates: int
) -> dict[str, Any]:
    """Everything about one way of asking."""
    verdict, count = measured.verdict, len(measured.places)
    bias = position_bias(measured)
    chosen = measured.summary()["nll"]
    return {
        **{name: vars(value) for name, value in intervals(measured.ranks, samples).items()},
        "nll": chosen,
        "nll_of_even": float(np.log(num_candidates)),
        "confidence": float(verdict.confidence[verdict.valid].mean()),
        "calibration_error": expected_calibration_error(
            measured.probs[verdict.valid], measured.places[verdict.valid.numpy()]
        ),
        "mean_rank_by_position": bias,
        "position_spread": max(bias) - min(bias),
        "valid_rate": float(verdict.valid.float().mean()),
        "failures": dict(verdict.failures),
        "prompt_tokens_per_row": verdict.prompt_tokens / count,
        "generated_tokens_per_row": verdict.generated_tokens / count,
        "rows_per_s": count / seconds,
    }


def make_report(
    config: EvaluateConfig, data: InteractionData, rows: Sequence[Example], looked_at: int,
    found: dict[str, tuple[Measured, float]], student: Recommender | None,
    before: dict[str, np.ndarray] | None,
) -> tuple[dict[str, Any], list[Sample]]:  # fmt: skip
    """The report, and ten rows to read."""
    size, samples = config.teacher.num_candidates, config.measure.bootstrap_samples
    measured, seconds = next(iter(found.values()))
    own = np.array([row.target_place for row in rows]) + 1
    report: dict[str, Any] = {
        "title": f"A teacher on {data.name}",
        "method": "evaluation",
        "data": data.name,
        "teacher": config.teacher.model,
        "adapter": config.teacher.adapter,
        "quantization": config.teacher.quantization,
        "mode": config.teacher.mode,
        "users": config.measure.users,
        "rows": len(rows),
        "validation_rows": len(rows),
        "rows_looked_at": looked_at,
        **facts_of(measured, seconds, samples, size),
        "any_order": any_order(size),
        "peak_memory_gb": round(
            peak_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu")) / 2**30, 2
        ),
    }
    orders = [{"order": "teacher", **_texts(intervals(measured.ranks, samples))}]
    pairs = []
    if student is not None:
        report["student_order"] = metrics_of(own)
        orders.append({"order": "student", **_texts(intervals(own, samples))})
        pairs.append(_against("the student's order", measured.ranks, own, samples))
    orders.append({"order": "any, expected", **{k: f"{v:.4f}" for k, v in any_order(size).items()}})
    if before is not None:
        report["against"] = config.measure.against
        orders.append(
            {"order": "the other teacher", **_texts(intervals(before["teacher_rank"], samples))}
        )
        pairs.append(_against("the other teacher", measured.ranks, before["teacher_rank"], samples))
    report["tables"] = {"Orders, mean and 95 % interval over rows": orders}
    if pairs:
        report["tables"]["In pairs, on the same rows"] = pairs
    if len(found) > 1:
        report["tables"]["Ways to search"] = [
            _search_row(name, *each, samples) for name, each in found.items()
        ]
    return report, _samples(data, config, rows, measured)


def _texts(values: dict[str, Interval]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def _against(name: str, ranks: np.ndarray, other: np.ndarray, samples: int) -> dict[str, Any]:
    row: dict[str, Any] = {"teacher less": name}
    for metric in METRICS:
        lift = paired_bootstrap(per_row(ranks, metric), per_row(other, metric), samples)
        low, high = lift.ci95
        row[metric] = f"{lift.absolute:+.4f} ({low:+.4f} to {high:+.4f}), p = {lift.p_value:.3f}"
    return row


def _search_row(name: str, measured: Measured, seconds: float, samples: int) -> dict[str, Any]:
    count = len(measured.places)
    return {
        "search": name,
        **_texts(intervals(measured.ranks, samples)),
        "generated tokens": round(measured.verdict.generated_tokens / count, 1),
        "prompt tokens": round(measured.verdict.prompt_tokens / count, 1),
        "seconds a row": round(seconds / count, 2),
    }


def _samples(
    data: InteractionData, config: EvaluateConfig, rows: Sequence[Example], measured: Measured
) -> list[Sample]:
    titles, samples = data.catalog.titles, []
    for place, row in enumerate(rows[:10]):
        shown = row.history[-config.teacher.history_length :]
        order = measured.probs[place].argsort(descending=True).tolist()
        best = [titles[row.candidates[candidate]] for candidate in order[:3]]
        lines = [
            "History: " + "; ".join(titles[item] for item in shown),
            f"Taken next: {titles[row.target]}, ranked {measured.ranks[place]} by the teacher",
            "Ranked first: " + "; ".join(best),
        ]
        if measured.verdict.reasonings:
            lines.insert(1, f"Reasoning: {measured.verdict.reasonings[place]}")
        samples.append(Sample(f"Row {place + 1}", lines))
    return samples


def say(report: dict[str, Any]) -> None:
    """The tables, and what else matters, on the console."""
    for heading, rows in report["tables"].items():
        print(f"\n{heading}")
        columns = list(rows[0])
        cells = [columns, *[[str(row[column]) for column in columns] for row in rows]]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        for line in cells:
            print("  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
    print(
        f"\nvalid {report['valid_rate']:.1%}; calibration error {report['calibration_error']:.3f}; "
        f"mean rank by position {min(report['mean_rank_by_position']):.1f} to "
        f"{max(report['mean_rank_by_position']):.1f}; "
        f"{report['prompt_tokens_per_row']:.0f} prompt and "
        f"{report['generated_tokens_per_row']:.0f} generated tokens a row, "
        f"{report['rows_per_s']:.2f} rows/s; peak memory {report['peak_memory_gb']:.2f} GB"
    )
