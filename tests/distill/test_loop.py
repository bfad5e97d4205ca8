"""The co-training step: what learns from what, and what must not."""

import hashlib
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cotrain.config import parse
from cotrain.data.batches import EpochSampler, SequenceBatch, SequenceDataset, make_loader
from cotrain.distill.learner import fork_control
from cotrain.distill.loop import Run, fit
from cotrain.distill.losses import listnet_sum
from cotrain.distill.outcome import finish
from cotrain.distill.querying import Teacher
from cotrain.distill.run import prepare
from cotrain.distill.state import CotrainState, learning_rate, new_state, restore_checkpoint
from cotrain.distill.step import cotrain_step
from cotrain.errors import CheckpointError
from cotrain.student.item_text import TEXT_STD, principal_components
from cotrain.student.retrieval import retrieve
from cotrain.student.sasrec import SASRec
from cotrain.teacher.ranker import RankLLM

Prepare = Callable[..., tuple[CotrainState, Run]]
FitUntil = Callable[[CotrainState, Run, int], None]
Results = Callable[[CotrainState, Run], dict[str, Any]]


def teacher_of(run: Run) -> Teacher:
    assert run.teacher is not None
    return run.teacher


def language_model_of(run: Run) -> RankLLM:
    ranker = teacher_of(run).ranker
    assert isinstance(ranker, RankLLM)
    return ranker


def fingerprint(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_the_teacher_never_changes_and_is_in_no_optimizer(prepared: Prepare):
    state, run = prepared()
    teacher = language_model_of(run).backbone.model
    before = fingerprint(teacher)
    fit(state, run)
    assert state.meter.totals["rows_valid"] > 0
    assert fingerprint(teacher) == before
    assert all(parameter.grad is None for parameter in teacher.parameters())
    optimized = {
        id(parameter)
        for learner in state.learners
        for group in learner.optimizer.param_groups
        for parameter in group["params"]
    }
    assert not optimized & {id(parameter) for parameter in teacher.parameters()}


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--train.windows", "random", "--train.loss", "ce", "--train.label_smoothing", "0.1"],
        ["--train.loss", "sampled_softmax", "--train.num_negatives", "20"],
    ],
    ids=["chunked_ce", "ce", "sampled_softmax"],
)
def test_without_weight_on_the_verdict_student_and_control_are_the_same_to_the_bit(
    prepared: Prepare, options: list[str]
):
    # The strongest check of the control: same start, batches, dropout, negatives, optimizer state.
    state, run = prepared("--distill.lambda_rank", "0", "--distill.lambda_emb", "0", *options)
    fit(state, run)
    assert state.meter.totals["rows_valid"] > 0
    assert state.control is not None
    assert fingerprint(state.student.model) == fingerprint(state.control.model)


LAZY = ["--train.item_updates", "lazy", "--train.num_negatives", "20"]


