"""Template files: what they may hold, and that every mistake in one is told at once."""

import re
import string
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cotrain.errors import ConfigError
from cotrain.teacher.templates import RANKING, SECTIONS, cut, load_template, parse_template

SHIPPED = sorted(path.stem for path in RANKING.folder.glob("*.txt"))
GOOD = {
    "system": "Be brief.",
    "user": "{instruction}\n\nSeen:\n{history}\nNext:\n{candidates}",
    "history_item": "* {title}",
    "candidate": "[{identifier}] {title}{categories}",
    "categories": " / {categories}",
    "instruction": "Rank {num_candidates} {noun}s.",
    "instruction_cot": "Think, then rank.",
    "reasoning": "So",
    "answer": "Best first: [",
}


def text_of(sections: dict[str, str]) -> str:
    return "".join(f"=== {name}\n{content}\n\n" for name, content in sections.items())


def without(*names: str) -> dict[str, str]:
    return {name: text for name, text in GOOD.items() if name not in names}


def mistakes(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_template(text, "mine.txt")
    heading, *lines = str(caught.value).splitlines()
    assert heading == f"teacher.template 'mine.txt' has {len(lines)} mistake(s):"
    return [line.removeprefix("  - ") for line in lines]


# ---- shipped ones -------------------------------------------------------------------------------


def test_the_shipped_templates():
    assert SHIPPED == ["brief", "brief-popularity", "default", "movies", "products"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_template_shares_its_instruction_and_names_no_identifier(name):
    template = load_template(name)
    assert template.name == name
    shared, _, rest = template.user.partition("{history}")
    assert "{instruction}" in shared
    # What follows the candidates is read anew for every row.
    assert rest.endswith("{candidates}")
    # An order shown as an example would speak for the identifiers that it begins with.
    for text in (template.system, template.instruction, template.instruction_cot, shared):
        assert "[" not in text
        assert not re.search(r"\b[B-HJ-Z1-9]\b", text)
    assert template.reasoning
    assert ("{categories}" in template.candidate) == (not name.startswith("brief"))


# ---- files --------------------------------------------------------------------------------------


def test_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "# Mine: with {anything}.\n\n" + text_of(GOOD)
    (tmp_path / "mine.txt").write_bytes(("\ufeff" + text).replace("\n", "\r\n").encode())
    template = load_template(str(tmp_path / "mine.txt"))
    for section, content in GOOD.items():
        assert getattr(template, section) == content
    monkeypatch.chdir(tmp_path)
    assert load_template("mine.txt").user == template.user
    # The name of a shipped one is that, whatever lies around.
    (tmp_path / "movies").write_text("no template")
    assert load_template("movies").name == "movies"


def test_optional_sections():
    sections = without("system", "reasoning", "categories") | {"candidate": "[{identifier}]{title}"}
    template = parse_template(text_of(sections), "mine")
    assert template.system == template.reasoning == template.categories == ""
    assert parse_template(text_of(GOOD | {"system": "", "reasoning": ""}), "x").system == ""


def test_spaces_inside_a_section_stay():
    template = parse_template(text_of(GOOD | {"categories": "\n  ({categories}) \n"}), "mine")
    assert template.categories == "  ({categories}) "


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("movie", ["is unknown; the nearest known one is 'movies'", "'default', 'movies', 'prod"]),
        ("zzz", ["'zzz' is unknown. Known: 'brief'", "path of a text file"]),
        ("nowhere/default.txt", ["cannot be read: No such file", "'default', 'movies'"]),
        ("none.txt", ["cannot be read: No such file"]),
        (".", ["cannot be read: Is a directory"]),
    ],
)
def test_unknown_names_and_unreadable_files(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_template(name)
    message = str(caught.value)
    assert message.startswith(f"teacher.template {name!r}")
    for part in said:
        assert part in message


def test_a_file_in_another_encoding_is_told(tmp_path: Path):
    (tmp_path / "mine.txt").write_bytes(text_of(GOOD).replace("Seen", "Schön").encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_template(str(tmp_path / "mine.txt"))


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (without("user"), "section 'user' is missing; head it by `=== user`."),
        (GOOD | {"answer": ""}, "section 'answer' is empty"),
        (GOOD | {"user": "\n"}, "section 'user' is empty"),
        (GOOD | {"instructions": "x"}, "'instructions' is unknown; the nearest known one is 'ins"),
        (GOOD | {"qqq": "x"}, "section 'qqq' is unknown. Known: system, user,"),
        (GOOD | {"candidate": "[{identifier}] x"}, "section 'candidate' lacks the field {title}."),
        (GOOD | {"candidate": "{title}"}, "section 'candidate' lacks the field {identifier}."),
        (GOOD | {"history_item": "x"}, "section 'history_item' lacks the field {title}."),
        (GOOD | {"categories": "x"}, "section 'categories' lacks the field {categories}."),
        (
            GOOD | {"history_item": "{title} {names}"},
            "section 'history_item' has the unknown field {names}; known there: {title}, {categ",
        ),
        (GOOD | {"system": "{history}"}, "section 'system' has the unknown field {history}"),
        (GOOD | {"history_item": "{} {title}"}, "has the unknown field {}"),
        (GOOD | {"history_item": "{title.x} {title}"}, "has the unknown field {title.x}"),
        (
            GOOD | {"user": GOOD["user"] + "{history}"},
            "section 'user' has {history} 2 times; expected once.",
        ),
        (GOOD | {"history_item": "{title:>9}"}, "section 'history_item' formats {title} by '>9'"),
        (GOOD | {"history_item": "{title!r}"}, "section 'history_item' formats {title} by 'r'"),
        (GOOD | {"system": "a } b"}, "section 'system' has a brace that belongs to no field"),
        (GOOD | {"system": "a {"}, "section 'system' has a brace that belongs to no field"),
        (
            GOOD | {"candidate": "{identifier}. {title}"},
            "'candidate' has {identifier} without square brackets; expected [{identifier}].",
        ),
        (GOOD | {"answer": "Ranking: "}, "section 'answer' ends with 'Ranking: '; expected ["),
        (GOOD | {"reasoning": "[A] is"}, "section 'reasoning' has a square bracket"),
        (without("categories"), "{categories} is used, but section 'categories' is missing"),
    ],
)
def test_each_mistake_is_named(sections, said):
    (told,) = mistakes(text_of(sections))
    assert said in told


