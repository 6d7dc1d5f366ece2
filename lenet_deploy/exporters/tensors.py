"""What an export may do to a checkpoint's tensors: a closed vocabulary, recorded in the manifest and verified bit for bit.

A record is JSON: `{"source": "c1.weight", "tensor": "constant.0", "transforms": [...]}`, where no transform means the same bits.
The transforms, in the only order that they may come in:

- `{"op": "scale", "factor": 0.67, "dtype": "float64"}`: times a constant of the architecture, in that arithmetic, rounded to float32
- `{"op": "permute", "dims": [1, 0]}`: one of PERMUTATIONS
- `{"op": "reshape", "shape": [6, 1, 1]}`: the same elements in the same order
- `{"op": "cast", "dtype": "float16"}`: rounded to nearest
- `{"op": "quantise", "dtype": "int8", "scale": NAME, "zero_point": NAME or null, "axis": 0 or null}`: within half a step
- `{"op": "zero"}`: left out, since all of it is zero; `tensor` is null
"""

from __future__ import annotations

import itertools
import math
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from lenet_deploy.exporters import ExportFailed
from lenet_deploy.models.config import TENSOR_LAYERS

PARAMETERS: Mapping[str, frozenset[str]] = {
    "scale": frozenset({"factor", "dtype"}),
    "permute": frozenset({"dims"}),
    "reshape": frozenset({"shape"}),
    "cast": frozenset({"dtype"}),
    "quantise": frozenset({"dtype", "scale", "zero_point", "axis"}),
    "zero": frozenset(),
}
LOSSY = ("cast", "quantise")
# A linear layer's weight for a product from the right, and a convolution's with the channels last, as OHWI and HWIO. No other: swapped
# filters or a transposed kernel are faults, not layouts.
PERMUTATIONS = ((1, 0), (0, 2, 3, 1), (2, 3, 1, 0))
ARITHMETIC: Mapping[str, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}
CASTS: Mapping[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}
INTEGERS: Mapping[str, torch.dtype] = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "uint16": torch.uint16,
    "int32": torch.int32,
}
QUANTISED = "_quantized"  # what ONNX quantisers append to the names of weights; `_scale` and `_zero_point` stand beside it
MAX_DIMS = 8
# Half a step proves nothing where the step is as large as the weights: the largest has to be this share of the type's span away from
# zero. Symmetric quantisers use half of it, those that keep a bit free a quarter; int32 biases take the step that their product has.
LEAST_SPAN = 1 / 8
FLOAT32_ROUNDING = 2.0**-24  # relative, of one operation: quantisers divide in float32 before they round to a step
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Tensors: TypeAlias = Mapping[str, torch.Tensor]
Record: TypeAlias = Mapping[str, Any]
Steps: TypeAlias = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TensorFault:
    """One tensor that is not what the checkpoint and the record make of it.

    Attributes:
        tensor: its name in the artifact; None where it has none.
        source: its name in the checkpoint; None for a tensor that comes from nowhere.
        reason: what is wrong.
    """

    tensor: str | None
    source: str | None
    reason: str

    @property
    def layer(self) -> str | None:
        """The layer that the checkpoint's tensor belongs to; None where no source is known."""
        return layer_of(self.source) if self.source else None

    def __str__(self) -> str:
        names = dict.fromkeys(name for name in (self.source, self.tensor) if name)
        return f"{' as '.join(names) or 'the records'}: {self.reason}"


class _Malformed(Exception):
    """A record that says nothing which could be verified."""


def layer_of(source: str) -> str:
    """The layer of a checkpoint's tensor, as the layer table calls it: its name up to the last dot, for most."""
    return TENSOR_LAYERS.get(source) or source.rpartition(".")[0] or source


def record(weights: Tensors, tensors: Tensors, factors: Collection[float]) -> tuple[Record, ...]:
    """Find each of the checkpoint's tensors in an artifact, and the transforms that lead there, in the order of the artifact's tensors.

    Args:
        weights: the checkpoint's tensors, float32.
        tensors: the artifact's, as its reader gives them.
        factors: constants of the architecture that may be folded into weights.

    Raises:
        ExportFailed: a tensor of the checkpoint is nowhere in the artifact.
    """
    found = [
        ((not _alike(source, name), len(steps), position), source, name, steps)
        for source, weight in weights.items()
        for position, name in enumerate(tensors)
        if (steps := _search(weight, name, tensors, factors)) is not None
    ]
    taken: dict[str, tuple[str | None, Steps]] = {}
    for _, source, name, steps in sorted(found, key=lambda match: match[0]):
        if source not in taken and not any(name == other for other, _ in taken.values()):
            taken[source] = (name, steps)
    for source, weight in weights.items():
        shared = next(((name, steps) for _, match, name, steps in found if match == source), None)
        if source not in taken and not weight.count_nonzero():
            taken[source] = (None, ({"op": "zero"},))
        elif source not in taken and shared:  # exporters store equal tensors once
            taken[source] = shared
        elif source not in taken:
            raise ExportFailed(f"the artifact holds nothing that is the checkpoint's {source}, as it is or in a form that can be verified")
    positions = {name: position for position, name in enumerate(tensors)}
    layers = {layer_of(source): positions[name] for source, (name, _) in taken.items() if name}
    places = {source: positions[name] if name else layers.get(layer_of(source), len(tensors)) for source, (name, _) in taken.items()}
    ordered = sorted(taken, key=lambda source: (places[source], taken[source][0] is None))
    return tuple(
        {"source": source, "tensor": taken[source][0], "transforms": [dict(step) for step in taken[source][1]]} for source in ordered
    )


