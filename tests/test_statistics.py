"""Speed-ups and ratios of medians: pairs, blocks and what their intervals claim."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from lenet_deploy.bench import statistics
from lenet_deploy.bench.statistics import MIN_VISITS, median_ratio_ci95, paired_ratios, speedups
from lenet_deploy.bench_records import Measurement, Visit
from lenet_deploy.order_statistics import median

Block = tuple[Visit, tuple[float, ...]]


def visit(process: int, number: int, samples: int, flag: str | None = None) -> Visit:
    return Visit(process, number, samples, singles=0, window_images=samples, window_s=1.0, flag=flag)


def measurement(variant: str, blocks: Sequence[Block], batch_size: int = 1, scope: str = "device", device: str = "cpu") -> Measurement:
    times = tuple(time for _, block in blocks for time in block)
    visits = tuple(each for each, _ in blocks)
    return Measurement(variant, device, batch_size, scope, times, 1, visits, 0, "rounds", 0, None)


def blocks(medians: Sequence[float], processes: int = 1) -> list[Block]:
    """Visits of three times each around the given medians, dealt to processes in turn."""
    return [(visit(i % processes, i // processes, 3), (value * 0.99, value, value * 1.2)) for i, value in enumerate(medians)]


def noisy(generator: np.random.Generator, count: int, sigma: float, processes: int = 1, samples: int = 15) -> list[Block]:
    """Visits with lognormal offsets, and lognormal times within each."""
    offsets = generator.normal(0, sigma, count)
    times = np.exp(offsets[:, None] + generator.normal(0, 0.02, (count, samples)))
    return [(visit(i % processes, i // processes, samples), tuple(row)) for i, row in enumerate(times.tolist())]


def test_a_speedup_is_the_median_over_pairs_of_baseline_time_to_variant_time() -> None:
    base = measurement("base", blocks([4.0, 6.0, 8.0]))
    fast = measurement("fast", blocks([2.0, 2.0, 2.0]))
    itself, found = speedups([base, fast], "base")
    assert (found.variant, found.baseline, found.batch_size, found.scope) == ("fast", "base", 1, "device")
    assert found.ratio == pytest.approx(3.0)
    assert found.pairs == 3
    assert (itself.variant, itself.ratio) == ("base", 1.0)


def test_visits_are_paired_by_process_and_round_and_not_by_place() -> None:
    base = measurement("base", blocks([1.0, 10.0, 2.0, 20.0], processes=2))
    turned = list(reversed(blocks([0.5, 5.0, 1.0, 10.0], processes=2)))
    _, found = speedups([base, measurement("twice", turned)], "base")
    assert found.ratio == pytest.approx(2.0)
    assert [round(ratio, 9) for _, (ratio,) in paired_ratios(base, measurement("twice", turned))] == [2.0] * 4


def test_a_visit_without_a_counterpart_and_a_flagged_one_are_in_no_pair() -> None:
    base = measurement("base", blocks([1.0] * 8))
    flagged = [(visit(0, 0, 2, "throttled"), (9.0, 9.0)), *blocks([1.0] * 7)[1:]]
    _, found = speedups([base, measurement("other", flagged)], "base")
    assert (found.ratio, found.pairs) == (1.0, 6)


@pytest.mark.parametrize("other", [{"batch_size": 8}, {"scope": "e2e"}, {"device": "cuda:0"}])
def test_only_the_same_workload_on_the_same_device_is_a_baseline(other: dict[str, str | int]) -> None:
    rows = [measurement("base", blocks([1.0] * 6)), measurement("variant", blocks([1.0] * 6), **other)]  # type: ignore[arg-type]
    assert [row.variant for row in speedups(rows, "base")] == ["base"]


def test_without_a_pair_or_without_the_baseline_there_is_no_speedup() -> None:
    early, late = blocks([1.0] * 2), [(visit(1, 0, 1), (1.0,))]
    rows = [measurement("base", early), measurement("late", late)]
    assert [row.variant for row in speedups(rows, "base")] == ["base"]
    assert speedups(rows, "absent") == ()
    assert speedups([], "base") == ()


def test_five_pairs_give_no_interval_and_six_do() -> None:
    def of(count: int) -> tuple[float, float] | None:
        values = [1.0 + 0.01 * i for i in range(count)]
        return speedups([measurement("base", blocks([2.0] * count)), measurement("variant", blocks(values))], "base")[1].ci95

    assert of(MIN_VISITS - 1) is None
    interval = of(MIN_VISITS)
    assert interval is not None
    assert 2.0 / 1.05 <= interval[0] < 2.0 / 1.025 < interval[1] <= 2.0


def test_what_a_pair_shares_does_not_widen_the_interval() -> None:
    """The machine slows down to a half during the run; paired, that is no noise."""
    drift = [2.0 ** (i / 11) for i in range(12)]
    rows = [measurement("base", blocks([3.0 * d for d in drift])), measurement("variant", blocks(drift))]
    _, found = speedups(rows, "base")
    assert found.ci95 == pytest.approx((3.0, 3.0))


def test_the_interval_of_a_speedup_covers_the_truth() -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for _ in range(150):
        rows = [measurement("base", noisy(generator, 8, 0.02)), measurement("variant", noisy(generator, 8, 0.02))]
        ci95 = speedups(rows, "base")[1].ci95
        assert ci95 is not None
        covered += ci95[0] <= 1.0 <= ci95[1]
    assert covered >= 0.92 * 150  # three standard deviations below 95 % is 0.90


def test_the_interval_of_a_speedup_covers_the_truth_where_processes_differ_more_than_visits() -> None:
    generator = np.random.default_rng(6)
    covered = 0
    for _ in range(150):
        pair = []
        for _ in range(2):
            layouts = generator.normal(0, 0.004, 3)
            medians = np.exp(layouts[np.arange(18) % 3] + generator.normal(0, 0.002, 18))
            pair.append(blocks(medians.tolist(), processes=3))
        ci95 = speedups([measurement("base", pair[0]), measurement("variant", pair[1])], "base")[1].ci95
        assert ci95 is not None
        covered += ci95[0] <= 1.0 <= ci95[1]
    # Three processes say little of how processes differ: 0.79 to 0.85 of the time. Drawing visits alone covered it 0.68 to 0.71 of it.
    assert covered >= 0.76 * 150


def test_the_same_measurements_give_the_same_interval() -> None:
    left, right = (noisy(np.random.default_rng(seed), 12, 0.02, processes=3) for seed in (1, 2))
    rows = [measurement("base", left), measurement("variant", right)]
    assert speedups(rows, "base") == speedups(rows, "base")
    assert median_ratio_ci95(left, right) == median_ratio_ci95(left, right)


@pytest.mark.parametrize(("base", "head"), [(5, 6), (6, 5), (0, 6), (24, 1)])
def test_a_side_of_fewer_than_six_visits_gives_no_interval(base: int, head: int) -> None:
    assert median_ratio_ci95(blocks([1.0] * base), blocks([1.0] * head)) is None


def test_visits_that_agree_give_their_ratio_alone() -> None:
    base, head = ([(visit(0, i, 1), (value,)) for i in range(6)] for value in (2.0, 3.0))
    assert median_ratio_ci95(base, head) == (1.5, 1.5)


def test_a_slower_head_moves_the_interval_by_just_that() -> None:
    base, head = (noisy(np.random.default_rng(seed), 24, 0.02, processes=3) for seed in (1, 2))
    before = median_ratio_ci95(base, head)
    after = median_ratio_ci95(base, [(each, tuple(1.5 * time for time in times)) for each, times in head])
    assert before is not None
    assert after == pytest.approx((1.5 * before[0], 1.5 * before[1]))


def test_swapping_the_sides_inverts_the_interval() -> None:
    base, head = (noisy(np.random.default_rng(seed), 12, 0.02) for seed in (1, 2))
    there, back = median_ratio_ci95(base, head), median_ratio_ci95(head, base)
    assert there is not None
    assert back is not None
    width = math.log(there[1] / there[0])
    assert math.log(there[0] * back[1]) == pytest.approx(0.0, abs=0.1 * width)  # other draws
    assert math.log(there[1] * back[0]) == pytest.approx(0.0, abs=0.1 * width)


def laid_out(side: list[Block], generator: np.random.Generator) -> float:
    """The median of one resample, made as one would by hand: processes first, then visits of each."""
    processes = sorted({each.process for each, _ in side})
    times: list[float] = []
    for process in generator.choice(processes, len(processes)):
        of_process = [values for each, values in side if each.process == process]
        for place in generator.integers(len(of_process), size=len(of_process)):
            times += of_process[place]
    return median(times)


@pytest.mark.parametrize(("count", "processes", "tail"), [(6, 1, 0.0024), (23, 3, 0.025)])
def test_the_interval_is_that_of_resamples_laid_out_one_by_one(count: int, processes: int, tail: float) -> None:
    base, head = (noisy(np.random.default_rng(seed), count, 0.02, processes, samples=4) for seed in (1, 2))
    generator = np.random.default_rng(3)
    by_hand = np.quantile([laid_out(head, generator) / laid_out(base, generator) for _ in range(3000)], (tail, 1 - tail))
    found = median_ratio_ci95(base, head)
    assert found is not None
    width = math.log(by_hand[1] / by_hand[0])
    assert np.log(found) == pytest.approx(np.log(by_hand), abs=0.15 * width)


@pytest.mark.parametrize(("count", "processes"), [(6, 1), (6, 6), (12, 1), (24, 3)])
def test_the_interval_of_a_ratio_covers_the_truth(count: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1_999)  # for the time; each end then has its own noise of a few percent of the width
    generator = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        interval = median_ratio_ci95(*(noisy(generator, count, 0.02, processes) for _ in range(2)))
        assert interval is not None
        covered += interval[0] <= 1.0 <= interval[1]
    assert covered >= 0.92 * 200


def test_what_differs_between_processes_widens_the_interval() -> None:
    """Of the same visits, dealt to three processes by their size or evenly."""
    base = noisy(np.random.default_rng(1), 24, 0.02, processes=3)
    ordered = sorted(noisy(np.random.default_rng(2), 24, 0.02), key=lambda block: median(block[1]))
    even = [(visit(i % 3, i // 3, 15), times) for i, (_, times) in enumerate(ordered)]
    apart = [(visit(i // 8, i % 8, 15), times) for i, (_, times) in enumerate(ordered)]
    narrow, wide = median_ratio_ci95(base, even), median_ratio_ci95(base, apart)
    assert narrow is not None
    assert wide is not None
    assert wide[1] / wide[0] - 1 > 1.5 * (narrow[1] / narrow[0] - 1)
