"""Rows to train and to measure a teacher on: a history, K candidates, and which of them is right.

Training rows come from training positions of the users that are not held out. Held-out users give
the rows on which a training chooses its best step: their validation targets, among the candidates
that the student retrieves for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cotrain.data.interactions import InteractionData
from cotrain.errors import ConfigError, DataError
from cotrain.finetune_settings import ExamplesConfig
from cotrain.student.recommender import Recommender

# Rows for each that is wanted: where the true item is missing they are dropped.
_ROWS_DRAWN = 6
_BATCH = 256


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        user: Index.
        cut: How many interactions of the user lie before the target.
        history: Their items, oldest first; the most recent ones are enough.
        candidates: K item indices; in the student's order where they are the student's.
        relevance: Of each; 1 for the target. Sums to 0 where the target is not among them.
        scores: The student's, of each; empty where they are not the student's.
        target: Item index.
    """

    user: int
    cut: int
    history: tuple[int, ...]
    candidates: tuple[int, ...]
    relevance: tuple[float, ...]
    target: int
    scores: tuple[float, ...] = ()

    @property
    def target_place(self) -> int | None:
        """Where the target stands among the candidates."""
        return self.candidates.index(self.target) if self.target in self.candidates else None

    @property
    def right_place(self) -> int:
        """Where the one right answer stands: the target, or where it is not among the candidates
        the most relevant of them, which the user takes later."""
        place = self.target_place
        return int(np.argmax(self.relevance)) if place is None else place


@dataclass(frozen=True)
class Examples:
    """Rows of one training.

    Attributes:
        train: From training positions of users who are not held out.
        validation: Validation rows of held-out users, with the target among the candidates.
        num_validation: Held-out users, with and without it.
        drawn: Training positions that were looked at.
    """

    train: list[Example]
    validation: list[Example]
    num_validation: int
    drawn: int


def held_out_users(data: InteractionData, share: float, seed: int) -> np.ndarray:
    """(n,) users that a teacher's training never sees, ascending; the same for every method."""
    order = np.random.default_rng((seed, 11)).permutation(data.num_users)
    return np.sort(order[: max(1, round(share * data.num_users))])


def open_student(settings: ExamplesConfig, data: InteractionData) -> Recommender | None:
    """The student that the settings name, checked against the data.

    Raises:
        ConfigError: It is needed and not named.
        AssetError, DataError: It cannot be read, or is of other items.
    """
    if settings.student is None:
        if settings.candidates == "student":
            raise ConfigError(
                "examples.candidates is student, but examples.student is none; name a run of "
                "scripts/train_online.py (with --teacher.model none for a plain one), or set "
                "examples.candidates popular."
            )
        return None
    folder = Path(settings.student).expanduser()
    if (folder / "student").is_dir():
        student = Recommender.of_run(folder)
    else:
        student = Recommender.from_pretrained(settings.student)
    if student.catalog.item_ids != data.catalog.item_ids:
        raise DataError(
            f"The student {settings.student} knows {len(student.catalog) - 1:,} items, which are "
            f"not the {data.num_items:,} of {data.name} in their order. Expected a student that "
            "was trained on these data with the same settings of data."
        )
    return student


def make_examples(
    data: InteractionData, settings: ExamplesConfig, num_candidates: int, seed: int,
    student: Recommender | None, shown: bool = False,
) -> Examples:  # fmt: skip
    """All rows of a training.

    Args:
        data: Interactions.
        settings: How many, and which candidates.
        num_candidates: K.
        seed: Of users, positions and drawn candidates.
        student: Whose candidates; also where others are trained on, validation shows its own.
        shown: Show a bar.

    Raises:
        DataError: No row is left to train or to validate on.
    """
    apart = held_out_users(data, settings.held_out, seed)
    users = np.setdiff1d(data.trained_users, apart)
    draw = np.random.default_rng((seed, 12))
    positions = training_positions(data, users, settings.min_history, seed, settings.draw)
    if settings.candidates == "student" and settings.missing == "drop":
        positions = positions[: _ROWS_DRAWN * settings.rows]
    else:
        positions = positions[: settings.rows]
    train: list[Example] = []
    drawn = 0
    bar = tqdm(total=settings.rows, desc="examples", unit="row", leave=False, disable=not shown)
    with bar:
        for start in range(0, len(positions), _BATCH):
            some = positions[start : start + _BATCH]
            rows = _rows(data, some, settings, num_candidates, student, draw)
            kept = [row for row in rows if sum(row.relevance) > 0]
            kept = kept[: settings.rows - len(train)]
            train += kept
            drawn += len(some)
            bar.update(len(kept))
            if len(train) == settings.rows:
                break
    evaluated = np.intersect1d(apart, data.evaluated_users("validation"))
    validation = validation_rows(data, evaluated, num_candidates, student, settings, seed)
    hits = [row for row in validation if row.target_place is not None]
    _check_enough(train, hits, len(positions), settings)
    pick = np.random.default_rng((seed, 13)).permutation(len(hits))[: settings.validation_rows]
    hits = [hits[place] for place in np.sort(pick).tolist()]
    return Examples(train, hits, len(validation), drawn)


