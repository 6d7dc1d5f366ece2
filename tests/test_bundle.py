"""Bundles: what the manifest promises, every way it can be broken, and what a publication must not replace."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lenet_deploy import api, data
from lenet_deploy import checkpoint as checkpoints
from lenet_deploy.bundle import MANIFEST, Bundle, check_target, open_bundle, write_manifest
from lenet_deploy.checkpoint import Checkpoint
from lenet_deploy.errors import BadInput, DamagedFile
from lenet_deploy.exporters import ExportOptions
from lenet_deploy.parity import inputs
from lenet_deploy.records import Artifact
from lenet_deploy.store import digest, sha256
from lenet_deploy.variants import ARTIFACTS, CHECKPOINT, ONNX, TRACE, VARIANTS, ArtifactSpec

NAMES = [spec.name for spec in ARTIFACTS]
EXPORTED = [spec for spec in ARTIFACTS if spec.exporter]


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    """A bundle of one's own to damage."""
    return open_bundle(shutil.copytree(bundle.path, tmp_path / "bundle"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    from PIL import Image

    Image.linear_gradient("L").save(tmp_path / "image.png")
    return tmp_path / "image.png"


def variant_of(name: str) -> str:
    """A variant on the CPU that runs the artifact."""
    return next(variant.name for variant in VARIANTS if variant.artifact.name == name and variant.device == "cpu")


def entry(bundle: Bundle, name: str) -> Artifact:
    found = bundle.artifact(name)
    assert found is not None
    return found


def rewrite(bundle: Bundle, name: str, **changes: Any) -> Path:
    """Write the manifest anew with one artifact's entry changed; returns the bundle's folder."""
    artifacts = tuple(dataclasses.replace(each, **changes) if each.name == name else each for each in bundle.manifest.artifacts)
    write_manifest(bundle.path, dataclasses.replace(bundle.manifest, artifacts=artifacts))
    return bundle.path


def put(bundle: Bundle, name: str, content: bytes) -> Path:
    """Other bytes under the artifact's name, and a manifest that vouches for them; returns the bundle's folder."""
    (bundle.path / entry(bundle, name).path).write_bytes(content)
    return rewrite(bundle, name, sha256=sha256(content), size_bytes=len(content))


def flip(path: Path, position: int, bit: int = 0) -> None:
    changed = bytearray(path.read_bytes())
    changed[position] ^= 1 << bit
    path.write_bytes(changed)


def edit(bundle: Bundle, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the manifest's JSON by hand; returns the bundle's folder."""
    document = json.loads((bundle.path / MANIFEST).read_text())
    change(document)
    document.pop("digest")
    document["digest"] = digest(document)  # as a careful forger would
    (bundle.path / MANIFEST).write_text(json.dumps(document))
    return bundle.path


def test_the_manifest_has_the_keys_that_scripts_read(bundle: Bundle) -> None:
    document = json.loads((bundle.path / MANIFEST).read_text())
    assert next(iter(document)) == "schema"
    assert document["schema"] == "lenet-deploy/manifest/1"
    assert {"artifacts", "model", "weights_sha256", "input", "labels", "versions", "environment"} <= document.keys()
    assert document["model"] == "lenet5"
    assert document["labels"] == list("0123456789")
    for artifact in document["artifacts"]:
        assert {"name", "format", "path", "sha256", "size_bytes", "status", "accuracy"} <= artifact.keys()


def test_the_manifest_vouches_for_every_file_and_there_is_no_other(bundle: Bundle) -> None:
    assert [artifact.name for artifact in bundle.manifest.artifacts] == NAMES
    assert sorted(path.name for path in bundle.path.iterdir()) == sorted([MANIFEST, *(each.path for each in bundle.manifest.artifacts)])
    for artifact in bundle.manifest.artifacts:
        content = (bundle.path / artifact.path).read_bytes()
        assert (len(content), sha256(content)) == (artifact.size_bytes, artifact.sha256)
        assert artifact.status == "verified"


def test_the_manifest_knows_the_accuracy_of_each_variant_that_ran(bundle: Bundle) -> None:
    known = {name: value for artifact in bundle.manifest.artifacts for name, value in artifact.accuracy.items()}
    assert {variant.name for variant in VARIANTS if variant.device == "cpu"} <= known.keys()
    assert all(50 < value <= 100 for value in known.values())


def test_an_opened_bundle_is_what_was_published(bundle: Bundle, checkpoint: Checkpoint) -> None:
    assert open_bundle(bundle.path).manifest == bundle.manifest
    assert bundle.metadata == checkpoint.metadata()


def test_a_bundle_opens_through_a_link_to_it(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle.path)
    opened = open_bundle(tmp_path / "link")
    assert [opened.read(artifact) for artifact in opened.manifest.artifacts]


@pytest.mark.parametrize("name", NAMES)
def test_one_flipped_bit_in_an_artifact_is_refused_before_it_is_parsed(name: str, copy: Bundle, image: Path) -> None:
    artifact = entry(copy, name)
    flip(copy.path / artifact.path, random.Random(name).randrange(artifact.size_bytes))
    uses: list[Callable[[], object]] = [
        lambda: api.check_parity(copy.path, variants=[variant_of(name)], batch_sizes=[1]),
        lambda: api.predict(copy.path, [image], variant=variant_of(name)),
        lambda: api.evaluate(copy.path / artifact.path, data.load_dataset("digits"), device="cpu"),
    ]
    if name == ONNX.name:  # a bench starts a process, whatever it is to find there
        uses.append(lambda: api.benchmark(copy.path, variants=[variant_of(name)], batch_sizes=[1], rounds=1))
    for use in uses:
        with pytest.raises(DamagedFile, match=rf"{artifact.path}: its sha256 is not the one in manifest"):
            use()


def test_any_flipped_bit_in_an_artifact_is_noticed(copy: Bundle) -> None:
    artifact = entry(copy, CHECKPOINT.name)
    path = copy.path / artifact.path
    chance = random.Random(0)
    for _ in range(100):
        position, bit = chance.randrange(artifact.size_bytes), chance.randrange(8)
        flip(path, position, bit)
        with pytest.raises(DamagedFile):
            copy.read(artifact)
        flip(path, position, bit)
    assert len(copy.read(artifact)) == artifact.size_bytes


@pytest.mark.parametrize("change", [lambda content: content + b"\0", lambda content: content[:-1], lambda content: b""])
@pytest.mark.parametrize("name", [TRACE.name, ONNX.name])
def test_an_artifact_of_another_size_is_refused(name: str, change: Callable[[bytes], bytes], copy: Bundle, image: Path) -> None:
    path = copy.path / entry(copy, name).path
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DamagedFile, match=path.name):
        api.predict(copy.path, [image], variant=variant_of(name))


def test_an_artifact_that_is_absent_or_a_folder_is_named(copy: Bundle) -> None:
    path = copy.path / ONNX.path
    path.unlink()
    with pytest.raises(BadInput, match=rf"{ONNX.path}: no such file"):
        api.check_parity(copy.path, variants=[variant_of(ONNX.name)], batch_sizes=[1])
    path.mkdir()
    with pytest.raises(BadInput, match=ONNX.path):
        api.check_parity(copy.path, variants=[variant_of(ONNX.name)], batch_sizes=[1])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b'"text"', b"{}", b"\xff\xfe", b"\0" * 64, b"[" * 100_000])
def test_a_manifest_that_is_empty_or_foreign_is_damaged(content: bytes, copy: Bundle) -> None:
    (copy.path / MANIFEST).write_bytes(content)
    with pytest.raises(DamagedFile, match=MANIFEST):
        open_bundle(copy.path)


def test_no_truncated_manifest_is_accepted(copy: Bundle) -> None:
    path = copy.path / MANIFEST
    whole = path.read_bytes()
    for length in range(0, len(whole.rstrip()), 11):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFile):
            open_bundle(copy.path)
    assert length > 1000


def test_a_flipped_bit_of_the_manifest_is_refused_or_changes_nothing(copy: Bundle) -> None:
    path = copy.path / MANIFEST
    whole = path.read_bytes()
    bits = random.Random(0)
    wrong = []
    for position in range(0, len(whole), 9):
        flip(path, position, bits.randrange(8))
        try:
            found = open_bundle(copy.path).manifest
        except BadInput:
            continue
        finally:
            path.write_bytes(whole)
        if found != copy.manifest:
            wrong.append(whole[max(0, position - 30) : position + 10].decode())
    assert wrong == []


def test_a_manifest_of_the_future_names_both_schemas(copy: Bundle) -> None:
    edit(copy, lambda document: document.update(schema="lenet-deploy/manifest/2"))
    with pytest.raises(DamagedFile, match=r"manifest/2.*manifest/1"):
        open_bundle(copy.path)


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no artifacts": lambda document: document.pop("artifacts"),
    "artifacts null": lambda document: document.update(artifacts=None),
    "artifacts an object": lambda document: document.update(artifacts={"a": 1}),
    "artifacts text": lambda document: document.update(artifacts="abc"),
    "artifact with an unknown key": lambda document: document["artifacts"][1].update(surprise=1),
    "artifact without a digest": lambda document: document["artifacts"][1].pop("sha256"),
    "digest too short": lambda document: document["artifacts"][1].update(sha256="ab"),
    "digest a number": lambda document: document["artifacts"][1].update(sha256=7),
    "size negative": lambda document: document["artifacts"][1].update(size_bytes=-1),
    "size text": lambda document: document["artifacts"][1].update(size_bytes="9"),
    "size true": lambda document: document["artifacts"][1].update(size_bytes=True),
    "status unknown": lambda document: document["artifacts"][1].update(status="fine"),
    "status a list": lambda document: document["artifacts"][1].update(status=["verified"]),
    "accuracy a list": lambda document: document["artifacts"][0].update(accuracy=[]),
    "accuracy null": lambda document: document["artifacts"][0].update(accuracy=None),
    "details a number": lambda document: document["artifacts"][0].update(details=3),
    "name twice": lambda document: document["artifacts"].append(dict(document["artifacts"][0])),
    "model unknown": lambda document: document.update(model="lenet6"),
    "model a number": lambda document: document.update(model=5),
    "config inexact": lambda document: document["config"].update(image_size=31),
    "config a list": lambda document: document.update(config=[]),
    "config with an unknown key": lambda document: document["config"].update(depth=3),
    "no input": lambda document: document.pop("input"),
    "channels infinite": lambda document: document["input"].update(channels=float("inf")),
    "mean beyond floats": lambda document: document["input"].update(mean=[10**400]),
    "std zero": lambda document: document["input"].update(std=[0]),
    "std NaN": lambda document: document["input"].update(std=[float("nan")]),
    "labels too few": lambda document: document.update(labels=["0"]),
    "labels a number": lambda document: document.update(labels=10),
    "versions a number": lambda document: document.update(versions=3),
    "environment empty": lambda document: document.update(environment={}),
    "environment a list": lambda document: document.update(environment=[]),
    "environment with an unknown key": lambda document: document["environment"].update(surprise=1),
    "no dataset": lambda document: document.pop("dataset"),
}


@pytest.mark.parametrize("change", EDITS)
def test_a_manifest_with_wrong_keys_or_values_is_damaged(change: str, copy: Bundle) -> None:
    with pytest.raises(DamagedFile, match=MANIFEST):
        open_bundle(edit(copy, EDITS[change]))


def test_two_artifacts_of_one_name_are_refused(copy: Bundle) -> None:
    write_manifest(copy.path, dataclasses.replace(copy.manifest, artifacts=(*copy.manifest.artifacts, copy.manifest.artifacts[0])))
    with pytest.raises(DamagedFile, match="two artifacts share a name"):
        open_bundle(copy.path)


def test_a_bundle_without_its_checkpoint_has_no_oracle(copy: Bundle) -> None:
    write_manifest(copy.path, dataclasses.replace(copy.manifest, artifacts=copy.manifest.artifacts[1:]))
    with pytest.raises(DamagedFile, match="lists no checkpoint"):
        api.check_parity(copy.path)


@pytest.mark.parametrize("path", ["../outside.onnx", "/etc/hostname", "..", ".", "", "a/../../outside.onnx", "..\\outside.onnx", "a\0b"])
def test_an_artifact_path_that_leaves_the_bundle_is_refused(path: str, copy: Bundle) -> None:
    shutil.copy(copy.path / ONNX.path, copy.path.parent / "outside.onnx")
    with pytest.raises(DamagedFile, match="leaves the bundle"):
        open_bundle(rewrite(copy, ONNX.name, path=path))


@pytest.mark.parametrize("path", ["x" * 5000, "\ud800", "sub/", "sub"], ids=["long", "surrogate", "slash", "folder"])
def test_an_artifact_path_that_no_file_can_have_is_bad_input(path: str, copy: Bundle, image: Path) -> None:
    (copy.path / "sub").mkdir()
    with pytest.raises(BadInput):
        api.predict(rewrite(copy, ONNX.name, path=path), [image], variant=variant_of(ONNX.name))


def test_a_link_out_of_the_bundle_is_refused(copy: Bundle, image: Path) -> None:
    outside = copy.path.parent / "outside.onnx"
    (copy.path / ONNX.path).rename(outside)
    (copy.path / ONNX.path).symlink_to(outside)
    with pytest.raises(DamagedFile, match="leaves the bundle"):
        api.predict(copy.path, [image], variant=variant_of(ONNX.name))


def test_a_folder_in_the_bundle_that_links_out_of_it_is_refused(copy: Bundle, image: Path) -> None:
    outside = copy.path.parent / "outside"
    outside.mkdir()
    (copy.path / ONNX.path).rename(outside / ONNX.path)
    (copy.path / "sub").symlink_to(outside)
    rewrite(copy, ONNX.name, path=f"sub/{ONNX.path}")
    with pytest.raises(DamagedFile, match="leaves the bundle"):
        api.predict(copy.path, [image], variant=variant_of(ONNX.name))


def test_a_link_within_the_bundle_is_followed(copy: Bundle) -> None:
    (copy.path / ONNX.path).rename(copy.path / "renamed.onnx")
    (copy.path / ONNX.path).symlink_to("renamed.onnx")
    assert len(copy.read(entry(copy, ONNX.name))) == entry(copy, ONNX.name).size_bytes


def test_what_is_no_bundle_is_refused_with_the_way_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"not a bundle.*lenet-deploy export"):
        open_bundle(tmp_path)
    for absent in (tmp_path / "absent", Path(__file__)):
        with pytest.raises(BadInput, match=absent.name):
            open_bundle(absent)


def other_artifact(spec: ArtifactSpec, checkpoint: Checkpoint) -> bytes:
    """The artifact of an untrained twin: the same shapes, other weights."""
    assert spec.exporter is not None
    twin = checkpoints.fresh(checkpoints.find_model(checkpoint.model), {"in_channels": "1", "image_size": "28", "padding": "2"}, seed=9)
    return spec.exporter()(twin.module(), checkpoint.metadata(), ExportOptions()).data


@pytest.mark.parametrize("spec", EXPORTED, ids=lambda spec: spec.name)
def test_another_models_artifact_with_the_right_digest_fails_parity(spec: ArtifactSpec, copy: Bundle, checkpoint: Checkpoint) -> None:
    put(copy, spec.name, other_artifact(spec, checkpoint))
    report = api.check_parity(copy.path, variants=[variant_of(spec.name), "eager/torch-cpu/fp32"], batch_sizes=[1, 64])
    assert report.verdict == "fail"
    assert {result.variant for result in report.results if result.status == "fail"} == {variant_of(spec.name)}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a model", bytes(4096)], ids=["empty", "zip", "text", "zeros"])
@pytest.mark.parametrize("spec", EXPORTED, ids=lambda spec: spec.name)
def test_an_artifact_that_does_not_open_fails_parity_when_its_digest_is_right(spec: ArtifactSpec, content: bytes, copy: Bundle) -> None:
    put(copy, spec.name, content)
    report = api.check_parity(copy.path, variants=[variant_of(spec.name)], batch_sizes=[1])
    read_back, opened = report.results
    assert (report.verdict, read_back.status, opened.status) == ("fail", "fail", "fail")
    assert read_back.check == "weights"
    assert "cannot be opened" in (opened.reason or "")


@pytest.mark.parametrize("name", [TRACE.name, "torchscript-script-fp32"])
def test_a_damaged_archive_with_the_right_digest_never_ends_in_another_error(
    name: str, copy: Bundle, few: data.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "INPUTS", 4)  # few images, many times
    monkeypatch.setattr(inputs, "MAX_PIXELS", 16)
    whole = (copy.path / entry(copy, name).path).read_bytes()
    chance = random.Random(0)
    verdicts = set()
    for _ in range(25):
        changed = bytearray(whole)
        changed[len(changed) - 1 - chance.randrange(4000)] ^= 1 << chance.randrange(8)  # code and directory stand at the end
        put(copy, name, bytes(changed))
        verdicts.add(api.check_parity(copy.path, variants=[variant_of(name)], batch_sizes=[1], dataset=few).verdict)
    assert "fail" in verdicts


def test_another_checkpoint_with_the_right_digest_is_not_taken_for_the_bundles_own(copy: Bundle) -> None:
    twin = checkpoints.fresh(checkpoints.find_model("lenet5"), {"in_channels": "1", "image_size": "28", "padding": "2"}, seed=9)
    put(copy, CHECKPOINT.name, checkpoints.to_bytes(twin))
    with pytest.raises(DamagedFile, match="describes other weights"):
        api.check_parity(copy.path)


def test_a_checkpoint_swapped_together_with_the_manifest_fails_every_artifact(copy: Bundle, checkpoint: Checkpoint) -> None:
    twin = dataclasses.replace(checkpoint, weights={name: tensor * 1.01 for name, tensor in checkpoint.weights.items()})
    manifest = dataclasses.replace(copy.manifest, metadata=twin.metadata())
    put(Bundle(copy.path, manifest), CHECKPOINT.name, checkpoints.to_bytes(twin))
    report = api.check_parity(copy.path, device="cpu", batch_sizes=[64])
    failed = {result.variant for result in report.results if result.status == "fail"}
    assert report.verdict == "fail"
    runs_it = {variant.name for variant in VARIANTS if variant.artifact is CHECKPOINT and variant.device == "cpu"}
    assert {result.variant for result in report.results} - failed == runs_it
    assert failed == {result.variant for result in report.results if result.check == "weights"}


def test_a_bundle_is_replaced_only_by_force(copy: Bundle, checkpoint: Checkpoint) -> None:
    before = (copy.path / MANIFEST).read_bytes()
    with pytest.raises(BadInput, match="--force"):
        api.export(checkpoint, copy.path, formats=["torchscript"])
    assert (copy.path / MANIFEST).read_bytes() == before
    twin = checkpoints.fresh(checkpoints.find_model("lenet5"), {"in_channels": "1", "image_size": "16"}, seed=9)
    report = api.export(twin, copy.path, formats=["torchscript"], force=True, device="cpu")
    assert report.bundle.metadata == twin.metadata()
    assert open_bundle(copy.path).manifest == report.bundle.manifest
    assert not (copy.path / ONNX.path).exists(), "nothing of the old bundle stays"
    assert list(copy.path.parent.glob(".*")) == []


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_something_else_is_never_replaced(force: bool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "photos"
    target.mkdir()
    (target / "me.jpg").write_text("precious")
    with pytest.raises(BadInput, match="not a bundle"):
        api.export(checkpoint, target, force=force)
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "me.jpg"]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_whose_manifest_is_of_another_program_is_never_replaced(force: bool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension" / MANIFEST).write_text('{"manifest_version": 3}')
    with pytest.raises(BadInput, match="not a bundle"):
        api.export(checkpoint, tmp_path / "extension", force=force)
    assert (tmp_path / "extension" / MANIFEST).read_text() == '{"manifest_version": 3}'


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_never_replaced(force: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(BadInput, match="a file"):
        check_target(tmp_path / "file", force)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_never_replaced(dangling: bool, copy: Bundle, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "absent" if dangling else copy.path)
    with pytest.raises(BadInput, match="symbolic link"):
        check_target(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()


def test_an_empty_folder_is_filled_without_force(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    report = api.export(checkpoint, tmp_path / "empty", formats=["torchscript"], device="cpu")
    assert open_bundle(tmp_path / "empty").manifest == report.bundle.manifest


def test_missing_folders_above_the_bundle_are_made(checkpoint: Checkpoint, tmp_path: Path) -> None:
    report = api.export(checkpoint, tmp_path / "a" / "b" / "bundle", formats=["torchscript"], device="cpu")
    assert report.bundle.path == tmp_path / "a" / "b" / "bundle"
    assert open_bundle(report.bundle.path).manifest == report.bundle.manifest


def test_a_published_bundle_has_the_usual_permissions(checkpoint: Checkpoint, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        api.export(checkpoint, tmp_path / "bundle", formats=["torchscript"], device="cpu")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "bundle").iterdir()}
    assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o755
    assert modes == {0o644}
