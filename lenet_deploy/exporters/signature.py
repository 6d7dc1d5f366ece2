"""What a file that was exported elsewhere takes and gives, as far as the file says so; nothing of it is run.

The one kind that can be measured and judged takes one batch of images, float32 (N, C, H, W), and gives one tensor.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from lenet_deploy.errors import BadInput, DamagedFile, first_line
from lenet_deploy.quiet import quiet_torchscript
from lenet_deploy.store import read_file

if TYPE_CHECKING:
    import onnx

Shape: TypeAlias = tuple[int, int, int]

MAX_VALUES = 2**22  # of one image, 16 MiB in float32: a megapixel in colour. A larger shape is a mistake or an attack
MAX_BATCH_VALUES = 2**28  # of a graph's one batch, 1 GiB
MAX_EXTERNAL_BYTES = 2**30  # protobuf ends at 2 GiB


@dataclass(frozen=True)
class Signature:
    """The input of a graph.

    Attributes:
        input_shape: (C, H, W).
        batch_size: the only one that it takes; None where it takes any, or does not say.
    """

    input_shape: Shape
    batch_size: int | None = None


def read_onnx(path: Path, data: bytes, asked: Shape | None) -> Signature:
    """What an ONNX graph takes.

    Args:
        asked: (C, H, W), for what the graph leaves open.

    Raises:
        DamagedFile: not an ONNX file.
        BadInput: it takes or gives something else than this project can measure, or leaves open what was not asked for.
    """
    model = _parsed(path, data)
    held = {tensor.name for tensor in model.graph.initializer}  # old files list their weights among the inputs
    images = _only(path, "takes", "inputs", [value for value in model.graph.input if value.name not in held])
    scores = _only(path, "gives", "outputs", model.graph.output)
    batch, *shape = _dimensions(path, images) or (None,) * 4
    _, *given = _dimensions(path, scores) or (None,)
    if len(shape) != 3:
        raise BadInput(f"{path}: its input {images.name} has {1 + len(shape)} dimensions; images have four, (N, C, H, W)")
    _check_size(f"{path}: its output {scores.name}", [side or 1 for side in given], MAX_VALUES)
    found = _completed(path, shape, asked)
    if batch is not None:
        _check_size(f"{path}: its batch of {batch}", (batch, *found), MAX_BATCH_VALUES)
    return Signature(found, batch)


def read_torchscript(path: Path, data: bytes, asked: Shape | None) -> Signature:
    """What a TorchScript archive takes: its schema says how many tensors, and nothing of their shape.

    It is opened, which a TorchScript file may put code of its own into; its `forward` is not run.

    Raises:
        BadInput: `forward` takes or gives something else than one tensor, or no shape was asked for.
    """
    with quiet_torchscript():
        module = torch.jit.load(io.BytesIO(data), map_location="cpu")
    if not hasattr(module, "forward"):
        raise BadInput(f"{path}: it has no forward, so there is nothing to run; export a module that has one")
    schema = module.forward.schema
    needed = [argument for argument in schema.arguments[1:] if not argument.has_default_value()]
    kinds = [str(each.type) for each in (*needed, *schema.returns)]
    if kinds != ["Tensor", "Tensor"]:
        raise BadInput(f"{path}: its {schema}; one tensor of images has to give one tensor of scores, so export such a forward")
    return Signature(_completed(path, (None,) * 3, asked))


def _only(path: Path, verb: str, noun: str, values: Sequence[onnx.ValueInfoProto]) -> onnx.ValueInfoProto:
    """The one value there has to be, a tensor of float32."""
    import onnx

    if len(values) != 1:
        names = ", ".join(value.name for value in values) or "none"
        raise BadInput(f"{path}: it {verb} {len(values)} {noun} ({names}); only a graph of one input and one output can be used")
    [value] = values
    kind = value.type.WhichOneof("value") or "nothing"
    element = value.type.tensor_type.elem_type if kind == "tensor_type" else 0
    if element != onnx.TensorProto.FLOAT:
        known = onnx.TensorProto.DataType.Name(element).lower() if element in onnx.TensorProto.DataType.values() and element else kind
        raise BadInput(f"{path}: {value.name}, which it {verb}, is {known}; only float32 tensors can be used, so export it with these")
    return value


def _dimensions(path: Path, value: onnx.ValueInfoProto) -> tuple[int | None, ...] | None:
    """Each dimension, None where it is open; None altogether where not even their number is known."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    found = tuple(side.dim_value if side.HasField("dim_value") else None for side in value.type.tensor_type.shape.dim)
    if not found or any(side is not None and side < 1 for side in found):
        raise DamagedFile(f"{path}: {value.name} is declared with the impossible shape {found}")
    return found


