"""From runs to what is told apart: by arm, by slice of the users, and whether terms were equal."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cotrain import config as configuration
from cotrain.comparison.arms import BASELINE, Plan
from cotrain.comparison.results import PRIMARY, RunResult
from cotrain.comparison.runs import Failure
from cotrain.comparison.statistics import Difference, difference, holm, spread
from cotrain.data.interactions import InteractionData
from cotrain.evaluation.metrics import per_user_metric
from cotrain.evaluation.slices import slices_of

_POINT = 0.001
_FEWER = 0.95  # of the rows of another arm
METRICS = (PRIMARY, "recall@10", "mrr")
# Results of one arm, by seed.
BySeed = dict[int, RunResult]


def summarise(
    plan: Plan,
    results: Sequence[RunResult],
    failures: Sequence[Failure],
    data: InteractionData,
    added: Sequence[str],
) -> dict[str, Any]:
    """Everything that comparison.json holds, but the verdict.

    Args:
        plan: What was to be done.
        results: Of the runs that ended.
        failures: The others.
        data: What they were trained on.
        added: Arms and seeds that came after results had been seen.
    """
    by_arm = {
        name: {one.run.seed: one for one in results if one.run.arm == name} for name in plan.arms
    }
    arms = {name: _arm(name, plan, by_arm) for name in plan.arms}
    compared = [name for name in plan.arms if arms[name]["against_baseline"]]
    raised = holm([arms[name]["against_baseline"][PRIMARY]["p_value"] for name in compared])
    for name, p_value in zip(compared, raised, strict=True):
        arms[name]["against_baseline"][PRIMARY]["p_holm"] = p_value
        arms[name]["per_point"] = _per_point(arms[name])
        arms[name]["frugal"] = _frugal(name, arms, by_arm, plan)
    base = configuration.to_dict(plan.base)
    return {
        "name": data.name,
        "baseline": BASELINE,
        "metric": PRIMARY,
        "seeds": list(plan.seeds),
        "arms": arms,
        "live_offline": _live_offline(by_arm, plan),
        "chosen": _chosen(by_arm),
        "equal_terms": _equal_terms(by_arm, plan.base.train.warmup_epochs),
        "slices": _slices(by_arm, data, plan),
        "runs": [_run(one) for one in results],
        "failed": [asdict(failure) for failure in failures],
        "added": list(added),
        "dataset": results[0].report["dataset"] if results else None,
        "environment": results[0].report["environment"] if results else None,
        "settings": {key: value for key, value in base.items() if key not in _OF_RUNS},
    }


_OF_RUNS = ("seed", "output_dir")


def _arm(name: str, plan: Plan, by_arm: dict[str, BySeed]) -> dict[str, Any]:
    own = by_arm[name]
    scores: dict[str, Any] = {
        split: {metric: _scores(own, lambda one, s=split, m=metric: one.report["student"][s][m])
                for metric in METRICS}
        for split in ("test", "validation")
    }  # fmt: skip
    return {
        "summary": plan.defined[name].summary,
        "settings": plan.settings[name],
        "seeds": list(own),
        **scores,
        "against_baseline": _against_baseline(name, plan, by_arm),
        "over_own_twin": {
            metric: _scores(own, lambda one, m=metric: one.report["lift"][m]["absolute"])
            for metric in METRICS
        }
        if own and all(one.report.get("lift") for one in own.values())
        else None,
        "teacher_rows": _mean(own, lambda one: (one.report["teacher"] or {}).get("rows_asked", 0)),
        "teacher_seconds": _mean(own, lambda one: (one.report["teacher"] or {}).get("seconds", 0)),
        "per_point": None,
        "frugal": None,
        "rationale_rows": _mean(
            own, lambda one: (one.report.get("rationales") or {}).get("rows", 0)
        ),
        "seconds": _mean(own, lambda one: one.report["seconds"]),
    }  # fmt: skip


def _against_baseline(
    name: str, plan: Plan, by_arm: dict[str, BySeed]
) -> dict[str, dict[str, Any]] | None:
    if name == BASELINE:
        return None
    found = {}
    for metric in METRICS:
        values = _difference(by_arm[name], by_arm[BASELINE], metric, plan, None)
        if values is None:
            return None
        found[metric] = {
            **values.users.as_dict(),
            "over_seeds": asdict(values.seeds),
            "users": len(next(iter(by_arm[name].values())).ranks),
        }
    return found


def _per_point(arm: dict[str, Any]) -> dict[str, float] | None:
    """What a gain of .001 in NDCG@10 cost: rows asked, seconds of the teacher; None without one."""
    gain = arm["against_baseline"][PRIMARY]["absolute"]
    if gain <= 0 or not arm["teacher_rows"]:
        return None
    points = gain / _POINT
    return {"rows": arm["teacher_rows"] / points, "seconds": arm["teacher_seconds"] / points}


def _frugal(
    name: str, arms: dict[str, Any], by_arm: dict[str, BySeed], plan: Plan
) -> dict[str, Any] | None:
    """What is left of the gain of the arm that asks most, of those that differ in nothing but
    `query.…`; None for that arm itself, and for one that asks about as many rows."""

    def others(of: str) -> dict[str, Any]:
        settings = arms[of]["settings"].items()
        return {key: value for key, value in settings if not key.startswith("query.")}

    alike = [of for of in arms if arms[of]["against_baseline"] and others(of) == others(name)]
    most = max(alike, key=lambda of: arms[of]["teacher_rows"])
    rows = arms[name]["teacher_rows"]
    if not rows or rows > _FEWER * arms[most]["teacher_rows"]:
        return None
    values = _difference(by_arm[name], by_arm[most], PRIMARY, plan, None)
    if values is None:
        return None
    gain, whole = (arms[of]["against_baseline"][PRIMARY] for of in (name, most))
    clear = whole["ci95"][0] > 0
    return {
        "of": most,
        "rows": rows / arms[most]["teacher_rows"],
        "kept": gain["absolute"] / whole["absolute"] if clear else None,
        **values.users.as_dict(),
        "over_seeds": asdict(values.seeds),
    }


def _live_offline(by_arm: dict[str, BySeed], plan: Plan) -> dict[str, Any] | None:
    """Asking in each step less asking once, before all of them; None without both arms."""
    live, offline = (by_arm.get(name, {}) for name in ("ranking", "offline"))
    values = _difference(live, offline, PRIMARY, plan, None)
    if values is None:
        return None

    def rows(own: BySeed) -> float | None:
        return _mean(own, lambda one: (one.report["teacher"] or {}).get("rows_asked", 0))

    return {
        **values.users.as_dict(),
        "over_seeds": asdict(values.seeds),
        "rows": {"live": rows(live), "offline": rows(offline)},
    }


def _difference(
    arm: BySeed, baseline: BySeed, metric: str, plan: Plan, members: np.ndarray | None
) -> Difference | None:
    """Over the users that `members` (n,) bool picks; None: all."""

    def per_user(of: BySeed) -> dict[int, np.ndarray]:
        chosen = slice(None) if members is None else members
        return {seed: per_user_metric(one.ranks[chosen], metric) for seed, one in of.items()}

    samples = plan.base.eval.bootstrap_samples
    return difference(per_user(arm), per_user(baseline), samples, plan.seeds[0])


def _chosen(by_arm: dict[str, BySeed]) -> str | None:
    """The arm that validation prefers, each judged against the baseline with the same seeds."""
    baseline, gains = by_arm[BASELINE], {BASELINE: 0.0}
    for name, own in by_arm.items():
        shared = [seed for seed in own if seed in baseline]
        if shared and name != BASELINE:
            gains[name] = float(
                np.mean([_validation(own[seed]) - _validation(baseline[seed]) for seed in shared])
            )
    if len(gains) == 1:
        return None
    return max(gains, key=lambda name: gains[name])


def _validation(result: RunResult) -> float:
    return result.report["student"]["validation"][PRIMARY]


def _equal_terms(by_arm: dict[str, BySeed], warmup_epochs: int) -> dict[str, int]:
    """Whether every run's twin, trained on cross-entropy alone, is the baseline of its seed.

    Returns:
        twins: How many could be compared. same: that rank every test item as the baseline does.
        other_epoch: that validation took from another epoch than the baseline, so that they may
        differ. differ: that differ though of the same epoch. early: baselines of an epoch before
        the teacher or the rationales started, where no other arm can choose one.
    """
    counts = dict.fromkeys(("twins", "same", "other_epoch", "differ"), 0)
    baseline = by_arm[BASELINE]
    for name, own in by_arm.items():
        for seed, one in own.items():
            twin = one.control_ranks
            if name == BASELINE or twin is None or seed not in baseline:
                continue
            epochs = [
                of.report[model]["best_epoch"]
                for of, model in ((one, "control"), (baseline[seed], "student"))
            ]
            counts["twins"] += 1
            if np.array_equal(twin, baseline[seed].ranks):
                counts["same"] += 1
            else:
                counts["differ" if epochs[0] == epochs[1] else "other_epoch"] += 1
    early = sum(one.report["student"]["best_epoch"] <= warmup_epochs for one in baseline.values())
    return {**counts, "early": early}


def _slices(by_arm: dict[str, BySeed], data: InteractionData, plan: Plan) -> list[dict[str, Any]]:
    """The primary metric of every arm among some of the users, and its difference there."""
    table = []
    for group in slices_of(data, "test"):
        row: dict[str, Any] = {
            "view": group.view,
            "label": group.label,
            "detail": group.detail,
            "users": int(group.members.sum()),
            "share": float(group.members.mean()),
            "arms": {},
        }
        for name, own in by_arm.items():
            if not own:
                continue
            found = None
            if name != BASELINE:
                found = _difference(own, by_arm[BASELINE], PRIMARY, plan, group.members)
            row["arms"][name] = {
                "mean": _mean(
                    own,
                    lambda one, inside=group.members: float(
                        per_user_metric(one.ranks[inside], PRIMARY).mean()
                    ),
                ),
                "against_baseline": None if found is None else found.users.as_dict(),
            }
        table.append(row)
    return table


def _run(result: RunResult) -> dict[str, Any]:
    report, run = result.report, result.run
    return {
        "arm": run.arm,
        "seed": run.seed,
        "folder": str(run.folder.relative_to(run.output)),
        "test": {metric: report["student"]["test"][metric] for metric in METRICS},
        "validation": {metric: report["student"]["validation"][metric] for metric in METRICS},
        "best_epoch": report["student"]["best_epoch"],
        "lift": None if not report.get("lift") else {m: report["lift"][m] for m in METRICS},
        "shipped": report["shipped"],
        "teacher_rows": (report["teacher"] or {}).get("rows_asked", 0),
        "teacher_seconds": (report["teacher"] or {}).get("seconds", 0.0),
        "seconds": report["seconds"],
        "collapsed": bool((report["effective_rank"] or {}).get("collapsed")),
        "warnings": report["warnings"],
    }


def _by_seed(own: BySeed, value: Callable[[RunResult], float]) -> dict[int, float]:
    return {seed: float(value(one)) for seed, one in own.items()}


def _scores(own: BySeed, value: Callable[[RunResult], float]) -> dict[str, Any] | None:
    return asdict(spread(_by_seed(own, value))) if own else None


def _mean(own: BySeed, value: Callable[[RunResult], float]) -> float | None:
    return float(np.mean(list(_by_seed(own, value).values()))) if own else None
