"""Ranking SFT on a tiny teacher: the loss of the model's own logits, on the prompts that a verdict
is read from."""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from cotrain.benchmarks.parity import FAMILIES, random_prompts, tiny_backbone
from cotrain.config import DataConfig, TeacherConfig
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.errors import ConfigError
from cotrain.finetune.examples import Example, make_examples
from cotrain.finetune.forward import identifier_logits, states_at, token_losses
from cotrain.finetune.lora import TrainableAdapter
from cotrain.finetune.rank_sft import RankObjective
from cotrain.finetune.tuning import tune
from cotrain.finetune_settings import ExamplesConfig, LoraSettings, SftConfig
from cotrain.teacher import backbone as backbones
from cotrain.teacher.backbone import Backbone, load_backbone
from cotrain.teacher.prompts import make_prompts
from cotrain.teacher.ranker import RankLLM
from cotrain.teacher.verdict import ranks_of

K = 5


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer() -> Iterator[None]:
    """It takes longer to read than the tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "load_tokenizer", functools.cache(backbones.load_tokenizer))
        yield


@pytest.fixture(scope="module")
def data(small_tables: tuple[Path, Path]) -> InteractionData:
    interactions, items = small_tables
    return load_interactions(DataConfig(interactions=str(interactions), items=str(items)))


@pytest.fixture(scope="module")
def make_ranker(tiny_teacher: str, data: InteractionData) -> Callable[..., RankLLM]:
    """`make_ranker(**settings)`: with a model of its own."""

    def make(**changes: Any) -> RankLLM:
        settings = TeacherConfig(
            **{"num_candidates": K, "history_length": 3, "template": "brief", **changes}
        )
        backbone = load_backbone(tiny_teacher, "fp32", torch.device("cpu"))
        prompts = make_prompts(
            settings, backbone.tokenizer, data.catalog.titles, data.catalog.categories, 2048
        )
        return RankLLM(backbone, prompts, settings)

    return make


@pytest.fixture(scope="module")
def ranker(make_ranker: Callable[..., RankLLM]) -> RankLLM:
    """For tests that train nothing."""
    return make_ranker()


@pytest.fixture(scope="module")
def rows(data: InteractionData) -> list[Example]:
    settings = ExamplesConfig(rows=12, candidates="random", held_out=0.3)
    train = make_examples(data, settings, K, 0, None).train
    # Some with several relevant candidates.
    return [
        Example(**{**vars(row), "relevance": (1.0, 0.3, 0.0, 0.0, 0.3)}) if number % 3 else row
        for number, row in enumerate(train)
    ]


def whole_logits(backbone: Backbone, tokens: list[int]) -> Tensor:
    """(T, V) of a forward pass as anybody writes it."""
    model: Any = backbone.model
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


# ---- forward passes -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_any_places_give_the_models_own_logits(family: str):
    backbone = tiny_backbone(family)
    prompts = random_prompts([3, 17, 9, 1])
    places = [[2], [0, 16, 5], [], [0]]
    whole = [whole_logits(backbone, prompt) for prompt in prompts]
    expected = torch.stack(
        [own[place] for own, of_row in zip(whole, places, strict=True) for place in of_row]
    )
    states = states_at(backbone, prompts, places)
    torch.testing.assert_close(backbone.logits(states), expected, atol=1e-4, rtol=1e-4)
    tokens = [7, 50, 3]
    last = torch.stack([own[-1, tokens] for own in whole])
    found = identifier_logits(backbone, prompts, tokens)
    torch.testing.assert_close(found, last, atol=1e-4, rtol=1e-4)
    targets = [4, 5, 6, 7, 8]
    losses = token_losses(backbone, states, targets)
    plain = F.cross_entropy(expected, torch.tensor(targets), reduction="none")
    torch.testing.assert_close(losses, plain, atol=1e-4, rtol=1e-4)


# ---- the loss -----------------------------------------------------------------------------------


def plain_loss(name: str, logits: Tensor, relevance: Tensor) -> float:
    """Of one row, in float64, element by element."""
    scores, worth = logits.double().tolist(), relevance.tolist()
    size = len(scores)
    if name == "ce":
        log_probs = logits.double().log_softmax(0).tolist()
        return -sum(w / sum(worth) * p for w, p in zip(worth, log_probs, strict=True))
    if name == "ranknet":
        pairs = [
            (worth[i] - worth[j], math.log1p(math.exp(scores[j] - scores[i])))
            for i in range(size) for j in range(size) if worth[i] > worth[j]
        ]  # fmt: skip
        return sum(w * loss for w, loss in pairs) / sum(w for w, _ in pairs)
    left = sorted(range(size), key=lambda place: -worth[place])
    losses = []
    while left and worth[left[0]] > 0:
        losses.append(math.log(sum(math.exp(scores[p]) for p in left)) - scores[left[0]])
        left = left[1:]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", ["ce", "ranknet", "listmle"])
def test_the_loss_is_that_of_the_models_own_logits_row_by_row(
    ranker: RankLLM, rows: list[Example], name: str
):
    objective = RankObjective(ranker, rows, [], name, seed=0)
    encoded = [objective.encode(row, 0) for row in range(len(objective))]
    assert len({len(row.tokens) for row in encoded}) > 3  # so some are padded
    letters = ranker.prompts.identifiers.first_tokens
    expected = [
        plain_loss(name, whole_logits(ranker.backbone, row.tokens)[-1, letters], row.relevance)
        for row in encoded
    ]
    found = objective.loss_sum(encoded)
    assert float(found) == pytest.approx(sum(expected), rel=1e-5)
    alone = [float(objective.loss_sum([row])) for row in encoded]
    assert alone == pytest.approx(expected, rel=1e-4)


def test_with_one_relevant_candidate_it_is_cross_entropy_of_the_full_logits_among_letters(
    ranker: RankLLM, rows: list[Example]
):
    one = Example(**{**vars(rows[0]), "relevance": (0.0, 0.0, 0.3, 0.0, 0.0)})
    objective = RankObjective(ranker, [one], [], "ce", seed=0)
    row = objective.encode(0, 0)
    letters = torch.tensor(ranker.prompts.identifiers.first_tokens)
    target = letters[row.relevance.argmax()]
    logits = whole_logits(ranker.backbone, row.tokens)[-1]
    others = torch.ones(len(logits), dtype=torch.bool)
    others[letters] = False
    expected = F.cross_entropy(logits.masked_fill(others, -torch.inf)[None], target[None])
    torch.testing.assert_close(objective.loss_sum([row]), expected)


# ---- rows ---------------------------------------------------------------------------------------


def test_relevance_goes_with_its_candidate(ranker: RankLLM, rows: list[Example]):
    """Told from the prompt's own text."""
    objective = RankObjective(ranker, rows, [], "ce", seed=0)
    titles = ranker.prompts.item_tokens()
    decode = ranker.backbone.tokenizer.decode
    for number, example in enumerate(rows):
        row = objective.encode(number, 1)
        text = str(decode(row.tokens))
        lines = text.partition("Candidates:\n")[2].split("\n")[:K]
        worth = dict(zip(example.candidates, example.relevance, strict=True))
        shown = {str(decode(titles[item - 1])).strip(): item for item in example.candidates}
        named = [shown[line.rpartition(" [")[0].strip()] for line in lines]
        assert sorted(named) == sorted(example.candidates)
        assert row.relevance.tolist() == pytest.approx([worth[item] for item in named])
        assert row.tokens == ranker.prompts.build(example.history, named)


