"""ONNX by torch's two exporters: the torch.export-based one (default) and the TorchScript-based one."""

from __future__ import annotations

import dataclasses
import io
import json
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lenet_deploy.errors import DamagedFile, first_line
from lenet_deploy.exporters import EXAMPLE_BATCH, METADATA_KEY, Exported, ExportFailed, ExportOptions
from lenet_deploy.quiet import quiet_exporter
from lenet_deploy.records import ArtifactMetadata
from lenet_deploy.store import sha256

OLDEST_OPSET = 17  # of both exporters for these models
DIGEST_KEY = f"{METADATA_KEY}_sha256"  # protobuf has no checksum, and a flipped bit in a weight still parses
NEWEST_TORCHSCRIPT_OPSET = 23  # beyond it torch prints its whole graph to standard output before it fails
COMPARED_TYPES = ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "INT8", "UINT8", "INT16", "UINT16", "INT32")
IGNORED_TYPES = ("INT64", "BOOL", "STRING")  # shapes, axes, masks and names; never weights

if TYPE_CHECKING:
    import onnx


def export_dynamo(module: nn.Module, metadata: ArtifactMetadata, options: ExportOptions) -> Exported:
    """Through torch.export; see `Exporter`."""
    _check_opset(options.opset)
    example = torch.zeros(EXAMPLE_BATCH, *metadata.preprocessing.input_shape)
    with quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            module,
            (example,),
            input_names=["image"],
            output_names=["logits"],
            opset_version=options.opset,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return _finish(program.model_proto, metadata, options, "torch.export")


def export_torchscript(module: nn.Module, metadata: ArtifactMetadata, options: ExportOptions) -> Exported:
    """Through torch.jit.trace; see `Exporter`."""
    import onnx

    _check_opset(options.opset, NEWEST_TORCHSCRIPT_OPSET)
    example = torch.zeros(EXAMPLE_BATCH, *metadata.preprocessing.input_shape)
    buffer = io.BytesIO()
    with quiet_exporter(), torch.no_grad():
        # torch calls 21 and up unsupported; the file is checked and judged like any other.
        warnings.filterwarnings("ignore", message="Exporting to ONNX opset version")
        torch.onnx.export(
            module,
            (example,),
            buffer,  # type: ignore[arg-type]  # a file object works and is documented; torch annotates paths only
            input_names=["image"],
            output_names=["logits"],
            opset_version=options.opset,
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
            dynamo=False,
        )
    return _finish(onnx.load_from_string(buffer.getvalue()), metadata, options, "torchscript")


def read_metadata(data: bytes, where: str) -> dict[str, Any] | None:
    """The JSON values that the exporters embedded, None in a file of another origin; needs no torch model.

    Raises:
        DamagedFile: not an ONNX file, or one whose content is not what was exported.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_from_string(data)
        embedded = {prop.key: prop.value for prop in model.metadata_props}
        values = json.loads(embedded.get(METADATA_KEY, "null"))
    except (DecodeError, ValueError) as error:
        raise DamagedFile(f"{where}: not a readable ONNX file ({error})") from None
    if not model.HasField("graph"):  # nothing at all is a message, too
        raise DamagedFile(f"{where}: not a readable ONNX file (it holds no graph)")
    if not isinstance(values, dict):
        return None
    if embedded.get(DIGEST_KEY) != content_digest(model, embedded[METADATA_KEY]):
        raise DamagedFile(f"{where}: its content is not what was exported; the file was altered, export it again")
    return values


def read_tensors(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors that nodes take from initialisers and constants; see `Reader`."""
    import onnx

    try:
        graph = _plain_graph(onnx.load_from_string(data))
        stored = [*((tensor.name, tensor) for tensor in graph.initializer), *_constants(graph)]
        held = dict(stored)
        if len(held) != len(stored):
            raise DamagedFile("two tensors of the ONNX file share a name")
        used = dict.fromkeys(name for node in graph.node for name in node.input)
        kinds = {name: onnx.TensorProto.DataType.Name(held[name].data_type) for name in used if name in held}
        return {name: _tensor(name, held[name], kind) for name, kind in kinds.items() if kind not in IGNORED_TYPES}
    except DamagedFile:
        raise
    except Exception as error:  # damaged bytes make protobuf and numpy fail in every way there is
        raise DamagedFile(f"the tensors of the ONNX file cannot be read ({first_line(error)})") from None


