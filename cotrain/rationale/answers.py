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
from cotrain.student.lookup import ItemLookup
from cotrain.student.recommender import Recommender

# Folders of a run with the better of student and control, and the other of the two.
SHIPPED, UNSHIPPED = "student", "unshipped"


@dataclass(frozen=True)
class FinishedRun:
    """What a run left behind; open it with `FinishedRun.open`.

    Attributes:
        folder: Of the run.
        recommender: The student that it ships.
    """

    folder: Path
    recommender: Recommender

    @classmethod
    def open(cls, folder: Path) -> "FinishedRun":
        """Reads the student. The data are read when they are asked for: new users need none.

        Raises:
            CheckpointError: No run folder, or of a run that has not finished.
            AssetError, DataError: Its student is damaged.
        """
        settings, student = folder / "config.yaml", folder / SHIPPED
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
        return cls(folder, Recommender.of_run(folder))

    @cached_property
    def data(self) -> InteractionData:
        """That it was trained on.

        Raises:
            DataError, AssetError, ConfigError: They cannot be had, or have changed.
        """
        settings = self.folder / "config.yaml"
        data = load_interactions(configuration.parse(["--config", str(settings)]).data)
        if self.recommender.catalog.item_ids != data.catalog.item_ids:
            raise DataError(
                f"The student of {self.folder} recommends {len(self.recommender.catalog) - 1:,} "
                f"items and the data {data.name!r} now have {data.num_items:,}, not the same ones "
                "in the same order. Expected the tables that the run was trained on."
            )
        return data

    @cached_property
    def report(self) -> dict[str, Any]:
        """Its report.

        Raises:
            CheckpointError: There is none, or it is no JSON object.
        """
        path = self.folder / "report.json"
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(report, dict):
                raise TypeError(f"it holds {type(report).__name__}")
        except (OSError, ValueError, RecursionError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not the report of a finished run: {type(error).__name__} "
                f"{str(error)[:200]}. Expected what scripts/train_online.py wrote."
            ) from error
        return report

    @cached_property
    def models(self) -> dict[str, Recommender]:
        """What it keeps of `student` and `control`, by these names: both, or the shipped one where
        there was no control, or an earlier version of this package finished the run.

        Raises:
            CheckpointError: The report does not say which of them is shipped.
            AssetError, DataError: The other one is damaged, or of other items.
        """
        shipped = self.report.get("shipped")
        if shipped not in ("student", "control"):
            raise CheckpointError(
                f"{self.folder / 'report.json'} says that {shipped!r} is shipped; expected student "
                "or control, as scripts/train_online.py writes."
            )
        found = {shipped: self.recommender}
        if (self.folder / UNSHIPPED).is_dir():
            other = Recommender.from_pretrained(self.folder / UNSHIPPED)
            if other.catalog.item_ids != self.recommender.catalog.item_ids:
                raise DataError(
                    f"{self.folder / UNSHIPPED} recommends other items than "
                    f"{self.folder / SHIPPED}. Expected both of one run."
                )
            found["control" if shipped == "student" else "student"] = other
        return found

    @cached_property
    def lookup(self) -> ItemLookup:
        """Finds items by id or title."""
        return ItemLookup(self.recommender.catalog)

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

    def recommend(
        self, history: np.ndarray, k: int = 10, *, user_id: Any = None, exclude_seen: bool = True,
        allowed: np.ndarray | None = None,
    ) -> Explanation:  # fmt: skip
        """Items without reasons.

        Args:
            history: Item indices, oldest first: `data.history(user)`, or what `lookup` found.
            k: Items.
            user_id: Raw id of the user; None: a new one.
            exclude_seen: Leave out what is in the history.
            allowed: (V,) bool, what may be recommended at all, as `lookup.allowed` tells.
        """
        catalog = self.recommender.catalog
        found = self.recommender.top_items([history], k, exclude_seen, allowed).cpu()
        pairs = zip(found.item_ids[0].tolist(), found.scores[0].tolist(), strict=True)
        items = [
            ExplainedItem(
                catalog.item_ids[item], catalog.titles[item], catalog.categories[item], score, []
            )
            for item, score in pairs
            if item
        ]
        return Explanation(user_id, items, [])

    @cached_property
    def agreement(self) -> dict[str, Any] | None:
        """Of the student that it ships, as its report has it; None where it does not say."""
        try:
            return self.report["rationales"]["agreement"][self.report["shipped"]]
        except (CheckpointError, LookupError, TypeError):
            return None

    def last_titles(self, history: np.ndarray, count: int = 3) -> list[str]:
        """Of what was taken last, latest first."""
        return [self.recommender.catalog.titles[item] for item in history[::-1][:count]]


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
