"""TorchScript by tracing and by scripting, each frozen."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lenet_deploy.devices import float32_precision
from lenet_deploy.errors import DamagedFile, first_line
from lenet_deploy.exporters import EXAMPLE_BATCH, METADATA_KEY, Exported, ExportOptions
from lenet_deploy.quiet import quiet_torchscript
from lenet_deploy.records import ArtifactMetadata
from lenet_deploy.store import check_zip

EXTRA_FILE = f"{METADATA_KEY}.json"
IGNORED_TYPES = (torch.int64, torch.bool)  # shapes, axes and masks; never weights


def export_trace(module: nn.Module, metadata: ArtifactMetadata, options: ExportOptions) -> Exported:
    """Record one forward pass and freeze it; see `Exporter`."""
    example = torch.zeros(EXAMPLE_BATCH, *metadata.preprocessing.input_shape)
    with float32_precision(), quiet_torchscript(), torch.no_grad():  # a trace keeps the TF32 switch as a constant
        return _frozen(torch.jit.trace(module, (example,)), metadata, "trace")


def export_script(module: nn.Module, metadata: ArtifactMetadata, options: ExportOptions) -> Exported:
    """Compile the module's source and freeze it; see `Exporter`."""
    with float32_precision(), quiet_torchscript():
        return _frozen(torch.jit.script(module), metadata, "script")


def read_metadata(data: bytes, where: str) -> dict[str, Any] | None:
    """The JSON values that `export_*` embedded, None in a file of another origin.

    Raises:
        DamagedFile: not a TorchScript archive.
    """
    check_zip(data, where, "TorchScript archive")
    files: dict[str, Any] = {EXTRA_FILE: ""}
    try:
        with quiet_torchscript():
            torch.jit.load(io.BytesIO(data), _extra_files=files)
        values = json.loads(files[EXTRA_FILE] or "null")
    except (RuntimeError, ValueError) as error:
        raise DamagedFile(f"{where}: not a readable TorchScript archive ({first_line(error)})") from None
    return values if isinstance(values, dict) else None


def read_tensors(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors that the graph takes from attributes, by name, and from constants, as `constant.0` and so on; see `Reader`."""
    check_zip(data, "the artifact", "TorchScript archive")
    try:
        with quiet_torchscript():
            module = torch.jit.load(io.BytesIO(data), map_location="cpu")
            found = dict(_used(module, module.inlined_graph))
    except DamagedFile:
        raise
    except Exception as error:  # damaged bytes make torch fail in every way there is
        raise DamagedFile(f"the tensors of the TorchScript archive cannot be read ({first_line(error)})") from None
    constants = itertools.count()
    named = {name or f"constant.{next(constants)}": tensor for name, tensor in found.values()}
    if len(named) != len(found):
        raise DamagedFile("two tensors of the TorchScript archive share a name")
    return named


def _used(module: Any, block: Any) -> Iterator[tuple[Any, tuple[str, torch.Tensor]]]:
    """What identifies each tensor, its attribute's name or nothing, and its value, node by node; some more than once."""
    for node in block.nodes():
        for value in node.inputs():
            kind = value.node().kind()
            if kind == "prim::Constant":
                for position, tensor in enumerate(_compared(value.toIValue())):
                    yield (value.debugName(), position), ("", tensor)
            elif kind == "prim::GetAttr":
                path = _path(value)
                for tensor in _compared(functools.reduce(getattr, path, module)):
                    yield path, (".".join(path), tensor)
        for inner in node.blocks():
            yield from _used(module, inner)


def _path(value: Any) -> tuple[str, ...]:
    """The attributes that lead from the module to a value."""
    node = value.node()
    return (*_path(next(node.inputs())), node.s("name")) if node.kind() == "prim::GetAttr" else ()


def _compared(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a constant or attribute that could be weights."""
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _compared(each)
    elif isinstance(value, torch.ScriptObject) or (isinstance(value, torch.Tensor) and (value.is_quantized or value.is_complex())):
        raise DamagedFile("the TorchScript archive holds packed, quantised or complex tensors, whose values are not read back")
    elif isinstance(value, torch.Tensor) and value.dtype not in IGNORED_TYPES:
        yield value.detach()


def _frozen(scripted: Any, metadata: ArtifactMetadata, method: str) -> Exported:
    buffer = io.BytesIO()
    text = json.dumps(dataclasses.asdict(metadata), sort_keys=True)
    torch.jit.save(torch.jit.freeze(scripted), buffer, _extra_files={EXTRA_FILE: text})
    return Exported(buffer.getvalue(), {"exporter": method, "frozen": True})