def test_candidates_of_no_weight_do_not_move_the_lazy_student_from_its_control(prepared: Prepare):
    """Regression: every candidate was looked up, and so took a step by its old momentum."""
    # A sum over sparse rows depends on what else is among them, in its last bit.
    state, run = prepared("--distill.lambda_rank", "0", "--distill.lambda_emb", "0",
                          "--train.learning_rate", "0.01",
                          "--train.loss", "sampled_softmax", *LAZY)  # fmt: skip
    fit(state, run)
    assert state.control is not None
    control = state.control.model.state_dict()
    for name, value in state.student.model.state_dict().items():
        torch.testing.assert_close(value, control[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("term", ["lambda_rank", "lambda_emb"])
def test_each_term_alone_moves_the_student_away_from_its_control(prepared: Prepare, term: str):
    off = {"lambda_rank": "0", "lambda_emb": "0", term: "0.5"}
    state, run = prepared(*(word for key in off for word in (f"--distill.{key}", off[key])))
    fit(state, run)
    assert state.control is not None
    assert fingerprint(state.student.model) != fingerprint(state.control.model)


def one_batch(run: Run) -> SequenceBatch:
    dataset = SequenceDataset(run.data, 20, 0)
    return next(iter(make_loader(dataset, EpochSampler(dataset.users, 16, 0))))


def test_a_step_brings_the_students_scores_closer_to_the_verdict_on_its_candidates(
    prepared: Prepare,
):
    state, run = prepared(
        "--distill.lambda_rank", "1000", "--distill.lambda_emb", "0", "--student.dropout", "0",
        "--query.fraction", "1", "--distill.teacher_temperature", "0.1",
    )  # fmt: skip
    batch = one_batch(run)
    student: Any = state.student.model
    output = student(batch, run.loss)
    candidates = retrieve(
        output.user_state, student.item_vectors, batch.history, batch.cut_target, 5
    )
    verdict, asked = teacher_of(run).ask(batch, candidates, state.epoch)
    assert asked.all()

    def ranking_loss() -> float:
        states = student(batch, run.loss).user_state
        scores = torch.einsum("bd,bkd->bk", states, student.item_vectors[candidates.item_ids])
        return listnet_sum(scores, verdict.probs, verdict.valid.float()).item() / len(asked)

    before = ranking_loss()
    report = cotrain_step(state, batch, run.teacher, run.loss, run.config, run.accelerator)
    assert report["loss_rank"] == pytest.approx(before, rel=1e-5)
    assert ranking_loss() < before


def test_the_projector_learns_to_meet_the_user_state(prepared: Prepare):
    state, run = prepared(
        "--distill.lambda_rank", "0", "--distill.lambda_emb", "1", "--query.fraction", "1",
        "--train.warmup_epochs", "0", "--train.lr_warmup_steps", "0", "--train.epochs", "8",
        "--train.learning_rate", "0.01",
    )  # fmt: skip
    fit(state, run)
    rows = [row["loss_emb"] for row in run.log.rows() if "loss_emb" in row]
    assert rows[-1] < 0.5 * rows[0]


def test_a_step_reports_the_means_of_what_it_optimises(prepared: Prepare):
    state, run = prepared("--train.warmup_epochs", "0", "--query.fraction", "1")
    batch = one_batch(run)
    torch.manual_seed(5)
    with torch.no_grad():
        output = state.student.model(batch, run.loss)
    torch.manual_seed(5)
    report = cotrain_step(state, batch, run.teacher, run.loss, run.config, run.accelerator)
    assert report["loss_ce"] == pytest.approx((output.loss_sum / output.n_targets).item(), rel=1e-5)
    assert report["teacher_rows"] == 16
    expected = report["loss_ce"] + 0.1 * report["loss_rank"] + 0.001 * report["loss_emb"]
    assert report["loss"] == pytest.approx(expected)


def test_a_batch_that_asks_nobody_still_trains(prepared: Prepare):
    state, run = prepared("--query.fraction", "0", "--train.warmup_epochs", "0")
    before = fingerprint(state.student.model)
    fit(state, run)
    assert fingerprint(state.student.model) != before
    assert state.meter.totals["rows_asked"] == 0


def test_learning_rate_warms_up_and_ends_at_its_ratio():
    config = parse(["--train.lr_warmup_steps", "10", "--train.final_lr_ratio", "0.1"])
    rates = [learning_rate(step, 110, config) for step in range(110)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_student_and_control_choose_their_best_epoch_after_the_fork(prepared: Prepare):
    # Regression: an epoch of the warm-up could be the best of both, and the lift exactly zero.
    state, run = prepared("--train.epochs", "5", "--train.warmup_epochs", "3")
    fit(state, run)
    assert [learner.best_epoch > 3 for learner in state.learners] == [True, True]
    rows = [row for row in run.log.rows() if row["kind"] == "validation" and row["epoch"] > 3]
    for learner in state.learners:
        of_learner = [row["ndcg@10"] for row in rows if row["model"] == learner.name]
        assert learner.best_metric == max(of_learner)


def test_the_teacher_is_calibrated_once_when_it_starts(prepared: Prepare):
    state, run = prepared()
    assert not state.identifier_bias.any()
    fit(state, run)
    assert state.identifier_bias.any()
    assert state.identifier_bias.equal(teacher_of(run).ranker.identifier_bias)
    # Calibration rows teach nothing and are not counted as asked.
    assert state.meter.totals["rows_asked"] == 2 * teacher_of(run).query.rows_per_epoch
    state, run = prepared("--teacher.calibration_rows", "0")
    fit(state, run)
    assert not state.identifier_bias.any()


@pytest.mark.parametrize("max_steps", [[], ["--train.max_steps", "10"]], ids=["whole", "cut"])
def test_a_run_resumed_at_its_last_step_still_validates_it(prepared: Prepare, max_steps: list[str]):
    # Regression: a checkpoint of the last step ended the loop before the last validation.
    last = "10" if max_steps else "12"
    state, run = prepared("--train.checkpoint_every_steps", last, *max_steps)
    fit(state, run)
    assert state.step == int(last)
    again = new_state(run.data.num_items, 32, run.config, run.accelerator)
    restore_checkpoint(again, run.folder, run.accelerator)
    assert again.step == int(last)
    fit(again, run)
    assert again.step == int(last)
    for before, after in zip(state.learners, again.learners, strict=True):
        assert (before.best_epoch, before.best_metric) == (after.best_epoch, after.best_metric)
        assert fingerprint(before.model) == fingerprint(after.model)


# ---- without a teacher --------------------------------------------------------------------------


def test_a_student_alone_trains_is_evaluated_and_reported(prepared: Prepare):
    # As many epochs of warm-up as of training, which a run with a teacher refuses.
    state, run = prepared("--teacher.model", "none", "--train.warmup_epochs", "3")
    before = fingerprint(state.student.model)
    assert (run.teacher, state.projector, state.learners) == (None, None, [state.student])
    fit(state, run)
    assert state.control is None
    assert fingerprint(state.student.model) != before
    assert state.step == 12
    report = finish(state, run)
    assert report["shipped"] == "student"
    assert [report[key] for key in ("control", "lift", "teacher", "effective_rank")] == [None] * 4
    assert report["examples"] == []
    assert 0 < report["student"]["test"]["mrr"] < 1
    page = (run.folder / "report.html").read_text()
    assert f"{report['student']['test']['mrr']:.4f}" in page
    assert "None" not in page.partition("<body")[2].partition("<details")[0]
    assert (run.folder / "student" / "model.safetensors").is_file()


def test_a_student_alone_starts_like_one_with_a_teacher(prepared: Prepare):
    """Loading a teacher draws no random number."""
    alone, taught = prepared("--teacher.model", "none"), prepared()
    assert fingerprint(alone[0].student.model) == fingerprint(taught[0].student.model)


@pytest.mark.parametrize(
    "options",
    [
        ["--teacher.model", "none"],
        ["--teacher.model", "none", "--train.loss", "sampled_softmax", "--train.windows", "random",
         *LAZY],
        ["--train.loss", "gbce", *LAZY],
        ["--distill.target", "blend", "--distill.audit", "warn", "--teacher.num_candidates", "20"],
    ],
    ids=["alone", "alone and lazy", "taught and lazy", "a blend"],
)  # fmt: skip
def test_an_interrupted_run_ends_to_the_bit_like_one_left_alone(
    prepared: Prepare, fit_until: FitUntil, results: Results, options: list[str]
):
    state, run = prepared(*options)
    fit(state, run)
    undisturbed = fingerprint(state.student.model), results(state, run)

    first, broken = prepared(*options)
    fit_until(first, broken, 6)
    assert first.step == 6
    again, resumed = prepare(broken.config, resume=True)
    assert again.step == 6
    fit(again, resumed)
    assert (fingerprint(again.student.model), results(again, resumed)) == undisturbed
    assert again.blend_beta == state.blend_beta


# ---- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", ["non_finite", "out_of_memory"])
def test_a_teacher_that_breaks_in_the_middle_is_counted_and_the_students_learn_on(
    prepared: Prepare, cause: str
):
    state, run = prepared("--query.fraction", "0.15")

    def broken(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if state.epoch < 2:
            return output
        if cause == "out_of_memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return torch.full_like(output, torch.nan)

    language_model_of(run).backbone.model.get_submodule("model.norm").register_forward_hook(broken)
    fit(state, run)
    assert (state.meter.totals["rows_asked"], state.meter.totals["rows_valid"]) == (18, 9)
    assert state.meter.failures == {cause: 9}
    rows = [row for row in run.log.rows() if "loss" in row]
    assert len(rows) == 12
    assert all(math.isfinite(row["loss"]) for row in rows)
    # A step without a verdict is one of cross-entropy.
    assert rows[-1]["teacher_rows"] == 0
    assert "loss_rank" not in rows[-1]
    assert rows[-1]["loss"] == rows[-1]["loss_ce"]


def test_nobody_goes_on_from_a_checkpoint_that_was_tampered_with(prepared: Prepare):
    state, run = prepared("--train.max_steps", "4", "--train.checkpoint_every_steps", "2")
    fit(state, run)
    latest = run.folder / "checkpoints" / "step_4"
    weights = latest / "student.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step_4 was changed .*\(student\.safetensors\)"):
        prepare(run.config, resume=True)
    shutil.rmtree(latest)  # as the message says
    assert prepare(run.config, resume=True)[0].step == 2


# ---- in parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", ["2", "5"])
def test_a_step_in_parts_is_the_same_step(prepared: Prepare, parts: str):
    steps = []
    for count in ("1", parts):
        options = ["--student.dropout", "0", "--train.warmup_epochs", "0", "--query.fraction", "1"]
        state, run = prepared(*options, "--train.accumulation_steps", count)
        batch = one_batch(run)
        report = cotrain_step(state, batch, run.teacher, run.loss, run.config, run.accelerator)
        steps.append((report, state.student.bare.state_dict()))
    (one, weights), (other, others) = steps
    assert one == pytest.approx(other, rel=1e-5)
    for name, value in weights.items():
        # Adam's first step is the learning rate, 0.001, even where the gradient is almost zero.
        torch.testing.assert_close(others[name], value, atol=1e-4, rtol=0)


# ---- a blend ------------------------------------------------------------------------------------

BLEND = ["--distill.target", "blend", "--query.fraction", "1", "--distill.lambda_emb", "0",
         "--train.warmup_epochs", "0", "--distill.lambda_rank", "10"]  # fmt: skip


def gradients(state: CotrainState) -> list[list[torch.Tensor]]:
    found = []
    for learner in state.learners:
        grads = [parameter.grad for parameter in learner.bare.parameters()]
        found.append([grad for grad in grads if grad is not None])
        assert len(found[-1]) == len(grads)
    return found


@pytest.mark.parametrize("parts", ["1", "3"])
@pytest.mark.parametrize("beta", ["0", "0.4"])
def test_a_blend_teaches_nothing_but_what_the_teacher_adds(
    prepared: Prepare, parts: str, beta: str
):
    # With dropout: both draw the same masks, in each part of the step.
    state, run = prepared(*BLEND, "--distill.blend_beta", beta, "--train.accumulation_steps", parts,
                          "--train.max_grad_norm", "1000000")  # fmt: skip
    state.control = fork_control(state.student)
    report = cotrain_step(state, one_batch(run), run.teacher, run.loss, run.config, run.accelerator)
    assert report["teacher_rows"] == 16
    students, controls = gradients(state)
    apart = max(float((a - b).abs().max()) for a, b in zip(students, controls, strict=True))
    assert (apart < 1e-6) if beta == "0" else (apart > 1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_blend_is_the_controls_scores_and_what_the_teacher_adds(
    prepared: Prepare, temperature: float
):
    state, run = prepared(*BLEND, "--distill.blend_beta", "0.4", "--student.dropout", "0",
                          "--distill.student_temperature", str(temperature))  # fmt: skip
    batch, student = one_batch(run), state.student.bare
    output = student(batch, run.loss)
    found = retrieve(output.user_state, student.item_vectors, batch.history, batch.cut_target, 5)
    verdict, _ = teacher_of(run).ask(batch, found, state.epoch)
    state.control = fork_control(state.student)
    assert isinstance(state.control.bare, SASRec)
    with torch.no_grad():  # its scores are twice the student's
        state.control.bare.final_norm.weight.mul_(2)
    report = cotrain_step(state, batch, run.teacher, run.loss, run.config, run.accelerator)

    expected = 0.0
    for scores, probs in zip(found.scores.tolist(), verdict.probs.tolist(), strict=True):
        target = np.exp((2 * np.array(scores) + 0.4 * np.log(probs)) / temperature)
        logprobs = np.array(scores) / temperature
        logprobs -= np.log(np.exp(logprobs).sum())
        expected -= (target / target.sum() * logprobs).sum() / 16
    assert report["loss_rank"] == pytest.approx(expected, rel=1e-4)


# ---- item text ----------------------------------------------------------------------------------


def test_student_and_control_start_from_the_same_item_text(
    prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COTRAIN_HOME", str(tmp_path / "cache"))
    state, run = prepared("--student.item_text", "teacher", "--train.warmup_epochs", "0",
                          "--distill.lambda_rank", "0", "--distill.lambda_emb", "0")  # fmt: skip
    student: Any = state.student.model
    started = fingerprint(student)
    components = principal_components(language_model_of(run).embed_items(), 16)
    torch.testing.assert_close(
        student.item_vectors[1:].detach(), components * (TEXT_STD / components.std())
    )
    assert not student.item_vectors[0].any()
    # Nothing else is drawn otherwise than without text.
    plain, _ = prepared()
    for (name, ours), theirs in zip(
        student.named_parameters(), plain.student.model.parameters(), strict=True
    ):
        assert ours.equal(theirs) == (name != "item_embedding.weight")
    # The embeddings were kept: a second run reads them and starts alike.
    assert len(list((tmp_path / "cache" / "item-text").iterdir())) == 1
    with monkeypatch.context() as patched:
        patched.setattr(RankLLM, "embed_items", None)
        again, _ = prepared("--student.item_text", "teacher")
    assert fingerprint(again.student.model) == started
    # The control forks from there: as nobody weighs the verdict, both stay the same.
    fit(state, run)
    assert state.control is not None
    assert fingerprint(state.control.model) == fingerprint(student) != started


def test_another_limit_of_title_tokens_reads_the_titles_anew(
    prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Regression: the teacher reads cut titles, and whole ones found the cut ones' embeddings."""
    monkeypatch.setenv("COTRAIN_HOME", str(tmp_path / "cache"))
    starts = {
        fingerprint(prepared("--student.item_text", "teacher", *options)[0].student.model)
        for options in ([], ["--teacher.max_title_tokens", "3"])
    }
    assert len(starts) == 2
