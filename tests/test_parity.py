"""Parity of whole bundles passes what is equal, fails what is not, and says which variant, where and why."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from lenet_deploy import api
from lenet_deploy.bundle import Bundle, open_bundle, write_manifest
from lenet_deploy.checkpoint import Checkpoint
from lenet_deploy.data import Dataset
from lenet_deploy.devices import float32_state
from lenet_deploy.errors import BadInput, DamagedFile, UnknownName, Unusable
from lenet_deploy.parity.check import BATCH_SIZES, SPECIALS
from lenet_deploy.records import CHECKS, Environment, NodePlacement, ParityReport, ParityResult
from lenet_deploy.variants import CHECKPOINT, ONNX_TS, TRACE, VARIANTS, ArtifactSpec

SETS = (
    *("digits test split", "normal, seed 0", "uniform, seed 0", "constants", "one-hot pixels"),
    *("large, normal x 10000", "subnormal, normal x 1e-39"),
)
ON_CPU = [variant.name for variant in VARIANTS if variant.device == "cpu"]
ENVIRONMENT = Environment("os", "3.11", "cpu", 1, None, None, None, {}, None)
Faulty = Callable[[ArtifactSpec, Checkpoint, nn.Module], bytes]
Vouched = Callable[[Bundle, Path, ArtifactSpec, bytes], Bundle]


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what no GPU here can run, and one can")


# A healthy bundle.


def test_every_variant_passes_every_check_on_every_input_set_and_batch_size(report: ParityReport) -> None:
    judged = {(r.variant, r.check, r.inputs, r.batch_size) for r in report.results}
    assert len(judged) == len(report.results)
    assert {result.status for result in report.results} == {"pass"}
    assert report.verdict == "pass"
    for name in ON_CPU:
        several = BATCH_SIZES[1:]
        assert {each[1:] for each in judged if each[0] == name} == {
            *({("weights", "weights read back", None)} if not name.startswith("eager/") else ()),
            *({("placement", "placement", None)} if name.startswith("onnx/") else ()),
            *(("outputs", inputs, size) for inputs in SETS for size in BATCH_SIZES),
            *(("consistency", inputs, size) for inputs in SETS for size in several),
            ("decisions", SETS[0], 1024),
            *(("permutation", "permuted batch", size) for size in several),
            *(("isolation", f"{special} in one image", size) for special, _ in SPECIALS for size in several),
        }
    assert {result.check for result in report.results} == set(CHECKS)


def test_passing_results_carry_their_errors_and_providers(report: ParityReport) -> None:
    for result in report.results:
        assert result.reason is None
        assert bool(result.node_providers) == (result.variant.startswith("onnx/") and result.check != "weights")
        if result.check == "outputs":
            assert 0.0 < (result.budget_used or 0.0) <= 1.0
            assert 0.0 < (result.rmse or 0.0) <= (result.max_abs_error or 0.0)
            assert result.cosine == pytest.approx(1.0, abs=1e-6)


def test_a_healthy_bundle_leaves_budget_on_usual_images(report: ParityReport) -> None:
    used = [r.budget_used or 0.0 for r in report.results if r.check == "outputs" and r.inputs in SETS[:4]]
    assert max(used) < 0.75


def test_decisions_are_counted_on_the_whole_test_split(report: ParityReport, digits: Dataset) -> None:
    decided = {result.variant: result for result in report.results if result.decisions}
    assert list(decided) == ON_CPU
    for result in decided.values():
        assert result.decisions is not None
        assert (result.check, result.top1_agreement, result.decisions.images) == ("decisions", 1.0, len(digits.test_images))
        assert result.decisions.oracle_correct == result.decisions.variant_correct
        assert result.decisions.mcnemar_p == 1.0


def test_the_report_says_what_float32_meant_and_what_was_required(report: ParityReport) -> None:
    assert set(report.float32.values()) == {"ieee"}
    assert report.float32.keys() == float32_state().keys()
    assert (report.required, report.missing, report.not_run, report.notes) == ((), (), (), ())


@without_gpu
def test_variants_that_cannot_run_here_are_skipped_with_one_reason_each(tiny_bundle: Bundle) -> None:
    report = api.check_parity(tiny_bundle, batch_sizes=(1,))
    names = [variant.name for variant in VARIANTS if variant.device == "cuda" and variant.artifact in (CHECKPOINT, TRACE, ONNX_TS)]
    assert [result.variant for result in report.not_run] == names
    assert all(result.reason and result.budget_used is None and result.batch_size is None for result in report.not_run)
    assert (report.verdict, report.missing) == ("pass", ())


# What is asked.


def test_globs_batch_sizes_and_data_set_narrow_the_run(tiny_bundle: Bundle, few: Dataset) -> None:
    other = dataclasses.replace(few, name="others")
    visited: list[tuple[int, int, str]] = []
    report = api.check_parity(
        tiny_bundle.path,
        variants=("eager/*cpu*/fp32", "onnx/ort-cpu/*"),
        batch_sizes=(5, 1, 5),
        dataset=other,
        progress=lambda done, total, what: visited.append((done, total, what)),
    )
    outputs = [result for result in report.results if result.check == "outputs" and result.inputs == "others test split"]
    names = ["eager/torch-cpu/fp32", "onnx/ort-cpu/fp32/ts-exporter"]
    assert [(result.variant, result.batch_size) for result in outputs] == [(name, size) for name in names for size in (5, 1)]
    assert visited == [(0, 3, "oracle"), (1, 3, names[0]), (2, 3, names[1])]
    assert report.notes == ("real images are from others, not from digits, which the model was trained on",)
    assert {result.decisions.images for result in report.results if result.decisions} == {40}


def test_a_drill_shows_every_layer_of_every_variant_on_the_real_images(tiny_bundle: Bundle, few: Dataset) -> None:
    report = api.check_parity(tiny_bundle, batch_sizes=(2,), device="cpu", dataset=few, drill=True)
    assert report.verdict == "pass"
    shown = [result for result in report.results if result.layers]
    assert [result.variant for result in shown] == [
        name for name in ON_CPU if "script" not in name.split("/")[-1] and name != "onnx/ort-cpu/fp32"
    ]
    assert {result.inputs for result in shown} == {"digits test split"}
    for result in shown:
        layers = [error.layer for error in result.layers if error.graph == result.layers[0].graph]
        assert layers == ["input", *(layer.name for layer in api.load(tiny_bundle.path).config.layers()), "output"]
        assert all(error.passed for error in result.layers)
    plain = api.check_parity(tiny_bundle, batch_sizes=(2,), device="cpu", dataset=few)
    assert not any(result.layers for result in plain.results)


@pytest.mark.parametrize("size", [0, -1])
def test_batch_sizes_below_one_are_bad_input(tiny_bundle: Bundle, size: int) -> None:
    with pytest.raises(BadInput, match=f"batch size is {size}"):
        api.check_parity(tiny_bundle, batch_sizes=(1, size))


@pytest.mark.parametrize("argument", ["variants", "require"])
def test_an_unknown_variant_is_bad_input_with_the_nearest_names(argument: str, tiny_bundle: Bundle) -> None:
    with pytest.raises(UnknownName, match="onnx/ort-cpu/fp32/ts-exporter"):
        api.check_parity(tiny_bundle, **{argument: ("onnx/ort-cpu/fp32/ts-exporters",)})


def test_a_variant_that_the_bundle_does_not_hold_is_unknown_too(tiny_bundle: Bundle) -> None:
    with pytest.raises(UnknownName):
        api.check_parity(tiny_bundle, require=("torchscript/torch-cpu/fp32/script",))


@pytest.mark.parametrize(
    "narrow",
    [{"variants": ("eager/*",)}, {"variants": ("onnx/ort-cpu/*",), "require": ("*cpu*",)}, {"device": "cpu", "require": ("*cuda*",)}],
)
def test_a_required_variant_that_is_not_selected_is_bad_input_that_names_it(narrow: dict[str, object], tiny_bundle: Bundle) -> None:
    arguments = {"require": ("onnx/*",), **narrow}
    with pytest.raises(BadInput, match="is required but not selected") as caught:
        api.check_parity(tiny_bundle, **arguments)
    assert "/fp32" in str(caught.value)


def test_a_required_variant_that_ran_is_not_missing(tiny_bundle: Bundle, few: Dataset) -> None:
    report = api.check_parity(tiny_bundle, batch_sizes=(1,), device="cpu", dataset=few, require=("eager/*cpu*/fp32", "onnx/ort-cpu/*"))
    assert report.required == ("eager/torch-cpu/fp32", "onnx/ort-cpu/fp32/ts-exporter")
    assert (report.missing, report.verdict) == ((), "pass")


@without_gpu
def test_a_required_variant_that_cannot_run_here_is_missing_and_the_verdict_is_of_the_others(tiny_bundle: Bundle, few: Dataset) -> None:
    report = api.check_parity(tiny_bundle, variants=("eager/*",), batch_sizes=(1,), dataset=few, require=("eager/*cuda*/fp32",))
    assert [result.variant for result in report.missing] == list(report.required) == ["eager/torch-cuda/fp32"]
    assert all("cannot be used" in (result.reason or "") for result in report.missing)
    assert report.verdict == "pass"


def test_allowing_tf32_is_in_the_report_and_off_again_afterwards(tiny_bundle: Bundle, few: Dataset) -> None:
    before = float32_state()
    report = api.check_parity(tiny_bundle, variants=("eager/*cpu*",), batch_sizes=(1,), device="cpu", dataset=few, allow_tf32=True)
    assert {name for name, value in report.float32.items() if value == "tf32"} == {
        "torch.cuda.matmul",
        "torch.cudnn.conv",
        "onnxruntime.cuda",
    }
    assert {name for name, value in report.float32.items() if value == "ieee"} == {"torch.mkldnn.matmul", "torch.mkldnn.conv"}
    assert report.verdict == "pass"
    assert max(result.budget_used or 0.0 for result in report.results) < 1.0, "the CPU's float32 is judged as such"
    assert float32_state() == before


# Faulty artifacts whose digest is the manifest's.


@dataclasses.dataclass(frozen=True)
class Spoiler:
    """Parity of the CPU variant of one artifact after its bytes were replaced."""

    bundle: Bundle
    dataset: Dataset
    folder: Path
    vouched: Vouched

    def report(self, spec: ArtifactSpec, data: bytes, sizes: tuple[int, ...] = (1, 3)) -> ParityReport:
        spoilt = self.vouched(self.bundle, self.folder / "spoilt", spec, data)
        names = [variant.name for variant in VARIANTS if variant.artifact is spec and variant.device == "cpu"]
        return api.check_parity(spoilt, variants=names, batch_sizes=sizes, dataset=self.dataset)


@pytest.fixture
def spoiler(tiny_bundle: Bundle, few: Dataset, tmp_path: Path, vouched: Vouched) -> Spoiler:
    return Spoiler(tiny_bundle, few, tmp_path, vouched)


def nothing(module: nn.Module) -> nn.Module:
    return module


def one_weight_off(module: nn.Module) -> nn.Module:
    weight = module.get_parameter("conv2.weight")
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


def classes_swapped(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name in ("fc3.weight", "fc3.bias"):
            module.get_parameter(name)[[0, 1]] = module.get_parameter(name)[[1, 0]]
    return module


def fewer_classes(module: nn.Module) -> nn.Module:
    module.fc3 = nn.Linear(16, 7)
    return module


def softmax_appended(module: nn.Module) -> nn.Module:
    return nn.Sequential(module, nn.Softmax(dim=1))


class Scaled(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.module(image / 255)
        return scores


FAULTS: tuple[tuple[Callable[[nn.Module], nn.Module], str, str], ...] = (
    (one_weight_off, "conv2", "times the budget"),
    (bias_dropped, "fc3", "times the budget"),
    (other_pooling, "pool1", "times the budget"),
    (other_activation, "conv1", "times the budget"),
    (one_weight_nan, "fc2", "NaN or infinite"),
    (classes_swapped, "fc3", "times the budget"),
    (softmax_appended, "output", "times the budget"),
    (Scaled, "input", "times the budget"),
)
each_format = pytest.mark.parametrize("spec", [TRACE, ONNX_TS], ids=lambda spec: spec.name)


@each_format
def test_an_artifact_rebuilt_without_a_fault_passes(spec: ArtifactSpec, spoiler: Spoiler, tiny: Checkpoint, faulty: Faulty) -> None:
    report = spoiler.report(spec, faulty(spec, tiny, tiny.module()))
    assert {result.status for result in report.results} == {"pass"}
    assert report.verdict == "pass"


@each_format
@pytest.mark.parametrize(("fault", "layer", "reason"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
def test_a_fault_fails_and_the_results_say_what_and_in_which_layer(
    spec: ArtifactSpec, fault: Callable[[nn.Module], nn.Module], layer: str, reason: str, spoiler: Spoiler, tiny: Checkpoint, faulty: Faulty
) -> None:
    report = spoiler.report(spec, faulty(spec, tiny, fault(tiny.module())))
    assert report.verdict == "fail"
    outputs = [result for result in report.results if result.check == "outputs" and result.inputs == "digits test split"]
    assert {result.status for result in outputs} == {"fail"}
    for result in outputs:
        assert reason in (result.reason or "")
        assert result.first_divergent_layer == layer
    traced = [result for result in report.results if result.layers and result.inputs == "digits test split"]
    assert len(traced) == 1
    first = next(error for error in traced[0].layers if not error.passed)
    assert first.layer == layer


@each_format
def test_other_weights_are_found_without_running_and_named_by_their_layer(
    spec: ArtifactSpec, spoiler: Spoiler, tiny: Checkpoint, faulty: Faulty
) -> None:
    module = tiny.module()
    with torch.no_grad():  # one bit, far below what any score shows
        weight = module.get_parameter("fc1.weight").view(-1)
        weight[7] = torch.nextafter(weight[7], weight.new_tensor(1.0))
    report = spoiler.report(spec, faulty(spec, tiny, module))
    wrong = [result for result in report.results if result.status == "fail"]
    assert [(result.check, result.inputs, result.first_divergent_layer) for result in wrong] == [("weights", "weights read back", "fc1")]
    assert report.verdict == "fail"


def test_another_number_of_classes_fails_by_its_shape(spoiler: Spoiler, tiny: Checkpoint, faulty: Faulty) -> None:
    report = spoiler.report(TRACE, faulty(TRACE, tiny, fewer_classes(tiny.module())))
    first = next(result for result in report.results if result.check == "outputs")
    assert "output has shape (1, 7), the oracle (1, 10)" in (first.reason or "")
    assert {result.status for result in report.results if result.check == "outputs"} == {"fail"}


def test_a_fault_in_one_artifact_fails_that_artifacts_variants_and_no_other(
    tiny_bundle: Bundle, few: Dataset, vouched: Vouched, tiny: Checkpoint, faulty: Faulty, tmp_path: Path
) -> None:
    spoilt = vouched(tiny_bundle, tmp_path / "spoilt", TRACE, faulty(TRACE, tiny, bias_dropped(tiny.module())))
    report = api.check_parity(spoilt, batch_sizes=(1,), device="cpu", dataset=few)
    assert {result.variant for result in report.results if result.status == "fail"} == {"torchscript/torch-cpu/fp32/trace"}
    assert report.verdict == "fail"


def test_a_frozen_batch_dimension_fails_at_every_other_batch_size(spoiler: Spoiler, tiny: Checkpoint, faulty: Faulty) -> None:
    model = onnx.load_from_string(faulty(ONNX_TS, tiny, tiny.module()))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    report = spoiler.report(ONNX_TS, model.SerializeToString(), (1, 2, 4))
    outputs = [result for result in report.results if result.check == "outputs"]
    assert {(result.batch_size, result.status) for result in outputs} == {(1, "fail"), (2, "pass"), (4, "fail")}
    assert all(f"does not run at batch {result.batch_size}" in (result.reason or "") for result in outputs if result.status == "fail")


def test_an_onnx_graph_with_a_second_input_fails_and_does_not_raise(spoiler: Spoiler, tiny: Checkpoint, faulty: Faulty) -> None:
    model = onnx.load_from_string(faulty(ONNX_TS, tiny, tiny.module()))
    model.graph.input.append(onnx.helper.make_tensor_value_info("another", onnx.TensorProto.FLOAT, [1]))
    model.graph.node.append(onnx.helper.make_node("Relu", ["another"], ["unused"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("unused", onnx.TensorProto.FLOAT, [1]))
    report = spoiler.report(ONNX_TS, model.SerializeToString())
    assert [result.reason for result in report.results if result.check == "outputs"] != []
    assert {result.status for result in report.results if result.check == "outputs"} == {"fail"}


@each_format
@pytest.mark.parametrize("data", [b"", b"no artifact"], ids=["empty", "foreign"])
def test_bytes_that_the_manifest_vouches_for_but_no_runtime_reads_are_a_mismatch(spec: ArtifactSpec, data: bytes, spoiler: Spoiler) -> None:
    report = spoiler.report(spec, data)
    assert {result.status for result in report.results} == {"fail"}
    assert any("cannot be opened" in (result.reason or "") for result in report.results)
    assert report.verdict == "fail"


@each_format
def test_bytes_that_the_manifest_does_not_vouch_for_are_bad_input_and_not_a_mismatch(
    spec: ArtifactSpec, tiny_bundle: Bundle, few: Dataset, vouched: Vouched, tmp_path: Path
) -> None:
    copy = vouched(tiny_bundle, tmp_path / "copy", spec, b"x")
    (copy.path / spec.path).write_bytes(b"y")
    with pytest.raises(DamagedFile, match="sha256"):
        api.check_parity(copy, batch_sizes=(1,), device="cpu", dataset=few)


def test_a_bundle_of_an_older_version_that_records_no_tensors_fails_and_says_what_to_do(
    tiny_bundle: Bundle, few: Dataset, tmp_path: Path
) -> None:
    copy = open_bundle(shutil.copytree(tiny_bundle.path, tmp_path / "copy"))
    bare = tuple(
        dataclasses.replace(each, details={key: value for key, value in each.details.items() if key != "tensors"})
        for each in copy.manifest.artifacts
    )
    write_manifest(copy.path, dataclasses.replace(copy.manifest, artifacts=bare))
    report = api.check_parity(copy.path, variants=("*cpu*",), batch_sizes=(1,), dataset=few)
    wrong = [result for result in report.results if result.status == "fail"]
    assert {result.check for result in wrong} == {"weights"}
    assert all("export the bundle again" in (result.reason or "") for result in wrong)


def test_the_data_set_of_the_bundle_is_used_where_none_is_given(tiny_bundle: Bundle) -> None:
    report = api.check_parity(tiny_bundle, variants=("eager/*cpu*",), batch_sizes=(64,))
    decided = next(result for result in report.results if result.decisions)
    assert decided.inputs == "digits test split"
    assert decided.decisions is not None
    assert decided.decisions.images == 360
    assert report.notes == ()


@without_gpu
def test_a_device_that_does_not_work_here_is_unusable(tiny_bundle: Bundle) -> None:
    with pytest.raises(Unusable):
        api.check_parity(tiny_bundle, device="cuda")


# The report itself.


def result(status: str, variant: str = "some/variant-cpu/fp32", inputs: str | None = None) -> ParityResult:
    return ParityResult(variant, status, inputs=inputs, node_providers=(NodePlacement("node", "provider"),))


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
    assert ParityReport(tuple(map(result, statuses)), (), ENVIRONMENT).verdict == verdict


def test_only_whole_variants_that_were_skipped_did_not_run_and_only_required_ones_of_them_are_missing() -> None:
    partly, away, other = result("skipped", "a", "large"), result("skipped", "b"), result("skipped", "c")
    report = ParityReport((result("pass", "a"), partly, away, other), (), ENVIRONMENT, required=("a", "b"))
    assert report.not_run == (away, other)
    assert report.missing == (away,)
    assert report.verdict == "pass"
