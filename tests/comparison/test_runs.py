"""Carrying a plan out with a stand-in for training: order, failures, stopping and going on."""

import fcntl
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cotrain.comparison.arms import Plan
from cotrain.comparison.folder import locked, stage
from cotrain.comparison.runs import Failure, LiveLine, Pace, Stopped, carry_out, time_left
from cotrain.errors import ConfigError

Calls = Callable[[], list[str]]
Carry = Callable[[Plan], list[Failure]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def said() -> Terminal:
    """All that was shown while plans were carried out."""
    return Terminal()


@pytest.fixture
def carry(stand_in: Path, said: Terminal) -> Carry:
    """Carries a plan out with the stand-in."""

    def do(plan: Plan) -> list[Failure]:
        plan.output.mkdir(parents=True, exist_ok=True)
        with locked(plan.output) as lock:
            return carry_out(plan, [sys.executable, str(stand_in)], lock, LiveLine(said))

    return do


def interrupt(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def test_every_run_is_done_by_seed_and_then_by_arm(plan, carry: Carry, calls: Calls, said):
    made = plan("ce,logit_kd", 2)
    assert carry(made) == []
    order = ["ce/seed-0", "logit_kd/seed-0", "ce/seed-1", "logit_kd/seed-1"]
    assert calls() == [f"--config {name}" for name in order]
    assert [stage(run) for run in made.runs] == ["finished"] * 4
    for name in order:
        assert (made.output / f"{name}.log").read_text() == f"training {name}\n"
    assert "3 of 4  ce, seed 1: done in 0:0" in said.getvalue()
    assert said.getvalue().count("NDCG@10 on validation 0.1000") == 4


def test_runs_that_begin_alike_share_their_warm_up(plan, carry: Carry, calls: Calls):
    made = plan("ce,logit_kd", 2)
    first = made.runs[0]
    assert carry(replace(made, runs=(first,))) == []
    (first.folder / "warm_up" / "checkpoints" / "step_9").mkdir(parents=True)
    assert carry(made) == []
    assert len(calls()) == 4  # what has ended is not repeated for the sake of its warm-up
    started = [yaml.safe_load((run.folder / "config.yaml").read_text()) for run in made.runs]
    shared = [(one["train"]["keep_warm_up"], one["train"]["warm_start"]) for one in started]
    # That of seed 1 the stand-in has not written, so that its other run begins by itself.
    assert shared == [(False, None), (False, str(first.folder)), (True, None), (False, None)]
    assert [stage(run) for run in made.runs] == ["finished"] * 4


def test_a_failed_run_is_reported_and_the_others_go_on(
    plan, carry: Carry, calls: Calls, said, monkeypatch
):
    made = plan("ce,logit_kd,decision_state", 1)
    monkeypatch.setenv("FAIL", "ce/seed-0")
    monkeypatch.setenv("KILL", "logit_kd/seed-0")
    failed, killed = carry(made)
    # Of a line that was written over, what stood there last.
    tail = "training ce/seed-0\nepoch 1/3  20%|ValueError: <it> went wrong"
    assert failed == Failure("ce", 0, "exit code 1", "ce/seed-0.log", tail)
    want_of_memory = "signal 9, most likely for want of memory"
    log = "logit_kd/seed-0.log"
    assert killed == Failure("logit_kd", 0, want_of_memory, log, "training logit_kd/seed-0")
    assert len(calls()) == 3
    assert [stage(run) for run in made.runs] == ["begun", "begun", "finished"]
    assert "1 of 3  ce, seed 0: failed after 0:0" in said.getvalue()
    assert "\n    epoch 1/3  20%|ValueError: <it> went wrong\n" in said.getvalue()

    # The same command tries these again, from their beginning, and nothing else.
    monkeypatch.delenv("FAIL")
    monkeypatch.delenv("KILL")
    assert carry(made) == []
    assert calls()[3:] == ["--config ce/seed-0", "--config logit_kd/seed-0"]
    assert (made.output / failed.log).read_text() == "training ce/seed-0\n"


def test_what_was_interrupted_is_resumed_and_what_has_ended_is_not_repeated(
    plan, carry: Carry, calls: Calls, as_soon_as, said, monkeypatch
):
    made = plan("ce,logit_kd", 1)
    monkeypatch.setenv("HANG", "logit_kd/seed-0")
    as_soon_as("hanging", interrupt)
    with pytest.raises(Stopped, match=r"1 of 2 runs done. The same command goes on from here"):
        carry(made)
    assert [stage(run) for run in made.runs] == ["finished", "interrupted"]
    assert "2 of 2  logit_kd, seed 0: stopped after 0:0" in said.getvalue()
    # The live line told where it was.
    assert re.search(r"2 of 2  logit_kd, seed 0  0:\d\d, epoch 2/3, 40 %", said.getvalue())

    carry(made)
    assert "1 of 2  ce, seed 0: there already, NDCG@10 on validation 0.1000" in said.getvalue()
    assert "2 of 2  logit_kd, seed 0, going on …" in said.getvalue()
    expected = ["--config ce/seed-0", "--config logit_kd/seed-0", "hanging", "signal"]
    expected.append("--resume logit_kd/seed-0")
    assert calls() == expected
    # A run that goes on keeps what it said before.
    assert (made.output / "logit_kd/seed-0.log").read_text().count("training") == 2

    carry(made)
    assert calls() == expected


def test_a_request_to_stop_is_passed_on_once_and_waited_for(
    plan, carry: Carry, calls: Calls, as_soon_as, monkeypatch
):
    made = plan("ce,logit_kd", 1)
    monkeypatch.setenv("FAIL", "ce/seed-0")
    monkeypatch.setenv("HANG", "logit_kd/seed-0")
    # Longer than it takes to look again whether the run has ended.
    monkeypatch.setenv("LINGER", "1.2")
    before = signal.getsignal(signal.SIGTERM)
    as_soon_as("hanging", lambda: interrupt(signal.SIGTERM))
    start = time.monotonic()
    # One that failed is not done.
    with pytest.raises(Stopped, match="0 of 2 runs done"):
        carry(made)
    assert time.monotonic() - start > 1.2
    assert calls()[1:] == ["--config logit_kd/seed-0", "hanging", "signal"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_request_ends_the_run_at_once(plan, carry: Carry, as_soon_as, monkeypatch):
    made = plan("ce,logit_kd", 1)
    monkeypatch.setenv("HANG", "ce/seed-0")
    monkeypatch.setenv("LINGER", "50")
    as_soon_as("hanging", interrupt)
    as_soon_as("signal", interrupt)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        carry(made)
    assert time.monotonic() - start < 25
    # It is gone: alive, it would hold the lock.
    with locked(made.output):
        pass


def test_a_run_holds_the_folder_even_where_whoever_started_it_is_gone(
    plan, stand_in: Path, as_soon_as, monkeypatch
):
    made = plan("ce,logit_kd", 1)
    made.output.mkdir()
    monkeypatch.setenv("HANG", "ce/seed-0")
    lock = os.open(made.output / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    refused: list[str] = []

    def gone() -> None:
        os.close(lock)
        try:
            with locked(made.output):
                pass
        except ConfigError as error:
            refused.append(str(error))
        interrupt()

    as_soon_as("hanging", gone)
    with pytest.raises(Stopped):
        carry_out(made, [sys.executable, str(stand_in)], lock, LiveLine(io.StringIO()))
    assert len(refused) == 1
    assert "or a run that a killed one left behind" in refused[0]
    with locked(made.output):
        pass


@pytest.mark.parametrize(
    ("seconds", "left", "now", "elapsed", "expected"),
    [
        # two runs of 15 s on average, 4 s of the first are over
        ({"ce": [10, 20]}, ["ce", "ce"], "ce", 4, (26, 0)),
        # one that takes longer than those before it may end any moment
        ({"ce": [10, 20]}, ["ce", "ce"], "ce", 99, (15, 0)),
        ({"ce": [10], "rdr": [30]}, ["rdr", "ce", "rdr"], "rdr", 5, (65, 0)),
        # of arms not known yet, nothing can be said and nothing be taken off
        ({"ce": [10]}, ["rdr", "ce", "rdr"], "rdr", 5, (10, 2)),
        ({}, ["ce", "ce"], "ce", 3, (0, 2)),
    ],
)
def test_time_left_by_hand(seconds, left, now, elapsed, expected):
    assert time_left(seconds, left, now, elapsed) == expected


def test_time_left_in_words(plan):
    runs = plan("ce,logit_kd", 2).runs
    pace = Pace({}, list(runs))
    assert pace.text(runs[0], 63) == "1:03"
    pace.finish(runs[0], 100)
    assert pace.text(runs[1], 5) == "0:05, at least 1:40 left"
    # A resumed run says nothing about a whole one.
    pace.finish(runs[1], None)
    assert pace.text(runs[2], 40) == "0:40, at least 1:00 left"
    pace.finish(runs[2], 200)
    pace.seconds["logit_kd"] = [300]
    assert pace.text(runs[3], 60) == "1:00, 4:00 left"


def test_a_terminal_shows_one_line_that_is_written_over(monkeypatch):
    monkeypatch.setenv("COLUMNS", "12")
    stream = Terminal()
    line = LiveLine(stream)
    line.show("a line that is too long")
    line.say("and one that stays")
    assert stream.getvalue() == "\r\x1b[Ka line that\r\x1b[Kand one that stays\n"


def test_a_file_gets_only_the_lines_that_stay():
    stream = io.StringIO()
    line = LiveLine(stream)
    line.show("for the moment")
    line.say("for good")
    assert stream.getvalue() == "for good\n"
