"""The loop on a tiny teacher that learns to say one letter: it learns, stops, fails and goes on."""

import functools
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from cotrain.errors import CotrainError
from cotrain.finetune import tuning
from cotrain.finetune.forward import identifier_logits
from cotrain.finetune.lora import TrainableAdapter
from cotrain.finetune.tuning import Interrupted, Progress, tune
from cotrain.finetune_settings import LoraSettings, SftConfig
from cotrain.runtime import checkpoint
from cotrain.runtime.seeding import seed_everything
from cotrain.teacher import backbone as backbones
from cotrain.teacher.backbone import Backbone, load_backbone

LETTERS = [34, 35, 36, 37]
SETTINGS = SftConfig(
    epochs=3, batch_size=4, learning_rate=0.02, lr_warmup_steps=2, eval_every_steps=4
)  # 15 steps
LORA = LoraSettings(rank=4, alpha=8.0, dropout=0.2)


@dataclass(frozen=True)
class Row:
    tokens: list[int]


class OneLetter:
    """Of random prompts of mixed lengths the answer is always the third letter."""

    def __init__(self, backbone: Backbone, count: int = 21):
        self.backbone = backbone
        draw = torch.Generator().manual_seed(0)
        lengths = torch.randint(3, 20, (count,), generator=draw).tolist()
        self.prompts = [torch.randint(40, 900, (n,), generator=draw).tolist() for n in lengths]
        self.encoded: list[tuple[int, int]] = []
        self.metrics: list[float] = []
        self.before_loss: Callable[[Sequence[Row]], None] = lambda rows: None

    def __len__(self) -> int:
        return len(self.prompts)

    def encode(self, row: int, epoch: int) -> Row:
        self.encoded.append((epoch, row))
        return Row(self.prompts[row])

    def loss_sum(self, encoded: Sequence[Row]) -> Tensor:
        self.before_loss(encoded)
        logits = identifier_logits(self.backbone, [row.tokens for row in encoded], LETTERS)
        wanted = torch.full((len(encoded),), 2)
        return F.cross_entropy(logits, wanted, reduction="sum")

    def validate(self, progress: str | None) -> dict[str, float]:
        with torch.no_grad():
            logits = identifier_logits(self.backbone, self.prompts[:6], LETTERS)
        probs = logits.softmax(1)[:, 2]
        self.metrics.append(float(probs.mean()))
        return {"ndcg@10": float(probs.mean()), "nll": float(-probs.log().mean())}


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer() -> Iterator[None]:
    """It takes longer to read than the tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "load_tokenizer", functools.cache(backbones.load_tokenizer))
        yield


@dataclass
class Training:
    """One training, anew or gone on with."""

    objective: OneLetter
    adapter: TrainableAdapter
    folder: Path

    def run(self, settings: SftConfig = SETTINGS, log: Any = None) -> Progress:
        seed_everything(7)
        return tune(
            self.adapter, self.objective, settings, self.folder, 3, Accelerator(cpu=True), log
        )


Begin = Callable[..., Training]


@pytest.fixture
def begin(tiny_teacher: str, tmp_path: Path) -> Begin:
    """`begin(folder)`: as one call of a program would, with a model and an adapter of its own."""

    def training(folder: str = "training", count: int = 21, lora: LoraSettings = LORA) -> Training:
        backbone = load_backbone(tiny_teacher, "fp32", torch.device("cpu"))
        adapter = TrainableAdapter(backbone, lora, seed=1)
        return Training(OneLetter(backbone, count), adapter, tmp_path / folder)

    return training


def same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-6) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], atol=tolerance, rtol=0) for name in one)


# ---- learning -----------------------------------------------------------------------------------


def test_what_can_be_learned_is_learned(begin: Begin):
    training = begin()
    rows: list[dict[str, Any]] = []
    progress = training.run(log=SimpleNamespace(write=rows.append, num_bytes=0))
    # Whole batches of 21 rows: five of 4 in each of three epochs.
    assert (progress.step, progress.epoch, progress.step_in_epoch) == (15, 3, 0)
    assert progress.rows == 15 * 4
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(losses) == 15
    assert losses[-1] < 0.3 * losses[0]
    assert progress.best["ndcg@10"] > 0.9 > 0.6 > progress.start["ndcg@10"]
    # Before the first step, every four, and at the end.
    assert [row["step"] for row in progress.validations] == [0, 4, 8, 12, 15]
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [0, 4, 8, 12, 15]
    assert training.objective.metrics == [row["ndcg@10"] for row in progress.validations]
    assert progress.start is progress.validations[0]
    assert progress.best == max(progress.validations, key=lambda row: row["ndcg@10"])
    # What was counted are the rows as they were encoded.
    encoded = [len(training.objective.prompts[row]) for _, row in training.objective.encoded]
    assert progress.tokens == sum(encoded)
    assert checkpoint.steps(training.folder) == [15]
    assert not any(module.training for module in training.adapter.backbone.model.modules())


def test_each_epoch_takes_every_row_once_in_another_order(begin: Begin):
    training = begin(count=20)
    training.run()
    orders = [[row for epoch, row in training.objective.encoded if epoch == e] for e in range(3)]
    assert [sorted(order) for order in orders] == [list(range(20))] * 3
    assert len({tuple(order) for order in orders}) == 3


def test_the_learning_rate_warms_up_and_falls_to_its_share(begin: Begin):
    rows: list[dict[str, Any]] = []
    settings = SftConfig(
        epochs=4, batch_size=4, learning_rate=0.01, lr_warmup_steps=4, final_lr_ratio=0.1,
        eval_every_steps=100, max_steps=14,
    )  # fmt: skip
    begin().run(settings, SimpleNamespace(write=rows.append, num_bytes=0))
    rates = [row["lr"] for row in rows if row["kind"] == "train"]
    assert rates[:5] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    # Half way down the cosine: in the middle of what is left.
    assert rates[9] == pytest.approx(0.01 * (0.1 + 0.9 / 2))
    assert len(rates) == 14
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0.001 < rates[-1] < 0.0018


def test_fewer_rows_than_a_batch_are_a_batch(begin: Begin):
    progress = begin(count=3).run()
    assert (progress.step, progress.rows) == (3, 9)


# ---- the gradient -------------------------------------------------------------------------------


def gradients(training: Training, budget: int) -> tuple[float, list[Tensor]]:
    settings = SftConfig(batch_size=21, micro_batch_tokens=budget)
    loop = tuning._Loop(
        training.adapter, training.objective, settings, training.folder, 3, Accelerator(cpu=True),
        None,
    )  # fmt: skip
    loss = loop.backward([Row(prompt) for prompt in training.objective.prompts], 21)
    grads = [parameter.grad for parameter in loop.parameters]
    return loss, [grad.clone() for grad in grads if grad is not None]


def test_the_size_of_micro_batches_does_not_change_the_gradient(begin: Begin):
    training = begin(lora=LoraSettings(rank=4, dropout=0.0))
    with torch.no_grad():
        for parameter in training.adapter.parameters.values():
            parameter.add_(0.05)
    passes: list[int] = []
    training.objective.before_loss = lambda rows: passes.append(len(rows))
    whole_loss, whole = gradients(training, 2048)
    assert passes == [21]
    passes.clear()
    loss, grads = gradients(training, 64)
    assert sum(passes) == 21
    assert len(passes) > 3
    assert loss == pytest.approx(whole_loss, abs=1e-5)
    # And both are the gradient of the mean loss, from a pass as anybody writes it, row by row.
    for parameter in training.adapter.parameters.values():
        parameter.grad = None
    model: Any = training.adapter.backbone.model
    rows = [model(torch.tensor([p])).logits[:, -1, LETTERS] for p in training.objective.prompts]
    mean = F.cross_entropy(torch.cat(rows), torch.full((21,), 2))
    mean.backward()
    assert loss == pytest.approx(float(mean.detach()), abs=1e-5)
    plain = [parameter.grad for parameter in training.adapter.parameters.values()]
    assert any(grad.abs().max() > 1e-2 for grad in whole)
    for one, other, expected in zip(grads, whole, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-4)


def test_the_gradient_is_clipped(begin: Begin):
    """With plain SGD in AdamW's place, what a step changes is the clipped gradient."""
    training = begin()
    settings = SftConfig(batch_size=4, max_steps=1, max_grad_norm=1e-3, lr_warmup_steps=0)
    loop = tuning._Loop(
        training.adapter, training.objective, settings, training.folder, 3, Accelerator(cpu=True),
        None,
    )  # fmt: skip
    report = loop.train_step()
    grads = [parameter.grad for parameter in loop.parameters]
    norm = torch.cat([grad.flatten() for grad in grads if grad is not None]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    assert report["grad_norm"] > 1e-2


# ---- memory -------------------------------------------------------------------------------------


def test_where_memory_runs_out_the_batch_is_tried_again_in_halves(
    begin: Begin, capsys: pytest.CaptureFixture[str]
):
    """The second pass fails, when gradients of the first are there already."""
    no_dropout = LoraSettings(rank=4, dropout=0.0)
    undisturbed = begin("one", lora=no_dropout)
    settings = SftConfig(**{**vars(SETTINGS), "micro_batch_tokens": 48, "max_steps": 3})
    expected = undisturbed.run(settings)
    training = begin("two", lora=no_dropout)
    calls = 0

    def run_out(rows: Sequence[Row]) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    training.objective.before_loss = run_out
    progress = training.run(settings)
    assert (expected.micro_batch_tokens, expected.backoffs) == (48, 0)
    assert (progress.micro_batch_tokens, progress.backoffs) == (24, 1)
    assert "sft.micro_batch_tokens goes to 24" in capsys.readouterr().out
    assert progress.step == 3
    assert same(training.adapter.state(), undisturbed.adapter.state(), 2e-5)


def test_one_row_that_does_not_fit_and_other_errors_are_not_tried_again(begin: Begin):
    training = begin()
    passes: list[int] = []

    def fail(rows: Sequence[Row]) -> None:
        passes.append(len(rows))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    training.objective.before_loss = fail
    with pytest.raises(torch.OutOfMemoryError):
        training.run()
    assert passes[-1] == 1
    assert 1 < len(passes) < 12

    def break_down(rows: Sequence[Row]) -> None:
        passes.append(len(rows))
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    passes.clear()
    training.objective.before_loss = break_down
    with pytest.raises(RuntimeError, match="mat1"):
        training.run()
    assert len(passes) == 1


# ---- a loss that is no number -------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_it_with_the_best_adapter_saved(begin: Begin):
    training = begin()
    settings = SftConfig(**{**vars(SETTINGS), "eval_every_steps": 2})
    objective = training.objective
    plain, steps = objective.loss_sum, 0

    def loss_sum(encoded: Sequence[Row]) -> Tensor:
        nonlocal steps
        steps += 1
        return plain(encoded) * (float("nan") if steps == 6 else 1.0)

    objective.loss_sum = loss_sum
    with pytest.raises(CotrainError, match=r"loss is nan at step 6; .* step 4, the best") as raised:
        training.run(settings)
    assert not isinstance(raised.value, Interrupted)
    assert "Lower sft.learning_rate (now 0.02)" in str(raised.value)
    saved = load_backbone(
        training.adapter.backbone.name, "fp32", torch.device("cpu"),
        adapter=str(training.folder / "adapter"),
    )  # fmt: skip
    assert OneLetter(saved).validate(None)["ndcg@10"] == pytest.approx(objective.metrics[2])


# ---- stopping and going on ----------------------------------------------------------------------


def stop_at(training: Training, step: int, rows_a_step: int = 4) -> None:
    """SIGTERM while the rows of this step are being read."""
    encode = training.objective.encode

    def signalled(row: int, epoch: int) -> Row:
        if len(training.objective.encoded) == (step - 1) * rows_a_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(row, epoch)

    training.objective.encode = signalled


@pytest.mark.parametrize("stops", [[1], [6], [8], [3, 4, 9]], ids=str)
def test_interrupted_and_gone_on_with_it_is_the_undisturbed_training(
    begin: Begin, stops: list[int]
):
    whole = begin("whole")
    expected = whole.run()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    done, read = 0, []
    for step in stops:
        training = begin("parts")
        stop_at(training, step - done)
        with pytest.raises(Interrupted, match=rf"step {step} of 15, .* The same command goes on"):
            training.run()
        assert checkpoint.steps(training.folder) == [step]
        done, read = step, read + training.objective.encoded
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    training = begin("parts")
    torch.rand(5)  # whatever was drawn before: the checkpoint has its own state
    progress = training.run()
    assert read + training.objective.encoded == whole.objective.encoded
    assert same(training.adapter.state(), whole.adapter.state())
    kept, other = (checkpoint.load_latest(one.folder)[0] for one in (training, whole))
    assert same(kept["adapter"], other["adapter"])
    for name in ("step", "epoch", "best", "start", "validations", "rows", "tokens", "since_best"):
        found, wanted = getattr(progress, name), getattr(expected, name)
        assert json.dumps(found) == json.dumps(wanted), name


def test_a_finished_training_that_is_called_again_returns_its_best(begin: Begin):
    first = begin()
    expected = first.run()
    again = begin()
    progress = again.run()
    assert progress.best == expected.best
    assert progress.step == 15
    assert again.objective.encoded == again.objective.metrics == []
    assert same(again.adapter.state(), first.adapter.state(), 0)


def test_a_request_in_the_last_step_is_too_late(begin: Begin):
    training = begin()
    stop_at(training, 15)
    assert training.run().step == 15


# ---- the best step ------------------------------------------------------------------------------


def with_metrics(training: Training, values: Sequence[float]) -> list[dict[str, Tensor]]:
    """Validation says these; returns the weights at each."""
    states: list[dict[str, Tensor]] = []
    said = iter(values)

    def validate(progress: str | None) -> dict[str, float]:
        states.append(training.adapter.state())
        return {"nll": next(said)}

    training.objective.validate = validate
    return states


@pytest.mark.parametrize(("best_by", "step"), [("nll", 2), ("ndcg@10", 1)])
def test_the_best_step_is_that_of_the_measure_asked_for(begin: Begin, best_by: Any, step: int):
    training = begin()
    said = iter([(3.0, 0.2), (2.0, 0.4), (1.0, 0.3)])
    training.objective.validate = lambda progress: dict(
        zip(("nll", "ndcg@10"), next(said), strict=True)
    )
    changes: dict[str, Any] = {"best_by": best_by, "eval_every_steps": 1, "max_steps": 2}
    progress = training.run(SftConfig(**{**vars(SETTINGS), **changes}))
    assert progress.best["step"] == step


def test_patience_ends_it_and_the_best_weights_come_back(begin: Begin):
    training = begin()
    settings = SftConfig(**{**vars(SETTINGS), "eval_every_steps": 2, "patience": 2})
    # A tie is not better.
    states = with_metrics(training, [0.9, 0.7, 0.8, 0.5, 0.5, 0.6, 0.1])
    progress = training.run(settings)
    assert progress.step == 10
    assert [row["nll"] for row in progress.validations] == [0.9, 0.7, 0.8, 0.5, 0.5, 0.6]
    assert progress.best == {"step": 6.0, "nll": 0.5}
    assert progress.since_best == 2
    assert same(training.adapter.state(), states[3], 0)
    assert not same(states[-1], states[3])
    assert "step 6" in training.adapter.backbone.adapter_version


def test_a_training_that_only_harms_ends_where_it_started(begin: Begin):
    training = begin()
    settings = SftConfig(**{**vars(SETTINGS), "eval_every_steps": 2, "patience": 3})
    states = with_metrics(training, [0.5, 0.6, 0.7, 0.8])
    progress = training.run(settings)
    assert progress.best == progress.start
    assert progress.step == 6
    assert same(training.adapter.state(), states[0], 0)


# ---- checkpointing ------------------------------------------------------------------------------


def test_computing_activations_again_trains_the_same(begin: Begin):
    ends = []
    for setting in ("off", "on"):
        training = begin(setting)
        settings = {**vars(SETTINGS), "max_steps": 3, "gradient_checkpointing": setting}
        training.run(SftConfig(**settings))
        ends.append(training.adapter.state())
    assert same(*ends)
