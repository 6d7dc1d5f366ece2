"""One process's share of a bench: every case visited in rounds of seeded random order, so that drift is shared by all.

Knows sessions, a clock and a stream; what it learns it hands to `send`, one flat dictionary at a time, so that nothing measured is lost
when the process ends.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lenet_deploy.bench.scopes import Stream, Work, bind
from lenet_deploy.bench.timing import Calibration, Clock, calibrate, stop_reason, time_blocks
from lenet_deploy.errors import DamagedFile, LenetDeployError, Unusable, first_line
from lenet_deploy.order_statistics import median

if TYPE_CHECKING:
    import torch

    from lenet_deploy.bench.plan import Plan
    from lenet_deploy.records import ImageInput
    from lenet_deploy.runtimes import Session

Send = Callable[[dict[str, Any]], None]

REVISIT_LAUNCHES = 5  # before the times of a later visit: caches and thread pools were another case's
SINGLES_SHARE = 0.25  # of a visit is spent on launches timed alone, where blocks are longer
BURSTS = 10  # in a window on a GPU, at least; two of them are in the queue at any time
DETAIL_LAUNCHES = 20  # of each visit on a GPU are taken apart: enqueue, the GPU's own time, copies
HOLD, MAX_HOLD_S = 4.0, 2e-3  # times what the host needs to start a launch: the GPU is kept busy until it lies ready

# What a visit takes in all, in its timed launches: with launches timed alone on the CPU; with the window and the details on a GPU.
VISIT_COST = {"cpu": 1 + SINGLES_SHARE, "cuda": 2.5}

SWEEP_GAIN = 0.05  # Triton Model Navigator stops doubling the batch below this gain in throughput
SWEEP_TRIES = 3  # the best of them counts: noise only ever takes throughput away
SWEEP_MAX = 16384


class Watch(Protocol):
    """What the machine says about itself between visits."""

    def throttled(self) -> str | None:
        """Why the times of now do not count; None where they do."""

    def energy_j(self) -> float | None:
        """Joules that the GPU has drawn since some moment in the past; None where it does not say."""


@dataclass(eq=False)
class Case:
    """One variant under one workload in one process.

    Attributes:
        session: shared by the variant's cases, so each visit binds anew.
        images: uint8 (N, C, H, W) in host memory.
    """

    variant: str
    session: Session
    images: torch.Tensor
    scope: str
    preprocessing: ImageInput
    stream: Stream | None
    calibration: Calibration | None = None
    visits: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    stopped: bool = False

    @property
    def key(self) -> dict[str, Any]:
        """What the case is called in everything that is sent."""
        return {"variant": self.variant, "batch_size": len(self.images), "scope": self.scope}


@dataclass(frozen=True)
class Window:
    """Launches back to back, in wall-clock seconds and, where the GPU says, joules."""

    launches: int
    seconds: float
    energy_j: float | None


@dataclass(frozen=True)
class Bench:
    """What all cases of a process share.

    Attributes:
        overhead_s: of a reading of the clock.
    """

    plan: Plan
    send: Send
    watch: Watch
    overhead_s: float
    clock: Clock = time.perf_counter
    sleep: Callable[[float], None] = time.sleep

    def run(self, cases: Sequence[Case], process: int) -> None:
        """Rounds until every case has stopped, or one ends beyond the time limit: a round that has begun is completed."""
        shuffle = random.Random(f"{self.plan.seed}/{process}")  # an order, not a secret
        end = self.clock() + self.plan.limit_s / self.plan.processes
        last: Session | None = None
        for number in itertools.count():
            due = [case for case in cases if not case.stopped]
            if number and not self.plan.fixed and self.clock() >= end:
                for case in due:
                    self._stop(case, "time limit")
                return
            if not due:
                return
            for case in shuffle.sample(due, len(due)):
                try:
                    self.visit(case, number, last)
                except Exception as error:  # a case that fails, e.g. for want of memory, takes no other with it
                    self.fail(case, error)
                    continue
                last = case.session
                if number + 1 >= self.plan.rounds:
                    reason = "rounds" if self.plan.fixed else stop_reason(case.visits, case.seconds)
                    if reason:
                        self._stop(case, reason)

    def fitted(self, cases: Sequence[Case]) -> Bench:
        """With visits as short as they must be for the plan's rounds of `cases` to fit into its time limit; never longer than planned."""
        if self.plan.fixed or not cases:
            return self
        share = self.plan.limit_s / self.plan.processes / self.plan.rounds
        visit_s = share / sum(VISIT_COST["cuda" if case.stream else "cpu"] for case in cases)
        return dataclasses.replace(self, plan=dataclasses.replace(self.plan, visit_s=min(self.plan.visit_s, visit_s)))

    def fail(self, case: Case, error: Exception) -> None:
        """Give a case up, and send why."""
        case.stopped = True
        said = str(error) if isinstance(error, LenetDeployError) else f"{type(error).__name__}: {first_line(error)}"
        self.send({"event": "failed", **case.key, "reason": said, "damaged": isinstance(error, DamagedFile)})

    def _stop(self, case: Case, reason: str) -> None:
        case.stopped = True
        self.send({"event": "stop", **case.key, "reason": reason})

    def visit(self, case: Case, number: int, last: Session | None = None) -> None:
        """Measure one visit of one case, after one of the session `last`, and send its raw times."""
        work = self._bound(case, last)
        if case.calibration is None:
            case.calibration = self._calibrated(case, work)
            found = case.calibration
            sent = {"launches_per_block": found.launches_per_block, "warmup_launches": found.warmup_launches, "steady": found.steady}
            self.send({"event": "case", **case.key, **sent})
        else:
            for _ in range(REVISIT_LAUNCHES):
                work.launch()
        launches = case.calibration.launches_per_block
        times, window = self._timed(work, launches, case.stream)
        flag = self.watch.throttled() if case.stream else None  # a GPU that idles meanwhile clocks down
        singles = [] if launches == 1 else time_blocks(work.launch, 1, SINGLES_SHARE * self.plan.visit_s, self.clock)
        details = self._details(work, case.stream) if case.stream and not flag else {}
        case.visits += [] if flag else [times]
        case.seconds += window.seconds
        self.send(
            {
                "event": "visit",
                **case.key,
                "round": number,
                "times_s": times,
                "single_times_s": singles,
                **details,
                "window_images": window.launches * len(case.images),
                "window_s": window.seconds,
                "energy_j": window.energy_j,
                "flag": flag,
            }
        )

    def _calibrated(self, case: Case, work: Work) -> Calibration:
        """Warm up; the block length is that of earlier processes, so that all times of a measurement are alike."""
        found = calibrate(work.launch, self.plan.warmup_s, self.overhead_s, self.clock)
        known = {(variant, size, scope): launches for variant, size, scope, launches in self.plan.blocks}
        launches = known.get((case.variant, len(case.images), case.scope), found.launches_per_block)
        return dataclasses.replace(found, launches_per_block=launches)

    def _bound(self, case: Case, last: Session | None = None) -> Work:
        if last is not None and last is not case.session:
            self.sleep(last.settle_s)
        try:
            work = bind(case.session, case.images, case.scope, case.preprocessing, case.stream)
            work.launch()
        except Exception as error:  # whatever a runtime raises for a graph that does not take this batch
            said = f"{case.variant} does not run at batch {len(case.images)}: {first_line(error)}"
            if "out of memory" in str(error).lower():
                raise Unusable(f"{said}; use smaller batches") from None
            raise DamagedFile(f"{said}; see parity") from None
        return work

    def _timed(self, work: Work, launches: int, stream: Stream | None) -> tuple[list[float], Window]:
        """Seconds per launch by block, and the window that throughput comes from.

        On the CPU both are the same launches. On CUDA these are two stretches: launches each waited for, and launches of which only the
        last is.
        """
        times = time_blocks(work.launch, launches, self.plan.visit_s, self.clock)
        if stream is None:
            return times, Window(len(times) * launches, sum(times) * launches, None)
        burst = max(1, int(self.plan.visit_s / BURSTS / median(times)))
        before, start = self.watch.energy_j(), self.clock()
        count, mark = 0, stream.event()
        while count == 0 or self.clock() - start < self.plan.visit_s:
            for _ in range(burst):
                work.start()
            count += burst
            # Wait for the burst before this one: the GPU always has the next one at hand, and the host does not run away from it.
            mark, previous = stream.event(), mark
            previous.synchronize()
        stream.synchronise()
        seconds, after = self.clock() - start, self.watch.energy_j()
        return times, Window(count, seconds, None if before is None or after is None else after - before)

    def _details(self, work: Work, stream: Stream) -> dict[str, list[float]]:
        """A launch on a GPU taken apart, by what the measurement calls it: seconds of DETAIL_LAUNCHES of each.

        What the GPU's own clock says is of the GPU alone: it is held until everything between the events is enqueued, so that the host's
        pace does not count. `gpu_times_s` is of the model without copies.
        """
        found: dict[str, list[float]] = {"enqueue_times_s": []}
        for _ in range(DETAIL_LAUNCHES):
            before = self.clock()
            work.start()
            found["enqueue_times_s"].append(self.clock() - before)
            stream.synchronise()
        hold_s = min(MAX_HOLD_S, HOLD * median(found["enqueue_times_s"]))
        for name, part in {"gpu": work.compute, **work.copies}.items():
            found[f"{name}_times_s"] = [_gpu_s(part, stream, hold_s) for _ in range(DETAIL_LAUNCHES)]
        return found

    def overhead(self, case: Case) -> float:
        """Seconds of one launch at batch 1 in the scope `device`, after warm-up: the most that its fixed part can be."""
        return calibrate(self._bound(case).launch, self.plan.warmup_s, self.overhead_s, self.clock).launch_s

    def sweep(self, make: Callable[[int], Case]) -> tuple[int, ...]:
        """Batch sizes from 1, doubled until throughput gains less than SWEEP_GAIN; the last is the one that gained too little."""
        sizes: list[int] = []
        best = 0.0
        for size in itertools.takewhile(lambda size: size <= SWEEP_MAX, (2**power for power in itertools.count())):
            case = make(size)
            try:
                work = self._bound(case)
            except Unusable:  # the memory ends here
                if not sizes:
                    raise
                break
            launches = calibrate(work.launch, self.plan.warmup_s, self.overhead_s, self.clock).launches_per_block
            found = 0.0
            for _ in range(SWEEP_TRIES):
                _, window = self._timed(work, launches, case.stream)
                found = max(found, window.launches * size / window.seconds)
            sizes.append(size)
            if found < best * (1 + SWEEP_GAIN):
                break
            best = found
        return tuple(sizes)


def _gpu_s(start: Callable[[], object], stream: Stream, hold_s: float) -> float:
    """Seconds by the GPU's own clock between events around what `start` starts, on a GPU that is held for `hold_s` first."""
    stream.hold(hold_s)
    before = stream.event()
    start()
    after = stream.event()
    stream.synchronise()
    return before.elapsed_time(after) / 1e3
