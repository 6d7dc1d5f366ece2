"""What `bench`, its scenarios and traces, and `compare` find, as frozen values. Raw times are stored, statistics are derived from them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lenet_deploy import order_statistics
from lenet_deploy.records import Environment, Failure, NodePlacement


@dataclass(frozen=True)
class Visit:
    """An uninterrupted stretch of launches of one case: what a bench interleaves, pairs and resamples.

    Attributes:
        process: number of the worker process, from 0.
        round: number of the pass over all cases in that process, from 0.
        samples: how many of the measurement's `times_s` are this visit's, in order.
        singles: how many of its `single_times_s` are.
        window_images, window_s: images and wall-clock seconds of launches back to back, the last one waited for.
        energy_j: what the GPU drew during the window; None where it does not say.
        flag: why the visit is kept out of the statistics, e.g. a throttled clock; None for one that counts.
    """

    process: int
    round: int
    samples: int
    singles: int
    window_images: int
    window_s: float
    energy_j: float | None = None
    flag: str | None = None


@dataclass(frozen=True)
class Measurement:
    """The raw times of one variant under one workload; everything else is derived.

    Attributes:
        scope: `device` (input resident on the device, to outputs ready) or `e2e` (uint8 in host memory to logits there).
        times_s: seconds per launch; each is a block's time divided by `launches_per_block`.
        launches_per_block: launches between two readings of the clock.
        visits: where the times come from, in order.
        warmup_launches: launches before the first kept time, over all processes.
        steady: whether each warm-up ended because launches were steady, rather than at its cap.
        stop: why no more was measured: the weakest of STOPS over all processes.
        single_times_s: seconds of launches timed alone; empty where `times_s` are that already.
        gpu_times_s: seconds between CUDA events around the model alone, on the stream it runs on, with the host out of the way.
        enqueue_times_s: seconds until the host may go on, of launches on CUDA.
        h2d_times_s, d2h_times_s: seconds of the copies to and from the GPU alone.
        overhead_s: seconds of a launch that do not grow with the batch.
        floors_s: the least that this launch can take on this device, by what limits it: `compute`, `memory`, `pcie`.
        node_providers: placement of each ONNX node.
    """

    variant: str
    device: str
    batch_size: int
    scope: str
    times_s: tuple[float, ...]
    launches_per_block: int
    visits: tuple[Visit, ...]
    warmup_launches: int
    stop: str
    size_bytes: int
    accuracy: float | None
    steady: bool = True
    single_times_s: tuple[float, ...] = ()
    gpu_times_s: tuple[float, ...] = ()
    enqueue_times_s: tuple[float, ...] = ()
    h2d_times_s: tuple[float, ...] = ()
    d2h_times_s: tuple[float, ...] = ()
    overhead_s: float | None = None
    floors_s: Mapping[str, float] = field(default_factory=dict)
    node_providers: tuple[NodePlacement, ...] = ()

    @property
    def by_visit(self) -> tuple[tuple[Visit, tuple[float, ...]], ...]:
        """The visits that count, each with its `times_s`."""
        ends = itertools.accumulate(visit.samples for visit in self.visits)
        return tuple(
            (visit, self.times_s[end - visit.samples : end])
            for visit, end in zip(self.visits, ends, strict=True)
            if visit.samples and visit.flag is None
        )

    @property
    def kept_s(self) -> tuple[float, ...]:
        """`times_s` of the visits that count."""
        return tuple(itertools.chain.from_iterable(times for _, times in self.by_visit))

    @property
    def kept_singles_s(self) -> tuple[float, ...]:
        """Singly timed launches of the visits that count."""
        if self.launches_per_block == 1:
            return self.kept_s
        ends = itertools.accumulate(visit.singles for visit in self.visits)
        kept = (self.single_times_s[end - v.singles : end] for v, end in zip(self.visits, ends, strict=True) if v.flag is None)
        return tuple(itertools.chain.from_iterable(kept))

    @property
    def flagged(self) -> int:
        """Samples kept out of the statistics."""
        return sum(visit.samples for visit in self.visits if visit.flag is not None)

    @property
    def median_s(self) -> float:
        """Median seconds per launch."""
        return order_statistics.median(self.kept_s)

    @property
    def ci95_s(self) -> tuple[float, float] | None:
        """95 % confidence interval of the median; None with fewer than six visits, where none exists."""
        return order_statistics.grouped_median_ci95([times for _, times in self.by_visit])

    @property
    def percentiles_s(self) -> Mapping[str, float | None]:
        """`p90`, `p95`, `p99` and `p99.9` of singly timed launches; None for one with too few samples."""
        singles = self.kept_singles_s
        return {f"p{percent:g}": order_statistics.percentile(singles, percent) for percent in order_statistics.MIN_SAMPLES}

    @property
    def throughput_ips(self) -> float:
        """Images per second of wall clock, launches back to back."""
        kept = [visit for visit in self.visits if visit.flag is None]
        return sum(visit.window_images for visit in kept) / sum(visit.window_s for visit in kept)

    @property
    def energy_per_image_j(self) -> float | None:
        """Joules that the GPU drew per image, launches back to back; None where it does not say."""
        known = [visit for visit in self.visits if visit.flag is None and visit.energy_j is not None]
        images = sum(visit.window_images for visit in known)
        return sum(visit.energy_j or 0.0 for visit in known) / images if images else None

    @property
    def limit_fraction(self) -> float | None:
        """Share of the physical limit: the longest floor in the median; None where the limit was not measured."""
        return max(self.floors_s.values()) / self.median_s if self.floors_s else None

    @property
    def bound(self) -> str | None:
        """What binds: `launch`, `pcie`, `compute` or `memory`, by TensorRT's rules (sampleReporting.cpp); None where unknown.

        A launch whose fixed part is more than 0.8 of it is bound by that, unless the GPU computes for as much of it (the host then waits
        in the launch). One whose copies take at least as long as the GPU computes is bound by them. Any other is bound by the longest
        floor; on a CPU by its fixed part where that is longer.
        """
        gpu_s = order_statistics.median(self.gpu_times_s) if self.gpu_times_s else 0.0
        fixed_s = self.overhead_s or 0.0
        if fixed_s > LAUNCH_BOUND * self.median_s >= gpu_s:
            return "launch"
        copies = [order_statistics.median(times) for times in (self.h2d_times_s, self.d2h_times_s) if times]
        if self.scope == "e2e" and gpu_s and copies and max(copies) >= gpu_s:
            return "pcie"
        if self.floors_s and not gpu_s and fixed_s > max(self.floors_s.values()):
            return "launch"
        return max(self.floors_s, key=lambda kind: self.floors_s[kind]) if self.floors_s else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader must know before citing the numbers."""
        found = list(order_statistics.warnings([times for _, times in self.by_visit], self.flagged))
        if not self.kept_s:
            return tuple(found)
        if not self.steady:
            found.append(f"not steady when the warm-up ended, after {self.warmup_launches} launches")
        kept = [visit for visit, _ in self.by_visit]
        window_s = min(sum(v.window_s for v in kept if v.process == process) for process in {v.process for v in kept})
        if window_s < MIN_WINDOW_S:
            found.append(f"images/s from {window_s:.2g} s of launches, and {MIN_WINDOW_S:g} s are the least to rely on")
        apart = self.batch_size / self.throughput_ips / self.median_s
        if apart > MEAN_APART:
            found.append(f"launches back to back took {apart:.3g} times the median each: read images/s")
        if self.limit_fraction is not None and self.limit_fraction > 1:
            found.append(BEYOND_LIMIT.format(self.limit_fraction))
        return tuple(found)


