"""One process's share of a bench: real sessions on the CPU, and a GPU's stream on a clock of its own, since no GPU can be had here."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lenet_deploy.bench.engine import DETAIL_LAUNCHES, REVISIT_LAUNCHES, VISIT_COST, Bench, Case
from lenet_deploy.bench.plan import SCOPES, Plan
from lenet_deploy.bench.scopes import Work, bind
from lenet_deploy.bench.timing import MAX_WARMUP_LAUNCHES, timer_overhead_s
from lenet_deploy.bundle import Bundle
from lenet_deploy.checkpoint import Checkpoint
from lenet_deploy.data import Dataset, fit, normalise
from lenet_deploy.devices import computing_on
from lenet_deploy.records import NodePlacement, Preprocessing
from lenet_deploy.runtimes import Session
from lenet_deploy.sources import artifact_of
from lenet_deploy.variants import VARIANTS, Variant

ON_CPU = [variant for variant in VARIANTS if variant.device == "cpu"]
GREY = Preprocessing(1, 4, 0, (0.0,), (1.0,))
PLAN = Plan(
    what="",
    device="auto",
    variants=(),
    batch_sizes={},
    scopes=SCOPES,
    processes=1,
    rounds=3,
    fixed=True,
    visit_s=1.0,
    warmup_s=100.0,
    limit_s=1e9,
    seed=0,
)


class World:
    """A machine on a clock of its own: a launch costs the host `enqueue_s`, and a GPU `gpu_s` behind what it has to do already."""

    def __init__(self, enqueue_s: float = 0.01, gpu_s: float = 0.0) -> None:
        self.now = self.busy_until = 0.0
        self.enqueue_s, self.gpu_s = enqueue_s, gpu_s
        self.launches = 0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def launch(self) -> None:
        self.launches += 1
        self.now += self.enqueue_s
        self.busy_until = max(self.busy_until, self.now) + self.gpu_s

    def synchronise(self) -> None:
        self.now = max(self.now, self.busy_until)

    def event(self) -> FakeEvent:
        return FakeEvent(self, max(self.now, self.busy_until))

    def hold(self, seconds: float) -> None:
        self.busy_until = max(self.now, self.busy_until) + seconds


@dataclasses.dataclass
class FakeEvent:
    """A point on the fake GPU's clock."""

    world: World
    at: float

    def synchronize(self) -> None:
        self.world.now = max(self.world.now, self.at)

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.at - self.at) * 1e3


class FakeSession:
    """Launches in a World, without arithmetic."""

    device = torch.device("cpu")
    node_providers: tuple[NodePlacement, ...] = ()
    settle_s = 0.0

    def __init__(self, world: World, cost: Callable[[int], float] | None = None) -> None:
        self.world, self.cost = world, cost
        self.bound: list[int] = []

    def bind(self, batch_size: int) -> torch.Tensor:
        self.bound.append(batch_size)
        if self.cost:
            self.world.enqueue_s = self.cost(batch_size)
        return torch.zeros(batch_size, 1, 4, 4)

    def launch(self) -> torch.Tensor:
        self.world.launch()
        return torch.zeros(self.bound[-1], 10)


class Quiet:
    """A machine about which nothing is known."""

    def throttled(self) -> str | None:
        return None

    def energy_j(self) -> float | None:
        return None


@dataclasses.dataclass
class Meter:
    """A GPU that draws 100 W, and is throttled at every other visit."""

    world: World
    asked: int = 0

    def throttled(self) -> str | None:
        self.asked += 1
        return "clock at 60 % of its default" if self.asked % 2 else None

    def energy_j(self) -> float | None:
        return 100.0 * self.world.now


def images(size: int) -> torch.Tensor:
    return torch.zeros(size, 1, 4, 4, dtype=torch.uint8)


def case(world: World, size: int = 1, scope: str = "device", session: Any = None, gpu: bool = False) -> Case:
    return Case("v", session or FakeSession(world), images(size), scope, GREY, world if gpu else None)


def bench(world: World, sent: list[dict[str, Any]], plan: Plan = PLAN, watch: Any = None) -> Bench:
    return Bench(plan, sent.append, watch or Quiet(), 1e-9, world.clock, world.sleep)


