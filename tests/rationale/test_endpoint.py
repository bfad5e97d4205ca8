"""Servers that answer late, wrongly, not yet, or not at all; and one that answers."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cotrain.errors import TeacherError
from cotrain.rationale import generate
from cotrain.rationale.endpoint import Answer, Endpoint
from cotrain.rationale.records import Rationale, read_rationales

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "generate_rationales.py"
specification = importlib.util.spec_from_file_location("generate_rationales", SCRIPT)
assert specification is not None
assert specification.loader is not None
generate_rationales = importlib.util.module_from_spec(specification)
specification.loader.exec_module(generate_rationales)
Options = dict[str, Any]
KEY = "sk-very-secret-0123456789"


@dataclass
class Reply:
    """What the server does with one request."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    wait_s: float = 0.0
    missing_bytes: int = 0  # of the body, where the connection breaks


def completion(
    text: str, logprobs: list[float] | None = None, finish_reason: str = "stop", **changes: Any
) -> dict[str, Any]:
    token = {"token": "a", "bytes": None, "top_logprobs": []}
    tokens = [{**token, "logprob": logprob} for logprob in logprobs or []]
    choice = {
        "index": 0, "message": {"role": "assistant", "content": text},
        "finish_reason": finish_reason, "logprobs": {"content": tokens} if tokens else None,
    }  # fmt: skip
    usage = {"prompt_tokens": 30, "completion_tokens": 5, "total_tokens": 35}
    return {
        "id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice],
        "usage": usage, **changes,
    }  # fmt: skip


def echo(number: int, body: dict[str, Any]) -> Reply:
    """The last words of the question, as the answer."""
    return Reply(body=completion(body["messages"][-1]["content"][-30:], [-0.5, -1.0]))


