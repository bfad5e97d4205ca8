"""What candidates are called in a prompt, and the tokens by which a model says it.

A letter is one token and one step decides between all of them. A number may be several tokens, so
identifiers form a trie; only its nodes where two identifiers part say anything about the ranking.
"""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from cotrain.errors import ConfigError, TeacherError, some_of


@dataclass(frozen=True)
class Node:
    """A place where the next token decides between identifiers.

    Attributes:
        prefix: Tokens between the answer prefix and this place; none at the root.
        children: Tokens that go on from here to at least one identifier.
    """

    prefix: tuple[int, ...]
    children: tuple[int, ...]


@dataclass(frozen=True)
class Identifiers:
    """Identifiers of the candidates, in the order in which they are given out.

    The closing bracket belongs to a path where it tells `1` from `10`; otherwise `1` would have a
    share of the probability of everything that begins with it.

    Attributes:
        texts: As they stand between brackets: A, B, … or 1, 2, …
        nodes: The root, and after it every other node where at least two identifiers part.
        paths: Of each identifier, (node index, child index) at each node on its way; its score is
            the sum of the log-probabilities there.
        emitted: Of each identifier, all of its tokens, without the closing bracket.
    """

    texts: tuple[str, ...]
    nodes: tuple[Node, ...]
    paths: tuple[tuple[tuple[int, int], ...], ...]
    emitted: tuple[tuple[int, ...], ...]

    @property
    def first_tokens(self) -> tuple[int, ...]:
        """Tokens with which an identifier can begin."""
        return self.nodes[0].children

    @property
    def are_single_tokens(self) -> bool:
        """Whether the root alone decides."""
        return len(self.nodes) == 1


def identifier_texts(kind: Literal["letters", "numbers"], count: int) -> list[str]:
    """The first `count` of A, B, … or 1, 2, …

    Raises:
        ConfigError: More letters than there are.
    """
    if kind == "numbers":
        return [str(number) for number in range(1, count + 1)]
    if count > len(string.ascii_uppercase):
        raise ConfigError(
            f"{count} candidates in one prompt, but teacher.identifiers letters names at most "
            f"{len(string.ascii_uppercase)}. Set teacher.identifiers numbers, or a teacher.window "
            "of at most that many."
        )
    return list(string.ascii_uppercase[:count])


def make_identifiers(
    tokenizer: PreTrainedTokenizerBase,
    encode: Callable[[str], list[int]],
    context: str,
    kind: Literal["letters", "numbers"],
    count: int,
) -> Identifiers:
    """Identifiers in the tokens that they have where the teacher says them.

    Args:
        tokenizer: To read tokens back.
        encode: Tokens of a text as it stands in the prompt.
        context: Text before an identifier, up to its opening bracket.
        kind: `letters` (at most 26) or `numbers`.
        count: How many.

    Raises:
        TeacherError: The tokenizer merges an identifier with what is around it, or splits a letter.
        ConfigError: More letters than there are.
    """
    texts = identifier_texts(kind, count)
    before = encode(context)
    emitted, closings, broken = [], [], []
    for text in texts:
        after = encode(f"{context}{text}]")
        own = after[len(before) :] if after[: len(before)] == before else []
        longest = 1 if kind == "letters" else len(own) - 1
        for length in range(1, min(longest, len(own) - 1) + 1):
            if str(tokenizer.decode(own[:length])).strip() == text:
                emitted.append(tuple(own[:length]))
                closings.append(own[length])
                break
        else:
            broken.append(text)
    if broken:
        what = "single tokens" if kind == "letters" else "tokens of their own"
        opening = context.rpartition("\n")[2][-20:]
        raise TeacherError(
            f"The tokenizer of the teacher does not keep {some_of(broken, 26)} as {what} after "
            f"{opening!r} and before ']', so they cannot be scored. Choose another teacher.model "
            "or teacher.identifiers, or a teacher.num_candidates that stops before the first of "
            "them."
        )
    whole = [(*own, closing) for own, closing in zip(emitted, closings, strict=True)]
    nodes, paths = _trie(whole)
    return Identifiers(tuple(texts), nodes, paths, tuple(emitted))


def _trie(
    whole: Sequence[tuple[int, ...]],
) -> tuple[tuple[Node, ...], tuple[tuple[tuple[int, int], ...], ...]]:
    """Nodes where these token sequences part, and the way of each sequence through them."""
    children: dict[tuple[int, ...], list[int]] = {(): []}
    for tokens in whole:
        for length, token in enumerate(tokens):
            following = children.setdefault(tokens[:length], [])
            if token not in following:
                following.append(token)
    nodes = [
        Node(prefix, tuple(following))
        for prefix, following in children.items()
        if len(following) > 1 or not prefix
    ]
    place = {node.prefix: index for index, node in enumerate(nodes)}
    paths = tuple(
        tuple(
            (place[tokens[:length]], nodes[place[tokens[:length]]].children.index(token))
            for length, token in enumerate(tokens)
            if tokens[:length] in place
        )
        for tokens in whole
    )
    return tuple(nodes), paths
