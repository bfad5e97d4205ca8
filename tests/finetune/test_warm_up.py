"""Rows whose answer is certain: the item that the history shows, or the most popular one."""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cotrain.config import TeacherConfig
from cotrain.data.interactions import InteractionData
from cotrain.errors import ConfigError
from cotrain.finetune.examples import Example
from cotrain.finetune.lora import TrainableAdapter
from cotrain.finetune.warm_up import CANDIDATES, WarmUpObjective, WarmUpRow
from cotrain.finetune_settings import LoraSettings
from cotrain.teacher import backbone as backbones
from cotrain.teacher.backbone import load_backbone
from cotrain.teacher.prompts import make_prompts
from cotrain.teacher.ranker import RankLLM

Make = Callable[..., WarmUpObjective]
LETTERS = "ABCDEFGHIJ"
HISTORIES = [(1, 50, 3, 4, 5), (9, 100, 200), (42,)]
CHOICES = (1, 2, 300, 50, 1200, 700, 1600, 181)
ROWS = [
    Example(user, 3, items, CHOICES, (1.0,) + (0.0,) * 7, 1) for user, items in enumerate(HISTORIES)
]


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer() -> Iterator[None]:
    """It takes longer to read than the tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "load_tokenizer", functools.cache(backbones.load_tokenizer))
        yield


@pytest.fixture(scope="module")
def make(tiny_teacher: str, ml100k: InteractionData) -> Make:
    @functools.cache
    def ranker(**changes: Any) -> RankLLM:
        settings = TeacherConfig(
            **{"num_candidates": 10, "history_length": 3, "template": "brief", **changes}
        )
        backbone = load_backbone(tiny_teacher, "fp32", torch.device("cpu"))
        prompts = make_prompts(
            settings, backbone.tokenizer, ml100k.catalog.titles, ml100k.catalog.categories, 2048,
            ml100k.popularity_levels.tolist(),
        )  # fmt: skip
        return RankLLM(backbone, prompts, settings)

    def objective(seed: int = 0, kind: Any = "recognition", **changes: Any) -> WarmUpObjective:
        levels = ml100k.popularity_levels
        return WarmUpObjective(ranker(**changes), ROWS, kind, 7, levels, seed)

    return objective


def read(objective: WarmUpObjective, row: WarmUpRow) -> tuple[list[str], dict[str, str]]:
    """The titles of the history, and of each label, that a prompt's words show."""
    text = str(objective.ranker.prompts.tokenizer.decode(row.tokens))
    past, _, rest = text.partition("\n\nCandidates:\n")
    shown = re.findall(r"^(.*) \[([A-Z])\]", rest, re.MULTILINE)
    assert text.endswith("Next: [")
    return re.findall(r"^- (.*)$", past, re.MULTILINE), {label: title for title, label in shown}


@pytest.mark.parametrize("num_candidates", [10, 4])
def test_only_the_right_labels_title_is_in_the_history_that_is_shown(
    make: Make, num_candidates: int
):
    objective = make(num_candidates=num_candidates)
    rights, places, labels = Counter(), Counter(), Counter()
    for epoch in range(6):
        for row in range(len(objective)):
            encoded = objective.encode(row, epoch)
            past, shown = read(objective, encoded)
            assert len(past) == min(3, len(HISTORIES[row % 3]))  # not the items before them
            assert len(shown) == len(encoded.labels) == min(CANDIDATES, num_candidates)
            assert list(shown) == [LETTERS[label] for label in encoded.labels]
            own = [shown[LETTERS[label]] in past for label in encoded.labels]
            assert tuple(map(float, own)) == encoded.target
            right = encoded.target.index(1)
            rights[shown[LETTERS[encoded.labels[right]]]] += 1
            places[right] += 1
            labels.update(encoded.labels)
    # Any of the titles shown, at any place, under any label.
    assert len(rights) == 7
    assert len(places) == min(CANDIDATES, num_candidates)
    assert set(labels) == set(range(num_candidates))


