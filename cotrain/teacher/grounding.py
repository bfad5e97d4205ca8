"""From what was written to items: how near a text is to the titles of a catalogue."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cotrain.data.item_text import identity, kept, load_sentence_encoder
from cotrain.teacher.memory import TokenBudget
from cotrain.teacher.passes import Passes

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Items whose distances are computed at once, in float64.
_CHUNK = 65_536


class SentenceEmbedder:
    """Texts by a sentence encoder, which is loaded when the first one comes.

    Args:
        encoder: Known asset, local folder or hub name.
        device: Where it computes.
    """

    def __init__(self, encoder: str, device: torch.device):
        self.encoder, self.device = encoder, device
        self._model: SentenceTransformer | None = None

    @property
    def version(self) -> str:
        """Of its weights; they do not change."""
        return self.encoder

    def embed(self, texts: list[str]) -> Tensor:
        """(n, E) float32; raises as `load_sentence_encoder`."""
        if self._model is None:
            self._model = load_sentence_encoder(self.encoder, self.device)
        vectors = self._model.encode(
            texts, batch_size=64, convert_to_tensor=True, show_progress_bar=False
        )
        return vectors.float().cpu()

    def embed_catalogue(self, texts: list[str]) -> Tensor:
        """The same, kept over runs."""
        return kept(texts, identity(self.encoder), lambda: self.embed(texts))


class TeacherEmbedder:
    """Texts by the teacher itself: the mean of its last states.

    Args:
        passes: The decoder.
        budget: Tokens of one pass.
        encode: Texts to tokens.
    """

    def __init__(
        self, passes: Passes, budget: TokenBudget,
        encode: Callable[[Sequence[str]], list[list[int]]],
    ):  # fmt: skip
        self.passes, self.budget, self.encode = passes, budget, encode

    @property
    def version(self) -> str:
        """Of its weights; an adapter that is trained moves the catalogue too."""
        return self.passes.backbone.adapter_version

    def embed(self, texts: list[str]) -> Tensor:
        """(n, H) float32."""
        return mean_states(self.passes, self.budget, self.encode(texts))

    embed_catalogue = embed


@torch.no_grad()
def mean_states(
    passes: Passes, budget: TokenBudget, texts: Sequence[list[int]], progress: str | None = None
) -> Tensor:
    """(n, H) float32 mean last state of each text, in groups that fit memory.

    Args:
        passes: The decoder.
        budget: Tokens of one pass.
        texts: As tokens.
        progress: What a bar says; none: no bar.
    """
    vectors = torch.empty(len(texts), passes.backbone.hidden_size)
    bar = tqdm(total=len(texts), desc=progress, unit="items", leave=False, disable=progress is None)

    def embed(rows: list[int]) -> None:
        vectors[rows] = passes.mean_states([texts[row] for row in rows]).cpu()

    with bar:
        for rows, done in budget.groups([len(text) for text in texts], embed):
            if not done:
                raise MemoryError("There is no memory to read one title with the teacher.")
            bar.update(len(rows))
    return vectors


class Grounding:
    """Nearness of texts to the titles of a catalogue.

    With D the L2 distance of embeddings, scaled to [0, 1] over the catalogue, and W a weight scaled
    to [0, 1], the distance of an item is D / (1 + W)^γ.

    Args:
        titles: Of items 1..V-1, as they would be written.
        embedder: Of titles and texts alike.
        weights: (V,) of each item index, such as how often it was taken; none: all the same.
        power: γ.

    Source: BIGRec (Bao et al., "A Bi-Step Grounding Paradigm for Large Language Models in
    Recommendation Systems", 2023). The paper embeds with the language model, `TeacherEmbedder`
    here; weights by a student are scaled over the candidates that it scored, not over all items.
    """

    def __init__(
        self, titles: Sequence[str], embedder: SentenceEmbedder | TeacherEmbedder,
        weights: np.ndarray | None = None, power: float = 1.0,
    ):  # fmt: skip
        self.titles, self.embedder, self.power = list(titles), embedder, power
        self.weights = None
        if weights is not None:
            self.weights = min_max(torch.as_tensor(weights[1:], dtype=torch.float32))  # (V-1,)
        self._vectors: tuple[str, Tensor] | None = None

    def vectors(self) -> Tensor:
        """(V-1, E) float32 embeddings of the titles, by the embedder as it now is; computed when
        first asked for, and again when its weights have changed."""
        version = self.embedder.version
        if self._vectors is None or self._vectors[0] != version:
            self._vectors = (version, self.embedder.embed_catalogue(self.titles))
        return self._vectors[1]

    def ground(self, texts: Sequence[str]) -> Tensor:
        """How far items are from texts.

        Args:
            texts: B texts, none empty.

        Returns:
            (B, V) float32, weighted; padding, item 0, is infinitely far.
        """
        distances = self._scaled(texts)
        if self.weights is not None:
            distances = weighted(distances, self.weights, self.power)
        return torch.nn.functional.pad(distances, (1, 0), value=torch.inf)

    def logits(
        self, texts: Sequence[str], candidates: Tensor, scores: Tensor | None = None
    ) -> Tensor:
        """Scores of a few items for each text.

        They are (mean D − D / (1 + W)^γ) / standard deviation of D, both over the catalogue: by how
        many of its deviations a candidate is nearer than the average item. Distances in [0, 1]
        would make any softmax of them nearly even. Over the catalogue and not over the candidates,
        because then a title that was hit stands out and candidates that are all as far as any other
        item stay even, which a scale of each row's own would blow up to the same certainty.

        Args:
            texts: B texts, none empty.
            candidates: (B, K) item indices.
            scores: (B, K) W in place of the catalogue's weights, on any scale.

        Returns:
            (B, K) float32.
        """
        distances = self._scaled(texts)  # (B, V-1)
        centre = distances.mean(1, keepdim=True)
        spread = distances.std(1, keepdim=True, correction=0)
        own = distances.gather(1, candidates - 1)
        if scores is not None:
            own = weighted(own, min_max(scores), self.power)
        elif self.weights is not None:
            own = weighted(own, self.weights[candidates - 1], self.power)
        return (centre - own) / torch.where(spread > 0, spread, 1.0)

    def _scaled(self, texts: Sequence[str]) -> Tensor:
        """(B, V-1) float32 distances, 0 of the nearest item and 1 of the farthest."""
        # In float64, because a product of matrices leaves 1e-3 of a distance that is 0.
        vectors, own = self.vectors(), self.embedder.embed(list(texts)).double()
        parts = [torch.cdist(own, chunk.double()) for chunk in vectors.split(_CHUNK)]
        return min_max(torch.cat(parts, dim=1)).float()


def min_max(values: Tensor) -> Tensor:
    """(…, n) values scaled to [0, 1] over the last dimension; zeros where all are equal."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return (values - low) / torch.where(high > low, high - low, 1.0)


def weighted(distances: Tensor, weights: Tensor, power: float) -> Tensor:
    """D / (1 + W)^γ of (…, n) distances and weights in [0, 1]."""
    return distances / (1 + weights) ** power
