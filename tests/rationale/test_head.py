"""W_r and its targets: closed forms, and what is saved of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from cotrain.data.interactions import InteractionData
from cotrain.errors import DataError
from cotrain.rationale import head as heads
from cotrain.rationale.head import RationaleHead, new_head
from cotrain.rationale.store import MatchedRationales, RationaleStore

SIZE = 6
Match = Callable[..., MatchedRationales]


@pytest.fixture
def match(small_data: InteractionData, make_rationale: Any, make_store: Any) -> Match:
    """`match(vectors)`: a store of these, one for each of the first training interactions."""

    def made(vectors: Any) -> MatchedRationales:
        ends = small_data.held_out.train_end - small_data.offsets[:-1]
        positions = [(user, cut) for user in range(60) for cut in range(1, ends[user])]
        # Last first, so that a row is not taken for a place.
        chosen = positions[: len(vectors)][::-1]
        rationales = [make_rationale(small_data, *position) for position in chosen]
        return RationaleStore.open(make_store(rationales, vectors)).match(small_data)

    return made


def uneven(rows: int, dimension: int = 5, seed: int = 0) -> np.ndarray:
    """Vectors about a mean, with one direction six times as wide as another."""
    draw = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(draw.normal(size=(dimension, dimension)))
    widths = np.geomspace(0.5, 3, dimension)
    return (draw.normal(size=(rows, dimension)) * widths) @ rotation + np.arange(1, dimension + 1)


# ---- targets ------------------------------------------------------------------------------------


def test_plain_targets_are_the_vectors_at_unit_length(match: Match):
    head = new_head(match([[3, 4], [0, -2], [6, 8]]), SIZE, "plain")
    found = head.targets(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.0, -1.0]]))
    assert head.whitening is None


def test_centred_targets_lie_about_the_mean(match: Match):
    # The mean is (2, 1).
    head = new_head(match([[5, 5], [2, 0], [-1, -2]]), SIZE, "centred")
    torch.testing.assert_close(head.mean, torch.tensor([2.0, 1.0]))
    found = head.targets(torch.tensor([[5.0, 5.0], [2.0, 0.0], [8.0, 1.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.0, -1.0], [1.0, 0.0]]))
    assert head.whitening is None


def test_the_mean_itself_has_no_direction_and_is_no_error(match: Match):
    head = new_head(match([[5, 5], [-1, -3]]), SIZE, "centred")
    assert head.targets(torch.tensor([[2.0, 1.0]])).tolist() == [[0.0, 0.0]]


def test_whitened_vectors_are_as_wide_in_all_directions(match: Match):
    vectors = uneven(2000)
    head = new_head(match(vectors), SIZE, "whitened")
    assert head.whitening is not None
    centred = torch.from_numpy(vectors).float() - head.mean
    before = torch.linalg.eigvalsh(torch.cov(centred.T))
    assert before[-1] / before[0] > 30
    whitened = torch.cov((centred @ head.whitening).T)
    torch.testing.assert_close(whitened, torch.eye(5), atol=0.03, rtol=0)
    torch.testing.assert_close(
        head.targets(torch.from_numpy(vectors).float()), F.normalize(centred @ head.whitening)
    )
    # Σ^-½, not only some matrix that whitens: it turns nothing.
    torch.testing.assert_close(head.whitening, head.whitening.T)
    assert (torch.linalg.eigvalsh(head.whitening) > 0).all()


def test_whitening_two_uncorrelated_numbers_divides_by_their_deviations(match: Match):
    corners = np.array([[3, 1], [3, -1], [-3, 1], [-3, -1]] * 200)
    head = new_head(match(corners + np.array([10, 20])), SIZE, "whitened")
    assert head.whitening is not None
    torch.testing.assert_close(
        head.whitening, torch.diag(torch.tensor([1 / 3, 1.0])), atol=0.01, rtol=0
    )
    found = head.targets(torch.tensor([[13.0, 21.0]]))
    torch.testing.assert_close(found, torch.full((1, 2), 0.5**0.5), atol=0.01, rtol=0)


def test_few_rationales_of_many_dimensions_do_not_become_noise(match: Match):
    """Their own covariance has directions without any width, which would be blown up."""
    vectors = uneven(12, 30)
    head = new_head(match(vectors), SIZE, "whitened")
    assert head.whitening is not None
    widths = torch.linalg.eigvalsh(head.whitening)
    assert widths[-1] / widths[0] < 30
    others = torch.from_numpy(uneven(100, 30, seed=1)).float()
    found = head.targets(others)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(100))


@pytest.mark.parametrize("targets", ["plain", "centred", "whitened"])
def test_rationales_that_are_all_the_same_give_numbers(match: Match, targets: Any):
    """Without any width there is nothing to divide by."""
    head = new_head(match([[1, 2, 3]] * 4), SIZE, targets)
    found = head.targets(torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 3.0]]))
    assert found.isfinite().all()
    assert (found.norm(dim=1) < 1.0001).all()


@pytest.mark.parametrize("targets", ["centred", "whitened"])
def test_mean_and_covariance_come_from_a_sample_of_many(
    match: Match, targets: Any, monkeypatch: pytest.MonkeyPatch
):
    matched = match(uneven(1000))
    whole = new_head(matched, SIZE, targets)
    monkeypatch.setattr(heads, "_SAMPLE", 600)
    of_some, again = new_head(matched, SIZE, targets), new_head(matched, SIZE, targets)
    assert not of_some.mean.equal(whole.mean)
    torch.testing.assert_close(of_some.mean, whole.mean, atol=0.2, rtol=0)
    assert of_some.mean.equal(again.mean)


# ---- the map ------------------------------------------------------------------------------------


def test_the_head_is_linear_and_starts_about_as_long_as_it_was_given():
    torch.manual_seed(0)
    head = RationaleHead(64, torch.zeros(32))
    states = F.normalize(torch.randn(500, 64), dim=1)
    with torch.no_grad():
        found = head(states)
        torch.testing.assert_close(head(2 * states), 2 * found)
        torch.testing.assert_close(head(torch.zeros(1, 64)), torch.zeros(1, 32))
    # 32 numbers of variance 1/64 each.
    assert found.norm(dim=1).mean() == pytest.approx(0.5**0.5, rel=0.1)


def test_targets_are_not_learned():
    head = RationaleHead(SIZE, torch.ones(3), torch.eye(3))
    assert [name for name, _ in head.named_parameters()] == ["linear.weight", "linear.bias"]
    vectors = torch.randn(2, 3, requires_grad=True)
    assert not head.targets(vectors).requires_grad


# ---- on disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["plain", "centred", "whitened"])
def test_a_head_comes_back_as_it_was_saved(tmp_path: Path, match: Match, targets: Any):
    head = new_head(match(uneven(50)), SIZE, targets)
    facts = {"store": "Où/„hier“", "numbers": [1, 2.5, None]}
    head.save(tmp_path / "not" / "yet", facts)
    found, kept = RationaleHead.load(tmp_path / "not" / "yet")
    assert kept == facts
    assert not found.training
    before, after = head.state_dict(), found.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    states, vectors = torch.randn(4, SIZE), torch.randn(4, 5)
    with torch.no_grad():
        assert found(states).equal(head(states))
    assert found.targets(vectors).equal(head.targets(vectors))


def test_a_folder_without_a_head_is_of_a_run_without_rationales(tmp_path: Path):
    with pytest.raises(DataError, match=r"no .*head\.safetensors.* without rationales.*--distill"):
        RationaleHead.load(tmp_path)


def rewritten(path: Path, drop: str = "", /, **changes: torch.Tensor) -> None:
    tensors = load_file(path) | changes
    tensors.pop(drop, None)
    save_file(tensors, path, {"facts": "{}"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a head at all, but some text"),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: rewritten(path, "mean"),
        lambda path: rewritten(path, "linear.bias"),
        lambda path: rewritten(path, "linear.weight"),
        lambda path: rewritten(path, other=torch.ones(1)),
        lambda path: rewritten(path, mean=torch.ones(4)),
        lambda path: rewritten(path, whitening=torch.eye(4)),
        lambda path: rewritten(path, **{"linear.weight": torch.ones(5)}),
        lambda path: save_file(load_file(path), path),
        lambda path: save_file(load_file(path), path, {"facts": "{"}),
    ],
    ids=["empty", "text", "shorter by a byte", "torn header", "no mean", "no bias", "no weight",
         "another tensor", "another dimension", "another whitening", "a line of weights",
         "no facts", "torn facts"],
)  # fmt: skip
def test_a_damaged_head_is_one_clear_error(tmp_path: Path, damage: Callable[[Path], Any]):
    RationaleHead(SIZE, torch.ones(5), torch.eye(5)).save(tmp_path, {"store": "somewhere"})
    path = tmp_path / "head.safetensors"
    damage(path)
    with pytest.raises(DataError) as caught:
        RationaleHead.load(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{path} cannot be read: ")
    assert said.endswith("Train the run anew.")
