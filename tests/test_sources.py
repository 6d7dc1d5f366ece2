"""What a WHAT argument may be: a model name, a checkpoint, a bundle, an artifact in it or a copy of one alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from lenet_deploy import api, data
from lenet_deploy.bundle import Bundle
from lenet_deploy.checkpoint import Checkpoint, to_bytes
from lenet_deploy.errors import BadInput, DamagedFile, InvalidConfig, UnknownName
from lenet_deploy.exporters import METADATA_KEY, ExportOptions
from lenet_deploy.exporters.onnx import DIGEST_KEY, content_digest
from lenet_deploy.exporters.torchscript import export_trace
from lenet_deploy.models import MODELS
from lenet_deploy.records import ArtifactMetadata
from lenet_deploy.sources import load, on_device, open_source, parity_dataset
from lenet_deploy.variants import ARTIFACTS, CHECKPOINT, ONNX, TRACE, VARIANTS, ArtifactSpec

NAMES = [model.name for model in MODELS]
EXPORTED = [spec.path for spec in ARTIFACTS if spec.exporter]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    from PIL import Image

    Image.linear_gradient("L").save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.mark.parametrize("name", NAMES)
def test_a_model_name_is_freshly_initialised_and_says_so(name: str) -> None:
    found = load(name)
    assert (found.model, found.dataset) == (name, None)
    assert found.provenance["source"] == "freshly initialised from seed 0"
    assert "freshly initialised from seed 0" in open_source(name).described


def test_the_seed_decides_the_fresh_weights_and_nothing_else_does() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = load("lenet5", seed=1), load("lenet5", seed=1), load("lenet5", seed=2)
    assert first.metadata() == again.metadata()
    assert first.metadata().weights_sha256 != other.metadata().weights_sha256
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are his own"


@pytest.mark.parametrize(("name", "nearest"), [("lenet", "lenet5"), ("lenet5-wid", "lenet5-wide"), ("lenet51998", "lenet5-1998")])
def test_an_unknown_name_offers_the_nearest(name: str, nearest: str) -> None:
    for use in (load, open_source):
        with pytest.raises(UnknownName, match=rf"unknown model '{name}'; did you mean .*{nearest}"):
            use(name)


def test_a_name_like_no_other_lists_what_is_known() -> None:
    with pytest.raises(UnknownName, match=f"known: {', '.join(NAMES)}"):
        load("vgg")


def test_settings_change_a_named_model() -> None:
    found = load("lenet5", settings={"channels": "4,8", "pooling": "max"})
    assert found.weights["conv2.weight"].shape == (8, 4, 5, 5)
    with pytest.raises(InvalidConfig, match="pool1"):
        load("lenet5", settings={"image_size": "31"})


def test_a_name_means_the_same_to_every_function_where_a_folder_has_it_too(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundle.path, tmp_path / "lenet5")  # what `lenet-deploy export lenet5` leaves behind
    monkeypatch.chdir(tmp_path)
    assert open_source("lenet5").metadata.weights_sha256 == load("lenet5").metadata().weights_sha256


def test_a_checkpoint_file_runs_on_its_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(to_bytes(checkpoint))
    source = open_source(path)
    assert source.metadata == checkpoint.metadata()
    assert {variant.artifact for variant in source.variants} == {CHECKPOINT}
    assert load(str(path)).metadata() == checkpoint.metadata()


def test_a_bundle_offers_every_variant_that_its_artifacts_have(bundle: Bundle, checkpoint: Checkpoint) -> None:
    source = open_source(bundle.path)
    assert source.variants == VARIANTS
    assert source.metadata == checkpoint.metadata()
    assert load(bundle.path).metadata() == checkpoint.metadata()


@pytest.mark.parametrize("spec", ARTIFACTS, ids=lambda spec: spec.name)
def test_an_artifact_in_a_bundle_is_verified_by_the_manifest(spec: ArtifactSpec, bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    path = folder / spec.path
    source = open_source(path)
    assert {variant.artifact for variant in source.variants} == {spec}
    assert source.read(source.variants[0]) == path.read_bytes()
    path.write_bytes(path.read_bytes()[:-1] + b"\xff\x00")
    with pytest.raises(DamagedFile, match="sha256"):
        open_source(path).read(source.variants[0])


@pytest.mark.parametrize("file", EXPORTED)
def test_an_artifact_copied_out_of_its_bundle_predicts_by_its_own_metadata(
    file: str, bundle: Bundle, image: Path, tmp_path: Path, digits: data.Dataset
) -> None:
    alone = shutil.copy(bundle.path / file, tmp_path / file)
    assert open_source(alone).metadata == bundle.metadata
    [mine], [expected] = api.predict(alone, [image]), api.predict(bundle.path / file, [image])
    assert [label for label, _ in mine.top] == [label for label, _ in expected.top]
    [row] = api.evaluate(alone, digits, device="cpu").rows
    assert row.correct == api.evaluate(bundle.path / file, digits, device="cpu").rows[0].correct


@pytest.mark.parametrize("file", EXPORTED)
def test_a_bare_artifact_is_known_by_its_content_and_suffix_not_by_its_name(file: str, bundle: Bundle, tmp_path: Path) -> None:
    renamed = shutil.copy(bundle.path / file, tmp_path / f"renamed{Path(file).suffix}")
    assert open_source(renamed).metadata == bundle.metadata


def test_an_artifact_holds_no_checkpoint(bundle: Bundle, tmp_path: Path) -> None:
    for file in (TRACE.path, ONNX.path):
        with pytest.raises(BadInput, match=file):
            load(shutil.copy(bundle.path / file, tmp_path / file))


def test_an_onnx_file_of_another_origin_is_refused(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["x2"])], "g", [value], [helper.make_empty_tensor_value_info("x2")])
    path = tmp_path / "foreign.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(DamagedFile, match=r"foreign\.onnx: it carries no lenet-deploy metadata"):
        open_source(path)


def test_a_torchscript_archive_of_another_origin_is_refused(tmp_path: Path) -> None:
    from lenet_deploy.quiet import quiet_torchscript

    path = tmp_path / "foreign.pt"
    with quiet_torchscript():
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)
    with pytest.raises(DamagedFile, match=r"foreign\.pt: it carries no lenet-deploy metadata"):
        open_source(path)


@pytest.mark.parametrize("suffix", [".onnx", ".pt", ".safetensors", ""])
@pytest.mark.parametrize("content", [b"", b"no model at all", b"PK\x03\x04 nor this", b"\x80\x02 nor this", bytes(99)])
def test_a_file_that_is_no_model_is_damaged(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=f"file{suffix}"):
        open_source(path)


@pytest.mark.parametrize("file", EXPORTED)
def test_a_truncated_bare_artifact_is_damaged(file: str, bundle: Bundle, image: Path, tmp_path: Path) -> None:
    whole = (bundle.path / file).read_bytes()
    path = tmp_path / file
    for length in (1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFile):
            api.predict(path, [image])


@pytest.mark.parametrize("file", EXPORTED)
def test_a_flipped_bit_in_a_bare_artifact_is_damaged(file: str, bundle: Bundle, image: Path, tmp_path: Path) -> None:
    whole = bytearray((bundle.path / file).read_bytes())
    path = tmp_path / file
    for position in range(5000, len(whole) - 5000, len(whole) // 12):  # tensors: no parser would notice, the checksums do
        whole[position] ^= 4
        path.write_bytes(whole)
        whole[position] ^= 4
        with pytest.raises(DamagedFile):
            api.predict(path, [image])


def foreign_graph(path: Path, metadata: ArtifactMetadata, operator: str, **attributes: int) -> Path:
    """An ONNX file with one operator that carries a real model's metadata."""
    from onnx import TensorProto, helper

    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 28, 28])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])
    graph = helper.make_graph([helper.make_node(operator, ["image"], ["logits"], **attributes)], "g", [image], [logits])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    text = json.dumps(dataclasses.asdict(metadata))
    helper.set_model_props(model, {METADATA_KEY: text, DIGEST_KEY: content_digest(model, text)})
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("operator", ["Relu", "Flatten"])
def test_a_bare_artifact_whose_scores_do_not_fit_its_labels_is_damaged(
    operator: str, bundle: Bundle, image: Path, tmp_path: Path, digits: data.Dataset
) -> None:
    path = foreign_graph(tmp_path / "odd.onnx", bundle.metadata, operator)
    with pytest.raises(DamagedFile, match="odd"):
        api.predict(path, [image], device="cpu")
    with pytest.raises(DamagedFile, match="odd"):
        api.evaluate(path, digits, device="cpu")


