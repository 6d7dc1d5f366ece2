"""The drill-down passes every layer of a healthy variant and names the one where a fault begins."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from lenet_deploy import api
from lenet_deploy.checkpoint import Checkpoint
from lenet_deploy.data import Dataset
from lenet_deploy.devices import computing_on
from lenet_deploy.parity.check import Trial
from lenet_deploy.parity.drill import Healthy, first_divergent, layer_errors, trace_errors
from lenet_deploy.parity.inputs import input_sets
from lenet_deploy.parity.judge import TOLERANCES
from lenet_deploy.records import LayerError, ParityReport
from lenet_deploy.runtimes.eager import trace_module
from lenet_deploy.runtimes.traces import Tap
from lenet_deploy.variants import ONNX_TS, TRACE, VARIANTS, ArtifactSpec

CPU = torch.device("cpu")
CHAIN = ("input", "conv1", "pool1", "conv2", "pool2", "fc1", "fc2", "fc3", "output")
CHAIN_1998 = ("input", "c1", "s2", "c3", "s4", "c5", "f6", "rbf", "output")
FORMS = ("module", TRACE, ONNX_TS)
Faulty = Callable[[ArtifactSpec, Checkpoint, nn.Module], bytes]
Make = Callable[[nn.Module], nn.Module]
Step = Callable[[torch.Tensor], torch.Tensor]
each_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form if isinstance(form, str) else form.format)


def traced(
    form: str | ArtifactSpec, checkpoint: Checkpoint, module: nn.Module, images: torch.Tensor, faulty: Faulty
) -> dict[str, Sequence[Tap]]:
    """Each form of the graph of a module: as eager runs it, or as an artifact of it shows."""
    if isinstance(form, str):
        with computing_on(CPU):
            return {form: trace_module(module, images)}
    data = faulty(form, checkpoint, module)
    variant = next(variant for variant in VARIANTS if variant.artifact is form and variant.device == "cpu")
    with computing_on(CPU), variant.open_traces(data, checkpoint.preprocessing.input_shape) as traces:
        return {graph: trace(images) for graph, trace in traces.items()}


def drilled(trial: Trial, form: str | ArtifactSpec, module: nn.Module, faulty: Faulty, precision: str = "fp32") -> tuple[LayerError, ...]:
    """The layers of a module that claims to be the trial's checkpoint, on its real images."""
    inputs = trial.inputs[0]
    images = inputs.images[:24]
    taps = traced(form, trial.checkpoint, module, images, faulty)
    with computing_on(CPU):
        return trace_errors(taps, trial.healthy(images, precision, inputs.condition(precision)[:24]))


def chain(errors: Sequence[LayerError]) -> dict[str, tuple[str, ...]]:
    """Names of the layers, by graph."""
    graphs = dict.fromkeys(error.graph for error in errors)
    return {graph: tuple(error.layer for error in errors if error.graph == graph) for graph in graphs}


# Healthy variants.


@each_form
def test_a_healthy_variant_has_the_whole_layer_table_between_input_and_output_and_passes(
    form: str | ArtifactSpec, trial: Trial, tiny: Checkpoint, faulty: Faulty
) -> None:
    errors = drilled(trial, form, tiny.module(), faulty)
    assert set(chain(errors).values()) == {CHAIN}
    assert all(error.passed and error.budget_used is not None and error.budget_used < 0.8 for error in errors), errors
    assert all(error.max_abs_error == 0.0 for error in errors if error.layer == "input")


def test_each_variant_of_the_published_bundle_shows_its_layers_on_the_real_images(report: ParityReport) -> None:
    shown = {result.variant: result for result in report.results if result.layers}
    assert list(shown) == [variant.name for variant in VARIANTS if variant.device == "cpu"]
    for result in shown.values():
        assert result.inputs == "digits test split"
        assert set(chain(result.layers).values()) == {CHAIN}
        assert all(error.passed for error in result.layers)
    graphs = {name: list(chain(result.layers)) for name, result in shown.items()}
    assert graphs["eager/torch-cpu/fp32"] == ["module"]
    assert graphs["torchscript/torch-cpu/fp32/trace"] == graphs["torchscript/torch-cpu/fp32/script"] == ["graph"]
    assert graphs["onnx/ort-cpu/fp32"] == graphs["onnx/ort-cpu/fp32/ts-exporter"] == ["optimised", "unoptimised"]


