"""Each check of a variant is made, on the images and batch sizes it promises, and catches the fault it is there for."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from lenet_deploy import store
from lenet_deploy.checkpoint import Checkpoint, to_bytes
from lenet_deploy.data import Dataset, fit, normalise
from lenet_deploy.devices import computing_on
from lenet_deploy.errors import DamagedFile, Misplaced, Unusable
from lenet_deploy.exporters import ExportOptions
from lenet_deploy.exporters.onnx import export_torchscript
from lenet_deploy.exporters.torchscript import export_script
from lenet_deploy.parity.check import ALONE, BATCH_SIZES, SPECIALS, Trial, check_variant, run_batch
from lenet_deploy.parity.inputs import EAGER, input_sets
from lenet_deploy.records import CHECKS, Environment, NodePlacement, ParityReport, ParityResult
from lenet_deploy.runtimes import Session, SessionOptions
from lenet_deploy.runtimes.eager import ModuleSession
from lenet_deploy.runtimes.traces import Trace
from lenet_deploy.variants import ONNX_TS, TRACE, VARIANTS, ArtifactSpec, RuntimeEntry, Variant

CPU = torch.device("cpu")
EAGER_CPU, TRACE_CPU, SCRIPT_CPU, _, ONNX_CPU, *_ = (variant for variant in VARIANTS if variant.device == "cpu")
SIZES = (1, 2, 7)  # the trial's
ENVIRONMENT = Environment("os", "3.11", "cpu", 1, None, None, None, {}, None)
Faulty = Callable[[ArtifactSpec, Checkpoint, nn.Module], bytes]
Step = Callable[[torch.Tensor], torch.Tensor]


def checked(variant: Variant, data: bytes, trial: Trial) -> tuple[ParityResult, ...]:
    with computing_on(CPU):
        return check_variant(variant, data, trial)


def failed(results: tuple[ParityResult, ...]) -> dict[str, list[int | None]]:
    """Batch sizes of the failures, by check."""
    found: dict[str, list[int | None]] = {}
    for result in results:
        if result.status == "fail":
            found.setdefault(result.check, []).append(result.batch_size)
    return found


def scripted(module: nn.Module, checkpoint: Checkpoint) -> bytes:
    return export_script(module.eval(), checkpoint.metadata(), ExportOptions()).data


class Behind(nn.Module):
    """A step behind the scores."""

    def __init__(self, module: nn.Module, step: Step) -> None:
        super().__init__()
        self.module, self.step = module, step

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.step(self.module(image))


# A healthy variant.


def healthy_bytes(variant: Variant, checkpoint: Checkpoint, faulty: Faulty) -> bytes:
    return to_bytes(checkpoint) if variant is EAGER_CPU else faulty(variant.artifact, checkpoint, checkpoint.module())


@pytest.mark.parametrize("variant", [EAGER_CPU, TRACE_CPU, ONNX_CPU], ids=lambda variant: variant.name)
def test_every_check_is_made_on_every_input_set_at_every_batch_size_and_passes(
    variant: Variant, trial: Trial, tiny: Checkpoint, faulty: Faulty
) -> None:
    results = checked(variant, healthy_bytes(variant, tiny, faulty), trial)
    sets, several = [inputs.name for inputs in trial.inputs], SIZES[1:]
    expected = Counter(
        [
            *([("placement", "placement", None)] if variant is ONNX_CPU else []),
            *(("outputs", name, size) for name in sets for size in SIZES),
            *(("consistency", name, size) for name in sets for size in several),
            ("decisions", sets[0], SIZES[-1]),
            *(("permutation", "permuted batch", size) for size in several),
            *(("isolation", f"{name} in one image", size) for name, _ in SPECIALS for size in several),
        ]
    )
    assert Counter((result.check, result.inputs, result.batch_size) for result in results) == expected
    assert {result.status for result in results} == {"pass"}
    assert {result.check for result in results} | {"weights"} | {"placement"} == set(CHECKS)
    assert all(
        (result.variant, result.reason, result.first_divergent_layer, result.layers) == (variant.name, None, None, ()) for result in results
    )


def test_results_carry_all_numbers_of_their_scores(trial: Trial, tiny: Checkpoint, faulty: Faulty) -> None:
    for result in checked(ONNX_CPU, faulty(ONNX_TS, tiny, tiny.module()), trial):
        if result.check in ("outputs", "isolation"):
            assert None not in (result.max_abs_error, result.rmse, result.budget_used, result.mean_abs_error, result.cosine)
            assert 0.0 < (result.budget_used or 0.0) <= 1.0
            assert (result.rmse or 0.0) <= (result.max_abs_error or 0.0)
            assert result.ulp_quantiles is not None
            assert list(result.ulp_quantiles) == ["p50", "p99", "max"]
        if result.check == "decisions":
            assert result.decisions is not None
            assert result.decisions.images == 40
        else:
            assert result.decisions is None
        assert {node.provider for node in result.node_providers} == {"CPUExecutionProvider"}


@pytest.mark.parametrize(("sizes", "checks"), [((1,), {"outputs", "decisions"}), ((3,), set(CHECKS) - {"weights", "placement"})])
def test_a_single_batch_size_has_the_checks_that_it_can(
    sizes: tuple[int, ...], checks: set[str], trial: Trial, tiny: Checkpoint, faulty: Faulty
) -> None:
    results = checked(TRACE_CPU, faulty(TRACE, tiny, tiny.module()), dataclasses.replace(trial, batch_sizes=sizes))
    assert {result.check for result in results} == checks
    assert {result.status for result in results} == {"pass"}
    assert {result.batch_size for result in results} == set(sizes)


def test_the_default_batch_sizes_are_the_documented_ones() -> None:
    assert BATCH_SIZES == (1, 2, 3, 7, 64, 1024)


class Recording:
    """The eager runtime on the CPU, which keeps every batch that was launched."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.batches: list[torch.Tensor] = []

    @contextlib.contextmanager
    def open_session(self, data: bytes, input_shape: tuple[int, int, int], device: str, options: SessionOptions) -> Iterator[Session]:
        yield ModuleSession(self._run, input_shape, CPU)

    def open_traces(
        self, data: bytes, input_shape: tuple[int, int, int], device: str, options: SessionOptions
    ) -> contextlib.AbstractContextManager[dict[str, Trace]]:
        raise Unusable("it hides its intermediate tensors")

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(images.clone())
        scores: torch.Tensor = self.module(images)
        return scores


