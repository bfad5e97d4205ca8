"""A teacher in the shape of a 7B model, random, for machines without trained weights.

What a pass costs does not depend on what the weights say.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from cotrain.teacher.identifiers import Identifiers, Node, identifier_texts
from cotrain.teacher.prompts import PromptBuilder

VOCABULARY = 32_000
SHORTEST, LONGEST, SHARED = 350, 500, 100


class RandomPrompts(PromptBuilder):
    """Prompts of random tokens behind a prefix that all of them share.

    Args:
        count: How many there are; a history whose last item is i gets prompt i modulo this.
        num_shown: W.
        seed: Of the tokens.
        vocabulary: Tokens that there are.
    """

    def __init__(self, count: int, num_shown: int, seed: int, vocabulary: int):
        random = np.random.default_rng((seed, 7))

        def draw(size: int) -> list[int]:
            return random.integers(3, vocabulary, size).tolist()  # behind the usual special tokens

        nothing: Any = None
        self.tokenizer = nothing
        self.num_shown = num_shown
        self.history_length = 1
        self.prefix = draw(SHARED)
        lengths = random.integers(SHORTEST, LONGEST + 1, count).tolist()
        self._prompts = [self.prefix + draw(length - SHARED) for length in lengths]
        tokens = tuple(range(10, 10 + num_shown))
        self.identifiers = Identifiers(
            texts=tuple(identifier_texts("letters", num_shown)),
            nodes=(Node((), tokens),),
            paths=tuple(((0, place),) for place in range(num_shown)),
            emitted=tuple((token,) for token in tokens),
        )

    def build(
        self, history: Sequence[int], shown: Sequence[int], hint: int | None = None,
        labels: Sequence[int] | None = None,
    ) -> list[int]:  # fmt: skip
        """The prompt of the history's last item."""
        return self._prompts[history[-1] % len(self._prompts)]


def config_7b(num_layers: int = 32) -> LlamaConfig:
    """The shape: Mistral's, 218 M weights a layer."""
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4096, intermediate_size=14_336,
        num_hidden_layers=num_layers, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=4096, tie_word_embeddings=False, use_cache=True,
        bos_token_id=None, eos_token_id=None,  # random weights would end an answer at random
    )  # fmt: skip


def nf4_linear(linear: nn.Linear) -> nn.Module:
    """The same weights in 4 bits, with the settings that teachers are loaded with."""
    packed = Linear4bit(
        linear.in_features, linear.out_features, bias=False, quant_type="nf4",
        compute_dtype=torch.bfloat16, compress_statistics=True, device="meta",
    )  # fmt: skip
    make: Any = Params4bit  # its arguments are those of its __new__
    weight = make(linear.weight.data, quant_type="nf4", compress_statistics=True, module=packed)
    packed.weight = weight.to(linear.weight.device)  # quantises
    return packed


def random_model(
    config: LlamaConfig,
    quantization: str,
    device: torch.device,
    seed: int,
    pack: Callable[[nn.Linear], nn.Module] = nf4_linear,
) -> LlamaForCausalLM:
    """Random bf16 weights, made and quantised on the device, one layer after the other.

    Args:
        config: The shape.
        quantization: nf4 or bf16.
        device: Where they are made.
        seed: Of the weights; on one device the same seed gives the same model.
        pack: Quantises a linear layer for nf4.
    """
    torch.manual_seed(seed)
    layers, config.num_hidden_layers = config.num_hidden_layers, 0
    with _made_in_bf16(device):
        model = LlamaForCausalLM(config)
    for index in range(layers):
        with _made_in_bf16(device):
            layer = LlamaDecoderLayer(config, index)
        for parent in list(layer.modules()) if quantization == "nf4" else ():
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, pack(child))
        model.model.layers.append(layer)
    config.num_hidden_layers = layers
    return model.requires_grad_(False).eval()


@contextlib.contextmanager
def _made_in_bf16(device: torch.device) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
