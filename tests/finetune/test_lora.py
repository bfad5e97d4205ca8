"""An adapter that is trained: it begins as nothing, is all that changes, and survives the disk."""

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cotrain.benchmarks.parity import gap
from cotrain.errors import CheckpointError, ConfigError, TeacherError
from cotrain.finetune import lora
from cotrain.finetune.lora import TrainableAdapter
from cotrain.finetune.tuning import set_checkpointing
from cotrain.finetune_settings import LoraSettings
from cotrain.teacher import backbone as backbones
from cotrain.teacher.backbone import Backbone, load_backbone

CPU = torch.device("cpu")
LORA = LoraSettings(rank=4, alpha=8.0, dropout=0.0)
PROMPTS = torch.randint(2, 1000, (3, 12), generator=torch.Generator().manual_seed(0))
QUANTIZATIONS = [("fp32", "fp32"), ("nf4", "fp32"), ("nf4", "bf16")]
# Products in bf16 are not rounded alike at every place in memory.
CLOSE = {"fp32": 1e-6, "bf16": 0.05}


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer() -> Iterator[None]:
    """It takes longer to read than the tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "load_tokenizer", functools.cache(backbones.load_tokenizer))
        yield


@pytest.fixture
def backbone(tiny_teacher: str) -> Backbone:
    return load_backbone(tiny_teacher, "fp32", CPU)


def logits(backbone: Backbone) -> Tensor:
    """(3, V) after the last token, by the model as it is."""
    model: Any = backbone.model
    with torch.no_grad():
        return model(PROMPTS).logits[:, -1].float()


def loss(backbone: Backbone) -> Tensor:
    model: Any = backbone.model
    return model(PROMPTS, labels=PROMPTS).loss


def train(adapter: TrainableAdapter, steps: int = 3) -> None:
    """A few steps that matter."""
    optimizer = torch.optim.Adam(list(adapter.parameters.values()), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(adapter.backbone).backward()
        optimizer.step()
    adapter.changed("step")


def base_weights(backbone: Backbone) -> dict[str, Tensor]:
    return {
        name: value.clone()
        for name, value in backbone.model.state_dict().items()
        if "lora_" not in name
    }


# ---- what it changes ----------------------------------------------------------------------------


@pytest.mark.parametrize(("quantization", "compute"), QUANTIZATIONS)
def test_only_the_adapter_learns_and_a_new_one_changes_nothing(
    tiny_teacher: str, quantization: str, compute: Any
):
    backbone = load_backbone(tiny_teacher, quantization, CPU, compute)
    before = logits(backbone)
    adapter = TrainableAdapter(backbone, LORA, seed=0)
    assert backbone.adapter == lora.NAME
    close = CLOSE[compute]
    assert gap(logits(backbone), before) <= close
    needing = {name for name, p in backbone.model.named_parameters() if p.requires_grad}
    assert needing == set(adapter.parameters)
    assert len(needing) == 2 * 7 * 2  # A and B of seven layers in two blocks
    weights = base_weights(backbone)

    loss(backbone).backward()
    for name, parameter in backbone.model.named_parameters():
        assert (parameter.grad is not None) == (name in needing)
        if "lora_B" in name:  # what A gets goes through B, which is zero
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0
    first = float(loss(backbone).detach())
    train(adapter)
    assert float(loss(backbone).detach()) < first
    assert gap(logits(backbone), before) > 0.1
    after = base_weights(backbone)
    assert weights.keys() == after.keys()
    assert all(weights[name].equal(after[name]) for name in weights)
    backbone.use_adapter(None)
    assert gap(logits(backbone), before) <= close


def test_gradients_are_those_of_the_merged_weights(backbone: Backbone):
    """A plain copy of the model whose weight is W + (alpha / rank) B A, by autograd."""
    adapter = TrainableAdapter(backbone, LORA, seed=0)
    train(adapter)
    for parameter in adapter.parameters.values():
        parameter.grad = None
    loss(backbone).backward()
    plain = load_backbone(backbone.name, "fp32", CPU)
    layer = next(name for name in adapter.parameters if "down_proj.lora_A" in name)
    factors = {}
    for name, value in adapter.parameters.items():
        if "lora_A" in name:
            other = adapter.parameters[name.replace("lora_A", "lora_B")]
            pair = [tensor.detach().clone().requires_grad_() for tensor in (value, other)]
            factors[name.split(".lora_A")[0]] = pair
    weights: dict[str, Tensor] = dict(plain.model.named_parameters())
    for module, (down, up) in factors.items():
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + 8.0 / 4 * up @ down
    output: Any = torch.func.functional_call(
        plain.model, weights, args=(PROMPTS,), kwargs={"labels": PROMPTS}
    )
    output.loss.backward()
    for module, (down, up) in factors.items():
        for kind, expected in (("lora_A", down), ("lora_B", up)):
            ours = adapter.parameters[f"{module}.{kind}.{lora.NAME}.weight"].grad
            torch.testing.assert_close(ours, expected.grad, rtol=1e-3, atol=1e-6)
    assert layer.split(".lora_A")[0] in factors


def test_a_seed_gives_the_same_adapter_and_leaves_random_numbers_alone(tiny_teacher: str):
    def made(seed: int) -> dict[str, Tensor]:
        return TrainableAdapter(load_backbone(tiny_teacher, "fp32", CPU), LORA, seed).state()

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = made(1)
    assert torch.rand(3).equal(expected)
    again, other = made(1), made(2)
    assert all(one[name].equal(again[name]) for name in one)
    assert any(not one[name].equal(other[name]) for name in one)


# ---- which layers -------------------------------------------------------------------------------


def adapted(adapter: TrainableAdapter) -> set[str]:
    """`block.layer` of each that has one."""
    parts = [name.split(".") for name in adapter.parameters]
    return {f"{part[part.index('layers') + 1]}.{part[-4]}" for part in parts}


def names(blocks: Sequence[int], layers: str) -> set[str]:
    return {f"{block}.{layer}" for block in blocks for layer in layers.split()}


ATTENTION, MLP = "q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, names([0, 1], f"{ATTENTION} {MLP}")),
        ({"modules": "attention"}, names([0, 1], ATTENTION)),
        ({"modules": "mlp"}, names([0, 1], MLP)),
        ({"last_layers": 1}, names([1], f"{ATTENTION} {MLP}")),
        ({"modules": "mlp", "last_layers": 1}, names([1], MLP)),
        ({"last_layers": 2}, names([0, 1], f"{ATTENTION} {MLP}")),
    ],
)
def test_layers_are_those_that_are_asked_for(
    backbone: Backbone, changes: Any, expected: set[str], tmp_path: Path
):
    adapter = TrainableAdapter(backbone, LoraSettings(rank=3, **changes), seed=0)
    assert adapted(adapter) == expected
    for name, parameter in adapter.parameters.items():
        assert 3 in parameter.shape, name
    train(adapter)
    ours = logits(backbone)
    adapter.save(tmp_path / "adapter")
    read = load_backbone(backbone.name, "fp32", CPU, adapter=str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(read), ours)


def test_below_the_last_layers_nothing_is_computed_backward(backbone: Backbone):
    TrainableAdapter(backbone, LoraSettings(last_layers=1), seed=0)
    seen: list[bool] = []
    layers: Any = backbone.decoder.layers
    layers[0].register_forward_hook(lambda *of: seen.append(of[2].requires_grad))
    loss(backbone).backward()
    assert seen == [False]


def test_more_layers_than_there_are_or_none_of_a_kind_are_refused(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ConfigError, match=r"last_layers is 3, but .* has 2 layers"):
        TrainableAdapter(backbone, LoraSettings(last_layers=3), seed=0)
    monkeypatch.setattr(lora, "_kind", lambda name, wanted: False)
    with pytest.raises(TeacherError, match="no linear layers of kind mlp"):
        TrainableAdapter(backbone, LoraSettings(modules="mlp"), seed=0)
    assert backbone.adapter is None


# ---- to disk and back ---------------------------------------------------------------------------


@pytest.mark.parametrize(("quantization", "compute"), QUANTIZATIONS)
def test_a_saved_adapter_is_read_as_it_was(
    tiny_teacher: str, quantization: str, compute: Any, tmp_path: Path
):
    backbone = load_backbone(tiny_teacher, quantization, CPU, compute)
    adapter = TrainableAdapter(backbone, LoraSettings(rank=4, dropout=0.3), seed=0)
    train(adapter)
    adapter.save(tmp_path / "deep" / "adapter")
    expected = logits(backbone)

    read = load_backbone(tiny_teacher, quantization, CPU, compute)
    base = logits(read)
    read.load_adapter(str(tmp_path / "deep" / "adapter"))
    close = CLOSE[compute]
    assert gap(logits(read), expected) <= close
    assert gap(base, expected) > 0.1
    assert not any(parameter.requires_grad for parameter in read.model.parameters())
    # Or it is trained further.
    further = load_backbone(tiny_teacher, quantization, CPU, compute)
    start = TrainableAdapter(further, LORA, seed=9, start=str(tmp_path / "deep" / "adapter"))
    assert gap(logits(further), expected) <= close
    for name, value in start.state().items():
        # Where products are in bf16, an adapter is read in bf16 as well.
        wanted = adapter.state()[name]
        assert value.dtype == torch.float32
        assert value.equal(wanted.bfloat16().float() if compute == "bf16" else wanted)
    train(start)
    assert gap(logits(further), expected) > 0.1
    needing = {name for name, p in further.model.named_parameters() if p.requires_grad}
    assert needing == set(start.parameters) == set(adapter.parameters)


def test_a_folder_is_replaced_whole_and_the_adapter_stays_trainable(
    backbone: Backbone, tmp_path: Path
):
    adapter = TrainableAdapter(backbone, LORA, seed=0)
    folder = tmp_path / "adapter"
    adapter.save(folder)
    (folder / "old").touch()
    train(adapter)
    adapter.save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert not (folder / "old").exists()
    read = load_backbone(backbone.name, "fp32", CPU, adapter=str(folder))
    assert logits(read).equal(logits(backbone))
    assert all(parameter.requires_grad for parameter in adapter.parameters.values())
    before = logits(backbone)
    train(adapter)
    assert not logits(backbone).equal(before)


def test_a_full_disk_leaves_what_was_there(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adapter = TrainableAdapter(backbone, LORA, seed=0)
    adapter.save(tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    train(adapter)

    def full(folder: Path, **_: Any) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backbone.model, "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"No space left .* run the same command again"):
        adapter.save(tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before


def test_another_adapter_beside_it_is_not_saved_in_its_place(backbone: Backbone, tmp_path: Path):
    adapter = TrainableAdapter(backbone, LORA, seed=0)
    train(adapter)
    adapter.save(tmp_path / "one")
    expected = logits(backbone)
    backbone.load_adapter(str(tmp_path / "one"), "other")
    backbone.use_adapter(lora.NAME)
    for parameter in adapter.parameters.values():
        parameter.requires_grad_(True)
    train(adapter)
    adapter.save(tmp_path / "two")
    read = load_backbone(backbone.name, "fp32", CPU, adapter=str(tmp_path / "two"))
    assert logits(read).equal(logits(backbone))
    assert not logits(read).equal(expected)


def test_a_start_that_does_not_fit_is_refused(backbone: Backbone, tmp_path: Path):
    with pytest.raises(TeacherError, match="cannot be put onto"):
        TrainableAdapter(backbone, LORA, seed=0, start=str(tmp_path))


# ---- states -------------------------------------------------------------------------------------


def test_a_state_is_a_copy_that_can_be_put_back(backbone: Backbone):
    adapter = TrainableAdapter(backbone, LORA, seed=0)
    train(adapter)
    kept, expected = adapter.state(), logits(backbone)
    version = backbone.adapter_version
    train(adapter)
    adapter.changed("later")
    assert backbone.adapter_version != version
    assert not logits(backbone).equal(expected)
    adapter.load_state(kept, "earlier")
    assert logits(backbone).equal(expected)
    assert "earlier" in backbone.adapter_version
    train(adapter)
    assert not all(adapter.state()[name].equal(kept[name]) for name in kept)


def test_a_reset_adapter_has_learned_nothing(backbone: Backbone):
    base = logits(backbone)
    adapter = TrainableAdapter(backbone, LORA, seed=0)
    train(adapter)
    random = torch.get_rng_state()
    adapter.reset(seed=4)
    assert torch.get_rng_state().equal(random)
    assert logits(backbone).equal(base)
    assert "start" in backbone.adapter_version
    state = adapter.state()
    assert all(value.abs().sum() > 0 for name, value in state.items() if "lora_A" in name)
    train(adapter)
    assert not logits(backbone).equal(base)
    adapter.reset(seed=4)
    assert all(value.equal(state[name]) for name, value in adapter.state().items())
    adapter.reset(seed=5)
    assert not all(value.equal(state[name]) for name, value in adapter.state().items())


# ---- training mode ------------------------------------------------------------------------------


def test_dropout_is_the_adapters_alone_and_only_in_training(backbone: Backbone):
    """The first layer after it sees a share of zeros, the model's own dropout stays off."""
    adapter = TrainableAdapter(backbone, LoraSettings(rank=4, dropout=0.5), seed=0)
    train(adapter)
    backbone.model.eval()
    quiet = logits(backbone)
    adapter.train()
    torch.manual_seed(0)
    assert not logits(backbone).equal(quiet)
    active = {name for name, m in backbone.model.named_modules() if m.training}
    dropouts = {
        name for name, m in backbone.model.named_modules()
        if isinstance(m, nn.Dropout) and name.endswith(f".{lora.NAME}")
    }  # fmt: skip
    assert dropouts
    assert {name for name in active if "layers" in name and "lora" in name} == dropouts
    adapter.train(False)
    assert logits(backbone).equal(quiet)
    assert not any(module.training for module in backbone.model.modules())


