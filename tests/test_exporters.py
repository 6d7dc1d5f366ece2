"""The exporters: what they embed, what their files promise, and that nothing of the machine or its noise gets out."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

from lenet_deploy import api, data
from lenet_deploy.checkpoint import Checkpoint, fresh
from lenet_deploy.errors import DamagedFile, GateFailed
from lenet_deploy.exporters import METADATA_KEY, Exported, ExportOptions
from lenet_deploy.exporters import onnx as onnx_exporters
from lenet_deploy.exporters import torchscript as torchscript_exporters
from lenet_deploy.models import MODELS, Model, find_model
from lenet_deploy.quiet import quiet_exporter, quiet_torchscript
from lenet_deploy.variants import ARTIFACTS, FORMATS, ArtifactSpec

EXPORTABLE = tuple(spec for spec in ARTIFACTS if spec.exporter)
READERS: dict[str, ModuleType] = {"onnx": onnx_exporters, "torchscript": torchscript_exporters}
OPSETS = (17, 20)  # the oldest and the newest that both exporters write; most tests have the default, 18
UNSUPPORTED_OPSETS = (5, 99)


def of_format(name: str) -> tuple[ArtifactSpec, ...]:
    return tuple(spec for spec in EXPORTABLE if spec.format == name)


each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
each_artifact = pytest.mark.parametrize("spec", EXPORTABLE, ids=lambda spec: spec.name)
each_onnx = pytest.mark.parametrize("spec", of_format("onnx"), ids=lambda spec: spec.name)
each_torchscript = pytest.mark.parametrize("spec", of_format("torchscript"), ids=lambda spec: spec.name)

Export = Callable[[ArtifactSpec, Model], Exported]
Shown = Callable[[], tuple[str, str, list[str]]]


@functools.cache
def checkpoint_of(model: Model) -> Checkpoint:
    return fresh(model, {}, 0)


def exported_by(spec: ArtifactSpec, model: Model, opset: int) -> Exported:
    checkpoint = checkpoint_of(model)
    assert spec.exporter is not None
    return spec.exporter()(checkpoint.module(), checkpoint.metadata(), ExportOptions(opset))


@dataclass(frozen=True)
class Watched:
    """An export, and what it did beside.

    Attributes:
        printed: what came out on either stream, Python's or the process's.
        changed: what it left otherwise than it was.
    """

    exported: Exported
    printed: str
    changed: tuple[str, ...]


def state(module: torch.nn.Module) -> dict[str, Any]:
    """What an export has to leave alone."""
    return {
        "levels of logging": {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript")},
        "filters of warnings": list(warnings.filters),
        "streams": (sys.stdout, sys.stderr),
        "training mode": module.training,
        "gradient mode": torch.is_grad_enabled(),
        "weights": {name: tensor.tolist() for name, tensor in module.state_dict().items()},
    }


@functools.cache
def watched(spec: ArtifactSpec, model: Model) -> Watched:
    """One artifact of one model at the default opset, exported once. A warning is an error."""
    checkpoint, own = checkpoint_of(model), io.StringIO()
    module = checkpoint.module()
    assert spec.exporter is not None
    with tempfile.TemporaryFile() as file, contextlib.redirect_stdout(own), contextlib.redirect_stderr(own):
        before, saved = state(module), (os.dup(1), os.dup(2))
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            found = spec.exporter()(module, checkpoint.metadata(), ExportOptions())
        finally:
            for descriptor, copy in enumerate(saved, 1):
                os.dup2(copy, descriptor)
                os.close(copy)
        after = state(module)
        file.seek(0)
        printed = own.getvalue() + file.read().decode()
    return Watched(found, printed, tuple(name for name in before if before[name] != after[name]))


@pytest.fixture(scope="module")
def exported() -> Export:
    """One artifact of one model at the default opset, exported once."""
    return lambda spec, model: watched(spec, model).exported


def loaded(data: bytes) -> Any:
    with quiet_torchscript():
        return torch.jit.load(BytesIO(data))


def opset_of(model: onnx.ModelProto) -> int:
    return next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))


def test_every_format_has_a_reader_of_its_metadata() -> None:
    assert set(FORMATS) == READERS.keys()


@each_model
@each_artifact
def test_an_artifact_carries_the_metadata_of_its_checkpoint(spec: ArtifactSpec, model: Model, exported: Export) -> None:
    found = READERS[spec.format].read_metadata(exported(spec, model).data, "artifact")
    expected = asdict(checkpoint_of(model).metadata())
    assert found == json.loads(json.dumps(expected))
    assert found.keys() == {"model", "config", "preprocessing", "labels", "weights_sha256"}


@each_model
@each_artifact
def test_no_path_of_this_machine_gets_into_an_artifact(spec: ArtifactSpec, model: Model, exported: Export) -> None:
    machine = {str(Path(__file__).resolve().parent.parent), sysconfig.get_path("purelib"), str(Path.home()), sys.prefix, "site-packages"}
    content = exported(spec, model).data
    assert [path for path in machine if path.encode() in content] == []


@each_model
@each_artifact
def test_exporting_is_silent_and_leaves_module_and_process_as_they_were(spec: ArtifactSpec, model: Model) -> None:
    assert watched(spec, model).printed == ""
    assert watched(spec, model).changed == ()


# ONNX


@each_model
@each_onnx
def test_an_onnx_file_has_one_image_input_and_one_logits_output_of_any_batch(spec: ArtifactSpec, model: Model, exported: Export) -> None:
    graph = onnx.load_from_string(exported(spec, model).data).graph
    config = model.defaults
    dims = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in (*graph.input, *graph.output)
    }
    assert [value.name for value in graph.input] == ["image"]
    assert [value.name for value in graph.output] == ["logits"]
    assert dims == {"image": ["batch", config.in_channels, config.image_size, config.image_size], "logits": ["batch", config.classes]}
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}


@each_model
@each_onnx
def test_an_onnx_file_is_whole_and_passes_the_full_check(spec: ArtifactSpec, model: Model, exported: Export) -> None:
    content = exported(spec, model).data
    onnx.checker.check_model(content, full_check=True)
    proto = onnx.load_from_string(content)
    assert not any(tensor.external_data or tensor.data_location for tensor in proto.graph.initializer)
    assert [prop.key for prop in proto.metadata_props] == [METADATA_KEY, onnx_exporters.DIGEST_KEY]
    assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)


@each_model
@each_onnx
def test_an_onnx_file_runs_at_any_batch(spec: ArtifactSpec, model: Model, exported: Export) -> None:
    session = onnxruntime.InferenceSession(exported(spec, model).data, providers=["CPUExecutionProvider"])
    checkpoint = checkpoint_of(model)
    module, shape = checkpoint.module(), checkpoint.preprocessing.input_shape
    for batch in (1, 2, 5, 300):
        images = torch.rand(batch, *shape)
        (scores,) = session.run(["logits"], {"image": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(scores), module(images), rtol=1e-4, atol=1e-4)


@each_onnx
@pytest.mark.parametrize("opset", OPSETS)
def test_the_opset_is_the_one_asked_for_and_recorded(spec: ArtifactSpec, opset: int) -> None:
    found = exported_by(spec, find_model("lenet5-1998"), opset)
    assert found.details["opset"] == opset == opset_of(onnx.load_from_string(found.data))


def test_the_two_exporters_say_which_they_are(exported: Export) -> None:
    names = {spec.name: exported(spec, MODELS[0]).details["exporter"] for spec in EXPORTABLE}
    assert {exported(spec, MODELS[0]).details["opset"] for spec in of_format("onnx")} == {18}
    assert len(set(names.values())) == len(EXPORTABLE)
    assert all(name and isinstance(name, str) for name in names.values())


@pytest.fixture
def shown(capfd: pytest.CaptureFixture[str]) -> Iterator[Shown]:
    """What a user would see: both streams and the warnings, which are errors elsewhere and would hide what comes after them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: (*capfd.readouterr(), [str(each.message) for each in caught])


