"""Intermediate tensors are those that a session computes, in order, whatever the runtime fused or laid out anew."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from torch import nn

from lenet_deploy import api
from lenet_deploy.checkpoint import Checkpoint, to_bytes
from lenet_deploy.devices import computing_on
from lenet_deploy.errors import DamagedFile, Unusable
from lenet_deploy.exporters import ExportOptions
from lenet_deploy.parity.judge import judge
from lenet_deploy.quiet import quiet_torchscript
from lenet_deploy.runtimes.eager import trace_module
from lenet_deploy.runtimes.onnx_taps import every_tensor
from lenet_deploy.runtimes.traces import CONV, DIFFERENCE, LINEAR, OTHER, POOL, Tap
from lenet_deploy.variants import VARIANTS, Variant

CPU = torch.device("cpu")
COUNT = 5
ON_CPU = [variant for variant in VARIANTS if variant.device == "cpu"]
ON_ORT = [variant for variant in ON_CPU if variant.runtime.name == "onnxruntime"]
GRAPHS = {"eager": ["module"], "torchscript": ["graph"], "onnxruntime": ["optimised", "unoptimised"]}
LENET5 = [CONV, POOL, CONV, POOL, LINEAR, LINEAR, LINEAR]
BEGINS = {"1998": [CONV, POOL, CONV, POOL, CONV, LINEAR, DIFFERENCE]}
# Grey and narrow; colour with other operators and channels that fill no block of ORT's layouts; wide enough to be blocked throughout; 1998.
CONFIGS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "grey": ("lenet5", {"in_channels": "1", "image_size": "28", "padding": "2"}),
    "colour": ("lenet5", {"image_size": "20", "channels": "10,6", "pooling": "max", "activation": "tanh"}),
    "sigmoid": ("lenet5", {"in_channels": "1", "image_size": "20", "channels": "10,6", "activation": "sigmoid"}),
    "wide": ("lenet5-wide", {"image_size": "20"}),
    "1998": ("lenet5-1998", {}),
}
each_model = pytest.mark.parametrize("model", CONFIGS)
each_variant = pytest.mark.parametrize("variant", ON_CPU, ids=lambda variant: variant.name)
each_onnx = pytest.mark.parametrize("variant", ON_ORT, ids=lambda variant: variant.name)


@dataclass(frozen=True, eq=False)
class Case:
    """One variant of one model: its bytes, and what it makes of some images."""

    data: bytes
    images: torch.Tensor
    scores: torch.Tensor
    traces: Mapping[str, Sequence[Tap]]


Cases = Callable[[str, Variant], Case]


@pytest.fixture(scope="module")
def case() -> Cases:
    """Opened once each."""

    @functools.cache
    def checkpoint(model: str) -> Checkpoint:
        name, settings = CONFIGS[model]
        return api.load(name, settings=settings, seed=3)

    @functools.cache
    def make(model: str, variant: Variant) -> Case:
        source = checkpoint(model)
        exporter = variant.artifact.exporter
        data = exporter()(source.module(), source.metadata(), ExportOptions()).data if exporter else to_bytes(source)
        shape = source.preprocessing.input_shape
        images = torch.randn(COUNT, *shape, generator=torch.Generator().manual_seed(0))
        with computing_on(CPU):
            with variant.open_session(data, shape) as session:
                session.bind(COUNT).copy_(images)
                scores = session.launch().clone()
            with variant.open_traces(data, shape) as traces:
                taps = {graph: trace(images) for graph, trace in traces.items()}
        return Case(data, images, scores, taps)

    return make


@each_model
@each_variant
def test_a_variant_shows_the_forms_of_its_graph_the_one_that_runs_first(model: str, variant: Variant, case: Cases) -> None:
    assert list(case(model, variant).traces) == GRAPHS[variant.runtime.name]


@each_model
@each_variant
def test_the_first_tensor_is_the_images_and_the_last_the_sessions_own_output(model: str, variant: Variant, case: Cases) -> None:
    found = case(model, variant)
    for first, *_, last in found.traces.values():
        assert (first.name, first.op, first.source, first.padded) == ("image", OTHER, "", False)
        assert torch.equal(first.value, found.images)
        judged = judge(last.value, found.scores.double(), "fp32")
        assert (judged.passed, judged.reason, last.padded) == (True, None, False)


@each_model
@each_variant
def test_each_tensor_has_a_name_of_its_own_and_an_earlier_source(model: str, variant: Variant, case: Cases) -> None:
    for taps in case(model, variant).traces.values():
        names = [tap.name for tap in taps]
        assert len(set(names)) == len(names)
        assert all(tap.source in names[:position] for position, tap in enumerate(taps) if position)


@each_model
@each_variant
def test_tensors_are_finite_floats_in_host_memory_with_a_row_an_image(model: str, variant: Variant, case: Cases) -> None:
    for taps in case(model, variant).traces.values():
        for tap in taps:
            assert (tap.value.device, tap.value.dtype, len(tap.value)) == (CPU, torch.float32, COUNT)
            assert tap.value.isfinite().all()


@each_model
@each_variant
def test_the_operators_that_begin_layers_are_those_of_the_layer_table(model: str, variant: Variant, case: Cases) -> None:
    for taps in case(model, variant).traces.values():
        assert [tap.op for tap in taps if tap.op != OTHER] == BEGINS.get(model, LENET5)


@each_model
@each_variant
def test_a_tensor_that_is_written_over_later_is_kept_as_it_was(model: str, variant: Variant, case: Cases) -> None:
    for taps in case(model, variant).traces.values():
        places = [tap.value.data_ptr() for tap in taps if tap.op != OTHER]
        assert len(set(places)) == len(places)


# What ONNX Runtime's optimiser makes of a graph.


def optimised(data: bytes, folder: Path) -> onnx.ModelProto:
    """The graph that a session with the defaults runs, as ONNX Runtime itself saves it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "saved.onnx")
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "saved.onnx")


