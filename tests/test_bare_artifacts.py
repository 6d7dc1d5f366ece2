"""Files that were exported elsewhere: what they take is read, what cannot be used is refused, the rest is measured and compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from lenet_deploy import api, store
from lenet_deploy.bench.plan import Plan
from lenet_deploy.bench.run import sizes_for
from lenet_deploy.bench.scopes import bench_images
from lenet_deploy.bench.worker import measure
from lenet_deploy.bundle import Bundle
from lenet_deploy.checkpoint import Checkpoint, to_bytes
from lenet_deploy.data import Dataset
from lenet_deploy.errors import BadInput, DamagedFile, first_line
from lenet_deploy.exporters import METADATA_KEY, ExportOptions
from lenet_deploy.exporters.onnx import DIGEST_KEY, content_digest, export_torchscript
from lenet_deploy.parity.judge import PAIR_TOLERANCE, differ
from lenet_deploy.quiet import quiet_exporter, quiet_torchscript
from lenet_deploy.records import PlainInput
from lenet_deploy.report.bench import bench_markdown, remarks
from lenet_deploy.sources import open_path, open_source
from lenet_deploy.variants import ONNX_TS

SHAPE = (3, 9, 7)
ORT, SCRIPT = "onnx/ort-cpu/fp32", "torchscript/torch-cpu/fp32/trace"


class Mean(nn.Module):
    """Over height and width, whatever these are."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


class Root(nn.Module):
    """NaN where a score is negative."""

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.sqrt()


def network(scores: int = 5) -> nn.Sequential:
    """A network that is no LeNet and whose file says nothing of this project."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), Mean(), nn.Linear(4, scores)).eval()


def to_onnx(module: nn.Module, path: Path, shape: tuple[int, ...] = SHAPE, open_axes: tuple[int, ...] = (0,)) -> Path:
    """By the quicker exporter, with an input of another name than ours."""
    axes = {"pixels": {axis: f"axis{axis}" for axis in open_axes}}
    with quiet_exporter(), torch.no_grad():
        torch.onnx.export(module, (torch.zeros(2, *shape),), path, input_names=["pixels"], dynamo=False, dynamic_axes=axes)
    return path


def to_torchscript(module: nn.Module, path: Path, shape: tuple[int, ...] = SHAPE) -> Path:
    with quiet_torchscript():
        torch.jit.save(torch.jit.trace(module, torch.zeros(2, *shape), check_trace=False), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One network, exported in the ways that others use."""
    root, module = tmp_path_factory.mktemp("foreign"), network()
    with quiet_exporter(), torch.no_grad():
        torch.onnx.export(module, (torch.zeros(2, *SHAPE),), root / "fixed.onnx", dynamo=True, verbose=False)  # weights in a second file
    to_onnx(module, root / "any.onnx")
    to_onnx(module, root / "open.onnx", open_axes=(0, 2, 3))
    to_torchscript(module, root / "traced.pt")
    return root


# What a file says of itself.


def test_what_a_graph_takes_is_read_from_it(folder: Path) -> None:
    found = {name: open_path(folder / name) for name in ("any.onnx", "fixed.onnx")}
    assert [(each.input, each.batch_size) for each in found.values()] == [(PlainInput(SHAPE), None), (PlainInput(SHAPE), 2)]
    assert all(each.metadata is None for each in found.values())
    assert [variant.name for variant in found["any.onnx"].variants] == [ORT, "onnx/ort-cuda/fp32"]


@pytest.mark.parametrize(("name", "known"), [("open.onnx", r"3 x \? x \?"), ("traced.pt", r"\? x \? x \?")])
def test_a_file_that_does_not_say_needs_the_input_shape(name: str, known: str, folder: Path) -> None:
    with pytest.raises(BadInput, match=rf"{name}: it does not say what images it takes \({known}\); add --input-shape C,H,W"):
        open_path(folder / name)
    assert open_path(folder / name, (3, 20, 20)).input == PlainInput((3, 20, 20))


@pytest.mark.parametrize("asked", [(3, 9, 8), (1, 9, 7)])
def test_another_input_shape_than_the_file_says_is_refused(asked: tuple[int, int, int], folder: Path) -> None:
    with pytest.raises(BadInput, match="takes images of 3 x 9 x 7"):
        open_path(folder / "any.onnx", asked)


