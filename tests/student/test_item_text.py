"""What text gives to item embeddings: its principal components, the same everywhere."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cotrain.errors import DataError
from cotrain.student import item_text
from cotrain.student.item_text import TEXT_STD, principal_components, start_from_text
from cotrain.student.sasrec import SASRec


def text_vectors(count: int, size: int) -> Tensor:
    """Embeddings off the origin, with a spread of their own along each axis."""
    generator = torch.Generator().manual_seed(count + size)
    scale = torch.linspace(3, 0.5, size)
    return torch.randn(count, size, generator=generator) * scale + 5


def by_svd(vectors: Tensor, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Components (n, size) and their axes (size, E), signs as they come."""
    centred = vectors.double().numpy()
    centred = centred - centred.mean(0)
    left, values, axes = np.linalg.svd(centred, full_matrices=False)
    return left[:, :size] * values[:size], axes[:size]


@pytest.mark.parametrize(("count", "size", "kept"), [(40, 12, 5), (40, 12, 12), (6, 12, 4)])
def test_components_are_those_of_the_singular_value_decomposition(count, size, kept):
    vectors = text_vectors(count, size)
    expected, axes = by_svd(vectors, kept)
    found = principal_components(vectors, kept)
    assert found.dtype == torch.float32
    # The sign of an axis is free; ours is the one that makes its largest entry positive.
    signs = np.sign(axes[np.arange(kept), abs(axes).argmax(1)])
    np.testing.assert_allclose(found, expected * signs, rtol=1e-4, atol=1e-4)
    assert (found.var(0).diff() < 0).all()  # largest first


def test_components_are_computed_alike_in_parts(monkeypatch):
    vectors = text_vectors(40, 12)
    whole = principal_components(vectors, 5)
    monkeypatch.setattr(item_text, "_CHUNK", 7)
    torch.testing.assert_close(principal_components(vectors, 5), whole, rtol=1e-5, atol=1e-5)


def test_no_more_components_than_dimensions_or_texts():
    assert principal_components(text_vectors(40, 3), 8).shape == (40, 3)
    assert principal_components(text_vectors(4, 30), 8).shape == (4, 4)


def student(num_items: int, size: int = 8) -> SASRec:
    torch.manual_seed(0)
    return SASRec(num_items, hidden_size=size, max_length=5)


def test_item_embeddings_become_the_components_at_their_scale():
    model, vectors = student(40), text_vectors(40, 12)
    others = {key: value.clone() for key, value in model.state_dict().items()}
    start_from_text(model, vectors)
    started = model.item_vectors[1:].detach()
    assert started.std().item() == pytest.approx(TEXT_STD, rel=1e-5)
    assert started.mean().abs() < 1e-6
    # One scale for all of them: the first component still tells more than the last.
    expected = principal_components(vectors, 8)
    torch.testing.assert_close(started, expected * (TEXT_STD / expected.std()))
    assert not model.item_vectors[0].any()
    for key, value in model.state_dict().items():
        assert key == "item_embedding.weight" or value.equal(others[key])


def test_distances_of_items_are_those_of_their_texts():
    """With room for every dimension nothing but the scale changes."""
    model, vectors = student(30, size=16), text_vectors(30, 12)
    with torch.no_grad():
        model.item_vectors.zero_()
    start_from_text(model, vectors)
    found = torch.pdist(model.item_vectors[1:].detach())
    ratio = found / torch.pdist(vectors)
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-4, atol=0)


def test_dimensions_that_text_does_not_fill_stay_random():
    model = student(40)
    random = model.item_vectors.detach().clone()
    start_from_text(model, text_vectors(40, 3))
    assert model.item_vectors[:, 3:].equal(random[:, 3:])
    assert (model.item_vectors[1:, :3] != random[1:, :3]).all()
    assert model.item_vectors[1:, :3].std().item() == pytest.approx(TEXT_STD, rel=1e-5)


def test_two_students_start_alike():
    one, other = student(40), student(40)
    for model in (one, other):
        start_from_text(model, text_vectors(40, 12))
    assert one.item_vectors.equal(other.item_vectors)


def test_a_vector_too_few_is_refused():
    with pytest.raises(ValueError, match="39 text vectors for 40 items"):
        start_from_text(student(40), text_vectors(39, 12))


@pytest.mark.parametrize("number", [0.1, 1e-30, 1e6])
def test_texts_that_are_all_the_same_are_refused(number):
    """Regression: they became NaN, or rounding errors blown up to embeddings."""
    vectors = torch.full((40, 12), number) * torch.rand(12, generator=torch.Generator())
    with pytest.raises(DataError, match="all 40 items the same embedding"):
        start_from_text(student(40), vectors)


def test_embeddings_that_are_not_finite_are_refused():
    vectors = text_vectors(40, 12)
    vectors[3, 5], vectors[7, 1] = torch.nan, torch.inf
    with pytest.raises(DataError, match="2 of 40 items an embedding that is not finite"):
        start_from_text(student(40), vectors)
