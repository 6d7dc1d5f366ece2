"""What MLPerf LoadGen is asked for, and what its summary says, as plain values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lenet_deploy import order_statistics
from lenet_deploy.bench_records import LoadResult
from lenet_deploy.errors import UnknownName, Unusable, first_line

SEEDS: Mapping[str, int] = {"qsl_rng_seed": 1, "sample_index_rng_seed": 2, "schedule_rng_seed": 3}  # the same load for every variant
DURATION_S = 10.0  # MLPerf asks submissions for 600 s; LeNet-5 answers thousands of queries in these
LATE = 0.01  # share of a server's queries that may miss the bound: MLPerf's 99th percentile
BACKLOG_MARGIN = 2.0  # arrivals are random, so that a backlog may be this much longer than its mean
BACKLOG_FLOOR = 32  # queries; below it chance decides
MIN_QUERIES = order_statistics.MIN_SAMPLES[99]  # below it LoadGen itself calls a 99th percentile undecided

_SECTIONS = ("Recommendations", "Early Stopping Result")
_PERCENTILE = re.compile(r"(\d+\.\d\d) percentile latency \(ns\)")


@dataclass(frozen=True)
class Scenario:
    """One of LoadGen's scenarios.

    Attributes:
        loadgen: its name there.
        metric: what its result is, unit included.
        headline: LoadGen's words for it.
        unit: what its number is to be multiplied by.
    """

    name: str
    loadgen: str
    metric: str
    headline: str
    unit: float


SCENARIOS: tuple[Scenario, ...] = (
    Scenario("single-stream", "SingleStream", "latency_p90_s", "90.00 percentile latency (ns)", 1e-9),
    Scenario("multi-stream", "MultiStream", "latency_p99_s", "99.00 percentile latency (ns)", 1e-9),
    Scenario("server", "Server", "qps", "Completed samples per second", 1.0),
    Scenario("offline", "Offline", "throughput_ips", "Samples per second", 1.0),
)


@dataclass(frozen=True)
class Load:
    """What one LoadGen test is asked for.

    Attributes:
        scenario: as LoadGen calls it, e.g. `SingleStream`.
        duration_s: least seconds of load.
        min_queries: least number of queries.
        qps: queries per second: for `Server` those that arrive, for `Offline` images and else queries that LoadGen is to be prepared for.
        latency_bound_s: what the 99th percentile of `Server` must not exceed.
        samples_per_query: images of one query of `MultiStream`.
        batch_size: most images of one launch.
    """

    scenario: str
    duration_s: float
    min_queries: int
    qps: float
    latency_bound_s: float
    samples_per_query: int
    batch_size: int

    @property
    def max_waiting(self) -> int:
        """Queries that may wait in `Server` before LoadGen gives up.

        A stall of bound + 1 % of the run makes 1 % of the queries late, after which no run is valid. With more waiting than arrive in twice
        that time the verdict is known, and the rest of the run would tell nothing.
        """
        run_s = max(self.duration_s, self.min_queries / self.qps)
        return math.ceil(BACKLOG_MARGIN * self.qps * (self.latency_bound_s + LATE * run_s)) + BACKLOG_FLOOR

    @property
    def settings(self) -> dict[str, float]:
        """What decides the numbers, for the record: names hold the units."""
        settings: dict[str, float] = {"min_duration_s": self.duration_s, "batch_size": self.batch_size, **SEEDS}
        if self.scenario == "Server":
            server = {"target_qps": self.qps, "latency_bound_s": self.latency_bound_s, "max_waiting": self.max_waiting}
            return {**settings, "min_queries": self.min_queries, **server}
        return {**settings, "min_queries": self.min_queries, "expected_qps": self.qps}


def find_scenario(name: str) -> Scenario:
    """The scenario of that name; raises UnknownName."""
    for scenario in SCENARIOS:
        if scenario.name == name:
            return scenario
    raise UnknownName("scenario", name, (scenario.name for scenario in SCENARIOS))


def parse_summary(text: str) -> dict[str, str]:
    """LoadGen's words by what they are about, in its order; a section of remarks as one entry, remarks separated by `; `.

    Raises:
        Unusable: not a summary of LoadGen's.
    """
    found: dict[str, str] = {}
    section = None
    for line in text.splitlines():
        key, colon, value = (part.strip() for part in line.partition(":"))
        if key in _SECTIONS and not value:
            section = key
        elif section and line.lstrip().startswith("* "):
            remark = line.lstrip()[2:]
            found[section] = f"{found[section]}; {remark}" if section in found else remark
        elif section in found and line.startswith(" ") and not colon:
            found[section] += f" {line.strip()}"
        elif colon and value:
            section, found[key] = None, value
    if "Result is" not in found:
        raise Unusable("LoadGen wrote no result into its summary; pip install -U 'lenet-deploy[loadgen]'")
    return found


def latencies(summary: Mapping[str, str], queries: int) -> dict[str, float | None]:
    """Seconds by `p50`, `p90`, ...: LoadGen's percentiles, None for one that so many queries are too few to claim."""
    found: dict[str, float | None] = {}
    for key, value in summary.items():
        if match := _PERCENTILE.fullmatch(key):
            percent = float(match[1])
            enough = queries >= order_statistics.MIN_SAMPLES.get(percent, 1)
            found[f"p{percent:g}"] = int(value) / 1e9 if enough else None
    return found


def judge(kind: Scenario, variant: str, device: str, load: Load, text: str, queries: int) -> LoadResult:
    """The record of one LoadGen test from its summary. Raises Unusable where that lacks the scenario's figures."""
    summary = parse_summary(text)
    try:
        value = kind.unit * float(summary[kind.headline])
    except (KeyError, ValueError) as error:
        raise Unusable(f"this LoadGen's summary lacks what {kind.name} is about ({first_line(error)}); install 5 or later") from None
    remarks = [*summary.get("Recommendations", "").split("; "), *summary.get("Early Stopping Result", "").split("; ")]
    return LoadResult(
        variant=variant,
        device=device,
        scenario=kind.name,
        valid=summary["Result is"] == "VALID",
        metric=kind.metric,
        value=value,
        queries=queries,
        latencies_s={} if kind.name == "offline" else latencies(summary, queries),  # there they are times since the one start
        settings=load.settings,
        summary=summary,
        reasons=() if summary["Result is"] == "VALID" else tuple(filter(None, remarks)),
    )
