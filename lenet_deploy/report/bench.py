"""A bench run as tables: what a person wants to see of it first, and what they need before they cite it."""

from __future__ import annotations

from lenet_deploy.bench_records import BenchReport, Measurement, Speedup
from lenet_deploy.report.table import Table, remark_lines, to_markdown, to_text, without
from lenet_deploy.report.tables import environment_line


def bench_table(report: BenchReport) -> Table:
    """One row a measurement, with all that Markdown has room for."""
    ratios = {(each.variant, each.batch_size, each.scope): each for each in report.speedups}
    columns = ("variant", "batch", "scope", "median", "95 % interval", "p90", "p99", "images/s", "speed-up", "limit", "bound", "warnings")
    return Table(columns, tuple(_row(m, ratios.get((m.variant, m.batch_size, m.scope))) for m in report.measurements))


def terminal_table(report: BenchReport) -> Table:
    """The same for a terminal: `warning_lines` say the rest."""
    return without(bench_table(report), "p90", "warnings")


def warning_lines(report: BenchReport) -> tuple[str, ...]:
    """The warnings, each with the rows it concerns."""
    return remark_lines((m.variant, f"{m.batch_size} {m.scope}", m.warnings) for m in report.measurements)


def _row(measured: Measurement, speedup: Speedup | None) -> tuple[str, ...]:
    head = (measured.variant, str(measured.batch_size), measured.scope)
    if not measured.kept_s:
        return (*head, *"--------", "; ".join(measured.warnings))
    percentiles, limit = measured.percentiles_s, measured.limit_fraction
    return (
        *head,
        seconds(measured.median_s),
        interval(measured.ci95_s),
        seconds(percentiles["p90"]),
        seconds(percentiles["p99"]),
        f"{measured.throughput_ips:,.0f}",
        _ratio(speedup),
        "-" if limit is None else f"{limit:.1%}",
        measured.bound or "-",
        "; ".join(measured.warnings),
    )


def _ratio(speedup: Speedup | None) -> str:
    if speedup is None:
        return "-"
    if speedup.variant == speedup.baseline:
        return "1 (baseline)"
    return f"{speedup.ratio:.2f} ({speedup.ci95[0]:.2f} - {speedup.ci95[1]:.2f})" if speedup.ci95 else f"~{speedup.ratio:.2f}"


def sections(report: BenchReport) -> tuple[tuple[str, Table], ...]:
    """The tables beside the main one that have rows, with their titles."""
    found = (
        ("Cold start, each in a fresh process", _cold_table(report)),
        ("Best batch sizes", _batch_table(report)),
        ("Limits, measured in the same run", _limit_table(report)),
    )
    return tuple((title, table) for title, table in found if table.rows)


def remarks(report: BenchReport) -> tuple[str, ...]:
    """What makes the numbers less than they seem: what failed, was cut short or could not be asked for, a noisy machine."""
    partial = (f"partial: {report.partial}",) if report.partial else ()
    failed = tuple(f"failed: {each.name}: {each.reason}" for each in report.failed)
    cut = sum(row.stop == "time limit" and row.ci95_s is None for row in report.measurements)
    short = (f"{cut} rows have no interval: the time limit left too few visits; raise --limit or measure less",) if cut else ()
    noisy = dict.fromkeys(remark for state in report.machine for remark in state.remarks)
    said = tuple(f"noisy machine: {remark}" for remark in noisy)
    unsteady = sum(any("noisy" in each or "drift" in each for each in row.warnings) for row in report.measurements)
    if not said and 2 * unsteady > len(report.measurements):
        rows = len(report.measurements)
        said = (f"{unsteady} of {rows} rows are noisy, and this machine shows no cause: perhaps others on the same hardware",)
    only = report.options.get("only_batch_size")
    fixed = (f"the graph is made for batches of {only} alone, so no other was measured",) if only else ()
    return (*partial, *failed, *fixed, *short, *said)


def bench_notes(report: BenchReport) -> tuple[str, ...]:
    """What follows the main table on a terminal."""
    titled = tuple(f"\n{title}\n{to_text(table)}" for title, table in sections(report))
    rough = ("~: too few visits for an interval",) if any(each.ci95 is None for each in report.speedups) else ()
    said = (*warning_lines(report), *rough, *remarks(report))
    return (*(("", *said) if said else ()), *titled, "", environment_line(report.environment))


def bench_markdown(report: BenchReport) -> str:
    """The same for a README or a pull request."""
    parts = [to_markdown(bench_table(report))]
    for title, table in sections(report):
        parts += [f"**{title}**", to_markdown(table)]
    skipped = [f"skipped: `{failure.name}`: {failure.reason}" for failure in report.skipped]
    listed = [f"- {line}" for line in (*remarks(report), *skipped)]
    return "\n\n".join((*parts, *(("\n".join(listed),) if listed else ()), environment_line(report.environment))) + "\n"


def _cold_table(report: BenchReport) -> Table:
    rows = tuple(
        (
            cold.variant,
            *(seconds(value) for value in (cold.import_s, cold.load_s, cold.first_s, cold.steady_s, cold.total_s)),
            "-" if cold.peak_memory_bytes is None else f"{cold.peak_memory_bytes / 2**20:,.0f} MiB",
        )
        for cold in report.cold_starts
    )
    return Table(("variant", "import", "load", "first inference", "until steady", "to first answer", "peak memory"), rows)


def _batch_table(report: BenchReport) -> Table:
    slo = report.options.get("slo_s")
    within = f"best within {slo * 1e3:g} ms" if slo else "within budget"
    rows = tuple(
        (each.variant, each.scope, str(each.best), "-" if each.within_slo is None else str(each.within_slo), each.statistic)
        for each in report.batches
    )
    return Table(("variant", "scope", "best batch", within, "by"), rows)


def _limit_table(report: BenchReport) -> Table:
    rows = tuple(
        (
            limit.device,
            ", ".join(f"{precision} {rate / 1e9:,.1f} GFLOP/s" for precision, rate in limit.flops.items()),
            f"{limit.memory_bps / 1e9:,.1f} GB/s",
            "-" if limit.pcie_bps is None else f"{limit.pcie_bps / 1e9:,.1f} GB/s",
        )
        for limit in report.limits
    )
    return Table(("device", "matrix product", "memory", "PCIe"), rows)


def interval(bounds: tuple[float, float] | None) -> str:
    """Two times and a dash between them, the unit once where it is one."""
    if bounds is None:
        return "-"
    low, high = seconds(bounds[0]), seconds(bounds[1])
    unit = high[high.index(" ") :]
    return f"{low.removesuffix(unit)} - {high}"


def seconds(value: float | None) -> str:
    """A time in the unit that fits it."""
    if value is None:
        return "-"
    if value < 1e-3:
        return f"{value * 1e6:,.1f} us"
    return f"{value * 1e3:,.3f} ms" if value < 1.0 else f"{value:,.2f} s"
