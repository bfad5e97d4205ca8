"""Random numbers repeat when they should, differ when they should, and survive a checkpoint."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cotrain.runtime import checkpoint
from cotrain.runtime.seeding import (
    all_states,
    replayed,
    seed_everything,
    set_all_states,
    set_torch_state,
    torch_state,
)

CPU = torch.device("cpu")


def draws() -> list[float]:
    """One number of each kind; the normal ones come in pairs, of which one is kept for later."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.random()),
        float(np.random.normal()),
        torch.rand(()).item(),
        F.dropout(torch.ones(64), 0.5).nonzero().double().mean().item(),
    ]


@pytest.fixture(autouse=True)
def unchanged_for_other_tests():
    state = all_states(CPU)
    yield
    set_all_states(state, CPU)


def test_same_seed_same_numbers():
    seed_everything(5)
    first = draws()
    seed_everything(5)
    assert draws() == first


def test_seeds_and_processes_differ_in_every_generator():
    drawn = []
    for seed, rank in [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (2**40 + 7, 0), (2**40 + 7, 3)]:
        seed_everything(seed, rank)
        drawn.append(draws())
    for kind in zip(*drawn, strict=True):
        assert len(set(kind)) == len(drawn)


def test_replayed_dropout_is_the_same_and_leaves_no_trace():
    seed_everything(0)
    state = torch_state(CPU)
    dropped = F.dropout(torch.ones(1000), 0.3)
    after = F.dropout(torch.ones(1000), 0.3)
    set_torch_state(state, CPU)
    assert torch.equal(F.dropout(torch.ones(1000), 0.3), dropped)
    with replayed(state, CPU):
        assert torch.equal(F.dropout(torch.ones(1000), 0.3), dropped)
        torch.rand(17)
    # As if nothing had been drawn inside.
    assert torch.equal(F.dropout(torch.ones(1000), 0.3), after)
    assert not torch.equal(dropped, after)


def test_replayed_leaves_no_trace_after_an_error_either():
    state = torch_state(CPU)
    torch.rand(3)
    outside = torch_state(CPU)["cpu"]
    with pytest.raises(ZeroDivisionError), replayed(state, CPU):
        _ = torch.rand(3).tolist()[0] / 0
    assert torch.equal(torch.get_rng_state(), outside)


def test_replayed_nests():
    seed_everything(1)
    state = torch_state(CPU)
    first = torch.rand(4)
    with replayed(state, CPU):
        with replayed(state, CPU):
            assert torch.equal(torch.rand(4), first)
        assert torch.equal(torch.rand(4), first)


@pytest.mark.parametrize("drawn", [0, 1, 1000])
def test_all_generators_come_back_from_a_checkpoint(tmp_path, drawn):
    """In the middle of a pair of normal numbers too, and after the buffers were refilled."""
    seed_everything(2)
    for _ in range(drawn):
        draws()
    checkpoint.save(tmp_path, 1, {}, {"random": all_states(CPU)}, keep=1)
    expected = [draws() for _ in range(3)]
    seed_everything(99)
    _, state = checkpoint.load_latest(tmp_path)
    set_all_states(state["random"], CPU)
    assert [draws() for _ in range(3)] == expected


def test_a_state_is_a_copy():
    seed_everything(3)
    state = all_states(CPU)
    expected = draws()
    draws()
    set_all_states(state, CPU)
    assert draws() == expected
    set_all_states(state, CPU)
    assert draws() == expected
