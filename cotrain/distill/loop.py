"""The heart: one co-training step, and the loop around it.

The teacher only ever appears here as `Teacher.ask`, under no_grad and outside `prepare`: it is in
no optimizer and in no checkpoint.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from cotrain.config import Config
from cotrain.data.batches import (
    EpochSampler,
    SequenceBatch,
    SequenceDataset,
    collate,
    make_loader,
)
from cotrain.data.interactions import InteractionData
from cotrain.distill import losses
from cotrain.distill.audit import audit, audit_rows
from cotrain.distill.querying import Teacher, verdict_weight
from cotrain.distill.rationales import Rationales, RationaleTerms
from cotrain.distill.state import (
    CotrainState,
    Learner,
    fork_control,
    learning_rate,
    save_checkpoint,
)
from cotrain.errors import CotrainError, DataError, TeacherError
from cotrain.evaluation.evaluator import evaluate
from cotrain.evaluation.metrics import metrics_from_ranks
from cotrain.runtime.interruption import StopRequest
from cotrain.runtime.seeding import replayed, torch_state
from cotrain.runtime.tracking import MetricsLog, clock, progress_bar
from cotrain.student.losses import TrainingLoss
from cotrain.student.optimizer import clip_grad_norm
from cotrain.student.retrieval import Candidates, retrieve
from cotrain.student.sasrec import SASRec, StudentOutput
from cotrain.teacher.verdict import entropy

SELECTION_METRIC = "ndcg@10"


class Interrupted(CotrainError):
    """The run was asked to stop and has written a checkpoint.

    Attributes:
        folder: Run folder to resume.
    """

    def __init__(self, step: int, total_steps: int, folder: Path):
        super().__init__(f"Stopped at step {step} of {total_steps}, with a checkpoint. Go on by")
        self.folder = folder


def cotrain_step(
    state: CotrainState,
    batch: SequenceBatch,
    teacher: Teacher | None,
    loss: TrainingLoss,
    config: Config,
    accelerator: Accelerator,
    rationales: Rationales | None = None,
    rationales_teach: bool = True,
) -> dict[str, float]:
    """One optimizer step of the student, and of the control beside it.

    Collectives, the same on every process whatever the teacher answered: the projector's moments
    and the loss counts, each one reduction, and the gradients.

    Args:
        state: Changed in place.
        batch: This process's rows, on the CPU.
        teacher: None while nobody is asked.
        loss: What the data teach by.
        config: Settings of the run.
        accelerator: Device and collectives.
        rationales: Of the training data, or None.
        rationales_teach: False: only W_r learns, from states that it leaves alone.

    Returns:
        Losses, each a mean over its own rows of all processes, and the teacher's entropy.
    """
    device = accelerator.device
    dropout_state = torch_state(device)
    on_device = batch.to(device)
    output = state.student.model(on_device, loss)
    state.meter.student_states.add(output.user_state)
    nothing = output.loss_sum.new_zeros(())
    terms = Terms(nothing, nothing, nothing, nothing)
    if teacher is not None:
        terms = distillation_terms(state, output, batch, on_device, teacher, config, accelerator)
    reasons = RationaleTerms(nothing, nothing, nothing)
    found = None if rationales is None else rationales.of_batch(batch, device)
    if rationales is not None and found is not None:
        weight = config.distill.lambda_rdr if rationales_teach else 0.0
        reasons = rationales.terms(state.student.head, output.states, found, weight)

    sums = [output.loss_sum, output.n_targets]
    sums += [terms.rank_sum, terms.emb_sum, terms.entropy_sum, terms.n_valid]
    sums += [reasons.head_sum, reasons.student_sum, reasons.n_rows]
    totals = _total(torch.stack(sums), accelerator).tolist()
    ce, n_targets, rank, emb, nats, n_valid, distance, rdr, n_reasons = totals
    n_targets, n_rows, n_found = max(n_targets, 1), max(n_valid, 1), max(n_reasons, 1)
    weights = config.distill
    report = {"loss_ce": ce / n_targets}
    if teacher is not None:
        report["teacher_rows"] = n_valid
    if n_valid:
        report |= {"loss_rank": rank / n_rows, "loss_emb": emb / n_rows}
        report["teacher_entropy"] = nats / n_rows
    if n_reasons:
        report |= {"rationale_rows": n_reasons, "rationale_cosine": 1 - distance / n_found}
    if n_reasons and rationales_teach:
        report["loss_rdr"] = rdr / n_found
    report["loss"] = (
        report["loss_ce"]
        + state.lambda_rank * report.get("loss_rank", 0.0)
        + weights.lambda_emb * report.get("loss_emb", 0.0)
        + weights.lambda_rdr * report.get("loss_rdr", 0.0)
    )
    if not math.isfinite(report["loss"]):
        raise CotrainError(
            f"The loss is {report['loss']} at step {state.step + 1} ({report}). Lower "
            "train.learning_rate or the distill.lambda_… of the term that is not finite."
        )
    # Processes average their gradients; × their number makes that the gradient of the mean over
    # all rows of all processes.
    total = accelerator.num_processes * (
        output.loss_sum / n_targets
        + state.lambda_rank * terms.rank_sum / n_rows
        + weights.lambda_emb * terms.emb_sum / n_rows
        + reasons.gradient_sum / n_found
    )
    _update(state.student, total, accelerator, config, state.projector)
    if state.control is not None:
        # The same dropout masks as the student's: any difference comes from what distills.
        with replayed(dropout_state, device):
            control = state.control.model(on_device, loss)
        total = control.loss_sum / n_targets
        if rationales is not None and found is not None:
            beside = rationales.terms(state.control.head, control.states, found, 0.0)
            total = total + beside.gradient_sum / n_found
            distance = _total(beside.head_sum, accelerator).item()
            if n_reasons:
                report["control_rationale_cosine"] = 1 - distance / n_found
        _update(state.control, accelerator.num_processes * total, accelerator, config)
        report["control_loss_ce"] = _total(control.loss_sum, accelerator).item() / n_targets
    return report


@dataclass(frozen=True)
class Terms:
    """Distillation losses and counts of one process's rows, each () and not yet divided."""

    rank_sum: Tensor
    emb_sum: Tensor
    entropy_sum: Tensor
    n_valid: Tensor


