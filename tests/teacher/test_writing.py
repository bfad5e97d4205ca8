"""Text written in batches is the text written one by one; drawn tokens are drawn as they should."""

import copy
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cotrain.benchmarks.parity import (
    FAMILIES,
    gap,
    generated,
    random_prompts,
    state_of,
    tiny_backbone,
)
from cotrain.errors import TeacherError
from cotrain.teacher.backbone import Backbone
from cotrain.teacher.passes import Passes, Steps
from cotrain.teacher.writing import Sampling, write

PREFIX = random_prompts([9], seed=1)[0]
LENGTHS = [3, 17, 9, 17, 1, 30]


def ended_by(backbone: Backbone, tokens: list[int] | int | None) -> None:
    model: Any = backbone.model
    model.generation_config.eos_token_id = tokens


def plain_answer(backbone: Backbone, prompt: list[int], limit: int) -> list[int]:
    """What `generate` writes, the token that ends it included."""
    return generated(backbone, prompt, limit).sequences[0, len(prompt) :].tolist()


@pytest.mark.parametrize("prefix", [[], PREFIX], ids=["whole", "behind a prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_generate_to_their_ends(family: str, prefix: list[int]):
    backbone = tiny_backbone(family)
    prompts = random_prompts(LENGTHS, PREFIX)
    whole = [plain_answer(backbone, prompt, 20) for prompt in prompts]
    # Two tokens that end some answers early, one of them at once.
    stops = {whole[0][0], whole[1][9], whole[3][4]}
    ended_by(backbone, sorted(stops))
    answers, first = write(Passes(backbone, prefix), prompts, 20)
    for answer, tokens in zip(answers, whole, strict=True):
        end = next((place for place, token in enumerate(tokens) if token in stops), None)
        assert answer.tokens == tokens[:end]
        assert answer.ended == (end is not None)
    assert answers[0].tokens == []
    states = torch.cat([state_of(generated(backbone, prompt, 1), 0) for prompt in prompts])
    assert gap(first, states) < 1e-5
    assert plain_answer(backbone, prompts[1], 20)[-1] in stops  # generate stops there too


def test_a_row_that_says_enough_is_not_continued(monkeypatch: pytest.MonkeyPatch):
    backbone = tiny_backbone("llama")
    prompts = random_prompts(LENGTHS)
    whole, _ = write(Passes(backbone), prompts, 32)
    sizes = []
    advance = Steps.advance

    def counting(self: Steps, tokens: torch.Tensor) -> torch.Tensor:
        sizes.append(len(tokens))
        return advance(self, tokens)

    monkeypatch.setattr(Steps, "advance", counting)
    # All but two rows have said enough with 5 tokens, the one of them with 18, the other never.
    enough = {tuple(answer.tokens[:3]): 5 for answer in whole}
    enough[tuple(whole[2].tokens[:3])] = 18
    enough[tuple(whole[4].tokens[:3])] = 1000
    answers, _ = write(
        Passes(backbone), prompts, 32, lambda tokens: len(tokens) >= enough[tuple(tokens[:3])]
    )
    for row, (answer, all_of_it) in enumerate(zip(answers, whole, strict=True)):
        assert answer.tokens == all_of_it.tokens[: len(answer.tokens)]
        assert not answer.ended
        assert len(answer.tokens) == {2: 24, 4: 32}.get(row, 8)  # asked every 8 tokens
    assert sizes == [6] * 7 + [2] * 16 + [1] * 8


def test_rows_that_end_do_not_keep_others_from_going_on():
    backbone = tiny_backbone("llama")
    prompts = random_prompts([4, 9, 13, 6])
    unended, _ = write(Passes(backbone), prompts, 40)
    ended_by(backbone, unended[3].tokens[11])
    answers, _ = write(Passes(backbone), prompts, 40)
    for prompt, answer in zip(prompts, answers, strict=True):
        plain = plain_answer(backbone, prompt, 40)
        assert answer.tokens == plain[: len(plain) - answer.ended]
    assert {answer.ended for answer in answers} == {True, False}


def test_one_token_is_the_shortest_answer():
    backbone = tiny_backbone("llama")
    prompts = random_prompts([4, 9])
    answers, _ = write(Passes(backbone), prompts, 1)
    assert [answer.tokens for answer in answers] == [
        plain_answer(backbone, prompt, 1) for prompt in prompts
    ]
    assert not any(answer.ended for answer in answers)


def test_writing_leaves_the_shared_prefix_as_it_was():
    backbone = tiny_backbone("qwen3")
    passes = Passes(backbone, PREFIX)
    prompts = random_prompts(LENGTHS, PREFIX)
    passes.last_states(prompts)
    shared = passes.shared(prompts)
    assert shared is not None
    keys = copy.deepcopy(shared.keys)
    write(passes, prompts, 12)
    assert shared.keys.equal(keys)
    assert shared.get_seq_length() == len(PREFIX)


# ---- drawn tokens -------------------------------------------------------------------------------


def seeds_of(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    return [(seed, row) for row in range(count)]


def plain_logits(backbone: Backbone, tokens: Sequence[int]) -> torch.Tensor:
    """(T, V) float64 of a forward pass as anybody writes it."""
    model: Any = backbone.model
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].double()


def nucleus_of(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """(V,) probabilities, by sorting all of them."""
    probs = (logits / temperature).softmax(0)
    order = probs.argsort(descending=True)
    before = probs[order].cumsum(0) - probs[order]  # of all likelier ones
    probs[order[before >= top_p]] = 0
    return probs / probs.sum()


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1, 1), (0.5, 1), (2, 1), (1, 0.9), (1, 0.4), (3, 0.97), (0.7, 0.01)]
)
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature: float, top_p: float):
    backbone = tiny_backbone("llama")
    prompt, count = random_prompts([9])[0], 4000
    expected = nucleus_of(plain_logits(backbone, prompt)[-1], temperature, top_p)
    sampling = Sampling(temperature, top_p, seeds_of(count))
    answers, _ = write(Passes(backbone), [prompt] * count, 1, sampling=sampling)
    drawn = Counter(answer.tokens[0] for answer in answers)
    assert set(drawn) <= set(expected.nonzero().flatten().tolist())
    # Chi-square over the tokens that are expected often enough, the others as one.
    often = [token for token, share in enumerate(expected.tolist()) if share * count >= 5]
    seen = [drawn[token] for token in often]
    wanted = [float(expected[token]) * count for token in often]
    if count - sum(wanted) > 1e-6:
        seen, wanted = [*seen, count - sum(seen)], [*wanted, count - sum(wanted)]
    deviation = sum((s - w) ** 2 / w for s, w in zip(seen, wanted, strict=True))
    freedom = len(seen) - 1
    assert deviation <= freedom + 4 * math.sqrt(2 * freedom)


