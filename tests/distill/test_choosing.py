"""Whom a student lets ask: by hand, whatever the processes, and exactly so after a resume."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cotrain.data.batches import SequenceDataset
from cotrain.distill import choosing
from cotrain.distill.choosing import chosen_by_student
from cotrain.distill.loop import Pace, Run, fit
from cotrain.distill.outcome import finish
from cotrain.distill.querying import Policy, Query
from cotrain.distill.run import prepare
from cotrain.distill.state import CotrainState
from cotrain.student.retrieval import retrieve

Prepare = Callable[..., tuple[CotrainState, Run]]
FOLLOWING = ["entropy", "margin", "loss", "k_center"]


def choose(state: CotrainState, run: Run, policy: Policy, fraction: float = 0.3) -> np.ndarray:
    dataset = SequenceDataset(run.data, 20, 0)
    query = Query(dataset.users, fraction, 0, policy)
    return chosen_by_student(state.student, query, dataset, 1, 5, run.accelerator)


@torch.no_grad()
def sharpen(state: CotrainState) -> None:
    """Scores that differ by whole units, as after training."""
    state.student.bare.item_embedding.weight.mul_(20)


@pytest.mark.parametrize("policy", FOLLOWING)
def test_those_ask_of_whom_the_policy_says_so_one_by_one(prepared: Prepare, policy: Policy):
    state, run = prepared()
    sharpen(state)
    chosen = choose(state, run, policy)
    model, dataset = state.student.bare.eval(), SequenceDataset(run.data, 20, 0)
    assert len(chosen) == 18
    states, unsure = [], []
    for user in dataset.users.tolist():
        row = dataset[user, 1]
        with torch.no_grad():
            own = model.user_states([row["window"][: row["cut"] + 1]])
        target = int(row["window"][row["cut"] + 1])
        found = retrieve(own, model.item_vectors, torch.from_numpy(row["history"])[None],
                         torch.tensor([target]), 5).scores[0].double()  # fmt: skip
        probs = found.softmax(0)
        every = (own[0] @ model.item_vectors[1:].T).detach()
        unsure.append({
            "entropy": float(-(probs * probs.log()).sum()), "margin": float(found[1] - found[0]),
            "loss": float(F.cross_entropy(every, torch.tensor(target - 1))), "k_center": 0.0,
        }[policy])  # fmt: skip
        states.append(F.normalize(own[0].double(), dim=0))
    place = {user: n for n, user in enumerate(dataset.users.tolist())}
    if policy == "k_center":
        cosines = torch.stack(states) @ torch.stack(states).T
        order = [place[user] for user in chosen.tolist()]
        for count in range(1, len(order)):
            nearest = cosines[:, order[:count]].amax(1)
            nearest[order[:count]] = torch.inf
            assert nearest[order[count]] <= nearest.min() + 1e-5
    else:
        least = min(unsure[place[user]] for user in chosen.tolist())
        others = set(dataset.users.tolist()) - set(chosen.tolist())
        assert max(unsure[place[user]] for user in others) <= least + 1e-4
        assert max(unsure) - min(unsure) > 0.01


@pytest.mark.parametrize("policy", FOLLOWING)
def test_dropout_groups_and_other_draws_do_not_matter(
    prepared: Prepare, policy: Policy, monkeypatch: pytest.MonkeyPatch
):
    state, run = prepared()
    sharpen(state)
    before = torch.get_rng_state()
    chosen = choose(state, run, policy)
    assert state.student.bare.training
    assert torch.get_rng_state().equal(before)
    monkeypatch.setattr(choosing, "_BATCH", 7)
    assert set(choose(state, run, policy).tolist()) == set(chosen.tolist())


def test_k_center_is_drawn_where_the_pool_is_too_small(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch
):
    state, run = prepared()
    monkeypatch.setattr(choosing, "POOL", 10)
    drawn = Query(run.data.trained_users, 0.3, 0).drawn(1)
    chosen = choose(state, run, "k_center")
    assert set(chosen[:10]) == set(drawn[:10])
    assert chosen[10:].tolist() == drawn[10:18].tolist()


@pytest.mark.parametrize("policy", FOLLOWING)
def test_a_run_asks_by_its_policy_and_chooses_again_each_epoch(prepared: Prepare, policy: Policy):
    state, run = prepared("--query.policy", policy)
    chosen = []
    tick = Pace.tick

    def seen(pace: Pace, report: dict[str, float]) -> None:
        if pace.state.step_in_epoch == 1:
            chosen.append(set(pace.state.asking.tolist()))
        tick(pace, report)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Pace, "tick", seen)
        fit(state, run)
    assert [len(users) for users in chosen] == [0, 30, 30]
    assert chosen[1] != chosen[2]
    assert state.meter.totals["rows_asked"] == 60
    report = finish(state, run)
    assert report["teacher"]["query"] == {
        "policy": policy, "when": "live", "rows_per_epoch": 30, "reuse": 1,
    }  # fmt: skip
    assert policy.replace("_", "-") in (run.folder / "report.html").read_text("utf-8")


def test_a_run_resumed_within_an_epoch_asks_whom_it_had_chosen(
    prepared: Prepare, fit_until: Callable[[CotrainState, Run, int], None]
):
    options = ["--query.policy", "entropy"]
    state, run = prepared(*options)
    fit(state, run)
    first, broken = prepared(*options)
    fit_until(first, broken, 6)
    again, resumed = prepare(broken.config, resume=True)
    assert again.asking.equal(first.asking)
    assert len(again.asking) == 30
    fit(again, resumed)
    assert again.meter.totals["rows_asked"] == 60
    for name, value in again.student.bare.state_dict().items():
        assert value.equal(state.student.bare.state_dict()[name]), name
