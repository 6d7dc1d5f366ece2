"""A table, and its two renderings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
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


def without(table: Table, *columns: str) -> Table:
    """The table without some columns, for a terminal, which is narrower than a file."""
    kept = [i for i, name in enumerate(table.columns) if name not in columns]
    return Table(tuple(table.columns[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in table.rows))


# A number that is no part of a name.
_NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:[.,]\d+)*%?")


def remark_lines(rows: Iterable[tuple[str, str, Sequence[str]]]) -> tuple[str, ...]:
    """What is said of rows, one line a remark with the rows it concerns; remarks that differ in their numbers alone are one.

    Args:
        rows: of each, the variant, the workload, and the remarks.
    """
    listed = list(rows)
    found: dict[str, list[tuple[str, str, str]]] = {}
    for variant, workload, remarks in listed:
        for remark in remarks:
            found.setdefault(_NUMBER.sub("#", remark), []).append((variant, workload, remark))
    return tuple(f"{_merged([remark for *_, remark in each])}: {_places(each, len(listed))}" for each in found.values())


def _merged(remarks: Sequence[str]) -> str:
    """Remarks that differ in numbers as one, with the least and the greatest of each."""

    def size(number: str) -> float:
        return float(number.rstrip("%").replace(",", ""))

    columns = zip(*map(_NUMBER.findall, remarks), strict=True)
    ends = iter([(min(column, key=size), max(column, key=size)) for column in columns])
    return _NUMBER.sub(lambda found: " to ".join(dict.fromkeys(next(ends))), remarks[0])


def _places(rows: Sequence[tuple[str, str, str]], count: int) -> str:
    if len(rows) == count > 1:
        return f"all {count} rows"
    workloads: dict[str, list[str]] = {}
    for variant, workload, _ in rows:
        workloads.setdefault(variant, []).append(workload)
    return "; ".join(f"{variant} ({', '.join(each)})" for variant, each in workloads.items())


def _one_line(cell: str) -> str:
    return " ".join(cell.splitlines())


def _numeric(table: Table) -> list[bool]:
    """Which columns hold numbers: a digit first, signs aside, in each cell that is not empty or a dash, and such a cell."""

    def number(cell: str) -> bool:
        return cell.lstrip("-+~").replace(",", "")[:1].isdigit() and " x " not in cell

    columns = [[row[i] for row in table.rows if row[i] not in ("", "-")] for i in range(len(table.columns))]
    return [bool(cells) and all(map(number, cells)) for cells in columns]