@pytest.mark.parametrize("opset", UNSUPPORTED_OPSETS)
def test_an_unsupported_opset_leaves_the_onnx_artifacts_out_with_the_reason(
    opset: int, digits: data.Dataset, tmp_path: Path, shown: Shown
) -> None:
    small = fresh(find_model("lenet5"), {"in_channels": "1", "image_size": "16"}, 0)
    report = api.export(small, tmp_path / "bundle", formats=FORMATS, opset=opset, device="cpu", dataset=digits)
    assert {failure.name for failure in report.left_out} == {spec.name for spec in of_format("onnx")}
    assert [failure.reason for failure in report.left_out if f"{opset}" not in failure.reason or "opset" not in failure.reason] == []
    assert {artifact.format for artifact in report.bundle.manifest.artifacts} == {"checkpoint", *FORMATS} - {"onnx"}
    assert shown() == ("", "", [])


@pytest.mark.parametrize("opset", UNSUPPORTED_OPSETS)
def test_where_nothing_could_be_exported_nothing_is_published(opset: int, digits: data.Dataset, tmp_path: Path, shown: Shown) -> None:
    with pytest.raises(GateFailed) as refusal:
        api.export("lenet5", tmp_path / "bundle", formats=("onnx",), opset=opset, device="cpu", dataset=digits)
    assert all(f"{spec.name}: " in str(refusal.value) for spec in of_format("onnx"))
    assert list(tmp_path.iterdir()) == []
    assert shown() == ("", "", [])


