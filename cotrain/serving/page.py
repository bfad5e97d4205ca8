"""The page itself, in Gradio: which controls there are, what each of them asks for, and its server.
What is shown is decided in inspector.py and worded in views.py."""

import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

# Before Gradio is read: it would report its use to its makers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import uvicorn
from fastapi import FastAPI

from cotrain.errors import ConfigError, CotrainError
from cotrain.serving import views
from cotrain.serving.guard import Guard
from cotrain.serving.inspector import (
    MAX_ITEMS,
    MAX_TEXT_CHARACTERS,
    MAX_USER_CHARACTERS,
    Inspector,
)
from cotrain.serving.records import Person

_LOCAL = ("127.0.0.1", "localhost", "[::1]", "::1")
# Requests that wait for their turn, at most.
_WAITING = 32
_FONT, _MONO = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]


class Page:
    """What the controls do.

    Args:
        inspector: Looks at the run.
    """

    def __init__(self, inspector: Inspector):
        self.inspector = inspector

    def show_user(self, text: Any, hide_next: Any) -> tuple[Person | None, str, str, str]:
        """(person, lists, teacher, reasons) of a user of the data."""
        return self._shown(lambda: self.inspector.known_user(text, bool(hide_next)))

    def show_new(self, text: Any) -> tuple[Person | None, str, str, str]:
        """The same of a new user."""
        return self._shown(lambda: self.inspector.new_user(text))

    def show_any(self, hide_next: Any) -> tuple[str, Person | None, str, str, str]:
        """(id, and the same) of a user at random."""
        user = self.inspector.random_user()
        return user, *self.show_user(user, hide_next)

    def _shown(self, find: Callable[[], Person]) -> tuple[Person | None, str, str, str]:
        try:
            person = find()
            lists = views.person_view(self.inspector, person, self.inspector.lists(person))
        except CotrainError as error:
            return None, views.notice(error), "", ""
        return person, lists, self.before_asking(), self._reasons(person)

    def before_asking(self) -> str:
        """What stands where the teacher's answer will be."""
        return views.notice(self.inspector.no_teacher, "quiet") if self.inspector.no_teacher else ""

    def _reasons(self, person: Person) -> str:
        if self.inspector.no_reasons:
            return views.notice(self.inspector.no_reasons, "quiet")
        try:
            return views.reasons_view(self.inspector, self.inspector.reasons(person))
        except CotrainError as error:
            return views.notice(error)

    def ask(self, person: Person | None) -> Iterator[str]:
        """The teacher's answer, and before it what it is waited for."""
        if person is None:
            yield views.notice("Choose somebody first, whose candidates the teacher is to rank.")
            return
        if not self.inspector.teacher_is_loaded:
            yield views.notice(
                "Loading the teacher. This is done once, and may take a minute …", "quiet"
            )
        try:
            yield views.answer_view(self.inspector, self.inspector.ask(person))
        except CotrainError as error:
            yield views.notice(error)

    def charts(self) -> str:
        """The run's curves."""
        try:
            return views.charts_view(self.inspector.charts())
        except CotrainError as error:
            return views.notice(error)

    def add_title(self, title: Any, text: Any) -> tuple[Any, Any]:
        """(no title, the list of items with this one)."""
        known = isinstance(title, str) and isinstance(text, str | None)
        lines = [line for line in (text or "").splitlines() if line.strip()] if known else []
        if not known or len(lines) >= MAX_ITEMS:
            return None, text
        return None, "\n".join([*lines, title[:MAX_USER_CHARACTERS]])


def build(inspector: Inspector) -> gr.Blocks:
    """The page of a run."""
    page = Page(inspector)
    with gr.Blocks(analytics_enabled=False, title=f"{inspector.run.folder.name} · cotrain") as made:
        _part(views.head(inspector))
        with gr.Tabs():
            with gr.Tab("Recommendations"):
                _recommendations(page, made)
            with gr.Tab("Training"):
                _part(page.charts())
    return made


