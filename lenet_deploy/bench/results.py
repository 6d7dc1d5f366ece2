"""What the workers of a run sent, as measurements; and what follows from these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby

from lenet_deploy import order_statistics
from lenet_deploy.bench.coordinator import Gathered, Key, Times
from lenet_deploy.bench_records import BatchChoice, Measurement

Floors = Callable[[str, int, str], Mapping[str, float]]


def measurements(
    found: Gathered, order: Iterable[Key], floors: Floors, sizes: Mapping[str, int], accuracies: Mapping[str, float]
) -> tuple[Measurement, ...]:
    """One measurement of each case that was visited, in the given order of cases.

    Args:
        floors: the least that a launch can take, from device, batch size and scope; empty where the limit was not measured.
        sizes, accuracies: bytes of the artifact and percent on the test split, by variant.
    """
    return tuple(
        _measurement(key, times, found, floors, sizes[key[0]], accuracies.get(key[0]))
        for key in order
        if (times := found.times.get(key)) is not None and times.visits
    )


def _measurement(key: Key, times: Times, found: Gathered, floors: Floors, size: int, accuracy: float | None) -> Measurement:
    variant, batch_size, scope = key
    device, nodes = found.opened[variant]
    enqueued = times.raw["enqueue_times_s"]
    return Measurement(
        variant=variant,
        device=device,
        batch_size=batch_size,
        scope=scope,
        launches_per_block=times.launches_per_block,
        visits=tuple(times.visits),
        warmup_launches=times.warmup_launches,
        steady=times.steady,
        stop=times.stop,
        size_bytes=size,
        accuracy=accuracy,
        # On CUDA what the host does for a launch; on the CPU what a launch takes beyond the least that batch 1 can.
        overhead_s=order_statistics.median(enqueued) if enqueued else _fixed(variant, device, found, floors),
        floors_s=floors(device, batch_size, scope),
        node_providers=nodes,
        **{name: tuple(raw) for name, raw in times.raw.items()},
    )


def _fixed(variant: str, device: str, found: Gathered, floors: Floors) -> float | None:
    alone, least = found.overheads_s.get(variant), floors(device, 1, "device").values()
    return max(0.0, alone - max(least)) if alone is not None and least else None


def batch_choices(measured: Sequence[Measurement], slo_s: float | None) -> tuple[BatchChoice, ...]:
    """The best batch size of each variant and scope that has times that count: of the highest throughput, and within a latency budget.

    The latency is p99 where every size has enough samples for it, else the median.
    """
    return tuple(_choice(list(rows), slo_s) for _, rows in groupby(sorted((row for row in measured if row.kept_s), key=_case), key=_case))


def _case(row: Measurement) -> tuple[str, str]:
    return (row.variant, row.scope)


def _choice(rows: Sequence[Measurement], slo_s: float | None) -> BatchChoice:
    p99s = [row.percentiles_s["p99"] for row in rows]
    statistic = "median" if None in p99s else "p99"
    within = [row for row, p99 in zip(rows, p99s, strict=True) if slo_s is not None and _latency(row, p99, statistic) <= slo_s]
    return BatchChoice(
        variant=rows[0].variant,
        scope=rows[0].scope,
        best=max(rows, key=lambda row: row.throughput_ips).batch_size,
        within_slo=max(within, key=lambda row: row.throughput_ips).batch_size if within else None,
        statistic=statistic,
    )


def _latency(row: Measurement, p99: float | None, statistic: str) -> float:
    return row.median_s if statistic == "median" or p99 is None else p99
