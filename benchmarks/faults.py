"""Faults to inject into exported artifacts, and healthy edits that look like faults. `parity_power.py` injects and counts them.

A fault is made in one of three ways: in the weights (written into an ONNX file's initializers, or exported anew as TorchScript), in
the steps of the forward pass (exported anew by the project's own exporters under the healthy metadata), or in the graph of an ONNX
file. The embedded digest of an ONNX file is renewed, so that only what the artifact computes gives the fault away.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from lenet_deploy import environment, train
from lenet_deploy.bundle import MANIFEST, Bundle, write_artifact, write_manifest
from lenet_deploy.checkpoint import Checkpoint, fresh, to_bytes
from lenet_deploy.data import Dataset
from lenet_deploy.exporters import METADATA_KEY, ExportOptions
from lenet_deploy.exporters.onnx import DIGEST_KEY, content_digest
from lenet_deploy.exporters.tensors import record
from lenet_deploy.models import find_model, initialise
from lenet_deploy.models.config import C3_CONNECTIONS
from lenet_deploy.records import Manifest
from lenet_deploy.variants import CHECKPOINT, ONNX, ONNX_TS, SCRIPT, TRACE, ArtifactSpec

FORMATS = (ONNX, ONNX_TS, TRACE, SCRIPT)
GREY = {"in_channels": "1", "image_size": "28", "padding": "2"}
MANTISSA_BITS = range(23)
DEAD_FILTER, DEAD_BIAS = 2, -1e6  # no input of the parity run lifts the filter above zero


@dataclass(frozen=True, eq=False)
class Subject:
    """A healthy bundle to spoil.

    Attributes:
        name: as results say it.
        dataset: real images of as many channels as the model takes.
        stale: weights of an earlier epoch; None for an untrained model.
    """

    name: str
    checkpoint: Checkpoint
    bundle: Bundle
    dataset: Dataset
    stale: Mapping[str, Tensor] | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layer table."""
        return tuple(layer.name for layer in self.checkpoint.config.layers())

    def read(self, spec: ArtifactSpec) -> bytes:
        """The healthy bytes of one artifact."""
        artifact = self.bundle.artifact(spec.name)
        assert artifact is not None
        return self.bundle.read(artifact)


@dataclass(frozen=True)
class Fault:
    """One fault at one position.

    Attributes:
        name: its kind.
        where: its position.
        layers: acceptable names of the first divergent layer; empty where no layer can be named.
        inject: the faulty bytes of an artifact of a healthy subject.
        exported: the export went wrong, not the file: the manifest records what that export made of the weights.
        replaces: `artifact`, or `manifest` where the bytes are to stand in for the manifest.
    """

    name: str
    where: str
    layers: tuple[str, ...]
    inject: Callable[[Subject, ArtifactSpec], bytes]
    exported: bool = False
    replaces: str = "artifact"


Draw: TypeAlias = Callable[[Subject, Random], Fault]
Weights: TypeAlias = dict[str, Tensor]
Step: TypeAlias = Callable[[Tensor], Tensor]
Steps: TypeAlias = dict[str, Step]


@dataclass(frozen=True)
class Kind:
    """A kind of fault: what it applies to, and how one is drawn.

    Attributes:
        subjects: names of the subjects that can have it.
        formats: one inner tuple a family; an injection takes one artifact of each, in turn by seed.
    """

    name: str
    draw: Draw
    subjects: tuple[str, ...]
    formats: tuple[tuple[ArtifactSpec, ...], ...]

    def fault(self, subject: Subject, seed: int) -> Fault:
        """The fault that a seed draws; the same seed draws the same one."""
        return dataclasses.replace(self.draw(subject, Random(f"{self.name} {seed}")), name=self.name)


# The subjects.


def make_subjects(folder: Path, digits: Dataset, quick: bool) -> dict[str, Subject]:
    """Healthy bundles of the models, by name: `grey`, `colour`, `wide`, `1998`, and `dead` with a filter that never fires.

    A quick run has smaller images, where the model can vary them.
    """
    tinted = _tinted(digits)
    small = {**GREY, "image_size": "16"} if quick else GREY
    square = {"hidden": "84,84", **({"image_size": "20"} if quick else {})}  # fc2 is square
    grey = _trained("lenet5", small, 3, digits)
    plans = {
        "grey": (grey, digits, _trained("lenet5", small, 2, digits).weights),
        "colour": (fresh(find_model("lenet5"), square, 1), tinted, None),
        "wide": (_trained("lenet5-wide", small, 2, digits), digits, _trained("lenet5-wide", small, 1, digits).weights),
        "1998": (_trained("lenet5-1998", {}, 2, digits), digits, _trained("lenet5-1998", {}, 1, digits).weights),
        "dead": (_with_dead_filter(grey), digits, None),
    }
    return {
        name: Subject(name, checkpoint, write_bundle(checkpoint, folder / name), images, stale)
        for name, (checkpoint, images, stale) in plans.items()
    }


