"""Input sets are named, seeded and what they say they are, and their reference values are computed once and are right."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lenet_deploy import api
from lenet_deploy.checkpoint import Checkpoint, from_bytes, to_bytes
from lenet_deploy.data import Dataset, fit, normalise
from lenet_deploy.parity import inputs as module
from lenet_deploy.parity.inputs import EAGER, InputSet, input_sets, round_to_tf32
from lenet_deploy.parity.judge import ILL_CONDITIONED, TOLERANCES, judge
from lenet_deploy.runtimes.eager import trace_module

NAMES = (
    "digits test split",
    "normal, seed 0",
    "uniform, seed 0",
    "constants",
    "one-hot pixels",
    "large, normal x 10000",
    "subnormal, normal x 1e-39",
)
COUNT = 16
each_set = pytest.mark.parametrize("name", NAMES)
each_precision = pytest.mark.parametrize("precision", TOLERANCES)


@pytest.fixture(scope="module")
def sets(tiny: Checkpoint, few: Dataset) -> dict[str, InputSet]:
    """The tiny network's, by name."""
    return {inputs.name: inputs for inputs in input_sets(tiny, few, COUNT)}


@pytest.fixture(scope="module")
def old(few: Dataset) -> tuple[Checkpoint, dict[str, InputSet]]:
    """The 1998 network, whose black and white are other numbers than zero and one, and its sets."""
    checkpoint = api.load("lenet5-1998")
    return checkpoint, {inputs.name: inputs for inputs in input_sets(checkpoint, few, COUNT)}


def test_the_sets_have_their_names_in_their_order(sets: dict[str, InputSet]) -> None:
    assert tuple(sets) == NAMES


@each_set
def test_images_are_the_models_input_and_have_a_score_each(name: str, sets: dict[str, InputSet], tiny: Checkpoint, few: Dataset) -> None:
    counts = dict(zip(NAMES, (len(few.test_images), COUNT, COUNT, 2, 20 * 20, COUNT, COUNT), strict=True))
    inputs = sets[name]
    assert inputs.images.shape == (counts[name], *tiny.preprocessing.input_shape)
    assert inputs.images.dtype == torch.float32
    assert inputs.images.is_contiguous()
    assert inputs.images.isfinite().all()
    assert (inputs.oracle.shape, inputs.oracle.dtype) == ((counts[name], 10), torch.float64)


@each_set
def test_another_call_makes_the_same_set_whatever_the_global_seed(
    name: str, sets: dict[str, InputSet], tiny: Checkpoint, few: Dataset
) -> None:
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    again = next(inputs for inputs in input_sets(tiny, few, COUNT) if inputs.name == name)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert torch.equal(again.images, sets[name].images)
    assert torch.equal(again.oracle, sets[name].oracle)
    assert torch.equal(again.condition("fp32"), sets[name].condition("fp32"))


def test_only_the_test_split_is_labelled_and_is_whole(sets: dict[str, InputSet], tiny: Checkpoint, few: Dataset) -> None:
    first, *others = sets.values()
    assert torch.equal(first.images, normalise(fit(few.test_images, tiny.preprocessing), tiny.preprocessing))
    assert first.labels is not None
    assert torch.equal(first.labels, few.test_labels)
    assert [inputs.labels for inputs in others] == [None] * 6


def test_normal_and_uniform_images_have_their_distributions(tiny: Checkpoint, few: Dataset) -> None:
    _, normal, uniform, *_ = input_sets(tiny, few, 256)
    assert abs(float(normal.images.mean())) < 0.02
    assert abs(float(normal.images.std()) - 1.0) < 0.02
    assert 0.0 <= float(uniform.images.min()) < 0.001
    assert 0.999 < float(uniform.images.max()) <= 1.0
    assert abs(float(uniform.images.mean()) - 0.5) < 0.01


