"""History and candidates → token ids, such that no title can pose as part of the prompt.

A prompt is assembled from token ids, segment by segment: fixed text is tokenised once, each title
once per item. Titles are escaped, so the tokens around a title never depend on it, and brackets,
line ends and control tokens exist only where the template put them.
"""

import html
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from cotrain.config import TeacherConfig
from cotrain.errors import ConfigError
from cotrain.teacher.chat import chat_frame
from cotrain.teacher.identifiers import make_identifiers
from cotrain.teacher.templates import Template, cut, load_template

_NOTHING = "N/A"
_BRACKETS = str.maketrans(
    {"[": "(", "]": ")", "［": "(", "］": ")", "【": "(", "】": ")", "﹇": "(", "﹈": ")"}
)


def escape(text: str, control_strings: Sequence[str] = ()) -> str:
    """A title as it may stand in a prompt.

    HTML entities are decoded; control, format (such as right-to-left marks) and unassigned
    characters and all line ends become spaces; square brackets, which mark identifiers, become
    round; each control string of the tokenizer is broken by a space.
    """
    text = html.unescape(text)
    text = "".join(" " if unicodedata.category(char)[0] == "C" else char for char in text)
    text = " ".join(text.translate(_BRACKETS).split())
    while any(control in text for control in control_strings):
        for control in control_strings:
            text = text.replace(control, f"{control[0]} {control[1:]}")
    return text


