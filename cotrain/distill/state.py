"""All that changes over a run: made, forked, written to a checkpoint and restored from one."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from cotrain.config import Config
from cotrain.distill.alignment import Projector
from cotrain.distill.learner import Learner, fork_control, make_learner
from cotrain.distill.meters import TeacherMeter
from cotrain.distill.verdicts import Judged, KeptVerdicts
from cotrain.errors import CheckpointError
from cotrain.rationale.head import new_head
from cotrain.rationale.store import MatchedRationales
from cotrain.runtime import checkpoint, tracking, zero
from cotrain.runtime.seeding import all_states, set_all_states
from cotrain.student.architectures import new_student
from cotrain.student.item_text import start_from_text


@dataclass
class CotrainState:
    """Everything that changes over a run, and therefore everything that a checkpoint holds.

    Attributes:
        student: Learns from data and teacher; has the projector.
        control: The twin that learns from data only; None before the teacher starts.
        meter: What the teacher did.
        epoch: Epochs completed.
        step_in_epoch: Batches of the current epoch completed.
        step: Optimizer steps completed.
        seconds: Time spent in earlier parts of an interrupted run.
        start_effective_rank: Of the student's states when the teacher started; 0 before.
        identifier_bias: (W,) the teacher's calibration; zeros before it started.
        lambda_rank: Weight of the ranking loss; where the audit decides it, 0 before.
        blend_beta: β of the blend that the ranking loss teaches; where the audit fits it, 0 before.
        asking: (n,) int64 users that ask in the running epoch, where the student chose them.
        started: Whether what distills has started.
        kept: Verdicts that are to teach in later epochs; where rows ask ahead, those on the first
            `epochs_asked` epochs that distill.
        fresh: Of the running epoch's steps, those that `kept` is to take: users and verdicts.
        epochs_asked: How many have asked ahead.
        audits: What each audit of the teacher found, with its step and epoch.
        rounds: What became of each round that ended, where `train.rounds` asks for several.
    """

    student: Learner
    control: Learner | None
    meter: TeacherMeter
    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    start_effective_rank: float = 0.0
    identifier_bias: Tensor = field(default_factory=lambda: torch.zeros(0))
    lambda_rank: float = 0.0
    blend_beta: float = 0.0
    asking: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    started: bool = False
    kept: KeptVerdicts = field(default_factory=lambda: KeptVerdicts.none(0, 0))
    fresh: list[tuple[Tensor, Judged]] = field(default_factory=list)
    epochs_asked: int = 0
    audits: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)

    @property
    def projector(self) -> Projector | None:
        """W_p, optimised with the student; None without a teacher."""
        return self.student.projector

    @property
    def learners(self) -> list[Learner]:
        """Student, and control where there is one."""
        return [self.student] + ([self.control] if self.control else [])

    def keep_fresh(self) -> None:
        """Put the running epoch's verdicts to those that are kept, all at once: they are sorted."""
        if self.fresh:
            self.kept = self.kept.and_of(self.fresh, self.epoch)
            self.fresh = []


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
    model = new_student(num_items, config.student, sparse=config.train.item_updates == "lazy")
    if item_text is not None:
        start_from_text(model, item_text)
    projector, head = None, None
    # On the side: whoever teaches, the student starts and drops out alike.
    with torch.random.fork_rng(devices=[]):
        if teacher_size is not None:
            projector = Projector(teacher_size, model.hidden_size)
        if rationales is not None:
            head = new_head(rationales, model.hidden_size, config.distill.rdr_targets)
    return CotrainState(
        student=make_learner("student", model, config, accelerator, projector, head),
        control=None,
        meter=TeacherMeter(config.teacher.num_candidates),
        kept=KeptVerdicts.none(config.teacher.num_candidates, teacher_size or 0),
        identifier_bias=torch.zeros(config.teacher.num_shown),
        lambda_rank=0.0 if config.distill.lambda_rank == "auto" else config.distill.lambda_rank,
        blend_beta=0.0 if config.distill.blend_beta == "auto" else config.distill.blend_beta,
    )


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """Of step `step`, counted from 0: linear warm-up, then a cosine to final_lr_ratio × peak."""
    train = config.train
    if step < train.lr_warmup_steps:
        return train.learning_rate * (step + 1) / train.lr_warmup_steps
    progress = (step - train.lr_warmup_steps) / max(1, total_steps - 1 - train.lr_warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return train.learning_rate * (train.final_lr_ratio + (1 - train.final_lr_ratio) * cosine)


_POSITION = (
    "epoch", "step_in_epoch", "step", "seconds", "start_effective_rank", "identifier_bias",
    "lambda_rank", "blend_beta", "asking", "started", "epochs_asked", "audits",
    "rounds",
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
    state.keep_fresh()
    own: dict[str, Any] = {
        "random": all_states(accelerator.device), "meter": state.meter.state_dict(),
    }  # fmt: skip
    for learner in state.learners:
        learner.refresh()
    if zero.stage(accelerator):
        own["shards"] = {item.name: zero.shard_state(item.model) for item in state.learners}
    of_processes = tracking.gather(own)
    failure: list[str | None] = [None]
    if accelerator.is_main_process:
        weights = {}
        if state.projector is not None:
            weights["projector"] = state.projector.state_dict()
        if len(state.kept.key):
            weights["verdicts"] = state.kept.state_dict()
        learners = {}
        for learner in state.learners:
            weights[learner.name] = learner.bare.state_dict()
            if learner.best_weights:
                weights[f"best_{learner.name}"] = learner.best_weights
            if learner.head is not None:
                weights[f"{learner.name}_head"] = learner.head.state_dict()
                if learner.best_head:
                    weights[f"best_{learner.name}_head"] = learner.best_head
            optimizers = {"beside": learner.beside_optimizer}
            if not learner.sharded:
                optimizers["model"] = learner.optimizer
            learners[learner.name] = {
                "optimizers": {key: one.state_dict() for key, one in optimizers.items() if one},
                "best_metric": learner.best_metric,
                "best_epoch": learner.best_epoch,
            }
        rest = {name: getattr(state, name) for name in _POSITION}
        rest |= {"learners": learners, "processes": of_processes, "log_bytes": log_bytes}
        rest |= {"zero_stage": zero.stage(accelerator)}
        try:
            checkpoint.save(folder, state.step, weights, rest, config.train.keep_checkpoints)
        except CheckpointError as error:
            failure = [str(error)]
    broadcast_object_list(failure)
    if failure[0] is not None:
        raise CheckpointError(failure[0])


def restore_checkpoint(state: CotrainState, folder: Path, accelerator: Accelerator) -> int:
    """Bring a fresh state to where the latest checkpoint of `folder` was.

    Returns:
        Length of metrics.jsonl at that time, in bytes.

    Raises:
        CheckpointError: No usable checkpoint, or written by another number of processes, or with
            another sharding.
    """
    weights, saved, own = _load(folder, accelerator)
    if "control" in saved["learners"]:
        state.control = fork_control(state.student)
    for learner in state.learners:
        _restore_learner(learner, weights, saved, own)
    for name in _POSITION:
        setattr(state, name, saved[name])
    if "verdicts" in weights:
        state.kept = KeptVerdicts.from_state_dict(weights["verdicts"])
    state.meter.load_state_dict(own["meter"])
    set_all_states(own["random"], accelerator.device)
    return saved["log_bytes"]


def take_over(state: CotrainState, folder: Path, accelerator: Accelerator) -> int:
    """Bring a fresh state to where another run's checkpoint was, which only learned from data; what
    teaches here starts fresh.

    Returns, and raises: As `restore_checkpoint`.
    """
    weights, saved, own = _load(folder, accelerator)
    _restore_learner(state.student, weights, saved, own)
    for name in ("epoch", "step", "seconds"):
        setattr(state, name, saved[name])
    state.meter.load_state_dict(own["meter"])
    set_all_states(own["random"], accelerator.device)
    return saved["log_bytes"]


def _load(
    folder: Path, accelerator: Accelerator
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], dict[str, Any]]:
    """Weights, the rest, and of the rest what is this process's."""
    weights, saved = checkpoint.load_latest(folder)
    if len(saved["processes"]) != accelerator.num_processes:
        raise CheckpointError(
            f"{folder} was run by {len(saved['processes'])} process(es) and would be resumed by "
            f"{accelerator.num_processes}; random states belong to processes. Launch it with "
            "the same number."
        )
    if saved["zero_stage"] != zero.stage(accelerator):
        kinds = ["without DeepSpeed", *(f"in DeepSpeed's ZeRO-{stage}" for stage in (1, 2, 3))]
        raise CheckpointError(
            f"{folder} was run {kinds[saved['zero_stage']]} and would be resumed "
            f"{kinds[zero.stage(accelerator)]}; optimizer state is kept as it was sharded. Launch "
            "it with the same accelerate file."
        )
    return weights, saved, saved["processes"][accelerator.process_index]


def _restore_learner(
    learner: Learner, weights: dict[str, dict[str, Tensor]], saved: dict[str, Any],
    own: dict[str, Any],
) -> None:  # fmt: skip
    facts = saved["learners"][learner.name]
    learner.load_weights(weights[learner.name])
    if learner.sharded:
        zero.load_shard_state(learner.model, own["shards"][learner.name])
    else:
        learner.optimizer.load_state_dict(facts["optimizers"]["model"])
    learner.best_metric, learner.best_epoch = facts["best_metric"], facts["best_epoch"]
    learner.best_weights = weights.get(f"best_{learner.name}", {})
    # Projector and head are missing where a run with them takes over from one without.
    if learner.beside_optimizer is not None and "beside" in facts["optimizers"]:
        learner.beside_optimizer.load_state_dict(facts["optimizers"]["beside"])
    if learner.projector is not None and "projector" in weights:
        learner.projector.load_state_dict(weights["projector"])
    if learner.head is not None:
        learner.head.load_state_dict(weights[f"{learner.name}_head"])
        learner.best_head = weights.get(f"best_{learner.name}_head", {})
