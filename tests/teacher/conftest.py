"""Small tokenizers whose merges a test chooses; rankers on real titles."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cotrain.config import TeacherConfig
from cotrain.data.interactions import InteractionData
from cotrain.teacher.backbone import Backbone, load_backbone
from cotrain.teacher.prompts import make_prompts
from cotrain.teacher.ranker import RankLLM


def make_bytes_tokenizer(
    merges: list[tuple[str, str]] | None = None, bos: bool = False, template: str | None = None
) -> PreTrainedTokenizerFast:
    """One token a byte, save for these merges; no chat template unless given."""
    merges = merges or []
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges), "<s>"]
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    inner: Any = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    tokenizer.chat_template = template  # pyright: ignore
    return tokenizer


def make_prefixing_tokenizer(scheme: str = "always") -> PreTrainedTokenizerFast:
    """Like those of Llama 2, Mistral and Phi 3: a space before every text, line ends as bytes."""
    specials = ["<unk>", "<s>", "</s>"]
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    letters = [chr(code) for code in range(33, 127)]
    merges = [("▁", letter) for letter in letters]
    pieces += [*letters, *("▁" + letter for letter in letters)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    inner: Any = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return make_bytes_tokenizer


@pytest.fixture(scope="session")
def prefixing_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return make_prefixing_tokenizer


@pytest.fixture(scope="session")
def make_ranker(tiny_teacher: str, ml100k: InteractionData) -> Callable[..., RankLLM]:
    """`make_ranker(**settings)`: on the tiny teacher, in float32, unless a backbone is given."""

    def make(backbone: Backbone | None = None, **changes: Any) -> RankLLM:
        short = {"history_length": 5, "max_title_tokens": 16, "item_noun": "movie"}
        settings = TeacherConfig(**{"num_candidates": 3, **short, **changes})
        backbone = backbone or load_backbone(tiny_teacher, "fp32", torch.device("cpu"))
        catalog = ml100k.catalog
        prompts = make_prompts(
            settings, backbone.tokenizer, catalog.titles, catalog.categories,
            backbone.max_context_tokens,
        )  # fmt: skip
        return RankLLM(backbone, prompts, settings)

    return make


@pytest.fixture(scope="session")
def real_backbone(smollm2: str) -> Backbone:
    """SmolLM2-135M in float32; tests leave it as it is."""
    return load_backbone(smollm2, "fp32", torch.device("cpu"))
