"""A process reward model: how likely a reasoning that begins like this leads to the right item.

A logistic head on the teacher's last hidden state at the end of a step, read with the adapter that
it was trained with; a fraction of a millisecond beside the pass itself.

Source: Wang et al., "Math-Shepherd", ACL 2024, whose step labels are shares of completions as well;
they train a whole language model where we train a head, because the state is there already.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cotrain.errors import CheckpointError, TeacherError
from cotrain.teacher.backbone import Backbone
from cotrain.teacher.memory import TokenBudget
from cotrain.teacher.passes import Passes

FORMAT = "cotrain-process-reward-1"
_NAME = "process_reward"


@dataclass(frozen=True)
class Head:
    """Weights of the logistic regression.

    Attributes:
        weight: (H,) float32, on standardised states.
        bias: () float32.
        mean, scale: (H,) float32 of the states it was trained on.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """(N,) logits of (N, H) states."""
        return ((states.float() - self.mean) / self.scale) @ self.weight + self.bias


class ProcessReward:
    """The head and the backbone that it reads.

    Args:
        head: Weights, on the CPU.
        passes: The decoder.
        budget: Tokens of one pass.
        adapter: Name of the adapter under which it was trained; none: the model as it is.
    """

    def __init__(self, head: Head, passes: Passes, budget: TokenBudget, adapter: str | None = None):
        self.head, self.passes, self.budget, self.adapter = head, passes, budget, adapter

    @torch.no_grad()
    def states(self, prefixes: Sequence[list[int]]) -> Tensor:
        """(N, H) float32 states, on the CPU, at the end of each token sequence."""
        states = torch.zeros(len(prefixes), self.passes.backbone.hidden_size)

        def read(rows: list[int]) -> None:
            states[rows] = self.passes.last_states([prefixes[row] for row in rows]).float().cpu()

        with using(self.passes.backbone, self.adapter):
            for _, done in self.budget.groups([len(prefix) for prefix in prefixes], read):
                if not done:
                    raise MemoryError("There is no memory to score one step of a reasoning.")
        return states

    def score(self, prefixes: Sequence[list[int]]) -> Tensor:
        """(N,) float32 in [0, 1] of prompts that go on to the end of a step."""
        return torch.sigmoid(self.head(self.states(prefixes)))

    @classmethod
    def load(cls, folder: Path, passes: Passes, budget: TokenBudget) -> "ProcessReward":
        """Read what `save_head` wrote beside an adapter.

        Raises:
            TeacherError: There is none, or it is of another model.
        """
        try:
            facts = json.loads((folder / "process_reward.json").read_text("utf-8"))
            tensors = load_file(folder / "process_reward.safetensors")
            head = Head(**{name: tensors[name] for name in ("weight", "bias", "mean", "scale")})
            wrong, model = facts["format"] != FORMAT, facts["model"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise TeacherError(
                f"The process reward model {folder} cannot be read: {error}. Expected a folder "
                "that scripts/train_teacher.py process-reward wrote."
            ) from error
        backbone = passes.backbone
        if wrong or len(head.weight) != backbone.hidden_size or model != backbone.name:
            raise TeacherError(
                f"The process reward model {folder} was trained on {model!r} with "
                f"states of {len(head.weight)}, not on {backbone.name!r} with "
                f"{backbone.hidden_size}. Train one for this teacher."
            )
        name = None
        if (folder / "adapter").is_dir():
            before, trained = backbone.adapter, trainable(backbone)
            try:
                backbone.load_adapter(str(folder / "adapter"), _NAME)
            finally:
                _back(backbone, before, trained)
            name = _NAME
        return cls(head, passes, budget, name)


def save_head(head: Head, folder: Path, model: str, facts: dict[str, float]) -> None:
    """Write the head of a process reward model.

    Raises:
        CheckpointError: The disk refused.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.contiguous() for name, value in vars(head).items()},
            folder / "process_reward.safetensors",
        )
        content = {"format": FORMAT, "model": model, **facts}
        (folder / "process_reward.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot write {folder}: {error}. Free space there.") from error


class using:
    """Inside, the backbone has another adapter on; outside, what it had, trainable as it was."""

    def __init__(self, backbone: Backbone, adapter: str | None):
        self._backbone, self._adapter = backbone, adapter
        self._before: tuple[str | None, list[torch.nn.Parameter]] = (None, [])

    def __enter__(self) -> None:
        self._before = (self._backbone.adapter, trainable(self._backbone))
        self._backbone.use_adapter(self._adapter)

    def __exit__(self, *exception: object) -> None:
        _back(self._backbone, *self._before)


def trainable(backbone: Backbone) -> list[torch.nn.Parameter]:
    """Weights that require a gradient."""
    return [parameter for parameter in backbone.model.parameters() if parameter.requires_grad]


def _back(backbone: Backbone, adapter: str | None, parameters: list[torch.nn.Parameter]) -> None:
    backbone.use_adapter(adapter)
    for parameter in parameters:
        parameter.requires_grad_(True)
