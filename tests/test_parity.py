"""Parity passes what is equal, fails what is not, and says which it was and why."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from lenet_deploy import api
from lenet_deploy.bundle import Bundle, open_bundle, write_artifact, write_manifest
from lenet_deploy.checkpoint import Checkpoint
from lenet_deploy.data import Dataset, fit, normalise
from lenet_deploy.errors import BadInput, DamagedFile, UnknownName
from lenet_deploy.exporters import ExportOptions
from lenet_deploy.exporters.onnx import export_torchscript
from lenet_deploy.exporters.torchscript import export_trace
from lenet_deploy.parity.check import BATCH_SIZES, check_variant
from lenet_deploy.parity.inputs import input_sets
from lenet_deploy.parity.judge import judge
from lenet_deploy.records import Artifact, Environment, NodePlacement, ParityReport, ParityResult
from lenet_deploy.variants import ONNX, TRACE, VARIANTS, ArtifactSpec, RuntimeEntry

LIMIT = 16 * 2.0**-23  # ADR 0004: share of the image's largest score that a float32 variant may be off
ORACLE = torch.tensor([[8.0, -1.0, 2.0], [0.5, 0.25, -0.125]], dtype=torch.float64)


def off_by(share: float, image: int) -> torch.Tensor:
    """The oracle with one score of `image` off by `share` of that image's budget."""
    output = ORACLE.clone()
    output[image, 1] += share * LIMIT * float(ORACLE[image].abs().max())
    return output


def test_equal_scores_pass_and_use_no_budget() -> None:
    judged = judge(ORACLE.clone(), ORACLE, "fp32")
    assert (judged.passed, judged.reason) == (True, None)
    assert (judged.max_abs_error, judged.rmse, judged.budget_used, judged.top1_agreement) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("share", [0.5, 0.999])
def test_an_error_within_the_images_own_budget_passes(image: int, share: float) -> None:
    judged = judge(off_by(share, image), ORACLE, "fp32")
    assert judged.passed
    assert judged.budget_used == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("share", [1.001, 100.0])
def test_an_error_just_beyond_the_images_own_budget_fails_and_names_the_image(image: int, share: float) -> None:
    judged = judge(off_by(share, image), ORACLE, "fp32")
    assert not judged.passed
    assert judged.budget_used == pytest.approx(share, rel=1e-6)
    assert f"image {image}" in (judged.reason or "")


def test_the_limit_itself_passes_with_a_used_budget_of_one() -> None:
    judged = judge(off_by(1.0, 0), ORACLE, "fp32")
    assert judged.passed
    assert judged.budget_used == 1.0


def test_the_budget_scales_with_each_images_own_largest_score() -> None:
    same_error = 0.9 * LIMIT * 8.0
    loud, faint = ORACLE.clone(), ORACLE.clone()
    loud[0, 1] += same_error
    faint[1, 1] += same_error
    assert judge(loud, ORACLE, "fp32").passed
    assert not judge(faint, ORACLE, "fp32").passed


def test_max_error_and_rmse_are_over_the_batch() -> None:
    output = ORACLE.clone()
    output[0, 0] += 3.0
    output[1, 2] -= 4.0
    judged = judge(output, ORACLE, "fp32")
    assert judged.max_abs_error == 4.0
    assert judged.rmse == pytest.approx(math.sqrt((9 + 16) / 6))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_fail_and_are_counted(value: float) -> None:
    output = ORACLE.clone()
    output[1, 2] = value
    judged = judge(output, ORACLE, "fp32")
    assert not judged.passed
    assert "1 of 6 outputs are NaN or infinite" in (judged.reason or "")
    assert (judged.max_abs_error, judged.rmse, judged.budget_used, judged.top1_agreement) == (None, None, None, None)


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (6,), (2, 3, 1), ()])
def test_another_shape_fails_with_both_shapes_in_the_reason(shape: tuple[int, ...]) -> None:
    judged = judge(torch.zeros(shape), ORACLE, "fp32")
    assert not judged.passed
    assert str(shape) in (judged.reason or "")
    assert str((2, 3)) in (judged.reason or "")


