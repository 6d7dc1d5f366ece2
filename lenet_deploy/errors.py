"""Everything the library raises on purpose.

    LenetDeployError
    |-- BadInput             the caller's words, files or values are wrong        (CLI exit code 2)
    |   |-- UnknownName      a name that no registry holds
    |   |-- InvalidConfig    a model configuration that cannot be built
    |   `-- DamagedFile      truncated, tampered with, foreign or unreadable
    |-- GateFailed           a check said no: parity, or nothing could be exported (1)
    |-- Inconclusive         the measurements do not decide the question         (4)
    |-- Unusable             the runtime or device asked for does not work here    (3)
    |   `-- Misplaced        it works, and would run some nodes elsewhere
    `-- CannotWrite          the disk is full, read-only or in the way             (5)

The library raises, the command line maps: exit codes live in `cli/errors.py` alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lenet_deploy.records import NodePlacement


class LenetDeployError(Exception):
    """Base of every error the library raises on purpose; the message says what, where and what to do."""


class BadInput(LenetDeployError):
    """What the caller passed cannot be used."""


class UnknownName(BadInput):
    """A name no registry holds; the message offers the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = tuple(known)
        near = get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")


class InvalidConfig(BadInput):
    """A model configuration that breaks a rule; the message names the field or layer and the numbers."""


class DamagedFile(BadInput):
    """A file that is truncated, altered, of another kind, or not readable."""


class GateFailed(LenetDeployError):
    """A gate said no."""


class Inconclusive(LenetDeployError):
    """What was measured says neither yes nor no; the message says how to find out."""


class Unusable(LenetDeployError):
    """A runtime or device that does not work on this machine; the message carries the fix."""


class Misplaced(Unusable):
    """A graph of which the runtime would place nodes elsewhere than asked; carries every node's placement."""

    def __init__(self, message: str, placement: tuple[NodePlacement, ...]) -> None:
        super().__init__(message)
        self.placement = placement


class CannotWrite(LenetDeployError):
    """Writing failed; what was there before is still there."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a message of our own; its type where it has none.

    TorchScript's interpreter begins with that something failed, shows its source, and ends with what it was.
    """
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return lines[-1 if lines[0].startswith("The following operation failed in the TorchScript interpreter") else 0]