def write_bundle(checkpoint: Checkpoint, folder: Path) -> Bundle:
    """What `api.export` writes, without its parity check, which is what is on trial here."""
    folder.mkdir(parents=True)
    artifacts = [write_artifact(folder, CHECKPOINT.name, CHECKPOINT.format, CHECKPOINT.path, to_bytes(checkpoint))]
    for spec in FORMATS:
        assert spec.exporter is not None
        exported = spec.exporter()(checkpoint.module(), checkpoint.metadata(), ExportOptions())
        details = {**exported.details, "tensors": list(recorded(checkpoint, spec, exported.data))}
        artifacts.append(write_artifact(folder, spec.name, spec.format, spec.path, exported.data, details))
    manifest = Manifest(checkpoint.metadata(), tuple(artifacts), environment.versions(), checkpoint.dataset, environment.capture())
    write_manifest(folder, manifest)
    return Bundle(folder, manifest)


def recorded(checkpoint: Checkpoint, spec: ArtifactSpec, data: bytes) -> tuple[Mapping[str, Any], ...]:
    """What an export writes into the manifest of where each weight is; raises ExportFailed where one is not there."""
    assert spec.reader is not None
    return record(checkpoint.weights, spec.reader()(data), find_model(checkpoint.model).factors)


def _trained(model: str, settings: Mapping[str, str], epochs: int, digits: Dataset) -> Checkpoint:
    return train.train(train.TrainConfig(model, settings, epochs=epochs, device="cpu"), digits)


def _with_dead_filter(checkpoint: Checkpoint) -> Checkpoint:
    bias = checkpoint.weights["conv1.bias"].clone()
    bias[DEAD_FILTER] = DEAD_BIAS
    return dataclasses.replace(checkpoint, weights={**checkpoint.weights, "conv1.bias": bias})


def _tinted(digits: Dataset) -> Dataset:
    """The digits in seeded colours: grey ones would hide a swap of red and blue."""
    colours = torch.rand(len(digits.test_images), 3, 1, 1, generator=torch.Generator().manual_seed(0))
    images = (digits.test_images * colours).round().to(torch.uint8)
    return dataclasses.replace(digits, name="tinted digits", test_images=images, train_images=digits.train_images.expand(-1, 3, -1, -1))


# How a fault gets into an artifact.


def in_weights(where: str, layers: tuple[str, ...], edit: Callable[[Weights], None]) -> Fault:
    """A fault that `edit` makes in a copy of the checkpoint's tensors."""

    def inject(subject: Subject, spec: ArtifactSpec) -> bytes:
        weights = {name: tensor.clone() for name, tensor in subject.checkpoint.weights.items()}
        edit(weights)
        if spec.format == "onnx":
            model = onnx.load_from_string(subject.read(spec))
            _write_initializers(model, subject.checkpoint.weights, weights)
            return _repacked(model)
        module = subject.checkpoint.module()
        module.load_state_dict(weights)
        return _exported(module, subject, spec)

    return Fault("", where, layers, inject)


def in_steps(where: str, layers: tuple[str, ...], edit: Callable[[Steps], None]) -> Fault:
    """A fault that `edit` makes in the steps of the forward pass."""

    def inject(subject: Subject, spec: ArtifactSpec) -> bytes:
        staged = Staged(subject.checkpoint.module())
        steps = staged.healthy()
        edit(steps)
        staged.steps = tuple(steps.values())
        return _exported(staged.eval(), subject, spec)

    return Fault("", where, layers, inject, exported=True)


def in_graph(where: str, layers: tuple[str, ...], edit: Callable[[onnx.GraphProto], None]) -> Fault:
    """A fault that `edit` makes in the graph of an ONNX file."""

    def inject(subject: Subject, spec: ArtifactSpec) -> bytes:
        model = onnx.load_from_string(subject.read(spec))
        edit(model.graph)
        return _repacked(model)

    return Fault("", where, layers, inject)