@each_onnx
@pytest.mark.parametrize("opset", [21, 24])
def test_a_newer_opset_is_written_or_refused_in_silence(spec: ArtifactSpec, opset: int, shown: Shown) -> None:
    found, reason = None, ""
    try:
        found = exported_by(spec, MODELS[0], opset)
    except Exception as refusal:  # as the export catches it
        reason = str(refusal)
    assert f"opset {opset}" in reason if found is None else found.details["opset"] == opset
    assert shown() == ("", "", [])


# TorchScript


@each_model
@each_torchscript
def test_a_torchscript_archive_is_frozen(spec: ArtifactSpec, model: Model, exported: Export) -> None:
    found = exported(spec, model)
    module = loaded(found.data)
    assert found.details["frozen"] is True
    assert list(module.parameters()) == list(module.buffers()) == list(module.children()) == []


@each_model
@each_torchscript
def test_a_torchscript_archive_runs_at_any_batch(spec: ArtifactSpec, model: Model, exported: Export) -> None:
    checkpoint = checkpoint_of(model)
    module, archive = checkpoint.module(), loaded(exported(spec, model).data)
    for batch in (1, 2, 5, 300):
        images = torch.rand(batch, *checkpoint.preprocessing.input_shape)
        with torch.no_grad():
            torch.testing.assert_close(archive(images), module(images), rtol=1e-4, atol=1e-4)


# Reading metadata


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
@pytest.mark.parametrize("content", [b"", b"text", bytes(300), b"PK\x03\x04"], ids=["nothing", "text", "zeros", "zip"])
def test_foreign_bytes_have_no_metadata(reader: ModuleType, content: bytes) -> None:
    with pytest.raises(DamagedFile, match=r"^the file: "):
        reader.read_metadata(content, "the file")


@each_artifact
def test_a_truncated_artifact_is_refused(spec: ArtifactSpec, exported: Export) -> None:
    content = exported(spec, MODELS[0]).data
    for length in (1, 100, len(content) // 2, len(content) - 1):
        with pytest.raises(DamagedFile, match=r"^the file: "):
            READERS[spec.format].read_metadata(content[:length], "the file")


def test_files_of_other_tools_carry_no_metadata() -> None:
    buffer = BytesIO()
    with quiet_torchscript():
        torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)), buffer)
    assert torchscript_exporters.read_metadata(buffer.getvalue(), "other.pt") is None
    graph = onnx.helper.make_graph([], "empty", [], [])
    assert onnx_exporters.read_metadata(onnx.helper.make_model(graph).SerializeToString(), "other.onnx") is None


# Silence, and only where it belongs


def test_quiet_torchscript_silences_deprecations_inside_and_nothing_else_or_after() -> None:
    with quiet_torchscript():
        torch.jit.script(torch.nn.ReLU())
        with pytest.raises(UserWarning, match="mine"):
            warnings.warn("mine", UserWarning, stacklevel=1)
    with pytest.raises((DeprecationWarning, FutureWarning), match=r"torch\.jit"):
        torch.jit.script(torch.nn.ReLU())


def test_quiet_exporter_silences_output_logs_and_deprecations_inside_and_nothing_after(capsys: Any, caplog: Any) -> None:
    with quiet_exporter():
        print("inside")  # noqa: T201
        logging.getLogger("torch.onnx").warning("inside")
        warnings.warn("inside", DeprecationWarning, stacklevel=1)
        with pytest.raises(UserWarning, match="mine"):
            warnings.warn("mine", UserWarning, stacklevel=1)
    assert (capsys.readouterr().out, caplog.text) == ("", "")
    print("after")  # noqa: T201
    logging.getLogger("torch.onnx").warning("after")
    with pytest.raises(DeprecationWarning, match="after"):
        warnings.warn("after", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().out == "after\n"
    assert "after" in caplog.text


def test_quiet_exporter_lets_errors_through_and_is_over_after_them(capsys: pytest.CaptureFixture[str]) -> None:
    level = logging.getLogger("torch.onnx").level
    with pytest.raises(ZeroDivisionError), quiet_exporter():
        raise ZeroDivisionError
    print("after")  # noqa: T201
    assert capsys.readouterr().out == "after\n"
    assert logging.getLogger("torch.onnx").level == level
