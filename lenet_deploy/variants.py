"""VARIANTS: the one registry of what can be exported, judged and measured. Plain data; implementations load when used.

A new variant is one entry here. A new runtime is one file in `runtimes/` and one loader below; a new format likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, cast

from lenet_deploy.errors import BadInput, UnknownName
from lenet_deploy.runtimes import PLAIN, SessionOptions

if TYPE_CHECKING:
    from lenet_deploy.exporters import Exporter, Reader
    from lenet_deploy.runtimes import Runtime, Session
    from lenet_deploy.runtimes.traces import Trace


def _trace() -> Exporter:
    from lenet_deploy.exporters import torchscript

    return torchscript.export_trace


def _script() -> Exporter:
    from lenet_deploy.exporters import torchscript

    return torchscript.export_script


def _onnx_dynamo() -> Exporter:
    from lenet_deploy.exporters import onnx

    return onnx.export_dynamo


def _onnx_torchscript() -> Exporter:
    from lenet_deploy.exporters import onnx

    return onnx.export_torchscript


def _torchscript_tensors() -> Reader:
    from lenet_deploy.exporters import torchscript

    return torchscript.read_tensors


def _onnx_tensors() -> Reader:
    from lenet_deploy.exporters import onnx

    return onnx.read_tensors


def _eager() -> Runtime:
    from lenet_deploy.runtimes import eager

    return cast("Runtime", eager)  # a module satisfies the protocol by its functions


def _torchscript() -> Runtime:
    from lenet_deploy.runtimes import torchscript

    return cast("Runtime", torchscript)


def _onnxruntime() -> Runtime:
    from lenet_deploy.runtimes import onnxruntime

    return cast("Runtime", onnxruntime)


@dataclass(frozen=True)
class ArtifactSpec:
    """One file that a bundle can hold.

    Attributes:
        name: unique, e.g. `onnx-fp32`.
        format: what `--to` calls it.
        precision: what `--precision` calls it.
        path: its file name in a bundle.
        exporter: loads the function that makes it; None for the checkpoint, which every bundle holds.
        reader: loads the function that reads its tensors back; None for the checkpoint, and for a format that does not expose them.
    """

    name: str
    format: str
    precision: str
    path: str
    exporter: Callable[[], Exporter] | None
    reader: Callable[[], Reader] | None = None


@dataclass(frozen=True)
class RuntimeEntry:
    """One runtime: its name and the loader of its implementation."""

    name: str
    load: Callable[[], Runtime]


@dataclass(frozen=True)
class Variant:
    """Format, runtime, precision and options under one name.

    Attributes:
        name: what users type, results say and globs match.
        artifact: the file it runs.
        runtime: what runs it.
        device: `cpu` or `cuda`.
        core: part of `demo` and of `bench --profile quick`.
        options: how its sessions run.
    """

    name: str
    artifact: ArtifactSpec
    runtime: RuntimeEntry
    device: str
    core: bool
    options: SessionOptions = PLAIN

    @property
    def precision(self) -> str:
        """The artifact's precision."""
        return self.artifact.precision

    def with_ort(self, ort: Mapping[str, str]) -> Variant:
        """This variant, opened with `ort` among its options where ONNX Runtime runs it (see `runtimes/ort_options.py`)."""
        if not ort or self.runtime != ONNXRUNTIME:
            return self
        return replace(self, options=replace(self.options, ort={**self.options.ort, **ort}))

    def open_session(self, data: bytes, input_shape: tuple[int, int, int], device: str | None = None) -> AbstractContextManager[Session]:
        """Open verified artifact bytes; `device` may name one CUDA device (see `Runtime.open_session`)."""
        return self.runtime.load().open_session(data, input_shape, device or self.device, self.options)

    def open_traces(
        self, data: bytes, input_shape: tuple[int, int, int], device: str | None = None
    ) -> AbstractContextManager[Mapping[str, Trace]]:
        """Open the same bytes to look inside (see `Runtime.open_traces`)."""
        return self.runtime.load().open_traces(data, input_shape, device or self.device, self.options)


CHECKPOINT = ArtifactSpec("checkpoint", "checkpoint", "fp32", "checkpoint.safetensors", None)
TRACE = ArtifactSpec("torchscript-trace-fp32", "torchscript", "fp32", "model.trace.pt", _trace, _torchscript_tensors)
SCRIPT = ArtifactSpec("torchscript-script-fp32", "torchscript", "fp32", "model.script.pt", _script, _torchscript_tensors)
ONNX = ArtifactSpec("onnx-fp32", "onnx", "fp32", "model.onnx", _onnx_dynamo, _onnx_tensors)
ONNX_TS = ArtifactSpec("onnx-ts-fp32", "onnx", "fp32", "model.ts.onnx", _onnx_torchscript, _onnx_tensors)

EAGER = RuntimeEntry("eager", _eager)
TORCHSCRIPT = RuntimeEntry("torchscript", _torchscript)
ONNXRUNTIME = RuntimeEntry("onnxruntime", _onnxruntime)

