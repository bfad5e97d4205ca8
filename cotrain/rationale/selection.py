"""Which training interactions get a rationale: at random, where a student is least sure, or unlike
each other; rare items as often as popular ones."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cotrain.config import RationaleConfig
from cotrain.data.interactions import InteractionData
from cotrain.data.packing import pack
from cotrain.errors import ConfigError, DataError, some_of
from cotrain.student.recommender import Recommender
from cotrain.student.selection import POOL, farthest_first, unsure_over_items

# Upper ends of the strata, in training interactions of the target.
STRATA = (5, 20, 100)
STRATUM_NAMES = ("1–5", "6–20", "21–100", "over 100")
# Users whose sequences go through the student at once.
_USERS = 64


@dataclass(frozen=True)
class Positions:
    """Training interactions, in the order in which they are to be written.

    Attributes:
        user: (n,) int64 user indices.
        cut: (n,) int64 how many interactions of the user lie before each.
        strata: Of each stratum its name, how many interactions there were and how many were chosen.
    """

    user: np.ndarray
    cut: np.ndarray
    strata: list[tuple[str, int, int]]


def select_positions(
    data: InteractionData,
    settings: RationaleConfig,
    seed: int,
    student: Recommender | None = None,
    progress: bool = False,
) -> Positions:
    """Choose by policy within each stratum, and spread the budget evenly over strata; one that has
    fewer gives all it has.

    Args:
        data: Only its training interactions are chosen from: those with something before them, and
            before what is held out of their user.
        settings: Policy, budget and limits.
        seed: Of every draw. At random, a larger budget holds what a smaller one does, as far as
            strata allow.
        student: Trained on these data; needed by every policy but random.
        progress: Show a bar while the student looks.

    Raises:
        ConfigError: A policy without its student, or a budget of nothing.
        DataError: Nothing to choose from, or a student of other items.
    """
    places = _eligible(data, settings.user_fraction, seed)
    share = settings.fraction * len(places)
    budget = settings.rows if settings.rows is not None else round(share)
    if budget < 1:
        raise ConfigError(
            f"rationale.fraction {settings.fraction} of {len(places):,} training interactions is "
            "none. Raise it, or set rationale.rows."
        )
    users = np.searchsorted(data.offsets, places, side="right") - 1
    priority = _priorities(data, places, users, settings, seed, student, progress)
    stratum = np.zeros(len(places), dtype=np.int64)
    if settings.strata == "popularity":
        stratum = np.digitize(data.train_counts[data.items[places]], STRATA, right=True)
    chosen = _spread(priority, stratum, users, budget, settings.per_user)
    names = STRATUM_NAMES if settings.strata == "popularity" else ("all",)
    counts = [np.bincount(stratum[part], minlength=len(names)) for part in (..., chosen)]
    return Positions(
        users[chosen],
        places[chosen] - data.offsets[users[chosen]],
        [(name, int(a), int(b)) for name, a, b in zip(names, *counts, strict=True)],
    )


def _eligible(data: InteractionData, user_fraction: float, seed: int) -> np.ndarray:
    """(n,) int64 places in `data.items` of what may be explained."""
    users = data.trained_users
    count = max(1, round(user_fraction * len(users)))
    users = np.sort(np.random.default_rng((seed, 6)).permutation(users)[:count])
    if not len(users):
        raise DataError(
            f"No user of {data.name!r} has two training interactions, so there is nothing to "
            "explain. Bring longer histories."
        )
    starts, ends = data.offsets[users] + 1, data.held_out.train_end[users]
    lengths = ends - starts
    firsts = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    return firsts + np.arange(lengths.sum())


def _priorities(
    data: InteractionData, places: np.ndarray, users: np.ndarray, settings: RationaleConfig,
    seed: int, student: Recommender | None, progress: bool,
) -> np.ndarray:  # fmt: skip
    """(n,) float64: the smaller, the sooner it is chosen."""
    # Drawn for all places of the data, so that it does not depend on which are eligible.
    drawn = np.random.default_rng((seed, 7)).random(len(data.items))[places]
    if settings.select == "random":
        return drawn
    if student is None:
        raise ConfigError(
            f"rationale.select {settings.select} asks a trained student; name its folder with "
            "rationale.student."
        )
    if student.catalog.item_ids != data.catalog.item_ids:
        theirs, ours = student.catalog.item_ids[1:], data.catalog.item_ids[1:]
        raise DataError(
            f"The student {settings.student} recommends other items than {data.name!r} has: "
            f"{len(theirs):,} such as {some_of(theirs[:2])}, against {len(ours):,} such as "
            f"{some_of(ours[:2])}. Give a student that was trained on these data."
        )
    if settings.select == "k_center":
        return _k_center(data, places, users, settings, seed, student, drawn, progress)
    values = np.empty(len(data.items))
    for part, states in _states(data, users, student, progress):
        wanted = torch.from_numpy(data.items[part]).to(states.device)
        items = student.model.item_vectors
        unsure = unsure_over_items(states, items, wanted, settings.select)
        values[part] = unsure.double().cpu().numpy()
    return -values[places]


@torch.no_grad()
def _states(
    data: InteractionData, users: np.ndarray, student: Recommender, progress: bool
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Places of training interactions and the (m, D) state of their user before each."""
    model = student.model.eval()
    length = model.max_length
    unique = np.unique(users)
    device = model.item_vectors.device
    bar = tqdm(total=len(unique), desc="asking the student", unit="user", disable=not progress)
    with bar:
        for start in range(0, len(unique), _USERS):
            part = unique[start : start + _USERS]
            # Histories longer than the student sees are looked at through windows that overlap by
            # half, and each position where more of its history is seen.
            windows = [
                window
                for user in part.tolist()
                for window in _windows(
                    int(data.offsets[user]), int(data.held_out.train_end[user]) - 1, length
                )
            ]
            packed = pack([data.items[begin:end] for begin, _, end in windows])
            states = model.encode(packed.to(device))
            places, rows = [], []
            for first, (begin, new, end) in zip(packed.starts.tolist(), windows, strict=True):
                places.append(np.arange(new + 1, end + 1))
                rows.append(np.arange(first + new - begin, first + end - begin))
            yield np.concatenate(places), states[torch.from_numpy(np.concatenate(rows))]
            bar.update(len(part))


