"""RankLLM: the verdict of a language model on the student's candidates, in one forward pass."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cotrain.teacher.backbone import Backbone
from cotrain.teacher.prompts import PromptBuilder


@dataclass(frozen=True)
class TeacherVerdict:
    """What the teacher says of B rows.

    Attributes:
        identifier_logits: (B, K) float32, in the order of the candidates (not as shown), less the
            calibration.
        ranking: (B, K) int64 positions in the candidates, best first.
        decision_state: (B, H) float32, the state whose logits choose the first identifier.
        valid: (B,) bool; an invalid row's other values are zeros and mean nothing.
        confidence: (B,) float32 in [0, 1], 1 − entropy of the softmax of the logits / log K.
        shown_order: (B, K) int64, the candidate position behind each letter.
        failures: Invalid rows by cause.
        prompt_tokens: Tokens of all prompts, without padding.
        seconds: Wall-clock time of prompts and forward passes.
    """

    identifier_logits: Tensor
    ranking: Tensor
    decision_state: Tensor
    valid: Tensor
    confidence: Tensor
    shown_order: Tensor
    failures: Counter
    prompt_tokens: int
    seconds: float

    def spread(self, rows: Tensor, size: int) -> "TeacherVerdict":
        """The same verdict in a batch of `size`, of which only `rows` were asked."""

        def scatter(values: Tensor) -> Tensor:
            full = values.new_zeros(size, *values.shape[1:])
            full[rows] = values
            return full

        return TeacherVerdict(
            *map(
                scatter,
                (
                    self.identifier_logits,
                    self.ranking,
                    self.decision_state,
                    self.valid,
                    self.confidence,
                    self.shown_order,
                ),
            ),
            failures=self.failures,
            prompt_tokens=self.prompt_tokens,
            seconds=self.seconds,
        )


def plan_micro_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Rows grouped by length, longest first, so that rows × longest stays within a token budget.

    A row longer than the budget goes alone. Longest first, so that a budget too large for memory
    shows in the first group.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= batch_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class RankLLM:
    """Listwise ranking by one pass over prompts whose next token is an identifier.

    Source: the single-token decoding of FIRST (Reddy et al., 2024); here the candidates are shown
    in a random order, undone afterwards, and the hidden state behind the logits is kept.

    Args:
        backbone: The frozen language model.
        prompts: Prompts for its tokenizer.
        batch_tokens: Prompt tokens, padding included, in one forward pass.
        temperature: τ_t, for `confidence` only.

    Attributes:
        letter_bias: (K,) float32, subtracted from the logits as shown; zeros until `calibrate`.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: PromptBuilder,
        batch_tokens: int = 8192,
        temperature: float = 1.0,
    ):
        self.backbone = backbone
        self.prompts = prompts
        self.batch_tokens = batch_tokens
        self.temperature = temperature
        self.letter_bias = torch.zeros(len(prompts.letters))

    def calibrate(
        self,
        histories: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        progress: str | None = None,
    ) -> TeacherVerdict:
        """Measure and from now on remove what the teacher gives each letter regardless of content.

        Candidates are shown in random order, so over rows every letter stands for the same mix of
        items, and what its mean logit has above the others' is bias. Arguments as for `rank`.

        Returns:
            The verdict on these rows before calibration.

        Source: Zhou et al., "Batch Calibration", ICLR 2024. A content-free prompt ("N/A" for every
        title), the other usual estimate, left most of the bias of SmolLM2-135M in place.
        """
        verdict = self.rank(histories, candidates, seeds, progress)
        shown = verdict.identifier_logits.gather(1, verdict.shown_order)[verdict.valid]
        if len(shown):
            # Row by row, because how sure a prompt makes the teacher of any letter is no bias.
            self.letter_bias = self.letter_bias + (shown - shown.mean(1, keepdim=True)).mean(0)
        return verdict

    @torch.no_grad()
    def rank(
        self,
        histories: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        progress: str | None = None,
    ) -> TeacherVerdict:
        """Rank each row's candidates.

        Args:
            histories: B lists of item indices, oldest first.
            candidates: B lists of K item indices.
            seeds: B seeds of the order in which candidates are shown, so that a row's prompt does
                not depend on the batch that it is in.
            progress: What a bar over the rows says; none: no bar.

        Returns:
            The verdict, on the CPU.
        """
        started = time.perf_counter()
        size = len(self.prompts.letters)
        shown_order = np.array(
            [np.random.default_rng(seed).permutation(size) for seed in seeds], dtype=np.int64
        ).reshape(len(seeds), size)
        prompts = [
            self.prompts.build(history, [row[place] for place in order])
            for history, row, order in zip(histories, candidates, shown_order, strict=True)
        ]
        states, shown_logits = self._forward(prompts, progress)
        shown_logits = shown_logits - self.letter_bias
        order = torch.from_numpy(shown_order)
        logits = torch.empty_like(shown_logits).scatter_(1, order, shown_logits)
        valid = states.isfinite().all(1) & logits.isfinite().all(1)
        logits, states = logits * valid[:, None], states * valid[:, None]
        logits, states = logits.nan_to_num(0, 0, 0), states.nan_to_num(0, 0, 0)
        log_q = torch.log_softmax(logits / self.temperature, dim=1)
        entropy = -(log_q.exp() * log_q).sum(1)
        confidence = (1 - entropy / np.log(size)).clamp(0, 1)
        failures = Counter({"non_finite": int((~valid).sum())} if not valid.all() else {})
        return TeacherVerdict(
            identifier_logits=logits,
            ranking=logits.argsort(dim=1, descending=True, stable=True) * valid[:, None],
            decision_state=states,
            valid=valid,
            confidence=confidence * valid,
            shown_order=order,
            failures=failures,
            prompt_tokens=sum(map(len, prompts)),
            seconds=time.perf_counter() - started,
        )

    @torch.no_grad()
    def embed_items(self, shown: bool = False) -> Tensor:
        """(V-1, H) float32 embedding of every item: the mean last state over title and categories.

        Args:
            shown: Show a bar.
        """
        texts = self.prompts.item_tokens()
        vectors = torch.empty(len(texts), self.backbone.hidden_size)
        bar = tqdm(
            total=len(texts), desc="reading titles", unit="items", leave=False, disable=not shown
        )
        with bar:
            for rows in plan_micro_batches([len(text) for text in texts], self.batch_tokens):
                vectors[rows] = self.backbone.mean_states([texts[row] for row in rows]).cpu()
                bar.update(len(rows))
        return vectors

    def _forward(self, prompts: list[list[int]], progress: str | None) -> tuple[Tensor, Tensor]:
        """(B, H) decision states and (B, K) identifier logits as shown, float32 on the CPU."""
        identifiers = torch.tensor(self.prompts.identifier_ids, device=self.backbone.device)
        states = torch.empty(len(prompts), self.backbone.hidden_size)
        logits = torch.empty(len(prompts), len(identifiers))
        bar = tqdm(
            total=len(prompts), desc=progress, unit="rows", leave=False, disable=progress is None
        )
        with bar:
            for rows in plan_micro_batches([len(prompt) for prompt in prompts], self.batch_tokens):
                state = self.backbone.decision_states([prompts[row] for row in rows])
                states[rows] = state.float().cpu()
                logits[rows] = self.backbone.token_logits(state, identifiers).cpu()
                bar.update(len(rows))
        return states, logits
