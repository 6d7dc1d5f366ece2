"""The public functions publish all or nothing, and report what they left out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from lenet_deploy import api, evaluation
from lenet_deploy.bundle import Bundle, open_bundle
from lenet_deploy.checkpoint import Checkpoint
from lenet_deploy.data import Dataset
from lenet_deploy.errors import BadInput, DamagedFile, GateFailed, LenetDeployError, UnknownName, Unusable
from lenet_deploy.exporters import Exported, Exporter, ExportOptions
from lenet_deploy.records import AccuracyRow, ArtifactMetadata
from lenet_deploy.runtimes import onnxruntime
from lenet_deploy.train import correct_top1
from lenet_deploy.variants import CHECKPOINT, DEVICES, RUNTIMES, SCRIPT, TRACE, VARIANTS, ArtifactSpec


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def slightly_wrong(module: nn.Module, metadata: ArtifactMetadata, options: ExportOptions) -> Exported:
    """Trace a module whose pooling is another, whose weights are all there."""
    from lenet_deploy.exporters.torchscript import export_trace

    module.pool = nn.MaxPool2d(2)
    return export_trace(module, metadata, options)


def with_other_weights(module: nn.Module, metadata: ArtifactMetadata, options: ExportOptions) -> Exported:
    """Trace a module whose last bias is off by a thousandth."""
    from lenet_deploy.exporters.torchscript import export_trace

    with torch.no_grad():
        module.get_parameter("fc3.bias")[3] += 1e-3
    return export_trace(module, metadata, options)


def refusing(module: nn.Module, metadata: ArtifactMetadata, options: ExportOptions) -> Exported:
    raise NotImplementedError("this operator is not known\nand a second line")


def speechless(module: nn.Module, metadata: ArtifactMetadata, options: ExportOptions) -> Exported:
    raise AssertionError


def interrupted(module: nn.Module, metadata: ArtifactMetadata, options: ExportOptions) -> Exported:
    raise KeyboardInterrupt


def exporting(monkeypatch: pytest.MonkeyPatch, exporters: Mapping[ArtifactSpec, Exporter | None]) -> None:
    """Make `export` write these artifacts, each by its own exporter or the one given in its place."""
    specs = tuple(dataclasses.replace(spec, exporter=lambda found=found: found) if found else spec for spec, found in exporters.items())
    monkeypatch.setattr(api, "select_artifacts", lambda formats, precisions: specs)


def test_export_returns_what_it_published(tiny: Checkpoint, digits: Dataset, tmp_path: Path) -> None:
    said: list[tuple[int, int, str]] = []
    report = api.export(
        tiny,
        tmp_path / "below" / "bundle",
        formats=("torchscript",),
        dataset=digits,
        progress=lambda done, total, what: said.append((done, total, what)),
    )
    assert report.bundle.path == tmp_path / "below" / "bundle"
    assert open_bundle(report.bundle.path) == report.bundle
    assert [artifact.name for artifact in report.bundle.manifest.artifacts] == [CHECKPOINT.name, TRACE.name, SCRIPT.name]
    assert report.parity.verdict == "pass"
    assert report.left_out == ()
    assert [path.name for path in (tmp_path / "below").iterdir()] == ["bundle"]
    assert said == [
        (0, 3, f"export {TRACE.name}"),
        (1, 3, f"export {SCRIPT.name}"),
        (2, 3, "check parity"),
        (2, 3, "publish"),
        (3, 3, "published"),
    ]


def test_a_bundle_loads_as_the_checkpoint_it_was_made_from(bundle: Bundle, checkpoint: Checkpoint) -> None:
    loaded = api.load(bundle.path)
    assert loaded.metadata() == checkpoint.metadata()
    assert loaded.provenance == checkpoint.provenance


def test_every_artifact_is_verified_and_knows_the_accuracy_that_evaluate_finds(bundle: Bundle, digits: Dataset) -> None:
    found = {row.variant: row.accuracy for row in api.evaluate(bundle.path, digits).rows}
    known = {name: value for artifact in bundle.manifest.artifacts for name, value in artifact.accuracy.items()}
    assert {artifact.status for artifact in bundle.manifest.artifacts} == {"verified"}
    assert known == found
    assert set(known) == {variant.name for variant in VARIANTS if variant.runtime.load().probe(variant.device).usable}


def test_accuracies_are_what_parity_counted(tiny: Checkpoint, digits: Dataset, tmp_path: Path) -> None:
    report = api.export(tiny, tmp_path / "bundle", formats=("torchscript",), dataset=digits, device="cpu")
    decided = {result.variant: result.decisions for result in report.parity.results if result.decisions}
    assert {row.variant for row in report.accuracies} == decided.keys() != set()
    for row in report.accuracies:
        assert (row.correct, row.images) == (decided[row.variant].variant_correct, decided[row.variant].images)
        assert row.accuracy == decided[row.variant].variant_accuracy
        assert row.ci95 == decided[row.variant].variant_ci95


def test_accuracies_stand_at_the_artifact_that_was_run(bundle: Bundle) -> None:
    owners = {variant.name: variant.artifact.name for variant in VARIANTS}
    assert all(owners[name] == artifact.name for artifact in bundle.manifest.artifacts for name in artifact.accuracy)


def test_accuracy_is_unknown_on_images_the_model_was_not_trained_on(tiny: Checkpoint, digits: Dataset, tmp_path: Path) -> None:
    others = dataclasses.replace(digits, name="others")
    report = api.export(tiny, tmp_path / "bundle", formats=("torchscript",), dataset=others)
    assert [artifact.accuracy for artifact in report.bundle.manifest.artifacts] == [{}, {}, {}]
    assert report.parity.notes == ("real images are from others, not from digits, which the model was trained on",)


def test_an_artifact_that_fails_parity_stops_the_publication(
    tiny: Checkpoint, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporting(monkeypatch, {SCRIPT: None, TRACE: slightly_wrong})
    with pytest.raises(api.ParityFailed) as caught:
        api.export(tiny, tmp_path / "bundle", dataset=digits)
    failed = {result.variant for result in caught.value.report.results if result.status == "fail"}
    assert failed >= {variant.name for variant in VARIANTS if variant.artifact is TRACE and variant.device == "cpu"}
    assert all("/trace" in name for name in failed)
    assert isinstance(caught.value, GateFailed)
    assert list(tmp_path.iterdir()) == []


def test_an_exporter_that_changes_the_module_does_not_change_the_others(
    tiny: Checkpoint, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporting(monkeypatch, {TRACE: slightly_wrong, SCRIPT: None})
    with pytest.raises(api.ParityFailed) as caught:
        api.export(tiny, tmp_path / "bundle", dataset=digits, device="cpu")
    failed = {result.variant for result in caught.value.report.results if result.status == "fail"}
    assert failed == {variant.name for variant in VARIANTS if variant.artifact is TRACE and variant.device == "cpu"}


def test_a_failed_parity_leaves_the_bundle_that_stood_there(
    tiny: Checkpoint, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.export(tiny, tmp_path / "bundle", formats=("torchscript",), dataset=digits)
    before = content(tmp_path)
    exporting(monkeypatch, {TRACE: slightly_wrong})
    with pytest.raises(api.ParityFailed):
        api.export(tiny, tmp_path / "bundle", dataset=digits, force=True)
    assert content(tmp_path) == before


def test_an_exporter_that_fails_is_left_out_and_reported_and_the_rest_is_published(
    tiny: Checkpoint, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporting(monkeypatch, {TRACE: refusing, SCRIPT: None})
    report = api.export(tiny, tmp_path / "bundle", dataset=digits)
    assert [(failure.name, failure.reason) for failure in report.left_out] == [(TRACE.name, "this operator is not known")]
    assert {artifact.name for artifact in report.bundle.manifest.artifacts} == {CHECKPOINT.name, SCRIPT.name}
    assert not (tmp_path / "bundle" / TRACE.path).exists()
    assert report.parity.verdict == "pass"


def test_an_artifact_without_the_checkpoints_weights_is_left_out_and_says_which(
    tiny: Checkpoint, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporting(monkeypatch, {TRACE: with_other_weights, SCRIPT: None})
    report = api.export(tiny, tmp_path / "bundle", dataset=digits, device="cpu")
    (failure,) = report.left_out
    assert failure.name == TRACE.name
    assert "the checkpoint's fc3.bias" in failure.reason
    assert not (tmp_path / "bundle" / TRACE.path).exists()
    assert {artifact.name for artifact in report.bundle.manifest.artifacts} == {CHECKPOINT.name, SCRIPT.name}


def test_a_failure_without_a_message_is_reported_by_its_kind(
    tiny: Checkpoint, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporting(monkeypatch, {TRACE: speechless, SCRIPT: None})
    report = api.export(tiny, tmp_path / "bundle", dataset=digits)
    (failure,) = report.left_out
    assert failure.name == TRACE.name
    assert failure.reason.startswith("AssertionError")


def test_nothing_exported_is_a_failed_gate_and_publishes_nothing(
    tiny: Checkpoint, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporting(monkeypatch, {TRACE: refusing, SCRIPT: speechless})
    with pytest.raises(GateFailed, match=rf"nothing could be exported.*{TRACE.name}: this operator is not known; {SCRIPT.name}: "):
        api.export(tiny, tmp_path / "bundle", dataset=digits)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(tiny: Checkpoint, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporting(monkeypatch, {SCRIPT: None, TRACE: interrupted})
    with pytest.raises(KeyboardInterrupt):
        api.export(tiny, tmp_path / "bundle", dataset=digits)
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_that_nothing_here_can_run_is_published_unverified(
    tiny: Checkpoint, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device in DEVICES:  # as on a machine whose onnxruntime is a build for other hardware
        monkeypatch.setitem(onnxruntime.PROVIDERS, device, "AbsentExecutionProvider")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    report = api.export(tiny, tmp_path / "bundle", dataset=digits, formats=("torchscript", "onnx"))
    status = {artifact.name: artifact.status for artifact in open_bundle(tmp_path / "bundle").manifest.artifacts}
    unrun = {variant.artifact.name for variant in VARIANTS if variant.runtime.name == "onnxruntime"}
    assert len(unrun) == 2
    assert status == {name: "unverified" if name in unrun else "verified" for name in status}
    assert unrun < status.keys()
    assert all(not artifact.accuracy for artifact in report.bundle.manifest.artifacts if artifact.name in unrun)


def test_an_existing_bundle_needs_force_and_is_then_replaced_whole(tiny: Checkpoint, digits: Dataset, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    api.export(tiny, target, formats=("torchscript",), dataset=digits)
    (target / "note.txt").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(BadInput, match="add --force"):
        api.export(tiny, target, formats=("torchscript",), dataset=digits)
    assert content(tmp_path) == before
    api.export(tiny, target, formats=("torchscript",), dataset=digits, force=True)
    assert {path.name for path in target.iterdir()} == {"manifest.json", CHECKPOINT.path, TRACE.path, SCRIPT.path}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"formats": ("onxx",)}, "unknown format"),
        ({"precisions": ("fp23",)}, "unknown precision"),
        ({"device": "gpu"}, "unknown device"),
    ],
)
def test_wrong_words_are_bad_input_and_create_nothing(
    choices: dict[str, str | tuple[str, ...]], message: str, tiny: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        api.export(tiny, tmp_path / "below" / "bundle", **choices)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["lenet6", "no/such/file.safetensors"])
def test_an_unknown_source_is_bad_input_and_creates_nothing(what: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        api.export(what, tmp_path / "below" / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so asking for it is no error")
def test_cuda_without_a_gpu_is_unusable_for_every_function(checkpoint: Checkpoint, bundle: Bundle, digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(Unusable):
        api.export(checkpoint, tmp_path / "bundle", device="cuda")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Unusable):
        api.check_parity(bundle, device="cuda")
    with pytest.raises(Unusable):
        api.benchmark(bundle, device="cuda")
    with pytest.raises(Unusable):
        api.evaluate(bundle.path, digits, device="cuda")


def test_variants_of_another_device_than_asked_for_are_bad_input(bundle: Bundle) -> None:
    for function in (api.check_parity, api.benchmark):
        with pytest.raises(BadInput, match="runs on cpu"):
            function(bundle, variants=("*-cuda/*",), device="cpu")


def test_evaluate_counts_what_the_checkpoints_module_gets_right(checkpoint: Checkpoint, bundle: Bundle, digits: Dataset) -> None:
    from lenet_deploy.data import fit

    images = fit(digits.test_images, checkpoint.preprocessing)
    correct = correct_top1(checkpoint.module(), images, digits.test_labels, checkpoint.preprocessing)
    (row,) = api.evaluate(bundle.path / CHECKPOINT.path, digits, device="cpu").rows
    assert (row.variant, row.correct, row.images) == ("eager/torch-cpu/fp32", correct, len(digits.test_images))
    assert row.ci95[0] < row.accuracy < row.ci95[1]


def test_the_confusion_counts_what_the_module_takes_each_image_for(checkpoint: Checkpoint, bundle: Bundle, digits: Dataset) -> None:
    found = evaluation.probabilities(checkpoint, digits.test_images).argmax(dim=1)
    (row,) = api.evaluate(bundle.path / CHECKPOINT.path, digits, device="cpu").rows
    for truth, counts in enumerate(row.confusion):
        assert counts == tuple(int(((digits.test_labels == truth) & (found == taken)).sum()) for taken in range(10))
    assert (row.labels, sum(map(sum, row.confusion))) == (digits.labels, row.images)
    assert row.correct == sum(each.correct for each in row.classes)


def test_precision_and_recall_are_none_where_they_are_not_defined() -> None:
    confusion = ((3, 0, 0, 0), (1, 2, 0, 0), (1, 1, 0, 0), (0, 0, 0, 0))  # nothing is taken for c, and d does not occur
    classes = AccuracyRow("v", 5, 8, confusion, ("a", "b", "c", "d")).classes
    assert [each.precision for each in classes] == [pytest.approx(60), pytest.approx(200 / 3), None, None]
    assert [each.recall for each in classes] == [100.0, pytest.approx(200 / 3), 0.0, None]


def test_evaluate_of_one_artifact_has_that_artifacts_variants(bundle: Bundle, digits: Dataset) -> None:
    rows = api.evaluate(bundle.path / TRACE.path, digits, device="cpu").rows
    assert [row.variant for row in rows] == [v.name for v in VARIANTS if v.artifact is TRACE and v.device == "cpu"]


def test_evaluate_refuses_a_data_set_with_more_classes_than_the_model(bundle: Bundle, digits: Dataset) -> None:
    with pytest.raises(BadInput, match="11 classes and this model 10"):
        api.evaluate(bundle.path, dataclasses.replace(digits, labels=(*digits.labels, "ten")))


@pytest.fixture(scope="module")
def picture(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PNG of the first digit of the test split."""
    from PIL import Image

    path = tmp_path_factory.mktemp("pictures") / "digit.png"
    Image.fromarray(digits.test_images[0, 0].numpy()).save(path)
    return path