class Staged(nn.Module):
    """A model's layers under their own names, and a forward pass that is a list of steps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.steps = tuple(self.healthy().values())

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x

    def healthy(self) -> Steps:
        """The model's own steps by name; the first word of a name is the layer that the step belongs to."""
        child: Callable[[str], Any] = self.get_submodule
        if not hasattr(self, "c1"):
            features, activation, pool = child("fc1").in_features, child("activation"), child("pool")
            steps: Steps = {}
            for number in "12":
                steps |= {f"conv{number}": child(f"conv{number}"), f"conv{number} activation": activation, f"pool{number}": pool}
            steps["pool2 flatten"] = lambda x: x.reshape(-1, features)
            for number in "12":
                steps |= {f"fc{number}": child(f"fc{number}"), f"fc{number} activation": activation}
            return steps | {"fc3": child("fc3")}
        steps = {}
        for layer in ("c1", "s2", "c3", "s4", "c5"):
            steps |= {layer: child(layer), f"{layer} activation": squash()}
        steps |= {"c5 flatten": lambda x: x.reshape(-1, 120), "f6": child("f6"), "f6 activation": squash()}
        return steps | {"rbf": lambda x: -self.distances(x)}

    def distances(self, x: Tensor) -> Tensor:
        """Squared distances to the prototypes of 1998."""
        return (x.unsqueeze(1) - self.get_buffer("prototypes")).square().sum(dim=2)


def squash(scale: float = 1.7159, slope: float = 2.0 / 3.0) -> Step:
    """The 1998 activation."""
    return lambda x: scale * torch.tanh(x * slope)


def _exported(module: nn.Module, subject: Subject, spec: ArtifactSpec) -> bytes:
    assert spec.exporter is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters warn of what the faults do, rightly
        return spec.exporter()(module, subject.checkpoint.metadata(), ExportOptions()).data


def _repacked(model: onnx.ModelProto) -> bytes:
    """The file with its embedded digest renewed."""
    text = next(prop.value for prop in model.metadata_props if prop.key == METADATA_KEY)
    helper.set_model_props(model, {METADATA_KEY: text, DIGEST_KEY: content_digest(model, text)})
    data: bytes = model.SerializeToString()
    return data


def _write_initializers(model: onnx.ModelProto, before: Mapping[str, Tensor], after: Weights) -> None:
    held = {initializer.name: initializer for initializer in model.graph.initializer}
    coefficients = iter(_next_constants(model.graph))  # both exporters fold four times the coefficient into one constant
    for name, tensor in after.items():
        where, value = name, tensor
        if name.endswith(".coefficient"):
            where, value = next(coefficients), 4.0 * tensor
        if not torch.equal(tensor, before[name]):
            held[where].CopyFrom(numpy_helper.from_array(value.numpy(), where))


def _next_constants(graph: onnx.GraphProto) -> Iterator[str]:
    """What the output of each average pooling is multiplied with."""
    pooled = [node.output[0] for node in graph.node if node.op_type == "AveragePool"]
    return (node.input[1] for node in graph.node if node.op_type == "Mul" and node.input[0] in pooled)


