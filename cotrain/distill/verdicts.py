"""Verdicts where the student learns from them: of a batch, and kept over epochs."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from cotrain.data.batches import SequenceBatch


@dataclass(frozen=True)
class Judged:
    """What the teacher said of rows, where the student is.

    Attributes:
        candidate_ids: (B, K) that the student proposed.
        probs: (B, K) Q.
        decision_state: (B, H).
        valid: (B,) bool.
        weight: (B,) what each verdict counts, 0 where there is none.
    """

    candidate_ids: Tensor
    probs: Tensor
    decision_state: Tensor
    valid: Tensor
    weight: Tensor

    def rows(self, part: slice) -> "Judged":
        """Those of some rows."""
        return Judged(**{name: column[part] for name, column in self.columns().items()})

    def to(self, device: torch.device) -> "Judged":
        """The same on a device."""
        return Judged(**{name: column.to(device) for name, column in self.columns().items()})

    def columns(self) -> dict[str, Tensor]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class KeptVerdicts:
    """Verdicts on N rows, by the epoch whose rows they are.

    Attributes:
        key: (N,) int64, ascending: epoch × 2³² + user.
        judged: Their N rows, on the CPU.
    """

    key: Tensor
    judged: Judged

    @staticmethod
    def none(num_candidates: int, teacher_size: int) -> "KeptVerdicts":
        """Not one yet, of K candidates and decision states of H."""
        ids = torch.zeros(0, num_candidates, dtype=torch.int64)
        states, valid = torch.zeros(0, teacher_size), torch.zeros(0, dtype=torch.bool)
        return KeptVerdicts(
            ids.new_zeros(0), Judged(ids, ids.float(), states, valid, torch.zeros(0))
        )

    def emptied(self) -> "KeptVerdicts":
        """None, of the same shapes."""
        return KeptVerdicts(self.key[:0], self.judged.rows(slice(0)))

    def and_of(self, parts: Sequence[tuple[Tensor, Judged]], epoch: int) -> "KeptVerdicts":
        """These, and what is valid of the verdicts on (n,) users each in another epoch."""
        added = [_key(users, epoch)[judged.valid] for users, judged in parts]
        key = torch.cat([self.key, *added])
        order = key.argsort()
        columns = {}
        for name, column in self.judged.columns().items():
            more = [getattr(judged, name)[judged.valid] for _, judged in parts]
            columns[name] = torch.cat([column, *more])[order]
        return KeptVerdicts(key[order], Judged(**columns))

    def of_batch(self, batch: SequenceBatch, epoch: int) -> Judged:
        """Those of a CPU batch in an epoch; where nothing was kept, zeros."""
        wanted = _key(batch.user_index, epoch)
        place = torch.searchsorted(self.key, wanted)
        found = torch.cat([self.key, self.key.new_full((1,), -1)])[place] == wanted
        found &= not batch.borrowed
        spread = {}
        for name, column in self.judged.columns().items():
            spread[name] = column.new_zeros(len(wanted), *column.shape[1:])
            spread[name][found] = column[place[found]]
        return Judged(**spread)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, for a checkpoint."""
        return {"key": self.key, **self.judged.columns()}

    @staticmethod
    def from_state_dict(state: dict[str, Tensor]) -> "KeptVerdicts":
        """Undo `state_dict`."""
        return KeptVerdicts(state["key"], Judged(**{k: v for k, v in state.items() if k != "key"}))


def _key(users: Tensor, epoch: int) -> Tensor:
    return users + epoch * 2**32
