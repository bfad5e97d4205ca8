"""Letters and numbers as tokens: what decides between identifiers, however they are split."""

import math
import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotrain.errors import ConfigError, TeacherError
from cotrain.teacher.identifiers import Identifiers, Node, identifier_texts, make_identifiers

CONTEXT = "Next?\nRanking: ["


def made(tokenizer: Any, kind: Any, count: int, context: str = CONTEXT) -> Identifiers:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return make_identifiers(tokenizer, encode, context, kind, count)


def whole(identifiers: Identifiers, index: int) -> list[int]:
    """The tokens at the nodes that an identifier passes, in order."""
    return [identifiers.nodes[node].children[child] for node, child in identifiers.paths[index]]


def merges_of(numbers: list[int]) -> list[tuple[str, str]]:
    return [(str(number)[:-1], str(number)[-1]) for number in numbers]


def test_texts():
    assert identifier_texts("letters", 3) == ["A", "B", "C"]
    assert identifier_texts("letters", 26) == [*string.ascii_uppercase]
    assert identifier_texts("numbers", 11)[-2:] == ["10", "11"]
    with pytest.raises(ConfigError, match="27 candidates in one prompt") as caught:
        identifier_texts("letters", 27)
    assert "teacher.identifiers numbers" in str(caught.value)


def test_letters_are_decided_at_the_root(tokenizer):
    identifiers = made(tokenizer, "letters", 26)
    assert identifiers.texts == tuple(string.ascii_uppercase)
    (root,) = identifiers.nodes
    assert root.prefix == ()
    assert identifiers.first_tokens == root.children
    assert identifiers.are_single_tokens
    assert [tokenizer.decode([token]) for token in root.children] == [*string.ascii_uppercase]
    assert identifiers.paths == tuple(((0, index),) for index in range(26))
    assert identifiers.emitted == tuple((token,) for token in root.children)


def test_numbers_that_are_single_tokens_are_decided_at_the_root(bytes_tokenizer):
    tokenizer = bytes_tokenizer(merges_of([*range(10, 21)]))
    identifiers = made(tokenizer, "numbers", 20)
    assert identifiers.are_single_tokens
    assert len(identifiers.first_tokens) == 20
    assert identifiers.paths == tuple(((0, index),) for index in range(20))
    assert [tokenizer.decode(list(own)) for own in identifiers.emitted] == [*identifiers.texts]


def test_numbers_that_are_split_by_hand(bytes_tokenizer):
    """1 and 10 share their first token: the bracket after it tells them apart."""
    tokenizer = bytes_tokenizer()
    digit = {char: tokenizer.encode(char)[0] for char in "0123456789]"}
    identifiers = made(tokenizer, "numbers", 12)
    assert identifiers.nodes == (
        Node((), tuple(digit[char] for char in "123456789")),
        Node((digit["1"],), tuple(digit[char] for char in "]012")),
    )
    assert identifiers.paths[0] == ((0, 0), (1, 0))
    assert identifiers.paths[1] == ((0, 1),)
    assert identifiers.paths[9:] == (((0, 0), (1, 1)), ((0, 0), (1, 2)), ((0, 0), (1, 3)))
    assert identifiers.emitted[0] == (digit["1"],)
    assert identifiers.emitted[10] == (digit["1"], digit["1"])
    assert not identifiers.are_single_tokens


def test_up_to_a_hundred_numbers_split_into_digits(bytes_tokenizer):
    tokenizer = bytes_tokenizer()
    identifiers = made(tokenizer, "numbers", 100)
    # The root, one node a first digit, and 10, which 100 goes on from.
    assert len(identifiers.nodes) == 11
    assert {tokenizer.decode(list(node.prefix)) for node in identifiers.nodes} == {
        "", *"123456789", "10",
    }  # fmt: skip
    assert tokenizer.decode(whole(identifiers, 99)) == "100"
    assert tokenizer.decode(whole(identifiers, 9)) == "10]"
    # 57 is decided once its second digit stands; nothing begins with it.
    assert tokenizer.decode(whole(identifiers, 56)) == "57"


def test_a_single_identifier_still_has_a_root(tokenizer):
    for kind in ("letters", "numbers"):
        identifiers = made(tokenizer, kind, 1)
        assert identifiers.paths == (((0, 0),),)
        assert len(identifiers.first_tokens) == 1


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 100),
    merged=st.lists(st.integers(10, 99), unique=True, max_size=20),
    data=st.data(),
)
def test_scores_are_a_distribution_however_numbers_are_split(bytes_tokenizer, count, merged, data):
    tokenizer = bytes_tokenizer(merges_of(merged))
    identifiers = made(tokenizer, "numbers", count)
    assert identifiers.nodes[0].prefix == ()
    assert len({*identifiers.paths}) == count
    for node in identifiers.nodes[1:]:
        assert len(node.children) > 1
        # A place that is reached: some identifier goes on from there.
        assert any((*own, -1)[: len(node.prefix)] == node.prefix for own in identifiers.emitted)
    # With any probabilities at the nodes, those of the identifiers sum to 1.
    logprobs = []
    for node in identifiers.nodes:
        drawn = data.draw(st.integers(0, 99))
        weights = [1 + (drawn * (place + 1)) % 7 for place in range(len(node.children))]
        logprobs.append([math.log(weight / sum(weights)) for weight in weights])
    scores = [sum(logprobs[node][child] for node, child in path) for path in identifiers.paths]
    assert sum(map(math.exp, scores)) == pytest.approx(1)
    for text, own in zip(identifiers.texts, identifiers.emitted, strict=True):
        assert tokenizer.decode(list(own)) == text


@pytest.mark.parametrize(
    ("kind", "merges", "broken"),
    [
        ("letters", [("[", "A")], "'A'"),  # the bracket before the identifier is gone
        ("letters", [("B", "]")], "'B'"),
        ("letters", [("[", "A"), ("C", "]")], "'A', 'C'"),
        ("numbers", [("1", "]")], "'1', '11'"),
        ("numbers", [("1", "0"), ("10", "]")], "'10'"),
        ("numbers", [("[", "1")], "'1', '10', '11', '12'"),
    ],
)
def test_identifiers_that_merge_with_their_brackets_are_named(
    bytes_tokenizer, kind, merges, broken
):
    with pytest.raises(TeacherError) as caught:
        made(bytes_tokenizer(merges), kind, 12)
    message = str(caught.value)
    what = "single tokens" if kind == "letters" else "tokens of their own"
    assert f"does not keep {broken} as {what} after 'Ranking: ['" in message
    assert "teacher.model" in message
    assert "teacher.identifiers" in message
    assert "teacher.num_candidates" in message


def test_identifiers_beyond_the_broken_one_do_not_matter(bytes_tokenizer):
    tokenizer = bytes_tokenizer([("D", "]")])
    assert len(made(tokenizer, "letters", 3).texts) == 3
    with pytest.raises(TeacherError, match="'D'"):
        made(tokenizer, "letters", 4)
