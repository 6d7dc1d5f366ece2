"""Other people's LeNet-5: which configurations a bare set of tensors can have, from their shapes and order, under any names.

Shapes give channels, hidden sizes, classes, and the side of the last pooled map; they do not give pooling, activation and normalisation.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from lenet_deploy.errors import BadInput, DamagedFile, InvalidConfig
from lenet_deploy.models import MODELS, find_model
from lenet_deploy.models.config import ACTIVATIONS, KERNEL, MAX_PARAMETERS, POOLINGS, LeNet5Config, ModelConfig, configure
from lenet_deploy.records import Preprocessing

FOREIGN = "lenet5"  # what tensors of no registered model's channels are an instance of
LAYERS = ("conv1", "conv2", "fc1", "fc2", "fc3")
CONVERTED = (torch.float16, torch.bfloat16, torch.float64)
MAX_STD = 2.0  # a scaling by 1/256 is one of 1.004; deviations of pixels from 0 to 255 are tens
COMMON_SIDES = (28, 32)  # of images; any other is assumed only where these do not fit
# Sides of the last pooled map that images of 28 and 32 pixels leave where both convolutions are padded, which LeNet-5's second is not.
BOTH_PADDED = {7: 28, 8: 32}
BATCH_NORM = ("running_mean", "running_var", "num_batches_tracked")
# In a name: what marks a tensor as a layer's weight or bias, and what marks a vector as neither.
ROLE = re.compile(r"weights?|kernels?|bias(?:es)?|(?<![a-z])[wb](?![a-z])", re.IGNORECASE)
NO_BIAS = re.compile(r"weight|kernel|scale|gamma|norm|slope|alpha", re.IGNORECASE)


@dataclass(frozen=True)
class Pixels:
    """What is said of how an image becomes the input of foreign weights; None is not said.

    Attributes:
        mean, std: a pixel from 0 to 1 becomes `(pixel - mean) / std`; one number for all channels, or one a channel.
        border: black pixels on each side that fill the input, in place of scaling the image up.

    Raises:
        BadInput: numbers that cannot be meant.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    border: int | None = None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise BadInput("--mean and --std go together: a pixel from 0 to 1 becomes (pixel - mean) / std; give both or none")
        if not all(0 <= value <= 1 for value in self.mean or ()):
            raise BadInput(f"mean {listed(self.mean or ())} is beyond pixels from 0 to 1; divide by 255 what is measured from 0 to 255")
        if not all(0 < value <= MAX_STD for value in self.std or ()):
            raise BadInput(f"std {listed(self.std or ())} is not above 0 and at most {MAX_STD:g}, for pixels from 0 to 1; divide it by 255")

    def applied(self, preprocessing: Preprocessing) -> Preprocessing:
        """The preprocessing with what is said; raises BadInput for another number of channels, or a border that leaves no image."""
        channels, border = preprocessing.channels, preprocessing.padding if self.border is None else self.border
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in (1, channels):
                raise BadInput(f"{name} {listed(values)} is {len(values)} numbers, for {channels} channel{'s' * (channels > 1)}")
        if not 0 <= 2 * border < preprocessing.size:
            raise BadInput(f"border is {border}; it must be at least 0 and leave some of the input's {preprocessing.size} pixels")
        mean, std = (
            values if each is None else each * (channels // len(each))
            for each, values in ((self.mean, preprocessing.mean), (self.std, preprocessing.std))
        )
        return Preprocessing(channels, preprocessing.size - 2 * border, border, mean, std)


@dataclass(frozen=True, eq=False)
class Adopted:
    """A LeNet-5 recognised in foreign tensors.

    Attributes:
        model: registered name.
        configs: every configuration that shapes and settings allow; the first is the one to assume.
        weights: float32, under this project's names.
        inferred: what the tensors said, one line each.
        left_open: the config's fields in which `configs` differ.
    """

    model: str
    configs: tuple[ModelConfig, ...]
    weights: Mapping[str, Tensor]
    inferred: tuple[str, ...]
    left_open: tuple[str, ...]


def plain(tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors as float32, and a line about those that were converted.

    Raises:
        DamagedFile: a tensor that no LeNet-5 has, by name: batch normalisation, of another dtype or layout, empty, absurdly large,
            NaN or infinite.
    """
    for name in tensors:
        if name.endswith(BATCH_NORM):
            raise DamagedFile(
                f"{where}: tensor {name} is of a batch normalisation, which LeNet-5 has not; fold it into the layer before it "
                "(torch.nn.utils.fusion.fuse_conv_bn_eval) and save that"
            )
    found: dict[str, Tensor] = {}
    converted: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout != torch.strided or tensor.is_nested or tensor.device.type != "cpu":
            raise DamagedFile(f"{where}: tensor {name} is not a plain dense tensor; save tensor.to_dense().cpu()")
        if not 0 < tensor.numel() <= MAX_PARAMETERS:  # asked before it is copied: one number can be stored as the whole of a large shape
            reason = f"it has {tensor.numel():,} numbers, and at most {MAX_PARAMETERS:,} are read" if tensor.numel() else "it is empty"
            _refuse(where, name, tensor, reason)
        if tensor.dtype in CONVERTED:
            converted.setdefault(kind, []).append(name)
        elif tensor.dtype != torch.float32:
            _refuse(where, name, tensor, f"it holds {kind}, where LeNet-5 has floating-point numbers")
        found[name] = tensor.detach().float().contiguous()
        if not torch.isfinite(found[name]).all():
            raise DamagedFile(
                f"{where}: tensor {name} holds NaN or infinity, or what is infinity in float32; "
                "the training diverged or the file was altered"
            )
    return found, tuple(f"converted from {kind} to float32: {', '.join(names)}" for kind, names in converted.items())


def adopt(tensors: Mapping[str, Tensor], where: str, settings: Mapping[str, str], model: str | None = None) -> Adopted:
    """Recognise a LeNet-5 in tensors of any names.

    Args:
        tensors: as `plain` gives them, in the order of the file.
        where: names the file in messages.
        settings: `KEY=VALUE` config settings for what the shapes leave open.
        model: registered model whose defaults are assumed first for that; None takes the first with these channels, else `lenet5`.

    Raises:
        DamagedFile: a tensor that no LeNet-5 has, or one that is missing, by name; or tensors that more than one LeNet-5 has.
        BadInput: settings that contradict the shapes, or that are needed.
    """
    weights = {name: tensor for name, tensor in tensors.items() if tensor.ndim in (2, 4)}
    vectors = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 1}
    for name, tensor in tensors.items():
        if name not in weights and name not in vectors:
            _refuse(where, name, tensor, "no layer of LeNet-5 has such a shape")
        if tensor.ndim == 4 and tuple(tensor.shape[2:]) != (KERNEL, KERNEL):
            other_layout = tuple(tensor.shape[:2]) == (KERNEL, KERNEL)
            wanted = "permute TensorFlow's layout to (out, in, height, width)" if other_layout else "LeNet-5's convolutions are 5x5"
            _refuse(where, name, tensor, wanted)
    order = _chain(weights, where)
    biases = _biases(tuple(tensors), {name: weights[name] for name in order}, vectors, where)
    found = {}
    for layer, name in zip(LAYERS, order, strict=True):
        weight = weights[name]
        found[f"{layer}.weight"] = (weight.flatten(1) if layer.startswith("fc") else weight).contiguous()
        found[f"{layer}.bias"] = biases.get(name, torch.zeros(len(weight)))
    channels = tuple(len(weights[name]) for name in order[:2])
    likely = (entry for entry in MODELS if isinstance(entry.defaults, LeNet5Config) and entry.defaults.channels == channels)
    entry = find_model(model) if model else next(likely, find_model(FOREIGN))
    assert isinstance(entry.defaults, LeNet5Config), "callers keep the model of 1998 apart"
    try:
        configs, left_open = _configs(found, where, settings, entry.defaults)
    except InvalidConfig as error:
        raise DamagedFile(f"{where}: its shapes, with what is set, make no LeNet-5 that can be built: {error}") from None
    config = configs[0]
    bare = [layer for layer, name in zip(LAYERS, order, strict=True) if name not in biases]
    lines = (
        f"channels {','.join(map(str, config.channels))}, hidden {','.join(map(str, config.hidden))}, {config.classes} classes, "
        f"{config.in_channels} input channel{'s' if config.in_channels > 1 else ''}, by the shapes",
        f"layers {', '.join(f'{layer} = {name}' for layer, name in zip(LAYERS, order, strict=True))}",
        *(("C5 is a convolution over the whole 5x5 map, which is the linear layer fc1",) if weights[order[2]].ndim == 4 else ()),
        *((f"no bias in {', '.join(bare)}: zero",) if bare else ()),
    )
    return Adopted(entry.name, configs, found, lines, left_open)


def _chain(weights: Mapping[str, Tensor], where: str) -> tuple[str, ...]:
    """The five layers' names in their order: what each gives is what the next takes; numbers in names decide between equals."""
    convolutions = [name for name, tensor in weights.items() if tensor.ndim == 4]
    linear = [name for name, tensor in weights.items() if tensor.ndim == 2]
    listed = ", ".join(f"{name} {tuple(weights[name].shape)}" for name in (*convolutions, *linear))[:400] or "no weights"
    if (len(convolutions), len(linear)) not in ((2, 3), (3, 2)):
        raise DamagedFile(
            f"{where}: {len(convolutions)} convolutions and {len(linear)} linear layers, where LeNet-5 has 2 and 3, or 3 and 2 "
            f"with C5 as a convolution; it holds {listed}"
        )
    orders = [
        (*first, *last)
        for first in itertools.permutations(convolutions)
        for last in itertools.permutations(linear)
        if _fits([weights[name] for name in (*first, *last)])
    ]
    if not orders:
        raise DamagedFile(
            f"{where}: no order of its layers makes each take what the one before gives, from 1 or 3 channels on, as in LeNet-5: {listed}"
        )
    for place in zip(*orders, strict=True):
        if len({re.sub(r"\d+", "", name) for name in place}) > 1:
            raise DamagedFile(
                f"{where}: {' and '.join(dict.fromkeys(place))} could each be the other by their shapes; number their names in their order"
            )
    return min(orders, key=lambda order: [[int(number) for number in re.findall(r"\d+", name)] for name in order])


def _fits(order: Sequence[Tensor]) -> bool:
    conv1, conv2, third, fourth, fifth = order
    if conv1.shape[1] not in (1, 3) or conv2.shape[1] != conv1.shape[0]:
        return False
    maps, taken = conv2.shape[0], third.shape[1]
    whole = taken == maps if third.ndim == 4 else taken % maps == 0 and math.isqrt(taken // maps) ** 2 == taken // maps
    return whole and fourth.shape[1] == third.shape[0] and fifth.shape[1] == fourth.shape[0]


def _biases(names: Sequence[str], weights: Mapping[str, Tensor], vectors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Each layer's bias: the vector of its length with the layer's name, or that follows it in the file, or that fits it alone."""
    found: dict[str, Tensor] = {}
    left = dict(vectors)

    def take(layer: str, candidates: Sequence[str]) -> None:
        fitting = [name for name in candidates if len(left[name]) == len(weights[layer]) and not NO_BIAS.search(name.rpartition(".")[2])]
        if layer not in found and len(fitting) == 1:
            found[layer] = left.pop(fitting[0])

    for layer in weights:
        take(layer, [name for name in left if ROLE.sub("", name) == ROLE.sub("", layer)])
    for layer in weights:
        take(layer, [name for name in names[names.index(layer) + 1 :][:1] if name in left])
    for layer in weights:
        alike = [other for other in weights if other not in found and len(weights[other]) == len(weights[layer])]
        take(layer, list(left) if len(alike) == 1 else [])
    for name, tensor in left.items():
        _refuse(where, name, tensor, "unexpected: it is no bias of the five layers, and LeNet-5 has no normalisation and no further layers")
    for kind in (2, 4):
        alike = [layer for layer in weights if weights[layer].ndim == kind]
        missing = [layer for layer in alike if layer not in found]
        if missing and len(missing) < len(alike):
            absent = ", ".join(
                re.sub(r"weight(?=s?$)", "bias", layer) if "weight" in layer else f"the bias of {layer}" for layer in missing
            )
            raise DamagedFile(
                f"{where}: missing {absent}, where {next(layer for layer in alike if layer in found)} has a bias; "
                "add zeros of that name if the layer has none"
            )
    return found


def _configs(
    weights: Mapping[str, Tensor], where: str, settings: Mapping[str, str], defaults: LeNet5Config
) -> tuple[tuple[LeNet5Config, ...], tuple[str, ...]]:
    """Every config that shapes and settings allow, the likeliest first, and the fields that neither decides."""
    conv1, conv2, fc1, fc2, fc3 = (weights[f"{layer}.weight"] for layer in LAYERS)
    side = math.isqrt(fc1.shape[1] // len(conv2))
    shaped = dataclasses.replace(
        defaults, in_channels=conv1.shape[1], channels=(len(conv1), len(conv2)), hidden=(len(fc1), len(fc2)), classes=len(fc3)
    )
    sizes = _sizes(side, conv1.shape[1], settings, where)
    poolings = sorted(POOLINGS, key=lambda each: each != defaults.pooling)
    activations = sorted(ACTIVATIONS, key=lambda each: each != defaults.activation)
    found = []
    for (size, padding), pooling, activation in itertools.product(sizes, poolings, activations):
        config = dataclasses.replace(shaped, image_size=size, padding=padding, pooling=pooling, activation=activation)
        found.append(configure(config, settings))
    fields = ("in_channels", "channels", "hidden", "classes")
    unlike = [name for name in fields if getattr(found[0], name) != getattr(shaped, name)]
    fitting = tuple(dict.fromkeys(config for config in found if config.layers()[3].output[1] == side))
    if unlike or not fitting:
        raise BadInput(f"{where}: --set {', '.join(unlike) or 'image_size or padding'} contradicts the shapes of its tensors; leave it out")
    open_fields = [name for name in ("pooling", "activation") if name not in settings]
    return fitting, (*open_fields, *(() if {"image_size", "padding"} & settings.keys() else ("image_size", "padding")))


def _sizes(side: int, in_channels: int, settings: Mapping[str, str], where: str) -> tuple[tuple[int, int], ...]:
    """Image sizes and paddings that leave pooled maps of `side`, the likeliest first: backwards through poolings and convolutions."""
    whole = 4 * side + 12
    padding, size = settings.get("padding", ""), settings.get("image_size", "")
    if padding.isdecimal():
        return ((whole - 2 * int(padding), int(padding)),)
    if size.isdecimal():
        return ((int(size), max(0, whole - int(size)) // 2),)
    if side in BOTH_PADDED:
        raise BadInput(
            f"{where}: its first linear layer takes maps of {side}x{side}, as images of {BOTH_PADDED[side]}x{BOTH_PADDED[side]} leave them "
            f"where both convolutions are padded, which is no LeNet-5; if its images are of {whole}x{whole}, add --set image_size={whole}"
        )
    common = [each for each in ((whole - 4, 2), (whole, 0)) if each[0] in COMMON_SIDES] or [(whole, 0)]
    return tuple(common if in_channels == 1 else reversed(common))  # digits are of 28x28, photographs of 32x32


def listed(values: Sequence[float]) -> str:
    """Numbers as they are typed."""
    return ",".join(f"{value:g}" for value in values)


def _refuse(where: str, name: str, tensor: Tensor, reason: str) -> NoReturn:
    raise DamagedFile(f"{where}: tensor {name} {tuple(tensor.shape)} fits no LeNet-5: {reason}")