def test_an_artifact_of_more_scores_than_labels_is_damaged(bundle: Bundle, image: Path, tmp_path: Path) -> None:
    wide = load("lenet5", settings={"in_channels": "1", "image_size": "28", "padding": "2", "classes": "300"}, seed=3)
    path = tmp_path / "odd.pt"
    path.write_bytes(export_trace(wide.module(), bundle.metadata, ExportOptions()).data)
    with pytest.raises(DamagedFile, match="odd"):
        api.predict(path, [image], device="cpu")


def test_settings_for_what_carries_its_own_config_are_refused(bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path) -> None:
    saved = tmp_path / "mine.safetensors"
    saved.write_bytes(to_bytes(checkpoint))
    bare = shutil.copy(bundle.path / ONNX.path, tmp_path / "model.onnx")
    for what in (bundle.path, bundle.path / CHECKPOINT.path, bundle.path / ONNX.path, saved, bare):
        with pytest.raises(BadInput, match="carries its own"):
            open_source(what, settings={"pooling": "max"})


@pytest.mark.parametrize("what", ["absent.safetensors", "absent/lenet5", "", "a" * 5000, "~", "\ud800"])
def test_what_names_nothing_is_bad_input(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for use in (load, open_source):
        with pytest.raises(BadInput):
            use(what)


def test_a_file_in_a_folder_with_a_damaged_manifest_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DamagedFile, match=r"manifest\.json"):
        open_source(folder / ONNX.path)


def test_a_file_beside_the_artifacts_that_the_manifest_does_not_list_stands_for_itself(
    bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    (folder / "extra.safetensors").write_bytes(to_bytes(load("lenet5-wide")))
    assert open_source(folder / "extra.safetensors").metadata.model == "lenet5-wide"


def test_device_cpu_leaves_only_the_variants_on_the_cpu() -> None:
    assert {variant.device for variant in on_device(VARIANTS, "cpu")} == {"cpu"}
    assert on_device(VARIANTS, "auto") == VARIANTS
    with pytest.raises(BadInput, match="none of onnx/ort-cuda/fp32 runs on cpu"):
        on_device([variant for variant in VARIANTS if variant.name == "onnx/ort-cuda/fp32"], "cpu")


def test_real_images_are_the_training_set_where_it_is_at_hand_else_the_digits(checkpoint: Checkpoint, tmp_path: Path) -> None:

    elsewhere = dataclasses.replace(checkpoint, provenance={"dataset": "cifar10"})
    assert parity_dataset(checkpoint).name == "digits"
    assert parity_dataset(elsewhere, tmp_path).name == "digits"
