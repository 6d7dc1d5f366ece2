"""Medians, percentiles and intervals of raw samples: pure functions of plain numbers, standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

Z95 = NormalDist().inv_cdf(0.975)

# Samples needed before a percentile may be printed, at confidence 0.99 (MLPerf LoadGen, early_stopping.cc).
MIN_SAMPLES = {90: 64, 99: 662}

# torch.utils.benchmark warns from this ratio of interquartile range to median on.
NOISY_RELATIVE_IQR = 0.10


def quantile(samples: Sequence[float], share: float) -> float:
    """The `share` quantile (0 to 1), linear between neighbours (Hyndman and Fan's type 7, numpy's default)."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def median(samples: Sequence[float]) -> float:
    """The middle sample."""
    return quantile(samples, 0.5)


def median_ci95(samples: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the median from order statistics; None below six samples, where none exists.

    No distribution is assumed: ranks n/2 -+ z sqrt(n)/2 (Conover, Practical Nonparametric Statistics, 3.2),
    rounded outwards. With five samples the full range covers the median with 93.75 % only.
    """
    n = len(samples)
    if n < 6:
        return None
    ordered = sorted(samples)
    half_width = Z95 * math.sqrt(n) / 2
    low = max(math.floor(n / 2 - half_width), 1)
    high = min(math.ceil(n / 2 + half_width) + 1, n)
    return (ordered[low - 1], ordered[high - 1])


def percentile(samples: Sequence[float], percent: int) -> float | None:
    """The percentile, or None where there are too few samples to claim it (see MIN_SAMPLES)."""
    return quantile(samples, percent / 100) if len(samples) >= MIN_SAMPLES[percent] else None


def relative_iqr(samples: Sequence[float]) -> float:
    """Interquartile range divided by the median."""
    return (quantile(samples, 0.75) - quantile(samples, 0.25)) / median(samples)


def wilson_ci95(successes: int, trials: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share (Wilson 1927): sound near 0 and 1, unlike the normal one."""
    share = successes / trials
    scale = 1 + Z95**2 / trials
    centre = (share + Z95**2 / (2 * trials)) / scale
    half_width = Z95 / scale * math.sqrt(share * (1 - share) / trials + Z95**2 / (4 * trials**2))
    return (max(0.0, centre - half_width), min(1.0, centre + half_width))


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test (McNemar 1947): a sign test on the pairs that only one of two got right.

    1.0 without such pairs: nothing speaks against equal accuracy.
    """
    pairs = only_first + only_second
    tail = sum(math.comb(pairs, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / (1 << pairs))
