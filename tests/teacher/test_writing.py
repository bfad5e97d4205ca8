"""Text written in batches is the text written one by one."""

import copy
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
from cotrain.teacher.backbone import Backbone
from cotrain.teacher.passes import Passes, Steps
from cotrain.teacher.writing import write

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