@each_model
@each_onnx
def test_the_optimised_graph_holds_nodes_that_onnxruntime_fused_or_blocked(
    model: str, variant: Variant, case: Cases, tmp_path: Path
) -> None:
    found = case(model, variant)
    saved = optimised(found.data, tmp_path)
    domains = {node.domain for node in saved.graph.node}
    assert domains & {"com.microsoft", "com.microsoft.nchwc"}
    tapped = every_tensor(saved.SerializeToString())
    assert [name for name, *_ in tapped.nodes] == [tap.name for tap in found.traces["optimised"][1:]]
    assert len(found.traces["optimised"]) < len(found.traces["unoptimised"]), "what was fused is one tensor"


@each_model
@each_onnx
def test_every_tensor_of_the_optimised_graph_is_one_of_the_graph_as_exported(model: str, variant: Variant, case: Cases) -> None:
    traces = case(model, variant).traces
    plain = [tap.value for tap in traces["unoptimised"]]
    padded = 0
    for tap in traces["optimised"]:
        value = tap.value
        if tap.padded:
            padded += 1
            channels = [other.shape[1] for other in plain if other.ndim == 4 and other.shape[2:] == value.shape[2:]]
            assert value[:, max(channels) :].count_nonzero() == 0, "the rest of a block is empty"
            value = value[:, : max(channels)]
        # Some products are fused into one, so a tensor of the 1998 network's squashing may lie between two of the exported graph's.
        close = [torch.allclose(value, other, rtol=1e-5, atol=1e-5) for other in plain if other.shape == value.shape]
        assert any(close) or (model == "1998" and not tap.padded), tap.name
    assert padded >= {"grey": 3, "colour": 1, "sigmoid": 1, "wide": 4, "1998": 3}[model], "blocked layouts are seen in plain ones"


def test_channels_that_fill_no_block_are_cut_from_the_padding(case: Cases) -> None:
    fused = next(tap for tap in case("colour", ON_ORT[0]).traces["optimised"] if tap.op == CONV)
    conv1, activation = case("colour", ON_ORT[0]).traces["unoptimised"][1:3]
    assert (fused.padded, conv1.op, activation.source) == (True, CONV, conv1.name)
    assert fused.value.shape[1] >= activation.value.shape[1] == 10
    assert torch.allclose(fused.value[:, :10], activation.value, rtol=1e-5, atol=1e-5), "convolution and tanh in one node"


@each_onnx
def test_marking_every_tensor_changes_no_score(variant: Variant, case: Cases) -> None:
    found = case("grey", variant)
    tapped = every_tensor(found.data)
    marked = ort.InferenceSession(tapped.model, providers=["CPUExecutionProvider"])
    assert marked.get_outputs()[0].name == "logits"
    (scores,) = marked.run(["logits"], {"image": found.images.numpy()})
    assert judge(torch.from_numpy(scores), found.scores.double(), "fp32").passed


def small_graph(*nodes: onnx.NodeProto, initializers: Mapping[str, np.ndarray] | None = None) -> bytes:
    """Nodes from `x` to `y`, whose first dimension is free."""
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in (initializers or {}).items()]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    graph = helper.make_graph(list(nodes), "small", ends[:1], ends[1:], tensors)
    data: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()
    return data


