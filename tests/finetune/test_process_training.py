"""Training a process reward model: what a step is worth, what the head learns, what is gone on
with."""

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cotrain.config import FinetuneConfig, parse_as
from cotrain.errors import ConfigError, CotrainError, DataError
from cotrain.finetune import process_training as module
from cotrain.finetune import run as runs
from cotrain.finetune.lora import TrainableAdapter
from cotrain.finetune.process_training import ROLLOUTS, Rollouts, fit_head, step_values
from cotrain.finetune.run import Context, prepare, run
from cotrain.finetune_settings import LoraSettings
from cotrain.runtime import tracking
from cotrain.teacher import backbone as backbones
from cotrain.teacher import steps
from cotrain.teacher.backbone import Backbone, load_backbone
from cotrain.teacher.memory import TokenBudget
from cotrain.teacher.passes import Passes
from cotrain.teacher.process_reward import ProcessReward
from cotrain.teacher.steps import split_steps

K = 4
Configured = Callable[..., FinetuneConfig]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One thread is faster for models this small, and the tokenizer takes longer to read."""
    threads = torch.get_num_threads()
    read = functools.cache(backbones.load_tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "use_all_cores", lambda processes: torch.set_num_threads(1))
        patch.setattr(backbones, "load_tokenizer", read)
        patch.setattr(runs, "load_tokenizer", read)
        # A random teacher would hardly ever come to an end, of a sentence or of all.
        patch.setattr(Backbone, "stop_ids", frozenset(range(0, 49_152, 12)))
        patch.setattr(steps, "_MARKS", tuple("adeghlnrsty"))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def configured(tiny_teacher: str, small_tables: tuple[Path, Path]) -> Configured:
    interactions, items = small_tables

    def with_options(folder: Path, *options: str) -> FinetuneConfig:
        return parse_as(
            FinetuneConfig,
            [
                "--data.interactions", str(interactions), "--data.items", str(items),
                "--teacher.model", tiny_teacher, "--teacher.quantization", "fp32",
                "--teacher.num_candidates", str(K), "--teacher.history_length", "3",
                "--teacher.template", "movies", "--teacher.reasoning_tokens", "24",
                "--examples.candidates", "random", "--examples.rows", "6",
                "--examples.validation_rows", "3", "--process.rollouts", "2",
                "--process.reached", "reciprocal_rank", "--output", str(folder), *options,
            ],
        )  # fmt: skip

    return with_options


@pytest.fixture(scope="module")
def context(configured: Configured, tmp_path_factory: pytest.TempPathFactory) -> Context:
    """Nothing is done in it; tests take it to folders of their own."""
    config = configured(tmp_path_factory.mktemp("process") / "idle")
    return prepare("process-reward", replace(config, teacher=replace(config.teacher, mode="cot")))


@pytest.fixture(scope="module")
def gathered(context: Context, tmp_path_factory: pytest.TempPathFactory) -> list[Rollouts]:
    """Rollouts of all rows, drawn at once, also of those whose reasoning is empty."""
    folder = tmp_path_factory.mktemp("gathered")
    found, every = module._gather(replace(context, folder=folder)), module._read(folder / ROLLOUTS)
    assert found == [one for one in every if one.ends]
    return every


# ---- what a step is worth -----------------------------------------------------------------------


def rollouts_of(
    place: int, *logits: list[list[float]], split: str = "train", row: int = 0
) -> Rollouts:
    ends = list(range(5, 5 * len(logits) + 1, 5))
    return Rollouts(split, row, [50, 51], [60] * (5 * len(logits)), ends, place, [*logits])


# Over all lines no letter has more than another, row by row less its mean.
BY_HAND = [
    rollouts_of(0, [[3.0, 2.0, 1.0], [1.0, 3.0, 2.0]], [[2.0, 1.0, 3.0]]),
    rollouts_of(2, [[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]], [[2.0, 3.0, 1.0], [2.0, 2.0, 2.0]]),
]


def test_values_by_hand():
    assert step_values(BY_HAND, "first") == [[1 / 2, 0], [1 / 2, 0]]
    found = step_values(BY_HAND, "reciprocal_rank")
    # Ties count against the step.
    assert found[0] == pytest.approx([(1 + 1 / 3) / 2, 1 / 2])
    assert found[1] == pytest.approx([(1 + 1 / 2) / 2, (1 / 3 + 1 / 3) / 2])


@pytest.mark.parametrize("reached", ["first", "reciprocal_rank"])
def test_what_every_completion_gives_a_letter_is_not_worth_anything(reached: str):
    letters = [9.0, -4.0, 0.5]
    liked = [
        replace(one, logits=[
            [[value + more for value, more in zip(line, letters, strict=True)] for line in step]
            for step in one.logits
        ])
        for one in BY_HAND
    ]  # fmt: skip
    # But for the tie, which rounding may break.
    found, plain = step_values(liked, reached), step_values(BY_HAND, reached)
    assert found[0] == pytest.approx(plain[0])
    assert found[1][0] == pytest.approx(plain[1][0])


# ---- the head -----------------------------------------------------------------------------------


def entropy(share: float, values: Tensor) -> float:
    """Mean cross-entropy of saying one share whatever is asked."""
    return float(-(values * math.log(share) + (1 - values) * math.log(1 - share)).mean())


def test_a_head_learns_what_a_line_separates():
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(400, 6, generator=draw) * torch.tensor([1, 9, 1, 0.1, 1, 1]) + 5
    side = (states[:, 1] - 5) / 9 - (states[:, 3] - 5) / 0.1
    values = torch.where(side > 0, 0.75, 0.25)
    train = torch.arange(400) % 2 == 0

    head, facts = fit_head(states, values, train, 400, 0.02)

    assert ((head(states[~train]) > 0) == (side[~train] > 0)).float().mean() > 0.95
    assert facts["held_out_spearman"] > 0.8
    assert (facts["steps_train"], facts["steps_held_out"]) == (200, 200)
    # Its bound: the entropy of the soft targets themselves.
    least = entropy(0.75, torch.tensor([0.75]))
    constant = entropy(float(values[train].mean()), values[~train])
    assert facts["held_out_loss_of_constant"] == pytest.approx(constant, abs=1e-5)
    assert least < facts["held_out_loss"] < least + 0.05 < constant
    assert 0 < facts["best_epoch"] <= 400


def test_where_nothing_carries_over_the_mean_of_training_stays():
    states = torch.tensor([[1.0], [2.0], [3.0], [1.0], [3.0]])
    values = torch.tensor([0.0, 0.5, 0.7, 1.0, 0.0])  # held out it is the other way round
    train = torch.tensor([True, True, True, False, False])

    head, facts = fit_head(states, values, train, 50, 0.1)

    assert facts["best_epoch"] == 0
    assert facts["held_out_spearman"] == 0
    assert torch.sigmoid(head(states)).tolist() == pytest.approx([0.4] * 5)
    assert facts["held_out_loss"] == pytest.approx(entropy(0.4, values[3:]))
    assert facts["held_out_loss"] == facts["held_out_loss_of_constant"]


@pytest.mark.parametrize("held_out", [1, 2, 3])
def test_few_steps_and_states_that_do_not_differ_are_no_failure(held_out: int):
    states = torch.ones(4 + held_out, 3)
    values = torch.tensor([0.0, 1.0, 1.0, 1.0, *[0.5] * held_out])
    train = torch.arange(4 + held_out) < 4
    head, facts = fit_head(states, values, train, 5, 0.1)
    assert torch.sigmoid(head(states)).isfinite().all()
    assert all(math.isfinite(value) for value in facts.values())


# ---- rollouts -----------------------------------------------------------------------------------


def next_logits(context: Context, tokens: list[int]) -> Tensor:
    model: Any = context.ranker.backbone.model
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, -1]
    return logits[list(context.ranker.prompts.identifiers.first_tokens)]


def test_every_row_has_its_reasoning_and_completions_of_its_steps(
    context: Context, gathered: list[Rollouts]
):
    examples, prompts = context.examples, context.ranker.prompts
    keys = {(one.split, one.row) for one in gathered}
    assert keys == {("train", row) for row in range(6)} | {("validation", row) for row in range(3)}
    complete = 0
    for one in gathered:
        example = (examples.train if one.split == "train" else examples.validation)[one.row]
        orders = {
            tuple(prompts.build(example.history, shown)): shown.index(example.target)
            for shown in itertools.permutations(example.candidates)
        }
        assert orders[tuple(one.prompt)] == one.place
        assert one.ends == split_steps(prompts.tokenizer, one.tokens)[:3]
        for end, step in zip(one.ends, one.logits, strict=True):
            whole = end == len(one.tokens) < 24
            # What is complete has nothing to draw: its verdict is read once.
            assert len(step) == (1 if whole else 2)
            assert all(len(line) == K for line in step)
            if whole:
                complete += 1
                read = next_logits(context, one.prompt + one.tokens + prompts.answer)
                assert step[0] == pytest.approx(read.tolist(), abs=1e-3)
    assert complete
    assert max(len(one.ends) for one in gathered) > 1
    # Those drawn from a step's end differ.
    assert any(step[0] != step[-1] for one in gathered for step in one.logits)


def test_a_torn_line_is_dropped_and_its_row_drawn_again(
    context: Context, gathered: list[Rollouts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lines = [json.dumps(vars(one)) + "\n" for one in gathered]
    torn = lines[-1][: len(lines[-1]) // 2]
    (tmp_path / ROLLOUTS).write_text("".join(lines[:4] + lines[5:-1]) + torn)
    roll, asked = module._roll, []

    def counted(context: Context, keys: Any) -> list[Rollouts]:
        asked.extend(keys)
        return roll(context, keys)

    monkeypatch.setattr(module, "_roll", counted)
    found = module._gather(replace(context, folder=tmp_path))

    assert asked == [(one.split, one.row) for one in (gathered[4], gathered[-1])]
    # And as it would have been.
    rows = [*gathered[:4], *gathered[5:-1], gathered[4], gathered[-1]]
    expected = [one for one in rows if one.ends]
    for one, other in zip(found, expected, strict=True):
        assert replace(one, logits=[]) == replace(other, logits=[])
        for step, same in zip(one.logits, other.logits, strict=True):
            np.testing.assert_allclose(step, same, atol=1e-3)
    # A third call has nothing to do.
    asked.clear()
    assert module._gather(replace(context, folder=tmp_path)) == found
    assert asked == []


@pytest.mark.parametrize("line", ["no json", "[1, 2]", '{"split": "train", "row": 0}'])
def test_another_file_of_that_name_is_refused(context: Context, tmp_path: Path, line: str):
    (tmp_path / ROLLOUTS).write_text(line + "\n")
    with pytest.raises(DataError, match="holds something else than rollouts"):
        module._gather(replace(context, folder=tmp_path))


def planted(context: Context, folder: Path, make: Callable[[str, int], Rollouts]) -> Context:
    """Rollouts of every row are there already."""
    lines = [
        json.dumps(vars(make(split, row)))
        for split, count in (("train", 6), ("validation", 3))
        for row in range(count)
    ]
    (folder / ROLLOUTS).write_text("\n".join(lines) + "\n")
    return replace(context, folder=folder)


def test_steps_that_are_all_worth_the_same_teach_nothing(context: Context, tmp_path: Path):
    # A mean of three thirds is rounded otherwise than one of a single third.
    third = [2.0, 1.0, 0.0, -3.0]
    lines = [[third] * 3, [third] * 7, [third]]
    orders = [np.roll(third, by).tolist() for by in range(K)]

    def even(split: str, row: int) -> Rollouts:
        # In every order, so that no letter has more than another.
        of_steps = [[order for order in orders for _ in step] for step in lines]
        return rollouts_of(row % K, *of_steps, split=split, row=row)

    with pytest.raises(CotrainError, match=r"All 18 steps are worth the same .*reciprocal_rank"):
        module.process_reward(planted(context, tmp_path, even))
    assert not (tmp_path / "process_reward.json").exists()


def test_a_single_step_of_training_teaches_nothing(context: Context, tmp_path: Path):
    """Its values have no spread, which was once read as one that is not 0."""

    def single(split: str, row: int) -> Rollouts:
        one = rollouts_of(row % K, [[float(row), 1.0, 0.0, 0.0]], split=split, row=row)
        return one if (split, row) == ("train", 0) or split == "validation" else replace(
            one, ends=[], logits=[]
        )  # fmt: skip

    with pytest.raises(CotrainError, match="All 1 steps are worth the same"):
        module.process_reward(planted(context, tmp_path, single))


@pytest.mark.parametrize("empty", ["train", "validation"])
def test_without_a_step_there_is_nothing_to_learn(context: Context, tmp_path: Path, empty: str):
    def silent(split: str, row: int) -> Rollouts:
        one = rollouts_of(0, [[1.0, 0.0, 0.0, 0.0]], split=split, row=row)
        return replace(one, tokens=[], ends=[], logits=[]) if split == empty else one

    with pytest.raises(DataError, match="Of 9 reasonings none has a step"):
        module.process_reward(planted(context, tmp_path, silent))


def test_several_processes_are_refused(context: Context, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(context.accelerator), "num_processes", 2)
    with pytest.raises(ConfigError, match=r"one process, not 2; launch it with --num_processes 1"):
        module.process_reward(context)


# ---- whole --------------------------------------------------------------------------------------


def last_state(backbone: Backbone, tokens: list[int]) -> Tensor:
    model: Any = backbone.model
    with torch.no_grad():
        return model.get_decoder()(torch.tensor([tokens])).last_hidden_state[0, -1]


@pytest.mark.parametrize("adapted", [False, True])
def test_the_folder_is_a_process_reward_model(
    configured: Configured, tiny_teacher: str, tmp_path: Path, adapted: bool
):
    options, cpu = (
        ["--process.epochs", "40", "--process.learning_rate", "0.05"],
        torch.device("cpu"),
    )
    if adapted:
        adapter = TrainableAdapter(
            load_backbone(tiny_teacher, "fp32", cpu), LoraSettings(rank=2), 0
        )
        torch.manual_seed(0)
        adapter.load_state(
            {name: torch.randn_like(value) / 5 for name, value in adapter.state().items()}, "new"
        )
        adapter.save(tmp_path / "start")
        options += ["--teacher.adapter", str(tmp_path / "start")]
    folder = tmp_path / "out"

    report = run("process-reward", module.process_reward, "cot", configured(folder, *options))

    assert (folder / "adapter").is_dir() == adapted
    assert report["steps_train"] + report["steps_held_out"] == sum(
        len(json.loads(line)["ends"]) for line in (folder / ROLLOUTS).read_text().splitlines()
    )
    backbone = load_backbone(tiny_teacher, "fp32", cpu)
    model = ProcessReward.load(folder, Passes(backbone, []), TokenBudget(4096))
    rows = [Rollouts(**json.loads(line)) for line in (folder / ROLLOUTS).read_text().splitlines()]
    prefixes = [one.prompt + one.tokens[:end] for one in rows for end in one.ends]
    scores = model.score(prefixes)
    # A logistic regression on the states of the model under that adapter.
    if adapted:
        backbone.load_adapter(str(folder / "adapter"), "mine")
    states = torch.stack([last_state(backbone, prefix) for prefix in prefixes])
    head = model.head
    logits = ((states - head.mean) / head.scale * head.weight).sum(1) + head.bias
    torch.testing.assert_close(scores, logits.sigmoid(), atol=1e-3, rtol=1e-3)
    # Fitted to the values of the steps, and chosen on those held out.
    values = step_values(rows, "reciprocal_rank")
    flat = torch.tensor([value for of_row in values for value in of_row])
    train = torch.tensor([one.split == "train" for one in rows for _ in one.ends])
    assert report["mean_value"] == pytest.approx(float(flat.mean()))
    constant = entropy(float(flat[train].mean()), flat[~train])
    assert report["held_out_loss_of_constant"] == pytest.approx(constant, abs=1e-4)
    held = scores[~train]
    loss = -(flat[~train] * held.log() + (1 - flat[~train]) * (1 - held).log()).mean()
    assert report["held_out_loss"] == pytest.approx(float(loss), abs=1e-3)
    assert report["held_out_loss"] <= report["held_out_loss_of_constant"]
    (places,) = report["tables"].values()
    assert [row["step"] for row in places] == list(range(1, len(places) + 1))
    assert sum(row["held-out steps"] for row in places) == report["steps_held_out"]