class Server(ThreadingHTTPServer):
    """Speaks the chat protocol; `reply` decides, by the number of the request and its body.

    Attributes:
        requests: Body, headers and time of each request, in the order in which they came.
        most_at_once: Requests that were under way together, at most.
        ended: Set when the test is over; who waits waits no longer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply: Callable[[int, dict[str, Any]], Reply] = echo
        self.requests: list[tuple[dict[str, Any], dict[str, str], float]] = []
        self.at_once = self.most_at_once = 0
        self.lock, self.ended = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def times(self) -> list[float]:
        return [when for *_, when in self.requests]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away without a word; that is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            number = len(server.requests)
            headers = {name.lower(): value for name, value in self.headers.items()}
            server.requests.append((body, headers, time.monotonic()))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            reply = server.reply(number, body)
            server.ended.wait(reply.wait_s)
        finally:
            with server.lock:
                server.at_once -= 1
        is_text = isinstance(reply.body, str)
        content = (reply.body if is_text else json.dumps(reply.body)).encode()
        self.send_response(reply.status)
        self.send_header("content-type", "text/html" if is_text else "application/json")
        self.send_header("content-length", str(len(content)))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) - reply.missing_bytes])
        self.close_connection = bool(reply.missing_bytes)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def endpoint_at(server: Server, **changes: Any) -> Endpoint:
    return Endpoint("m", server.url, **{"max_tokens": 20, "max_retries": 2, **changes})


QUESTIONS = [("", f"Why {number}?") for number in range(8)]


def answers_of(endpoint: Endpoint, questions: list[tuple[str, str]] = QUESTIONS) -> list[Answer]:
    """In the order of the questions."""
    pairs = [pair for batch in endpoint.write(questions) for pair in batch]
    found = {place: answer for place, answer in pairs if answer is not None}
    return [found[place] for place in range(len(questions))]


def refused(status: int, message: str, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, {"error": {"message": message, "code": None}}, named)


# ---- what is asked and answered -----------------------------------------------------------------


def test_a_question_says_all_that_was_set_and_an_answer_all_that_came(server: Server):
    endpoint = endpoint_at(server, temperature=0.7, top_p=0.9, seed=5)
    (answer,) = answers_of(endpoint, [("Be brief.", "Why so?")])
    assert answer == Answer("Why so?", 5, -0.75, True)
    ((body, headers, _),) = server.requests
    assert body == {
        "model": "m", "max_tokens": 20, "temperature": 0.7, "top_p": 0.9, "seed": 5,
        "logprobs": True, "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why so?"},
        ],
    }  # fmt: skip
    assert KEY not in str(headers)


def test_answers_keep_the_place_of_their_question(server: Server):
    def first_one_late(number: int, body: dict[str, Any]) -> Reply:
        reply = echo(number, body)
        reply.wait_s = 0.5 if reply.body["choices"][0]["message"]["content"] == "Why 0?" else 0.0
        return reply

    server.reply = first_one_late
    batches = list(endpoint_at(server).write(QUESTIONS))
    places = [place for batch in batches for place, _ in batch]
    assert sorted(places) == list(range(8))
    assert places[-1] == 0
    assert all(
        answer and answer.text == f"Why {place}?" for batch in batches for place, answer in batch
    )
    assert all(len(body["messages"]) == 1 for body, *_ in server.requests)  # no system message


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (completion("It is", finish_reason="length"), Answer("It is", 5, None, False)),
        (completion("It is.", usage=None), Answer("It is.", None, None, True)),
        (completion("", finish_reason="content_filter"), Answer("", 5, None, True)),
        ({"choices": [{"message": {"content": None}}]}, Answer("", None, None, True)),
    ],
    ids=["to the limit", "without counts", "filtered", "bare"],
)
def test_what_servers_leave_out_is_not_known(
    server: Server, body: dict[str, Any], expected: Answer
):
    server.reply = lambda *_: Reply(body=body)
    assert answers_of(endpoint_at(server), QUESTIONS[:1]) == [expected]


@pytest.mark.parametrize(
    "body",
    ["<html>Welcome</html>", {"error": "overloaded"}, {"choices": []}, ["nothing"], "null", None],
    ids=str,
)
def test_a_server_of_something_else_is_an_error_that_says_so(server: Server, body: Any):
    """Regression: an AttributeError of the client, with its traceback."""
    server.reply = lambda *_: Reply(body=body)
    with pytest.raises(TeacherError, match=r"else than a chat completion.* ends with /v1"):
        endpoint_at(server).check()


# ---- options that a server does not know --------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "option"),
    [(400, "logprobs"), (422, "seed"), (400, "temperature"), (422, "top_p")],
)
def test_an_option_that_is_refused_is_left_out_from_then_on(
    server: Server, capsys: pytest.CaptureFixture, status: int, option: str
):
    """Regression: a refusal as FastAPI words it, 422 and in `detail`, was an error."""

    def particular(number: int, body: dict[str, Any]) -> Reply:
        if option in body:
            message = f"Unexpected fields in the request: {{'{option}'}}"
            return refused(400, message) if status == 400 else Reply(422, {"detail": message})
        return Reply(body=completion("Yes."))

    server.reply = particular
    endpoint = endpoint_at(server)
    endpoint.check()
    assert answers_of(endpoint) == [Answer("Yes.", 5, None, True)] * 8
    assert [option in body for body, *_ in server.requests] == [True] + [False] * 9
    said = capsys.readouterr().err
    assert said.count(f"refuses {option}") == 1
    assert f"is asked without it: {status} " in said


def test_several_options_are_left_out_also_when_many_questions_learn_it_at_once(server: Server):
    def particular(number: int, body: dict[str, Any]) -> Reply:
        unknown = [name for name in ("logprobs", "seed", "top_p") if name in body]
        if unknown:
            return replace(refused(400, f"unknown: {unknown[0]}"), wait_s=0.05)
        return echo(number, body)

    server.reply = particular
    answers = answers_of(endpoint_at(server))
    assert [answer.text for answer in answers] == [question for _, question in QUESTIONS]


def test_models_that_want_another_name_for_the_limit_get_it(server: Server):
    """Regression: the first question, for one token, repeated the old name for ever."""

    def particular(number: int, body: dict[str, Any]) -> Reply:
        if "max_tokens" in body:
            return refused(400, "Unsupported parameter: 'max_tokens' is not supported with this "
                           "model. Use 'max_completion_tokens' instead.")  # fmt: skip
        return echo(number, body)

    server.reply = particular
    endpoint = endpoint_at(server)
    endpoint.check()
    answers_of(endpoint, QUESTIONS[:1])
    limits = [body.get("max_completion_tokens") for body, *_ in server.requests]
    assert limits == [None, 1, 20]


def test_other_complaints_are_errors_at_once(server: Server):
    server.reply = lambda *_: refused(400, "The question is longer than 64 tokens.")
    with pytest.raises(TeacherError, match="longer than 64 tokens"):
        endpoint_at(server).check()
    assert len(server.requests) == 1


def test_a_question_that_is_refused_is_left_out_and_the_others_are_answered(
    server: Server, capsys: pytest.CaptureFixture[str]
):
    def reply(number: int, body: dict[str, Any]) -> Reply:
        if "Why 3?" in str(body["messages"]):
            return refused(400, "This one does not pass the filter.")
        return echo(number, body)

    server.reply = reply
    found = dict(pair for batch in endpoint_at(server).write(QUESTIONS) for pair in batch)
    assert [place for place, answer in found.items() if answer is None] == [3]
    assert len(found) == len(QUESTIONS)
    assert "does not pass the filter" in capsys.readouterr().err


def test_a_server_that_refuses_most_questions_is_an_error(server: Server):
    server.reply = lambda *_: refused(400, "The template has no room for that.")
    with pytest.raises(TeacherError, match="refuses most questions"):
        list(endpoint_at(server).write([("", f"{number}") for number in range(200)]))
    assert len(server.requests) < 60


# ---- failures -----------------------------------------------------------------------------------


def failing_first(times: int, reply: Reply) -> Callable[[int, dict[str, Any]], Reply]:
    return lambda number, body: reply if number < times else echo(number, body)


def test_pauses_are_as_long_as_the_server_asks(server: Server):
    server.reply = failing_first(2, refused(429, "slow down", retry_after="0.3"))
    endpoint = endpoint_at(server)
    assert answers_of(endpoint, QUESTIONS[:1])[0].text == "Why 0?"
    assert endpoint.retries == 2
    first, second, third = server.times
    assert second - first >= 0.3
    assert third - second >= 0.3
    assert third - first < 3


@pytest.mark.parametrize(
    "reply",
    [refused(500, "oops"), Reply(body=completion("Yes."), missing_bytes=20)],
    ids=["500", "broken off"],
)
def test_otherwise_pauses_grow(server: Server, reply: Reply):
    server.reply = failing_first(2, reply)
    endpoint = endpoint_at(server)
    assert answers_of(endpoint, QUESTIONS[:1])[0].text == "Why 0?"
    assert endpoint.retries == 2
    first, second, third = server.times
    assert 0.3 < second - first < third - second


@pytest.mark.parametrize(
    ("status", "tries", "said"),
    [
        (500, 2, r"fails: .*the reason.* See the server's log"),
        (
            429,
            2,
            r"says that there are too many .*the reason.* Lower rationale",
        ),
        (401, 1, "refuses the key. Set OPENAI_API_KEY"),
        (403, 1, "refuses the key. Set OPENAI_API_KEY"),
        (404, 1, r"is not there: .*the reason.* Correct rationale.endpoint_model"),
    ],
)
def test_a_failure_for_good_says_what_to_do(server: Server, status: int, tries: int, said: str):
    server.reply = lambda *_: refused(status, "the reason", retry_after="0.05")
    with pytest.raises(TeacherError, match=f"endpoint {server.url}, model 'm', {said}"):
        endpoint_at(server, max_retries=1).check()
    assert len(server.requests) == tries


def test_an_answer_that_is_late_is_asked_for_again_and_then_an_error(server: Server):
    server.reply = lambda *_: Reply(body=completion("Yes."), wait_s=30)
    with pytest.raises(TeacherError, match=r"within 0.2 s. Raise rationale.timeout_s"):
        endpoint_at(server, timeout_s=0.2, max_retries=1).check()
    assert len(server.requests) == 2


def test_where_nobody_listens_it_is_an_error():
    with socket.socket() as taken:  # bound, but it does not listen
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(TeacherError, match=f"{url}.* cannot be reached. Start the server"):
            Endpoint("m", url, max_tokens=1, max_retries=0).check()


def test_answers_are_given_before_the_failure_that_came_with_them(server: Server):
    def one_fails(number: int, body: dict[str, Any]) -> Reply:
        if body["messages"][-1]["content"] == "Why 2?":
            return refused(404, "gone")
        return echo(number, body)

    server.reply = one_fails
    answers: list[int] = []
    batches = endpoint_at(server, concurrency=1).write(QUESTIONS)
    with pytest.raises(TeacherError, match=r"is not there.* 2 questions were answered before"):
        answers.extend(place for batch in batches for place, _ in batch)
    assert answers == [0, 1]


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(TeacherError, match=r"pip install 'cotrain\[endpoint\]'"):
        Endpoint("m", None, max_tokens=1)


# ---- how many, how fast -------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 3])
def test_never_more_at_once_than_allowed(server: Server, concurrency: int):
    def slow(number: int, body: dict[str, Any]) -> Reply:
        reply = echo(number, body)
        reply.wait_s = 0.02 + 0.02 * (number % 3)
        return reply

    server.reply = slow
    questions = [("", str(number)) for number in range(15)]
    answers = answers_of(endpoint_at(server, concurrency=concurrency), questions)
    assert [answer.text for answer in answers] == [question for _, question in questions]
    assert server.most_at_once == concurrency


def test_questions_are_read_when_they_are_sent(server: Server):
    read: list[int] = []

    def questions() -> Iterator[tuple[str, str]]:
        for number in range(1000):
            read.append(number)
            yield "", str(number)

    writing = endpoint_at(server, concurrency=2).write(questions())
    next(batch for batch in writing if batch)
    assert len(read) <= 4
    writing.close()
    time.sleep(0.1)
    assert len(server.requests) <= len(read) <= 4


def test_no_more_in_a_minute_than_allowed_and_evenly(server: Server):
    endpoint = endpoint_at(server, requests_per_minute=600)
    answers_of(endpoint, QUESTIONS[:6])
    first, *later = server.times
    for number, when in enumerate(later, start=1):
        assert when - first > 0.1 * number - 0.05


def test_whoever_waits_for_his_turn_asks_nothing_once_it_is_over(server: Server):
    """Regression: all that waited were sent at once."""
    writing = endpoint_at(server, requests_per_minute=60, concurrency=5).write(QUESTIONS)
    next(batch for batch in writing if batch)
    writing.close()
    time.sleep(0.3)
    assert len(server.requests) == 1


def test_whoever_waits_for_an_answer_can_stop(server: Server):
    server.reply = lambda *_: Reply(body=completion("Yes."), wait_s=30)
    writing = endpoint_at(server).write(QUESTIONS)
    started = time.monotonic()
    assert next(writing) == []
    assert time.monotonic() - started < 5


# ---- the key ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500])
def test_the_key_is_that_of_the_environment_and_never_repeated(
    server: Server, monkeypatch: pytest.MonkeyPatch, status: int
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.reply = lambda *_: refused(status, f"{KEY} is not good enough")
    endpoint = endpoint_at(server, max_retries=0)
    with pytest.raises(TeacherError) as caught:
        endpoint.check()
    assert server.requests[0][1]["authorization"] == f"Bearer {KEY}"
    shown: BaseException | None = caught.value
    while shown is not None:  # with all that a traceback would show
        assert KEY not in str(shown)
        shown = None if shown.__suppress_context__ else shown.__context__


def test_a_refused_option_does_not_show_it_either(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.reply = failing_first(1, refused(400, f"no logprobs for {KEY}"))
    endpoint_at(server).check()
    said = capsys.readouterr().err
    assert "no logprobs for …" in said
    assert KEY not in said


# ---- the script ---------------------------------------------------------------------------------


@pytest.fixture
def options(server: Server, small_tables: tuple[Path, Path], tmp_path: Path) -> Options:
    return {
        "data.name": "small",
        "data.interactions": small_tables[0],
        "data.items": small_tables[1],
        "output": tmp_path / "rationales",
        "rationale.backend": "endpoint",
        "rationale.endpoint_url": server.url,
        "rationale.endpoint_model": "a-model",
        "rationale.template": "default",
        "rationale.language": "none",
        "rationale.rows": 12,
        "rationale.concurrency": 2,
        "rationale.max_retries": 0,
    }


@pytest.fixture(autouse=True)
def threads_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "use_all_cores", lambda _: None)


def words(options: Options) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def call(options: Options) -> int:
    return generate_rationales.main(words(options))


def rows_of(options: Options) -> list[Rationale]:
    return list(read_rationales(options["output"] / "rationales.jsonl"))


def asked(server: Server) -> Counter[str]:
    """Questions, without the first of a call, which only tries the server."""
    texts = [body["messages"][-1]["content"] for body, *_ in server.requests]
    return Counter(text for text in texts if text != "Say yes.")


def test_rows_of_an_endpoint_are_rows_like_any_other(
    server: Server, options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    options["rationale.max_retries"] = 1

    def two_paragraphs(number: int, body: dict[str, Any]) -> Reply:
        if number == 3:
            return refused(429, "slow down", retry_after="0.05")
        text = f"A comedy with ghosts, as number {number} was.\n\nAnything else?"
        return Reply(body=completion(text, [-0.25]))

    server.reply = two_paragraphs
    assert call(options) == 0
    rows = rows_of(options)
    assert len({row.key for row in rows}) == len(asked(server)) == len(rows) == 12
    for row in rows:
        assert row.rationale.startswith("A comedy with ghosts, as number ")
        assert row.rationale.endswith(" was.")
        assert (row.model, row.logprob, row.tokens, row.flags) == ("a-model", -0.25, 5, [])
    report = json.loads((options["output"] / "report.json").read_text())
    assert report["asked"]["Model"] == "a-model"
    printed = "".join(capsys.readouterr())
    assert "Tries that followed a failure: 1." in printed
    files = b"".join(path.read_bytes() for path in options["output"].iterdir())
    assert KEY not in printed
    assert KEY.encode() not in files


def test_rows_before_a_failure_are_written_and_the_same_command_goes_on(
    server: Server, options: Options
):
    def soon_without_money(number: int, body: dict[str, Any]) -> Reply:
        return refused(401, "no money left") if number > 5 else echo(number, body)

    server.reply = soon_without_money
    # One after the other: of several under way a refusal may arrive before the answers.
    options["rationale.concurrency"] = 1
    with pytest.raises(TeacherError, match=r"refuses the key.* 5 questions were answered before"):
        call(options)
    first = rows_of(options)
    assert len(first) == 5
    server.reply = echo
    server.requests.clear()
    assert call(options) == 0
    assert len(asked(server)) == 7  # those without an answer
    rows = rows_of(options)
    assert rows[:5] == first
    assert len({row.key for row in rows}) == 12


def test_a_server_that_cannot_be_used_is_told_before_a_file_is_begun(
    server: Server, options: Options
):
    server.reply = lambda *_: refused(404, "The model `a-model` does not exist.")
    with pytest.raises(TeacherError, match="`a-model` does not exist"):
        call(options)
    assert len(server.requests) == 1
    assert not (options["output"] / "rationales.jsonl").exists()
    server.reply = echo
    assert call(options | {"rationale.rows": 2}) == 0


def test_an_interrupted_call_does_not_wait_for_the_answers_under_way(
    server: Server, options: Options, capsys: pytest.CaptureFixture
):
    """Regression: it waited for the next answer, which may take minutes or never come."""

    def interrupting(number: int, body: dict[str, Any]) -> Reply:
        if number <= 5:
            return echo(number, body)
        if number == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return Reply(body=completion("Late."), wait_s=60)

    server.reply = interrupting
    started = time.monotonic()
    assert call(options) == 130
    assert time.monotonic() - started < 20
    assert "Stopped with 5 rationales" in capsys.readouterr().err
    server.reply = echo
    assert call(options) == 0
    assert len({row.key for row in rows_of(options)}) == 12


@pytest.mark.slow
def test_an_interrupted_script_ends_although_requests_are_under_way(
    server: Server, options: Options
):
    """Regression: at its end Python waited for the threads that waited for answers."""
    server.reply = lambda number, body: (
        echo(number, body) if number <= 2 else Reply(body=completion("Late."), wait_s=300)
    )
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *words(options)], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(server.requests) < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Stopped with 2 rationales" in said
    assert "Traceback" not in said
    assert len(rows_of(options)) == 2


# ---- transformers serve -------------------------------------------------------------------------


@pytest.fixture
def transformers_serve(smollm2: str, tmp_path: Path) -> Iterator[str]:
    """Address of a server of SmolLM2 under the name of its folder, where it was started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(smollm2)
    program = str(Path(sys.executable).parent / "transformers")
    command = [program, "serve", folder.name, "--host", "127.0.0.1", "--port", str(port)]
    # In the bf16 of its weights it is several times as slow on a CPU.
    command += ["--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    log = tmp_path / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=folder.parent, env=environment, stdout=file, stderr=file
        )
    try:
        deadline = time.monotonic() + 180
        while not _is_ready(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_transformers_serve_writes_for_the_script(
    transformers_serve: str, smollm2: str, options: Options
):
    name = Path(smollm2).name
    options |= {
        "rationale.endpoint_url": transformers_serve, "rationale.endpoint_model": name,
        "rationale.rows": 6, "rationale.history_length": 3, "rationale.max_tokens": 24,
        "rationale.language": "en", "rationale.timeout_s": 300,
    }  # fmt: skip
    command = [sys.executable, str(SCRIPT), *words(options)]
    assert "OPENAI_API_KEY" not in os.environ
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    rows = rows_of(options)
    assert len({row.key for row in rows}) == 6
    for row in rows:
        assert len(row.rationale.split()) > 3
        assert "empty" not in row.flags
        assert row.model == name
        assert row.tokens is not None
        assert 3 < row.tokens <= 24
        assert row.logprob is None  # it takes the option and gives none
    with pytest.raises(TeacherError, match=r"400 .*pinned to .* requested 'another'"):
        Endpoint("another", transformers_serve, max_tokens=1, max_retries=0).check()