HEALTHY = [
    ("lenet5-wide", {"image_size": "20"}),
    ("lenet5", {"pooling": "max", "activation": "tanh", "image_size": "20"}),
    ("lenet5", {"activation": "sigmoid", "image_size": "20"}),
    ("lenet5-1998", {}),
]


@pytest.mark.parametrize(("model", "settings"), HEALTHY, ids=[f"{model} {settings.get('activation', '')}" for model, settings in HEALTHY])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_layer_of_a_healthy_network_is_blamed_on_images_of_usual_size(
    model: str, settings: dict[str, str], seed: int, few: Dataset, faulty: Faulty
) -> None:
    checkpoint = api.load(model, settings=settings, seed=seed)
    with computing_on(CPU):
        trial = Trial(input_sets(checkpoint, few, 16), (1,), checkpoint)
    taken = trial.inputs[:4]  # the test split, normal and uniform images, constants
    data = faulty(ONNX_TS, checkpoint, checkpoint.module())
    variant = next(variant for variant in VARIANTS if variant.artifact is ONNX_TS and variant.device == "cpu")
    with computing_on(CPU), variant.open_traces(data, checkpoint.preprocessing.input_shape) as traces:
        for inputs in taken:
            images = inputs.images[:16]
            healthy = trial.healthy(images, "fp32", inputs.condition("fp32")[:16])
            taps = {graph: trace(images) for graph, trace in traces.items()}
            taps["module"] = trace_module(checkpoint.module(), images)
            beyond = [(error.graph, error.layer, error.budget_used) for error in trace_errors(taps, healthy) if not error.passed]
            assert beyond == [], inputs.name


# Faults.


class Stepwise(nn.Module):
    """A lenet5 whose tensor behind one step goes through a fault."""

    def __init__(self, module: nn.Module, where: str, fault: Step) -> None:
        super().__init__()
        self.module, self.where, self.fault = module, where, fault

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        layer, activation, pool = self.module.get_submodule, self.module.get_submodule("activation"), self.module.get_submodule("pool")
        x = self._at("input", image)
        for number in "12":
            x = self._at(f"conv{number}", activation(layer(f"conv{number}")(x)))
            x = self._at(f"pool{number}", pool(x))
        x = self._at("flatten", x.flatten(1))
        for number in "12":
            x = self._at(f"fc{number}", activation(layer(f"fc{number}")(x)))
        return self._at("output", layer("fc3")(x))

    def _at(self, where: str, x: torch.Tensor) -> torch.Tensor:
        return self.fault(x) if where == self.where else x


def at(where: str, fault: Step) -> Make:
    return lambda module: Stepwise(module, where, fault)


def scaled(tensor: str, factor: float = 1.001) -> Make:
    """One tensor of the checkpoint scaled."""

    def make(module: nn.Module) -> nn.Module:
        with torch.no_grad():
            module.get_parameter(tensor).mul_(factor)
        return module

    return make


def replaced(layer: str, other: nn.Module) -> Make:
    """Pooling or activation of one layer is another's: the module's own is kept for the rest."""

    def make(module: nn.Module) -> nn.Module:
        class Once(nn.Module):
            def __init__(self, own: nn.Module, turn: int) -> None:
                super().__init__()
                self.own, self.other, self.turn, self.calls, self.uses = own, other, turn, 0, 4 if own is activation else 2

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                self.calls += 1
                result: torch.Tensor = self.other(x) if (self.calls - 1) % self.uses == self.turn else self.own(x)
                return result

        activation = module.get_submodule("activation")
        name = "pool" if layer.startswith("pool") else "activation"
        turn = {"pool1": 0, "pool2": 1, "conv1": 0, "conv2": 1, "fc1": 2, "fc2": 3}[layer]
        setattr(module, name, Once(module.get_submodule(name), turn))
        return module

    return make


