"""`lenet-deploy compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lenet_deploy.errors import GateFailed, Inconclusive

from .options import Json, Markdown, Quiet
from .output import emit, note, verdict

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
    """Compare two results of bench, case by case; exit 1 if any is slower, else 4 if any is inconclusive."""
    from lenet_deploy.bench.compare import compare
    from lenet_deploy.report.comparison import comparison_counts, comparison_markdown, comparison_table
    from lenet_deploy.store import comparison_json, read_bench

    report = compare(read_bench(base), read_bench(head), threshold, across_machines)
    for remark in report.notes:
        note(f"note: {remark}", quiet)
    emit(
        comparison_table(report),
        lambda: comparison_json(report),
        json,
        markdown,
        f"verdict: {verdict(report.verdict, report.verdict == 'not slower')} ({comparison_counts(report)})",
        markdown=lambda: comparison_markdown(report),
    )
    cases = [f"{row.variant} (batch {row.batch_size}, {row.scope})" for row in report.rows if row.verdict == report.verdict]
    named = ", ".join(cases[:NAMED]) + (f" and {len(cases) - NAMED} more" if len(cases) > NAMED else "")
    if report.verdict == "slower":
        raise GateFailed(f"slower by more than {threshold:g} %: {named}")
    if report.verdict == "inconclusive":
        raise Inconclusive(f"inconclusive: {named}; measure longer, with bench --profile full, or on a quieter machine")
