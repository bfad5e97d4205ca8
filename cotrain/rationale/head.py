"""W_r: from a student's state to where the reason for what comes next lies among rationales."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cotrain.errors import DataError
from cotrain.rationale.store import MatchedRationales

FOLDER = "rationale_head"
_FILE = "head.safetensors"
# Rationales that mean and covariance are estimated from, at most.
_SAMPLE = 20_000

Targets = Literal["plain", "centred", "whitened"]


class RationaleHead(nn.Module):
    """A linear map and the space that it leads to.

    Args:
        student_size: D.
        mean: (E,) subtracted from rationale vectors; zeros where they are taken as they are.
        whitening: (E, E) applied after that, or None.
    """

    mean: Tensor
    whitening: Tensor | None

    def __init__(self, student_size: int, mean: Tensor, whitening: Tensor | None = None):
        super().__init__()
        self.linear = nn.Linear(student_size, len(mean))
        nn.init.normal_(self.linear.weight, std=student_size**-0.5)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean", mean.float())
        self.register_buffer("whitening", None if whitening is None else whitening.float())

    def forward(self, states: Tensor) -> Tensor:
        """(m, D) user states → (m, E), of any length."""
        return self.linear(states)

    @torch.no_grad()
    def targets(self, vectors: Tensor) -> Tensor:
        """(m, E) rationale vectors → (m, E) of unit length, where `forward` should lead."""
        vectors = vectors - self.mean
        if self.whitening is not None:
            vectors = vectors @ self.whitening
        return F.normalize(vectors, dim=1)

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write `head.safetensors`, with `facts` (JSON) in it."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.contiguous().cpu() for name, value in self.state_dict().items()}
        save_file(tensors, folder / _FILE, {"facts": json.dumps(facts)})

    @classmethod
    def load(cls, folder: Path) -> tuple["RationaleHead", dict[str, Any]]:
        """Undo `save`: the head, and the facts.

        Raises:
            DataError: There is none, or it cannot be read.
        """
        path = folder / _FILE
        if not path.is_file():
            raise DataError(
                f"There is no {path}: the run was trained without rationales. Train one with "
                "--distill.rationales STORE."
            )
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                facts = json.loads((file.metadata() or {})["facts"])
            mean, whitening = tensors["mean"], tensors.get("whitening")
            if whitening is not None and whitening.shape != (len(mean), len(mean)):
                raise ValueError(f"it whitens {tuple(whitening.shape)} and has {len(mean)} means")
            head = cls(tensors["linear.weight"].shape[1], mean, whitening)
            head.load_state_dict(tensors)
        except (SafetensorError, OSError, LookupError, ValueError, RuntimeError) as error:
            raise DataError(f"{path} cannot be read: {error}. Train the run anew.") from error
        return head.eval(), facts


def new_head(matched: MatchedRationales, student_size: int, targets: Targets) -> RationaleHead:
    """An untrained head for a store.

    Args:
        matched: The rationales of the training data.
        student_size: D.
        targets: As `distill.rdr_targets`. `whitened` multiplies by Σ^-½ of a shrunk covariance, so
            that a few thousand rationales in 384 dimensions do not become noise.

    Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance
    matrices", 2004; Su et al., "Whitening Sentence Representations", 2021.
    """
    dimension = matched.store.dimension
    if targets == "plain":
        return RationaleHead(student_size, torch.zeros(dimension))
    rows = matched.rows
    if len(rows) > _SAMPLE:
        rows = np.sort(np.random.default_rng(0).choice(rows, _SAMPLE, replace=False))
    vectors = matched.store.vectors(rows).double()
    mean = vectors.mean(0)
    if targets == "centred":
        return RationaleHead(student_size, mean)
    # Here, because it takes a second that other runs should not pay.
    from sklearn.covariance import ledoit_wolf

    covariance, _ = ledoit_wolf(vectors.numpy())
    values, directions = torch.linalg.eigh(torch.from_numpy(covariance))
    # The second bound: rationales that are all the same have no width in any direction.
    scale = values.clamp(min=max(1e-12 * float(values.max()), 1e-20)).rsqrt()
    return RationaleHead(student_size, mean, directions * scale @ directions.T)
