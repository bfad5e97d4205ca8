"""What the page's server answers at all: an ASGI layer before Gradio.

Gradio has routes that read files it was allowed to, take uploads, fetch other sites and more. The
page needs none of them, so what it needs is listed here and everything else is refused.
"""

import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from cotrain.serving.inspector import MAX_TEXT_CHARACTERS

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_READ = re.compile(
    r"/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|(assets|static)/[\w./-]+"
    r"|gradio_api/(startup-events|info|theme\.css|queue/data|heartbeat/\w+))?/?"
)
_WRITE = re.compile(r"/gradio_api/(queue/join|cancel|reset)/?")
# Everything that somebody may type, in UTF-8, and as much again around it.
MAX_BODY_BYTES = 2 * 4 * MAX_TEXT_CHARACTERS
_HEADERS = [
    # The browser asks nobody but this server, whatever stands in the page.
    (
        b"content-security-policy",
        b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; "
        b"form-action 'self'; object-src 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """Passes on what the page needs, and refuses the rest with one line.

    Args:
        app: The page's.
        hosts: Names by which it may be called, without port; None: by any. A page elsewhere
            whose name somebody points at this machine is refused by this.
    """

    def __init__(self, app: App, hosts: Iterable[str] | None):
        self.app = app
        self.hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # websockets, which the page does not use
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        status, why = self._refused(scope["method"], scope["path"], headers)
        if status:
            await _answer(send, status, why)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _refused(self, method: str, path: str, headers: dict[bytes, bytes]) -> tuple[int, str]:
        """Status and reason; 0 where the request is passed on."""
        host = headers.get(b"host", b"").decode("latin-1")
        if self.hosts is not None and re.sub(r":\d+$", "", host).lower() not in self.hosts:
            return 421, "This page is not served under that name."
        known = _WRITE if method == "POST" else _READ
        if method not in ("GET", "HEAD", "POST") or ".." in path or not known.fullmatch(path):
            return 404, "This page has nothing there."
        if method == "POST":
            length = headers.get(b"content-length", b"")
            if not length.isdigit():
                return 411, "Say how long the request is."
            # The server reads no more of a body than its header says.
            if int(length) > MAX_BODY_BYTES:
                return 413, f"The request is too long: at most {MAX_BODY_BYTES:,} bytes are read."
        return 0, ""


async def _answer(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *_HEADERS,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
