"""Forward passes with a graph through the adapter: states of chosen positions, never logits over
the vocabulary of a whole prompt."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cotrain.teacher.backbone import Backbone
from cotrain.teacher.passes import padded, to_device


def states_at(
    backbone: Backbone, prompts: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
) -> Tensor:
    """Last hidden states, after the final norm.

    Args:
        backbone: With an adapter that is trained.
        prompts: B token sequences. Padded on the right: under causal attention nothing after a
            token can reach it.
        places: For each the positions whose states are wanted, any number.

    Returns:
        (N, H), prompts one after another.
    """
    ids = to_device(padded(prompts), backbone.device)
    hidden = backbone.decoder(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, H)
    rows = [row for row, of_row in enumerate(places) for _ in of_row]
    columns = [place for of_row in places for place in of_row]
    return hidden[torch.tensor(rows, device=hidden.device), torch.tensor(columns).to(hidden.device)]


def identifier_logits(
    backbone: Backbone, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]
) -> Tensor:
    """(B, K) float32 logits of identifiers after the last token of each prompt."""
    states = states_at(backbone, prompts, [[len(prompt) - 1] for prompt in prompts])
    return backbone.token_logits(states, torch.tensor(token_ids, device=states.device))


def token_losses(backbone: Backbone, states: Tensor, targets: Sequence[int]) -> Tensor:
    """(N,) cross-entropy in nats of the token after each of (N, H) states."""
    wanted = torch.tensor(targets, device=states.device)
    return F.cross_entropy(backbone.logits(states), wanted, reduction="none")