FAULTS: dict[str, tuple[Make, str]] = {
    **{f"{layer} weight": (scaled(f"{layer}.weight"), layer) for layer in ("conv1", "conv2", "fc1", "fc2", "fc3")},
    **{f"{layer} bias": (scaled(f"{layer}.bias", 0.5), layer) for layer in ("conv1", "conv2", "fc1", "fc2", "fc3")},
    **{f"max for average in {layer}": (replaced(layer, nn.MaxPool2d(2)), layer) for layer in ("pool1", "pool2")},
    **{f"activation of {layer} dropped": (replaced(layer, nn.Identity()), layer) for layer in ("conv1", "conv2", "fc1", "fc2")},
    **{f"tanh for ReLU in {layer}": (replaced(layer, nn.Tanh()), layer) for layer in ("conv1", "conv2", "fc1", "fc2")},
    **{
        f"channels of {layer} shifted": (at(layer, lambda x: x.roll(1, 1)), layer)
        for layer in ("conv1", "pool1", "conv2", "pool2", "fc1", "fc2")
    },
    "flattened channels last": (at("pool2", lambda x: x.permute(0, 2, 3, 1).reshape(x.shape)), "pool2"),
    "flattened in another order": (at("flatten", lambda x: x.flip(1)), "pool2"),
    "input scaled": (at("input", lambda x: x / 255), "input"),
    "input shifted": (at("input", lambda x: x - 0.1), "input"),
    "input mirrored": (at("input", lambda x: x.flip(3)), "input"),
    "softmax appended": (at("output", lambda x: x.softmax(1)), "output"),
    "scores permuted": (at("output", lambda x: x.roll(1, 1)), "output"),
    "scores scaled": (at("output", lambda x: x * 1.001), "output"),
    "a linear layer appended": (lambda module: nn.Sequential(module, nn.Linear(10, 10)), "output"),
    "sum over the batch added": (at("output", lambda x: x + 0.001 * x.sum()), "output"),
}


@each_form
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_by_its_layer(fault: str, form: str | ArtifactSpec, trial: Trial, tiny: Checkpoint, faulty: Faulty) -> None:
    make, layer = FAULTS[fault]
    torch.manual_seed(0)
    errors = drilled(trial, form, make(tiny.module()), faulty)
    found = first_divergent(errors)
    assert found is not None
    assert found[0] == layer
    for graph, layers in chain(errors).items():
        before = layers[: layers.index(layer)]
        assert before == CHAIN[: CHAIN.index(layer)], graph
        status = {error.layer: error.passed for error in errors if error.graph == graph}
        assert all(status[name] for name in before), graph
        assert not status[layer], graph
    assert found[1].startswith(f"begins at {layer} (tensor ")
    assert "graph only" not in found[1], "it is in every form of the graph"


@each_form
@pytest.mark.parametrize("layer", ["conv1", "conv2", "fc1", "fc2"])
def test_a_value_that_is_not_finite_begins_where_it_appears_and_has_no_number(
    layer: str, form: str | ArtifactSpec, trial: Trial, tiny: Checkpoint, faulty: Faulty
) -> None:
    module = tiny.module()
    with torch.no_grad():
        module.get_parameter(f"{layer}.bias")[0] = math.nan
    errors = drilled(trial, form, module, faulty)
    failed = [error for error in errors if not error.passed]
    assert failed[0].layer == layer
    assert {(error.max_abs_error, error.budget_used) for error in failed} == {(None, None)}
    assert (first_divergent(errors) or ("", ""))[1].endswith("then not comparable")


OF_1998: dict[str, tuple[Make, tuple[str, ...]]] = {
    **{f"{layer} weight": (scaled(f"{layer}.weight"), (layer,)) for layer in ("c1", "c3", "c5", "f6")},
    **{f"{layer} coefficient": (scaled(f"{layer}.coefficient"), (layer,)) for layer in ("s2", "s4")},
    "input scaled": (lambda module: nn.Sequential(Scale(), module), ("input",)),
    "scores not negated": (lambda module: nn.Sequential(module, Scale(-1.0)), ("output",)),
}


