"""Which interactions are trained on and which are held out.

Two splits, told apart by `data.split`:

- leave-one-out: of every user the last interaction is the test target, the one before it the
  validation target, and the rest is for training. Every user is evaluated; but what one user did
  last year is trained on to predict what another did ten years ago.
- time: two moments, the same for all users, part training, validation and test. Only what lies
  strictly before the first moment is trained on, so that no training step has seen the future of
  any target. In each window one interaction a user is the target (by default the last one), and
  its history is everything of that user before it.

What has no past follows one rule each in the split by time. A user without an interaction in
training is not evaluated. An item without one stays in the catalogue and can be a target
(`data.unseen_items: keep`), or leaves with all its interactions (`drop`).

Source: Gusak et al., "Time to Split", RecSys 2025 (arXiv 2507.16289): global temporal split with
global temporal validation. Their target "last" is the default here: they find that results on
"first", the interaction right after the cut, agree less with other realistic evaluation, because
the pauses before it are distributed differently.
"""

import datetime
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from cotrain.config import DataConfig
from cotrain.errors import DataError

Split = Literal["validation", "test"]
SPLITS: tuple[Split, ...] = ("validation", "test")
NOT_EVALUATED = -1


@dataclass(frozen=True)
class HeldOut:
    """Places in the items of all users, laid end to end.

    Attributes:
        train_end: (U,) int64, the place after each user's last training item.
        validation: (U,) int64, place of the validation target; -1: the user has none.
        test: (U,) int64, place of the test target; -1: the user has none.
    """

    train_end: np.ndarray
    validation: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Cuts:
    """Where the windows of validation and test start, as numbers and as the notes call them."""

    validation: float
    test: float
    validation_text: str
    test_text: str


def leave_one_out(offsets: np.ndarray) -> HeldOut:
    """The last item of each user for test, the one before for validation.

    Args:
        offsets: (U+1,) int64, user u's items are at `offsets[u]` to `offsets[u + 1] - 1`, three or
            more.
    """
    return HeldOut(offsets[1:] - 2, offsets[1:] - 2, offsets[1:] - 1)


def find_cuts(times: pl.Series, config: DataConfig) -> Cuts:
    """The two moments, from the settings or from the shares of interactions they leave.

    Args:
        times: Of every interaction, in any order; numbers or dates, none missing.
        config: The settings of the split.

    Raises:
        DataError: A start is no time, or validation does not start before test.
    """
    if config.validation_start is not None and config.test_start is not None:
        starts = [
            _moment(config.validation_start, times, "--data.validation_start"),
            _moment(config.test_start, times, "--data.test_start"),
        ]
        remedy = "Exchange or correct --data.validation_start and --data.test_start."
    else:
        # What is tied at a cut comes after it, all of it.
        in_order = times.sort()
        held_out = (config.validation_share + config.test_share, config.test_share)
        places = [min(round(len(times) * (1 - share)), len(times) - 1) for share in held_out]
        starts = [in_order.slice(place, 1) for place in places]
        remedy = (
            "Many interactions have the same time; raise --data.validation_share and "
            "--data.test_share, or set --data.validation_start and --data.test_start."
        )
    numbers = [start.to_physical()[0] for start in starts]
    texts = [str(start[0]) for start in starts]
    if not numbers[0] < numbers[1]:
        raise DataError(
            f"The split by time has validation start at {texts[0]} and test at {texts[1]}; "
            f"expected validation to start before test. {remedy}"
        )
    return Cuts(numbers[0], numbers[1], texts[0], texts[1])


def _moment(text: str, times: pl.Series, option: str) -> pl.Series:
    """One time of the same type as `times`, from a setting."""
    try:
        if not times.dtype.is_temporal():
            number = float(text)
            # Integers first: nanoseconds since 1970 do not fit into a float.
            return pl.Series([int(text) if text.strip().isdecimal() else number])
        moment = datetime.datetime.fromisoformat(text)
        if moment.tzinfo is not None:
            moment = moment.astimezone(datetime.timezone.utc).replace(tzinfo=None)
        one = pl.Series([moment])
        if isinstance(times.dtype, pl.Datetime) and times.dtype.time_zone is not None:
            one = one.dt.replace_time_zone("UTC")
        return one.cast(times.dtype)
    except (ValueError, pl.exceptions.PolarsError) as error:
        expected = "an ISO date" if times.dtype.is_temporal() else "a number"
        raise DataError(
            f"{option} is {text!r}; the times of the interactions run from {times.min()} to "
            f"{times.max()}, so expected {expected} like these."
        ) from error


