"""From the teacher's decision state to the student's space, and whether either collapses."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Projector(nn.Module):
    """W_p on the decision state, standardised by the mean and variance of all rows seen so far.

    Args:
        teacher_size: H.
        student_size: D.
    """

    mean: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, teacher_size: int, student_size: int):
        super().__init__()
        self.linear = nn.Linear(teacher_size, student_size)
        nn.init.normal_(self.linear.weight, std=teacher_size**-0.5)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean", torch.zeros(teacher_size, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(teacher_size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def observe(
        self, states: Tensor, valid: Tensor, reduce: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        """Take decision states into the running mean and variance.

        Args:
            states: (B, H); rows that are not valid are left out.
            valid: (B,) bool.
            reduce: Sums a tensor over all processes; called once whatever `valid` holds.

        Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
        Sample Variances", 1979. Centred on the mean so far, which keeps the sums exact.
        """
        centred = (states.double() - self.mean) * valid[:, None]
        moments = torch.stack([centred.sum(0), centred.square().sum(0)])
        count = valid.sum().double().expand(1, moments.shape[1])
        first, second, added = reduce(torch.cat([moments, count]))
        total = self.count + added[0]
        shift = first / total.clamp(min=1)
        self.squares += second - total * shift.square()
        self.mean += shift
        self.count.copy_(total)

    def forward(self, states: Tensor) -> Tensor:
        """(B, H) decision states → (B, D)."""
        variance = self.squares / self.count.clamp(min=1)
        standardised = (states.double() - self.mean) / (variance + 1e-6).sqrt()
        return self.linear(standardised.to(self.linear.weight.dtype))


def effective_rank(states: Tensor) -> float:
    """Number of directions that (N, D) states really use, 1 to min(N, D); 0 without any variance.

    The exponential of the entropy of the normalised singular values of the centred states.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    if len(states) < 2:
        return 0.0
    values = torch.linalg.svdvals(states.double() - states.double().mean(0))
    total = values.sum()
    if total <= 0:
        return 0.0
    shares = values / total
    return float(torch.exp(-torch.xlogy(shares, shares).sum()))


class RecentRows:
    """The last `capacity` rows of a stream of vectors, for meters that need a sample."""

    def __init__(self, capacity: int = 512):
        self.capacity = capacity
        self.rows: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Append (n, D) rows."""
        rows = rows.detach().float().cpu()
        kept = rows if self.rows is None else torch.cat([self.rows, rows])
        self.rows = kept[-self.capacity :].clone()

    def effective_rank(self) -> float:
        """Of the rows held."""
        return 0.0 if self.rows is None else effective_rank(self.rows)
