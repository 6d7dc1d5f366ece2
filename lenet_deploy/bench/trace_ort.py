"""ONNX Runtime's own profile as spans, moved to the clock of the launches that they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lenet_deploy.bench.spans import OPERATOR, WRAPPER, Span
from lenet_deploy.errors import Unusable

RUN = "model_run"  # one for each launch
KERNEL_TIME = "_kernel_time"  # the end of the name of a node's own time
SHAPES = ("input_type_shape", "output_type_shape")

NOTE = (
    "onnxruntime's profile counts whole microseconds, rounded down: each call of an operator is up to 1 us longer than it says, "
    "and the time in which none ran shorter"
)


def read(events: Sequence[Mapping[str, Any]], launches: Sequence[Span]) -> tuple[Span, ...]:
    """The nodes and the runs around them of the last `len(launches)` runs, each inside its launch.

    Args:
        events: as the profile's JSON has them, times in whole microseconds since the session was opened.
        launches: in order.

    Raises:
        Unusable: the profile shows fewer runs than there were.
    """
    timed = [event for event in events if "dur" in event]
    runs = sorted((event for event in timed if event["name"] == RUN), key=lambda event: event["ts"])[-len(launches) :]
    if len(runs) < len(launches):
        raise Unusable(f"this onnxruntime's profile shows {len(runs)} of {len(launches)} launches; trace another runtime")
    first = runs[0]["ts"]
    inside = [event for event in timed if event["ts"] >= first]
    nodes = [_node(event) for event in inside if event.get("cat") == "Node" and event["name"].endswith(KERNEL_TIME)]
    wrappers = [_wrapper(event, nodes) for event in inside if event.get("cat") == "Session"]
    shift_s = offset_s([(1e-6 * run["ts"], 1e-6 * (run["ts"] + run["dur"])) for run in runs], launches)
    return tuple(dataclasses.replace(each, start_s=each.start_s + shift_s, end_s=each.end_s + shift_s) for each in (*wrappers, *nodes))


def offset_s(runs: Sequence[tuple[float, float]], launches: Sequence[Span]) -> float:
    """Seconds to add to the runs' clock so that each run (start, end) lies inside its launch: the middle of what is possible.

    The origin of ONNX Runtime's clock depends on the system, so the launches themselves say how the two clocks lie to each other.
    """
    pairs = list(zip(runs, launches, strict=True))
    least = max(launch.start_s - start for (start, _), launch in pairs)
    most = min(launch.end_s - end for (_, end), launch in pairs)
    return (least + most) / 2


def _node(event: Mapping[str, Any]) -> Span:
    about = event["args"]
    details = {"provider": about.get("provider"), **{name: about[name] for name in SHAPES if name in about}}
    start_s = 1e-6 * event["ts"]
    node = event["name"].removesuffix(KERNEL_TIME)
    return Span(OPERATOR, about["op_name"], start_s, start_s + 1e-6 * event["dur"], event["tid"], node, details)


def _wrapper(event: Mapping[str, Any], nodes: Sequence[Span]) -> Span:
    """A run, or a part of it. Rounded down, it can end a microsecond before the last node in it does."""
    start_s = 1e-6 * event["ts"]
    end_s = start_s + 1e-6 * event["dur"]
    last = max((node.end_s for node in nodes if start_s <= node.start_s < end_s), default=end_s)
    return Span(WRAPPER, event["name"], start_s, max(end_s, last), event["tid"])
