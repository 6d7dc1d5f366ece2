"""The assertion for other people's tests: silent where all is equal, and a message that says variant, input set and layer where not."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lenet_deploy import api
from lenet_deploy.bundle import Bundle
from lenet_deploy.checkpoint import Checkpoint, to_bytes
from lenet_deploy.data import Dataset
from lenet_deploy.errors import BadInput, DamagedFile, UnknownName
from lenet_deploy.exporters import Exported, ExportOptions
from lenet_deploy.parity import check, inputs
from lenet_deploy.records import ArtifactMetadata, Environment, ParityReport, ParityResult
from lenet_deploy.testing import SHOWN, assert_parity, failure_message
from lenet_deploy.variants import ONNX_TS, SCRIPT, TRACE, VARIANTS, ArtifactSpec

ENVIRONMENT = Environment("os", "3.11", "cpu", 1, None, None, None, {}, None)
Faulty = Callable[[ArtifactSpec, Checkpoint, nn.Module], bytes]
Vouched = Callable[[Bundle, Path, ArtifactSpec, bytes], Bundle]

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what no GPU here can run, and one can")


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer images and batch sizes than users get, where the test is about the assertion: an export has no argument for them."""
    monkeypatch.setattr(api, "INPUTS", 16)
    monkeypatch.setattr(inputs, "MAX_PIXELS", 100)
    monkeypatch.setattr(check, "BATCH_SIZES", (1, 3))


@pytest.fixture
def spoilt(tiny_bundle: Bundle, tiny: Checkpoint, faulty: Faulty, vouched: Vouched, tmp_path: Path) -> Bundle:
    """A bundle whose ONNX file has other weights in conv2."""
    module = tiny.module()
    with torch.no_grad():
        module.get_parameter("conv2.weight").mul_(1.01)
    return vouched(tiny_bundle, tmp_path / "spoilt", ONNX_TS, faulty(ONNX_TS, tiny, module))


def test_a_bundle_and_its_folder_pass_and_give_the_report(tiny_bundle: Bundle, few: Dataset) -> None:
    for what in (tiny_bundle, tiny_bundle.path, str(tiny_bundle.path)):
        report = assert_parity(what, variants=("*cpu*",), batch_sizes=(2,), dataset=few)
        assert report.verdict == "pass"
        assert {result.variant for result in report.results} == {
            *("eager/torch-cpu/fp32", "torchscript/torch-cpu/fp32/trace", "onnx/ort-cpu/fp32/ts-exporter"),
            "eager/torch-cpu/fp32/channels-last",
        }
        assert {result.batch_size for result in report.results} == {2, None}