BEYOND_LIMIT = (
    "{:.1%} of the limit: its convolutions take fewer multiplications than their definition, "
    "or the device was disturbed while its limit was measured"
)
MIN_WINDOW_S = 0.5  # nvbench's least accumulated time, by process
MEAN_APART = 1.25  # a mean this far above the median has a tail that the median does not show
LAUNCH_BOUND = 0.8  # TensorRT, sampleReporting.cpp: enqueue against compute

# Why a process ended with a case, from the strongest to the weakest reason. `precise`: the 95 % interval of its median is narrow enough.
# `settled`: the noise between visits is known. `rounds`: as many as were asked for. `time limit`: the profile's. `interrupted`: by Ctrl-C,
# or it failed, or its process died.
STOPS = ("precise", "settled", "rounds", "time limit", "interrupted")


@dataclass(frozen=True)
class Limit:
    """What a device can do at most, measured beside the variants.

    Attributes:
        flops: floating-point operations per second of a large matrix product, by precision.
        memory_bps: bytes per second read and written where no cache holds them: by a copy or by reading alone, whichever is faster.
        pcie_bps: bytes per second from pinned host memory to the device; None on the CPU.
        bandwidths_bps: bytes per second of smaller working sets, which caches hold, by their bytes in decimal; the last is `memory_bps`.
    """

    device: str
    flops: Mapping[str, float]
    memory_bps: float
    pcie_bps: float | None = None
    bandwidths_bps: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ColdStart:
    """One variant in a fresh process, seconds each.

    Attributes:
        import_s: importing what the variant needs.
        load_s: opening the artifact as a session.
        first_s: the first inference at batch 1.
        steady_s: from then on until launches were steady; None where they did not within 300 of them or two seconds.
        total_s: from the start of the process to the first answer.
        batch_size: the largest of the run, launched once at the end, for the memory.
        peak_memory_bytes: most memory held, on the CPU of the process; of the GPU what came to be used since the start.
    """

    variant: str
    import_s: float
    load_s: float
    first_s: float
    steady_s: float | None
    total_s: float
    batch_size: int
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Speedup:
    """How many times as fast as the baseline, paired visit by visit.

    Attributes:
        ratio: median over the pairs of baseline time to variant time.
        ci95: bootstrap interval of it; None with too few pairs.
        pairs: visits of the same round of the same process.
    """

    variant: str
    baseline: str
    batch_size: int
    scope: str
    ratio: float
    ci95: tuple[float, float] | None
    pairs: int