def test_uniform_images_and_constants_reach_what_black_and_white_become(old: tuple[Checkpoint, dict[str, InputSet]]) -> None:
    checkpoint, sets = old
    edges = normalise(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 32, 32), checkpoint.preprocessing)
    assert edges[:, 0, 0, 0].tolist() == pytest.approx([-0.1, 1.175])
    assert sets["constants"].images[:, 0, 0, 0].tolist() == pytest.approx([0.0, 1.0, -0.1, 1.175])
    assert -0.1 <= float(sets["uniform, seed 0"].images.min()) < -0.09
    assert 1.16 < float(sets["uniform, seed 0"].images.max()) <= 1.175


def test_constants_are_constant_and_none_comes_twice(sets: dict[str, InputSet]) -> None:
    images = sets["constants"].images
    assert images[:, 0, 0, 0].tolist() == [0.0, 1.0], "black and white are zero and one here"
    assert all((image == image[0, 0, 0]).all() for image in images)


def test_large_and_subnormal_images_are_the_normal_ones_scaled(sets: dict[str, InputSet]) -> None:
    normal, large, tiny = (sets[name].images for name in (NAMES[1], NAMES[5], NAMES[6]))
    assert torch.equal(large, normal * 1e4)
    assert torch.equal(tiny, normal * 1e-39)


def test_subnormal_images_are_subnormal_and_not_flushed_to_zero(sets: dict[str, InputSet]) -> None:
    images = sets["subnormal, normal x 1e-39"].images
    assert 0.0 < float(images.abs().max()) < torch.finfo(torch.float32).smallest_normal
    assert (images != 0).double().mean() > 0.999


def test_each_pixel_of_a_small_input_is_one_exactly_once(sets: dict[str, InputSet]) -> None:
    images = sets["one-hot pixels"].images.flatten(1)
    assert torch.equal(images, torch.eye(400))


def test_a_large_input_has_a_seeded_choice_of_its_pixels(few: Dataset) -> None:
    one_hot = functools.partial(module._one_hot, (3, 40, 40))
    first, again = (one_hot(torch.Generator().manual_seed(0)) for _ in range(2))
    other = one_hot(torch.Generator().manual_seed(1))
    assert first.shape == (4096, 3, 40, 40)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    flat = first.flatten(1)
    assert (flat.sum(dim=1) == 1).all()
    assert flat.count_nonzero() == 4096
    assert flat.sum(dim=0).max() == 1, "no pixel comes twice"
    assert (flat.argmax(dim=1).diff() > 0).all(), "in their order"
    assert all(first[:, channel].any() for channel in range(3))


def test_colour_images_have_three_channels_of_their_own(few: Dataset) -> None:
    checkpoint = api.load("lenet5", settings={"image_size": "16", "channels": "2,3", "hidden": "8,6"})
    for inputs in input_sets(checkpoint, few, 4):
        assert inputs.images.shape[1:] == (3, 16, 16)
        if "normal" in inputs.name:
            assert not torch.equal(inputs.images[:, 0], inputs.images[:, 1])


# The reference values.


@each_set
def test_the_oracle_is_the_checkpoints_network_in_float64(name: str, sets: dict[str, InputSet], tiny: Checkpoint) -> None:
    weight = {key: tensor.double() for key, tensor in tiny.weights.items()}
    x = torch.conv2d(sets[name].images.double(), weight["conv1.weight"], weight["conv1.bias"]).relu()
    x = torch.conv2d(nn.functional.avg_pool2d(x, 2), weight["conv2.weight"], weight["conv2.bias"]).relu()
    x = nn.functional.avg_pool2d(x, 2).reshape(len(x), -1)
    for layer in ("fc1", "fc2"):
        x = (x @ weight[f"{layer}.weight"].T + weight[f"{layer}.bias"]).relu()
    x = x @ weight["fc3.weight"].T + weight["fc3.bias"]
    assert torch.allclose(sets[name].oracle, x, rtol=1e-12, atol=1e-13 * float(x.abs().max()))


