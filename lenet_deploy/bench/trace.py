"""Why is it slow? The operators of one variant under one workload, as a Chrome trace and as times per launch."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lenet_deploy import environment, store
from lenet_deploy.bench import trace_ort, trace_torch
from lenet_deploy.bench.scopes import bind, stream_of
from lenet_deploy.bench.spans import (
    KERNEL,
    LAUNCH,
    OPERATOR,
    WRAPPER,
    Launched,
    Span,
    by_launch,
    chrome_events,
    from_the_last,
    idle_s,
    interquartile_mean,
    middle_half,
    operator_times,
)
from lenet_deploy.bench.timing import calibrate
from lenet_deploy.bench_records import TraceReport
from lenet_deploy.errors import DamagedFile, first_line

if TYPE_CHECKING:
    import torch

    from lenet_deploy.records import ImageInput
    from lenet_deploy.runtimes import Session
    from lenet_deploy.variants import Variant

LAUNCHES = 50
MIN_LAUNCHES = 8  # the fewest of which the middle half is four
LIMIT_S = 2.0  # of the launches that are traced, as long as they take without the profiler
WARMUP_S = 1.0
PROFILED_WARMUP = 5  # launches with the profiler on before those that are kept; measured: the first three take up to twice as long
SETTLE_S = 0.06  # idle threads of ONNX Runtime spin for up to 50 ms after its last launch and would take a core from what follows

Opener: TypeAlias = "Callable[[], AbstractContextManager[Session]]"
# A session that profiles itself, and a function that ends the profile and returns its events in Chrome's format.
ProfiledOpener: TypeAlias = "Callable[[], AbstractContextManager[tuple[Session, Callable[[], Sequence[Mapping[str, Any]]]]]]"


def profiled_opener(variant: Variant, data: bytes, input_shape: tuple[int, int, int], device: str | None = None) -> ProfiledOpener | None:
    """How to open verified artifact bytes so that they profile themselves; None where torch's profiler sees all operators of a variant."""
    open_profiled = getattr(variant.runtime.load(), "open_profiled", None)  # a runtime has this function only if it needs it
    if open_profiled is None:
        return None
    return lambda: open_profiled(data, input_shape, device or variant.device, variant.options)


def trace(
    variant: str,
    open_plain: Opener,
    open_profiled: ProfiledOpener | None,
    images: torch.Tensor,
    preprocessing: ImageInput,
    directory: Path,
    launches: int = LAUNCHES,
) -> TraceReport:
    """Trace a variant's launches in the scope `device`, inside `devices.computing_on`, and write them as one file in `directory`.

    Args:
        open_plain: opens the session as a user would.
        open_profiled: opens it once more so that it profiles itself; None where torch's profiler sees its operators.
        images: uint8 (N, C, H, W) in host memory; N is the batch size.
        directory: made where it is missing.
        launches: at most as many; fewer, but MIN_LAUNCHES, where they would take longer than LIMIT_S.

    Raises:
        DamagedFile: the variant does not run at this batch size.
        CannotWrite: the folder or the file.
        Unusable: as `open_session`; or the runtime's profile does not show the launches.
    """
    store.make_folder(directory)
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(open_plain())
        plain = _bound(variant, session, images, preprocessing)
        warm = calibrate(plain, WARMUP_S, overhead_s=0.0)
        slow = launches * warm.launch_s > LIMIT_S
        count = max(MIN_LAUNCHES, int(LIMIT_S / warm.launch_s)) if slow else launches
        collect, traced = None, plain
        if open_profiled:
            profiled, collect = stack.enter_context(open_profiled())
            traced = _bound(variant, profiled, images, preprocessing)
        # Launches without the profiler come before and after those with it, so that both see the same drift.
        plain_s = _times(plain, count, session.device)
        time.sleep(SETTLE_S)
        # torch's profiler sees no operator of a session that profiles itself, only its kernels: on the CPU it would but cost time.
        record = _clocked if collect and session.device.type == "cpu" else trace_torch.record
        spans = from_the_last(record(traced, PROFILED_WARMUP + count, session.device), count)
        if collect:
            spans += trace_ort.read(collect(), [span for span in spans if span.kind == LAUNCH])
        plain_s += _times(plain, count, session.device)
    found = by_launch(spans)
    report = _report(variant, session.device, len(images), found, plain_s, (trace_ort.NOTE,) if collect else ())
    return _written(report, found, directory)


def _bound(variant: str, session: Session, images: torch.Tensor, preprocessing: ImageInput) -> Callable[[], object]:
    """A complete launch of the session; raises DamagedFile where it does not take the batch."""
    launch = bind(session, images, "device", preprocessing, stream_of(session.device)).launch
    try:
        launch()
    except Exception as error:  # whatever a runtime raises for a graph that does not take this batch
        raise DamagedFile(f"{variant} does not run at batch {len(images)}: {first_line(error)}; see parity") from None
    return launch


def _clocked(launch: Callable[[], object], count: int, device: torch.device) -> tuple[Span, ...]:
    """The spans of `count` launches by the host's clock, and nothing of what is in them."""
    spans = []
    for _ in range(count):
        before = time.perf_counter()
        launch()
        spans.append(Span(LAUNCH, LAUNCH, before, time.perf_counter()))
    return tuple(spans)


def _times(launch: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Seconds of each of `count` launches, after the threads of whatever ran before have come to rest."""
    time.sleep(SETTLE_S)
    return [span.length_s for span in _clocked(launch, count, device)]


def _report(
    variant: str, device: torch.device, batch_size: int, found: Sequence[Launched], plain_s: Sequence[float], notes: tuple[str, ...]
) -> TraceReport:
    counted = middle_half(found)
    on_gpu = device.type == "cuda"
    return TraceReport(
        variant=variant,
        device=str(device),
        batch_size=batch_size,
        launches=len(found),
        launch_s=interquartile_mean([launch.length_s for launch, _ in found]),
        plain_s=interquartile_mean(plain_s),
        operators=operator_times(counted, OPERATOR),
        wrappers=operator_times(counted, WRAPPER),
        idle_s=idle_s(counted, OPERATOR),
        kernels=operator_times(counted, KERNEL) if on_gpu else (),
        gpu_idle_s=idle_s(counted, KERNEL) if on_gpu else None,
        path="",
        notes=notes,
        environment=environment.capture(),
    )


def _written(report: TraceReport, found: Sequence[Launched], directory: Path) -> TraceReport:
    """The report, with the name of the file that now holds its launches.

    Viewers ignore what they do not know, so the file is like every other of ours: a schema first, the environment last.
    """
    path = directory / f"{report.variant.replace('/', '-')}.batch{report.batch_size}.trace.json"
    summary = dataclasses.asdict(report)
    del summary["environment"], summary["path"]
    events = chrome_events(found, f"{report.variant}, batch {report.batch_size}, {report.device}")
    body = {"displayTimeUnit": "ns", "summary": summary, "traceEvents": events}
    store.write_file(path, store.dump("trace", 1, report.environment, body).encode())
    return dataclasses.replace(report, path=str(path))
