"""Where a failure begins: every layer of a variant beside the oracle's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lenet_deploy.models.layers import Layer
from lenet_deploy.parity.judge import TOLERANCES
from lenet_deploy.records import LayerError
from lenet_deploy.runtimes.traces import CONV, DIFFERENCE, LINEAR, POOL, Tap

INPUT, OUTPUT = "input", "output"

# Which operator begins each kind of layer in the layer table.
_BEGINS = {
    "conv": CONV,
    "conv, table": CONV,
    "avg pool": POOL,
    "max pool": POOL,
    "subsampling": POOL,
    "linear": LINEAR,
    "rbf distance": DIFFERENCE,
}


@dataclass(frozen=True, eq=False)
class _Stage:
    """What a layer computed: its output; and every tensor it met, from its input to that."""

    layer: str
    output: Tap
    within: tuple[Tap, ...]


@dataclass(frozen=True, eq=False)
class Healthy:
    """What the layers of a variant are compared with, on the same images.

    Attributes:
        oracle: the float64 module's tensors.
        eager: those of torch's eager mode in the variant's precision, on the CPU; None where there are none.
        layers: the model's layer table.
        precision: key of TOLERANCES; others have no budget, and only what is not finite or of another shape fails.
        condition: as in `judge`; (N,).
    """

    oracle: Sequence[Tap]
    eager: Sequence[Tap] | None
    layers: Sequence[Layer]
    precision: str
    condition: torch.Tensor | float = 1.0


def layer_errors(graph: str, taps: Sequence[Tap], healthy: Healthy) -> tuple[LayerError, ...]:
    """Compare a variant's layers with the oracle's, from the input to the scores.

    A LeNet is a chain, so a layer reaches from the operator that begins it to the tensor that the next such operator takes:
    activation, flattening and the like belong to the layer before them, whatever a runtime fused or reordered in between. The rule is
    that of the scores (see `judge`), with the largest value that the layer meets in the image in place of the largest score. Where the
    variant's operators are not those of the layer table, the first layer that is not there fails and ends the comparison.

    Args:
        graph: name of this form of the variant, for the result.
        taps: the variant's own tensors.
    """
    ours, theirs = _stages(taps, healthy.layers), _stages(healthy.oracle, healthy.layers)
    eager: tuple[_Stage | None, ...] = _stages(healthy.eager, healthy.layers) if healthy.eager else ()
    if len(eager) != len(theirs):  # an emulated format hides some of its tensors
        eager = (None,) * len(theirs)
    whole = len(ours) == len(theirs)
    chain = zip(ours[:-1] if whole else ours, theirs, eager, strict=False)
    found = [_error(graph, stage.layer, stage.output, other, own, healthy) for stage, other, own in chain]
    if not whole:
        return (*found, LayerError(graph, theirs[len(ours)].layer, "not in this graph", None, None, False))
    # The last layer's own result may lie before the scores, with something behind it that does not belong there.
    last = ours[-1]
    tries = [_error(graph, last.layer, tap, theirs[-1], eager[-1], healthy) for tap in reversed(last.within[1:])]
    own = next((each for each in tries if each.passed), tries[0])
    return (*found, own, _error(graph, OUTPUT, last.output, theirs[-1], eager[-1], healthy))


def first_divergent(errors: Sequence[LayerError]) -> tuple[str, str] | None:
    """The layer where a failure begins and a sentence about it, or None where there are no layers to compare.

    It is the first layer beyond its budget in the form of the graph that runs; where none is, the one that added most to the share.
    """
    by_graph: dict[str, list[LayerError]] = {}
    for error in errors:
        by_graph.setdefault(error.graph, []).append(error)
    failing = {graph: _first_failing(each) for graph, each in by_graph.items()}
    graph = next((graph for graph, index in failing.items() if index is not None), None)
    if graph is None:
        graph = next(iter(by_graph), None)
        if graph is None:
            return None
        chain = by_graph[graph]
        index = max(range(len(chain)), key=lambda i: (chain[i].budget_used or 0.0) - ((chain[i - 1].budget_used or 0.0) if i else 0.0))
        return chain[index].layer, f"no layer is beyond its budget; {chain[index].layer} adds most to it"
    index = failing[graph] or 0
    chain, begins = by_graph[graph], by_graph[graph][index]
    before = f"{chain[index - 1].layer} at {_share(chain[index - 1])}" if index else "nothing"
    only = f", in the {graph} graph only" if len(by_graph) > 1 and sum(i is not None for i in failing.values()) == 1 else ""
    return begins.layer, f"begins at {begins.layer} (tensor {begins.tensor}{only}): before it {before}, then {_share(begins)}"


def _first_failing(errors: Sequence[LayerError]) -> int | None:
    return next((index for index, error in enumerate(errors) if not error.passed), None)


def _share(error: LayerError) -> str:
    if error.budget_used is None:
        return "not comparable"
    return f"{error.budget_used:.3g} of its budget (error {error.max_abs_error:.3g})"


def _stages(taps: Sequence[Tap], layers: Sequence[Layer]) -> tuple[_Stage, ...]:
    """The input, then each layer of the table as far as the operators follow it; the table's last reaches to the scores."""
    kinds = [_BEGINS[layer.kind] for layer in layers]
    index = {tap.name: i for i, tap in enumerate(taps)}
    begins = [i for i, tap in enumerate(taps) if tap.op in kinds]
    ends = [index[taps[i].source] for i in begins] or [len(taps) - 1]
    stages = [_Stage(INPUT, taps[ends[0]], (taps[ends[0]],))]
    for number, (layer, kind, start) in enumerate(zip(layers, kinds, begins, strict=False), 1):
        if taps[start].op != kind:
            break
        end = ends[number] if number < min(len(ends), len(layers)) else len(taps) - 1
        stages.append(_Stage(layer.name, taps[end], (taps[index[taps[start].source]], *taps[start : end + 1])))
    return tuple(stages)


