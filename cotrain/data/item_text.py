"""Embeddings of the items' titles and categories, computed once for a catalogue and kept."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cotrain import assets
from cotrain.data.catalog import Catalog
from cotrain.errors import DataError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def item_texts(catalog: Catalog) -> list[str]:
    """Title and categories of every item 1..V-1, as encoders read them."""
    return [
        f"{title}. {', '.join(categories.split('|'))}" if categories else title
        for title, categories in zip(catalog.titles[1:], catalog.categories[1:], strict=True)
    ]


def load_sentence_encoder(encoder: str, device: torch.device) -> "SentenceTransformer":
    """A sentence-transformers model.

    Args:
        encoder: Known asset, local folder or hub name.
        device: Where it will compute.

    Raises:
        AssetError: A known asset that cannot be fetched.
        DataError: The name leads to no sentence encoder.
    """
    known = encoder in assets.ASSETS
    source = str(assets.fetch(encoder, kind="model")) if known else str(Path(encoder).expanduser())
    if not Path(source).exists():
        source = encoder
    # Here, because it takes seconds that only a run with texts should pay.
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(source, device=str(device))
    except (OSError, ValueError) as error:
        raise DataError(
            f"The sentence encoder {encoder!r} cannot be loaded: {error}\nExpected a known asset "
            "such as all-minilm-l6-v2, a local folder, or a hub name."
        ) from error


def sentence_vectors(
    texts: list[str], encoder: str, device: torch.device, progress: bool = True
) -> Tensor:
    """(n, E) float32 embeddings by a sentence-transformers model.

    Args:
        texts: What to encode.
        encoder: As for `load_sentence_encoder`, like the device and what is raised.
        device: Where to compute.
        progress: Show a bar.
    """
    model = load_sentence_encoder(encoder, device)
    vectors = model.encode(texts, batch_size=64, convert_to_tensor=True, show_progress_bar=progress)
    return vectors.float().cpu()


def identity(model: str) -> str:
    """The name of a model, and what tells one state of a local folder from the next."""
    folder = Path(model).expanduser()
    if model in assets.ASSETS or not folder.is_dir():
        return model
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [(path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return f"{folder.absolute()} {facts}"


def kept(texts: list[str], encoder: str, encode: Callable[[], Tensor]) -> Tensor:
    """The result of `encode()`, from the cache where the same texts were encoded before.

    Args:
        texts: What is encoded.
        encoder: Whatever tells one encoder from another.
        encode: Computes (n, E).
    """
    digest = hashlib.sha256(json.dumps([encoder, texts]).encode()).hexdigest()
    path = assets.cache_root() / "item-text" / f"{digest[:32]}.safetensors"
    if path.is_file():
        return load_file(path)["vectors"]
    vectors = encode().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file({"vectors": vectors}, partial)
    partial.replace(path)
    return vectors
