"""The weights in the artifacts: read back, recorded at export, and verified bit for bit against the checkpoint."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from lenet_deploy import data, train
from lenet_deploy.bundle import Bundle, open_bundle
from lenet_deploy.checkpoint import Checkpoint, fresh
from lenet_deploy.errors import DamagedFile
from lenet_deploy.exporters import ExportFailed, ExportOptions, tensors
from lenet_deploy.exporters.tensors import TensorFault, record, verify
from lenet_deploy.models import MODELS, find_model
from lenet_deploy.models.config import SQUASH_SLOPE, SUBSAMPLED_PIXELS, TENSOR_LAYERS
from lenet_deploy.models.lenet5_1998 import Subsampling, squash
from lenet_deploy.parity.weights import FACTORS, check_weights
from lenet_deploy.quiet import quiet_torchscript
from lenet_deploy.variants import ARTIFACTS, ONNX, ONNX_TS, SCRIPT, TRACE, VARIANTS, ArtifactSpec, Variant

READABLE = tuple(spec for spec in ARTIFACTS if spec.reader)
Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]

each_spec = pytest.mark.parametrize("spec", READABLE, ids=lambda spec: spec.name)
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)


@functools.cache
def trained_1998() -> Checkpoint:
    return train.train(train.TrainConfig("lenet5-1998", epochs=1, device="cpu"), data.load_dataset("digits"))


@functools.cache
def exported(spec: ArtifactSpec, checkpoint: Checkpoint) -> bytes:
    assert spec.exporter is not None
    return spec.exporter()(checkpoint.module(), checkpoint.metadata(), ExportOptions()).data


def read(spec: ArtifactSpec, content: bytes) -> Tensors:
    assert spec.reader is not None
    return dict(spec.reader()(content))


@functools.cache
def recorded_text(spec: ArtifactSpec, checkpoint: Checkpoint) -> str:
    found = record(checkpoint.weights, read(spec, exported(spec, checkpoint)), find_model(checkpoint.model).factors)
    return json.dumps(list(found))


def recorded(spec: ArtifactSpec, checkpoint: Checkpoint) -> Any:
    return json.loads(recorded_text(spec, checkpoint))


def variant_of(spec: ArtifactSpec) -> Variant:
    return next(variant for variant in VARIANTS if variant.artifact == spec)


def faults_of(spec: ArtifactSpec, checkpoint: Checkpoint, content: bytes) -> tuple[TensorFault, ...]:
    return verify(checkpoint.weights, read(spec, content), recorded(spec, checkpoint), FACTORS, lossless=True)


def edited(content: bytes, change: Callable[[onnx.GraphProto], object]) -> bytes:
    model = onnx.load_from_string(content)
    change(model.graph)
    return model.SerializeToString()


def rewritten(content: bytes, name: str, change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """The ONNX file with one initialiser changed."""

    def apply(graph: onnx.GraphProto) -> None:
        (initializer,) = (each for each in graph.initializer if each.name == name)
        initializer.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(initializer).copy()), name))

    return edited(content, apply)


def altered(checkpoint: Checkpoint, change: Change) -> Checkpoint:
    weights = {name: tensor.clone() for name, tensor in checkpoint.weights.items()}
    change(weights)
    return Checkpoint(checkpoint.model, checkpoint.config, checkpoint.preprocessing, checkpoint.labels, checkpoint.provenance, weights)


def wrongly_exported(spec: ArtifactSpec, checkpoint: Checkpoint, change: Change) -> bytes:
    """The artifact with other weights: exported with them, or with initialisers replaced where those are the weights as they are."""
    wrong = altered(checkpoint, change)
    touched = {name for name, weight in wrong.weights.items() if not torch.equal(weight, checkpoint.weights[name])}
    folded = any(each["transforms"] for each in recorded(spec, checkpoint) if each["source"] in touched)
    if spec.format != "onnx" or folded:
        return exported(spec, wrong)
    content = exported(spec, checkpoint)
    for name in touched:
        content = rewritten(content, name, lambda array, name=name: wrong.weights[name].numpy())  # type: ignore[misc]  # bound at once
    return content


def flip_lowest_bit(name: str, place: int = -1) -> Change:
    return lambda weights: weights[name].view(torch.int32).view(-1)[place].bitwise_xor_(1)


# Healthy exports


@each_model
@each_spec
def test_every_artifact_of_a_fresh_model_holds_its_weights(spec: ArtifactSpec, model: Any) -> None:
    checkpoint = fresh(model, {}, 0)
    content = exported(spec, checkpoint)
    result = check_weights(variant_of(spec), content, {"tensors": recorded(spec, checkpoint)}, checkpoint.weights)
    assert result is not None
    assert (result.status, result.reason, result.check, result.batch_size) == ("pass", None, "weights", None)


@each_model
@each_spec
def test_every_artifact_of_a_trained_model_holds_its_weights(spec: ArtifactSpec, model: Any, checkpoint: Checkpoint) -> None:
    if model.name == "lenet5-1998":
        checkpoint = trained_1998()
    elif model.name == "lenet5-wide":  # noise stands for training: no tensor is zero or equal to another
        generator = torch.Generator().manual_seed(1)
        checkpoint = altered(
            fresh(model, {}, 0), lambda weights: [each.add_(torch.randn(each.shape, generator=generator)) for each in weights.values()]
        )
    assert faults_of(spec, checkpoint, exported(spec, checkpoint)) == ()


def test_a_record_is_json_and_follows_the_graph_from_input_to_output(checkpoint: Checkpoint) -> None:
    found = recorded(TRACE, checkpoint)
    assert [each["source"].partition(".")[0] for each in found][::2] == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert found[0] == {"source": "conv1.weight", "tensor": "constant.0", "transforms": []}


@pytest.mark.parametrize(("spec", "arithmetic"), [(TRACE, "float64"), (SCRIPT, "float32")], ids=["trace", "script"])
def test_freezing_folds_the_squashing_into_the_convolution_before_it(spec: ArtifactSpec, arithmetic: str) -> None:
    steps = {each["source"]: each["transforms"] for each in recorded(spec, trained_1998())}
    fold = [{"op": "scale", "factor": SQUASH_SLOPE, "dtype": arithmetic}]
    assert [steps[f"{layer}.weight"] for layer in ("c1", "c3", "c5")] == [fold] * 3
    # A bias is so short that both arithmetics may give the same bits.
    assert [[(step["op"], step["factor"]) for step in steps[f"{layer}.bias"]] for layer in ("c1", "c3", "c5")] == [
        [("scale", SQUASH_SLOPE)]
    ] * 3
    assert steps["s2.coefficient"] == steps["s4.coefficient"] == [{"op": "scale", "factor": SUBSAMPLED_PIXELS, "dtype": "float32"}]
    assert steps["f6.weight"] == steps["prototypes"] == []


def test_the_folded_factors_are_those_of_the_modules() -> None:
    x = torch.linspace(-2, 2, 9)
    assert torch.equal(squash(x), 1.7159 * torch.tanh(x * SQUASH_SLOPE))
    layer, block = Subsampling(1), torch.ones(1, 1, 2, 2)
    torch.nn.init.constant_(layer.coefficient, 0.3)
    assert torch.equal(layer(block).flatten(), SUBSAMPLED_PIXELS * layer.coefficient.flatten())
    assert set(find_model("lenet5-1998").factors) == {SQUASH_SLOPE, SUBSAMPLED_PIXELS} == set(FACTORS)


def test_the_zero_biases_that_an_exporter_left_out_are_recorded_as_zero() -> None:
    found = recorded(ONNX, fresh(find_model("lenet5-1998"), {}, 0))
    left_out = [each["source"] for each in found if each["tensor"] is None]
    assert left_out == ["c1.bias", "c3.bias", "c5.bias", "f6.bias"]
    assert all(each["transforms"] == [{"op": "zero"}] for each in found if each["tensor"] is None)


def test_an_exported_bundle_carries_the_records(bundle: Bundle) -> None:
    reopened = open_bundle(bundle.path)
    for spec in READABLE:
        before, after = bundle.artifact(spec.name), reopened.artifact(spec.name)
        assert before is not None
        assert after is not None
        assert before.details == after.details
        assert {each["source"] for each in after.details["tensors"]} == {
            f"{layer}.{kind}" for layer in ("conv1", "conv2", "fc1", "fc2", "fc3") for kind in ("weight", "bias")
        }


# Wrong weights


@pytest.mark.parametrize("name", ["conv1.weight", "conv2.bias", "fc1.weight", "fc3.bias"])
@each_spec
def test_one_flipped_lowest_bit_is_caught_and_its_layer_named(spec: ArtifactSpec, name: str, checkpoint: Checkpoint) -> None:
    content = wrongly_exported(spec, checkpoint, flip_lowest_bit(name))
    result = check_weights(variant_of(spec), content, {"tensors": recorded(spec, checkpoint)}, checkpoint.weights)
    assert result is not None
    assert (result.status, result.first_divergent_layer) == ("fail", name.partition(".")[0])
    assert result.reason is not None
    assert result.reason.startswith("1 wrong in its tensors: ")
    assert name in result.reason
    assert "1 of " in result.reason
    assert "1 ulp apart" in result.reason


@pytest.mark.parametrize("name", ["c1.weight", "c3.bias", "c5.weight", "s2.coefficient", "prototypes"])
@each_spec
def test_the_smallest_change_of_a_folded_weight_is_caught(spec: ArtifactSpec, name: str) -> None:
    checkpoint = trained_1998()

    def change(weights: Tensors) -> None:
        flat = weights[name].view(-1)
        flat[3] = torch.nextafter(torch.nextafter(flat[3], torch.tensor(9.0)), torch.tensor(9.0))  # a fold may round one ulp away

    (fault,) = faults_of(spec, checkpoint, wrongly_exported(spec, checkpoint, change))
    assert (fault.source, fault.layer) == (name, TENSOR_LAYERS.get(name, name.partition(".")[0]))


def test_any_flipped_bit_of_any_onnx_tensor_is_caught(checkpoint: Checkpoint) -> None:
    content, chance = exported(ONNX, checkpoint), np.random.default_rng(0)
    for name, weight in checkpoint.weights.items():
        place, bit = int(chance.integers(weight.numel())), int(chance.integers(32))

        def flip(array: np.ndarray, place: int = place, bit: int = bit) -> np.ndarray:
            array.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
            return array

        (fault,) = faults_of(ONNX, checkpoint, rewritten(content, name, flip))
        assert (fault.source, fault.tensor) == (name, name)


def swap_filters(weights: Tensors) -> None:
    weights["conv2.weight"][[0, 1]] = weights["conv2.weight"][[1, 0]]


def transpose_kernels(weights: Tensors) -> None:
    weights["conv2.weight"] = weights["conv2.weight"].transpose(2, 3).contiguous()


def zero_a_bias(weights: Tensors) -> None:
    weights["conv2.bias"].zero_()


def add_a_tenth_of_a_percent(weights: Tensors) -> None:
    weights["conv2.weight"][5, 3, 1, 1] *= 1.001


def put_nan(weights: Tensors) -> None:
    weights["conv2.weight"][0, 0, 0, 0] = torch.nan


WRONG = (swap_filters, transpose_kernels, zero_a_bias, add_a_tenth_of_a_percent, put_nan)


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
@each_spec
def test_a_wrong_layer_is_caught_and_named(spec: ArtifactSpec, change: Change, checkpoint: Checkpoint) -> None:
    faults = faults_of(spec, checkpoint, wrongly_exported(spec, checkpoint, change))
    assert faults
    assert {fault.layer for fault in faults} == {"conv2"}
    if change is put_nan:
        assert "nan in the artifact" in str(faults[0])


@each_spec
def test_stale_weights_are_caught_from_the_first_layer_on(spec: ArtifactSpec, checkpoint: Checkpoint) -> None:
    stale = wrongly_exported(spec, checkpoint, lambda weights: [weight.mul_(1.01) for weight in weights.values()])
    result = check_weights(variant_of(spec), stale, {"tensors": recorded(spec, checkpoint)}, checkpoint.weights)
    assert result is not None
    assert result.first_divergent_layer == "conv1"
    assert result.reason is not None
    assert result.reason.startswith("10 wrong in its tensors: conv1.")
    assert result.reason.endswith("; and 7 more")


def drop_bias(graph: onnx.GraphProto) -> None:
    node = next(each for each in graph.node if "conv2.bias" in each.input)
    del node.input[2:]  # the initialiser stays, and nothing uses it


def add_bias(graph: onnx.GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.zeros(10, np.float32), "extra"))
    graph.node.append(onnx.helper.make_node("Add", ["logits", "extra"], ["more"]))


def negate_zero(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[0] = -0.0
    return array


def test_a_bias_that_nothing_uses_any_more_is_missing(checkpoint: Checkpoint) -> None:
    (fault,) = faults_of(ONNX, checkpoint, edited(exported(ONNX, checkpoint), drop_bias))
    assert (fault.layer, fault.reason) == ("conv2", "the artifact uses no such tensor")


@pytest.mark.parametrize("spec", [ONNX, ONNX_TS], ids=lambda spec: spec.name)
def test_an_added_bias_is_caught_even_where_it_is_zero(spec: ArtifactSpec, checkpoint: Checkpoint) -> None:
    (fault,) = faults_of(spec, checkpoint, edited(exported(spec, checkpoint), add_bias))
    assert (fault.tensor, fault.source, fault.layer) == ("extra", None, None)
    assert "no record accounts for it" in fault.reason


def test_a_lost_bias_of_a_torchscript_archive_is_caught_at_its_layer(checkpoint: Checkpoint) -> None:
    module: Any = checkpoint.module()
    module.conv2.bias = None
    with quiet_torchscript():
        frozen, buffer = torch.jit.freeze(torch.jit.script(module)), BytesIO()
        torch.jit.save(frozen, buffer)
    assert faults_of(SCRIPT, checkpoint, buffer.getvalue())[0].layer == "conv2"


def test_negative_zero_is_not_zero(checkpoint: Checkpoint) -> None:
    zeroed = altered(checkpoint, lambda weights: weights["fc1.bias"].view(-1)[:1].zero_())
    (fault,) = faults_of(ONNX, zeroed, rewritten(exported(ONNX, zeroed), "fc1.bias", negate_zero))
    assert "first at [0]: -0 in the artifact, 0 by the checkpoint, 0 ulps apart" in fault.reason


def test_a_bias_left_out_as_zero_has_to_be_zero() -> None:
    untrained = fresh(find_model("lenet5-1998"), {}, 0)
    changed = altered(untrained, lambda weights: weights["c3.bias"][2].fill_(1e-30))
    held = read(ONNX, exported(ONNX, untrained))
    (fault,) = verify(changed.weights, held, recorded(ONNX, untrained), FACTORS)
    assert (fault.layer, fault.reason) == ("c3", "it was left out as zero, and 1 of its 16 elements are not")


def test_a_reshaped_tensor_is_not_the_same(checkpoint: Checkpoint) -> None:
    flat = rewritten(exported(ONNX, checkpoint), "conv1.weight", lambda array: array.reshape(6, 25))
    (fault,) = faults_of(ONNX, checkpoint, flat)
    assert fault.reason == "its shape is [6, 25] in the artifact, [6, 1, 5, 5] by the checkpoint and the record"


def test_what_an_artifact_does_not_hold_cannot_be_recorded(checkpoint: Checkpoint) -> None:
    for change in (swap_filters, transpose_kernels, add_a_tenth_of_a_percent, put_nan):
        held = read(ONNX, wrongly_exported(ONNX, checkpoint, change))
        with pytest.raises(ExportFailed, match=r"conv2\.weight"):
            record(checkpoint.weights, held, FACTORS)


# Recorded transforms


def half(content: bytes) -> bytes:
    """The ONNX file with its float32 initialisers rounded to float16."""

    def apply(graph: onnx.GraphProto) -> None:
        for each in graph.initializer:
            if each.data_type == onnx.TensorProto.FLOAT:
                each.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(each).astype(np.float16), each.name))

    return edited(content, apply)


def test_a_cast_is_a_fault_where_none_was_recorded(checkpoint: Checkpoint) -> None:
    faults = faults_of(ONNX, checkpoint, half(exported(ONNX, checkpoint)))
    assert len(faults) == 10
    assert faults[0].reason == "it is torch.float16 in the artifact, torch.float32 by the record"


@pytest.mark.parametrize("kind", ["trained", "1998"])
def test_a_recorded_cast_is_verified_to_the_last_bit(kind: str, checkpoint: Checkpoint) -> None:
    source = checkpoint if kind == "trained" else trained_1998()
    name = "fc2.weight" if kind == "trained" else "s2.bias"
    content = half(exported(ONNX, source))
    found = record(source.weights, read(ONNX, content), FACTORS)
    assert all(each["transforms"][-1] == {"op": "cast", "dtype": "float16"} for each in found)
    assert verify(source.weights, read(ONNX, content), list(found), FACTORS) == ()
    (fault,) = verify(altered(source, flip_high_bit(name)).weights, read(ONNX, content), list(found), FACTORS)
    assert fault.source == name
    promised = verify(source.weights, read(ONNX, content), list(found), FACTORS, lossless=True)
    assert len(promised) == len(source.weights)
    assert "promises float32" in promised[0].reason


def flip_high_bit(name: str) -> Change:
    return lambda weights: weights[name].view(torch.int32).view(-1)[0].bitwise_xor_(1 << 20)


def test_a_transposed_linear_weight_is_a_layout_and_a_transposed_kernel_none(checkpoint: Checkpoint) -> None:
    held = read(ONNX, exported(ONNX, checkpoint))
    held["fc1.weight"] = held["fc1.weight"].T
    held["conv1.weight"] = held["conv1.weight"].permute(0, 2, 3, 1).to(torch.bfloat16)
    found = record(checkpoint.weights, held, FACTORS)
    steps = {each["source"]: [step["op"] for step in each["transforms"]] for each in found if each["transforms"]}
    assert steps["fc1.weight"] == ["permute"]
    assert steps["conv1.weight"][-1] == "cast"
    assert verify(checkpoint.weights, held, list(found), FACTORS) == ()
    kernel = {"source": "w", "tensor": "w", "transforms": [{"op": "permute", "dims": [0, 1, 3, 2]}]}
    weight = {"w": torch.rand(2, 2, 2, 2)}
    (fault,) = verify(weight, {"w": weight["w"].permute(0, 1, 3, 2)}, [kernel], FACTORS)
    assert "no layout" in fault.reason


def test_equal_tensors_may_be_stored_once() -> None:
    weights = {"a.weight": torch.ones(3), "b.weight": torch.ones(3)}
    found = record(weights, {"constant.0": torch.ones(3)}, ())
    assert [each["tensor"] for each in found] == ["constant.0", "constant.0"]
    assert verify(weights, {"constant.0": torch.ones(3)}, list(found), ()) == ()


def scaled_by(factor: Any) -> dict[str, Any]:
    return {"source": "w", "tensor": "w", "transforms": [{"op": "scale", "factor": factor, "dtype": "float32"}]}


@pytest.mark.parametrize("factor", [1.001, 1.7159, 4, True, "4.0", None, [4.0], float("nan")])
def test_no_factor_but_the_architecture_s_is_accepted(factor: Any) -> None:
    weight = torch.rand(5)
    wrong = weight * factor if isinstance(factor, float) else weight * 4
    (fault,) = verify({"w": weight}, {"w": wrong}, [scaled_by(factor)], FACTORS)
    assert "the architecture multiplies nothing by" in fault.reason


# Malformed records


def with_steps(*steps: Any) -> dict[str, Any]:
    return {"source": "w", "tensor": "w", "transforms": list(steps)}


QUANTISE = {"op": "quantise", "dtype": "int8", "scale": "s", "zero_point": None, "axis": None}
MALFORMED: Mapping[str, Any] = {
    "no list": {"w": "w"},
    "text": "w",
    "nothing": None,
    "a number inside": [3],
    "an empty record": [{}],
    "more than asked": [{**with_steps(), "note": ""}],
    "a source that is a list": [{**with_steps(), "source": ["w"]}],
    "a tensor that is a number": [{**with_steps(), "tensor": 0}],
    "an unknown source": [{**with_steps(), "source": "v"}],
    "an unknown tensor": [{**with_steps(), "tensor": "v"}],
    "left out without zero": [{**with_steps(), "tensor": None}],
    "zero and still there": [with_steps({"op": "zero"})],
    "transforms that are text": [{**with_steps(), "transforms": "zero"}],
    "an unknown operation": [with_steps({"op": "add"})],
    "an operation that is a list": [with_steps({"op": ["cast"]})],
    "a step that is text": [with_steps("cast")],
    "a step too little": [with_steps({"op": "cast"})],
    "a step too much": [with_steps({"op": "cast", "dtype": "float16", "to": 1})],
    "twice the same": [with_steps(*[{"op": "reshape", "shape": [6]}] * 2)],
    "the wrong order": [with_steps({"op": "cast", "dtype": "float16"}, {"op": "reshape", "shape": [6]})],
    "a cast to a list": [with_steps({"op": "cast", "dtype": []})],
    "a cast to nowhere": [with_steps({"op": "cast", "dtype": "float99"})],
    "a negative shape": [with_steps({"op": "reshape", "shape": [-2, -3]})],
    "a huge shape": [with_steps({"op": "reshape", "shape": [10**40]})],
    "a long shape": [with_steps({"op": "reshape", "shape": [1] * 10_000 + [6]})],
    "a shape of texts": [with_steps({"op": "reshape", "shape": ["6"]})],
    "dims beyond": [with_steps({"op": "permute", "dims": [0, 2, 3, 1]})],
    "dims of truth": [with_steps({"op": "permute", "dims": [True, False]})],
    "an arithmetic of text": [with_steps({"op": "scale", "factor": 4.0, "dtype": "text"})],
    "a scale that is a number": [with_steps({**QUANTISE, "scale": 1.0})],
    "a scale that is nowhere": [with_steps(QUANTISE)],
    "a quantisation of floats": [with_steps({**QUANTISE, "scale": "w"})],
    "recorded twice": [with_steps(), with_steps()],
    "no record at all": [],
}


@pytest.mark.parametrize("entries", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_record_is_a_fault_with_a_reason(entries: Any) -> None:
    weights = {"w": torch.rand(2, 3)}
    faults = verify(weights, weights, entries, FACTORS)
    assert faults
    assert all(fault.reason and str(fault) for fault in faults)


@pytest.mark.parametrize("axis", [-1, 2, True, "0", 0.0])
def test_an_axis_that_is_none_is_a_fault(axis: Any) -> None:
    held = {"w": torch.ones(2, 3, dtype=torch.int8), "s": torch.tensor(1.0)}
    (fault, *_) = verify({"w": torch.ones(2, 3)}, held, [with_steps({**QUANTISE, "axis": axis})], FACTORS)
    assert "axis" in fault.reason


def json_values() -> st.SearchStrategy[Any]:
    words = st.sampled_from(["w", "s", "source", "tensor", "transforms", "op", "dtype", "float16", "int8", *tensors.PARAMETERS])
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=3)
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4), max_leaves=8)


STEPS = st.lists(
    st.sampled_from(sorted(tensors.PARAMETERS)).flatmap(
        lambda op: st.fixed_dictionaries({"op": st.just(op), **dict.fromkeys(sorted(tensors.PARAMETERS[op]), json_values())})
    ),
    max_size=3,
)


@settings(max_examples=40)
@given(
    st.lists(st.fixed_dictionaries({"source": st.just("w"), "tensor": st.sampled_from(["w", "s", None]), "transforms": STEPS}), max_size=2)
)
def test_no_record_of_the_right_form_makes_a_wrong_tensor_right(entries: Any) -> None:
    held = {"w": torch.tensor([[1.0, 2.0], [3.0, 5.0]]), "s": torch.tensor([0.5, 0.5])}
    assert verify({"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, held, entries, FACTORS)


@given(json_values())
def test_no_json_at_all_makes_a_verification_crash(entries: Any) -> None:
    assert verify({"w": torch.ones(2)}, {"w": torch.ones(2)}, entries, FACTORS)


# Quantisation


class Digits(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no annotations
    """The first test images, as onnxruntime's calibration asks for them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        images = data.fit(data.load_dataset("digits").test_images[:32], checkpoint.preprocessing)
        self.batches = iter(data.normalise(images, checkpoint.preprocessing).split(8))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"image": batch.numpy()}


