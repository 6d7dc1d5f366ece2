"""How many times as fast: ratios of visits with a bootstrap interval, paired inside one run and unpaired between two.

A bootstrap of few values is too narrow. Both intervals are therefore expanded percentile intervals (Hesterberg, What Teachers Should Know
About the Bootstrap, The American Statistician 69, 2015): the percentiles are taken as far out as Student's t and the bias of a bootstrap's
variance would put them. With six visits that is nearly the range of what was drawn, with thirty little more than the plain interval.
Percentiles are the same whether a ratio or its logarithm is resampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from lenet_deploy.bench_records import Measurement, Speedup, Visit
from lenet_deploy.order_statistics import Z95, median

if TYPE_CHECKING:
    from numpy import ndarray

    Floats: TypeAlias = ndarray[Any, Any]

# What `Measurement.by_visit` gives: each visit with its times or its one ratio.
Visits: TypeAlias = Sequence[tuple[Visit, Sequence[float]]]

# Visits, or pairs of them, below which no interval is given: the range of five values covers the median of what they come from with 93.75 %
# only, so that no resampling of five can claim 95 % (see `order_statistics.median_ci95`).
MIN_VISITS = 6
# Six visits put 0.24 % of the resamples beyond each end of the interval: twelve of these.
RESAMPLES = 4_999
SEED = 0  # the same files give the same interval


def paired_ratios(over: Measurement, under: Measurement) -> tuple[tuple[Visit, tuple[float]], ...]:
    """Median time of `over` divided by that of `under`, for each round of each process in which both have a visit that counts."""
    medians = {(visit.process, visit.round): median(times) for visit, times in under.by_visit}
    return tuple(
        (visit, (median(times) / medians[visit.process, visit.round],))
        for visit, times in over.by_visit
        if (visit.process, visit.round) in medians
    )


def speedups(measurements: Sequence[Measurement], baseline: str) -> tuple[Speedup, ...]:
    """How many times as fast as the baseline each other variant is, on the same device, at the same batch size, in the same scope.

    Visits of the same round of the same process are divided by each other, since they share what the machine was doing, and the pairs are
    resampled whole, processes first (see `median_ratio_ci95`). The baseline itself has entries of 1.0; a measurement without a pair has
    none, so a baseline that was not measured gives nothing. The interval of fewer than MIN_VISITS pairs is None.

    Args:
        measurements: of one run.
        baseline: name of the variant that is 1.0.
    """
    bases = {_workload(each): each for each in measurements if each.variant == baseline}
    found = []
    for each in measurements:
        base = bases.get(_workload(each))
        pairs = paired_ratios(base, each) if base else ()
        if pairs:
            middle = median([ratio for _, (ratio,) in pairs])
            found.append(Speedup(each.variant, baseline, each.batch_size, each.scope, middle, _median_ci95(pairs), len(pairs)))
    return tuple(found)


def median_ratio_ci95(base_visits: Visits, head_visits: Visits) -> tuple[float, float] | None:
    """95 % interval of the pooled median of `head_visits` divided by that of `base_visits`; None where either has fewer than MIN_VISITS.

    The two sides are resampled independently of each other. On each, processes are drawn first and then as many visits of each as it made
    (Davison and Hinkley, Bootstrap Methods and their Application, 3.8), because visits of one process share its memory layout. At batch 1,
    processes were measured to differ by 0.3 %, and visits of one process by 0.1 to 0.8 %, bursts aside. Drawing visits alone covered the
    truth in 66 to 91 % of simulated runs of that kind, this in 85 to 96 %, and in 79 to 85 % where three processes differ by twice what
    visits do. Visits of a single process cannot say how processes differ.
    """
    if min(len(base_visits), len(head_visits)) < MIN_VISITS:
        return None
    import numpy as np

    streams = np.random.default_rng(SEED).spawn(2)
    base, head = (_pooled_medians(*side) for side in zip((base_visits, head_visits), streams, strict=True))
    tail = min(map(_tail, (base_visits, head_visits)))
    low, high = np.quantile(head / base, (tail, 1 - tail))
    return (float(low), float(high))


def _workload(measurement: Measurement) -> tuple[str, int, str]:
    return (measurement.device, measurement.batch_size, measurement.scope)


def _tail(resampled: Visits) -> float:
    """The share of resamples beyond each end of a 95 % interval.

    Of a mean of n visits from k processes, which do not differ, the variance over resamples is 2 - 1/k - k/n times the true one: too little
    for a single process, and more than enough for several with several visits each. Student's t is divided by the root of it, and nothing
    is taken off the plain percentiles.
    """
    from scipy.special import ndtr, stdtrit

    visits, processes = len(resampled), len({visit.process for visit, _ in resampled})
    expanded = stdtrit(visits - 1, 0.025) / math.sqrt(2 - 1 / processes - processes / visits)
    return float(ndtr(min(-Z95, expanded)))


def _median_ci95(pairs: Visits) -> tuple[float, float] | None:
    """95 % interval of the median of ratios, one a pair of visits; None below MIN_VISITS."""
    if len(pairs) < MIN_VISITS:
        return None
    import numpy as np

    tail = _tail(pairs)
    low, high = np.quantile(_pooled_medians(pairs, np.random.default_rng(SEED)), (tail, 1 - tail))
    return (float(low), float(high))


def _pooled_medians(visits: Visits, generator: Any) -> Floats:
    """The median of all times of each resample, shape (RESAMPLES,).

    Found by bisection over the sorted times: how many times of a resample are at most some value follows from how many of each visit are,
    so that no resample is ever laid out or sorted.
    """
    import numpy as np

    counts = _counts([visit.process for visit, _ in visits], generator)
    times = [np.sort(np.asarray(each, dtype=float)) for _, each in visits]
    sizes = np.array([len(each) for each in times])
    pool = np.unique(np.concatenate(times))
    # The median of a mixture is not below its parts' lowest median, nor above their highest.
    lowest, highest = min(each[(len(each) - 1) // 2] for each in times), max(each[len(each) // 2] for each in times)
    candidates = pool[np.searchsorted(pool, lowest) : np.searchsorted(pool, highest) + 1]
    below = np.stack([np.searchsorted(each, candidates, side="right") for each in times], axis=1).astype(float)

    def first(counts: Floats, reached: Callable[[Floats, Floats], Floats]) -> Floats:
        """The place of the first candidate at or below which `reached` as many times lie, of half as many, for each resample."""
        half = counts @ sizes / 2
        low, high = np.zeros(len(counts), dtype=int), np.full(len(counts), len(candidates) - 1)
        for _ in range(len(candidates).bit_length()):
            middle = (low + high) // 2
            good = reached(np.einsum("rv,rv->r", counts, below[middle]), half)
            low, high = np.where(good, low, middle + 1), np.where(good, middle, high)
        return high

    places = first(counts, np.greater_equal)
    medians: Floats = candidates[places]
    # Where exactly half of an even number of times lies there, the median is halfway to the next time.
    even = np.einsum("rv,rv->r", counts, below[places]) == counts @ sizes / 2
    medians[even] = (medians[even] + candidates[first(counts[even], np.greater)]) / 2
    return medians


def _counts(processes: Sequence[int], generator: Any) -> Floats:
    """How often each resample holds each visit, shape (RESAMPLES, visits): processes drawn first, then visits of each."""
    import numpy as np

    visits = len(processes)
    order = np.argsort(processes, kind="stable")
    _, starts, sizes = np.unique(np.asarray(processes)[order], return_index=True, return_counts=True)
    drawn = generator.integers(len(sizes), size=(RESAMPLES, len(sizes), 1))
    places = np.arange(sizes.max())
    inside = (generator.random((RESAMPLES, len(sizes), len(places))) * sizes[drawn]).astype(int)
    held = np.arange(RESAMPLES)[:, None, None] * visits + order[starts[drawn] + inside]
    counts: Floats = np.bincount(held[places < sizes[drawn]], minlength=RESAMPLES * visits).reshape(RESAMPLES, visits).astype(float)
    return counts