def layer_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The node that begins each layer of the layer table, in its order."""
    return [node for node in graph.node if node.op_type in ("Conv", "AveragePool", "MaxPool", "Gemm", "Sub")]


def insert_after(graph: onnx.GraphProto, node: onnx.NodeProto, *ops: tuple[str, tuple[str, ...], dict[str, Any]]) -> None:
    """Put a chain of (operator, further inputs, attributes) between a node and whoever reads its output."""
    final = node.output[0]
    source = node.output[0] = f"{final}/0"
    chain = []
    for number, (op, inputs, attributes) in enumerate(ops, 1):
        target = final if number == len(ops) else f"{final}/{number}"
        chain.append(helper.make_node(op, [source, *inputs], [target], name=f"{final}/{op}/{number}", **attributes))
        source = target
    nodes = list(graph.node)
    place = nodes.index(node) + 1
    del graph.node[:]
    graph.node.extend([*nodes[:place], *chain, *nodes[place:]])


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    """Replace or add one attribute of a node."""
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def _then(first: Step, second: Step) -> Step:
    return lambda x: second(first(x))


# Faults in the weights.


def layer_of(tensor: str) -> str:
    """The layer of the layer table that a tensor belongs to."""
    return "rbf" if tensor == "prototypes" else tensor.split(".")[0]


def _named(subject: Subject, *patterns: str) -> list[str]:
    return [name for name in subject.checkpoint.weights if any(fnmatchcase(name, pattern) for pattern in patterns)]


def one_value(change: Callable[[Tensor, int], None], *patterns: str) -> Draw:
    """A fault of one number in a tensor, whose flat view and position `change` is given; zeros are passed over."""

    def draw(subject: Subject, rng: Random) -> Fault:
        name = rng.choice(_named(subject, *(patterns or ("*.weight", "*.coefficient"))))
        at = int(rng.choice(subject.checkpoint.weights[name].view(-1).nonzero()[:, 0].tolist()))
        return in_weights(f"{name}[{at}]", (layer_of(name),), lambda weights: change(weights[name].view(-1), at))

    return draw


def one_tensor(change: Callable[[Tensor], Tensor], *patterns: str) -> Draw:
    """A fault of a whole tensor, whose name matches one of `patterns`."""

    def draw(subject: Subject, rng: Random) -> Fault:
        name = rng.choice(_named(subject, *patterns))
        return in_weights(name, (layer_of(name),), lambda weights: weights.update({name: change(weights[name])}))

    return draw


def bit(number: int) -> Draw:
    """One bit of one weight, 0 the lowest of the mantissa, 23 the lowest of the exponent."""

    def flip(flat: Tensor, at: int) -> None:
        flat.view(torch.int32)[at] ^= 1 << number

    return one_value(flip)


def exponent_bit(subject: Subject, rng: Random) -> Fault:
    """Any bit of the exponent of one weight."""
    return bit(rng.choice(range(23, 31)))(subject, rng)


def scaled(factor: float) -> Callable[[Tensor, int], None]:
    """Multiply one number."""

    def change(flat: Tensor, at: int) -> None:
        flat[at] *= factor

    return change


def becomes(value: float) -> Callable[[Tensor, int], None]:
    """Replace one number."""

    def change(flat: Tensor, at: int) -> None:
        flat[at] = value

    return change


def filter_negated(subject: Subject, rng: Random) -> Fault:
    """Every weight of one filter or neuron."""
    name = rng.choice(_named(subject, "*.weight"))
    row = rng.randrange(len(subject.checkpoint.weights[name]))

    def edit(weights: Weights) -> None:
        weights[name][row].neg_()

    return in_weights(f"{name}[{row}]", (layer_of(name),), edit)


def filters_swapped(*endings: str) -> Draw:
    """Two filters or neurons of a layer, in the tensors named."""

    def draw(subject: Subject, rng: Random) -> Fault:
        layer = layer_of(rng.choice(_named(subject, "*.weight")))
        a, b = rng.sample(range(len(subject.checkpoint.weights[f"{layer}.weight"])), 2)

        def edit(weights: Weights) -> None:
            for ending in endings:
                tensor = weights[f"{layer}{ending}"]
                tensor[[a, b]] = tensor[[b, a]]

        return in_weights(f"{layer}: {a} and {b}", (layer,), edit)

    return draw


def channels_swapped(subject: Subject, rng: Random) -> Fault:
    """Two input channels of the second convolution."""
    a, b = rng.sample(range(subject.checkpoint.weights["conv2.weight"].shape[1]), 2)

    def edit(weights: Weights) -> None:
        weights["conv2.weight"][:, [a, b]] = weights["conv2.weight"][:, [b, a]]

    return in_weights(f"conv2.weight[:, {a}] and [:, {b}]", ("conv2",), edit)


def weights_replaced(source: Callable[[Subject, Random], Mapping[str, Tensor]]) -> Draw:
    """All weights are other ones."""

    def draw(subject: Subject, rng: Random) -> Fault:
        other = source(subject, rng)
        changed = [name for name in other if not torch.equal(other[name], subject.checkpoint.weights[name])]
        first = min((layer_of(name) for name in changed), key=subject.layers.index)
        return in_weights("everywhere", (first,), lambda weights: weights.update(other))

    return draw


def _stale(subject: Subject, rng: Random) -> Mapping[str, Tensor]:
    assert subject.stale is not None
    return subject.stale


def _other_seed(subject: Subject, rng: Random) -> Mapping[str, Tensor]:
    return initialise(subject.checkpoint.model, subject.checkpoint.config, rng.randrange(2, 1000)).state_dict()


def edge_moved(subject: Subject, rng: Random) -> Fault:
    """One connection of C3's table: a map reads another S2 map with the same kernel."""
    target = rng.randrange(16)
    sources = [source for source in range(6) if target in C3_CONNECTIONS[source]]
    if len(sources) == 6:  # the last map sees all
        return edge_moved(subject, rng)
    old = rng.choice(sources)
    new = rng.choice([source for source in range(6) if source not in sources])

    def edit(weights: Weights) -> None:
        kernel = weights["c3.weight"][target]
        kernel[new] = kernel[old]
        kernel[old] = 0.0

    return in_weights(f"c3 map {target}: s2 map {old} -> {new}", ("c3",), edit)


