"""What LoadGen said of each variant, and the rates that were tried."""

from __future__ import annotations

from collections.abc import Iterable

from lenet_deploy.bench.load import DURATION_S
from lenet_deploy.bench_records import LoadResult
from lenet_deploy.report.bench import seconds
from lenet_deploy.report.table import Table

SHOWN = ("p50", "p90", "p99", "p99.9")


def load_table(results: Iterable[LoadResult]) -> Table:
    """One row a variant and scenario: LoadGen's verdict, the scenario's figure, and the latencies that there are enough queries for."""
    rows = tuple(
        (
            result.variant,
            result.scenario,
            "valid" if result.valid else "invalid",
            result.metric.removesuffix("_s").removesuffix("_ips").replace("_", " "),
            _value(result),
            *(seconds(result.latencies_s.get(name)) for name in SHOWN),
            f"{result.queries:,}",
            "; ".join((*_short(result), *result.reasons)),
        )
        for result in results
    )
    return Table(("variant", "scenario", "verdict", "metric", "value", *SHOWN, "queries", "remarks"), rows)


def probe_table(result: LoadResult) -> Table:
    """One row a rate that was tried in `server`, in order."""
    rows = tuple(
        (f"{probe.target_qps:,.0f}", "valid" if probe.valid else "invalid", seconds(probe.latency_p99_s), f"{probe.queries:,}")
        for probe in result.probes
    )
    return Table(("queries/s", "verdict", "p99", "queries"), rows)


def _short(result: LoadResult) -> tuple[str, ...]:
    asked = result.settings["min_duration_s"]
    return (f"of {asked:g} s, where {DURATION_S:g} s are usual",) if asked < DURATION_S else ()


def _value(result: LoadResult) -> str:
    if result.metric.endswith("_s"):
        return seconds(result.value)
    return f"{result.value:,.0f} {'images/s' if result.metric.endswith('_ips') else 'queries/s'}"
