"""The words of a prompt: small text files with named fields, shipped ones and the user's own.

A file has sections, each headed by a line `=== name`; lines that start with # before the first one
are comments. Fields stand in braces; a literal brace is doubled. Empty lines at the start and end
of a section do not count. Which sections there are and which fields each one takes is told by a
`Kind`: `RANKING` here, another where rationales are asked for.
"""

import dataclasses
import difflib
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cotrain.errors import ConfigError, some_of

_HEADING = "==="


@dataclass(frozen=True)
class Section:
    """What a section of a template must and may hold.

    Attributes:
        once: Fields that it has exactly once.
        optional: Fields that it may have.
        required: Whether a file must have the section, and not empty.
    """

    once: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    required: bool = True


@dataclass(frozen=True)
class Kind:
    """Templates for one purpose.

    Attributes:
        option: The setting that names one.
        folder: Where the shipped ones lie.
        sections: By name, what there may be.
        words: Fields that may stand in a section more than once.
        further: What is wrong between fields that are all there.
    """

    option: str
    folder: Path
    sections: Mapping[str, Section]
    words: Sequence[str]
    further: Callable[[Mapping[str, str]], list[str]]


_WORDS = ("noun", "num_candidates")
SECTIONS = {
    "system": Section(optional=_WORDS, required=False),
    "user": Section(once=("instruction", "history", "candidates"), optional=_WORDS),
    "history_item": Section(once=("title",), optional=("categories", "popularity")),
    "candidate": Section(once=("identifier", "title"), optional=("categories", "popularity")),
    "categories": Section(once=("categories",), required=False),
    "instruction": Section(optional=_WORDS),
    "instruction_cot": Section(optional=_WORDS),
    "reasoning": Section(optional=_WORDS, required=False),
    "answer": Section(optional=_WORDS),
}


@dataclass(frozen=True)
class Template:
    """A prompt's words, with the fields of `SECTIONS` still in them.

    Attributes:
        name: As the user gave it.
        user: The message to the teacher. The part before the first of {history} and {candidates} is
            the same in every prompt of a run and computed once, so the longer the cheaper.
        history_item: One line of the history.
        candidate: One line of the candidates; {popularity} in a line is how often the item was
            taken in training, 0 to 9 by shares of a tenth of all interactions.
        instruction: What {instruction} stands for in the modes direct and generate.
        instruction_cot: The same in the mode cot.
        answer: Opens the teacher's ranking; ends with the bracket before the first identifier.
        system: The system message; may be empty.
        categories: What {categories} stands for in the line of an item that has categories.
        reasoning: Opens the teacher's reasoning in the mode cot; may be empty.
    """

    name: str
    user: str
    history_item: str
    candidate: str
    instruction: str
    instruction_cot: str
    answer: str
    system: str = ""
    categories: str = ""
    reasoning: str = ""


def cut(text: str, values: Mapping[str, str], fields: Sequence[str] = ()) -> list[str]:
    """Text with some of its fields filled, cut where the others stand.

    Args:
        text: A section of a template.
        values: Text of fields by name; braces in it mean nothing.
        fields: Names of fields at which to cut.

    Returns:
        Text, field name, text, …, text: one more text than fields.
    """
    pieces = [""]
    for literal, field, _, _ in string.Formatter().parse(text):
        pieces[-1] += literal
        if field in fields:
            pieces += [str(field), ""]
        elif field is not None:
            pieces[-1] += values[field]
    return pieces


def load_template(name_or_path: str) -> Template:
    """A shipped template, or one from a file.

    Args:
        name_or_path: `default`, `movies`, `products`, or the path of a text file.

    Raises:
        ConfigError: There is no such template, or it cannot be read; or all of its mistakes.
    """
    return parse_template(read_template(name_or_path, RANKING), name_or_path)


def parse_template(text: str, name: str) -> Template:
    """A template from the content of its file.

    Raises:
        ConfigError: Names every missing, unknown or repeated section and field at once.
    """
    return Template(name=name, **parse_sections(text, name, RANKING))


def read_template(name_or_path: str, kind: Kind) -> str:
    """Content of a template's file; arguments and errors as for `load_template`."""
    known = sorted(path.stem for path in kind.folder.glob("*.txt"))
    path = kind.folder / f"{name_or_path}.txt"
    if name_or_path not in known:
        path = Path(name_or_path).expanduser()
        # A word without folder or ending is taken for the name of a template, misspelt.
        if not path.exists() and path.name == name_or_path and not path.suffix:
            close = difflib.get_close_matches(name_or_path, known, n=1, cutoff=0.5)
            meant = f"; the nearest known one is {close[0]!r}" if close else ""
            raise ConfigError(
                f"{kind.option} {name_or_path!r} is unknown{meant}. Known: {some_of(known)}; "
                "expected one of them, or the path of a text file."
            )
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{kind.option} {name_or_path!r} cannot be read: {error.strerror}. Expected one of "
            f"{some_of(known)}, or the path of a text file."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{kind.option} {name_or_path!r} is not UTF-8 text: {error}. Save it as such."
        ) from error


