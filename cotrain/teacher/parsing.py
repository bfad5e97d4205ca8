"""Reading the order that a language model wrote: text in, a permutation or a typed failure out.

Pure, total, and linear in the length of the text. What counts as naming an identifier:

- In brackets, anywhere: `[A]`, `[ a ]`, `[10]`; what stands between them, such as titles, is passed
  over. The closing bracket may be missing before `>`, a line's end, another bracket after a comma,
  or the end of the answer. `[Z]` and `[99]` are unknown identifiers where they were not shown;
  `[Remastered]`, `[3D]` and `[1999]` do not look like any and are passed over.
- Bare, only capitals and numbers that stand alone between two `>`. Where no bracket is the model's
  own, because the prompt ends with the first one, also those alone between any separators (`>`
  `,` `;` `|` `→`, line ends), in an unbroken list of two or more that begins the answer, a line, or
  what follows a colon. So `A good choice`, `I, personally, like B` and `A < B` are no orders.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_LOOKS_LIKE_ONE = "[A-Z]|[0-9]{1,3}"
_STRONG = ">→≻"
_LINE_ENDS = "\n\r"
_SEPARATORS = f":,;|{_STRONG}{_LINE_ENDS}"
_MARKS = r"[\s\[\](){}*_\"'`.=\-]"
# No two neighbours in these patterns can match the same character, and a scan that begins at a
# bracket ends before the next one: that keeps the time linear.
_BRACKETED = re.compile(
    r"\[\s*(?:([A-Za-z]|[0-9]{1,3})\s*\]"
    rf"|({_LOOKS_LIKE_ONE})(?=\s*(?:[{_STRONG}]|[,;|]\s*\[|\Z)|[ \t]*[{_LINE_ENDS}]))"
)
_PART = re.compile(rf"[^{_SEPARATORS}]+")
_ALONE = re.compile(rf"{_MARKS}*(?:[0-9]{{1,3}}[.)]{_MARKS}+)?({_LOOKS_LIKE_ONE}){_MARKS}*\Z")
_NOTHING = re.compile(rf"{_MARKS}*\Z")

Span = tuple[int, int]


@dataclass(frozen=True)
class Parsed:
    """What an answer says.

    Attributes:
        order: Positions of the identifiers that were named, best first, up to the first defect.
        failure: None where that is all of them, or else one of
            `empty`: nothing was written;
            `no_identifier`: something was, but no identifier;
            `unknown_identifier`: one that was not shown;
            `repeated`: one that was named before;
            `truncated`: good as far as it goes, but the model stopped or was cut before all were
            named.
            `order` is empty with the first two, may be with the third, and is not otherwise.
        first_identifier: Start and end of the best identifier's characters in the text, without
            brackets; None where `order` is empty.
    """

    order: tuple[int, ...]
    failure: str | None
    first_identifier: Span | None


def parse_ranking(text: str, identifiers: Sequence[str], ended: bool) -> Parsed:
    """The order that `text` names.

    Args:
        text: What was generated, behind the opening bracket that ends the answer prefix:
            `[A] > [B] > …`.
        identifiers: What the candidates are called, capital letters or numbers, as shown.
        ended: Whether the model stopped by itself. Where it was cut, an identifier at the very end
            counts only with its closing bracket: `[1` may have been to become `[10]`.

    Returns:
        A permutation or a typed failure, whatever the text; anything may follow a permutation.
    """
    positions = {identifier: position for position, identifier in enumerate(identifiers)}
    order: dict[int, Span] = {}
    failure = None
    for start, end in _named(text, ended):
        if len(order) == len(positions):
            break
        position = positions.get(text[start:end].upper())
        if position is None or position in order:
            failure = "unknown_identifier" if position is None else "repeated"
            break
        order[position] = (start, end)
    if failure is None and len(order) < len(positions):
        said = text.strip().removeprefix("[").strip()
        failure = "truncated" if order else "no_identifier" if said else "empty"
    return Parsed(tuple(order), failure, next(iter(order.values()), None))


def _named(text: str, ended: bool) -> list[Span]:
    """All that looks like a named identifier, in order of the text."""
    matches = list(_BRACKETED.finditer(text))
    bracketed = [match.span(match.lastindex or 0) for match in matches]
    opening = len(text) - len(text.lstrip())
    own_brackets = any(match.start() > opening for match in matches)
    between, listed = _alone(text)
    if own_brackets:
        spans = sorted({*bracketed, *between})
    else:
        spans = listed if not bracketed or listed[:1] == bracketed else bracketed
    if spans and not ended and not text[spans[-1][1] :].strip(" \t"):
        spans.pop()
    return spans


def _alone(text: str) -> tuple[list[Span], list[Span]]:
    """Identifiers that are all of what separators set apart.

    Returns:
        Those between two `>` or ends of the text; and the first list of them.
    """
    parts = [
        match.span() for match in _PART.finditer(text) if not _NOTHING.match(text, *match.span())
    ]
    between: list[Span] = []
    lists: list[list[Span]] = [[]]
    unbroken = False
    for index, (start, end) in enumerate(parts):
        before = text[parts[index - 1][1] if index else 0 : start]
        after = text[end : parts[index + 1][0] if index + 1 < len(parts) else len(text)]
        alone = _ALONE.match(text, start, end)
        begins = index == 0 or _has(before, ":" + _LINE_ENDS)
        if alone and begins and not (unbroken and ":" not in before):
            lists.append([alone.span(1)])
        elif alone and unbroken:
            lists[-1].append(alone.span(1))
        unbroken = alone is not None and (begins or unbroken)
        first, last = index == 0, index + 1 == len(parts)
        if alone and (first or _has(before, _STRONG)) and (last or _has(after, _STRONG)):
            between.append(alone.span(1))
    enough = 1 if len(parts) == 1 else 2
    return between, next((found for found in lists if len(found) >= enough), [])


def _has(gap: str, characters: str) -> bool:
    return any(character in gap for character in characters)