@pytest.mark.parametrize(
    ("quantization", "compute", "last_layers"),
    [*((*kind, None) for kind in QUANTIZATIONS), ("fp32", "fp32", 1)],
)
def test_gradients_are_the_same_where_activations_are_computed_again(
    tiny_teacher: str, quantization: str, compute: Any, last_layers: int | None
):
    found, runs = [], []
    for setting in ("off", "on"):
        backbone = load_backbone(tiny_teacher, quantization, CPU, compute)
        settings = LoraSettings(rank=4, dropout=0.3, last_layers=last_layers)
        adapter = TrainableAdapter(backbone, settings, seed=0)
        with torch.no_grad():
            for number, parameter in enumerate(adapter.parameters.values()):
                torch.manual_seed(number)
                parameter.normal_(std=0.1)
        set_checkpointing(backbone, setting)
        layers: Any = backbone.decoder.layers
        calls: list[int] = []
        layers[-1].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        adapter.train()
        torch.manual_seed(1)
        loss(backbone).backward()
        runs.append(len(calls))
        found.append([parameter.grad for parameter in adapter.parameters.values()])
        adapter.train(False)
        calls.clear()
        logits(backbone)
        assert len(calls) == 1
    assert runs == [1, 2]
    for plain, again in zip(*found, strict=True):
        assert plain is not None
        assert plain.abs().sum() > 0
        assert float((again - plain).norm() / plain.norm()) <= CLOSE[compute]


def test_a_new_adapters_scale_is_alpha_over_rank(backbone: Backbone):
    """The loss as B moves away from zero: twice the alpha, twice the slope."""
    slopes = []
    for alpha in (4.0, 8.0):
        backbone = load_backbone(backbone.name, "fp32", CPU)
        adapter = TrainableAdapter(backbone, LoraSettings(4, alpha, 0.0), seed=0)
        loss(backbone).backward()
        grads = [p.grad for name, p in adapter.parameters.items() if "lora_B" in name]
        slopes.append(math.sqrt(sum(float(g.square().sum()) for g in grads if g is not None)))
    assert slopes[1] == pytest.approx(2 * slopes[0], rel=1e-4)