def verify(
    weights: Tensors, tensors: Tensors, recorded: Any, factors: Collection[float], *, lossless: bool = False
) -> tuple[TensorFault, ...]:
    """Compare an artifact's tensors with what the checkpoint's become by the records; nothing returned means equal bit for bit.

    Args:
        weights: the checkpoint's tensors, float32.
        tensors: the artifact's, as its reader gives them.
        recorded: a manifest's JSON; whatever it is, it becomes a fault where it cannot be verified.
        factors: constants of the architecture that may be folded into weights.
        lossless: the artifact promises float32, so a cast or a quantisation is a fault even where it was recorded.
    """
    if not isinstance(recorded, (list, tuple)):
        return (TensorFault(None, None, f"{reprlib.repr(recorded)} is no list of records"),)
    faults: list[TensorFault] = []
    sources: list[str] = []
    accounted: set[str] = set()
    for entry in recorded:
        try:
            source, name, steps = _parsed(entry)
        except _Malformed as error:
            faults.append(TensorFault(None, None, f"malformed record {reprlib.repr(entry)}: {error}"))
            continue
        accounted.update(_names(name, steps))
        reason = _fault(weights[source], name, steps, tensors, factors) if source in weights else "the checkpoint has no such tensor"
        if source in sources:
            reason = "it is recorded twice"
        elif lossless and any(step["op"] in LOSSY for step in steps):
            reason = "the record casts or quantises it, and the artifact promises float32"
        if reason:
            faults.append(TensorFault(name, source, reason))
        sources.append(source)
    faults += [TensorFault(None, source, "no record accounts for it") for source in weights if source not in sources]
    # In the order of the layers, as far as the records know it.
    order = {layer: position for position, layer in enumerate(dict.fromkeys(map(layer_of, sources)))}
    faults.sort(key=lambda fault: order.get(fault.layer or "", len(order)))
    extra = (name for name, tensor in tensors.items() if tensor.numel() > 1 and name not in accounted)
    return (*faults, *(TensorFault(name, None, "the artifact holds it and no record accounts for it") for name in extra))


def _parsed(entry: Any) -> tuple[str, str | None, Steps]:
    """Source, tensor and transforms of a record of the right form; the transforms' parameters are checked where they are applied."""
    if not isinstance(entry, Mapping) or entry.keys() != {"source", "tensor", "transforms"}:
        raise _Malformed("it has to have source, tensor and transforms")
    source, name, steps = entry["source"], entry["tensor"], entry["transforms"]
    if not isinstance(source, str) or not isinstance(name, (str, type(None))) or not isinstance(steps, (list, tuple)):
        raise _Malformed("source, tensor or transforms is of the wrong type")
    operations = [step.get("op") if isinstance(step, Mapping) else None for step in steps]
    known = tuple(PARAMETERS)
    if not all(isinstance(operation, str) and operation in known for operation in operations):
        raise _Malformed(f"a transform is none of {', '.join(known)}")
    ranks = [known.index(operation) for operation in operations]
    if ranks != sorted(set(ranks)):
        raise _Malformed(f"transforms come at most once each, in the order {', '.join(known)}")
    if (name is None) != ("zero" in operations) or ("zero" in operations and len(steps) > 1):
        raise _Malformed("a tensor is null where it was left out as zero, and only there")
    for step in steps:
        if step.keys() != PARAMETERS[step["op"]] | {"op"}:
            raise _Malformed(f"{step['op']} takes {', '.join(sorted(PARAMETERS[step['op']])) or 'nothing'}")
        if step["op"] == "quantise" and not (isinstance(step["scale"], str) and isinstance(step["zero_point"], (str, type(None)))):
            raise _Malformed("scale and zero_point are names of tensors")
    return source, name, steps


def _names(name: str | None, steps: Steps) -> Iterator[str]:
    """The artifact's tensors that a record speaks of."""
    named = (step[key] for step in steps if step["op"] == "quantise" for key in ("scale", "zero_point"))
    return (each for each in (name, *named) if each is not None)