def validation_rows(
    data: InteractionData, users: Sequence[int] | np.ndarray, num_candidates: int,
    student: Recommender | None, settings: ExamplesConfig, seed: int,
) -> list[Example]:  # fmt: skip
    """A row for each user's validation target, whether or not it is among the candidates: the
    student's top K; without a student the target among others drawn as `settings` say."""
    draw = np.random.default_rng((seed, 14))
    rows: list[Example] = []
    for start in range(0, len(users), _BATCH):
        some = [int(user) for user in users[start : start + _BATCH]]
        histories = [data.history_before(user, "validation") for user in some]
        targets = [data.target(user, "validation") for user in some]
        lists, scores = _candidates(
            data, histories, targets, settings, num_candidates, student, draw, by_student=True
        )
        rows += [
            Example(
                user, len(history), tuple(history.tolist()), tuple(items),
                tuple(float(item == target) for item in items), target, tuple(values),
            )
            for user, history, target, items, values in zip(
                some, histories, targets, lists, scores, strict=True
            )
        ]  # fmt: skip
    return rows


def rows_at(
    data: InteractionData, positions: np.ndarray, settings: ExamplesConfig, num_candidates: int,
    seed: int, student: Recommender | None,
) -> list[Example]:  # fmt: skip
    """A row for each of (n, 2) user and cut, in their order, whether or not the target is among
    the candidates."""
    draw = np.random.default_rng((seed, 16))
    return [
        row
        for start in range(0, len(positions), _BATCH)
        for row in _rows(
            data, positions[start : start + _BATCH], settings, num_candidates, student, draw
        )
    ]


def training_positions(
    data: InteractionData, users: np.ndarray, min_history: int, seed: int, draw: int = 0
) -> np.ndarray:
    """(n, 2) user and cut of every position that may be trained, in random order, another one for
    each `draw`."""
    lengths = data.held_out.train_end[users] - data.offsets[users]
    counts = np.maximum(lengths - min_history, 0)
    owners = np.repeat(users, counts)
    first = np.cumsum(counts) - counts
    cuts = np.arange(int(counts.sum())) - np.repeat(first, counts) + min_history
    positions = np.stack([owners, cuts], axis=1)
    return positions[np.random.default_rng((seed, 19, draw)).permutation(len(positions))]


def _rows(
    data: InteractionData, positions: np.ndarray, settings: ExamplesConfig, num_candidates: int,
    student: Recommender | None, draw: np.random.Generator,
) -> list[Example]:  # fmt: skip
    pairs = [(int(user), int(cut)) for user, cut in positions]
    histories = [data.train_history(user)[:cut] for user, cut in pairs]
    targets = [int(data.train_history(user)[cut]) for user, cut in pairs]
    lists, scores = _candidates(
        data, histories, targets, settings, num_candidates, student, draw,
        by_student=settings.candidates == "student",
    )  # fmt: skip
    rows = []
    for (user, cut), history, target, items, values in zip(
        pairs, histories, targets, lists, scores, strict=True
    ):
        later = set(data.train_history(user)[cut + 1 :].tolist())
        relevance = [_worth(item, target, later, settings.future_weight) for item in items]
        if settings.missing == "inject" and sum(relevance) == 0:
            items, relevance = [*items[:-1], target], [*relevance[:-1], 1.0]
        rows.append(
            Example(user, cut, tuple(history.tolist()), tuple(items), tuple(relevance), target,
                    tuple(values))
        )  # fmt: skip
    return rows


def _worth(item: int, target: int, later: set[int], future_weight: float) -> float:
    if item == target:
        return 1.0
    return future_weight if item in later else 0.0


def _candidates(
    data: InteractionData, histories: Sequence[np.ndarray], targets: Sequence[int],
    settings: ExamplesConfig, num_candidates: int, student: Recommender | None,
    draw: np.random.Generator, by_student: bool,
) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
    """K items of each row that are not in its history, and the student's scores of them."""
    if by_student and student is not None:
        found = student.top_items(histories, num_candidates).cpu()
        if (found.item_ids == 0).any():
            raise DataError(
                f"A user has fewer than {num_candidates} unseen items; lower "
                "teacher.num_candidates."
            )
        return found.item_ids.tolist(), found.scores.tolist()
    weights = np.ones(len(data.catalog)) if settings.candidates == "random" else None
    weights = data.train_counts + 0.01 if weights is None else weights
    lists = []
    for history, target in zip(histories, targets, strict=True):
        allowed = weights.copy()
        allowed[[0, target]] = 0
        allowed[history] = 0
        if np.count_nonzero(allowed) < num_candidates - 1:
            raise DataError(
                f"A user has fewer than {num_candidates} unseen items; lower "
                "teacher.num_candidates."
            )
        others = draw.choice(
            len(allowed), num_candidates - 1, replace=False, p=allowed / allowed.sum()
        )
        lists.append([target, *others.tolist()])
    return lists, [[] for _ in lists]


def _check_enough(
    train: list[Example], hits: list[Example], positions: int, settings: ExamplesConfig
) -> None:
    if not train:
        raise DataError(
            f"None of {positions:,} training positions has the true item, or one that the user "
            "takes later, among its candidates. Expected some: take a better examples.student, "
            "raise teacher.num_candidates, or set examples.missing inject."
        )
    if not hits:
        raise DataError(
            "No held-out user has the true item among the candidates on validation, so no step "
            f"could be chosen. Raise examples.held_out (now {settings.held_out}), or take a better "
            "examples.student."
        )