def run(cases: list[Case], world: World, plan: Plan = PLAN, process: int = 0, watch: Any = None) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []
    bench(world, sent, plan, watch).run(cases, process)
    return sent


def visits(sent: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in sent if event["event"] == "visit"]


def order(seed: int, process: int = 0) -> list[list[int]]:
    world = World()
    plan = dataclasses.replace(PLAN, seed=seed)
    seen = visits(run([case(world, size) for size in range(1, 7)], world, plan, process))
    return [[event["batch_size"] for event in seen if event["round"] == number] for number in range(PLAN.rounds)]


def test_every_case_is_visited_once_a_round_in_an_order_that_changes() -> None:
    rounds = order(0)
    assert all(sorted(each) == [1, 2, 3, 4, 5, 6] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


def test_the_order_is_the_seeds_and_the_processs() -> None:
    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, process=1)


def test_times_are_those_of_launches_and_none_is_of_the_warm_up() -> None:
    world = World()
    world.launches = 0
    sent = run([case(world, 2)], world)
    told = next(event for event in sent if event["event"] == "case")
    assert told["launches_per_block"] == 1
    assert all(each == pytest.approx(0.01) for event in visits(sent) for each in event["times_s"])
    timed = sum(len(event["times_s"]) for event in visits(sent))
    first = PLAN.rounds  # each visit begins with one launch that shows whether the batch runs
    assert world.launches == first + told["warmup_launches"] + REVISIT_LAUNCHES * (PLAN.rounds - 1) + timed


def test_on_the_cpu_the_timed_launches_are_the_window() -> None:
    world = World()
    for event in visits(run([case(world, 4)], world)):
        assert event["window_images"] == 4 * len(event["times_s"])
        assert event["window_s"] == pytest.approx(sum(event["times_s"])) == pytest.approx(1.0, rel=0.02)
        assert event["energy_j"] is None
        assert not set(event) & {"gpu_times_s", "enqueue_times_s"}


def test_on_a_gpu_latency_waits_for_each_launch_and_the_window_does_not() -> None:
    world = World(enqueue_s=1e-4, gpu_s=4e-4)
    for event in visits(run([case(world, 8, gpu=True)], world)):
        assert event["times_s"] == [pytest.approx(5e-4)] * len(event["times_s"])
        assert event["enqueue_times_s"] == [pytest.approx(1e-4)] * DETAIL_LAUNCHES
        assert event["gpu_times_s"] == [pytest.approx(4e-4)] * DETAIL_LAUNCHES, "the host does not count"
        assert event["window_s"] / (event["window_images"] / 8) == pytest.approx(4e-4, rel=0.05), "the GPU never waits for the host"


def test_energy_is_that_of_the_window_and_a_throttled_visit_is_flagged_and_kept() -> None:
    world = World(gpu_s=0.02)
    seen = visits(run([case(world, gpu=True)], world, watch=Meter(world)))
    assert [event["flag"] for event in seen] == ["clock at 60 % of its default", None, "clock at 60 % of its default"]
    assert all(event["times_s"] for event in seen)
    assert ["gpu_times_s" in event for event in seen] == [False, True, False], "nothing of a throttled visit is taken apart"
    for event in seen:
        assert event["energy_j"] == pytest.approx(100.0 * event["window_s"])


def test_flagged_visits_do_not_end_a_case() -> None:
    world = World(gpu_s=0.02)
    plan = dataclasses.replace(PLAN, fixed=False, rounds=6)
    seen = visits(run([case(world, gpu=True)], world, plan, watch=Meter(world)))
    assert len(seen) == 12, "six of them flagged"


def test_short_launches_come_in_blocks_with_some_timed_alone() -> None:
    world = World(enqueue_s=1e-7)
    plan = dataclasses.replace(PLAN, visit_s=1e-3)
    sent = run([case(world)], world, plan)
    launches = next(event for event in sent if event["event"] == "case")["launches_per_block"]
    assert launches in (10, 11), "the reading of the clock, 1e-9 s, is a thousandth of ten launches"
    for event in visits(sent):
        assert event["times_s"] == [pytest.approx(1e-7)] * len(event["times_s"])
        assert len(event["single_times_s"]) == pytest.approx(plan.visit_s / 4 / 1e-7, rel=0.01)
        assert event["window_images"] == launches * len(event["times_s"])