def _fault(weight: torch.Tensor, name: str | None, steps: Steps, tensors: Tensors, factors: Collection[float]) -> str | None:
    """Why a tensor is not what the transforms make of a weight; None where it is."""
    if name is None:
        nonzero = int(weight.count_nonzero())
        return f"it was left out as zero, and {nonzero} of its {weight.numel()} elements are not" if nonzero else None
    found, expected = tensors.get(name), weight
    if found is None:
        return "the artifact uses no such tensor"
    try:
        for step in steps:
            if step["op"] == "quantise":
                return _quantised(expected, found, step, tensors)
            expected = _EXACT[step["op"]](expected, step, factors)
    except _Malformed as error:
        return f"malformed record: {error}"
    return _different(expected, found)


def _scaled(weight: torch.Tensor, step: Mapping[str, Any], factors: Collection[float]) -> torch.Tensor:
    factor = step["factor"]
    if type(factor) is not float or factor not in factors:
        raise _Malformed(f"the architecture multiplies nothing by {reprlib.repr(factor)}")
    return (weight.to(_dtype(step, ARITHMETIC)) * factor).to(weight.dtype)


def _permuted(weight: torch.Tensor, step: Mapping[str, Any], factors: Collection[float]) -> torch.Tensor:
    dims = step["dims"]
    if not _whole(dims) or tuple(dims) not in PERMUTATIONS or len(dims) != weight.dim():
        raise _Malformed(f"{reprlib.repr(dims)} is no layout of a weight with {weight.dim()} dimensions")
    return weight.permute(*dims)


def _reshaped(weight: torch.Tensor, step: Mapping[str, Any], factors: Collection[float]) -> torch.Tensor:
    shape = step["shape"]
    if not _whole(shape) or min(shape, default=1) < 1 or math.prod(shape) != weight.numel():
        raise _Malformed(f"{reprlib.repr(shape)} is no shape of {weight.numel()} elements")
    return weight.reshape(tuple(shape))


def _cast(weight: torch.Tensor, step: Mapping[str, Any], factors: Collection[float]) -> torch.Tensor:
    return weight.to(_dtype(step, CASTS))


_EXACT: Mapping[str, Callable[[torch.Tensor, Mapping[str, Any], Collection[float]], torch.Tensor]] = {
    "scale": _scaled,
    "permute": _permuted,
    "reshape": _reshaped,
    "cast": _cast,
}


def _whole(values: Any) -> bool:
    """Whether it is a short list of whole numbers."""
    return isinstance(values, (list, tuple)) and len(values) <= MAX_DIMS and all(type(value) is int for value in values)


def _dtype(step: Mapping[str, Any], known: Mapping[str, torch.dtype]) -> torch.dtype:
    name = step["dtype"]
    if not isinstance(name, str) or name not in known:
        raise _Malformed(f"the dtype of {step['op']} is {reprlib.repr(name)}, not one of {', '.join(known)}")
    return known[name]


def _different(expected: torch.Tensor, found: torch.Tensor) -> str | None:
    """How two floating-point tensors differ in their bits; None where they do not."""
    if mismatch := _unlike(expected.shape, expected.dtype, found):
        return mismatch
    ours, theirs = (tensor.contiguous().view(_BITS[tensor.element_size()]) for tensor in (found, expected))
    differ = ours != theirs
    if not differ.any():
        return None
    where = differ.nonzero()[0].tolist()
    index = tuple(where)
    apart = abs(_rank(int(ours[index]), found.element_size()) - _rank(int(theirs[index]), found.element_size()))
    number, wanted = float(found[index]), float(expected[index])
    distance = "not comparable" if math.isnan(number) or math.isnan(wanted) else f"{apart} ulp{'' if apart == 1 else 's'} apart"
    count = f"{int(differ.sum())} of {differ.numel()} elements differ"
    return f"{count}, first at {where}: {number:.9g} in the artifact, {wanted:.9g} by the checkpoint, {distance}"


def _unlike(shape: Sequence[int], dtype: torch.dtype, found: torch.Tensor) -> str | None:
    if found.shape != shape:
        return f"its shape is {list(found.shape)} in the artifact, {list(shape)} by the checkpoint and the record"
    return f"it is {found.dtype} in the artifact, {dtype} by the record" if found.dtype != dtype else None


def _rank(bits: int, size: int) -> int:
    """Place of a float among all of its format, from its bits as a signed integer: neighbours differ by one, the two zeros by none."""
    return bits if bits >= 0 else -(1 << (8 * size - 1)) - bits


