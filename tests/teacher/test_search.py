"""Several reasonings for a row: drawn one by one they are the same, a tree keeps the best of them,
and no row depends on another."""

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cotrain.benchmarks.parity import VOCABULARY, gap, random_prompts, tiny_backbone
from cotrain.config import TeacherConfig
from cotrain.data.interactions import InteractionData
from cotrain.teacher import backbone as backbones
from cotrain.teacher import search
from cotrain.teacher.backbone import Backbone
from cotrain.teacher.passes import Passes
from cotrain.teacher.process_reward import Head, save_head
from cotrain.teacher.ranker import RankLLM
from cotrain.teacher.search import Thinker, Thinking, Thought, merged, seed_of, tokens_until
from cotrain.teacher.steps import split_steps
from cotrain.teacher.writing import Sampling, write

MakeRanker = Callable[..., RankLLM]
PREFIX = random_prompts([6], seed=1)[0]
PROMPTS = random_prompts([3, 17, 9, 17, 1, 30], PREFIX)
NEXT = 50
# Every sixth token ends a sentence, one opens the ranking.
PIECES = ["." if token % 6 == 0 else f" w{token}" for token in range(VOCABULARY)]
PIECES[NEXT] = "\nNext:"


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer() -> Iterator[None]:
    """It takes longer to read than the tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "load_tokenizer", functools.cache(backbones.load_tokenizer))
        yield


class Words:
    """As much of a tokenizer as the search asks for."""

    eos_token_id = None

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return "".join(PIECES[token] for token in tokens)


WORDS: Any = Words()


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """A tiny model of words and full stops."""
    found = tiny_backbone("llama")
    found.tokenizer = WORDS
    return found


def thinker_of(
    backbone: Backbone, ranking: str = "Next:", score: search.Score | None = None,
    prefix: Sequence[int] = (), **changes: Any,
) -> Thinker:  # fmt: skip
    chosen = TeacherConfig(**{"mode": "cot", "reasoning_tokens": 24, **changes})
    return Thinker(Passes(backbone, prefix), chosen, ranking, WORDS.decode, score)


def tokens_of(found: Sequence[Thinking]) -> list[list[list[int]]]:
    return [[thought.tokens for thought in thinking.thoughts] for thinking in found]


# ---- merging verdicts ---------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=3), min_size=1,
                  max_size=4),
    data=st.data(),
)  # fmt: skip
def test_merged_is_the_weighted_mean_of_the_softmaxes(rows: list[list[float]], data: st.DataObject):
    weights = data.draw(
        st.lists(st.sampled_from([0.0, 0.2, 0.9, 3.0]), min_size=len(rows), max_size=len(rows))
    )
    logits = torch.tensor(rows, dtype=torch.float64)
    shares = torch.tensor(weights, dtype=torch.float64)
    if shares.sum() == 0:  # nothing is better than anything
        shares += 1
    mean = (shares[:, None] * logits.softmax(1)).sum(0) / shares.sum()
    found = merged(logits, weights)
    torch.testing.assert_close(found, mean.log(), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found.softmax(0), mean, atol=1e-9, rtol=1e-9)


def test_merged_by_hand():
    logits = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log() + torch.tensor([[7.0], [-2.0]])
    found = merged(logits, [3.0, 1.0]).exp()
    torch.testing.assert_close(found, torch.tensor([5 / 16, 11 / 16]))
    torch.testing.assert_close(merged(logits, [0.0, 2.0]).exp(), torch.tensor([0.5, 0.5]))


# ---- drawing ------------------------------------------------------------------------------------


def test_drawn_reasonings_are_those_of_separate_calls(backbone: Backbone):
    thinker = thinker_of(backbone, ranking="", prefix=PREFIX)
    found = thinker.draw(PROMPTS, 3, temperature=1.3, top_p=0.9, salt=5)
    assert [len(row) for row in found] == [3] * 6
    for prompt, row in zip(PROMPTS[:3], found, strict=False):
        for copy, thought in enumerate(row):
            sampling = Sampling(1.3, 0.9, [(*seed_of(prompt), 5, copy)])
            ((alone,), _) = write(Passes(backbone), [prompt], 24, sampling=sampling)
            assert thought.tokens == alone.tokens
            assert (thought.generated, thought.finished, thought.score) == (24, False, 1.0)
        assert len({tuple(thought.tokens) for thought in row}) == 3
    assert thinker.draw(PROMPTS, 3, 1.3, 0.9, salt=5) == found
    other = thinker.draw(PROMPTS, 3, 1.3, 0.9, salt=6)
    assert not any(a.tokens == b.tokens for a, b in zip(found[0], other[0], strict=True))
    # Nor do others that it is with, or further copies, change what a prompt draws.
    assert thinker.draw(PROMPTS[2:4], 2, 1.3, 0.9, salt=5) == [row[:2] for row in found[2:4]]


@pytest.mark.parametrize("end", ["ranking", "paragraph"])
def test_a_reasoning_ends_where_the_ranking_opens_or_a_paragraph_does(
    backbone: Backbone, end: str, monkeypatch: pytest.MonkeyPatch
):
    """What was written of the ranking is paid for and not kept."""
    open_ended = thinker_of(backbone, ranking="").draw(PROMPTS, 8, 1.5)
    thinker = thinker_of(backbone, ranking="Next:" if end == "ranking" else "", reasoning_end=end)
    if end == "paragraph":
        monkeypatch.setattr(
            thinker, "text_of", lambda tokens: WORDS.decode(tokens).replace("Next:", "\n\n")
        )
    cut = thinker.draw(PROMPTS, 8, 1.5)
    ended = 0
    for whole, thought in zip(chain(*open_ended), chain(*cut), strict=True):
        if NEXT not in whole.tokens:
            assert thought == whole
            continue
        ended += 1
        place = whole.tokens.index(NEXT)
        assert thought.tokens == whole.tokens[:place]
        assert thought.finished
        assert place < thought.generated <= min(24, (place // 8 + 1) * 8)
    assert ended > 3


@settings(max_examples=40, deadline=None)
@given(tokens=st.lists(st.integers(0, VOCABULARY - 1), max_size=8), data=st.data())
def test_so_many_tokens_until_the_text_is_so_long(tokens: list[int], data: st.DataObject):
    text = WORDS.decode(tokens)
    length = data.draw(st.integers(0, len(text)))
    count = tokens_until(tokens, WORDS.decode, length)
    assert len(WORDS.decode(tokens[:count])) >= length
    assert count == 0 or len(WORDS.decode(tokens[: count - 1])) < length


def test_a_seed_is_the_prompts_own():
    seeds = {seed_of(prompt) for prompt in [*PROMPTS, [1, 2], [2, 1], [1], [], [1, 2, 0]]}
    assert len(seeds) == len(PROMPTS) + 5
    assert seed_of(PROMPTS[0]) == seed_of([*PROMPTS[0]])
    assert all(number >= 0 for seed in seeds for number in seed)


# ---- self-consistency ---------------------------------------------------------------------------


def test_one_sample_without_temperature_is_the_greedy_reasoning(backbone: Backbone):
    greedy = thinker_of(backbone).think(PROMPTS)
    cold = thinker_of(
        backbone, search="self_consistency", samples=1, search_temperature=1e-6
    ).think(PROMPTS)
    assert cold == greedy
    assert [(len(one.thoughts), one.read) for one in greedy] == [(1, len(p)) for p in PROMPTS]


@pytest.mark.parametrize("prefix", [[], PREFIX], ids=["whole", "behind a prefix"])
def test_states_after_thoughts_are_those_of_whole_prompts(backbone: Backbone, prefix: list[int]):
    thinker = thinker_of(backbone, prefix=prefix)
    draw = np.random.default_rng(0)
    for counts in ([1, 3, 2, 1, 1, 4], [1] * 6, [2] * 6):
        thoughts = [
            [Thought(draw.integers(2, 90, draw.integers(0, 9)).tolist(), 9, True)
             for _ in range(count)]
            for count in counts
        ]  # fmt: skip
        answer = [NEXT, 7]
        whole = [
            prompt + thought.tokens + answer
            for prompt, row in zip(PROMPTS, thoughts, strict=True)
            for thought in row
        ]
        model: Any = backbone.model
        with torch.no_grad():
            plain = [model(torch.tensor([p]), output_hidden_states=True) for p in whole]
        expected = torch.cat([output.hidden_states[-1][:, -1] for output in plain])
        assert gap(thinker.states_after(PROMPTS, thoughts, answer), expected) < 1e-5


def asks_of(data: InteractionData, count: int) -> list[tuple[list[int], list[int]]]:
    users = data.trained_users[:count].tolist()
    return [
        (data.train_history(user)[-5:].tolist(), [3 * user + 1, 3 * user + 2, 3 * user + 3])
        for user in users
    ]


def plain_look(ranker: RankLLM, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """(K,) probabilities of the letters and (H,) state, by the model itself."""
    model: Any = ranker.backbone.model
    with torch.no_grad():
        output = model(torch.tensor([tokens]), output_hidden_states=True)
    letters = ranker.prompts.identifiers.first_tokens
    return output.logits[0, -1, letters].softmax(0), output.hidden_states[-1][0, -1]


def test_self_consistency_averages_the_verdicts_of_its_samples(
    make_ranker: MakeRanker, ml100k: InteractionData
):
    ranker = make_ranker(mode="cot", reasoning_tokens=6, search="self_consistency", samples=3)
    asks = asks_of(ml100k, 3)
    for ask, look in zip(asks, ranker.reader.read(asks), strict=True):
        prompt = ranker.prompts.build(*ask)
        ((*thoughts,),) = ranker.reader.thinker.draw([prompt], 3, 0.8)
        ends = [prompt + thought.tokens + ranker.prompts.answer for thought in thoughts]
        probs, states = zip(*(plain_look(ranker, end) for end in ends), strict=True)
        assert look.logits is not None
        torch.testing.assert_close(
            look.logits, torch.stack(probs).mean(0).log(), atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(look.state, torch.stack(states).mean(0), atol=1e-4, rtol=1e-4)
        assert look.generated_tokens == sum(thought.generated for thought in thoughts)
        assert look.prompt_tokens == 2 * len(prompt)  # to write, and to read the verdicts
        assert look.reasoning == str(ranker.backbone.tokenizer.decode(thoughts[0].tokens)).strip()


def test_other_settings_of_the_search_forget_what_was_remembered(
    make_ranker: MakeRanker, ml100k: InteractionData
):
    ranker = make_ranker(mode="cot", reasoning_tokens=6, memo_rows=9)
    asks = asks_of(ml100k, 2)
    greedy = ranker.reader.read(asks)
    several = TeacherConfig(**{**vars(ranker.settings), "search": "self_consistency", "samples": 3})
    ranker.use_search(several)
    found = ranker.reader.read(asks)
    assert ranker.reader.memo_hits == 0
    assert all(look.generated_tokens == 18 for look in found)
    for one, other in zip(greedy, found, strict=True):
        assert not torch.allclose(one.state, other.state)  # pyright: ignore


# ---- trees --------------------------------------------------------------------------------------


def worth(prefixes: Sequence[list[int]]) -> Tensor:
    """Something in [0, 1] that depends on all of what was said, with ties nowhere."""
    digests = [seed_of(prefix)[0] / 2**32 for prefix in prefixes]
    return torch.tensor(digests, dtype=torch.float64).float()


def plain_tree(backbone: Backbone, prompt: list[int], chosen: TeacherConfig) -> list[Thought]:
    """The same search of one prompt, each step of each branch written alone."""
    beam = [Thought([], 0, False)]
    for depth in range(chosen.search_steps):
        pool = [thought for thought in beam if thought.finished]
        for parent in beam:
            if parent.finished:
                continue
            start = prompt + parent.tokens
            left = chosen.reasoning_tokens - len(parent.tokens)
            for branch in range(chosen.branches * (chosen.samples if depth == 0 else 1)):
                sampling = Sampling(
                    chosen.search_temperature, 1, [(*seed_of(start), depth, branch)]
                )
                ((written,), _) = write(Passes(backbone), [start], left, sampling=sampling)
                tokens = written.tokens
                if NEXT in tokens:
                    tokens = tokens[: tokens.index(NEXT)]
                pool.append(plain_child(parent, tokens, chosen.reasoning_tokens))
        for thought in pool:
            thought.score = float(worth([prompt + thought.tokens])[0])
        different = {tuple(thought.tokens): thought for thought in pool}
        beam = sorted(different.values(), key=lambda thought: -thought.score)[: chosen.samples]
    return beam


def plain_child(parent: Thought, tokens: list[int], limit: int) -> Thought:
    """The first step of what was written all the way."""
    # So far as it takes to see that another step follows, asked every eight tokens.
    seen = next(
        (
            tokens[:n]
            for n in range(8, len(tokens) + 1, 8)
            if len(split_steps(WORDS, tokens[:n])) > 1
        ),
        tokens,
    )
    ends = split_steps(WORDS, seen)
    step = seen[: ends[0]] if ends else []
    whole = parent.tokens + step
    return Thought(whole, 0, len(ends) < 2 or len(whole) == limit)


TREES = [
    {"samples": 2, "branches": 2, "search_steps": 3},
    {"samples": 1, "branches": 4, "search_steps": 2, "search_temperature": 1.5},
    {"samples": 3, "branches": 1, "search_steps": 4, "reasoning_tokens": 15},
]


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_a_tree_is_the_search_of_each_prompt_written_step_by_step(backbone: Backbone, tree: Any):
    thinker = thinker_of(backbone, score=worth, search="tree", prefix=PREFIX, **tree)
    found = thinker.think(PROMPTS[:4])
    for prompt, thinking in zip(PROMPTS[:4], found, strict=True):
        expected = plain_tree(backbone, prompt, thinker.settings)
        assert [(t.tokens, t.finished) for t in thinking.thoughts] == [
            (t.tokens, t.finished) for t in expected
        ]
        assert [t.score for t in thinking.thoughts] == [t.score for t in expected]


@pytest.mark.parametrize("tree", TREES[::2], ids=str)
def test_a_tree_of_a_row_is_the_same_whatever_rows_it_is_with(backbone: Backbone, tree: Any):
    """Regression: where another row had more tokens left, this one was written further than it was
    to go, and its last step cut where those words suggested."""
    prompts = random_prompts([3, 9, 4, 12, 7, 20, 5, 8, 2, 6, 11, 10], seed=8)
    thinker = thinker_of(backbone, score=worth, search="tree", **tree)
    together = thinker.think(prompts)
    alone = [thinker.think([prompt])[0] for prompt in prompts]
    assert tokens_of(together) == tokens_of(alone)
    flags = [[t.finished for t in thinking.thoughts] for thinking in together]
    assert flags == [[t.finished for t in thinking.thoughts] for thinking in alone]
    assert [thinking.generated for thinking in together] == [one.generated for one in alone]


@settings(max_examples=12, deadline=None)
@given(
    samples=st.integers(1, 3), branches=st.integers(1, 3), steps=st.integers(1, 4),
    limit=st.integers(1, 20), temperature=st.sampled_from([0.5, 1.0, 3.0]),
)  # fmt: skip
def test_no_reasoning_is_longer_than_it_may_be_and_all_come_to_an_end(
    samples: int, branches: int, steps: int, limit: int, temperature: float
):
    found = tiny_backbone("llama")
    found.tokenizer = WORDS
    scored: list[list[int]] = []

    def score(prefixes: Sequence[list[int]]) -> Tensor:
        scored.extend(prefixes)
        return worth(prefixes)

    thinker = thinker_of(
        found, score=score, search="tree", samples=samples, branches=branches, search_steps=steps,
        reasoning_tokens=limit, search_temperature=temperature,
    )  # fmt: skip
    prompts = PROMPTS[:3]
    for prompt, thinking in zip(prompts, thinker.think(prompts), strict=True):
        assert 1 <= len(thinking.thoughts) <= samples
        scores = [thought.score for thought in thinking.thoughts]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(thought.tokens) for thought in thinking.thoughts}) == len(scores)
        for thought in thinking.thoughts:
            assert len(thought.tokens) <= limit
            assert prompt + thought.tokens in scored
            assert NEXT not in thought.tokens
            # A step adds one token at least, so with as many steps as tokens it is at its end.
            assert thought.finished or steps < limit
        assert thinking.generated >= max(len(thought.tokens) for thought in thinking.thoughts)
        assert thinking.read >= len(prompt) * 2


def test_the_best_scored_go_on(backbone: Backbone):
    """A score that wants one word: of what was drawn the reasonings with most of it are kept."""

    def wants(prefixes: Sequence[list[int]]) -> Tensor:
        return torch.tensor(
            [sum(token % 6 == 1 for token in prefix) / len(prefix) for prefix in prefixes]
        )

    def share(thinking: Thinking, prompt: list[int]) -> float:
        return float(wants([prompt + thinking.thoughts[0].tokens])[0])

    tree = {"search": "tree", "samples": 2, "search_steps": 3}
    wide = thinker_of(backbone, score=wants, branches=8, **tree).think(PROMPTS)
    narrow = thinker_of(backbone, score=wants, branches=1, **tree).think(PROMPTS)
    against = thinker_of(backbone, score=lambda p: 1 - wants(p), branches=8, **tree).think(PROMPTS)
    shares = [
        np.mean([share(*pair) for pair in zip(found, PROMPTS, strict=True)])
        for found in (wide, narrow, against)
    ]
    assert shares[0] > shares[1] > shares[2]


def test_the_same_reasoning_is_kept_once(backbone: Backbone):
    """Nearly without temperature all branches say the same."""
    thinker = thinker_of(
        backbone, score=worth, search="tree", samples=3, branches=2, search_temperature=1e-6
    )
    assert [len(thinking.thoughts) for thinking in thinker.think(PROMPTS)] == [1] * 6


def test_what_a_tree_costs_is_counted(backbone: Backbone, monkeypatch: pytest.MonkeyPatch):
    written: list[int] = []

    def counting(*asked: Any) -> Any:
        rows, states = write(*asked)
        written.append(sum(len(row.tokens) for row in rows))
        return rows, states

    monkeypatch.setattr(search, "write", counting)
    scored: list[int] = []

    def score(prefixes: Sequence[list[int]]) -> Tensor:
        scored.append(sum(map(len, prefixes)))
        return worth(prefixes)

    thinker = thinker_of(
        backbone, score=score, search="tree", samples=2, branches=2, search_steps=1
    )
    found = thinker.think(PROMPTS)
    assert sum(thinking.generated for thinking in found) == sum(written)
    # Each prompt once to be continued, and with each of four beginnings to be scored.
    assert sum(one.read for one in found) == sum(map(len, PROMPTS)) + sum(scored)


def test_the_verdict_of_a_tree_weighs_reasonings_by_their_score(
    make_ranker: MakeRanker, ml100k: InteractionData, tmp_path: Path
):
    plain = make_ranker(mode="cot")
    size = plain.backbone.hidden_size
    draw = torch.Generator().manual_seed(0)
    head = Head(
        torch.randn(size, generator=draw), torch.tensor(0.1), torch.zeros(size), torch.ones(size)
    )
    save_head(head, tmp_path, plain.backbone.name, {})
    ranker = make_ranker(
        mode="cot", reasoning_tokens=8, search="tree", samples=2, branches=2, search_steps=1,
        process_reward=str(tmp_path),
    )  # fmt: skip
    asks = asks_of(ml100k, 3)
    prompts = [ranker.prompts.build(*ask) for ask in asks]
    found = ranker.reader.thinker.think(prompts)
    for prompt, thinking, look in zip(prompts, found, ranker.reader.read(asks), strict=True):
        assert len(thinking.thoughts) == 2
        total = torch.zeros(3)
        weights = []
        for thought in thinking.thoughts:
            _, state = plain_look(ranker, prompt + thought.tokens)
            weights.append(float(torch.sigmoid(head(state[None]))[0]))
            assert thought.score == pytest.approx(weights[-1], abs=1e-4)
            probs, _ = plain_look(ranker, prompt + thought.tokens + ranker.prompts.answer)
            total += weights[-1] * probs
        assert look.logits is not None
        torch.testing.assert_close(look.logits, (total / sum(weights)).log(), atol=1e-3, rtol=1e-3)
        best = thinking.thoughts[0]
        assert look.reasoning == str(ranker.backbone.tokenizer.decode(best.tokens)).strip()
        assert look.generated_tokens == thinking.generated
        assert look.prompt_tokens == thinking.read + len(prompt)