def test_predict_gives_the_top_labels_best_first(bundle: Bundle, digits: Dataset, picture: Path) -> None:
    first, second = api.predict(bundle.path, [picture, str(picture)], top=4, device="cpu")
    assert first.image == str(picture)
    assert first.variant == "eager/torch-cpu/fp32"
    assert len(first.top) == 4
    shares = [share for _, share in first.top]
    assert all(high >= low for high, low in itertools.pairwise(shares))
    assert 0 < sum(shares) <= 1 + 1e-6
    assert first.top[0][0] == digits.labels[int(digits.test_labels[0])]
    assert [label for label, _ in second.top] == [label for label, _ in first.top]


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.device == "cpu"], ids=lambda variant: variant.name)
def test_predict_with_any_variant_gives_the_same_label(variant: object, bundle: Bundle, picture: Path) -> None:
    name = next(v.name for v in VARIANTS if v is variant)
    (expected,) = api.predict(bundle.path, [picture], device="cpu")
    (found,) = api.predict(bundle.path, [picture], variant=name)
    assert found.variant == name
    assert found.top[0][0] == expected.top[0][0]
    assert found.top[0][1] == pytest.approx(expected.top[0][1], abs=1e-5)


def test_predict_gives_no_more_labels_than_there_are_and_refuses_none(bundle: Bundle, picture: Path) -> None:
    (found,) = api.predict(bundle.path, [picture], top=50, device="cpu")
    assert sorted(label for label, _ in found.top) == sorted(bundle.metadata.labels)
    assert sum(share for _, share in found.top) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(BadInput, match="top is 0"):
        api.predict(bundle.path, [picture], top=0)


