"""The public functions: load, probe, export (export + parity + publish), check_parity and check_pair, benchmark and those beside it.

Importing this module imports no torch; the functions import what they need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lenet_deploy import environment
from lenet_deploy.bench.direct import load_test, trace
from lenet_deploy.bench.run import benchmark, sizes_of
from lenet_deploy.errors import BadInput, GateFailed, first_line
from lenet_deploy.evaluation import evaluate, predict
from lenet_deploy.pairing import check_pair
from lenet_deploy.probing import probe
from lenet_deploy.records import AccuracyRow, Artifact, Failure, ParityReport, ParityResult, RuntimeStatus
from lenet_deploy.sources import (
    artifact_of,
    bundle_checkpoint,
    bundle_source,
    bundle_variants,
    computing,
    device_of,
    load,
    on_device,
    parity_dataset,
    ready,
)
from lenet_deploy.variants import CHECKPOINT, DEVICES, RUNTIMES, VARIANTS, RuntimeEntry, select_artifacts

if TYPE_CHECKING:
    from lenet_deploy.bundle import Bundle
    from lenet_deploy.checkpoint import Checkpoint
    from lenet_deploy.data import Dataset

__all__ = [
    "ExportReport",
    "ParityFailed",
    "benchmark",
    "check_pair",
    "check_parity",
    "doctor",
    "evaluate",
    "export",
    "load",
    "load_test",
    "predict",
    "probe",
    "trace",
]

INPUTS = 256  # generated images of each kind; a larger batch repeats them

# Called with steps done, steps in all, and what is at work.
Progress: TypeAlias = Callable[[int, int, str], None]


def _silent(done: int, total: int, what: str) -> None:
    """The default progress: none."""


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        bundle: the published bundle.
        parity: the check that allowed it.
        accuracies: of each variant that ran, where the data set is the one trained on.
        left_out: artifacts that failed to export, with the reason.
    """

    bundle: Bundle
    parity: ParityReport
    accuracies: tuple[AccuracyRow, ...]
    left_out: tuple[Failure, ...]


class ParityFailed(GateFailed):
    """Artifacts that do not compute the checkpoint's function; carries the report."""

    def __init__(self, message: str, report: ParityReport) -> None:
        super().__init__(message)
        self.report = report


def export(
    what: str | Path | Checkpoint,
    out: str | Path,
    *,
    formats: Iterable[str] = ("torchscript", "onnx"),
    precisions: Iterable[str] = ("fp32",),
    opset: int = 18,
    force: bool = False,
    device: str = "auto",
    dataset: Dataset | None = None,
    progress: Progress = _silent,
) -> ExportReport:
    """Export a checkpoint into a bundle, prove each artifact equal to the oracle, and publish all or nothing.

    Args:
        what: a checkpoint, or anything `load` takes.
        out: the bundle's folder.
        formats, precisions: as `--to` and `--precision`.
        opset: ONNX operator set.
        force: replace a bundle that stands at `out`.
        device: `auto` checks parity on every device here; `cpu` or `cuda[:N]` on that one.
        dataset: real images for parity and, when it is the one trained on, for the accuracies in the manifest.

    Raises:
        BadInput: see `load`; also an `out` that may not be replaced.
        ParityFailed: an artifact differs from the oracle; nothing was published.
        GateFailed: nothing could be exported.
        CannotWrite: the disk refused; what stood at `out` is as it was.
    """
    from lenet_deploy import checkpoint as checkpoints
    from lenet_deploy.atomic import publish, staging_folder
    from lenet_deploy.bundle import Bundle, check_target, write_artifact, write_manifest
    from lenet_deploy.checkpoint import Checkpoint
    from lenet_deploy.devices import parse_device
    from lenet_deploy.exporters import ExportOptions
    from lenet_deploy.exporters.tensors import record
    from lenet_deploy.models import find_model
    from lenet_deploy.records import Manifest

    specs = select_artifacts(formats, precisions)
    parse_device(device)
    target = Path(out)
    check_target(target, force)
    source = what if isinstance(what, Checkpoint) else load(what)
    images = dataset or parity_dataset(source)
    metadata = source.metadata()
    left_out: list[Failure] = []
    with staging_folder(target) as staging:
        artifacts = [write_artifact(staging, CHECKPOINT.name, CHECKPOINT.format, CHECKPOINT.path, checkpoints.to_bytes(source))]
        for number, spec in enumerate(specs):
            progress(number, len(specs) + 1, f"export {spec.name}")
            assert spec.exporter is not None
            try:
                exported = spec.exporter()(source.module(), metadata, ExportOptions(opset))
                details = dict(exported.details)
                if spec.reader:
                    details["tensors"] = list(record(source.weights, spec.reader()(exported.data), find_model(source.model).factors))
            except Exception as error:  # exporters raise what they like; each is reported and takes no other with it
                left_out.append(Failure(spec.name, first_line(error)))
                continue
            artifacts.append(write_artifact(staging, spec.name, spec.format, spec.path, exported.data, details))
        if len(artifacts) == 1:
            reasons = "; ".join(f"{failure.name}: {failure.reason}" for failure in left_out)
            raise GateFailed(f"nothing could be exported, so {target} is as it was: {reasons}")
        progress(len(specs), len(specs) + 1, "check parity")
        manifest = Manifest(metadata, tuple(artifacts), environment.versions(), source.dataset, environment.capture())
        draft = Bundle(staging, manifest)
        report = check_parity(draft, device=device, dataset=images)
        if report.verdict == "fail":
            raise ParityFailed(f"an artifact does not compute the checkpoint's function, so {target} is as it was", report)
        rows = _accuracies(report) if images.name == source.dataset else ()
        verified = tuple(_judged(artifact, report, rows) for artifact in artifacts)
        manifest = dataclasses.replace(manifest, artifacts=verified)
        write_manifest(staging, manifest)
        progress(len(specs), len(specs) + 1, "publish")
        publish(staging, target, check_target(target, force))  # asked again: the world went on during the export
    progress(len(specs) + 1, len(specs) + 1, "published")
    return ExportReport(Bundle(target, manifest), report, rows, tuple(left_out))


