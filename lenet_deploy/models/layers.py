"""The layer table: output shapes, parameters and MACs, from the formulas alone (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lenet_deploy.errors import InvalidConfig

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Layer:
    """One row of the layer table.

    Attributes:
        name: layer name, as in the checkpoint's tensor names.
        kind: what it does, e.g. `conv`, `avg pool`, `linear`.
        output: output shape without the batch dimension, (C, H, W) or (features,).
        kernel: side of the square window; None where there is none.
        stride: step of the window; None where there is none.
        padding: zeros added on each side; None where there is none.
        parameters: trainable scalars.
        macs: multiply-accumulates for one image (convolutions and linear layers).
        fixed_parameters: scalars that training never changes.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    kernel: int | None = None
    stride: int | None = None
    padding: int | None = None
    parameters: int = 0
    macs: int = 0
    fixed_parameters: int = 0

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters, trainable and fixed, in float32."""
        return FLOAT32_BYTES * (self.parameters + self.fixed_parameters)

    @property
    def output_bytes(self) -> int:
        """Bytes of one image's output in float32."""
        return FLOAT32_BYTES * math.prod(self.output)


def output_size(layer: str, size: int, kernel: int, stride: int, padding: int) -> int:
    """Output side of a square window: OH = (H + 2P - FH) / S + 1, which must be a whole number.

    Raises:
        InvalidConfig: the window does not fit, or the division leaves a remainder.
    """
    span = size + 2 * padding - kernel
    formula = f"OH = (H + 2P - FH)/S + 1 = ({size} + 2*{padding} - {kernel})/{stride} + 1"
    if span < 0:
        raise InvalidConfig(f"layer {layer}: {formula}: the {kernel}x{kernel} window does not fit; use a larger image_size")
    if span % stride:
        raise InvalidConfig(
            f"layer {layer}: {formula} = {span / stride + 1:g} is not a whole number; "
            f"change image_size or padding so that {span} is divisible by {stride}"
        )
    return span // stride + 1


def convolution(name: str, source: tuple[int, ...], filters: int, kernel: int, padding: int = 0) -> Layer:
    """Row of a stride-1 convolution with bias over `source` (C, H, W)."""
    channels, height, _ = source
    side = output_size(name, height, kernel, 1, padding)
    weights = filters * channels * kernel * kernel
    return Layer(name, "conv", (filters, side, side), kernel, 1, padding, weights + filters, weights * side * side)


def pool(name: str, kind: str, source: tuple[int, ...], parameters: int = 0) -> Layer:
    """Row of a 2x2 window of stride 2 over `source` (C, H, W)."""
    channels, height, _ = source
    side = output_size(name, height, 2, 2, 0)
    return Layer(name, kind, (channels, side, side), 2, 2, 0, parameters)


def linear(name: str, inputs: int, outputs: int) -> Layer:
    """Row of a fully connected layer with bias."""
    return Layer(name, "linear", (outputs,), parameters=inputs * outputs + outputs, macs=inputs * outputs)
