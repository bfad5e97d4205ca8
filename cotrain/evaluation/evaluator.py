"""Full-ranking evaluation: every user, the whole catalogue, the history masked.

Memory is bounded whatever the number of users and items: a batch of users is encoded at once, and
of these as many are scored at once as `MAX_SCORES` allows. Only the rank and the list of ten of
each user are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from cotrain.data.interactions import InteractionData
from cotrain.data.splits import Split
from cotrain.evaluation.metrics import LIST_LENGTH, target_ranks, top_items

# Users × items that are scored at once: 128 MiB of scores and as much again for their masks.
MAX_SCORES = 2**25


class RankingModel(Protocol):
    """What can be evaluated: a model that scores by the inner product of user and item."""

    training: bool

    @property
    def item_vectors(self) -> Tensor:
        """(V, D), row 0 = padding."""
        ...

    def user_states(self, histories: Sequence[np.ndarray]) -> Tensor:
        """(B, D) state after the last item of each history, on the device of `item_vectors`."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What one model does for the users of one split.

    Attributes:
        users: (n,) int64 user indices, ascending.
        ranks: (n,) int64 rank of each user's target among all items not in the history, 1 = best.
        recommended: (n, 10) int64 items each user would be shown, best first; 0 = none left. The
            history is left out without exception, so that a target that repeats an item of it has
            a rank and yet is in no list.
    """

    users: np.ndarray
    ranks: np.ndarray
    recommended: np.ndarray

    def ranks_by_user(self, num_users: int) -> list[int | None]:
        """(num_users,) ranks, None for a user that is not evaluated."""
        ranks: list[int | None] = [None] * num_users
        for user, rank in zip(self.users.tolist(), self.ranks.tolist(), strict=True):
            ranks[user] = rank
        return ranks


@torch.no_grad()
def evaluate(
    model: RankingModel,
    data: InteractionData,
    split: Split,
    batch_size: int = 256,
    accelerator: Accelerator | None = None,
) -> Evaluation:
    """Rank each user's held-out item, and list what the user would be shown.

    Args:
        model: The student, in any mode; left as it was.
        data: The interactions and their split.
        split: Which held-out item.
        batch_size: Users encoded at once; bounds memory, changes nothing else.
        accelerator: With several processes, each ranks its share and all get the whole.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    everybody = data.evaluated_users(split)
    # Users of like history length come together: batches are padded to their longest.
    users = everybody[np.argsort(data.history_lengths(split), kind="stable")][rank::world]
    was_training = model.training
    model.train(False)
    item_vectors = model.item_vectors
    found = []
    starts = tqdm(
        range(0, len(users), batch_size),
        desc=f"ranking {split} items",
        delay=3,  # short evaluations stay silent
        leave=False,
        disable=rank != 0,
    )
    for start in starts:
        group = users[start : start + batch_size]
        histories = [data.history_before(user, split) for user in group]
        targets = torch.tensor([data.target(user, split) for user in group])
        states = model.user_states(histories)
        found.append((group, *_rank_and_list(states, item_vectors, targets, histories)))
    model.train(was_training)
    ranks = np.zeros(data.num_users, dtype=np.int64)
    recommended = np.zeros((data.num_users, LIST_LENGTH), dtype=np.int64)
    for group, group_ranks, group_lists in gather_object(found) if world > 1 else found:
        ranks[group], recommended[group] = group_ranks, group_lists
    return Evaluation(everybody, ranks[everybody], recommended[everybody])


def _rank_and_list(
    states: Tensor, item_vectors: Tensor, targets: Tensor, histories: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks (B,) and lists (B, 10) of a batch, at most MAX_SCORES scores at once."""
    device = item_vectors.device
    # Users are cut, not the catalogue: the target's score and all it is compared with come out of
    # the same product, so that items with equal vectors tie exactly.
    step = max(1, MAX_SCORES // len(item_vectors))
    ranks, lists = [], []
    for start in range(0, len(states), step):
        part = slice(start, start + step)
        known = histories[part]
        ids = torch.from_numpy(np.concatenate(known)).to(device)
        lengths = torch.tensor([len(history) for history in known], device=device)
        rows = torch.arange(len(known), device=device).repeat_interleave(lengths)
        scores = states[part] @ item_vectors.T  # (rows, V)
        ranks.append(target_ranks(scores, targets[part], rows, ids).cpu())
        lists.append(top_items(scores, rows, ids, LIST_LENGTH).cpu())
    return torch.cat(ranks).numpy(), torch.cat(lists).numpy()