class Scale(nn.Module):
    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


@pytest.fixture(scope="module")
def trial_1998(few: Dataset) -> Trial:
    checkpoint = api.load("lenet5-1998")
    with computing_on(CPU):
        return Trial(input_sets(checkpoint, few, 2), (1,), checkpoint)


@each_form
@pytest.mark.parametrize("fault", OF_1998)
def test_a_fault_in_the_1998_network_is_named_by_its_layer(fault: str, form: str | ArtifactSpec, trial_1998: Trial, faulty: Faulty) -> None:
    make, layers = OF_1998[fault]
    errors = drilled(trial_1998, form, make(trial_1998.checkpoint.module()), faulty)
    assert (first_divergent(errors) or ("", ""))[0] in layers
    assert next(iter(chain(errors).values()))[: CHAIN_1998.index(layers[0]) + 1] == CHAIN_1998[: CHAIN_1998.index(layers[0]) + 1]


# Graphs of another structure.


class Pooled(nn.Module):
    """Without pool1's operator: every second pixel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, ::2, ::2]


@each_form
def test_a_missing_layer_ends_the_comparison_there(form: str | ArtifactSpec, trial: Trial, tiny: Checkpoint, faulty: Faulty) -> None:
    errors = drilled(trial, form, replaced("pool1", Pooled())(tiny.module()), faulty)
    for graph, layers in chain(errors).items():
        assert layers == ("input", "conv1", "pool1"), graph
    assert [error.tensor for error in errors if error.layer == "pool1"] == ["not in this graph"] * len(chain(errors))
    assert (first_divergent(errors) or ("", ""))[0] in ("conv1", "pool1")


@each_form
def test_an_extra_layer_ends_the_comparison_there(form: str | ArtifactSpec, trial: Trial, tiny: Checkpoint, faulty: Faulty) -> None:
    extra = nn.Conv2d(6, 6, 3, padding=1)
    errors = drilled(trial, form, Stepwise(tiny.module(), "conv1", extra), faulty)
    for graph, layers in chain(errors).items():
        assert layers == ("input", "conv1", "pool1"), graph
    last = errors[-1]
    assert (last.layer, last.tensor, last.max_abs_error, last.budget_used, last.passed) == ("pool1", "not in this graph", None, None, False)
    assert (first_divergent(errors) or ("", ""))[0] == "pool1"


def test_a_graph_without_any_layer_is_a_failure_at_the_first(trial: Trial, faulty: Faulty) -> None:
    class Nothing(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.flatten(1)[:, :10]

    errors = drilled(trial, "module", Nothing(), faulty)
    assert [error.passed for error in errors if error.layer == "conv1"] == [False]
    assert (first_divergent(errors) or ("", ""))[0] in ("input", "conv1")


# Taps that are made by hand.


@pytest.fixture(scope="module")
def healthy(trial: Trial) -> Healthy:
    images = trial.inputs[0].images[:8]
    with computing_on(CPU):
        return trial.healthy(images, "fp32", trial.inputs[0].condition("fp32")[:8])


def float32s(taps: Sequence[Tap]) -> list[Tap]:
    """The oracle's tensors, rounded: a variant that could not be better."""
    return [dataclasses.replace(tap, value=tap.value.float()) for tap in taps]


def test_the_oracle_rounded_uses_next_to_nothing(healthy: Healthy) -> None:
    errors = layer_errors("hand", float32s(healthy.oracle), healthy)
    assert tuple(error.layer for error in errors) == CHAIN
    assert all(error.passed and (error.budget_used or 0.0) < 0.2 for error in errors)


