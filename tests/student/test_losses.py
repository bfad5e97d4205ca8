"""Losses against their definitions: values, gradients, what is sampled and how much is held."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cotrain.data.batches import collate
from cotrain.student.losses import (
    LossName,
    TrainingLoss,
    chunked_cross_entropy,
    full_cross_entropy,
    gbce_beta,
    make_loss,
    sampled_loss,
)
from cotrain.student.optimizer import LazyAdamW
from cotrain.student.sasrec import SASRec

CPU = torch.device("cpu")
LN2, LN3, LN5 = math.log(2), math.log(3), math.log(5)
SAMPLED: list[LossName] = ["sampled_softmax", "bce", "gbce"]


def embedding_of(weights: Tensor, sparse: bool = False) -> nn.Embedding:
    embedding = nn.Embedding(*weights.shape, padding_idx=0, sparse=sparse)
    embedding.weight = nn.Parameter(weights.clone())
    return embedding


def problem(
    num_positions: int, num_items: int, size: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """States, item vectors with a row of zeros for padding, and targets."""
    generator = torch.Generator().manual_seed(num_positions * 1000 + num_items)
    states = torch.randn(num_positions, size, generator=generator, dtype=dtype)
    vectors = torch.randn(num_items + 1, size, generator=generator, dtype=dtype)
    vectors[0] = 0
    targets = torch.randint(1, num_items + 1, (num_positions,), generator=generator)
    return states.requires_grad_(), vectors.requires_grad_(), targets


# ---- softmax over the catalogue -----------------------------------------------------------------


@pytest.mark.parametrize("loss", [full_cross_entropy, chunked_cross_entropy])
def test_cross_entropy_by_hand(loss):
    # Probabilities 1/6, 2/6, 3/6; padding, with the largest product of all, is no item.
    states = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    vectors = torch.tensor([[9.0, 9.0], [0.0, 1.0], [LN2, 2.0], [LN3, 3.0]])
    found = loss(states, vectors, torch.tensor([3, 1]))
    assert found.item() == pytest.approx(math.log(2) + math.log(6))
    # 0.7 of the mass at the target and 0.1 at each of the three.
    everywhere = 0.1 * (math.log(6) + math.log(3) + math.log(2))
    found = loss(states[:1], vectors, torch.tensor([3]), label_smoothing=0.3)
    assert found.item() == pytest.approx(0.7 * math.log(2) + everywhere)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
# Chunks of 16 rows, the fewest there are, of 20, and of more than all; with and without a rest.
@pytest.mark.parametrize("chunk_logits", [1, 20 * 31, 10**6, None])
@pytest.mark.parametrize("num_positions", [1, 16, 40, 57])
def test_chunked_cross_entropy_equals_the_full_one(
    num_positions, chunk_logits, smoothing, dtype, tolerance
):
    results = []
    for loss in (
        partial(full_cross_entropy, label_smoothing=smoothing),
        partial(chunked_cross_entropy, label_smoothing=smoothing, chunk_logits=chunk_logits),
    ):
        states, vectors, targets = problem(num_positions, 30, dtype=dtype)
        value = loss(states, vectors, targets)
        (0.7 * value).backward()
        results.append((value.detach(), states.grad, vectors.grad))
    for full, chunked in zip(*results, strict=True):
        assert chunked.dtype == dtype
        torch.testing.assert_close(chunked, full, rtol=tolerance, atol=10 * tolerance)
    assert not results[1][2][0].any()  # padding


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_survives_scores_that_exp_does_not(smoothing):
    states, vectors, targets = problem(20, 9, dtype=torch.float32)
    with torch.no_grad():
        states *= 1e3
    expected = full_cross_entropy(states, vectors, targets, smoothing)
    found = chunked_cross_entropy(states, vectors, targets, smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    found.backward()
    assert states.grad is not None
    assert states.grad.isfinite().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_gradcheck_of_cross_entropy(smoothing):
    states, vectors, targets = problem(20, 6, size=3)
    for loss in (full_cross_entropy, partial(chunked_cross_entropy, chunk_logits=1)):
        assert torch.autograd.gradcheck(
            lambda s, v, loss=loss: loss(s, v, targets, label_smoothing=smoothing),
            (states, vectors),
        )


# ---- sampled losses -----------------------------------------------------------------------------


def by_hand(kind: Any, negative_ids: list[int], target: int = 9, **options: Any) -> float:
    """One position whose target scores ln 3, against negatives that score ln 2 and ln 5."""
    return sampled_loss(
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[LN3, 7.0]]),
        torch.tensor([[LN2, -1.0], [LN5, 4.0]]),
        (torch.tensor([target]), torch.tensor(negative_ids)),
        kind,
        **options,
    ).item()


def test_sampled_softmax_by_hand():
    assert by_hand("softmax", [1, 2]) == pytest.approx(-math.log(3 / (3 + 2 + 5)))
    # Drawn with probabilities 1/4 and 1/2: masses 2 / (2 × 1/4) and 5 / (2 × 1/2).
    bias = -torch.tensor([2 / 4, 2 / 2]).log()
    found = by_hand("softmax", [1, 2], negative_bias=bias)
    assert found == pytest.approx(-math.log(3 / (3 + 4 + 5)))


def test_bce_and_gbce_by_hand():
    # σ(ln x) = x / (1 + x).
    positive, negatives = -math.log(3 / 4), -math.log(1 - 2 / 3) - math.log(1 - 5 / 6)
    assert by_hand("bce", [1, 2]) == pytest.approx(positive + negatives)
    found = by_hand("bce", [1, 2], positive_weight=0.25)
    # σ to the power of β, as the paper writes it.
    assert found == pytest.approx(-math.log((3 / 4) ** 0.25) + negatives)


def test_a_negative_that_is_the_target_takes_no_part():
    assert by_hand("softmax", [9, 2]) == pytest.approx(-math.log(3 / (3 + 5)))
    assert by_hand("softmax", [9, 9]) == pytest.approx(0)
    assert by_hand("bce", [1, 9]) == pytest.approx(-math.log(3 / 4) + math.log(3))
    assert by_hand("bce", [9, 9]) == pytest.approx(-math.log(3 / 4))


@pytest.mark.parametrize("kind", ["softmax", "bce"])
def test_a_collision_gives_no_gradient_but_only_where_it_is_one(kind):
    states, vectors, _ = problem(2, 4)
    targets, negatives = torch.tensor([3, 1]), torch.tensor([3, 3])

    def gradient(which: slice) -> Tensor:
        drawn = vectors[negatives].detach().requires_grad_()
        sampled_loss(
            states[which], vectors[targets[which]], drawn, (targets[which], negatives), kind
        ).backward()
        assert drawn.grad is not None
        return drawn.grad

    assert not gradient(slice(0, 1)).any()
    assert gradient(slice(1, 2)).all()
    assert gradient(slice(0, 2)).equal(gradient(slice(1, 2)))


def plain_sampled(
    states: Tensor, positives: Tensor, negatives: Tensor, ids: tuple[Tensor, Tensor], kind: str,
    bias: Tensor, beta: float,
) -> Tensor:  # fmt: skip
    """The definition, one position at a time, differentiated by autograd."""
    total = states.new_zeros(())
    for state, positive, target in zip(states, positives, ids[0], strict=True):
        score = state @ positive
        others = (negatives @ state + bias)[ids[1] != target]
        if kind == "softmax":
            total = total + torch.cat([score[None], others]).logsumexp(0) - score
        else:
            total = total - beta * score.sigmoid().log() - (1 - others.sigmoid()).log().sum()
    return total


@pytest.mark.parametrize("kind", ["softmax", "bce"])
@pytest.mark.parametrize("chunk_logits", [1, 20 * 8, None])
def test_sampled_losses_equal_their_definition(kind, chunk_logits):
    states, vectors, targets = problem(41, 12)
    drawn = torch.tensor([1, 5, 5, 12, 3, 7, 2, 9])
    bias = torch.linspace(-1, 1, 8, dtype=torch.float64)
    inputs = [states, vectors[targets].detach(), vectors[drawn].detach()]
    results = []
    for chunked in (False, True):
        copies = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        arguments: tuple[Any, ...] = (*copies, (targets, drawn), kind, bias, 0.4)
        compute = partial(sampled_loss, chunk_logits=chunk_logits) if chunked else plain_sampled
        value = compute(*arguments)
        (0.3 * value).backward()
        results.append([value.detach(), *(copy.grad for copy in copies)])
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["softmax", "bce"])
def test_gradcheck_of_sampled_losses(kind):
    states, vectors, targets = problem(20, 6, size=3)
    drawn = torch.tensor([1, 4, 4, 6])
    bias = torch.linspace(-1, 1, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s, p, n: sampled_loss(s, p, n, (targets, drawn), kind, bias, 0.4, chunk_logits=1),
        (
            states,
            vectors[targets].detach().requires_grad_(),
            vectors[drawn].detach().requires_grad_(),
        ),
    )


@pytest.mark.parametrize("name", ["ce", "chunked_ce", *SAMPLED])
def test_gradcheck_through_the_embedding(name):
    """Targets, negatives and, for the full losses, the whole table are the same weights."""
    states, vectors, targets = problem(6, 5, size=3)
    loss = make_loss(name, np.arange(6), CPU, num_negatives=7, popularity_power=0.5)
    embedding = embedding_of(vectors.detach())

    def value(states: Tensor, weights: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same negatives every time

        def rows(ids: Tensor) -> Tensor:
            return weights[ids]

        look_up: Any = rows
        look_up.weight = weights
        return loss(states, look_up, targets)

    assert torch.autograd.gradcheck(value, (states, vectors))
    torch.manual_seed(0)
    assert loss(states, embedding, targets).item() == value(states, vectors).item()


@pytest.mark.parametrize("name", ["chunked_ce", *SAMPLED])
def test_mixed_precision_computes_the_loss_in_full(name):
    """Regression: under autocast half of the products came out in bf16, and the other failed."""
    states, vectors, targets = problem(20, 30, dtype=torch.float32)
    loss = make_loss(name, np.ones(31), CPU, num_negatives=8)
    embedding = embedding_of(vectors.detach())
    torch.manual_seed(0)
    expected = loss(states, embedding, targets)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(states, embedding, targets)
        found.backward()
    assert found.equal(expected)


# ---- what is sampled ----------------------------------------------------------------------------


class Recording(nn.Embedding):
    """Remembers what was looked up."""

    def forward(self, input: Tensor) -> Tensor:
        self.seen = input
        return super().forward(input)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_negatives_are_drawn_by_popularity_and_never_padding(power):
    # The first item never occurs in training; padding's count must not matter.
    counts, draws = np.array([50, 0, 1, 8, 24, 3]), 200_000
    loss = make_loss("bce", counts, CPU, num_negatives=draws, popularity_power=power)
    torch.manual_seed(0)
    embedding = Recording(6, 2)
    loss(torch.zeros(1, 2), embedding, torch.tensor([1]))
    found = np.bincount(embedding.seen, minlength=6)
    assert found.sum() == draws
    assert found[0] == 0
    expected = (counts[1:] + 1.0) ** power
    expected = draws * expected / expected.sum()
    assert (abs(found[1:] - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize(("number", "item"), [(0.0, 1), (1 - 2**-53, 3)])
def test_the_ends_of_the_random_numbers_are_items(monkeypatch, number, item):
    """Padding has no share, and rounding of the cumulative shares opens no item behind the last."""
    loss = make_loss("bce", np.array([0, 4, 2, 1]), CPU, num_negatives=2, popularity_power=0.3)
    monkeypatch.setattr(torch, "rand", lambda size, **options: torch.full((size,), number).double())
    embedding = Recording(4, 2)
    loss(torch.zeros(1, 2), embedding, torch.tensor([1]))
    assert embedding.seen.tolist() == [item, item]


def test_negatives_are_drawn_anew_and_repeat_under_a_seed():
    loss = make_loss("sampled_softmax", np.ones(1000), CPU, num_negatives=20)
    embedding = Recording(1000, 2)
    seen = []
    for seed in (0, None, 0):
        if seed is not None:
            torch.manual_seed(seed)
        loss(torch.zeros(1, 2), embedding, torch.tensor([1]))
        seen.append(embedding.seen)
    assert seen[0].equal(seen[2])
    assert not seen[0].equal(seen[1])


def partition_sums(power: float, corrected: bool) -> tuple[np.ndarray, float]:
    """What many draws hold for the sum over the catalogue of exp(score), and the sum."""
    states, vectors, _ = problem(1, 12)
    embedding, target = embedding_of(vectors.detach()), torch.tensor([4])
    loss = make_loss(
        "sampled_softmax", np.arange(13) ** 2, CPU, num_negatives=24, popularity_power=power,
        logq_correction=corrected,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        scores = (states @ vectors[1:].T).flatten()
        # The loss is ln(sum) − score of the target.
        values = [loss(states, embedding, target).item() for _ in range(2000)]
    return np.exp(np.array(values) + scores[3].item()), float(scores.exp().sum())


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_corrected_sampled_softmax_estimates_the_whole_sum_without_bias(power):
    estimates, whole = partition_sums(power, corrected=True)
    error = estimates.std() / math.sqrt(len(estimates))
    assert error < 0.02 * whole
    assert abs(estimates.mean() - whole) < 5 * error


def test_without_correction_the_sum_is_another_one():
    """The counterpart: the test above can fail."""
    estimates, whole = partition_sums(0.5, corrected=False)
    assert abs(estimates.mean() - whole) > 20 * estimates.std() / math.sqrt(len(estimates))


def test_gbce_beta_is_that_of_the_paper():
    # α = 256 / 3416 as in the paper's MovieLens-1M; β = α (t (1 − 1/α) + 1/α).
    rate = 256 / 3416
    assert gbce_beta(256, 3417, 0.0) == pytest.approx(1)
    assert gbce_beta(256, 3417, 1.0) == pytest.approx(rate)
    assert gbce_beta(256, 3417, 0.75) == pytest.approx(0.75 * rate + 0.25)
    # As many negatives as there are items, or more: nothing to calibrate.
    assert gbce_beta(5000, 3417, 0.75) == pytest.approx(1)


def test_gbce_without_calibration_is_bce_and_with_it_weighs_positives_less():
    states, vectors, targets = problem(9, 40)
    embedding = embedding_of(vectors.detach())

    def value(name: Any, **options: Any) -> float:
        torch.manual_seed(0)
        loss = make_loss(name, np.ones(41), CPU, num_negatives=10, **options)
        return loss(states, embedding, targets).item()

    assert value("gbce", calibration=0.0) == pytest.approx(value("bce"))
    scores = (states * embedding(targets)).sum(1)
    positives = -nn.functional.logsigmoid(scores).sum().item()
    beta = gbce_beta(10, 40, 0.75)
    expected = value("bce") - (1 - beta) * positives
    assert value("gbce", calibration=0.75) == pytest.approx(expected)


# ---- memory -------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and not value.is_sparse:
                self.numel = max(self.numel, value.numel())
        return result


def largest(name: Any, sparse: bool = False, **options: Any) -> int:
    """N = 1000 positions, V = 10,001 items of D = 4: 10 M logits."""
    states, vectors, targets = problem(1000, 10_000, size=4, dtype=torch.float32)
    embedding = embedding_of(vectors.detach(), sparse)
    loss = make_loss(name, np.ones(10_001), CPU, **options)
    with LargestTensor() as seen:
        loss(states, embedding, targets).backward()
    return seen.numel


def test_logits_of_all_positions_and_items_never_exist_at_once():
    chunk = 2**21
    assert largest("ce") == 1000 * 10_000  # that the measure measures
    assert largest("chunked_ce") <= chunk
    assert largest("chunked_ce", label_smoothing=0.1) <= chunk
    for name in SAMPLED:
        assert largest(name, num_negatives=5000) <= chunk


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_losses_touch_no_more_of_the_catalogue_than_they_look_up(name):
    # With sparse gradients not even one number for each of the catalogue's vectors.
    assert largest(name, sparse=True, num_negatives=10) < 10_000 * 4


# ---- padding, trained ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sparse"),
    [("ce", False), ("chunked_ce", False), *((n, s) for n in SAMPLED for s in (False, True))],
)
def test_every_loss_is_learnt_and_padding_stays_zero_throughout(name, sparse):
    torch.manual_seed(0)
    model = SASRec(30, hidden_size=8, max_length=9, dropout=0.0, sparse=sparse)
    loss = make_loss(name, np.arange(31), CPU, num_negatives=10)
    optimizer = LazyAdamW(model.parameters(), lr=0.03, weight_decay=0.01)
    windows = torch.randint(1, 31, (12, 10)).numpy()
    batch = collate(
        [
            {"user": 0, "window": window, "cut": 0, "history": window[:1], "first_target": 0}
            for window in windows
        ]
    )
    values = []
    for _ in range(20):
        output = model(batch, loss)
        optimizer.zero_grad()
        output.loss_sum.backward()
        gradient = model.item_embedding.weight.grad
        assert gradient is not None
        assert gradient.is_sparse == sparse
        assert not gradient.to_dense()[0].any()
        optimizer.step()
        values.append(output.loss_sum.item())
        assert not model.item_vectors[0].any()
    assert values[-1] < 0.8 * values[0]


def test_only_sampled_losses_say_so():
    names: list[LossName] = ["ce", "chunked_ce", *SAMPLED]
    assert [TrainingLoss(name).sampled for name in names] == [False, False, True, True, True]
