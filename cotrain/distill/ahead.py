"""Asking the teacher once, on what the warm student proposes, about all that later epochs learn."""

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from cotrain.config import Config
from cotrain.data.batches import SequenceDataset, collate
from cotrain.distill.querying import Teacher
from cotrain.distill.state import CotrainState
from cotrain.distill.step import ask
from cotrain.distill.verdicts import Judged
from cotrain.runtime.tracking import gather

# Rows asked at once, by all processes.
_BATCH = 256


def ask_ahead(
    state: CotrainState,
    teacher: Teacher,
    dataset: SequenceDataset,
    users: np.ndarray,
    epoch: int,
    config: Config,
    accelerator: Accelerator,
) -> None:
    """Keep the verdicts on the rows that ask in an epoch to come; a collective.

    Args:
        state: Gives the student, which proposes without dropout; keeps the verdicts of all
            processes, on each of them.
        teacher: Who is asked; its query knows who asks in that epoch.
        dataset: Gives each user's row of the epoch, with its cut.
        users: (n,) users that are trained in the epoch.
        epoch: Which.
        config: Confidence.
        accelerator: Device and processes.
    """
    asking = users[teacher.query.choose(torch.from_numpy(users), epoch).numpy()]
    parts: list[tuple[Tensor, Judged]] = []
    bar = tqdm(
        range(0, len(asking), _BATCH), desc=f"asking for epoch {epoch + 1}",
        disable=not accelerator.is_main_process, leave=False,
    )  # fmt: skip
    with state.student.without_dropout():
        for start in bar:
            group = asking[start : start + _BATCH]
            own = group[accelerator.process_index :: accelerator.num_processes].tolist()
            # A process without a row has to keep up with the others.
            keys = [(user, epoch) for user in own] or [(int(group[0]), epoch, True)]
            rows = collate([dataset[key] for key in keys])
            judged = ask(state, rows, teacher, epoch, config, accelerator)
            parts += gather((rows.user_index, judged))
    state.kept = state.kept.and_of(parts, epoch)