def test_an_all_zero_oracle_leaves_no_budget_and_no_division_by_zero() -> None:
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    exact = judge(zeros.clone(), zeros, "fp32")
    assert (exact.passed, exact.budget_used) == (True, 0.0)
    off = judge(zeros + 1e-30, zeros, "fp32")
    assert not off.passed
    assert off.budget_used is not None
    assert off.budget_used > 1.0


def test_top1_agreement_is_the_share_of_images_with_the_oracles_class() -> None:
    output = ORACLE.clone()
    output[1] = torch.tensor([0.0, 0.75, 0.0])
    assert judge(output, ORACLE, "fp32").top1_agreement == 0.5


@pytest.mark.parametrize("wrong", [1e30, 1e200, 1e308])
def test_every_number_of_a_judgement_is_finite_however_wrong_the_output(wrong: float) -> None:
    judged = judge(torch.full((2, 3), wrong, dtype=torch.float64), ORACLE, "fp32")
    assert not judged.passed
    numbers = (judged.max_abs_error, judged.rmse, judged.budget_used)
    assert all(number is not None and math.isfinite(number) for number in numbers)


def test_a_healthy_float32_module_uses_a_small_part_of_the_budget(checkpoint: Checkpoint, digits: Dataset) -> None:
    for inputs in input_sets(checkpoint, digits, 64):
        judged = judge(checkpoint.module()(inputs.images).detach(), inputs.oracle, "fp32")
        assert judged.passed
        assert judged.budget_used is not None
        assert 0.0 < judged.budget_used < 0.6


def test_input_sets_are_the_same_each_time_and_named(checkpoint: Checkpoint, digits: Dataset) -> None:
    first, second = input_sets(checkpoint, digits, 5), input_sets(checkpoint, digits, 5)
    assert [inputs.name for inputs in first] == ["digits test images", "normal, seed 0"]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.oracle, other.oracle)


def test_input_sets_are_real_images_and_normal_ones_of_the_models_shape(checkpoint: Checkpoint, digits: Dataset) -> None:
    spec = checkpoint.preprocessing
    real, normal = input_sets(checkpoint, digits, 64)
    assert torch.equal(real.images, normalise(fit(digits.test_images[:64], spec), spec))
    assert normal.images.shape == (64, *spec.input_shape)
    assert abs(float(normal.images.mean())) < 0.02
    assert abs(float(normal.images.std()) - 1.0) < 0.02


def test_a_data_set_with_fewer_images_than_asked_for_is_cycled(checkpoint: Checkpoint, digits: Dataset) -> None:
    few = dataclasses.replace(digits, test_images=digits.test_images[:3], test_labels=digits.test_labels[:3])
    images = input_sets(checkpoint, few, 7)[0].images
    assert torch.equal(images[3:6], images[:3])
    assert torch.equal(images[6], images[0])


def test_the_oracle_is_the_checkpoints_network_in_float64(checkpoint: Checkpoint, digits: Dataset) -> None:
    inputs = input_sets(checkpoint, digits, 4)[0]
    weight = {name: tensor.double() for name, tensor in checkpoint.weights.items()}
    x = torch.conv2d(inputs.images.double(), weight["conv1.weight"], weight["conv1.bias"], padding=2).relu()
    x = torch.conv2d(nn.functional.avg_pool2d(x, 2), weight["conv2.weight"], weight["conv2.bias"]).relu()
    x = nn.functional.avg_pool2d(x, 2).reshape(4, -1)
    for layer in ("fc1", "fc2"):
        x = (x @ weight[f"{layer}.weight"].T + weight[f"{layer}.bias"]).relu()
    x = x @ weight["fc3.weight"].T + weight["fc3.bias"]
    assert inputs.oracle.dtype == torch.float64
    assert torch.allclose(inputs.oracle, x, rtol=1e-12, atol=1e-12)


def usable_names() -> set[str]:
    return {variant.name for variant in VARIANTS if variant.runtime.load().probe(variant.device).usable}


