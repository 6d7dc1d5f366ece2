"""torch's profiler as spans: its operators on the host, and on CUDA every kernel of the process, whichever runtime started it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lenet_deploy.bench.spans import KERNEL, LAUNCH, OPERATOR, WRAPPER, Span
from lenet_deploy.quiet import captured_stderr

if TYPE_CHECKING:
    import torch

NAMESPACE = "::"  # in the name of every operator of torch, as in aten::conv2d


def record(launch: Callable[[], object], count: int, device: torch.device) -> tuple[Span, ...]:
    """The spans of `count` launches, one after another; `launch` is a complete one: started and waited for."""
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    # Kineto logs to standard error, on a machine without a GPU for instance that there is none.
    with captured_stderr():
        with profile(activities=activities, acc_events=True) as profiler:
            for _ in range(count):
                with record_function(LAUNCH):
                    launch()
        return read(profiler.events() or ())


def read(events: Any) -> tuple[Span, ...]:
    """Spans from torch's `FunctionEvent`s."""
    host = [event for event in events if event.device_type.name == "CPU"]
    # Marks of the host are repeated on the GPU's side of the profile.
    marks = {event.name for event in host}
    gpu = [event for event in events if event.device_type.name != "CPU" and event.name not in marks]
    return (
        *(_span(event, _kind(event), event.thread) for event in host),
        *(_span(event, KERNEL, event.device_resource_id) for event in gpu),
    )


def _span(event: Any, kind: str, lane: int) -> Span:
    return Span(kind, event.name, 1e-6 * event.time_range.start, 1e-6 * event.time_range.end, 0 if kind == LAUNCH else lane)


def _kind(event: Any) -> str:
    """What an event on the host is. One that holds others and is not torch's operator wraps them, as TorchScript's `forward` does."""
    if event.name == LAUNCH:
        return LAUNCH
    return WRAPPER if event.cpu_children and NAMESPACE not in event.name else OPERATOR