def behind_dead_relu(subject: Subject, rng: Random) -> Fault:
    """A weight of the filter that never fires."""
    at = rng.randrange(25)
    return in_weights(
        f"conv1.weight[{DEAD_FILTER}, 0, {at}]", ("conv1",), lambda w: scaled(1.5)(w["conv1.weight"][DEAD_FILTER].view(-1), at)
    )


# Faults in the steps.


def at_step(pattern: str, replacement: Callable[[Step], Step], precedes: bool = False) -> Draw:
    """Replace one step, drawn from those whose names match `pattern`.

    `precedes`: nodes of its own come before the layer's first, so the layer before it is as good a name.
    """

    def draw(subject: Subject, rng: Random) -> Fault:
        name = rng.choice([name for name in Staged(subject.checkpoint.module()).healthy() if fnmatchcase(name, pattern)])
        layer = name.split()[0]
        before = subject.layers[subject.layers.index(layer) - 1]

        def edit(steps: Steps) -> None:
            steps[name] = replacement(steps[name])

        return in_steps(name, (layer, before) if precedes else (layer,), edit)

    return draw


def instead(step: Step) -> Callable[[Step], Step]:
    """The healthy step is not taken, this one is."""
    return lambda healthy: step


def shifted_pool(healthy: Step) -> Step:
    """The windows begin one pixel further right and down."""
    return lambda x: healthy(functional.pad(x[:, :, 1:, 1:], (0, 1, 0, 1)))


def padded_pool(counted: bool) -> Step:
    """Average pooling given padding 1 and cropped to the size that it should have."""

    def step(x: Tensor) -> Tensor:
        side = x.shape[2] // 2
        return functional.avg_pool2d(x, 2, 2, padding=1, count_include_pad=counted)[:, :, :side, :side]

    return step


def window_of_three(x: Tensor) -> Tensor:
    """Max pooling over 3x3 in steps of two."""
    return functional.max_pool2d(functional.pad(x, (0, 1, 0, 1)), 3, 2)


def stride_of_one(x: Tensor) -> Tensor:
    """Average pooling in steps of one, cropped."""
    side = x.shape[2] // 2
    return functional.avg_pool2d(x, 2, 1)[:, :, :side, :side]


def wrong_padding(make: Callable[[Random], Callable[[Tensor, Tensor, Tensor], Tensor]]) -> Draw:
    """The first convolution of a model with padding 2, given image, weight and bias. A Pad node of its own precedes the layer."""

    def draw(subject: Subject, rng: Random) -> Fault:
        convolve = make(rng)

        def edit(steps: Steps) -> None:
            layer: Any = steps["conv1"]
            steps["conv1"] = lambda x: convolve(x, layer.weight, layer.bias)

        return in_steps("conv1", ("conv1", "input"), edit)

    return draw


def _off_by_one(rng: Random) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if rng.random() < 0.5:
        return lambda x, w, b: functional.pad(functional.conv2d(x, w, b, padding=1), (1, 1, 1, 1))
    if rng.random() < 0.5:
        return lambda x, w, b: functional.conv2d(x, w, b, padding=3)[:, :, :-2, :-2]
    return lambda x, w, b: functional.conv2d(x, w, b, padding=3)[:, :, 2:, 2:]


def _asymmetric(rng: Random) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    sides = rng.choice(((3, 1, 3, 1), (1, 3, 1, 3), (3, 1, 2, 2), (2, 2, 1, 3)))
    return lambda x, w, b: functional.conv2d(functional.pad(x, sides), w, b)


def _mode(mode: str) -> Callable[[Random], Callable[[Tensor, Tensor, Tensor], Tensor]]:
    return lambda rng: lambda x, w, b: functional.conv2d(functional.pad(x, (2, 2, 2, 2), mode=mode), w, b)


def dilated(subject: Subject, rng: Random) -> Fault:
    """Dilation 2 in one convolution, with the padding that keeps the shape."""
    name = rng.choice([layer for layer in subject.layers if layer in ("conv1", "conv2", "c1", "c3")])

    def edit(steps: Steps) -> None:
        layer: Any = steps[name]
        steps[name] = lambda x: functional.conv2d(x, layer.weight, layer.bias, padding=layer.padding[0] + 2, dilation=2)

    return in_steps(name, (name,), edit)


def on_input(make: Callable[[Random], Step]) -> Draw:
    """A step before the first layer."""

    def draw(subject: Subject, rng: Random) -> Fault:
        step = make(rng)

        def edit(steps: Steps) -> None:
            first = next(iter(steps))
            steps[first] = _then(step, steps[first])

        return in_steps("input", ("input",), edit)

    return draw


