"""One look in every mode: logits, orders and decision states are those of the plain model."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cotrain.benchmarks.parity import gap, generated
from cotrain.data.interactions import InteractionData
from cotrain.teacher import reading, search
from cotrain.teacher.backbone import Backbone
from cotrain.teacher.parsing import parse_ranking
from cotrain.teacher.passes import Passes
from cotrain.teacher.ranker import RankLLM
from cotrain.teacher.reading import Ask, Look
from cotrain.teacher.verdict import ranks_of_order
from cotrain.teacher.writing import Written

MakeRanker = Callable[..., RankLLM]


def asks_of(data: InteractionData, rows: int, size: int) -> list[Ask]:
    """Histories of unlike lengths, candidates of unlike titles."""
    return [
        (data.train_history(row)[: 1 + row].tolist(), list(range(1 + 9 * row, 1 + 9 * row + size)))
        for row in range(rows)
    ]


def plain(backbone: Backbone, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(H,) last state and (vocabulary,) log-probabilities after these tokens."""
    model: Any = backbone.model
    with torch.no_grad():
        output = model(torch.tensor([list(tokens)]), output_hidden_states=True)
    return output.hidden_states[-1][0, -1], torch.log_softmax(output.logits[0, -1].float(), 0)


def spoken(ranker: RankLLM) -> list[list[int]]:
    """Tokens of each identifier as the teacher says it, with its closing bracket, from the text of
    whole prompts."""
    tokenizer, identifiers = ranker.prompts.tokenizer, ranker.prompts.identifiers
    opening = tokenizer.encode("Ranking: [", add_special_tokens=False)
    whole = [
        tokenizer.encode(f"Ranking: [{text}]", add_special_tokens=False)
        for text in identifiers.texts
    ]
    assert all(tokens[: len(opening)] == opening for tokens in whole)
    return [tokens[len(opening) :] for tokens in whole]


def brute_scores(ranker: RankLLM, prompt: list[int]) -> Tensor:
    """(W,) sums of log-probabilities over the tokens of each identifier, without those that no
    other identifier could have had instead; a forward pass of the plain model for each token."""
    words = spoken(ranker)
    after: dict[tuple[int, ...], Tensor] = {}
    scores = []
    for own in words:
        total = torch.zeros(())
        for length, token in enumerate(own):
            said = tuple(own[:length])
            if len({other[length] for other in words if tuple(other[:length]) == said}) > 1:
                if said not in after:
                    after[said] = plain(ranker.backbone, [*prompt, *said])[1]
                total = total + after[said][token]
        scores.append(total)
    return torch.stack(scores)


def centred(logits: Tensor) -> Tensor:
    return logits - logits.mean()


