"""Why these items: the rationales that lie nearest to where a user's state leads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cotrain.data.interactions import InteractionData
from cotrain.errors import DataError
from cotrain.rationale.head import RationaleHead
from cotrain.rationale.store import MatchedRationales
from cotrain.student.recommender import Recommender

# Users × rationales that are compared at once: 64 MiB, and as much again beside them.
MAX_SCORES = 2**24
# Rationales read at once, at most.
MAX_ROWS = 2**14
# Users for whom items are recommended at once.
_BATCH = 256
# Users and rationales whose mean is taken, at most.
_MEAN_USERS, _MEAN_ROWS = 1000, 20_000


@dataclass(frozen=True)
class Reason:
    """A rationale that was found for a user.

    Attributes:
        row: Of the store.
        text: The rationale.
        item_id: Raw id of its source item, which it was written for.
        title: Of that item.
        own: Whether it was written for this user.
        cosine: Between it and W_r u, both without what all have in common.
        likeness: Cosine of the student's vectors of its source item and the recommended one; None
            where it stands for the user as a whole.
    """

    row: int
    text: str
    item_id: Any
    title: str
    own: bool
    cosine: float
    likeness: float | None = None


@dataclass(frozen=True)
class ExplainedItem:
    """A recommended item.

    Attributes:
        item_id: Raw id.
        title: Of the item.
        categories: Joined by a bar.
        score: The student's.
        reasons: Those that fit it best, best first.
    """

    item_id: Any
    title: str
    categories: str
    score: float
    reasons: list[Reason]


@dataclass(frozen=True)
class Explanation:
    """What one user is shown.

    Attributes:
        user_id: Raw id; None: a new user.
        items: Best first.
        nearest: Reasons nearest to W_r u, whatever is recommended, of equal texts one.
    """

    user_id: Any
    items: list[ExplainedItem]
    nearest: list[Reason]


class Explainer:
    """A student, its way to rationales, and the rationales.

    Args:
        recommender: The student, of the same items as the data.
        head: W_r, trained with it; goes to its device.
        matched: Rationales of the data.
        data: Whose training interactions they explain.

    Attributes:
        owners: (n,) int64, for which user each row of the store was written.
        source_items: (n,) int64, for which item.

    Raises:
        DataError: Student, head, rationales and data do not belong together.
    """

    def __init__(
        self,
        recommender: Recommender,
        head: RationaleHead,
        matched: MatchedRationales,
        data: InteractionData,
    ):
        _check(recommender, head, matched, data)
        self.recommender = recommender
        self.device = recommender.model.item_vectors.device
        self.head = head.to(self.device)
        self.store = matched.store
        self.data = data
        self.owners = np.empty(len(self.store), dtype=np.int64)
        self.source_items = np.empty(len(self.store), dtype=np.int64)
        self.owners[matched.rows] = np.searchsorted(data.offsets, matched.places, "right") - 1
        self.source_items[matched.rows] = data.items[matched.places]
        # Rows by owner, so that a user's own are one stretch.
        self._by_owner = matched.rows
        self._starts = np.searchsorted(matched.places, data.offsets)

    # ---- finding reasons ------------------------------------------------------------------------

    @torch.no_grad()
    def nearest(
        self, states: Tensor, count: int, without: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rationales nearest to W_r u by cosine, over the whole store, read in parts.

        Of both what all users or all rationales have in common is taken out before. Otherwise the
        few rationales that are nearest to the mean are nearest to everybody.

        Source: Suzuki et al., "Centering Similarity Measures to Reduce Hubs", EMNLP 2013.

        Args:
            states: (B, D) user states.
            count: Rationales a user.
            without: (B,) user whose own rationales are left out for each state; None: all count.

        Returns:
            (B, C) rows of the store, nearest first, and their cosines; C = min(count, n). Where
            fewer are left the row is -1 and the cosine -inf.
        """
        of_users, of_rationales = self._centres
        queries = F.normalize(self._directions(states) - of_users, dim=1)  # (B, E)
        count = min(count, len(self.store))
        best = queries.new_full((len(queries), 0), -torch.inf)
        rows = torch.zeros(len(queries), 0, dtype=torch.int64, device=self.device)
        size = min(MAX_ROWS, max(1, MAX_SCORES // max(1, len(queries))))
        excluded = None if without is None else torch.tensor(without, device=self.device)[:, None]
        for start in range(0, len(self.store), size):
            part = np.arange(start, min(start + size, len(self.store)))
            targets = self.head.targets(self.store.vectors(part).to(self.device))  # (m, E)
            scores = queries @ F.normalize(targets - of_rationales, dim=1).T
            if excluded is not None:
                owners = torch.from_numpy(self.owners[part]).to(self.device)
                scores = scores.masked_fill(owners == excluded, -torch.inf)
            ids = torch.from_numpy(part).to(self.device).expand(len(scores), -1)
            best, places = torch.cat([best, scores], 1).topk(min(count, start + len(part)), dim=1)
            rows = torch.cat([rows, ids], 1).gather(1, places)
        rows = rows.masked_fill(best == -torch.inf, -1)
        return rows.cpu().numpy(), best.cpu().numpy()

    def _directions(self, states: Tensor) -> Tensor:
        """(B, E) W_r u of unit length."""
        return F.normalize(self.head(states.to(self.device)).float(), dim=1)

    @cached_property
    @torch.no_grad()
    def _centres(self) -> tuple[Tensor, Tensor]:
        """(E,) means over training users of W_r u, and over rationales, all of unit length."""
        draw, model = np.random.default_rng(0), self.recommender.model.eval()
        users = _some(self.data.trained_users, _MEAN_USERS, draw)
        histories = [self.data.train_history(user) for user in users.tolist()]
        states = [
            model.user_states(histories[start : start + _BATCH])
            for start in range(0, len(histories), _BATCH)
        ]
        rows = _some(np.arange(len(self.store)), _MEAN_ROWS, draw)
        targets = self.head.targets(self.store.vectors(rows).to(self.device))
        return self._directions(torch.cat(states)).mean(0), targets.mean(0)

    def fitting(self, items: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of a user's rationales fit each of the recommended items.

        Those whose source item is the recommended one come first, then those whose source item is
        most like it to the student; equal ones stay in the order of the rows.

        Args:
            items: (k,) recommended.
            rows: (P,) of the store.

        Returns:
            (k, P) places in `rows`, best first, and the likeness of each.
        """
        sources, of_row = np.unique(self.source_items[rows], return_inverse=True)
        vectors = self.recommender.model.item_vectors.detach()
        wanted = F.normalize(vectors[torch.from_numpy(items).to(self.device)].float(), dim=1)
        offered = F.normalize(vectors[torch.from_numpy(sources).to(self.device)].float(), dim=1)
        # Once for each source item: columns of one product may differ in their last bits.
        likeness = (wanted @ offered.T).cpu().numpy()[:, of_row]  # (k, P)
        same = items[:, None] == sources[of_row]
        order = np.lexsort((-likeness, ~same), axis=1)
        return order, np.take_along_axis(likeness, order, axis=1)

    def recommended(
        self, histories: Sequence[np.ndarray], k: int, exclude_seen: bool = True,
        allowed: np.ndarray | None = None,
    ) -> Iterator[tuple[Tensor, np.ndarray, np.ndarray]]:  # fmt: skip
        """State (D,), items (≤ k,) and scores of each history."""
        model = self.recommender.model
        for start in range(0, len(histories), _BATCH):
            some = histories[start : start + _BATCH]
            found = self.recommender.top_items(some, k, exclude_seen, allowed).cpu()
            model.eval()
            with torch.no_grad():
                states = model.user_states(some)
            for state, items, scores in zip(states, found.item_ids, found.scores, strict=True):
                yield state, items[items > 0].numpy(), scores[items > 0].numpy()

    # ---- explaining -----------------------------------------------------------------------------

    def explain(
        self, users: Sequence[int], k: int = 10, *, exclude_own: bool = False, **how: Any
    ) -> list[Explanation]:
        """Recommend to users of the data, by all that is known of them, and say why.

        Args:
            users: User indices.
            k: Items a user.
            exclude_own: Leave out rationales that were written for the same user.
            how: Further arguments of `explain_histories`.
        """
        histories = [self.data.history(user) for user in users]
        return self.explain_histories(histories, k, users=users, exclude_own=exclude_own, **how)

    def explain_histories(
        self,
        histories: Sequence[np.ndarray],
        k: int = 10,
        *,
        users: Sequence[int] | None = None,
        exclude_own: bool = False,
        exclude_seen: bool = True,
        allowed: np.ndarray | None = None,
        reasons: int = 1,
        overall: int = 3,
        pool: int = 50,
    ) -> list[Explanation]:
        """Recommend to anybody, and say why.

        Args:
            histories: Item indices, oldest first, one or more each.
            k: Items a user.
            users: Whose histories they are; None: new users.
            exclude_own: Leave out rationales that were written for the same user.
            exclude_seen: Leave out what is in the history.
            allowed: (V,) bool, what may be recommended at all; None: everything.
            reasons: Of each item.
            overall: Reasons for the user as a whole.
            pool: The user's nearest rationales, from which those of an item are chosen.
        """
        made = list(self.recommended(histories, k, exclude_seen, allowed))
        states = torch.stack([state for state, _, _ in made])
        whose: Sequence[int | None] = [None] * len(made) if users is None else users
        found, cosines = self.nearest(states, max(pool, overall), users if exclude_own else None)
        explanations = []
        for user, (_, items, scores), rows, near in zip(whose, made, found, cosines, strict=True):
            places, likeness = self.fitting(items, rows[rows >= 0][:pool])
            fits = (places[:, :reasons], likeness[:, :reasons])
            explanations.append(self._explanation(user, items, scores, fits, rows, near, overall))
        return explanations

    def _explanation(
        self, user: int | None, items: np.ndarray, scores: np.ndarray,
        fits: tuple[np.ndarray, np.ndarray], rows: np.ndarray, cosines: np.ndarray, overall: int,
    ) -> Explanation:  # fmt: skip
        """Puts words to what was found for a user: items, places in `rows`, and how they fit."""
        catalog = self.data.catalog
        wanted = rows[rows >= 0]
        texts = dict(zip(wanted.tolist(), self.store.texts(wanted), strict=True))

        def reason(place: int, likeness: float | None = None) -> Reason:
            row = int(rows[place])
            return Reason(
                row=row,
                text=texts[row].rationale,
                item_id=texts[row].item_id,
                title=catalog.titles[self.source_items[row]],
                own=bool(self.owners[row] == user),
                cosine=float(cosines[place]),
                likeness=likeness,
            )

        explained = [
            ExplainedItem(
                item_id=catalog.item_ids[item],
                title=catalog.titles[item],
                categories=catalog.categories[item],
                score=score,
                reasons=[reason(*pair) for pair in zip(places, likeness, strict=True)],
            )
            for item, score, places, likeness in zip(
                items.tolist(), scores.tolist(), *(fit.tolist() for fit in fits), strict=True
            )
        ]
        # Of equal texts the nearest one: the others say nothing more.
        first: dict[str, int] = {}
        for place in range(len(wanted)):
            first.setdefault(texts[int(rows[place])].rationale, place)
        nearest = [reason(place) for place in list(first.values())[:overall]]
        user_id = None if user is None else self.data.user_ids[user]
        return Explanation(user_id, explained, nearest)

    def random_rows(self, without: int | None, count: int, draw: np.random.Generator) -> np.ndarray:
        """(≤ count,) different rows of the store, none of this user's own."""
        start, end = (0, 0) if without is None else self._starts[without : without + 2]
        others = len(self.store) - (end - start)
        chosen = draw.choice(others, min(count, others), replace=False)
        # Their own are one stretch of the rows by owner: what lies after it moves up.
        return self._by_owner[chosen + (chosen >= start) * (end - start)]


def _some(values: np.ndarray, count: int, draw: np.random.Generator) -> np.ndarray:
    """All, or so many of them, in order."""
    if len(values) <= count:
        return values
    return np.sort(draw.choice(values, count, replace=False))


def _check(
    recommender: Recommender,
    head: RationaleHead,
    matched: MatchedRationales,
    data: InteractionData,
) -> None:
    if recommender.catalog.item_ids != data.catalog.item_ids:
        raise DataError(
            f"The student recommends {len(recommender.catalog) - 1:,} items and the data "
            f"{data.name!r} have {data.num_items:,}, not the same ones in the same order. Expected "
            "the data of the run that trained it."
        )
    dimension, size = head.linear.weight.shape
    if (dimension, size) != (matched.store.dimension, recommender.model.hidden_size):
        raise DataError(
            f"The rationale head leads from {size} to {dimension} numbers; the student's states "
            f"have {recommender.model.hidden_size}, and the vectors in {matched.store.folder}, by "
            f"{matched.store.encoder}, {matched.store.dimension}. Expected the head, student and "
            "store of one run."
        )