def on_scores(make: Callable[[Random], Step], last_too: bool = False) -> Draw:
    """A step behind the last layer; `last_too` where the last layer is as good a name for it as `output`."""

    def draw(subject: Subject, rng: Random) -> Fault:
        step, last = make(rng), subject.layers[-1]

        def edit(steps: Steps) -> None:
            steps[last] = _then(steps[last], step)

        return in_steps("scores", ("output", last) if last_too else ("output",), edit)

    return draw


def _row_repeated(rng: Random) -> Step:
    row = rng.randint(1, 4)

    def step(scores: Tensor) -> Tensor:
        rows = torch.arange(scores.shape[0])
        return scores[torch.where(rows == row, row - 1, rows)]

    return step


def _towards_mean(x: Tensor) -> Tensor:
    """Nothing at batch 1: each image is drawn 0.1 % towards the batch's mean."""
    return x + 0.001 * (x.mean(dim=0, keepdim=True) - x)


def _rolled(rng: Random) -> Step:
    by = rng.randint(1, 9)
    return lambda scores: scores.roll(by, 1)


def rbf_unnegated(subject: Subject, rng: Random) -> Fault:
    """The last layer without its minus sign."""

    def edit(steps: Steps) -> None:
        negated = steps["rbf"]
        steps["rbf"] = lambda x: -negated(x)

    return in_steps("rbf", ("rbf", "output"), edit)


def flattened_hwc(x: Tensor) -> Tensor:
    """Channels last, as TensorFlow flattens."""
    return x.permute(0, 2, 3, 1).flatten(1)


# Faults in the graph of an ONNX file.


def wrong_zero_point(subject: Subject, rng: Random) -> Fault:
    """The output of a layer with weights through int8 and back, where the two disagree on zero."""
    number = rng.choice([i for i, layer in enumerate(subject.layers) if f"{layer}.weight" in subject.checkpoint.weights])

    def edit(graph: onnx.GraphProto) -> None:
        for name, value in (("fault/scale", 0.05), ("fault/zero", 0), ("fault/one", 1)):
            kind = onnx.TensorProto.FLOAT if name == "fault/scale" else onnx.TensorProto.INT8
            graph.initializer.append(helper.make_tensor(name, kind, [], [value]))
        begin = layer_nodes(graph)[number]
        inputs = (("fault/scale", "fault/zero"), ("fault/scale", "fault/one"))
        insert_after(graph, begin, ("QuantizeLinear", inputs[0], {}), ("DequantizeLinear", inputs[1], {}))

    return in_graph(subject.layers[number], (subject.layers[number],), edit)


def gemm_alpha(subject: Subject, rng: Random) -> Fault:
    """One linear layer's product is 0.01 % too large."""
    number = rng.choice([i for i, layer in enumerate(subject.layers) if layer in ("fc1", "fc2", "fc3", "f6")])
    layer = subject.layers[number]
    return in_graph(layer, (layer,), lambda graph: set_attribute(layer_nodes(graph)[number], "alpha", 1.0001))


def frozen_batch(subject: Subject, rng: Random) -> Fault:
    """The reshape before the first linear layer is for two images."""

    def edit(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.op_type == "Reshape")
        features = subject.checkpoint.weights["f6.weight" if "f6" in subject.layers else "fc1.weight"].shape[1]
        graph.initializer.append(helper.make_tensor("fault/shape", onnx.TensorProto.INT64, [2], [2, features]))
        node.input[1] = "fault/shape"

    return in_graph("reshape", (), edit)


def frozen_batch_step(subject: Subject, rng: Random) -> Fault:
    """The same in TorchScript."""

    def edit(steps: Steps) -> None:
        name = next(name for name in steps if name.endswith("flatten"))
        steps[name] = lambda x: x.reshape(2, x[0].numel())

    return in_steps("reshape", (), edit)


def other_manifest(subject: Subject, rng: Random) -> Fault:
    """The manifest of another model's bundle, which stands beside this one's folder."""
    other = "1998" if subject.name != "1998" else "grey"
    inject = functools.partial(_manifest_of, other)
    return Fault("", f"manifest of {other}", (), inject, replaces="manifest")


def _manifest_of(other: str, subject: Subject, spec: ArtifactSpec) -> bytes:
    return (subject.bundle.path.parent / other / MANIFEST).read_bytes()


# The kinds.

