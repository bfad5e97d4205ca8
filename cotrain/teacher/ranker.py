"""RankLLM: the verdict of a language model on the student's candidates.

Candidates are shown in a seeded random order, undone afterwards. More of them than a window are
ranked by windows that slide from the back; several shuffles are averaged.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cotrain.config import TeacherConfig
from cotrain.teacher.backbone import Backbone
from cotrain.teacher.bigrec import TitleReader
from cotrain.teacher.grounding import mean_states
from cotrain.teacher.item_prompts import ItemPrompts
from cotrain.teacher.memory import TokenBudget
from cotrain.teacher.passes import Passes
from cotrain.teacher.pointwise import QuestionReader
from cotrain.teacher.process_reward import ProcessReward
from cotrain.teacher.prompts import PromptBuilder
from cotrain.teacher.reading import Look, Reader
from cotrain.teacher.verdict import (
    TeacherVerdict,
    agreement_of,
    confidence_of,
    probs_of_logits,
    probs_of_ranks,
    ranks_of,
)

Rows = Sequence[Sequence[int]]
Scores = Sequence[Sequence[float]]
_Any = TypeVar("_Any")


class RankLLM:
    """Ranking by a language model: listwise, or in `bigrec` and `pointwise` without labels.

    Args:
        backbone: The frozen language model.
        prompts: Prompts for its tokenizer.
        settings: Mode, K, windows, shuffles, calibration, budget.
        temperature: τ_t of Q where there are logits.
        order_temperature: τ_r of Q where there is only an order.
        train_counts: (V,) how often each item was taken in training; needed where `bigrec` weights
            by popularity.

    Source: in `direct` mode the single-token decoding of FIRST (Reddy et al., 2024), with the
    hidden state behind the logits kept; sliding windows as in RankGPT (Sun et al., 2023), from a
    random order and not the retriever's, because that one would teach the student itself.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: PromptBuilder,
        settings: TeacherConfig,
        temperature: float = 1.0,
        order_temperature: float = 3.0,
        train_counts: np.ndarray | None = None,
    ):
        self.backbone = backbone
        self.prompts = prompts
        self.settings = settings
        self.temperature = temperature
        self.order_temperature = order_temperature
        # More than 2048 at once only leaves a CPU's cache, but writing reads all weights for every
        # token and wants many rows.
        on_cpu = backbone.device.type == "cpu"
        own = 2048 if on_cpu and settings.mode in ("direct", "pointwise") else 8192
        self.budget = TokenBudget(settings.batch_tokens or own)
        self.passes = Passes(backbone, prompts.prefix)
        if not isinstance(prompts, ItemPrompts):
            self.reader = Reader(self.passes, prompts, settings, self.budget)
        elif prompts.mode == "bigrec":
            self.reader = TitleReader(self.passes, prompts, settings, self.budget, train_counts)
        else:
            self.reader = QuestionReader(self.passes, prompts, settings, self.budget)
        if settings.search == "tree":
            self.use_search(settings)

    def use_search(self, settings: TeacherConfig) -> None:
        """From now on look for reasonings as these settings say, which are otherwise its own.

        Raises:
            TeacherError: The process reward model of a tree cannot be read, or is another
                teacher's.
        """
        self.settings = settings
        self.reader.use(settings)
        if settings.search == "tree":
            folder = Path(str(settings.process_reward)).expanduser()
            self.reader.thinker.score = ProcessReward.load(folder, self.passes, self.budget).score

    def prepare(self) -> None:
        """Do now what is done once, and would else fall to the first rows: in `bigrec` the titles
        of the catalogue are embedded.

        Raises:
            AssetError, DataError: The sentence encoder cannot be had.
        """
        if isinstance(self.reader, TitleReader):
            self.reader.grounding.vectors()

    @property
    def state_size(self) -> int:
        """H, width of the decision state."""
        return self.backbone.hidden_size

    @property
    def facts(self) -> dict[str, Any]:
        """What a report says of it."""
        names = (
            "adapter", "mode", "decision_position", "identifiers", "template", "num_candidates",
            "window", "stride", "shuffles", "calibration",
        )  # fmt: skip
        return {
            "model": self.backbone.name,
            "quantization": self.backbone.quantization,
            "parameters": self.backbone.num_parameters,
            **{name: getattr(self.settings, name) for name in names},
        }

    def cost(self, history: Sequence[int], candidates: Sequence[int]) -> int:
        """Prompt tokens of a row, by which processes share the work."""
        return len(self.prompts.build(history, candidates[: self.prompts.num_shown]))

    @property
    def wants_scores(self) -> bool:
        """Whether `rank` needs the student's scores."""
        return self.settings.mode == "bigrec" and self.settings.grounding_weight == "student"

    @property
    def identifier_bias(self) -> Tensor:
        """(W,) float32, subtracted from the logits as shown; zeros until `calibrate`."""
        return self.reader.bias

    @identifier_bias.setter
    def identifier_bias(self, bias: Tensor) -> None:
        self.reader.bias = bias

    @property
    def backoffs(self) -> list[dict[str, Any]]:
        """Each time that memory ran out and the token budget was halved."""
        return self.budget.backoffs

    def calibrate(
        self, histories: Rows, candidates: Rows, seeds: Rows, progress: str | None = None,
        scores: Scores | None = None,
    ) -> TeacherVerdict:  # fmt: skip
        """Measure, and remove from now on, what an identifier gets whatever stands behind it.

        `batch`: candidates are shown in random order, so over rows every identifier stands for the
        same mix of items, and what its mean logit has above the others' is bias. `content_free`:
        the same of prompts with "N/A" for every title, with every length of history. In the modes
        without labels a place has no bias, and none is removed.

        Arguments as for `rank`.

        Returns:
            The verdict on these rows before calibration.

        Source: Zhou et al., "Batch Calibration", ICLR 2024; Zhao et al., "Calibrate Before Use",
        ICML 2021, which left most of the bias of SmolLM2-135M in place.
        """
        self.identifier_bias = torch.zeros_like(self.identifier_bias)
        verdict, looks = self._rank(histories, candidates, seeds, progress, scores)
        if isinstance(self.prompts, ItemPrompts):
            return verdict
        if self.settings.calibration == "content_free":
            lengths = range(1, self.prompts.history_length + 1)
            looks = self.reader.read_prompts([self.prompts.build_content_free(n) for n in lengths])
        logits = [look.logits for look in looks if look.logits is not None and not look.failure]
        if logits and self.settings.calibration != "none":
            shown = torch.stack(logits)
            # Row by row, because how sure a prompt makes the teacher of any identifier is no bias.
            self.identifier_bias = (shown - shown.mean(1, keepdim=True)).mean(0)
        return verdict

    def rank(
        self, histories: Rows, candidates: Rows, seeds: Rows, progress: str | None = None,
        scores: Scores | None = None,
    ) -> TeacherVerdict:  # fmt: skip
        """Rank each row's candidates.

        Args:
            histories: B lists of item indices, oldest first.
            candidates: B lists of K item indices.
            seeds: B seeds of the orders in which candidates are shown, so that a row's prompt does
                not depend on the batch that it is in.
            progress: What a bar over the rows says; none: no bar.
            scores: The student's, B lists of K; read where `wants_scores`, else ignored.

        Returns:
            The verdict, on the CPU.

        Raises:
            TeacherError: `scores` are needed and missing.
        """
        return self._rank(histories, candidates, seeds, progress, scores)[0]

    def embed_items(self, shown: bool = False) -> Tensor:
        """(V-1, H) float32 embedding of every item: the mean last state over title and categories.

        Args:
            shown: Show a bar.
        """
        return mean_states(
            self.passes, self.budget, self.prompts.item_tokens(),
            "reading titles" if shown else None,
        )  # fmt: skip

    def _rank(
        self, histories: Rows, candidates: Rows, seeds: Rows, progress: str | None,
        scores: Scores | None,
    ) -> tuple[TeacherVerdict, list[Look]]:  # fmt: skip
        """The verdict, and every look that it is made of."""
        started = time.perf_counter()
        size, shuffles = self.settings.num_candidates, self.settings.shuffles
        # One line for each shuffle of each row, shuffles outermost.
        draws = [
            np.random.default_rng([*seed, shuffle] if shuffle else seed)
            for shuffle in range(shuffles)
            for seed in seeds
        ]
        shown = torch.from_numpy(
            np.array([draw.permutation(size) for draw in draws], np.int64).reshape(-1, size)
        )
        histories, candidates = [*histories] * shuffles, [*candidates] * shuffles
        # Candidates that no student retrieved come with empty scores.
        if scores is not None and any(len(row) != size for row in scores):
            scores = None

        def read(places: Tensor) -> list[Look]:
            asks = list(zip(histories, _shown(candidates, places), strict=True))
            if isinstance(self.reader, TitleReader) and scores is not None:
                return self.reader.read(asks, progress, _shown([*scores] * shuffles, places))
            return self.reader.read(asks, progress)

        if self.prompts.num_shown >= size:
            looks = read(shown)
            windows = [looks]
            ranks = torch.empty(shown.shape).scatter_(1, shown, self._ranks(looks))
        else:
            order, windows = self._slide(shown.clone(), draws, read)
            ranks = torch.arange(1.0, size + 1).expand(shown.shape)
            ranks = torch.empty(shown.shape).scatter_(1, order, ranks)
        logits = None
        if self.settings.mode != "generate" and len(windows) == 1:
            logits = torch.empty(shown.shape).scatter_(1, shown, self._logits(windows[0]))
        verdict = self._merge(windows, ranks, logits, shown, len(seeds))
        looks = [look for window in windows for look in window]
        verdict = dataclasses.replace(
            verdict,
            prompt_tokens=sum(look.prompt_tokens for look in looks),
            generated_tokens=sum(look.generated_tokens for look in looks),
            seconds=time.perf_counter() - started,
        )
        return verdict, looks

    def _slide(
        self,
        order: Tensor,
        draws: Sequence[np.random.Generator],
        read: Callable[[Tensor], list[Look]],
    ) -> tuple[Tensor, list[list[Look]]]:
        """Move the best to the front, window by window from the back.

        Args:
            order: (n, K) candidate positions; changed.
            draws: Shuffle each window, so that the order that an earlier one left is not shown.
            read: Looks at (n, W) of them.

        Returns:
            The candidate positions best first, and the looks of each window.
        """
        window = self.prompts.num_shown
        looks = []
        stride = self.settings.stride or max(1, window // 2)
        for start in window_starts(order.shape[1], window, stride):
            inside = order[:, start : start + window]
            if looks:
                mixed = np.array([draw.permutation(window) for draw in draws], np.int64)
                inside = inside.gather(1, torch.from_numpy(mixed).reshape(-1, window))
            looks.append(read(inside))
            # Where the teacher does not tell two apart, the shuffle does.
            best_first = self._ranks(looks[-1]).argsort(dim=1, stable=True)
            order[:, start : start + window] = inside.gather(1, best_first)
        return order, looks

    def _ranks(self, looks: Sequence[Look]) -> Tensor:
        """(n, W) ranks as shown; all equal where a look failed."""
        window = self.prompts.num_shown
        undecided = torch.full((window,), (window + 1) / 2)
        ranks = [
            undecided
            if look.failure
            else look.ranks
            if look.logits is None
            else ranks_of(look.logits - self.identifier_bias)
            for look in looks
        ]
        return _stacked(ranks, window)

    def _logits(self, looks: Sequence[Look]) -> Tensor:
        """(n, W) logits as shown, less the bias; zeros where a look failed."""
        nothing = torch.zeros(self.prompts.num_shown)
        return _stacked(
            [
                nothing
                if look.failure or look.logits is None
                else look.logits - self.identifier_bias
                for look in looks
            ],
            self.prompts.num_shown,
        )

    def _merge(
        self,
        windows: Sequence[Sequence[Look]],
        ranks: Tensor,
        logits: Tensor | None,
        shown: Tensor,
        num_rows: int,
    ) -> TeacherVerdict:
        """One verdict of all shuffles; (n, K) tensors in, candidates in the student's order."""
        shuffles, size = self.settings.shuffles, self.settings.num_candidates
        lines = list(zip(*windows, strict=True))  # the windows of each line
        causes = [next((look.failure for look in line if look.failure), None) for line in lines]
        good = torch.tensor([cause is None for cause in causes]).view(shuffles, num_rows)
        nothing = torch.zeros(self.backbone.hidden_size)
        states = _stacked(
            [
                nothing if cause or line[-1].state is None else line[-1].state
                for line, cause in zip(lines, causes, strict=True)
            ],
            self.backbone.hidden_size,
        )

        def mean(values: Tensor) -> Tensor:
            """Over the shuffles that have a verdict; zeros where none has."""
            by_shuffle = values.view(shuffles, num_rows, values.shape[1]) * good[..., None]
            return by_shuffle.sum(0) / good.sum(0).clamp(min=1)[:, None]

        valid = good.any(0)
        merged = None if logits is None else mean(logits)
        merged_ranks = ranks_of(-mean(ranks)) if merged is None else ranks_of(merged)
        probs = (
            probs_of_ranks(merged_ranks, self.order_temperature)
            if merged is None
            else probs_of_logits(merged, self.temperature)
        )
        agreement = torch.zeros(num_rows)
        if shuffles > 1:
            agreement = agreement_of(ranks.view(shuffles, num_rows, size)) * good.all(0)
        partial = [next((look.partial for look in line if look.partial), None) for line in lines]
        reasonings = [line[-1].reasoning for line in lines[:num_rows]]
        return TeacherVerdict(
            identifier_logits=merged,
            ranks=merged_ranks * valid[:, None],
            probs=probs * valid[:, None],
            decision_state=mean(states),
            valid=valid,
            confidence=confidence_of(probs) * valid,
            agreement=agreement,
            shown_order=shown[:num_rows],
            failures=_first_causes(causes, ~valid),
            partial=_first_causes(partial, valid),
            reasonings=reasonings if self.settings.mode == "cot" else (),
        )


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin that slide over a list from its back; the last begins at the front."""
    return [*range(size - window, 0, -stride), 0]


def _shown(rows: Sequence[Sequence[_Any]], places: Tensor) -> list[list[_Any]]:
    """What stands at (n, W) places of n rows."""
    lines = zip(rows, places.tolist(), strict=True)
    return [[row[place] for place in line] for row, line in lines]


def _stacked(rows: Sequence[Tensor | None], width: int) -> Tensor:
    """(n, width), also of no rows."""
    return torch.stack([row for row in rows if row is not None]) if rows else torch.empty(0, width)


def _first_causes(causes: Sequence[str | None], rows: Tensor) -> Counter:
    """Counts, over some rows, of the first cause that any shuffle of the row names."""
    counted: Counter[str] = Counter()
    for row in rows.nonzero().flatten().tolist():
        cause = next((cause for cause in causes[row :: len(rows)] if cause), None)
        if cause:
            counted[cause] += 1
    return counted
