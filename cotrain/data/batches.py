"""Training batches: which users come together, what each row holds, where the teacher is asked.

Everything random here is a function of (seed, epoch, user), never of the batch or the process: a
run cut into other batches, or resumed in the middle, sees the same rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cotrain.data.interactions import InteractionData

PADDING = 0


@dataclass(frozen=True)
class SequenceBatch:
    """B users' training sequences, left-padded.

    Attributes:
        user_index: (B,) int64.
        item_ids: (B, L) int64 item indices, oldest first, 0 = padding.
        target_ids: (B, L) int64, the item after each of `item_ids`, 0 where there is none.
        cut: (B,) int64 column at which the teacher is asked: the history ends with
            `item_ids[b, cut[b]]` and the item to predict is `target_ids[b, cut[b]]`.
        history: (B, M) int64, every item up to the cut (also those older than L), oldest first,
            left-padded with 0.
    """

    user_index: Tensor
    item_ids: Tensor
    target_ids: Tensor
    cut: Tensor
    history: Tensor

    def to(self, device: torch.device) -> "SequenceBatch":
        """The same batch on a device."""
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        return replace(self, **moved)

    @property
    def cut_target(self) -> Tensor:
        """(B,) the item that follows the history at the cut."""
        return self.target_ids.gather(1, self.cut[:, None]).squeeze(1)


def left_pad(rows: list[np.ndarray]) -> Tensor:
    """(B, longest) int64 with 0 on the left."""
    padded = np.full((len(rows), max(len(row) for row in rows)), PADDING, dtype=np.int64)
    for line, row in zip(padded, rows, strict=True):
        line[len(line) - len(row) :] = row
    return torch.from_numpy(padded)


class SequenceDataset(Dataset):
    """One training row a user: its items before validation, the last `max_length` + 1 of them.

    A row is asked for by (user, epoch), because the cut is drawn anew every epoch from the
    positions that are trained.

    Args:
        data: The interactions.
        max_length: L, positions the student sees.
        seed: Seed of the cuts.

    Attributes:
        users: (n,) int64 users with at least one position to learn from.
    """

    def __init__(self, data: InteractionData, max_length: int, seed: int):
        self.data = data
        self.max_length = max_length
        self.seed = seed
        self.users = data.trained_users

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, np.ndarray | int]:
        user, epoch = key
        items = self.data.train_history(user)
        window = items[-(self.max_length + 1) :]
        positions = len(window) - 1
        cut = int(np.random.default_rng((self.seed, epoch, user)).integers(positions))
        return {
            "user": user,
            "window": window,
            "cut": cut,
            "history": items[: len(items) - len(window) + cut + 1],
        }


def collate(rows: list[dict]) -> SequenceBatch:
    """Rows of `SequenceDataset`, left-padded to the longest row (not to max_length)."""
    item_ids = left_pad([row["window"][:-1] for row in rows])
    return SequenceBatch(
        user_index=torch.tensor([row["user"] for row in rows]),
        item_ids=item_ids,
        target_ids=left_pad([row["window"][1:] for row in rows]),
        cut=torch.tensor([item_ids.shape[1] - len(row["window"]) + 1 + row["cut"] for row in rows]),
        history=left_pad([row["history"] for row in rows]),
    )


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (user, epoch) keys; knows where it stands, so that a run can go on there.

    Every process walks the same global batches and takes its own rows of each: one batch is one
    optimizer step of the whole run, however many processes share it.

    Args:
        users: Users to visit once an epoch.
        batch_size: Users a step, over all processes.
        seed: Seed of the order.
        rank: This process.
        world_size: All processes.
    """

    def __init__(
        self, users: np.ndarray, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ):
        self.users = users
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.first_step = 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch. The last one may be short, but never has fewer rows than processes."""
        full, rest = divmod(len(self.users), self.batch_size)
        return full + (rest >= self.world_size)

    def start_at(self, epoch: int, step: int = 0) -> None:
        """Iterate next over `epoch`, from its batch `step` on."""
        self.epoch, self.first_step = epoch, step

    def __len__(self) -> int:
        return self.steps_per_epoch - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.users)
        for step in range(self.first_step, self.steps_per_epoch):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(user, self.epoch) for user in batch[self.rank :: self.world_size].tolist()]


def make_loader(dataset: SequenceDataset, sampler: EpochSampler) -> DataLoader:
    """Loader of `SequenceBatch`. Rows are slices of one array, so worker processes would cost more
    than they save."""
    # A loader draws a number whenever it starts. Taken from the global generator, it would give a
    # run that resumes within an epoch other dropout than one that never stopped.
    generator = torch.Generator()
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, generator=generator)
