"""Token ids of the pieces of a prompt: fixed text and items, such that no title can pose as part of
the prompt.

Prompts are assembled from token ids, segment by segment: fixed text is tokenised once, each title
once per item. Titles are escaped, so the tokens around a title never depend on it, and brackets,
line ends and control tokens exist only where the template put them.
"""

import html
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cotrain.teacher.chat import chat_frame
from cotrain.teacher.templates import cut

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


class Segments:
    """Fixed text as tokens, the same wherever it stands in a prompt.

    Args:
        tokenizer: The teacher's.

    Attributes:
        line_end: Tokens of a line end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._anchor = self._find_anchor()
        self.line_end = self.encode("\n")

    def _find_anchor(self) -> str:
        """Text to put before a segment so that it is read as in the middle of a text.

        Llama 2, Mistral and Phi 3 put a space before every text; without the anchor each segment of
        a prompt would begin with one. A line end merges with no other character there.
        """
        alone, line_end = self._tokens("a"), self._tokens("\n")
        return "" if self._tokens("\na") == line_end + alone else "\n"

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text in the middle of a prompt."""
        (tokens,) = self.encode_all([text])
        return tokens

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
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

    def frame(self, system: str, opening: str) -> tuple[list[int], str]:
        """What stands around a user message.

        Args:
            system: System message; may be empty.
            opening: How the user message begins, the same in every prompt.

        Returns:
            Tokens up to the end of `opening`, the beginning of the text included; and the text
            between the user message and the assistant's answer.
        """
        head, tail = chat_frame(self.tokenizer, system)
        prefix = self._tokens(head + opening) if head + opening else []
        if not self.tokenizer.chat_template:
            first = self.tokenizer("a").input_ids[:1]
            prefix = (first if first == [self.tokenizer.bos_token_id] else []) + prefix
        return prefix, tail

    def joined(self, lines: Sequence[list[int]]) -> list[int]:
        """Lines of tokens, line ends between them."""
        tokens: list[int] = []
        for index, line in enumerate(lines):
            tokens += self.line_end + line if index else line
        return tokens


@dataclass(frozen=True)
class Line:
    """What a template says of one item: fixed tokens, and between them its title and more.

    Attributes:
        fixed: One more than fields.
        fields: `title` and perhaps `categories` and `popularity`.
        lead: The space before the title, or nothing; it belongs to the title's tokens, as in
            running text.
    """

    fixed: list[list[int]]
    fields: list[str]
    lead: str

    def __len__(self) -> int:
        return sum(map(len, self.fixed))


def make_line(segments: Segments, text: str, values: Mapping[str, str]) -> Line:
    """The line of a template section, with every field filled in but those of the item."""
    cuts = cut(text, values, ("title", "categories", "popularity"))
    fixed, fields = cuts[::2], cuts[1::2]
    place = fields.index("title")
    lead = " " if fixed[place].endswith(" ") else ""
    fixed[place] = fixed[place].removesuffix(" ")
    return Line(segments.encode_all(fixed), fields, lead)


class ItemTokens:
    """Titles and categories of a catalogue as tokens.

    Args:
        segments: Of the teacher's tokenizer.
        titles: Title of each item index; index 0 is padding.
        categories: Categories of each item index, joined by a bar.
        around: Words around categories, with the field {categories}; may be empty.
        lines: That will be filled.
        max_title_tokens: A title, and separately its categories, are cut to this many tokens.
        popularity: A level of each item index, where a line shows it.

    Attributes:
        nothing: Index of an item that is called "N/A", after the real ones.
    """

    def __init__(
        self,
        segments: Segments,
        titles: Sequence[str],
        categories: Sequence[str],
        around: str,
        lines: Sequence[Line],
        max_title_tokens: int,
        popularity: Sequence[int] | None = None,
    ):
        self.nothing = len(titles)
        self._segments = segments
        self._max_tokens = max_title_tokens
        tokenizer = segments.tokenizer
        # Runs of spaces or line ends that are tokens of their own cannot occur in escaped text.
        # The base class does not declare this method that every tokenizer has.
        added: dict[str, int] = tokenizer.get_added_vocab()  # pyright: ignore
        self._controls = controls = [
            text
            for text in {*added, *tokenizer.all_special_tokens}
            if len(text) > 1 and not any(char.isspace() for char in text)
        ]
        self._control_ids = {*added.values(), *tokenizer.all_special_ids}

        names = [*(escape(title, controls) or "untitled" for title in titles), _NOTHING]
        self._titles = {lead: self._encode(names, lead) for lead in {line.lead for line in lines}}
        self._categories: list[list[int]] = [[] for _ in names]
        if around:
            self._encode_categories(
                around, [escape(", ".join(text.split("|")), controls) for text in categories]
            )

        self._popularity: list[list[int]] = []
        if any("popularity" in line.fields for line in lines):
            if popularity is None:
                raise ValueError("the template shows {popularity}, and no levels were given")
            levels = [segments.encode(str(level)) for level in range(max(popularity) + 1)]
            self._popularity = [levels[level] for level in popularity] + [levels[0]]

    def _encode_categories(self, around: str, lists: Sequence[str]) -> None:
        having = [item for item, text in enumerate(lists) if text]
        before, _, after = cut(around, {}, ("categories",))
        lead = " " if before.endswith(" ") else ""
        opening, closing = self._segments.encode_all([before.removesuffix(" "), after])
        tokenised = self._encode([lists[item] for item in having], lead)
        for item, tokens in zip(having, tokenised, strict=True):
            self._categories[item] = opening + tokens + closing

    def _encode(self, texts: Sequence[str], lead: str) -> list[list[int]]:
        return [
            [token for token in tokens if token not in self._control_ids][: self._max_tokens]
            for tokens in self._segments.encode_all([lead + text for text in texts])
        ]

    def words(self, text: str, lead: str) -> list[int]:
        """Tokens of any text, escaped as a title is, behind a space or nothing."""
        (tokens,) = self._segments.encode_all([lead + escape(text, self._controls)])
        return [token for token in tokens if token not in self._control_ids]

    def fill(self, line: Line, item: int) -> list[int]:
        """The line of one item."""
        values = {
            "title": self._titles[line.lead],
            "categories": self._categories,
            "popularity": self._popularity,
        }
        tokens = line.fixed[0].copy()
        for field, after in zip(line.fields, line.fixed[1:], strict=True):
            tokens += values[field][item] + after
        return tokens

    def past(
        self, line: Line, history: Sequence[int], length: int, room: int | None = None
    ) -> list[int]:
        """The last items of a history, oldest first, a line each.

        Args:
            line: Of one item.
            history: Item indices, oldest first.
            length: Most items shown.
            room: Most tokens; where they do not do, the oldest items go first. None: no limit.
        """
        lines: list[list[int]] = []
        for item in reversed(history[-length:]):
            tokens = self.fill(line, item)
            if room is not None:
                room -= len(tokens) + (len(self._segments.line_end) if lines else 0)
                if room < 0:
                    break
            lines.append(tokens)
        return self._segments.joined(lines[::-1])

    def most_popularity_tokens(self, line: Line) -> int:
        """Tokens of a popularity at most, where this line shows it."""
        shown = line.fields.count("popularity")
        return shown * max(map(len, self._popularity), default=0)

    def all_tokens(self, line: Line) -> list[list[int]]:
        """Title and categories of each item 1..V-1, as this line shows them."""
        titles = self._titles[line.lead]
        return [titles[item] + self._categories[item] for item in range(1, self.nothing)]
