"""The timing policy, on a clock of its own."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterable

import pytest

from lenet_deploy.bench.timing import (
    HALF,
    MAX_WARMUP_LAUNCHES,
    MIN_ACCUMULATED_S,
    MIN_VISITS,
    PRECISE,
    SETTLED,
    TRAILING,
    calibrate,
    settled,
    steady,
    stop_reason,
    time_blocks,
    timer_overhead_s,
)

FOREVER = 1e9


class FakeClock:
    """A clock that costs `reading_s` to read, and a launch that takes the scripted times, the last one for ever."""

    def __init__(self, reading_s: float, launches_s: Iterable[float]) -> None:
        self.now = 0.0
        self.reading_s = reading_s
        self.script = iter(launches_s)
        self.last = 0.0
        self.launches = 0

    def __call__(self) -> float:
        self.now += self.reading_s
        return self.now

    def launch(self) -> None:
        self.last = next(self.script, self.last)
        self.now += self.last
        self.launches += 1


def noisy(seed: int, middle: float, spread: float, count: int) -> list[float]:
    generator = random.Random(seed)
    return [middle * (1 + generator.gauss(0, spread)) for _ in range(count)]


def test_the_timers_overhead_is_what_one_reading_costs() -> None:
    assert timer_overhead_s(FakeClock(4e-8, ())) == pytest.approx(4e-8)
    assert 0.0 <= timer_overhead_s() < 1e-4


def test_blocks_share_the_readings_between_them() -> None:
    clock = FakeClock(0.5, [3.0])
    times = time_blocks(clock.launch, 5, 40.0, clock)
    assert times == [pytest.approx((5 * 3.0 + 0.5) / 5)] * 3  # of 15.5 s each
    assert clock.launches == 15
    assert clock.now == 0.5 + 3 * 15.5, "one reading before the first block and one behind each"


def test_a_block_longer_than_the_limit_is_still_one_block() -> None:
    clock = FakeClock(0.0, [3.0])
    assert time_blocks(clock.launch, 2, 0.1, clock) == [3.0]


@pytest.mark.parametrize("launch_s", [1e-7, 1e-6, 2e-5, 3.3e-4, 0.01, 2.0])
@pytest.mark.parametrize("overhead_s", [2e-8, 1e-7, 1e-6])
def test_reading_the_clock_takes_at_most_a_thousandth_of_a_block(launch_s: float, overhead_s: float) -> None:
    clock = FakeClock(overhead_s, [launch_s])
    launches = calibrate(clock.launch, FOREVER, overhead_s, clock).launches_per_block
    block_s = launches * time_blocks(clock.launch, launches, 0.0, clock)[0]
    assert overhead_s <= 0.001 * block_s * (1 + 1e-6)


@pytest.mark.parametrize("launch_s", [1e-6, 2e-5, 3.3e-4])
def test_a_block_is_no_longer_than_it_must_be(launch_s: float) -> None:
    clock = FakeClock(1e-7, [launch_s])
    launches = calibrate(clock.launch, FOREVER, 1e-7, clock).launches_per_block
    assert (launches - 1) * 0.001 * launch_s <= 1e-7


def test_slow_launches_are_single_launch_blocks() -> None:
    clock = FakeClock(1e-7, [0.01])
    assert calibrate(clock.launch, FOREVER, 1e-7, clock).launches_per_block == 1


def test_a_clock_too_coarse_to_see_a_launch_still_gives_a_block() -> None:
    clock = FakeClock(0.0, [0.0])
    assert calibrate(clock.launch, FOREVER, 1e-7, clock).launches_per_block == 1


def test_a_steady_case_warms_up_for_two_halves() -> None:
    clock = FakeClock(0.0, [1e-3])
    found = calibrate(clock.launch, FOREVER, 0.0, clock)
    assert found.warmup_launches == clock.launches == 2 * HALF
    assert found.launch_s == pytest.approx(1e-3)
    assert found.steady


@pytest.mark.parametrize("slow", [1, 12, 25])
def test_slow_first_launches_do_not_count(slow: int) -> None:
    clock = FakeClock(1e-7, [1.0] * slow + [1e-3])
    found = calibrate(clock.launch, FOREVER, 1e-7, clock)
    assert found.launch_s == pytest.approx(1e-3, rel=1e-3)
    assert found.warmup_launches >= slow + 2 * HALF - 1


def test_a_case_that_never_settles_stops_at_the_cap_and_says_so() -> None:
    clock = FakeClock(0.0, (1e-6 * 1.02**i for i in itertools.count()))
    found = calibrate(clock.launch, FOREVER, 0.0, clock)
    assert (found.warmup_launches, found.steady) == (MAX_WARMUP_LAUNCHES, False)
    assert MAX_WARMUP_LAUNCHES == 300


@pytest.mark.parametrize(("limit_s", "launches"), [(0.5, 1), (3.5, 4), (30.5, 31)])
def test_the_warm_up_ends_at_its_time_limit(limit_s: float, launches: int) -> None:
    clock = FakeClock(0.0, [1.0])
    found = calibrate(clock.launch, limit_s, 0.0, clock)
    assert (found.warmup_launches, found.launch_s, found.steady) == (launches, 1.0, False)


FLAT = [1.0, 1.02, 0.98, 1.01, 0.99] * 4


@pytest.mark.parametrize(
    ("first", "is_steady"),
    [
        (FLAT, True),
        ([1.5, *FLAT[1:]], False),  # its first value is an outlier
        ([value * 1.2 for value in FLAT], False),  # slower by more than 10 %
        ([value * 0.4 for value in FLAT], False),  # faster by more than 50 %
        ([1 + (value - 1) * 1.5 for value in FLAT], False),  # a wider spread
        ([value * 1.06 for value in FLAT], False),  # quartiles off by more than 5 %
        ([value * 1.003 for value in FLAT], True),
    ],
)
def test_two_halves_are_steady_by_pyperfs_rule(first: list[float], is_steady: bool) -> None:
    assert steady([9.0, *first, *FLAT]) is is_steady, "only the last two halves count"


def test_fewer_than_two_halves_are_not_steady() -> None:
    assert not steady([1.0] * (2 * HALF - 1))
    assert steady([1.0] * (2 * HALF))


def test_a_narrow_interval_is_precise() -> None:
    visits = [noisy(seed, 1e-3, PRECISE / 10, 20) for seed in range(MIN_VISITS)]
    assert stop_reason(visits, 1.0) == "precise"


@pytest.mark.parametrize(("visits", "seconds"), [(MIN_VISITS - 1, 1.0), (MIN_VISITS, MIN_ACCUMULATED_S * 0.99)])
def test_too_few_visits_or_too_short_ones_are_not_enough(visits: int, seconds: float) -> None:
    assert stop_reason([[1.0] * 50] * visits, seconds) is None


def test_visits_that_disagree_are_not_precise_however_many_samples_they_have() -> None:
    apart = [[1.0 + 0.02 * (visit % 2)] * 9 for visit in range(MIN_VISITS)]
    assert stop_reason(apart, 1.0) is None


def test_wide_noise_between_visits_is_settled_once_it_is_known() -> None:
    visits = [[1.0 + 0.02 * (visit % 2)] * 9 for visit in range(80)]
    assert stop_reason(visits, 1.0) == "settled"
    assert stop_reason(visits[: MIN_VISITS + TRAILING - 1], 1.0) is None


def test_however_many_launches_of_one_visit_agree_its_neighbours_decide() -> None:
    visits = [noisy(seed, 1.0 + 0.1 * (seed % 2), 0.001, 2000) for seed in range(MIN_VISITS)]
    assert stop_reason(visits, 1.0) is None


def test_noise_that_grows_is_not_settled() -> None:
    growing = [1.0 + 0.01 * i * (-1) ** i for i in range(MIN_VISITS + TRAILING + 6)]
    assert not settled(growing)


def test_the_rule_is_nvbenchs_over_the_last_visits() -> None:
    medians = noisy(3, 1.0, 0.1, 100)
    estimates = [statistics.stdev(medians[:n]) / statistics.fmean(medians[:n]) if n > 1 else 0.0 for n in range(1, len(medians) + 1)]
    for n in range(MIN_VISITS + TRAILING, len(medians)):
        window = estimates[:n][-TRAILING:]
        assert settled(medians[:n]) is (statistics.pstdev(window) <= SETTLED * estimates[n - 1])
    assert not settled(medians[: MIN_VISITS + TRAILING - 1])


def test_equal_visits_are_settled() -> None:
    assert settled([1e-4] * (MIN_VISITS + TRAILING))