@dataclass(frozen=True)
class _Line:
    """What the template says of one item: fixed tokens, and between them its title and categories.

    Attributes:
        fixed: One more than fields.
        fields: `title` and perhaps `categories`.
        lead: The space before the title, or nothing; it belongs to the title's tokens, as in
            running text.
    """

    fixed: list[list[int]]
    fields: list[str]
    lead: str

    def __len__(self) -> int:
        return sum(map(len, self.fixed))


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

    Attributes:
        prefix: The tokens with which every prompt begins.
        identifiers: What candidates are called and the tokens by which the teacher says it.
        answer: In `cot`, the tokens that end the reasoning and open the ranking; else none.
        answer_tokens: Tokens of a whole ranking after the answer prefix, the end of the answer
            included, as `generate` writes it.
        max_prompt_tokens: No prompt is longer.

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
    ):
        self.tokenizer = tokenizer
        self.num_shown = num_shown
        self.history_length = history_length
        self._nothing = len(titles)  # an item of its own, after the real ones
        self._anchor = self._find_anchor()
        words = {"noun": item_noun, "num_candidates": str(num_shown)}
        answer_text = "".join(cut(template.answer, words))
        tail_text = self._encode_frame(template, words, mode, answer_text)
        in_cot = mode == "cot"
        self.answer = self._encode(f"\n{answer_text}") if in_cot else []
        self.identifiers = make_identifiers(
            tokenizer, self._encode, f"\n{answer_text}" if in_cot else tail_text, identifiers,
            num_shown,
        )  # fmt: skip
        self._encode_lines(template)
        self._encode_items(template, titles, categories, max_title_tokens)
        ranking = "] > [".join(self.identifiers.texts)
        self.answer_tokens = len(self._encode(f"{ranking}]")) + 1
        longest = max(map(len, self.identifiers.emitted))
        further = len(self.answer) + (self.answer_tokens if mode == "generate" else longest) - 1
        self.max_prompt_tokens = max_context_tokens - reserved_tokens - further
        self._check_candidates_fit(max_title_tokens, max_context_tokens)

    def build(self, history: Sequence[int], shown: Sequence[int]) -> list[int]:
        """Token ids of one prompt.

        Args:
            history: Item indices, oldest first. The last `history_length` are used, fewer where
                the context is short: the oldest go first.
            shown: At most `num_shown` item indices in the order in which they are labelled.
        """
        if len(shown) > self.num_shown:
            raise ValueError(f"{len(shown)} candidates to show; expected at most {self.num_shown}")
        labelled = zip(self._candidate_lines, shown, strict=False)
        candidates = self._joined([self._filled(line, item) for line, item in labelled])
        room = self.max_prompt_tokens - self._num_fixed - len(candidates)
        lines: list[list[int]] = []
        for item in reversed(history[-self.history_length :]):
            line = self._filled(self._history_line, item)
            room -= len(line) + (len(self._line_end) if lines else 0)
            if room < 0:
                break
            lines.append(line)
        past = self._joined(lines[::-1])
        first, second = (past, candidates) if self._history_first else (candidates, past)
        return self.prefix + first + self._middle + second + self._tail

    def build_content_free(self, history_titles: int) -> list[int]:
        """A prompt with "N/A" for every title, without categories: what the teacher answers to it
        it says of the identifiers alone.

        Args:
            history_titles: Titles in the history.
        """
        return self.build([self._nothing] * history_titles, [self._nothing] * self.num_shown)

    def item_tokens(self) -> list[list[int]]:
        """Title and categories of each item 1..V-1, as a candidate shows them."""
        titles = self._titles[self._candidate_lines[0].lead]
        return [titles[item] + self._categories[item] for item in range(1, self._nothing)]

    # ---- tokens of fixed text -------------------------------------------------------------------

    def _find_anchor(self) -> str:
        """Text to put before a segment so that it is read as in the middle of a text.

        Llama 2, Mistral and Phi 3 put a space before every text; without the anchor each segment of
        a prompt would begin with one. A line end merges with no other character there.
        """
        alone, line_end = self._tokens("a"), self._tokens("\n")
        return "" if self._tokens("\na") == line_end + alone else "\n"

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _encode(self, text: str) -> list[int]:
        """Tokens of a text in the middle of a prompt."""
        (tokens,) = self._encode_all([text])
        return tokens

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for many texts, a good deal faster than one by one."""
        if not texts:
            return []
        anchor = self._tokens(self._anchor) if self._anchor else []
        read = self.tokenizer(
            [self._anchor + text for text in texts],
            add_special_tokens=False,
            verbose=False,  # about long texts: titles are cut afterwards
        ).input_ids
        return [
            tokens[len(anchor) :] if tokens[: len(anchor)] == anchor else self._tokens(text)
            for tokens, text in zip(read, texts, strict=True)
        ]

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
        head, tail = chat_frame(self.tokenizer, "".join(cut(template.system, words)))
        tail = closing + tail
        tail += "".join(cut(template.reasoning, words)) if mode == "cot" else answer_text
        self.prefix = self._tokens(head + opening) if head + opening else []
        if not self.tokenizer.chat_template:
            self.prefix = _bos(self.tokenizer) + self.prefix
        self._middle, self._tail = self._encode_all([middle, tail])
        self._line_end = self._encode("\n")
        self._num_fixed = len(self.prefix) + len(self._middle) + len(self._tail)
        return tail

    def _joined(self, lines: Sequence[list[int]]) -> list[int]:
        tokens: list[int] = []
        for index, line in enumerate(lines):
            tokens += self._line_end + line if index else line
        return tokens

    # ---- tokens of items ------------------------------------------------------------------------

    def _encode_lines(self, template: Template) -> None:
        self._candidate_lines = [
            self._line(template.candidate, {"identifier": text}) for text in self.identifiers.texts
        ]
        self._history_line = self._line(template.history_item, {})

    def _line(self, text: str, values: Mapping[str, str]) -> _Line:
        cuts = cut(text, values, ("title", "categories"))
        fixed, fields = cuts[::2], cuts[1::2]
        place = fields.index("title")
        lead = " " if fixed[place].endswith(" ") else ""
        fixed[place] = fixed[place].removesuffix(" ")
        return _Line(self._encode_all(fixed), fields, lead)

    def _filled(self, line: _Line, item: int) -> list[int]:
        values = {"title": self._titles[line.lead], "categories": self._categories}
        tokens = line.fixed[0].copy()
        for field, after in zip(line.fields, line.fixed[1:], strict=True):
            tokens += values[field][item] + after
        return tokens

    def _encode_items(
        self,
        template: Template,
        titles: Sequence[str],
        categories: Sequence[str],
        max_title_tokens: int,
    ) -> None:
        # Runs of spaces or line ends that are tokens of their own cannot occur in escaped text.
        # The base class does not declare this method that every tokenizer has.
        added: dict[str, int] = self.tokenizer.get_added_vocab()  # pyright: ignore
        controls = [
            text
            for text in {*added, *self.tokenizer.all_special_tokens}
            if len(text) > 1 and not any(char.isspace() for char in text)
        ]
        control_ids = {*added.values(), *self.tokenizer.all_special_ids}

        def encode(texts: Sequence[str], lead: str) -> list[list[int]]:
            tokenised = self._encode_all([lead + text for text in texts])
            return [
                [token for token in tokens if token not in control_ids][:max_title_tokens]
                for tokens in tokenised
            ]

        names = [*(escape(title, controls) or "untitled" for title in titles), _NOTHING]
        leads = {self._history_line.lead, self._candidate_lines[0].lead}
        self._titles = {lead: encode(names, lead) for lead in leads}

        self._categories: list[list[int]] = [[] for _ in names]
        lists = [escape(", ".join(text.split("|")), controls) for text in categories]
        having = [item for item, text in enumerate(lists) if text]
        before, _, after = cut(template.categories, {}, ("categories",))
        lead = " " if before.endswith(" ") else ""
        opening, closing = self._encode_all([before.removesuffix(" "), after])
        for item, tokens in zip(having, encode([lists[i] for i in having], lead), strict=True):
            self._categories[item] = opening + tokens + closing

    def _check_candidates_fit(self, max_title_tokens: int, max_context_tokens: int) -> None:
        lengths = sorted(map(len, self.item_tokens()))
        longest = sum(lengths[-self.num_shown :])
        frame = self._num_fixed + (self.num_shown - 1) * len(self._line_end)
        frame += sum(map(len, self._candidate_lines))
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
) -> PromptBuilder:
    """The prompts that a run's settings ask for.

    Raises:
        ConfigError, TeacherError: As `load_template` and `PromptBuilder`.
    """
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
    )


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    first = tokenizer("a").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []
