"""What ran when, whatever profiler says so: spans of one clock, the times that follow from them, and Chrome's format. Pure functions."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lenet_deploy.bench_records import OperatorTime

# What a span is. A wrapper holds operators and is none itself: a session's run, an interpreter's frame. A kernel is anything on the GPU.
LAUNCH, WRAPPER, OPERATOR, KERNEL = "launch", "wrapper", "operator", "kernel"

QUARTER = 4  # one launch in four is left out at either end of the order by length: the interquartile mean
PID = 1  # the one process of a trace; every variant has a trace of its own


@dataclass(frozen=True)
class Span:
    """Something that ran.

    Attributes:
        kind: LAUNCH, WRAPPER, OPERATOR or KERNEL.
        start_s, end_s: seconds on a clock that all spans of a trace share, from any origin.
        lane: the thread, or on the GPU the stream, that it ran on; spans of one lane follow each other or lie inside each other.
        node: which node of the graph, where the runtime says so.
        details: what else is known, as JSON values.
    """

    kind: str
    name: str
    start_s: float
    end_s: float
    lane: int = 0
    node: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def length_s(self) -> float:
        """Seconds from start to end."""
        return self.end_s - self.start_s


# A launch, and everything that began while it ran.
Launched: TypeAlias = tuple[Span, tuple[Span, ...]]


def by_launch(spans: Iterable[Span]) -> tuple[Launched, ...]:
    """The launches in order, each with what began in it; what began outside of all is left out."""
    ordered = sorted(spans, key=_position)
    launches = [span for span in ordered if span.kind == LAUNCH]
    others = [span for span in ordered if span.kind != LAUNCH]
    return tuple((launch, tuple(span for span in others if launch.start_s <= span.start_s < launch.end_s)) for launch in launches)


def middle_half(launches: Sequence[Launched]) -> tuple[Launched, ...]:
    """The launches without the shortest and the longest quarter: what one interruption cannot change."""
    cut = len(launches) // QUARTER
    return tuple(sorted(launches, key=lambda each: each[0].length_s)[cut : len(launches) - cut])


def interquartile_mean(times_s: Sequence[float]) -> float:
    """The mean of the middle half, as of `middle_half`."""
    cut = len(times_s) // QUARTER
    return statistics.fmean(sorted(times_s)[cut : len(times_s) - cut])


def operator_times(launches: Sequence[Launched], kind: str) -> tuple[OperatorTime, ...]:
    """The operators of a kind by name and node, each per launch, the longest first."""
    calls: dict[tuple[str, str | None], int] = {}
    total_s: dict[tuple[str, str | None], float] = {}
    for _, inside in launches:
        for span, self_s in self_times(inside):
            if span.kind == kind:
                key = (span.name, span.node)
                calls[key] = calls.get(key, 0) + 1
                total_s[key] = total_s.get(key, 0.0) + self_s
    count = len(launches)
    found = (OperatorTime(name, node, calls[name, node] / count, seconds / count) for (name, node), seconds in total_s.items())
    return tuple(sorted(found, key=lambda each: -each.self_s))


def self_times(spans: Iterable[Span]) -> tuple[tuple[Span, float], ...]:
    """Every span with its seconds outside of the spans inside it, so that no time is counted twice."""
    found = []
    for lane in _by_lane(spans).values():
        inside_s = [0.0] * len(lane)
        around: list[int] = []
        for i, span in enumerate(lane):
            while around and lane[around[-1]].end_s <= span.start_s:
                around.pop()
            if around:
                inside_s[around[-1]] += min(span.end_s, lane[around[-1]].end_s) - span.start_s
            around.append(i)
        found += [(span, span.length_s - seconds) for span, seconds in zip(lane, inside_s, strict=True)]
    return tuple(found)


def idle_s(launches: Sequence[Launched], kind: str) -> float:
    """Mean seconds of a launch in which no span of a kind ran, in any lane."""
    return statistics.fmean(launch.length_s - _covered_s(launch, inside, kind) for launch, inside in launches)


def chrome_events(launches: Sequence[Launched], process: str) -> list[dict[str, Any]]:
    """The launches and what ran in them as `traceEvents` of Chrome's trace format; time 0 is the start of the first launch.

    One process, with a lane for the launches, one for each thread's operators and one for each of the GPU's streams.
    """
    origin_s = launches[0][0].start_s
    # Operators and what wraps them share a lane, where the viewer draws one inside the other.
    titles = {LAUNCH: "launches", OPERATOR: "operators", WRAPPER: "operators", KERNEL: "GPU stream"}
    lanes: dict[tuple[str, int], int] = {}
    events: list[dict[str, Any]] = []
    for number, (launch, inside) in enumerate(launches):
        for span in (launch, *inside):
            lane = lanes.setdefault((titles[span.kind], span.lane), len(lanes))
            about = {"launch": number, **({"node": span.node} if span.node else {}), **span.details}
            times = {
                "ts": round(1e6 * (span.start_s - origin_s), 3),
                "dur": round(1e6 * span.length_s, 3),
            }  # microseconds, as the format has it
            events.append({"ph": "X", "cat": span.kind, "name": span.name, "pid": PID, "tid": lane, **times, "args": about})
    named = [_metadata("process_name", 0, {"name": process})]
    for (title, number), lane in lanes.items():
        alone = sum(other == title for other, _ in lanes) == 1
        named.append(_metadata("thread_name", lane, {"name": title if alone and title != titles[KERNEL] else f"{title} {number}"}))
        named.append(_metadata("thread_sort_index", lane, {"sort_index": lane}))
    return named + events


def _metadata(name: str, lane: int, about: Mapping[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": PID, "tid": lane, "args": dict(about)}


def _position(span: Span) -> tuple[float, float]:
    """Spans in this order meet what is around them before what is inside."""
    return (span.start_s, -span.end_s)


def _by_lane(spans: Iterable[Span]) -> Mapping[tuple[bool, int], list[Span]]:
    """Spans of each thread and of each stream, whose numbers have nothing to do with each other."""
    lanes: dict[tuple[bool, int], list[Span]] = {}
    for span in sorted(spans, key=_position):
        lanes.setdefault((span.kind == KERNEL, span.lane), []).append(span)
    return lanes


def _covered_s(launch: Span, inside: Iterable[Span], kind: str) -> float:
    """Seconds of a launch in which at least one span of a kind ran."""
    covered = 0.0
    reached = launch.start_s
    for span in sorted((span for span in inside if span.kind == kind), key=_position):
        begin, end = max(span.start_s, reached), min(span.end_s, launch.end_s)
        covered += max(0.0, end - begin)
        reached = max(reached, end)
    return covered


def from_the_last(spans: Iterable[Span], count: int) -> tuple[Span, ...]:
    """What began with the last `count` launches or after; what came before was for warming up."""
    found = sorted(spans, key=_position)
    starts = [span.start_s for span in found if span.kind == LAUNCH]
    return tuple(itertools.dropwhile(lambda span: span.start_s < starts[-count], found))
