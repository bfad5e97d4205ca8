"""Any text in, a permutation or a typed failure out."""

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotrain.teacher.parsing import parse_ranking

LETTERS = [chr(ord("A") + place) for place in range(26)]
NUMBERS = [str(place + 1) for place in range(200)]
FAILURES = {"empty", "no_identifier", "unknown_identifier", "repeated", "truncated"}

# As a model writes them behind the opening bracket that the prompt ends with.
FORMATS: dict[str, Callable[[list[str]], str]] = {
    "as asked": lambda names: " > ".join(f"[{name}]" for name in names),
    "commas": lambda names: ", ".join(f"[{name}]" for name in names),
    "lines": lambda names: "\n".join(f"[{name}]" for name in names),
    "numbered lines": lambda names: "[\n" + "\n".join(
        f"{place}. [{name}]" for place, name in enumerate(names, 1)
    ),
    "lower case": lambda names: " > ".join(f"[{name.lower()}]" for name in names),
    "spaces": lambda names: " > ".join(f"[ {name} ]" for name in names),
    "no separator": lambda names: "".join(f"[{name}]" for name in names),
    "titles": lambda names: " > ".join(f"[{name}] Bug's Life, A (1998) [VHS]" for name in names),
    "titled lines": lambda names: "\n".join(f"[{name}]: A Heat, I | drama" for name in names),
    "opened twice": lambda names: "[" + " > ".join(f"[{name}]" for name in names),
    "bold": lambda names: "[" + " > ".join(f"**[{name}]**" for name in names),
    "one list": lambda names: "[" + ", ".join(names) + "]",
    "bare": lambda names: "[" + " > ".join(names),
    "bare behind the first": lambda names: f"[{names[0]}] > " + " > ".join(names[1:]),
    "bare in places": lambda names: " > ".join(
        f"[{name}]" if place % 2 == 0 else name for place, name in enumerate(names)
    ),
    "bare lines": lambda names: "[" + "\r\n".join(names) + "\n",
    "bare and bold": lambda names: "[" + ", ".join(f"**{name}**" for name in names),
    "arrows": lambda names: "[" + " -> ".join(names) + ".",
    "introduced": lambda names: "[Here is the ranking: " + " > ".join(names),
    "introduced on a line": lambda names: "[I rank them so.\n\n" + ", ".join(names),
    "never closed": lambda names: "[" + " > [".join(names),
}  # fmt: skip


@st.composite
def permutations(draw: st.DrawFn) -> tuple[list[str], list[int]]:
    names = draw(st.sampled_from([LETTERS, NUMBERS]))
    size = draw(st.integers(2, 26))
    return names[:size], draw(st.permutations(range(size)))


@pytest.mark.parametrize("style", FORMATS)
@given(permutations())
def test_every_permutation_comes_back_from_every_tolerated_format(
    style: str, permutation: tuple[list[str], list[int]]
):
    names, order = permutation
    text = FORMATS[style]([names[place] for place in order])
    parsed = parse_ranking(text, names, ended=True)
    assert (parsed.failure, list(parsed.order)) == (None, order)
    assert parsed.first_identifier is not None
    start, end = parsed.first_identifier
    assert text[start:end].upper() == names[order[0]]


# Half of it made of what orders are made of.
PIECES = st.sampled_from([
    *"[]>,;:|→.-*()\n\r ", *LETTERS[:6], "a", "b", "1", "2", "10", "99", "[A]", "[B] ", " > ",
    "[C", "A good choice", "1. ", "Title [VHS], A", "\u200f", "١", "é", "🎬", "\0",
])  # fmt: skip
ANYTHING = st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join))


@given(ANYTHING, st.sampled_from([LETTERS[:2], LETTERS[:4], LETTERS, NUMBERS[:3], NUMBERS]),
       st.booleans())  # fmt: skip
def test_any_text_gives_a_permutation_or_a_typed_failure(text: str, names: list[str], ended: bool):
    parsed = parse_ranking(text, names, ended)
    assert len(set(parsed.order)) == len(parsed.order)
    assert set(parsed.order) <= set(range(len(names)))
    assert (parsed.failure is None) == (len(parsed.order) == len(names))
    assert parsed.failure is None or parsed.failure in FAILURES
    if parsed.failure in ("empty", "no_identifier"):
        assert not parsed.order
    if parsed.failure in ("repeated", "truncated"):
        assert parsed.order
    # Nothing that was not said, and in the order in which it was said.
    rest = text.encode("utf-8", "surrogatepass").upper()
    for place in parsed.order:
        name = names[place].encode()
        assert name in rest
        rest = rest[rest.index(name) + len(name) :]
    if parsed.order:
        assert parsed.first_identifier is not None
        start, end = parsed.first_identifier
        assert text[start:end].upper() == names[parsed.order[0]]
    else:
        assert parsed.first_identifier is None


