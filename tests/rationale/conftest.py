"""Rationales of real histories, stores of them, and a sentence encoder that takes no time."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tokenizers import Tokenizer

from cotrain import assets
from cotrain.config import DataConfig
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.rationale import store
from cotrain.rationale.records import Rationale, position_hash


@pytest.fixture(scope="session")
def small_data(small_tables: tuple[Path, Path]) -> InteractionData:
    """60 users of ML-100K, the last item of each for test, the one before for validation."""
    interactions, items = map(str, small_tables)
    return load_interactions(DataConfig(name="small", interactions=interactions, items=items))


def rationale_of(
    data: InteractionData, user: int, cut: int, text: str | None = None, **changes: Any
) -> Rationale:
    """Of the interaction `cut` of a user, whether or not it may have one."""
    ids = [data.catalog.item_ids[item] for item in data.history(user)[: cut + 1]]
    title = data.catalog.titles[data.history(user)[cut]]
    facts: dict[str, Any] = {
        "user_id": data.user_ids[user], "item_id": ids[-1], "cut": cut,
        "history_hash": position_hash(ids[:-1], ids[-1]),
        "rationale": text or f"{title} is like what they took before.",
        "model": "a model", "template": "default", "logprob": -0.5, "tokens": 9, "flags": [],
    }  # fmt: skip
    return Rationale(**facts | changes)


@pytest.fixture(scope="session")
def make_rationale() -> Callable[..., Rationale]:
    return rationale_of


def write_store_to(
    folder: Path, rationales: Sequence[Rationale], vectors: Any = None, **facts: str
) -> Path:
    """The folder, which was not yet there, with a store; without vectors, random ones of 8."""
    folder.mkdir()
    if vectors is None:
        vectors = np.random.default_rng(0).normal(size=(len(rationales), 8))
    vectors = np.asarray(vectors, np.float32)
    user_id, item_id = (
        pl.String() if isinstance(value, str) else pl.Int64()
        for value in (rationales[0].user_id, rationales[0].item_id)
    )
    rows = [{"row": row, **asdict(rationale)} for row, rationale in enumerate(rationales)]
    table = pl.DataFrame(rows, schema=store.row_schema(user_id, item_id))
    table.write_parquet(folder / store.ROWS, row_group_size=store.ROW_GROUP)
    facts = {"format": store.FORMAT, "encoder": "by hand", "data": "", **facts}
    header = store.header_bytes(len(vectors), vectors.shape[1], "F32", facts)
    (folder / store.VECTORS).write_bytes(header + vectors.tobytes())
    return folder


@pytest.fixture(scope="session")
def write_store() -> Callable[..., Path]:
    return write_store_to


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Path]:
    """`make_store(rationales, vectors)`: folder of a store for one test."""

    def make(
        rationales: Sequence[Rationale], vectors: Any = None, name: str = "store", **facts: str
    ) -> Path:
        return write_store_to(tmp_path / name, rationales, vectors, **facts)

    return make


@pytest.fixture(scope="session")
def static_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a sentence-transformers model that adds up random vectors of words, of 16."""
    # Here, because it takes seconds that only these tests should pay.
    from sentence_transformers import SentenceTransformer

    try:
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    except ImportError:  # its place before 6.0
        from sentence_transformers.models import StaticEmbedding  # pyright: ignore
    folder = tmp_path_factory.mktemp("static") / "encoder"
    tokenizer = Tokenizer.from_file(str(assets.fetch("all-minilm-l6-v2") / "tokenizer.json"))
    tokenizer.no_padding()
    weights = np.random.default_rng(0).normal(size=(tokenizer.get_vocab_size(), 16))
    embedding = StaticEmbedding(tokenizer, embedding_weights=weights.astype(np.float32))
    SentenceTransformer(modules=[embedding], device="cpu").save(str(folder))
    return str(folder)
