"""Medians, percentiles and intervals of raw samples: pure functions of plain numbers, standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

Z95 = NormalDist().inv_cdf(0.975)

# Samples needed before a percentile may be printed, at confidence 0.99 (MLPerf LoadGen, early_stopping.cc).
MIN_SAMPLES: Mapping[float, int] = {90: 64, 95: 130, 99: 662, 99.9: 6636}

# torch.utils.benchmark warns from these ratios of interquartile range to median on.
NOISY_RELATIVE_IQR = 0.10
GROSS_RELATIVE_IQR = 0.25

# The second half of the visits against the first: pyperf calls a change of more than this unsteady.
DRIFT = 0.10
# Two modes: a gap between neighbouring samples of the middle 90 % that is this share of the median, with a tenth of the samples on either
# side. Half of torch's limit for noise, since a gap of that width in the middle of a sample is no accident.
GAP = 0.05
SIDE = 0.10


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


def grouped_median_ci95(groups: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """95 % interval of the median of all samples, where those of one group are not independent of each other.

    The wider of two, both from order statistics: that of the samples, and that of the groups' medians. None below six groups.
    """
    by_group = median_ci95([median(group) for group in groups])
    by_sample = median_ci95([sample for group in groups for sample in group])
    return (min(by_group[0], by_sample[0]), max(by_group[1], by_sample[1])) if by_group and by_sample else None


def percentile(samples: Sequence[float], percent: float) -> float | None:
    """The percentile, or None where there are too few samples to claim it (see MIN_SAMPLES)."""
    return quantile(samples, percent / 100) if len(samples) >= MIN_SAMPLES[percent] else None


def relative_iqr(samples: Sequence[float]) -> float:
    """Interquartile range divided by the median."""
    return (quantile(samples, 0.75) - quantile(samples, 0.25)) / median(samples)


def warnings(visits: Sequence[Sequence[float]], flagged: int = 0) -> tuple[str, ...]:
    """What the samples of a measurement say against it, visit by visit in the order of time."""
    samples = [sample for visit in visits for sample in visit]
    if not samples:
        return (f"all {flagged} samples were flagged",)
    found = []
    spread = relative_iqr(samples)
    if spread > NOISY_RELATIVE_IQR:
        word = "grossly noisy" if spread > GROSS_RELATIVE_IQR else "noisy"
        found.append(f"{word}: interquartile range is {spread:.0%} of the median")
    change = drift([median(visit) for visit in visits])
    if change is not None:
        found.append(f"drift: later visits took {change:+.0%}")
    centres = modes(samples)
    if centres is not None:
        found.append(f"two modes: {centres[0] * 1e6:.4g} and {centres[1] * 1e6:.4g} us")
    interval = grouped_median_ci95(visits)
    if interval and not found and interval[1] - interval[0] > 2 * NOISY_RELATIVE_IQR * median(samples):
        low, high = (bound / median(samples) - 1 for bound in interval)
        found.append(f"visits disagree: the interval reaches from {low:+.0%} to {high:+.0%}")
    if flagged:
        found.append(f"{flagged} samples flagged and left out")
    return tuple(found)


def drift(medians: Sequence[float]) -> float | None:
    """Relative change from the first half of the visits to the second, or None where there is no drift.

    A trend: the change exceeds DRIFT, and all visits of one half are on one side of the median of all (of at least six visits).
    """
    half = len(medians) // 2
    if half < 3:
        return None
    first, second, middle = median(medians[:half]), median(medians[-half:]), median(medians)
    change = second / first - 1
    rising = change > DRIFT and max(medians[:half]) <= middle <= min(medians[-half:])
    falling = change < -DRIFT and min(medians[:half]) >= middle >= max(medians[-half:])
    return change if rising or falling else None


def modes(samples: Sequence[float]) -> tuple[float, float] | None:
    """The medians below and above the widest gap in the samples, or None where no gap divides them."""
    ordered = sorted(samples)
    side = math.ceil(SIDE * len(ordered))
    if side < 2 or len(ordered) < 20:
        return None
    gap, at = max((ordered[i] - ordered[i - 1], i) for i in range(side, len(ordered) - side + 1))
    return (median(ordered[:at]), median(ordered[at:])) if gap > GAP * median(ordered) else None


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
