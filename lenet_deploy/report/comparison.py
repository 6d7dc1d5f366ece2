"""Two results of bench against each other, as a table and as Markdown for a pull request."""

from __future__ import annotations

import html

from lenet_deploy.bench_records import VERDICTS, Comparison, ComparisonReport
from lenet_deploy.report.bench import seconds
from lenet_deploy.report.table import Table, remark_lines, to_markdown, without
from lenet_deploy.report.tables import environment_line


def comparison_table(report: ComparisonReport) -> Table:
    """One row a case; the ratio is head to base, so that above 1 head is slower."""
    columns = ("variant", "device", "batch", "scope", "base", "head", "ratio", "95 % interval", "verdict", "remarks")
    return Table(columns, tuple(map(_row, report.rows)))


def terminal_table(report: ComparisonReport) -> Table:
    """The same for a terminal: `comparison_lines` say the remarks."""
    return without(comparison_table(report), "remarks")


def comparison_lines(report: ComparisonReport) -> tuple[str, ...]:
    """The remarks, each with the rows it concerns."""
    return remark_lines((row.variant, f"{row.batch_size} {row.scope}", _remarks(row)) for row in report.rows)


def comparison_counts(report: ComparisonReport) -> str:
    """How many cases got which verdict, the worst first, in one line."""
    verdicts = [row.verdict for row in report.rows]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS if verdict in verdicts)


def comparison_markdown(report: ComparisonReport) -> str:
    """The verdict, the table, the notes, and both machines."""
    counted = f"{comparison_counts(report)}; changes of up to {report.threshold_percent:g} % are taken for none."
    machines = [
        f"{side}: {environment_line(each)}" for side, each in (("base", report.base_environment), ("head", report.head_environment))
    ]
    listed = "\n".join(f"- {html.escape(' '.join(line.splitlines()))}" for line in (*report.notes, *machines))
    return "\n\n".join((f"## Compared with base: {report.verdict}", counted, to_markdown(comparison_table(report)), listed)) + "\n"


def _row(row: Comparison) -> tuple[str, ...]:
    return (
        row.variant,
        row.device,
        str(row.batch_size),
        row.scope,
        seconds(row.base_median_s),
        seconds(row.head_median_s),
        "-" if row.ratio is None else f"{row.ratio:.3f}",
        "-" if row.ci95 is None else f"{row.ci95[0]:.3f} - {row.ci95[1]:.3f}",
        row.verdict,
        "; ".join(_remarks(row)),
    )


def _remarks(row: Comparison) -> tuple[str, ...]:
    return (*((row.reason,) if row.reason else ()), *row.warnings)
