"""Texts from a server that speaks OpenAI's chat protocol: vLLM, SGLang, `transformers serve`, or a
hosted model."""

import os
import sys
import threading
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any

from tqdm import tqdm

from cotrain.errors import TeacherError

KEY = "OPENAI_API_KEY"
# Seconds after which who waits for an answer is asked whether to go on.
_PATIENCE_S = 0.5
# Refused questions from which on it matters whether they are most of them.
_MANY = 20


class QuestionRefused(TeacherError):
    """The server takes no question of this kind; others may do."""


@dataclass(frozen=True)
class Answer:
    """What was written in answer to one question.

    Attributes:
        text: The text; empty where the model refused or a filter stopped it.
        tokens: Written; None: the writer does not tell.
        logprob: Mean log-probability of a token in nats; None: the writer does not tell.
        ended: Whether it came to an end, rather than to the limit.
    """

    text: str
    tokens: int | None
    logprob: float | None
    ended: bool


class Endpoint:
    """A server, asked several questions at once.

    Args:
        model: Name of the model there.
        base_url: Address; None: OpenAI's own.
        max_tokens: Of an answer.
        temperature, top_p, seed: How it is drawn.
        concurrency: Requests under way at once.
        requests_per_minute: Most that are sent in a minute, tries that follow a failure left out;
            None: no limit.
        max_retries: Tries after the first. Pauses grow, or are what the server asks for.
        timeout_s: Seconds that one try may take.

    Attributes:
        retries: Tries so far that followed a failure.

    Raises:
        TeacherError: The `openai` package is missing.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None,
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        concurrency: int = 8,
        requests_per_minute: int | None = None,
        max_retries: int = 5,
        timeout_s: float = 120.0,
    ):
        try:
            # Here, because it takes a second and is an optional dependency.
            import openai
        except ImportError as error:
            raise TeacherError(
                "rationale.backend endpoint needs the openai package: pip install "
                "'cotrain[endpoint]', or set rationale.backend local."
            ) from error
        self._errors = openai
        self.model = model
        self.address = base_url or "https://api.openai.com/v1"
        self.retries = 0
        self._concurrency = concurrency
        self._pace = _Pace(requests_per_minute)
        self._timeout_s = timeout_s
        self._max_tokens = max_tokens
        self._limit_option = "max_tokens"
        self._options: dict[str, Any] = {
            "temperature": temperature, "top_p": top_p, "seed": seed, "logprobs": True,
        }  # fmt: skip
        # A server of one's own mostly wants no key, but the client wants to have one.
        client = openai.OpenAI(
            api_key=os.environ.get(KEY) or "none", base_url=self.address, max_retries=max_retries,
            timeout=timeout_s,
        )  # fmt: skip
        self._create: Any = client.chat.completions.with_raw_response.create

    def check(self) -> None:
        """Ask for one token, to learn which of the options the server takes.

        Raises:
            TeacherError: It cannot be reached, or refuses key, model or question.
        """
        self._ask(("", "Say yes."), threading.Event(), max_tokens=1)

    def write(
        self, messages: Iterable[tuple[str, str]]
    ) -> Generator[list[tuple[int, Answer | None]], None, None]:
        """Answers with the place of their question, as they come; an empty list now and then where
        none comes, so that whoever waits can stop. Questions are read when they are sent; closing
        the iterator sends no more of them. None in place of an answer: the server refuses this one
        question, as too long, or by a filter.

        Args:
            messages: System text, which may be empty, and user text of each question.

        Raises:
            TeacherError: The server fails for good, or refuses most questions; answers that came
                before have been given.
        """
        came: SimpleQueue[tuple[int, Answer | Exception | None]] = SimpleQueue()
        stopped = threading.Event()

        def ask(place: int, message: tuple[str, str]) -> None:
            try:
                came.put((place, self._ask(message, stopped)))
            except QuestionRefused as error:
                tqdm.write(f"{error} It is left out.", file=sys.stderr)
                came.put((place, None))
            except Exception as error:
                came.put((place, error))

        questions = iter(enumerate(messages))
        answered = refused = under_way = 0
        try:
            while True:
                for question in islice(questions, self._concurrency - under_way):
                    # Not of a pool, for which Python waits at its end: an answer may take minutes.
                    threading.Thread(target=ask, args=question, daemon=True).start()
                    under_way += 1
                if not under_way:
                    return
                results = _taken(came)
                under_way -= len(results)
                # Those that succeeded first: they are not lost where another failed.
                answers = [
                    (at, result) for at, result in results if not isinstance(result, Exception)
                ]
                refused += sum(answer is None for _, answer in answers)
                answered += sum(answer is not None for _, answer in answers)
                yield answers
                if refused >= _MANY and refused > answered:
                    raise TeacherError(
                        f"The endpoint {self.address}, model {self.model!r}, refuses most "
                        f"questions: {refused:,} of {refused + answered:,}; why is above. Correct "
                        "what it names, or take another model."
                    )
                for _, error in results:
                    if isinstance(error, TeacherError):
                        raise TeacherError(
                            f"{error} {answered:,} questions were answered before; the same "
                            "command goes on with the others."
                        ) from error
                    if isinstance(error, Exception):
                        raise error
        finally:
            stopped.set()

    def _ask(
        self, message: tuple[str, str], stopped: threading.Event, max_tokens: int | None = None
    ) -> Answer:
        system, user = message
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": user})
        errors = self._errors
        while True:
            self._pace.wait(stopped)
            sent = {**self._options, self._limit_option: max_tokens or self._max_tokens}
            try:
                raw = self._create(model=self.model, messages=messages, **sent)
            except (errors.BadRequestError, errors.UnprocessableEntityError) as error:
                if not self._give_up_option(error, sent):
                    raise QuestionRefused(str(self._explained(error))) from None
            except errors.OpenAIError as error:
                raise self._explained(error) from None
            else:
                self.retries += raw.retries_taken
                return self._read(raw)

    def _read(self, raw: Any) -> Answer:
        try:
            return _answer(raw.parse())
        # A page in place of JSON is given as it is, and JSON of another kind lacks what it has.
        except (AttributeError, IndexError, TypeError, ValueError, self._errors.OpenAIError):
            raise TeacherError(
                f"The endpoint {self.address}, model {self.model!r}, answers something else than a "
                "chat completion. Correct rationale.endpoint_url; the address mostly ends with /v1."
            ) from None

    def _give_up_option(self, error: Exception, sent: dict[str, Any]) -> bool:
        """Leave out, from now on, an option that the server does not know; False: it complains of
        something else."""
        complaint = self._said(error)
        if "max_completion_tokens" in complaint and "max_tokens" in sent:
            self._limit_option = "max_completion_tokens"
            return True
        for name in ("logprobs", "seed", "top_p", "temperature"):
            if name in complaint and name in sent:
                if self._options.pop(name, None) is not None:
                    tqdm.write(
                        f"The endpoint refuses {name} {sent[name]} and is asked without it: "
                        f"{complaint[:300]}",
                        file=sys.stderr,
                    )
                return True
        return False

    def _said(self, error: Exception) -> str:
        said = str(error)
        # The client passes on the words of servers that put them where OpenAI does, and no others.
        if isinstance(error, self._errors.APIStatusError):
            said = f"{error.status_code} {' '.join(error.response.text.split())}"
        # The server may repeat the key that it was given.
        key = os.environ.get(KEY)
        return said.replace(key, "…") if key else said

    def _explained(self, error: Exception) -> TeacherError:
        errors = self._errors
        where = f"The endpoint {self.address}, model {self.model!r},"
        said = self._said(error)[:300]
        if isinstance(error, errors.APITimeoutError):
            what = f"does not answer within {self._timeout_s:g} s. Raise rationale.timeout_s, or "
            what += "lower rationale.concurrency."
        elif isinstance(error, errors.APIConnectionError):
            what = "cannot be reached. Start the server, or correct rationale.endpoint_url."
        elif isinstance(error, errors.AuthenticationError | errors.PermissionDeniedError):
            what = f"refuses the key. Set {KEY} in the environment to one that it takes."
        elif isinstance(error, errors.NotFoundError):
            what = f"is not there: {said} Correct rationale.endpoint_model or endpoint_url; the "
            what += "address mostly ends with /v1."
        elif isinstance(error, errors.RateLimitError):
            what = f"says that there are too many requests: {said} Lower rationale.concurrency or "
            what += "set rationale.requests_per_minute."
        else:
            what = f"fails: {said} See the server's log."
        return TeacherError(f"{where} {what}")


class _Pace:
    """Lets through so many requests a minute, evenly; from several threads."""

    def __init__(self, per_minute: int | None):
        self._interval = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stopped: threading.Event) -> None:
        """Until it is one's turn.

        Raises:
            TeacherError: It will not be.
        """
        with self._lock:
            now = time.monotonic()
            due = max(now, self._next)
            self._next = due + self._interval
        if stopped.wait(due - now):
            raise TeacherError("Nothing more is asked.")


def _taken(came: SimpleQueue[Any]) -> list[Any]:
    """All that is there, or the first that comes; nothing where it takes long."""
    taken = []
    try:
        taken.append(came.get(timeout=_PATIENCE_S))
        while True:
            taken.append(came.get_nowait())
    except Empty:
        return taken


def _answer(completion: Any) -> Answer:
    choice = completion.choices[0]
    of_tokens = getattr(choice.logprobs, "content", None) or []
    values = [token.logprob for token in of_tokens]
    return Answer(
        text=choice.message.content or "",
        tokens=completion.usage.completion_tokens if completion.usage else None,
        logprob=sum(values) / len(values) if values else None,
        ended=choice.finish_reason != "length",
    )