def test_every_variant_is_judged_on_every_input_set_and_batch_size_or_skipped_with_a_reason(bundle: Bundle) -> None:
    report = api.check_parity(bundle)
    usable = usable_names()
    judged = {(r.variant, r.inputs, r.batch_size) for r in report.results if r.status != "skipped"}
    sets = ("digits test images", "normal, seed 0")
    assert judged == {(name, inputs, size) for name in usable for inputs in sets for size in BATCH_SIZES}
    assert len(judged) == sum(r.status != "skipped" for r in report.results)
    skipped = [r for r in report.results if r.status == "skipped"]
    assert [r.variant for r in skipped] == [variant.name for variant in VARIANTS if variant.name not in usable]
    assert all(r.reason and r.inputs is None and r.batch_size is None and r.budget_used is None for r in skipped)
    assert report.verdict == "pass"
    assert report.notes == ()


def test_passing_results_carry_their_errors_and_providers(bundle: Bundle) -> None:
    report = api.check_parity(bundle, device="cpu")
    for result in report.results:
        assert (result.status, result.reason) == ("pass", None)
        assert result.budget_used is not None
        assert 0.0 < result.budget_used <= 1.0
        assert result.max_abs_error is not None
        assert result.rmse is not None
        assert 0.0 < result.rmse <= result.max_abs_error < 1e-3
        assert result.top1_agreement == 1.0
        assert bool(result.node_providers) == result.variant.startswith("onnx/")


def test_parity_judges_the_documented_batch_sizes_by_default() -> None:
    assert BATCH_SIZES == (1, 2, 3, 64)


def test_globs_batch_sizes_and_data_set_narrow_the_run(bundle: Bundle, digits: Dataset) -> None:
    other = dataclasses.replace(digits, name="others")
    visited: list[tuple[int, int, str]] = []
    report = api.check_parity(
        bundle.path,
        variants=("eager/*cpu*",),
        batch_sizes=(5, 1, 5),
        dataset=other,
        progress=lambda done, total, what: visited.append((done, total, what)),
    )
    assert [(r.inputs, r.batch_size) for r in report.results] == [
        ("others test images", 5),
        ("others test images", 1),
        ("normal, seed 0", 5),
        ("normal, seed 0", 1),
    ]
    assert visited == [(0, 1, "eager/torch-cpu/fp32")]
    assert report.notes == ("real images are from others, not from digits, which the model was trained on",)


@pytest.mark.parametrize("size", [0, -1])
def test_batch_sizes_below_one_are_bad_input(bundle: Bundle, size: int) -> None:
    with pytest.raises(BadInput, match=f"batch size is {size}"):
        api.check_parity(bundle, batch_sizes=(1, size))


def test_an_unknown_variant_is_bad_input_with_the_nearest_names(bundle: Bundle) -> None:
    with pytest.raises(UnknownName, match="onnx/ort-cpu/fp32"):
        api.check_parity(bundle, variants=("onnx/ort-cpu/fp23",))


def rebuilt(bundle: Bundle, folder: Path, spec: ArtifactSpec, data: bytes) -> Bundle:
    """A copy of the bundle in which one artifact has other bytes that the manifest vouches for."""
    folder.mkdir()
    artifacts: list[Artifact] = []
    for entry in bundle.manifest.artifacts:
        content = data if entry.name == spec.name else bundle.read(entry)
        artifacts.append(write_artifact(folder, entry.name, entry.format, entry.path, content, entry.details))
    write_manifest(folder, dataclasses.replace(bundle.manifest, artifacts=tuple(artifacts)))
    return open_bundle(folder)


def parity_of(bundle: Bundle, folder: Path, spec: ArtifactSpec, data: bytes) -> ParityReport:
    """Parity of the CPU variants of one artifact after its bytes were replaced."""
    globs = [variant.name for variant in VARIANTS if variant.artifact is spec and variant.device == "cpu"]
    return api.check_parity(rebuilt(bundle, folder, spec, data), variants=globs, batch_sizes=(1, 2, 3))


def nothing(module: nn.Module) -> nn.Module:
    return module


