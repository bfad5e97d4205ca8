"""Text that the teacher writes, likeliest or drawn, row by row until each is done."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cotrain.errors import TeacherError
from cotrain.teacher.passes import Passes, Steps, to_device

# Rows are asked whether they are done, and finished ones left out, only every so many steps.
_CHECK_EVERY = 8
# Tokens among which the end of a nucleus is looked for first; a sort of all costs 50 times as much.
_FIRST_LOOK = 64


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    A row uses one uniform number for each token, from a generator of its own, and takes the token
    at which the probabilities, added up in the vocabulary's order, pass it. What it writes depends
    on its prompt and seed and not on the rows it is with (but for rounding, which may move a
    probability past the number).

    Attributes:
        temperature: Logits are divided by it; 0: the likeliest token each time.
        top_p: Tokens are drawn from the likeliest ones that together have at least this share, the
            fewest that do (and any that are as likely as the last of them). Found after the
            temperature. 1: from all. Source: Holtzman et al., The Curious Case of Neural Text
            Degeneration, 2020.
        seeds: One for each row, of numbers from 0.

    Raises:
        TeacherError: A temperature below 0, or a share outside (0, 1].
    """

    temperature: float
    top_p: float
    seeds: Sequence[tuple[int, ...]]

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise TeacherError(
                f"Tokens cannot be drawn with temperature {self.temperature} and top_p "
                f"{self.top_p}. Expected temperature ≥ 0 and 0 < top_p ≤ 1."
            )


@dataclass(frozen=True)
class Written:
    """What one row wrote.

    Attributes:
        tokens: Without the token that ends an answer.
        ended: Whether the model stopped by itself, rather than at the limit.
        logprob: Mean log-probability, in nats, of what was written, the token that ended it
            included, under the model itself: at temperature 1 and among all tokens, however they
            were drawn. 0 if nothing was written; not finite where the model's logits are not.
    """

    tokens: list[int]
    ended: bool
    logprob: float


@torch.no_grad()
def write(
    passes: Passes,
    prompts: Sequence[list[int]],
    max_tokens: int,
    done: Callable[[list[int]], bool] = lambda _: False,
    sampling: Sampling | None = None,
    copies: int = 1,
) -> tuple[list[Written], Tensor]:
    """Continue prompts token by token.

    Args:
        passes: The decoder.
        prompts: B prompts.
        max_tokens: Of each row.
        done: Whether these tokens of a row are all that is wanted; asked now and then.
        sampling: How tokens are drawn; None: the likeliest each time.
        copies: How many answers to each prompt, which is read once for all of them.

    Returns:
        B × copies answers, those to one prompt beside each other, and (B × copies, H) the state
        that chose each one's first token.

    Raises:
        TeacherError: Not one seed for each answer; a model that cannot be continued.
    """
    backbone = passes.backbone
    stops = torch.tensor(sorted(backbone.stop_ids), dtype=torch.int64)
    size = len(prompts) * copies
    numbers = _uniform_numbers(sampling, size, max_tokens)
    steps = Steps(passes, prompts, max_tokens)
    if copies > 1:
        steps.keep(torch.arange(len(prompts)).repeat_interleave(copies))
    first = steps.state
    tokens: list[list[int]] = [[] for _ in range(size)]
    logprobs: list[list[float]] = [[] for _ in range(size)]
    ended = [False] * size
    active = torch.arange(size)
    for step in range(1, max_tokens + 1):
        logits = backbone.logits(steps.state)
        chosen, logprob = _choose(logits, sampling, numbers[active, step - 1])
        stopped = torch.isin(chosen, stops)
        for row, token, value, stop in zip(
            active.tolist(), chosen.tolist(), logprob.tolist(), stopped.tolist(), strict=True
        ):
            if not ended[row]:
                logprobs[row].append(value)
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
    means = [sum(values) / len(values) if values else 0.0 for values in logprobs]
    return [Written(*row) for row in zip(tokens, ended, means, strict=True)], first


def _uniform_numbers(sampling: Sampling | None, rows: int, count: int) -> Tensor:
    """(B, count) float32 in [0, 1), each row from its own generator; nothing of them if greedy."""
    if sampling is None or sampling.temperature == 0:
        return torch.zeros(rows, 1).expand(rows, count)
    if len(sampling.seeds) != rows:
        raise TeacherError(
            f"{rows} answers are to be drawn with {len(sampling.seeds)} seeds. Expected one "
            "for each."
        )
    drawn = np.stack([np.random.default_rng(seed).random(count) for seed in sampling.seeds])
    # Cut to what float32 holds and not rounded, which could make a 1 of it.
    return torch.from_numpy((np.floor(drawn * 2**24) / 2**24).astype(np.float32))


def _choose(logits: Tensor, sampling: Sampling | None, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's next token, and its log-probability under the model.

    Args:
        logits: (B, V) float32.
        sampling: How to draw; None: the likeliest.
        numbers: (B,) uniform in [0, 1).

    Returns:
        (B,) int64 and (B,) float32, on the CPU.
    """
    logprobs = logits.log_softmax(1)
    if sampling is None or sampling.temperature == 0:
        chosen = logits.argmax(1)
    else:
        probs = (logprobs / sampling.temperature).softmax(1)
        if sampling.top_p < 1:
            least = _least_of_nucleus(probs, sampling.top_p, _FIRST_LOOK)
            probs = torch.where(probs >= least, probs, 0)
        chosen = _place_of(to_device(numbers, probs.device), probs)
    logprob = logprobs.gather(1, chosen[:, None])[:, 0]
    # Both at once: each transfer waits for the device to finish.
    both = torch.stack([chosen.double(), logprob.double()]).cpu()
    return both[0].long(), both[1].float()


def _place_of(numbers: Tensor, weights: Tensor) -> Tensor:
    """(B,) places where (B, V) weights, added up, pass (B,) shares of their total in [0, 1)."""
    passed = weights.cumsum(1)  # (B, V)
    # Less than the total after rounding too, so never at a weight of 0, nor beyond the end.
    shares = numbers[:, None] * passed[:, -1:]
    places = torch.searchsorted(passed, shares, right=True)[:, 0]
    return places.clamp(max=weights.shape[1] - 1)  # what is no number passes nothing


def _least_of_nucleus(probs: Tensor, top_p: float, looked_at: int) -> Tensor:
    """(B, 1) the smallest of the largest of (B, V) that together have `top_p`, which are looked for
    among so many first."""
    vocabulary = probs.shape[1]
    looked_at = min(looked_at, vocabulary)
    largest = probs.topk(looked_at, dim=1).values
    before = (largest.cumsum(1) < top_p).sum(1, keepdim=True)  # (B, 1)
    least = largest.gather(1, before.clamp(max=looked_at - 1))
    unfound = (before[:, 0] == looked_at).nonzero().flatten()
    if len(unfound) and looked_at < vocabulary:
        least[unfound] = _least_of_nucleus(probs[unfound], top_p, 16 * looked_at)
    return least
