"""The architectures: their numbers, their arithmetic, and what their configurations refuse."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from lenet_deploy import data
from lenet_deploy.errors import InvalidConfig, UnknownName
from lenet_deploy.models import MODELS, Model, find_model, initialise
from lenet_deploy.models.config import ACTIVATIONS, C3_CONNECTIONS, MAX_SIDE, LeNet5Config, LeNet1998Config, ModelConfig
from lenet_deploy.models.layers import Layer, output_size
from lenet_deploy.models.lenet5_1998 import LeNet1998, Subsampling, connection_mask, prototypes, squash
from lenet_deploy.train import TrainConfig, train

TODAY = tuple(model for model in MODELS if isinstance(model.defaults, LeNet5Config))
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
each_model_of_today = pytest.mark.parametrize("model", TODAY, ids=lambda model: model.name)


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "golden/lenet5.json").read_text())["models"]


@pytest.fixture
def paper() -> LeNet1998:
    module = initialise("lenet5-1998", LeNet1998Config())
    assert isinstance(module, LeNet1998)
    return module


def activations(module: nn.Module, config: ModelConfig) -> list[torch.Tensor]:
    """What each layer of the table puts out for two images, the scores last."""
    outputs: list[torch.Tensor] = []
    for name, child in module.named_children():
        if name != "activation":
            child.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    with torch.no_grad():
        scores = module(torch.rand(2, config.in_channels, config.image_size, config.image_size))
    return [*outputs[: len(config.layers()) - 1], scores]


def per_layer(layers: tuple[Layer, ...], column: str) -> dict[str, int]:
    """One column of the layer table where it is not zero, and its total."""
    found = {layer.name: getattr(layer, column) for layer in layers if getattr(layer, column)}
    return {**found, "total": sum(found.values())}


def scalars(module: nn.Module, layer: str) -> int:
    return sum(tensor.numel() for tensor in module.get_submodule(layer).parameters())


def test_the_golden_file_describes_every_registered_model(golden: dict[str, Any]) -> None:
    assert golden.keys() == {model.name for model in MODELS}


@each_model
def test_the_default_input_is_the_golden_one(model: Model, golden: dict[str, Any]) -> None:
    config = model.defaults
    assert [config.in_channels, config.image_size, config.image_size] == golden[model.name]["input"]


@each_model_of_today
def test_parameters_and_macs_are_the_golden_ones(model: Model, golden: dict[str, Any]) -> None:
    layers = model.defaults.layers()
    assert per_layer(layers, "parameters") == golden[model.name]["parameters"]
    assert per_layer(layers, "macs") == golden[model.name]["macs"]


def test_with_one_channel_the_totals_are_the_golden_ones(golden: dict[str, Any]) -> None:
    layers = find_model("lenet5").configured({"in_channels": "1"}).layers()
    assert per_layer(layers, "parameters")["total"] == golden["lenet5"]["parameters_one_channel_total"]
    assert per_layer(layers, "macs")["total"] == golden["lenet5"]["macs_one_channel_total"]


@each_model_of_today
def test_the_modules_hold_the_golden_numbers_of_parameters(model: Model, golden: dict[str, Any]) -> None:
    module = initialise(model.name, model.defaults)
    expected = dict(golden[model.name]["parameters"])
    assert sum(tensor.numel() for tensor in module.parameters()) == expected.pop("total")
    assert {name: scalars(module, name) for name in expected} == expected


def test_the_1998_table_holds_the_golden_numbers(golden: dict[str, Any]) -> None:
    layers = LeNet1998Config().layers()
    expected = {name.lower(): count for name, count in golden["lenet5-1998"]["trainable_parameters"].items()}
    assert per_layer(layers, "parameters") == expected
    assert expected["total"] == 60_000
    assert sum(layer.fixed_parameters for layer in layers) == golden["lenet5-1998"]["fixed_parameters"]["RBF prototypes"] == 840


def test_the_1998_module_trains_the_golden_numbers_of_scalars(paper: LeNet1998, golden: dict[str, Any]) -> None:
    expected = {name.lower(): count for name, count in golden["lenet5-1998"]["trainable_parameters"].items()}
    total = expected.pop("total")
    counts = {name: scalars(paper, name) for name in expected}
    counts["c3"] -= int((1 - paper.c3.mask.expand_as(paper.c3.weight)).sum())
    assert counts == expected
    assert sum(counts.values()) == total
    assert paper.prototypes.numel() == golden["lenet5-1998"]["fixed_parameters"]["RBF prototypes"]
    assert all(tensor is not paper.prototypes for tensor in paper.parameters())


def test_c3_is_connected_by_the_golden_table(golden: dict[str, Any]) -> None:
    table = tuple(tuple(maps) for _, maps in sorted(golden["lenet5-1998"]["c3_connections"].items()))
    assert table == C3_CONNECTIONS
    mask = connection_mask()
    assert all(tuple(mask[:, source, 0, 0].nonzero().flatten().tolist()) == maps for source, maps in enumerate(table))


@each_model
def test_the_layer_table_has_the_shapes_of_the_real_activations(model: Model) -> None:
    config = model.defaults
    shapes = [tuple(output.shape[1:]) for output in activations(initialise(model.name, config), config)]
    assert shapes == [layer.output for layer in config.layers()]


@each_model
def test_the_layer_table_has_the_windows_of_the_real_layers(model: Model) -> None:
    module = initialise(model.name, model.defaults)
    rows = {layer.name: (layer.kernel, layer.stride, layer.padding) for layer in model.defaults.layers() if layer.kind.startswith("conv")}
    real = {
        name: (child.kernel_size[0], child.stride[0], child.padding[0])
        for name, child in module.named_children()
        if isinstance(child, nn.Conv2d)
    }
    assert rows == real


def test_bytes_in_the_layer_table_are_those_of_float32() -> None:
    rbf = LeNet1998Config().layers()[-1]
    conv1 = LeNet5Config().layers()[0]
    assert (rbf.parameter_bytes, rbf.output_bytes) == (4 * 840, 4 * 10)
    assert (conv1.parameter_bytes, conv1.output_bytes) == (4 * 456, 4 * 6 * 28 * 28)


def test_a_28_pixel_image_padded_by_2_has_the_layers_of_a_32_pixel_one() -> None:
    padded = LeNet5Config(image_size=28, padding=2).layers()
    assert [layer.output for layer in padded] == [layer.output for layer in LeNet5Config().layers()]
    assert LeNet5Config(image_size=28).layers()[3].output == (16, 4, 4)


def test_output_size_is_the_formula() -> None:
    assert output_size("any", 7, 3, 2, 0) == 3
    assert output_size("any", 4, 3, 1, 1) == 4
    assert output_size("any", 5, 5, 1, 0) == 1


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_lenet5_is_its_layers_one_after_another(pooling: str, activation: str) -> None:
    module = initialise("lenet5", LeNet5Config(pooling=pooling, activation=activation))
    w, act = module.state_dict(), getattr(torch, activation)
    pool = functional.avg_pool2d if pooling == "avg" else functional.max_pool2d
    image = torch.rand(3, 3, 32, 32)
    x = pool(act(functional.conv2d(image, w["conv1.weight"], w["conv1.bias"])), 2)
    x = pool(act(functional.conv2d(x, w["conv2.weight"], w["conv2.bias"])), 2)
    x = x.reshape(-1, 5 * 5 * 16)
    x = act(functional.linear(x, w["fc1.weight"], w["fc1.bias"]))
    x = act(functional.linear(x, w["fc2.weight"], w["fc2.bias"]))
    x = functional.linear(x, w["fc3.weight"], w["fc3.bias"])
    with torch.no_grad():
        torch.testing.assert_close(module(image), x)


def test_features_are_flattened_channel_by_channel_then_row_by_row() -> None:
    config = LeNet5Config()
    module = initialise("lenet5", config)
    seen: list[torch.Tensor] = []
    module.get_submodule("fc1").register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    pooled = activations(module, config)[3]
    assert seen[0].shape == (2, 400)
    assert all(torch.equal(seen[0][:, 25 * c + 5 * y + x], pooled[:, c, y, x]) for c in (0, 7, 15) for y in (0, 3) for x in (1, 4))


def test_squash_is_the_scaled_tanh_which_keeps_one_and_minus_one() -> None:
    points = torch.tensor([-1.0, 0.0, 1.0, 2.5])
    torch.testing.assert_close(squash(points), torch.tensor([1.7159 * math.tanh(2 / 3 * x) for x in points.tolist()]))
    torch.testing.assert_close(squash(points)[[0, 2]], torch.tensor([-1.0, 1.0]), atol=1e-4, rtol=0)


def test_subsampling_is_the_sum_of_four_times_a_coefficient_plus_a_bias() -> None:
    layer = Subsampling(2)
    with torch.no_grad():
        layer.coefficient.copy_(torch.tensor([0.5, -2.0]).reshape(2, 1, 1))
        layer.bias.copy_(torch.tensor([10.0, 1.0]).reshape(2, 1, 1))
        found = layer(torch.arange(32.0).reshape(1, 2, 4, 4))
    sums = torch.tensor([[[10.0, 18.0], [42.0, 50.0]], [[74.0, 82.0], [106.0, 114.0]]])
    assert torch.equal(found[0], torch.stack((0.5 * sums[0] + 10, -2.0 * sums[1] + 1)))


def test_absent_c3_connections_stay_exactly_zero_while_adam_trains(paper: LeNet1998) -> None:
    absent = paper.c3.mask.expand_as(paper.c3.weight) == 0
    before = paper.c3.weight.detach().clone()
    optimizer = torch.optim.Adam(paper.train().parameters(), lr=0.01, weight_decay=0.01)
    images, labels = torch.rand(32, 1, 32, 32), torch.arange(32) % 10
    for _ in range(5):
        optimizer.zero_grad()
        functional.cross_entropy(paper(images), labels).backward()
        optimizer.step()
    assert int(absent.sum()) == (6 * 16 - sum(map(len, C3_CONNECTIONS))) * 25
    assert not paper.c3.weight[absent].any()
    assert (paper.c3.weight != before)[~absent].all()


def test_training_and_inference_compute_the_same_scores(paper: LeNet1998) -> None:
    images = torch.rand(4, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(paper.train()(images), paper.eval()(images))


def test_a_trained_1998_checkpoint_keeps_table_and_prototypes(digits: data.Dataset) -> None:
    some = dataclasses.replace(digits, train_images=digits.train_images[:256], train_labels=digits.train_labels[:256])
    weights = train(TrainConfig("lenet5-1998", epochs=1, device="cpu"), some).weights
    assert not weights["c3.weight"].mul(1 - connection_mask()).any()
    assert torch.equal(weights["prototypes"], prototypes())


def test_prototypes_are_ten_different_drawings_in_plus_and_minus_one() -> None:
    drawn = prototypes()
    assert drawn.shape == (10, 7 * 12)
    assert drawn.abs().eq(1).all()
    assert len(drawn.unique(dim=0)) == 10


def test_1998_scores_are_negated_squared_distances_to_the_prototypes(paper: LeNet1998) -> None:
    *_, before, scores = activations(paper, LeNet1998Config())
    distances = torch.cdist(squash(before).double(), prototypes().double()).square()
    torch.testing.assert_close(scores.double(), -distances, rtol=1e-5, atol=1e-4)
    assert torch.equal(scores.argmax(dim=1), distances.argmin(dim=1))


def test_1998_weights_start_with_variance_one_over_fan_in_and_biases_at_zero(paper: LeNet1998) -> None:
    for name, fan_in in (("c1", 25), ("c5", 400), ("f6", 120)):
        assert paper.get_parameter(f"{name}.weight").std().item() == pytest.approx(fan_in**-0.5, rel=0.15)
    for weight, inputs in zip(paper.c3.weight, connection_mask().sum(dim=(1, 2, 3)).tolist(), strict=True):
        assert weight[weight != 0].std().item() == pytest.approx((25 * inputs) ** -0.5, rel=0.25)
    assert not any(tensor.any() for name, tensor in paper.named_parameters() if name.endswith("bias"))


@each_model
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(model: Model) -> None:
    first, again, other = (initialise(model.name, model.defaults, seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@each_model
def test_initialising_leaves_the_global_random_state_alone(model: Model) -> None:
    before = torch.get_rng_state()
    module = initialise(model.name, model.defaults, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert not module.training


def test_settings_are_parsed_by_the_type_of_their_field() -> None:
    settings = {"in_channels": "1", "channels": "8,16", "hidden": "32, 24", "pooling": "max", "activation": "tanh", "classes": "7"}
    expected = LeNet5Config(in_channels=1, channels=(8, 16), hidden=(32, 24), classes=7, pooling="max", activation="tanh")
    assert find_model("lenet5").configured(settings) == expected


@each_model
def test_a_config_survives_json(model: Model) -> None:
    assert model.config_from(json.loads(json.dumps(dataclasses.asdict(model.defaults)))) == model.defaults


@each_model
def test_an_unknown_key_is_refused_with_the_nearest_ones(model: Model) -> None:
    with pytest.raises(UnknownName, match=r"unknown config key 'clases'; did you mean classes"):
        model.configured({"clases": "10"})
    with pytest.raises(UnknownName, match="config key"):
        model.config_from({"zzz": 1})


def test_an_unknown_model_is_refused_with_the_nearest_ones() -> None:
    with pytest.raises(UnknownName, match="unknown model 'lenet-5'; did you mean lenet5"):
        find_model("lenet-5")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_size": "29"}, ["pool1", "(25 + 2*0 - 2)/2 + 1 = 12.5", "image_size"]),
        ({"image_size": "30"}, ["pool2", "(9 + 2*0 - 2)/2 + 1 = 4.5"]),
        ({"image_size": "4"}, ["conv1", "(4 + 2*0 - 5)/1 + 1", "does not fit"]),
        ({"image_size": "12"}, ["conv2", "(4 + 2*0 - 5)/1 + 1", "does not fit"]),
        ({"image_size": "0"}, ["image_size = 0", str(MAX_SIDE)]),
        ({"image_size": str(MAX_SIDE + 1)}, ["image_size", str(MAX_SIDE)]),
        ({"image_size": "28.5"}, ["image_size = '28.5'", "whole number"]),
        ({"image_size": ""}, ["image_size = ''", "whole number"]),
        ({"in_channels": "2"}, ["in_channels = 2", "1, 3"]),
        ({"padding": "-1"}, ["padding = -1", "0 to 4"]),
        ({"padding": "5"}, ["padding = 5", "0 to 4"]),
        ({"channels": "6"}, ["channels = 6", "two numbers"]),
        ({"channels": "6,16,32"}, ["channels = 6,16,32", "two numbers"]),
        ({"channels": "6;16"}, ["channels = '6;16'", "separated by commas"]),
        ({"hidden": "0,84"}, ["hidden = 0", f"1 to {MAX_SIDE}"]),
        ({"classes": "1"}, ["classes = 1", "2 to"]),
        ({"pooling": "mean"}, ["pooling = 'mean'", "avg, max"]),
        ({"activation": "gelu"}, ["activation = 'gelu'", "relu, tanh"]),
        ({"image_size": "1020", "channels": "6,1024"}, ["fc1", "100,000,000"]),
    ],
)
def test_a_config_that_breaks_a_rule_is_refused_with_the_field_or_layer_and_the_numbers(settings: dict[str, str], words: list[str]) -> None:
    with pytest.raises(InvalidConfig) as refusal:
        find_model("lenet5").configured(settings)
    assert [word for word in words if word not in str(refusal.value)] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("classes", value) for value in ("10", True, 10.0, None)),
        *(("channels", value) for value in (6, "6,16", [6.0, 16], [6, None])),
        *(("hidden", value) for value in ([[120], [84]], {})),
        ("image_size", [32]),
        ("pooling", 1),
    ],
)
def test_a_stored_value_of_the_wrong_type_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(InvalidConfig, match=key):
        find_model("lenet5").config_from({key: value})


@pytest.mark.parametrize("value", [1.0, True])
def test_a_value_that_only_equals_a_valid_one_is_refused(value: Any) -> None:
    with pytest.raises(InvalidConfig, match="in_channels"):
        LeNet5Config(in_channels=value)
    with pytest.raises(InvalidConfig, match="in_channels"):
        LeNet1998Config(in_channels=value)


@pytest.mark.parametrize(("key", "text"), [("in_channels", "3"), ("image_size", "28"), ("classes", "26")])
def test_the_1998_network_does_not_vary(key: str, text: str) -> None:
    with pytest.raises(InvalidConfig, match=rf"lenet5-1998 has {key} = .*, not {text}.*use lenet5"):
        find_model("lenet5-1998").configured({key: text})
