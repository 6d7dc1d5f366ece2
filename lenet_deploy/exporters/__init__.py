"""One file a format. An exporter turns a module into bytes and says what it chose; it touches no disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lenet_deploy.records import ArtifactMetadata

# Batch 1 would be specialised by torch.export (pytorch#151582), so every example has two images.
EXAMPLE_BATCH = 2
METADATA_KEY = "lenet_deploy"


@dataclass(frozen=True)
class ExportOptions:
    """What a caller may choose.

    Attributes:
        opset: ONNX operator set; 18 is the oldest that both exporters write without conversion.
    """

    opset: int = 18


@dataclass(frozen=True)
class Exported:
    """An artifact's bytes, and what the exporter chose (e.g. exporter, opset) as JSON values."""

    data: bytes
    details: Mapping[str, Any] = field(default_factory=dict)


class ExportFailed(Exception):
    """An exporter could not do it; caught by the export, which leaves the artifact out and reports the reason."""


# A module in eval mode on the CPU, what to embed, what to choose -> the artifact.
Exporter: TypeAlias = "Callable[[nn.Module, ArtifactMetadata, ExportOptions], Exported]"

# An artifact's bytes -> its floating-point and quantised tensors by name, in the order that they are first used in; nothing is run.
# Raises DamagedFile for what it cannot read in full.
Reader: TypeAlias = "Callable[[bytes], Mapping[str, torch.Tensor]]"