ANY = ("grey", "colour", "wide", "1998")
LENET5 = ("grey", "colour", "wide")
AVERAGE = ("grey", "colour")
TRAINED = ("grey", "wide", "1998")
PADDED = ("grey", "wide")
FOUR = ((ONNX, ONNX_TS), (SCRIPT, TRACE))  # faults in weights
THREE = ((ONNX_TS, ONNX), (TRACE,))  # faults in steps: TorchScript's compiler would refuse their lambdas
GRAPH = ((ONNX, ONNX_TS),)
# Names of steps.
ACTIVATION, POOL, FLATTEN, WEIGHTED = "* activation", "pool?", "* flatten", "[cf]*[0-9]"


def _same(step: Step) -> Callable[[Random], Step]:
    return lambda rng: step


MANTISSA = tuple(Kind(f"mantissa bit {number}", bit(number), ANY, FOUR) for number in MANTISSA_BITS)

KINDS: tuple[Kind, ...] = (
    Kind("exponent bit of a weight", exponent_bit, ANY, FOUR),
    Kind("weight zeroed", one_value(becomes(0.0)), ANY, FOUR),
    Kind("weight off by 0.1 %", one_value(scaled(1.001)), ANY, FOUR),
    Kind("sign of a weight", one_value(scaled(-1.0)), ANY, FOUR),
    Kind("sign of a filter", filter_negated, ANY, FOUR),
    Kind("two filters swapped with their biases", filters_swapped(".weight", ".bias"), ANY, FOUR),
    Kind("two filters swapped without their biases", filters_swapped(".weight"), ANY, FOUR),
    Kind("bias dropped", one_tensor(torch.zeros_like, "*.bias"), ANY, FOUR),
    Kind("bias shifted by one", one_tensor(lambda bias: bias.roll(1, 0), "*.bias"), ANY, FOUR),
    Kind("bias doubled", one_tensor(lambda bias: 2.0 * bias, "*.bias"), ANY, FOUR),
    Kind("kernel transposed", one_tensor(lambda w: w.transpose(2, 3).contiguous(), "conv?.weight", "c?.weight"), ANY, FOUR),
    Kind("kernel rotated by 180 degrees", one_tensor(lambda w: w.flip(2, 3), "conv?.weight", "c?.weight"), ANY, FOUR),
    Kind("input channels of conv2 swapped", channels_swapped, LENET5, FOUR),
    Kind("NaN in a weight", one_value(becomes(float("nan"))), ANY, FOUR),
    Kind("infinity in a bias", one_value(becomes(float("inf")), "*.bias"), ANY, FOUR),
    Kind("stale weights of another epoch", weights_replaced(_stale), TRAINED, FOUR),
    Kind("weights of another seed", weights_replaced(_other_seed), ANY, FOUR),
    Kind("weight tensor through bf16", one_tensor(lambda w: w.bfloat16().float(), "*.weight"), ANY, FOUR),
    Kind("weight tensor rounded to 3 decimals", one_tensor(lambda w: w.round(decimals=3), "*.weight"), ANY, FOUR),
    Kind("square weight transposed", one_tensor(lambda w: w.T.contiguous(), "fc2.weight"), ("colour",), FOUR),
    Kind("weight behind a dead ReLU", behind_dead_relu, ("dead",), FOUR),
    Kind("C3 connection moved", edge_moved, ("1998",), FOUR),
    Kind("subsampling coefficient / 4", one_tensor(lambda c: c / 4.0, "*.coefficient"), ("1998",), FOUR),
    Kind("prototype pixel flipped", one_value(scaled(-1.0), "prototypes"), ("1998",), FOUR),
    Kind("max for average pooling", at_step(POOL, instead(nn.MaxPool2d(2))), AVERAGE, THREE),
    Kind("average for max pooling", at_step(POOL, instead(nn.AvgPool2d(2))), ("wide",), THREE),
    Kind("pooling padded, padding counted", at_step(POOL, instead(padded_pool(True))), AVERAGE, THREE),
    Kind("pooling padded, padding not counted", at_step(POOL, instead(padded_pool(False))), AVERAGE, THREE),
    Kind("pooling shifted by a pixel", at_step(POOL, shifted_pool, precedes=True), LENET5, THREE),
    Kind("pooling window 3 for 2", at_step(POOL, instead(window_of_three), precedes=True), ("wide",), THREE),
    Kind("pooling stride 1 for 2, cropped", at_step(POOL, instead(stride_of_one)), AVERAGE, THREE),
    Kind("padding off by one", wrong_padding(_off_by_one), PADDED, THREE),
    Kind("padding asymmetric", wrong_padding(_asymmetric), PADDED, THREE),
    Kind("padding by reflection", wrong_padding(_mode("reflect")), PADDED, THREE),
    Kind("padding by the edge", wrong_padding(_mode("replicate")), PADDED, THREE),
    Kind("dilation 2 for 1", dilated, ANY, THREE),
    Kind("activation dropped", at_step(ACTIVATION, instead(lambda x: x)), ANY, THREE),
    Kind("ReLU on the scores", on_scores(_same(torch.relu), last_too=True), LENET5, THREE),
    Kind("LeakyReLU for ReLU", at_step(ACTIVATION, instead(functional.leaky_relu)), LENET5, THREE),
    Kind("tanh for ReLU", at_step(ACTIVATION, instead(torch.tanh)), LENET5, THREE),
    Kind("flattened channels last", at_step(FLATTEN, instead(flattened_hwc)), LENET5, THREE),
    Kind("normalised with a wrong mean", on_input(lambda rng: (lambda by: lambda x: x - by)(rng.uniform(0.001, 0.1))), ANY, THREE),
    Kind("normalised with a wrong std", on_input(lambda rng: (lambda by: lambda x: x / by)(rng.uniform(1.001, 1.1))), ANY, THREE),
    Kind("RGB and BGR swapped", on_input(_same(lambda x: x.flip(1))), ("colour",), THREE),
    Kind("softmax appended", on_scores(_same(lambda s: s.softmax(1))), ANY, THREE),
    Kind("log_softmax appended", on_scores(_same(lambda s: s.log_softmax(1))), ANY, THREE),
    Kind("labels permuted", on_scores(_rolled), ANY, THREE),
    Kind("scores clipped to 10", on_scores(_same(lambda s: s.clamp(-10.0, 10.0))), ANY, THREE),
    Kind("scores scaled by 1.001", on_scores(_same(lambda s: s * 1.001)), ANY, THREE),
    Kind("layer through fp16", at_step(WEIGHTED, lambda layer: _then(layer, lambda x: x.half().float())), ANY, THREE),
    Kind("row of the batch repeated", on_scores(_row_repeated, last_too=True), ANY, ((ONNX_TS,), (TRACE,))),
    Kind("rows of the batch reversed", on_scores(_same(lambda s: s.flip(0)), last_too=True), ANY, THREE),
    Kind("scores depend on the batch", on_scores(_same(_towards_mean), last_too=True), ANY, THREE),
    Kind("noise of 1e-4 on the scores", on_scores(_same(lambda s: s + 1e-4 * torch.randn_like(s)), last_too=True), ANY, THREE),
    Kind("tanh scale 1.7 for 1.7159", at_step(ACTIVATION, instead(squash(scale=1.7))), ("1998",), THREE),
    Kind("tanh slope 0.66 for 2/3", at_step(ACTIVATION, instead(squash(slope=0.66))), ("1998",), THREE),
    Kind("RBF not negated", rbf_unnegated, ("1998",), THREE),
    Kind("int8 with a wrong zero point", wrong_zero_point, ANY, GRAPH),
    Kind("Gemm alpha 1.0001", gemm_alpha, ANY, GRAPH),
    Kind("batch frozen at 2", frozen_batch, ANY, GRAPH),
    Kind("batch frozen at 2, TorchScript", frozen_batch_step, ANY, ((TRACE,),)),
    Kind("manifest of another model", other_manifest, ANY, ((ONNX, ONNX_TS, TRACE, SCRIPT),)),
)