def distillation_terms(
    state: CotrainState,
    output: StudentOutput,
    batch: SequenceBatch,
    on_device: SequenceBatch,
    teacher: Teacher,
    config: Config,
    accelerator: Accelerator,
) -> Terms:
    """Let the teacher judge what the student proposes, and the student answer for it.

    Only the student's states and item embeddings, and the projector, carry a gradient.

    Args:
        state: Gives the student and the projector; its meter and the projector's moments change.
        output: The student's forward on `batch`.
        batch: This process's rows, on the CPU, where prompts are made.
        on_device: The same rows, where the student is.
        teacher: Who is asked, and which rows ask.
        config: Temperatures and confidence.
        accelerator: Device and collectives.
    """
    device = accelerator.device
    student = accelerator.unwrap_model(state.student.model)
    candidates = propose(student, output, on_device, teacher.num_candidates)
    verdict, asked = teacher.ask(batch, candidates, state.epoch)
    state.meter.observe(batch, candidates, verdict, asked)

    weight = verdict_weight(verdict, config.distill.confidence).to(device)
    decision_state, valid = verdict.decision_state.to(device), verdict.valid.to(device)
    # (B, K), computed again because retrieval keeps no graph
    item_vectors = student.item_embedding(candidates.item_ids.to(device))
    scores = torch.einsum("bd,bkd->bk", output.user_state, item_vectors)
    assert state.projector is not None  # there is a teacher
    accelerator.unwrap_model(state.projector).observe(
        decision_state, valid, lambda sums: _total(sums, accelerator)
    )
    # Of all rows, also of those without a verdict: processes must agree on what is called.
    projected = state.projector(decision_state)
    return Terms(
        rank_sum=losses.listnet_sum(
            scores, verdict.probs.to(device), weight, config.distill.student_temperature
        ),
        emb_sum=losses.alignment_sum(projected, output.user_state, weight),
        entropy_sum=(entropy(verdict.probs).to(device) * valid).sum(),
        n_valid=valid.sum(),
    )


