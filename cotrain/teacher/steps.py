"""Where the steps of a reasoning end: a step is a sentence or a clause, up to its punctuation."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_MARKS = (".", "!", "?", ";", ":", ",")
# A shorter one is part of the next.
_LEAST_TOKENS = 4


def split_steps(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[int]:
    """How many tokens there are up to the end of each step, ascending; the last is all of them.

    A mark ends a step where a space or nothing follows it, so `3.5` stays whole. Empty for no
    tokens.
    """
    pieces = [str(tokenizer.decode([token])) for token in tokens]
    ends: list[int] = []
    for place, piece in enumerate(pieces):
        following = pieces[place + 1][:1] if place + 1 < len(pieces) else " "
        marked = piece.rstrip(" ").endswith(_MARKS) and (following.isspace() or piece[-1] == " ")
        long_enough = place + 1 - (ends[-1] if ends else 0) >= _LEAST_TOKENS
        if (marked or "\n" in piece) and long_enough:
            ends.append(place + 1)
    if pieces and (not ends or ends[-1] < len(pieces)):
        # What is left after the last mark is a step of its own only if it says something.
        rest = len(pieces) - (ends[-1] if ends else 0)
        if ends and rest < _LEAST_TOKENS:
            ends.pop()
        ends.append(len(pieces))
    return ends
