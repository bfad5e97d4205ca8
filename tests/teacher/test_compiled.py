"""Compiled layers: the same states, one program for all layers, lengths and batch sizes."""

from typing import Any

import pytest
import torch

from cotrain.benchmarks.parity import gap, random_prompts
from cotrain.teacher import compiled
from cotrain.teacher.backbone import load_backbone
from cotrain.teacher.compiled import compile_layers, compiling_pays, eager
from cotrain.teacher.passes import Passes
from cotrain.teacher.writing import write

CPU = torch.device("cpu")
PREFIX = random_prompts([9], seed=1)[0]


def test_it_is_offered_only_where_it_was_measured_to_pay(
    tiny_teacher: str, monkeypatch: pytest.MonkeyPatch
):
    narrow = load_backbone(tiny_teacher, "bf16", CPU)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: "/usr/bin/g++")
    assert compiling_pays(narrow)
    assert not compiling_pays(load_backbone(tiny_teacher, "fp32", CPU))
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert not compiling_pays(narrow)


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_compiled_layers_say_the_same_and_are_compiled_once(tiny_teacher: str, compute: Any):
    if compiled.shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain, ours = (load_backbone(tiny_teacher, "nf4", CPU, compute) for _ in range(2))
    compile_layers(ours)
    assert ours.compiled
    tolerance = 1e-5 if compute == "fp32" else 0.05
    for prefix in ([], PREFIX):
        passes, eagerly = Passes(ours, prefix), Passes(plain, prefix)
        for lengths in ([3, 17, 9], [40], [5, 5], [31, 2, 8, 64], [7]):
            prompts = random_prompts(lengths, PREFIX)
            states = passes.last_states(prompts)
            assert gap(states, eagerly.last_states(prompts)) < tolerance
    # One program with a mask and one without, perhaps one more for a single row or token: not one
    # for each layer, length or batch size.
    assert counters["stats"]["unique_graphs"] <= 6
    written = write(Passes(ours, PREFIX), prompts, 6)[0]
    assert counters["stats"]["unique_graphs"] <= 6
    if compute == "fp32":
        assert written == write(Passes(plain, PREFIX), prompts, 6)[0]


def test_eager_is_only_for_the_while():
    program = torch.compile(lambda values: values + 1, backend="eager")
    with eager():
        assert program(torch.ones(1)).item() == 2
    assert program(torch.ones(1)).item() == 2