def propose(
    student: SASRec, output: StudentOutput, on_device: SequenceBatch, num_candidates: int
) -> Candidates:
    """The student's candidates at the cut of every row of its batch, moved to the CPU."""
    candidates = retrieve(
        output.user_state,
        student.item_vectors,
        on_device.history,
        on_device.cut_target,
        num_candidates,
    )
    return candidates.cpu()


def _total(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Sum over all processes, in float64 and without a graph; a collective."""
    total = accelerator.reduce(values.detach().double(), "sum")
    assert isinstance(total, Tensor)  # a tensor goes in
    return total


def _update(
    learner: Learner,
    loss: Tensor,
    accelerator: Accelerator,
    config: Config,
    projector: nn.Module | None = None,
) -> None:
    learner.optimizer.zero_grad()
    accelerator.backward(loss)
    # Clipped apart: what projector and head do must not change the student's step size.
    if config.train.item_updates == "lazy":
        clip_grad_norm(learner.model.parameters(), config.train.max_grad_norm)
    else:
        accelerator.clip_grad_norm_(learner.model.parameters(), config.train.max_grad_norm)
    for beside in (projector, learner.head):
        if beside is not None:
            accelerator.clip_grad_norm_(beside.parameters(), config.train.max_grad_norm)
    learner.optimizer.step()


@dataclass(frozen=True)
class Run:
    """What a run is made of and what does not change while it trains.

    Attributes:
        config: Its settings.
        data: Interactions and catalogue.
        teacher: The ranker and who asks it, or None.
        rationales: Reasons for training interactions, or None; without both the student learns
            alone.
        loss: What the data teach by.
        accelerator: Device and processes.
        log: Takes metrics.
        folder: Where everything is written.
    """

    config: Config
    data: InteractionData
    teacher: Teacher | None
    rationales: Rationales | None
    loss: TrainingLoss
    accelerator: Accelerator
    log: MetricsLog
    folder: Path


def fit(state: CotrainState, run: Run) -> None:
    """Train from where `state` stands to the end; cross-entropy first, then with what distills.

    Raises:
        Interrupted: After SIGINT or SIGTERM, with a checkpoint written.
    """
    train, accelerator = run.config.train, run.accelerator
    dataset = SequenceDataset(
        run.data, run.config.student.max_length, run.config.seed, train.windows
    )
    sampler = EpochSampler(
        dataset.users, train.batch_size, run.config.seed,
        accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    loader = make_loader(dataset, sampler)
    pace = Pace(run, sampler.steps_per_epoch, state)
    ended = False
    with StopRequest() as stop, pace.bar:
        while not ended:
            distills = run.config.distills and state.epoch >= train.warmup_epochs
            if distills and state.epoch == train.warmup_epochs and state.step_in_epoch == 0:
                start_distilling(state, run, dataset)
            teacher = run.teacher if distills else None
            sampler.start_at(state.epoch, state.step_in_epoch)
            for batch in loader:
                if state.step >= pace.total_steps:
                    break
                rate = learning_rate(state.step, pace.total_steps, run.config)
                for learner in state.learners:
                    for group in learner.optimizer.param_groups:
                        group["lr"] = rate
                report = cotrain_step(
                    state, batch, teacher, run.loss, run.config, accelerator, run.rationales,
                    rationales_teach=distills,
                )  # fmt: skip
                state.step += 1
                state.step_in_epoch += 1
                pace.tick(report)
                epoch = state.epoch + state.step_in_epoch / sampler.steps_per_epoch
                row = {"kind": "train", "step": state.step, "epoch": epoch, "lr": rate, **report}
                run.log.write(row)
                stopping = _anywhere(stop.received, accelerator)
                if stopping or state.step % train.checkpoint_every_steps == 0:
                    save_checkpoint(state, run.folder, run.config, accelerator, run.log.num_bytes)
                if stopping:
                    raise Interrupted(state.step, pace.total_steps, run.folder)
            ended = state.epoch + 1 == train.epochs or state.step >= pace.total_steps
            if ended or (state.epoch + 1) % train.eval_every_epochs == 0:
                validate(state, run)
                if distills and (ended or run.config.distill.audit_evaluations):
                    audit_teacher(state, run)
            state.epoch += 1
            state.step_in_epoch = 0


def start_distilling(state: CotrainState, run: Run, dataset: SequenceDataset) -> None:
    """What happens once, between the warm-up and the first step that distills."""
    state.start_effective_rank = state.meter.student_states.effective_rank()
    if run.config.train.control:
        state.control = fork_control(state, run.config, run.accelerator)
    for learner in state.learners:
        # Student and control choose their best epoch from the same ones, those after the fork.
        learner.best_metric = -1.0
    count = min(run.config.teacher.calibration_rows, len(dataset))
    if run.teacher is not None and count:
        teacher = run.teacher
        # On the student's own candidates: the bias depends on what is shown, and measured on random
        # items it leaves three times as much.
        draw = np.random.default_rng((run.config.seed, 5)).permutation(dataset.users)[:count]
        rows = collate([dataset[user, state.epoch] for user in draw.tolist()])
        student = run.accelerator.unwrap_model(state.student.model).eval()
        on_device = rows.to(run.accelerator.device)
        with torch.no_grad():
            output = student(on_device, run.loss)
        student.train()
        candidates = propose(student, output, on_device, teacher.num_candidates)
        shown = "calibrating the teacher" if run.accelerator.is_main_process else None
        state.meter.observe_calibration(teacher.calibrate(rows, candidates, shown))
        state.identifier_bias = teacher.ranker.identifier_bias
    audit_teacher(state, run)
    if run.config.distill.audit == "stop" and state.audits and not state.audits[-1]["teaches"]:
        raise TeacherError(
            f"This teacher has nothing to teach that {state.audits[-1]['rows']} validation rows "
            "show (above), and distill.audit is stop. Train it (scripts/train_teacher.py), take "
            "another one, audit more rows (distill.audit_rows), or set distill.audit warn."
        )


def audit_teacher(state: CotrainState, run: Run) -> None:
    """What the teacher knows that the present student does not, said and kept; where
    `distill.lambda_rank` is auto, its weight follows.

    Raises:
        DataError: There is no row to audit on, and `distill.audit` is stop.
    """
    settings, config, accelerator = run.config.distill, run.config, run.accelerator
    if run.teacher is None or settings.audit == "off":
        return
    model = accelerator.unwrap_model(state.student.model)
    try:
        rows = audit_rows(
            model, run.data, config.teacher.num_candidates, settings.audit_rows, config.seed
        )
    except DataError as error:
        if settings.audit == "stop":
            raise
        tell(f"No audit: {error}", accelerator)
        return
    found = audit(rows, run.teacher.ranker, config.seed, accelerator, config.eval.bootstrap_samples)
    tell(str(found), accelerator)
    state.audits.append({"step": state.step, "epoch": state.epoch, **found.as_dict()})
    run.log.write({
        "kind": "audit", "step": state.step, "epoch": state.epoch, "student": found.student,
        "teacher": found.teacher, "blend": found.blend, "beta": found.beta,
    })  # fmt: skip
    if settings.lambda_rank == "auto":
        state.lambda_rank = found.lambda_rank
        tell(f"distill.lambda_rank auto: {state.lambda_rank:.3f}", accelerator)


def tell(text: str, accelerator: Accelerator) -> None:
    """A line of the main process above the live one."""
    if accelerator.is_main_process:
        tqdm.write(text)


def validate(state: CotrainState, run: Run) -> None:
    """Rank validation items with every learner, keep the best weights, log metrics and ranks."""
    epoch = state.epoch + 1
    for learner in state.learners:
        model = run.accelerator.unwrap_model(learner.model)
        found = evaluate(model, run.data, "validation", run.config.eval.batch_size, run.accelerator)
        metrics = metrics_from_ranks(found.ranks)
        learner.consider(metrics[SELECTION_METRIC], epoch, run.accelerator)
        row = {"kind": "validation", "step": state.step, "epoch": epoch, "model": learner.name}
        run.log.write(row | metrics)
    row = {"kind": "train", "step": state.step, "epoch": epoch}
    row["student_state_effective_rank"] = state.meter.student_states.effective_rank()
    if state.meter.decision_states.rows is not None:
        row["decision_state_effective_rank"] = state.meter.decision_states.effective_rank()
        row["teacher_rows_per_s"] = state.meter.rows_per_s
    run.log.write(row)


def _anywhere(flag: bool, accelerator: Accelerator) -> bool:
    """True on every process when `flag` is true on one; a collective."""
    if accelerator.num_processes == 1:
        return flag
    return bool(_total(torch.tensor(float(flag), device=accelerator.device), accelerator) > 0)


class Pace:
    """The live line: losses, teacher rate, and a time left that knows which steps will ask.

    Args:
        run: Settings and who asks.
        steps_per_epoch: Optimizer steps an epoch.
        state: Where the run stands; its meter is read, its `seconds` kept up to date.
    """

    def __init__(self, run: Run, steps_per_epoch: int, state: CotrainState):
        train = run.config.train
        self.state = state
        self.epochs = train.epochs
        self.total_steps = min(train.epochs * steps_per_epoch, train.max_steps or sys.maxsize)
        self.first_asking_step = train.warmup_epochs * steps_per_epoch
        self.rows_per_step, self.teacher_rows_per_s = 0.0, 1.0
        if run.teacher is not None:
            self.rows_per_step = run.teacher.query.rows_per_epoch / steps_per_epoch
            self.rows_per_step /= run.accelerator.num_processes
            self.teacher_rows_per_s = run.teacher.probed_rows_per_s
        self.bar = progress_bar(self.total_steps, state.step, run.accelerator.is_main_process)
        self._first_step = state.step
        self._teacher_seconds = state.meter.totals["seconds"]
        self._started = self._last = time.perf_counter()

    def tick(self, report: dict[str, float]) -> None:
        """After each step, with what it reported."""
        now = time.perf_counter()
        state, meter = self.state, self.state.meter
        state.seconds += now - self._last
        self._last = now
        if meter.totals["rows_asked"]:
            self.teacher_rows_per_s = meter.rows_per_s
        spent = now - self._started - (meter.totals["seconds"] - self._teacher_seconds)
        per_step = spent / (state.step - self._first_step)
        to_ask = self.total_steps - max(state.step, self.first_asking_step)
        left = per_step * (self.total_steps - state.step)
        left += max(0, to_ask) * self.rows_per_step / self.teacher_rows_per_s
        self.bar.set_description_str(f"epoch {state.epoch + 1}/{self.epochs}", refresh=False)
        shown = {"left": clock(left), "CE": f"{report['loss_ce']:.3f}"}
        if "loss_rank" in report:
            shown |= {"rank": f"{report['loss_rank']:.3f}", "emb": f"{report['loss_emb']:.1f}"}
            shown["teacher"] = f"{self.teacher_rows_per_s:.2f} rows/s"
        if "loss_rdr" in report:
            shown["rdr"] = f"{report['loss_rdr']:.3f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
