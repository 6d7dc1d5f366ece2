"""A variant under load: MLPerf LoadGen's four scenarios, its own summary and its own verdict.

A query's samples are uint8 images in host memory, its answer the logits in host memory: the scope `e2e`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lenet_deploy.bench.load import DURATION_S, MIN_QUERIES, Load, Scenario, find_scenario, judge
from lenet_deploy.bench.loadgen import Context, Respond, load_binding, run_test
from lenet_deploy.bench_records import LoadProbe, LoadResult
from lenet_deploy.data import normalise_into
from lenet_deploy.errors import BadInput, LenetDeployError, Unusable, first_line
from lenet_deploy.records import ImageInput

if TYPE_CHECKING:
    import torch

    from lenet_deploy.runtimes import Session

Progress = Callable[[int, int, str], None]

LATENCY_BOUND_S = 0.015  # MLPerf's bound of its image classifier in Server, ResNet-50 (mlperf.conf)
SAMPLES_PER_QUERY = 8  # MLPerf's MultiStream
BATCH_SIZE = 64

# How the highest valid QPS is found. Each rate that is tried is short: a fifth of the run, and long enough for a queue to show. At a rate
# that is too high by the tolerance the queue grows to the bound in bound / tolerance.
TOLERANCE = 0.05
PROBE_SHARE = 0.2
MAX_PROBES = 12
MAX_HALVINGS = 4  # below a 32nd of the rate that one image at a time allows, load is not what makes answers late
START = 0.5  # share of the rate that one image at a time allows

FINAL_TRIES = 3  # of the whole run: a longer one may meet a stall that the probe did not
# LoadGen prepares its queries beforehand, for twice the rate that it expects, but only 1.1 times that in Offline. With too few of them a
# run is too short, and invalid.
HEADROOM = 1.5
MAX_PREPARATIONS = 3
WARMUP_LAUNCHES = 20
WARMUP_S = 0.1


def run_scenario(
    session: Session,
    images: torch.Tensor,
    preprocessing: ImageInput,
    scenario: str,
    *,
    variant: str,
    duration_s: float = DURATION_S,
    latency_bound_s: float = LATENCY_BOUND_S,
    samples_per_query: int = SAMPLES_PER_QUERY,
    batch_size: int = BATCH_SIZE,
    progress: Progress = lambda done, total, what: None,
) -> LoadResult:
    """What MLPerf LoadGen says of an opened session in one of `load.SCENARIOS`.

    `single-stream`: one image at a time, the next when the last is answered. `multi-stream`: the same with `samples_per_query` images.
    `offline`: all images at once, answered in launches of `batch_size`. `server`: images arrive at random (Poisson) at a rate; a thread
    answers what is waiting, up to `batch_size` at once, as serving systems do; the result is the highest rate, within TOLERANCE, at which
    99 % are answered within `latency_bound_s` in LoadGen's judgement. It is found by bisection over short runs, and confirmed by one of
    `duration_s`; where that fails, by another at a lower rate. The result lists all that came before the last.

    Args:
        images: uint8 (N, C, H, W) in host memory, of the model's size; LoadGen asks for them in a seeded random order.
        variant: its name, for the result.
        duration_s: least seconds of load. A run goes on until it has MIN_QUERIES queries, too, but for `offline`.
        latency_bound_s: seconds, for `server` only.
        progress: called after each run with those done, those there may be, and the variant.

    Raises:
        UnknownName: no such scenario.
        BadInput: a number that makes no sense.
        Unusable: LoadGen is not installed, or the session failed under load.
        KeyboardInterrupt: on Ctrl-C, as soon as LoadGen has ended; no thread, file or folder is left.
    """
    kind = find_scenario(scenario)
    _check(images, duration_s, latency_bound_s, samples_per_query, batch_size)
    load_binding()  # says what is missing before anything is measured
    responder = Responder(session, images, preprocessing)
    per_launch = {"single-stream": 1, "multi-stream": samples_per_query}.get(kind.name, batch_size)
    try:
        largest_s = _fastest_s(responder, per_launch, len(images))
        launch_s = _fastest_s(responder, 1, len(images)) if kind.name == "server" else largest_s
        for size in range(1, per_launch + 1) if kind.name == "server" else ():  # a CUDA graph is recorded at the first sight of a size
            responder([index % len(images) for index in range(size)])
    except LenetDeployError:
        raise
    except Exception as error:  # whatever a runtime raises
        raise Unusable(f"{variant} does not answer a batch of {per_launch} ({first_line(error)}); see parity") from error
    least, qps = (1, HEADROOM * per_launch / launch_s) if kind.name == "offline" else (MIN_QUERIES, 1 / launch_s)
    load = Load(kind.loadgen, duration_s, least, qps, latency_bound_s, samples_per_query, per_launch)
    bench = _Bench(kind, variant, str(session.device), len(images), responder, _context(session.device), progress)
    return bench.server(load) if kind.name == "server" else bench.prepared(load)


class Responder:
    """From the numbers of images to their logits in host memory, through a session.

    Each batch size is bound when the last launch had another one; on CUDA images go through pinned memory.
    """

    def __init__(self, session: Session, images: torch.Tensor, preprocessing: ImageInput) -> None:
        import torch

        self._session, self._preprocessing = session, preprocessing
        self._images = images.pin_memory() if session.device.type == "cuda" else images
        self._staging = self._buffer = torch.empty(0)

    def __call__(self, indices: Sequence[int]) -> torch.Tensor:
        """float32 (len(indices), classes), new memory."""
        import torch

        count, device = len(indices), self._session.device
        if count != len(self._buffer):
            self._buffer = self._session.bind(count)
            self._staging = torch.empty(count, *self._images.shape[1:], dtype=torch.uint8, pin_memory=device.type == "cuda")
        if count == 1:
            chosen = self._images[indices[0]][None]
        else:
            chosen = torch.index_select(self._images, 0, torch.tensor(indices), out=self._staging)
        normalise_into(self._buffer, chosen.to(device, non_blocking=True), self._preprocessing)
        return self._session.launch().to("cpu", copy=True)  # waits for the scores


def highest_valid(valid: Callable[[float], bool], start: float) -> float | None:
    """The highest rate found valid, or None where none is.

    Doubles or halves from `start` to a valid and an invalid rate, and bisects between them, in ratios, until they are TOLERANCE apart or
    MAX_PROBES rates were tried. A rate that fails is tried once more before it is believed: a stall of the machine makes a valid one fail,
    while nothing makes an invalid one pass.
    """
    tried = 0

    def passes(rate: float) -> bool:
        nonlocal tried
        tried += 1
        return valid(rate) or valid(rate)

    if passes(start):
        low, high = start, 2 * start
        while tried < MAX_PROBES and passes(high):
            low, high = high, 2 * high
    else:
        low, high = start / 2, start
        while not passes(low):
            if tried > MAX_HALVINGS:
                return None
            low, high = low / 2, low
    while tried < MAX_PROBES and high > low * (1 + TOLERANCE):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


@dataclass(frozen=True, eq=False)
class _Bench:
    """What stays the same over the LoadGen tests of one scenario."""

    kind: Scenario
    variant: str
    device: str
    images: int
    respond: Respond
    context: Context
    progress: Progress

    def once(self, load: Load) -> LoadResult:
        """One LoadGen test."""
        return judge(self.kind, self.variant, self.device, load, *run_test(load, self.images, self.respond, self.context))

    def prepared(self, load: Load) -> LoadResult:
        """One test for which LoadGen has prepared enough queries; with too few it is done again with twice as many."""
        for attempt in range(1, MAX_PREPARATIONS + 1):
            result = self.once(load)
            enough = result.summary.get("Min duration satisfied") != "NO"
            self.progress(MAX_PREPARATIONS if enough else attempt, MAX_PREPARATIONS, self.variant)
            if enough:
                break
            load = replace(load, qps=2 * load.qps)
        return result

    def server(self, load: Load) -> LoadResult:
        """Bisection, and then the whole run."""
        load = replace(load, duration_s=max(load.duration_s, load.latency_bound_s / TOLERANCE))
        probe_s = max(PROBE_SHARE * load.duration_s, load.latency_bound_s / TOLERANCE)
        probes: list[LoadProbe] = []
        total = 2 * MAX_PROBES + FINAL_TRIES

        def valid(qps: float) -> bool:
            result = self.once(replace(load, qps=qps, duration_s=probe_s))
            probes.append(_probe(result, qps))
            self.progress(len(probes), total, self.variant)
            return result.valid

        start = START * load.qps
        # Where one image alone takes longer than the bound, no rate helps: then LoadGen says so of a single one.
        found = highest_valid(valid, start) if 1 / load.qps <= load.latency_bound_s else None
        qps = found or min((probe.target_qps for probe in probes), default=start)
        for attempt in range(1, FINAL_TRIES + 1):
            result = self.once(replace(load, qps=qps))
            if result.valid or found is None or attempt == FINAL_TRIES:
                break
            probes.append(_probe(result, qps))
            self.progress(len(probes), total, self.variant)
            qps /= 1 + TOLERANCE
        self.progress(total, total, self.variant)
        return replace(result, probes=tuple(probes), settings={**result.settings, "full_runs": attempt})


def _probe(result: LoadResult, qps: float) -> LoadProbe:
    return LoadProbe(qps, result.valid, result.latencies_s.get("p99"), result.queries)


def _fastest_s(respond: Respond, count: int, images: int) -> float:
    """Seconds of the fastest of some launches, which warm the session up as well."""
    times: list[float] = []
    indices = [index % images for index in range(count)]
    begin = time.perf_counter()
    while len(times) < WARMUP_LAUNCHES or time.perf_counter() - begin < WARMUP_S:
        start = time.perf_counter()
        respond(indices)
        times.append(time.perf_counter() - start)
    return min(times)


def _context(device: torch.device) -> Context:
    """What a thread enters to compute as the calling one does: torch keeps inference mode and the current stream for each thread."""
    import torch

    if device.type != "cuda":
        return torch.inference_mode
    stream = torch.cuda.current_stream(device)

    @contextlib.contextmanager
    def on_the_same_stream() -> Iterator[None]:
        with torch.inference_mode(), torch.cuda.device(device), torch.cuda.stream(stream):
            yield

    return on_the_same_stream


def _check(images: torch.Tensor, duration_s: float, latency_bound_s: float, samples_per_query: int, batch_size: int) -> None:
    for what, number in (("duration", duration_s), ("latency bound", latency_bound_s)):
        if not (math.isfinite(number) and number > 0):
            raise BadInput(f"a load of {what} {number} s; it must be more than 0")
    if batch_size < 1:
        raise BadInput(f"a load of batch size {batch_size}; it must be at least 1")
    if not 1 <= samples_per_query <= len(images):
        raise BadInput(f"{samples_per_query} images per query, of {len(images)} images; it must be between 1 and that")