def _completed(path: Path, declared: Sequence[int | None], asked: Shape | None) -> Shape:
    """(C, H, W) as declared, what is open as asked for; whether these agree is the caller's to say."""
    if asked is None and None in declared:
        sides = " x ".join("?" if side is None else str(side) for side in declared)
        raise BadInput(f"{path}: it does not say what images it takes ({sides}); add --input-shape C,H,W")
    channels, height, width = (mine if asked is None else asked[i] if mine is None else mine for i, mine in enumerate(declared))
    shape = (int(channels or 0), int(height or 0), int(width or 0))
    _check_size(f"{path}: its input", shape, MAX_VALUES)
    return shape


def _check_size(what: str, sides: Sequence[int], most: int) -> None:
    if math.prod(sides) > most:
        raise BadInput(f"{what} of {_sides(sides)} has {math.prod(sides):,} values, and {most:,} are the most that can be used")


def _sides(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


def _parsed(path: Path, data: bytes) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_from_string(data)
    except (DecodeError, ValueError) as error:
        raise DamagedFile(f"{path}: not a readable ONNX file ({first_line(error)})") from None
    if not model.graph.node:
        raise DamagedFile(f"{path}: not a readable ONNX file (it holds no graph)")
    return model


def embedded(path: Path, data: bytes) -> bytes:
    """The graph at `path` with every tensor inside, so that no runtime reads from elsewhere; as it is where they are.

    Raises:
        DamagedFile: not an ONNX file, or its weights are not where it says.
        BadInput: its weights lie outside its folder.
    """
    import onnx

    model = _parsed(path, data)
    outside = [tensor for tensor in _tensors(model) if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data]
    read: dict[str, bytes] = {}
    for tensor in outside:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        where = entries.get("location", "")
        if where not in read:
            read[where] = _beside(path, tensor.name, where)
        try:
            offset = int(entries.get("offset", 0))
            length = int(entries.get("length", len(read[where]) - offset))
        except ValueError:
            offset = length = -1
        if not 0 <= offset <= offset + length <= len(read[where]):
            raise DamagedFile(f"{path}: its tensor {tensor.name} lies beyond the end of {where}; get a fresh copy of both")
        tensor.raw_data = read[where][offset : offset + length]
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    return bytes(model.SerializeToString()) if outside else data


def _beside(path: Path, tensor: str, where: str) -> bytes:
    """A file with weights, which has to lie in the folder of the graph, whatever its name or a link says."""
    folder = path.parent.resolve()
    try:
        target = (folder / where).resolve()
        inside = bool(where) and target.is_relative_to(folder)
        size = target.stat().st_size if inside and target.is_file() else 0
    except (OSError, ValueError):
        inside = False
    if not inside:
        raise BadInput(f"{path}: its tensor {tensor} lies in {where[:80]!r}, outside its folder, which is not read; export it in one file")
    if size > MAX_EXTERNAL_BYTES:
        raise BadInput(f"{target}: {size:,} bytes of weights, and {MAX_EXTERNAL_BYTES:,} are the most that can be used")
    return read_file(target, f"the tensor {tensor} of {path.name}")


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a model holds, wherever."""
    yield from _in_graph(model.graph)
    for function in model.functions:
        yield from _in_nodes(function.node)


def _in_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: Any) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _in_graph(graph)
