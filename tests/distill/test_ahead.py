"""Asking once, before all epochs: the rows of a live run, on what the student then proposed."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cotrain.data.batches import EpochSampler, SequenceBatch, SequenceDataset, collate
from cotrain.distill import loop
from cotrain.distill.loop import Interrupted, Run, fit
from cotrain.distill.outcome import finish
from cotrain.distill.querying import Teacher
from cotrain.distill.run import prepare
from cotrain.distill.state import CotrainState
from cotrain.distill.step import propose
from cotrain.distill.verdicts import Judged, KeptVerdicts

Prepare = Callable[..., tuple[CotrainState, Run]]
FitUntil = Callable[[CotrainState, Run, int], None]
Results = Callable[[CotrainState, Run], dict[str, Any]]
OFFLINE = ["--query.when", "offline"]


def batch_of(users: list[int], borrowed: bool = False) -> Any:
    batch: Any = SequenceBatch.__new__(SequenceBatch)
    object.__setattr__(batch, "user_index", torch.tensor(users))
    object.__setattr__(batch, "borrowed", borrowed)
    return batch


def judged_of(marks: list[int], valid: list[bool]) -> Judged:
    mark = torch.tensor(marks)[:, None]
    weight = torch.tensor(marks) / 10 * torch.tensor(valid)
    probs, states = mark.expand(-1, 2).float(), mark.expand(-1, 3).float()
    return Judged(mark.expand(-1, 2), probs, states, torch.tensor(valid), weight)


def test_kept_verdicts_are_found_by_user_and_epoch():
    kept = KeptVerdicts.none(2, 3)
    assert not kept.of_batch(batch_of([4, 1]), 2).valid.any()
    parts = [
        (torch.tensor([7, 3]), judged_of([17, 13], [True, True])),
        (torch.tensor([5]), judged_of([15], [False])),
    ]
    kept = kept.and_of(parts, 2).and_of([(torch.tensor([3]), judged_of([23], [True]))], 3)
    kept = KeptVerdicts.from_state_dict(kept.state_dict())
    found = kept.of_batch(batch_of([3, 4, 5, 7]), 2)
    assert found.valid.tolist() == [True, False, False, True]
    assert found.candidate_ids.tolist() == [[13, 13], [0, 0], [0, 0], [17, 17]]
    assert found.decision_state[:, 0].tolist() == [13, 0, 0, 17]
    assert found.weight.tolist() == pytest.approx([1.3, 0, 0, 1.7])
    assert kept.of_batch(batch_of([3, 7]), 3).candidate_ids.tolist() == [[23, 23], [0, 0]]
    borrowed = kept.of_batch(batch_of([3], borrowed=True), 2)
    assert not borrowed.valid.any()
    assert not borrowed.weight.any()


def losses(run: Run) -> list[dict[str, float]]:
    kept = ("step", "teacher_rows", "loss_rank", "loss_emb", "teacher_entropy")
    rows = [row for row in run.log.rows() if "loss" in row]
    return [{key: row[key] for key in kept if key in row} for row in rows]


@pytest.mark.parametrize("policy", ["random", "entropy", "k_center"])
@pytest.mark.parametrize("cut", [[], ["--train.max_steps", "9"]], ids=["whole", "cut"])
def test_of_a_student_that_stands_still_both_ask_and_learn_the_same(
    prepared: Prepare, policy: str, cut: list[str]
):
    still = ["--student.dropout", "0", "--train.learning_rate", "1e-12", "--query.policy", policy]
    live, live_run = prepared(*still, *cut)
    ahead, ahead_run = prepared(*still, *cut, *OFFLINE)
    fit(live, live_run)
    fit(ahead, ahead_run)
    for one, other in zip(losses(live_run), losses(ahead_run), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for name in ("rows_asked", "rows_valid", "prompt_tokens", "target_in_candidates"):
        assert live.meter.totals[name] == ahead.meter.totals[name]
    assert ahead.meter.totals["rows_asked"] > 30


def test_the_verdicts_are_on_what_the_warm_student_proposed(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch
):
    state, run = prepared(*OFFLINE, "--train.learning_rate", "0.01")
    assert run.teacher is not None
    dataset = SequenceDataset(run.data, 20, 0)
    expected: dict[int, list[int]] = {}
    asked = loop.ask_ahead

    def seen(state: CotrainState, teacher: Teacher, *more: Any) -> None:
        asked(state, teacher, *more)
        if more[2] == 2:
            state.student.bare.eval()
            rows = collate([dataset[user, 2] for user in dataset.users.tolist()])
            found = propose(state.student, rows, 5, run.accelerator)
            expected.update(zip(dataset.users.tolist(), found.item_ids.tolist(), strict=True))
            state.student.bare.train()

    monkeypatch.setattr(loop, "ask_ahead", seen)
    fit(state, run)
    assert state.meter.totals["rows_asked"] == 2 * 30
    kept = state.kept.of_batch(batch_of(dataset.users.tolist()), 2)
    assert int(kept.valid.sum()) == 30
    for user, ids, valid in zip(
        dataset.users.tolist(), kept.candidate_ids.tolist(), kept.valid.tolist(), strict=True
    ):
        assert not valid or ids == expected[user]
    report = finish(state, run)
    assert report["teacher"]["query"]["when"] == "offline"
    assert report["teacher"]["rows_asked"] == 60


@pytest.mark.parametrize("moment", ["asking", "training"])
def test_an_interrupted_run_asks_nothing_twice_and_ends_to_the_bit_like_one_left_alone(
    prepared: Prepare,
    fit_until: FitUntil,
    results: Results,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
):
    options = [*OFFLINE, "--query.policy", "margin", "--distill.target", "blend",
               "--distill.blend_beta", "0.4"]  # fmt: skip
    state, run = prepared(*options)
    fit(state, run)
    undisturbed = results(state, run)

    first, broken = prepared(*options)
    asked = loop.ask_ahead

    def interrupted_asking(*arguments: Any) -> None:
        asked(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    if moment == "training":
        fit_until(first, broken, 6)
    else:
        with monkeypatch.context() as patched:
            patched.setattr(loop, "ask_ahead", interrupted_asking)
            with pytest.raises(Interrupted):
                fit(first, broken)
    assert (first.step, first.epochs_asked) == ((4, 1) if moment == "asking" else (6, 2))
    again, resumed = prepare(broken.config, resume=True)
    assert again.kept.key.equal(first.kept.key)
    fit(again, resumed)
    assert results(again, resumed) == undisturbed
    for name, value in again.student.bare.state_dict().items():
        assert value.equal(state.student.bare.state_dict()[name]), name


def test_the_order_of_an_epoch_is_the_one_that_is_visited():
    sampler = EpochSampler(torch.arange(5, 25).numpy(), 6, 3)
    sampler.start_at(2)
    visited = [key[0] for keys in sampler for key in keys]
    assert visited == sampler.order(2).tolist()
