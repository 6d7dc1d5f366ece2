"""A table, and its two renderings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Cells as text. Columns whose cells are numbers are aligned to the right.

    Attributes:
        columns: the headings.
        rows: as many cells each as there are columns.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def to_text(table: Table) -> str:
    """For a terminal: columns padded to their widest cell, no line wrapped."""
    lines = (table.columns, *(tuple(map(_one_line, row)) for row in table.rows))
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    right = _numeric(table)

    def render(cells: Sequence[str]) -> str:
        padded = (cell.rjust(width) if r else cell.ljust(width) for cell, width, r in zip(cells, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join((render(table.columns), rule, *map(render, lines[1:])))


def to_markdown(table: Table) -> str:
    """For a README or a pull request."""
    marks = ("---:" if r else "---" for r in _numeric(table))
    lines = (table.columns, tuple(marks), *(tuple(_one_line(cell).replace("|", "\\|") for cell in row) for row in table.rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _one_line(cell: str) -> str:
    return " ".join(cell.splitlines())


def _numeric(table: Table) -> list[bool]:
    """Which columns hold numbers: a digit first in each cell that is not empty or a dash, and at least one such cell."""

    def number(cell: str) -> bool:
        return cell.lstrip("-+").replace(",", "")[:1].isdigit() and " x " not in cell

    columns = [[row[i] for row in table.rows if row[i] not in ("", "-")] for i in range(len(table.columns))]
    return [bool(cells) and all(map(number, cells)) for cells in columns]
