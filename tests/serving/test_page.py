"""The page's controls and its server, without a browser."""

import importlib.util
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from cotrain.errors import CheckpointError, ConfigError
from cotrain.serving.inspector import MAX_ITEMS, Inspector
from cotrain.serving.page import Page, make_app, serve

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "serve.py"
specification = importlib.util.spec_from_file_location("serve_script", SCRIPT)
assert specification is not None
assert specification.loader is not None
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)


@pytest.fixture(scope="module")
def client(hostile: Inspector) -> TestClient:
    return TestClient(make_app(hostile, "127.0.0.1"), base_url="http://127.0.0.1")


def test_controls_show_people_or_one_line(inspector: Inspector):
    page = Page(inspector)
    person, lists, answer, reasons = page.show_user("8", True)
    assert person is not None
    assert "Nearest to this person" in reasons
    assert lists.count("<li") > 20
    assert answer == ""
    user, _, lists, *_ = page.show_any(True)
    assert f"User {user}" in lists
    for nobody in ("x", "", ["8"], {"path": "/etc/passwd"}, "8" * 10**6):
        person, lists, *rest = page.show_user(nobody, True)
        assert person is None
        assert lists.startswith('<div class="ct-notice ct-error" role="alert">')
        assert rest == ["", ""]
    assert page.show_new("50\n181")[0] is not None
    assert page.show_new("<b>\n" * 20)[0] is None
    assert ["Choose somebody first" in text for text in page.ask(None)] == [True]


def test_who_waits_for_the_teacher_is_told(hostile_run: Path, look_at: Callable[[Path], Inspector]):
    page = Page(look_at(hostile_run))
    person = page.inspector.known_user("8")
    first, second = page.ask(person)
    assert "Loading the teacher" in first
    assert second.count("<li") == 6
    assert len(list(page.ask(person))) == 1


def test_titles_are_added_up_to_a_limit(inspector: Inspector):
    page = Page(inspector)
    assert page.add_title("Fargo", None) == (None, "Fargo")
    assert page.add_title("Fargo", " \nTwister\n") == (None, "Twister\nFargo")
    full = "\n".join(["Twister"] * MAX_ITEMS)
    assert page.add_title("Fargo", full) == (None, full)
    assert page.add_title(["Fargo"], "Twister") == (None, "Twister")


def test_the_server_has_the_page_and_no_file(client: TestClient, hostile_run: Path):
    page = client.get("/")
    assert page.status_code == 200
    assert "gradio" in page.text
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False
    inside = hostile_run / "report.json"
    for path in ("/etc/passwd", str(inside), str(SCRIPT), "https://example.org/", "..%2f..%2fx"):
        for route in ("/file=", "/gradio_api/file=", "/gradio_api/file/", "/gradio_api/proxy="):
            assert client.get(route + path).status_code == 404
    files = {"files": ("x.html", b"<script>")}
    assert client.post("/gradio_api/upload", files=files).status_code == 404
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421


def test_gradio_itself_would_not_read_files_either(hostile: Inspector):
    behind = TestClient(make_app(hostile, "127.0.0.1").app, base_url="http://127.0.0.1")
    inside = hostile.run.folder / "report.json"
    for path in ("/etc/passwd", str(inside), str(SCRIPT)):
        assert behind.get(f"/gradio_api/file={path}").status_code == 403


def test_mistakes_of_the_command_line(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = str(finished_run)
    with pytest.raises(ConfigError, match="--port is 99999"):
        script.main(["--run", run, "--port", "99999"])
    with pytest.raises(CheckpointError, match="no run folder"):
        script.main(["--run", str(tmp_path)])
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name)
    )
    with pytest.raises(ConfigError, match=r"pip install 'cotrain\[serve\]'"):
        script.main(["--run", run])


def test_a_port_that_is_taken(inspector: Inspector):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Cannot listen on 127.0.0.1 port {port}"):
            serve(inspector, "127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"Cannot listen on 203\.0\.113\.1"):
        serve(inspector, "203.0.113.1", 0)


def test_nothing_is_reported_to_gradios_makers():
    from gradio import analytics

    assert not analytics.analytics_enabled()
