"""A frozen causal language model: loading, adapters, and logits of a few tokens only."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from cotrain.assets import resolve_model
from cotrain.errors import TeacherError, some_of
from cotrain.teacher import cpu
from cotrain.teacher.tokenizer import load_tokenizer


@dataclass
class Backbone:
    """The language model as the ranker uses it; nothing in it ever requires a gradient.

    Attributes:
        model: The causal LM, in eval mode.
        tokenizer: Its tokenizer.
        name: As the user named it.
        quantization: nf4, int8, bf16 or fp32.
        compute: What products are computed in, bf16 or fp32.
        compiled: Whether its layers are compiled.
        adapters: Version of each adapter by name; a version is a hash of what the adapter holds.
        adapter: The one in use; None: the model as it is.
    """

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    name: str
    quantization: str
    compute: str = "fp32"
    compiled: bool = False
    adapters: dict[str, str] = field(default_factory=dict)
    adapter: str | None = None

    @property
    def device(self) -> torch.device:
        """Where prompts must be."""
        return self.model.device

    @property
    def decoder(self) -> nn.Module:
        """The model without its output head."""
        return self.model.get_decoder()

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

    @property
    def stop_ids(self) -> set[int]:
        """Tokens that end an answer."""
        of_model = getattr(self.model.generation_config, "eos_token_id", None)
        listed = of_model if isinstance(of_model, list) else [of_model]
        return {token for token in [*listed, self.tokenizer.eos_token_id] if token is not None}

    @property
    def adapter_version(self) -> str:
        """Tells verdicts of different weights apart."""
        return "base" if self.adapter is None else self.adapters[self.adapter]

    def load_adapter(self, source: str, name: str = "default") -> None:
        """Put a LoRA adapter onto the quantised weights, and use it.

        Args:
            source: Folder written by peft's `save_pretrained`, or a hub name.
            name: To switch by; an adapter of that name is replaced.

        Raises:
            TeacherError: There is no adapter, it is no LoRA, or it does not fit this model. Another
                that was in use stays so.
        """
        config = self._adapter_config(source)
        before = self.adapter
        self._remove_adapter(name)
        try:
            with quiet_loading():
                loaded = self.model.load_adapter(
                    source, adapter_name=name, ignore_mismatched_sizes=True
                )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            self._back_to(before, without=name)
            raise self._no_adapter(source, error) from error
        # Where the name is part of one of the model's own, those count as missing too.
        missing = [key for key in loaded.missing_keys if name in key.split(".")]
        mismatched = [key for key, *_ in loaded.mismatched_keys]
        if unplaced := {*missing, *loaded.unexpected_keys, *mismatched}:
            self._back_to(before, without=name)
            raise TeacherError(
                f"The adapter {source!r} does not fit {self.name!r}: no place of its shape for "
                f"{some_of(sorted(unplaced))}. Expected an adapter trained on this model."
            )
        self.model.eval()
        # Its settings too: the same weights with another lora_alpha are another adapter.
        settings = json.dumps(config.to_dict(), sort_keys=True, default=_stable)
        digest = hashlib.sha256(settings.encode())
        for key, value in sorted(self.model.get_adapter_state_dict(name).items()):
            digest.update(key.encode())
            digest.update(value.detach().float().cpu().numpy().tobytes())
        self.adapters[name] = digest.hexdigest()[:16]
        self.use_adapter(name)

    def _adapter_config(self, source: str) -> PeftConfig:
        """Of what can be switched off again, and leaves the output head's rows to be read.

        Raises:
            TeacherError: There is none, or not of a LoRA of other layers alone.
        """
        try:
            with quiet_loading():
                config = PeftConfig.from_pretrained(source)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._no_adapter(source, error) from error
        head = self.model.get_output_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is head)
        if config.peft_type != PeftType.LORA:
            problem = f"is of kind {config.peft_type}, not LORA"
        elif whole := getattr(config, "modules_to_save", None):
            problem = f"replaces whole layers, {some_of(sorted(whole))}"
        elif check_target_module_exists(config, name):
            problem = f"changes the output head {name!r}, of which single rows are read"
        else:
            return config
        raise TeacherError(
            f"The adapter {source!r} {problem}. Merge it into {self.name!r} (peft's "
            "merge_and_unload), save that, and set it as teacher.model."
        )

    def _no_adapter(self, source: str, error: Exception) -> TeacherError:
        return TeacherError(
            f"The adapter {source!r} cannot be put onto {self.name!r}: {error}\nExpected a folder "
            "that peft's save_pretrained wrote, or a hub name, of a LoRA adapter trained on this "
            "model."
        )

    def _remove_adapter(self, name: str) -> None:
        if name in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter(name)
        self.adapters.pop(name, None)

    def _back_to(self, adapter: str | None, without: str) -> None:
        """After an adapter could not be loaded, or only in part."""
        self._remove_adapter(without)
        self.use_adapter(adapter if adapter in self.adapters else None)

    def use_adapter(self, name: str | None) -> None:
        """Switch to a loaded adapter, or to none.

        Raises:
            TeacherError: No adapter of that name was loaded.
        """
        if name is not None and name not in self.adapters:
            raise TeacherError(
                f"No adapter {name!r} was loaded, but {some_of(sorted(self.adapters)) or 'none'}."
            )
        if name is not None:
            self.model.enable_adapters()
            self.model.set_adapter(name)
            self.model.requires_grad_(False)  # peft takes the one in use to be trained
        elif self.adapters:
            self.model.disable_adapters()
        self.adapter = name

    def token_logits(self, states: Tensor, token_ids: Tensor) -> Tensor:
        """Output logits of a few tokens, from only their rows of the output head.

        Args:
            states: (B, H).
            token_ids: (K,) int64.

        Returns:
            (B, K) float32, equal to those columns of the model's own logits.
        """
        head = self._head()
        bias = None if head.bias is None else head.bias[token_ids]
        return self._scaled(F.linear(states.to(head.weight.dtype), head.weight[token_ids], bias))

    def logits(self, states: Tensor) -> Tensor:
        """(B, vocabulary) float32 output logits of (B, H) states."""
        head = self._head()
        return self._scaled(head(states.to(head.weight.dtype)))

    def _head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)  # checked when it was loaded
        return head

    def _scaled(self, logits: Tensor) -> Tensor:
        """What some families do to logits before the softmax: Cohere, Granite, Gemma 2."""
        config = self.model.config.get_text_config()
        logits = logits.float() * (getattr(config, "logit_scale", None) or 1.0)
        logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits


def load_backbone(
    name: str,
    quantization: str,
    device: torch.device,
    compute: Literal["auto", "fp32", "bf16"] = "auto",
    adapter: str | None = None,
) -> Backbone:
    """Load a causal LM for inference only.

    Weights are read, and quantised, one by one; there are never two copies of the model.

    Args:
        name: Known asset, local folder or hub name.
        quantization: nf4, int8 (both bitsandbytes), bf16 or fp32.
        device: Where the weights go, whole.
        compute: What products are computed in. auto: bf16 but for fp32 weights, for int8 on a CPU,
            and for nf4 on a CPU without bf16 matrix units.
        adapter: Folder or hub name of a LoRA adapter.

    Raises:
        AssetError: A folder without weights, or an asset that cannot be fetched.
        TeacherError: The name leads to no causal language model, or not to one whose logits can be
            computed for a few tokens alone; the adapter does not fit.
    """
    source = resolve_model(name)
    on_cpu = device.type == "cpu"
    if compute == "auto":
        narrow = {"fp32": False, "bf16": True, "int8": not on_cpu}
        narrow["nf4"] = not on_cpu or cpu.has_bf16_units()
        compute = "bf16" if narrow[quantization] else "fp32"
    # On a CPU only products are narrowed, below.
    dtype = torch.float32 if on_cpu or compute == "fp32" else torch.bfloat16
    # On its own, because loading weights may take minutes and this does not.
    tokenizer, _ = load_tokenizer(name)
    try:
        with quiet_loading():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                quantization_config=_quantization_config(quantization, dtype),
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
    has_head = isinstance(model.get_output_embeddings(), nn.Linear)
    if not has_head or model.get_decoder() is model:
        missing = "decoder of its own" if has_head else "output head"
        raise TeacherError(
            f"teacher.model {name!r} has no {missing} to read identifiers from. Choose another "
            "teacher.model."
        )
    model.requires_grad_(False).eval()
    cpu.return_freed_memory()
    if on_cpu and compute == "bf16":
        cpu.compute_in_bf16(model)
        cpu.return_freed_memory()
    elif on_cpu:
        cpu.use_packed_4bit_in_fp32(model)
    backbone = Backbone(model, tokenizer, name, quantization, compute)
    _check_logits(backbone)
    if adapter is not None:
        folder = Path(adapter).expanduser()
        backbone.load_adapter(str(folder) if folder.is_dir() else adapter)
    return backbone


@torch.no_grad()
def _check_logits(backbone: Backbone) -> None:
    """Some models do to their logits what no other does; such a one is refused and not misread.

    Raises:
        TeacherError: Logits of the last state are not the model's own.
    """
    vocabulary = backbone.model.config.get_text_config().vocab_size
    ids = torch.arange(1, 9, device=backbone.device)[None] % vocabulary
    own = backbone.model(input_ids=ids, use_cache=False).logits[:, -1].float()
    if not own.isfinite().all():
        return  # every verdict says so
    state = backbone.decoder(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
    ours = backbone.token_logits(state, torch.arange(own.shape[1], device=backbone.device))
    gap = (ours - own).norm() / own.norm()
    # int8 and bf16 round otherwise for other shapes of the same product.
    if not gap < 0.05:
        raise TeacherError(
            f"teacher.model {backbone.name!r}: its logits are not its output head times its last "
            f"hidden state (relative gap {gap:.2g}), so a few of them cannot be computed alone. "
            "Choose another teacher.model."
        )


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


def _stable(value: Any) -> Any:
    """What has no form in JSON, the same in every process."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the libraries' bars and hints: a run prints its own lines about what it loads."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
