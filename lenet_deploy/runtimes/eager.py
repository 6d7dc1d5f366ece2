"""The checkpoint itself, run by torch's eager mode; and the session that every torch module shares."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from lenet_deploy import checkpoint
from lenet_deploy.devices import parse_device, probe_torch
from lenet_deploy.records import NodePlacement, RuntimeStatus


class ModuleSession:
    """A callable torch module as a Session (see `lenet_deploy.runtimes`)."""

    node_providers: tuple[NodePlacement, ...] = ()

    def __init__(self, module: Callable[[torch.Tensor], torch.Tensor], input_shape: tuple[int, int, int], device: torch.device) -> None:
        self.device = device
        self._module = module
        self._shape = input_shape
        self._input = torch.empty(0)

    def bind(self, batch_size: int) -> torch.Tensor:
        self._input = torch.zeros(batch_size, *self._shape, device=self.device)
        return self._input

    def launch(self) -> torch.Tensor:
        return self._module(self._input)


def probe(device: str) -> RuntimeStatus:
    """See `Runtime.probe`."""
    return probe_torch(f"eager-{device}", device)


@contextlib.contextmanager
def open_session(data: bytes, input_shape: tuple[int, int, int], device: str) -> Iterator[ModuleSession]:
    """Open a checkpoint's bytes; see `Runtime.open_session`."""
    target = parse_device(device)
    module = checkpoint.from_bytes(data, "checkpoint").module().to(target)
    yield ModuleSession(module, input_shape, target)