def test_a_nucleus_wider_than_the_first_look_is_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cotrain.teacher.writing._FIRST_LOOK", 2)
    backbone = tiny_backbone("llama")
    prompts = random_prompts([9, 4])
    count = 3000
    for prompt in prompts:
        expected = nucleus_of(plain_logits(backbone, prompt)[-1], 4, 0.8)
        assert (expected > 0).sum() > 32  # 2, then 32, then all
        sampling = Sampling(4, 0.8, seeds_of(count))
        answers, _ = write(Passes(backbone), [prompt] * count, 1, sampling=sampling)
        drawn = {answer.tokens[0] for answer in answers}
        assert drawn == set((expected > 0).nonzero().flatten().tolist())


def test_a_row_writes_the_same_whatever_rows_it_is_with():
    backbone = tiny_backbone("llama")
    prompts, seeds = random_prompts(LENGTHS, PREFIX), seeds_of(len(LENGTHS))

    def written(rows: list[int], prefix: list[int], temperature: float = 1.5, **options: Any):
        sampling = Sampling(temperature, 0.95, [seeds[row] for row in rows])
        texts = [prompts[row] for row in rows]
        answers, _ = write(Passes(backbone, prefix), texts, 30, sampling=sampling, **options)
        return [answer.tokens for answer in answers]

    together = written(list(range(6)), PREFIX)
    assert len(set(map(tuple, together))) == 6
    assert together == written(list(range(6)), PREFIX)
    for row in range(6):
        assert written([row], []) == [together[row]]
    assert written([4, 1], PREFIX) == [together[4], together[1]]
    assert written([4, 1], PREFIX, temperature=0.7) != [together[4], together[1]]
    # Nor do rows that are left out, or end, change what the others draw.
    enough = {tuple(together[row][:3]) for row in (0, 3)}
    some = written(list(range(6)), PREFIX, done=lambda tokens: tuple(tokens[:3]) in enough)
    assert some == [whole[:8] if row in (0, 3) else whole for row, whole in enumerate(together)]
    ended_by(backbone, together[2][10])
    for whole, cut in zip(together, written(list(range(6)), PREFIX), strict=True):
        end = whole.index(together[2][10]) if together[2][10] in whole else None
        assert cut == whole[:end]


def test_a_seed_tells_rows_of_one_prompt_apart():
    backbone = tiny_backbone("llama")
    prompt = random_prompts([9])[0]
    seeds = [(7,), (7, 1), (8,), (7,)]
    answers, _ = write(Passes(backbone), [prompt] * 4, 20, sampling=Sampling(1, 1, seeds))
    texts = [tuple(answer.tokens) for answer in answers]
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3