def test_weights_in_a_file_beside_the_graph_are_read_into_it(folder: Path) -> None:
    outside = onnx.load(folder / "fixed.onnx", load_external_data=False)
    assert any(tensor.data_location == TensorProto.EXTERNAL for tensor in outside.graph.initializer), "what this test is about"
    source = open_path(folder / "fixed.onnx")
    whole = onnx.load_from_string(source.read(source.variants[0]))
    expected = onnx.load(folder / "fixed.onnx")
    for mine, theirs in zip(whole.graph.initializer, expected.graph.initializer, strict=True):
        assert mine.data_location == TensorProto.DEFAULT
        assert onnx.numpy_helper.to_array(mine).tobytes() == onnx.numpy_helper.to_array(theirs).tobytes()


def moved_outside(folder: Path, tmp_path: Path, **entries: str) -> Path:
    model = onnx.load(folder / "fixed.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = entries.get(entry.key, entry.value)
    (tmp_path / "fixed.onnx.data").write_bytes((folder / "fixed.onnx.data").read_bytes())
    path = tmp_path / "moved.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "link", "absent", ""])
def test_weights_outside_the_folder_are_never_read(location: str, folder: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "secret").write_bytes(bytes(4096))
    (inner / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(BadInput, match=r"moved\.onnx"):
        open_path(moved_outside(folder, inner, location=location))


@pytest.mark.parametrize("entries", [{"offset": "999999"}, {"length": "-1"}, {"offset": "many"}])
def test_weights_that_are_not_all_there_are_damaged(entries: dict[str, str], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DamagedFile, match="beyond the end"):
        open_path(moved_outside(folder, tmp_path, **entries))


def graph(
    path: Path, inputs: dict[str, tuple[int, list[int | str]]], outputs: dict[str, tuple[int, list[int | str]]], op: str = "Relu"
) -> Path:
    domain = "my.ops" if op == "Mine" else ""
    node = helper.make_node(op, list(inputs)[:1], list(outputs)[:1], domain=domain)
    values = [[helper.make_tensor_value_info(name, *each) for name, each in side.items()] for side in (inputs, outputs)]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("my.ops", 1)]
    path.write_bytes(helper.make_model(helper.make_graph([node], "g", *values), opset_imports=opsets, ir_version=8).SerializeToString())
    return path


IMAGES, SCORES = (TensorProto.FLOAT, ["n", 3, 9, 7]), (TensorProto.FLOAT, ["n", 3, 9, 7])
REFUSED = {
    "two inputs": ({"x": IMAGES, "y": IMAGES}, {"z": SCORES}, r"takes 2 inputs \(x, y\)"),
    "two outputs": ({"x": IMAGES}, {"y": SCORES, "x2": SCORES}, r"gives 2 outputs \(y, x2\)"),
    "no input": ({}, {"y": SCORES}, r"takes 0 inputs \(none\)"),
    "whole numbers": ({"x": (TensorProto.INT64, ["n", 3, 9, 7])}, {"y": SCORES}, "x, which it takes, is int64"),
    "half precision": ({"x": IMAGES}, {"y": (TensorProto.FLOAT16, ["n", 3])}, "y, which it gives, is float16"),
    "flat": ({"x": (TensorProto.FLOAT, ["n", 784])}, {"y": SCORES}, "input x has 2 dimensions"),
    "enormous": ({"x": (TensorProto.FLOAT, ["n", 3, 10**6, 10**6])}, {"y": SCORES}, "3,000,000,000,000 values"),
    "enormous output": ({"x": IMAGES}, {"y": (TensorProto.FLOAT, ["n", 10**9])}, "1,000,000,000 values"),
    "enormous batch": ({"x": (TensorProto.FLOAT, [10**7, 3, 9, 7])}, {"y": SCORES}, "its batch of 10000000"),
    "nothing": ({"x": (TensorProto.FLOAT, ["n", 0, 9, 7])}, {"y": SCORES}, "impossible shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_graph_that_is_no_classifier_of_images_is_refused_by_name(case: str, tmp_path: Path) -> None:
    inputs, outputs, said = REFUSED[case]
    with pytest.raises(BadInput, match=said):
        open_path(graph(tmp_path / "odd.onnx", inputs, outputs, "Constant" if not inputs else "Relu"))


@pytest.mark.parametrize("content", [b"", b"a text that calls itself a graph", b"\x08\x08"])
def test_what_is_no_graph_is_damaged(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"text\.onnx: not a readable ONNX file"):
        open_path(tmp_path / "text.onnx")


def test_an_operator_that_the_runtime_does_not_have_is_named(folder: Path, tmp_path: Path) -> None:
    odd = graph(tmp_path / "odd.onnx", {"x": IMAGES}, {"y": SCORES}, "Mine")
    with pytest.raises(DamagedFile, match=r"odd\.onnx.*my\.ops:Mine"):
        api.check_pair(odd, folder / "any.onnx", device="cpu")


class Two(nn.Module):
    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return images + others


class Pair(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images, images


class Number(nn.Module):
    def forward(self, count: int) -> int:
        return count


class Silent(nn.Module):
    """Has no forward of its own."""

    @torch.jit.export
    def score(self, images: torch.Tensor) -> torch.Tensor:
        return images


@pytest.mark.parametrize(("module", "said"), [(Two, "others"), (Pair, "Tensor, Tensor"), (Number, "int count"), (Silent, "no forward")])
def test_a_torchscript_file_of_another_kind_of_forward_is_refused(module: Callable[[], nn.Module], said: str, tmp_path: Path) -> None:
    with quiet_torchscript():
        torch.jit.save(torch.jit.script(module()), tmp_path / "odd.pt")
    with pytest.raises(BadInput, match=rf"odd\.pt: .*{said}"):
        open_path(tmp_path / "odd.pt", SHAPE)


def test_what_torchscript_says_last_is_what_went_wrong(folder: Path) -> None:
    with quiet_torchscript():
        module = torch.jit.load(folder / "traced.pt")
    with pytest.raises(RuntimeError) as caught:
        module(torch.zeros(1, 1, 9, 7))
    assert "channels" in first_line(caught.value)


# bench


@pytest.mark.parametrize("shape", [SHAPE, (1, 28, 28), (2, 1, 30)])
def test_the_clock_has_images_of_any_shape(shape: tuple[int, int, int]) -> None:
    images = bench_images(4, PlainInput(shape))
    assert (images.shape, images.dtype) == ((4, *shape), torch.uint8)
    assert images.float().std() > 10


def test_a_graph_of_one_batch_size_is_measured_at_that_and_has_no_limits(folder: Path) -> None:
    report = api.benchmark(folder / "fixed.onnx", device="cpu", rounds=1, cold_start=True)
    assert [(m.variant, m.batch_size, m.scope) for m in report.measurements] == [(ORT, 2, "device"), (ORT, 2, "e2e")]
    for m in report.measurements:
        assert m.median_s > 0
        assert m.size_bytes > 500, "the weights beside it count"
        assert (m.accuracy, m.floors_s, m.limit_fraction, m.bound, m.overhead_s) == (None, {}, None, None, None)
        assert m.node_providers
    [cold] = report.cold_starts
    assert cold.batch_size == 2
    assert report.limits, "of the device"
    assert report.options["input_shape"] == [3, 9, 7]
    [said] = [line for line in remarks(report) if "alone" in line]
    assert said == "the graph is made for batches of 2 alone, so no other was measured"
    assert said in bench_markdown(report)
    assert json.loads(store.bench_json(report))["measurements"][0]["limit_fraction"] is None


def test_our_own_artifact_is_measured_on_its_own_and_in_its_bundle(tiny_bundle: Bundle, tmp_path: Path) -> None:
    alone = tmp_path / "model.onnx"
    alone.write_bytes((tiny_bundle.path / ONNX_TS.path).read_bytes())
    (tmp_path / "manifest.json").write_bytes((tiny_bundle.path / "manifest.json").read_bytes())  # of a bundle that does not list it
    report = api.benchmark(alone, device="cpu", rounds=1, batch_sizes=(1,), scopes=("device",))
    [row] = report.measurements
    assert (row.variant, row.accuracy) == (ORT, None)
    assert row.limit_fraction is not None, "its metadata says what it computes"
    assert "input_shape" not in report.options
    listed = open_path(tiny_bundle.path / ONNX_TS.path)
    assert [variant.artifact for variant in listed.variants] == [ONNX_TS] * 2


def test_a_file_that_is_replaced_meanwhile_ends_the_run(folder: Path) -> None:
    plan = Plan(str(folder / "any.onnx"), "cpu", (ORT,), {ORT: (1,)}, ("device",), 1, 1, True, 0.01, 0.1, 1.0, 0, digest="0" * 64)
    with pytest.raises(DamagedFile, match="replaced while it was measured"):
        measure(plan, 0, lambda event: None)


def test_other_batch_sizes_than_the_only_one_are_refused(folder: Path) -> None:
    fixed = open_path(folder / "fixed.onnx")
    assert sizes_for(fixed, None, (1, 8)) == sizes_for(fixed, (2,), (1, 8)) == (2,)
    for wrong in (lambda: sizes_for(fixed, (1, 2), (1,)), lambda: api.benchmark(folder / "fixed.onnx", sweep=True)):
        with pytest.raises(BadInput, match="takes batches of 2 alone"):
            wrong()
    with pytest.raises(BadInput, match="a scenario needs any"):
        api.load_test(folder / "fixed.onnx", "offline")


# parity of two files


def test_two_exports_of_one_network_are_equal(folder: Path) -> None:
    report = api.check_pair(folder / "any.onnx", folder / "traced.pt", input_shape=SHAPE, device="cpu", batch_sizes=(1, 3))
    assert report.verdict == "pass"
    assert {result.variant for result in report.results} == {SCRIPT}
    assert {(result.inputs, result.batch_size) for result in report.results} >= {("one-hot pixels", 1), ("constants", 3)}
    assert all((result.budget_used or 0) < 0.5 for result in report.results)
    assert "neither is known to be right" in report.notes[0]
    again = api.check_pair(folder / "traced.pt", folder / "fixed.onnx", input_shape=SHAPE, device="cpu")
    assert (again.verdict, {result.batch_size for result in again.results}) == ("pass", {2})


def other(change: str, path: Path) -> Path:
    module = network()
    if change == "weight":
        module[0].weight.data[1, 1] *= 1.001
    elif change == "channels":
        module[0].weight.data = module[0].weight.data.flip(1)
    else:
        module.append(Root())
    return to_onnx(module, path)


@pytest.mark.parametrize(("change", "said"), [("weight", "times what is allowed"), ("channels", "times what"), ("NaN", "NaN or infinite")])
def test_a_file_that_computes_something_else_fails(change: str, said: str, folder: Path, tmp_path: Path) -> None:
    changed = other(change, tmp_path / "changed.onnx")
    for sides in ((folder / "any.onnx", changed), (changed, folder / "any.onnx")):
        report = api.check_pair(*sides, device="cpu", batch_sizes=(1, 8))
        assert report.verdict == "fail"
        assert any(said in (result.reason or "") for result in report.results)


def test_a_wide_tolerance_is_the_callers_to_choose(folder: Path, tmp_path: Path) -> None:
    changed = other("weight", tmp_path / "changed.onnx")
    assert api.check_pair(folder / "any.onnx", changed, device="cpu", batch_sizes=(8,), tolerance=0.05).verdict == "pass"
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(BadInput, match="must be a number above 0"):
            api.check_pair(folder / "any.onnx", changed, tolerance=wrong)


def test_files_of_other_inputs_or_outputs_are_not_compared(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"3 x 9 x 7 and .* images of 3 x 9 x 9"):
        api.check_pair(folder / "any.onnx", to_onnx(network(), tmp_path / "large.onnx", (3, 9, 9)))
    with pytest.raises(BadInput, match=r"gives 7 scores an image, and .* 5"):
        api.check_pair(folder / "any.onnx", to_torchscript(network(7), tmp_path / "wide.pt"), input_shape=SHAPE, device="cpu")
    with pytest.raises(DamagedFile, match=r"traced\.pt.*does not run at batch 1: .*channels"):
        api.check_pair(folder / "traced.pt", folder / "traced.pt", input_shape=(1, 9, 7), device="cpu", batch_sizes=(1,))


def test_real_images_need_the_shape_where_the_preprocessing_is_not_known(digits: Dataset, few: Dataset, tmp_path: Path) -> None:
    small = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    a, b = to_onnx(small, tmp_path / "a.onnx", (1, 8, 8)), to_torchscript(small, tmp_path / "b.pt", (1, 8, 8))
    report = api.check_pair(a, b, input_shape=(1, 8, 8), device="cpu", dataset=few, batch_sizes=(8,))
    assert (report.verdict, report.results[0].inputs) == ("pass", "digits test split")
    wide = to_onnx(nn.Sequential(nn.Flatten(), nn.Linear(81, 3)).eval(), tmp_path / "wide.onnx", (1, 9, 9))
    with pytest.raises(BadInput, match="images of 1 x 8 x 8, and these files take 1 x 9 x 9"):
        api.check_pair(wide, wide, device="cpu", dataset=digits)


def test_a_checkpoint_on_either_side_brings_its_oracle(tiny: Checkpoint, few: Dataset, tmp_path: Path) -> None:
    saved, shape = tmp_path / "tiny.safetensors", tiny.preprocessing.input_shape
    saved.write_bytes(to_bytes(tiny))
    good = to_onnx(tiny.module(), tmp_path / "good.onnx", shape)
    for sides in ((saved, good), (good, saved)):
        report = api.check_pair(*sides, device="cpu", dataset=few, batch_sizes=(1, 3))
        assert report.verdict == "pass"
        assert {result.check for result in report.results} >= {"outputs", "consistency", "isolation", "decisions"}
    fixed = api.check_pair(saved, to_onnx(tiny.module(), tmp_path / "fixed.onnx", shape, ()), device="cpu", dataset=few)
    assert (fixed.verdict, {result.batch_size for result in fixed.results} - {None}) == ("pass", {2})
    module = tiny.module()
    module.get_submodule("fc2").weight.data[0] *= 1.01
    report = api.check_pair(saved, to_onnx(module, tmp_path / "bad.onnx", shape), device="cpu", dataset=few, batch_sizes=(3,))
    assert report.verdict == "fail"
    assert {result.first_divergent_layer for result in report.results if result.status == "fail"} - {None} == {"fc2"}
    with pytest.raises(BadInput, match="leave the tolerance out"):
        api.check_pair(saved, good, tolerance=0.1)


def test_another_architecture_than_the_checkpoints_fails_without_a_defect(tiny: Checkpoint, few: Dataset, tmp_path: Path) -> None:
    saved, shape = tmp_path / "tiny.safetensors", tiny.preprocessing.input_shape
    saved.write_bytes(to_bytes(tiny))
    strange = nn.Sequential(nn.Flatten(), nn.Linear(shape[1] * shape[2], 10), nn.Softmax(1)).eval()
    for path in (to_onnx(strange, tmp_path / "s.onnx", shape), to_torchscript(strange, tmp_path / "s.pt", shape)):
        assert api.check_pair(saved, path, input_shape=shape, device="cpu", dataset=few, batch_sizes=(3,)).verdict == "fail"


def test_the_difference_is_judged_image_by_image() -> None:
    reference = torch.tensor([[1.0, -2.0], [100.0, 0.0]])
    within = reference + torch.tensor([[0.0, 1.5e-5], [7e-4, 0.0]])
    assert differ(within, reference, PAIR_TOLERANCE).passed
    small, large = reference + torch.tensor([[2e-5, 0.0], [0.0, 0.0]]), reference + torch.tensor([[0.0, 0.0], [0.0, 1e-3]])
    assert (differ(small, reference, PAIR_TOLERANCE).passed, differ(large, reference, PAIR_TOLERANCE).worst) == (False, 1)
    assert differ(large, reference, PAIR_TOLERANCE, torch.tensor([1.0, 2.0], dtype=torch.float64)).passed


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_has_to_be_so_on_both_sides(value: float) -> None:
    finite, broken = torch.ones(3, 2), torch.ones(3, 2)
    broken[1, 0] = value
    assert differ(broken, broken.clone(), PAIR_TOLERANCE).passed
    for output, reference in ((finite, broken), (broken, finite), (broken, -broken)):
        assert differ(output, reference, PAIR_TOLERANCE).passed is False
    assert differ(broken[1:2], broken[1:2], PAIR_TOLERANCE).max_abs_error is None


def test_scores_too_small_for_float32_are_equal() -> None:
    assert differ(torch.zeros(1, 2), torch.tensor([[1e-38, 3e-39]]), PAIR_TOLERANCE).passed
    assert not differ(torch.zeros(1, 2), torch.tensor([[1e-30, 1e-31]]), PAIR_TOLERANCE).passed


def test_our_own_metadata_does_not_let_a_graph_read_from_elsewhere(tiny: Checkpoint, tmp_path: Path) -> None:
    model = onnx.load_from_string(export_torchscript(tiny.module(), tiny.metadata(), ExportOptions()).data)
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, "../secret")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    text = next(each.value for each in model.metadata_props if each.key == METADATA_KEY)
    helper.set_model_props(model, {METADATA_KEY: text, DIGEST_KEY: content_digest(model, text)})
    (tmp_path / "ours.onnx").write_bytes(model.SerializeToString())
    for reader in (open_path, open_source):
        with pytest.raises(BadInput, match="outside its folder"):
            reader(tmp_path / "ours.onnx")
