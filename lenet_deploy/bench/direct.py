"""What is not a matter of rounds and visits, and runs in the caller's own process: load scenarios and traces."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lenet_deploy import environment
from lenet_deploy.bench.coordinator import Progress
from lenet_deploy.bench.plan import find_profile
from lenet_deploy.bench.run import chosen_variants, opened, silent, sizes_for, taken
from lenet_deploy.bench_records import BenchReport, LoadResult, TraceReport
from lenet_deploy.errors import BadInput, Unusable
from lenet_deploy.records import Failure
from lenet_deploy.sources import computing, device_of, open_session

if TYPE_CHECKING:
    from lenet_deploy.bundle import Bundle
    from lenet_deploy.variants import Variant

Made = TypeVar("Made")
IMAGES = 1024  # that a scenario asks for, as LoadGen's own references do


def load_test(
    what: str | Path | Bundle,
    scenario: str,
    *,
    variants: Iterable[str] | None = None,
    profile: str = "quick",
    duration_s: float | None = None,
    latency_bound_s: float | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    allow_tf32: bool = False,
    ort_options: Mapping[str, str] | None = None,
    device: str = "auto",
    input_shape: tuple[int, int, int] | None = None,
    progress: Progress = silent,
) -> BenchReport:
    """What MLPerf LoadGen says of the variants of a bundle or file under load; those that cannot run here are listed with the reason.

    Args:
        scenario: `single-stream`, `multi-stream`, `server` or `offline`, see `bench.scenarios.run_scenario`.
        duration_s: least seconds of load; LoadGen's scenarios have a default.
        latency_bound_s: that 99 % of the queries have to keep, for `server`.
        batch_size: most images in a launch, for `server` and `offline`.

    Others as in `benchmark`.

    Raises:
        BadInput: as `benchmark`, or an unknown scenario.
        Unusable: LoadGen is not installed, or none of the variants works here.
        KeyboardInterrupt: on Ctrl-C before the first variant is done, with nothing left behind; later ones end the run, marked as partial.
    """
    from lenet_deploy.bench.load import find_scenario
    from lenet_deploy.bench.loadgen import load_binding
    from lenet_deploy.bench.scenarios import run_scenario
    from lenet_deploy.bench.scopes import bench_images

    find_scenario(scenario)
    load_binding()
    source = opened(what, input_shape)
    if source.batch_size:
        raise BadInput(f"{source.described} takes batches of {source.batch_size} alone, and a scenario needs any; export it anew")
    selected = chosen_variants(source, variants, find_profile(profile), device, threads, ort_options)
    images = bench_images(IMAGES, source.input)
    given = {"duration_s": duration_s, "latency_bound_s": latency_bound_s, "batch_size": batch_size}
    asked = {name: value for name, value in given.items() if value is not None}

    def one(variant: Variant) -> LoadResult:
        with open_session(source, variant, device) as session:
            return run_scenario(session, images, source.input, scenario, variant=variant.name, progress=progress, **asked)  # type: ignore[arg-type]

    with computing(device, allow_tf32, threads):
        found, skipped, partial = _each(selected, one)
        captured = environment.capture()
    options = {"profile": profile, "scenario": scenario, "threads": threads, "allow_tf32": allow_tf32, "ort": dict(ort_options or {})}
    return BenchReport((), skipped, captured, options=options | taken(source), loads=found, partial=partial)


def trace(
    what: str | Path | Bundle,
    directory: str | Path,
    *,
    variants: Iterable[str] | None = None,
    batch_sizes: Sequence[int] | None = None,
    profile: str = "quick",
    threads: int | None = None,
    allow_tf32: bool = False,
    ort_options: Mapping[str, str] | None = None,
    device: str = "auto",
    input_shape: tuple[int, int, int] | None = None,
    progress: Progress = silent,
) -> tuple[tuple[TraceReport, ...], tuple[Failure, ...]]:
    """The operators of each variant and batch size, as a Chrome trace in `directory` and as times; and the variants that cannot run here.

    Arguments as in `benchmark`. Batch 1 where no sizes are given.

    Raises:
        BadInput: as `benchmark`.
        Unusable: none of the variants works here.
        CannotWrite: into `directory`.
    """
    from lenet_deploy.bench.scopes import bench_images
    from lenet_deploy.bench.trace import profiled_opener
    from lenet_deploy.bench.trace import trace as trace_one

    source = opened(what, input_shape)
    selected = chosen_variants(source, variants, find_profile(profile), device, threads, ort_options)
    sizes, shape = sizes_for(source, batch_sizes, (1,)), source.input.input_shape
    done = iter(range(1, 1 + len(selected) * len(sizes)))

    def one(variant: Variant) -> tuple[TraceReport, ...]:
        return tuple(traced(variant))

    def traced(variant: Variant) -> Iterator[TraceReport]:
        data, where = source.read(variant), device_of(variant, device)
        profiled = profiled_opener(variant, data, shape, where)
        for size in sizes:
            images = bench_images(size, source.input)
            plain = functools.partial(variant.open_session, data, shape, where)
            yield trace_one(variant.name, plain, profiled, images, source.input, Path(directory))
            progress(next(done), len(selected) * len(sizes), variant.name)

    with computing(device, allow_tf32, threads):
        found, skipped, partial = _each(selected, one)
    if partial:
        raise KeyboardInterrupt  # its traces are files, each whole
    return tuple(report for reports in found for report in reports), skipped


def _each(variants: Iterable[Variant], make: Callable[[Variant], Made]) -> tuple[tuple[Made, ...], tuple[Failure, ...], str | None]:
    """What `make` gives for each variant that works here, why the others do not, and why it is not all; raises Unusable where none does."""
    made: list[Made] = []
    skipped: list[Failure] = []
    for variant in variants:
        try:
            made.append(make(variant))
        except Unusable as error:
            skipped.append(Failure(variant.name, str(error)))
        except KeyboardInterrupt:
            if not made:
                raise
            return tuple(made), tuple(skipped), f"interrupted during {variant.name}; those before it are whole"
    if not made:
        raise Unusable("; ".join(f"{failure.name}: {failure.reason}" for failure in skipped))
    return tuple(made), tuple(skipped), None
