"""The checkpoint itself, run by torch's eager mode; and the session that every torch module shares."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lenet_deploy import checkpoint
from lenet_deploy.devices import parse_device, probe_torch
from lenet_deploy.records import NodePlacement, RuntimeStatus
from lenet_deploy.runtimes import PLAIN, SessionOptions
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

Module: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
# How to replay what was recorded, and the output that a replay writes.
Recording: TypeAlias = tuple[Callable[[], object], torch.Tensor]

# Before recording, as torch.cuda.make_graphed_callables does: libraries start up at the first launch, TorchScript profiles its first of a
# batch size and compiles at its second.
WARMUP_LAUNCHES = 3


class ModuleSession:
    """A callable torch module as a Session (see `lenet_deploy.runtimes`)."""

    node_providers: tuple[NodePlacement, ...] = ()
    settle_s = 0.0

    def __init__(self, module: Module, input_shape: tuple[int, int, int], device: torch.device, options: SessionOptions = PLAIN) -> None:
        self.device = device
        self._module = module
        self._shape = input_shape
        self._format = _format(options)
        self._input = torch.empty(0)

    def bind(self, batch_size: int) -> torch.Tensor:
        # Made in its format, not converted: of one channel torch takes either for the other and would convert nothing.
        self._input = torch.empty(batch_size, *self._shape, device=self.device, memory_format=self._format).zero_()
        return self._input

    def launch(self) -> torch.Tensor:
        return self._module(self._input)


class GraphSession(ModuleSession):
    """A torch module whose launches replay a CUDA graph, as a Session.

    A graph reads and writes the addresses that it was recorded with, so each batch size keeps its graph, its input and its output.
    """

    def __init__(
        self,
        module: Module,
        input_shape: tuple[int, int, int],
        device: torch.device,
        options: SessionOptions = PLAIN,
        record: Callable[[Module, torch.Tensor], Recording] | None = None,
    ) -> None:
        super().__init__(module, input_shape, device, options)
        self._record = record or record_graph
        self._inputs: dict[int, torch.Tensor] = {}
        self._recordings: dict[int, Recording] = {}
        self._batch_size = 0

    def bind(self, batch_size: int) -> torch.Tensor:
        if batch_size not in self._inputs:
            self._inputs[batch_size] = super().bind(batch_size)
        self._batch_size, self._input = batch_size, self._inputs[batch_size]
        return self._input

    def launch(self) -> torch.Tensor:
        recording = self._recordings.get(self._batch_size)
        if recording is None:  # not in `bind`, which comes before the caller's images and outside its warm-up
            recording = self._recordings[self._batch_size] = self._record(self._module, self._input)
        replay, output = recording
        replay()
        return output


def record_graph(module: Module, images: torch.Tensor) -> Recording:
    """Record a launch on `images` as a CUDA graph; it is replayed on torch's current stream.

    Warm-up and recording are on the current stream, which must not be the default one (see `devices.computing_on`): what the libraries
    set up once a stream, such as handles and workspaces, is there before the recording, where it could not be made.
    """
    stream = torch.cuda.current_stream(images.device)
    for _ in range(WARMUP_LAUNCHES):
        module(images)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # waits for the GPU first
        output = module(images)
    return graph.replay, output


def session_of(module: Module, input_shape: tuple[int, int, int], device: torch.device, options: SessionOptions) -> ModuleSession:
    """A module on `device` as the session that the options ask for."""
    return (GraphSession if options.cuda_graph else ModuleSession)(module, input_shape, device, options)


def probe(device: str) -> RuntimeStatus:
    """See `Runtime.probe`."""
    return probe_torch(f"eager-{device}", device)


@contextlib.contextmanager
def open_session(data: bytes, input_shape: tuple[int, int, int], device: str, options: SessionOptions = PLAIN) -> Iterator[ModuleSession]:
    """Open a checkpoint's bytes; see `Runtime.open_session`."""
    options.check(device, "channels_last", "cuda_graph")
    target = parse_device(device)
    yield session_of(_load(data, target, options), input_shape, target, options)


@contextlib.contextmanager
def open_traces(
    data: bytes, input_shape: tuple[int, int, int], device: str, options: SessionOptions = PLAIN
) -> Iterator[Mapping[str, Trace]]:
    """See `Runtime.open_traces`."""
    options.check(device, "channels_last", "cuda_graph")
    target = parse_device(device)
    module = _load(data, target, options)

    def trace(images: torch.Tensor) -> tuple[Tap, ...]:
        # The session's own buffer has the session's strides, also for one channel.
        buffer = ModuleSession(module, input_shape, target, options).bind(len(images))
        return trace_module(module, buffer.copy_(images))

    yield {"module": trace}


def _load(data: bytes, device: torch.device, options: SessionOptions) -> torch.nn.Module:
    return checkpoint.from_bytes(data, "checkpoint").module().to(device).to(memory_format=_format(options))


def _format(options: SessionOptions) -> torch.memory_format:
    return torch.channels_last if options.channels_last else torch.contiguous_format


def trace_module(module: Module, images: torch.Tensor) -> tuple[Tap, ...]:
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
