"""A LoRA adapter to train on a frozen backbone, and how it gets to disk (QLoRA where the backbone
is in 4 bits; Dettmers et al., 2023)."""

import os
import shutil
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from cotrain.errors import CheckpointError, ConfigError, TeacherError
from cotrain.finetune_settings import LoraSettings
from cotrain.runtime.seeding import replayed, torch_state
from cotrain.teacher.backbone import Backbone, quiet_loading

NAME = "trained"


class TrainableAdapter:
    """The adapter `trained` of a backbone, the only thing in it that requires a gradient.

    Args:
        backbone: Gets it, and uses it.
        settings: Of a new one.
        seed: Of a new one's weights, the same on every process.
        start: Folder or hub name of an adapter to go on from; none: a new one, which changes
            nothing until it is trained.

    Attributes:
        parameters: Its weights by name.

    Raises:
        TeacherError: `start` does not fit.
        ConfigError: More layers than there are, or none that could be adapted.
    """

    def __init__(
        self, backbone: Backbone, settings: LoraSettings, seed: int, start: str | None = None
    ):
        self.backbone = backbone
        if start is not None:
            folder = Path(start).expanduser()
            backbone.load_adapter(str(folder) if folder.is_dir() else start, NAME)
        else:
            device = backbone.device
            with replayed(torch_state(device), device):
                torch.manual_seed(seed)
                backbone.model.add_adapter(_config(backbone, settings), NAME)
            backbone.model.eval()  # its dropout begins as in training
            backbone.adapters[NAME] = ""
            backbone.use_adapter(NAME)
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in backbone.model.named_parameters():
            if f".{NAME}." in name:
                # In bf16 a step of a learning rate's size would be rounded away.
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
                self.parameters[name] = parameter
        self.changed("start")

    def changed(self, version: str) -> None:
        """Tell the backbone that these are other weights now."""
        self.backbone.adapters[NAME] = f"training {version}"

    def train(self, mode: bool = True) -> None:
        """Switch the adapter's dropout, and whether activations are computed again; the backbone's
        own dropout stays off."""
        for name, module in self.backbone.model.named_modules():
            if name.rpartition(".")[2] == NAME and isinstance(module, nn.Dropout):
                module.train(mode)
            elif isinstance(module, GradientCheckpointingLayer):
                module.training = mode  # of this module alone, which checkpoints only in training

    def state(self) -> dict[str, Tensor]:
        """A copy of the weights, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor], version: str) -> None:
        """Put a copy of weights back."""
        for name, value in state.items():
            self.parameters[name].copy_(value)
        self.changed(version)

    def reset(self, seed: int) -> None:
        """Weights of a new adapter, as if nothing had been learned."""
        device = self.backbone.device
        with replayed(torch_state(device), device), torch.no_grad():
            torch.manual_seed(seed)
            for module in self.backbone.model.modules():
                start = getattr(module, "reset_lora_parameters", None)
                if start is not None:
                    start(NAME, True)
        self.changed("start")

    def save(self, folder: Path) -> None:
        """Write it as peft does, whole or not at all; replaces what is there.

        Raises:
            CheckpointError: The disk refused; what was there before is untouched.
        """
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        replaced = folder.with_name(f".{folder.name}.replaced.tmp")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.parent.mkdir(parents=True, exist_ok=True)
            self.backbone.model.set_adapter(NAME)
            with quiet_loading():
                self.backbone.model.save_pretrained(temporary)
            # Of the backbone, and loaded from there.
            (temporary / "generation_config.json").unlink(missing_ok=True)
            shutil.rmtree(replaced, ignore_errors=True)
            if folder.exists():
                folder.rename(replaced)
            temporary.rename(folder)
            shutil.rmtree(replaced, ignore_errors=True)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"Cannot write the adapter {folder}: {error}. Free space or permissions there, "
                "then run the same command again."
            ) from error


def _config(backbone: Backbone, settings: LoraSettings) -> LoraConfig:
    text = backbone.model.config.get_text_config()
    layers = int(text.num_hidden_layers)
    if settings.last_layers is not None and settings.last_layers > layers:
        raise ConfigError(
            f"lora.last_layers is {settings.last_layers}, but {backbone.name!r} has {layers} "
            "layers; expected at most that many."
        )
    head = backbone.model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and _kind(name, settings.modules)
    }
    if not names:
        raise TeacherError(
            f"teacher.model {backbone.name!r} has no linear layers of kind {settings.modules}; set "
            "lora.modules all, or choose another teacher.model."
        )
    last = settings.last_layers
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.dropout,
        target_modules=sorted(names),
        layers_to_transform=None if last is None else list(range(layers - last, layers)),
        task_type="CAUSAL_LM",
        base_model_name_or_path=backbone.name,
    )


def _kind(name: str, wanted: str) -> bool:
    in_attention = "attn" in name or "attention" in name
    return wanted == "all" or (wanted == "attention") == in_attention
