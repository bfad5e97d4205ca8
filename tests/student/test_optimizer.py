"""Lazy AdamW is AdamW where a row is looked up, and nothing at all where it is not."""

import copy
from collections.abc import Iterable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from cotrain.student.optimizer import LazyAdamW, clip_grad_norm

ROWS, SIZE = 12, 3


class Model(nn.Module):
    """An embedding, and a linear layer that always has dense gradients."""

    def __init__(self, sparse: bool, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(ROWS, SIZE, sparse=sparse, dtype=dtype)
        self.head: nn.Module = nn.Linear(SIZE, 2, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def train(
    model: Model, optimizer: torch.optim.Optimizer, batches: Iterable[Tensor], rate: float
) -> None:
    for step, ids in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate / (1 + step)
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()


def every_row(steps: int) -> list[Tensor]:
    """Every row in every batch, some of them twice."""
    generator = torch.Generator().manual_seed(1)
    again = torch.randint(ROWS, (steps, 5), generator=generator)
    return [torch.cat([torch.arange(ROWS), more]) for more in again]


def some_rows(steps: int, highest: int = ROWS - 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return list(torch.randint(highest, (steps, 4), generator=generator))


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_adamw_where_every_row_is_looked_up(decay):
    results = []
    for sparse, kind in ((False, torch.optim.AdamW), (True, LazyAdamW)):
        model = Model(sparse)
        optimizer = kind(model.parameters(), betas=(0.8, 0.95), weight_decay=decay)
        train(model, optimizer, every_row(8), rate=0.05)
        results.append(weights(model))
    for plain, lazy in zip(*results, strict=True):
        torch.testing.assert_close(lazy, plain, rtol=1e-12, atol=1e-14)


def test_dense_gradients_are_adamws_to_the_bit():
    results = []
    for kind in (torch.optim.AdamW, LazyAdamW):
        model = Model(sparse=False, dtype=torch.float32)
        train(model, kind(model.parameters(), weight_decay=0.1), some_rows(5), rate=0.05)
        results.append(weights(model))
    assert all(plain.equal(lazy) for plain, lazy in zip(*results, strict=True))


def test_where_few_rows_are_looked_up_it_is_torchs_sparse_adam():
    """Another implementation of the same; it has no weight decay, and ε in another place."""
    results = []
    for kind in (torch.optim.SparseAdam, partial(LazyAdamW, weight_decay=0.0)):
        model = Model(sparse=True)
        model.head = nn.Identity()
        optimizer = kind(list(model.parameters()), betas=(0.9, 0.98), eps=1e-30)
        train(model, optimizer, some_rows(10), rate=0.05)
        results.append(weights(model.table)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


def test_rows_that_are_not_looked_up_stay_as_they_are_to_the_bit():
    model = Model(sparse=True, dtype=torch.float32)
    table = model.table.weight
    optimizer = LazyAdamW(model.parameters(), weight_decay=0.1)
    train(model, optimizer, every_row(3), rate=0.05)  # every row has moments now
    before = [table.detach().clone()]
    before += [optimizer.state[table][name].clone() for name in ("exp_avg", "exp_avg_sq")]
    touched = torch.tensor([2, 7])
    train(model, optimizer, [touched, touched[:1]], rate=0.05)
    after = [table, *(optimizer.state[table][name] for name in ("exp_avg", "exp_avg_sq"))]
    rest = [row for row in range(ROWS) if row not in touched]
    for old, new in zip(before, after, strict=True):
        assert new[rest].equal(old[rest])
        assert (new[touched] != old[touched]).all()


def test_a_row_looked_up_for_nothing_stays_as_it_is_to_the_bit():
    """Regression: with a gradient of zero it took a step by its old momentum."""
    model = Model(sparse=True, dtype=torch.float32)
    optimizer = LazyAdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    train(model, optimizer, every_row(3), rate=0.05)
    before = weights(model.table)[0]
    optimizer.zero_grad()
    (model.table(torch.tensor([3, 8, 8])) * torch.tensor([[1.0], [0.0], [0.0]])).sum().backward()
    optimizer.step()
    moved = (model.table.weight != before).any(1)
    assert moved.nonzero().flatten().tolist() == [3]


def test_a_row_looked_up_twice_in_a_step_moves_by_the_sum():
    results = []
    for ids in ([4, 4, 1], [1, 4]):
        table = nn.Embedding(ROWS, SIZE, sparse=True, dtype=torch.float64)
        nn.init.ones_(table.weight)
        optimizer = LazyAdamW(table.parameters(), lr=0.1, betas=(0.9, 0.9))
        scale = torch.tensor([1.0 if len(ids) == 3 or item == 1 else 2.0 for item in ids])
        (table(torch.tensor(ids)) * scale[:, None]).sum().backward()
        optimizer.step()
        results.append((weights(table)[0], optimizer.state[table.weight]["exp_avg"]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_are_still_there_after_a_step():
    model = Model(sparse=True)
    train(model, LazyAdamW(model.parameters()), some_rows(1), rate=0.1)
    assert all(gradient(parameter).to_dense().any() for parameter in model.parameters())
    assert gradient(model.table.weight).is_sparse


def test_a_state_dict_goes_on_where_it_was_written():
    batches = some_rows(9)
    model = Model(sparse=True, dtype=torch.float32)
    optimizer = LazyAdamW(model.parameters(), weight_decay=0.1)
    train(model, optimizer, batches[:5], rate=0.05)
    again = copy.deepcopy(model)
    other = LazyAdamW(again.parameters(), weight_decay=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, batches[5:], rate=0.02)
    train(again, other, batches[5:], rate=0.02)
    assert all(one.equal(two) for one, two in zip(weights(model), weights(again), strict=True))
    assert {key: value for key, value in optimizer.state_dict().items() if key != "state"} == {
        key: value for key, value in other.state_dict().items() if key != "state"
    }


# ---- clipping -----------------------------------------------------------------------------------


def with_gradients(sparse: bool) -> Model:
    model = Model(sparse)
    model(torch.tensor([1, 1, 5, 7])).square().sum().backward()
    return model


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_gradients_are_clipped_as_torch_does(sparse, max_norm):
    plain, ours = with_gradients(False), with_gradients(sparse)
    expected = nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
    found = clip_grad_norm(ours.parameters(), max_norm)
    torch.testing.assert_close(found, expected)
    for one, two in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(gradient(two).to_dense(), gradient(one), rtol=1e-12, atol=1e-14)
    norm = torch.cat([gradient(one).to_dense().flatten() for one in ours.parameters()]).norm()
    assert norm == pytest.approx(min(max_norm, expected.item()), rel=1e-4)


def test_parameters_without_a_gradient_are_passed_over():
    model, unused = with_gradients(sparse=True), nn.Linear(2, 2)
    parameters = [model.table.weight, *unused.parameters()]
    expected = gradient(model.table.weight).to_dense().norm()
    assert clip_grad_norm(parameters, 0.5).item() == pytest.approx(expected.item())
    assert unused.weight.grad is None
