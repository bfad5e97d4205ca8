"""Real small things that many tests share: a slice of ML-100K, a tiny random language model."""

from pathlib import Path

import polars as pl
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from cotrain import assets
from cotrain.config import DataConfig
from cotrain.data.interactions import InteractionData, load_interactions


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