def _recommendations(page: Page, whole: gr.Blocks) -> None:
    inspector = page.inspector
    with gr.Tabs(selected="new" if inspector.no_data else "known"):
        with gr.Tab("A user of the data", id="known"):
            user, hide, another = _known_user(inspector)
        with gr.Tab("A new user", id="new"):
            title, items, recommend = _new_user(inspector)
    person, lists = gr.State(None), _part("", "lists")
    _part("<h2>What the teacher says</h2>")
    ask = gr.Button(
        "Ask the teacher to rank the student's candidates", elem_id="ask",
        visible=not inspector.no_teacher,
    )  # fmt: skip
    answer = _part(page.before_asking(), "answer")
    _part("<h2>Why</h2>")
    reasons = _part("", "reasons")

    shown: Any = [person, lists, answer, reasons]
    # Who waits for the teacher keeps nobody from looking at lists.
    of_student: Any = {
        "concurrency_id": "student", "concurrency_limit": 1, "api_visibility": "private",
    }  # fmt: skip
    of_teacher: Any = of_student | {"concurrency_id": "teacher", "show_progress": "minimal"}
    quietly: Any = of_student | {"show_progress": "hidden"}
    user.input(page.show_user, [user, hide], shown, **of_student)
    hide.input(page.show_user, [user, hide], shown, **of_student)
    another.click(page.show_any, hide, [user, *shown], **of_student)
    title.input(page.add_title, [title, items], [title, items], **quietly)
    recommend.click(page.show_new, items, shown, **of_student)
    ask.click(page.ask, person, answer, **of_teacher)
    if not inspector.no_data:  # somebody to look at before anybody is chosen
        whole.load(page.show_any, hide, [user, *shown], **of_student)


def _known_user(inspector: Inspector) -> tuple[gr.Dropdown, gr.Checkbox, gr.Button]:
    if inspector.no_data:
        _part(views.notice(inspector.no_data, "quiet"))
    with gr.Row(visible=not inspector.no_data):
        user = gr.Dropdown(
            [] if inspector.no_data else inspector.some_users(), value=None,
            label="User id: type to search", allow_custom_value=True, scale=4, min_width=260,
            elem_id="user",
        )  # fmt: skip
        another = gr.Button("Another user", scale=1, min_width=140, elem_id="another")
    hide = gr.Checkbox(
        True, label="Hide what they took next from the models", container=False, elem_id="hide",
        visible=not inspector.no_data,
    )  # fmt: skip
    return user, hide, another


def _new_user(inspector: Inspector) -> tuple[gr.Dropdown, gr.Textbox, gr.Button]:
    with gr.Row():
        title = gr.Dropdown(
            inspector.some_titles(), value=None, label="Find a title and add it",
            allow_custom_value=True, min_width=260, elem_id="title",
        )  # fmt: skip
        items = gr.Textbox(
            label=f"What they took: titles or ids, one a line, latest last, at most {MAX_ITEMS}",
            lines=4, max_lines=8, max_length=MAX_TEXT_CHARACTERS, min_width=260, elem_id="items",
        )  # fmt: skip
    return title, items, gr.Button("Recommend", variant="primary", elem_id="recommend")


def _part(html: str, name: str | None = None) -> gr.HTML:
    return gr.HTML(html, elem_id=name, elem_classes="ct-part", apply_default_css=False)


def make_app(inspector: Inspector, host: str) -> Guard:
    """The page as an ASGI application that answers nothing else."""
    blocks = build(inspector).queue(max_size=_WAITING)
    theme = gr.Theme(
        primary_hue="blue", neutral_hue="slate", radius_size="lg", font=_FONT, font_mono=_MONO
    )
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None), blocks, path="/", theme=theme, css=views.stylesheet(),
        allowed_paths=[], blocked_paths=["/"], show_error=False, max_file_size=0, ssr_mode=False,
        pwa=False, mcp_server=False, enable_monitoring=False, footer_links=[], run_history=False,
    )  # fmt: skip
    open_to_all = host in ("0.0.0.0", "::")
    return Guard(app, None if open_to_all else {*_LOCAL, host})


def serve(inspector: Inspector, host: str, port: int, say: Callable[[str], None] = print) -> None:
    """Serves the page until it is interrupted.

    Args:
        inspector: Looks at the run.
        host: Address to listen on.
        port: 0: any that is free.
        say: Is told where the page is.

    Raises:
        ConfigError: Nothing can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {host} port {port}: {error.strerror}. Choose another --port, or an "
            "address of this machine for --host."
        ) from error
    app = make_app(inspector, host)
    name = f"[{host}]" if ":" in host else host
    say(f"Looking at {inspector.run.folder}: http://{name}:{listening.getsockname()[1]}")
    if host not in _LOCAL:
        say("Everybody who reaches this machine can look at the run, and ask its teacher.")
    say("Ctrl-C ends it.")
    uvicorn.Server(server_settings(app)).run(sockets=[listening])


def server_settings(app: Guard) -> uvicorn.Config:
    """Of the page's server, which ends though a browser keeps a connection open."""
    return uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
