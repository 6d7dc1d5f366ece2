"""The timing policy on a clock of its own, and the bench run on real sessions."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator

import pytest
import torch

from lenet_deploy import api
from lenet_deploy.bench.plan import PROFILES, REVISIT_LAUNCHES, SCOPES, Case, Profile, find_profile, measure
from lenet_deploy.bench.timing import MAX_WARMUP_LAUNCHES, MIN_WARMUP_LAUNCHES, calibrate, time_block, timer_overhead_s
from lenet_deploy.bundle import Bundle
from lenet_deploy.checkpoint import Checkpoint
from lenet_deploy.data import Dataset, fit, normalise
from lenet_deploy.devices import computing_on
from lenet_deploy.errors import BadInput, UnknownName, Unusable
from lenet_deploy.order_statistics import MIN_SAMPLES
from lenet_deploy.records import BenchReport, Measurement, NodePlacement
from lenet_deploy.runtimes import Session
from lenet_deploy.sources import artifact_of
from lenet_deploy.variants import VARIANTS, Variant

ON_CPU = [variant for variant in VARIANTS if variant.device == "cpu"]
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


def test_the_timers_overhead_is_what_one_reading_costs() -> None:
    assert timer_overhead_s(FakeClock(4e-8, ())) == pytest.approx(4e-8)
    assert 0.0 <= timer_overhead_s() < 1e-4


def test_a_block_is_timed_by_two_readings_around_all_its_launches() -> None:
    clock = FakeClock(0.5, [3.0])
    assert time_block(clock.launch, 5, clock) == 5 * 3.0 + 0.5
    assert clock.launches == 5
    assert clock.now == 5 * 3.0 + 2 * 0.5


@pytest.mark.parametrize("launch_s", [1e-7, 1e-6, 2e-5, 3.3e-4, 0.01, 2.0])
@pytest.mark.parametrize("overhead_s", [2e-8, 1e-7, 1e-6])
def test_reading_the_clock_takes_at_most_a_thousandth_of_a_block(launch_s: float, overhead_s: float) -> None:
    clock = FakeClock(overhead_s, [launch_s])
    launches = calibrate(clock.launch, FOREVER, overhead_s, clock).launches_per_block
    block_s = time_block(clock.launch, launches, clock)
    assert overhead_s <= 0.001 * block_s * (1 + 1e-6)


@pytest.mark.parametrize("launch_s", [1e-6, 2e-5, 3.3e-4])
def test_a_block_is_no_longer_than_it_must_be(launch_s: float) -> None:
    clock = FakeClock(1e-7, [launch_s])
    launches = calibrate(clock.launch, FOREVER, 1e-7, clock).launches_per_block
    assert (launches - 1) * 0.001 * launch_s <= 1e-7


def test_slow_launches_are_single_launch_blocks() -> None:
    clock = FakeClock(1e-7, [0.01])
    assert calibrate(clock.launch, FOREVER, 1e-7, clock).launches_per_block == 1


def test_a_steady_case_warms_up_for_two_halves() -> None:
    clock = FakeClock(0.0, [1e-3])
    found = calibrate(clock.launch, FOREVER, 0.0, clock)
    assert found.warmup_launches == clock.launches == 2 * MIN_WARMUP_LAUNCHES
    assert found.launch_s == pytest.approx(1e-3)


@pytest.mark.parametrize("slow", [1, 12, 25])
def test_slow_first_launches_do_not_count(slow: int) -> None:
    clock = FakeClock(1e-7, [1.0] * slow + [1e-3])
    found = calibrate(clock.launch, FOREVER, 1e-7, clock)
    assert found.launch_s == pytest.approx(1e-3, rel=1e-3)
    assert found.warmup_launches >= slow + MIN_WARMUP_LAUNCHES // 2


def test_a_case_that_never_settles_stops_at_the_cap() -> None:
    clock = FakeClock(0.0, (1e-6 * 1.02**i for i in itertools.count()))
    assert calibrate(clock.launch, FOREVER, 0.0, clock).warmup_launches == MAX_WARMUP_LAUNCHES == 300


@pytest.mark.parametrize(("limit_s", "launches"), [(0.5, 1), (3.5, 4), (30.5, 31)])
def test_the_warm_up_ends_at_its_time_limit(limit_s: float, launches: int) -> None:
    clock = FakeClock(0.0, [1.0])
    found = calibrate(clock.launch, limit_s, 0.0, clock)
    assert found.warmup_launches == launches
    assert found.launch_s == 1.0


def test_a_clock_too_coarse_to_see_a_launch_still_gives_a_block() -> None:
    clock = FakeClock(0.0, [0.0])
    assert calibrate(clock.launch, FOREVER, 1e-7, clock).launches_per_block >= 1


class Recorder:
    """A session that keeps what was bound and launched."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.device, self.node_providers = session.device, session.node_providers
        self.input = self.output = torch.empty(0)

    def bind(self, batch_size: int) -> torch.Tensor:
        self.input = self.session.bind(batch_size)
        return self.input

    def launch(self) -> torch.Tensor:
        self.output = self.session.launch()
        return self.output


