"""Real small things that many tests share: a slice of ML-100K, a tiny random language model."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from cotrain import assets
from cotrain.config import DataConfig
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.evaluation.compare import paired_bootstrap
from cotrain.evaluation.metrics import metrics_from_ranks
from cotrain.rationale import store as stores
from cotrain.rationale.head import FOLDER as HEAD
from cotrain.rationale.head import RationaleHead
from cotrain.rationale.records import position_hashes
from cotrain.student.recommender import Recommender
from cotrain.student.sasrec import SASRec


@pytest.fixture(scope="session")
def ml100k() -> InteractionData:
    return load_interactions(DataConfig())


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of the real model."""
    return str(assets.fetch("smollm2-135m-instruct"))


@pytest.fixture(scope="session")
def tokenizer(smollm2: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def tiny_teacher(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Folder of a random Llama, 2 layers of 32, with SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-teacher")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def small_tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Interactions and items of 60 users of ML-100K, as CSV."""
    source, folder = assets.fetch("ml-100k"), tmp_path_factory.mktemp("tables")
    interactions = pl.read_parquet(source / "interactions.parquet")
    interactions = interactions.filter(pl.col("user_id").cast(pl.Int64) <= 60)
    interactions.write_csv(folder / "interactions.csv")
    items = pl.read_parquet(source / "items.parquet")
    items.join(interactions, on="item_id", how="semi").write_csv(folder / "items.csv")
    return folder / "interactions.csv", folder / "items.csv"


def _write_store(
    folder: Path, data: InteractionData, places: np.ndarray, dimension: int = 12
) -> Path:
    """A store of random vectors that depend on the target, for these places in the data."""
    users = np.searchsorted(data.offsets, places, side="right") - 1
    cuts = places - data.offsets[users]
    ids = data.catalog.item_ids
    hashes = {
        int(user): position_hashes([ids[item] for item in data.history(int(user))])
        for user in np.unique(users)
    }
    user_ids = pl.Series([data.user_ids[user] for user in users])
    targets = pl.Series([ids[item] for item in data.items[places]])
    rows = pl.DataFrame(
        {
            "row": np.arange(len(places)), "user_id": user_ids, "item_id": targets, "cut": cuts,
            "history_hash": [hashes[int(u)][c] for u, c in zip(users, cuts, strict=True)],
            "rationale": [f"Reason {place}." for place in places.tolist()],
            "model": "none", "template": "movies", "logprob": -1.0, "tokens": 4,
            "flags": [[]] * len(places),
        },
        schema=stores.row_schema(user_ids.dtype, targets.dtype),
    )  # fmt: skip
    of_items = np.random.default_rng(0).normal(size=(len(data.catalog), dimension))
    vectors = (of_items[data.items[places]] + 1).astype("<f2")
    folder.mkdir(parents=True)
    facts = {"format": stores.FORMAT, "encoder": "random", "data": data.name}
    header = stores.header_bytes(len(vectors), dimension, "F16", facts)
    (folder / stores.VECTORS).write_bytes(header + vectors.tobytes())
    rows.write_parquet(folder / stores.ROWS)
    return folder


def _training_places(data: InteractionData) -> np.ndarray:
    """Every interaction that may have a rationale."""
    ends = zip(data.offsets[:-1], data.held_out.train_end, strict=True)
    return np.concatenate([np.arange(start + 1, end) for start, end in ends])


@pytest.fixture(scope="session")
def write_store() -> Callable[..., Path]:
    return _write_store


@pytest.fixture(scope="session")
def training_places() -> Callable[[InteractionData], np.ndarray]:
    return _training_places


def _report(data: InteractionData) -> dict:
    """What a run with a teacher that helped would have reported."""
    draw = np.random.default_rng(0)
    ranks = draw.integers(1, 60, data.num_users)
    results = {
        name: {split: metrics_from_ranks(worse * ranks) for split in ("validation", "test")}
        for name, worse in (("student", 1), ("control", 2))
    }
    gains = [1 / (worse * ranks) for worse in (1, 2)]
    return {
        "name": data.name, "seed": 0, "shipped": "student", **results,
        "dataset": {
            "name": data.name, "users": data.num_users, "items": data.num_items,
            "interactions": data.num_interactions, "split": "leave-one-out",
            "evaluated_users": {"validation": data.num_users, "test": data.num_users},
            "notes": data.notes,
        },
        "lift": {"ndcg@10": paired_bootstrap(*gains, samples=200).as_dict()},
        "teacher": {
            "model": "a-teacher", "adapter": None, "quantization": "nf4", "num_candidates": 20,
            "rows_asked": 40, "rows_valid": 39, "rows_per_s": 2.5,
        },
        "rationales": None, "warnings": ["Users are few."], "environment": {"device": "cpu"},
    }  # fmt: skip


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, small_tables: tuple[Path, Path]) -> Path:
    """Folder as a run on 60 users with a teacher and rationales would leave it; the student has
    not been trained, and of everything else there is only what comes after a run needs."""
    folder = tmp_path_factory.mktemp("finished")
    interactions, items = map(str, small_tables)
    settings = {"name": "small", "interactions": interactions, "items": items}
    data = load_interactions(DataConfig(name="small", interactions=interactions, items=items))
    lines = [f"  {name}: {json.dumps(value)}" for name, value in settings.items()]
    (folder / "config.yaml").write_text("\n".join(["data:", *lines]) + "\n")
    torch.manual_seed(0)
    model = SASRec(data.num_items, hidden_size=16, num_layers=2, num_heads=2, max_length=20)
    with torch.no_grad():  # scores that differ
        model.item_embedding.weight[1:].normal_()
        model.position_embedding.weight.normal_()
    Recommender(model, data.catalog).save_pretrained(folder / "student")
    places = _training_places(data)[::5]
    store = _write_store(folder / "store", data, places)
    RationaleHead(16, torch.zeros(12)).save(folder / HEAD, {"store": str(store)})
    (folder / "report.json").write_text(json.dumps(_report(data)))
    return folder
