"""Verdicts that teach in several epochs: the same rows again, asked about once."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from cotrain.config import parse
from cotrain.data.batches import PADDING, SequenceBatch
from cotrain.distill import step
from cotrain.distill.loop import Pace, Run, fit
from cotrain.distill.outcome import finish
from cotrain.distill.run import prepare
from cotrain.distill.state import CotrainState
from cotrain.distill.verdicts import Judged
from cotrain.runtime import checkpoint

Prepare = Callable[..., tuple[CotrainState, Run]]
FitUntil = Callable[[CotrainState, Run, int], None]
Results = Callable[[CotrainState, Run], dict[str, Any]]
# Of a user in an epoch: the history behind which the teacher was asked, and about what.
Taught = dict[int, dict[int, tuple[list[int], list[int], list[float]]]]


def test_which_epoch_asks():
    words = ["--train.warmup_epochs", "2", "--train.epochs", "10", "--query.reuse", "3"]
    config = parse([*words, "--teacher.model", "some-teacher"])
    assert [config.asking_epoch(epoch) for epoch in range(10)] == [0, 1, 2, 2, 2, 5, 5, 5, 8, 8]
    assert [epoch for epoch in range(10) if config.asks(epoch)] == [2, 5, 8]
    # Each round has another teacher, who does not answer for the one before.
    config = parse([*words, "--teacher.model", "some-teacher", "--train.rounds", "2"])
    assert [epoch for epoch in range(10) if config.asks(epoch)] == [2, 5, 6, 9]
    alone = parse([*words, "--teacher.model", "none"])
    assert [alone.asking_epoch(epoch) for epoch in range(10)] == list(range(10))
    assert not any(map(alone.asks, range(10)))


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch) -> Taught:
    """What a run teaches, by epoch and user."""
    seen: Taught = defaultdict(dict)
    let_judge = step.let_judge

    def watched(state: CotrainState, batch: SequenceBatch, *more: Any) -> Judged:
        judged = let_judge(state, batch, *more)
        for row in judged.valid.nonzero().flatten().tolist():
            history = batch.history[row]
            seen[state.epoch][int(batch.user_index[row])] = (
                history[history != PADDING].tolist(),
                judged.candidate_ids[row].tolist(),
                judged.probs[row].tolist(),
            )
        return judged

    monkeypatch.setattr(step, "let_judge", watched)
    return seen


@pytest.mark.parametrize("windows", ["last", "random"])
@pytest.mark.parametrize("policy", ["random", "entropy"])
@pytest.mark.parametrize("when", ["live", "offline"])
def test_the_epochs_after_the_one_that_asks_repeat_it(
    prepared: Prepare, taught: Taught, when: str, policy: str, windows: str
):
    state, run = prepared(
        "--query.when", when, "--query.policy", policy, "--query.reuse", "2",
        "--train.windows", windows, "--train.epochs", "5", "--student.max_length", "5",
        "--train.learning_rate", "0.01",
    )  # fmt: skip
    fit(state, run)
    assert list(taught) == [1, 2, 3, 4]
    assert taught[1] == taught[2]
    assert taught[3] == taught[4]
    assert len(taught[1]) == len(taught[3]) == 30
    both = taught[1].keys() & taught[3].keys()
    assert sum(taught[1][user] != taught[3][user] for user in both) > len(both) / 2
    report = finish(state, run)
    assert (report["teacher"]["rows_asked"], report["teacher"]["query"]["reuse"]) == (60, 2)


def test_without_it_no_verdict_is_kept(prepared: Prepare):
    state, run = prepared("--train.checkpoint_every_steps", "1")
    fit(state, run)
    assert not len(state.kept.key)
    assert "verdicts" not in checkpoint.load_latest(run.folder)[0]


@pytest.mark.parametrize("stop_at", [6, 10], ids=["asking", "repeating"])
def test_an_interrupted_run_asks_nothing_twice_and_ends_to_the_bit_like_one_left_alone(
    prepared: Prepare, fit_until: FitUntil, results: Results, stop_at: int
):
    options = ["--query.policy", "margin", "--distill.target", "blend",
               "--distill.blend_beta", "0.4", "--query.reuse", "3"]  # fmt: skip
    state, run = prepared(*options)
    fit(state, run)
    undisturbed = results(state, run)
    assert undisturbed["counts"][0] == 30

    first, broken = prepared(*options)
    fit_until(first, broken, stop_at)
    again, resumed = prepare(broken.config, resume=True)
    assert len(again.kept.key) == len(first.kept.key) > 0
    fit(again, resumed)
    assert results(again, resumed) == undisturbed
    for name, value in again.student.bare.state_dict().items():
        assert value.equal(state.student.bare.state_dict()[name]), name


def test_the_time_left_knows_which_epochs_ask(prepared: Prepare):
    state, run = prepared("--train.epochs", "6", "--query.reuse", "2", "--train.max_steps", "22")
    pace = Pace(run, 4, state)  # epochs 1, 3 and 5 ask, the last for two steps
    assert pace.steps_to_ask() == 4 + 4 + 2
    state.step = 6
    assert pace.steps_to_ask() == 2 + 4 + 2
    state.step = 21
    assert pace.steps_to_ask() == 1
    pace.bar.close()