@pytest.fixture(scope="module", params=[False, True], ids=["per tensor", "per channel"])
def int8(request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return quantised(checkpoint, request.param, tmp_path_factory.mktemp("int8"))


def quantised(checkpoint: Checkpoint, per_channel: bool, folder: Path) -> bytes:
    path, level = folder / "int8.onnx", logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # it recommends a preprocessing that these graphs do not need
    try:
        model = onnx.load_from_string(exported(ONNX, checkpoint))
        quantize_static(model, path, Digits(checkpoint), quant_format=QuantFormat.QDQ, per_channel=per_channel, weight_type=QuantType.QInt8)
    finally:
        logging.disable(level)
    return path.read_bytes()


def quantised_faults(checkpoint: Checkpoint, healthy: bytes, content: bytes) -> tuple[TensorFault, ...]:
    found = json.loads(json.dumps(record(checkpoint.weights, read(ONNX, healthy), FACTORS)))
    return verify(checkpoint.weights, read(ONNX, content), found, FACTORS)


def test_a_healthy_quantisation_is_within_half_a_step(checkpoint: Checkpoint, int8: bytes) -> None:
    assert quantised_faults(checkpoint, int8, int8) == ()
    found = record(checkpoint.weights, read(ONNX, int8), FACTORS)
    kinds = {each["transforms"][-1]["dtype"] for each in found}
    assert kinds == {"int8", "int32"}


def test_a_folded_coefficient_can_be_quantised_too(tmp_path: Path) -> None:
    source = trained_1998()
    content = quantised(source, False, tmp_path)
    assert quantised_faults(source, content, content) == ()
    steps = {each["source"]: [step["op"] for step in each["transforms"]] for each in record(source.weights, read(ONNX, content), FACTORS)}
    assert steps["s2.coefficient"] == ["scale", "quantise"]


def add_to_last(amount: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        flat = array.reshape(-1)
        flat[-1] += amount if flat[-1] <= 0 else -amount  # towards zero, so that nothing overflows
        return array

    return change


@pytest.mark.parametrize("name", ["conv1.weight_quantized", "fc2.weight_quantized", "conv2.bias_quantized"])
def test_one_weight_a_step_away_is_caught(name: str, checkpoint: Checkpoint, int8: bytes) -> None:
    (fault,) = quantised_faults(checkpoint, int8, rewritten(int8, name, add_to_last(1)))
    assert fault.tensor == name
    assert "1 of " in fault.reason
    assert "more than half a step off" in fault.reason


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("conv2.weight_zero_point", lambda zero: zero + np.int8(1), "more than half a step off"),
        ("conv2.weight_zero_point", lambda zero: zero.astype(np.uint8), "no zero point conv2.weight_zero_point of type torch.int8"),
        ("conv2.weight_scale", lambda scale: scale * np.float32(1.02), "more than half a step off"),
        ("conv2.weight_scale", lambda scale: scale * np.float32(0), "not a positive number"),
        ("conv2.weight_scale", lambda scale: scale * np.float32(np.nan), "not a positive number"),
        ("conv2.weight_scale", lambda scale: scale * np.float32(100), "too coarse"),
        ("conv2.weight_scale", lambda scale: np.ones(7, np.float32), "do not fit"),
        ("conv2.weight_quantized", lambda weight: weight.astype(np.int16), "torch.int16 in the artifact, torch.int8 by the record"),
    ],
)
def test_a_wrong_scale_or_zero_point_is_caught(name: str, change: Any, reason: str, checkpoint: Checkpoint, int8: bytes) -> None:
    (fault,) = quantised_faults(checkpoint, int8, rewritten(int8, name, lambda array: np.asarray(change(array))))
    assert fault.layer == "conv2"
    assert reason in fault.reason