def test_what_does_not_depend_on_the_images_and_what_is_no_float_is_left_out() -> None:
    data = small_graph(
        helper.make_node("Add", ["one", "one"], ["two"]),  # of weights alone
        helper.make_node("Shape", ["x"], ["shape"]),  # whole numbers
        helper.make_node("Expand", ["two", "shape"], ["wide"]),
        helper.make_node("Mul", ["x", "wide"], ["y"]),
        initializers={"one": np.ones(4, np.float32)},
    )
    with computing_on(CPU), ON_ORT[0].open_traces(data, (4, 1, 1)) as traces:
        taps = traces["unoptimised"](torch.ones(3, 4))
    assert [(tap.name, tap.source) for tap in taps] == [("image", ""), ("wide", "shape"), ("y", "image")]
    assert torch.equal(taps[-1].value, torch.full((3, 4), 2.0))


def test_a_blocked_value_whose_channels_cannot_be_told_is_unusable_and_no_crash(
    tiny: Checkpoint, faulty: Callable[..., bytes], tmp_path: Path
) -> None:
    class Doubled(nn.Module):
        """Two convolutions added, which ONNX Runtime fuses into one with the other's blocked result as its fourth input."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = api.load("lenet5-wide", settings={"image_size": "20", "in_channels": "1"}).module()

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            x = self.inner.get_submodule("conv1")(image)
            return (self.inner.get_submodule("conv2")(x) + self.inner.get_submodule("conv2")(x.relu())).mean(dim=(2, 3))

    data = faulty(ON_ORT[0].artifact, tiny, Doubled())
    fused = [node for node in optimised(data, tmp_path).graph.node if node.op_type == "Conv" and len(node.input) > 3]
    assert fused, "the premise"
    with computing_on(CPU), pytest.raises(Unusable, match="channels"), ON_ORT[0].open_traces(data, (1, 20, 20)):
        pass


# Torch.


def test_functions_are_seen_and_not_only_modules() -> None:
    taps = trace_module(lambda x: torch.sigmoid(x * 2.0).flatten(1) - 1.0, torch.ones(2, 1, 2))
    assert [(tap.name.split(".")[0], tap.op) for tap in taps] == [
        ("image", OTHER),
        ("mul", OTHER),
        ("sigmoid", OTHER),
        (taps[3].name.split(".")[0], OTHER),  # flatten is a view or a reshape, by torch's version
        ("sub", DIFFERENCE),
    ]
    assert torch.equal(taps[-1].value, torch.sigmoid(torch.full((2, 2), 2.0)) - 1.0)


def test_tensors_of_weights_alone_and_whole_numbers_are_left_out() -> None:
    weight = torch.ones(3, 3)
    taps = trace_module(lambda x: (x @ (weight * 2.0)) + x.argmax(1, keepdim=True), torch.ones(2, 3))
    assert [tap.op for tap in taps] == [OTHER, LINEAR, OTHER]


def test_a_module_in_float64_is_traced_in_float64(tiny: Checkpoint) -> None:
    with computing_on(CPU):
        taps = trace_module(tiny.module().double(), torch.zeros(2, 1, 20, 20, dtype=torch.float64))
    assert {tap.value.dtype for tap in taps} == {torch.float64}
    assert len(taps) == 13


def test_a_torchscript_archive_that_is_not_frozen_is_unusable_and_says_so(tiny: Checkpoint) -> None:
    variant = next(variant for variant in ON_CPU if variant.runtime.name == "torchscript")
    buffer = io.BytesIO()
    with quiet_torchscript():
        torch.jit.save(torch.jit.script(tiny.module()), buffer)
    with computing_on(CPU), pytest.raises(Unusable, match="not frozen"), variant.open_traces(buffer.getvalue(), (1, 20, 20)):
        pass


@each_variant
@pytest.mark.parametrize("data", [b"", b"no artifact"], ids=["empty", "foreign"])
def test_damaged_bytes_are_a_damaged_file_as_in_a_session(variant: Variant, data: bytes) -> None:
    with computing_on(CPU), pytest.raises(DamagedFile), variant.open_traces(data, (1, 20, 20)):
        pass


@each_variant
def test_a_trace_takes_any_batch_and_gives_the_same_tensors_again(variant: Variant, case: Cases) -> None:
    found = case("colour", variant)
    with computing_on(CPU), variant.open_traces(found.data, tuple(found.images.shape[1:])) as traces:
        for graph, trace in traces.items():
            before = found.traces[graph]
            assert [tap.value.shape[0] for tap in trace(found.images[:1])] == [1] * len(before)
            for tap, again in zip(before, trace(found.images), strict=True):
                assert (again.name, again.op, again.source) == (tap.name, tap.op, tap.source)
                assert torch.equal(again.value, tap.value)