def parse_sections(text: str, name: str, kind: Kind) -> dict[str, str]:
    """Sections of a template by name; errors as for `parse_template`."""
    problems: list[str] = []
    sections = _sections(text, kind, problems)
    for section, content in sections.items():
        problems += _field_problems(section, content, kind)
    for section, rule in kind.sections.items():
        if rule.required and not sections.get(section):
            state = "empty" if section in sections else "missing"
            problems.append(f"section {section!r} is {state}; head it by `{_HEADING} {section}`.")
    if not problems:
        problems = kind.further(sections)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{kind.option} {name!r} has {len(problems)} mistake(s):\n{listed}")
    return sections


def _sections(text: str, kind: Kind, problems: list[str]) -> dict[str, str]:
    """Content of each known section; the others become problems."""
    contents: dict[str, list[str]] = {}
    lines: list[str] = []  # of the section being read; of none where it is unknown
    before = True
    for line in text.split("\n"):
        if line.startswith(_HEADING):
            before, lines = False, []
            section = line.removeprefix(_HEADING).strip()
            if section in contents:
                problems.append(f"section {section!r} is there twice; keep one.")
            elif section in kind.sections:
                contents[section] = lines
            else:
                close = difflib.get_close_matches(section, kind.sections, n=1, cutoff=0.5)
                meant = f"; the nearest known one is {close[0]!r}" if close else ""
                expected = ", ".join(kind.sections)
                problems.append(f"section {section!r} is unknown{meant}. Known: {expected}.")
        elif before and line.strip() and not line.startswith("#"):
            problems.append(
                f"{line[:40]!r} stands before the first section; expected `{_HEADING} user` or the "
                "like, or a comment, with # in front."
            )
            before = False  # one such line is enough to tell
        else:
            lines.append(line)
    return {section: "\n".join(lines).strip("\n") for section, lines in contents.items()}


def _field_problems(section: str, text: str, kind: Kind) -> list[str]:
    """Fields of one section that are missing, unknown, repeated or not plain names."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        return [
            f"section {section!r} has a brace that belongs to no field ({error}); double it to "
            "mean the brace itself."
        ]
    rule = kind.sections[section]
    problems = []
    found = Counter(field for _, field, _, _ in parts if field is not None)
    allowed = (*rule.once, *rule.optional)
    for field in found:
        if field not in allowed:
            expected = ", ".join(f"{{{name}}}" for name in allowed)
            shown = " ".join(field.split())  # braces may stand lines apart
            problems.append(
                f"section {section!r} has the unknown field {{{shown}}}; known there: {expected}. "
                "For literal braces double them."
            )
        elif found[field] > 1 and field not in kind.words:
            problems.append(
                f"section {section!r} has {{{field}}} {found[field]} times; expected once."
            )
    problems += [
        f"section {section!r} formats {{{field}}} by {spec or conversion!r}; expected a name alone."
        for _, field, spec, conversion in parts
        if spec or conversion
    ]
    # An empty section that has to be there is told as such.
    if text or not rule.required:
        problems += [
            f"section {section!r} lacks the field {{{field}}}."
            for field in rule.once
            if field not in found
        ]
    return problems


def _further_problems(sections: Mapping[str, str]) -> list[str]:
    """What is wrong between fields that are all there."""
    problems = []
    if "[{identifier}]" not in sections["candidate"]:
        problems.append(
            "section 'candidate' has {identifier} without square brackets; expected [{identifier}]."
        )
    if not sections["answer"].endswith("["):
        problems.append(
            f"section 'answer' ends with {sections['answer'][-10:]!r}; expected [, so that the "
            "next token is an identifier."
        )
    if "[" in sections.get("reasoning", ""):
        problems.append(
            "section 'reasoning' has a square bracket; it marks identifiers, which the reasoning "
            "must not begin with."
        )
    shown = sections["candidate"] + sections["history_item"]
    return problems + categories_problems(shown, sections)


def categories_problems(shown: str, sections: Mapping[str, str]) -> list[str]:
    """What is wrong where the lines of items, `shown`, want categories that have no words."""
    if "{categories}" in shown and "categories" not in sections:
        return [
            "{categories} is used, but section 'categories' is missing: the text that it stands "
            "for, such as ` | {categories}`."
        ]
    return []


RANKING = Kind(
    option="teacher.template",
    folder=Path(__file__).parent / "templates",
    sections=SECTIONS,
    words=_WORDS,
    further=_further_problems,
)
assert {field.name for field in dataclasses.fields(Template)} == {"name", *SECTIONS}
