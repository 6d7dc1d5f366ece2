"""Where results and progress go: results to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lenet_deploy.models import MODELS

from .errors import discard_stdout, raise_if_interrupted

if TYPE_CHECKING:
    from lenet_deploy.records import Failure
    from lenet_deploy.report.table import Table


def emit(table: Table, text: Callable[[], str], json_to: str | None, markdown_to: Path | None = None, *lines: str) -> None:
    """Print the table and `lines`, or the JSON alone with `--json -`; write the files that were asked for.

    `text` makes the JSON document, if it is wanted.
    """
    from lenet_deploy.report.table import to_markdown, to_text
    from lenet_deploy.store import write_file

    if json_to not in (None, "-"):  # files first: the reader of standard output may have gone
        write_file(Path(str(json_to)), text().encode())
    if markdown_to is not None:
        write_file(markdown_to, (to_markdown(table) + "\n").encode())
    try:
        if json_to == "-":
            typer.echo(text(), nl=False)
        else:
            typer.echo("\n".join((to_text(table), *lines)))
        sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()  # the command still ends with its own exit code


def verdict(word: str, good: bool) -> str:
    """A word in green or red on a terminal, plain elsewhere and with NO_COLOR."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        return typer.style(word, fg="green" if good else "red", bold=True)
    return word


def note(message: str, quiet: bool = False) -> None:
    """A line for the person at the terminal."""
    if not quiet:
        typer.echo(message, err=True)


def note_if_fresh(what: str, seed: int, quiet: bool) -> None:
    """Say so where WHAT is a model's name, whose weights are therefore untrained."""
    if what in (model.name for model in MODELS):
        note(f"{what}: freshly initialised from seed {seed}, not trained", quiet)


def note_skipped(failures: Iterable[Failure], quiet: bool) -> None:
    """One line a variant that does not run here."""
    for failure in failures:
        note(f"skipped: {failure.name}: {failure.reason}", quiet)


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on a terminal, nothing elsewhere; the callable takes steps done, steps in all, and what is at work."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total, what: raise_if_interrupted()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")

        def show(done: int, total: int, what: str) -> None:
            raise_if_interrupted()
            bar.update(task, completed=done, total=total, description=what)

        yield show
