"""The timing policy: calibrate, warm up, then blocks of launches between two readings of one clock.

Pure logic over a `launch` callable and a clock, so that tests can drive it with a clock of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lenet_deploy.order_statistics import median

Clock = Callable[[], float]

MAX_TIMER_SHARE = 0.001  # reading the clock costs less than this share of a block (torch.utils.benchmark)
MIN_WARMUP_LAUNCHES = 20  # pyperf compares halves of at least 20 values
MAX_WARMUP_LAUNCHES = 300  # pyperf's cap
STEADY_CHANGE = 0.10  # pyperf: a second half within 10 % of the first is steady
CLOCK_READINGS = 1001


@dataclass(frozen=True)
class Calibration:
    """What one case needs before its times count.

    Attributes:
        launches_per_block: launches between two readings of the clock.
        warmup_launches: launches spent until the case was steady.
        launch_s: seconds of one launch, roughly.
    """

    launches_per_block: int
    warmup_launches: int
    launch_s: float


def timer_overhead_s(clock: Clock = time.perf_counter) -> float:
    """Median seconds between two readings of the clock with nothing in between."""
    readings = [clock() for _ in range(CLOCK_READINGS)]
    return median([after - before for before, after in pairwise(readings)])


def time_block(launch: Callable[[], object], launches: int, clock: Clock = time.perf_counter) -> float:
    """Seconds of `launches` launches, each complete before the next begins."""
    start = clock()
    for _ in range(launches):
        launch()
    return clock() - start


def calibrate(launch: Callable[[], object], limit_s: float, overhead_s: float, clock: Clock = time.perf_counter) -> Calibration:
    """Warm up until launches are steady, and choose the block length.

    Steady: of the last 2 x 20 launches, the medians of the halves differ by at most 10 %; else the cap or `limit_s` ends it.
    """
    times: list[float] = []
    start = clock()
    while len(times) < MAX_WARMUP_LAUNCHES and not _steady(times):
        times.append(time_block(launch, 1, clock))
        if clock() - start > limit_s:
            break
    launch_s = max(0.0, median(times[-MIN_WARMUP_LAUNCHES:]) - overhead_s)  # each was timed alone, with one reading of the clock
    launches = max(1, -(-overhead_s // (MAX_TIMER_SHARE * launch_s))) if launch_s > 0 else 1
    return Calibration(int(launches), len(times), launch_s)


def _steady(times: Sequence[float]) -> bool:
    if len(times) < 2 * MIN_WARMUP_LAUNCHES:
        return False
    first = median(times[-2 * MIN_WARMUP_LAUNCHES : -MIN_WARMUP_LAUNCHES])
    second = median(times[-MIN_WARMUP_LAUNCHES:])
    return abs(second - first) <= STEADY_CHANGE * first
