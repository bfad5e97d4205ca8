"""The loop around the co-training step: epochs, evaluation, checkpoints, and how long it takes."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from cotrain.config import Config
from cotrain.data.batches import EpochSampler, SequenceDataset, collate, make_loader
from cotrain.data.interactions import InteractionData
from cotrain.distill import warm_up
from cotrain.distill.ahead import ask_ahead
from cotrain.distill.audit import audit, audit_rows
from cotrain.distill.choosing import chosen_by_student
from cotrain.distill.learner import fork_control
from cotrain.distill.querying import Teacher
from cotrain.distill.rationales import Rationales
from cotrain.distill.state import CotrainState, learning_rate, save_checkpoint
from cotrain.distill.step import cotrain_step, propose, total
from cotrain.errors import CotrainError, DataError, TeacherError
from cotrain.evaluation.evaluator import evaluate
from cotrain.evaluation.metrics import metrics_from_ranks
from cotrain.runtime.interruption import StopRequest
from cotrain.runtime.tracking import MetricsLog, clock, progress_bar
from cotrain.student.losses import TrainingLoss

SELECTION_METRIC = "ndcg@10"


class Interrupted(CotrainError):
    """The run was asked to stop and has written a checkpoint.

    Attributes:
        folder: Run folder to resume.
    """

    def __init__(self, step: int, total_steps: int, folder: Path):
        super().__init__(f"Stopped at step {step} of {total_steps}, with a checkpoint. Go on by")
        self.folder = folder


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


def fit(state: CotrainState, run: Run, until_epoch: int | None = None) -> None:
    """Train from where `state` stands to the end of an epoch, none: of the last one; cross-entropy
    first, then with what distills.

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
    last_epoch, ended = until_epoch or train.epochs, False
    with StopRequest() as stop, pace.bar:
        while not ended:
            warm = state.epoch == train.warmup_epochs and not state.step_in_epoch
            if train.keep_warm_up and warm and not state.started:
                warm_up.keep(state, run.folder, run.config, accelerator, run.log.num_bytes)
            distills = run.config.distills and state.epoch >= train.warmup_epochs
            if distills and not state.started:
                start_distilling(state, run)
            teacher = run.teacher if distills else None
            if teacher is not None and run.config.query.when == "offline":
                ask_for_all_epochs(state, run, dataset, sampler, pace.total_steps, stop)
            elif state.step_in_epoch == 0 and run.config.asks(state.epoch):
                state.kept = state.kept.emptied()
                choose_users(state, run, dataset, state.epoch)
            sampler.start_at(state.epoch, state.step_in_epoch, run.config.asking_epoch(state.epoch))
            for batch in loader:
                if state.step >= pace.total_steps:
                    break
                rate = learning_rate(state.step, pace.total_steps, run.config)
                for learner in state.learners:
                    learner.set_rate(rate)
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
            ended = state.epoch + 1 == last_epoch or state.step >= pace.total_steps
            if ended or (state.epoch + 1) % train.eval_every_epochs == 0:
                validate(state, run)
                if distills and (ended or run.config.distill.audit_evaluations):
                    audit_teacher(state, run)
            state.keep_fresh()
            state.epoch += 1
            state.step_in_epoch = 0


def start_distilling(state: CotrainState, run: Run) -> None:
    """What happens once, between the warm-up and the first step that distills."""
    state.started = True
    state.start_effective_rank = state.meter.student_states.effective_rank()
    if run.config.train.control:
        state.control = fork_control(state.student)
    for learner in state.learners:
        # Student and control choose their best epoch from the same ones, those after the fork.
        learner.best_metric = -1.0
    meet_teacher(state, run)
    if kept_out(state, run.config):
        raise TeacherError(
            f"This teacher has nothing to teach that {state.audits[-1]['rows']} validation rows "
            "show (above), and distill.audit is stop. Train it (scripts/train_teacher.py), take "
            "another one, audit more rows (distill.audit_rows), or set distill.audit warn."
        )
    settings = run.config.distill
    if settings.target == "blend" and settings.blend_beta == "auto" and state.audits:
        # Of this audit and no later one: here the student is what the blend is made with.
        state.blend_beta = state.audits[-1]["beta"]
        tell(f"distill.blend_beta auto: {state.blend_beta:g}", run.accelerator)


def kept_out(state: CotrainState, config: Config) -> bool:
    """Whether `distill.audit stop` keeps the teacher out that has just been audited."""
    return config.distill.audit == "stop" and bool(state.audits) and not state.audits[-1]["teaches"]


def meet_teacher(state: CotrainState, run: Run) -> None:
    """Calibrate a teacher that begins to teach, on the candidates of the present student, and audit
    it."""
    dataset = SequenceDataset(
        run.data, run.config.student.max_length, run.config.seed, run.config.train.windows
    )
    count = min(run.config.teacher.calibration_rows, len(dataset))
    if run.teacher is not None and count:
        teacher = run.teacher
        # On the student's own candidates: the bias depends on what is shown, and measured on random
        # items it leaves three times as much.
        draw = np.random.default_rng((run.config.seed, 5)).permutation(dataset.users)[:count]
        rows = collate([dataset[user, state.epoch] for user in draw.tolist()])
        with state.student.without_dropout():
            candidates = propose(state.student, rows, teacher.num_candidates, run.accelerator)
        shown = "calibrating the teacher" if run.accelerator.is_main_process else None
        state.meter.observe_calibration(teacher.calibrate(rows, candidates, shown))
        state.identifier_bias = teacher.ranker.identifier_bias
    audit_teacher(state, run)