def test_the_oracle_of_the_1998_network_is_its_formulas_in_float64(old: tuple[Checkpoint, dict[str, InputSet]]) -> None:
    checkpoint, sets = old
    w = {key: tensor.double() for key, tensor in checkpoint.weights.items()}

    def squash(x: torch.Tensor) -> torch.Tensor:
        return 1.7159 * torch.tanh(2.0 / 3.0 * x)

    def subsample(x: torch.Tensor, name: str) -> torch.Tensor:
        blocks = x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]
        return squash(blocks * w[f"{name}.coefficient"] + w[f"{name}.bias"])

    for inputs in sets.values():
        x = subsample(squash(torch.conv2d(inputs.images.double(), w["c1.weight"], w["c1.bias"])), "s2")
        x = subsample(squash(torch.conv2d(x, w["c3.weight"], w["c3.bias"])), "s4")
        x = squash(torch.conv2d(x, w["c5.weight"], w["c5.bias"])).flatten(1)
        x = squash(x @ w["f6.weight"].T + w["f6.bias"])
        scores = -(x[:, None] - w["prototypes"]).square().sum(dim=2)
        assert torch.allclose(inputs.oracle, scores, rtol=1e-11), inputs.name


def test_the_oracle_needs_no_particular_batch(tiny: Checkpoint, sets: dict[str, InputSet]) -> None:
    for inputs in sets.values():
        with torch.inference_mode():
            whole = tiny.module().double()(inputs.images.double())
        assert torch.allclose(inputs.oracle, whole, rtol=1e-13, atol=1e-300)


