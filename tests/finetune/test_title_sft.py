"""Losses of the modes without labels are those of the plain model, and what they teach is said."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from cotrain.config import FinetuneConfig, TeacherConfig
from cotrain.data.interactions import InteractionData
from cotrain.errors import ConfigError
from cotrain.finetune.bigrec import bigrec, in_catalogue
from cotrain.finetune.examples import Example, Examples
from cotrain.finetune.lora import TrainableAdapter
from cotrain.finetune.run import Context
from cotrain.finetune.title_sft import TitleObjective, YesNoObjective
from cotrain.finetune_settings import BigRecConfig, LoraSettings, SftConfig
from cotrain.teacher.backbone import load_backbone
from cotrain.teacher.bigrec import TitleReader
from cotrain.teacher.prompts import make_prompts
from cotrain.teacher.ranker import RankLLM

Make = Callable[..., tuple[RankLLM, TrainableAdapter]]


def example(user: int, target: int, candidates: list[int], later: tuple[int, ...] = ()) -> Example:
    relevance = tuple(1.0 if i == target else 0.3 if i in later else 0.0 for i in candidates)
    history = tuple(range(100 + user, 103 + 2 * user))
    return Example(user, 3, history, tuple(candidates), relevance, target)


ROWS = [
    example(0, 1, [4, 1, 9, 16]), example(1, 25, [25, 36, 49, 64], (36, 49)),
    example(2, 81, [100, 121, 144, 81], (100, 121, 144)),
]  # fmt: skip


@pytest.fixture
def make(tiny_teacher: str, ml100k: InteractionData) -> Make:
    """A ranker and the adapter on it, whose weights say something already."""

    def make(mode: str, **changes: Any) -> tuple[RankLLM, TrainableAdapter]:
        settings = settings_of(mode=mode, **changes)
        backbone = load_backbone(tiny_teacher, "fp32", torch.device("cpu"))
        catalog = ml100k.catalog
        prompts = make_prompts(
            settings, backbone.tokenizer, catalog.titles, catalog.categories, 2048
        )
        adapter = TrainableAdapter(backbone, LoraSettings(rank=8, dropout=0.0), 0)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in adapter.parameters.values():
                parameter += 0.05 * torch.randn_like(parameter)
        return RankLLM(backbone, prompts, settings), adapter

    return make


def settings_of(**changes: Any) -> TeacherConfig:
    few: dict[str, Any] = {
        "num_candidates": 4, "history_length": 3, "max_title_tokens": 12, "title_tokens": 10,
        "template": "brief", "item_noun": "movie", "grounding_encoder": "teacher",
    }  # fmt: skip
    return TeacherConfig(**{**few, **changes})


def full_logits(ranker: RankLLM, tokens: list[int]) -> Tensor:
    model: Any = ranker.backbone.model
    return model(torch.tensor([tokens])).logits[0]


def gradients(adapter: TrainableAdapter, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(adapter.parameters.values())))


# ---- titles -------------------------------------------------------------------------------------


def test_a_title_is_learned_token_by_token_with_its_end(make: Make, ml100k: InteractionData):
    ranker, adapter = make("bigrec")
    objective = TitleObjective(ranker, ROWS, ROWS, 0)
    tokenizer = ranker.backbone.tokenizer
    encoded = [objective.encode(row, 0) for row in range(len(objective))]
    total, lengths = torch.zeros(()), set()
    for row, own in zip(ROWS, encoded, strict=True):
        # The whole answer as one text, after a prompt that asks for it.
        prompt = ranker.prompts.build(row.history, row.candidates)
        title = tokenizer.encode(
            f" {ml100k.catalog.title(row.target)}<|im_end|>", add_special_tokens=False
        )[:10]
        assert own.tokens + own.answer[-1:] == prompt + title
        logits = full_logits(ranker, prompt + title)[len(prompt) - 1 : -1]
        total = total + F.cross_entropy(logits, torch.tensor(title))  # a mean over its tokens
        lengths.add(len(title))
    assert len(lengths) > 1
    loss = objective.loss_sum(encoded)
    torch.testing.assert_close(loss, total, atol=1e-5, rtol=1e-5)
    for ours, plain in zip(gradients(adapter, loss), gradients(adapter, total), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)
    assert objective.encode(1, 7) == encoded[1]


def test_a_title_that_was_learned_is_written_and_found(make: Make):
    ranker, adapter = make("bigrec")
    objective = TitleObjective(ranker, ROWS[:2], ROWS[:2], 0)
    optimizer = torch.optim.Adam(adapter.parameters.values(), lr=0.01)
    for step in range(40):
        loss = objective.loss_sum([objective.encode(row, 0) for row in range(2)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        adapter.changed(f"step {step}")
    assert isinstance(ranker.reader, TitleReader)
    looks, ranks = in_catalogue(ranker.reader, ROWS[:2])
    titles = ranker.reader.grounding.titles
    assert [look.title for look in looks] == [titles[row.target - 1] for row in ROWS[:2]]
    assert ranks.tolist() == [1, 1]
    assert objective.validate(None)["accuracy@1"] == 1


def test_what_was_not_written_is_found_last_and_what_was_seen_is_passed_over(
    make: Make, monkeypatch: pytest.MonkeyPatch
):
    ranker, _ = make("bigrec")
    reader = ranker.reader
    assert isinstance(reader, TitleReader)
    titles = reader.grounding.titles
    texts = {ROWS[0].history: titles[ROWS[0].history[0] - 1], ROWS[1].history: titles[24]}

    def write_titles(histories: Any, progress: str | None = None) -> list[Any]:
        return [
            SimpleNamespace(
                title=texts.get(tuple(history), ""),
                failure=None if tuple(history) in texts else "empty",
            )
            for history in histories
        ]

    monkeypatch.setattr(reader, "write_titles", write_titles)
    _, ranks = in_catalogue(reader, ROWS)
    # The first wrote a title that the user has had: it is no rival, whatever else is near.
    distances = reader.ground([texts[ROWS[0].history]])[0]
    unseen = [i for i in range(1, len(distances)) if i not in ROWS[0].history]
    nearer = sum(distances[item] <= distances[ROWS[0].target] for item in unseen)
    assert ranks.tolist() == [int(nearer), 1, len(titles)]


# ---- yes and no ---------------------------------------------------------------------------------


def test_yes_for_what_was_taken_and_no_for_what_was_not(make: Make):
    ranker, adapter = make("pointwise")
    objective = YesNoObjective(ranker, ROWS, ROWS, 2, 0)
    encoded = [objective.encode(row, 0) for row in range(3)]
    # Of the second row only one candidate is never taken, of the third none.
    assert [row.answers for row in encoded] == [[1, 0, 0], [1, 0], [1]]
    tokenizer = ranker.backbone.tokenizer
    (yes,), (no,) = (tokenizer.encode(f" {w}", add_special_tokens=False) for w in ("Yes", "No"))
    total = torch.zeros(())
    for own in encoded:
        logits = torch.stack([full_logits(ranker, prompt)[-1] for prompt in own.prompts])
        sigma = (logits[:, yes] - logits[:, no]).sigmoid()
        answers = torch.tensor(own.answers)
        total = total - (answers * sigma.log() + (1 - answers) * (1 - sigma).log()).mean()
        assert own.tokens == [token for prompt in own.prompts for token in prompt]
    loss = objective.loss_sum(encoded)
    torch.testing.assert_close(loss, total, atol=1e-5, rtol=1e-5)
    for ours, plain in zip(gradients(adapter, loss), gradients(adapter, total), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)
    targets = [ranker.prompts.build(row.history, [row.target]) for row in ROWS]
    assert [own.prompts[0] for own in encoded] == targets
    assert encoded[1].prompts[1] == ranker.prompts.build(ROWS[1].history, [64])


def test_other_candidates_are_drawn_in_each_epoch(make: Make):
    ranker, _ = make("pointwise")
    questions = {item: ranker.prompts.build(ROWS[0].history, [item]) for item in (4, 9, 16)}
    drawn = []
    objective = YesNoObjective(ranker, ROWS, ROWS, 1, 5)
    for epoch in range(20):
        _, prompt = objective.encode(0, epoch).prompts
        drawn += [item for item, question in questions.items() if question == prompt]
    assert len(drawn) == 20
    assert set(drawn) == set(questions)
    again = YesNoObjective(ranker, ROWS, ROWS, 1, 5)
    assert again.encode(0, 3) == objective.encode(0, 3)


def test_a_ranker_of_another_mode_is_refused(make: Make):
    titles, questions, letters = (make(mode)[0] for mode in ("bigrec", "pointwise", "direct"))
    for ranker in (questions, letters):
        with pytest.raises(ConfigError, match=r"Set teacher\.mode bigrec"):
            TitleObjective(ranker, ROWS, ROWS, 0)
    for ranker in (titles, letters):
        with pytest.raises(ConfigError, match=r"Set teacher\.mode pointwise"):
            YesNoObjective(ranker, ROWS, ROWS, 1, 0)


# ---- the method ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["title", "yes_no"])
def test_the_method_trains_validates_and_shows(
    task: Any, make: Make, ml100k: InteractionData, tmp_path: Path
):
    mode: Any = "bigrec" if task == "title" else "pointwise"
    ranker, adapter = make(mode)
    config = FinetuneConfig(
        teacher=settings_of(mode=mode), bigrec=BigRecConfig(task=task),
        sft=SftConfig(epochs=1, batch_size=2, lr_warmup_steps=0),
    )  # fmt: skip
    log: Any = SimpleNamespace(write=lambda row: None, num_bytes=0)
    said: list[str] = []
    context = Context(
        config, "bigrec", ml100k, None, Examples(ROWS, ROWS, 3, 3), ranker, adapter,
        Accelerator(cpu=True), log, tmp_path, said.append,
    )  # fmt: skip
    before = adapter.state()
    outcome = bigrec(context)
    assert outcome.progress is not None
    assert outcome.progress.step == 1
    assert len(outcome.progress.validations) == 2
    assert any(not value.equal(before[name]) for name, value in adapter.state().items()) or (
        outcome.progress.best["step"] == 0
    )
    assert outcome.facts["task"] == task
    assert len(outcome.samples) == 3
    text = "\n".join(outcome.samples[0].lines)
    assert f"Taken next: {ml100k.catalog.title(1)}" in text
    if task == "title":
        assert set(outcome.facts["whole_catalogue"]) == {"recall@10", "ndcg@10", "mrr"}
        assert "Nearest: " in text or "Nothing was written" in text
    else:
        assert "Yes rather than No" in text
    assert "tokens on average" in said[0]