# ---- direct -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 26])
def test_letters_are_scored_by_the_logits_after_the_prompt(
    make_ranker: MakeRanker, ml100k: InteractionData, size: int
):
    ranker = make_ranker(num_candidates=size)
    asks = asks_of(ml100k, 3, size)
    letters = [tokens[0] for tokens in spoken(ranker)]
    for (history, shown), look in zip(asks, ranker.reader.read(asks), strict=True):
        prompt = ranker.prompts.build(history, shown)
        state, logprobs = plain(ranker.backbone, prompt)
        assert look.state is not None
        assert look.logits is not None
        torch.testing.assert_close(look.state, state, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(centred(look.logits), centred(logprobs[letters]))
        assert look.logits.shape == (size,)
        assert (look.prompt_tokens, look.generated_tokens) == (len(prompt), 0)


@pytest.mark.parametrize("size", [2, 9, 10, 12, 26])
def test_numbers_are_scored_by_the_sum_over_their_tokens(
    make_ranker: MakeRanker, ml100k: InteractionData, size: int
):
    ranker = make_ranker(num_candidates=size, identifiers="numbers")
    asks = asks_of(ml100k, 2, size)
    looks = ranker.reader.read(asks)
    for (history, shown), look in zip(asks, looks, strict=True):
        expected = brute_scores(ranker, ranker.prompts.build(history, shown))
        assert look.logits is not None
        if size < 10:  # one token each, and logits instead
            torch.testing.assert_close(centred(look.logits), centred(expected))
        else:
            torch.testing.assert_close(look.logits, expected)
    if size == 12:  # "1" may end or go on: without its bracket it had a share of 10, 11 and 12
        one = spoken(ranker)[0]
        assert len(one) == 2
        prompt = ranker.prompts.build(*asks[0])
        whole = plain(ranker.backbone, prompt)[1][one[0]]
        assert looks[0].logits is not None
        assert looks[0].logits[[0, 9, 10, 11]].exp().sum() < whole.exp()
        assert looks[0].logits[0] < whole - 0.01


@pytest.mark.parametrize("identifiers", ["letters", "numbers"])
def test_the_real_model_is_read_the_same(
    make_ranker: MakeRanker, real_backbone: Backbone, ml100k: InteractionData, identifiers: str
):
    ranker = make_ranker(real_backbone, num_candidates=10, identifiers=identifiers)
    asks = asks_of(ml100k, 2, 10)
    looks = ranker.reader.read(asks)
    prompt = ranker.prompts.build(*asks[1])
    state, _ = plain(real_backbone, prompt)
    assert looks[1].state is not None
    assert looks[1].logits is not None
    assert gap(looks[1].state[None], state[None]) < 1e-4
    expected = brute_scores(ranker, prompt)
    torch.testing.assert_close(centred(looks[1].logits), centred(expected), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("identifiers", ["letters", "numbers"])
def test_emit_is_the_state_at_the_first_identifier_without_its_bias(
    make_ranker: MakeRanker, ml100k: InteractionData, identifiers: str
):
    ranker = make_ranker(num_candidates=12, identifiers=identifiers, decision_position="emit")
    predicting = make_ranker(ranker.backbone, num_candidates=12, identifiers=identifiers)
    asks = asks_of(ml100k, 6, 12)
    lengths = set()
    plain_logits = [look.logits for look in predicting.reader.read(asks)]
    mean = torch.stack([logits for logits in plain_logits if logits is not None]).mean(0)
    # Without any bias one identifier is first nearly everywhere; with these, others are, of one
    # token and of two, also within a batch.
    for bias in (torch.zeros(12), mean, mean - torch.linspace(-1, 1, 12)):
        ranker.identifier_bias = bias
        for ask, look, logits in zip(asks, ranker.reader.read(asks), plain_logits, strict=True):
            assert look.logits is not None
            assert look.state is not None
            assert logits is not None
            torch.testing.assert_close(look.logits, logits)
            best = int((look.logits - bias).argmax())
            emitted = spoken(ranker)[best][:-1]
            lengths.add(len(emitted))
            state, _ = plain(ranker.backbone, [*ranker.prompts.build(*ask), *emitted])
            torch.testing.assert_close(look.state, state, atol=1e-5, rtol=1e-4)
    assert lengths == ({1} if identifiers == "letters" else {1, 2})


# ---- generate -----------------------------------------------------------------------------------


def test_the_written_order_is_that_of_generate(
    make_ranker: MakeRanker, real_backbone: Backbone, ml100k: InteractionData
):
    ranker = make_ranker(real_backbone, num_candidates=4, mode="generate")
    asks = asks_of(ml100k, 2, 4)
    prompts = ranker.prompts
    for ask, look in zip(asks, ranker.reader.read(asks), strict=True):
        prompt = prompts.build(*ask)
        output = generated(real_backbone, prompt, prompts.answer_tokens)
        text = "[" + str(
            prompts.tokenizer.decode(output.sequences[0, len(prompt) :], skip_special_tokens=True)
        )
        parsed = parse_ranking(text, prompts.identifiers.texts, ended=False)
        assert parsed.order  # SmolLM2 does name some of them
        assert (look.failure, look.partial) == (None, parsed.failure)
        assert look.logits is None
        assert look.ranks is not None
        assert look.ranks.equal(ranks_of_order(parsed.order, 4))
        assert look.generated_tokens == prompts.answer_tokens
        # The order opens with the identifier itself, so the prompt's state chose it.
        assert look.state is not None
        assert gap(look.state[None], output.hidden_states[0][-1][:, -1]) < 1e-4


def writing(ranker: RankLLM, asks: Sequence[Ask], texts: Sequence[str]) -> Callable[..., Any]:
    """In place of `write`: to these asks the teacher says this."""
    prompts, tokenizer = ranker.prompts, ranker.prompts.tokenizer
    opening = [] if prompts.answer else tokenizer.encode("Ranking: [", add_special_tokens=False)
    answers = {}
    for ask, text in zip(asks, texts, strict=True):
        whole = tokenizer.encode(("Ranking: [" if opening else "") + text, add_special_tokens=False)
        assert whole[: len(opening)] == opening
        answers[tuple(prompts.build(*ask))] = whole[len(opening) :]

    def write(passes: Passes, rows: Sequence[list[int]], *_: Any) -> Any:
        return [Written(answers[tuple(row)], True, -1.0) for row in rows], passes.last_states(rows)

    return write


SAID = [
    ("B] > [C] > [A]", "", "B"),
    ("B", "", "B"),
    ("I would say:\n[C] > [A] > [B]", "I would say:\n[", "C"),
    ("The best is ½ of all, namely [B], then [A]", "The best is ½ of all, namely [", "B"),
]


@pytest.mark.parametrize("position", ["predict", "emit"])
def test_the_decision_state_is_at_the_first_identifier_wherever_it_is_written(
    make_ranker: MakeRanker, ml100k: InteractionData, monkeypatch: pytest.MonkeyPatch, position: Any
):
    ranker = make_ranker(mode="generate", decision_position=position)
    asks = asks_of(ml100k, len(SAID), 3)
    said_to = writing(ranker, asks, [said for said, _, _ in SAID])
    monkeypatch.setattr(reading, "write", said_to)
    tokenizer = ranker.prompts.tokenizer
    for ask, look, (said, before, first) in zip(asks, ranker.reader.read(asks), SAID, strict=True):
        assert look.failure is None
        opening = tokenizer.encode("Ranking: [", add_special_tokens=False)
        upto = f"Ranking: [{before}" + (first if position == "emit" else "")
        written = tokenizer.encode(upto, add_special_tokens=False)[len(opening) :]
        state, logprobs = plain(ranker.backbone, [*ranker.prompts.build(*ask), *written])
        assert look.state is not None
        torch.testing.assert_close(look.state, state, atol=1e-5, rtol=1e-4, msg=said)
        assert logprobs.isfinite().all()


def test_what_was_written_is_ranked_tied_or_a_counted_failure(
    make_ranker: MakeRanker, ml100k: InteractionData, monkeypatch: pytest.MonkeyPatch
):
    said = {
        "C] > [A] > [B]": (None, None, [2.0, 3.0, 1.0]),
        "C] > [A]": (None, "truncated", [2.0, 3.0, 1.0]),  # what is left is the last
        "C]": (None, "truncated", [2.5, 2.5, 1.0]),
        "C] > [C] > [A]": (None, "repeated", [2.5, 2.5, 1.0]),
        "B] > [X]": (None, "unknown_identifier", [2.5, 1.0, 2.5]),
        "X] > [A]": ("unknown_identifier", None, None),
        "that is hard to say": ("no_identifier", None, None),
        "": ("empty", None, None),
    }
    ranker = make_ranker(mode="generate")
    asks = asks_of(ml100k, len(said), 3)
    monkeypatch.setattr(reading, "write", writing(ranker, asks, list(said)))
    looks = ranker.reader.read(asks)
    for look, (failure, partial, ranks) in zip(looks, said.values(), strict=True):
        assert (look.failure, look.partial) == (failure, partial)
        assert (None if look.ranks is None else look.ranks.tolist()) == ranks


# ---- cot ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["predict", "emit"])
def test_the_verdict_is_read_behind_the_reasoning_that_generate_writes(
    make_ranker: MakeRanker, real_backbone: Backbone, ml100k: InteractionData, position: Any
):
    ranker = make_ranker(
        real_backbone, num_candidates=4, mode="cot", reasoning_tokens=7, decision_position=position
    )
    asks = asks_of(ml100k, 2, 4)[position == "emit" :]
    prompts = ranker.prompts
    letters = [tokens[0] for tokens in spoken(ranker)]
    for ask, look in zip(asks, ranker.reader.read(asks), strict=True):
        prompt = prompts.build(*ask)
        reasoning = generated(real_backbone, prompt, 7).sequences[0, len(prompt) :].tolist()
        assert look.reasoning == str(prompts.tokenizer.decode(reasoning)).strip() != ""
        assert look.generated_tokens == 7
        followed = prompt + reasoning + prompts.answer
        state, logprobs = plain(real_backbone, followed)
        assert look.logits is not None
        assert look.state is not None
        torch.testing.assert_close(
            centred(look.logits), centred(logprobs[letters]), atol=1e-3, rtol=1e-3
        )
        if position == "emit":
            state, _ = plain(real_backbone, [*followed, letters[int(look.logits.argmax())]])
        assert gap(look.state[None], state[None]) < 1e-4


def test_reasoning_ends_where_the_teacher_goes_on_to_rank(
    make_ranker: MakeRanker, ml100k: InteractionData, monkeypatch: pytest.MonkeyPatch
):
    ranker = make_ranker(mode="cot")
    prompts, tokenizer = ranker.prompts, ranker.prompts.tokenizer
    said = [" likes trains.\n\nRanking: [B] > [A]", " likes trains.", "", "Ranking: [B]"]
    asks = asks_of(ml100k, 4, 3)
    monkeypatch.setattr(search, "write", writing(ranker, asks, said))
    looks = ranker.reader.read(asks)
    assert [look.reasoning for look in looks] == ["likes trains."] * 2 + ["", ""]
    kept = tokenizer.encode(" likes trains.", add_special_tokens=False)
    for ask, look, reasoning in zip(asks, looks, [kept, kept, [], []], strict=True):
        state, _ = plain(ranker.backbone, prompts.build(*ask) + reasoning + prompts.answer)
        assert look.state is not None
        torch.testing.assert_close(look.state, state, atol=1e-5, rtol=1e-4)


# ---- rows apart ---------------------------------------------------------------------------------


def poison(backbone: Backbone, tokens: set[int]) -> None:
    embedding: Any = backbone.model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[list(tokens)] = torch.nan


@pytest.mark.parametrize("mode", ["direct", "generate", "cot"])
@pytest.mark.parametrize("position", ["predict", "emit"])
def test_a_row_that_is_not_finite_leaves_the_others_alone(
    make_ranker: MakeRanker, mode: Any, position: Any
):
    settings = {"mode": mode, "decision_position": position, "reasoning_tokens": 5}
    ranker, untouched = (make_ranker(**settings) for _ in range(2))
    poisoned, clean = ([], [50, 100, 100]), ([], [100] * 3)
    tokens = set(ranker.prompts.build(*poisoned)) - set(ranker.prompts.build(*clean))
    poison(ranker.backbone, tokens)
    looks = ranker.reader.read([clean, poisoned, clean])
    alone = untouched.reader.read([clean])[0]
    assert looks[1].failure == "non_finite"
    for look in (looks[0], looks[2]):
        assert (look.failure, look.partial) == (alone.failure, alone.partial)
        assert look.state is not None
        assert alone.state is not None
        torch.testing.assert_close(look.state, alone.state, atol=1e-5, rtol=1e-4)


# ---- the memo -----------------------------------------------------------------------------------


def same(one: Look, other: Look) -> bool:
    assert one.state is not None
    assert one.logits is not None
    assert other.state is not None
    assert other.logits is not None
    return one.state.equal(other.state) and one.logits.equal(other.logits)


def test_equal_prompts_are_answered_from_memory(make_ranker: MakeRanker, ml100k: InteractionData):
    ranker = make_ranker(memo_rows=10)
    reader, asks = ranker.reader, asks_of(ml100k, 4, 3)
    first = reader.read(asks)
    assert reader.memo_hits == 0
    computed = ranker.passes.computed_tokens
    again = reader.read([asks[2], asks[0], asks[2]])
    assert reader.memo_hits == 3
    assert ranker.passes.computed_tokens == computed
    assert same(again[0], first[2])
    assert same(again[1], first[0])
    assert same(again[2], first[2])
    assert [look.prompt_tokens for look in again] == [0, 0, 0]  # they cost nothing
    # A prompt twice in one batch is no hit, and no harm.
    twice = make_ranker(ranker.backbone, memo_rows=10).reader.read([asks[1], asks[1]])
    for look in twice:
        torch.testing.assert_close(look.logits, first[1].logits)


def test_without_a_memo_nothing_is_kept(make_ranker: MakeRanker, ml100k: InteractionData):
    ranker = make_ranker()
    asks = asks_of(ml100k, 2, 3)
    ranker.reader.read(asks)
    computed = ranker.passes.computed_tokens
    ranker.reader.read(asks)
    assert ranker.passes.computed_tokens > computed
    assert ranker.reader.memo_hits == 0


def test_the_memo_forgets_what_was_longest_unused(make_ranker: MakeRanker, ml100k: InteractionData):
    ranker = make_ranker(memo_rows=2)
    reader, (one, two, three, four) = ranker.reader, asks_of(ml100k, 4, 3)
    reader.read([one, two])
    reader.read([one])  # so `two` is the older one
    reader.read([three])
    assert reader.memo_hits == 1
    reader.read([one, three])
    assert reader.memo_hits == 3
    reader.read([two])
    assert reader.memo_hits == 3
    reader.read([one, two, three, four])
    assert len(reader._memo) == 2


def test_a_known_prompt_among_new_ones_that_push_it_out_is_still_answered(
    make_ranker: MakeRanker, ml100k: InteractionData
):
    """Regression: the new ones took its place before it was looked up, and it came back empty."""
    ranker = make_ranker(memo_rows=1)
    asks = asks_of(ml100k, 3, 3)
    known = ranker.reader.read(asks[2:])[0]
    looks = ranker.reader.read(asks)
    assert same(looks[2], known)
    assert all(look.state is not None for look in looks)


def test_failures_are_not_remembered(
    make_ranker: MakeRanker, ml100k: InteractionData, monkeypatch: pytest.MonkeyPatch
):
    ranker = make_ranker(mode="generate", memo_rows=10)
    asks = asks_of(ml100k, 2, 3)
    for said, failures, hits in (
        (["A]", "what?"], [None, "no_identifier"], 0),
        (["B]", "B]"], [None, None], 1),
    ):
        monkeypatch.setattr(reading, "write", writing(ranker, asks, said))
        assert [look.failure for look in ranker.reader.read(asks)] == failures
        assert ranker.reader.memo_hits == hits


@pytest.mark.parametrize(("position", "hits"), [("predict", 2), ("emit", 0)])
def test_another_bias_counts_only_where_it_decides_what_is_emitted(
    make_ranker: MakeRanker, ml100k: InteractionData, position: Any, hits: int
):
    ranker = make_ranker(memo_rows=10, decision_position=position)
    asks = asks_of(ml100k, 2, 3)
    ranker.reader.read(asks)
    ranker.identifier_bias = torch.tensor([0.0, 1.0, 0.0])
    ranker.reader.read(asks)
    assert ranker.reader.memo_hits == hits


def test_another_adapter_is_another_teacher(make_ranker: MakeRanker, ml100k: InteractionData):
    ranker = make_ranker(memo_rows=10)
    asks = asks_of(ml100k, 2, 3)
    ranker.reader.read(asks)
    ranker.backbone.adapters["other"] = "another version"
    ranker.backbone.adapter = "other"
    ranker.reader.read(asks)
    assert ranker.reader.memo_hits == 0
    ranker.backbone.adapter = None
    ranker.reader.read(asks)
    assert ranker.reader.memo_hits == 2
