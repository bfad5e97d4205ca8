"""The page of a folder of rationales: counts, samples, and that no text of others gets out."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cotrain.data.interactions import InteractionData
from cotrain.rationale.checks import FLAGS
from cotrain.rationale.page import Summary, write_page
from cotrain.rationale.records import Rationale

Make = Callable[..., Rationale]
HOSTILE = "</blockquote><script>alert('&')</script>{{ 7 * 7 }}\"onload=x"
STRATA = [("1–5", 120, 30), ("over 100", 0, 0)]
FACTS = {"Model": "a model", "Drawn": "temperature 0.0"}


@pytest.fixture
def some(small_data: InteractionData, make_rationale: Make) -> list[Rationale]:
    """Of 20 users three each; the second flagged, the third flagged twice and like another's."""
    return [
        make_rationale(
            small_data, user, cut, f"Text {user // 2}." if cut == 3 else f"Text {user} {cut}.",
            flags=[[], ["echo"], ["echo", "too_short"]][cut - 1],
            tokens=[10, 4, None][cut - 1], logprob=[-0.5, None, -1.5][cut - 1],
        )
        for user in range(20)
        for cut in (1, 2, 3)
    ]  # fmt: skip


class Page(HTMLParser):
    """What a browser would show and run: texts by element, and how often each element is there."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.elements: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        self.open.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data


@pytest.fixture
def write(tmp_path: Path, small_data: InteractionData) -> Callable[..., tuple[Page, Any]]:
    """`write(rationales)`: the page, and the report as it is read back."""

    def made(
        rationales: list[Rationale], data: InteractionData = small_data, history_length: int = 10,
        facts: dict[str, Any] = FACTS, strata: Any = STRATA,
    ) -> tuple[Page, Any]:  # fmt: skip
        path = write_page(facts, strata, Summary.of(rationales), data, history_length, tmp_path)
        assert path == tmp_path / "rationales.html"
        assert {file.name for file in tmp_path.iterdir()} == {"rationales.html", "report.json"}
        page = Page(path.read_text(encoding="utf-8"))
        return page, json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))

    return made


# ---- counts -------------------------------------------------------------------------------------


def test_everything_is_counted(some: list[Rationale]):
    report = Summary.of(some).as_report()
    assert report == {
        "rows": 60,
        "users": 20,
        "different_texts": 40 + 10,
        "clean": 20,
        "clean_share": 1 / 3,
        "flags": {name: {"echo": 40, "too_short": 20}.get(name, 0) for name in FLAGS},
        "tokens": 20 * 14,
        "mean_tokens": 7.0,
        "mean_logprob": -1.0,
    }


def test_nothing_is_counted_as_nothing():
    report = Summary.of([]).as_report()
    assert (report["rows"], report["clean_share"], report["tokens"]) == (0, 0, 0)
    assert (report["mean_tokens"], report["mean_logprob"]) == (None, None)


def test_rationales_are_read_once_and_not_kept(some: list[Rationale]):
    summary = Summary.of(iter(some))
    assert summary.rows == 60
    assert {kind: len(kept) for kind, kept in summary.samples.items()} == {"clean": 5, "flagged": 5}


# ---- samples ------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_samples(some: list[Rationale]):
    first = Summary.of(some, seed=1).samples
    assert Summary.of(some, seed=1).samples == first
    assert Summary.of(some, seed=2).samples != first
    for kind, kept in first.items():
        assert len({rationale.key for rationale in kept}) == 5
        assert all(bool(rationale.flags) == (kind == "flagged") for rationale in kept)


def test_every_rationale_is_as_likely_to_be_a_sample(some: list[Rationale]):
    """The last as much as the first."""
    counts = {kind: Counter[Any]() for kind in ("clean", "flagged")}
    for seed in range(2000):
        for kind, kept in Summary.of(some, seed).samples.items():
            counts[kind].update(rationale.key for rationale in kept)
    for kind, total in (("clean", 20), ("flagged", 40)):
        expected = 2000 * 5 / total
        assert len(counts[kind]) == total
        assert max(abs(count - expected) for count in counts[kind].values()) < 6 * expected**0.5


def test_few_are_all_shown(some: list[Rationale]):
    assert Summary.of(some[:7]).samples == {
        "clean": [some[0], some[3], some[6]],
        "flagged": [some[1], some[2], some[4], some[5]],
    }


# ---- report.json --------------------------------------------------------------------------------


def test_the_report_has_what_was_asked_and_what_came(write: Any, some: list[Rationale]):
    _, report = write(some)
    assert report == {
        "asked": FACTS,
        "strata": [list(stratum) for stratum in STRATA],
        **Summary.of(some).as_report(),
    }


# ---- the page -----------------------------------------------------------------------------------


def test_the_page_shows_counts_strata_and_facts(write: Any, some: list[Rationale]):
    page, _ = write(some)
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert facts == {
        "Rationales": "60", "Without a flag": "33.3 %", "Different texts": "50", "Users": "20",
        "Tokens each": "7.0", "Mean log-probability": "-1.00",
    }  # fmt: skip
    assert page.texts["th"][5:15] == list(FLAGS)
    cells = page.texts["td"]
    place = cells.index(FLAGS["echo"])
    assert cells[place + 1 : place + 3] == ["40", "66.7 %"]
    place = cells.index("120")
    assert cells[place : place + 4] == ["120", "30", "0", "0"]
    for label, value in FACTS.items():
        assert label in page.texts["th"]
        assert value in cells
    assert page.texts["h1"] == ["Rationales of small"]


def test_samples_show_what_was_asked_and_said(
    write: Any, small_data: InteractionData, make_rationale: Make
):
    user, cut = 5, 30
    flagged = make_rationale(small_data, user, cut, "Some text.", flags=["echo", "too_short"])
    empty = dataclasses.replace(make_rationale(small_data, 7, 2), rationale="", flags=["empty"])
    clean = make_rationale(small_data, 6, 1, logprob=None)
    page, _ = write([flagged, empty, clean], history_length=4)
    titles, categories = small_data.catalog.titles, small_data.catalog.categories
    shown = [(6, 1), (user, cut), (7, 2)]
    histories = [small_data.history(of)[max(0, at - 4) : at] for of, at in shown]
    assert page.texts["li"] == [titles[item] for history in histories for item in history]
    targets = [small_data.history(of)[at] for of, at in shown]
    for text, item in zip(
        [text for text in page.texts["p"] if text.startswith("→")], targets, strict=True
    ):
        assert text.strip() == f"→ {titles[item]}"
    assert page.texts["blockquote"] == [clean.rationale, "Some text.", "(nothing)"]
    notes = page.texts["span"]
    for item in targets:
        assert categories[item].replace("|", ", ") in notes
        assert any(f"taken {small_data.train_counts[item]} times" in note for note in notes)
    tags = [note for note in notes if note in ("clean", *FLAGS)]
    assert tags == ["clean", "echo", "too_short", "empty"]
    assert sum("log-probability -0.50" in note for note in notes) == 2


def test_what_the_writer_does_not_tell_is_left_out(write: Any, some: list[Rationale]):
    page, report = write([dataclasses.replace(r, tokens=None, logprob=None) for r in some])
    assert page.texts["dt"] == ["Rationales", "Without a flag", "Different texts", "Users"]
    assert (report["mean_tokens"], report["mean_logprob"]) == (None, None)


def test_a_page_of_nothing_says_so(write: Any):
    page, _ = write([])
    assert "There are none yet." in page.texts["p"]
    assert "blockquote" not in page.elements


def test_texts_of_others_stay_texts(write: Any, small_data: InteractionData, make_rationale: Make):
    """Titles, categories, rationales, names and facts come from anywhere."""
    catalog = small_data.catalog
    hostile = dataclasses.replace(
        small_data,
        name=HOSTILE,
        catalog=dataclasses.replace(
            catalog,
            titles=["", *(f"{title} {HOSTILE}" for title in catalog.titles[1:])],
            categories=["", *[HOSTILE] * (len(catalog) - 1)],
        ),
    )
    rationale = make_rationale(hostile, 0, 9, HOSTILE, flags=["echo"])
    plain, _ = write([make_rationale(small_data, 0, 9, "Plain.", flags=["echo"])])
    page, report = write([rationale], hostile, facts={HOSTILE: HOSTILE}, strata=[(HOSTILE, 1, 1)])
    assert page.texts["blockquote"] == [HOSTILE]
    assert page.texts["h1"] == [f"Rationales of {HOSTILE}"]
    assert HOSTILE in page.texts["td"]
    assert page.texts["li"][0].endswith(HOSTILE)
    assert "script" not in page.elements
    # As many elements as of harmless texts, but for one fact and one stratum less.
    assert plain.elements - page.elements == Counter({"tr": 2, "th": 2, "td": 3})
    assert page.attributes <= plain.attributes
    assert report["asked"] == {HOSTILE: HOSTILE}


def test_the_page_needs_nothing_from_elsewhere(write: Any, some: list[Rationale]):
    page, _ = write(some)
    assert not {"src", "href", "srcset", "action"} & page.attributes
    assert not {"script", "link", "img", "iframe"} & page.elements.keys()
