"""cotrain from Python: a finished run, a teacher to ask, losses for a loop of one's own.

Everything here is also to be had from `cotrain` itself. The examples are run by a test, with a
small run and a small teacher in place of these names.

Recommend, and say why:

>>> from cotrain import load_run
>>> run = load_run("runs/NAME")
>>> [item.title for item in run.recommend(user=8, k=3).items]  # doctest: +ELLIPSIS
['...', '...', '...']
>>> found = run.recommend(titles=["Toy Story (1995)", "Star Wars (1977)"], k=3, explain=True)
>>> found.items[0].reasons[0].text  # doctest: +ELLIPSIS
'...'

Rank with a teacher:

>>> from cotrain import load_teacher
>>> teacher = load_teacher("smollm2-135m-instruct", run.recommender.catalog, num_candidates=5)
>>> ranked = teacher.rank([[50, 1]], [[4, 7, 8, 9, 11]])
>>> sorted(ranked.item_ids[0])
[4, 7, 8, 9, 11]

Learn from its verdict:

>>> import torch
>>> from cotrain import losses
>>> student = run.recommender.model.train()
>>> optimizer = torch.optim.Adam(student.parameters())
>>> states = student.user_states(ranked.histories)
>>> scores = (states[:, None] * student.item_vectors[ranked.candidates]).sum(-1)
>>> verdict = ranked.verdict
>>> loss = losses.listnet_sum(scores, verdict.probs, verdict.confidence)
>>> loss.backward()
>>> optimizer.step()
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cotrain import config as configuration
from cotrain.data.catalog import Catalog
from cotrain.errors import ConfigError, DataError, some_of
from cotrain.rationale.answers import FinishedRun
from cotrain.rationale.explain import Explainer, Explanation
from cotrain.student.lookup import Kind
from cotrain.student.recommender import Recommender
from cotrain.teacher.backbone import load_backbone
from cotrain.teacher.prompts import make_prompts
from cotrain.teacher.ranker import RankLLM
from cotrain.teacher.tokenizer import load_tokenizer
from cotrain.teacher.verdict import TeacherVerdict


def load_run(folder: str | Path) -> "Run":
    """Opens what scripts/train_online.py left behind.

    Args:
        folder: Of a finished run.

    Raises:
        CheckpointError: No run, or one that has not finished.
        AssetError, DataError: Its student is damaged.

    >>> from cotrain import load_run
    >>> load_run("runs/NAME").recommend(items=[50, 181], k=2).items[0].item_id > 0
    True
    """
    return Run(FinishedRun.open(Path(folder).expanduser()))


@dataclass(frozen=True)
class Run:
    """A finished run; `load_run` opens one.

    Attributes:
        finished: Folder, data, report and more.
    """

    finished: FinishedRun

    @property
    def recommender(self) -> Recommender:
        """The student that it ships; `recommend` of it takes many histories at once."""
        return self.finished.recommender

    @property
    def report(self) -> dict[str, Any]:
        """What report.json holds."""
        return self.finished.report

    @cached_property
    def explainer(self) -> Explainer:
        """Finds reasons; only of runs that were trained with rationales."""
        return self.finished.explainer()

    def recommend(
        self,
        *,
        user: Any = None,
        items: Sequence[Any] = (),
        titles: Sequence[str] = (),
        k: int = 10,
        explain: bool = False,
        exclude_seen: bool = True,
        categories: Sequence[str] = (),
    ) -> Explanation:
        """What one user is shown.

        Args:
            user: Raw id of a user of the data; or, of a new one:
            items: Raw ids of what was taken, oldest first; or
            titles: The same by title.
            k: Items.
            explain: With reasons; needs a run that was trained with rationales.
            exclude_seen: Leave out what is in the history.
            categories: Only items of one of these.

        Raises:
            DataError: User, items, titles or categories are unknown, or there are no rationales.
            ConfigError: Not one of user, items and titles; k below 1.
        """
        if [user is not None, bool(items), bool(titles)].count(True) != 1 or k < 1:
            raise ConfigError(
                f"user is {user!r}, with {len(items)} items and {len(titles)} titles, k is {k}; "
                "expected one of user, items and titles, and k of 1 or more."
            )
        run, index = self.finished, None
        if user is not None:
            index = run.user(str(user))
            history = run.data.history(index)
        else:
            kind: Kind = "id" if items else "title"
            history = run.lookup.indices([(kind, str(name)) for name in items or titles])
        allowed, _ = run.lookup.allowed(categories)
        if explain:
            return self.explainer.explain_histories(
                [history], k, users=None if index is None else [index],
                exclude_seen=exclude_seen, allowed=allowed,
            )[0]  # fmt: skip
        return run.recommend(
            history, k, user_id=user, exclude_seen=exclude_seen, allowed=allowed
        )  # fmt: skip


@dataclass(frozen=True)
class Ranked:
    """How a teacher ranks B rows of K candidates.

    Attributes:
        item_ids: Raw ids of each row's candidates, best first; as they were given where the row has
            no valid verdict.
        verdict: Everything else, candidates in the order in which they were given.
        histories: B arrays of item indices, as a student reads them.
        candidates: (B, K) int64 item indices, as they were given.
    """

    item_ids: list[list[Any]]
    verdict: TeacherVerdict
    histories: list[np.ndarray]
    candidates: Tensor


class Teacher:
    """A language model that ranks items by raw id; `load_teacher` makes one.

    Args:
        ranker: It, with the prompts of the catalogue's titles.
        catalog: The items.
    """

    def __init__(self, ranker: RankLLM, catalog: Catalog):
        self.ranker = ranker
        self.catalog = catalog
        self._indices = {item: index for index, item in enumerate(catalog.item_ids) if index}

    def rank(
        self, histories: Sequence[Sequence[Any]], candidates: Sequence[Sequence[Any]], seed: int = 0
    ) -> Ranked:
        """Ranks each row's candidates.

        Args:
            histories: B lists of raw ids, oldest first; the last ones are shown.
            candidates: B lists of K different raw ids, K as the teacher was loaded for.
            seed: Of the order in which candidates are shown.

        Raises:
            DataError: Ids that the catalogue lacks, or another number of candidates.
        """
        size = self.ranker.settings.num_candidates
        wrong = [
            row for row, ids in enumerate(candidates) if len(set(ids)) != size or len(ids) != size
        ]
        if wrong or len(histories) != len(candidates):
            raise DataError(
                f"{len(histories)} histories have {len(candidates)} rows of candidates, of which "
                f"rows {some_of(wrong)} are not {size} different items; expected {size} for each "
                "history, or load the teacher with another num_candidates."
            )
        read, shown = self._indices_of(histories), self._indices_of(candidates)
        seeds = [(seed, row) for row in range(len(read))]
        verdict = self.ranker.rank(read, shown, seeds)
        item_ids = [
            [ids[place] for place in order] if valid else list(ids)
            for ids, order, valid in zip(
                candidates, verdict.ranking.tolist(), verdict.valid.tolist(), strict=True
            )
        ]
        histories_read = [np.array(row, np.int64) for row in read]
        return Ranked(item_ids, verdict, histories_read, torch.tensor(shown).view(-1, size))

    def _indices_of(self, rows: Iterable[Iterable[Any]]) -> list[list[int]]:
        listed = [list(row) for row in rows]
        unknown = [item for row in listed for item in row if item not in self._indices]
        if unknown or not all(listed):
            raise DataError(
                f"There are rows without items, or items that the catalogue lacks: "
                f"{some_of(unknown)}. Expected raw ids such as "
                f"{some_of(self.catalog.item_ids[1:4])}."
            )
        return [[self._indices[item] for item in row] for row in listed]


def load_teacher(
    name: str,
    catalog: Catalog,
    *,
    num_candidates: int = 20,
    quantization: str = "nf4",
    device: str | torch.device = "cpu",
    adapter: str | None = None,
    **settings: Any,
) -> Teacher:
    """Loads a language model that ranks a catalogue's items.

    Args:
        name: A known name, a folder, or a hub name.
        catalog: The items, such as `Recommender.catalog`.
        num_candidates: K, items of each ranking.
        quantization: nf4, int8, bf16 or fp32.
        device: Where its weights go.
        adapter: Folder or hub name of a LoRA adapter.
        settings: Others of `cotrain.config.TeacherConfig`, such as `mode`, `template`, `shuffles`.

    Raises:
        AssetError, TeacherError, ConfigError: It cannot be loaded, or not be asked like this.

    >>> from cotrain import Recommender, load_teacher
    >>> catalog = Recommender.from_pretrained("runs/NAME/student").catalog
    >>> teacher = load_teacher("smollm2-135m-instruct", catalog, num_candidates=2)
    >>> teacher.rank([[50]], [[1, 4]]).verdict.probs.shape
    torch.Size([1, 2])
    """
    wanted = {
        "model": name, "num_candidates": num_candidates, "quantization": quantization,
        "adapter": adapter, **settings,
    }  # fmt: skip
    # As from a command line, so that everything is checked, and told in the same words.
    argv = [
        f"--teacher.{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in wanted.items()
        if value is not None
    ]
    config = configuration.parse(argv).teacher
    if num_candidates < 2 or num_candidates >= len(catalog):
        raise ConfigError(
            f"num_candidates is {num_candidates}; expected 2 or more, and at most the "
            f"{len(catalog) - 1:,} items of the catalogue."
        )
    # Prompts first: what cannot be asked is found out before the weights are read.
    tokenizer, max_context_tokens = load_tokenizer(name)
    prompts = make_prompts(
        config, tokenizer, catalog.titles, catalog.categories, max_context_tokens
    )
    backbone = load_backbone(name, quantization, torch.device(device), config.compute, adapter)
    ranker = RankLLM(backbone, prompts, config)
    ranker.prepare()
    return Teacher(ranker, catalog)
