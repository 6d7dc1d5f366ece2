"""The one place where errors become exit codes and messages."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import typer

from lenet_deploy.errors import BadInput, CannotWrite, GateFailed, LenetDeployError, Unusable

EXIT_CODES: tuple[tuple[type[Exception], int], ...] = ((GateFailed, 1), (BadInput, 2), (Unusable, 3), (CannotWrite, 5))
# typer once raised click's exceptions and now raises its own copies; this is the base of all usage errors in both.
USAGE_ERROR: Any = typer.BadParameter.__base__
INTERRUPTED = 130
UNEXPECTED = 70  # sysexits.h EX_SOFTWARE: a defect of this program


def run(application: typer.Typer) -> int:
    """Run the application on sys.argv and return the exit code; a traceback appears only with LENET_DEPLOY_DEBUG=1."""
    try:
        code = application(standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except USAGE_ERROR as error:
        error.show()
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted; nothing is half-written")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (head, less) has gone: not an error; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except LenetDeployError as error:
        _debug()
        _say(f"error: {error}")
        return next(code for kind, code in EXIT_CODES if isinstance(error, kind))
    except Exception as error:
        _debug()
        _say(f"internal error: {type(error).__name__}: {error}\nset LENET_DEPLOY_DEBUG=1 for the traceback, and please report it")
        return UNEXPECTED


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _debug() -> None:
    if os.environ.get("LENET_DEPLOY_DEBUG") == "1":
        traceback.print_exc()