class FakeSession:
    """A session without arithmetic, so that order and counts do not wait for it; a launch takes at least `pause_s`."""

    device = torch.device("cpu")
    node_providers: tuple[NodePlacement, ...] = ()

    def __init__(self, input_shape: tuple[int, int, int], pause_s: float = 0.0) -> None:
        self.input_shape = input_shape
        self.pause_s = pause_s
        self.bound: list[int] = []
        self.launches = 0

    def bind(self, batch_size: int) -> torch.Tensor:
        self.bound.append(batch_size)
        return torch.zeros(batch_size, *self.input_shape)

    def launch(self) -> torch.Tensor:
        time.sleep(self.pause_s)
        self.launches += 1
        return torch.zeros(1)


TINY = Profile("tiny", (1,), rounds=4, visit_s=0.002, window_s=0.002, warmup_s=0.02, core_only=True)
ONCE = dataclasses.replace(TINY, rounds=1)


@contextlib.contextmanager
def opened(bundle: Bundle, variant: Variant) -> Iterator[Session]:
    data = bundle.read(artifact_of(bundle, variant))
    with computing_on(torch.device("cpu")), variant.open_session(data, bundle.metadata.preprocessing.input_shape) as session:
        yield session


def case(bundle: Bundle, session: Session, images: torch.Tensor, scope: str = "device", variant: Variant = ON_CPU[0]) -> Case:
    return Case(variant, session, images, scope, bundle.metadata.preprocessing, 123, 97.5)


@pytest.fixture
def pixels(digits: Dataset, bundle: Bundle) -> torch.Tensor:
    """uint8 digits of the model's size."""
    return fit(digits.test_images[:8], bundle.metadata.preprocessing)


def visits(bundle: Bundle, pixels: torch.Tensor, seed: int) -> tuple[list[int], list[tuple[int, int, str]], tuple[Measurement, ...]]:
    """The order in which six cases, told apart by batch size, were visited; what progress said; and the measurements."""
    session = FakeSession(bundle.metadata.preprocessing.input_shape)
    said: list[tuple[int, int, str]] = []
    cases = [case(bundle, session, pixels[:size]) for size in range(1, 7)]
    found = measure(cases, TINY, lambda done, total, what: said.append((done, total, what)), seed)
    return session.bound, said, found


