"""The bench run: cases interleaved in seeded random order over several rounds, so that drift is shared by all."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from lenet_deploy.bench.timing import Calibration, calibrate, time_block, timer_overhead_s
from lenet_deploy.data import normalise_into
from lenet_deploy.devices import synchronise
from lenet_deploy.errors import DamagedFile, UnknownName, first_line
from lenet_deploy.records import Measurement, Preprocessing
from lenet_deploy.runtimes import Session
from lenet_deploy.variants import Variant

SCOPES = ("device", "e2e")


@dataclass(frozen=True)
class Profile:
    """How much time a bench may take.

    Attributes:
        batch_sizes: what `--batch` defaults to.
        rounds: times every case is visited.
        visit_s: seconds of timed blocks in one visit.
        window_s: seconds of back-to-back launches in one visit, for throughput.
        warmup_s: longest warm-up at a case's first visit.
        core_only: leave out variants that are not core.
    """

    name: str
    batch_sizes: tuple[int, ...]
    rounds: int
    visit_s: float
    window_s: float
    warmup_s: float
    core_only: bool


PROFILES: tuple[Profile, ...] = (
    Profile("quick", (1, 8, 64), rounds=3, visit_s=0.08, window_s=0.06, warmup_s=0.3, core_only=True),
    Profile("full", (1, 8, 64, 512), rounds=10, visit_s=0.25, window_s=0.25, warmup_s=2.0, core_only=False),
)
SETTLE_S = 0.1  # idle workers of ONNX Runtime spin for up to 50 ms after its last run and would take a core from the next case
REVISIT_LAUNCHES = 5  # before the times of a later visit: caches and thread pools were another case's


@dataclass(eq=False)
class Case:
    """One variant under one workload while it is being measured; the raw times end up in a Measurement.

    Attributes:
        session: shared by the variant's cases, so each visit binds anew.
        images: uint8 (N, C, H, W) in host memory.
    """

    variant: Variant
    session: Session
    images: torch.Tensor
    scope: str
    preprocessing: Preprocessing
    size_bytes: int
    accuracy: float | None
    calibration: Calibration | None = None
    times_s: list[float] = field(default_factory=list)
    window_images: int = 0
    window_s: float = 0.0

    def visit(self, profile: Profile, overhead_s: float) -> None:
        """Measure for one visit: blocks of complete launches, then a window of back-to-back ones."""
        start, finish = self._bound()
        time.sleep(SETTLE_S)

        def launch() -> None:
            finish(start())

        if self.calibration is None:
            try:
                launch()
            except Exception as error:  # whatever a runtime raises for a graph that does not take this batch
                batch = len(self.images)
                raise DamagedFile(f"{self.variant.name} does not run at batch {batch}: {first_line(error)}; see parity") from None
            self.calibration = calibrate(launch, profile.warmup_s, overhead_s)
        else:
            time_block(launch, REVISIT_LAUNCHES)
        launches = self.calibration.launches_per_block
        end = time.perf_counter() + profile.visit_s
        while True:
            self.times_s.append(time_block(launch, launches) / launches)
            if time.perf_counter() >= end:
                break
        self._window(start, finish, profile.window_s)

    def _window(self, start: Callable[[], torch.Tensor], finish: Callable[[torch.Tensor], object], limit_s: float) -> None:
        """Launches without waiting in between, the last one waited for."""
        assert self.calibration is not None
        burst = max(1, int(limit_s / 4 / self.calibration.launch_s)) if self.calibration.launch_s else 1
        begin = time.perf_counter()
        while True:
            for _ in range(burst):
                output = start()
            finish(output)
            self.window_images += burst * len(self.images)
            if time.perf_counter() - begin >= limit_s:
                break
        self.window_s += time.perf_counter() - begin

    def _bound(self) -> tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], object]]:
        """How this case starts a launch, and how it waits for one."""
        session, device = self.session, self.session.device
        buffer = session.bind(len(self.images))
        if self.scope == "device":
            normalise_into(buffer, self.images.to(device), self.preprocessing)
            return session.launch, lambda output: synchronise(device)
        host = self.images.pin_memory() if device.type == "cuda" else self.images

        def start() -> torch.Tensor:
            normalise_into(buffer, host.to(device, non_blocking=True), self.preprocessing)
            return session.launch().to("cpu", copy=True)  # waits for the scores: they are in host memory afterwards

        return start, lambda output: None

    def measurement(self) -> Measurement:
        """The raw times and where they come from."""
        assert self.calibration is not None
        return Measurement(
            variant=self.variant.name,
            device=str(self.session.device),
            batch_size=len(self.images),
            scope=self.scope,
            times_s=tuple(self.times_s),
            launches_per_block=self.calibration.launches_per_block,
            window_images=self.window_images,
            window_s=self.window_s,
            warmup_launches=self.calibration.warmup_launches,
            size_bytes=self.size_bytes,
            accuracy=self.accuracy,
            node_providers=self.session.node_providers,
        )


def measure(cases: Sequence[Case], profile: Profile, progress: Callable[[int, int, str], None], seed: int = 0) -> tuple[Measurement, ...]:
    """Visit every case `profile.rounds` times, each round in a new seeded random order; measurements in the cases' order.

    Args:
        progress: called after each visit with visits done, visits in all, and the variant.
    """
    overhead_s = timer_overhead_s()
    shuffle = random.Random(seed)
    done, total = 0, profile.rounds * len(cases)
    for _ in range(profile.rounds):
        for case in shuffle.sample(cases, len(cases)):
            case.visit(profile, overhead_s)
            done += 1
            progress(done, total, case.variant.name)
    return tuple(case.measurement() for case in cases)


def find_profile(name: str) -> Profile:
    """The profile of that name; raises UnknownName."""
    for profile in PROFILES:
        if profile.name == name:
            return profile
    raise UnknownName("profile", name, (profile.name for profile in PROFILES))