def _error(graph: str, layer: str, tap: Tap, stage: _Stage, eager: _Stage | None, healthy: Healthy) -> LayerError:
    value, target = _flat(tap, stage), _flat(stage.output, stage)
    if value.shape != target.shape or not value.isfinite().all():
        return LayerError(graph, layer, tap.name, None, None, False)
    error = (value - target).abs()
    tolerance = TOLERANCES.get(healthy.precision)
    if tolerance is None:
        return LayerError(graph, layer, tap.name, float(error.max()), None, True)
    scale = torch.stack([each.value.abs().flatten(1).amax(dim=1) for each in stage.within]).amax(dim=0).clamp_min(2.0**-1000)
    unit = tolerance.epsilon * healthy.condition * scale
    allowed, spread = tolerance.factor * unit, None
    if eager is not None:
        # A layer can be ill-conditioned where the scores are not. Eager shows it, by its own largest and typical error in the batch.
        own = ((_flat(eager.output, stage) - target) / scale[:, None]).abs()
        allowed = allowed.maximum(tolerance.ratio * own.max() * scale)
        spread = error.square().mean(dim=1).sqrt() / (tolerance.ratio * own.square().mean().sqrt() * scale + unit)
    used = error.amax(dim=1) / allowed
    used = used if spread is None else used.maximum(spread)
    share = min(float(used.max()), 1e300)
    return LayerError(graph, layer, tap.name, min(float(error.max()), 1e300), share, share <= 1.0)


def _flat(tap: Tap, stage: _Stage) -> torch.Tensor:
    """A layer's values as float64 (N, ...), without the channels that a blocked layout pads."""
    value, wanted = tap.value.double(), stage.output.value
    if tap.padded and value.ndim == wanted.ndim and value.shape[1] > wanted.shape[1]:
        value = value[:, : wanted.shape[1]]
    return value.flatten(1) if value.ndim > 1 else value  # a reduction over the batch has no images


def trace_errors(traces: Mapping[str, Sequence[Tap]], healthy: Healthy) -> tuple[LayerError, ...]:
    """`layer_errors` of each form of the graph, in order."""
    return tuple(error for graph, taps in traces.items() for error in layer_errors(graph, taps, healthy))