def check_parity(
    bundle: str | Path | Bundle,
    *,
    variants: Iterable[str] = ("*",),
    batch_sizes: Sequence[int] | None = None,
    device: str = "auto",
    dataset: Dataset | None = None,
    require: Iterable[str] = (),
    drill: bool = False,
    allow_tf32: bool = False,
    progress: Progress = _silent,
) -> ParityReport:
    """Judge every variant of a bundle against the float64 oracle of its own checkpoint.

    Args:
        variants: globs over variant names.
        batch_sizes: each at least 1; `BATCH_SIZES` of `lenet_deploy.parity.check` when None.
        device: `auto` for every device, else only the variants of `cpu` or `cuda[:N]`.
        dataset: labelled images; the bundle's own data set when None, where it is at hand, else the embedded digits.
        require: globs over variant names that have to be judged; `ParityReport.missing` are those that could not.
        drill: compare every layer of every variant, not only of those that fail.
        allow_tf32: let float32 products on CUDA be TF32, and judge them by its tolerance.

    Raises:
        BadInput: not a bundle, an unknown variant, a required one that is not selected, a batch size below 1, or a file whose digest
            is not the manifest's.
        Unusable: `device` does not work here.
    """
    from lenet_deploy.devices import float32_state
    from lenet_deploy.parity.check import BATCH_SIZES, Trial, check_variant
    from lenet_deploy.parity.inputs import input_sets
    from lenet_deploy.parity.weights import check_weights

    opened = _open(bundle)
    sizes = sizes_of(batch_sizes or BATCH_SIZES)
    selected = on_device(bundle_variants(opened, variants), device)
    required = tuple(variant.name for variant in bundle_variants(opened, require))
    unselected = set(required) - {variant.name for variant in selected}
    if unselected:
        raise BadInput(f"{', '.join(sorted(unselected))} is required but not selected; widen the variants or the device asked for")
    source, checkpoint = bundle_source(opened), bundle_checkpoint(opened)
    images = dataset or parity_dataset(checkpoint)
    notes = []
    if checkpoint.dataset not in (None, images.name):
        notes.append(f"real images are from {images.name}, not from {checkpoint.dataset}, which the model was trained on")
    progress(0, len(selected) + 1, "oracle")
    results: list[ParityResult] = []
    with computing(device, allow_tf32):
        inputs = input_sets(checkpoint, images, INPUTS)
        trial = Trial(inputs, sizes, checkpoint, drill, allow_tf32)
        for number, variant in enumerate(selected, 1):
            progress(number, len(selected) + 1, variant.name)
            data = source.read(variant)
            ran = check_variant(variant, data, trial, device_of(variant, device))
            weights = check_weights(variant, data, artifact_of(opened, variant).details, checkpoint.weights)
            # What does not run here is skipped, unless its file alone is already wrong.
            if weights and (weights.status == "fail" or ran[0].status != "skipped" or ran[0].inputs):
                results.append(weights)
            results += ran
        state = float32_state()
    return ParityReport(tuple(results), tuple(notes), environment.capture(), state, required)


def doctor() -> tuple[RuntimeStatus, ...]:
    """What this machine can run, tried and not guessed: one status a runtime and device."""
    return tuple(_probe(runtime, device) for device in DEVICES for runtime in RUNTIMES)


def _probe(runtime: RuntimeEntry, device: str) -> RuntimeStatus:
    try:
        return runtime.load().probe(device)
    except ImportError as error:  # an installation without its dependencies
        package = error.name or "a package"
        return RuntimeStatus(f"{runtime.name}-{device}", False, f"{package} does not import ({error})", f"pip install {package}")


def _open(bundle: str | Path | Bundle) -> Bundle:
    from lenet_deploy.bundle import open_bundle

    return open_bundle(ready(bundle)) if isinstance(bundle, (str, Path)) else bundle


def _accuracies(report: ParityReport) -> tuple[AccuracyRow, ...]:
    """What parity counted on the test split, of the variants that ran."""
    return tuple(
        AccuracyRow(result.variant, result.decisions.variant_correct, result.decisions.images)
        for result in report.results
        if result.decisions
    )


def _judged(artifact: Artifact, report: ParityReport, rows: Sequence[AccuracyRow]) -> Artifact:
    """The artifact with the status that parity gave it: verified where at least one variant of it ran and passed."""
    names = {variant.name for variant in VARIANTS if variant.artifact.name == artifact.name}
    passed = any(result.variant in names and result.status == "pass" for result in report.results)
    known = {row.variant: row.accuracy for row in rows if row.variant in names}
    return dataclasses.replace(artifact, status="verified" if passed else "unverified", accuracy=known)