def content_digest(model: onnx.ModelProto, metadata: str) -> str:
    """Hex digest of all that decides what the model computes: nodes, weights, operator sets, and its metadata as JSON text."""
    opsets = sorted((each.domain, each.version) for each in model.opset_import)
    return sha256(model.graph.SerializeToString(deterministic=True) + f"{opsets} {metadata}".encode())


def _plain_graph(model: onnx.ModelProto) -> onnx.GraphProto:
    """The model's graph, where it is all there is: what were left unread could not be vouched for."""
    nested = any(attribute.HasField("g") or attribute.graphs for node in model.graph.node for attribute in node.attribute)
    if nested or model.functions or model.graph.sparse_initializer:
        raise DamagedFile("the ONNX file holds subgraphs, functions or sparse tensors, whose values are not read back")
    return model.graph


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """The values of Constant nodes by the name of their output; whole numbers and text are none that could be weights."""
    import numpy
    from onnx import numpy_helper

    for node in graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value":
                yield node.output[0], attribute.t
            elif attribute.name in ("value_float", "value_floats"):
                number = attribute.f if attribute.name == "value_float" else list(attribute.floats)
                yield node.output[0], numpy_helper.from_array(numpy.array(number, dtype=numpy.float32))
            elif attribute.name == "sparse_value":
                raise DamagedFile(f"tensor {node.output[0]} of the ONNX file is sparse, whose values are not read back")


def _tensor(name: str, stored: onnx.TensorProto, kind: str) -> torch.Tensor:
    """One stored tensor, bit for bit."""
    from onnx import numpy_helper

    if stored.external_data or stored.data_location:
        raise DamagedFile(f"tensor {name} lies outside the ONNX file; export the model in one file")
    if kind not in COMPARED_TYPES:
        raise DamagedFile(f"tensor {name} of the ONNX file has type {kind}, which cannot be compared")
    array = numpy_helper.to_array(stored)
    if kind == "BFLOAT16":  # numpy has no such type, and torch does not know the one that onnx takes for it
        return torch.from_numpy(array.view("uint16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _check_opset(opset: int, newest: int | None = None) -> None:
    """Refuse what no exporter writes or this onnx does not know, before an exporter fails on it at length."""
    import onnx

    known = onnx.defs.onnx_opset_version()
    newest = min(newest or known, known)
    if not OLDEST_OPSET <= opset <= newest:
        raise ExportFailed(f"opset {opset} was asked for; {OLDEST_OPSET} to {newest} can be written here")


def _finish(model: onnx.ModelProto, metadata: ArtifactMetadata, options: ExportOptions, exporter: str) -> Exported:
    """Check opset, strip machine paths, embed metadata, run onnx's full check."""
    import onnx

    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), None)
    if opset != options.opset:
        raise ExportFailed(f"opset {options.opset} was asked for and the {exporter} exporter wrote {opset}; choose another --opset")
    for holder in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        # The torch.export-based exporter writes source paths and stack traces of this machine here.
        holder.ClearField("doc_string")
        del holder.metadata_props[:]
    for initializer in model.graph.initializer:
        del initializer.metadata_props[:]
    text = json.dumps(dataclasses.asdict(metadata), sort_keys=True)
    onnx.helper.set_model_props(model, {METADATA_KEY: text, DIGEST_KEY: content_digest(model, text)})
    data = model.SerializeToString()
    onnx.checker.check_model(data, full_check=True)
    return Exported(data, {"exporter": exporter, "opset": opset, "ir_version": model.ir_version})