def test_every_case_is_visited_once_a_round_in_an_order_that_changes(bundle: Bundle, pixels: torch.Tensor) -> None:
    bound, _, _ = visits(bundle, pixels, seed=0)
    rounds = [bound[i : i + 6] for i in range(0, len(bound), 6)]
    assert len(rounds) == TINY.rounds
    assert all(sorted(each) == [1, 2, 3, 4, 5, 6] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


def test_the_order_is_the_seeds(bundle: Bundle, pixels: torch.Tensor) -> None:
    orders = [visits(bundle, pixels, seed)[0] for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_measurements_come_in_the_cases_order_and_progress_counts_every_visit(bundle: Bundle, pixels: torch.Tensor) -> None:
    _, said, found = visits(bundle, pixels, seed=3)
    assert [m.batch_size for m in found] == [1, 2, 3, 4, 5, 6]
    assert said == [(done, 24, ON_CPU[0].name) for done in range(1, 25)]


def test_times_are_kept_from_every_round_and_none_is_of_the_warm_up(bundle: Bundle, pixels: torch.Tensor) -> None:
    session = FakeSession(bundle.metadata.preprocessing.input_shape, pause_s=0.003)
    found = measure([case(bundle, session, pixels[:2])], TINY, lambda *said: None)[0]
    assert found.launches_per_block == 1
    assert found.warmup_launches >= 1
    assert len(found.times_s) == TINY.rounds  # one launch fills a visit
    revisits = REVISIT_LAUNCHES * (TINY.rounds - 1)
    first = 1  # shows whether the batch runs at all
    assert session.launches == first + found.warmup_launches + revisits + len(found.times_s) + found.window_images // 2


@pytest.mark.parametrize("scope", SCOPES)
def test_a_launch_takes_at_least_its_known_time(bundle: Bundle, pixels: torch.Tensor, scope: str) -> None:
    found = measure(
        [case(bundle, FakeSession(bundle.metadata.preprocessing.input_shape, pause_s=0.003), pixels[:4], scope)], TINY, lambda *said: None
    )[0]
    assert min(found.times_s) >= 0.003
    assert found.median_s < 0.3
    assert found.throughput_ips <= 4 / 0.003
    assert found.window_s >= TINY.rounds * TINY.window_s


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("variant", ON_CPU, ids=lambda variant: variant.name)
def test_what_is_timed_is_inference_on_the_normalised_images(
    variant: Variant, scope: str, bundle: Bundle, checkpoint: Checkpoint, pixels: torch.Tensor
) -> None:
    expected = normalise(pixels[:3], bundle.metadata.preprocessing)
    with opened(bundle, variant) as session:
        recorder = Recorder(session)
        measure([case(bundle, recorder, pixels[:3], scope, variant)], ONCE, lambda *said: None)
        assert torch.equal(recorder.input, expected)
        torch.testing.assert_close(recorder.output.clone(), checkpoint.module()(expected), rtol=1e-5, atol=1e-4)


def test_e2e_reads_the_images_anew_at_each_launch_and_device_does_not(bundle: Bundle, pixels: torch.Tensor) -> None:
    seen = {}
    for scope in SCOPES:
        images = pixels[:2].clone()
        with opened(bundle, ON_CPU[0]) as session:
            recorder = Recorder(session)
            start, finish = case(bundle, recorder, images, scope)._bound()
            images.zero_()
            finish(start())
            seen[scope] = torch.equal(recorder.input, normalise(images, bundle.metadata.preprocessing))
    assert seen == {"device": False, "e2e": True}


@pytest.fixture(scope="module")
def report(bundle: Bundle) -> BenchReport:
    """One real, short benchmark of everything in the bundle."""
    return api.benchmark(bundle, batch_sizes=(1, 2, 2), rounds=1)


def test_the_benchmark_measures_every_usable_core_variant_in_every_workload(report: BenchReport) -> None:
    usable = [v for v in VARIANTS if v.core and v.runtime.load().probe(v.device).usable]
    assert [(m.variant, m.batch_size, m.scope) for m in report.measurements] == [
        (variant.name, size, scope) for variant in usable for size in (1, 2) for scope in SCOPES
    ]
    assert [skipped.name for skipped in report.skipped] == [v.name for v in VARIANTS if v.core and v not in usable]
    assert all(skipped.reason for skipped in report.skipped)


def test_every_measurement_is_positive_and_consistent(report: BenchReport, bundle: Bundle) -> None:
    for m in report.measurements:
        entry = next(v.artifact.name for v in VARIANTS if v.name == m.variant)
        artifact = bundle.artifact(entry)
        assert artifact is not None
        assert (m.size_bytes, m.accuracy) == (artifact.size_bytes, artifact.accuracy[m.variant])
        assert m.times_s
        assert min(m.times_s) > 0
        assert min(m.times_s) <= m.median_s <= max(m.times_s)
        assert m.throughput_ips == m.window_images / m.window_s
        assert m.window_images % m.batch_size == 0
        assert m.launches_per_block >= 1
        assert m.warmup_launches >= 1
        assert m.device.startswith("cuda" if "-cuda/" in m.variant else "cpu")
        assert bool(m.node_providers) == m.variant.startswith("onnx/")


def test_the_environment_is_part_of_the_report(report: BenchReport) -> None:
    assert report.environment.threads == torch.get_num_threads()
    assert report.environment.versions["torch"].startswith(torch.__version__.partition("+")[0])


def test_the_quick_profile_covers_core_variants_only(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [profile.name for profile in PROFILES if profile.core_only] == ["quick"]
    extra = dataclasses.replace(ON_CPU[0], name="eager/torch-cpu/fp32/extra", core=False)
    monkeypatch.setattr("lenet_deploy.sources.VARIANTS", (ON_CPU[0], extra))
    for profile in PROFILES:
        shortened = dataclasses.replace(profile, rounds=1, visit_s=0.001, window_s=0.001, warmup_s=0.01)
        monkeypatch.setattr("lenet_deploy.bench.plan.PROFILES", (shortened,))
        measured = [m.variant for m in api.benchmark(bundle, profile=profile.name, batch_sizes=(1,), scopes=("device",)).measurements]
        assert measured == [ON_CPU[0].name] if profile.core_only else [ON_CPU[0].name, extra.name]
    asked = api.benchmark(bundle, variants=("*/extra",), profile=PROFILES[-1].name, batch_sizes=(1,), scopes=("device",))
    assert [m.variant for m in asked.measurements] == [extra.name]


def test_globs_and_one_scope_narrow_the_run_and_progress_is_reported(bundle: Bundle) -> None:
    said: list[tuple[int, int, str]] = []
    found = api.benchmark(
        bundle.path,
        variants=("onnx/ort-cpu/fp32",),
        batch_sizes=(3,),
        scopes=("e2e",),
        rounds=2,
        device="cpu",
        progress=lambda done, total, what: said.append((done, total, what)),
    )
    assert [(m.variant, m.batch_size, m.scope) for m in found.measurements] == [("onnx/ort-cpu/fp32", 3, "e2e")]
    assert said == [(1, 2, "onnx/ort-cpu/fp32"), (2, 2, "onnx/ort-cpu/fp32")]
    assert found.skipped == ()


@pytest.mark.parametrize("size", [0, -8])
def test_batch_sizes_below_one_are_bad_input(bundle: Bundle, size: int) -> None:
    with pytest.raises(BadInput, match=f"batch size is {size}"):
        api.benchmark(bundle, batch_sizes=(1, size))


@pytest.mark.parametrize("rounds", [0, -1])
def test_rounds_below_one_are_bad_input(bundle: Bundle, rounds: int) -> None:
    with pytest.raises(BadInput, match=f"rounds is {rounds}"):
        api.benchmark(bundle, rounds=rounds)


def test_an_unknown_scope_is_bad_input_and_names_those_there_are(bundle: Bundle) -> None:
    with pytest.raises(BadInput, match=r"'host'.*device or e2e"):
        api.benchmark(bundle, scopes=("device", "host"))


def test_no_scope_at_all_is_bad_input(bundle: Bundle) -> None:
    with pytest.raises(BadInput, match="scope"):
        api.benchmark(bundle, scopes=())


def test_a_scope_named_twice_is_measured_once(bundle: Bundle) -> None:
    found = api.benchmark(bundle, variants=("eager/torch-cpu/*",), batch_sizes=(1,), scopes=("device", "device"), rounds=1)
    assert [m.scope for m in found.measurements] == ["device"]


def test_an_unknown_profile_is_bad_input_with_the_nearest_name(bundle: Bundle) -> None:
    with pytest.raises(UnknownName, match="quick"):
        api.benchmark(bundle, profile="quik")
    assert find_profile("full").name == "full"


def test_an_unknown_variant_is_bad_input(bundle: Bundle) -> None:
    with pytest.raises(UnknownName, match="variant 'tensorrt/"):
        api.benchmark(bundle, variants=("tensorrt/*",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so its variants are measured")
def test_nothing_but_unusable_variants_is_unusable_with_each_reason(bundle: Bundle) -> None:
    with pytest.raises(Unusable, match="onnx/ort-cuda/fp32: "):
        api.benchmark(bundle, variants=("onnx/ort-cuda/fp32",))


def measurement(times: int, launches_per_block: int = 1) -> Measurement:
    seconds = tuple(1e-3 + 1e-6 * i for i in range(times))
    return Measurement("v", "cpu", 8, "device", seconds, launches_per_block, 800, 0.1, 40, 1, None, (NodePlacement("n", "p"),))


@pytest.mark.parametrize("percent", MIN_SAMPLES)
def test_a_percentile_needs_enough_samples(percent: int) -> None:
    needed = MIN_SAMPLES[percent]
    assert getattr(measurement(needed - 1), f"p{percent}_s") is None
    value = getattr(measurement(needed), f"p{percent}_s")
    assert value == pytest.approx(1e-3 + 1e-6 * (needed - 1) * percent / 100)


def test_blocks_of_several_launches_have_no_percentiles() -> None:
    blocks = measurement(1000, launches_per_block=2)
    assert (blocks.p90_s, blocks.p99_s) == (None, None)
    assert blocks.median_s == pytest.approx(1e-3 + 1e-6 * 499.5)
    assert blocks.ci95_s is not None
    assert blocks.ci95_s[0] < blocks.median_s < blocks.ci95_s[1]


def test_throughput_is_images_by_wall_clock_and_not_by_the_median() -> None:
    assert measurement(3).throughput_ips == 8000.0


def test_a_wide_spread_is_warned_of() -> None:
    assert measurement(100).warnings == ()
    noisy = dataclasses.replace(measurement(1), times_s=(1.0, 1.0, 2.0, 3.0))
    assert len(noisy.warnings) == 1
    assert "noisy" in noisy.warnings[0]
