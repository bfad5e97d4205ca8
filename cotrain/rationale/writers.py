"""Who writes rationales: a language model on this machine, or a server. Both take positions and
give answers as they come."""

import dataclasses
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from cotrain.config import RationaleConfig
from cotrain.rationale.endpoint import Answer, Endpoint
from cotrain.rationale.prompts import RationaleMessages, RationalePrompts
from cotrain.teacher.backbone import Backbone
from cotrain.teacher.memory import TokenBudget
from cotrain.teacher.passes import Passes
from cotrain.teacher.writing import Sampling, write

# Rows that are planned into batches together: enough for like lengths to find each other, few
# enough for an interrupted file to hold a fair share of everything.
_BLOCK = 512
# Prompt and answer tokens of one batch, by device. Each step reads all weights once, so many rows
# pay; on a GPU more than on a CPU, and where memory is short it is halved.
_BATCH_TOKENS = {"cpu": 2**14, "cuda": 2**17}


@dataclass(frozen=True)
class Ask:
    """One position.

    Attributes:
        history: Item indices before the target, oldest first.
        target: Item index.
        seed: Of what is drawn for it.
    """

    history: Sequence[int]
    target: int
    seed: tuple[int, ...]


# Answers by place in the list of asks. None: it could not be asked, for want of memory, or was
# refused.
Answers = list[tuple[int, Answer | None]]


class LocalWriter:
    """A frozen language model, batch by batch.

    Batches are planned from the whole list, whatever of it is done: an interrupted list that is
    gone on with gives the same texts as one in one go, because a row meets the same others.

    Args:
        backbone: The language model.
        prompts: For its tokenizer.
        settings: Temperature, tokens.
        batch_tokens: Prompt and answer tokens of one batch; None: 16384, on a GPU 131072.

    Attributes:
        name: Of the model.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: RationalePrompts,
        settings: RationaleConfig,
        batch_tokens: int | None = None,
    ):
        self.name = backbone.name
        self._prompts = prompts
        self._settings = settings
        self._passes = Passes(backbone, prompts.prefix)
        self._passes.check_steps()
        self.budget = TokenBudget(batch_tokens or _BATCH_TOKENS[backbone.device.type])

    def write(self, asks: Sequence[Ask], done: Collection[int] = ()) -> Iterator[Answers]:
        """Answers to all asks that are not done, a batch at a time.

        Args:
            asks: The whole list.
            done: Places of it that need no answer; they may get one.
        """
        done = set(done)
        for start in range(0, len(asks), _BLOCK):
            block = range(start, min(start + _BLOCK, len(asks)))
            prompts = [self._prompts.build(asks[place].history, asks[place].target)
                       for place in block]  # fmt: skip
            lengths = [len(prompt) + self._settings.max_tokens for prompt in prompts]
            answers: dict[int, Answer | None] = {}

            def work(rows: list[int], start=start, prompts=prompts, answers=answers) -> None:
                if all(start + row in done for row in rows):
                    return
                seeds = [asks[start + row].seed for row in rows]
                texts = self._answers([prompts[row] for row in rows], seeds)
                answers.update(zip(rows, texts, strict=True))

            for rows, fits in self.budget.groups(lengths, work):
                if not fits:
                    answers.update(dict.fromkeys(rows))
                batch = [(start + row, answers.pop(row)) for row in rows if row in answers]
                if batch:
                    yield batch

    def _answers(
        self, prompts: Sequence[list[int]], seeds: Sequence[tuple[int, ...]]
    ) -> list[Answer]:
        settings, tokenizer = self._settings, self._prompts.tokenizer
        opening = self._prompts.opening

        def text_of(tokens: list[int]) -> str:
            return str(tokenizer.decode(tokens, skip_special_tokens=True))

        sampling = None
        if settings.temperature > 0:
            sampling = Sampling(settings.temperature, settings.top_p, seeds)
        written, _ = write(
            self._passes, prompts, settings.max_tokens,
            lambda tokens: "\n" in text_of(tokens).strip(), sampling,
        )  # fmt: skip
        return [
            Answer(_joined(opening, text_of(row.tokens)), len(row.tokens), row.logprob, row.ended)
            for row in written
        ]


class EndpointWriter:
    """A server that speaks OpenAI's protocol, several requests at once.

    Args:
        endpoint: The server.
        messages: Questions as text.

    Attributes:
        name: Of the model.
    """

    def __init__(self, endpoint: Endpoint, messages: RationaleMessages):
        self.name = endpoint.model
        self.endpoint = endpoint
        self._messages = messages

    def write(self, asks: Sequence[Ask], done: Collection[int] = ()) -> Iterator[Answers]:
        """Answers to all asks that are not done, as they come."""
        done = set(done)
        places = [place for place in range(len(asks)) if place not in done]
        # Put together when they are sent: a million of them need no memory.
        messages = (self._messages.build(asks[at].history, asks[at].target) for at in places)
        for answers in self.endpoint.write(messages):
            yield [(places[index], answer) for index, answer in answers]


def _joined(opening: str, text: str) -> str:
    """Both as one paragraph, whatever line ends are between them; an opening alone says nothing."""
    written = text.lstrip()
    between = text[: len(text) - len(written)]
    if not written:
        return ""
    return opening + (" " if "\n" in between else between) + written


def first_paragraph(answer: Answer) -> Answer:
    """What counts of an answer: its first paragraph, up to its last whole sentence where it was cut
    off at the limit."""
    text = " ".join(answer.text.strip().partition("\n")[0].split())
    ended = answer.ended or "\n" in answer.text.strip()
    if not ended:
        end = max(text.rfind(mark) for mark in (". ", "! ", "? ", "。"))
        if text.endswith((".", "!", "?", "。")):
            ended = True
        elif end > 0:
            text, ended = text[: end + 1], True
    return dataclasses.replace(answer, text=text, ended=ended)


def seed_of(seed: int, user_id: object, cut: int) -> tuple[int, int, int]:
    """Of one position, by its raw id: another selection of positions changes nothing."""
    return seed, zlib.crc32(repr(user_id).encode()), cut
