"""Where results and progress go: results to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lenet_deploy.errors import BadInput, CannotWrite
from lenet_deploy.models import MODELS
from lenet_deploy.sources import known_names

from .errors import discard_stdout
from .interrupts import raise_if_interrupted

if TYPE_CHECKING:
    from lenet_deploy.records import Failure
    from lenet_deploy.report.table import Table


def emit(
    table: Table,
    text: Callable[[], str],
    json_to: str | None,
    markdown_to: Path | None = None,
    *lines: str,
    markdown: Callable[[], str] | None = None,
) -> None:
    """Print the table and `lines`, or the JSON alone with `--json -`; write the files that were asked for.

    `text` makes the JSON document, and `markdown` the Markdown one where that is more than the table, if they are wanted.
    """
    from lenet_deploy.report.table import to_markdown, to_text
    from lenet_deploy.store import write_file

    try:
        if json_to not in (None, "-"):  # files first: the reader of standard output may have gone
            write_file(Path(str(json_to)), text().encode())
        if markdown_to is not None:
            write_markdown(markdown_to, markdown() if markdown else to_markdown(table) + "\n")
    finally:  # a disk that is full takes the file alone
        if json_to == "-":
            show(text().removesuffix("\n"))
        else:
            show(to_text(table), *lines)


def check_outputs(json_to: str | None, *others: Path | None) -> None:
    """Refuse before anything is measured what could not be written after it.

    Raises:
        BadInput: two of them are the same file, or one of the others is `-`.
        CannotWrite: a folder that does not exist or takes no files, or a folder in the file's place.
    """
    files = [path for path in (None if json_to in (None, "-") else Path(str(json_to)), *others) if path is not None]
    if Path("-") in others:
        raise BadInput("- is standard output for --json alone; name a file")
    for number, path in enumerate(files):
        if path.is_dir():
            raise CannotWrite(f"{path}: cannot be written: a folder stands there; name a file in it")
        if not path.parent.is_dir():
            raise CannotWrite(f"{path}: cannot be written: {path.parent} is no folder; make it first")
        if not os.access(path if path.exists() and not path.is_file() else path.parent, os.W_OK):
            raise CannotWrite(f"{path}: cannot be written: no permission; choose another place")
        to_a_file = path.is_file() or not path.exists()  # pipes and devices take several
        if to_a_file and path.resolve() in [other.resolve() for other in files[:number]]:
            raise BadInput(f"two results would go to {path}, and the one would replace the other; name two files")


def show(*lines: str) -> None:
    """Lines of a result on standard output; a reader that has gone is no error."""
    try:
        typer.echo("\n".join(lines))
        sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()  # the command still ends with its own exit code


def write_markdown(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step, or append to it where it is the summary that GitHub shows for a job's step.

    Raises:
        CannotWrite: the system refused; `path` is as it was.
    """
    from lenet_deploy.store import cannot_write, write_file

    data = text.encode()
    if not _is_step_summary(path):
        write_file(path, data)
        return
    try:
        with path.open("ab", buffering=0) as file:  # unbuffered, so that nothing is left to be written after a refusal
            before = file.tell()
            data = b"\n\n" + data if before else data  # what others wrote may lack its last line break
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                with contextlib.suppress(OSError):  # the first refusal is the one to report
                    file.truncate(before)
                raise
    except OSError as error:
        raise cannot_write(path, error) from error


def _is_step_summary(path: Path) -> bool:
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    return bool(summary) and path.resolve() == Path(str(summary)).resolve()


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
    if what in known_names() and Path(what).exists():
        note(f"{what}: the model of that name, not what stands in this folder; for that say ./{what}", quiet)


def note_skipped(failures: Iterable[Failure], quiet: bool) -> None:
    """One line a reason why variants do not run here."""
    by_reason: dict[str, list[str]] = {}
    for failure in failures:
        by_reason.setdefault(failure.reason, []).append(failure.name)
    for reason, names in by_reason.items():
        note(f"skipped: {', '.join(names)}: {reason}", quiet)


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

        def advance(done: int, total: int, what: str) -> None:
            raise_if_interrupted()
            bar.update(task, completed=done, total=total, description=what)

        yield advance
