"""A frozen causal language model: loading, last hidden state, and logits of a few tokens only."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from cotrain.assets import resolve_model
from cotrain.errors import TeacherError, some_of


@dataclass(frozen=True)
class Backbone:
    """The language model as the ranker uses it; nothing in it ever requires a gradient.

    Attributes:
        model: The causal LM, in eval mode.
        tokenizer: Its tokenizer.
        name: As the user named it.
        quantization: nf4, int8, bf16 or fp32.
    """

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    name: str
    quantization: str

    @property
    def device(self) -> torch.device:
        """Where prompts must be."""
        return self.model.device

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.model.config.get_text_config().hidden_size

    @property
    def max_context_tokens(self) -> int:
        """Longest prompt the model was made for."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit or self.tokenizer.model_max_length

    @property
    def num_parameters(self) -> int:
        """Weights, counting a packed 4-bit weight as one."""
        return self.model.num_parameters()

    @torch.no_grad()
    def decision_states(self, prompts: list[list[int]]) -> Tensor:
        """Last hidden state, after the final norm, at the last token of each prompt.

        Prompts are padded on the right: under causal attention nothing after a token can reach it,
        so no attention mask is needed and the fast causal kernel serves. No cache is kept, and
        neither the states of other layers nor logits over the vocabulary are computed.

        Returns:
            (B, H) in the model's compute dtype.
        """
        hidden = self._states(prompts)  # (B, T, H)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        return hidden[torch.arange(len(prompts), device=self.device), last]

    @torch.no_grad()
    def mean_states(self, texts: list[list[int]]) -> Tensor:
        """Mean of each text's states after the final norm, (B, H) float32; a text embedding."""
        hidden = self._states(texts).float()
        lengths = torch.tensor([len(text) for text in texts], device=self.device)[:, None]
        real = torch.arange(hidden.shape[1], device=self.device) < lengths  # (B, T)
        return torch.einsum("bth,bt->bh", hidden, real.float()) / lengths

    def _states(self, prompts: list[list[int]]) -> Tensor:
        """(B, T, H) of right-padded token ids; meaningless at padding."""
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        decoder = self.model.get_decoder()
        return decoder(input_ids=ids.to(self.device), use_cache=False).last_hidden_state

    @torch.no_grad()
    def token_logits(self, states: Tensor, token_ids: Tensor) -> Tensor:
        """Output logits of a few tokens, from only their rows of the output head.

        Args:
            states: (B, H).
            token_ids: (K,) int64.

        Returns:
            (B, K) float32, equal to those columns of the model's own logits.
        """
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)  # checked when it was loaded
        bias = None if head.bias is None else head.bias[token_ids]
        logits = F.linear(states.to(head.weight.dtype), head.weight[token_ids], bias).float()
        config = self.model.config.get_text_config()
        # What some families do to logits before the softmax: Cohere, Granite, Gemma 2.
        logits = logits * (getattr(config, "logit_scale", None) or 1.0)
        logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits


def load_backbone(name: str, quantization: str, device: torch.device) -> Backbone:
    """Load a causal LM for inference only.

    Args:
        name: Known asset, local folder or hub name.
        quantization: nf4, int8 (both bitsandbytes), bf16 or fp32. Quantised weights are computed
            with in bf16 on a GPU and in fp32 on a CPU, where bf16 units are rare.
        device: Where the weights go, whole.

    Raises:
        AssetError: A folder without weights, or an asset that cannot be fetched.
        TeacherError: The name leads to no causal language model.
    """
    source = resolve_model(name)
    compute_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(quantization, compute_dtype)
    try:
        with _quiet_loading():
            # Checked on its own, because loading weights may take minutes and this does not.
            AutoConfig.from_pretrained(source)
            tokenizer = AutoTokenizer.from_pretrained(source)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                quantization_config=_quantization_config(quantization, compute_dtype),
                device_map={"": device},
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError) as error:
        raise TeacherError(
            f"teacher.model {name!r} cannot be loaded as a causal language model: {error}\n"
            "Expected a known asset, a folder written by save_pretrained with its tokenizer, or "
            "the name of such a model on the hub."
        ) from error
    model, loading = loaded
    if loading["missing_keys"]:  # transformers fills them with random numbers
        raise TeacherError(
            f"teacher.model {name!r} is no trained causal language model: its weights lack "
            f"{some_of(sorted(loading['missing_keys']))}. Expected a decoder with its output head."
        )
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise TeacherError(f"teacher.model {name!r} has no output head to read identifiers from.")
    model.requires_grad_(False).eval()
    _compute_in_fp32_on_cpu(model)
    return Backbone(model, tokenizer, name, quantization)


def _quantization_config(
    quantization: str, compute_dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return None


def _compute_in_fp32_on_cpu(model: nn.Module) -> None:
    """Where a CPU has bf16 instructions, bitsandbytes would repack 4-bit weights for a kernel that
    computes in bf16. It ignores the compute dtype and is half as fast on whole prompts as unpacking
    the weights and multiplying in fp32 (530 against 1,000 tokens/s for 135 M parameters)."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without the libraries' bars and hints: a run prints its own lines about what it loads."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
