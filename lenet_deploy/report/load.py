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
    """One row a rate that was tried in `server`, in order: short runs, then those of full length, of which the last is the result."""
    failed = int(result.settings.get("full_runs", 1)) - 1
    lengths = ("short",) * (len(result.probes) - failed) + ("full",) * failed
    probes = zip(lengths, result.probes, strict=True)
    tried = [(length, probe.target_qps, probe.valid, probe.latency_p99_s, probe.queries) for length, probe in probes]
    last = ("full", result.settings["target_qps"], result.valid, result.latencies_s.get("p99"), result.queries)
    rows = tuple(
        (length, f"{qps:,.0f}", "valid" if valid else "invalid", seconds(p99_s), f"{queries:,}")
        for length, qps, valid, p99_s, queries in (*tried, last)
    )
    return Table(("run", "queries/s", "verdict", "p99", "queries"), rows)


def _short(result: LoadResult) -> tuple[str, ...]:
    asked = result.settings["min_duration_s"]
    return (f"of {asked:g} s, where {DURATION_S:g} s are usual",) if asked < DURATION_S else ()


def _value(result: LoadResult) -> str:
    if result.metric.endswith("_s"):
        return seconds(result.value)
    return f"{result.value:,.0f} {'images/s' if result.metric.endswith('_ips') else 'queries/s'}"
