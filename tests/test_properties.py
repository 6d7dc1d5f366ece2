"""Properties over all model configurations: a valid one works everywhere, an invalid one is refused with a reason."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lenet_deploy import api, data
from lenet_deploy import checkpoint as checkpoints
from lenet_deploy.checkpoint import Checkpoint
from lenet_deploy.errors import DamagedFile, InvalidConfig, UnknownName
from lenet_deploy.models import MODELS, find_model, initialise
from lenet_deploy.models.config import ACTIVATIONS, KERNEL, MAX_SIDE, POOLINGS, LeNet5Config
from lenet_deploy.variants import ARTIFACTS, FORMATS, VARIANTS

T = TypeVar("T")
FIELDS = tuple(field.name for field in dataclasses.fields(LeNet5Config))
LAYERS = tuple(layer.name for layer in LeNet5Config().layers())


def examples(number: int) -> settings:
    """The same examples every time, and no limit on the time of one: this machine may be busy."""
    return settings(max_examples=number, deadline=None, derandomize=True, database=None)


@st.composite
def configs(draw: st.DrawFn) -> LeNet5Config:
    """Any valid configuration of a small network: the last feature map's side decides the image's."""
    padding = draw(st.integers(0, KERNEL - 1))
    size = 12 + 4 * draw(st.integers(1, 6)) - 2 * padding
    return LeNet5Config(
        in_channels=draw(st.sampled_from((1, 3))),
        image_size=size,
        padding=padding,
        channels=(draw(st.integers(1, 12)), draw(st.integers(1, 20))),
        hidden=(draw(st.integers(1, 40)), draw(st.integers(1, 30))),
        classes=draw(st.integers(2, 12)),
        pooling=draw(st.sampled_from(POOLINGS)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
    )


def as_settings(config: LeNet5Config) -> dict[str, str]:
    """The configuration as `--set` takes it."""
    return {key: ",".join(map(str, value)) if isinstance(value, tuple) else str(value) for key, value in dataclasses.asdict(config).items()}


def fresh(config: LeNet5Config, seed: int = 0) -> Checkpoint:
    return checkpoints.fresh(find_model("lenet5"), as_settings(config), seed)


def attempt(build: Callable[[], T]) -> tuple[T | None, str]:
    """What was built, or the reason of the refusal; any other exception is the test's failure."""
    try:
        return build(), ""
    except (InvalidConfig, DamagedFile) as refusal:
        return None, str(refusal)


def names_the_culprit(reason: str, key: str) -> bool:
    """Whether a refusal names the field and its value, or the layer that the value breaks."""
    return f"{key} = " in reason or any(f"layer {name}" in reason for name in LAYERS)


# Anything JSON can say, with the numbers near the limits often among it.
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 40) | st.integers() | st.sampled_from((MAX_SIDE, MAX_SIDE + 1)) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@examples(6)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_any_valid_config_exports_to_every_format_and_agrees_with_the_oracle(
    config: LeNet5Config, seed: int, digits: data.Dataset, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("any") / "bundle"
    report = api.export(fresh(config, seed), out, formats=FORMATS, device="cpu", dataset=digits)
    assert report.left_out == ()
    assert {artifact.name for artifact in report.bundle.manifest.artifacts} == {spec.name for spec in ARTIFACTS}
    assert {artifact.status for artifact in report.bundle.manifest.artifacts} == {"verified"}
    assert {result.variant for result in report.parity.results} == {variant.name for variant in VARIANTS if variant.device == "cpu"}
    assert {result.status for result in report.parity.results} == {"pass"}


@examples(30)
@given(config=configs())
def test_the_layer_table_of_any_valid_config_is_that_of_the_real_module(config: LeNet5Config) -> None:
    module = initialise("lenet5", config)
    shapes: list[tuple[int, ...]] = []
    for name, child in module.named_children():
        if name != "activation":
            child.register_forward_hook(lambda layer, inputs, output: shapes.append(tuple(output.shape[1:])))
    scores = module(torch.rand(2, config.in_channels, config.image_size, config.image_size))
    assert shapes == [layer.output for layer in config.layers()]
    assert scores.shape == (2, config.classes)
    parameters = {layer.name: layer.parameters for layer in config.layers() if layer.parameters}
    assert parameters == {name: sum(each.numel() for each in module.get_submodule(name).parameters()) for name in parameters}
    assert sum(parameters.values()) == sum(tensor.numel() for tensor in module.parameters())


@examples(30)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_any_checkpoint_survives_its_file(config: LeNet5Config, seed: int) -> None:
    original = fresh(config, seed)
    stored = checkpoints.to_bytes(original)
    loaded = checkpoints.from_bytes(stored, "memory")
    assert (loaded.config, loaded.metadata(), loaded.provenance) == (config, original.metadata(), original.provenance)
    assert loaded.weights.keys() == original.weights.keys()
    assert all(torch.equal(loaded.weights[name], original.weights[name]) for name in original.weights)
    assert checkpoints.to_bytes(loaded) == stored


@examples(30)
@given(config=configs())
def test_any_valid_config_is_the_same_from_settings_and_from_json(config: LeNet5Config) -> None:
    assert find_model("lenet5").configured(as_settings(config)) == config
    assert find_model("lenet5").config_from(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_a_side_is_valid_exactly_where_both_poolings_divide_it() -> None:
    for padding in range(KERNEL):
        for size in range(1, 80):
            padded = size + 2 * padding
            config, reason = attempt(functools.partial(LeNet5Config, image_size=size, padding=padding))
            assert (config is not None) == (padded >= 16 and padded % 4 == 0)
            assert config or any(f"layer {name}: OH = " in reason for name in LAYERS)


@examples(300)
@given(key=st.sampled_from(FIELDS), value=json_values)
def test_any_stored_value_gives_a_config_or_a_refusal_that_names_it(key: str, value: Any) -> None:
    for model in MODELS:
        if key in dataclasses.asdict(model.defaults):
            config, reason = attempt(functools.partial(model.config_from, {key: value}))
            stored = tuple(value) if isinstance(value, list) else value
            assert names_the_culprit(reason, key) if config is None else getattr(config, key) == stored


@examples(300)
@given(key=st.sampled_from(FIELDS), text=st.text() | st.lists(st.integers(-3, 1100).map(str), max_size=3).map(",".join))
def test_any_setting_gives_a_config_or_a_refusal_that_names_it(key: str, text: str) -> None:
    config, reason = attempt(lambda: find_model("lenet5").configured({key: text}))
    assert names_the_culprit(reason, key) if config is None else config.layers()[-1].parameters > 0


@examples(30)
@given(key=st.text().filter(lambda text: text not in FIELDS), text=st.text())
def test_any_other_key_is_refused_by_name(key: str, text: str) -> None:
    for model in MODELS:
        with pytest.raises(UnknownName) as refusal:
            model.configured({key: text})
        assert repr(key) in str(refusal.value)


@examples(150)
@given(config=configs(), place=st.sampled_from(("model", "config", "preprocessing", "labels", "weights_sha256")), value=json_values)
def test_any_other_metadata_is_read_or_refused_as_damaged(config: LeNet5Config, place: str, value: Any) -> None:
    body = {**dataclasses.asdict(fresh(config).metadata()), place: value}
    read, reason = attempt(lambda: checkpoints.metadata_from_json(body, "memory"))
    assert reason.startswith("memory: ") if read is None else all(isinstance(label, str) for label in read.labels)
