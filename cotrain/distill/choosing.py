"""A student looks over all users and says whom to ask the teacher about."""

import itertools

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from cotrain.data.batches import SequenceBatch, SequenceDataset, collate
from cotrain.distill.learner import Learner
from cotrain.distill.querying import Policy, Query
from cotrain.distill.step import states_at_cut
from cotrain.runtime.tracking import gather
from cotrain.student.retrieval import retrieve
from cotrain.student.selection import POOL, farthest_first, unsure_of, unsure_over_items

_BATCH = 256


def chosen_by_student(
    student: Learner,
    query: Query,
    dataset: SequenceDataset,
    epoch: int,
    num_candidates: int,
    accelerator: Accelerator,
) -> np.ndarray:
    """(n,) int64 users that ask in an epoch, by a policy that follows the student; a collective.
    Each process looks at its share, in the same groups of users however many there are.

    Args:
        student: As it is now; looks without dropout.
        query: Policy and budget; its draw decides between equals, and whom k-center begins with.
        dataset: Gives each user's row of the epoch, with its cut.
        epoch: Which.
        num_candidates: K, of what the student proposes.
        accelerator: Device and processes.
    """
    users = query.drawn(epoch)
    if query.policy == "k_center":
        pool = users[:POOL]
        states = _look(student, query.policy, pool, dataset, epoch, num_candidates, accelerator)
        order = np.concatenate([pool[farthest_first(states, query.rows_per_epoch)], users[POOL:]])
    else:
        unsure = _look(student, query.policy, users, dataset, epoch, num_candidates, accelerator)
        order = users[unsure.argsort(descending=True, stable=True).numpy()]
    chosen = [order[: query.rows_per_epoch]]
    broadcast_object_list(chosen)
    return chosen[0]


@torch.no_grad()
def _look(
    student: Learner, policy: Policy, users: np.ndarray, dataset: SequenceDataset, epoch: int,
    num_candidates: int, accelerator: Accelerator,
) -> Tensor:  # fmt: skip
    """(n, …) what a policy goes by, of each user, on the CPU."""
    groups = [users[start : start + _BATCH] for start in range(0, len(users), _BATCH)]
    own = []
    with student.without_dropout():
        for group in groups[accelerator.process_index :: accelerator.num_processes]:
            rows = collate([dataset[user, epoch] for user in group.tolist()])
            rows = rows.to(accelerator.device)
            states = states_at_cut(student, rows, accelerator)
            own.append(_values(states, student, policy, rows, num_candidates).cpu())
    # One group of each process in turn, as they were dealt.
    rounds = itertools.zip_longest(*gather(own))
    return torch.cat([values for dealt in rounds for values in dealt if values is not None])


def _values(
    states: Tensor, student: Learner, policy: Policy, rows: SequenceBatch, num_candidates: int
) -> Tensor:
    """(B, D) states for k-center; else (B,) how unsure the student is, -inf where too few items are
    left to ask about."""
    if policy == "k_center":
        return states
    item_vectors = student.bare.item_vectors
    found = retrieve(states, item_vectors, rows.history, rows.cut_target, num_candidates)
    if policy == "loss":
        unsure = unsure_over_items(states, item_vectors, rows.cut_target, policy)
    else:
        assert policy in ("entropy", "margin")  # the others leave it to a draw
        unsure = unsure_of(found.scores, policy)
    return unsure.masked_fill(~found.complete, -torch.inf)
