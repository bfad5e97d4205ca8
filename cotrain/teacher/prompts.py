"""History and candidates → token ids. How a prompt is put together from pieces that are tokenised
once, and why no title can pose as part of it, is told in `cotrain.teacher.segments`.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from cotrain.config import TeacherConfig
from cotrain.errors import ConfigError
from cotrain.teacher.identifiers import make_identifiers
from cotrain.teacher.segments import ItemTokens, Segments, make_line
from cotrain.teacher.templates import Template, cut, load_template

# Before the line of the right candidate, where the teacher is to say why it is.
_HINT = "\n\nThe right one is:\n"


class PromptBuilder:
    """Assembles prompts for one tokenizer and one catalogue.

    Args:
        tokenizer: The teacher's.
        titles: Title of each item index; index 0 is padding.
        categories: Categories of each item index, joined by a bar.
        template: The words.
        num_shown: Most candidates in one prompt.
        identifiers: What candidates are called, `letters` or `numbers`.
        mode: In `cot` a prompt ends where the reasoning begins, else where the ranking does.
        item_noun: What an item is called, singular.
        history_length: Most recent titles shown.
        max_title_tokens: A title, and separately its categories, are cut to this many tokens.
        max_context_tokens: The model's limit.
        reserved_tokens: Of these, kept free after a prompt: one for an identifier, and those of a
            reasoning. What else the mode writes is added to it.
        popularity: A level of each item index, for templates that show it.

    Attributes:
        prefix: The tokens with which every prompt begins.
        identifiers: What candidates are called and the tokens by which the teacher says it.
        opening: In `cot`, the text that opens the reasoning, the last of a prompt; else empty.
        answer: In `cot`, the tokens that end the reasoning and open the ranking; else none.
        answer_tokens: Tokens of a whole ranking after the answer prefix, the end of the answer
            included, as `generate` writes it.
        max_prompt_tokens: No prompt is longer.
        shows_popularity: Whether candidates are shown with theirs.

    Raises:
        TeacherError: Identifiers that cannot be scored; a chat template that takes no user message.
        ConfigError: The longest candidates would not fit the context; more candidates than letters.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        titles: Sequence[str],
        categories: Sequence[str],
        *,
        template: Template,
        num_shown: int,
        identifiers: Literal["letters", "numbers"] = "letters",
        mode: Literal["direct", "generate", "cot"] = "direct",
        item_noun: str = "item",
        history_length: int,
        max_title_tokens: int,
        max_context_tokens: int,
        reserved_tokens: int = 1,
        popularity: Sequence[int] | None = None,
    ):
        self.tokenizer = tokenizer
        self.num_shown = num_shown
        self.history_length = history_length
        self._segments = Segments(tokenizer)
        words = {"noun": item_noun, "num_candidates": str(num_shown)}
        answer_text = "".join(cut(template.answer, words))
        tail_text = self._encode_frame(template, words, mode, answer_text)
        in_cot = mode == "cot"
        self.opening = "".join(cut(template.reasoning, words)) if in_cot else ""
        self.answer = self._segments.encode(f"\n{answer_text}") if in_cot else []
        self.identifiers = make_identifiers(
            tokenizer, self._segments.encode, f"\n{answer_text}" if in_cot else tail_text,
            identifiers, num_shown,
        )  # fmt: skip
        self._candidate_lines = [
            make_line(self._segments, template.candidate, {"identifier": text})
            for text in self.identifiers.texts
        ]
        self.shows_popularity = "popularity" in self._candidate_lines[0].fields
        self._history_line = make_line(self._segments, template.history_item, {})
        self._items = ItemTokens(
            self._segments, titles, categories, template.categories,
            [self._history_line, self._candidate_lines[0]], max_title_tokens, popularity,
        )  # fmt: skip
        ranking = "] > [".join(self.identifiers.texts)
        self.answer_tokens = len(self._segments.encode(f"{ranking}]")) + 1
        longest = max(map(len, self.identifiers.emitted))
        further = len(self.answer) + (self.answer_tokens if mode == "generate" else longest) - 1
        self.max_prompt_tokens = max_context_tokens - reserved_tokens - further
        self._check_candidates_fit(max_title_tokens, max_context_tokens)

    def build(
        self, history: Sequence[int], shown: Sequence[int], hint: int | None = None,
        labels: Sequence[int] | None = None,
    ) -> list[int]:  # fmt: skip
        """Token ids of one prompt.

        Args:
            history: Item indices, oldest first. The last `history_length` are used, fewer where
                the context is short: the oldest go first.
            shown: At most `num_shown` item indices in the order in which they are labelled.
            hint: Place among them of the right one, which is then told; none: nothing is.
            labels: Which identifiers they get, by place among `identifiers`; none: the first ones.
        """
        if len(shown) > self.num_shown:
            raise ValueError(f"{len(shown)} candidates to show; expected at most {self.num_shown}")
        lines = self._candidate_lines[: len(shown)]
        if labels is not None:
            lines = [self._candidate_lines[label] for label in labels]
        labelled = zip(lines, shown, strict=True)
        candidates = self._segments.joined([self._items.fill(*pair) for pair in labelled])
        told: list[int] = []
        if hint is not None:
            told = self._hint + self._items.fill(lines[hint], shown[hint])
        room = self.max_prompt_tokens - self._num_fixed - len(candidates) - len(told)
        past = self._items.past(self._history_line, history, self.history_length, room)
        first, second = (past, candidates) if self._history_first else (candidates, past)
        return self.prefix + first + self._middle + second + told + self._tail

    def reasoning(self, text: str) -> list[int]:
        """Tokens of a reasoning as it goes on from the end of a prompt of `cot`, escaped."""
        return self._items.words(text, " " if self.opening.strip() else "")

    def build_content_free(self, history_titles: int) -> list[int]:
        """A prompt with "N/A" for every title, without categories: what the teacher answers to it
        it says of the identifiers alone.

        Args:
            history_titles: Titles in the history.
        """
        nothing = self._items.nothing
        return self.build([nothing] * history_titles, [nothing] * self.num_shown)

    def item_tokens(self) -> list[list[int]]:
        """Title and categories of each item 1..V-1, as a candidate shows them."""
        return self._items.all_tokens(self._candidate_lines[0])

    def _encode_frame(
        self, template: Template, words: Mapping[str, str], mode: str, answer_text: str
    ) -> str:
        """Sets what does not depend on the row.

        Returns:
            The text after the last line.
        """
        instruction = template.instruction_cot if mode == "cot" else template.instruction
        values = {**words, "instruction": "".join(cut(instruction, words))}
        fields = ("history", "candidates")
        opening, first, middle, _, closing = cut(template.user, values, fields)
        self._history_first = first == "history"
        self.prefix, tail = self._segments.frame("".join(cut(template.system, words)), opening)
        tail = closing + tail
        tail += "".join(cut(template.reasoning, words)) if mode == "cot" else answer_text
        self._middle, self._tail = self._segments.encode_all([middle, tail])
        self._hint = self._segments.encode(_HINT)
        self._num_fixed = len(self.prefix) + len(self._middle) + len(self._tail)
        return tail

    def _check_candidates_fit(self, max_title_tokens: int, max_context_tokens: int) -> None:
        lengths = sorted(map(len, self.item_tokens()))
        longest = sum(lengths[-self.num_shown :])
        frame = self._num_fixed + (self.num_shown - 1) * len(self._segments.line_end)
        frame += sum(map(len, self._candidate_lines))
        frame += self.num_shown * self._items.most_popularity_tokens(self._candidate_lines[0])
        if frame + longest > self.max_prompt_tokens:
            raise ConfigError(
                f"{self.num_shown} candidates can take {frame + longest} tokens, without any "
                f"history; the teacher's context of {max_context_tokens} leaves "
                f"{self.max_prompt_tokens}. Lower teacher.max_title_tokens (now "
                f"{max_title_tokens}), teacher.window or teacher.num_candidates."
            )


def make_prompts(
    settings: TeacherConfig,
    tokenizer: PreTrainedTokenizerBase,
    titles: Sequence[str],
    categories: Sequence[str],
    max_context_tokens: int,
    popularity: Sequence[int] | None = None,
) -> PromptBuilder:
    """The prompts that a run's settings ask for; `ItemPrompts` in the modes without labels.

    Raises:
        ConfigError, TeacherError: As `load_template` and `PromptBuilder`.
    """
    if settings.mode == "bigrec" or settings.mode == "pointwise":
        # Here, because they are prompts too.
        from cotrain.teacher.item_prompts import make_item_prompts

        return make_item_prompts(
            settings, settings.mode, tokenizer, titles, categories, max_context_tokens, popularity
        )
    return PromptBuilder(
        tokenizer,
        titles,
        categories,
        template=load_template(settings.template),
        num_shown=settings.num_shown,
        identifiers=settings.identifiers,
        mode=settings.mode,
        item_noun=settings.item_noun,
        history_length=settings.history_length,
        max_title_tokens=settings.max_title_tokens,
        max_context_tokens=max_context_tokens,
        reserved_tokens=1 + (settings.reasoning_tokens if settings.mode == "cot" else 0),
        popularity=popularity,
    )