def test_idle_threads_of_another_session_are_waited_for_and_those_of_its_own_are_not() -> None:
    world = World()
    waits: list[float] = []
    first, second = FakeSession(world), FakeSession(world)
    first.settle_s, second.settle_s = 0.5, 0.25
    made = Bench(PLAN, lambda event: None, Quiet(), 1e-9, world.clock, waits.append)
    for last, session in ((None, first), (first, first), (first, second), (second, first)):
        made.visit(case(world, session=session), 0, last)
    assert waits == [0.5, 0.25]


def test_on_a_gpu_the_host_does_not_run_away_in_a_window() -> None:
    world = World(enqueue_s=1e-4, gpu_s=0.05)
    for event in visits(run([case(world, gpu=True)], world)):
        assert event["window_s"] == pytest.approx(PLAN.visit_s, rel=0.3)


def test_a_later_process_takes_the_block_length_of_the_first() -> None:
    world = World()
    sent = run([case(world, 2)], world, dataclasses.replace(PLAN, blocks=(("v", 2, "device", 7), ("v", 3, "device", 9))))
    assert next(event for event in sent if event["event"] == "case")["launches_per_block"] == 7


def test_a_case_stops_when_it_is_precise_and_others_go_on() -> None:
    world = World()
    plan = dataclasses.replace(PLAN, fixed=False, rounds=6, limit_s=80.0)
    ragged = itertools.count()
    uneven = FakeSession(world, lambda size: 0.5 + 0.2 * (next(ragged) % 2))  # every visit is unlike the one before
    sent = run([case(world, 1, session=FakeSession(world, lambda size: 0.01)), case(world, 2, session=uneven)], world, plan)
    assert [(event["batch_size"], event["reason"]) for event in sent if event["event"] == "stop"] == [(1, "precise"), (2, "time limit")]
    counts = Counter(event["batch_size"] for event in visits(sent))
    assert counts[1] == 6 < counts[2]


def test_a_fixed_number_of_rounds_is_kept_whatever_the_time_limit() -> None:
    world = World()
    sent = run([case(world), case(world, 2)], world, dataclasses.replace(PLAN, limit_s=0.001))
    assert len(visits(sent)) == 2 * PLAN.rounds
    assert {event["reason"] for event in sent if event["event"] == "stop"} == {"rounds"}


def test_the_first_round_is_complete_even_beyond_the_time_limit() -> None:
    world = World()
    sent = run([case(world), case(world, 2)], world, dataclasses.replace(PLAN, fixed=False, limit_s=0.001))
    assert sorted(event["batch_size"] for event in visits(sent)) == [1, 2]
    assert {event["reason"] for event in sent if event["event"] == "stop"} == {"time limit"}


def test_the_time_is_shared_by_the_processes() -> None:
    ragged = itertools.count()
    spent = {}
    for processes in (1, 2):
        world = World()
        uneven = FakeSession(world, lambda size: 0.05 * 1.05 ** next(ragged))
        run([case(world, session=uneven)], world, dataclasses.replace(PLAN, fixed=False, rounds=6, limit_s=60.0, processes=processes))
        spent[processes] = world.now
    assert spent[1] == pytest.approx(60.0, rel=0.1)
    assert spent[2] == pytest.approx(30.0, rel=0.2)


@pytest.mark.parametrize(
    ("fixed_s", "image_s", "expected"),
    [
        (1.0, 0.0, (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)),  # doubles for ever
        (0.0, 1.0, (1, 2)),  # no gain at all
        (1.0, 1.0, (1, 2, 4, 8, 16, 32)),  # from 16 to 32: 33/32 over 17/16, a gain of 3 %
    ],
)
def test_a_sweep_doubles_until_throughput_gains_less_than_a_twentieth(fixed_s: float, image_s: float, expected: tuple[int, ...]) -> None:
    world = World()
    session = FakeSession(world, lambda size: fixed_s + image_s * size)
    assert bench(world, []).sweep(lambda size: case(world, size, session=session)) == expected


def test_the_overhead_is_that_of_a_launch_at_batch_1() -> None:
    world = World(enqueue_s=0.02)
    assert bench(world, []).overhead(case(world)) == pytest.approx(0.02, rel=1e-3)


