"""TorchScript archives, run by torch's own interpreter."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import torch

from lenet_deploy.devices import parse_device, probe_torch
from lenet_deploy.errors import DamagedFile, first_line
from lenet_deploy.quiet import quiet_torchscript
from lenet_deploy.records import RuntimeStatus
from lenet_deploy.runtimes.eager import ModuleSession


def probe(device: str) -> RuntimeStatus:
    """See `Runtime.probe`."""
    return probe_torch(f"torchscript-{device}", device)


@contextlib.contextmanager
def open_session(data: bytes, input_shape: tuple[int, int, int], device: str) -> Iterator[ModuleSession]:
    """Open a TorchScript archive; see `Runtime.open_session`."""
    target = parse_device(device)
    try:
        with quiet_torchscript():
            module = torch.jit.load(io.BytesIO(data), map_location=target)
    except (RuntimeError, ValueError, EOFError) as error:
        raise DamagedFile(f"not a readable TorchScript archive ({first_line(error)})") from None
    yield ModuleSession(module, input_shape, target)
