"""The one place where errors become exit codes and messages."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import typer

from lenet_deploy.errors import BadInput, CannotWrite, GateFailed, Inconclusive, LenetDeployError, Unusable

from .interrupts import INTERRUPTED, raise_if_interrupted, say_interrupted, was_interrupted

CANNOT_WRITE = 5
EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (GateFailed, 1),
    (BadInput, 2),
    (Unusable, 3),
    (Inconclusive, 4),
    (CannotWrite, CANNOT_WRITE),
)
# typer once raised click's exceptions and now raises its own copies; this is the base of all usage errors in both.
USAGE_ERROR: Any = typer.BadParameter.__base__
UNEXPECTED = 70  # sysexits.h EX_SOFTWARE: a defect of this program


def run(application: typer.Typer) -> int:
    """Run the application on sys.argv and return the exit code; a traceback appears only with LENET_DEPLOY_DEBUG=1."""
    try:
        return _outcome(application)
    except KeyboardInterrupt:  # while an error was being said
        return say_interrupted()


def _outcome(application: typer.Typer) -> int:
    if sys.stdout is None:  # closed by the caller
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # it lives as long as the process
    try:
        code = application(standalone_mode=False)
        sys.stdout.flush()
        raise_if_interrupted()
        if code == INTERRUPTED:  # newer typer turns Ctrl-C into this code itself
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except USAGE_ERROR as error:
        error.show()
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return say_interrupted()
    except (BrokenPipeError, SystemExit):
        # The reader of a pipe (head, less) has gone, which typer turns into an exit of its own: not an error.
        discard_stdout()
        return 0
    except OSError as error:
        _debug()
        if was_interrupted():
            return say_interrupted()
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EBADF):
            return _unexpected(error)
        discard_stdout()
        _say(f"error: standard output cannot be written ({error.strerror}); free space or send it elsewhere")
        return CANNOT_WRITE
    except Exception as error:
        _debug()
        if was_interrupted() and not isinstance(error, CannotWrite):  # what an import or a library made of it
            return say_interrupted()
        if not isinstance(error, LenetDeployError):
            return _unexpected(error)
        _say(f"error: {error}")
        return next(code for kind, code in EXIT_CODES if isinstance(error, kind))


def discard_stdout() -> None:
    """Send what is still to be printed nowhere, so that the interpreter does not fail on it at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unexpected(error: Exception) -> int:
    _say(f"internal error: {type(error).__name__}: {error}\nset LENET_DEPLOY_DEBUG=1 for the traceback, and please report it")
    return UNEXPECTED


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _debug() -> None:
    if os.environ.get("LENET_DEPLOY_DEBUG") == "1":
        traceback.print_exc()
