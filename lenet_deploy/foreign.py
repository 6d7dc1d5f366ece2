"""Other people's LeNet-5: which configuration a bare set of tensors has, from their shapes and order, under any names.

Shapes give channels, hidden sizes, classes, and the side of the last pooled map; they do not give pooling, activation and normalisation.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from lenet_deploy.errors import BadInput, DamagedFile, InvalidConfig
from lenet_deploy.models.config import KERNEL, LeNet5Config, configure

LAYERS = ("conv1", "conv2", "fc1", "fc2", "fc3")
CONVERTED = (torch.float16, torch.bfloat16, torch.float64)
SIDE_AFTER = 5  # of the last pooled map of a 32x32 image


@dataclass(frozen=True, eq=False)
class Adopted:
    """A LeNet-5 recognised in foreign tensors.

    Attributes:
        config: what the shapes and the settings given say, and defaults for the rest.
        weights: float32, under this project's names.
        inferred: what the tensors said, one line each.
        assumed: what they could not say, one line each.
    """

    config: LeNet5Config
    weights: Mapping[str, Tensor]
    inferred: tuple[str, ...]
    assumed: tuple[str, ...]


def adopt(tensors: Mapping[str, Tensor], where: str, settings: Mapping[str, str]) -> Adopted:
    """Recognise a LeNet-5 in tensors of any names.

    Args:
        tensors: in the order of the file.
        where: names the file in messages.
        settings: `KEY=VALUE` config settings for what the shapes leave open.

    Raises:
        DamagedFile: a tensor that no LeNet-5 has, by name, or a value that is NaN or infinite.
        BadInput: settings that contradict the shapes.
    """
    plain, converted = _float32(tensors, where)
    weights = {name: tensor for name, tensor in plain.items() if tensor.ndim in (2, 4)}
    vectors = {name: tensor for name, tensor in plain.items() if tensor.ndim == 1}
    for name, tensor in plain.items():
        if name not in weights and name not in vectors:
            _refuse(where, name, tensor, "no layer of LeNet-5 has such a shape")
    for name, tensor in weights.items():
        if tensor.ndim == 4 and tuple(tensor.shape[2:]) != (KERNEL, KERNEL):
            other_layout = tuple(tensor.shape[:2]) == (KERNEL, KERNEL)
            wanted = "permute TensorFlow's layout to (out, in, height, width)" if other_layout else "LeNet-5's convolutions are 5x5"
            _refuse(where, name, tensor, wanted)
    order = _chain(weights, where)
    biases = _biases(order, weights, vectors, where)
    convolutional = weights[order[2]].ndim == 4
    found = {}
    for layer, name in zip(LAYERS, order, strict=True):
        weight = weights[name]
        found[f"{layer}.weight"] = (weight.flatten(1) if layer.startswith("fc") else weight).contiguous()
        found[f"{layer}.bias"] = biases.get(name, torch.zeros(len(weight)))
    config, assumed = _config(found, where, settings)
    lines = [
        f"channels {','.join(map(str, config.channels))}, hidden {','.join(map(str, config.hidden))}, {config.classes} classes, "
        f"{config.in_channels} input channel{'s' if config.in_channels > 1 else ''}, from the shapes",
        f"layers {', '.join(f'{layer} = {name}' for layer, name in zip(LAYERS, order, strict=True))}",
        *(("C5 is a convolution of the whole 5x5 map, which is the linear layer fc1",) if convolutional else ()),
        *((f"converted to float32: {', '.join(converted)}",) if converted else ()),
    ]
    bare = [layer for layer, name in zip(LAYERS, order, strict=True) if name not in biases]
    if bare:
        lines.append(f"no bias in {', '.join(bare)}: zero")
    return Adopted(config, found, tuple(lines), tuple(assumed))


def _float32(tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], list[str]]:
    found, converted = {}, []
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise DamagedFile(f"{where}: tensor {name} is not a plain dense tensor; save tensor.to_dense().cpu()")
        if tensor.dtype in CONVERTED:
            converted.append(f"{name} ({str(tensor.dtype).removeprefix('torch.')})")
        elif tensor.dtype != torch.float32:
            _refuse(where, name, tensor, f"it holds {str(tensor.dtype).removeprefix('torch.')}, where LeNet-5 has floating-point numbers")
        found[name] = tensor.detach().float().contiguous()
        if not tensor.numel():
            _refuse(where, name, tensor, "it is empty")
        if not torch.isfinite(found[name]).all():
            raise DamagedFile(f"{where}: tensor {name} holds NaN or infinity; the training diverged or the file was altered")
    return found, converted


def _chain(weights: Mapping[str, Tensor], where: str) -> tuple[str, ...]:
    """The five layers' names in their order: what each gives is what the next takes; the file's order decides between equals."""
    convolutions = [name for name, tensor in weights.items() if tensor.ndim == 4]
    linear = [name for name, tensor in weights.items() if tensor.ndim == 2]
    if (len(convolutions), len(linear)) not in ((2, 3), (3, 2)):
        listed = ", ".join(f"{name} {tuple(weights[name].shape)}" for name in (*convolutions, *linear))
        raise DamagedFile(
            f"{where}: {len(convolutions)} convolutions and {len(linear)} linear layers, where LeNet-5 has 2 and 3, or 3 and 2 "
            f"with C5 as a convolution; it holds {listed[:400] or 'no weights'}"
        )
    for first in itertools.permutations(convolutions):
        for last in itertools.permutations(linear):
            order = (*first, *last)
            if _fits([weights[name] for name in order]):
                return order
    listed = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in weights.items())
    raise DamagedFile(f"{where}: no order of its layers makes each take what the one before gives, as in LeNet-5: {listed[:400]}")


def _fits(order: Sequence[Tensor]) -> bool:
    conv1, conv2, third, fourth, fifth = order
    if conv1.shape[1] not in (1, 3) or conv2.shape[1] != conv1.shape[0]:
        return False
    maps = conv2.shape[0]
    taken = third.shape[1]
    whole = taken == maps if third.ndim == 4 else taken % maps == 0 and math.isqrt(taken // maps) ** 2 == taken // maps
    return whole and fourth.shape[1] == third.shape[0] and fifth.shape[1] == fourth.shape[0]


def _biases(order: Sequence[str], weights: Mapping[str, Tensor], vectors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Each layer's bias: of the same parent where names have one, else the next of its length in the file's order."""
    found: dict[str, Tensor] = {}
    left = dict(vectors)
    for name in order:
        parent = name.rpartition(".")[0]
        sibling = next((other for other in left if parent and other.rpartition(".")[0] == parent and "bias" in other), None)
        if sibling is not None and len(left[sibling]) == len(weights[name]):
            found[name] = left.pop(sibling)
    for name in order:
        if name not in found and "." not in name:
            match = next((other for other in left if "." not in other and len(left[other]) == len(weights[name])), None)
            if match is not None:
                found[name] = left.pop(match)
    for name, tensor in left.items():
        _refuse(where, name, tensor, "it is no bias of the five layers; LeNet-5 has no batch normalisation and no further layers")
    return found


