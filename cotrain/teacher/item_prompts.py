"""Prompts in which no candidate has a label: for the title of the next item (`bigrec`), or about
one candidate for yes or no (`pointwise`)."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from cotrain.config import TeacherConfig
from cotrain.errors import ConfigError, TeacherError
from cotrain.teacher.identifiers import Identifiers
from cotrain.teacher.item_templates import ItemTemplate, Mode, load_item_template
from cotrain.teacher.prompts import PromptBuilder
from cotrain.teacher.segments import ItemTokens, Line, Segments, make_line
from cotrain.teacher.templates import cut


class ItemPrompts(PromptBuilder):
    """Assembles prompts without labels; takes the place of `PromptBuilder` in these modes.

    Args:
        tokenizer: The teacher's.
        titles: Title of each item index; index 0 is padding.
        categories: Categories of each item index, joined by a bar.
        template: The words.
        mode: What is asked for.
        num_candidates: K, as many as a look scores.
        item_noun: What an item is called, singular.
        history_length: Most recent titles shown.
        max_title_tokens: A title, and separately its categories, are cut to this many tokens.
        title_tokens: A written title is cut to this many.
        max_context_tokens: The model's limit.
        popularity: A level of each item index, for templates that show it.

    Attributes:
        template: The words.
        answer_ids: In `pointwise`, the tokens of Yes and No where the answer is due; else none.

    Raises:
        TeacherError: Yes and No cannot be told apart by one token; a chat template that takes no
            user message.
        ConfigError: The longest question would not fit the context.
    """

    # The constructor of rankings is left out on purpose: it labels candidates and sees that all of
    # them fit one prompt, neither of which is so here.
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        titles: Sequence[str],
        categories: Sequence[str],
        *,
        template: ItemTemplate,
        mode: Mode,
        num_candidates: int,
        item_noun: str,
        history_length: int,
        max_title_tokens: int,
        title_tokens: int,
        max_context_tokens: int,
        popularity: Sequence[int] | None = None,
    ):
        self.tokenizer, self.template, self.mode = tokenizer, template, mode
        self.num_shown, self.history_length = num_candidates, history_length
        self.identifiers = Identifiers((), (), (), ())
        self.opening, self.answer, self.answer_tokens = "", [], 0
        self._title_tokens, self._max_title_tokens = title_tokens, max_title_tokens
        self._segments = Segments(tokenizer)
        words = {"noun": item_noun}
        asks_title = mode == "bigrec"
        message = template.title if asks_title else template.yes_no
        answer = template.title_answer if asks_title else template.yes_no_answer
        answer, _, _ = cut(answer, words, ("title", "answer"))
        self._lead = " " if answer.endswith(" ") else ""
        fields = ("history",) if asks_title else ("history", "candidate")
        opening, first, *rest = cut(message, words, fields)
        middle, closing = "" if asks_title else rest[0], rest[-1]
        self._history_first = first == "history"
        system = "".join(cut(template.system, words))
        self.prefix, tail = self._segments.frame(system, opening)
        context = closing + tail + answer.removesuffix(" ")
        self._middle, self._tail = self._segments.encode_all([middle, context])
        self._history_line = make_line(self._segments, template.history_item, {})
        self._title_line = Line([[], []], ["title"], self._lead)
        self._candidate_line = (
            self._title_line if asks_title else make_line(self._segments, template.candidate, {})
        )
        self._items = ItemTokens(
            self._segments, titles, categories, template.categories,
            [self._history_line, self._candidate_line, self._title_line], max_title_tokens,
            popularity,
        )  # fmt: skip
        self.answer_ids: tuple[int, ...] = () if asks_title else self._answers(context)
        self.max_prompt_tokens = max_context_tokens - (title_tokens if asks_title else 1)
        self._num_fixed = len(self.prefix) + len(self._middle) + len(self._tail)
        self._check_fits(max_context_tokens)

    def build(
        self, history: Sequence[int], shown: Sequence[int], hint: int | None = None,
        labels: Sequence[int] | None = None,
    ) -> list[int]:  # fmt: skip
        """The first prompt of a row: for the title, or about the first candidate. There are
        neither labels nor hints."""
        if self.mode == "bigrec":
            return self.build_title(history)
        return self.build_question(history, shown[0])

    def build_title(self, history: Sequence[int]) -> list[int]:
        """Token ids of the prompt that ends where the next title is due.

        Args:
            history: Item indices, oldest first. The last `history_length` are used, fewer where
                the context is short: the oldest go first.
        """
        room = self.max_prompt_tokens - self._num_fixed
        past = self._items.past(self._history_line, history, self.history_length, room)
        return self.prefix + past + self._tail

    def build_question(self, history: Sequence[int], candidate: int) -> list[int]:
        """Token ids of the prompt that ends where Yes or No is due; arguments as above."""
        line = self._items.fill(self._candidate_line, candidate)
        room = self.max_prompt_tokens - self._num_fixed - len(line)
        past = self._items.past(self._history_line, history, self.history_length, room)
        first, second = (past, line) if self._history_first else (line, past)
        return self.prefix + first + self._middle + second + self._tail

    def title_answer(self, item: int) -> list[int]:
        """What is to be written after `build_title` where this item is next: its title, and, if
        that is not cut short, the token that ends an answer."""
        title = self._items.fill(self._title_line, item)
        limit = min(self._title_tokens, self._max_title_tokens)
        if len(title) >= limit:
            return title[:limit]
        end = self.tokenizer.eos_token_id
        return title + ([end] if isinstance(end, int) else self._segments.line_end[:1])

    def written_titles(self) -> list[str]:
        """Text of each item 1..V-1 as it would be written: escaped and cut as in a prompt."""
        tokens = [
            self._items.fill(self._title_line, item)[: self._title_tokens]
            for item in range(1, self._items.nothing)
        ]
        return [self.written(title) for title in tokens]

    def written(self, tokens: Sequence[int]) -> str:
        """The title that these tokens say: their first line that is not empty."""
        text = str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))
        return text.strip().partition("\n")[0].strip()

    def is_over(self, tokens: Sequence[int]) -> bool:
        """Whether the line of the title has ended."""
        text = str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))
        return "\n" in text.lstrip()

    def encode_titles(self, titles: Sequence[str]) -> list[list[int]]:
        """Tokens of texts as titles stand after the answer's opening."""
        return self._segments.encode_all([self._lead + title for title in titles])

    def item_tokens(self) -> list[list[int]]:
        """Title and categories of each item 1..V-1, as a candidate shows them."""
        return self._items.all_tokens(self._candidate_line)

    def _answers(self, context: str) -> tuple[int, int]:
        before = self._segments.encode(context)
        found = {}
        for word in ("Yes", "No"):
            after = self._segments.encode(context + self._lead + word)
            found[word] = after[len(before) :] if after[: len(before)] == before else []
        yes, no = found.values()
        if len(yes) != 1 or len(no) != 1 or yes == no:
            raise TeacherError(
                f"The tokenizer of the teacher does not keep Yes and No as tokens of their own "
                f"after {context[-20:] + self._lead!r}: they are {len(yes)} and {len(no)} tokens "
                "(0: merged with what is before them). Expected one each, because one step tells "
                "them apart. Choose another teacher.model, or another 'yes_no_answer' in a "
                "teacher.template of your own."
            )
        return yes[0], no[0]

    def _check_fits(self, max_context_tokens: int) -> None:
        longest = 0
        if self.mode == "pointwise":
            # The line holds the title's tokens and its own.
            longest = max(map(len, self.item_tokens()), default=0) + len(self._candidate_line)
            longest += self._items.most_popularity_tokens(self._candidate_line)
        if self._num_fixed + longest > self.max_prompt_tokens:
            raise ConfigError(
                f"A prompt of teacher.mode {self.mode} can take {self._num_fixed + longest} "
                f"tokens, without any history; the teacher's context of {max_context_tokens} "
                f"leaves {self.max_prompt_tokens}. Lower teacher.max_title_tokens (now "
                f"{self._max_title_tokens}) or teacher.title_tokens (now {self._title_tokens}), or "
                "take a shorter teacher.template."
            )


def make_item_prompts(
    settings: TeacherConfig,
    mode: Mode,
    tokenizer: PreTrainedTokenizerBase,
    titles: Sequence[str],
    categories: Sequence[str],
    max_context_tokens: int,
    popularity: Sequence[int] | None = None,
) -> ItemPrompts:
    """The prompts that a run's settings ask for in one of these modes.

    Raises:
        ConfigError, TeacherError: As `load_item_template` and `ItemPrompts`.
    """
    return ItemPrompts(
        tokenizer,
        titles,
        categories,
        template=load_item_template(settings.template, mode),
        mode=mode,
        num_candidates=settings.num_candidates,
        item_noun=settings.item_noun,
        history_length=settings.history_length,
        max_title_tokens=settings.max_title_tokens,
        title_tokens=settings.title_tokens,
        max_context_tokens=max_context_tokens,
        popularity=popularity,
    )
