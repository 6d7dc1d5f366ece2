"""Model configurations: plain frozen values that check themselves and know their layer table (no torch)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from lenet_deploy.errors import InvalidConfig, UnknownName
from lenet_deploy.models.layers import Layer, convolution, linear, pool

KERNEL = 5  # LeNet-5's one convolution size
POOLINGS = ("avg", "max")
ACTIVATIONS = ("relu", "tanh", "sigmoid")
MAX_SIDE = 1024  # of anything a config counts: beyond it a LeNet is a typing mistake
MAX_PARAMETERS = 100_000_000  # 400 MB in float32, so that a mistyped config is refused and not allocated

# What the 1998 network multiplies by: its squashing is tanh of 2x/3, its subsampling four times the mean of a block.
# lenet5_1998 spells them out again, since torch.jit.script takes no global numbers; a test holds the two together.
SQUASH_SLOPE = 2.0 / 3.0
SUBSAMPLED_PIXELS = 4.0

# The 1998 paper's Table I: which of the six S2 maps each of the sixteen C3 maps sees. One row an S2 map.
C3_CONNECTIONS: tuple[tuple[int, ...], ...] = (
    (0, 4, 5, 6, 9, 10, 11, 12, 14, 15),
    (0, 1, 5, 6, 7, 10, 11, 12, 13, 15),
    (0, 1, 2, 6, 7, 8, 11, 13, 14, 15),
    (1, 2, 3, 6, 7, 8, 9, 12, 14, 15),
    (2, 3, 4, 7, 8, 9, 10, 12, 13, 15),
    (3, 4, 5, 8, 9, 10, 11, 13, 14, 15),
)


# Layers of the tensors whose names do not begin with their layer's.
TENSOR_LAYERS = {"prototypes": "rbf"}


class ModelConfig(Protocol):
    """What every configuration offers; equal configurations build equal models."""

    @property
    def in_channels(self) -> int:
        """Channels of the input image: 1 or 3."""

    @property
    def image_size(self) -> int:
        """Side of the square input image in pixels."""

    @property
    def classes(self) -> int:
        """Number of scores."""

    def layers(self) -> tuple[Layer, ...]:
        """The layer table, top to bottom; raises InvalidConfig where a division is not exact."""


@dataclass(frozen=True)
class LeNet5Config:
    """LeNet-5 as taught today: two 5x5 convolutions, two poolings, three linear layers.

    Attributes:
        in_channels: 1 (grey) or 3 (RGB).
        image_size: side of the square input; 32, 28, or any side that the formula divides exactly.
        padding: zeros around the image before conv1; 2 makes a 28x28 digit behave like a 32x32 one.
        channels: filters of conv1 and conv2.
        hidden: features of fc1 and fc2.
        classes: number of scores.
        pooling: `avg` or `max`.
        activation: `relu`, `tanh` or `sigmoid`.

    Raises:
        InvalidConfig: a value is out of range or a layer's division is not exact.
    """

    in_channels: int = 3
    image_size: int = 32
    padding: int = 0
    channels: tuple[int, ...] = (6, 16)
    hidden: tuple[int, ...] = (120, 84)
    classes: int = 10
    pooling: str = "avg"
    activation: str = "relu"

    def __post_init__(self) -> None:
        _one_of("in_channels", self.in_channels, (1, 3))
        _in_range("image_size", self.image_size, 1, MAX_SIDE)
        _in_range("padding", self.padding, 0, KERNEL - 1)
        _sizes("channels", self.channels)
        _sizes("hidden", self.hidden)
        _in_range("classes", self.classes, 2, MAX_SIDE)
        _one_of("pooling", self.pooling, POOLINGS)
        _one_of("activation", self.activation, ACTIVATIONS)
        layers = self.layers()
        total, largest = sum(layer.parameters for layer in layers), max(layers, key=lambda layer: layer.parameters)
        if total > MAX_PARAMETERS:
            raise InvalidConfig(
                f"this config has {total:,} parameters, {largest.parameters:,} of them in layer {largest.name}, "
                f"and at most {MAX_PARAMETERS:,} are built; use smaller sizes"
            )

    def layers(self) -> tuple[Layer, ...]:
        """The layer table; see `ModelConfig.layers`."""
        first, second = self.channels
        kind = f"{self.pooling} pool"
        conv1 = convolution("conv1", (self.in_channels, self.image_size, self.image_size), first, KERNEL, self.padding)
        pool1 = pool("pool1", kind, conv1.output)
        conv2 = convolution("conv2", pool1.output, second, KERNEL)
        pool2 = pool("pool2", kind, conv2.output)
        fc1 = linear("fc1", math.prod(pool2.output), self.hidden[0])
        fc2 = linear("fc2", self.hidden[0], self.hidden[1])
        fc3 = linear("fc3", self.hidden[1], self.classes)
        return (conv1, pool1, conv2, pool2, fc1, fc2, fc3)


@dataclass(frozen=True)
class LeNet1998Config:
    """LeNet-5 as published (LeCun, Bottou, Bengio, Haffner 1998, section II.B). Nothing in it varies.

    The fields exist so that every config answers the same questions; other values are refused.
    """

    in_channels: int = 1
    image_size: int = 32
    classes: int = 10

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default or type(value) is not type(field.default):
                raise InvalidConfig(
                    f"lenet5-1998 has {field.name} = {field.default}, not {value!r}: "
                    "its prototypes and connection table are fixed; use lenet5 to vary it"
                )

    def layers(self) -> tuple[Layer, ...]:
        """The layer table; see `ModelConfig.layers`."""
        c1 = convolution("c1", (1, 32, 32), 6, KERNEL)
        s2 = pool("s2", "subsampling", c1.output, parameters=2 * 6)
        dense = convolution("c3", s2.output, 16, KERNEL)
        weights = sum(map(len, C3_CONNECTIONS)) * KERNEL * KERNEL
        positions = dense.output[1] * dense.output[2]
        c3 = dataclasses.replace(dense, kind="conv, table", parameters=weights + 16, macs=weights * positions)
        s4 = pool("s4", "subsampling", c3.output, parameters=2 * 16)
        c5 = convolution("c5", s4.output, 120, KERNEL)
        f6 = linear("f6", 120, 84)
        rbf = Layer("rbf", "rbf distance", (10,), macs=84 * 10, fixed_parameters=84 * 10)
        return (c1, s2, c3, s4, c5, f6, rbf)


C = TypeVar("C", bound=LeNet5Config | LeNet1998Config)


def configure(defaults: C, settings: Mapping[str, str]) -> C:
    """Return `defaults` with `KEY=VALUE` settings applied, each parsed by its field's type.

    Raises:
        UnknownName: a key that the config does not have.
        InvalidConfig: a value that does not parse or breaks a rule.
    """
    return from_values(defaults, {key: _parse(defaults, key, text) for key, text in settings.items()})


def from_values(defaults: C, values: Mapping[str, Any]) -> C:
    """Return `defaults` with `values` (as read from JSON) put in their place, types checked.

    Raises:
        UnknownName: a key that the config does not have.
        InvalidConfig: a value of the wrong type or one that breaks a rule.
    """
    checked: dict[str, Any] = {}
    for key, value in values.items():
        default = _default(defaults, key)
        if isinstance(default, tuple) and isinstance(value, (list, tuple)):
            value = tuple(value)
        elif type(value) is not type(default):
            raise InvalidConfig(f"{key} = {value!r} has the wrong type; it looks like {default!r}")
        checked[key] = value
    return dataclasses.replace(defaults, **checked)


def _default(defaults: LeNet5Config | LeNet1998Config, key: str) -> Any:
    names = tuple(field.name for field in dataclasses.fields(defaults))
    if key not in names:
        raise UnknownName("config key", key, names)
    return getattr(defaults, key)


def _parse(defaults: LeNet5Config | LeNet1998Config, key: str, text: str) -> Any:
    default = _default(defaults, key)
    try:
        if isinstance(default, tuple):
            return tuple(int(part) for part in text.split(","))
        return int(text) if isinstance(default, int) else text
    except ValueError:
        kind = "whole numbers separated by commas" if isinstance(default, tuple) else "a whole number"
        raise InvalidConfig(f"{key} = {text!r} is not {kind}") from None


def _in_range(name: str, value: int, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise InvalidConfig(f"{name} = {value!r} is not a whole number from {low} to {high}")


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed or type(value) is not type(allowed[0]):  # True == 1 and 1.0 == 1 are typing mistakes
        raise InvalidConfig(f"{name} = {value!r} is not one of {', '.join(map(str, allowed))}")


def _sizes(name: str, values: tuple[int, ...]) -> None:
    if len(values) != 2:
        raise InvalidConfig(f"{name} = {','.join(map(str, values))} must be two numbers, such as 6,16")
    for value in values:
        _in_range(name, value, 1, MAX_SIDE)
