"""`scripts/benchmark.py modes`: what a teacher says in each mode, on the same real prompts.

How many answers are verdicts, how many of them whole orders, what they cost, how sure they are, and
how much they follow the place at which a candidate is shown. How good they are is another question.
"""

import dataclasses
from collections import Counter
from typing import Any

import torch

from cotrain.benchmarks import processes
from cotrain.benchmarks.settings import ModesSettings
from cotrain.benchmarks.teacher_rows import make_rows
from cotrain.config import TeacherConfig
from cotrain.runtime.tracking import use_all_cores
from cotrain.teacher.backbone import load_backbone
from cotrain.teacher.ranker import RankLLM
from cotrain.teacher.verdict import TeacherVerdict

# What each line changes of the settings.
MODES: dict[str, dict[str, Any]] = {
    "direct": {},
    "direct, emit": {"decision_position": "emit"},
    "direct, numbers": {"identifiers": "numbers"},
    "direct, window 10, stride 5": {"window": 10, "stride": 5},
    "direct, 3 shuffles": {"shuffles": 3},
    "direct, content-free": {"calibration": "content_free"},
    "cot": {"mode": "cot"},
    "generate": {"mode": "generate"},
}


def run(settings: ModesSettings) -> dict[str, Any]:
    """Ask in every mode, print a line each and what was written.

    Returns:
        Settings, machine, and the numbers of every mode.

    Raises:
        CotrainError: Data or teacher cannot be read.
    """
    use_all_cores(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = load_backbone(settings.model, settings.quantization, device)
    facts = processes.machine(torch.get_num_threads())
    print(headline(settings, facts), flush=True)
    results, samples = {}, []
    for name, changes in MODES.items():
        teacher = TeacherConfig(
            model=settings.model, quantization=settings.quantization,
            num_candidates=settings.num_candidates, template=settings.template, **changes,
        )  # fmt: skip
        # Calibrated on as many rows of other users.
        rows = make_rows(dataclasses.asdict(settings) | {"rows": 2 * settings.rows}, teacher)
        ranker = RankLLM(backbone, rows.prompts, teacher)
        asks = (rows.histories, rows.candidates, rows.seeds)
        count = settings.rows
        before = ranker.calibrate(*(part[count:] for part in asks), progress=name)
        verdict = before
        if teacher.mode != "generate":  # an order has no logits to calibrate
            verdict = ranker.rank(*(part[:count] for part in asks), progress=name)
        results[name] = numbers(verdict, before)
        print(line(name, results[name]), flush=True)
        samples += [f"{name}: {text}" for text in verdict.reasonings[: settings.samples]]
    if samples:
        print("\nReasonings\n" + "\n".join(f"- {text}" for text in samples))
    return {
        "benchmark": "modes",
        "settings": dataclasses.asdict(settings),
        "machine": facts,
        "modes": results,
    }


def numbers(verdict: TeacherVerdict, before: TeacherVerdict) -> dict[str, Any]:
    """What one mode came to; `before` is the verdict before calibration."""
    count, valid = len(verdict.valid), int(verdict.valid.sum())
    partial = Counter(verdict.partial)
    return {
        "rows": count,
        "valid": valid,
        "full": valid - partial.total(),
        "partial": dict(partial),
        "failures": dict(verdict.failures),
        "rows_per_s": count / verdict.seconds,
        "prompt_tokens_per_row": verdict.prompt_tokens / count,
        "generated_tokens_per_row": verdict.generated_tokens / count,
        "confidence": float(verdict.confidence[verdict.valid].mean()) if valid else 0.0,
        "agreement": float(verdict.agreement[verdict.valid].mean()) if valid else 0.0,
        "rank_by_position_before": mean_ranks(before),
        "rank_by_position": mean_ranks(verdict),
    }


def mean_ranks(verdict: TeacherVerdict) -> list[float]:
    """(K,) mean rank by the place at which a candidate was shown; empty without valid rows."""
    if not verdict.valid.any():
        return []
    return verdict.ranks.gather(1, verdict.shown_order)[verdict.valid].mean(0).tolist()


def headline(settings: ModesSettings, facts: dict[str, Any]) -> str:
    """What is asked, before the first answer."""
    return "\n".join(
        [
            f"{settings.model}, {settings.quantization}, template {settings.template}: "
            f"{settings.rows} rows of {settings.data}, {settings.num_candidates} candidates drawn "
            f"by popularity, seed {settings.seed}",
            f"Machine: {facts['processor'] or 'unknown processor'}, {facts['cores']} cores, "
            f"{facts['threads']} threads",
            "Mean rank by shown position: smallest and largest over positions, before and after "
            f"calibration; {(settings.num_candidates + 1) / 2:g} everywhere is no bias.",
            "",
            f"{'mode':<29}{'valid':>8}{'whole':>8}{'rows/s':>8}{'read':>7}{'written':>9}"
            f"{'confid.':>9}{'agree':>7}  {'bias before':<14}{'after':<14}causes",
        ]
    )


def line(name: str, found: dict[str, Any]) -> str:
    """One mode, under the headline's columns."""

    def spread(ranks: list[float]) -> str:
        return f"{min(ranks):.1f} – {max(ranks):.1f}" if ranks else "–"

    causes = ", ".join(
        f"{cause} {count}" for cause, count in {**found["failures"], **found["partial"]}.items()
    )
    return (
        f"{name:<29}{found['valid'] / found['rows']:>8.0%}{found['full'] / found['rows']:>8.0%}"
        f"{found['rows_per_s']:>8.2f}{found['prompt_tokens_per_row']:>7.0f}"
        f"{found['generated_tokens_per_row']:>9.1f}{found['confidence']:>9.2f}"
        f"{found['agreement']:>7.2f}  {spread(found['rank_by_position_before']):<14}"
        f"{spread(found['rank_by_position']):<14}{causes}"
    )
