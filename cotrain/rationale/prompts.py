"""History and what was taken after it → a question for the reason, as tokens or as messages."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cotrain.data.catalog import Catalog
from cotrain.errors import ConfigError
from cotrain.teacher.segments import ItemTokens, Segments, escape, make_line
from cotrain.teacher.templates import (
    Kind,
    Section,
    categories_problems,
    cut,
    parse_sections,
    read_template,
)

_WORDS = ("noun",)


def _further_problems(sections: Mapping[str, str]) -> list[str]:
    return categories_problems(sections["target"] + sections["history_item"], sections)


RATIONALE = Kind(
    option="rationale.template",
    folder=Path(__file__).parent / "templates",
    sections={
        "system": Section(optional=_WORDS, required=False),
        "user": Section(once=("instruction", "history", "target", "question"), optional=_WORDS),
        "history_item": Section(once=("title",), optional=("categories",)),
        "target": Section(once=("title",), optional=("categories",)),
        "categories": Section(once=("categories",), required=False),
        "instruction": Section(optional=_WORDS),
        "question": Section(optional=_WORDS),
        "opening": Section(optional=_WORDS, required=False),
    },
    words=_WORDS,
    further=_further_problems,
)


@dataclass(frozen=True)
class RationaleTemplate:
    """A question's words, with the fields of `RATIONALE` still in them.

    Attributes:
        name: As the user gave it.
        user: The message; the part before {history} and {target} is the same for every row.
        history_item: One line of the history.
        target: The item that was taken.
        instruction: What {instruction} stands for: what follows.
        question: What {question} stands for: what is wanted.
        system: The system message; may be empty.
        categories: What {categories} stands for in the line of an item that has categories.
        opening: With what a model on this machine begins; part of the rationale. May be empty.
    """

    name: str
    user: str
    history_item: str
    target: str
    instruction: str
    question: str
    system: str = ""
    categories: str = ""
    opening: str = ""


assert {f.name for f in dataclasses.fields(RationaleTemplate)} == {"name", *RATIONALE.sections}


def load_template(name_or_path: str) -> RationaleTemplate:
    """A shipped template (`default`, `movies`, `products`), or one from a file.

    Raises:
        ConfigError: There is no such template, or it cannot be read; or all of its mistakes.
    """
    text = read_template(name_or_path, RATIONALE)
    return RationaleTemplate(name=name_or_path, **parse_sections(text, name_or_path, RATIONALE))


class RationalePrompts:
    """Prompts for a language model on this machine.

    Args:
        tokenizer: Of the model.
        catalog: Titles and categories.
        template: The words.
        item_noun: What an item is called, singular.
        history_length: Most recent titles shown.
        max_title_tokens: A title, and separately its categories, are cut to this many tokens.
        max_prompt_tokens: No prompt is longer; older titles go first.

    Attributes:
        prefix: The tokens with which every prompt begins.
        opening: The text with which every rationale begins; the last of a prompt.

    Raises:
        ConfigError: The longest target would not fit.
        TeacherError: A chat template that takes no user message.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        catalog: Catalog,
        template: RationaleTemplate,
        *,
        item_noun: str,
        history_length: int,
        max_title_tokens: int,
        max_prompt_tokens: int,
    ):
        self.tokenizer = tokenizer
        self.history_length = history_length
        segments = Segments(tokenizer)
        words = {"noun": item_noun}
        fields = ("history", "target")
        opening, first, middle, _, closing = cut(template.user, _words(template, words), fields)
        self._history_first = first == "history"
        self.opening = "".join(cut(template.opening, words))
        self.prefix, tail = segments.frame("".join(cut(template.system, words)), opening)
        self._middle, self._tail = segments.encode_all([middle, closing + tail + self.opening])
        self._history_line = make_line(segments, template.history_item, {})
        self._target_line = make_line(segments, template.target, {})
        self._items = ItemTokens(
            segments, catalog.titles, catalog.categories, template.categories,
            [self._history_line, self._target_line], max_title_tokens,
        )  # fmt: skip
        fixed = len(self.prefix) + len(self._middle) + len(self._tail) + len(self._target_line)
        longest = max(map(len, self._items.all_tokens(self._target_line)), default=0)
        if fixed + longest > max_prompt_tokens:
            raise ConfigError(
                f"A question for a rationale can take {fixed + longest} tokens, without any "
                f"history; the model's context leaves {max_prompt_tokens}. Lower "
                f"teacher.max_title_tokens (now {max_title_tokens}) or rationale.max_tokens."
            )
        self._room = max_prompt_tokens - (fixed - len(self._target_line))

    def build(self, history: Sequence[int], target: int) -> list[int]:
        """Token ids of one prompt.

        Args:
            history: Item indices, oldest first. The last `history_length` are used, fewer where
                the context is short: the oldest go first.
            target: Item index of what was taken next.
        """
        taken = self._items.fill(self._target_line, target)
        past = self._items.past(
            self._history_line, history, self.history_length, self._room - len(taken)
        )
        first, second = (past, taken) if self._history_first else (taken, past)
        return self.prefix + first + self._middle + second + self._tail


class RationaleMessages:
    """The same question as a system and a user message, for a server with a tokenizer of its own.

    Args:
        catalog: Titles and categories.
        template: The words; its opening is left out, since a server begins by itself.
        item_noun: What an item is called, singular.
        history_length: Most recent titles shown.
        max_title_characters: A title, and separately its categories, are cut to this length.
    """

    def __init__(
        self,
        catalog: Catalog,
        template: RationaleTemplate,
        *,
        item_noun: str,
        history_length: int,
        max_title_characters: int,
    ):
        self._catalog = catalog
        self._template = template
        self._words = {"noun": item_noun}
        self._history_length = history_length
        self._max_characters = max_title_characters

    def build(self, history: Sequence[int], target: int) -> tuple[str, str]:
        """System and user message; arguments as for `RationalePrompts.build`."""
        template = self._template
        lines = [self._line(template.history_item, i) for i in history[-self._history_length :]]
        values = _words(template, self._words) | {
            "history": "\n".join(lines), "target": self._line(template.target, target),
        }  # fmt: skip
        return "".join(cut(template.system, self._words)), "".join(cut(template.user, values))

    def _line(self, section: str, item: int) -> str:
        title = plain(self._catalog.titles[item])[: self._max_characters] or "untitled"
        categories = plain(", ".join(self._catalog.categories[item].split("|")))
        if categories:
            shown = {"categories": categories[: self._max_characters]}
            categories = "".join(cut(self._template.categories, shown))
        return "".join(cut(section, {"title": title, "categories": categories}))


def plain(text: str) -> str:
    """A title that no server's tokenizer takes for control tokens such as <|im_end|> or </s>."""
    return escape(text, ("<|", "</", "<s>", "<start_of", "<end_of", "<bos>", "<eos>", "<think"))


def _words(template: RationaleTemplate, words: Mapping[str, str]) -> dict[str, str]:
    return {
        **words,
        "instruction": "".join(cut(template.instruction, words)),
        "question": "".join(cut(template.question, words)),
    }