def test_all_mistakes_of_a_file_at_once():
    text = "Hello\n" + text_of(
        without("instruction") | {"history_item": "{titel}", "candidates": "x", "system": "{"}
    )
    told = mistakes(text + "=== user\nagain\n")
    for part in (
        "'Hello' stands before the first section", "unknown field {titel}",
        "'history_item' lacks the field {title}", "section 'candidates' is unknown",
        "section 'system' has a brace", "section 'instruction' is missing",
        "section 'user' is there twice",
    ):  # fmt: skip
        assert len([line for line in told if part in line]) == 1, part
    assert len(told) == 7


def test_an_empty_file_lacks_all_that_it_needs():
    needed = [name for name, rule in SECTIONS.items() if rule.required]
    assert len(mistakes("")) == len(needed) == 6


# ---- filling ------------------------------------------------------------------------------------


def test_filled_and_cut_by_hand():
    values = {"noun": "mo{v}ie", "identifier": "A"}
    assert cut("a {noun} {{b}}", values) == ["a mo{v}ie {b}"]
    assert cut("[{identifier}] {title}{categories}", values, ("title", "categories")) == [
        "[A] ", "title", "", "categories", "",
    ]  # fmt: skip
    assert cut("", values) == [""]
    assert cut("{title}", {}, ("title",)) == ["", "title", ""]


@given(
    parts=st.lists(
        st.text(max_size=5) | st.sampled_from(["{title}", "{noun}", "{{", "}}"]).map(lambda f: (f,))
    )
)
def test_filling_is_that_of_python(parts):
    """A literal text comes back whatever is in it; cuts joined are the text filled."""
    escaped = "".join(
        part[0] if isinstance(part, tuple) else part.replace("{", "{{").replace("}", "}}")
        for part in parts
    )
    expected = escaped.format(title="{title}", noun="n{o}un")
    pieces = cut(escaped, {"noun": "n{o}un"}, ("title",))
    pieces[1::2] = [f"{{{field}}}" for field in pieces[1::2]]
    assert "".join(pieces) == expected
    assert len(pieces) == 2 * parts.count(("{title}",)) + 1


@settings(max_examples=200)
@given(
    st.lists(
        st.sampled_from(
            [*(f"=== {name}\n" for name in GOOD), *GOOD.values(), "\n", "{", "}", "==="]
        )
        | st.text(alphabet=string.printable, max_size=8)
    ).map("".join)
)
@example("=== system\n{=== system\n}")  # a field over two lines was a mistake over two lines
def test_any_text_is_a_template_or_a_list_of_mistakes(text):
    try:
        template = parse_template(text, "mine.txt")
    except ConfigError:
        assert mistakes(text)
    else:
        assert template.answer.endswith("[")
