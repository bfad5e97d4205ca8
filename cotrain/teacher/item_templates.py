"""The words of prompts in which no candidate has a label: for the title of the next item
(`bigrec`), and about one candidate for yes or no (`pointwise`).

They are found by the same name as those of rankings. A file of one's own has the sections of
`ITEMWISE` for one of the two modes, or for both; a file for rankings, which has none of them, is
good here too, and the words of `default` are used.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cotrain.errors import ConfigError
from cotrain.teacher.templates import (
    Kind,
    Section,
    categories_problems,
    parse_sections,
    parse_template,
    read_template,
)

Mode = Literal["bigrec", "pointwise"]
_WORDS = ("noun",)
# What each mode cannot do without.
_NEEDED = {
    "bigrec": ("title", "title_answer"),
    "pointwise": ("yes_no", "yes_no_answer", "candidate"),
}


def _further_problems(sections: Mapping[str, str]) -> list[str]:
    problems = [
        f"section {section!r} goes on after {{{field}}}; expected it at the end, because there the "
        "teacher goes on."
        for section, field in (("title_answer", "title"), ("yes_no_answer", "answer"))
        if section in sections and not sections[section].endswith(f"{{{field}}}")
    ]
    shown = sections.get("candidate", "") + sections["history_item"]
    return problems + categories_problems(shown, sections)


ITEMWISE = Kind(
    option="teacher.template",
    folder=Path(__file__).parent / "templates_itemwise",
    sections={
        "system": Section(optional=_WORDS, required=False),
        "title": Section(once=("history",), optional=_WORDS, required=False),
        "title_answer": Section(once=("title",), optional=_WORDS, required=False),
        "yes_no": Section(once=("history", "candidate"), optional=_WORDS, required=False),
        "yes_no_answer": Section(once=("answer",), optional=_WORDS, required=False),
        "history_item": Section(once=("title",), optional=("categories", "popularity")),
        "candidate": Section(
            once=("title",), optional=("categories", "popularity"), required=False
        ),
        "categories": Section(once=("categories",), required=False),
    },
    words=_WORDS,
    further=_further_problems,
)


@dataclass(frozen=True)
class ItemTemplate:
    """The words of both kinds of prompts, with the fields of `ITEMWISE` still in them.

    Attributes:
        name: As the user gave it; `default` where a file for rankings was given.
        history_item: One line of the history.
        title: The message that asks for the next title.
        title_answer: Opens the answer to it; the title stands at its end.
        yes_no: The message that asks about one candidate.
        yes_no_answer: Opens the answer to it; Yes or No stands at its end.
        candidate: The candidate in it.
        system: The system message; may be empty.
        categories: What {categories} stands for in the line of an item that has categories.
    """

    name: str
    history_item: str
    title: str = ""
    title_answer: str = ""
    yes_no: str = ""
    yes_no_answer: str = ""
    candidate: str = ""
    system: str = ""
    categories: str = ""


assert {field.name for field in dataclasses.fields(ItemTemplate)} == {"name", *ITEMWISE.sections}


def load_item_template(name_or_path: str, mode: Mode) -> ItemTemplate:
    """A shipped template, or one from a file: of this kind, or of rankings.

    Args:
        name_or_path: As `teacher.template`.
        mode: Whose sections must be there.

    Raises:
        ConfigError: There is no such template, or it cannot be read; or all of its mistakes.
    """
    text = read_template(name_or_path, ITEMWISE)
    if not re.search(r"^===\s*(title|yes_no)", text, re.MULTILINE):
        parse_template(text, name_or_path)  # with its mistakes, as in any other mode
        return load_item_template("default", mode)
    template = ItemTemplate(name=name_or_path, **parse_sections(text, name_or_path, ITEMWISE))
    missing = [repr(section) for section in _NEEDED[mode] if not getattr(template, section)]
    if missing:
        raise ConfigError(
            f"teacher.template {name_or_path!r} lacks {' and '.join(missing)}, which teacher.mode "
            f"{mode} needs. Head a section by `=== {missing[0][1:-1]}`, or take a shipped template."
        )
    return template
