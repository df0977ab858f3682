"""Shares and means with their 95 % intervals."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

Z = 1.959964  # of a normal distribution's middle 95 %
DRAWS = 2000  # of a bootstrap


@dataclass(frozen=True)
class Estimate:
    """A share by Wilson's interval, or a mean by a bootstrap's: `interval` says which."""

    value: float
    low: float
    high: float
    n: int
    interval: str


def share(hits: Iterable[bool]) -> Estimate:
    """How many of n are true; Wilson's score interval, which holds for small n and near 0 and 1."""
    hits = [bool(hit) for hit in hits]
    n, k = len(hits), sum(hits)
    if not n:
        return Estimate(math.nan, 0.0, 1.0, 0, "Wilson")
    p, z = k / n, Z * Z / n
    middle = (p + z / 2) / (1 + z)
    half = math.sqrt(p * (1 - p) * z + z * z / 4) / (1 + z)
    return Estimate(p, max(middle - half, 0.0), min(middle + half, 1.0), n, "Wilson")


def mean(values: Sequence[float]) -> Estimate:
    """The mean; its interval by drawing the values anew, with a fixed seed."""
    numbers = torch.tensor(list(values), dtype=torch.float64)
    if not len(numbers):
        return Estimate(math.nan, math.nan, math.nan, 0, "bootstrap")
    seeded = torch.Generator().manual_seed(0)
    draws = torch.randint(len(numbers), (DRAWS, len(numbers)), generator=seeded)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = numbers[draws].mean(-1).quantile(ends).tolist()
    return Estimate(statistics.fmean(numbers.tolist()), low, high, len(numbers), "bootstrap")
