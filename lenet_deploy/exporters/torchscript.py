"""TorchScript by tracing and by scripting, each frozen."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import torch
from torch import nn

from lenet_deploy.devices import strict_float32
from lenet_deploy.errors import DamagedFile, first_line
from lenet_deploy.exporters import EXAMPLE_BATCH, METADATA_KEY, Exported, ExportOptions
from lenet_deploy.quiet import quiet_torchscript
from lenet_deploy.records import ArtifactMetadata
from lenet_deploy.store import check_zip

EXTRA_FILE = f"{METADATA_KEY}.json"


def export_trace(module: nn.Module, metadata: ArtifactMetadata, options: ExportOptions) -> Exported:
    """Record one forward pass and freeze it; see `Exporter`."""
    example = torch.zeros(EXAMPLE_BATCH, *metadata.preprocessing.input_shape)
    with strict_float32(), quiet_torchscript(), torch.no_grad():  # a trace keeps the TF32 switch as a constant
        return _frozen(torch.jit.trace(module, (example,)), metadata, "trace")


def export_script(module: nn.Module, metadata: ArtifactMetadata, options: ExportOptions) -> Exported:
    """Compile the module's source and freeze it; see `Exporter`."""
    with strict_float32(), quiet_torchscript():
        return _frozen(torch.jit.script(module), metadata, "script")


def read_metadata(data: bytes, where: str) -> dict[str, Any]:
    """The JSON values that `export_*` embedded.

    Raises:
        DamagedFile: not a TorchScript archive, or one without them.
    """
    check_zip(data, where, "TorchScript archive")
    files: dict[str, Any] = {EXTRA_FILE: ""}
    try:
        with quiet_torchscript():
            torch.jit.load(io.BytesIO(data), _extra_files=files)
        values = json.loads(files[EXTRA_FILE] or "null")
    except (RuntimeError, ValueError) as error:
        raise DamagedFile(f"{where}: not a readable TorchScript archive ({first_line(error)})") from None
    if not isinstance(values, dict):
        raise DamagedFile(f"{where}: it carries no lenet-deploy metadata; export it with lenet-deploy")
    return values


def _frozen(scripted: Any, metadata: ArtifactMetadata, method: str) -> Exported:
    buffer = io.BytesIO()
    text = json.dumps(dataclasses.asdict(metadata), sort_keys=True)
    torch.jit.save(torch.jit.freeze(scripted), buffer, _extra_files={EXTRA_FILE: text})
    return Exported(buffer.getvalue(), {"exporter": method, "frozen": True})
