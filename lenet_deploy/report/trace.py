"""A trace for a terminal: the operators that take most, the gaps between them, and what the profiler cost."""

from __future__ import annotations

from collections.abc import Sequence

from lenet_deploy.bench_records import OperatorTime, TraceReport
from lenet_deploy.report.table import Table

TOP = 12  # operators that have a row of their own; a LeNet's other ones take a few percent
LONGEST = 60  # characters of a kernel's name: a template's arguments go on for hundreds


def trace_tables(report: TraceReport, top: int = TOP) -> tuple[tuple[str, Table], ...]:
    """Titles and tables: the operators on the host and, on CUDA, the kernels; the rows of each add up to the launch."""
    where = f"{report.variant}, batch {report.batch_size}, {report.device}"
    host = _table(report, report.operators, report.idle_s, "no operator ran", top)
    tables = ((f"{where}: operators on the host", host),)
    if report.gpu_idle_s is None:
        return tables
    gpu = _table(report, report.kernels, report.gpu_idle_s, "nothing ran on the GPU", top)
    return (*tables, (f"{where}: kernels on the GPU", gpu))


def trace_lines(report: TraceReport) -> tuple[str, ...]:
    """What to read with the tables: the gaps, what the profiler cost, and where the trace is."""
    kernels = report.kernels_per_launch
    launched = "" if kernels is None else f"; {kernels:,.3g} kernels a launch"
    running = "operator" if report.gpu_idle_s is None else "kernel"
    around = report.idle_s - sum(each.self_s for each in report.wrappers)
    parts = [*(f"{_us(each.self_s)} in {each.name}" for each in report.wrappers), f"{_us(around)} outside"]
    return (
        f"gaps: {report.gap_share:.0%} of a launch, in which no {running} ran{launched}",
        *((f"the host's {_us(report.idle_s)} between operators: {', '.join(parts)}",) if report.wrappers else ()),
        f"a launch took {_us(report.launch_s)} with the profiler on and {_us(report.plain_s)} without it ({report.slowdown:.1f} times): "
        "the shares say where to look, latencies come from bench",
        *report.notes,
        f"{report.launches} launches in {report.path}: open it in https://ui.perfetto.dev or chrome://tracing",
    )


def _table(report: TraceReport, operators: Sequence[OperatorTime], idle_s: float, idle: str, top: int) -> Table:
    rows = [(_short(each.name), each.node or "-", f"{each.calls:.3g}", *_time(report, each.self_s)) for each in operators[:top]]
    rest = operators[top:]
    if rest:
        rows.append((f"{len(rest)} others", "-", f"{sum(e.calls for e in rest):.3g}", *_time(report, sum(e.self_s for e in rest))))
    rows.append((f"({idle})", "-", "-", *_time(report, idle_s)))
    columns = ("operator", "node", "calls/launch", "time/launch", "share")
    if any(each.node for each in operators):
        return Table(columns, tuple(rows))
    return Table((columns[0], *columns[2:]), tuple((row[0], *row[2:]) for row in rows))


def _time(report: TraceReport, seconds: float) -> tuple[str, str]:
    return (_us(seconds), f"{seconds / report.launch_s:.1%}")


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f} us"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."
