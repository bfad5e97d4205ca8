"""bf16 products on a CPU: next to the same states, with or without matrix units for them."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from cotrain.benchmarks.parity import FAMILIES, gap, random_prompts, state_of, tiny_backbone
from cotrain.benchmarks.parity import generated as plain_generated
from cotrain.config import TeacherConfig
from cotrain.teacher import cpu
from cotrain.teacher.backbone import Backbone, load_backbone
from cotrain.teacher.passes import Passes, Steps
from cotrain.teacher.writing import write

CPU = torch.device("cpu")
PREFIX = random_prompts([9], seed=1)[0]
PROMPTS = random_prompts([3, 17, 9], PREFIX)


def narrowed(backbone: Backbone) -> Backbone:
    """The same with products in bf16."""
    other = copy.deepcopy(backbone)
    cpu.compute_in_bf16(other.model)
    other.compute = "bf16"
    return other


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_multiplies_in_bf16_between_fp32(bias: bool):
    plain = nn.Linear(24, 40, bias)
    layer = cpu.Bf16Linear(plain.weight, plain.bias)
    assert (layer.in_features, layer.out_features) == (24, 40)
    assert layer.weight.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    values = torch.randn(2, 5, 24)
    output = layer(values)
    assert output.dtype == torch.float32
    exact = values.bfloat16().double() @ layer.weight.double().T
    exact = exact if plain.bias is None else exact + plain.bias.double()
    # Once rounded to bf16, and the bias added after that.
    assert (output - exact).norm() / exact.norm() < 0.004


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_states_but_for_the_rounding(family: str):
    backbone = tiny_backbone(family)
    ours = narrowed(backbone)
    plain = torch.cat([state_of(plain_generated(backbone, prompt, 1), 0) for prompt in PROMPTS])
    assert gap(Passes(ours, PREFIX).last_states(PROMPTS), plain) < 0.05
    # Batched, behind a prefix and continued it is itself again.
    alone = torch.cat([Passes(ours).last_states([prompt]) for prompt in PROMPTS])
    steps = Steps(Passes(ours, PREFIX), PROMPTS, 4)
    assert gap(steps.state, alone) < 0.03
    after = steps.advance(torch.tensor([[5, 6]] * 3))
    continued = [[*prompt, 5, 6] for prompt in PROMPTS]
    whole = torch.cat([Passes(ours).last_states([prompt]) for prompt in continued])
    assert gap(after, whole) < 0.05


def test_only_products_are_narrowed(tiny_teacher: str):
    backbone = load_backbone(tiny_teacher, "nf4", CPU, "bf16")
    assert backbone.compute == "bf16"
    head = backbone.model.get_output_embeddings()
    for name, module in backbone.model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            assert type(module) is cpu.Bf16Linear, name
    others = [
        parameter.dtype
        for name, parameter in backbone.model.named_parameters()
        if "proj" not in name
    ]
    assert set(others) == {torch.float32}
    assert Passes(backbone).last_states([[1, 2, 3]]).dtype == torch.float32
    assert backbone.logits(torch.zeros(1, 32)).dtype == torch.float32


def test_nf4_weights_are_unpacked_to_their_values(tiny_teacher: str):
    packed = load_backbone(tiny_teacher, "nf4", CPU, "fp32")
    unpacked = load_backbone(tiny_teacher, "nf4", CPU, "bf16")
    name = "model.layers.1.mlp.down_proj"
    one, other = (each.model.get_submodule(name) for each in (packed, unpacked))
    columns = torch.eye(64)
    torch.testing.assert_close(one(columns).bfloat16().float(), other(columns))
    assert gap(Passes(unpacked).last_states(PROMPTS), Passes(packed).last_states(PROMPTS)) < 0.05


def test_nf4_that_computes_in_fp32_is_packed_and_does(tiny_teacher: str):
    backbone = load_backbone(tiny_teacher, "nf4", CPU, "fp32")
    layer: Any = backbone.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.numel() * 2 == layer.in_features * layer.out_features
    Passes(backbone).last_states([[1, 2, 3]])
    # Regression: bitsandbytes repacks for a bf16 kernel at the first product where it can.
    assert layer.weight.quant_state.dtype == torch.float32


@pytest.mark.parametrize(("units", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_narrows_nf4_only_where_the_cpu_is_made_for_it(
    tiny_teacher: str, monkeypatch: pytest.MonkeyPatch, units: bool, expected: str
):
    monkeypatch.setattr(cpu, "has_bf16_units", lambda: units)
    for quantization, compute in (
        ("nf4", expected), ("int8", "fp32"), ("fp32", "fp32"), ("bf16", "bf16"),
    ):  # fmt: skip
        backbone = load_backbone(tiny_teacher, quantization, CPU, TeacherConfig().compute)
        assert backbone.compute == compute


def test_a_cpu_says_whether_it_has_units(monkeypatch: pytest.MonkeyPatch):
    assert cpu.has_bf16_units() in (True, False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert cpu.has_bf16_units() is False


def test_text_is_written_in_bf16_too(tiny_teacher: str):
    backbone = load_backbone(tiny_teacher, "bf16", CPU)
    answers, _ = write(Passes(backbone, PREFIX), PROMPTS, 6)
    assert [len(answer.tokens) for answer in answers] == [6, 6, 6]
