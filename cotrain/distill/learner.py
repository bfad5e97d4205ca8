"""A model with what trains it, in one process or sharded over many."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cotrain.config import Config
from cotrain.distill.alignment import Projector
from cotrain.rationale.head import RationaleHead
from cotrain.runtime import zero
from cotrain.runtime.processes import make_accelerator
from cotrain.student.optimizer import LazyAdamW, clip_grad_norm
from cotrain.student.protocol import Student


@dataclass
class Learner:
    """A model with what trains it, and its best state on validation so far.

    The model is prepared: alone, in DDP, or in an engine of DeepSpeed. What is small and beside it
    (projector, head) every process holds whole; its gradients are averaged once a step.

    Attributes:
        model: As prepared; called for what trains it and for nothing else.
        bare: Its weights as a plain model, to evaluate and save: the model itself, or under
            DeepSpeed a copy as of the last `refresh`.
        optimizer: Of the model.
        projector: W_p, of the student; None without a teacher.
        head: W_r from its states to rationales; None without rationales. The control has one too,
            which leaves it alone: it finds reasons for what a model recommends that never saw any.
        beside_optimizer: Of projector and head; None without either.
    """

    name: str
    model: Any
    bare: Student
    optimizer: Any
    accelerator: Accelerator
    config: Config
    projector: Projector | None = None
    head: RationaleHead | None = None
    beside_optimizer: Any = None
    last_metric: float = -1.0
    best_metric: float = -1.0
    best_epoch: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    best_head: dict[str, Tensor] = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        """Whether DeepSpeed trains it."""
        return zero.stage(self.accelerator) > 0

    @property
    def beside(self) -> list[nn.Module]:
        """Projector and head, where there are."""
        return [module for module in (self.projector, self.head) if module is not None]

    # ---- a step ---------------------------------------------------------------------------------

    def set_rate(self, rate: float) -> None:
        """Learning rate from now on."""
        for optimizer in (self.optimizer, self.beside_optimizer):
            for group in optimizer.param_groups if optimizer is not None else []:
                group["lr"] = rate

    def start_step(self) -> None:
        """Forget the last gradients."""
        self.optimizer.zero_grad()  # nothing, under DeepSpeed, which has forgotten them
        if self.beside_optimizer is not None:
            self.beside_optimizer.zero_grad()

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one part of a step's rows; the last one's backward shares
        the gradients of all of them between processes."""
        if self.sharded:
            self.model.set_gradient_accumulation_boundary(last)
            yield
        else:
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a part's share of the mean over all rows of all processes."""
        # Processes average their gradients; × their number makes that their sum.
        loss = loss * self.accelerator.num_processes
        if self.sharded:
            self.model.backward(loss)
        else:
            self.accelerator.backward(loss)

    def update(self) -> None:
        """The optimizer's step, on gradients clipped apart: what projector and head do must not
        change the student's step size."""
        train = self.config.train
        if self.sharded:
            self.model.step()  # clips as well
        elif train.item_updates == "lazy":
            clip_grad_norm(self.model.parameters(), train.max_grad_norm)
        else:
            self.accelerator.clip_grad_norm_(self.model.parameters(), train.max_grad_norm)
        self.optimizer.step()  # nothing, under DeepSpeed
        if self.beside_optimizer is None:
            return
        self._average_gradients_beside()
        for module in self.beside:
            if self.sharded:
                nn.utils.clip_grad_norm_(module.parameters(), train.max_grad_norm)
            else:
                self.accelerator.clip_grad_norm_(module.parameters(), train.max_grad_norm)
        self.beside_optimizer.step()

    def _average_gradients_beside(self) -> None:
        """One collective. Processes agree on what has a gradient, for all call the same modules;
        what has none stays so, because a gradient of zeros would be a step to Adam."""
        if self.accelerator.num_processes == 1:
            return
        parameters = [weight for module in self.beside for weight in module.parameters()]
        grads = [weight.grad for weight in parameters if weight.grad is not None]
        if not grads:
            return
        mean: Any = self.accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), "mean")
        for grad, averaged in zip(grads, mean.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(averaged.view_as(grad))

    # ---- what is kept ---------------------------------------------------------------------------

    def refresh(self) -> None:
        """Bring `bare` to where the model is; a collective."""
        if self.sharded:
            zero.copy_weights(self.model, cast("nn.Module", self.bare))

    @contextlib.contextmanager
    def without_dropout(self) -> Iterator[None]:
        """`bare` as the model is now, without dropout, for a look between steps; a collective."""
        self.refresh()
        self.bare.eval()
        yield
        self.bare.train()

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Set the weights to train on from; a collective."""
        self.bare.load_state_dict(weights)
        if self.sharded:
            zero.load_weights(self.model, cast("nn.Module", self.bare))

    def consider(self, metric: float, epoch: int) -> None:
        """Keep a copy of the weights if their validation metric is the best so far."""
        self.last_metric = metric
        if metric > self.best_metric:
            self.best_metric, self.best_epoch = metric, epoch
            self.best_weights = _copy_of(self.bare)
            if self.head is not None:
                self.best_head = _copy_of(self.head)

    def restore_best(self) -> None:
        """Bring `bare` and the head to the best weights; training is over."""
        self.bare.load_state_dict(self.best_weights)
        if self.head is not None:
            self.head.load_state_dict(self.best_head)


def make_learner(
    name: str,
    model: Student,
    config: Config,
    accelerator: Accelerator,
    projector: Projector | None = None,
    head: RationaleHead | None = None,
) -> Learner:
    """Prepare a model, with a fresh optimizer.

    Args:
        name: Of the learner, in reports and checkpoints.
        model: The same on every process.
        config: Settings of the run.
        accelerator: Of the run.
        projector: To be trained beside it.
        head: To be trained beside it.

    Raises:
        ConfigError: DeepSpeed's settings ask for what cannot be done.
    """
    optimizer, bare = make_optimizer([model], config), model
    if zero.stage(accelerator):
        rows = config.train.batch_size // accelerator.num_processes
        rows = max(1, rows // config.train.accumulation_steps)
        zero.fill_in(accelerator, rows, config.train.max_grad_norm)
        bare = copy.deepcopy(model).to(accelerator.device)
        # Each engine belongs to an accelerator of its own, which shares all else with the run's.
        engine, optimizer = make_accelerator().prepare(model, optimizer)
        zero.let_item_embedding_be_read(engine, engine.module.item_embedding.weight)
        model = engine
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
        bare = cast("Student", accelerator.unwrap_model(model))
    beside = [module.to(accelerator.device) for module in (projector, head) if module is not None]
    beside_optimizer = None
    if beside:
        beside_optimizer = make_optimizer(beside, config)
        if not zero.stage(accelerator):
            beside_optimizer = accelerator.prepare(beside_optimizer)
    return Learner(
        name, model, bare, optimizer, accelerator, config, projector, head, beside_optimizer
    )


def make_optimizer(modules: list[Any], config: Config) -> torch.optim.Optimizer:
    """AdamW; the parameters of each module are a group."""
    groups = [{"params": list(module.parameters())} for module in modules]
    train = config.train
    kind = LazyAdamW if train.item_updates == "lazy" else torch.optim.AdamW
    return kind(
        groups, lr=train.learning_rate, betas=(0.9, train.adam_beta2),
        weight_decay=train.weight_decay, fused=train.item_updates == "all",
    )  # fmt: skip


def fork_control(student: Learner) -> Learner:
    """The student's twin: same weights, head, optimizer state and best state so far."""
    student.refresh()
    model, head = copy.deepcopy(student.bare), copy.deepcopy(student.head)
    control = make_learner("control", model, student.config, student.accelerator, head=head)
    if student.sharded:
        zero.load_shard_state(control.model, zero.shard_state(student.model))
    else:
        control.optimizer.load_state_dict(copy.deepcopy(student.optimizer.state_dict()))
    if head is not None:
        saved = student.beside_optimizer.state_dict()
        group = saved["param_groups"][-1]  # the projector's, if there is one, comes first
        # Where no step was taken yet there are no moments.
        moments = {index: saved["state"][index] for index in group["params"] if saved["state"]}
        control.beside_optimizer.load_state_dict(
            copy.deepcopy({"state": moments, "param_groups": [group]})
        )
    control.best_metric, control.best_epoch = student.best_metric, student.best_epoch
    control.best_weights = {key: value.clone() for key, value in student.best_weights.items()}
    control.best_head = {key: value.clone() for key, value in student.best_head.items()}
    return control


def _copy_of(model: nn.Module | Student) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
