"""What the page shows of a finished run, as records: whose history, both models' lists and what
moved between them, the teacher's order, reasons, curves. Knows nothing of HTML or of browsers."""

import itertools
import json
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cotrain import config as configuration
from cotrain.data.interactions import InteractionData
from cotrain.distill.run import load_ranker
from cotrain.errors import CheckpointError, CotrainError, DataError
from cotrain.evaluation.charts import draw_charts
from cotrain.evaluation.drawing import Chart
from cotrain.rationale.answers import FinishedRun
from cotrain.rationale.explain import Explainer, Explanation
from cotrain.rationale.head import FOLDER as HEAD
from cotrain.serving.records import SEARCHED, TOP, Answer, Judged, Lists, Person, Placed
from cotrain.student.lookup import Kind
from cotrain.teacher.item_prompts import ItemPrompts
from cotrain.teacher.ranker import RankLLM

# What a person may type. More would only cost time, and is refused before anything reads it.
MAX_USER_CHARACTERS, MAX_TEXT_CHARACTERS, MAX_ITEMS = 200, 10_000, 50
# Users and titles that the page lists, to be searched in the browser.
OFFERED = 10_000
# Bytes of metrics.jsonl that are read.
_MAX_CURVES = 2**28


class Inspector:
    """Looks at one finished run.

    Args:
        run: It.
        store: Where its rationales are, if they were moved.

    Raises:
        CheckpointError, AssetError, DataError: Its models or its report are damaged.
    """

    def __init__(self, run: FinishedRun, store: Path | None = None):
        self.run = run
        self.models = run.models
        self.catalog = run.recommender.catalog
        self.report = run.report
        self._store = store
        self._teacher: RankLLM | None = None
        self._loading = threading.Lock()

    # ---- what there is --------------------------------------------------------------------------

    @cached_property
    def no_data(self) -> str:
        """Why the users of the data cannot be shown; "" where they can."""
        try:
            self.run.data.user_ids  # noqa: B018
        except CotrainError as error:
            return one_line(error)
        return ""

    @property
    def data(self) -> InteractionData:
        """That the run was trained on."""
        return self.run.data

    @property
    def no_control(self) -> str:
        """Why there is one list only; "" where there are two."""
        if len(self.models) == 2:
            return ""
        if not self.report.get("control"):
            return "This run had no control: nothing taught its student, or train.control was off."
        missing = "control" if "student" in self.models else "student"
        return (
            f"This run kept its {self.report['shipped']} only. Runs that are finished from now on "
            f"keep the {missing} as well, in unshipped/."
        )

    @property
    def no_teacher(self) -> str:
        """Why no teacher can be asked; "" where one can."""
        if not self.report.get("teacher"):
            return "This run had no teacher that could be asked."
        if self.report["teacher"].get("mode") == "nearness":
            return "This run was taught by the nearness of texts, and by no language model."
        return self.no_data

    @property
    def no_reasons(self) -> str:
        """Why there are no reasons; "" where there are."""
        if not (self.run.folder / HEAD).is_dir():
            return "This run was trained without rationales, so it knows no reasons."
        return self.no_data

    # ---- finding somebody -----------------------------------------------------------------------

    @cached_property
    def _user_places(self) -> dict[str, int]:
        return {str(user): place for place, user in enumerate(self.data.user_ids)}

    def known_user(self, text: Any, hide_next: bool = True) -> Person:
        """A user of the data.

        Args:
            text: Raw id, as it was typed.
            hide_next: Hide the test item from the models, where the user has one.

        Raises:
            DataError: Nobody has this id, or it is no id.
        """
        text = _text(text, MAX_USER_CHARACTERS, "A user id").strip()
        if not text:
            raise DataError("No user is named. Type an id, or take another user at random.")
        user = self._user_places.get(text)
        if user is None:
            raise DataError(
                f"The data {self.data.name!r} have no user {text!r}. Expected one of "
                f"{self.data.num_users:,}, such as {', '.join(map(repr, self.some_users()[:3]))}."
            )
        if not hide_next or user not in self._tested:
            return Person(user, self.data.user_ids[user], self.data.history(user))
        before = self.data.history_before(user, "test")
        taken = self.data.target(user, "test")
        return Person(user, self.data.user_ids[user], before, taken)

    @cached_property
    def _tested(self) -> set[int]:
        return set(self.data.evaluated_users("test").tolist())

    def new_user(self, text: Any) -> Person:
        """Somebody who took some items.

        Args:
            text: Ids or titles of items, one a line, oldest first.

        Raises:
            DataError: Some are unknown or not clear, there are none, or too many.
        """
        text = _text(text, MAX_TEXT_CHARACTERS, "The list of items")
        names = [line.strip() for line in text.splitlines() if line.strip()]
        if len(names) > MAX_ITEMS:
            raise DataError(f"{len(names):,} items are named; expected at most {MAX_ITEMS}.")
        lookup = self.run.lookup
        kinds: list[tuple[Kind, str]] = [
            ("id" if name in lookup.by_id else "title", name) for name in names
        ]
        return Person(None, None, lookup.indices(kinds))

    def random_user(self) -> str:
        """Id of any user, as text; of one with a test item where there are."""
        users = self.data.evaluated_users("test")
        place = np.random.default_rng().choice(users if len(users) else self.data.num_users)
        return str(self.data.user_ids[place])

    def some_users(self) -> list[str]:
        """Ids to choose from; others can be typed."""
        return list(itertools.islice(self._user_places, OFFERED))

    def some_titles(self) -> list[str]:
        """Titles to choose from, in the order of the catalogue; others can be typed."""
        items = itertools.islice(self.run.lookup.by_title.values(), OFFERED)
        return [self.catalog.titles[of_title[0]] for of_title in items]

    # ---- what they are shown --------------------------------------------------------------------

    def lists(self, person: Person) -> Lists:
        """Both models' lists, or the shipped one's."""
        orders = {name: self._order(name, person, SEARCHED) for name in self.models}
        places = {name: _places(order) for name, order in orders.items()}
        found = {}
        for name, order in orders.items():
            others = next((places[other] for other in places if other != name), {})
            found[name] = [
                self._placed(item, place, others.get(item), person)
                for place, item in enumerate(order[:TOP], start=1)
            ]
        taken = person.taken_next
        next_places = {} if taken is None else {name: places[name].get(taken) for name in places}
        return Lists(found, next_places)

    def _order(self, model: str, person: Person, count: int) -> list[int]:
        found = self.models[model].top_items([person.history], count).cpu()
        return [item for item in found.item_ids[0].tolist() if item]

    def _placed(self, item: int, place: int, elsewhere: int | None, person: Person) -> Placed:
        titles, categories = self.catalog.titles, self.catalog.categories
        taken = item == person.taken_next
        return Placed(item, titles[item], categories[item], place, elsewhere, taken)

    @cached_property
    def _explainer(self) -> Explainer:
        return self.run.explainer(self._store)

    def reasons(self, person: Person, count: int = 5) -> Explanation:
        """What the shipped model recommends, with the reasons that it finds.

        Args:
            person: To whom.
            count: Reasons for the person as a whole.

        Raises:
            DataError: There are none: see `no_reasons`; or they are gone.
        """
        if self.no_reasons:
            raise DataError(self.no_reasons)
        users = None if person.user is None else [person.user]
        (found,) = self._explainer.explain_histories(
            [person.history], TOP, users=users, overall=count
        )
        return found

    # ---- the teacher ----------------------------------------------------------------------------

    @property
    def teacher_is_loaded(self) -> bool:
        """Whether the next answer takes no longer than the ranking."""
        return self._teacher is not None

    def ask(self, person: Person) -> Answer:
        """The teacher's order of the candidates that the student proposes, as during the run.

        Args:
            person: For whom.

        Raises:
            DataError: There is no teacher, or there are too few candidates.
            AssetError, TeacherError, ConfigError: It cannot be loaded, or gives no verdict.
        """
        if self.no_teacher:
            raise DataError(self.no_teacher)
        ranker = self._loaded_teacher()
        size = ranker.settings.num_candidates
        model = "student" if "student" in self.models else "control"
        found = self.models[model].top_items([person.history], size).cpu()
        if not bool(found.complete[0]):
            raise DataError(f"Too few items are left to ask about: the teacher ranks {size}.")
        candidates = found.item_ids[0].tolist()
        # The same order is shown whenever the same person is asked about.
        seed = (0, 0) if person.user is None else (0, 1, person.user)
        verdict = ranker.rank(
            [person.history.tolist()], [candidates], [seed], scores=found.scores.tolist()
        )
        if not bool(verdict.valid[0]):
            raise DataError(f"The teacher gave no usable answer: {', '.join(verdict.failures)}.")
        ranks, probs = verdict.ranks[0].tolist(), verdict.probs[0].tolist()
        names = _identifiers(ranker, verdict.shown_order[0].tolist())
        rows = [
            Judged(
                self._placed(candidates[at], place, at + 1, person),
                names.get(at, ""),
                probs[at],
                ranks.count(ranks[at]) > 1,
            )
            for place, at in enumerate(verdict.ranking[0].tolist(), start=1)
        ]
        reasoning = verdict.reasonings[0] if verdict.reasonings else ""
        ordered = verdict.identifier_logits is None
        return Answer(
            rows,
            confidence=float(verdict.confidence[0]),
            temperature=ranker.order_temperature if ordered else ranker.temperature,
            seconds=verdict.seconds,
            prompt_tokens=verdict.prompt_tokens,
            reasoning=reasoning,
        )

    def _loaded_teacher(self) -> RankLLM:
        """Loaded by the first who asks; the others wait for it."""
        with self._loading:
            if self._teacher is None:
                settings = self.run.folder / "config.yaml"
                config = configuration.parse(["--config", str(settings)])
                device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
                ranker = load_ranker(config, self.data, device, lambda _: None)
                bias = torch.tensor(self.report["teacher"].get("identifier_bias") or [])
                if bias.shape == ranker.identifier_bias.shape:
                    ranker.identifier_bias = bias
                self._teacher = ranker
            return self._teacher

    # ---- how it was trained ---------------------------------------------------------------------

    def charts(self) -> list[Chart]:
        """The curves of the run.

        Raises:
            CheckpointError: metrics.jsonl is not there, or no such file.
        """
        path = self.run.folder / "metrics.jsonl"
        try:
            if path.stat().st_size > _MAX_CURVES:
                raise ValueError(f"it has more than {_MAX_CURVES / 2**20:.0f} MiB")
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"The run has no curves to show, because metrics.jsonl cannot be read: "
                f"{type(error).__name__}. Expected what scripts/train_online.py wrote."
            ) from error
        return draw_charts(self.report, [row for row in rows if isinstance(row, dict)])


def one_line(error: object, limit: int = 400) -> str:
    """What an error says, on one line without control characters."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(error))
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _text(value: Any, limit: int, what: str) -> str:
    """What somebody typed, or what a program sent in its place."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{what} is {type(value).__name__}; expected text.")
    if len(value) > limit:
        raise DataError(f"{what} has {len(value):,} characters; expected at most {limit:,}.")
    return value


def _places(order: list[int]) -> dict[int, int]:
    return {item: place for place, item in enumerate(order, start=1)}


def _identifiers(ranker: RankLLM, shown: list[int]) -> dict[int, str]:
    """What each candidate, by its place, was called; nothing where it went by several, or none."""
    prompts = ranker.prompts
    if isinstance(prompts, ItemPrompts) or prompts.num_shown < len(shown):
        return {}
    return dict(zip(shown, prompts.identifiers.texts, strict=False))
