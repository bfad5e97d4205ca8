"""Small tokenizers whose merges a test chooses."""

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


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
