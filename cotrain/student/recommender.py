"""The student as its user meets it: raw item ids in, raw item ids out, from one folder or hub name.

recommender = Recommender.from_pretrained("runs/…/student")
recommender.recommend([["item a", "item b"]], k=10)
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from huggingface_hub import ModelCard, ModelHubMixin
from huggingface_hub.constants import REPOCARD_NAME

from cotrain.data.catalog import Catalog
from cotrain.errors import AssetError, DataError, some_of
from cotrain.student import pretrained
from cotrain.student.architectures import class_name, class_of_run
from cotrain.student.protocol import Student
from cotrain.student.retrieval import Candidates, retrieve
from cotrain.student.sasrec import SASRec

# Users × items that are scored at once: 64 MiB of scores, and three times that beside them.
MAX_SCORES = 2**24
# Users × seen items that are left out at once.
MAX_SEEN = 2**22


@dataclass(frozen=True)
class Recommendations:
    """What B users are shown.

    Attributes:
        item_ids: Raw ids of each user's items, best first; fewer than k where no more are left,
            none where no item of the history is known.
        scores: Of the same items; to compare items of one user, not users.
        unknown: (B,) int64, items of each history that the catalogue lacks and nobody read.
    """

    item_ids: list[list[Any]]
    scores: list[list[float]]
    unknown: np.ndarray


class Recommender(ModelHubMixin, library_name="cotrain", tags=["sequential-recommendation"]):
    """A student with the catalogue that names its items.

    `save_pretrained(folder)` and `push_to_hub(repo_id)` come from huggingface_hub and write
    `model.safetensors`, `config.json`, `items.parquet` and the model card `README.md`, which both
    leave alone where the folder has one. Both take `model_card_kwargs`: `dataset_name`, `protocol`,
    `metrics` (name to value) and what else `cotrain.evaluation.card` finds in a report.

    Attributes:
        model: The student; its own `train` and `to` decide mode and device.
        catalog: Item index to raw id, title and categories.
        card: The model card it was loaded with, saved again unless `model_card_kwargs` ask for a
            new one; none: one is written on saving.
    """

    def __new__(cls, *_args: Any, **_kwargs: Any) -> "Recommender":
        # The mixin's own would write the whole catalogue into config.json.
        return object.__new__(cls)

    def __init__(self, model: Student, catalog: Catalog, card: ModelCard | None = None):
        """Joins the two.

        Raises:
            DataError: They are not of the same items, or ids are missing or repeated.
        """
        _check_sizes(len(model.item_vectors) - 1, catalog)
        self.model = model
        self.catalog = catalog
        self.card = card
        self._indices = _indices_by_id(catalog)

    # ---- recommending ---------------------------------------------------------------------------

    def recommend(
        self,
        histories: Iterable[Iterable[Any]],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        allowed: np.ndarray | None = None,
        unknown: Literal["error", "skip"] = "error",
        batch_size: int = 256,
    ) -> Recommendations:
        """The k items that each user is most likely to take next.

        Args:
            histories: For each of B users the raw ids of items taken, oldest first, any number.
            k: Items a user.
            exclude_seen: Leave out what is in the user's history.
            allowed: (V,) bool by item index, what may be recommended at all, as
                `cotrain.student.filters.allowed_items` tells; None: everything.
            unknown: Ids that the catalogue lacks, and histories without an id. error: a DataError
                names them. skip: such ids are left out and counted; a user of whom nothing is left
                gets no items.
            batch_size: Users scored at once; bounds memory, changes nothing else.

        Raises:
            DataError: Unknown ids or empty histories under "error"; a history that is no list.
            ValueError: k or batch_size below 1, another value of `unknown`, another shape of
                `allowed`.
        """
        if k < 1 or batch_size < 1:
            raise ValueError(f"k is {k} and batch_size {batch_size}; expected 1 or more")
        if unknown not in ("error", "skip"):
            raise ValueError(f"unknown is {unknown!r}; expected 'error' or 'skip'")
        known, strangers = self._read(histories)
        if unknown == "error":
            self._refuse_unknown(known, strangers)
        indices, scores = self.top_indices(
            known, k, exclude_seen=exclude_seen, allowed=allowed, batch_size=batch_size
        )
        counts = (indices > 0).sum(1).tolist()
        rows = [row[:count] for row, count in zip(indices.tolist(), counts, strict=True)]
        unknown_counts = np.fromiter((len(ids) for ids in strangers), np.int64, len(strangers))
        return Recommendations(
            [[self.catalog.item_ids[index] for index in row] for row in rows],
            [row[:count] for row, count in zip(scores.tolist(), counts, strict=True)],
            unknown_counts,
        )

    def top_indices(
        self,
        histories: Sequence[np.ndarray],
        k: int,
        *,
        exclude_seen: bool = True,
        allowed: np.ndarray | None = None,
        batch_size: int = 256,
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `recommend` recommends, by item index, for any number of users.

        Args:
            histories: n arrays of item indices, oldest first; a user without one gets nothing.
            k: Items a user.
            exclude_seen: As there, like the two that follow.
            allowed: As there.
            batch_size: As there.

        Returns:
            (n, min(k, V - 1)) int64 indices, best first, 0 where no more are left, and float32
            scores.
        """
        width = min(k, len(self.catalog) - 1)
        indices = np.zeros((len(histories), width), np.int64)
        scores = np.full((len(histories), width), -np.inf, np.float32)
        for users in _batches(histories, batch_size):
            some = [histories[user] for user in users]
            found = self.top_items(some, k, exclude_seen, allowed).cpu()
            indices[users], scores[users] = found.item_ids.numpy(), found.scores.numpy()
        return indices, scores

    @torch.no_grad()
    def top_items(
        self,
        histories: Sequence[np.ndarray],
        k: int,
        exclude_seen: bool = True,
        allowed: np.ndarray | None = None,
    ) -> Candidates:
        """The same by item index, for one batch.

        Args:
            histories: B arrays of item indices, oldest first, with one item or more each.
            k: Items a user.
            exclude_seen: Leave out what is in the user's history.
            allowed: (V,) bool by item index, what may be recommended at all; None: everything.

        Returns:
            (B, min(k, V - 1)) items and scores; target ranks mean nothing.
        """
        if allowed is not None and allowed.shape != (len(self.catalog),):
            raise ValueError(
                f"allowed has shape {allowed.shape}; expected one truth value for each of "
                f"{len(self.catalog):,} item indices, 0 included"
            )
        was_training = self.model.training
        self.model.eval()
        states = self.model.user_states(histories)
        self.model.train(was_training)
        seen = [np.unique(history) for history in histories] if exclude_seen else []
        masked = np.zeros((len(histories), max(map(len, seen), default=0)), np.int64)
        for row, items in enumerate(seen):
            masked[row, : len(items)] = items
        return retrieve(
            states,
            self.model.item_vectors,
            torch.from_numpy(masked).to(states.device),
            torch.zeros(len(states), dtype=torch.int64, device=states.device),
            min(k, len(self.catalog) - 1),
            chunk_size=max(1, MAX_SCORES // len(states)),
            excluded=None if allowed is None else torch.from_numpy(~allowed).to(states.device),
        )

    def _read(self, histories: Iterable[Iterable[Any]]) -> tuple[list[np.ndarray], list[list[Any]]]:
        """Item indices of each history, and the ids that have none."""
        known, strangers = [], []
        for row, history in enumerate(histories):
            try:
                if isinstance(history, str | bytes):
                    raise TypeError("text, not a list")
                ids = list(history)
                indices = [self._indices.get(item, 0) for item in ids]
            except TypeError as error:
                raise DataError(
                    f"History {row} is {str(history)[:80]!r}: {error}. Expected a list of raw item "
                    "ids for each user, such as [[id, id], [id]] for two users."
                ) from error
            known.append(np.array([index for index in indices if index], dtype=np.int64))
            strangers.append([item for item, index in zip(ids, indices, strict=True) if not index])
        return known, strangers

    def _refuse_unknown(self, known: list[np.ndarray], strangers: list[list[Any]]) -> None:
        unknown = [item for items in strangers for item in items]
        if unknown:
            rows = sum(map(bool, strangers))
            examples = some_of(self.catalog.item_ids[1:4])
            raise DataError(
                f"{rows} of {len(known)} histories hold items that the catalogue lacks: "
                f"{some_of(unknown)}. Expected raw ids of its {len(self.catalog) - 1:,} items, "
                f"such as {examples}; unknown='skip' leaves others out and counts them."
            )
        empty = [row for row, items in enumerate(known) if not len(items)]
        if empty:
            raise DataError(
                f"Histories without an item: {some_of(empty)} of {len(known)}. Expected one id or "
                "more each; unknown='skip' gives such users an empty list."
            )

    # ---- saving and loading ---------------------------------------------------------------------

    # Narrower than the mixin's: the model's own arguments come from its config, from nowhere else.
    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        architecture: type[Student] | None = None,
    ) -> "Recommender":
        """Reads what `save_pretrained` or `push_to_hub` wrote; a folder needs no network.

        Args:
            pretrained_model_name_or_path: Local folder, or else a hub name such as "owner/name".
            force_download: Download again what the hub's cache has.
            token: For private repositories; none: that of `hf auth login`.
            cache_dir: The hub's cache folder.
            local_files_only: Hub names are looked up in the cache folder alone.
            revision: Branch, tag or commit on the hub; none: the latest.
            device: Where the model goes.
            architecture: Class of a student of your own; none: SASRec. It is never taken from the
                folder, which is not to decide what code is run.

        Raises:
            AssetError: Not to be found, of another class, pickled, damaged, or not what its config
                says.
            DataError: The catalogue is damaged, or of other items than the model.
            ConfigError: A revision of a local folder.
        """
        folder = pretrained.find_folder(
            pretrained_model_name_or_path,
            revision=revision,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        kind = SASRec if architecture is None else architecture
        config = pretrained.read_config(folder, kind)
        catalog = Catalog.load(folder)
        # Before the weights are read, of which there may be gigabytes.
        _check_sizes(config["num_items"], catalog)
        return cls(pretrained.read_model(folder, config, device, kind), catalog, _read_card(folder))

    @classmethod
    def of_run(cls, folder: Path) -> "Recommender":
        """What a finished run ships; a student of one's own is of the class that its settings name.

        Raises:
            AssetError, DataError: It is damaged.
            ConfigError: The class cannot be had.
        """
        student = pretrained.find_folder(folder / "student")
        own = pretrained.saved_architecture(student) != SASRec.__name__
        return cls.from_pretrained(student, architecture=class_of_run(folder) if own else None)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.catalog.save(save_directory)
        pretrained.write_model(self.model, save_directory)

    def generate_model_card(self, *_args: Any, **facts: Any) -> ModelCard:
        """The card it was loaded with, or, where `facts` or no card are given, a new one.

        Args:
            facts: `dataset_name`, `protocol`, `metrics`, `repo_id` and others that
                model_card.md.jinja names; each may be missing.
        """
        if self.card is not None and not facts:
            return self.card
        name = class_name(type(self.model))
        return ModelCard.from_template(
            self._hub_mixin_info.model_card_data,
            template_path=str(Path(__file__).with_name("model_card.md.jinja")),
            architecture=type(self.model).__name__,
            own_class=None if ":" not in name else name.split(":"),
            num_items=len(self.catalog) - 1,
            settings=self.model.settings,
            example_history=self.catalog.item_ids[1:3],
            **facts,
        )


def _check_sizes(num_items: int, catalog: Catalog) -> None:
    if num_items != len(catalog) - 1:
        raise DataError(
            f"The model has num_items {num_items:,}, its catalogue {len(catalog) - 1:,} items. "
            "Expected both of one run: save them together again."
        )


def _indices_by_id(catalog: Catalog) -> dict[Any, int]:
    ids = catalog.item_ids[1:]
    indices = {item: index for index, item in enumerate(ids, start=1)}
    if len(indices) < len(ids) or None in indices:
        wrong = [item for index, item in enumerate(ids, 1) if item is None or indices[item] > index]
        raise DataError(
            f"The catalogue has items without an id of their own: {some_of(wrong)}. Expected a "
            "different id for each item."
        )
    return indices


def _read_card(folder: Path) -> ModelCard | None:
    path = folder / REPOCARD_NAME
    if not path.is_file():
        return None
    try:
        return ModelCard.load(path, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        raise AssetError(
            f"The model card {path} cannot be read: {error}. Mend or delete it."
        ) from error


def _batches(histories: Sequence[np.ndarray], batch_size: int) -> Iterator[list[int]]:
    """Rows that have a history, like lengths together, so that one long history does not make the
    table of what others have seen as wide as itself."""
    lengths = np.fromiter((len(history) for history in histories), np.int64, len(histories))
    order = np.argsort(lengths, kind="stable")
    start = int((lengths == 0).sum())
    while start < len(order):
        end = min(start + batch_size, len(order))
        while end - start > 1 and (end - start) * lengths[order[end - 1]] > MAX_SEEN:
            end = start + (end - start) // 2
        yield order[start:end].tolist()
        start = end