@each_set
def test_the_peak_is_the_largest_value_of_sampled_images_and_of_all_scores(name: str, sets: dict[str, InputSet], tiny: Checkpoint) -> None:
    inputs = sets[name]
    sample = inputs.images[:: len(inputs.images) // module.CHUNK + 1]
    assert len(sample) <= module.CHUNK
    with torch.inference_mode():
        values = [float(tap.value.abs().max()) for tap in trace_module(tiny.module().double(), sample.double())]
    assert len(values) == 13
    assert inputs.peak == max(*values, float(inputs.oracle.abs().max()))
    if len(inputs.images) <= module.CHUNK:
        assert inputs.peak >= float(inputs.images.abs().max())


def test_the_smallest_input_is_the_smallest_that_is_not_zero(sets: dict[str, InputSet], tiny: Checkpoint, few: Dataset) -> None:
    assert sets["one-hot pixels"].smallest == 1.0
    assert sets["constants"].smallest == 1.0
    assert sets["digits test split"].smallest == pytest.approx(1 / 255)
    blank = dataclasses.replace(few, test_images=torch.zeros_like(few.test_images[:2]), test_labels=few.test_labels[:2])
    assert input_sets(tiny, blank, 1)[0].smallest == math.inf


@each_set
@each_precision
def test_conditions_are_at_least_one_and_small_but_for_large_images(name: str, precision: str, sets: dict[str, InputSet]) -> None:
    condition = sets[name].condition(precision)
    assert (condition.shape, condition.dtype) == ((len(sets[name].images),), torch.float64)
    assert (condition >= 1.0).all()
    assert condition.isfinite().all()
    if not name.startswith("large"):
        assert condition.median() < ILL_CONDITIONED / 2


def test_an_image_whose_scores_cancel_is_ill_conditioned(tiny: Checkpoint, few: Dataset) -> None:
    fc3 = {name: tensor.clone() for name, tensor in tiny.weights.items()}
    inputs = input_sets(tiny, few, 1)[3]  # constants
    with torch.no_grad():
        hidden = trace_module(tiny.module().double(), inputs.images.double())[-2].value
    # The bias takes away all but a millionth of what the products give the black image.
    fc3["fc3.bias"] = (-(hidden[0] @ fc3["fc3.weight"].double().T) * (1 - 1e-6)).float()
    cancelling = input_sets(dataclasses.replace(tiny, weights=fc3), few, 1)[3]
    black, white = cancelling.condition("fp32").tolist()
    assert black > 1e4 > 100.0 > white
    assert cancelling.condition("int8").tolist() == [1.0, 1.0]


@each_precision
def test_condition_is_what_moving_weights_and_pixels_by_one_epsilon_does(
    precision: str, sets: dict[str, InputSet], tiny: Checkpoint
) -> None:
    inputs, epsilon = sets["normal, seed 0"], TOLERANCES[precision].epsilon
    generator = torch.Generator().manual_seed(99)  # other draws than the module's own

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2.0 - 1.0
        return tensor.double() * (1 + epsilon * signs)

    perturbed = tiny.module().double()
    perturbed.load_state_dict({name: moved(tensor) for name, tensor in tiny.weights.items()})
    with torch.no_grad():
        scores = perturbed(moved(inputs.images))
    largest = inputs.oracle.abs().amax(dim=1)
    seen = (scores - inputs.oracle).abs().amax(dim=1) / (epsilon * largest)
    assert (seen < 8 * inputs.condition(precision)).all()
    assert (inputs.condition(precision) < 8 * seen.clamp_min(1.0)).all()


@each_precision
def test_eagers_error_is_that_of_the_checkpoint_run_in_that_precision_and_at_least_the_sets_average(
    precision: str, sets: dict[str, InputSet], tiny: Checkpoint
) -> None:
    inputs = sets["digits test split"]
    with torch.inference_mode():
        scores = EAGER[precision](tiny.module())(inputs.images).double()
    found = inputs.eager_rmse(precision)
    assert found is not None
    assert (found.shape, found.dtype) == ((len(inputs.images),), torch.float64)
    direct = torch.stack([(each - right).norm() for each, right in zip(scores, inputs.oracle, strict=True)])
    scale = torch.stack([right.norm() for right in inputs.oracle]) * inputs.condition(precision)
    average = scale * float((direct / scale).norm()) / math.sqrt(len(direct))
    assert torch.allclose(found * math.sqrt(10), direct.maximum(average), rtol=1e-9)
    assert (direct > average).any(), "an image that eager finds hard is judged by its own error"
    assert (direct < average).any(), "and luck on one image is no measure"


def test_shorter_formats_err_more_in_the_order_of_their_epsilons(sets: dict[str, InputSet]) -> None:
    medians = {}
    for precision in TOLERANCES:
        found = sets["normal, seed 0"].eager_rmse(precision)
        assert found is not None
        medians[precision] = float(found.median())
    assert medians["fp32"] * 100 < medians["tf32"]
    assert medians["tf32"] / 4 < medians["fp16"] < medians["tf32"] * 4, "as many bits"
    assert medians["fp16"] * 2 < medians["bf16"]


@each_precision
def test_eager_itself_passes_its_own_judgement(precision: str, sets: dict[str, InputSet], tiny: Checkpoint) -> None:
    inputs = sets["digits test split"]
    with torch.inference_mode():
        scores = EAGER[precision](tiny.module())(inputs.images)
    judged = judge(scores, inputs.oracle, precision, inputs.eager_rmse(precision), inputs.condition(precision))
    assert (judged.passed, judged.reason) == (True, None)
    assert judged.budget_used is not None
    assert judged.budget_used < 0.5


def test_int8_has_neither_an_eager_reference_nor_a_condition(sets: dict[str, InputSet]) -> None:
    inputs = sets["digits test split"]
    assert inputs.eager_rmse("int8") is None
    assert (inputs.condition("int8") == 1.0).all()


def test_references_are_computed_once_a_precision(tiny: Checkpoint, few: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    eager, condition = module._eager_rmse, module._condition
    monkeypatch.setattr(module, "_eager_rmse", lambda *args: (calls.append(f"eager {args[-1]}"), eager(*args))[1])
    monkeypatch.setattr(module, "_condition", lambda *args: (calls.append(f"condition {args[-1]}"), condition(*args))[1])
    inputs = input_sets(tiny, few, 2)[1]
    assert calls == [], "nothing before it is asked for"
    for _ in range(3):
        for precision in ("fp32", "fp16"):
            inputs.eager_rmse(precision)
            inputs.condition(precision)
    assert sorted(calls) == ["condition fp16", "condition fp32", "eager fp16", "eager fp32"]


def test_making_sets_and_references_leaves_the_checkpoint_as_it_is(tiny: Checkpoint, few: Dataset) -> None:
    checkpoint = from_bytes(to_bytes(tiny), "memory")
    for inputs in input_sets(checkpoint, few, 2):
        for precision in TOLERANCES:
            inputs.eager_rmse(precision)
            inputs.condition(precision)
    assert all(torch.equal(checkpoint.weights[name], tensor) for name, tensor in tiny.weights.items())


# TF32.

float32s = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**127), max_value=2.0**127)