@pytest.mark.parametrize("prefix", [[], PREFIX], ids=["whole", "behind a prefix"])
def test_copies_are_separate_calls_that_read_each_prompt_once(prefix: list[int]):
    backbone = tiny_backbone("llama")
    prompts = random_prompts(LENGTHS, PREFIX)
    seeds = seeds_of(3 * len(prompts))
    passes = Passes(backbone, prefix)

    def written(some: list[list[int]], own: list[tuple[int, ...]], copies: int, **options: Any):
        sampling = Sampling(1.5, 0.95, own)
        return write(passes, some, 20, sampling=sampling, copies=copies, **options)

    answers, first = written(prompts, seeds, 3)
    assert len(answers) == len(first) == 3 * len(prompts)
    for place in range(3):
        separate, state = written(prompts, seeds[place::3], 1)
        assert [row.tokens for row in answers[place::3]] == [row.tokens for row in separate]
        assert [row.logprob for row in answers[place::3]] == pytest.approx(
            [row.logprob for row in separate], rel=1e-5
        )
        assert gap(first[place::3], state) < 1e-5
    assert len({tuple(row.tokens) for row in answers}) == 3 * len(prompts)
    # One that says enough, or ends, leaves the others alone.
    enough = tuple(answers[4].tokens[:3])
    some, _ = written(prompts, seeds, 3, done=lambda tokens: tuple(tokens[:3]) == enough)
    assert [row.tokens for row in some] == [
        row.tokens[:8] if number == 4 else row.tokens for number, row in enumerate(answers)
    ]
    passes.computed_tokens = 0
    write(passes, prompts, 1, copies=3)
    whole = passes.computed_tokens
    passes.computed_tokens = 0
    write(passes, prompts, 1)
    assert whole == passes.computed_tokens


def test_copies_without_sampling_say_the_same():
    backbone = tiny_backbone("llama")
    prompts = random_prompts([4, 9])
    answers, _ = write(Passes(backbone), prompts, 12, copies=2)
    plain, _ = write(Passes(backbone), prompts, 12)
    assert [row.tokens for row in answers] == [row.tokens for row in plain for _ in range(2)]
    with pytest.raises(TeacherError, match=r"4 answers .* with 2 seeds"):
        write(Passes(backbone), prompts, 2, sampling=Sampling(1, 1, seeds_of(2)), copies=2)


def test_without_temperature_or_with_one_token_in_the_nucleus_text_is_greedy():
    backbone = tiny_backbone("llama")
    prompts = random_prompts(LENGTHS)
    greedy, _ = write(Passes(backbone), prompts, 12)
    for temperature, top_p in ((0, 0.5), (1, 1e-9)):
        sampling = Sampling(temperature, top_p, seeds_of(len(prompts)))
        answers, _ = write(Passes(backbone), prompts, 12, sampling=sampling)
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in greedy]
        for ours, plain in zip(answers, greedy, strict=True):
            assert ours.logprob == pytest.approx(plain.logprob, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("drawn", [False, True])
def test_logprob_is_the_models_own_of_all_that_was_written(family: str, drawn: bool):
    backbone = tiny_backbone(family)
    prompts = random_prompts(LENGTHS, PREFIX)
    sampling = Sampling(2.5, 0.9, seeds_of(len(prompts))) if drawn else None
    unended, _ = write(Passes(backbone, PREFIX), prompts, 20, sampling=sampling)
    stop = unended[1].tokens[11]
    ended_by(backbone, stop)
    answers, _ = write(Passes(backbone, PREFIX), prompts, 20, sampling=sampling)
    assert {answer.ended for answer in answers} == {True, False}
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = [*answer.tokens, *([stop] if answer.ended else [])]
        logprobs = plain_logits(backbone, prompt + tokens).log_softmax(1)[len(prompt) - 1 : -1]
        own = logprobs.gather(1, torch.tensor(tokens)[:, None]).mean()
        assert answer.logprob == pytest.approx(float(own), rel=1e-5)
    nothing, _ = write(Passes(backbone), prompts, 0)
    assert [(answer.tokens, answer.logprob) for answer in nothing] == [([], 0.0)] * len(prompts)


def test_seeds_and_settings_that_cannot_be_drawn_with_are_refused():
    backbone = tiny_backbone("llama")
    with pytest.raises(TeacherError, match=r"2 answers .* with 3 seeds"):
        write(Passes(backbone), random_prompts([4, 4]), 2, sampling=Sampling(1, 1, seeds_of(3)))
    for temperature, top_p in ((-0.1, 1), (math.nan, 1), (1, 0), (1, 1.01)):
        with pytest.raises(TeacherError, match="Expected temperature"):
            Sampling(temperature, top_p, [])