def test_candidates_are_shuffled_by_row_epoch_and_seed(ranker: RankLLM, rows: list[Example]):
    def orders(epoch: int, seed: int = 0) -> list[list[int]]:
        objective = RankObjective(ranker, rows, [], "ce", seed)
        return [objective.encode(row, epoch).tokens for row in range(len(rows))]

    first = orders(0)
    assert orders(0) == first
    for other in (orders(1), orders(0, seed=1)):
        assert sum(a != b for a, b in zip(first, other, strict=True)) > len(rows) - 3
    same_rows = RankObjective(ranker, [rows[0]] * 8, [], "ce", 0)
    assert len({tuple(same_rows.encode(row, 0).tokens) for row in range(8)}) > 5
    # Over epochs the target is behind every letter.
    objective = RankObjective(ranker, rows[:1], [], "ce", 0)
    places = {int(objective.encode(0, epoch).relevance.argmax()) for epoch in range(60)}
    assert places == set(range(K))


def test_a_verdict_is_read_from_the_prompt_that_is_trained(ranker: RankLLM, rows: list[Example]):
    """So the logits of the loss, in the student's order, are those that rank the row."""
    objective = RankObjective(ranker, rows, [], "ce", seed=0)
    for number, example in enumerate(rows[:4]):
        row = objective.encode(number, 0)
        logits = identifier_logits(
            ranker.backbone, [row.tokens], ranker.prompts.identifiers.first_tokens
        )
        look = ranker.reader.read_prompts([row.tokens])[0]
        torch.testing.assert_close(look.logits, logits[0], atol=1e-5, rtol=1e-4)
        assert ranker.prompts.build(example.history, example.candidates)[-1] == row.tokens[-1]


# ---- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ce", "ranknet", "listmle"])
def test_a_teacher_learns_an_order_of_items(
    make_ranker: Callable[..., RankLLM], tmp_path: Path, name: str
):
    """Rows that all want the same item among the same others, whatever letter it has."""
    ranker = make_ranker(history_length=1, num_candidates=3)
    adapter = TrainableAdapter(ranker.backbone, LoraSettings(rank=8, dropout=0.0), seed=0)
    rows = [
        Example(user, 5, (300 + user,), (11, 12, 13), (0.0, 1.0, 0.3), target=12)
        for user in range(8)
    ]
    objective = RankObjective(ranker, rows, rows, name, seed=0)
    settings = SftConfig(
        epochs=30, batch_size=8, learning_rate=0.02, lr_warmup_steps=5, eval_every_steps=10
    )  # fmt: skip
    progress = tune(adapter, objective, settings, tmp_path, 0, Accelerator(cpu=True))
    assert progress.best["ndcg@10"] > progress.start["ndcg@10"] + 0.1
    assert progress.best["nll"] < progress.start["nll"] - 0.1
    verdict = ranker.rank(
        [row.history for row in rows], [row.candidates for row in rows],
        [(9, number) for number in range(8)],
    )  # fmt: skip
    assert verdict.identifier_logits is not None
    ranks = ranks_of(verdict.identifier_logits.mean(0))
    assert ranks[1] == 1


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"identifiers": "numbers", "num_candidates": 12}, {"window": 3}], ids=str
)
def test_what_no_one_step_decides_is_refused(
    make_ranker: Callable[..., RankLLM], rows: list[Example], changes: Any
):
    with pytest.raises(ConfigError, match=r"one step that decides between all .* Set"):
        RankObjective(make_ranker(**changes), rows, [], "ce", 0)
