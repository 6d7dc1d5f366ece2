"""A parity run as Markdown, for a pull request or a job's summary page."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from lenet_deploy.records import ParityReport, ParityResult
from lenet_deploy.report.table import Table, to_markdown
from lenet_deploy.report.tables import environment_line, layer_error_table, parity_table

# Layers are left out beyond it: a comment on GitHub holds 65,536 characters, and a longer one is refused as a whole.
MAX_CHARACTERS = 60_000


def parity_markdown(report: ParityReport) -> str:
    """The verdict, the parity table, and what a reader asks next: failures, layers, decisions, what was skipped, the machine."""
    by_status: dict[str, list[ParityResult]] = {}
    for result in report.results:
        by_status.setdefault(result.status, []).append(result)
    failed, skipped = by_status.get("fail", []), by_status.get("skipped", [])
    decided = [result for result in report.results if result.decisions]
    lacking = ", but not all that is required was judged" if report.missing else ""
    head = [f"## Parity: {report.verdict}{lacking}", _counts(report), to_markdown(_escaped(parity_table(report)))]
    if failed:
        head += ["### Failures", _list(map(_failure, failed))]
    if report.missing:
        head += ["### Required, but not judged", _list(map(_skipped, report.missing))]
    tail = []
    if decided:
        tail += ["### Decisions", to_markdown(_escaped(_decision_table(decided)))]
    if skipped:
        tail += ["### Skipped", _list(map(_skipped, skipped))]
    if report.notes:
        tail += ["### Notes", _list(map(_plain, report.notes))]
    tail.append(f"Judged on {_plain(environment_line(report.environment))}.")
    room = MAX_CHARACTERS - sum(len(part) + 2 for part in (*head, *tail))
    return "\n\n".join((*head, *_layers(report.results, room), *tail)) + "\n"


def _counts(report: ParityReport) -> str:
    """How many variants passed, failed and were skipped, in words."""
    statuses = [row[1] for row in parity_table(report).rows]
    if not any(result.status != "skipped" for result in report.results):
        return "Nothing was judged, so nothing is known to be equal."
    counts = [f"{statuses.count(status)} {word}" for status, word in (("pass", "passed"), ("fail", "failed"), ("skipped", "skipped"))]
    return f"{len(statuses)} {'variant' if len(statuses) == 1 else 'variants'}: {', '.join(counts)}."


def _failure(result: ParityResult) -> str:
    layer = f" First divergent layer: {_code(result.first_divergent_layer)}." if result.first_divergent_layer else ""
    return f"{_where(result)}: {_plain(result.reason or 'no reason was given').rstrip('.')}.{layer}"


def _skipped(result: ParityResult) -> str:
    return f"{_where(result)}: {_plain(result.reason or 'no reason was given')}"


def _where(result: ParityResult) -> str:
    """Variant, inputs and batch size, as far as there are any."""
    inputs = f", {_plain(result.inputs)}" if result.inputs else ""
    batch = f", batch {result.batch_size}" if result.batch_size is not None else ""
    return f"{_code(result.variant)}{inputs}{batch}"


def _layers(results: Iterable[ParityResult], room: int) -> list[str]:
    """A collapsed table for each result that has layers, those that failed first, in at most `room` characters."""
    traced = sorted((result for result in results if result.layers), key=lambda result: result.status != "fail")
    shown: list[str] = []
    for number, result in enumerate(traced):
        details = _details(result)
        room -= len(details) + 2
        if room < 0:
            left = len(traced) - number
            shown.append(f"{left} more {'table' if left == 1 else 'tables'} of layers would not fit here; the JSON holds every layer.")
            break
        shown.append(details)
    return ["### Layers", *shown] if shown else []


def _details(result: ParityResult) -> str:
    # Without the batch size: layers are traced on images of the input set, not on the launch that failed.
    title = f"{result.variant}, {result.inputs}" if result.inputs else result.variant
    # GitHub reads Markdown inside HTML only behind an empty line; the title is on the HTML's own line.
    table = to_markdown(_escaped(layer_error_table(result.layers)))
    return f"<details>\n<summary>{html.escape(_one_line(title))}</summary>\n\n{table}\n\n</details>"


def _decision_table(results: Sequence[ParityResult]) -> Table:
    rows = tuple(
        (
            result.variant,
            result.inputs or "",
            f"{decisions.images:,}",
            _accuracy(decisions.oracle_accuracy, decisions.oracle_ci95),
            _accuracy(decisions.variant_accuracy, decisions.variant_ci95),
            f"{decisions.near_ties:,}",
            f"{decisions.true_flips:,}",
            f"{decisions.mcnemar_p:.3g}",
        )
        for result in results
        if (decisions := result.decisions)
    )
    columns = ("variant", "inputs", "images", "oracle accuracy %", "variant accuracy %", "near ties", "true flips", "McNemar p")
    return Table(columns, rows)


def _accuracy(percent: float, interval: tuple[float, float]) -> str:
    return f"{percent:.2f} ({interval[0]:.2f} - {interval[1]:.2f})"


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _escaped(table: Table) -> Table:
    """A table whose cells Markdown shows as they are; `to_markdown` itself escapes what would end a cell."""
    return Table(table.columns, tuple(tuple(map(_plain, row)) for row in table.rows))


def _plain(text: str) -> str:
    """Text that Markdown and HTML leave alone."""
    return re.sub(r"[\\`*_\[\]<>&~]", r"\\\g<0>", _one_line(text))


def _code(text: str) -> str:
    """A code span, in more backticks than the text has."""
    text = _one_line(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
