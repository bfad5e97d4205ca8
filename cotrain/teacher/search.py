"""Several reasonings for a row: drawn and averaged (self-consistency), or grown step by step and
cut back by a process reward model (a beam search over steps).

What is drawn depends on the row's prompt alone, not on the rows it is with.

Source: Wang et al., "Self-Consistency Improves Chain of Thought Reasoning", ICLR 2023, on verdicts
rather than votes; Snell et al., "Scaling LLM Test-Time Compute Optimally", 2024, beam search
against a process reward model.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cotrain.config import TeacherConfig
from cotrain.teacher.passes import Passes, Steps
from cotrain.teacher.steps import split_steps
from cotrain.teacher.writing import Sampling, write

# (N,) scores in [0, 1] of prompts that go on to the end of a step.
Score = Callable[[Sequence[list[int]]], Tensor]


@dataclass
class Thought:
    """A reasoning, or the beginning of one.

    Attributes:
        tokens: What is kept of it, without the opening of the ranking.
        generated: Tokens that were written when it was last added to, also those not kept.
        finished: Whether it came to its end.
        score: By the process reward model; 1 without one.
    """

    tokens: list[int]
    generated: int
    finished: bool
    score: float = 1.0


@dataclass
class Thinking:
    """What was thought of one prompt.

    Attributes:
        thoughts: Those that count, one or more.
        generated: Tokens written, also for what was dropped.
        read: Prompt tokens read for it, each pass counted.
    """

    thoughts: list[Thought]
    generated: int
    read: int


class Thinker:
    """Writes reasonings for prompts of the mode `cot`.

    Args:
        passes: The decoder.
        settings: How they are looked for.
        ranking: The text that opens the ranking; where the model goes on to it by itself, its
            reasoning ends. Nothing: only where it stops.
        text_of: Text of tokens.
        score: For the search by trees.
    """

    def __init__(
        self, passes: Passes, settings: TeacherConfig, ranking: str,
        text_of: Callable[[list[int]], str], score: Score | None = None,
    ):  # fmt: skip
        self.passes, self.settings = passes, settings
        self.ranking, self.text_of, self.score = ranking, text_of, score
        ends = [ranking, "\n\n" if settings.reasoning_end == "paragraph" else ""]
        self._ends = [end for end in ends if end]

    def think(self, prompts: Sequence[list[int]]) -> list[Thinking]:
        """The reasonings of each prompt, as the settings look for them."""
        if self.settings.search == "tree":
            return self._tree(prompts)
        if self.settings.search == "self_consistency":
            temperature, count = self.settings.search_temperature, self.settings.samples
            found = self.draw(prompts, count, temperature)
        else:
            written, _ = write(self.passes, prompts, self.settings.reasoning_tokens, self._over)
            found = [[self._thought(row.tokens, row.ended)] for row in written]
        return [
            Thinking(thoughts, sum(thought.generated for thought in thoughts), len(prompt))
            for prompt, thoughts in zip(prompts, found, strict=True)
        ]

    def draw(
        self, prompts: Sequence[list[int]], count: int, temperature: float, top_p: float = 1.0,
        salt: int = 0,
    ) -> list[list[Thought]]:  # fmt: skip
        """`count` reasonings of each prompt; another `salt` draws others."""
        seeds = [(*seed_of(prompt), salt, copy) for prompt in prompts for copy in range(count)]
        written, _ = write(
            self.passes, prompts, self.settings.reasoning_tokens, self._over,
            Sampling(temperature, top_p, seeds), count,
        )  # fmt: skip
        thoughts = [self._thought(row.tokens, row.ended) for row in written]
        return [thoughts[start : start + count] for start in range(0, len(thoughts), count)]

    def states_after(
        self, prompts: Sequence[list[int]], thoughts: Sequence[Sequence[Thought]], answer: list[int]
    ) -> Tensor:
        """(N, H) state after each thought and the answer prefix; each prompt is read once for all
        of its thoughts."""
        suffixes = [thought.tokens + answer for row in thoughts for thought in row]
        if all(len(row) == 1 for row in thoughts):
            return self.passes.last_states(
                [prompt + suffix for prompt, suffix in zip(prompts, suffixes, strict=True)]
            )
        steps = Steps(self.passes, prompts, max(map(len, suffixes)))
        counts = torch.tensor([len(row) for row in thoughts])
        steps.keep(torch.arange(len(prompts)).repeat_interleave(counts))
        return steps.read(suffixes)

    # ---- search by trees ------------------------------------------------------------------------

    def _tree(self, prompts: Sequence[list[int]]) -> list[Thinking]:
        settings, score = self.settings, self.score
        assert score is not None  # checked with the settings
        beams = [[Thought([], 0, False)] for _ in prompts]
        generated, read = [0] * len(prompts), [0] * len(prompts)
        for depth in range(settings.search_steps):
            open_ones = [
                (row, thought)
                for row, beam in enumerate(beams)
                for thought in beam
                if not thought.finished
            ]
            if not open_ones:
                break
            # The first step has one beginning to go on from, and has to fill the whole beam.
            branches = settings.branches * (settings.samples if depth == 0 else 1)
            grown = self._grow(prompts, open_ones, branches, depth)
            going = [
                (row, thought)
                for (row, _), children in zip(open_ones, grown, strict=True)
                for thought in children
            ]
            values = score([prompts[row] + thought.tokens for row, thought in going])
            pools: list[list[Thought]] = [
                [thought for thought in beam if thought.finished] for beam in beams
            ]
            for (row, thought), value in zip(going, values.tolist(), strict=True):
                thought.score = value
                pools[row].append(thought)
                # Once to be scored; what was read to write it is counted with its parent.
                generated[row] += thought.generated
                read[row] += len(prompts[row]) + len(thought.tokens)
            for row, thought in open_ones:
                read[row] += len(prompts[row]) + len(thought.tokens)
            beams = [_best(pool, settings.samples) for pool in pools]
        return [Thinking(*row) for row in zip(beams, generated, read, strict=True)]

    def _grow(
        self, prompts: Sequence[list[int]], open_ones: Sequence[tuple[int, Thought]],
        branches: int, depth: int,
    ) -> list[list[Thought]]:  # fmt: skip
        """Each of these, one step longer, in so many ways."""
        settings, tokenizer = self.settings, self.passes.backbone.tokenizer
        starts = [prompts[row] + thought.tokens for row, thought in open_ones]
        left = settings.reasoning_tokens - min(len(thought.tokens) for _, thought in open_ones)
        seeds = [(*seed_of(start), depth, branch) for start in starts for branch in range(branches)]

        def over(tokens: list[int]) -> bool:
            return len(split_steps(tokenizer, tokens)) > 1 or self._over(tokens)

        written, _ = write(
            self.passes, starts, max(1, left), over,
            Sampling(settings.search_temperature, 1.0, seeds), branches,
        )  # fmt: skip
        grown: list[list[Thought]] = []
        for place, (_, parent) in enumerate(open_ones):
            children = []
            # Others may have more left, and had this one written further than it is to go.
            own = settings.reasoning_tokens - len(parent.tokens)
            for row in written[place * branches : (place + 1) * branches]:
                whole = self._thought(row.tokens[:own], row.ended)
                ends = split_steps(tokenizer, whole.tokens)
                more = len(ends) > 1
                tokens = parent.tokens + (whole.tokens[: ends[0]] if more else whole.tokens)
                full = len(tokens) >= settings.reasoning_tokens
                children.append(Thought(tokens, whole.generated, full or not more))
            grown.append(children)
        return grown

    # ---- one reasoning --------------------------------------------------------------------------

    def _over(self, tokens: list[int]) -> bool:
        text = self.text_of(tokens)
        return any(end in text for end in self._ends)

    def _thought(self, tokens: list[int], ended: bool) -> Thought:
        text, kept = self.text_of(tokens), tokens
        places = [text.index(end) for end in self._ends if end in text]
        if places:
            before = text[: min(places)].rstrip()
            kept = tokens[: tokens_until(tokens, self.text_of, len(before))]
        return Thought(kept, len(tokens), ended or bool(places))


def _best(pool: list[Thought], count: int) -> list[Thought]:
    """The best scored, equal reasonings once."""
    different = {tuple(thought.tokens): thought for thought in pool}
    return sorted(different.values(), key=lambda thought: -thought.score)[:count]


def seed_of(prompt: Sequence[int]) -> tuple[int, int]:
    """A seed that is the prompt's own."""
    digest = hashlib.blake2b(torch.tensor(list(prompt)).numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")


def merged(logits: Tensor, weights: Sequence[float]) -> Tensor:
    """(W,) logits whose softmax is the weighted mean of those of (m, W)."""
    shares = torch.tensor(weights, device=logits.device, dtype=logits.dtype)
    shares = torch.full_like(shares, 1 / len(shares)) if shares.sum() <= 0 else shares
    log_shares = (shares / shares.sum()).log()
    return torch.logsumexp(torch.log_softmax(logits, 1) + log_shares[:, None], 0)


def tokens_until(tokens: list[int], text_of: Callable[[list[int]], str], length: int) -> int:
    """How many tokens it takes until the text has this many characters."""
    return next(
        (count for count in range(len(tokens)) if len(text_of(tokens[:count])) >= length),
        len(tokens),
    )
