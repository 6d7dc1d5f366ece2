"""Ctrl-C, remembered from before anything heavy is imported. Imports nothing of ours, so that it is there at once."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

INTERRUPTED = 130

_interrupted = threading.Event()


def take_interrupts() -> None:
    """Remember Ctrl-C for as long as the process lives, and keep its traces in clean-up code off the screen."""
    signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = lambda left: None if issubclass(left.exc_type, KeyboardInterrupt) else sys.__unraisablehook__(left)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def was_interrupted() -> bool:
    """Whether Ctrl-C was pressed, whatever became of its KeyboardInterrupt."""
    return _interrupted.is_set()


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt again if one was raised before: torch's exporters swallow some."""
    if was_interrupted():
        raise KeyboardInterrupt


def say_interrupted() -> int:
    """The message and the exit code of an interrupted command."""
    print("interrupted; nothing is half-written", file=sys.stderr)
    return INTERRUPTED
