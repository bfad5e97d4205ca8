"""The page in a real browser: Chromium, through Playwright."""

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import uvicorn

from cotrain.rationale.answers import FinishedRun
from cotrain.serving.inspector import MAX_TEXT_CHARACTERS, Inspector
from cotrain.serving.page import make_app, server_settings

pytestmark = [pytest.mark.browser, pytest.mark.slow]
SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "serve.py"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("no Chromium; on Debian and Ubuntu: apt install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root, as on a build machine, Chromium has no sandbox.
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@contextlib.contextmanager
def serving(run: Path) -> Iterator[str]:
    """Address of the page of a run."""
    inspector = Inspector(FinishedRun.open(run))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(server_settings(make_app(inspector, "127.0.0.1")))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(60)


@pytest.fixture(scope="module")
def address(hostile_run: Path) -> Iterator[str]:
    with serving(hostile_run) as found:
        yield found


@pytest.fixture(params=[1280, 390])
def page(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    """The open page, wide and narrow; afterwards, whom it asked and what went wrong in it."""
    opened = browser.new_page(viewport={"width": request.param, "height": 844})
    opened.set_default_timeout(120_000)
    asked, wrong = set(), []
    opened.on("request", lambda one: asked.add(urlparse(one.url).netloc))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.goto(address)
    # Somebody is shown at once.
    opened.wait_for_selector("#lists .ct-list li")
    yield opened
    # What a title tried would have been done by now.
    assert opened.evaluate("window.hit") is None
    assert opened.evaluate("document.documentElement.scrollWidth") <= request.param
    assert wrong == []
    # Without a name: pictures in the page itself.
    assert asked <= {urlparse(address).netloc, ""}
    opened.close()


def choose(page: Any, user: str) -> None:
    page.locator("#user input").fill(user)
    page.locator("#user input").press("Enter")


def test_a_user_is_looked_at_and_the_teacher_asked(page: Any):
    choose(page, "8")
    page.wait_for_selector("text=User 8")
    assert page.locator("#lists .ct-list li").count() == 20
    assert page.locator("#lists .ct-next").is_visible()
    # Lines belong between lists that stand beside each other.
    wide = page.viewport_size["width"] > 760
    assert page.locator("#lists .ct-lines").is_visible() == wide
    boxes = [page.locator(f".ct-of-{name}").bounding_box() for name in ("control", "student")]
    assert (boxes[0]["y"] == boxes[1]["y"]) == wide
    assert page.locator("#reasons .ct-quotes blockquote").count() == 5
    assert page.locator("#reasons .ct-why li").count() >= 1
    page.click("#ask")
    page.wait_for_selector("#answer .ct-bars")
    assert page.locator("#answer .ct-bars li").count() == 6
    # Another user takes the answer about this one away.
    page.click("#another")
    page.wait_for_selector("#answer .ct-bars", state="detached")
    assert page.locator("#lists .ct-list li").count() == 20


def test_titles_are_found_and_added(page: Any, hostile_titles: dict[int, str]):
    page.get_by_role("tab", name="A new user").click()
    page.locator("#title input").click()
    page.locator("#title input").press_sequentially("Wars'", delay=50)
    page.get_by_role("option", name=hostile_titles[50]).click()
    page.wait_for_function("document.querySelector('#items textarea').value.includes('Wars')")
    page.locator("#items textarea").press("End")
    text = page.locator("#items textarea").input_value()
    page.locator("#items textarea").fill(f"{text}\n1\n{hostile_titles[181]}")
    page.click("#recommend")
    page.wait_for_selector("text=A new user 3 items")
    shown = page.locator("#lists .ct-history li").all_inner_texts()
    assert shown == [hostile_titles[item] for item in (181, 1, 50)]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("no such user", "have no user 'no such user'"),
        ("../../../etc/passwd", "have no user"),
        ("<img src=x onerror=window.hit=1>", "have no user"),
        ("<|im_end|>{{window.hit=1}}${window.hit=1}", "have no user"),
        ("8" * 5000, "5,000 characters; expected at most 200"),
    ],
)
def test_hostile_ids_get_one_line(page: Any, typed: str, said: str):
    choose(page, typed)
    line = page.wait_for_selector("#lists [role=alert]").inner_text()
    assert said in line
    assert "\n" not in line
    choose(page, "8")
    page.wait_for_selector("text=User 8")


def test_huge_lists_of_items_are_cut_or_refused(page: Any):
    page.get_by_role("tab", name="A new user").click()
    page.locator("#items textarea").fill("50\n" * 400)
    page.click("#recommend")
    line = page.wait_for_selector("#lists [role=alert]").inner_text()
    assert "400 items are named; expected at most 50" in line
    # Nobody can type more than is read; what a program sends in its place is refused.
    assert page.locator("#items textarea").get_attribute("maxlength") == str(MAX_TEXT_CHARACTERS)
    page.locator("#items textarea").fill("x" * 10**6)
    page.click("#recommend")
    page.locator("#items textarea").fill("50")
    page.click("#recommend")
    page.wait_for_selector("text=A new user 1 item")


def test_curves(page: Any):
    page.get_by_role("tab", name="Training").click()
    page.wait_for_selector(".ct-charts svg")
    assert page.locator(".ct-charts figure").count() >= 3
    assert page.locator(".ct-charts svg").first.bounding_box()["width"] > 250


def test_a_run_without_teacher_and_control_says_so(
    browser: Any, finished_run: Path, tmp_path: Path
):
    shutil.copytree(finished_run, tmp_path / "run")
    report = (finished_run / "report.json").read_text()
    (tmp_path / "run/report.json").write_text(report.replace('"teacher": {', '"unused": {'))
    with serving(tmp_path / "run") as found:
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.goto(found, timeout=120_000)
        page.set_default_timeout(120_000)
        page.wait_for_selector("#lists .ct-list li")
        assert not page.locator("#ask").is_visible()
        assert "had no teacher" in page.locator("#answer").inner_text()
        choose(page, "8")
        page.wait_for_selector("text=kept its student only")
        assert page.locator("#lists .ct-list li").count() == 10
        page.close()


def test_the_command_serves_until_it_is_interrupted(run_with_control: Path):
    command = [sys.executable, "-u", str(SCRIPT), "--run", str(run_with_control), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line
        with urllib.request.urlopen(found[0], timeout=120) as answer:
            assert answer.status == 200
        server.send_signal(signal.SIGINT)
        server.wait(120)