@pytest.mark.parametrize("content", [0.0, 1e9, math.nan])
def test_channels_that_a_blocked_layout_pads_are_left_out_and_others_are_not(healthy: Healthy, content: float) -> None:
    taps = float32s(healthy.oracle)
    place = next(i for i, tap in enumerate(taps) if tap.name.startswith("relu"))
    wider = torch.cat([taps[place].value, torch.full((8, 2, 16, 16), content)], dim=1)
    padded = [dataclasses.replace(tap, value=wider, padded=True) if i == place else tap for i, tap in enumerate(taps)]
    assert all(error.passed for error in layer_errors("hand", padded, healthy))
    claimed = [dataclasses.replace(tap, padded=False) for tap in padded]
    failed = [error for error in layer_errors("hand", claimed, healthy) if not error.passed]
    assert [(error.layer, error.max_abs_error) for error in failed] == [("conv1", None)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_value_that_is_not_finite_fails_with_a_budget_and_without_one(healthy: Healthy, value: float, precision: str) -> None:
    taps = float32s(healthy.oracle)
    taps[-1] = dataclasses.replace(taps[-1], value=taps[-1].value.clone())
    taps[-1].value[3, 4] = value
    errors = layer_errors("hand", taps, dataclasses.replace(healthy, precision=precision))
    failed = [error for error in errors if not error.passed]
    assert {(error.max_abs_error, error.budget_used) for error in failed} == {(None, None)}
    assert failed[-1].layer == "output"


def test_int8_has_errors_without_budgets_and_passes(healthy: Healthy) -> None:
    taps = [dataclasses.replace(tap, value=tap.value + 0.25 * (tap.source != "")) for tap in healthy.oracle]
    errors = layer_errors("hand", taps, dataclasses.replace(healthy, precision="int8", eager=None))
    assert tuple(error.layer for error in errors) == CHAIN
    assert [error.max_abs_error for error in errors[1:]] == pytest.approx([0.25] * 8)
    assert {(error.budget_used, error.passed) for error in errors} == {(None, True)}


def test_one_image_beyond_its_budget_is_enough(healthy: Healthy) -> None:
    taps = float32s(healthy.oracle)
    value = taps[-1].value.clone()
    value[5] *= 1.0001
    errors = layer_errors("hand", [*taps[:-1], dataclasses.replace(taps[-1], value=value)], healthy)
    assert [error.layer for error in errors if not error.passed] == ["fc3", "output"]


def scores_off(healthy: Healthy, errors: torch.Tensor) -> list[Tap]:
    """The oracle's tensors with the scores of each image off by `errors` (N,), each score alike."""
    *taps, scores = healthy.oracle
    return [*taps, dataclasses.replace(scores, value=scores.value + errors[:, None])]


def met_by_fc3(healthy: Healthy) -> torch.Tensor:
    """The largest value that the last layer meets in each image, input and output."""
    return torch.stack([tap.value.abs().flatten(1).amax(dim=1) for tap in healthy.oracle[-2:]]).amax(dim=0)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize(("share", "passed"), [(0.5, True), (1 - 1e-9, True), (1 + 1e-6, False), (3.0, False)])
def test_without_eager_a_layer_may_be_off_by_the_factor_of_the_largest_value_it_meets(
    healthy: Healthy, precision: str, share: float, passed: bool
) -> None:
    tolerance = TOLERANCES[precision]
    plain = dataclasses.replace(healthy, eager=None, condition=1.0, precision=precision)
    errors = layer_errors("hand", scores_off(plain, share * tolerance.factor * tolerance.epsilon * met_by_fc3(plain)), plain)
    assert [each.passed for each in errors[-2:]] == [passed] * 2
    assert errors[-1].budget_used == pytest.approx(share, rel=1e-6)
    assert all(each.budget_used == 0.0 for each in errors[:-2])


@pytest.mark.parametrize(("share", "passed"), [(0.5, True), (0.999, True), (1.001, False), (3.0, False)])
def test_where_eager_errs_a_layer_may_err_by_the_ratio_of_it(healthy: Healthy, share: float, passed: bool) -> None:
    tolerance, met = TOLERANCES["fp32"], met_by_fc3(healthy)
    own = 1e-3  # far beyond the factor, as where a layer magnifies what the scores do not show
    eager = scores_off(healthy, own * met)
    stricter = dataclasses.replace(healthy, eager=eager, condition=1.0)
    errors = layer_errors("hand", scores_off(healthy, share * tolerance.ratio * own * met), stricter)
    assert [each.passed for each in errors[-2:]] == [passed] * 2
    assert errors[-1].budget_used == pytest.approx(share, rel=1e-3)


def test_condition_widens_the_budget_of_every_layer(healthy: Healthy) -> None:
    taps = [dataclasses.replace(tap, value=tap.value * (1 + 1e-5)) for tap in float32s(healthy.oracle)]
    plain = dataclasses.replace(healthy, eager=None, condition=1.0)
    tight, wide = (layer_errors("hand", taps, dataclasses.replace(plain, condition=condition)) for condition in (1.0, 4.0))
    for one, other in zip(tight[1:], wide[1:], strict=True):
        assert (one.budget_used or 0.0) == pytest.approx(4 * (other.budget_used or 0.0), rel=1e-6)


@pytest.mark.parametrize("value", [1e38, 3e38, -3e38])
def test_numbers_stay_finite_and_fit_json_however_absurd_the_layer(healthy: Healthy, value: float) -> None:
    taps = [dataclasses.replace(tap, value=torch.full_like(tap.value, value)) if tap.source else tap for tap in float32s(healthy.oracle)]
    errors = layer_errors("hand", taps, healthy)
    assert json.dumps([dataclasses.asdict(error) for error in errors], allow_nan=False)
    assert not any(error.passed for error in errors[1:])


# The sentence.


def error(layer: str, share: float | None, graph: str = "graph") -> LayerError:
    return LayerError(graph, layer, f"{layer}.out", None if share is None else share / 8, share, share is not None and share <= 1.0)


def test_nothing_to_compare_has_no_layer() -> None:
    assert first_divergent(()) is None


def test_the_sentence_says_where_it_begins_what_came_before_and_what_then() -> None:
    errors = (error("input", 0.0), error("conv1", 0.25), error("pool1", 80.0), error("conv2", 0.5))
    assert first_divergent(errors) == (
        "pool1",
        "begins at pool1 (tensor pool1.out): before it conv1 at 0.25 of its budget (error 0.0312), then 80 of its budget (error 10)",
    )


def test_a_failure_of_the_first_has_nothing_before_it() -> None:
    assert first_divergent((error("input", 2.0), error("conv1", None))) == (
        "input",
        "begins at input (tensor input.out): before it nothing, then 2 of its budget (error 0.25)",
    )


@pytest.mark.parametrize(
    ("optimised", "unoptimised", "layer", "only"),
    [
        (2.0, 0.5, "conv1", ", in the optimised graph only"),
        (0.5, 2.0, "conv1", ", in the unoptimised graph only"),
        (2.0, 2.0, "conv1", ""),
        (None, 0.5, "conv1", ", in the optimised graph only"),
    ],
)
def test_a_fault_of_one_form_of_the_graph_alone_is_said_so(optimised: float | None, unoptimised: float, layer: str, only: str) -> None:
    errors = (
        *(error("input", 0.0, graph) for graph in ("optimised",)),
        error("conv1", optimised, "optimised"),
        error("input", 0.0, "unoptimised"),
        error("conv1", unoptimised, "unoptimised"),
    )
    found = first_divergent(errors)
    assert found is not None
    assert found[0] == layer
    assert f"(tensor conv1.out{only})" in found[1]


def test_the_form_that_runs_is_told_of_where_both_fail() -> None:
    errors = (error("conv1", 0.5, "optimised"), error("fc1", 3.0, "optimised"), error("conv1", 2.0, "unoptimised"))
    assert (first_divergent(errors) or ("", ""))[0] == "fc1"


def test_where_no_layer_is_beyond_its_budget_the_one_that_adds_most_is_named() -> None:
    errors = (error("input", 0.0), error("conv1", 0.3), error("pool1", 0.9), error("conv2", 0.95))
    assert first_divergent(errors) == ("pool1", "no layer is beyond its budget; pool1 adds most to it")
