"""Who writes: batches that do not depend on what is done, little memory, what counts of a text."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cotrain.config import RationaleConfig
from cotrain.data.interactions import InteractionData
from cotrain.rationale import writers
from cotrain.rationale.endpoint import Answer
from cotrain.rationale.prompts import RationalePrompts, load_template
from cotrain.rationale.writers import Ask, LocalWriter, first_paragraph, seed_of
from cotrain.teacher import memory
from cotrain.teacher.backbone import Backbone, load_backbone
from cotrain.teacher.passes import Passes
from cotrain.teacher.writing import Written

CUDA_OOM = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"
MakeWriter = Callable[..., LocalWriter]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A model this small is slower with several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def backbone(tiny_teacher: str) -> Backbone:
    return load_backbone(tiny_teacher, "fp32", torch.device("cpu"))


@pytest.fixture(scope="module")
def make_prompts(
    backbone: Backbone, small_data: InteractionData
) -> Callable[[str], RationalePrompts]:
    made: dict[str, RationalePrompts] = {}

    def make(template: str) -> RationalePrompts:
        if template not in made:
            made[template] = RationalePrompts(
                backbone.tokenizer, small_data.catalog, load_template(template), item_noun="movie",
                history_length=5, max_title_tokens=32, max_prompt_tokens=2000,
            )  # fmt: skip
        return made[template]

    return make


@pytest.fixture(scope="module")
def make_writer(backbone: Backbone, make_prompts: Callable[[str], RationalePrompts]) -> MakeWriter:
    def make(batch_tokens: int = 800, template: str = "default", **changes: Any) -> LocalWriter:
        settings = RationaleConfig(**{"max_tokens": 6, **changes})
        return LocalWriter(backbone, make_prompts(template), settings, batch_tokens)

    return make


@pytest.fixture(scope="module")
def asks(small_data: InteractionData) -> list[Ask]:
    """Twenty, of ten users, with histories of one title and of five."""
    return [
        Ask(small_data.history(user)[:cut].tolist(), int(small_data.history(user)[cut]),
            seed_of(0, small_data.user_ids[user], cut))
        for user in range(10)
        for cut in (1, 5)
    ]  # fmt: skip


def answers_of(
    writer: LocalWriter, asks: Sequence[Ask], done: Collection[int] = ()
) -> dict[int, Answer | None]:
    """By place; each place at most once."""
    found = [pair for batch in writer.write(asks, done) for pair in batch]
    assert len(dict(found)) == len(found)
    return dict(found)


# ---- what counts of a text ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ended", "expected", "is_whole"),
    [
        ("It is a comedy.", True, "It is a comedy.", True),
        ("  It is\ta  comedy. \n", True, "It is a comedy.", True),
        ("It is a comedy.\n\nThe user's choices:\n- more", False, "It is a comedy.", True),
        ("It is a comedy\nand", False, "It is a comedy", True),  # a line of its own is an end
        ("It is a comedy. It has ghosts and", False, "It is a comedy.", True),
        ("Why? Because it is! And it", False, "Why? Because it is!", True),
        ("It is a comedy.", False, "It is a comedy.", True),
        ("这是喜剧。它有鬼", False, "这是喜剧。", True),
        ("It is a comedy of 1.5 hours", False, "It is a comedy of 1.5 hours", False),
        ("It is a comedy. It has ghosts", True, "It is a comedy. It has ghosts", True),
        ("", True, "", True),
        ("", False, "", False),
    ],
)
def test_the_first_paragraph_up_to_its_last_whole_sentence(
    text: str, ended: bool, expected: str, is_whole: bool
):
    answer = first_paragraph(Answer(text, 7, -0.5, ended))
    assert answer == Answer(expected, 7, -0.5, is_whole)


@given(st.text(alphabet="aB .!?\n\t。", max_size=40), st.booleans())
def test_a_paragraph_is_one_line_from_the_beginning_and_stays_as_it_is(text: str, ended: bool):
    answer = first_paragraph(Answer(text, None, None, ended))
    assert " ".join(text.split()).startswith(answer.text)
    assert answer.text == " ".join(answer.text.split())
    assert first_paragraph(answer) == answer
    assert answer.ended >= ended


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (" a comedy.", "This user chose it because it is a comedy."),
        ("n't sad.", "This user chose it because it isn't sad."),
        ("\n\nA comedy.\n\nNext", "This user chose it because it is A comedy."),
        ("", ""),
        (" \n", ""),
    ],
)
def test_the_opening_is_part_of_it_and_alone_it_is_nothing(
    make_writer: MakeWriter, asks: list[Ask], monkeypatch: pytest.MonkeyPatch, backbone: Backbone,
    written: str, expected: str,
):  # fmt: skip
    """Regression: where a line end came first, the opening alone was taken for a reason."""
    tokens = backbone.tokenizer.encode(written, add_special_tokens=False)
    monkeypatch.setattr(writers, "write", lambda *_: ([Written(tokens, True, -1.0)], None))
    answer = answers_of(make_writer(), asks[:1])[0]
    assert answer is not None
    assert first_paragraph(answer).text == expected


# ---- seeds --------------------------------------------------------------------------------------


def test_a_seed_is_of_the_position_and_of_nothing_else():
    keys = [(seed, user, cut) for seed in (0, 1) for user in (1, "1", "é") for cut in (1, 2)]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert seed_of(3, "é", 4) == (3, 1434964553, 4)  # in every process, on every machine
    draws = {np.random.default_rng(seed).random() for seed in seeds}
    assert len(draws) == len(keys)


def test_a_draw_is_the_same_in_another_selection(make_writer: MakeWriter, asks: list[Ask]):
    writer = make_writer(temperature=1.0)
    whole = answers_of(writer, asks)
    chosen = [17, 2, 9, 3, 12]
    few = answers_of(make_writer(400, temperature=1.0), [asks[place] for place in chosen])
    assert [few[row].text for row in range(5)] == [whole[place].text for place in chosen]  # pyright: ignore
    assert len({answer.text for answer in whole.values() if answer}) == len(asks)


# ---- batches ------------------------------------------------------------------------------------


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """Prompts of each batch that was written."""
    seen: list[list[list[int]]] = []
    write = writers.write

    def watched(passes: Passes, prompts: Any, *rest: Any) -> Any:
        seen.append(list(prompts))
        return write(passes, prompts, *rest)

    monkeypatch.setattr(writers, "write", watched)
    return seen


@pytest.mark.parametrize("block", [7, 512])
def test_batches_are_the_same_whichever_rows_are_done(
    make_writer: MakeWriter, asks: list[Ask], batches: list, monkeypatch: pytest.MonkeyPatch,
    block: int,
):  # fmt: skip
    monkeypatch.setattr(writers, "_BLOCK", block)
    writer = make_writer(temperature=1.0)
    whole = answers_of(writer, asks)
    assert whole.keys() == set(range(20))
    of_whole = list(batches)
    assert 3 < len(of_whole) < 20
    random = np.random.default_rng(0)
    for count in (0, 5, 12, 19):
        done = set(random.choice(20, count, replace=False).tolist())
        batches.clear()
        found = answers_of(writer, asks, done)
        assert all(batch in of_whole for batch in batches)
        assert batches == [batch for batch in of_whole if batch in batches]  # in the same order
        assert found.keys() >= set(range(20)) - done
        assert all(found[place] == whole[place] for place in found)
    batches.clear()
    assert answers_of(writer, asks, range(20)) == {}
    assert batches == []


def test_asks_within_a_batch_are_told_apart(make_writer: MakeWriter, asks: list[Ask]):
    together = answers_of(make_writer(20_000), asks)
    for place in (0, 7, 19):
        alone = answers_of(make_writer(), asks[place : place + 1])[0]
        assert alone is not None
        other = together[place]
        assert other is not None
        assert (alone.text, alone.tokens, alone.ended) == (other.text, other.tokens, other.ended)
        assert alone.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_what_is_not_wanted_is_not_written(make_writer: MakeWriter, asks: list[Ask]):
    answers = answers_of(make_writer(max_tokens=3), asks[:4])
    assert all(answer and answer.tokens == 3 and not answer.ended for answer in answers.values())


# ---- little memory ------------------------------------------------------------------------------


def with_memory_for(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """A pass over more runs out of memory."""
    decode = Passes._decode

    def little(self: Passes, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        if ids.numel() > tokens:
            raise torch.OutOfMemoryError(CUDA_OOM)
        return decode(self, ids, **options)

    monkeypatch.setattr(Passes, "_decode", little)
    monkeypatch.setattr(memory, "_free", lambda: None)  # collecting garbage takes a while


@pytest.mark.parametrize("done", [[], [0, 3, 4, 5, 11]], ids=["from nothing", "going on"])
def test_with_little_memory_every_text_is_the_same(
    make_writer: MakeWriter, asks: list[Ask], monkeypatch: pytest.MonkeyPatch, done: list[int]
):
    whole = answers_of(make_writer(20_000), asks)
    writer = make_writer(20_000)
    with_memory_for(monkeypatch, 700)
    found = answers_of(writer, asks, done)
    assert writer.budget.backoffs
    assert writer.budget.tokens < 20_000
    assert found.keys() >= set(range(20)) - set(done)
    for place, answer in found.items():
        expected = whole[place]
        assert answer is not None
        assert expected is not None
        assert answer.text == expected.text


def test_one_that_never_fits_is_given_up_and_the_others_are_not(
    make_writer: MakeWriter, asks: list[Ask], monkeypatch: pytest.MonkeyPatch
):
    writer = make_writer(20_000)
    prompts = [writer._prompts.build(ask.history, ask.target) for ask in asks]
    lengths = [len(prompt) - len(writer._prompts.prefix) for prompt in prompts]
    second, longest = sorted(lengths)[-2:]
    assert second < longest
    whole = answers_of(writer, asks)
    with_memory_for(monkeypatch, second)
    found = answers_of(writer, asks)
    given_up = [place for place, answer in found.items() if answer is None]
    assert given_up == [lengths.index(longest)]
    for place, answer in found.items():
        expected = whole[place]
        if answer is not None and expected is not None:
            assert answer.text == expected.text
    assert found.keys() == set(range(20))
