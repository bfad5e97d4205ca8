"""Filters over events: ratings, duplicates, repeats, busy users, and the k-core.

All of them work on arrays of codes in time order and return the rows to keep; `apply` runs them in
their order and counts.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from cotrain.data.cleaning import Events
from cotrain.data.ledger import Ledger, counted
from cotrain.errors import DataError

# More events than any reader of MovieLens has entered by hand (33,332 in 32M).
BUSY = 50_000


@dataclass(frozen=True)
class Filters:
    """What to leave out; the defaults leave out nothing.

    Attributes:
        min_rating: Lowest rating that counts as an interaction; none: all do, as implicit
            positives.
        duplicates: Which interaction of a user with the same item stays.
        drop_repeats: Whether an interaction with the same item as the one just before goes.
        max_user_interactions: Users with more are dropped whole, as bots; none: no limit.
        min_user_interactions: Fewest interactions of a user, and
        min_item_interactions: of an item; both hold at the end. 5 and 5 is the 5-core.
    """

    min_rating: float | None = None
    duplicates: Literal["all", "first", "last"] = "all"
    drop_repeats: bool = False
    max_user_interactions: int | None = None
    min_user_interactions: int = 1
    min_item_interactions: int = 1


def apply(events: Events, filters: Filters, ledger: Ledger) -> pl.DataFrame:
    """The events that stay, in their order.

    Raises:
        DataError: Nothing stays, or ratings are asked for and there are none.
    """
    table = events.table
    if filters.min_rating is not None:
        table = _rated(table, filters.min_rating, ledger)
    repeated = _duplicates(table, len(events.items), filters.duplicates, ledger)
    if repeated is not None:
        table = table.filter(repeated)
    if filters.drop_repeats:
        keep = ~consecutive_repeats(*_codes(table))
        ledger.drop("the same item twice in a row", int((~keep).sum()))
        table = table.filter(keep)
    table = _without_busy(table, events, filters.max_user_interactions, ledger)
    if max(filters.min_user_interactions, filters.min_item_interactions) > 1:
        table = _core(table, filters, ledger)
    if table.is_empty():
        raise DataError(
            f"No interaction is left after the filters:\n{ledger.table()}\nLower the limits."
        )
    return table


def k_core(
    users: np.ndarray, items: np.ndarray, min_user: int, min_item: int
) -> tuple[np.ndarray, int]:
    """The largest subset in which every user and every item has enough interactions.

    Args:
        users: Codes from 0, (N,).
        items: Codes from 0, (N,).
        min_user: Fewest interactions of a user.
        min_item: Fewest interactions of an item.

    Returns:
        Which interactions stay, (N,) bool, and after how many rounds nothing changed any more.
    """
    kept = np.arange(len(users))
    rounds = 0
    while True:
        before = len(kept)
        rounds += 1
        for codes, minimum in ((users, min_user), (items, min_item)):
            if minimum > 1 and len(kept):
                some = codes[kept]
                kept = kept[(np.bincount(some) >= minimum)[some]]
        if len(kept) == before:
            break
    keep = np.zeros(len(users), dtype=bool)
    keep[kept] = True
    return keep, rounds


def consecutive_repeats(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """(N,) bool: the event has the user and the item of the event before it."""
    repeats = np.zeros(len(users), dtype=bool)
    repeats[1:] = (users[1:] == users[:-1]) & (items[1:] == items[:-1])
    return repeats


def _codes(table: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return table["user"].to_numpy(), table["item"].to_numpy()


def _rated(table: pl.DataFrame, minimum: float, ledger: Ledger) -> pl.DataFrame:
    if "rating" not in table.columns:
        raise DataError(
            f"--min-rating {minimum:g} is given, and the source has no ratings. Leave it, or name "
            "the column with --rating-column."
        )
    unrated = table["rating"].null_count()
    if unrated:
        table = table.drop_nulls("rating")
        ledger.drop("no rating, and --min-rating is given", unrated)
    keep = table["rating"] >= minimum
    ledger.drop(f"rating below {minimum:g}", int((~keep).sum()))
    return table.filter(keep)


def _duplicates(
    table: pl.DataFrame, num_items: int, policy: str, ledger: Ledger
) -> pl.Series | None:
    """Which rows stay, or None if all do."""
    pair = table.select(pl.col("user").cast(pl.Int64) * num_items + pl.col("item")).to_series()
    again = ~pair.is_first_distinct()
    if policy == "all":
        if count := int(again.sum()):
            in_a_row = int(consecutive_repeats(*_codes(table)).sum())
            ledger.note(
                f"{count:,} interactions repeat an earlier one of the same user and item, "
                f"{in_a_row:,} of them directly; all are kept (--duplicates all)."
            )
        return None
    keep = ~again if policy == "first" else pair.is_last_distinct()
    ledger.drop(f"the same user and item again, only the {policy} is kept", int((~keep).sum()))
    return keep


def _without_busy(
    table: pl.DataFrame, events: Events, limit: int | None, ledger: Ledger
) -> pl.DataFrame:
    counts = np.bincount(table["user"].to_numpy(), minlength=len(events.users))
    busy = np.flatnonzero(counts > (BUSY if limit is None else limit))
    busy = busy[np.argsort(-counts[busy], kind="stable")]
    examples = [f"user {events.users[int(user)]!r}: {counts[user]:,} events" for user in busy[:5]]
    if limit is None:
        if len(busy):
            ledger.note(
                f"WARNING: {counted(len(busy), 'user')} with more than {BUSY:,} events, together "
                f"{counts[busy].sum() / max(1, table.height):.1%} of all; bots? "
                f"{'; '.join(examples)}. Kept; --max-user-interactions drops such users."
            )
        return table
    ledger.drop(
        f"{counted(len(busy), 'user')} with more than {limit:,} events",
        int(counts[busy].sum()),
        examples,
    )
    return table.filter((counts <= limit)[table["user"].to_numpy()])


def _core(table: pl.DataFrame, filters: Filters, ledger: Ledger) -> pl.DataFrame:
    """The k-core; where repeats were to go, those that arise when an item between them goes."""
    minima = filters.min_user_interactions, filters.min_item_interactions
    name = f"users with fewer than {minima[0]:,} events, items with fewer than {minima[1]:,}"
    while True:
        keep, rounds = k_core(*_codes(table), *minima)
        ledger.drop(f"{name} ({counted(rounds, 'round')})", int((~keep).sum()))
        table = table.filter(keep)
        repeats = consecutive_repeats(*_codes(table))
        if not filters.drop_repeats or not repeats.any():
            return table
        ledger.drop("the same item twice in a row, after that", int(repeats.sum()))
        table = table.filter(~repeats)
