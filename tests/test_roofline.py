"""The limit is measured, the floors follow from it by their formulas, and nothing beats it silently."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lenet_deploy import environment
from lenet_deploy.bench import roofline
from lenet_deploy.bench.roofline import bandwidth_bps, best_rate, floors, launch_bytes, measure_limit, working_sets
from lenet_deploy.bench_records import BenchReport, Limit, Measurement, Visit
from lenet_deploy.devices import float32_state
from lenet_deploy.errors import Unusable
from lenet_deploy.models import find_model
from lenet_deploy.store import bench_json, read_bench

LAYERS = find_model("lenet5").defaults.layers()
SHAPE, CLASSES = (3, 32, 32), 10
MACS, PARAMETERS = 651_720, 62_006
FLOAT_IMAGE, PIXELS, SCORES = 12_288, 3_072, 40  # bytes of one image
MIB = 1 << 20

# What a measured rate may be beyond the limit: other processes may have slowed the limit's products down, and not this one.
DISTURBANCE = 1.5


def moved(batch_size: int, scope: str = "device", precision: str = "fp32") -> int:
    return launch_bytes(LAYERS, SHAPE, CLASSES, batch_size, scope, precision)


def least(limit: Limit, batch_size: int, scope: str = "device", precision: str = "fp32") -> dict[str, float]:
    return floors(LAYERS, SHAPE, CLASSES, batch_size, scope, precision, limit)


def test_one_image_moves_its_input_its_scores_and_every_weight() -> None:
    assert moved(1) == FLOAT_IMAGE + SCORES + 4 * PARAMETERS


def test_weights_are_read_once_per_launch_and_the_rest_once_per_image() -> None:
    assert moved(512) - moved(1) == 511 * (FLOAT_IMAGE + SCORES)


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("tf32", 4), ("fp16", 2), ("bf16", 2), ("int8", 1)])
def test_only_the_weights_have_the_precision(precision: str, size: int) -> None:
    assert moved(8, precision=precision) == 8 * (FLOAT_IMAGE + SCORES) + size * PARAMETERS


def test_end_to_end_also_reads_the_pixels_and_writes_the_input() -> None:
    assert moved(8, "e2e") - moved(8) == 8 * (PIXELS + FLOAT_IMAGE)


def test_weights_that_training_never_changes_are_read_too() -> None:
    model = find_model("lenet5-1998").defaults
    assert launch_bytes(model.layers(), (1, 32, 32), 10, 1, "device", "fp32") == 4 * 1024 + 40 + 4 * (60_000 + 840)


def test_the_floors_on_a_cpu_are_its_formulas() -> None:
    limit = Limit("cpu", {"fp32": 1e11}, 2e10)
    assert least(limit, 64) == {"compute": pytest.approx(2 * MACS * 64 / 1e11), "memory": pytest.approx(moved(64) / 2e10)}
    assert least(limit, 64, "e2e").keys() == {"compute", "memory"}  # nothing crosses a bus


def test_the_floors_on_a_gpu_know_its_bus_end_to_end_only() -> None:
    limit = Limit("cuda:0", {"fp32": 5e13, "tf32": 4e14}, 3e12, 5e10)
    assert least(limit, 8).keys() == {"compute", "memory"}
    assert least(limit, 8, "e2e")["pcie"] == pytest.approx(8 * (PIXELS + SCORES) / 5e10)
    assert least(limit, 8)["compute"] == pytest.approx(8 * least(limit, 8, precision="tf32")["compute"])


def test_a_precision_that_was_not_measured_has_no_compute_floor() -> None:
    assert least(Limit("cpu", {"fp32": 1e11}, 2e10), 1, precision="int8").keys() == {"memory"}


CACHED = Limit("cpu", {"fp32": 1e11}, 2e10, None, {str(MIB): 9e10, str(4 * MIB): 1e11, str(16 * MIB): 5e10, str(64 * MIB): 2e10})


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, 1e11),  # starting the copies slowed the smallest down: it is not slower than a larger one
        (4 * MIB, 1e11),
        (15 * MIB, 1e11),  # between two: it may be as fast as the smaller
        (16 * MIB, 5e10),
        (63 * MIB, 5e10),
        (64 * MIB, 2e10),
        (1 << 40, 2e10),
    ],
)
def test_a_launch_is_judged_by_the_bandwidth_of_its_own_size(size: int, expected: float) -> None:
    assert bandwidth_bps(CACHED, size) == expected


def test_without_smaller_working_sets_the_memory_is_what_counts() -> None:
    assert bandwidth_bps(Limit("cpu", {}, 2e10), 1) == 2e10


def test_what_a_cache_holds_has_a_lower_memory_floor_than_main_memory_gives_it() -> None:
    assert least(CACHED, 1)["memory"] == pytest.approx(moved(1) / 1e11)
    assert least(CACHED, 8192)["memory"] == pytest.approx(moved(8192) / 2e10)


def within(floor_s: float) -> Measurement:
    visit = Visit(process=0, round=0, samples=3, singles=0, window_images=3, window_s=3.0)
    return Measurement("v", "cpu", 1, "device", (1.0, 1.0, 1.0), 1, (visit,), 1, "rounds", 1, None, floors_s={"compute": floor_s})


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_within_the_limit_there_is_nothing_to_say(share: float) -> None:
    assert within(share).limit_fraction == share
    assert within(share).warnings == ()


def test_a_share_above_one_is_said() -> None:
    assert [words[:25] for words in within(1.25).warnings] == ["125.0% of the limit: its "]


def test_a_limit_comes_back_from_json(tmp_path: Path) -> None:
    report = BenchReport((), (), environment.capture(), limits=(CACHED,))
    path = tmp_path / "bench.json"
    path.write_text(bench_json(report))
    assert read_bench(path).limits == (CACHED,)


class Scripted:
    """A clock that only work moves, by one duration after the other, and the last one ever after."""

    def __init__(self, *durations: float) -> None:
        self.now, self.runs, self._durations = 0.0, 0, durations

    def __call__(self) -> float:
        return self.now

    def work(self) -> None:
        self.now += self._durations[min(self.runs, len(self._durations) - 1)]
        self.runs += 1


def test_the_fastest_repetition_counts_and_the_first_run_does_not() -> None:
    clock = Scripted(0.001, 4.0, 2.0, 5.0)
    assert best_rate(clock.work, 100.0, clock, budget_s=1.0) == 50.0
    assert clock.runs == 1 + roofline.MIN_REPETITIONS


def test_repetitions_go_on_until_the_budget_is_spent() -> None:
    clock = Scripted(1.0)
    best_rate(clock.work, 1.0, clock, budget_s=10.0)
    assert clock.runs == 11


@pytest.mark.parametrize(
    ("smallest", "cache", "expected"),
    [
        (MIB, 32 * MIB, (MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)),
        (16 * MIB, None, (16 * MIB, 64 * MIB)),  # not known
        (16 * MIB, 4096 * MIB, (16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB)),  # more than may be taken
        (4 * MIB, 12 * MIB, (4 * MIB, 16 * MIB, 64 * MIB, 96 * MIB)),
    ],
)
def test_working_sets_grow_to_what_no_cache_holds(smallest: int, cache: int | None, expected: tuple[int, ...]) -> None:
    assert working_sets(smallest, cache) == expected


def seconds() -> Callable[[], float]:
    """A clock that moves one second each time it is read."""
    now = iter(range(1_000_000))
    return lambda: float(next(now))


def test_rates_are_operations_and_bytes_per_second_of_the_clock() -> None:
    limit = measure_limit(torch.device("cpu"), ("fp32",), seconds())
    sizes = working_sets(roofline.CPU.smallest_set, roofline.last_level_cache_bytes())
    assert limit.device == "cpu"
    assert limit.flops == {"fp32": 2.0 * 256**3}  # one second is long enough for the smallest side
    assert limit.bandwidths_bps == {str(size): size * max(1, min(16 * MIB // size, 256)) for size in sizes}
    assert limit.memory_bps == limit.bandwidths_bps[str(sizes[-1])] == sizes[-1]
    assert limit.pcie_bps is None


def test_sides_grow_until_a_product_takes_long_enough() -> None:
    readings = iter(range(1_000_000))
    limit = measure_limit(torch.device("cpu"), (), lambda: next(readings) * 0.004)
    assert limit.flops == {"fp32": pytest.approx(2.0 * 1024**3 / 0.004)}  # none reaches 10 ms, so the largest is the last


def test_measuring_leaves_threads_precision_and_gradients_as_they_were() -> None:
    threads, state = torch.get_num_threads(), float32_state()
    try:
        torch.set_num_threads(2)
        measure_limit(torch.device("cpu"), ("tf32",), seconds())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert float32_state() == state
    assert torch.is_grad_enabled()


def test_a_cpu_that_has_no_memory_left_is_unusable_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SMALLEST_MEMORY", 1 << 60)
    monkeypatch.setattr(roofline, "LARGEST_MEMORY", 1 << 60)
    with pytest.raises(Unusable, match=r"the limit of cpu cannot be measured: .+; free its memory"):
        measure_limit(torch.device("cpu"), (), seconds())


def fastest(work: Callable[[], object], amount: float, budget_s: float = 0.1) -> float:
    return best_rate(work, amount, time.perf_counter, budget_s)


def test_this_cpu_does_not_beat_its_measured_limit() -> None:
    limit = measure_limit(torch.device("cpu"), ("fp32", "tf32", "fp16", "int8"))
    assert limit.flops.keys() == {"fp32", "tf32", "fp16"}
    assert limit.flops["fp32"] > 0
    assert limit.flops["tf32"] == limit.flops["fp32"]  # which is the GPU's
    assert limit.flops["fp16"] >= limit.flops["fp32"]  # to which it may be converted
    assert all(bps > 0 for bps in limit.bandwidths_bps.values())
    with torch.inference_mode():
        for side in (384, 640):
            left, right, out = (torch.ones(side, side) for _ in range(3))
            rate = fastest(lambda left=left, right=right, out=out: torch.mm(left, right, out=out), 2.0 * side**3)
            assert rate <= DISTURBANCE * limit.flops["fp32"]
        source = torch.ones(3 * MIB)
        target = torch.empty_like(source)
        rate = fastest(lambda: target.copy_(source), 24.0 * MIB)
        assert rate <= DISTURBANCE * bandwidth_bps(limit, 24 * MIB)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")
def test_a_real_gpu_has_a_limit_in_every_direction() -> None:
    device = torch.device("cuda", 0)
    limit = measure_limit(device, ("fp32", "tf32", "fp16"))
    assert limit.flops["fp32"] <= limit.flops["tf32"]
    assert limit.pcie_bps is not None
    assert 0 < limit.pcie_bps < limit.memory_bps
    side = 6144
    left, right = (torch.ones(side, side, device=device, dtype=torch.float16) for _ in range(2))

    def product() -> None:
        torch.mm(left, right)
        torch.cuda.synchronize(device)

    assert fastest(product, 2.0 * side**3) <= DISTURBANCE * limit.flops["fp16"]
