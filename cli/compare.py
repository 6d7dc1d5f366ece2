"""`lenet-deploy compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lenet_deploy.errors import GateFailed, Inconclusive

from .options import Json, Markdown, Quiet
from .output import check_outputs, emit, note, verdict

if TYPE_CHECKING:
    from lenet_deploy.bench_records import ComparisonReport

NAMED = 3  # cases in the message at the end; the table above it has all


def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE.json", help="What bench --json wrote before.", show_default=False)],
    head: Annotated[Path, typer.Argument(metavar="HEAD.json", help="What it wrote after.", show_default=False)],
    threshold: Annotated[float, typer.Option("--threshold", metavar="PCT", help="Percent of change that is taken for none.")] = 3.0,
    across_machines: Annotated[
        bool, typer.Option("--across-machines", help="Compare ratios to each file's own baseline, from unlike machines or options.")
    ] = False,
    json: Json = None,
    markdown: Markdown = None,
    quiet: Quiet = False,
) -> None:
    """Compare two results of bench, case by case; exit 1 if any is slower, else 4 if any is inconclusive or missing in HEAD."""
    check_outputs(json, markdown)
    from lenet_deploy.bench.compare import compare
    from lenet_deploy.report.comparison import comparison_counts, comparison_lines, comparison_markdown, terminal_table
    from lenet_deploy.store import comparison_json, read_bench

    results = read_bench(base), read_bench(head)
    report = compare(*results, threshold, across_machines)
    if results[0] == results[1]:
        note("note: both files are the same result", quiet)
    for remark in report.notes:
        note(f"note: {remark}", quiet)
    emit(
        terminal_table(report),
        lambda: comparison_json(report),
        json,
        markdown,
        *comparison_lines(report),
        f"verdict: {verdict(report.verdict, report.verdict == 'not slower')} ({comparison_counts(report)})",
        markdown=lambda: comparison_markdown(report),
    )
    if report.verdict == "slower":
        raise GateFailed(f"slower by more than {threshold:g} %: {_named(report, 'slower')}")
    if report.verdict == "incomplete":
        raise Inconclusive(f"not measured in {head}: {_named(report, 'only in base')}; compare results of the same variants and batches")
    if report.verdict == "inconclusive":
        named = _named(report, "inconclusive")
        raise Inconclusive(f"inconclusive: {named}; measure longer, with bench --profile full, or on a quieter machine")


def _named(report: ComparisonReport, wanted: str) -> str:
    cases = [f"{row.variant} (batch {row.batch_size}, {row.scope})" for row in report.rows if row.verdict == wanted]
    return ", ".join(cases[:NAMED]) + (f" and {len(cases) - NAMED} more" if len(cases) > NAMED else "")