def test_predict_refuses_what_it_does_not_know(bundle: Bundle, picture: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName):
        api.predict(bundle.path, [picture], variant="onnx/ort-tpu/fp32")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DamagedFile):
        api.predict(bundle.path, [picture, tmp_path / "text.png"])
    with pytest.raises(BadInput):
        api.predict(bundle.path, [])


def test_doctor_has_one_status_a_runtime_and_device() -> None:
    statuses = api.doctor()
    assert [status.name for status in statuses] == [f"{runtime.name}-{device}" for device in DEVICES for runtime in RUNTIMES]
    assert all(status.reason for status in statuses)
    assert all(status.usable or status.fix for status in statuses)


@pytest.fixture
def no_manifest(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"x")
    yield tmp_path / "folder"
    assert content(tmp_path / "folder") == {"file": b"x"}


def test_a_folder_that_is_no_bundle_is_bad_input_everywhere(no_manifest: Path, tiny: Checkpoint, digits: Dataset) -> None:
    for call in (api.check_parity, api.benchmark, api.load):
        with pytest.raises(BadInput, match="not a bundle"):
            call(no_manifest)
    with pytest.raises(BadInput, match="not a bundle"):
        api.evaluate(no_manifest, digits)
    with pytest.raises(BadInput, match="not a bundle"):
        api.export(tiny, no_manifest, force=True)


def test_every_error_raised_on_purpose_shares_one_base() -> None:
    assert issubclass(api.ParityFailed, LenetDeployError)
    assert all(issubclass(kind, LenetDeployError) for kind in (BadInput, DamagedFile, GateFailed, UnknownName, Unusable))
