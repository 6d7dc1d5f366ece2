"""The checkpoint itself, run by torch's eager mode; and the session that every torch module shares."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lenet_deploy import checkpoint
from lenet_deploy.devices import parse_device, probe_torch
from lenet_deploy.records import NodePlacement, RuntimeStatus
from lenet_deploy.runtimes.traces import CONV, DIFFERENCE, LINEAR, OTHER, POOL, Tap, Trace

# torch's names of the operators that begin a layer, in eager mode and in TorchScript.
OPS: Mapping[str, str] = {
    "conv2d": CONV,
    "convolution": CONV,
    "_convolution": CONV,
    "mkldnn_convolution": CONV,
    "avg_pool2d": POOL,
    "max_pool2d": POOL,
    "linear": LINEAR,
    "addmm": LINEAR,
    "mm": LINEAR,
    "matmul": LINEAR,
    "sub": DIFFERENCE,
}


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


@contextlib.contextmanager
def open_traces(data: bytes, input_shape: tuple[int, int, int], device: str) -> Iterator[Mapping[str, Trace]]:
    """See `Runtime.open_traces`."""
    target = parse_device(device)
    module = checkpoint.from_bytes(data, "checkpoint").module().to(target)
    yield {"module": lambda images: trace_module(module, images.to(target))}


def trace_module(module: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> tuple[Tap, ...]:
    """Every tensor that a torch module computes from `images`, on the device of `images`, as they come."""
    with _Recorder(images) as recorder:
        module(images)
    return tuple(recorder.taps)


class _Recorder(TorchDispatchMode):
    """Keeps each result that depends on the images. Hooks would see modules only, and much of a forward is plain functions."""

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.taps = [Tap("image", OTHER, "", images.cpu())]
        self._kept = [(images, "image")]  # the tensors themselves, so that no id is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        source = next((name for arg in args for kept, name in self._kept if arg is kept), None)
        if source is not None and isinstance(result, torch.Tensor) and result.is_floating_point():
            op = func.overloadpacket.__name__
            name = f"{op}.{len(self.taps)}"
            self._kept.append((result, name))
            self.taps.append(Tap(name, OPS.get(op, OTHER), source, result.cpu()))
        return result
