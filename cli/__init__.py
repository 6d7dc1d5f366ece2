"""The command line: one file a command; a command parses, calls the library once, and renders.

Importing it imports nothing more than `lenet_deploy` itself: `app` takes Ctrl-C first, so that the rest can be interrupted at any moment.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from .interrupts import say_interrupted, take_interrupts, was_interrupted

if TYPE_CHECKING:
    import typer

COMMANDS = ("demo", "train", "evaluate", "inspect", "export", "parity", "bench", "compare", "predict", "zoo", "doctor")


def build() -> typer.Typer:
    """The typer application, every command registered."""
    import typer

    application = typer.Typer(
        name="lenet-deploy",
        help="Train or load LeNet-5, export it, prove every export equal, and measure each.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # rich costs a third of the time that --help takes
    )

    def _version(show: bool) -> None:
        if show:
            from lenet_deploy import __version__

            typer.echo(f"lenet-deploy {__version__}")
            raise typer.Exit

    @application.callback()
    def root(
        version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version and exit."),
    ) -> None:
        pass

    for name in COMMANDS:
        application.command()(getattr(import_module(f".{name}", __name__), name))
    return application


def app() -> None:
    """Run the command line and exit with the documented code."""
    take_interrupts()
    try:
        from .errors import run

        application = build()
    except BaseException:  # an import turns the interrupt into errors of its own
        if not was_interrupted():
            raise
        sys.exit(say_interrupted())
    sys.exit(run(application))
