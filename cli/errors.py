"""The one place where errors become exit codes and messages."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from lenet_deploy.errors import BadInput, CannotWrite, GateFailed, Inconclusive, LenetDeployError, Unusable

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
INTERRUPTED = 130
UNEXPECTED = 70  # sysexits.h EX_SOFTWARE: a defect of this program


def run(application: typer.Typer) -> int:
    """Run the application on sys.argv and return the exit code; a traceback appears only with LENET_DEPLOY_DEBUG=1."""
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
        _say("interrupted; nothing is half-written")
        return INTERRUPTED
    except (BrokenPipeError, SystemExit):
        # The reader of a pipe (head, less) has gone, which typer turns into an exit of its own: not an error.
        discard_stdout()
        return 0
    except OSError as error:
        _debug()
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EBADF):
            return _unexpected(error)
        discard_stdout()
        _say(f"error: standard output cannot be written ({error.strerror}); free space or send it elsewhere")
        return CANNOT_WRITE
    except LenetDeployError as error:
        _debug()
        _say(f"error: {error}")
        return next(code for kind, code in EXIT_CODES if isinstance(error, kind))
    except Exception as error:
        _debug()
        return _unexpected(error)


_interrupted = threading.Event()


def take_interrupts() -> None:
    """Remember Ctrl-C for as long as the process lives, and keep its traces in clean-up code off the screen."""
    signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = lambda left: None if issubclass(left.exc_type, KeyboardInterrupt) else sys.__unraisablehook__(left)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt again if one was raised before: torch's exporters swallow some."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


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
