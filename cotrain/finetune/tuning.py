"""The loop that fits an adapter: micro-batches under a token budget, validation, checkpoints.

Every process holds the whole frozen backbone and takes its own rows of each batch; only the
adapter's gradients travel, in one reduction a step.
"""

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from cotrain.errors import CotrainError
from cotrain.finetune.lora import TrainableAdapter
from cotrain.finetune_settings import SftConfig
from cotrain.runtime import checkpoint
from cotrain.runtime.interruption import StopRequest
from cotrain.runtime.seeding import all_states, set_all_states
from cotrain.runtime.tracking import MetricsLog, progress_bar
from cotrain.teacher.backbone import Backbone
from cotrain.teacher.memory import is_out_of_memory, plan_micro_batches


class Interrupted(CotrainError):
    """The training was asked to stop and has written a checkpoint."""


class Objective(Protocol):
    """What an adapter is fitted to."""

    def __len__(self) -> int:
        """Rows."""
        ...

    def encode(self, row: int, epoch: int) -> Any:
        """One row as it stands in an epoch; `tokens` are its token ids."""
        ...

    def loss_sum(self, encoded: Sequence[Any]) -> Tensor:
        """() loss summed over rows, each counting 1; with a graph."""
        ...

    def validate(self, progress: str | None) -> dict[str, float]:
        """Measures on held-out users, the `sft.best_by` among them."""
        ...


def gain_of(found: dict[str, float], before: dict[str, float], metric: str) -> float:
    """How much better a validation is than another: by a lower nll, by a higher NDCG."""
    gain = found[metric] - before[metric]
    return -gain if metric == "nll" else gain