def choose_users(state: CotrainState, run: Run, dataset: SequenceDataset, epoch: int) -> None:
    """Whom the present student lets ask in an epoch, where the policy leaves it to the student; a
    collective."""
    assert run.teacher is not None
    if run.teacher.query.follows_student:
        chosen = chosen_by_student(
            state.student, run.teacher.query, dataset, epoch, run.config.teacher.num_candidates,
            run.accelerator,
        )  # fmt: skip
        state.asking = torch.from_numpy(chosen)
        run.teacher.query.settle(epoch, chosen)


def ask_for_all_epochs(
    state: CotrainState, run: Run, dataset: SequenceDataset, sampler: EpochSampler,
    total_steps: int, stop: StopRequest,
) -> None:  # fmt: skip
    """Ask once about every row that would ask in the course of the run, on what the student of the
    warm-up proposes; what was asked before an interruption is not asked again.

    Raises:
        Interrupted: After SIGINT or SIGTERM, with a checkpoint written.
    """
    assert run.teacher is not None
    train = run.config.train
    while (epoch := train.warmup_epochs + state.epochs_asked) < train.epochs:
        left = max(0, total_steps - epoch * sampler.steps_per_epoch)  # with train.max_steps
        if run.config.asks(epoch):
            choose_users(state, run, dataset, epoch)
            users = sampler.order(epoch)[: left * train.batch_size]
            ask_ahead(state, run.teacher, dataset, users, epoch, run.config, run.accelerator)
        state.epochs_asked += 1
        save_checkpoint(state, run.folder, run.config, run.accelerator, run.log.num_bytes)
        if _anywhere(stop.received, run.accelerator):
            raise Interrupted(state.step, total_steps, run.folder)


def audit_teacher(state: CotrainState, run: Run) -> None:
    """What the teacher knows that the present student does not, said and kept; where
    `distill.lambda_rank` is auto, its weight follows.

    Raises:
        DataError: There is no row to audit on, and `distill.audit` is stop.
    """
    settings, config, accelerator = run.config.distill, run.config, run.accelerator
    if run.teacher is None or settings.audit == "off":
        return
    state.student.refresh()
    try:
        rows = audit_rows(
            state.student.bare,
            run.data,
            config.teacher.num_candidates,
            settings.audit_rows,
            config.seed,
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
        state.lambda_rank = found.lambda_rank(settings.target)
        tell(f"distill.lambda_rank auto: {state.lambda_rank:.3f}", accelerator)


def tell(text: str, accelerator: Accelerator) -> None:
    """A line of the main process above the live one."""
    if accelerator.is_main_process:
        tqdm.write(text)


def validate(state: CotrainState, run: Run) -> None:
    """Rank validation items with every learner, keep the best weights, log metrics and ranks."""
    epoch = state.epoch + 1
    for learner in state.learners:
        learner.refresh()
        found = evaluate(
            learner.bare, run.data, "validation", run.config.eval.batch_size, run.accelerator
        )
        metrics = metrics_from_ranks(found.ranks)
        learner.consider(metrics[SELECTION_METRIC], epoch)
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
    return bool(total(torch.tensor(float(flag), device=accelerator.device), accelerator) > 0)


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
        self.steps_per_epoch = steps_per_epoch
        self.asking_epochs = [epoch for epoch in range(train.epochs) if run.config.asks(epoch)]
        self.rows_per_step, self.teacher_rows_per_s = 0.0, 1.0
        if run.teacher is not None:
            self.rows_per_step = run.teacher.query.rows_per_epoch / steps_per_epoch
            self.rows_per_step /= run.accelerator.num_processes
            self.teacher_rows_per_s = run.teacher.probed_rows_per_s
        self.bar = progress_bar(self.total_steps, state.step, run.accelerator.is_main_process)
        self._first_step = state.step
        self._teacher_seconds = state.meter.totals["seconds"]
        self._started = self._last = time.perf_counter()

    def steps_to_ask(self) -> int:
        """How many of the steps to come ask the teacher."""
        if self.state.epochs_asked:
            return 0  # it is done
        found = 0
        for epoch in self.asking_epochs:
            first, end = epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch
            found += max(0, min(end, self.total_steps) - max(first, self.state.step))
        return found

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
        left = per_step * (self.total_steps - state.step)
        left += self.steps_to_ask() * self.rows_per_step / self.teacher_rows_per_s
        self.bar.set_description_str(f"epoch {state.epoch + 1}/{self.epochs}", refresh=False)
        shown = {"left": clock(left), "CE": f"{report['loss_ce']:.3f}"}
        if "loss_rank" in report:
            shown |= {"rank": f"{report['loss_rank']:.3f}", "emb": f"{report['loss_emb']:.1f}"}
            shown["teacher"] = f"{self.teacher_rows_per_s:.2f} rows/s"
        if "loss_rdr" in report:
            shown["rdr"] = f"{report['loss_rdr']:.3f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