@pytest.mark.parametrize("sizes", [(1, 2, 7), (7, 1)], ids=str)
def test_the_whole_set_runs_at_the_largest_size_and_its_first_images_at_the_others(
    sizes: tuple[int, ...], trial: Trial, tiny: Checkpoint
) -> None:
    for inputs in trial.inputs:
        recording = Recording(tiny.module())
        variant = dataclasses.replace(EAGER_CPU, runtime=RuntimeEntry("recording", lambda recording=recording: recording))
        results = checked(variant, b"", dataclasses.replace(trial, inputs=(inputs,), batch_sizes=sizes))
        assert {result.status for result in results} == {"pass"}
        batches = iter(recording.batches)
        alone = torch.cat([next(batches) for _ in range(ALONE)])
        assert torch.equal(alone, inputs.images[torch.arange(ALONE) % len(inputs.images)])
        for size in sizes:
            count = -(-len(inputs.images) // size) * size if size == max(sizes) else size
            wanted = inputs.images[torch.arange(count) % len(inputs.images)]
            launched = [next(batches) for _ in range(count // size)]
            assert torch.equal(torch.cat(launched), wanted), "every image, the first ones once more to fill the last batch"
            assert {len(batch) for batch in launched} == {size}, "graphs that are made for one batch size take no other"


def test_a_permuted_batch_holds_the_same_images_in_another_order_and_one_image_alone_is_poisoned(trial: Trial, tiny: Checkpoint) -> None:
    recording = Recording(tiny.module())
    variant = dataclasses.replace(EAGER_CPU, runtime=RuntimeEntry("recording", lambda: recording))
    checked(variant, b"", dataclasses.replace(trial, inputs=trial.inputs[:1], batch_sizes=(7,)))
    straight, permuted, *poisoned = recording.batches[-4:]
    assert torch.equal(straight, trial.inputs[0].images[:7])
    assert not torch.equal(permuted, straight)
    assert sorted(image.sum().item() for image in permuted) == sorted(image.sum().item() for image in straight)
    for batch, (_, value) in zip(poisoned, SPECIALS, strict=True):
        assert torch.equal(batch[[0, 1, 2, 4, 5, 6]], straight[[0, 1, 2, 4, 5, 6]])
        assert torch.equal(batch[3].nan_to_num(12.0), torch.full_like(batch[3], value).nan_to_num(12.0))
    assert trial.inputs[0].images.isfinite().all(), "the set itself is left alone"


def test_run_batch_hands_out_scores_of_its_own(tiny: Checkpoint) -> None:
    buffer = torch.zeros(2, 10)

    class Reusing(ModuleSession):
        def launch(self) -> torch.Tensor:
            return buffer.add_(1.0)

    session = Reusing(tiny.module(), (1, 20, 20), CPU)
    first, second = run_batch(session, torch.zeros(2, 1, 20, 20)), run_batch(session, torch.zeros(2, 1, 20, 20))
    assert (float(first.max()), float(second.max())) == (1.0, 2.0)


# Faults that show in one place only.


class OneImage(nn.Module):
    """Wrong on one image, wherever it stands in a batch."""

    def __init__(self, module: nn.Module, image: torch.Tensor) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("image", image)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hit = (images == self.get_buffer("image")).flatten(1).all(dim=1, keepdim=True)
        scores: torch.Tensor = self.module(images) * (1.0 + 1e-3 * hit.float())
        return scores


@pytest.mark.parametrize(("number", "index"), [(0, 0), (0, 39), (1, 15), (3, 1), (4, 123), (4, 399), (5, 8), (6, 15)])
def test_a_fault_on_one_image_of_a_set_is_caught_there_and_its_layers_are_those_of_that_image(
    number: int, index: int, trial: Trial, tiny: Checkpoint, faulty: Faulty
) -> None:
    inputs = trial.inputs[number]
    results = checked(TRACE_CPU, faulty(TRACE, tiny, OneImage(tiny.module(), inputs.images[index])), trial)
    at_fault = [result for result in results if result.status == "fail" and result.check == "outputs"]
    assert {result.inputs for result in at_fault} == {inputs.name}
    assert {result.batch_size for result in at_fault} == {size for size in SIZES if size > index or size == max(SIZES)}
    largest = at_fault[-1]
    # A batch larger than the set repeats it, and the copies differ by rounding alone.
    named = re.match(r"image (\d+): ", largest.reason or "")
    assert named is not None
    assert int(named[1]) % len(inputs.images) == index
    assert largest.first_divergent_layer == "output"
    assert "begins at output" in (largest.reason or ""), "the traced images hold the one at fault"


class OnlyAt(nn.Module):
    """Wrong at one batch size."""

    def __init__(self, module: nn.Module, size: int) -> None:
        super().__init__()
        self.module = module
        self.size = size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores = self.module(images)
        if images.shape[0] == self.size:
            scores = scores * 1.01
        return scores


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_fault_at_one_batch_size_is_caught_at_that_size_and_batches_disagree_with_images_alone(
    size: int, trial: Trial, tiny: Checkpoint
) -> None:
    even = dataclasses.replace(trial, batch_sizes=(1, 2, 8))  # every set has a multiple of eight images, so that no smaller batch is left
    results = checked(SCRIPT_CPU, scripted(OnlyAt(tiny.module(), size), tiny), even)
    wrong = failed(results)
    assert set(wrong["outputs"]) == {size}
    assert set(wrong["consistency"]) == ({2, 8} if size == 1 else {size})
    if size > 1:
        assert set(wrong["isolation"]) == {size}
    assert "permutation" not in wrong


def row_repeated(scores: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(scores.shape[0])
    return scores[torch.where(rows == 5, rows - 1, rows)]


ACROSS: dict[str, tuple[Step, set[str], set[int | None]]] = {
    # fault, checks that have to fail, batch sizes at which they do
    "a row that is another's": (row_repeated, {"outputs", "consistency", "permutation", "isolation", "decisions"}, {7}),
    "rows reversed": (lambda scores: scores.flip(0), {"outputs", "consistency", "isolation"}, {2, 7}),
    "rows rolled": (lambda scores: scores.roll(1, 0), {"outputs", "consistency", "permutation", "isolation"}, {2, 7}),
    "drawn to the mean of the batch": (
        lambda s: s + 0.001 * (s.mean(0, keepdim=True) - s),
        {"outputs", "consistency", "isolation"},
        {2, 7},
    ),
    "scaled by the batch": (lambda scores: scores / scores.abs().max() * 3.0, {"outputs", "consistency", "isolation"}, {1, 2, 7}),
    "NaN and infinity reach the batch": (lambda scores: scores + 0.0 * scores.sum(), {"isolation"}, {2, 7}),
}


@pytest.mark.parametrize("spec", [TRACE, ONNX_TS], ids=lambda spec: spec.format)
@pytest.mark.parametrize("fault", ACROSS)
def test_a_fault_across_the_batch_is_caught_by_the_checks_of_batches(
    fault: str, spec: ArtifactSpec, trial: Trial, tiny: Checkpoint, faulty: Faulty
) -> None:
    step, checks, sizes = ACROSS[fault]
    variant = TRACE_CPU if spec is TRACE else ONNX_CPU
    wrong = failed(checked(variant, faulty(spec, tiny, Behind(tiny.module(), step)), trial))
    assert wrong.keys() >= checks
    assert {size for check in checks for size in wrong[check]} <= sizes | {7}
    if checks == {"isolation"}:
        assert wrong.keys() == {"isolation"}, "every other check passes"


class Noisy(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores = self.module(images)
        return scores + 1e-3 * torch.randn_like(scores)


def test_scores_that_differ_from_launch_to_launch_are_caught_by_every_check_that_launches_twice(trial: Trial, tiny: Checkpoint) -> None:
    wrong = failed(checked(SCRIPT_CPU, scripted(Noisy(tiny.module()), tiny), trial))
    assert wrong.keys() >= {"outputs", "consistency", "permutation", "isolation"}


class OrderMatters(nn.Module):
    """Wrong, or refused, where one image comes first: in no straight batch of the test split."""

    def __init__(self, module: nn.Module, first: torch.Tensor, refuse: bool) -> None:
        super().__init__()
        self.module = module
        self.refuse = refuse
        self.register_buffer("first", first)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores = self.module(images)
        if images.shape[0] > 2 and bool((images[0] == self.first).all()):
            if self.refuse:
                raise RuntimeError("not this order")
            scores = scores * 1.01
        return scores


@pytest.mark.parametrize("refuse", [False, True], ids=["wrong", "refused"])
def test_a_fault_that_only_another_order_shows_is_caught_by_the_permutation(refuse: bool, trial: Trial, tiny: Checkpoint) -> None:
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    assert int(order[0]) not in (0, 7), "the premise: another image comes first"
    module = OrderMatters(tiny.module(), trial.inputs[0].images[order[0]], refuse)
    results = checked(SCRIPT_CPU, scripted(module, tiny), trial)
    assert failed(results) == {"permutation": [7]}
    reason = next(result.reason for result in results if result.status == "fail")
    assert ("does not run at batch 7" if refuse else "its scores differ") in (reason or "")


class PixelIgnored(nn.Module):
    def __init__(self, module: nn.Module, pixel: int) -> None:
        super().__init__()
        self.module = module
        mask = torch.ones(1, 1, 20, 20)
        mask.view(-1)[pixel] = 0.0
        self.register_buffer("mask", mask)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.module(images * self.get_buffer("mask"))
        return scores


@pytest.mark.parametrize("spec", [TRACE, ONNX_TS], ids=lambda spec: spec.format)
@pytest.mark.parametrize("pixel", [123, 399])
def test_a_pixel_that_the_graph_ignores_is_named_by_the_one_hot_images(
    spec: ArtifactSpec, pixel: int, trial: Trial, tiny: Checkpoint, faulty: Faulty
) -> None:
    variant = TRACE_CPU if spec is TRACE else ONNX_CPU
    results = checked(variant, faulty(spec, tiny, PixelIgnored(tiny.module(), pixel)), trial)
    (found,) = [result for result in results if result.status == "fail" and result.inputs == "one-hot pixels"]
    assert (found.check, found.batch_size, found.first_divergent_layer) == ("outputs", 7, "input")
    assert (found.reason or "").startswith(f"image {pixel}: ")


def test_permuted_classes_are_caught_by_the_decisions_too(trial: Trial, tiny: Checkpoint, faulty: Faulty) -> None:
    results = checked(TRACE_CPU, faulty(TRACE, tiny, Behind(tiny.module(), lambda scores: scores.roll(1, 1))), trial)
    (decided,) = [result for result in results if result.check == "decisions"]
    assert (decided.status, decided.top1_agreement) == ("fail", 0.0)
    assert decided.decisions is not None
    assert decided.decisions.true_flips == 40
    assert "40 of 40 images get another class" in (decided.reason or "")
    assert decided.first_divergent_layer == "output"


def test_a_failure_has_its_layers_once_an_input_set_and_its_layer_each_time(trial: Trial, tiny: Checkpoint, faulty: Faulty) -> None:
    module = tiny.module()
    with torch.no_grad():
        module.get_parameter("conv2.weight").mul_(1.01)
    results = checked(TRACE_CPU, faulty(TRACE, tiny, module), trial)
    wrong = [result for result in results if result.status == "fail"]
    assert {result.first_divergent_layer for result in wrong if result.check == "outputs"} == {"conv2"}
    with_layers = [result for result in results if result.layers]
    assert [result.inputs for result in with_layers] == [inputs.name for inputs in trial.inputs]
    assert all(result is next(each for each in wrong if each.inputs == result.inputs) for result in with_layers)
    assert all(result.first_divergent_layer is None for result in wrong if result.check == "isolation")


def test_a_drill_shows_the_layers_of_a_healthy_variant_once_on_the_first_set(trial: Trial, tiny: Checkpoint, faulty: Faulty) -> None:
    results = checked(TRACE_CPU, faulty(TRACE, tiny, tiny.module()), dataclasses.replace(trial, drill=True))
    assert [(result.inputs, result.check, result.batch_size) for result in results if result.layers] == [
        ("digits test split", "outputs", 1)
    ]
    assert {result.status for result in results} == {"pass"}
    assert all(result.first_divergent_layer is None for result in results)


# What cannot run, or not in full.


class Refusing:
    """A runtime that opens nothing."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def open_session(
        self, data: bytes, input_shape: tuple[int, int, int], device: str, options: SessionOptions
    ) -> contextlib.AbstractContextManager[Session]:
        raise self.error


def refusing(error: Exception) -> Variant:
    return dataclasses.replace(EAGER_CPU, runtime=RuntimeEntry("refusing", lambda: Refusing(error)))  # type: ignore[arg-type, return-value]


def test_a_variant_that_cannot_run_here_is_skipped_with_one_result(trial: Trial) -> None:
    (result,) = checked(refusing(Unusable("no such device; buy one")), b"", trial)
    assert (result.status, result.reason, result.inputs, result.batch_size) == ("skipped", "no such device; buy one", None, None)


def test_bytes_that_cannot_be_opened_fail_with_one_result(trial: Trial) -> None:
    (result,) = checked(refusing(DamagedFile("it is broken")), b"", trial)
    assert (result.status, result.reason, result.inputs) == ("fail", "the artifact cannot be opened: it is broken", None)


def test_a_misplaced_node_is_a_failed_placement_that_names_the_nodes(trial: Trial) -> None:
    # A provider that runs part of a graph needs a device that cannot be had here, so the runtime is made up; its error is the real one's.
    nodes = (NodePlacement("conv", "CUDAExecutionProvider"), NodePlacement("shape", "CPUExecutionProvider"))
    error = Misplaced("onnxruntime would run 1 nodes elsewhere than on CUDAExecutionProvider: shape on CPUExecutionProvider", nodes)
    (result,) = checked(refusing(error), b"", trial)
    assert (result.check, result.status, result.inputs) == ("placement", "fail", "placement")
    assert "shape on CPUExecutionProvider" in (result.reason or "")
    assert result.node_providers == nodes


def test_an_exception_without_a_message_is_a_failure_like_any_other(trial: Trial) -> None:
    class Silent(Recording):
        def _run(self, images: torch.Tensor) -> torch.Tensor:
            raise AssertionError

    variant = dataclasses.replace(EAGER_CPU, runtime=RuntimeEntry("silent", lambda: Silent(nn.Identity())))
    results = checked(variant, b"", trial)
    assert {(result.check, result.status) for result in results} == {("outputs", "fail"), ("isolation", "fail")}
    assert all("it does not run at batch" in (result.reason or "") for result in results)
    assert all("AssertionError" in (result.reason or "") for result in results)
    assert {(result.first_divergent_layer, result.layers) for result in results} == {(None, ())}, "a runtime may hide its tensors"


class ReturnsPair(nn.Module):
    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return image, image


class RaisesNothingReadable(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        assert image.sum() > 1e30, ""
        return image


@pytest.mark.parametrize("module", [ReturnsPair(), RaisesNothingReadable()], ids=lambda module: type(module).__name__)
def test_a_module_that_cannot_be_run_fails_and_does_not_raise(module: nn.Module, trial: Trial, tiny: Checkpoint) -> None:
    results = checked(SCRIPT_CPU, scripted(module, tiny), trial)
    assert {result.status for result in results if result.check == "outputs"} == {"fail"}
    assert all("does not run at batch" in (result.reason or "") for result in results if result.check == "outputs")


STRANGE: dict[str, Step] = {
    "a number for the batch": lambda scores: scores.sum(),
    "a number an image": lambda scores: scores.sum(1),
    "another dimension": lambda scores: scores[:, :, None],
    "a row too few": lambda scores: scores[:-1],
    "a class too few": lambda scores: scores[:, :9],
    "whole numbers": lambda scores: scores.int(),
    "float64 beyond every float32": lambda scores: scores.double() * 0.0 + 1e308,
    "nothing but infinity": lambda scores: scores / 0.0,
    "subnormal scores": lambda scores: scores * 1e-40,
    "a sum over the batch behind the scores": lambda scores: scores + 0.001 * scores.sum(),
}


@pytest.mark.parametrize("strange", STRANGE)
def test_whatever_an_artifact_returns_is_a_failure_that_a_file_can_hold_and_no_crash(
    strange: str, trial: Trial, tiny: Checkpoint, faulty: Faulty
) -> None:
    results = checked(TRACE_CPU, faulty(TRACE, tiny, Behind(tiny.module(), STRANGE[strange])), trial)
    outputs = [result for result in results if result.check == "outputs"]
    assert "fail" in {result.status for result in outputs}
    assert all(result.reason for result in outputs if result.status == "fail")
    document = json.loads(store.parity_json(ParityReport(results, (), ENVIRONMENT)))
    assert document["verdict"] == "fail"


def edited(data: bytes, edit: Callable[[onnx.GraphProto], None]) -> bytes:
    model = onnx.load_from_string(data)
    edit(model.graph)
    result: bytes = model.SerializeToString()
    return result


def behind(graph: onnx.GraphProto, *nodes: onnx.NodeProto) -> None:
    """Nodes from `before` to `logits`."""
    graph.node[-1].output[0] = "before"
    graph.node.extend(nodes)


def in_float64(graph: onnx.GraphProto) -> None:
    behind(graph, helper.make_node("Cast", ["before"], ["logits"], to=onnx.TensorProto.DOUBLE))
    graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE


def through_a_sequence(graph: onnx.GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.float32(1.01), "more"))
    behind(
        graph,
        helper.make_node("SplitToSequence", ["before"], ["parts"], axis=1, keepdims=1),
        helper.make_node("ConcatFromSequence", ["parts"], ["whole"], axis=1),
        helper.make_node("Mul", ["whole", "more"], ["logits"]),
    )


def one_bias_less(graph: onnx.GraphProto) -> None:
    next(node for node in graph.node if node.op_type == "Gemm").input[2] = ""


def weight_as_a_constant(graph: onnx.GraphProto) -> None:
    weight = next(each for each in graph.initializer if list(each.dims) == [10, 6, 5, 5])
    value = onnx.TensorProto()
    value.CopyFrom(weight)
    graph.initializer.remove(weight)
    graph.node.insert(0, helper.make_node("Constant", [], [value.name], value=value))
    one_bias_less(graph)


def two_convolutions_added(graph: onnx.GraphProto) -> None:
    place = [position for position, node in enumerate(graph.node) if node.op_type == "Conv"][1]
    conv = graph.node[place]
    out = conv.output[0]
    conv.output[0] = "first"
    graph.node.insert(place + 1, helper.make_node("Conv", list(conv.input), ["second"], kernel_shape=[5, 5]))
    graph.node.insert(place + 2, helper.make_node("Add", ["first", "second"], [out]))


@pytest.mark.parametrize(
    "edit", [in_float64, through_a_sequence, one_bias_less, weight_as_a_constant, two_convolutions_added], ids=lambda f: f.__name__
)
def test_whatever_an_onnx_graph_holds_is_a_failure_and_no_crash(
    edit: Callable[[onnx.GraphProto], None], trial: Trial, tiny: Checkpoint, faulty: Faulty
) -> None:
    results = checked(ONNX_CPU, edited(faulty(ONNX_TS, tiny, tiny.module()), edit), trial)
    assert {result.status for result in results if result.check == "outputs"} >= {"fail"}
    assert json.loads(store.parity_json(ParityReport(results, (), ENVIRONMENT)))["verdict"] == "fail"


@pytest.mark.parametrize("edit", [lambda graph: behind(graph, helper.make_node("Dropout", ["before"], ["logits", "mask"]))])
def test_a_healthy_onnx_graph_passes_however_it_is_written(
    edit: Callable[[onnx.GraphProto], None], trial: Trial, tiny: Checkpoint, faulty: Faulty
) -> None:
    results = checked(ONNX_CPU, edited(faulty(ONNX_TS, tiny, tiny.module()), edit), dataclasses.replace(trial, drill=True))
    assert {result.status for result in results} == {"pass"}
    layers = next(result.layers for result in results if result.layers)
    assert all(error.passed for error in layers)


# Other precisions, without a device of their own.


def in_precision(variant: Variant, precision: str) -> Variant:
    """A variant of the tests alone, whose artifact claims another precision."""
    return dataclasses.replace(
        variant, name=f"{variant.name} as {precision}", artifact=dataclasses.replace(variant.artifact, precision=precision)
    )


class Cast(nn.Module):
    """A module in a shorter format between float32 images and float32 scores."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module.to(dtype), dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.module(images.to(self.dtype)).float()
        return scores


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_shorter_format_is_judged_by_its_own_tolerance_and_sets_that_it_cannot_hold_are_skipped(
    precision: str, dtype: torch.dtype, trial: Trial, tiny: Checkpoint, faulty: Faulty
) -> None:
    data = faulty(TRACE, tiny, Cast(tiny.module(), dtype))
    results = checked(in_precision(TRACE_CPU, precision), data, trial)
    assert {result.status for result in results} == {"pass", "skipped"}
    skipped = {result.inputs: result.reason for result in results if result.status == "skipped"}
    assert f"{precision} cannot hold inputs" in (skipped["subnormal, normal x 1e-39"] or "")
    assert all(result.batch_size is None for result in results if result.status == "skipped")
    judged = {result.inputs for result in results if result.check == "outputs" and result.status == "pass"}
    assert judged >= {"normal, seed 0", "uniform, seed 0", "one-hot pixels"}
    assert ParityReport(results, (), ENVIRONMENT).verdict == "pass"
    as_float32 = checked(TRACE_CPU, data, trial)
    assert {result.status for result in as_float32 if result.check == "outputs"} == {"fail"}


@pytest.mark.parametrize(("precision", "dtype", "factor"), [("fp16", torch.float16, 1.05), ("bf16", torch.bfloat16, 1.4)])
def test_a_fault_beyond_a_shorter_formats_rounding_is_caught_and_located(
    precision: str, dtype: torch.dtype, factor: float, trial: Trial, tiny: Checkpoint, faulty: Faulty
) -> None:
    module = tiny.module()
    with torch.no_grad():
        module.get_parameter("fc1.weight").mul_(factor)
    results = checked(in_precision(TRACE_CPU, precision), faulty(TRACE, tiny, Cast(module, dtype)), trial)
    wrong = [result for result in results if result.status == "fail" and result.inputs == "one-hot pixels"]
    assert {result.check for result in wrong} == {"outputs"}
    assert {result.first_divergent_layer for result in wrong} == {"fc1"}


def test_tf32_on_a_gpu_would_be_judged_by_its_own_tolerance(trial: Trial, tiny: Checkpoint) -> None:
    # A GPU cannot be had here, so TF32 is the emulation that its tolerance was derived from.
    def emulated(images: torch.Tensor) -> torch.Tensor:
        return EAGER["tf32"](tiny.module())(images)

    recording = Recording(nn.Identity())
    recording.module = emulated  # type: ignore[assignment]
    variant = dataclasses.replace(in_precision(EAGER_CPU, "tf32"), runtime=RuntimeEntry("emulated", lambda: recording))
    results = checked(variant, b"", dataclasses.replace(trial, inputs=trial.inputs[1:3] + trial.inputs[4:5]))
    assert {result.status for result in results} == {"pass"}
    strict = dataclasses.replace(variant, artifact=EAGER_CPU.artifact)
    assert "fail" in {result.status for result in checked(strict, b"", dataclasses.replace(trial, inputs=trial.inputs[1:2]))}


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_float32_on_cuda_alone_is_judged_as_tf32_where_that_is_allowed(variant: Variant, allowed: bool, trial: Trial) -> None:
    found = dataclasses.replace(trial, allow_tf32=allowed).precision(variant)
    assert found == ("tf32" if allowed and variant.device == "cuda" else "fp32")
    assert dataclasses.replace(trial, allow_tf32=allowed).precision(in_precision(variant, "fp16")) == "fp16"


# int8 without a GPU: ONNX Runtime's own quantisers.


@dataclasses.dataclass(frozen=True)
class Quantised:
    """The digits network in static (QDQ) and dynamic int8, and the trial that it is put through."""

    static: bytes
    dynamic: bytes
    trial: Trial


@pytest.fixture(scope="module")
def quantised(checkpoint: Checkpoint, digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

    folder = tmp_path_factory.mktemp("int8")
    (folder / "model.onnx").write_bytes(export_torchscript(checkpoint.module(), checkpoint.metadata(), ExportOptions()).data)
    images = normalise(fit(digits.train_images[:200], checkpoint.preprocessing), checkpoint.preprocessing).numpy()

    class Calibration(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(np.split(images, 20))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"image": batch}

    source, static, dynamic = (str(folder / name) for name in ("model.onnx", "static.onnx", "dynamic.onnx"))
    quantize_static(source, static, Calibration(), quant_format=QuantFormat.QDQ, weight_type=QuantType.QInt8, per_channel=True)
    quantize_dynamic(source, dynamic, weight_type=QuantType.QInt8)
    with computing_on(CPU):
        sets = input_sets(checkpoint, digits, 8)
    inputs = tuple(each for each in sets if each.name != "one-hot pixels")
    return Quantised(Path(static).read_bytes(), Path(dynamic).read_bytes(), Trial(inputs, (1, 2, 7), checkpoint))


def test_static_int8_passes_every_check_without_a_budget_for_its_scores(quantised: Quantised) -> None:
    results = checked(in_precision(ONNX_CPU, "int8"), quantised.static, quantised.trial)
    assert {result.status for result in results} == {"pass"}
    assert {result.check for result in results} == set(CHECKS) - {"weights"}
    assert {result.budget_used for result in results if result.check == "outputs"} == {None}
    (decided,) = [result for result in results if result.check == "decisions"]
    assert decided.decisions is not None
    assert decided.decisions.images == 360
    assert decided.decisions.true_flips > 0, "rounding to steps does flip classes, and may"
    assert max(result.max_abs_error or 0.0 for result in results if result.inputs == "digits test split") > 0.01


def test_static_int8_with_permuted_classes_fails_on_accuracy_alone(quantised: Quantised) -> None:
    def permute(graph: onnx.GraphProto) -> None:
        graph.initializer.append(numpy_helper.from_array(np.roll(np.arange(10), 1), "order"))
        behind(graph, helper.make_node("Gather", ["before", "order"], ["logits"], axis=1))

    results = checked(in_precision(ONNX_CPU, "int8"), edited(quantised.static, permute), quantised.trial)
    assert failed(results) == {"decisions": [7]}
    reason = next(result.reason for result in results if result.status == "fail")
    assert (reason or "").startswith("accuracy drops by ")


def test_static_int8_that_is_not_finite_fails(quantised: Quantised) -> None:
    def infinite(graph: onnx.GraphProto) -> None:
        graph.initializer.append(numpy_helper.from_array(np.float32(0.0), "nothing"))
        behind(graph, helper.make_node("Div", ["before", "nothing"], ["logits"]))

    wrong = failed(checked(in_precision(ONNX_CPU, "int8"), edited(quantised.static, infinite), quantised.trial))
    assert wrong.keys() >= {"outputs", "isolation", "permutation"}


def test_dynamic_int8_is_exempt_from_what_its_scale_over_the_batch_rules_out_and_says_so(quantised: Quantised) -> None:
    results = checked(in_precision(ONNX_CPU, "int8-dynamic"), quantised.dynamic, quantised.trial)
    skipped = [result for result in results if result.status == "skipped"]
    assert {(result.check, result.inputs) for result in skipped} == {
        *(("consistency", inputs.name) for inputs in quantised.trial.inputs),
        *(("isolation", f"{name} in one image") for name, _ in SPECIALS),
    }
    assert all("dynamic int8 scales by the whole batch" in (result.reason or "") for result in skipped)
    assert {result.status for result in results if result not in skipped} == {"pass"}
    assert {result.check for result in results if result not in skipped} == {"placement", "outputs", "decisions", "permutation"}
    static = checked(in_precision(ONNX_CPU, "int8"), quantised.dynamic, quantised.trial)
    assert failed(static).keys() & {"consistency", "isolation"}, "judged as static it would fail"
