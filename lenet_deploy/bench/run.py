"""The public function `benchmark`: from what is asked for to a report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenet_deploy import environment
from lenet_deploy.bench.coordinator import Gathered, Key, Progress, gather
from lenet_deploy.bench.plan import SCOPES, Plan, Profile, find_profile
from lenet_deploy.bench.results import batch_choices, measurements
from lenet_deploy.bench_records import BenchReport, Measurement, Speedup
from lenet_deploy.errors import BadInput, DamagedFile, UnknownName, Unusable
from lenet_deploy.records import Failure
from lenet_deploy.sources import Source, bundle_source, on_device, open_path
from lenet_deploy.store import digest, sha256
from lenet_deploy.variants import VARIANTS, select_variants, with_ort_options

if TYPE_CHECKING:
    from lenet_deploy.bundle import Bundle
    from lenet_deploy.variants import Variant

UNSAID = ("what", "digest", "blocks", "variants", "input_shape")  # of a plan, in a report's options
MAX_BATCH = 65_536  # beyond it a batch is a typing mistake, and its buffers would not fit


def silent(done: int, total: int, what: str) -> None:
    """The default progress: none."""


def benchmark(
    what: str | Path | Bundle,
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
    input_shape: tuple[int, int, int] | None = None,
    progress: Progress = silent,
) -> BenchReport:
    """Measure the variants of a bundle or of one file that this machine can run; the others are listed with the reason.

    Everything is measured in fresh worker processes. Ctrl-C ends it early with a report of what there is, marked as partial. What fails
    is listed in the report's `failed` and takes nothing else with it.

    Args:
        what: a bundle, a checkpoint file, or an artifact, which may come from elsewhere.
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
        input_shape: (C, H, W) of the images that a file of another origin takes, where it does not say.

    Raises:
        BadInput: nothing that can be measured, an unknown variant, scope or profile, a number out of its range, a wrong digest.
        Unusable: `device` does not work here, or none of the variants asked for does, or all of them failed.
        KeyboardInterrupt: before anything was measured.
    """
    chosen, source = find_profile(profile), opened(what, input_shape)
    if sweep and batch_sizes:
        raise BadInput("a sweep finds the batch sizes itself; give either sizes or auto")
    if slo_s is not None and not 0 < slo_s < math.inf:
        raise BadInput(f"the latency budget is {slo_s * 1e3:g} ms; it must be a number above 0")
    if limit_s is not None and not 0 < limit_s < math.inf:
        raise BadInput(f"the time limit is {limit_s:g} s; it must be a number above 0")
    if sweep and source.batch_size:
        raise BadInput(f"{source.described} takes batches of {source.batch_size} alone; leave auto out")
    selected = chosen_variants(source, variants, chosen, device, threads, ort_options)
    names = tuple(variant.name for variant in selected)
    if baseline is not None and baseline not in names:
        if baseline in (variant.name for variant in VARIANTS):
            raise BadInput(f"the baseline {baseline} is not among the variants to be measured: {', '.join(names)}; widen --variants")
        raise UnknownName("baseline", baseline, names)
    sizes = sizes_for(source, batch_sizes, chosen.batch_sizes)
    plan = Plan(
        what=str((Path(what) if isinstance(what, (str, Path)) else what.path).resolve()),
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
        input_shape=input_shape,
        digest=digest_of(source, selected),
    )
    found = gather(plan, chosen.cold_start if cold_start is None else cold_start, progress)
    if not found.opened:
        raise Unusable("; ".join(f"{name}: {reason}" for name, reason in found.skipped.items()))
    measured = _measured(source, selected, plan, found)
    if not measured:
        kind = DamagedFile if found.damaged else Unusable
        raise kind("; ".join(f"{failure.name}: {failure.reason}" for failure in found.failed))
    options = {"profile": profile, "baseline": baseline, "slo_s": slo_s, **dataclasses.asdict(plan)}
    return BenchReport(
        measurements=measured,
        skipped=tuple(Failure(name, reason) for name, reason in found.skipped.items()),
        environment=found.environment or environment.capture(),
        failed=tuple(found.failed),
        options={name: value for name, value in options.items() if name not in UNSAID} | taken(source),
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


def sizes_for(source: Source, asked: Sequence[int] | None, default: Sequence[int]) -> tuple[int, ...]:
    """The batch sizes asked for, else the default, else the one that a graph is made for; raises BadInput where that is another."""
    only = (source.batch_size,) if source.batch_size else None
    sizes = sizes_of(asked or only or default)
    if only and sizes != only:
        raise BadInput(f"{source.described} takes batches of {source.batch_size} alone; leave the batch sizes out, or export it anew")
    return sizes


def opened(what: str | Path | Bundle, input_shape: tuple[int, int, int] | None = None) -> Source:
    """What to measure, opened if it is a path; raises BadInput."""
    return open_path(what, input_shape) if isinstance(what, (str, Path)) else bundle_source(what)


def taken(source: Source) -> dict[str, Any]:
    """What a file of another origin takes, for a report's options; of our own files the metadata says it."""
    return {} if source.metadata else {"input_shape": list(source.input.input_shape), "only_batch_size": source.batch_size}


def digest_of(source: Source, variants: Iterable[Variant]) -> str:
    """Of all bytes that the variants run; raises DamagedFile where a manifest says that they are others."""
    return digest({variant.name: sha256(source.read(variant)) for variant in variants})


def chosen_variants(
    source: Source,
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
    selected = select_variants(globs or ("*",), source.variants)
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


def _measured(source: Source, selected: Sequence[Variant], plan: Plan, found: Gathered) -> tuple[Measurement, ...]:
    from lenet_deploy.bench.roofline import floors
    from lenet_deploy.models import find_model

    metadata = source.metadata
    layers = find_model(metadata.model).config_from(metadata.config).layers() if metadata else ()
    sizes = {**plan.batch_sizes, **found.sizes}
    order: list[Key] = [(name, size, scope) for name in plan.variants for size in sizes.get(name, ()) for scope in plan.scopes]

    def least(device: str, batch_size: int, scope: str) -> Mapping[str, float]:
        limit = found.limits.get(device)
        if metadata is None or limit is None:  # without its layers the least that a graph needs is not known
            return {}
        precision = "tf32" if plan.allow_tf32 and device.startswith("cuda") else "fp32"
        return floors(layers, source.input.input_shape, len(metadata.labels), batch_size, scope, precision, limit)

    return measurements(found, order, least, {variant.name: len(source.read(variant)) for variant in selected}, source.accuracies)


def _speedups(measured: Sequence[Measurement], baseline: str | None) -> tuple[Speedup, ...]:
    """Relative to the baseline on its device, and to the first variant on every other."""
    from lenet_deploy.bench.statistics import speedups

    found: list[Speedup] = []
    for device in dict.fromkeys(row.device for row in measured):
        rows = [row for row in measured if row.device == device]
        names = dict.fromkeys(row.variant for row in rows)
        found += speedups(rows, baseline if baseline in names else next(iter(names)))
    return tuple(found)
