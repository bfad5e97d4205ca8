"""All that changes over a run: made, forked, written to a checkpoint and restored from one."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from cotrain.config import Config
from cotrain.distill.alignment import Projector
from cotrain.distill.meters import TeacherMeter
from cotrain.errors import CheckpointError
from cotrain.rationale.head import new_head
from cotrain.rationale.store import MatchedRationales
from cotrain.runtime import checkpoint, tracking
from cotrain.runtime.seeding import all_states, set_all_states
from cotrain.student.item_text import start_from_text
from cotrain.student.optimizer import LazyAdamW
from cotrain.student.sasrec import SASRec


@dataclass
class Learner:
    """A model with what trains it, and its best state on validation so far.

    Attributes:
        head: W_r from its states to rationales; None without rationales. The control has one too,
            which leaves it alone: it finds reasons for what a model recommends that never saw any.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    head: nn.Module | None = None
    best_metric: float = -1.0
    best_epoch: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    best_head: dict[str, Tensor] = field(default_factory=dict)

    def consider(self, metric: float, epoch: int, accelerator: Accelerator) -> None:
        """Keep a copy of the weights if their validation metric is the best so far."""
        if metric > self.best_metric:
            self.best_metric, self.best_epoch = metric, epoch
            self.best_weights = _copy_of(accelerator.unwrap_model(self.model))
            if self.head is not None:
                self.best_head = _copy_of(accelerator.unwrap_model(self.head))

    def restore_best(self, accelerator: Accelerator) -> None:
        """Go back to the best weights."""
        accelerator.unwrap_model(self.model).load_state_dict(self.best_weights)
        if self.head is not None:
            accelerator.unwrap_model(self.head).load_state_dict(self.best_head)


def _copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}


@dataclass
class CotrainState:
    """Everything that changes over a run, and therefore everything that a checkpoint holds.

    Attributes:
        student: Learns from data and teacher.
        projector: W_p, optimised with the student; None without a teacher.
        control: The twin that learns from data only; None before the teacher starts.
        meter: What the teacher did.
        epoch: Epochs completed.
        step_in_epoch: Batches of the current epoch completed.
        step: Optimizer steps completed.
        seconds: Time spent in earlier parts of an interrupted run.
        start_effective_rank: Of the student's states when the teacher started; 0 before.
        identifier_bias: (W,) the teacher's calibration; zeros before it started.
        lambda_rank: Weight of the ranking loss; where the audit decides it, 0 before.
        audits: What each audit of the teacher found, with its step and epoch.
    """

    student: Learner
    projector: nn.Module | None
    control: Learner | None
    meter: TeacherMeter
    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    start_effective_rank: float = 0.0
    identifier_bias: Tensor = field(default_factory=lambda: torch.zeros(0))
    lambda_rank: float = 0.0
    audits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def learners(self) -> list[Learner]:
        """Student, and control where there is one."""
        return [self.student] + ([self.control] if self.control else [])