@dataclass
class Progress:
    """Where a training stands; what its report is made of.

    Attributes:
        step, epoch, step_in_epoch: Done.
        best: The best validation so far, with its step.
        start: The validation before the first step.
        since_best: Validations since the best one.
        validations: All of them.
        seconds, rows, tokens: Of the training passes, validation left out.
        micro_batch_tokens: The token budget as it is now.
        backoffs: Each time that memory ran out.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best: dict[str, float] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)
    since_best: int = 0
    validations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    rows: int = 0
    tokens: int = 0
    micro_batch_tokens: int = 0
    backoffs: int = 0


def tune(
    adapter: TrainableAdapter,
    objective: Objective,
    settings: SftConfig,
    folder: Path,
    seed: int,
    accelerator: Accelerator,
    log: MetricsLog | None = None,
) -> Progress:
    """Fit the adapter; it ends with the weights of its best validation.

    Args:
        adapter: Changed in place.
        objective: Rows, loss and validation.
        settings: Steps, batch, learning rate.
        folder: Where checkpoints go; those that are there are gone on from.
        seed: Of the order of rows.
        accelerator: Device and processes.
        log: Takes metrics; none: nothing is logged.

    Raises:
        Interrupted: After Ctrl-C or SIGTERM, with a checkpoint written.
        CotrainError: A loss that is no number, with the best adapter saved.
    """
    loop = _Loop(adapter, objective, settings, folder, seed, accelerator, log)
    if checkpoint.steps(folder):
        loop.restore()
    with StopRequest() as stop:
        return loop.run(stop)


class _Loop:
    def __init__(
        self, adapter: TrainableAdapter, objective: Objective, settings: SftConfig, folder: Path,
        seed: int, accelerator: Accelerator, log: MetricsLog | None,
    ):  # fmt: skip
        self.adapter, self.objective, self.settings = adapter, objective, settings
        self.folder, self.seed, self.accelerator, self.log = folder, seed, accelerator, log
        self.progress = Progress(micro_batch_tokens=settings.micro_batch_tokens)
        self.best_state = adapter.state()
        self.parameters = list(adapter.parameters.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.steps_per_epoch = max(1, len(objective) // settings.batch_size)
        self.total = settings.epochs * self.steps_per_epoch
        if settings.max_steps is not None:
            self.total = min(self.total, settings.max_steps)
        set_checkpointing(adapter.backbone, settings.gradient_checkpointing)

    # ---- the loop -------------------------------------------------------------------------------

    def run(self, stop: StopRequest) -> Progress:
        progress, main = self.progress, self.accelerator.is_main_process
        if not progress.validations:
            self.validate()
            progress.start = progress.validations[0]
        bar = progress_bar(self.total, progress.step, main)
        with bar:
            while progress.step < self.total and progress.since_best < self.settings.patience:
                started = time.perf_counter()
                report = self.train_step()
                progress.seconds += time.perf_counter() - started
                self.tick(bar, report)
                last = progress.step == self.total
                stopping = self.anywhere(stop.received)
                if last or progress.step % self.settings.eval_every_steps == 0:
                    self.validate()
                    self.save()
                elif stopping:
                    self.save()
                if stopping and not last:
                    raise Interrupted(
                        f"Stopped at step {progress.step} of {self.total}, with a checkpoint in "
                        f"{self.folder}. The same command goes on."
                    )
        self.adapter.load_state(self.best_state, f"step {int(progress.best.get('step', 0))}")
        self.adapter.train(False)
        return progress

    def train_step(self) -> dict[str, float]:
        progress, settings = self.progress, self.settings
        order = np.random.default_rng((self.seed, 21, progress.epoch)).permutation(
            len(self.objective)
        )
        start = progress.step_in_epoch * settings.batch_size
        batch = order[start : start + settings.batch_size]
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        accelerator = self.accelerator
        own = batch[accelerator.process_index :: accelerator.num_processes].tolist()
        encoded = [self.objective.encode(row, progress.epoch) for row in own]
        loss = self.backward(encoded, len(batch))
        total = self.reduce_gradients(loss)
        if not math.isfinite(total):
            self.adapter.load_state(self.best_state, "best")
            if accelerator.is_main_process:
                self.adapter.save(self.folder / "adapter")
            raise CotrainError(
                f"The loss is {total} at step {progress.step + 1}; the adapter of step "
                f"{int(progress.best.get('step', 0))}, the best one, is in "
                f"{self.folder / 'adapter'}. Lower sft.learning_rate (now "
                f"{settings.learning_rate}), or set teacher.quantization bf16 or fp32."
            )
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, settings.max_grad_norm)
        self.optimizer.step()
        progress.step += 1
        progress.step_in_epoch += 1
        progress.rows += len(batch)
        progress.tokens += sum(len(row.tokens) for row in encoded) * accelerator.num_processes
        if progress.step_in_epoch == self.steps_per_epoch:
            progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
        self.adapter.changed(f"step {progress.step}")
        return {"loss": total, "grad_norm": float(norm), "lr": rate}

    def backward(self, encoded: Sequence[Any], num_rows: int) -> float:
        """Gradients of this process's rows; tried again with fewer at once where memory runs out.

        Returns:
            Their loss, divided by the rows of the whole batch.
        """
        progress = self.progress
        lengths = [len(row.tokens) for row in encoded]
        self.adapter.train()
        while True:
            self.optimizer.zero_grad()
            total = 0.0
            groups = plan_micro_batches(lengths, progress.micro_batch_tokens)
            try:
                for group in groups:
                    loss = self.objective.loss_sum([encoded[row] for row in group]) / num_rows
                    loss.backward()
                    total += loss.item()
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or max(map(len, groups)) == 1:
                    raise
            # Here, and not where it is caught: there the failed pass is still held in memory.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            progress.micro_batch_tokens //= 2
            progress.backoffs += 1
            tqdm.write(
                "Memory ran out in training; sft.micro_batch_tokens goes to "
                f"{progress.micro_batch_tokens:,}."
            )
        self.adapter.train(False)
        return total

    def reduce_gradients(self, loss: float) -> float:
        """Sum the gradients over all processes; returns the sum of the losses."""
        if self.accelerator.num_processes == 1:
            return loss
        zero = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = torch.cat([g.flatten().float() for g in zero] + [zero[0].new_tensor([loss]).float()])
        flat = self.accelerator.reduce(flat, "sum")
        assert isinstance(flat, Tensor)
        start = 0
        for parameter in self.parameters:
            size = parameter.numel()
            parameter.grad = flat[start : start + size].view_as(parameter).to(parameter.dtype)
            start += size
        return float(flat[-1])

    def learning_rate(self) -> float:
        settings, step = self.settings, self.progress.step
        if step < settings.lr_warmup_steps:
            return settings.learning_rate * (step + 1) / settings.lr_warmup_steps
        done = (step - settings.lr_warmup_steps) / max(1, self.total - settings.lr_warmup_steps)
        low = settings.final_lr_ratio
        return settings.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * done)) / 2)

    # ---- measuring and keeping ------------------------------------------------------------------

    def validate(self) -> None:
        progress, main = self.progress, self.accelerator.is_main_process
        found = self.objective.validate("validating" if main else None)
        row = {"step": float(progress.step), **found}
        progress.validations.append(row)
        if not progress.best or gain_of(found, progress.best, self.settings.best_by) > 0:
            progress.best, progress.since_best = row, 0
            self.best_state = self.adapter.state()
        else:
            progress.since_best += 1
        if main:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
            tqdm.write(f"step {progress.step}: validation {shown}")
        self.write("validation", found)

    def tick(self, bar: Any, report: dict[str, float]) -> None:
        progress = self.progress
        rate = progress.rows / progress.seconds
        left = (self.total - progress.step) * self.settings.batch_size / rate
        bar.update(1)
        minutes, seconds = divmod(round(left), 60)
        bar.set_postfix_str(f"loss={report['loss']:.3f}, {rate:.2f} rows/s, left={minutes}:"
                            f"{seconds:02}")  # fmt: skip
        self.write("train", report)

    def write(self, kind: str, row: dict[str, float]) -> None:
        if self.log is not None:
            self.log.write({"kind": kind, "step": self.progress.step, **row})

    def anywhere(self, received: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return received
        flag = torch.tensor([float(received)], device=self.accelerator.device)
        total = self.accelerator.reduce(flag, "sum")
        assert isinstance(total, Tensor)
        return bool(total.item())

    def save(self) -> None:
        if self.accelerator.is_main_process:
            checkpoint.save(
                self.folder, self.progress.step,
                {"adapter": self.adapter.state(), "best": self.best_state},
                {
                    "progress": {**vars(self.progress)},
                    "optimizer": self.optimizer.state_dict(),
                    "rng": all_states(self.accelerator.device),
                    "log_bytes": 0 if self.log is None else self.log.num_bytes,
                },
                keep=1,
            )  # fmt: skip
        self.accelerator.wait_for_everyone()

    def restore(self) -> None:
        weights, state = checkpoint.load_latest(self.folder)
        self.progress = Progress(**state["progress"])
        # Another one asked for now holds, unless memory is known not to do for it.
        if not self.progress.backoffs:
            self.progress.micro_batch_tokens = self.settings.micro_batch_tokens
        self.adapter.load_state(weights["adapter"], f"step {self.progress.step}")
        self.best_state = weights["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        set_all_states(state["rng"], self.accelerator.device)
        self.accelerator.print(f"Going on at step {self.progress.step} of {self.total}.")


def set_checkpointing(backbone: Backbone, setting: str) -> None:
    """Keep the activations of a training pass, or compute them again."""
    if setting == "on" or (setting == "auto" and backbone.device.type == "cuda"):
        model: Any = backbone.model
        # Its name since transformers 5.20; the old one still works, with a warning.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