# Edits that change nothing: a check that fails them cries wolf.


def on_nodes(op: str, edit: Callable[[onnx.GraphProto, onnx.NodeProto], None]) -> Draw:
    """A healthy edit of one node of a kind."""

    def draw(subject: Subject, rng: Random) -> Fault:
        pick = rng.random()

        def change(graph: onnx.GraphProto) -> None:
            nodes = [node for node in graph.node if node.op_type == op]
            edit(graph, nodes[int(pick * len(nodes))])

        return in_graph(op, (), change)

    return draw


EQUIVALENTS: tuple[Kind, ...] = (
    Kind(
        "count_include_pad 0 without padding",
        on_nodes("AveragePool", lambda _, n: set_attribute(n, "count_include_pad", 0)),
        AVERAGE,
        GRAPH,
    ),
    Kind("ceil_mode 1 where sizes divide", on_nodes("AveragePool", lambda _, n: set_attribute(n, "ceil_mode", 1)), AVERAGE, GRAPH),
    Kind("Identity after a convolution", on_nodes("Conv", lambda g, n: insert_after(g, n, ("Identity", (), {}))), ANY, GRAPH),
    Kind("ReLU twice", on_nodes("Relu", lambda g, n: insert_after(g, n, ("Relu", (), {}))), LENET5, GRAPH),
    Kind("steps exported anew", lambda subject, rng: in_steps("nowhere", (), lambda steps: None), ANY, THREE),
)