def new_state(
    num_items: int,
    teacher_size: int | None,
    config: Config,
    accelerator: Accelerator,
    item_text: Tensor | None = None,
    rationales: MatchedRationales | None = None,
) -> CotrainState:
    """A fresh student, projector and head, prepared, at step 0.

    Args:
        num_items: Size of the catalogue without padding.
        teacher_size: H, width of the decision state; None without a teacher.
        config: Settings of the run.
        accelerator: Prepares models and optimizer.
        item_text: (num_items, E) text embedding of each item to start from; None: random.
        rationales: Those of the training data, or None.
    """
    settings = config.student
    model = SASRec(
        num_items,
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        max_length=settings.max_length,
        dropout=settings.dropout,
        sparse=config.train.item_updates == "lazy",
    )
    if item_text is not None:
        start_from_text(model, item_text)
    projector, head = None, None
    # On the side: whoever teaches, the student starts and drops out alike.
    with torch.random.fork_rng(devices=[]):
        if teacher_size is not None:
            projector = Projector(teacher_size, settings.hidden_size)
        if rationales is not None:
            head = new_head(rationales, settings.hidden_size, config.distill.rdr_targets)
    optimizer = make_optimizer([model, projector, head], config)
    model, optimizer = accelerator.prepare(model, optimizer)
    if projector is not None:
        projector = accelerator.prepare(projector)
    if head is not None:
        head = accelerator.prepare(head)
    return CotrainState(
        student=Learner("student", model, optimizer, head),
        projector=projector,
        control=None,
        meter=TeacherMeter(config.teacher.num_candidates),
        identifier_bias=torch.zeros(config.teacher.num_shown),
        lambda_rank=0.0 if config.distill.lambda_rank == "auto" else config.distill.lambda_rank,
    )


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """Of step `step`, counted from 0: linear warm-up, then a cosine to final_lr_ratio × peak."""
    train = config.train
    if step < train.lr_warmup_steps:
        return train.learning_rate * (step + 1) / train.lr_warmup_steps
    progress = (step - train.lr_warmup_steps) / max(1, total_steps - 1 - train.lr_warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return train.learning_rate * (train.final_lr_ratio + (1 - train.final_lr_ratio) * cosine)


def make_optimizer(modules: Sequence[nn.Module | None], config: Config) -> torch.optim.Optimizer:
    """AdamW; the parameters of each module, the student first, are a group."""
    groups = [{"params": list(module.parameters())} for module in modules if module is not None]
    train = config.train
    kind = LazyAdamW if train.item_updates == "lazy" else torch.optim.AdamW
    return kind(
        groups, lr=train.learning_rate, betas=(0.9, train.adam_beta2),
        weight_decay=train.weight_decay, fused=train.item_updates == "all",
    )  # fmt: skip


def fork_control(state: CotrainState, config: Config, accelerator: Accelerator) -> Learner:
    """The student's twin: same weights, head, optimizer state and best state so far."""
    student = state.student
    model = copy.deepcopy(accelerator.unwrap_model(student.model))
    head = None
    if student.head is not None:
        head = copy.deepcopy(accelerator.unwrap_model(student.head))
    optimizer = make_optimizer([model, head], config)
    saved = student.optimizer.state_dict()
    groups = [saved["param_groups"][0], *([saved["param_groups"][-1]] if head else [])]
    # Where no step was taken yet there are none.
    moments = {
        index: saved["state"][index]
        for group in groups
        for index in group["params"]
        if index in saved["state"]
    }
    optimizer.load_state_dict(copy.deepcopy({"state": moments, "param_groups": groups}))
    model, optimizer = accelerator.prepare(model, optimizer)
    if head is not None:
        head = accelerator.prepare(head)
    best = {key: value.clone() for key, value in student.best_weights.items()}
    best_head = {key: value.clone() for key, value in student.best_head.items()}
    return Learner(
        "control", model, optimizer, head, student.best_metric, student.best_epoch, best, best_head
    )


_POSITION = (
    "epoch", "step_in_epoch", "step", "seconds", "start_effective_rank", "identifier_bias",
    "lambda_rank", "audits",
)  # fmt: skip


def save_checkpoint(
    state: CotrainState, folder: Path, config: Config, accelerator: Accelerator, log_bytes: int
) -> None:
    """Write a checkpoint of the whole run; a collective, the main process writes.

    Args:
        state: What to write.
        folder: Run folder.
        config: Says how many checkpoints are kept.
        accelerator: Gathers what differs between processes.
        log_bytes: Length of metrics.jsonl now; what is beyond is cut off at a resume.

    Raises:
        CheckpointError: On every process, if the disk refused.
    """
    of_processes = tracking.gather(
        {"random": all_states(accelerator.device), "meter": state.meter.state_dict()}
    )
    failure: list[str | None] = [None]
    if accelerator.is_main_process:
        weights = {}
        if state.projector is not None:
            weights["projector"] = accelerator.unwrap_model(state.projector).state_dict()
        learners = {}
        for learner in state.learners:
            weights[learner.name] = accelerator.unwrap_model(learner.model).state_dict()
            if learner.best_weights:
                weights[f"best_{learner.name}"] = learner.best_weights
            if learner.head is not None:
                weights[f"{learner.name}_head"] = accelerator.unwrap_model(
                    learner.head
                ).state_dict()
                if learner.best_head:
                    weights[f"best_{learner.name}_head"] = learner.best_head
            learners[learner.name] = {
                "optimizer": learner.optimizer.state_dict(),
                "best_metric": learner.best_metric,
                "best_epoch": learner.best_epoch,
            }
        rest = {name: getattr(state, name) for name in _POSITION}
        rest |= {"learners": learners, "processes": of_processes, "log_bytes": log_bytes}
        try:
            checkpoint.save(folder, state.step, weights, rest, config.train.keep_checkpoints)
        except CheckpointError as error:
            failure = [str(error)]
    broadcast_object_list(failure)
    if failure[0] is not None:
        raise CheckpointError(failure[0])


def restore_checkpoint(
    state: CotrainState, folder: Path, config: Config, accelerator: Accelerator
) -> int:
    """Bring a fresh state to where the latest checkpoint of `folder` was.

    Returns:
        Length of metrics.jsonl at that time, in bytes.

    Raises:
        CheckpointError: No usable checkpoint, or written by another number of processes.
    """
    weights, saved = checkpoint.load_latest(folder)
    if len(saved["processes"]) != accelerator.num_processes:
        raise CheckpointError(
            f"{folder} was run by {len(saved['processes'])} process(es) and would be resumed by "
            f"{accelerator.num_processes}; random states belong to processes. Launch it with "
            "the same number."
        )
    if state.projector is not None:
        accelerator.unwrap_model(state.projector).load_state_dict(weights["projector"])
    if "control" in saved["learners"]:
        state.control = fork_control(state, config, accelerator)
    for learner in state.learners:
        facts = saved["learners"][learner.name]
        accelerator.unwrap_model(learner.model).load_state_dict(weights[learner.name])
        learner.optimizer.load_state_dict(facts["optimizer"])
        learner.best_metric, learner.best_epoch = facts["best_metric"], facts["best_epoch"]
        learner.best_weights = weights.get(f"best_{learner.name}", {})
        if learner.head is not None:
            head = accelerator.unwrap_model(learner.head)
            head.load_state_dict(weights[f"{learner.name}_head"])
            learner.best_head = weights.get(f"best_{learner.name}_head", {})
    for name in _POSITION:
        setattr(state, name, saved[name])
    own = saved["processes"][accelerator.process_index]
    state.meter.load_state_dict(own["meter"])
    set_all_states(own["random"], accelerator.device)
    return saved["log_bytes"]