def test_a_batch_that_does_not_run_is_named() -> None:
    class Broken(FakeSession):
        def launch(self) -> torch.Tensor:
            raise RuntimeError("Got invalid dimensions for input\nat: somewhere")

    world = World()
    sent = run([case(world, 5, session=Broken(world)), case(world, 2)], world)
    failed = {"event": "failed", "variant": "v", "batch_size": 5, "scope": "device", "damaged": True}
    assert [event for event in sent if event["event"] == "failed"] == [
        {**failed, "reason": "v does not run at batch 5: Got invalid dimensions for input; see parity"}
    ]
    assert {event["batch_size"] for event in visits(sent)} == {2}, "the other case goes on"


def test_a_case_that_fails_in_the_middle_keeps_what_was_measured_and_stops() -> None:
    class Failing(FakeSession):
        def launch(self) -> torch.Tensor:
            if self.world.now > 20:
                raise ValueError("no more")
            return super().launch()

    world = World()
    sent = run([case(world, session=Failing(world))], world, dataclasses.replace(PLAN, rounds=100))
    assert 1 < len(visits(sent)) < 100
    assert (sent[-1]["event"], sent[-1]["reason"]) == ("failed", "ValueError: no more")


def test_memory_that_ends_ends_a_sweep_and_is_no_damage() -> None:
    class Small(FakeSession):
        def launch(self) -> torch.Tensor:
            if self.bound[-1] > 4:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().launch()

    world = World()
    small = Small(world)
    assert bench(world, []).sweep(lambda size: case(world, size, session=small)) == (1, 2, 4)
    (failed,) = [event for event in run([case(world, 8, session=small)], world) if event["event"] == "failed"]
    assert (failed["damaged"], "use smaller batches" in failed["reason"]) == (False, True)


def test_visits_are_shortened_until_the_rounds_fit_into_the_limit() -> None:
    world = World()
    cases = [case(world, 1), case(world, 2, gpu=True)]
    plan = dataclasses.replace(PLAN, fixed=False, rounds=6, processes=2, limit_s=30.0)
    fitted = bench(world, [], plan).fitted(cases).plan
    assert fitted.visit_s == pytest.approx(30.0 / 2 / 6 / (VISIT_COST["cpu"] + VISIT_COST["cuda"]))
    for other in (dataclasses.replace(plan, limit_s=1e6), dataclasses.replace(plan, fixed=True)):
        assert bench(world, [], other).fitted(cases).plan == other, "a visit is never longer than planned"


def test_what_the_gpu_computes_is_timed_without_the_hosts_pace() -> None:
    world = World(enqueue_s=1e-4, gpu_s=1e-5)  # the host is ten times slower
    for event in visits(run([case(world, gpu=True)], world)):
        assert event["gpu_times_s"] == pytest.approx([1e-5] * DETAIL_LAUNCHES)
        assert event["enqueue_times_s"] == pytest.approx([1e-4] * DETAIL_LAUNCHES)


class Spinning(FakeSession):
    """Keeps a core busy for a while and records for how long: the real clock, and a cost that is known."""

    def __init__(self, costs_s: Iterator[float]) -> None:
        super().__init__(World())
        self.costs_s, self.recorded, self.scores = costs_s, list[float](), torch.zeros(1)

    def launch(self) -> torch.Tensor:
        start = time.perf_counter()
        end = start + next(self.costs_s)
        while time.perf_counter() < end:
            pass
        self.recorded.append(time.perf_counter() - start)
        return self.scores


@pytest.mark.parametrize("costs_s", [(2e-3,), (1.5e-3, 3e-3, 1.5e-3), (2e-3, 2e-3, 2e-3, 2e-2)], ids=["steady", "two modes", "heavy tail"])
def test_the_engine_reports_what_a_session_of_known_cost_recorded(costs_s: tuple[float, ...]) -> None:
    session = Spinning(itertools.cycle(costs_s))
    recorded: list[float] = []
    sent: list[dict[str, Any]] = []

    def send(event: dict[str, Any]) -> None:
        sent.append(event)
        if event["event"] == "visit":
            recorded.extend(session.recorded[-len(event["times_s"]) :])

    plan = dataclasses.replace(PLAN, visit_s=0.05, warmup_s=0.5)
    Bench(plan, send, Quiet(), timer_overhead_s()).run([case(World(), session=session)], 0)
    assert {event["launches_per_block"] for event in sent if event["event"] == "case"} == {1}
    reported = [each for event in visits(sent) for each in event["times_s"]]
    assert len(reported) == len(recorded)
    assert all(around >= inside for around, inside in zip(reported, recorded, strict=True)), "the tail is kept"
    assert statistics.median(reported) == pytest.approx(statistics.median(recorded), rel=0.01)


