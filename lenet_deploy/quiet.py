"""Third-party noise, silenced where it is expected and only there.

TorchScript is deprecated and still first-class here, so its warnings tell a user nothing; the ONNX exporters print
their progress to standard output, where results belong.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator

CAPTURED_BYTES = 1 << 16


@contextlib.contextmanager
def quiet_torchscript() -> Iterator[None]:
    """Without the deprecation warnings of `torch.jit`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without the ONNX exporters' progress lines, log lines and deprecations; what goes wrong with them is an exception."""
    disabled = logging.root.manager.disable
    with contextlib.redirect_stdout(io.StringIO()), quiet_torchscript():
        logging.disable(logging.CRITICAL)  # they log under half a dozen names
        try:
            yield
        finally:
            logging.disable(disabled)


@contextlib.contextmanager
def captured_stderr() -> Iterator[Callable[[], str]]:
    """Keep what native code writes to file descriptor 2, and yield a function that returns it so far.

    ONNX Runtime reports a missing library there, past its logger and its exceptions.
    """
    saved = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield lambda: os.pread(sink.fileno(), CAPTURED_BYTES, 0).decode(errors="replace")
        finally:
            os.dup2(saved, 2)
            os.close(saved)