def _quantised(expected: torch.Tensor, found: torch.Tensor, step: Mapping[str, Any], tensors: Tensors) -> str | None:
    """Why a quantised tensor does not stand for the expected numbers, each within half a step; None where it does."""
    if mismatch := _unlike(expected.shape, _dtype(step, INTEGERS), found):
        return mismatch
    axis, scale, zero = step["axis"], tensors.get(step["scale"]), torch.zeros(1, dtype=found.dtype)
    if axis is not None and not (type(axis) is int and 0 <= axis < found.dim()):
        raise _Malformed(f"axis {reprlib.repr(axis)} is no dimension of {list(found.shape)}")
    if scale is None or not scale.is_floating_point():
        return f"the artifact has no scale {step['scale']}"
    if step["zero_point"] is not None:
        named = tensors.get(step["zero_point"])
        if named is None or named.dtype != found.dtype:
            return f"the artifact has no zero point {step['zero_point']} of type {found.dtype}"
        zero = named
    steps, channels = 1 if axis is None else found.shape[axis], [1] * found.dim()
    if axis is not None:
        channels[axis] = steps
    if scale.numel() != steps or zero.numel() not in (1, steps):
        return f"{scale.numel()} scales and {zero.numel()} zero points do not fit {steps} of {list(found.shape)}"
    if not (scale.isfinite().all() and (scale > 0).all()):
        return f"its scale {step['scale']} is not a positive number throughout"
    size = scale.double().reshape(channels)
    if found.element_size() < 4:
        peak = expected.double().abs()
        peak = peak.amax() if axis is None else peak.amax([dim for dim in range(peak.dim()) if dim != axis], keepdim=True)
        limits = torch.iinfo(found.dtype)
        if bool(((peak > 0) & (peak / size < LEAST_SPAN * (limits.max - limits.min))).any()):
            return f"its step, {float(size.max()):.3g} in scale {step['scale']}, is too coarse for its values"
    origin = zero.double().reshape(channels if zero.numel() == steps else [1] * found.dim())
    value = (found.double() - origin) * size
    error = (value - expected.double()).abs()
    wrong = ~(error <= size / 2 + (expected.double().abs() + (origin * size).abs()) * FLOAT32_ROUNDING)
    if not wrong.any():
        return None
    where = wrong.nonzero()[0].tolist()
    index = tuple(where)
    count = f"{int(wrong.sum())} of {wrong.numel()} elements are more than half a step off"
    stands = f"{int(found[index])} stands for {float(value[index]):.9g} in the artifact, {float(expected[index]):.9g} by the checkpoint"
    return f"{count}, first at {where}: {stands}, {float((error / size)[index]):.3g} steps apart"


def _alike(source: str, name: str) -> bool:
    """Whether an artifact's tensor is called as the checkpoint's."""
    return name.removesuffix(QUANTISED) == source


def _search(weight: torch.Tensor, name: str, tensors: Tensors, factors: Collection[float]) -> Steps | None:
    """The shortest transforms that make an artifact's tensor of a weight; None where there are none."""
    found = tensors[name]
    if found.numel() != weight.numel():
        return None
    scales = [{"op": "scale", "factor": factor, "dtype": dtype} for factor in factors for dtype in ARITHMETIC]
    folds: list[list[dict[str, Any]]] = [[], *([step] for step in scales)]
    chains = itertools.product(folds, _layouts(weight.shape, found.shape), _endings(name, tensors))
    for steps in sorted(([*fold, *layout, *ending] for fold, layout, ending in chains), key=len):
        if _fault(weight, name, steps, tensors, factors) is None:
            return steps
    return None


def _layouts(before: Sequence[int], after: Sequence[int]) -> list[list[dict[str, Any]]]:
    """The changes of layout that lead from a shape to another of as many elements."""
    same = [[]] if tuple(before) == tuple(after) else [[{"op": "reshape", "shape": list(after)}]]
    fitting = (dims for dims in PERMUTATIONS if len(dims) == len(before) and tuple(before[dim] for dim in dims) == tuple(after))
    return [*same, *([{"op": "permute", "dims": list(dims)}] for dims in fitting)]


def _endings(name: str, tensors: Tensors) -> list[list[dict[str, Any]]]:
    """What can lead from float32 to the type of an artifact's tensor; scale and zero point by the names that ONNX quantisers use."""
    found = tensors[name]
    if found.dtype == torch.float32:
        return [[]]
    if found.dtype not in INTEGERS.values():
        return [[{"op": "cast", "dtype": dtype}] for dtype, cast in CASTS.items() if cast == found.dtype]
    (dtype,) = (each for each, integer in INTEGERS.items() if integer == found.dtype)
    bases = (name, name.removesuffix(QUANTISED))
    scale = next((f"{base}_scale" for base in bases if f"{base}_scale" in tensors), None)
    zero = next((f"{base}_zero_point" for base in bases if f"{base}_zero_point" in tensors), None)
    axes: list[int | None] = [None, *range(found.dim())]
    return [[{"op": "quantise", "dtype": dtype, "scale": scale, "zero_point": zero, "axis": axis}] for axis in axes] if scale else []