@dataclass(frozen=True)
class BatchChoice:
    """The batch size to use for one variant, from a sweep.

    Attributes:
        best: batch size of the highest throughput.
        within_slo: that of the highest throughput whose latency is within the budget; None where no size is, or none was asked for.
        statistic: what was compared with the budget: `p99` where all sizes have it, else `median`.
    """

    variant: str
    scope: str
    best: int
    within_slo: int | None
    statistic: str


@dataclass(frozen=True)
class MachineState:
    """What the machine was doing while a worker process measured.

    Attributes:
        process: number of the worker process.
        cpu: affinity, governor, load and share of stolen time.
        gpu: clocks, temperature, throttle reasons, power and other processes; empty without one.
        remarks: what makes it a noisy machine, in words.
    """

    process: int
    cpu: Mapping[str, Any]
    gpu: Mapping[str, Any]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class LoadProbe:
    """One rate that was tried in search of the highest valid one.

    Attributes:
        target_qps: queries that arrived per second.
        valid: LoadGen's verdict.
        latency_p99_s: seconds; None with too few queries to claim it, as where LoadGen gave up.
        queries: how many arrived.
    """

    target_qps: float
    valid: bool
    latency_p99_s: float | None
    queries: int


@dataclass(frozen=True)
class LoadResult:
    """One variant in one of MLPerf LoadGen's scenarios, from uint8 images in host memory to logits there.

    Attributes:
        scenario: `single-stream`, `multi-stream`, `server` or `offline`.
        valid: LoadGen's verdict.
        metric: what `value` is: `latency_p90_s` and `latency_p99_s` of a query, `qps` answered at the highest valid rate, or
            `throughput_ips`, images per second.
        queries: how many LoadGen issued; in `offline` one holds all images.
        latencies_s: seconds of a query by `p50`, `p90`, `p95`, `p97`, `p99` and `p99.9`; None with too few queries to claim it; empty
            for `offline`.
        settings: what LoadGen was asked for: durations, rates, bounds, batch size and seeds, by names that hold their units.
        summary: LoadGen's own words and figures.
        reasons: LoadGen's remarks on a result that is not valid.
        probes: the rates that were tried, in order; `server` only.
    """

    variant: str
    device: str
    scenario: str
    valid: bool
    metric: str
    value: float
    queries: int
    latencies_s: Mapping[str, float | None]
    settings: Mapping[str, float]
    summary: Mapping[str, str]
    reasons: tuple[str, ...] = ()
    probes: tuple[LoadProbe, ...] = ()


@dataclass(frozen=True)
class BenchReport:
    """All measurements of one bench run.

    Attributes:
        options: the profile and every switch that decides a number.
        partial: why it is not complete; None for a whole one.
        failed: what began and failed: cases, cold starts, processes.
    """

    measurements: tuple[Measurement, ...]
    skipped: tuple[Failure, ...]
    environment: Environment
    options: Mapping[str, Any] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()
    machine: tuple[MachineState, ...] = ()
    cold_starts: tuple[ColdStart, ...] = ()
    speedups: tuple[Speedup, ...] = ()
    batches: tuple[BatchChoice, ...] = ()
    loads: tuple[LoadResult, ...] = ()
    partial: str | None = None
    failed: tuple[Failure, ...] = ()


