"""Rationales in the loop: who learns from them, from which, and what they must not touch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cotrain.config import parse
from cotrain.data.batches import EpochSampler, SequenceDataset, make_loader
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.distill.loop import Run, fit
from cotrain.distill.losses import cosine_sum, gram_sum, scaled_gradient
from cotrain.distill.outcome import finish
from cotrain.distill.rationales import Rationales
from cotrain.distill.state import CotrainState, new_state, restore_checkpoint
from cotrain.distill.step import cotrain_step
from cotrain.errors import ConfigError, DataError
from cotrain.rationale.head import FOLDER, RationaleHead
from cotrain.settings import DataConfig

Prepare = Callable[..., tuple[CotrainState, Run]]
WriteStore = Callable[..., Path]
Places = Callable[[InteractionData], np.ndarray]
ALONE = ["--teacher.model", "none"]


@pytest.fixture(scope="session")
def small_data(small_tables: tuple[Path, Path]) -> InteractionData:
    interactions, items = map(str, small_tables)
    return load_interactions(DataConfig(interactions=interactions, items=items))


@pytest.fixture(scope="session")
def store(
    small_data: InteractionData,
    tmp_path_factory: pytest.TempPathFactory,
    write_store: WriteStore,
    training_places: Places,
) -> str:
    """Of a fifth of the training interactions."""
    places = np.random.default_rng(1).permutation(training_places(small_data))
    places = places[: len(places) // 5]
    return str(write_store(tmp_path_factory.mktemp("rationales") / "store", small_data, places))


def rationales_of(run: Run) -> Rationales:
    assert run.rationales is not None
    return run.rationales


def weights(module: Any) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in module.state_dict().values()])


def test_every_position_with_a_rationale_finds_its_own(prepared: Prepare, store: str):
    _, run = prepared(*ALONE, "--distill.rationales", store, "--train.windows", "random")
    rationales, seen = rationales_of(run), set()
    dataset = SequenceDataset(run.data, 20, 0, "random")
    for epoch in range(3):
        sampler = EpochSampler(dataset.users, 16, 0)
        sampler.start_at(epoch)
        for batch in make_loader(dataset, sampler):
            places = batch.target_places
            assert run.data.items[places].tolist() == batch.target_ids.tolist()
            positions, vectors = rationales.of_batch(batch, torch.device("cpu"))
            known = np.isin(places.numpy(), rationales.matched.places)
            assert positions.tolist() == np.flatnonzero(known).tolist()
            rows = rationales.matched.find(places[positions].numpy())
            assert vectors.equal(rationales.matched.store.vectors(rows))
            seen |= set(places[positions].tolist())
    assert seen <= set(rationales.matched.places.tolist())
    assert len(seen) > 100


def test_no_rationale_in_training_touches_a_held_out_interaction(prepared: Prepare, store: str):
    """The leak check: of every vector that a run uses, history and target lie in training."""
    state, run = prepared(*ALONE, "--distill.rationales", store, "--distill.lambda_rdr", "1")
    used: list[np.ndarray] = []
    rationales = rationales_of(run)
    find = rationales.matched.find

    class Watched:
        places, rows, store = rationales.matched.places, rationales.matched.rows, None

        def find(self, places: np.ndarray) -> np.ndarray:
            found = find(places)
            used.append(places[found >= 0])
            return found

    watched: Any = Watched()
    watched.store = rationales.matched.store
    rationales.matched = watched
    fit(state, run)
    places = np.concatenate(used)
    assert len(places)
    users = np.searchsorted(run.data.offsets, places, side="right") - 1
    assert (places < run.data.held_out.train_end[users]).all()
    held_out = run.data.held_out
    assert not np.isin(places, np.concatenate([held_out.validation, held_out.test])).any()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_store_with_one_held_out_interaction_is_refused(
    prepared: Prepare,
    small_data: InteractionData,
    tmp_path: Path,
    split: str,
    write_store: WriteStore,
    training_places: Places,
):
    places = training_places(small_data)[:50]
    leak = int(getattr(small_data.held_out, split)[3])
    folder = write_store(tmp_path / "leaking", small_data, np.sort(np.append(places, leak)))
    with pytest.raises(DataError, match=r"1 of interactions that are held out for validation"):
        prepared(*ALONE, "--distill.rationales", str(folder))


def test_rationales_of_another_split_are_refused(prepared: Prepare, store: str):
    with pytest.raises(DataError, match="held out for validation or test"):
        prepared(*ALONE, "--distill.rationales", store, "--data.split", "time")


@pytest.mark.parametrize("form", ["cosine", "gram"])
def test_without_weight_student_and_control_are_the_same_and_both_heads_learn(
    prepared: Prepare, store: str, form: str
):
    state, run = prepared(*ALONE, "--distill.rationales", store, "--distill.rdr_form", form)
    head = weights(state.student.head)
    fit(state, run)
    assert state.control is not None
    assert weights(state.student.model).equal(weights(state.control.model))
    # The student's head and the control's see the same states and so learn the same.
    assert weights(state.student.head).equal(weights(state.control.head))
    assert not weights(state.student.head).equal(head)


def test_the_head_learns_from_the_first_step_and_the_student_after_the_warm_up(
    prepared: Prepare, store: str
):
    """Regression: the head began with the student's pull, at the end of the learning rate's way
    down, and led nowhere: explanations were no better than chance."""
    warm_up = ("--train.epochs", "11", "--train.warmup_epochs", "10", "--train.max_steps", "40",
               "--train.learning_rate", "0.005")  # fmt: skip
    alone, run = prepared(*ALONE, *warm_up)
    fit(alone, run)
    pull = ("--distill.rationales", store, "--distill.lambda_rdr", "1")
    state, run = prepared(*ALONE, *pull, *warm_up)
    head = weights(state.student.head)
    fit(state, run)
    assert state.step == 40  # four an epoch
    assert weights(state.student.model).equal(weights(alone.student.model))
    assert not weights(state.student.head).equal(head)
    logged = [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]
    cosines = [row["rationale_cosine"] for row in logged if "rationale_cosine" in row]
    assert np.mean(cosines[-4:]) > 0.2 + np.mean(cosines[:4])
    assert not any("loss_rdr" in row for row in logged)


def test_rationales_do_not_change_the_control(prepared: Prepare, store: str):
    """Whoever teaches, the control is the student that learned alone."""
    alone, run = prepared(*ALONE)
    fit(alone, run)
    for options in ([*ALONE, "--distill.rationales", store, "--distill.lambda_rdr", "1"], []):
        state, run = prepared(*options)
        fit(state, run)
        assert state.control is not None
        assert weights(state.control.model).equal(weights(alone.student.model))
        assert not weights(state.student.model).equal(weights(alone.student.model))


@pytest.mark.parametrize("targets", ["plain", "centred", "whitened"])
@pytest.mark.parametrize("form", ["cosine", "gram"])
def test_a_student_comes_closer_to_its_rationales_than_its_control(
    prepared: Prepare, store: str, form: str, targets: str
):
    state, run = prepared(
        *ALONE, "--distill.rationales", store, "--distill.lambda_rdr", "3",
        "--distill.rdr_form", form, "--distill.rdr_targets", targets, "--train.epochs", "12",
        "--train.learning_rate", "0.005", "--student.dropout", "0",
    )  # fmt: skip
    fit(state, run)
    dataset = SequenceDataset(run.data, 20, 0)
    batch = next(iter(make_loader(dataset, EpochSampler(dataset.users, 60, 0))))
    rationales = rationales_of(run)
    found = rationales.of_batch(batch, torch.device("cpu"))
    far = {}
    for learner in state.learners:
        states = learner.model(batch, run.loss).states
        terms = rationales.terms(learner.head, states, found, 1.0)
        far[learner.name] = terms.student_sum.item()
    assert far["student"] < 0.97 * far["control"]


def test_the_weight_scales_what_reaches_the_student_and_not_the_head(prepared: Prepare, store: str):
    state, run = prepared(*ALONE, "--distill.rationales", store)
    dataset = SequenceDataset(run.data, 20, 0)
    batch = next(iter(make_loader(dataset, EpochSampler(dataset.users, 60, 0))))
    rationales = rationales_of(run)
    found = rationales.of_batch(batch, torch.device("cpu"))
    head: Any = state.student.head
    gradients = {}
    for weight in (1.0, 0.25, 0.0):
        states = torch.randn(
            len(batch.target_ids), 16, generator=torch.Generator().manual_seed(0)
        ).requires_grad_()
        head.zero_grad()
        terms = rationales.terms(head, states, found, weight)
        assert isinstance(terms.gradient_sum, torch.Tensor)
        terms.gradient_sum.backward()
        gradients[weight] = (states.grad, head.linear.weight.grad.clone())
    torch.testing.assert_close(gradients[0.25][0], 0.25 * gradients[1.0][0])
    assert gradients[0.0][0] is None
    for _, of_head in gradients.values():
        torch.testing.assert_close(of_head, gradients[1.0][1])


def test_a_batch_without_a_rationale_changes_nothing_but_counts(
    prepared: Prepare,
    small_data: InteractionData,
    tmp_path: Path,
    write_store: WriteStore,
    training_places: Places,
):
    folder = write_store(tmp_path / "one", small_data, training_places(small_data)[:1])
    state, run = prepared(
        *ALONE, "--distill.rationales", str(folder), "--distill.lambda_rdr", "1",
        "--train.warmup_epochs", "0",
    )  # fmt: skip
    dataset = SequenceDataset(run.data, 20, 0)
    users = [user for user in dataset.users.tolist() if user != 0][:16]
    batch = next(iter(make_loader(dataset, EpochSampler(np.array(users), 16, 0))))
    report = cotrain_step(state, batch, None, run.loss, run.config, run.accelerator, run.rationales)
    assert "loss_rdr" not in report
    assert report["loss"] == report["loss_ce"]


def test_losses_have_their_closed_forms():
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # cos 45°, and cos 180°.
    predicted = torch.tensor([[3.0, 3.0], [0.0, -2.0]])
    torch.testing.assert_close(cosine_sum(predicted, targets), torch.tensor(1 - 0.5**0.5 + 2))
    # States at 60°, targets at 90°: (1/2 − 0)² for each of the two.
    states = torch.tensor([[2.0, 0.0], [0.5, 0.75**0.5]])
    torch.testing.assert_close(gram_sum(states, targets), torch.tensor(0.5))
    assert gram_sum(states[:1], targets[:1]) == 0
    assert gram_sum(states[:0], targets[:0]) == 0
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    scaled = scaled_gradient(values, 0.5)
    assert scaled.equal(values)
    (scaled * torch.tensor([2.0, 4.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 2.0]


def test_a_gram_of_many_rows_is_taken_a_thousand_at_a_time():
    torch.manual_seed(0)
    states, targets = torch.randn(1500, 4), torch.nn.functional.normalize(torch.randn(1500, 3))
    parts = [gram_sum(states[part], targets[part]) for part in (slice(1024), slice(1024, None))]
    torch.testing.assert_close(gram_sum(states, targets), parts[0] + parts[1])


# ---- whole runs ---------------------------------------------------------------------------------


def test_a_run_of_rationales_without_a_teacher_is_reported_and_exported(
    prepared: Prepare, store: str
):
    state, run = prepared(*ALONE, "--distill.rationales", store, "--distill.lambda_rdr", "0.1")
    fit(state, run)
    report = finish(state, run)
    assert report["teacher"] is None
    facts = report["rationales"]
    assert facts["rows"] == len(rationales_of(run).matched.places)
    assert (facts["encoder"], facts["dimension"], facts["lambda_rdr"]) == ("random", 12, 0.1)
    assert report["lift"] is not None
    page = (run.folder / "report.html").read_text()
    assert "Interactions with a rationale" in page
    assert "Closeness to the rationales" in page
    assert "None" not in page.partition("<body")[2].partition("<details")[0]
    head, kept = RationaleHead.load(run.folder / FOLDER)
    assert kept["store"] == facts["store"]
    shipped: Any = state.student if report["shipped"] == "student" else state.control
    assert weights(head).equal(weights(shipped.head))


def test_teacher_and_rationales_teach_together(prepared: Prepare, store: str):
    state, run = prepared("--distill.rationales", store, "--distill.lambda_rdr", "0.1")
    fit(state, run)
    taught = [row for row in run.log.rows() if "loss_rdr" in row and "loss_rank" in row]
    assert taught
    for row in taught:
        weights_of = run.config.distill
        parts = row["loss_ce"] + weights_of.lambda_rank * row["loss_rank"]
        parts += weights_of.lambda_emb * row["loss_emb"] + 0.1 * row["loss_rdr"]
        assert row["loss"] == pytest.approx(parts)


def test_heads_survive_a_checkpoint(prepared: Prepare, store: str):
    options = [*ALONE, "--distill.rationales", store, "--distill.lambda_rdr", "1",
               "--train.checkpoint_every_steps", "12"]  # fmt: skip
    state, run = prepared(*options)
    fit(state, run)
    matched = rationales_of(run).matched
    again = new_state(run.data.num_items, None, run.config, run.accelerator, rationales=matched)
    restore_checkpoint(again, run.folder, run.accelerator)
    for before, after in zip(state.learners, again.learners, strict=True):
        assert weights(before.head).equal(weights(after.head))
        assert before.optimizer.state_dict()["state"].keys() == (
            after.optimizer.state_dict()["state"].keys()
        )


def test_a_weight_without_rationales_is_a_mistake():
    with pytest.raises(ConfigError, match=r"distill\.lambda_rdr is 0\.1, but distill\.rationales"):
        parse(["--distill.lambda_rdr", "0.1"])
