"""What makes vectors of texts: a sentence encoder, or the language model that teaches."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cotrain.config import EncodeConfig, TeacherConfig
from cotrain.data.item_text import load_sentence_encoder
from cotrain.errors import TeacherError
from cotrain.teacher.backbone import load_backbone
from cotrain.teacher.memory import TokenBudget
from cotrain.teacher.passes import Passes


@dataclass(frozen=True)
class TextEncoder:
    """What makes vectors of texts.

    Attributes:
        name: As the user named it; for a teacher with what was loaded.
        dimension: E.
        encode: n texts to (n, E) float32 on the CPU.
    """

    name: str
    dimension: int
    encode: Callable[[list[str]], Tensor]


def load_encoder(config: EncodeConfig, device: torch.device) -> TextEncoder:
    """What the settings name.

    Raises:
        AssetError, DataError, TeacherError: It cannot be loaded.
    """
    if config.encoder == "teacher":
        return _teacher(config.teacher, device)
    model = load_sentence_encoder(config.encoder, device)

    def encode(texts: list[str]) -> Tensor:
        found = model.encode(
            texts, batch_size=config.batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return found.float().cpu()

    return TextEncoder(config.encoder, encode(["size"]).shape[1], encode)


def _teacher(settings: TeacherConfig, device: torch.device) -> TextEncoder:
    """The mean of a language model's last states over a text."""
    assert settings.model is not None  # checked with the settings
    backbone = load_backbone(
        settings.model, settings.quantization, device, settings.compute, settings.adapter
    )
    passes = Passes(backbone)
    # More than 2048 at once only leaves a CPU's cache.
    budget = TokenBudget(settings.batch_tokens or (2048 if device.type == "cpu" else 8192))

    def encode(texts: list[str]) -> Tensor:
        tokens: list[list[int]] = backbone.tokenizer(
            texts, add_special_tokens=False, truncation=True, max_length=backbone.max_context_tokens
        ).input_ids
        vectors = torch.empty(len(texts), backbone.hidden_size)

        def embed(rows: list[int]) -> None:
            vectors[rows] = passes.mean_states([tokens[row] for row in rows]).cpu()

        for rows, done in budget.groups([len(row) for row in tokens], embed):
            if not done:
                raise TeacherError(
                    f"There is no memory to read one rationale of {len(tokens[rows[0]]):,} tokens "
                    f"with {settings.model!r}. Take a smaller model or teacher.quantization."
                )
        return vectors

    name = f"teacher {settings.model} {backbone.quantization} {backbone.compute} "
    return TextEncoder(name + backbone.adapter_version, backbone.hidden_size, encode)