@dataclass(frozen=True)
class OperatorTime:
    """One operator of a trace, per launch.

    Attributes:
        name: as the runtime calls it: torch's operator, ONNX Runtime's kind of node, the GPU's kernel.
        node: which node of the graph, where the runtime says so; a fused one is called after a node or a value that it replaces.
        calls: how often a launch calls it.
        self_s: seconds of a launch that it takes, without the operators inside it.
    """

    name: str
    node: str | None
    calls: float
    self_s: float


@dataclass(frozen=True)
class TraceReport:
    """Where the time of a launch goes: the input on the device, to the output ready there.

    Times are means over the middle half of the launches by their length, so that one that was interrupted does not count.

    Attributes:
        launches: how many are in the file.
        launch_s: seconds of a launch with the profiler on.
        plain_s: seconds of a launch without it, by the same statistic.
        operators: on the host, the longest first.
        wrappers: what holds operators and is none itself, as a session's run or an interpreter's frame; their `self_s` is part of `idle_s`.
        idle_s: seconds of a launch in which no operator ran.
        kernels: on the GPU, copies among them, the longest first; empty on the CPU.
        gpu_idle_s: seconds of a launch in which nothing ran on the GPU; None on the CPU.
        path: the Chrome trace.
        notes: what a reader must know of the times.
    """

    variant: str
    device: str
    batch_size: int
    launches: int
    launch_s: float
    plain_s: float
    operators: tuple[OperatorTime, ...]
    wrappers: tuple[OperatorTime, ...]
    idle_s: float
    kernels: tuple[OperatorTime, ...]
    gpu_idle_s: float | None
    path: str
    notes: tuple[str, ...]
    environment: Environment

    @property
    def gap_share(self) -> float:
        """Share of a launch, 0 to 1, in which nothing ran: no kernel on CUDA, no operator on the CPU."""
        return (self.idle_s if self.gpu_idle_s is None else self.gpu_idle_s) / self.launch_s

    @property
    def kernels_per_launch(self) -> float | None:
        """GPU kernels that a launch starts, copies and fills left out; None on the CPU."""
        return None if self.gpu_idle_s is None else sum(each.calls for each in self.kernels if not each.name.startswith(COPIES))

    @property
    def slowdown(self) -> float:
        """How many times as long a launch takes with the profiler on."""
        return self.launch_s / self.plain_s

    def share(self, operator: OperatorTime) -> float:
        """Share of a launch, 0 to 1, that an operator takes itself."""
        return operator.self_s / self.launch_s


COPIES = ("Memcpy", "Memset")  # how CUPTI's names of what is no kernel begin


@dataclass(frozen=True)
class Comparison:
    """One case, a variant under one workload, in two results of bench.

    Attributes:
        verdict: one of VERDICTS.
        ratio: median time in head divided by that in base, 1.02 for 2 % more; across machines each is first divided by the baseline's.
        ci95: bootstrap interval of it; None with too few visits.
        base_median_s, head_median_s: seconds per launch; None where that file did not measure it, or only with samples that were flagged.
        base_visits, head_visits: visits that count; across machines, those that the baseline has too.
        reason: why it is inconclusive or only in one file.
        warnings: what the times of either side say against themselves, as `base: noisy ...`.
    """

    variant: str
    device: str
    batch_size: int
    scope: str
    verdict: str
    ratio: float | None = None
    ci95: tuple[float, float] | None = None
    base_median_s: float | None = None
    head_median_s: float | None = None
    base_visits: int = 0
    head_visits: int = 0
    reason: str | None = None
    warnings: tuple[str, ...] = ()


# `slower` and `faster`: the whole interval is beyond the threshold; `same`: the whole interval is within it.
VERDICTS = ("slower", "inconclusive", "same", "faster", "only in base", "only in head")


@dataclass(frozen=True)
class ComparisonReport:
    """Two results of bench, case by case: those of base in its order, then those of head alone.

    Attributes:
        threshold_percent: change that is taken for none.
        baselines: the variant that times are relative to, by device; empty unless across machines.
        notes: what a reader should know, e.g. versions that differ.
    """

    rows: tuple[Comparison, ...]
    threshold_percent: float
    across_machines: bool
    baselines: Mapping[str, str]
    notes: tuple[str, ...]
    base_environment: Environment
    head_environment: Environment

    @property
    def verdict(self) -> str:
        """`slower` when any case is, else `incomplete` when head lacks one of base, else `inconclusive` when any is, else `not slower`."""
        found = {row.verdict for row in self.rows}
        if "only in base" in found and "slower" not in found:
            return "incomplete"  # a variant that no longer runs must not pass a gate
        return next((verdict for verdict in ("slower", "inconclusive") if verdict in found), "not slower")
