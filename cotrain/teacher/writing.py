"""Text that the teacher writes: greedy, row by row until each is done."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cotrain.teacher.passes import Passes, Steps

# Rows are asked whether they are done, and finished ones left out, only every so many steps.
_CHECK_EVERY = 8


@dataclass(frozen=True)
class Written:
    """What one row wrote.

    Attributes:
        tokens: Without the token that ends an answer.
        ended: Whether the model stopped by itself, rather than at the limit.
    """

    tokens: list[int]
    ended: bool


@torch.no_grad()
def write(
    passes: Passes,
    prompts: Sequence[list[int]],
    max_tokens: int,
    done: Callable[[list[int]], bool] = lambda _: False,
) -> tuple[list[Written], Tensor]:
    """Continue prompts by the likeliest token each time.

    Args:
        passes: The decoder.
        prompts: B prompts.
        max_tokens: Of each row.
        done: Whether these tokens of a row are all that is wanted; asked now and then.

    Returns:
        B answers, and (B, H) the state that chose each row's first token.
    """
    backbone = passes.backbone
    stops = torch.tensor(sorted(backbone.stop_ids), dtype=torch.int64)
    steps = Steps(passes, prompts, max_tokens)
    first = steps.state
    tokens: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    active = torch.arange(len(prompts))
    for step in range(1, max_tokens + 1):
        chosen = backbone.logits(steps.state).argmax(1).cpu()
        stopped = torch.isin(chosen, stops)
        for row, token, stop in zip(
            active.tolist(), chosen.tolist(), stopped.tolist(), strict=True
        ):
            ended[row] |= stop
            if not ended[row]:
                tokens[row].append(token)
        if step == max_tokens:
            break
        over = torch.tensor([ended[row] for row in active.tolist()])
        if step % _CHECK_EVERY == 0:
            over |= torch.tensor([done(tokens[row]) for row in active.tolist()])
        if over.all():
            break
        # A smaller batch is a copy of the cache: not for every row that ends.
        if step % _CHECK_EVERY == 0 and over.any():
            going_on = (~over).nonzero().flatten()
            steps.keep(going_on)
            active, chosen = active[going_on], chosen[going_on]
        steps.advance(chosen[:, None])
    return [Written(*row) for row in zip(tokens, ended, strict=True)], first
