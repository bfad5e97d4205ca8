"""A finished run's recommendations for its users, as words."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cotrain import config as configuration
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.errors import CheckpointError, DataError, some_of
from cotrain.rationale.explain import ExplainedItem, Explainer, Explanation, Reason
from cotrain.rationale.head import FOLDER, RationaleHead
from cotrain.rationale.store import RationaleStore
from cotrain.student.recommender import Recommender


@dataclass(frozen=True)
class FinishedRun:
    """What a run left behind; open it with `FinishedRun.open`.

    Attributes:
        folder: Of the run.
        data: That it was trained on.
        recommender: The student that it ships.
    """

    folder: Path
    data: InteractionData
    recommender: Recommender

    @classmethod
    def open(cls, folder: Path) -> "FinishedRun":
        """Reads settings, student and data.

        Raises:
            CheckpointError: No run folder, or of a run that has not finished.
            DataError, AssetError, ConfigError: Its data or student cannot be had.
        """
        settings, student = folder / "config.yaml", folder / "student"
        if not settings.is_file():
            raise CheckpointError(
                f"{folder} is no run folder: it has no config.yaml. Give --run the folder that "
                "scripts/train_online.py wrote."
            )
        if not student.is_dir():
            raise CheckpointError(
                f"The run {folder} has no student yet. Let it finish: accelerate launch "
                f"scripts/train_online.py --resume {folder}"
            )
        recommender = Recommender.from_pretrained(student)
        data = load_interactions(configuration.parse(["--config", str(settings)]).data)
        if recommender.catalog.item_ids != data.catalog.item_ids:
            raise DataError(
                f"The student of {folder} recommends {len(recommender.catalog) - 1:,} items and "
                f"the data {data.name!r} now have {data.num_items:,}, not the same ones in the "
                "same order. Expected the tables that the run was trained on."
            )
        return cls(folder, data, recommender)

    def user(self, raw_id: str) -> int:
        """Index of the user that the command line names.

        Raises:
            DataError: The data have none of this name.
        """
        ids = self.data.user_ids
        texts = [str(user) for user in ids]
        if raw_id not in texts:
            raise DataError(
                f"The data {self.data.name!r} have no user {raw_id!r}. Expected one of its "
                f"{len(ids):,} users: {some_of(ids)}."
            )
        return texts.index(raw_id)

    def explainer(self, store: Path | None = None) -> Explainer:
        """With the head and the rationales of the run.

        Args:
            store: Where the rationales are now; None: where they were when it was trained.

        Raises:
            DataError: It was trained without rationales, or they are gone or do not fit.
        """
        head, facts = RationaleHead.load(self.folder / FOLDER)
        folder = Path(facts["store"]) if store is None else store
        if not folder.is_dir():
            raise DataError(
                f"The rationales of this run, {folder}, are not there. Name their folder with "
                "--store."
            )
        matched = RationaleStore.open(folder).match(self.data)
        return Explainer(self.recommender, head, matched, self.data)

    def recommend(self, user: int, k: int) -> Explanation:
        """Items without reasons, by everything that is known of a user."""
        catalog = self.data.catalog
        found = self.recommender.top_items([self.data.history(user)], k).cpu()
        pairs = zip(found.item_ids[0].tolist(), found.scores[0].tolist(), strict=True)
        items = [
            ExplainedItem(
                catalog.item_ids[item], catalog.titles[item], catalog.categories[item], score, []
            )
            for item, score in pairs
            if item
        ]
        return Explanation(self.data.user_ids[user], items, [])

    @cached_property
    def agreement(self) -> dict[str, Any] | None:
        """Of the student that it ships, as its report has it; None where it does not say."""
        try:
            report = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
            return report["rationales"]["agreement"][report["shipped"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def last_titles(self, user: int, count: int = 3) -> list[str]:
        """Of what the user took last, latest first."""
        latest: np.ndarray = self.data.history(user)[::-1][:count]
        return [self.data.catalog.titles[item] for item in latest]


def readable(explanation: Explanation) -> str:
    """Items with their reasons, a line each."""
    lines = []
    for rank, item in enumerate(explanation.items, start=1):
        categories = f" [{item.categories.replace('|', ', ')}]" if item.categories else ""
        lines.append(f"{rank:3}. {item.title}{categories}  {item.score:.2f}")
        lines += [f"       {_reason(reason)}" for reason in item.reasons]
    if explanation.nearest:
        lines += ["", "Nearest reasons, whatever is recommended:"]
        lines += [f"     {_reason(reason)}" for reason in explanation.nearest]
    return "\n".join(lines)


def _reason(reason: Reason) -> str:
    whose = ", their own" if reason.own else ""
    text = " ".join(reason.text.split())
    return f"{reason.cosine:.2f}  “{text}” — written for {reason.title}{whose}"


def agreement_text(agreement: dict[str, Any]) -> str:
    """Of `Agreement.as_report`, in two lines."""
    names = {"nearest": "the nearest reason", "shown": "the reason shown for the item"}
    lines = ["Source items that share a category with the recommended item, test users:"]
    for key, name in names.items():
        one = agreement[key]
        low, high = (100 * bound for bound in one["ci95"])
        lines.append(
            f"  {name}: {100 * one['share']:.1f} % against {100 * one['random']:.1f} % at random; "
            f"{100 * one['difference']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f} "
            f"({one['users']:,} users)"
        )
    return "\n".join(lines)
