"""An ONNX graph whose every value is an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lenet_deploy.errors import Unusable
from lenet_deploy.runtimes.traces import CONV, DIFFERENCE, LINEAR, OTHER, POOL, Tap

if TYPE_CHECKING:
    import onnx

# ORT's layouts with blocked channels, which its optimiser chooses for the CPU.
BLOCKED = "com.microsoft.nchwc"
REORDER = "ReorderOutput"

# The operators that begin a layer, ONNX's own and ORT's fused ones.
OPS = {
    "Conv": CONV,
    "FusedConv": CONV,
    "QLinearConv": CONV,
    "AveragePool": POOL,
    "MaxPool": POOL,
    "Gemm": LINEAR,
    "FusedGemm": LINEAR,
    "MatMul": LINEAR,
    "FusedMatMul": LINEAR,
    "Sub": DIFFERENCE,
}


@dataclass(frozen=True)
class Tapped:
    """A model that returns every value computed from its images.

    Attributes:
        model: its bytes.
        nodes: name, kind, source and whether channels may be padded, of each value in the order of computation.
        outputs: the output that carries each value, by its name.
    """

    model: bytes
    nodes: tuple[tuple[str, str, str, bool], ...]
    outputs: Mapping[str, str]

    def taps(self, images: torch.Tensor, values: Mapping[str, Any]) -> tuple[Tap, ...]:
        """The taps of one run, from its outputs by name (numpy arrays)."""
        found = (
            Tap(name, op, source, torch.from_numpy(values[self.outputs[name]]), padded)
            for name, op, source, padded in self.nodes
            if values[self.outputs[name]].dtype.kind == "f"
        )
        return (Tap("image", OTHER, "", images), *found)


def every_tensor(data: bytes) -> Tapped:
    """Mark every value that depends on the images as an output; blocked ones through a reordering, since outputs are plain."""
    import onnx

    model = onnx.load_from_string(data)
    graph = model.graph
    weights = {each.name: each for each in graph.initializer}
    sources = {graph.input[0].name: "image"}
    blocked: dict[str, int] = {}  # channels, perhaps with padding, by value
    nodes: list[tuple[str, str, str, bool]] = []
    outputs: dict[str, str] = {each.name: each.name for each in graph.output}
    added = []
    for node in list(graph.node):
        source = next((sources[name] for name in node.input if name in sources), None)
        if source is None or not node.output:
            continue
        name = node.output[0]  # what a LeNet computes has one output a node
        if node.domain == BLOCKED and node.op_type == "ReorderInput":
            sources[name] = source  # the same values in another order
            continue
        sources[name] = name
        if node.domain == BLOCKED and node.op_type != REORDER:
            blocked[name] = _channels(name, graph.node, weights)
            outputs[name] = f"{name}/plain"
            added.append(onnx.helper.make_node(REORDER, [name], [outputs[name]], domain=BLOCKED, channels=blocked[name]))
        else:
            outputs.setdefault(name, name)
        nodes.append((name, _kind(node, weights), source, name in blocked))
    graph.node.extend(added)
    known = {each.name for each in graph.output}
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs.values() if name not in known)
    return Tapped(model.SerializeToString(), tuple(nodes), outputs)


def _kind(node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto]) -> str:
    op = OPS.get(node.op_type, OTHER)
    if op == CONV and node.input[1] in weights and tuple(weights[node.input[1]].dims[2:]) == (1, 1):
        return OTHER  # ORT turns the product with a coefficient a channel into a convolution of one pixel
    return op


def _channels(value: str, nodes: Sequence[onnx.NodeProto], weights: Mapping[str, onnx.TensorProto]) -> int:
    """Channels of a blocked value, which its own node does not always know: from the next node that does."""
    for node in nodes:
        if value not in node.input[:1]:
            continue
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == REORDER:
            return int(attributes["channels"])
        if node.op_type == "Conv":
            return int(weights[node.input[1]].dims[1] * attributes.get("group", 1))
        return _channels(node.output[0], nodes, weights)
    raise Unusable(f"the channels of {value} are not known")
