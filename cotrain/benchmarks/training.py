"""Our student as a run trains it, without teacher and files: what the benchmarks put a clock to."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from cotrain import config as configuration
from cotrain.config import Config
from cotrain.data.batches import EpochSampler, SequenceDataset, left_pad, make_loader
from cotrain.data.interactions import InteractionData
from cotrain.distill.state import CotrainState, new_state
from cotrain.distill.step import cotrain_step
from cotrain.runtime.seeding import seed_everything
from cotrain.student.losses import make_loss
from cotrain.student.protocol import Student
from cotrain.student.retrieval import retrieve


def run_config(job: dict[str, Any]) -> Config:
    """A run's settings from a benchmark's: a student alone, without weight decay."""
    options = {
        "student.hidden_size": job["hidden_size"],
        "student.num_layers": job["num_layers"],
        "student.num_heads": job["num_heads"],
        "student.max_length": job["max_length"],
        "student.dropout": job["dropout"],
        "teacher.model": "none",
        "train.loss": job["loss"],
        "train.num_negatives": job["num_negatives"],
        "train.gbce_calibration": job["gbce_calibration"],
        "train.item_updates": job["item_updates"],
        "train.batch_size": job["batch_size"],
        "train.learning_rate": job["learning_rate"],
        "train.weight_decay": 0.0,
        "seed": job["seed"],
    }
    return configuration.parse([f"--{name}={value}" for name, value in options.items()])


@dataclass
class EpochReport:
    """What an epoch did. `computed_positions` counts the cells of the attention's grids."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    positions: int = 0
    computed_positions: int = 0
    loss_sum: float = 0.0


class Training:
    """A fresh student and its batches.

    Args:
        data: The interactions.
        config: Settings of the run.
        accelerator: Device and processes; None: one on the CPU.
    """

    def __init__(
        self, data: InteractionData, config: Config, accelerator: Accelerator | None = None
    ):
        self.data, self.config = data, config
        self.accelerator = accelerator or Accelerator(cpu=True)
        seed_everything(config.seed, 0)
        self.state: CotrainState = new_state(data.num_items, None, config, self.accelerator)
        train = config.train
        self.loss = make_loss(
            train.loss, data.train_counts, self.accelerator.device, train.label_smoothing,
            train.num_negatives, train.negatives_power, train.logq_correction,
            train.gbce_calibration,
        )  # fmt: skip
        dataset = SequenceDataset(data, config.student.max_length, config.seed)
        self.sampler = EpochSampler(
            dataset.users, config.train.batch_size, config.seed,
            self.accelerator.process_index, self.accelerator.num_processes,
        )  # fmt: skip
        self.loader = make_loader(dataset, self.sampler)

    @property
    def model(self) -> Student:
        return self.state.student.bare

    def epoch(self, max_steps: int | None = None, show: str | None = None) -> EpochReport:
        """Train one epoch, or its first steps.

        Args:
            max_steps: None for all.
            show: Words for a progress bar; None: none.
        """
        report = EpochReport()
        steps = min(self.sampler.steps_per_epoch, max_steps or self.sampler.steps_per_epoch)
        bar = tqdm(total=steps, desc=show, leave=False, disable=show is None, mininterval=2)
        started = last = time.perf_counter()
        cpu_started = time.process_time()
        for step, batch in enumerate(self.loader, 1):
            losses = cotrain_step(self.state, batch, None, self.loss, self.config, self.accelerator)
            now = time.perf_counter()
            report.step_seconds.append(now - last)
            last = now
            count = len(batch.target_ids)
            report.positions += count
            report.loss_sum += losses["loss_ce"] * count
            report.computed_positions += sum(
                group.num_rows * group.length for group in batch.sequences.groups
            )
            bar.update()
            if step == steps:
                break
        report.seconds = time.perf_counter() - started
        report.cpu_seconds = time.process_time() - cpu_started
        bar.close()
        return report

    def top_items(self, k: int, batch_size: int) -> Iterator[torch.Tensor]:
        """(B, k) best unseen items of all users, batch by batch, for the time of the test."""
        model = self.model
        was_training = model.training
        model.eval()
        for start in range(0, self.data.num_users, batch_size):
            users = range(start, min(start + batch_size, self.data.num_users))
            histories = [self.data.history_before(user, "test") for user in users]
            targets = torch.tensor([self.data.test_target(user) for user in users])
            with torch.no_grad():
                states = model.user_states(histories)
                found = retrieve(states, model.item_vectors, left_pad(histories), targets, k)
            yield found.item_ids
        model.train(was_training)
