"""The command line: one file a command; a command parses, calls the library once, and renders."""

from __future__ import annotations

import sys

import typer

from . import bench, compare, demo, doctor, evaluate, export, inspect, parity, predict, train
from .errors import run, take_interrupts

COMMANDS = (
    demo.demo,
    train.train,
    evaluate.evaluate,
    inspect.inspect,
    export.export,
    parity.parity,
    bench.bench,
    compare.compare,
    predict.predict,
    doctor.doctor,
)


def _version(show: bool) -> None:
    if show:
        from lenet_deploy import __version__

        typer.echo(f"lenet-deploy {__version__}")
        raise typer.Exit


def build() -> typer.Typer:
    """The typer application, every command registered."""
    application = typer.Typer(
        name="lenet-deploy",
        help="Train or load LeNet-5, export it, prove every export equal, and measure each.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # rich costs a third of the time that --help takes
    )

    @application.callback()
    def root(
        version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version and exit."),
    ) -> None:
        pass

    for command in COMMANDS:
        application.command()(command)
    return application


def app() -> None:
    """Run the command line and exit with the documented code."""
    take_interrupts()
    sys.exit(run(build()))
