"""Starts the worker processes of a run one after another, and gathers what they send."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lenet_deploy.bench.plan import Plan
from lenet_deploy.bench_records import STOPS, ColdStart, Limit, MachineState, Visit
from lenet_deploy.errors import BadInput, DamagedFile, LenetDeployError, Unusable
from lenet_deploy.records import Environment, Failure, NodePlacement

# -P: a file in the current folder that happens to be called torch.py is not imported.
COMMAND = (sys.executable, "-P", "-m", "lenet_deploy.bench.worker")

# The errors of a worker by number, the most special first.
KINDS = (DamagedFile, BadInput, Unusable, LenetDeployError)

SILENCE_S = 300.0  # without an event a worker hangs, in a driver for one: no visit, warm-up or opening of a session takes as long

Key = tuple[str, int, str]  # variant, batch size, scope
Progress = Callable[[int, int, str], None]

# Raw times of a visit, by what both the event and the measurement call them.
TIMES = ("times_s", "single_times_s", "gpu_times_s", "enqueue_times_s", "h2d_times_s", "d2h_times_s")


@dataclass(eq=False)
class Times:
    """What was sent of one case, over all processes.

    Attributes:
        steady: whether each warm-up ended by its rule.
        stops: why each process ended with it.
    """

    launches_per_block: int = 1
    warmup_launches: int = 0
    steady: bool = True
    stops: dict[int, str] = field(default_factory=dict)
    visits: list[Visit] = field(default_factory=list)
    raw: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in TIMES})

    @property
    def stop(self) -> str:
        """The weakest reason of all processes that visited it."""
        return max((self.stops.get(visit.process, "interrupted") for visit in self.visits), key=STOPS.index)


@dataclass(eq=False)
class Gathered:
    """What was sent in one run.

    Attributes:
        opened: device and placement of each variant that runs.
        environment: of the last worker, whose torch is loaded.
        failed: cases, cold starts and processes that failed, and why.
        damaged: whether one of them failed because its file is not what it should be.
        partial: why there is no more; None for a whole run.
    """

    opened: dict[str, tuple[str, tuple[NodePlacement, ...]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    times: dict[Key, Times] = field(default_factory=dict)
    overheads_s: dict[str, float] = field(default_factory=dict)
    limits: dict[str, Limit] = field(default_factory=dict)
    machine: list[MachineState] = field(default_factory=list)
    cold: list[ColdStart] = field(default_factory=list)
    environment: Environment | None = None
    failed: list[Failure] = field(default_factory=list)
    damaged: bool = False
    cases: int = 0
    partial: str | None = None

    def take(self, event: Mapping[str, Any], process: int) -> None:
        """File one event of a worker."""
        values = {name: value for name, value in event.items() if name != "event"}
        match event["event"]:
            case "opened":
                self.opened[values["variant"]] = (values["device"], tuple(NodePlacement(*each) for each in values["nodes"]))
            case "skipped":
                self.skipped[values["variant"]] = values["reason"]
            case "sizes":
                self.sizes[values["variant"]] = tuple(values["sizes"])
            case "overhead":
                self.overheads_s[values["variant"]] = values["seconds"]
            case "limit":
                self.limits[values["device"]] = higher(Limit(**values), self.limits.get(values["device"]))
            case "machine":
                self.machine.append(MachineState(**{**values, "remarks": tuple(values["remarks"])}))
            case "environment":
                self.environment = Environment(**values)
            case "cold":
                self.cold.append(ColdStart(**values))
            case "failed":
                self.damaged |= values["damaged"]
                failure = Failure(values["variant"], f"batch {values['batch_size']}, {values['scope']}: {values['reason']}")
                if failure not in self.failed:  # it does so in every process
                    self.failed.append(failure)
            case "cases":
                self.cases = values["count"]
            case "case":
                times = self._times(event)
                times.launches_per_block = values["launches_per_block"]
                times.warmup_launches += values["warmup_launches"]
                times.steady &= values["steady"]
            case "visit":
                self._visit(event, process)
            case "stop":
                self._times(event).stops[process] = values["reason"]
            case "error":
                raise KINDS[values["kind"]](values["message"])

    def _times(self, event: Mapping[str, Any]) -> Times:
        return self.times.setdefault((event["variant"], event["batch_size"], event["scope"]), Times())

    def _visit(self, event: Mapping[str, Any], process: int) -> None:
        times = self._times(event)
        for name in TIMES:
            times.raw[name] += event.get(name, ())
        times.visits.append(
            Visit(
                process=process,
                round=event["round"],
                samples=len(event["times_s"]),
                singles=len(event["single_times_s"]),
                window_images=event["window_images"],
                window_s=event["window_s"],
                energy_j=event["energy_j"],
                flag=event["flag"],
            )
        )


def higher(one: Limit, other: Limit | None) -> Limit:
    """The best of two measurements of one device's limit, rate by rate."""
    if other is None:
        return one

    def best(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
        return {name: max(a.get(name, 0.0), b.get(name, 0.0)) for name in (*a, *(name for name in b if name not in a))}

    known = [bps for bps in (one.pcie_bps, other.pcie_bps) if bps is not None]
    return Limit(
        device=one.device,
        flops=best(one.flops, other.flops),
        memory_bps=max(one.memory_bps, other.memory_bps),
        pcie_bps=max(known) if known else None,
        bandwidths_bps=best(one.bandwidths_bps, other.bandwidths_bps),
    )


def gather(plan: Plan, cold_start: bool, progress: Progress) -> Gathered:
    """Run every process of the plan, and a cold start of every variant if asked for.

    Ctrl-C and a worker that dies end it early: what was sent by then is returned, with `partial` saying so.

    Args:
        progress: called after each visit with visits done, visits in all, and the variant.

    Raises:
        BadInput, Unusable: what a worker reports, or a worker that died, before anything was measured.
        KeyboardInterrupt: before anything was measured.
    """
    found = Gathered()
    done = 0
    try:
        for process in range(plan.processes):
            _run(plan, process, found, progress)
            if not found.opened:
                return found
            done += 1
            plan = dataclasses.replace(plan, batch_sizes={**plan.batch_sizes, **found.sizes}, blocks=_blocks(found))
        if cold_start:
            for variant in found.opened:
                try:
                    for event in _events({"plan": plan.to_json(), "cold": variant, "spawned_s": time.monotonic()}):
                        found.take(event, 0)
                except LenetDeployError as error:
                    found.failed.append(Failure(variant, f"cold start: {error}"))
    except (KeyboardInterrupt, LenetDeployError) as error:
        visits = sum(len(times.visits) for times in found.times.values())
        if not visits:
            raise
        if done == plan.processes:
            found.partial = "interrupted during the cold starts: every round is complete, and cold starts are missing"
        else:
            found.partial = f"interrupted after {visits} visits: fewer samples than the profile asks for, and the last round is incomplete"
        if isinstance(error, LenetDeployError):
            found.partial = f"ended early after {visits} visits: {error}"
            found.failed.append(Failure(f"process {done + 1}", str(error)))
    return found


def _run(plan: Plan, process: int, found: Gathered, progress: Progress) -> None:
    done = 0
    for event in _events({"plan": plan.to_json(), "process": process}):
        found.take(event, process)
        if event["event"] == "visit":
            done += 1
            in_all = found.cases * plan.rounds  # in each process
            progress(process * in_all + min(done, in_all), plan.processes * in_all, event["variant"])


def _blocks(found: Gathered) -> tuple[tuple[str, int, str, int], ...]:
    return tuple((*key, times.launches_per_block) for key, times in found.times.items())


def _events(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What a fresh worker sends for one request, as it comes. Leaving early ends the worker."""
    with tempfile.TemporaryFile() as errors, _started(errors) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once; what it said comes below
            worker.stdin.write(json.dumps(request))
            worker.stdin.close()
        last = {}
        with Watchdog(worker) as watchdog:
            for line in worker.stdout:
                watchdog.heard()
                try:
                    last = json.loads(line)
                except ValueError:  # it died while it wrote
                    break
                yield last
            code = worker.wait()
        if last.get("event") != "done":
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()
            why = f"signal {-code}" if code < 0 else f"exit code {code}"
            if watchdog.bit:
                why = f"nothing to say for {SILENCE_S:.0f} s"
            raise Unusable(f"a measuring process ended with {why}: {said[-1] if said else 'it said nothing'}; run the bench again")


class Watchdog:
    """Ends a worker of which nothing is heard for SILENCE_S."""

    def __init__(self, worker: subprocess.Popen[str]) -> None:
        self._worker = worker
        self.bit = False

    def __enter__(self) -> Watchdog:
        self._wait()
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()

    def heard(self) -> None:
        """Begin to wait anew."""
        self._timer.cancel()
        self._wait()

    def _wait(self) -> None:
        self._timer = threading.Timer(SILENCE_S, self._bite)
        self._timer.daemon = True
        self._timer.start()

    def _bite(self) -> None:
        self.bit = True
        self._worker.kill()


@contextlib.contextmanager
def _started(errors: Any) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as worker:
        try:
            yield worker
        finally:
            worker.kill()