@given(permutations(), ANYTHING, st.booleans())
def test_anything_may_follow_a_permutation(
    permutation: tuple[list[str], list[int]], more: str, ended: bool
):
    names, order = permutation
    text = FORMATS["as asked"]([names[place] for place in order])
    parsed = parse_ranking(text + more, names, ended)
    assert (parsed.failure, list(parsed.order)) == (None, order)


@given(permutations(), st.integers(0, 150))
def test_a_cut_answer_is_the_beginning_of_the_whole_one(
    permutation: tuple[list[str], list[int]], length: int
):
    names, order = permutation
    text = FORMATS["as asked"]([names[place] for place in order])[:length]
    parsed = parse_ranking(text, names, ended=False)
    assert list(parsed.order) == order[: text.count("]")]


@pytest.mark.parametrize(
    ("text", "failure", "order"),
    [
        ("", "empty", ""),
        ("[", "empty", ""),
        ("[ \n", "empty", ""),
        ("[]", "no_identifier", ""),
        ("[I cannot rank these.", "no_identifier", ""),
        ("[Toy Story] > [Heat]", "no_identifier", ""),
        ("[Z] > [A]", "unknown_identifier", ""),
        ("[1] > [2] > [3] > [4]", "unknown_identifier", ""),
        ("[B] > [Z] > [A]", "unknown_identifier", "B"),
        ("[B] > [A] > [B] > [C]", "repeated", "BA"),
        ("[C] > [A]", "truncated", "CA"),
        ("[C] is what this user would watch next.", "truncated", "C"),
        ("[C", "truncated", "C"),
        ("[C > B", "truncated", "CB"),
        ("[C, [B], [A]", "truncated", "CBA"),
        # Brackets in titles are no identifiers, and commas in titles name nobody.
        ("[C] Bug's Life, A, [B] Room with a View, A [1986], [A] Heat [VHS]", "truncated", "CBA"),
        # Bare words are an order only as a list of nothing else.
        ("[A good choice, I think, is D", "no_identifier", ""),
        ("[I, personally, like B, C", "no_identifier", ""),
        ("[A < B < C < D", "no_identifier", ""),
        ("[A Title > B Title > C Title", "no_identifier", ""),
        ("[a > b > c > d", "no_identifier", ""),
        ("[A > B > C because C, D are alike", "truncated", "AB"),
        ("[D] is best.\nA\nB\nC", "truncated", "D"),
        ("[1. Toy Story\n2. Heat", "no_identifier", ""),
    ],
)  # fmt: skip
def test_defects_have_causes_and_keep_what_was_said(text: str, failure: str, order: str):
    parsed = parse_ranking(text, LETTERS[:4], ended=True)
    assert parsed.failure == failure
    assert [LETTERS[place] for place in parsed.order] == list(order)


def test_a_number_at_the_cut_may_have_been_the_start_of_another():
    assert parse_ranking("[3] > [1", NUMBERS[:10], ended=False).order == (2,)
    assert parse_ranking("[3] > [1", NUMBERS[:10], ended=True).order == (2, 0)
    assert parse_ranking("[3 > 1", NUMBERS[:10], ended=False).order == (2,)
    assert parse_ranking("[3] > [1]", NUMBERS[:10], ended=False).order == (2, 0)


@pytest.mark.parametrize(
    "piece",
    ["[", "[A", "[ ", "[A   ", "[A,", "[A ,  [", "A > ", "A\n", "[A] > ", "[A] ", "1. ", ": ", "-",
     " ", ">", "[Z", "(", "A"],
)  # fmt: skip
def test_time_is_linear_in_the_answer(piece: str):
    text = piece * (100_000 // len(piece))
    started = time.perf_counter()
    parse_ranking(text, LETTERS[:20], ended=False)
    # Quadratic time would be minutes; linear is a tenth of a second on a slow machine.
    assert time.perf_counter() - started < 3