# The scopes, on real sessions.


@contextlib.contextmanager
def opened(bundle: Bundle, variant: Variant) -> Iterator[Session]:
    data = bundle.read(artifact_of(bundle, variant))
    with computing_on(torch.device("cpu")), variant.open_session(data, bundle.metadata.preprocessing.input_shape) as session:
        yield session


@pytest.fixture
def pixels(digits: Dataset, bundle: Bundle) -> torch.Tensor:
    """uint8 digits of the model's size."""
    return fit(digits.test_images[:3], bundle.metadata.preprocessing)


class Recorder:
    """A session that keeps what was bound and launched."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.device, self.node_providers, self.settle_s = session.device, session.node_providers, session.settle_s
        self.input = self.output = torch.empty(0)

    def bind(self, batch_size: int) -> torch.Tensor:
        self.input = self.session.bind(batch_size)
        return self.input

    def launch(self) -> torch.Tensor:
        self.output = self.session.launch()
        return self.output


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("variant", ON_CPU, ids=lambda variant: variant.name)
def test_what_is_timed_is_inference_on_the_normalised_images(
    variant: Variant, scope: str, bundle: Bundle, checkpoint: Checkpoint, pixels: torch.Tensor
) -> None:
    expected = normalise(pixels, bundle.metadata.preprocessing)
    with opened(bundle, variant) as session:
        recorder = Recorder(session)
        work = bind(recorder, pixels, scope, bundle.metadata.preprocessing, None)
        scores = work.launch()
        assert isinstance(scores, torch.Tensor)
        assert torch.equal(recorder.input, expected)
        torch.testing.assert_close(recorder.output.clone(), checkpoint.module()(expected), rtol=1e-5, atol=1e-4)
        assert torch.equal(scores, recorder.output)
        assert (scores.data_ptr() == recorder.output.data_ptr()) is (scope == "device"), "e2e ends in memory of the caller's own"


def test_e2e_reads_the_images_anew_at_each_launch_and_device_does_not(bundle: Bundle, pixels: torch.Tensor) -> None:
    seen = {}
    for scope in SCOPES:
        chosen = pixels.clone()
        with opened(bundle, ON_CPU[0]) as session:
            recorder = Recorder(session)
            work = bind(recorder, chosen, scope, bundle.metadata.preprocessing, None)
            chosen.zero_()
            work.launch()
            seen[scope] = torch.equal(recorder.input, normalise(chosen, bundle.metadata.preprocessing))
    assert seen == {"device": False, "e2e": True}


def test_on_the_cpu_a_launch_is_its_start_and_nothing_is_copied(bundle: Bundle, pixels: torch.Tensor) -> None:
    with opened(bundle, ON_CPU[0]) as session:
        work = bind(session, pixels, "e2e", bundle.metadata.preprocessing, None)
    assert work.finish is None
    assert work.launch is work.start
    assert work.copies == {}


def test_on_a_gpu_a_launch_starts_and_then_waits() -> None:
    done: list[str] = []
    work = Work(lambda: done.append("start"), lambda: done.append("finish"), lambda: None)
    work.launch()
    work.launch()
    assert done == ["start", "finish", "start", "finish"]


def test_the_warm_up_has_a_cap(bundle: Bundle) -> None:
    world = World()
    growing = (1e-3 * 1.05**number for number in itertools.count())

    class Growing(FakeSession):
        def launch(self) -> torch.Tensor:
            world.enqueue_s = next(growing)
            return super().launch()

    sent = run([case(world, session=Growing(world))], world, dataclasses.replace(PLAN, rounds=1, warmup_s=1e9))
    assert next(event for event in sent if event["event"] == "case")["warmup_launches"] == MAX_WARMUP_LAUNCHES
