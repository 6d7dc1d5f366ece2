"""The public function `benchmark`: from what is asked for to a report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lenet_deploy import environment
from lenet_deploy.bench.coordinator import Gathered, Key, Progress, gather
from lenet_deploy.bench.plan import SCOPES, Plan, Profile, find_profile
from lenet_deploy.bench.results import batch_choices, measurements
from lenet_deploy.bench_records import BenchReport, Measurement, Speedup
from lenet_deploy.errors import BadInput, DamagedFile, UnknownName, Unusable
from lenet_deploy.records import Failure
from lenet_deploy.sources import artifact_of, bundle_variants, on_device
from lenet_deploy.variants import VARIANTS, with_ort_options

if TYPE_CHECKING:
    from lenet_deploy.bundle import Bundle
    from lenet_deploy.variants import Variant

MAX_BATCH = 65_536  # beyond it a batch is a typing mistake, and its buffers would not fit


def silent(done: int, total: int, what: str) -> None:
    """The default progress: none."""


def benchmark(
    bundle: str | Path | Bundle,
    *,
    variants: Iterable[str] | None = None,
    batch_sizes: Sequence[int] | None = None,
    sweep: bool = False,
    slo_s: float | None = None,
    scopes: Sequence[str] = SCOPES,
    rounds: int | None = None,
    processes: int | None = None,
    limit_s: float | None = None,
    profile: str = "quick",
    baseline: str | None = None,
    cold_start: bool | None = None,
    threads: int | None = None,
    allow_tf32: bool = False,
    ort_options: Mapping[str, str] | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = silent,
) -> BenchReport:
    """Measure the variants of a bundle that this machine can run; the others are listed with the reason.

    Everything is measured in fresh worker processes. Ctrl-C ends it early with a report of what there is, marked as partial. What fails
    is listed in the report's `failed` and takes nothing else with it.

    Args:
        variants: globs over variant names; what the profile covers when None.
        batch_sizes: each at least 1; the profile's when None.
        sweep: find them instead: double each variant's batch until throughput stops growing.
        slo_s: latency budget in seconds, for the best batch size within it.
        scopes: `device`, `e2e` or both.
        rounds: times every case is visited in each process; as the profile and its stop rule say when None.
        processes: fresh worker processes; the profile's when None.
        limit_s: seconds of all processes together after which no further round begins; the profile's when None.
        profile: `quick` or `full`.
        baseline: variant that speed-ups are relative to; the first of each device when None.
        cold_start: time each variant's first answer in a process of its own; as the profile says when None.
        threads: intra-op threads of torch and ONNX Runtime; torch's default when None.
        allow_tf32: let float32 products on CUDA be TF32.
        ort_options: session options for ONNX Runtime.
        device: `auto` for every device, else only the variants of `cpu` or `cuda[:N]`.
        seed: of the order of visits.

    Raises:
        BadInput: not a bundle, an unknown variant, scope or profile, a number out of its range, a wrong digest.
        Unusable: `device` does not work here, or none of the variants asked for does, or all of them failed.
        KeyboardInterrupt: before anything was measured.
    """
    chosen, opened = find_profile(profile), opened_bundle(bundle)
    if sweep and batch_sizes:
        raise BadInput("a sweep finds the batch sizes itself; give either sizes or auto")
    if slo_s is not None and not 0 < slo_s < math.inf:
        raise BadInput(f"the latency budget is {slo_s * 1e3:g} ms; it must be a number above 0")
    if limit_s is not None and not 0 < limit_s < math.inf:
        raise BadInput(f"the time limit is {limit_s:g} s; it must be a number above 0")
    selected = chosen_variants(opened, variants, chosen, device, threads, ort_options)
    names = tuple(variant.name for variant in selected)
    if baseline is not None and baseline not in names:
        if baseline in (variant.name for variant in VARIANTS):
            raise BadInput(f"the baseline {baseline} is not among the variants to be measured: {', '.join(names)}; widen --variants")
        raise UnknownName("baseline", baseline, names)
    sizes = sizes_of(batch_sizes or chosen.batch_sizes)
    plan = Plan(
        bundle=str(opened.path.resolve()),
        device=device,
        variants=names,
        batch_sizes={} if sweep else dict.fromkeys(names, sizes),
        scopes=_scopes(scopes),
        processes=_positive("processes", processes) or chosen.processes,
        rounds=_positive("rounds", rounds) or chosen.rounds,
        fixed=rounds is not None,
        visit_s=chosen.visit_s,
        warmup_s=chosen.warmup_s,
        limit_s=limit_s or chosen.limit_s,
        seed=seed,
        threads=threads,
        allow_tf32=allow_tf32,
        ort=dict(ort_options or {}),
    )
    found = gather(plan, chosen.cold_start if cold_start is None else cold_start, progress)
    if not found.opened:
        raise Unusable("; ".join(f"{name}: {reason}" for name, reason in found.skipped.items()))
    measured = _measured(opened, selected, plan, found)
    if not measured:
        kind = DamagedFile if found.damaged else Unusable
        raise kind("; ".join(f"{failure.name}: {failure.reason}" for failure in found.failed))
    options = {"profile": profile, "baseline": baseline, "slo_s": slo_s, **dataclasses.asdict(plan)}
    return BenchReport(
        measurements=measured,
        skipped=tuple(Failure(name, reason) for name, reason in found.skipped.items()),
        environment=found.environment or environment.capture(),
        failed=tuple(found.failed),
        options={name: value for name, value in options.items() if name not in ("bundle", "blocks", "variants")},
        limits=tuple(found.limits.values()),
        machine=tuple(found.machine),
        cold_starts=tuple(found.cold),
        speedups=_speedups(measured, baseline),
        batches=batch_choices(measured, slo_s) if sweep or slo_s is not None else (),
        partial=found.partial,
    )


def sizes_of(sizes: Sequence[int]) -> tuple[int, ...]:
    """Batch sizes, each once; raises BadInput."""
    for size in sizes:
        if not 1 <= size <= MAX_BATCH:
            raise BadInput(f"batch size is {size}; it must be at least 1 and at most {MAX_BATCH:,}")
    return tuple(dict.fromkeys(sizes))


def opened_bundle(bundle: str | Path | Bundle) -> Bundle:
    """The bundle, opened if it is a path; raises BadInput."""
    from lenet_deploy.bundle import open_bundle

    return open_bundle(Path(bundle)) if isinstance(bundle, (str, Path)) else bundle


def chosen_variants(
    bundle: Bundle,
    globs: Iterable[str] | None,
    profile: Profile,
    device: str,
    threads: int | None = None,
    ort_options: Mapping[str, str] | None = None,
) -> tuple[Variant, ...]:
    """What to measure: what `globs` match, or what the profile covers when None; with ONNX Runtime's options.

    Raises:
        BadInput: none is of that device, options that none of them has, or a number of threads that none can have.
    """
    if threads is not None:
        from lenet_deploy.devices import check_threads

        check_threads(threads)
    selected = bundle_variants(bundle, globs or ("*",))
    if globs is None and profile.core_only:
        selected = tuple(variant for variant in selected if variant.core)
    return with_ort_options(on_device(selected, device), ort_options or {})


def _scopes(scopes: Sequence[str]) -> tuple[str, ...]:
    for scope in scopes or ("",):
        if scope not in SCOPES:
            raise BadInput(f"unknown scope {scope!r}; use {' or '.join(SCOPES)}")
    return tuple(dict.fromkeys(scopes))


def _positive(name: str, number: int | None) -> int | None:
    if number is not None and number < 1:
        raise BadInput(f"{name} is {number}; it must be at least 1")
    return number


def _measured(bundle: Bundle, selected: Sequence[Variant], plan: Plan, found: Gathered) -> tuple[Measurement, ...]:
    from lenet_deploy.bench.roofline import floors
    from lenet_deploy.models import find_model

    metadata = bundle.metadata
    layers = find_model(metadata.model).config_from(metadata.config).layers()
    shape = metadata.preprocessing.input_shape
    artifacts = {variant.name: artifact_of(bundle, variant) for variant in selected}
    sizes = {**plan.batch_sizes, **found.sizes}
    order: list[Key] = [(name, size, scope) for name in plan.variants for size in sizes.get(name, ()) for scope in plan.scopes]

    def least(device: str, batch_size: int, scope: str) -> Mapping[str, float]:
        limit = found.limits.get(device)
        precision = "tf32" if plan.allow_tf32 and device.startswith("cuda") else "fp32"
        return floors(layers, shape, len(metadata.labels), batch_size, scope, precision, limit) if limit else {}

    accuracies = {name: artifact.accuracy[name] for name, artifact in artifacts.items() if name in artifact.accuracy}
    return measurements(found, order, least, {name: each.size_bytes for name, each in artifacts.items()}, accuracies)


def _speedups(measured: Sequence[Measurement], baseline: str | None) -> tuple[Speedup, ...]:
    """Relative to the baseline on its device, and to the first variant on every other."""
    from lenet_deploy.bench.statistics import speedups

    found: list[Speedup] = []
    for device in dict.fromkeys(row.device for row in measured):
        rows = [row for row in measured if row.device == device]
        names = dict.fromkeys(row.variant for row in rows)
        found += speedups(rows, baseline if baseline in names else next(iter(names)))
    return tuple(found)
