"""Training batches: which users come together, what each row holds, where the teacher is asked.

Everything random here is a function of (seed, epoch, user), never of the batch or the process: a
run cut into other batches, or resumed in the middle, sees the same rows.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cotrain.data.interactions import InteractionData
from cotrain.data.packing import PackedSequences, pack_together

PADDING = 0


@dataclass(frozen=True)
class SequenceBatch:
    """B users' training sequences, N positions in all.

    Attributes:
        user_index: (B,) int64.
        sequences: The items, packed.
        target_ids: (N,) int64, the item after each of `sequences.item_ids`.
        cut: (B,) int64, which of the N positions asks the teacher: the history ends with the item
            there, and the item to predict is `target_ids[cut]`.
        history: (B, M) int64, every item up to the cut (also those older than the sequence),
            oldest first, left-padded with 0.
        first_target: (B,) int64, where in the data's items the target of each row's first position
            stands.
        borrowed: The one row is another process's, and counts for nothing: this process has none
            of the step and has to keep up with the others.
    """

    user_index: Tensor
    sequences: PackedSequences
    target_ids: Tensor
    cut: Tensor
    history: Tensor
    first_target: Tensor
    borrowed: bool = False

    def to(self, device: torch.device) -> "SequenceBatch":
        """The same batch on a device."""
        names = [field.name for field in fields(self) if field.name != "borrowed"]
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def split(self, parts: int) -> list["SequenceBatch"]:
        """The same rows in so many batches, as equal as they can be; each keeps their order."""
        if parts == 1:
            return [self]
        rows = [self._row(row) for row in range(len(self.user_index))]
        sizes = torch.arange(len(rows)).tensor_split(parts)
        return [collate([rows[row] for row in part.tolist()]) for part in sizes]

    def _row(self, row: int) -> dict[str, Any]:
        """As `SequenceDataset` gives it."""
        start, length = int(self.sequences.starts[row]), int(self.sequences.lengths[row])
        items, end = self.sequences.item_ids.numpy(), start + length
        history = self.history[row]
        return {
            "user": int(self.user_index[row]),
            "window": np.append(items[start:end], self.target_ids[end - 1].numpy()),
            "cut": int(self.cut[row]) - start,
            "history": history[history != PADDING].numpy(),
            "first_target": int(self.first_target[row]),
            "borrowed": self.borrowed,
        }

    @property
    def cut_target(self) -> Tensor:
        """(B,) the item that follows the history at the cut."""
        return self.target_ids[self.cut]

    @property
    def target_places(self) -> Tensor:
        """(N,) where in the data's items each of `target_ids` stands."""
        rows = self.sequences.starts.argsort()
        first = self.first_target[rows].repeat_interleave(self.sequences.lengths[rows])
        return first + self.sequences.positions


def left_pad(rows: Sequence[np.ndarray]) -> Tensor:
    """(B, longest) int64 with 0 on the left."""
    padded = np.full((len(rows), max(len(row) for row in rows)), PADDING, dtype=np.int64)
    for line, row in zip(padded, rows, strict=True):
        line[len(line) - len(row) :] = row
    return torch.from_numpy(padded)


class SequenceDataset(Dataset):
    """One training row a user and epoch: at most `max_length` + 1 of its training items.

    A row is asked for by (user, epoch), because the cut is drawn anew every epoch from the
    positions that are trained, and so is the window of a history that is longer.

    Args:
        data: The interactions.
        max_length: L, positions the student sees.
        seed: Seed of the windows and the cuts.
        windows: last: the most recent items. random: any stretch of a long history, so that all of
            it is trained in the course of epochs.

    Attributes:
        users: (n,) int64 users with at least one position to learn from.
    """

    def __init__(
        self,
        data: InteractionData,
        max_length: int,
        seed: int,
        windows: Literal["last", "random"] = "last",
    ):
        self.data = data
        self.max_length = max_length
        self.seed = seed
        self.windows = windows
        self.users = data.trained_users

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, key: tuple[int, int] | tuple[int, int, bool]) -> dict[str, Any]:
        user, epoch, *borrowed = key
        items = self.data.train_history(user)
        draw = random.Random(f"{self.seed} {epoch} {user}")
        start = max(0, len(items) - self.max_length - 1)
        if self.windows == "random":
            start = draw.randint(0, start)
        window = items[start : start + self.max_length + 1]
        cut = draw.randrange(len(window) - 1)
        return {
            "user": user,
            "window": window,
            "cut": cut,
            "history": items[: start + cut + 1],
            "first_target": int(self.data.offsets[user]) + start + 1,
            "borrowed": any(borrowed),
        }


def collate(rows: list[dict]) -> SequenceBatch:
    """Rows of `SequenceDataset`, packed."""
    sequences, (target_ids,) = pack_together(
        [row["window"][:-1] for row in rows], [row["window"][1:] for row in rows]
    )
    return SequenceBatch(
        user_index=torch.tensor([row["user"] for row in rows]),
        sequences=sequences,
        target_ids=target_ids,
        cut=sequences.starts + torch.tensor([row["cut"] for row in rows]),
        history=left_pad([row["history"] for row in rows]),
        first_target=torch.tensor([row["first_target"] for row in rows]),
        borrowed=any(row.get("borrowed", False) for row in rows),
    )


class EpochSampler(Sampler[list[tuple[int, int] | tuple[int, int, bool]]]):
    """Batches of (user, epoch) keys; knows where it stands, so that a run can go on there.

    Every process walks the same global batches and takes its own rows of each: one batch is one
    optimizer step of the whole run, however many processes share it. A process that has no row of
    a short last batch gets one that is another's, as (user, epoch, True).

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
        self.start_at(0)

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch; the last one may be short."""
        return -(-len(self.users) // self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """(n,) the users as an epoch visits them, over all processes."""
        return np.random.default_rng((self.seed, epoch)).permutation(self.users)

    def start_at(self, epoch: int, step: int = 0, rows_of: int | None = None) -> None:
        """Iterate next over `epoch`, from its batch `step` on; each user's row is that of the epoch
        `rows_of`, where it is another."""
        self.epoch, self.first_step = epoch, step
        self.rows_of = epoch if rows_of is None else rows_of

    def __len__(self) -> int:
        return self.steps_per_epoch - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int] | tuple[int, int, bool]]]:
        order = self.order(self.epoch)
        for step in range(self.first_step, self.steps_per_epoch):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            own = batch[self.rank :: self.world_size].tolist()
            yield [(user, self.rows_of) for user in own] or [(int(batch[0]), self.rows_of, True)]


def make_loader(dataset: SequenceDataset, sampler: EpochSampler) -> DataLoader:
    """Loader of `SequenceBatch`. Rows are slices of one array, so worker processes would cost more
    than they save."""
    # A loader draws a number whenever it starts. Taken from the global generator, it would give a
    # run that resumes within an epoch other dropout than one that never stopped.
    generator = torch.Generator()
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, generator=generator)