def _windows(start: int, end: int, length: int) -> list[tuple[int, int, int]]:
    """Cover items [start, end) by windows of at most `length`: where each begins, from where on it
    shows what the one before did not, and where it ends."""
    windows = [(start, start, min(end, start + length))]
    while windows[-1][2] < end:
        seen = windows[-1][2]
        begin = seen - length // 2
        windows.append((begin, seen, min(end, begin + length)))
    return windows


@torch.no_grad()
def _k_center(
    data: InteractionData, places: np.ndarray, users: np.ndarray, settings: RationaleConfig,
    seed: int, student: Recommender, drawn: np.ndarray, progress: bool,
) -> np.ndarray:  # fmt: skip
    """Farthest-first order of user states on the sphere: each is the one that is least like all
    before it. Interactions outside of a random pool come last, in random order."""
    pool = np.argsort(drawn)[:POOL]
    rows = np.full(len(data.items), -1)
    rows[places[pool]] = np.arange(len(pool))
    vectors = torch.empty(len(pool), student.model.hidden_size)
    for part, states in _states(data, users[pool], student, progress):
        inside = rows[part] >= 0
        vectors[rows[part][inside]] = states[torch.from_numpy(inside)].float().cpu()
    budget = settings.rows if settings.rows is not None else round(settings.fraction * len(places))
    priority = 2 * len(places) + drawn
    # Strata and limits a user may refuse some of the first: twice the budget is put in order.
    order = farthest_first(vectors, 2 * budget, progress)
    priority[pool[order]] = np.arange(len(order))
    return priority


def _spread(
    priority: np.ndarray, stratum: np.ndarray, users: np.ndarray, budget: int, per_user: int | None
) -> np.ndarray:
    """Indices of what is chosen: one of each stratum in turn, by priority."""
    order = np.argsort(priority, kind="stable")
    turn = np.empty(len(order))
    for number in np.unique(stratum):
        own = order[stratum[order] == number]
        turn[own] = np.arange(len(own))
    # Within a turn the strata follow each other; without strata this is the order of priority.
    order = order[np.lexsort((stratum[order], turn[order]))]
    if per_user is None:
        return order[:budget]
    taken: dict[int, int] = {}
    chosen = []
    for index in order.tolist():
        user = int(users[index])
        if taken.get(user, 0) < per_user:
            taken[user] = taken.get(user, 0) + 1
            chosen.append(index)
            if len(chosen) == budget:
                break
    return np.array(chosen, dtype=np.int64)
