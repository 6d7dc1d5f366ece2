"""TorchScript archives, run by torch's own interpreter."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lenet_deploy.devices import parse_device, probe_torch
from lenet_deploy.errors import DamagedFile, Unusable, first_line
from lenet_deploy.quiet import quiet_torchscript
from lenet_deploy.records import RuntimeStatus
from lenet_deploy.runtimes import PLAIN, SessionOptions
from lenet_deploy.runtimes.eager import OPS, ModuleSession, session_of
from lenet_deploy.runtimes.traces import OTHER, Tap, Trace


def probe(device: str) -> RuntimeStatus:
    """See `Runtime.probe`."""
    return probe_torch(f"torchscript-{device}", device)


@contextlib.contextmanager
def open_session(data: bytes, input_shape: tuple[int, int, int], device: str, options: SessionOptions = PLAIN) -> Iterator[ModuleSession]:
    """Open a TorchScript archive; see `Runtime.open_session`."""
    options.check(device, "cuda_graph")
    target = parse_device(device)
    yield session_of(_load(data, target), input_shape, target, options)


@contextlib.contextmanager
def open_traces(
    data: bytes, input_shape: tuple[int, int, int], device: str, options: SessionOptions = PLAIN
) -> Iterator[Mapping[str, Trace]]:
    """See `Runtime.open_traces`."""
    options.check(device, "cuda_graph")
    target = parse_device(device)
    function, nodes = _with_every_tensor(_load(data, target))

    def trace(images: torch.Tensor) -> tuple[Tap, ...]:
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # public, not listed; fusion would compute other tensors
            values = function(images.to(target))
        taps = (Tap(name, op, source, value.cpu()) for (name, op, source), value in zip(nodes, values, strict=True))
        return (Tap("image", OTHER, "", images), *taps)

    yield {"graph": trace}


def _load(data: bytes, device: torch.device) -> Any:
    try:
        with quiet_torchscript():
            return torch.jit.load(io.BytesIO(data), map_location=device)
    except (RuntimeError, ValueError, EOFError) as error:
        raise DamagedFile(f"not a readable TorchScript archive ({first_line(error)})") from None


def _with_every_tensor(module: Any) -> tuple[Any, list[tuple[str, str, str]]]:
    """The module's graph as a function that returns every tensor computed from the images, and name, kind and source of each.

    A frozen graph has no submodules left to hook, so its own values become outputs.
    """
    graph = module.inlined_graph.copy()
    own, images = graph.inputs()
    if list(own.uses()):
        raise Unusable("this TorchScript archive is not frozen, so its graph cannot stand alone; export it again")
    names = {images.debugName(): "image"}
    values = []
    nodes: list[tuple[str, str, str]] = []
    for node in graph.nodes():
        kind = node.kind().removeprefix("aten::")
        source = next((names[each.debugName()] for each in node.inputs() if each.debugName() in names), None)
        for value in node.outputs():
            if source is not None and isinstance(value.type(), torch._C.TensorType):
                name = f"{kind}.{len(nodes) + 1}"
                names[value.debugName()] = name
                values.append(value)
                nodes.append((name, OPS.get(kind, OTHER), source))
    together = graph.insertNode(graph.create("prim::TupleConstruct", values, 1))
    together.output().setType(torch._C.TupleType([value.type() for value in values]))
    for _ in list(graph.outputs()):
        graph.eraseOutput(0)
    graph.registerOutput(together.output())
    graph.eraseInput(0)
    return torch._C._create_function_from_graph("traced", graph), nodes