def handle_unseen_items(
    rows: pl.DataFrame, cuts: Cuts, config: DataConfig, notes: list[str]
) -> pl.DataFrame:
    """Counts items that occur only after the cut, and drops their rows where that is asked for.

    Args:
        rows: Columns user, item and time.
        cuts: The two moments.
        config: The settings of the split.
        notes: Gets one sentence.
    """
    before = pl.col("time").to_physical() < cuts.validation
    unseen = rows.join(rows.filter(before).select("item").unique(), on="item", how="anti")
    items, drop = unseen["item"].n_unique(), config.unseen_items == "drop"
    if items:
        what = (
            f"dropped with their {unseen.height:,} interactions"
            if drop
            else "kept in the catalogue; they can be targets, but no training step has seen them"
        )
        notes.append(
            f"{items:,} of {rows['item'].n_unique():,} items have no interaction before "
            f"{cuts.validation_text}: {what} (--data.unseen_items)."
        )
    if not drop:
        return rows
    return rows.join(unseen.select("item").unique(), on="item", how="anti", maintain_order="left")


def split_by_time(
    offsets: np.ndarray, times: np.ndarray, cuts: Cuts, config: DataConfig, notes: list[str]
) -> HeldOut:
    """Training, validation and test by two moments that hold for all users.

    Args:
        offsets: (U+1,) int64, user u's interactions are at `offsets[u]` to `offsets[u + 1] - 1`.
        times: (N,) of the interactions as numbers, ascending within each user.
        cuts: The two moments; an interaction at one belongs to the window that starts there.
        config: The settings of the split.
        notes: Get what is in each part and who is not evaluated.

    Raises:
        DataError: Nothing to train on, or nobody to evaluate in one of the windows.
    """
    begins = offsets[:-1]
    train_end = begins + _counts(times < cuts.validation, offsets)
    validation_end = begins + _counts(times < cuts.test, offsets)
    known = train_end > begins
    windows = {"validation": (train_end, validation_end), "test": (validation_end, offsets[1:])}

    num_train = int((train_end - begins).sum())
    sizes = {name: int((end - begin).sum()) for name, (begin, end) in windows.items()}
    moments = {"validation": cuts.validation_text, "test": cuts.test_text}
    notes.append(
        f"Split by time: {_share(num_train, times)} before {moments['validation']} for training, "
        f"{_share(sizes['validation'], times)} from there for validation, "
        f"{_share(sizes['test'], times)} from {moments['test']} for test."
    )
    targets: dict[str, np.ndarray] = {}
    for name, (begin, end) in windows.items():
        active = end > begin
        place = begin if config.time_target == "first" else end - 1
        targets[name] = np.where(active & known, place, NOT_EVALUATED)
        evaluated, without = int((active & known).sum()), int((active & ~known).sum())
        more = f"{without:,} more {'user is' if without == 1 else 'users are'}"
        rest = f" {more} active there, but not before, and so not evaluated." if without else ""
        notes.append(
            f"Evaluated on {name}: {evaluated:,} user{'' if evaluated == 1 else 's'}, on the "
            f"{config.time_target} interaction of the window.{rest}"
        )
        if not evaluated:
            span = "no times" if not len(times) else f"times from {times.min()} to {times.max()}"
            raise DataError(
                f"The split by time leaves no user to evaluate on {name}: of {len(begins):,} users "
                f"{int(known.sum()):,} have interactions before {moments['validation']}, "
                f"{int(active.sum()):,} in the window of {name}, and none has both. The table has "
                f"{span}; move the cuts with --data.validation_share and --data.test_share, or "
                "--data.validation_start and --data.test_start."
            )
    return HeldOut(train_end, targets["validation"], targets["test"])


def _counts(which: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(U,) int64: how many of each user's interactions are marked."""
    running = np.concatenate([[0], np.cumsum(which)]).astype(np.int64)
    return running[offsets[1:]] - running[offsets[:-1]]


def _share(count: int, times: np.ndarray) -> str:
    return f"{count:,} interactions ({100 * count / max(len(times), 1):.1f} %)"