def _config(weights: Mapping[str, Tensor], where: str, settings: Mapping[str, str]) -> tuple[LeNet5Config, list[str]]:
    conv1, conv2, fc1, fc2, fc3 = (weights[f"{layer}.weight"] for layer in LAYERS)
    side = math.isqrt(fc1.shape[1] // conv2.shape[0])
    given = dict(settings)
    size, padding = 4 * side + 12, 0  # backwards through two poolings and two convolutions
    if side == SIDE_AFTER and conv1.shape[1] == 1 and not {"image_size", "padding"} & given.keys():
        size, padding = 28, 2
    elif "padding" in given and "image_size" not in given and given["padding"].isdecimal():
        size -= 2 * int(given["padding"])
    try:
        defaults = LeNet5Config(
            in_channels=conv1.shape[1],
            image_size=size,
            padding=padding if "padding" not in given else int(given["padding"]) if given["padding"].isdecimal() else 0,
            channels=(conv1.shape[0], conv2.shape[0]),
            hidden=(fc1.shape[0], fc2.shape[0]),
            classes=fc3.shape[0],
        )
        config = configure(defaults, given)
    except InvalidConfig as error:
        raise DamagedFile(f"{where}: its shapes make no LeNet-5 that can be built: {error}") from None
    shaped = ("in_channels", "channels", "hidden", "classes")
    unlike = [name for name in shaped if getattr(config, name) != getattr(defaults, name)]
    if config.layers()[3].output[1] != side:
        unlike.append("image_size and padding")
    if unlike:
        raise BadInput(f"{where}: --set {', '.join(unlike)} contradicts the shapes of its tensors; leave it out")
    open_fields = [name for name in ("pooling", "activation") if name not in given]
    assumed = [f"{name} {getattr(config, name)}" for name in open_fields]
    if not {"image_size", "padding"} & given.keys():
        assumed.append(f"images of {size}x{size}" + (f" with a border of {padding}" if padding else ""))
    return dataclasses.replace(config), assumed


def _refuse(where: str, name: str, tensor: Tensor, reason: str) -> NoReturn:
    raise DamagedFile(f"{where}: tensor {name} {tuple(tensor.shape)} fits no LeNet-5: {reason}")
