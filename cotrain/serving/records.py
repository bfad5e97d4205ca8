"""What the inspector finds and the page shows."""

from dataclasses import dataclass
from typing import Any

import numpy as np

# Items of a list, and places of the other list that are looked through for where one was.
TOP, SEARCHED = 10, 100


@dataclass(frozen=True)
class Person:
    """Somebody to whom the models recommend.

    Attributes:
        user: Index in the data; None: a new user.
        user_id: Raw id; None: a new user.
        history: (n,) item indices that the models read, oldest first.
        taken_next: The item that came next and that the models do not see; None: not known.
    """

    user: int | None
    user_id: Any
    history: np.ndarray
    taken_next: int | None = None


@dataclass(frozen=True)
class Placed:
    """An item in a list.

    Attributes:
        item: Its index.
        title: Of the item.
        categories: Joined by a bar.
        place: 1 is best.
        elsewhere: Its place in the list that this one is compared with; None: beyond `SEARCHED`,
            or there is no such list.
        taken_next: Whether it is what the person took next.
    """

    item: int
    title: str
    categories: str
    place: int
    elsewhere: int | None
    taken_next: bool


@dataclass(frozen=True)
class Lists:
    """What each model recommends.

    Attributes:
        of: The `TOP` best of each model, by its name; `elsewhere` is the place in the other's.
        next_places: Place of what the person took next in each model's list; None: beyond
            `SEARCHED`. Empty where it is not known.
    """

    of: dict[str, list[Placed]]
    next_places: dict[str, int | None]

    @property
    def shared(self) -> int | None:
        """Items that both models recommend; None where there is one model."""
        if len(self.of) < 2:
            return None
        return sum((placed.elsewhere or TOP + 1) <= TOP for placed in self.of["student"])


@dataclass(frozen=True)
class Judged:
    """A candidate as the teacher ranks it.

    Attributes:
        placed: With the teacher's place, and the student's as `elsewhere`.
        identifier: What it was called in the prompt; "" where candidates have no identifier.
        prob: What the student was to learn: of that identifier among the candidates', after
            calibration, at the run's temperature.
        tied: Whether the teacher does not tell it apart from another one.
    """

    placed: Placed
    identifier: str
    prob: float
    tied: bool


@dataclass(frozen=True)
class Answer:
    """What the teacher says of the student's candidates.

    Attributes:
        rows: Best first.
        confidence: 0 where it guesses, 1 where it is certain.
        temperature: At which the probabilities were taken.
        seconds: That the ranking took.
        prompt_tokens: That it read.
        reasoning: That it wrote first; "" in most modes.
    """

    rows: list[Judged]
    confidence: float
    temperature: float
    seconds: float
    prompt_tokens: int
    reasoning: str