# Reading back


@pytest.mark.parametrize("content", [b"", b"text", bytes(300), b"PK\x03\x04"], ids=["nothing", "text", "zeros", "zip"])
@each_spec
def test_an_unreadable_artifact_fails_or_lacks_every_tensor(spec: ArtifactSpec, content: bytes, checkpoint: Checkpoint) -> None:
    result = check_weights(variant_of(spec), content, {"tensors": recorded(spec, checkpoint)}, checkpoint.weights)
    assert result is not None
    assert result.status == "fail"
    assert result.reason


def tensor_of(kind: int, **fields: Any) -> onnx.TensorProto:
    return onnx.TensorProto(name="conv1.weight", data_type=kind, **fields)


UNREADABLE: Mapping[str, tuple[onnx.TensorProto, str]] = {
    "outside the file": (tensor_of(1, data_location=1), "outside the ONNX file"),
    "complex": (tensor_of(onnx.TensorProto.COMPLEX64), "type COMPLEX64, which cannot be compared"),
    "an unknown type": (tensor_of(99), "cannot be read"),
    "too few bytes": (tensor_of(1, dims=[6], raw_data=b"1234"), "cannot be read"),
}


@pytest.mark.parametrize(("stored", "reason"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_tensor_that_cannot_be_compared_is_said_to_be_so(stored: onnx.TensorProto, reason: str, checkpoint: Checkpoint) -> None:
    def put(graph: onnx.GraphProto) -> None:
        next(each for each in graph.initializer if each.name == "conv1.weight").CopyFrom(stored)

    content = edited(exported(ONNX, checkpoint), put)
    with pytest.raises(DamagedFile, match=reason):
        read(ONNX, content)
    result = check_weights(variant_of(ONNX), content, {"tensors": recorded(ONNX, checkpoint)}, checkpoint.weights)
    assert result is not None
    assert result.reason is not None
    assert result.reason.startswith("its tensors cannot be read back: ")


def add_subgraph(graph: onnx.GraphProto) -> None:
    branch = onnx.helper.make_graph([], "branch", [], [])
    graph.node.append(onnx.helper.make_node("If", ["image"], ["branched"], then_branch=branch, else_branch=branch))


def name_twice(graph: onnx.GraphProto) -> None:
    graph.initializer.append(graph.initializer[0])


def add_sparse_constant(graph: onnx.GraphProto) -> None:
    graph.node.append(onnx.helper.make_node("Constant", [], ["sparse"], sparse_value=onnx.SparseTensorProto()))


@pytest.mark.parametrize(("change", "reason"), [(add_subgraph, "subgraphs"), (name_twice, "share a name"), (add_sparse_constant, "sparse")])
def test_what_is_not_read_in_full_is_refused(change: Any, reason: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(DamagedFile, match=reason):
        read(ONNX, edited(exported(ONNX, checkpoint), change))


def test_constants_and_all_their_kinds_are_read() -> None:
    make = onnx.helper.make_node
    stored = numpy_helper.from_array(np.array([1.0, np.nan], np.float32))
    bfloat16 = onnx.helper.make_tensor("b", onnx.TensorProto.BFLOAT16, [2], [1.0, -0.0])
    nodes = [
        make("Constant", [], ["whole"], value=stored),
        make("Constant", [], ["one"], value_float=2.5),
        make("Constant", [], ["some"], value_floats=[1.0, 2.0]),
        make("Constant", [], ["shape"], value_ints=[1, 2]),
        make("Constant", [], ["unused"], value_float=1.0),
        make("Sum", ["some", "one", "whole", "shape", "b"], ["sum"]),
    ]
    graph = onnx.helper.make_graph(nodes, "constants", [], [], [bfloat16])
    found = read(ONNX, onnx.helper.make_model(graph).SerializeToString())
    assert list(found) == ["some", "one", "whole", "b"]
    assert [found["some"].tolist(), found["one"].item(), found["b"].dtype] == [[1.0, 2.0], 2.5, torch.bfloat16]
    assert found["b"].view(torch.int16).tolist() == [0x3F80, -0x8000]
    assert found["whole"].view(torch.int32).tolist() == np.array([1.0, np.nan], np.float32).view(np.int32).tolist()


def saved(scripted: Any) -> bytes:
    buffer = BytesIO()
    torch.jit.save(scripted, buffer)
    return buffer.getvalue()


def test_a_torchscript_archive_that_is_not_frozen_is_read_by_name(checkpoint: Checkpoint) -> None:
    with quiet_torchscript():
        content = saved(torch.jit.script(checkpoint.module()))
    found = read(SCRIPT, content)
    assert sorted(found) == sorted(checkpoint.weights)
    assert next(iter(found)) == "conv1.weight"
    assert all(torch.equal(tensor, checkpoint.weights[name]) for name, tensor in found.items())


class Branching(torch.nn.Module):
    """Constants behind a branch, in a list, and of a kind that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return torch.cat([x, self.b])
        return torch.cat([x, self.a, torch.ones(1, dtype=torch.int64)])


def test_constants_of_a_branch_are_read() -> None:
    with quiet_torchscript():
        content = saved(torch.jit.freeze(torch.jit.script(Branching().eval())))
    assert [tuple(tensor.shape) for tensor in read(SCRIPT, content).values()] == [(3,), (2,)]


def test_a_complex_constant_is_refused() -> None:
    class Complex(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.ones(2, dtype=torch.complex64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.w

    with quiet_torchscript():
        content = saved(torch.jit.trace(Complex(), torch.ones(2)))
    with pytest.raises(DamagedFile, match="complex"):
        read(SCRIPT, content)


# The check


def test_a_manifest_of_an_older_version_asks_for_a_new_export(checkpoint: Checkpoint) -> None:
    result = check_weights(variant_of(ONNX), exported(ONNX, checkpoint), {"exporter": "torch.export"}, checkpoint.weights)
    assert result is not None
    assert result.status == "fail"
    assert "export the bundle again" in str(result.reason)


def test_a_format_that_does_not_expose_its_tensors_is_not_checked(checkpoint: Checkpoint) -> None:
    closed = [variant for variant in VARIANTS if variant.artifact.reader is None]
    assert {variant.artifact.name for variant in closed} >= {"checkpoint"}
    assert all(check_weights(variant, b"", {}, checkpoint.weights) is None for variant in closed)


def test_an_artifact_that_promises_float32_may_not_be_recorded_as_cast(checkpoint: Checkpoint) -> None:
    content = half(exported(ONNX, checkpoint))
    details = {"tensors": list(record(checkpoint.weights, read(ONNX, content), FACTORS))}
    result = check_weights(variant_of(ONNX), content, details, checkpoint.weights)
    assert result is not None
    assert (result.status, result.first_divergent_layer) == ("fail", "conv1")
    assert "promises float32" in str(result.reason)


def test_a_tensor_without_a_record_is_named_at_its_place(checkpoint: Checkpoint) -> None:
    entries: Iterator[Any] = (each for each in recorded(ONNX, checkpoint) if each["source"] != "conv2.bias")
    faults = verify(checkpoint.weights, read(ONNX, exported(ONNX, checkpoint)), list(entries), FACTORS)
    assert [(fault.source, fault.tensor) for fault in faults] == [("conv2.bias", None), (None, "conv2.bias")]
