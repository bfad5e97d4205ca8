"""Texts of items and their embeddings, which are computed once."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cotrain.data.catalog import Catalog
from cotrain.data.item_text import identity, item_texts, kept, sentence_vectors
from cotrain.errors import CotrainError

CPU = torch.device("cpu")


class Encoder:
    """Says how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return torch.arange(6.0).view(3, 2).T + self.calls


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COTRAIN_HOME", str(tmp_path))
    return tmp_path / "item-text"


def test_texts_are_titles_with_their_categories():
    catalog = Catalog([None, 7, 8, 9], ["", "Heat", "Alien", "É"], ["", "Action|Crime", "", "x"])
    assert item_texts(catalog) == ["Heat. Action, Crime", "Alien", "É. x"]


def test_the_same_texts_are_encoded_once(cache):
    encoder = Encoder()
    first = kept(["a", "b"], "one", encoder)
    assert kept(["a", "b"], "one", encoder).equal(first)
    assert encoder.calls == 1
    assert first.equal(Encoder()())
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]  # nothing half-written


@pytest.mark.parametrize(
    ("texts", "encoder"), [(["a", "b"], "two"), (["a", "c"], "one"), (["b", "a"], "one"),
                           (["ab"], "one"), (["a"], "one")],
)  # fmt: skip
def test_other_texts_another_order_or_encoder_are_encoded_anew(texts, encoder):
    encode = Encoder()
    kept(["a", "b"], "one", encode)
    kept(texts, encoder, encode)
    assert encode.calls == 2


def test_an_encoding_that_fails_leaves_nothing(cache):
    def fail() -> Tensor:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        kept(["a"], "one", fail)
    encoder = Encoder()
    kept(["a"], "one", encoder)
    assert encoder.calls == 1


def test_a_local_model_that_changed_is_another_one(tmp_path):
    """Regression: a folder trained on in place got the embeddings of its former weights."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "weights").write_text("1234")
    before = identity(str(folder))
    assert identity(str(folder)) == before
    (folder / "weights").write_text("12345")
    longer = identity(str(folder))
    assert longer != before
    os.utime(folder / "weights", (1, 1))
    assert identity(str(folder)) not in (before, longer)
    assert identity("all-minilm-l6-v2") == "all-minilm-l6-v2"
    assert identity("owner/name") == "owner/name"


def test_a_sentence_encoder_puts_like_texts_together(monkeypatch):
    monkeypatch.delenv("COTRAIN_HOME")
    texts = ["Toy Story. Animation", "A Bug's Life. Animation", "How to repair a diesel engine"]
    vectors = sentence_vectors(texts, "all-minilm-l6-v2", CPU, progress=False)
    assert vectors.shape == (3, 384)
    assert vectors.dtype == torch.float32
    likeness = torch.corrcoef(vectors)
    assert likeness[0, 1] > likeness[0, 2] + 0.1
    alone = sentence_vectors(texts[2:], "all-minilm-l6-v2", CPU, progress=False)
    torch.testing.assert_close(alone[0], vectors[2], atol=1e-5, rtol=0)


def test_a_name_that_leads_to_no_encoder_is_refused(tmp_path, monkeypatch):
    with pytest.raises(CotrainError, match="no-such-folder"):
        sentence_vectors(["a"], "./no-such-folder", CPU, progress=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CotrainError, match="empty"):
        sentence_vectors(["a"], str(tmp_path / "empty"), CPU, progress=False)
