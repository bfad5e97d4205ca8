"""One look of the teacher at a list of candidates that fits a prompt: logits or an order, and the
decision state, in each mode."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from tqdm import tqdm

from cotrain.config import TeacherConfig
from cotrain.teacher.identifiers import Identifiers
from cotrain.teacher.memory import TokenBudget
from cotrain.teacher.parsing import parse_ranking
from cotrain.teacher.passes import Passes, Steps
from cotrain.teacher.prompts import PromptBuilder
from cotrain.teacher.search import Thinker, merged, tokens_until
from cotrain.teacher.verdict import ranks_of_order
from cotrain.teacher.writing import write

# History, and all the candidates that a prompt shows, as shown.
Ask = tuple[Sequence[int], Sequence[int]]


@dataclass
class Look:
    """What the teacher said of one prompt with W candidates, as shown.

    Attributes:
        logits: (W,) float32 before calibration; None where an order was written.
        ranks: (W,) float32, 1 = best, ties share; None where there are logits.
        state: (H,) float32.
        failure: Why there is no verdict; the rest then means nothing.
        partial: Why an order stops before its end.
        reasoning: What `cot` wrote first.
        title: What `bigrec` wrote.
        prompt_tokens, generated_tokens: What it cost.
    """

    logits: Tensor | None = None
    ranks: Tensor | None = None
    state: Tensor | None = None
    failure: str | None = None
    partial: str | None = None
    reasoning: str = ""
    title: str = ""
    prompt_tokens: int = 0
    generated_tokens: int = 0


class Reader:
    """Puts prompts to the language model, in groups that fit memory, and remembers if asked to.

    Args:
        passes: The decoder, sharing the prompts' prefix.
        prompts: Prompts for its tokenizer.
        settings: Mode, decision position, memo.
        budget: Prompt tokens of one pass.

    Attributes:
        bias: (W,) float32, what each identifier's logit has above others' whatever stands behind
            it; `emit` follows the identifier that is first without it.
        memo_hits: Prompts that were answered from memory.
    """

    def __init__(
        self, passes: Passes, prompts: PromptBuilder, settings: TeacherConfig, budget: TokenBudget
    ):
        self.passes = passes
        self.prompts = prompts
        self.settings = settings
        self.budget = budget
        self.bias = torch.zeros(prompts.num_shown)
        self.memo_hits = 0
        self._memo: OrderedDict[bytes, Look] = OrderedDict()

    @cached_property
    def thinker(self) -> Thinker:
        """Writes reasonings; of the mode `cot`."""
        # Where the model goes on to the ranking by itself, its reasoning ends before it.
        answer = str(self.prompts.tokenizer.decode(self.prompts.answer))
        ranking = answer.strip().rstrip("[").strip()
        return Thinker(self.passes, self.settings, ranking, self._text_of)

    def use(self, settings: TeacherConfig) -> None:
        """Other settings of the search; what was remembered under the old ones is forgotten."""
        self.settings = self.thinker.settings = settings
        self._memo.clear()

    def read(self, asks: Sequence[Ask], progress: str | None = None) -> list[Look]:
        """One look for each ask, in their order."""
        prompts = [self.prompts.build(history, shown) for history, shown in asks]
        return self.read_prompts(prompts, progress)

    def read_prompts(self, prompts: Sequence[list[int]], progress: str | None = None) -> list[Look]:
        """The same for prompts as tokens."""
        looks = [Look(prompt_tokens=len(prompt)) for prompt in prompts]
        keys = [self._key(prompt) for prompt in prompts] if self.settings.memo_rows else []
        for row, key in enumerate(keys):
            if key in self._memo:
                looks[row] = self._memo[key]
                self._memo.move_to_end(key)
                self.memo_hits += 1
        waiting = [row for row, look in enumerate(looks) if look.state is None]
        work = self._modes()[self.settings.mode]
        bar = tqdm(
            total=len(waiting), desc=progress, unit="rows", leave=False, disable=progress is None
        )

        def on_rows(group: list[int]) -> None:
            rows = [waiting[place] for place in group]
            work([prompts[row] for row in rows], [looks[row] for row in rows])

        with bar:
            lengths = [len(prompts[row]) for row in waiting]
            for group, done in self.budget.groups(lengths, on_rows):
                if not done:
                    for place in group:
                        looks[waiting[place]].failure = "out_of_memory"
                bar.update(len(group))
        _to_cpu([looks[row] for row in waiting])
        for row in waiting:
            _check_finite(looks[row])
        if keys:
            self._remember({keys[row]: looks[row] for row in waiting if not looks[row].failure})
        return looks

    # ---- modes: each fills in its looks ---------------------------------------------------------

    def _modes(self) -> dict[str, Callable[[Sequence[list[int]], Sequence[Look]], None]]:
        return {"direct": self._direct, "generate": self._generate, "cot": self._cot}

    def _direct(self, prompts: Sequence[list[int]], looks: Sequence[Look]) -> None:
        identifiers, backbone = self.prompts.identifiers, self.passes.backbone
        emit = self.settings.decision_position == "emit"
        if identifiers.are_single_tokens and not emit:
            state = self.passes.last_states(prompts)
            first = torch.tensor(identifiers.first_tokens, device=state.device)
            logits = backbone.token_logits(state, first)
        else:
            further = max(map(len, identifiers.emitted)) + 1
            steps = Steps(self.passes, prompts, further)
            state, logits = steps.state, self._identifier_scores(steps, identifiers)
            if emit:
                state = self._emitted(steps, logits, identifiers)
        for look, row_state, row_logits in zip(looks, state, logits, strict=True):
            look.state, look.logits = row_state, row_logits

    def _identifier_scores(self, steps: Steps, identifiers: Identifiers) -> Tensor:
        """(B, W): logits of single tokens, or sums of log-probabilities over several."""
        backbone, size = self.passes.backbone, len(steps.state)
        if identifiers.are_single_tokens:
            first = torch.tensor(identifiers.first_tokens, device=steps.state.device)
            return backbone.token_logits(steps.state, first)
        of_nodes = []
        for node in identifiers.nodes:
            prefix = torch.tensor([node.prefix], dtype=torch.int64).expand(size, -1)
            state = steps.peek(prefix) if node.prefix else steps.state
            children = torch.tensor(node.children, device=state.device)
            of_nodes.append(torch.log_softmax(backbone.logits(state), dim=1)[:, children])
        return torch.stack(
            [
                torch.stack([of_nodes[node][:, child] for node, child in path]).sum(0)
                for path in identifiers.paths
            ],
            dim=1,
        )

    def _emitted(self, steps: Steps, logits: Tensor, identifiers: Identifiers) -> Tensor:
        """(B, H) states at the last token of each row's best identifier."""
        best = (logits - self.bias.to(logits.device)).argmax(1).tolist()
        states = torch.empty_like(steps.state)
        for length in {len(identifiers.emitted[place]) for place in best}:
            # Rows whose identifier has another length get any of this one, and are not read.
            some = next(tokens for tokens in identifiers.emitted if len(tokens) == length)
            ours = torch.tensor([len(identifiers.emitted[place]) == length for place in best])
            tokens = [
                identifiers.emitted[place] if mine else some
                for place, mine in zip(best, ours.tolist(), strict=True)
            ]
            after, ours = steps.peek(torch.tensor(tokens)), ours.to(states.device)
            states[ours] = after[ours]
        return states

    def _generate(self, prompts: Sequence[list[int]], looks: Sequence[Look]) -> None:
        tokenizer, texts = self.prompts.tokenizer, self.prompts.identifiers.texts

        def text_of(tokens: list[int]) -> str:
            return "[" + str(tokenizer.decode(tokens, skip_special_tokens=True))

        def done(tokens: list[int]) -> bool:
            # Cut one token short: whatever it says is then no matter of what is still to come.
            return parse_ranking(text_of(tokens[:-1]), texts, ended=False).failure in (
                None, "repeated", "unknown_identifier",
            )  # fmt: skip

        written, first_state = write(self.passes, prompts, self.prompts.answer_tokens, done)
        again: list[tuple[int, list[int]]] = []
        for row, (answer, look) in enumerate(zip(written, looks, strict=True)):
            text = text_of(answer.tokens)
            parsed = parse_ranking(text, texts, answer.ended)
            look.generated_tokens = len(answer.tokens)
            look.state = first_state[row]
            # None again where an attempt that ran out of memory had said otherwise.
            look.failure = parsed.failure if parsed.first_identifier is None else None
            if parsed.first_identifier is None:
                continue
            look.partial = parsed.failure
            look.ranks = ranks_of_order(parsed.order, len(texts))
            start, end = parsed.first_identifier
            if self.settings.decision_position == "predict":
                count = tokens_until(answer.tokens, text_of, start + 1) - 1
            else:
                count = tokens_until(answer.tokens, text_of, end)
            if count:
                again.append((row, prompts[row] + answer.tokens[:count]))
        if again:
            # Read again rather than kept: the states of every step would fill the memory.
            states = self.passes.last_states([prompt for _, prompt in again])
            for (row, _), state in zip(again, states, strict=True):
                looks[row].state = state

    def _cot(self, prompts: Sequence[list[int]], looks: Sequence[Look]) -> None:
        found = self.thinker.think(prompts)
        thoughts = [thinking.thoughts for thinking in found]
        states = self.thinker.states_after(prompts, thoughts, self.prompts.answer)
        identifiers, place = self.prompts.identifiers, 0
        several = any(len(row) > 1 for row in thoughts)
        if not identifiers.are_single_tokens or self.settings.decision_position == "emit":
            # Single thoughts, checked with the settings: read as any prompt is.
            follow = zip(prompts, thoughts, strict=True)
            self._direct([p + row[0].tokens + self.prompts.answer for p, row in follow], looks)
        else:
            first = torch.tensor(identifiers.first_tokens, device=states.device)
            logits = self.passes.backbone.token_logits(states, first)
            for row, look in zip(thoughts, looks, strict=True):
                own = slice(place, place + len(row))
                weights = [thought.score for thought in row]
                look.logits = merged(logits[own], weights) if several else logits[place]
                look.state = states[own].float().mean(0) if several else states[place]
                place += len(row)
        for prompt, thinking, look in zip(prompts, found, looks, strict=True):
            look.generated_tokens = thinking.generated
            # The verdict is read with the prompt once more.
            look.prompt_tokens = thinking.read + (len(prompt) if several else 0)
            best = max(thinking.thoughts, key=lambda thought: thought.score)
            look.reasoning = self._text_of(best.tokens).strip()

    def _text_of(self, tokens: list[int]) -> str:
        return str(self.prompts.tokenizer.decode(tokens, skip_special_tokens=True))

    def _key(self, prompt: list[int]) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(torch.tensor(prompt).numpy().tobytes())
        digest.update(self.passes.backbone.adapter_version.encode())
        if self.settings.decision_position == "emit":  # which identifier is first depends on it
            digest.update(self.bias.numpy().tobytes())
        return digest.digest()

    def _remember(self, looks: Mapping[bytes, Look]) -> None:
        # What is remembered costs nothing the next time.
        for key, look in looks.items():
            self._memo[key] = replace(look, prompt_tokens=0, generated_tokens=0)
        while len(self._memo) > self.settings.memo_rows:
            self._memo.popitem(last=False)


def _check_finite(look: Look) -> None:
    for values in (look.state, look.logits):
        # Also where nothing could be parsed: what such a state writes is no fault of its words.
        broken = values is not None and not values.isfinite().all()
        if broken and look.failure != "out_of_memory":
            look.failure = "non_finite"


def _to_cpu(looks: Sequence[Look]) -> None:
    """Move everything at once: each transfer waits for the device to finish."""
    for name in ("state", "logits"):
        having = [look for look in looks if getattr(look, name) is not None]
        if having:
            values = torch.stack([getattr(look, name) for look in having]).float().cpu()
            for look, row in zip(having, values, strict=True):
                setattr(look, name, row)