@pytest.mark.parametrize("kind", ["popularity", "order"])
def test_every_other_row_asks_for_popularity(make: Make, kind: str):
    objective = make(kind=kind, template="brief-popularity")
    orders = set()
    for row in range(12):
        encoded = objective.encode(row, 0)
        text = str(objective.ranker.prompts.tokenizer.decode(encoded.tokens))
        shown = re.findall(r"^(.*), (\d) \[([A-Z])\]", text, re.MULTILINE)
        assert encoded.kind == (kind if row % 2 else "recognition")
        assert len(shown) == (len(CHOICES) if encoded.kind == "order" else CANDIDATES)
        levels = [int(level) for _, level, _ in shown]
        if encoded.kind == "order":
            orders.add(tuple(title for title, _, _ in shown))
            assert [label for _, _, label in shown] == list(LETTERS[: len(CHOICES)])
            # One level more is twice as likely.
            worth = [2.0**level for level in levels]
            assert encoded.target == pytest.approx([each / sum(worth) for each in worth])
        else:
            assert sorted(encoded.target) == [0.0] * (CANDIDATES - 1) + [1.0]
        if encoded.kind == "popularity":
            assert len(set(levels)) == CANDIDATES
            assert levels[encoded.target.index(1)] == max(levels)
    if kind == "order":
        assert len(orders) > 3
        assert len({title for order in orders for title in order}) == len(CHOICES)


@pytest.mark.parametrize("kind", ["popularity", "order"])
def test_popularity_that_is_not_shown_cannot_be_learned(make: Make, kind: str):
    with pytest.raises(ConfigError, match=rf"{kind}_rows.*template brief does not.*popularity"):
        make(kind=kind)


def test_rows_are_others_in_each_epoch_and_the_same_again(make: Make):
    objective, again = make(), make()
    epochs = [[objective.encode(row, epoch) for row in range(7)] for epoch in range(3)]
    assert epochs[1] == [again.encode(row, 1) for row in range(7)]
    tokens = {tuple(row.tokens) for rows in epochs for row in rows}
    assert len(tokens) == 21
    assert make(seed=1).encode(0, 0) != epochs[0][0]


def test_the_loss_is_that_of_the_models_own_logits_among_the_labels_shown(make: Make):
    objective = make()
    encoded = [objective.encode(row, 0) for row in range(4)]
    model: Any = objective.ranker.backbone.model
    tokens = objective.ranker.prompts.identifiers.first_tokens
    expected = []
    for row in encoded:
        with torch.no_grad():
            logits = model(torch.tensor([row.tokens])).logits[0, -1]
        shown = logits[[tokens[label] for label in row.labels]]
        expected.append(float(F.cross_entropy(shown, torch.tensor(row.target))))
    assert float(objective.loss_sum(encoded)) == pytest.approx(sum(expected), rel=1e-4)
    assert float(objective.loss_sum(encoded[2:3])) == pytest.approx(expected[2], rel=1e-4)


def test_gradients_reach_the_adapter(make: Make):
    objective = make(max_title_tokens=8)  # a model of its own
    adapter = TrainableAdapter(objective.ranker.backbone, LoraSettings(rank=2, dropout=0.0), 0)
    objective.loss_sum([objective.encode(0, 0)]).backward()
    grads = [p.grad for name, p in adapter.parameters.items() if "lora_B" in name]
    assert sum(float(grad.norm()) for grad in grads if grad is not None) > 1e-3


def test_what_is_perfect_has_no_loss(make: Make, monkeypatch: pytest.MonkeyPatch):
    objective = make(kind="order", template="brief-popularity")
    encoded = [objective.encode(row, 0) for row in range(1, 6, 2)]

    def planted(rows: list[WarmUpRow]) -> list[tuple[WarmUpRow, Tensor]]:
        return [(row, torch.tensor(row.target).log() + 3) for row in rows]

    monkeypatch.setattr(objective, "_read", planted)
    assert float(objective.loss_sum(encoded)) == pytest.approx(0, abs=1e-5)
    found = objective.validate(None)
    assert found == pytest.approx({"nll": 0, "accuracy@1": 1, "concordance": 1}, abs=1e-5)


@pytest.mark.parametrize(
    ("knows", "accuracy", "concordance"), [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (-1.0, 0.0, 0.0)]
)
def test_validation_counts_ties_against_the_teacher(
    make: Make, monkeypatch: pytest.MonkeyPatch, knows: float, accuracy: float, concordance: float
):
    objective, seen = make(), []

    def planted(encoded: list[WarmUpRow]) -> list[tuple[WarmUpRow, Tensor]]:
        seen.extend(tuple(row.tokens) for row in encoded)
        return [(row, knows * torch.tensor(row.target)) for row in encoded]

    monkeypatch.setattr(objective, "_read", planted)
    found = objective.validate(None)
    assert found["accuracy@1"] == accuracy
    assert found["concordance"] == concordance
    trained = {tuple(objective.encode(row, epoch).tokens) for row in range(7) for epoch in range(3)}
    assert len(set(seen)) == 64
    assert not trained & set(seen)