def tf32(value: float) -> float:
    return float(round_to_tf32(torch.tensor([value], dtype=torch.float32))[0])


@settings(deadline=None, derandomize=True, max_examples=300)
@given(float32s)
def test_rounding_to_tf32_is_to_the_nearest_of_its_numbers(value: float) -> None:
    rounded = tf32(value)
    assert tf32(rounded) == rounded
    if abs(value) >= torch.finfo(torch.float32).smallest_normal:
        assert abs(rounded - value) <= 2.0**-11 * abs(value)
        mantissa, _ = math.frexp(rounded)
        assert mantissa * 2**11 == int(mantissa * 2**11), "ten bits behind the leading one"
    assert math.copysign(1.0, rounded) == math.copysign(1.0, value)
    assert tf32(-value) == -rounded


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("value", "rounded"), [(1 + 2**-11, 1 + 2**-10), (1 + 3 * 2**-11, 1 + 2 * 2**-10), (1 + 2**-11 - 2**-23, 1.0)])
def test_ties_go_away_from_zero(sign: float, value: float, rounded: float) -> None:
    assert tf32(sign * value) == sign * rounded


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1.5, math.inf, -math.inf, 65504.0, 2.0**-126])
def test_what_tf32_holds_stays_as_it_is(value: float) -> None:
    assert tf32(value) == value


def test_rounding_keeps_shape_and_takes_any_layout_and_leaves_its_argument_alone() -> None:
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).T
    before = values.clone()
    assert torch.equal(round_to_tf32(values), round_to_tf32(values.contiguous()))
    assert torch.equal(values, before)
    assert math.isnan(tf32(math.nan))


def test_tf32_rounds_the_operands_of_convolutions_and_products_and_nothing_else(tiny: Checkpoint) -> None:
    images = torch.randn(4, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    weights = {name: tensor.double() for name, tensor in tiny.weights.items()}

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return round_to_tf32(tensor.float()).double()

    x = images.double()
    for layer in ("conv1", "conv2"):
        x = torch.conv2d(rounded(x), rounded(weights[f"{layer}.weight"]), weights[f"{layer}.bias"]).float().double().relu()
        x = nn.functional.avg_pool2d(x, 2)
    x = x.flatten(1)
    for layer in ("fc1", "fc2", "fc3"):
        x = (rounded(x) @ rounded(weights[f"{layer}.weight"]).T + weights[f"{layer}.bias"]).float().double()
        x = x if layer == "fc3" else x.relu()
    with torch.inference_mode():
        scores = EAGER["tf32"](tiny.module())(images)
    assert torch.allclose(scores.double(), x, rtol=0, atol=3e-4 * float(x.abs().max()))
    plain = tiny.module()(images).detach().double()
    assert float((scores - plain).abs().max()) > 1e-5 * float(x.abs().max()), "and it does round"
