"""Checkpoints: what is saved comes back, what is damaged or foreign is refused in words, and nothing in a file is run."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lenet_deploy import checkpoint as checkpoints
from lenet_deploy.checkpoint import METADATA_KEY, Checkpoint, from_bytes, load, to_bytes
from lenet_deploy.errors import BadInput, DamagedFile
from lenet_deploy.models import MODELS, find_model

NAMES = [model.name for model in MODELS]
FLIPPED_POSITIONS = 150
TINY = {"in_channels": "1", "channels": "2,3", "hidden": "8,6", "pooling": "max"}


def fresh(name: str = "lenet5", settings: Mapping[str, str] | None = None) -> Checkpoint:
    return checkpoints.fresh(find_model(name), settings or {}, seed=3)


def same(one: Checkpoint, other: Checkpoint) -> bool:
    return one.metadata() == other.metadata() and dict(one.provenance) == dict(other.provenance)


def torch_saved(value: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def flipped(data: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


def accepted(candidates: Iterable[bytes]) -> list[Checkpoint]:
    """The checkpoints among `candidates`; anything but BadInput ends the test."""
    found = []
    for data in candidates:
        try:
            found.append(from_bytes(data, "a file"))
        except BadInput:
            continue
    return found


def rewritten(checkpoint: Checkpoint, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The checkpoint's file with other metadata, its digest made anew: what a foreign program could write."""
    data = to_bytes(checkpoint)
    body = json.loads(json.loads(data[8 : header_end(data)])["__metadata__"][METADATA_KEY])
    del body["digest"]
    change(body)
    text = json.dumps({**body, "digest": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()})
    return safetensors.torch.save(dict(checkpoint.weights), metadata={METADATA_KEY: text})


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_checkpoint_comes_back_whole(name: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    saved = fresh(name)
    path.write_bytes(to_bytes(saved))
    found = load(path)
    assert same(found, saved)
    assert found.config == saved.config
    assert found.weights.keys() == saved.weights.keys()
    assert all(torch.equal(found.weights[key], saved.weights[key]) for key in saved.weights)


def test_a_trained_checkpoint_keeps_its_labels_normalisation_and_provenance(checkpoint: Checkpoint) -> None:
    found = from_bytes(to_bytes(checkpoint), "a file")
    assert found.labels == tuple("0123456789")
    assert found.preprocessing == checkpoint.preprocessing
    assert found.dataset == "digits"
    assert found.provenance["test_accuracy"] == checkpoint.provenance["test_accuracy"]


def test_the_same_checkpoint_gives_the_same_bytes() -> None:
    assert to_bytes(fresh()) == to_bytes(fresh())


def test_no_flipped_bit_of_the_content_is_accepted() -> None:
    data = to_bytes(fresh())
    positions = random.Random(0).sample(range(header_end(data), len(data)), FLIPPED_POSITIONS)
    assert accepted(flipped(data, position, bit) for position in positions for bit in range(8)) == []


@pytest.mark.parametrize("name", ["lenet5", "lenet5-1998"])
def test_a_flipped_bit_of_the_header_is_refused_or_changes_nothing(name: str) -> None:
    saved = fresh(name)  # the default config: its bare tensors alone would be taken for a foreign state_dict
    data = to_bytes(saved)
    bits = random.Random(0)
    found = accepted(flipped(data, position, bits.randrange(8)) for position in range(header_end(data)))
    assert all(same(one, saved) for one in found)


def test_every_bit_of_the_metadata_key_counts() -> None:
    data = to_bytes(fresh())
    start = data.index(METADATA_KEY.encode())
    assert accepted(flipped(data, start + offset, bit) for offset in range(len(METADATA_KEY)) for bit in range(8)) == []


def test_no_truncation_is_accepted() -> None:
    data = to_bytes(fresh())
    lengths = {*range(64), *random.Random(0).sample(range(len(data)), FLIPPED_POSITIONS), header_end(data), len(data) - 1}
    assert accepted(data[:length] for length in lengths) == []


def test_trailing_bytes_are_refused() -> None:
    with pytest.raises(DamagedFile):
        from_bytes(to_bytes(fresh()) + b"\0", "a file")


def test_an_empty_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "nothing.safetensors"
    path.write_bytes(b"")
    with pytest.raises(DamagedFile, match=r"nothing\.safetensors: the file is empty"):
        load(path)


@pytest.mark.parametrize("head", [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x05", b"{", b"\x20\0\0\0\0\0\0\0{"])
def test_random_bytes_are_refused(head: bytes) -> None:
    noise = random.Random(0)
    assert accepted(head + noise.randbytes(noise.randrange(1, 400)) for _ in range(60)) == []


@pytest.mark.parametrize("path", ["absent.safetensors", "", "absent/absent.pt", "x" * 5000])
def test_a_path_without_a_file_is_bad_input(path: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        load(tmp_path / path)


def test_foreign_safetensors_without_metadata_load_as_a_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    saved = fresh("lenet5-wide")
    path.write_bytes(safetensors.torch.save(dict(saved.weights), metadata={"format": "pt"}))
    found = load(path)
    assert found.model == "lenet5-wide"
    assert found.metadata().weights_sha256 == saved.metadata().weights_sha256


def test_foreign_safetensors_of_another_network_are_refused_with_what_differs() -> None:
    data = safetensors.torch.save({"encoder.weight": torch.zeros(2, 2)})
    with pytest.raises(DamagedFile, match=r"1 linear layers, where LeNet-5 has 2 and 3.*encoder\.weight"):
        from_bytes(data, "a file")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_state_dict_is_recognised(name: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    saved = fresh(name)
    path.write_bytes(torch_saved(saved.module().state_dict(), zipped))
    found = load(path)
    assert found.model == name
    assert found.metadata().weights_sha256 == saved.metadata().weights_sha256


def test_a_foreign_state_dict_loads_by_model_and_settings(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    saved = fresh("lenet5", TINY)
    path.write_bytes(torch_saved(dict(saved.weights)))
    assert load(path).config == dataclasses.replace(saved.config, image_size=28, padding=2, pooling="avg"), "what shapes cannot say"
    found = load(path, "lenet5", {**TINY, "image_size": "32"})
    assert found.config == saved.config
    assert found.metadata().weights_sha256 == saved.metadata().weights_sha256


def test_settings_for_a_checkpoint_that_has_its_own_are_refused() -> None:
    with pytest.raises(BadInput, match="carries its own model and config"):
        from_bytes(to_bytes(fresh()), "a file", "lenet5-wide")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_damaged_state_dict_raises_nothing_but_bad_input(zipped: bool) -> None:
    saved = fresh("lenet5", TINY)
    data = torch_saved(dict(saved.weights), zipped)
    chance = random.Random(0)
    lengths = [*range(0, 2000, 7), *range(len(data) - 300, len(data), 3)]
    damaged = [flipped(data, chance.randrange(len(data)), chance.randrange(8)) for _ in range(300)] + [data[:length] for length in lengths]
    outcomes = []
    for each in damaged:
        try:
            outcomes.append(from_bytes(each, "a file", "lenet5", TINY))
        except BadInput:
            outcomes.append(None)
    assert None in outcomes
    if zipped:  # a zip archive carries checksums; the old format has none that could tell
        assert all(one is None or same(one, from_bytes(data, "a file", "lenet5", TINY)) for one in outcomes)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return (os.system, (f"touch {self.marker}",))


def pickles(value: object) -> dict[str, bytes]:
    """`value` in every form that a `.pt` file was ever written in."""
    bare = {f"pickle {protocol}": pickle.dumps(value, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)}
    return {**bare, "zip": torch_saved(value), "legacy": torch_saved(value, zipped=False)}


def test_the_payload_of_these_tests_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("form", pickles(None))
@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "among tensors"])
def test_code_in_a_pickle_is_refused_and_does_not_run(form: str, wrapped: bool, tmp_path: Path) -> None:
    payload = Payload(tmp_path / "marker")
    path = tmp_path / "weights.pt"
    path.write_bytes(pickles({**fresh().weights, "fc3.bias": payload} if wrapped else payload)[form])
    with pytest.raises(DamagedFile, match=r"weights\.pt"):
        load(path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_whole_pickled_module_is_refused_with_the_way_out(zipped: bool) -> None:
    with pytest.raises(DamagedFile, match=r"(?s)run code.*model\.state_dict\(\)"):
        from_bytes(torch_saved(fresh().module(), zipped), "a file")


def test_a_torchscript_archive_is_refused_as_such(bundle: Any) -> None:
    with pytest.raises(DamagedFile, match="TorchScript") as caught:
        load(bundle.path / "model.trace.pt")
    assert "weights_only" not in str(caught.value), "torch's own advice is to switch the safety off"


@pytest.mark.parametrize(
    "value",
    [[torch.zeros(2)], torch.zeros(2), {}, {"conv1.weight": 1}, {"state_dict": {"conv1.weight": torch.zeros(1)}}, "text", None],
    ids=["list", "tensor", "empty", "number", "nested", "text", "none"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_is_no_dict_of_tensors_is_refused(value: object, zipped: bool) -> None:
    with pytest.raises(DamagedFile):
        from_bytes(torch_saved(value, zipped), "a file")


def replaced(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> Checkpoint:
    return dataclasses.replace(checkpoint, weights={**checkpoint.weights, name: tensor})


def unfit(change: str) -> Checkpoint:
    whole = fresh()
    bias = whole.weights["fc3.bias"]
    if change == "missing":
        return dataclasses.replace(whole, weights={name: tensor for name, tensor in whole.weights.items() if name != "fc3.bias"})
    return replaced(
        whole,
        "extra" if change == "unexpected" else "fc3.bias",
        {
            "unexpected": torch.zeros(1),
            "(11,)": torch.zeros(11),
            "(10, 1)": bias[:, None].clone(),
            "float16": bias.half(),
            "float64": bias.double(),
            "int64": bias.long(),
            "NaN": bias.index_fill(0, torch.tensor([3]), float("nan")),
            "infinity": bias.index_fill(0, torch.tensor([3]), -float("inf")),
        }[change],
    )


UNFIT = ["missing", "unexpected", "(11,)", "(10, 1)", "int64", "NaN", "infinity"]


@pytest.mark.parametrize(
    ("change", "foreign"),  # a state_dict may hold other floating-point numbers
    [*((change, foreign) for change in UNFIT for foreign in (False, True)), ("float16", False), ("float64", False)],
)
def test_tensors_that_do_not_fit_are_refused_and_named(change: str, foreign: bool) -> None:
    broken = unfit(change)
    data = torch_saved(dict(broken.weights)) if foreign else to_bytes(broken)
    with pytest.raises(DamagedFile) as caught:
        from_bytes(data, "some.file")
    assert "some.file" in str(caught.value)
    assert change in str(caught.value)
    assert ("extra" if change == "unexpected" else "fc3.bias") in str(caught.value)


def test_a_config_that_the_tensors_do_not_fit_is_refused() -> None:
    with pytest.raises(DamagedFile, match=r"tensor \S+ is .* but lenet5 with this config has"):
        from_bytes(to_bytes(dataclasses.replace(fresh(), config=fresh("lenet5-wide").config)), "a file")


@pytest.mark.parametrize("foreign", [False, True], ids=["checkpoint", "state_dict"])
def test_a_changed_prototype_of_1998_is_refused(foreign: bool) -> None:
    whole = fresh("lenet5-1998")
    prototypes = whole.weights["prototypes"].clone()
    prototypes[4, 20] *= -1
    broken = replaced(whole, "prototypes", prototypes)
    with pytest.raises(DamagedFile, match="prototypes is fixed"):
        from_bytes(torch_saved(dict(broken.weights)) if foreign else to_bytes(broken), "a file")


@pytest.mark.parametrize("foreign", [False, True], ids=["checkpoint", "state_dict"])
def test_a_weight_outside_the_connection_table_of_1998_is_refused(foreign: bool) -> None:
    whole = fresh("lenet5-1998")
    weight = whole.weights["c3.weight"].clone()
    assert weight[1, 0].count_nonzero() == 0, "C3 map 1 does not see S2 map 0"
    weight[1, 0, 2, 2] = 1e-6
    broken = replaced(whole, "c3.weight", weight)
    with pytest.raises(DamagedFile, match="connection table"):
        from_bytes(torch_saved(dict(broken.weights)) if foreign else to_bytes(broken), "a file")


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "schema of the future": lambda body: body.update(schema="lenet-deploy/checkpoint/2"),
    "no schema": lambda body: body.pop("schema"),
    "schema a number": lambda body: body.update(schema=1),
    "unknown model": lambda body: body.update(model="lenet6"),
    "model a list": lambda body: body.update(model=["lenet5"]),
    "no config": lambda body: body.pop("config"),
    "config a list": lambda body: body.update(config=[]),
    "config of the wrong type": lambda body: body["config"].update(channels="6,16"),
    "config that cannot be built": lambda body: body["config"].update(image_size=31),
    "config of another size": lambda body: body["config"].update(image_size=36),
    "config with an unknown key": lambda body: body["config"].update(depth=3),
    "no labels": lambda body: body.pop("labels"),
    "too few labels": lambda body: body.update(labels=["0", "1"]),
    "labels a number": lambda body: body.update(labels=10),
    "no normalisation": lambda body: body.pop("preprocessing"),
    "std of zero": lambda body: body["preprocessing"].update(std=[0.0, 1.0, 1.0]),
    "mean not a number": lambda body: body["preprocessing"].update(mean=[float("nan")] * 3),
    "std infinite": lambda body: body["preprocessing"].update(std=[float("inf")] * 3),
    "mean beyond floats": lambda body: body["preprocessing"].update(mean=[10**400] * 3),
    "channels infinite": lambda body: body["preprocessing"].update(channels=float("inf")),
    "one mean for three channels": lambda body: body["preprocessing"].update(mean=[0.0]),
    "provenance a list": lambda body: body.update(provenance=[1]),
    "provenance null": lambda body: body.update(provenance=None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_metadata_that_is_wrong_in_itself_is_damaged_though_its_digest_is_right(change: str) -> None:
    with pytest.raises(DamagedFile):
        from_bytes(rewritten(fresh(), CHANGES[change]), "a file")


def test_a_future_schema_is_named_beside_the_one_read_here() -> None:
    with pytest.raises(DamagedFile, match=r"checkpoint/2.*checkpoint/1"):
        from_bytes(rewritten(fresh(), CHANGES["schema of the future"]), "a file")


@pytest.mark.parametrize("text", ["", "null", "[]", "3", '"text"', "{}", "[" * 100_000, '{"schema": "lenet-deploy/checkpoint/1"}'])
def test_metadata_that_is_no_checkpoint_is_damaged(text: str) -> None:
    data = safetensors.torch.save(dict(fresh().weights), metadata={METADATA_KEY: text})
    with pytest.raises(DamagedFile):
        from_bytes(data, "a file")
