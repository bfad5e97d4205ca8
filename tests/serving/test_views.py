"""The page's parts as HTML."""

from html.parser import HTMLParser

from cotrain.errors import DataError
from cotrain.serving import views
from cotrain.serving.inspector import Inspector
from cotrain.serving.records import TOP, Lists, Placed


class Seen(HTMLParser):
    """Tags, attributes and text of a part."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def placed(item: int, place: int, elsewhere: int | None) -> Placed:
    return Placed(item, f"Item {item}", "A|B", place, elsewhere, False)


def test_lines_join_equal_items_and_say_how_they_moved():
    student = [
        placed(7, 1, 2),
        placed(8, 2, 1),
        placed(9, 3, 3),
        placed(4, 4, 11),
        placed(5, 5, None),
    ]
    control = [
        placed(8, 1, 2),
        placed(7, 2, 1),
        placed(9, 3, 3),
        placed(6, 4, 60),
        placed(3, 5, None),
    ]
    lines = views._lines(Lists({"student": student, "control": control}, {}))
    assert [moved for _, _, moved in lines] == ["rose", "fell", "same"]
    (up, first, _), (down, second, _), (same, third, _) = lines
    assert (up, down, same) == (second, first, third)
    assert views._lines(Lists({"student": student}, {})) == []


def test_what_moved_is_said(inspector: Inspector):
    person = inspector.known_user("8")
    student = [
        placed(7, 1, 3),
        placed(8, 2, 1),
        placed(9, 3, 3),
        placed(4, 4, 17),
        placed(5, 5, None),
    ]
    control = [placed(6, 1, 60)]
    lists = Lists({"student": student, "control": control}, {"student": 3, "control": None})
    text = " ".join(Seen(views.person_view(inspector, person, lists)).text.split())
    assert "1 Item 7A · B ▲ 2" in text
    assert "2 Item 8A · B ▼ 1" in text
    assert "3 Item 9A · B =" in text
    assert "4 Item 4A · B new17" in text
    assert "5 Item 5A · B new" in text
    assert "1 Item 6A · B out60" in text
    assert "student: place 3 control: not among its first 100" in text
    assert f"3 of {TOP} are in both lists" in text


def test_nothing_of_the_catalogue_becomes_markup(
    hostile: Inspector, hostile_titles: dict[int, str]
):
    person = hostile.new_user("\n".join(map(str, hostile_titles)))
    parts = [
        views.head(hostile),
        views.person_view(hostile, person, hostile.lists(person)),
        views.answer_view(hostile, hostile.ask(person)),
        views.reasons_view(hostile, hostile.reasons(person)),
        views.notice(DataError(f"no item is called {hostile_titles[50]!r}\n\x1b[2J")),
    ]
    for part in parts:
        seen = Seen(part)
        assert not {"img", "script", "iframe", "a", "link"} & set(seen.tags)
        assert not {name for name in seen.attributes if name.startswith("on")}
    history = Seen(parts[1]).text
    assert all(title in history for title in hostile_titles.values())


def test_an_error_is_one_line():
    seen = Seen(views.notice("two\nlines \x00 <b>x</b> " + "y" * 10_000))
    assert seen.tags == ["div"]
    assert seen.text.startswith("two lines <b>x</b> yyy")
    assert len(seen.text) <= 402
    assert "\n" not in seen.text.strip()


def test_curves_are_drawn(inspector: Inspector):
    seen = Seen(views.charts_view(inspector.charts()))
    assert seen.tags.count("svg") == seen.tags.count("figure") >= 2
    assert "Validation NDCG@10" in seen.text


def test_the_head_says_what_came_of_the_run(inspector: Inspector):
    text = Seen(views.head(inspector)).text
    assert "The teacher helped" in text
    assert f"{inspector.report['student']['test']['ndcg@10']:.4f}" in text