CHANNELS_LAST = SessionOptions(channels_last=True)
CUDA_GRAPH = SessionOptions(cuda_graph=True)

VARIANTS: tuple[Variant, ...] = (
    Variant("eager/torch-cpu/fp32", CHECKPOINT, EAGER, "cpu", core=True),
    Variant("torchscript/torch-cpu/fp32/trace", TRACE, TORCHSCRIPT, "cpu", core=True),
    Variant("torchscript/torch-cpu/fp32/script", SCRIPT, TORCHSCRIPT, "cpu", core=True),
    Variant("onnx/ort-cpu/fp32", ONNX, ONNXRUNTIME, "cpu", core=True),
    Variant("onnx/ort-cpu/fp32/ts-exporter", ONNX_TS, ONNXRUNTIME, "cpu", core=True),
    Variant("eager/torch-cpu/fp32/channels-last", CHECKPOINT, EAGER, "cpu", core=False, options=CHANNELS_LAST),
    Variant("eager/torch-cuda/fp32", CHECKPOINT, EAGER, "cuda", core=True),
    Variant("torchscript/torch-cuda/fp32/trace", TRACE, TORCHSCRIPT, "cuda", core=True),
    Variant("torchscript/torch-cuda/fp32/script", SCRIPT, TORCHSCRIPT, "cuda", core=True),
    Variant("onnx/ort-cuda/fp32", ONNX, ONNXRUNTIME, "cuda", core=True),
    Variant("onnx/ort-cuda/fp32/ts-exporter", ONNX_TS, ONNXRUNTIME, "cuda", core=True),
    Variant("eager/torch-cuda/fp32/channels-last", CHECKPOINT, EAGER, "cuda", core=False, options=CHANNELS_LAST),
    Variant("eager/torch-cuda/fp32/cuda-graph", CHECKPOINT, EAGER, "cuda", core=False, options=CUDA_GRAPH),
    Variant("torchscript/torch-cuda/fp32/trace/cuda-graph", TRACE, TORCHSCRIPT, "cuda", core=False, options=CUDA_GRAPH),
    Variant("onnx/ort-cuda/fp32/cuda-graph", ONNX, ONNXRUNTIME, "cuda", core=False, options=CUDA_GRAPH),
)

# Everything else is derived, so that nothing has to be listed twice.
ARTIFACTS: tuple[ArtifactSpec, ...] = tuple(dict.fromkeys(variant.artifact for variant in VARIANTS))
FORMATS: tuple[str, ...] = tuple(dict.fromkeys(spec.format for spec in ARTIFACTS if spec.exporter))
PRECISIONS: tuple[str, ...] = tuple(dict.fromkeys(spec.precision for spec in ARTIFACTS))
RUNTIMES: tuple[RuntimeEntry, ...] = tuple(dict.fromkeys(variant.runtime for variant in VARIANTS))
DEVICES: tuple[str, ...] = tuple(dict.fromkeys(variant.device for variant in VARIANTS))


def select_artifacts(formats: Iterable[str], precisions: Iterable[str]) -> tuple[ArtifactSpec, ...]:
    """The artifacts to export for `--to` and `--precision`; `all` among the formats means every one there is.

    Raises:
        UnknownName: a format or precision that no artifact has.
    """
    wanted, exact = tuple(formats), tuple(precisions)
    if "all" in wanted:
        wanted, exact = FORMATS, PRECISIONS
    for name in wanted:
        if name not in FORMATS:
            raise UnknownName("format", name, (*FORMATS, "all"))
    for name in exact:
        if name not in PRECISIONS:
            raise UnknownName("precision", name, PRECISIONS)
    return tuple(spec for spec in ARTIFACTS if spec.exporter and spec.format in wanted and spec.precision in exact)


def select_variants(globs: Iterable[str], among: Iterable[Variant] = VARIANTS) -> tuple[Variant, ...]:
    """The variants whose names match any of `globs`, in registry order.

    Raises:
        UnknownName: a glob that matches none.
    """
    variants, patterns = tuple(among), tuple(globs)
    for pattern in patterns:
        if not any(fnmatchcase(variant.name, pattern) for variant in variants):
            raise UnknownName("variant", pattern, (variant.name for variant in variants))
    return tuple(variant for variant in variants if any(fnmatchcase(variant.name, pattern) for pattern in patterns))


def with_ort_options(variants: Iterable[Variant], ort: Mapping[str, str]) -> tuple[Variant, ...]:
    """The variants, those that ONNX Runtime runs with `ort` among their options.

    Raises:
        BadInput: there are options, and ONNX Runtime runs none of the variants, so that they would be ignored.
    """
    found = tuple(variants)
    if ort and not any(variant.runtime == ONNXRUNTIME for variant in found):
        names = ", ".join(variant.name for variant in found)
        raise BadInput(f"{', '.join(ort)}: options of onnxruntime, which runs none of {names}; widen the variants or leave them out")
    return tuple(variant.with_ort(ort) for variant in found)
