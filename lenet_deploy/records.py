"""Frozen values that cross modules. Units live in names; statistics are derived from raw times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lenet_deploy import order_statistics


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input, the same in training, parity, bench and predict.

    An image is scaled to fit `resize` x `resize`, surrounded by `padding` black pixels, and each channel becomes
    `(pixel / 255 - mean) / std`, float32, layout (N, channels, size, size).
    """

    channels: int
    resize: int
    padding: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def size(self) -> int:
        """Side of the model's square input in pixels."""
        return self.resize + 2 * self.padding

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the model's input."""
        return (self.channels, self.size, self.size)


@dataclass(frozen=True)
class PlainInput:
    """The input of a graph whose preprocessing nobody wrote down: each value is `pixel / 255`, float32, layout (N, C, H, W).

    Attributes:
        input_shape: (C, H, W).
    """

    input_shape: tuple[int, int, int]

    @property
    def mean(self) -> tuple[float, ...]:
        """Nothing is taken off."""
        return (0.0,) * self.input_shape[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Nothing is scaled."""
        return (1.0,) * self.input_shape[0]


ImageInput: TypeAlias = Preprocessing | PlainInput


@dataclass(frozen=True)
class ArtifactMetadata:
    """What travels inside every artifact, so that the file alone can be used and traced.

    Attributes:
        model: registered name.
        config: the configuration as JSON values.
        preprocessing: how to make its input.
        labels: class names in the order of the scores.
        weights_sha256: digest of the checkpoint's tensors.
    """

    model: str
    config: Mapping[str, Any]
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    weights_sha256: str


@dataclass(frozen=True)
class Artifact:
    """One file of a bundle, as the manifest lists it.

    Attributes:
        name: unique in the bundle, e.g. `onnx-fp32`.
        format: `checkpoint`, `torchscript` or `onnx`.
        path: file name relative to the bundle.
        sha256: digest of the file.
        size_bytes: its length.
        status: `verified` (it ran and passed parity here) or `unverified` (nothing here could run it).
        details: what the exporter chose, e.g. exporter and opset.
        accuracy: percent on the data set's test split, by variant, where known.
    """

    name: str
    format: str
    path: str
    sha256: str
    size_bytes: int
    status: str
    details: Mapping[str, Any] = field(default_factory=dict)
    accuracy: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds and how to use it."""

    metadata: ArtifactMetadata
    artifacts: tuple[Artifact, ...]
    versions: Mapping[str, str]
    dataset: str | None
    environment: Environment


@dataclass(frozen=True)
class Failure:
    """Something that was left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class NodePlacement:
    """Which execution provider runs one node of an ONNX graph."""

    node: str
    provider: str


@dataclass(frozen=True)
class Environment:
    """Device, versions and commit: part of every result.

    Attributes:
        cores: logical CPUs this process may use.
        threads: intra-op threads of torch, which ONNX Runtime sessions are given too; None before torch is loaded.
        gpu: name of the CUDA device in use, or of the first; None where there is none.
        versions: installed package versions by distribution name.
        commit: git commit of the source tree; None for an installed wheel.
    """

    os: str
    python: str
    cpu: str
    cores: int
    threads: int | None
    gpu: str | None
    driver: str | None
    versions: Mapping[str, str]
    commit: str | None


@dataclass(frozen=True)
class Decisions:
    """What a variant and the oracle decide on the same labelled images.

    Attributes:
        images: how many.
        near_ties: images of another top class where the oracle's margin is within the error bound: rounding may decide either way.
        true_flips: the other images of another top class.
        oracle_correct, variant_correct: images whose top class is the label.
        oracle_only, variant_only: images that only the one got right.
    """

    images: int
    near_ties: int
    true_flips: int
    oracle_correct: int
    variant_correct: int
    oracle_only: int
    variant_only: int

    @property
    def oracle_accuracy(self) -> float:
        """Percent."""
        return 100.0 * self.oracle_correct / self.images

    @property
    def variant_accuracy(self) -> float:
        """Percent."""
        return 100.0 * self.variant_correct / self.images

    @property
    def oracle_ci95(self) -> tuple[float, float]:
        """95 % Wilson interval of the oracle's accuracy, percent."""
        return _percent(order_statistics.wilson_ci95(self.oracle_correct, self.images))

    @property
    def variant_ci95(self) -> tuple[float, float]:
        """95 % Wilson interval of the variant's accuracy, percent."""
        return _percent(order_statistics.wilson_ci95(self.variant_correct, self.images))

    @property
    def mcnemar_p(self) -> float:
        """McNemar's exact test: how likely so uneven a split of the discordant images is if both are equally accurate."""
        return order_statistics.mcnemar_exact(self.oracle_only, self.variant_only)


@dataclass(frozen=True)
class LayerError:
    """One layer of a variant beside the oracle's.

    Attributes:
        graph: which form of the variant: `module`, `graph`, `optimised` or `unoptimised`.
        layer: as the layer table calls it; `input` before the first and `output` behind the last.
        tensor: the variant's own name of the layer's output.
        max_abs_error: largest absolute difference from the oracle's layer; None where it is not finite or of another shape.
        budget_used: share of the layer's tolerance; None as above.
        passed: within its budget.
    """

    graph: str
    layer: str
    tensor: str
    max_abs_error: float | None
    budget_used: float | None
    passed: bool


@dataclass(frozen=True)
class ParityResult:
    """One check of one variant against the float64 oracle.

    Attributes:
        status: `pass`, `fail` or `skipped`.
        reason: why it failed or was skipped; None for a pass.
        inputs: name of the input set or of what was compared; None when the whole variant was skipped.
        batch_size: images per launch; None for what needs no launch.
        max_abs_error: largest absolute difference from the oracle, in logits; None when skipped or not finite.
        rmse: root mean square of the differences.
        budget_used: largest share of the tolerance that an image used; 1.0 is the limit.
        top1_agreement: share of images with the oracle's top class, 0 to 1.
        first_divergent_layer: where a failure begins, where known.
        check: one of CHECKS.
        mean_abs_error: mean of the absolute differences.
        max_rel_error, mean_rel_error: relative to the oracle's score, over the scores that are not zero; None where all are.
        cosine: smallest cosine of an image's scores and the oracle's.
        ulp_quantiles: `p50`, `p99` and `max` of the differences in units of the last place of the oracle's score.
        decisions: for `decisions` only.
        layers: every layer, where a failure was traced or `drill` asked for it.
    """

    variant: str
    status: str
    reason: str | None = None
    inputs: str | None = None
    batch_size: int | None = None
    max_abs_error: float | None = None
    rmse: float | None = None
    budget_used: float | None = None
    top1_agreement: float | None = None
    first_divergent_layer: str | None = None
    node_providers: tuple[NodePlacement, ...] = ()
    check: str = "outputs"
    mean_abs_error: float | None = None
    max_rel_error: float | None = None
    mean_rel_error: float | None = None
    cosine: float | None = None
    ulp_quantiles: Mapping[str, float] | None = None
    decisions: Decisions | None = None
    layers: tuple[LayerError, ...] = ()


# What a ParityResult can be about. `outputs`: scores against the oracle's. `consistency`: an image in a batch against the same
# image alone. `permutation`: a permuted batch. `isolation`: NaN or infinity in one image of a batch. `decisions`: the top class on
# the whole test split. `weights`: the tensors in the file. `placement`: where its nodes run.
CHECKS = ("placement", "weights", "outputs", "consistency", "permutation", "isolation", "decisions")


@dataclass(frozen=True)
class ParityReport:
    """All results of one parity run.

    Attributes:
        notes: what a reader should know, e.g. which images were used.
        float32: what `fp32` meant on the GPU: `ieee` or `tf32`, by switch.
        required: variants that have to be judged.
    """

    results: tuple[ParityResult, ...]
    notes: tuple[str, ...]
    environment: Environment
    float32: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """`pass` when something was judged and nothing failed, else `fail`."""
        statuses = {result.status for result in self.results}
        return "pass" if "pass" in statuses and "fail" not in statuses else "fail"

    @property
    def not_run(self) -> tuple[ParityResult, ...]:
        """The variants that could not run here, with the reason."""
        return tuple(result for result in self.results if result.status == "skipped" and result.inputs is None)

    @property
    def missing(self) -> tuple[ParityResult, ...]:
        """Those of `not_run` that are required."""
        return tuple(result for result in self.not_run if result.variant in self.required)


@dataclass(frozen=True)
class RuntimeStatus:
    """Whether one runtime works on one kind of device here, and if not, why and what to do."""

    name: str
    usable: bool
    reason: str
    fix: str | None = None


@dataclass(frozen=True)
class ClassCounts:
    """One class of a test split.

    Attributes:
        images: those that are of it.
        predicted: those that are taken for it.
        correct: those of both.
    """

    label: str
    images: int
    predicted: int
    correct: int

    @property
    def precision(self) -> float | None:
        """Percent of those taken for it that are of it; None where none is taken for it."""
        return 100.0 * self.correct / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        """Percent of those of it that are taken for it; None where there are none."""
        return 100.0 * self.correct / self.images if self.images else None


@dataclass(frozen=True)
class AccuracyRow:
    """Accuracy of one variant: percent of `images` whose top score is the label, with a 95 % Wilson interval.

    Attributes:
        confusion: images by their class and by the class of their top score, as rows and columns; empty where only hits were counted.
        labels: of the classes, in that order; empty likewise.
    """

    variant: str
    correct: int
    images: int
    confusion: tuple[tuple[int, ...], ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[ClassCounts, ...]:
        """Every class of the confusion."""
        predicted = [sum(column) for column in zip(*self.confusion, strict=True)]
        named = zip(self.labels, self.confusion, strict=True)
        return tuple(ClassCounts(label, sum(row), predicted[i], row[i]) for i, (label, row) in enumerate(named))

    @property
    def accuracy(self) -> float:
        """Percent correct."""
        return 100.0 * self.correct / self.images

    @property
    def ci95(self) -> tuple[float, float]:
        """95 % interval of the accuracy, percent."""
        return _percent(order_statistics.wilson_ci95(self.correct, self.images))


@dataclass(frozen=True)
class AccuracyReport:
    """Accuracy of every variant that runs here, and why the others do not."""

    rows: tuple[AccuracyRow, ...]
    skipped: tuple[Failure, ...]
    environment: Environment


@dataclass(frozen=True)
class Prediction:
    """The top labels of one image, best first.

    Attributes:
        top: (label, probability) pairs; softmax of the scores.
    """

    image: str
    variant: str
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class EpochStats:
    """One epoch of training.

    Attributes:
        loss: mean training cross-entropy over the epoch.
        lr: learning rate at the epoch's end.
        accuracy: percent on the test split after the epoch.
        images_per_s: training images per wall-clock second, evaluation excluded.
        seconds: of the epoch, evaluation excluded.
    """

    epoch: int
    loss: float
    lr: float
    accuracy: float
    images_per_s: float
    seconds: float = 0.0


def _percent(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    return (100.0 * low, 100.0 * high)
