"""Carries a plan out: one process a run, one after the other, with one live line over all."""

import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from cotrain import config as configuration
from cotrain.comparison.arms import Plan, PlannedRun
from cotrain.comparison.folder import Stage, stage
from cotrain.comparison.results import training_seconds, validation_score
from cotrain.config import Config
from cotrain.distill import warm_up
from cotrain.errors import CotrainError
from cotrain.runtime import checkpoint
from cotrain.runtime.interruption import StopRequest
from cotrain.runtime.tracking import clock

_POLL_S = 0.5
_TAIL_LINES = 15
_PROGRESS = re.compile(r"epoch (\d+/\d+) +(\d+)%")


class Stopped(CotrainError):
    """The comparison was asked to stop; the run that was under way has been ended."""


@dataclass(frozen=True)
class Failure:
    """A run that ended without a report.

    Attributes:
        arm: Of the run.
        seed: Of the run.
        how: Exit code or signal.
        log: File with all that it said.
        tail: The end of it.
    """

    arm: str
    seed: int
    how: str
    log: str
    tail: str


@dataclass
class LiveLine:
    """One line that is written over on a terminal; elsewhere only lines that stay.

    Attributes:
        stream: Where to.
    """

    stream: TextIO = field(default_factory=lambda: sys.stderr)

    def show(self, text: str) -> None:
        """For the moment."""
        if self.stream.isatty():
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r\x1b[K{text[:width]}")
            self.stream.flush()

    def say(self, text: str) -> None:
        """For good."""
        cleared = "\r\x1b[K" if self.stream.isatty() else ""
        self.stream.write(f"{cleared}{text}\n")
        self.stream.flush()


def carry_out(
    plan: Plan, command: Sequence[str], lock: int, line: LiveLine | None = None
) -> list[Failure]:
    """Do every run that has not ended yet.

    Args:
        plan: What to do.
        command: Starts a run when `--config FILE` or `--resume RUN` is put behind it.
        lock: File descriptor that runs inherit.
        line: Where progress is shown.

    Returns:
        The runs that failed; the others went on.

    Raises:
        Stopped: After SIGINT or SIGTERM, which the run under way got as well.
        ConfigError: A run folder was made with other settings.
    """
    line = line or LiveLine()
    stages: dict[str, Stage] = {run.name: stage(run) for run in plan.runs}
    pace = Pace({}, list(plan.runs))
    failures = []
    with StopRequest() as stop:
        for place, run in enumerate(plan.runs, start=1):
            of = f"{place} of {len(plan.runs)}"
            if stages[run.name] == "finished":
                line.say(f"{of}  {run.name}: there already, {_outcome(run)}")
                pace.finish(run, training_seconds(run.folder))
                continue
            started = time.monotonic()
            words = _prepared(run, stages[run.name], plan)
            resumed = ", going on" if stages[run.name] == "interrupted" else ""
            line.say(f"{of}  {run.name}{resumed} …")
            code = _run(
                [*command, *words], log_of(run), lock, stop,
                lambda run=run, of=of, started=started: line.show(
                    f"{of}  {run.name}  {pace.text(run, time.monotonic() - started)}"
                    f"{_progress(log_of(run))}"
                ),
            )  # fmt: skip
            seconds = time.monotonic() - started
            if stop.received:
                line.say(f"{of}  {run.name}: stopped after {clock(seconds)}")
                done = sum((one.folder / "report.json").is_file() for one in plan.runs)
                raise Stopped(
                    f"Stopped with {done} of {len(plan.runs)} runs done. The same command goes on "
                    "from here."
                )
            if (run.folder / "report.json").is_file():
                # A resumed run was under way before: it says nothing about a whole one.
                pace.finish(run, seconds if stages[run.name] != "interrupted" else None)
                line.say(f"{of}  {run.name}: done in {clock(seconds)}, {_outcome(run)}")
                continue
            failure = _failure(run, code)
            failures.append(failure)
            pace.finish(run, None)
            line.say(
                f"{of}  {run.name}: failed after {clock(seconds)}, {failure.how}. The end of "
                f"{failure.log}:\n{_indented(failure.tail)}"
            )
    return failures


def log_of(run: PlannedRun) -> Path:
    """All that a run says on its console."""
    return run.folder.with_name(f"{run.folder.name}.log")


def _prepared(run: PlannedRun, at: Stage, plan: Plan) -> list[str]:
    """Arguments that start or resume a run; clears away what cannot be gone on with."""
    if at == "interrupted":
        return ["--resume", str(run.folder)]
    if at == "begun":
        shutil.rmtree(run.folder)
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    file = run.folder.with_name(f"{run.folder.name}.yaml")
    configuration.save(_with_warm_up(run, plan), file)
    log_of(run).unlink(missing_ok=True)
    return ["--config", str(file)]


def _with_warm_up(run: PlannedRun, plan: Plan) -> Config:
    """Settings by which runs that begin alike do so once: the first one keeps its warm-up, and the
    others take it over."""
    alike = [
        other
        for other in plan.runs
        if other.seed == run.seed and warm_up.decides(other.config) == warm_up.decides(run.config)
    ]
    train = run.config.train
    if not train.warmup_epochs or len(alike) == 1:
        return run.config
    there = checkpoint.steps(alike[0].folder / warm_up.FOLDER)
    if there and alike[0] is not run:
        return replace(run.config, train=replace(train, warm_start=str(alike[0].folder)))
    return replace(run.config, train=replace(train, keep_warm_up=alike[0] is run))


def _run(
    words: Sequence[str], log: Path, lock: int, stop: StopRequest, tick: Callable[[], None]
) -> int:
    """Start a process, wait for it, pass a request to stop on to it once.

    Returns:
        Its exit code, or minus the signal that ended it.
    """
    with log.open("ab") as file:
        # In a session of its own: Ctrl-C on the terminal would reach it beside what is passed on
        # here, and to a run a second one means to drop everything.
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, pass_fds=(lock,),
        )  # fmt: skip
    passed_on = False
    try:
        while True:
            try:
                return process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                tick()
            if stop.received and not passed_on:
                passed_on = True
                process.send_signal(signal.SIGINT)
    except BaseException:
        process.kill()
        process.wait()
        raise


