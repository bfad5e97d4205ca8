"""A whole comparison: from settings to a page."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cotrain.comparison.arms import Plan
from cotrain.comparison.folder import locked, remember, stage
from cotrain.comparison.page import console_table, write
from cotrain.comparison.results import read_run
from cotrain.comparison.runs import carry_out
from cotrain.comparison.summary import summarise
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.distill.run import check_against_data
from cotrain.rationale.store import RationaleStore


def compare(plan: Plan, command: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Do what is left of a plan, then tell its arms apart.

    Args:
        plan: What to do.
        command: Starts a run when `--config FILE` or `--resume RUN` is put behind it.
        say: Prints lines of the result.

    Returns:
        What comparison.json holds, but the verdict.

    Raises:
        CotrainError: Before anything starts, if settings, folder, data or rationales cannot work.
        Stopped: After SIGINT or SIGTERM.
    """
    data = load_interactions(plan.base.data)
    _check(plan, data)
    plan.output.mkdir(parents=True, exist_ok=True)
    with locked(plan.output) as lock:
        added = remember(plan)
        failures = carry_out(plan, command, lock)
        ended = [run for run in plan.runs if stage(run) == "finished"]
        result = summarise(plan, [read_run(run, data) for run in ended], failures, data, added)
        _, page = write(result, plan.output)
    say(f"\n{console_table(result)}\n\nPage: {page}")
    return result


def _check(plan: Plan, data: InteractionData) -> None:
    """What would fail every run of an arm, found out before the first one starts.

    Raises:
        ConfigError, DataError: The data are too small, or the rationales are of others.
    """
    check_against_data(plan.base, data, 1)
    if any(arm.reads for arm in plan.defined.values()):
        assert plan.base.distill.rationales is not None  # checked with the settings
        RationaleStore.open(Path(plan.base.distill.rationales)).match(data)
