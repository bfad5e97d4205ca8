"""What a co-training step holds: traces of allocations."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensorMode

from cotrain import config as configuration
from cotrain.benchmarks import teacher_memory_worker as worker
from cotrain.benchmarks import teacher_tables as tables
from cotrain.benchmarks.allocations import Allocations
from cotrain.benchmarks.teacher_shape import VOCABULARY, RandomPrompts, config_7b


@pytest.mark.parametrize("fake", [False, True])
def test_storages_count_from_the_operation_that_makes_them_until_they_are_freed(fake: bool):
    outside = torch.ones(100)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad()
    with mode, Allocations() as traced:
        one = torch.empty(1000)
        view = one.view(10, 100)[2:]
        assert traced.live == 4000
        two = one + 1
        assert traced.live == traced.peak == 8000
        del one
        assert traced.live == 8000  # its view keeps it
        del view
        assert traced.live == 4000
        two.add_(1)
        two = two[:100] * outside
    assert (traced.live, traced.peak) == (400, 8000)


def test_what_autograd_keeps_counts():
    with Allocations() as traced:
        weight = torch.zeros(1000, requires_grad=True)
        loss = weight.exp().sum()
        assert traced.live == 8000 + 4
        loss.backward()
        del loss
        assert traced.live == 8000  # weight and gradient


def test_the_traced_teacher_holds_what_its_weights_take():
    shape = config_7b(num_layers=2)
    prompts = RandomPrompts(worker.ASKED_ROWS, 20, 0, VOCABULARY)
    found = worker.trace_teacher(shape, prompts, batch_tokens=8192)
    linear = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
    embeddings = 2 * 32_000 * 4096 * 2
    assert found["embeddings"] == embeddings
    packed = linear / 2 + linear / 64 + linear / 64 / 256 * 4
    # Beside them: norms, rotary frequencies and tables.
    assert embeddings + packed < found["weights"] < embeddings + packed + 1e5
    assert found["prefix"] == pytest.approx(2 * 2 * 2 * 100 * 8 * 128 * 2, rel=0.01)  # held twice
    # The widest place: three times 14,336 wide, and a weight unpacked.
    assert found["pass_tokens"] <= 8192
    assert 2 * found["pass_tokens"] * 14_336 * 2 < found["pass"] < 5 * found["pass_tokens"] * 28_672


def test_training_is_traced_with_twin_and_projector():
    config = configuration.parse(
        ["--student.hidden_size=16", "--student.max_length=20", "--teacher.num_candidates=5"]
    )
    verdicts: Any = worker.RandomVerdicts(64)
    with Allocations() as traced:
        parameters = worker.train(config, 64, verdicts, Accelerator(cpu=True))
    # Weights, gradients and two moments of everything, at least.
    assert traced.peak > 4 * 4 * parameters


@pytest.mark.gpu
def test_a_step_is_measured_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker, "config_7b", lambda: config_7b(num_layers=2))
    config = configuration.parse(["--student.hidden_size=16", "--student.max_length=20"])
    prompts = RandomPrompts(worker.ASKED_ROWS, 20, 0, VOCABULARY)
    traced = worker.trace_teacher(config_7b(num_layers=2), prompts, 8192)
    found = worker.measure(config, prompts, None)
    teacher = traced["weights"] + traced["prefix"] + traced["pass"]
    assert found["allocated"] == pytest.approx(teacher, rel=0.1)
    assert found["backoffs"] == 0


def test_the_table_adds_the_parts_up():
    found = {
        "asked_rows": 32,
        "batch_size": 64,
        "student": {"hidden_size": 128, "num_layers": 2, "max_length": 200},
        "teacher": {
            "embeddings": 500e6, "weights": 4100e6, "while_making": 4200e6, "prefix": 20e6,
            "pass": 700e6, "pass_tokens": 6400,
        },
        "training": {"peak": 180e6, "parameters": 1_000_000},
    }  # fmt: skip
    text = tables.memory_table(found)
    assert "3,600 MB" in text
    assert "5,000 MB" in text
    assert "4.66 GiB of 8 GiB" in text
    assert "Measured" not in text
    measured = {"device": "GPU", "allocated": 2**32, "reserved": 2**33, "backoffs": 0}
    assert "4.00 GiB allocated" in tables.memory_table(found | {"measured": measured})
