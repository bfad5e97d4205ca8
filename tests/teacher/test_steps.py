"""A reasoning cut into steps: each ends at its punctuation, and together they are all of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from cotrain.teacher.steps import split_steps


def steps_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    ends = split_steps(tokenizer, tokens)
    starts = [0, *ends][: len(ends)]
    return [
        str(tokenizer.decode(tokens[start:end])) for start, end in zip(starts, ends, strict=True)
    ]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (" likes old films. He also likes trains a lot.",
         [" likes old films.", " He also likes trains a lot."]),
        # A clause is a step, a number or an abbreviation in it is not the end of one.
        (" likes comedies of the nineties, and gave 3.5 stars to one; nothing at all since then",
         [" likes comedies of the nineties,", " and gave 3.5 stars to one;",
          " nothing at all since then"]),
        (" is it a film of war? It is not one!", [" is it a film of war?", " It is not one!"]),
        # Too short to be a step.
        (" likes old films with trains. Yes. And also a few comedies.",
         [" likes old films with trains.", " Yes. And also a few comedies."]),
        (" likes old films with trains. Yes.", [" likes old films with trains. Yes."]),
        (" no, no", [" no, no"]),
        # A line end ends a step without any mark.
        (" one two three four\nfive six seven eight", [" one two three four\n",
                                                      "five six seven eight"]),
        (" likes all of it", [" likes all of it"]),
        ("", []),
    ],
)  # fmt: skip
def test_steps_by_hand(tokenizer: PreTrainedTokenizerBase, text: str, steps: list[str]):
    assert steps_of(tokenizer, text) == steps


WORDS = [" likes", " old", " films", " of", " war", ".", ",", ";", "!", "?", ":", "\n", " 3", "5"]


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=40))
def test_steps_are_all_of_the_tokens_and_none_is_short_but_the_only_one(
    tokenizer: PreTrainedTokenizerBase, words: list[str]
):
    tokens = tokenizer.encode("".join(words), add_special_tokens=False)
    ends = split_steps(tokenizer, tokens)
    lengths = [end - start for start, end in zip([0, *ends][: len(ends)], ends, strict=True)]
    assert sum(lengths) == len(tokens)
    if len(ends) > 1:
        assert min(lengths) >= 4
    else:
        assert ends == ([len(tokens)] if tokens else [])
    for end in ends[:-1]:
        piece = str(tokenizer.decode([tokens[end - 1]]))
        assert "\n" in piece or piece.rstrip(" ").endswith((".", "!", "?", ";", ":", ","))


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=40))
def test_a_step_that_another_follows_stays_one_whatever_is_written_after(
    tokenizer: PreTrainedTokenizerBase, words: list[str]
):
    """So a search may stop writing as soon as it sees a second step begin."""
    tokens = tokenizer.encode("".join(words), add_special_tokens=False)
    whole = split_steps(tokenizer, tokens)
    for count in range(1, len(tokens)):
        ends = split_steps(tokenizer, tokens[:count])
        if len(ends) > 1:
            assert whole[0] == ends[0]