def test_a_checkpoint_and_its_file_are_exported_and_pass(tiny: Checkpoint, few: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(to_bytes(tiny))
    for what in (tiny, path, str(path)):
        report = assert_parity(what, device="cpu", dataset=few, formats=("torchscript",))
        assert {result.variant for result in report.results if result.status == "pass"} == {
            *("eager/torch-cpu/fp32", "torchscript/torch-cpu/fp32/trace", "torchscript/torch-cpu/fp32/script"),
            "eager/torch-cpu/fp32/channels-last",
        }
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_models_name_is_exported_to_every_default_format_and_passes(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = assert_parity("lenet5", device="cpu", dataset=few, require=("onnx/ort-cpu/fp32",))
    assert {result.variant for result in report.results} == {variant.name for variant in VARIANTS if variant.device == "cpu"}
    assert list(tmp_path.iterdir()) == [], "the export is temporary"


def test_a_fault_is_an_assertion_that_names_variant_check_inputs_batch_and_layer(spoilt: Bundle, few: Dataset) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_parity(spoilt, device="cpu", dataset=few)
    first, *lines = str(caught.value).splitlines()
    assert first == "parity failed"
    assert {line.split()[0].rstrip(":") for line in lines} == {"onnx/ort-cpu/fp32/ts-exporter"}
    assert len(lines) == SHOWN + 1
    assert re.search(
        r"^  onnx/ort-cpu/fp32/ts-exporter \[outputs\] .+, batch \d: image \d+: .* begins at conv2 \(tensor ", "\n".join(lines), re.M
    )
    assert re.fullmatch(r"  onnx/ort-cpu/fp32/ts-exporter: \d+ more", lines[-1])
    assert "[weights] weights read back: 1 wrong in its tensors: conv2.weight" in str(caught.value)


def test_a_fault_elsewhere_than_in_the_variants_asked_for_is_no_matter(spoilt: Bundle, few: Dataset) -> None:
    assert assert_parity(spoilt, variants=("eager/*", "torchscript/*"), device="cpu", dataset=few).verdict == "pass"


@without_gpu
def test_a_required_variant_that_cannot_run_is_an_assertion(tiny_bundle: Bundle, few: Dataset) -> None:
    with pytest.raises(AssertionError, match=r"eager/torch-cuda/fp32 is required and was skipped: device cuda cannot be used"):
        assert_parity(tiny_bundle, variants=("eager/*",), dataset=few, require=("eager/torch-cuda/*",))


@without_gpu
def test_nothing_judged_is_an_assertion_with_the_reasons(tiny_bundle: Bundle, few: Dataset) -> None:
    with pytest.raises(AssertionError, match=r"eager/torch-cuda/fp32 was skipped: device cuda cannot be used"):
        assert_parity(tiny_bundle, variants=("*cuda*",), dataset=few)


def slightly_wrong(module: nn.Module, metadata: ArtifactMetadata, options: ExportOptions) -> Exported:
    from lenet_deploy.exporters.torchscript import export_trace

    with torch.no_grad():
        module.get_parameter("fc1.bias").add_(1e-3)
    return export_trace(module, metadata, options)


def refusing(module: nn.Module, metadata: ArtifactMetadata, options: ExportOptions) -> Exported:
    raise NotImplementedError("this operator is not known")


def exporting(monkeypatch: pytest.MonkeyPatch, *specs: ArtifactSpec) -> None:
    monkeypatch.setattr(api, "select_artifacts", lambda formats, precisions: specs)


def test_an_export_that_fails_parity_is_an_assertion_with_its_report(
    tiny: Checkpoint, few: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporting(monkeypatch, dataclasses.replace(TRACE, exporter=lambda: slightly_wrong, reader=None))
    with pytest.raises(AssertionError, match=r"torchscript/torch-cpu/fp32/trace \[outputs\].*begins at fc1"):
        assert_parity(tiny, device="cpu", dataset=few)


def test_an_artifact_that_cannot_be_exported_is_an_assertion(tiny: Checkpoint, few: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    exporting(monkeypatch, SCRIPT, dataclasses.replace(TRACE, exporter=lambda: refusing))
    with pytest.raises(AssertionError, match="torchscript-trace-fp32 could not be exported: this operator is not known"):
        assert_parity(tiny, device="cpu", dataset=few)


def test_python_without_assertions_still_fails(spoilt: Bundle) -> None:
    program = (
        "import sys; from lenet_deploy.testing import assert_parity; assert_parity(sys.argv[1], variants=('onnx/*cpu*',), batch_sizes=(2,))"
    )
    command = [sys.executable, "-O", "-W", "error", "-c", program, str(spoilt.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "AssertionError: parity failed" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"variants": ("onxx/*",)}, UnknownName, "unknown variant"),
        ({"require": ("onxx/*",)}, UnknownName, "unknown variant"),
        ({"variants": ("eager/*",), "require": ("onnx/ort-cpu/*",)}, BadInput, "required but not selected"),
        ({"batch_sizes": (0,)}, BadInput, "batch size is 0"),
        ({"device": "tpu"}, BadInput, "unknown device"),
    ],
)
def test_a_wrong_question_is_bad_input_and_no_mismatch(
    arguments: dict[str, object], error: type[BadInput], message: str, tiny_bundle: Bundle, few: Dataset
) -> None:
    with pytest.raises(error, match=message):
        assert_parity(tiny_bundle, dataset=few, **arguments)


def test_a_wrong_file_is_bad_input_and_no_mismatch(tiny_bundle: Bundle, vouched: Vouched, few: Dataset, tmp_path: Path) -> None:
    copy = vouched(tiny_bundle, tmp_path / "copy", TRACE, b"x")
    (copy.path / TRACE.path).write_bytes(b"y")
    with pytest.raises(DamagedFile, match="sha256"):
        assert_parity(copy.path, variants=("torchscript/*cpu*",), dataset=few)
    with pytest.raises(UnknownName):
        assert_parity("lenet6")
    with pytest.raises(BadInput, match="not a bundle"):
        assert_parity(tmp_path)


def failing(variant: str, budget_used: float | None, number: int) -> ParityResult:
    return ParityResult(variant, "fail", f"reason {number}", "digits", 2, budget_used=budget_used)


def test_the_message_has_the_worst_first_and_says_how_many_more() -> None:
    results = (*(failing("a", float(share), share) for share in range(2, 9)), failing("a", None, 0), failing("b", 3.0, 1))
    away = ParityResult("c", "skipped", "no GPU")
    message = failure_message(ParityReport((*results, away), (), ENVIRONMENT, required=("c",)))
    assert message.splitlines() == [
        "parity failed",
        "  a [outputs] digits, batch 2: reason 0",
        *(f"  a [outputs] digits, batch 2: reason {share}" for share in (8, 7, 6, 5)),
        "  a: 3 more",
        "  b [outputs] digits, batch 2: reason 1",
        "  c is required and was skipped: no GPU",
    ]


def test_the_message_of_a_whole_variant_has_its_check_alone() -> None:
    whole = ParityResult("a", "fail", "the artifact cannot be opened")
    assert (
        failure_message(ParityReport((whole,), (), ENVIRONMENT)).splitlines()[1] == "  a [outputs] outputs: the artifact cannot be opened"
    )
