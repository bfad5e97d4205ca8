"""Full-ranking evaluation: every user, the whole catalogue, the history masked."""

from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from cotrain.data.batches import left_pad
from cotrain.data.interactions import InteractionData
from cotrain.evaluation.metrics import target_ranks
from cotrain.student.sasrec import SASRec

Split = Literal["validation", "test"]


def history_and_target(data: InteractionData, user: int, split: Split) -> tuple[np.ndarray, int]:
    """What is known of a user when the split's item is to be found, oldest first, and that item."""
    if split == "validation":
        return data.train_history(user), data.validation_target(user)
    return data.history(user)[:-1], data.test_target(user)


@torch.no_grad()
def evaluate(
    model: SASRec,
    data: InteractionData,
    split: Split,
    batch_size: int = 256,
    accelerator: Accelerator | None = None,
) -> np.ndarray:
    """Rank of each user's held-out item among all items not in the user's history.

    Args:
        model: The student, in any mode; left as it was.
        data: The interactions, split leave-one-out.
        split: Which held-out item.
        batch_size: Users scored at once; bounds memory, changes nothing else.
        accelerator: With several processes, each ranks its share and all get the whole.

    Returns:
        (U,) int64 ranks, 1 = best, in the order of users.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    # Users of like length come together: batches are padded to their longest.
    users = np.argsort(np.diff(data.offsets), kind="stable")[rank::world]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
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
        histories, targets = zip(
            *(history_and_target(data, user, split) for user in group), strict=True
        )
        item_ids = left_pad([history[-model.max_length :] for history in histories]).to(device)
        scores = model.encode(item_ids)[:, -1] @ model.item_vectors.T
        ranks = target_ranks(
            scores, torch.tensor(targets, device=device), left_pad(list(histories)).to(device)
        )
        found.append((group, ranks.cpu().numpy()))
    model.train(was_training)
    ranks = np.zeros(data.num_users, dtype=np.int64)
    for group, group_ranks in gather_object(found) if world > 1 else found:
        ranks[group] = group_ranks
    return ranks
