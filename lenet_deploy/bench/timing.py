"""The timing policy: blocks of launches between two readings of one clock, warm-up, and when enough was measured.

Pure logic over a `launch` callable and a clock, so that tests can drive it with a clock of their own.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from lenet_deploy.order_statistics import grouped_median_ci95, median, quantile

Clock = Callable[[], float]

MAX_TIMER_SHARE = 0.001  # reading the clock costs less than this share of a block (torch.utils.benchmark)
CLOCK_READINGS = 1001

# pyperf, _worker.py: launches are steady when two neighbouring halves of at least 20 values agree.
HALF = 20
MAX_WARMUP_LAUNCHES = 300
OUTLIER = 1.5  # the first value is at most this many interquartile ranges above the second half's third quartile
MEAN_CHANGE = (-0.50, 0.10)  # of the first half from the second, in shares of it
MAD_CHANGE = 0.10
QUARTILE_CHANGE = 0.05

PRECISE = 0.005  # half of the 95 % interval, as a share of the median
MIN_VISITS = 6  # fewer have no 95 % interval (order_statistics.median_ci95)

# nvbench, stdrel_criterion.cxx: more samples do not help once the relative standard deviation stays the same. There a sample is a launch;
# here it is the median of a visit, since the launches of one visit share the moment and would agree at once. So the window is shorter.
MIN_SAMPLES = 10
MIN_ACCUMULATED_S = 0.5
TRAILING = 12  # visits
SETTLED = 0.05  # relative standard deviation of the estimates in the trailing window


@dataclass(frozen=True)
class Calibration:
    """What one case needs before its times count.

    Attributes:
        launches_per_block: launches between two readings of the clock.
        warmup_launches: launches spent until the case was steady.
        launch_s: seconds of one launch, roughly.
        steady: whether the rule was met, rather than the cap or the limit.
    """

    launches_per_block: int
    warmup_launches: int
    launch_s: float
    steady: bool


def timer_overhead_s(clock: Clock = time.perf_counter) -> float:
    """Median seconds between two readings of the clock with nothing in between."""
    readings = [clock() for _ in range(CLOCK_READINGS)]
    return median([after - before for before, after in pairwise(readings)])


def calibrate(launch: Callable[[], object], limit_s: float, overhead_s: float, clock: Clock = time.perf_counter) -> Calibration:
    """Launch until it is steady by pyperf's rule, or the cap or `limit_s` ends it; and choose the block length.

    `launch` is one complete launch: started and waited for.
    """
    times: list[float] = []
    start = clock()
    settled = False
    while not settled and len(times) < MAX_WARMUP_LAUNCHES:
        before = clock()
        launch()
        times.append(clock() - before)
        settled = steady(times)
        if clock() - start > limit_s:
            break
    launch_s = max(0.0, median(times[-HALF:]) - overhead_s)  # each was timed alone, with one reading of the clock
    launches = max(1, math.ceil(overhead_s / (MAX_TIMER_SHARE * launch_s))) if launch_s > 0 else 1
    return Calibration(launches, len(times), launch_s, settled)


def steady(times: Sequence[float]) -> bool:
    """Whether the last 2 x 20 times agree with each other, half by half (pyperf's rule)."""
    if len(times) < 2 * HALF:
        return False
    first, second = times[-2 * HALF : -HALF], times[-HALF:]
    low, high = quantile(second, 0.25), quantile(second, 0.75)
    if first[0] > high + OUTLIER * (high - low):
        return False
    if not MEAN_CHANGE[0] <= _change(statistics.fmean(first), statistics.fmean(second)) <= MEAN_CHANGE[1]:
        return False
    if abs(_change(_deviation(first), _deviation(second))) > MAD_CHANGE:
        return False
    return all(abs(_change(quantile(first, share), quantile(second, share))) <= QUARTILE_CHANGE for share in (0.25, 0.75))


def time_blocks(launch: Callable[[], object], launches: int, limit_s: float, clock: Clock = time.perf_counter) -> list[float]:
    """Seconds per launch of each block of `launches` launches, one after another until `limit_s` have passed; at least one block."""
    times: list[float] = []
    before = start = clock()
    repeat = range(launches)
    while True:
        for _ in repeat:
            launch()
        after = clock()
        times.append((after - before) / launches)
        if after - start >= limit_s:
            return times
        before = after


def stop_reason(visits: Sequence[Sequence[float]], seconds: float) -> str | None:
    """Why a case needs no more visits, `precise` or `settled` (see `records.STOPS`), or None where it does.

    Args:
        visits: seconds per launch, by visit.
        seconds: what these samples took altogether.
    """
    samples = list(chain.from_iterable(visits))
    if len(visits) < MIN_VISITS or len(samples) < MIN_SAMPLES or seconds < MIN_ACCUMULATED_S:
        return None
    middle, interval = median(samples), grouped_median_ci95(visits)
    if interval and max(interval[1] - middle, middle - interval[0]) <= PRECISE * middle:
        return "precise"
    return "settled" if settled([median(visit) for visit in visits]) else None


def settled(medians: Sequence[float]) -> bool:
    """Whether the noise between visits is known: its relative standard deviation has varied little over the last TRAILING visits."""
    if len(medians) < MIN_VISITS + TRAILING:
        return False
    so_far = (medians[:count] for count in range(len(medians) - TRAILING + 1, len(medians) + 1))
    noise = [statistics.stdev(each) / statistics.fmean(each) for each in so_far]
    return statistics.pstdev(noise) <= SETTLED * noise[-1]


def _change(first: float, second: float) -> float:
    """Relative change from the second to the first; 0 where both are zero."""
    return (first - second) / second if second else (0.0 if first == second else math.inf)


def _deviation(values: Sequence[float]) -> float:
    """Median absolute deviation."""
    middle = median(values)
    return median([abs(value - middle) for value in values])
