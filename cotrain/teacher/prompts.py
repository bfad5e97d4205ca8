"""History and candidates → token ids, such that no title can pose as part of the prompt.

A prompt is assembled from token ids, segment by segment: fixed text is tokenised once, each title
once per item. Titles are escaped, so the tokens around a title never depend on it, and brackets,
line ends and control tokens exist only where the template put them.
"""

import html
import string
import unicodedata
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from cotrain.errors import ConfigError, TeacherError, some_of

OPENING = "These are the last {noun}s that a user chose, oldest first:\n"
QUESTION = "\nThe user's next {noun} is one of these candidates:\n"
INSTRUCTION = (
    "\nRank the candidates by how likely the user is to choose them next, most likely first. "
    "Answer with their letters in brackets, joined by >."
)
ANSWER_PREFIX = "Ranking: ["
_SENTINEL = "@@cotrain-prompt@@"
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


class PromptBuilder:
    """Assembles prompts for one tokenizer and one catalogue.

    Args:
        tokenizer: The teacher's.
        titles: Title of each item index; index 0 is padding.
        categories: Categories of each item index, joined by a bar.
        num_candidates: K.
        item_noun: What an item is called, singular.
        history_length: Most recent titles shown.
        max_title_tokens: A title, and separately its categories, are cut to this many tokens.
        max_context_tokens: The model's limit; one token is left for the identifier.

    Attributes:
        identifier_ids: The token of each identifier A, B, … in the place where it is predicted.

    Raises:
        TeacherError: Identifiers that are not single tokens in context.
        ConfigError: The longest K candidates would not fit the context.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        titles: Sequence[str],
        categories: Sequence[str],
        *,
        num_candidates: int,
        item_noun: str,
        history_length: int,
        max_title_tokens: int,
        max_context_tokens: int,
    ):
        self.tokenizer = tokenizer
        self.history_length = history_length
        self.max_prompt_tokens = max_context_tokens - 1
        self.letters = string.ascii_uppercase[:num_candidates]
        head, tail = _chat_frame(tokenizer)
        self._head = self._encode(head + OPENING.format(noun=item_noun))
        if not tokenizer.chat_template:
            self._head = _bos(tokenizer) + self._head
        self._question = self._encode(QUESTION.format(noun=item_noun))
        self._tail = self._encode(INSTRUCTION + tail + ANSWER_PREFIX)
        self._labels = [self._encode(f"[{letter}]") for letter in self.letters]
        self._bullet, self._separator = self._encode("-"), self._encode(" |")
        self._line_end = self._encode("\n")
        self.identifier_ids = self._single_token_identifiers(INSTRUCTION + tail + ANSWER_PREFIX)
        self._titles, self._categories = self._encode_items(titles, categories, max_title_tokens)
        self._check_candidates_fit(max_title_tokens)

    def build(self, history: Sequence[int], shown: Sequence[int]) -> list[int]:
        """Token ids of one prompt.

        Args:
            history: Item indices, oldest first. The last `history_length` are used, fewer where
                the context is short: the oldest go first.
            shown: K item indices in the order in which they are lettered.
        """
        candidates = self._question.copy()
        for label, item in zip(self._labels, shown, strict=True):
            candidates += label + self._candidate(item) + self._line_end
        room = self.max_prompt_tokens - len(self._head) - len(candidates) - len(self._tail)
        lines: list[list[int]] = []
        for item in reversed(history[-self.history_length :]):
            line = self._bullet + self._titles[item] + self._line_end
            if len(line) > room:
                break
            room -= len(line)
            lines.append(line)
        past = [token for line in reversed(lines) for token in line]
        return self._head + past + candidates + self._tail

    def item_tokens(self) -> list[list[int]]:
        """Title and categories of each item 1..V-1, as a candidate shows them."""
        return [self._candidate(item) for item in range(1, len(self._titles))]

    def _candidate(self, item: int) -> list[int]:
        categories = self._categories[item]
        return self._titles[item] + (self._separator + categories if categories else [])

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _single_token_identifiers(self, context: str) -> list[int]:
        before = self._encode(context)
        ids, broken = [], []
        for letter in self.letters:
            after = self._encode(f"{context}{letter}]")
            token = self.tokenizer.decode(after[len(before) : len(before) + 1])
            if after[: len(before)] == before and str(token).strip() == letter:
                ids.append(after[len(before)])
            else:
                broken.append(letter)
        if broken:
            raise TeacherError(
                f"The tokenizer of the teacher does not keep {some_of(broken, 26)} as single "
                f"tokens after {ANSWER_PREFIX!r}, so one pass cannot score them. Choose another "
                "teacher.model, or a teacher.num_candidates that stops before the first of them."
            )
        return ids

    def _encode_items(
        self, titles: Sequence[str], categories: Sequence[str], max_tokens: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        # Runs of spaces or line ends that are tokens of their own cannot occur in escaped text.
        # The base class does not declare this method that every tokenizer has.
        added: dict[str, int] = self.tokenizer.get_added_vocab()  # pyright: ignore
        controls = [
            text
            for text in {*added, *self.tokenizer.all_special_tokens}
            if len(text) > 1 and not any(char.isspace() for char in text)
        ]
        control_ids = {*added.values(), *self.tokenizer.all_special_ids}

        def encode(text: str) -> list[int]:
            # The space binds a title to its label as in running text.
            tokens = self._encode(f" {text}") if text else []
            return [token for token in tokens if token not in control_ids][:max_tokens]

        return (
            [encode(escape(title, controls) or "untitled") for title in titles],
            [encode(escape(", ".join(text.split("|")), controls)) for text in categories],
        )

    def _check_candidates_fit(self, max_title_tokens: int) -> None:
        lengths = sorted(len(self._candidate(item)) for item in range(1, len(self._titles)))
        longest = sum(lengths[-len(self.letters) :])
        frame = len(self._head) + len(self._question) + len(self._tail)
        frame += sum(len(label) + len(self._line_end) for label in self._labels)
        if frame + longest > self.max_prompt_tokens:
            raise ConfigError(
                f"{len(self.letters)} candidates can take {frame + longest} tokens, without any "
                f"history; the teacher's context leaves {self.max_prompt_tokens}. Lower "
                f"teacher.max_title_tokens (now {max_title_tokens}) or teacher.num_candidates."
            )


def _chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Text before and after a user message, up to where the assistant begins."""
    if not tokenizer.chat_template:
        return "", "\n"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": _SENTINEL}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,  # templates that know it close the thinking block at once
    )
    head, _, tail = str(rendered).partition(_SENTINEL)
    return head, tail


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    first = tokenizer("a").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []
