"""What repeated runs of two arms say about their difference. Pure.

Two things vary: which users there are, and the seed. The bootstrap over users speaks of the first,
the spread of the differences over seeds of the second; neither contains the other."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

from cotrain.evaluation.compare import Lift, paired_bootstrap


@dataclass(frozen=True)
class Spread:
    """One number of every seed.

    Attributes:
        by_seed: The numbers.
        mean: Over seeds.
        sd: Standard deviation over seeds, with n − 1; None for one seed.
        ci95: Student's interval of the mean; None for one seed.
    """

    by_seed: dict[int, float]
    mean: float
    sd: float | None
    ci95: tuple[float, float] | None


@dataclass(frozen=True)
class Difference:
    """An arm minus the baseline, over the seeds that both have.

    Attributes:
        users: Of every user's mean over seeds, by paired bootstrap over users.
        seeds: Of every seed's mean over users.
    """

    users: Lift
    seeds: Spread


def spread(by_seed: Mapping[int, float]) -> Spread:
    """Mean, standard deviation and interval of a few numbers.

    Args:
        by_seed: At least one.

    Source: Student, "The probable error of a mean", 1908.
    """
    values = list(by_seed.values())
    count, mean = len(values), math.fsum(values) / len(values)
    if count < 2:
        return Spread(dict(by_seed), mean, None, None)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(student_t.ppf(0.975, count - 1)) * sd / math.sqrt(count)
    return Spread(dict(by_seed), mean, sd, (mean - half, mean + half))


def difference(
    arm: Mapping[int, np.ndarray],
    baseline: Mapping[int, np.ndarray],
    samples: int = 10_000,
    seed: int = 0,
) -> Difference | None:
    """How far an arm is from the baseline, paired by user and by seed.

    Args:
        arm: (n,) per-user metric of each seed.
        baseline: The same of the baseline, users in the same order.
        samples: Resamples of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        None where no seed is in both.
    """
    shared = [number for number in arm if number in baseline]
    if not shared:
        return None
    means = [np.mean([of[number] for number in shared], axis=0) for of in (arm, baseline)]
    return Difference(
        paired_bootstrap(means[0], means[1], samples, seed),
        spread({number: float((arm[number] - baseline[number]).mean()) for number in shared}),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, each raised so that the chance of any false alarm stays below the
    level at which they are read.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979: the smallest is
    multiplied by their number, the next by one less, and so on; none falls below one before it.

    Args:
        p_values: One a test, in any order.

    Returns:
        In the same order, at most 1.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted
