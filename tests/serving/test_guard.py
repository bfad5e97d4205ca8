"""What the server answers at all."""

import asyncio
from typing import Any

import pytest

from cotrain.serving.guard import MAX_BODY_BYTES, Guard


def answer(method: str, path: str, hosts: Any = ("localhost",), **headers: str) -> tuple[int, Any]:
    """Status and headers for one request; an application behind it would say 200."""
    sent: list[Any] = []

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})

    async def receive() -> Any:
        raise AssertionError("nothing is read of what is refused")

    async def send(message: Any) -> None:
        sent.append(message)

    headers = {"host": "localhost:7860"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw}
    asyncio.run(Guard(inside, hosts)(scope, receive, send))
    assert sent[-1]["body"] == (b"inside" if sent[0]["status"] == 200 else sent[-1]["body"])
    return sent[0]["status"], dict(sent[0]["headers"])


@pytest.mark.parametrize(
    "path",
    [
        "/", "/config", "/theme.css", "/assets/index-a_1.js", "/static/fonts/x.woff2",
        "/gradio_api/queue/data", "/gradio_api/heartbeat/abc123", "/gradio_api/startup-events",
    ],
)  # fmt: skip
def test_what_the_page_needs_passes(path: str):
    status, headers = answer("GET", path)
    assert status == 200
    assert headers[b"content-security-policy"].startswith(b"default-src 'self'")
    assert headers[b"x-content-type-options"] == b"nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "/file=/etc/passwd", "/gradio_api/file=/etc/passwd", "/gradio_api/file=report.json",
        "/gradio_api/file=https://example.org/", "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=https://example.org/", "/gradio_api/upload_progress", "/monitoring",
        "/gradio_api/deep_link", "/static/../../etc/passwd", "/assets/..", "/assets/a\\..\\b",
        "//etc/passwd", "/assets/\x00", "/gradio_api/stream/a/b/1/playlist-file", "/svelte/x.js",
        "/gradio_api/custom_component/1/client/x/style.css", "/docs", "/openapi.json", "/login",
        "/gradio_api/vibe-code", "/gradio_api/queue/join", "/gradio_api/heartbeat/../x",
    ],
)  # fmt: skip
def test_everything_else_is_refused(path: str):
    assert answer("GET", path)[0] == 404
    assert answer("HEAD", path)[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "/", "/gradio_api/upload", "/gradio_api/run/predict", "/gradio_api/call/ask",
        "/gradio_api/component_server", "/gradio_api/vibe-edit", "/gradio_api/process_recording",
        "/login",
    ],
)  # fmt: skip
def test_nothing_can_be_left_there(path: str):
    assert answer("POST", path, content_length="2")[0] == 404
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert answer(method, "/")[0] == 404


def test_long_requests_are_refused_unread():
    path = "/gradio_api/queue/join"
    assert answer("POST", path, content_length=str(MAX_BODY_BYTES))[0] == 200
    assert answer("POST", path, content_length=str(MAX_BODY_BYTES + 1))[0] == 413
    assert answer("POST", path)[0] == 411
    assert answer("POST", path, content_length="-1")[0] == 411


def test_another_name_for_this_machine_is_refused():
    assert answer("GET", "/", host="evil.example:7860")[0] == 421
    assert answer("GET", "/", host="LOCALHOST")[0] == 200
    assert answer("GET", "/", host="[::1]:7860", hosts=["[::1]"])[0] == 200
    assert answer("GET", "/", host="")[0] == 421
    assert answer("GET", "/", host="any.example", hosts=None)[0] == 200