@dataclass
class Pace:
    """How long the rest takes, judged by runs of the same arm that have ended.

    Attributes:
        seconds: Of the ended runs, by arm.
        left: Runs that have not ended, the one under way among them.
    """

    seconds: dict[str, list[float]]
    left: list[PlannedRun]

    def finish(self, run: PlannedRun, seconds: float | None) -> None:
        """A run has ended, after so many seconds where that says something."""
        self.left.remove(run)
        if seconds is not None:
            self.seconds.setdefault(run.arm, []).append(seconds)

    def text(self, run: PlannedRun, elapsed: float) -> str:
        """Time of the run under way, and what is left of all."""
        known, unknown = time_left(self.seconds, [one.arm for one in self.left], run.arm, elapsed)
        left = f"{'at least ' if unknown else ''}{clock(known)} left"
        return f"{clock(elapsed)}, {left}" if known or not unknown else clock(elapsed)


def time_left(
    seconds: Mapping[str, Sequence[float]], left: Sequence[str], now: str, elapsed: float
) -> tuple[float, int]:
    """Seconds that the runs of known arms still take, and how many are of arms not known yet.

    Args:
        seconds: Of ended runs, by arm.
        left: Arms of the runs that have not ended, that of the one under way among them.
        now: Arm of the one under way.
        elapsed: Seconds that it has taken.
    """
    means = {arm: math.fsum(of) / len(of) for arm, of in seconds.items() if of}
    total = sum(means[arm] for arm in left if arm in means)
    # One that takes longer than those before it is expected to end any moment.
    total -= min(elapsed, means.get(now, 0.0))
    return total, sum(arm not in means for arm in left)


def _progress(log: Path) -> str:
    """Where the run under way says that it is; its live line goes to its log."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        found = _PROGRESS.findall(file.read().decode("utf-8", errors="replace"))
    return f", epoch {found[-1][0]}, {found[-1][1]} %" if found else ""


def _outcome(run: PlannedRun) -> str:
    # Test is read once, at the end, over all arms.
    return f"NDCG@10 on validation {validation_score(run.folder):.4f}"


def _failure(run: PlannedRun, code: int) -> Failure:
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    if code == -signal.SIGKILL:
        how += ", most likely for want of memory"
    log = log_of(run)
    # As bytes: read as text, what returns to the start of a line would begin a new one.
    text = log.read_bytes().decode("utf-8", errors="replace") if log.is_file() else ""
    # Of a line that was written over, what stood there last.
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    tail = "\n".join([line for line in lines if line.strip()][-_TAIL_LINES:])
    return Failure(run.arm, run.seed, how, str(log.relative_to(run.output)), tail)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