def one_weight_off(module: nn.Module) -> nn.Module:
    weight = module.get_parameter("conv1.weight")
    with torch.no_grad():
        weight.view(-1)[weight.abs().argmax()] *= 1.01
    return module


def bias_dropped(module: nn.Module) -> nn.Module:
    nn.init.zeros_(module.get_parameter("fc3.bias"))
    return module


def other_pooling(module: nn.Module) -> nn.Module:
    module.pool = nn.MaxPool2d(2)
    return module


def other_activation(module: nn.Module) -> nn.Module:
    module.activation = nn.Tanh()
    return module


def one_weight_nan(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module.get_parameter("fc2.weight")[0, 0] = math.nan
    return module


def softmax_appended(module: nn.Module) -> nn.Module:
    return nn.Sequential(module, nn.Softmax(dim=1))


def classes_swapped(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name in ("fc3.weight", "fc3.bias"):
            module.get_parameter(name)[[0, 1]] = module.get_parameter(name)[[1, 0]]
    return module


def fewer_classes(module: nn.Module) -> nn.Module:
    module.fc3 = nn.Linear(84, 7)
    return module


def input_scaled_again(module: nn.Module) -> nn.Module:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            scores: torch.Tensor = self.inner(image / 255)
            return scores

    return Scaled()


Fault = Callable[[nn.Module], nn.Module]
FAULTS: tuple[tuple[Fault, str], ...] = (
    (one_weight_off, "times the budget"),
    (bias_dropped, "times the budget"),
    (other_pooling, "times the budget"),
    (other_activation, "times the budget"),
    (one_weight_nan, "NaN or infinite"),
    (softmax_appended, "times the budget"),
    (classes_swapped, "times the budget"),
    (fewer_classes, "output has shape (1, 7), the oracle (1, 10)"),
    (input_scaled_again, "times the budget"),
)
# Each format by its quickest exporter.
EXPORTS = {TRACE: export_trace, ONNX: export_torchscript}
each_format = pytest.mark.parametrize("spec", EXPORTS, ids=lambda spec: spec.name)


def faulty(spec: ArtifactSpec, checkpoint: Checkpoint, fault: Fault) -> bytes:
    return EXPORTS[spec](fault(checkpoint.module()).eval(), checkpoint.metadata(), ExportOptions()).data


@each_format
def test_an_artifact_rebuilt_without_a_fault_passes(spec: ArtifactSpec, bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path) -> None:
    report = parity_of(bundle, tmp_path / "rebuilt", spec, faulty(spec, checkpoint, nothing))
    assert report.verdict == "pass"


@each_format
@pytest.mark.parametrize(("fault", "reason"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_fault_fails_and_the_reason_says_what(
    spec: ArtifactSpec, fault: Fault, reason: str, bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    report = parity_of(bundle, tmp_path / "rebuilt", spec, faulty(spec, checkpoint, fault))
    assert report.verdict == "fail"
    assert all(result.status == "fail" and result.reason for result in report.results)
    assert reason in (report.results[0].reason or "")


@pytest.mark.parametrize("fault", [one_weight_off], ids=lambda fault: fault.__name__)
def test_a_fault_in_one_artifact_fails_that_artifacts_variants_and_no_other(
    fault: Fault, bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    report = api.check_parity(rebuilt(bundle, tmp_path / "rebuilt", TRACE, faulty(TRACE, checkpoint, fault)), device="cpu")
    failed = {result.variant for result in report.results if result.status == "fail"}
    assert failed == {variant.name for variant in VARIANTS if variant.artifact is TRACE and variant.device == "cpu"}
    assert report.verdict == "fail"


def test_a_frozen_batch_dimension_fails_at_every_other_batch_size(bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path) -> None:
    import onnx

    model = onnx.load_from_string(faulty(ONNX, checkpoint, nothing))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    report = parity_of(bundle, tmp_path / "rebuilt", ONNX, model.SerializeToString())
    assert {result.batch_size: result.status for result in report.results} == {1: "fail", 2: "pass", 3: "fail"}
    assert all(f"batch {r.batch_size}" in (r.reason or "") for r in report.results if r.status == "fail")
    assert report.verdict == "fail"


def test_an_onnx_graph_with_a_second_input_fails_and_does_not_raise(bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path) -> None:
    import onnx

    model = onnx.load_from_string(faulty(ONNX, checkpoint, nothing))
    model.graph.input.append(onnx.helper.make_tensor_value_info("another", onnx.TensorProto.FLOAT, [1]))
    model.graph.node.append(onnx.helper.make_node("Relu", ["another"], ["unused"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("unused", onnx.TensorProto.FLOAT, [1]))
    report = parity_of(bundle, tmp_path / "rebuilt", ONNX, model.SerializeToString())
    assert {result.status for result in report.results} == {"fail"}


class ReturnsPair(nn.Module):
    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return image, image


class RaisesNothingReadable(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        assert image.sum() > 1e9, ""
        return image


@pytest.mark.parametrize("module", [ReturnsPair(), RaisesNothingReadable()], ids=lambda module: type(module).__name__)
def test_a_module_that_cannot_be_run_fails_and_does_not_raise(
    module: nn.Module, bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from lenet_deploy.exporters.torchscript import export_script

    data = export_script(module.eval(), checkpoint.metadata(), ExportOptions()).data
    report = parity_of(bundle, tmp_path / "rebuilt", TRACE, data)
    assert {result.status for result in report.results} == {"fail"}
    assert all("does not run at batch" in (result.reason or "") for result in report.results)


def test_an_exception_without_a_message_is_a_failure_like_any_other(bundle: Bundle, checkpoint: Checkpoint, digits: Dataset) -> None:
    class Silent:
        device = torch.device("cpu")
        node_providers = ()

        @staticmethod
        @contextlib.contextmanager
        def open_session(data: bytes, input_shape: tuple[int, int, int], device: str) -> Iterator[Silent]:
            yield Silent()

        def bind(self, batch_size: int) -> torch.Tensor:
            raise AssertionError

    variant = dataclasses.replace(VARIANTS[0], runtime=RuntimeEntry("silent", Silent))
    results = check_variant(variant, b"", input_sets(checkpoint, digits, 1), (1,))
    assert [result.status for result in results] == ["fail", "fail"]
    assert all(result.reason for result in results)


@each_format
@pytest.mark.parametrize("data", [b"", b"no artifact"], ids=["empty", "foreign"])
def test_bytes_that_the_manifest_vouches_for_but_no_runtime_reads_are_a_mismatch(
    spec: ArtifactSpec, data: bytes, bundle: Bundle, tmp_path: Path
) -> None:
    report = parity_of(bundle, tmp_path / "rebuilt", spec, data)
    assert [result.status for result in report.results] == ["fail"]
    assert "cannot be opened" in (report.results[0].reason or "")


@each_format
def test_bytes_that_the_manifest_does_not_vouch_for_are_bad_input_and_not_a_mismatch(
    spec: ArtifactSpec, bundle: Bundle, tmp_path: Path
) -> None:
    copy = rebuilt(bundle, tmp_path / "copy", spec, b"x")
    path = copy.path / spec.path
    path.write_bytes(b"y")
    with pytest.raises(DamagedFile, match="sha256"):
        api.check_parity(copy)


def result(status: str) -> ParityResult:
    return ParityResult("some/variant-cpu/fp32", status, node_providers=(NodePlacement("node", "provider"),))


@pytest.mark.parametrize(
    ("statuses", "verdict"),
    [
        (("pass",), "pass"),
        (("pass", "skipped"), "pass"),
        (("pass", "fail"), "fail"),
        (("fail", "skipped"), "fail"),
        (("skipped",), "fail"),
        ((), "fail"),
    ],
)
def test_the_verdict_needs_a_pass_and_no_failure(statuses: tuple[str, ...], verdict: str) -> None:
    environment = Environment("os", "3.11", "cpu", 1, None, None, None, {}, None)
    assert ParityReport(tuple(map(result, statuses)), (), environment).verdict == verdict
