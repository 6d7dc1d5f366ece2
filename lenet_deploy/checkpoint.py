"""Checkpoints: trained weights and all that rebuilds the model, in safetensors; foreign state_dicts, safely."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from lenet_deploy import foreign
from lenet_deploy.data import make_preprocessing
from lenet_deploy.errors import BadInput, DamagedFile, InvalidConfig, LenetDeployError, first_line
from lenet_deploy.models import MODELS, Model, find_model, initialise
from lenet_deploy.models.config import ModelConfig
from lenet_deploy.records import ArtifactMetadata, Preprocessing
from lenet_deploy.store import check_zip, digest, read_file

METADATA_KEY = "lenet_deploy"
FOREIGN = "lenet5"  # what tensors under other names are recognised as
UNSCALED = "pixels from 0 to 1, with no mean and deviation"
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")  # where others keep the tensors in what they save
SCHEMA = "lenet-deploy/checkpoint/1"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Weights, and everything needed to use them.

    Attributes:
        model: registered name.
        config: configuration that rebuilds the module.
        preprocessing: how an image becomes the module's input.
        labels: class names in the order of the scores.
        provenance: where the weights come from: data set, seed, epochs, versions ..., JSON values.
        weights: float32 tensors by name, on the CPU.
    """

    model: str
    config: ModelConfig
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    provenance: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]

    def module(self) -> nn.Module:
        """A new module in eval mode on the CPU that holds these weights; float32 (N, C, H, W) to (N, classes)."""
        module = initialise(self.model, self.config)
        module.load_state_dict(dict(self.weights))
        return module

    @property
    def dataset(self) -> str | None:
        """Name of the data set it was trained on, where known."""
        return self.provenance.get("dataset")

    def metadata(self) -> ArtifactMetadata:
        """What each artifact made from this checkpoint carries."""
        config = json.loads(json.dumps(dataclasses.asdict(self.config)))  # type: ignore[call-overload]  # configs are dataclasses
        return ArtifactMetadata(self.model, config, self.preprocessing, self.labels, weights_sha256(self.weights))


def fresh(model: Model, settings: Mapping[str, str], seed: int) -> Checkpoint:
    """An untrained checkpoint of a registered model; raises UnknownName or InvalidConfig."""
    config = model.configured(settings)
    weights = _plain(initialise(model.name, config, seed).state_dict())
    preprocessing = make_preprocessing(config.in_channels, config.image_size, model.pixel_range)
    provenance = {"source": f"freshly initialised from seed {seed}", "seed": seed}
    return Checkpoint(model.name, config, preprocessing, _numbered(config.classes), provenance, weights)


def weights_sha256(weights: Mapping[str, torch.Tensor]) -> str:
    """Digest of names, dtypes, shapes and bytes, independent of the order and of the file format."""
    hasher = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.numpy().tobytes())
    return hasher.hexdigest()


def to_bytes(checkpoint: Checkpoint) -> bytes:
    """The checkpoint as a safetensors file; its metadata carries a digest over tensors and metadata."""
    body = {
        "schema": SCHEMA,
        **dataclasses.asdict(checkpoint.metadata()),
        "provenance": dict(checkpoint.provenance),
    }
    text = json.dumps({**body, "digest": digest(body)}, sort_keys=True)
    return safetensors.torch.save(dict(checkpoint.weights), metadata={METADATA_KEY: text})


def load(path: Path, model: str | None = None, settings: Mapping[str, str] | None = None) -> Checkpoint:
    """Read a checkpoint, or a foreign state_dict (`.safetensors`, `.pt`, `.pth`); nothing in it is executed.

    Args:
        model: registered name for a file that does not say what it is; None tries each.
        settings: `KEY=VALUE` config settings for such a file.

    Raises:
        BadInput: absent or unreadable; or its tensors fit no model asked for.
        DamagedFile: truncated, altered, of another kind, or needing to run code to load.
    """
    return from_bytes(read_file(path, "a checkpoint"), str(path), model, settings or {})


def from_bytes(data: bytes, where: str, model: str | None = None, settings: Mapping[str, str] | None = None) -> Checkpoint:
    """As `load`, from bytes already read; `where` names them in messages."""
    if not data:
        raise DamagedFile(f"{where}: the file is empty")
    if is_torchscript(data):
        raise DamagedFile(f"{where}: a TorchScript archive, not a checkpoint; predict, evaluate and inspect take it, export needs weights")
    if _is_npz(data):
        return _adopt(_arrays(data, where), where, model, settings or {})
    if _is_pickle(data):
        return _adopt(_state_dict(data, where), where, model, settings or {})
    try:
        weights = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DamagedFile(f"{where}: not a readable safetensors file ({error}); it is truncated, altered or of another kind") from None
    metadata = header_metadata(data)
    text = metadata.get(METADATA_KEY)
    if text is None and any(SCHEMA in value for value in metadata.values()):
        raise DamagedFile(f"{where}: a checkpoint whose metadata has lost its name; the file was altered, get a fresh copy")
    if text is None:
        return _adopt(weights, where, model, settings or {})
    if settings or model:
        raise BadInput(f"{where}: this checkpoint carries its own model and config; leave out --model and --set")
    return _decode(text, weights, where)


def metadata_from_json(values: Mapping[str, Any], where: str) -> ArtifactMetadata:
    """Artifact metadata from JSON values.

    Raises:
        DamagedFile: a key is missing or has the wrong type.
    """
    try:
        raw = values["preprocessing"]
        preprocessing = Preprocessing(
            int(raw["channels"]), int(raw["resize"]), int(raw["padding"]), tuple(map(float, raw["mean"])), tuple(map(float, raw["std"]))
        )
        metadata = ArtifactMetadata(
            values["model"], values["config"], preprocessing, tuple(map(str, values["labels"])), values["weights_sha256"]
        )
        config = find_model(metadata.model).config_from(metadata.config)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DamagedFile(f"{where}: its metadata is incomplete ({error!r})") from None
    except LenetDeployError as error:
        raise DamagedFile(f"{where}: its metadata names a model that cannot be built: {error}") from None
    fits = preprocessing.input_shape == (config.in_channels, config.image_size, config.image_size)
    per_channel = len(preprocessing.mean) == len(preprocessing.std) == preprocessing.channels
    finite = all(map(math.isfinite, (*preprocessing.mean, *preprocessing.std))) and 0 not in preprocessing.std
    if not (fits and per_channel and finite and len(metadata.labels) == config.classes):
        raise DamagedFile(f"{where}: its preprocessing or labels do not fit its model's config")
    return metadata


def _decode(text: str, weights: dict[str, torch.Tensor], where: str) -> Checkpoint:
    try:
        body = json.loads(text)
        schema = body["schema"]
        claimed = body.pop("digest")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedFile(f"{where}: its metadata is not that of a checkpoint") from None
    if schema != SCHEMA:
        raise DamagedFile(f"{where}: schema is {schema!r}, this version reads {SCHEMA!r}")
    _check_plain(weights, where)
    if digest(body) != claimed or weights_sha256(weights) != body.get("weights_sha256"):
        raise DamagedFile(f"{where}: its digest does not match its content; the file was altered, get a fresh copy")
    provenance = body.get("provenance")
    if not isinstance(provenance, dict):
        raise DamagedFile(f"{where}: its provenance is not a table of values")
    metadata = metadata_from_json(body, where)
    model = find_model(metadata.model)
    config = model.config_from(metadata.config)
    _check_fit(weights, model, config, where)
    return Checkpoint(metadata.model, config, metadata.preprocessing, metadata.labels, provenance, weights)


def _adopt(weights: dict[str, torch.Tensor], where: str, name: str | None, settings: Mapping[str, str]) -> Checkpoint:
    """A checkpoint from a bare state_dict: the first model whose names and shapes it has, or a LeNet-5 under other names."""
    weights = _without_prefix(weights)
    candidates = (find_model(name),) if name else MODELS
    for model in candidates:
        with contextlib.suppress(InvalidConfig, DamagedFile, BadInput):
            config = model.configured(settings)
            _check_plain(weights, where)
            _check_fit(weights, model, config, where)
            provenance = {"inferred": [f"{model.name}, by the names and shapes of its tensors"], "assumed": _assumed(model, settings)}
            return _bare(model, config, weights, provenance)
    if name and find_model(name).build is not find_model(FOREIGN).build:
        model = find_model(name)
        _check_plain(weights, where)
        _check_fit(weights, model, model.configured(settings), where)
    found = foreign.adopt(weights, where, settings)
    model = find_model(name or FOREIGN)
    return _bare(model, found.config, found.weights, {"inferred": list(found.inferred), "assumed": [*found.assumed, UNSCALED]})


def _bare(model: Model, config: ModelConfig, weights: Mapping[str, torch.Tensor], provenance: Mapping[str, Any]) -> Checkpoint:
    preprocessing = make_preprocessing(config.in_channels, config.image_size, model.pixel_range)
    whole = {"source": "a state_dict without metadata", **provenance}
    return Checkpoint(model.name, config, preprocessing, _numbered(config.classes), whole, _plain(weights))


def _assumed(model: Model, settings: Mapping[str, str]) -> list[str]:
    named = [
        f"{key} {getattr(model.defaults, key)}" for key in ("pooling", "activation") if hasattr(model.defaults, key) and key not in settings
    ]
    return [*named, UNSCALED if model.pixel_range == (0.0, 1.0) else f"pixels from {model.pixel_range[0]} to {model.pixel_range[1]}"]


def _without_prefix(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names without the part that all of them begin with, as wrappers leave it: `module.`, `_orig_mod.`, `model.`."""
    while len({name.partition(".")[0] for name in weights}) == 1 and all(name.count(".") > 1 for name in weights):
        weights = {name.partition(".")[2]: tensor for name, tensor in weights.items()}
    return weights


def _check_fit(weights: Mapping[str, torch.Tensor], model: Model, config: ModelConfig, where: str) -> None:
    module = initialise(model.name, config)
    expected = module.state_dict()
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or extra:
        raise DamagedFile(f"{where}: tensors do not fit {model.name}: missing {_some(missing)}, unexpected {_some(extra)}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise DamagedFile(
                f"{where}: tensor {name} is {tuple(tensor.shape)}, but {model.name} with this config has {tuple(expected[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise DamagedFile(f"{where}: tensor {name} holds NaN or infinity; the training diverged or the file was altered")
    for name, buffer in module.named_buffers():
        if name in weights and not torch.equal(weights[name], buffer):
            raise DamagedFile(f"{where}: tensor {name} is fixed in {model.name} and differs here")
        if name.endswith(".mask") and weights[name.replace(".mask", ".weight")].mul(1 - buffer).any():
            raise DamagedFile(f"{where}: a weight outside the connection table of {name.removesuffix('.mask')} is not zero")


def _check_plain(weights: Mapping[str, torch.Tensor], where: str) -> None:
    for name, tensor in weights.items():
        if tensor.dtype != torch.float32:
            raise DamagedFile(f"{where}: tensor {name} is {tensor.dtype}; convert it to torch.float32")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise DamagedFile(f"{where}: tensor {name} is not a plain dense tensor; save tensor.to_dense().cpu()")


def _state_dict(data: bytes, where: str) -> dict[str, torch.Tensor]:
    if data[:2] == b"PK":
        check_zip(data, where, "state_dict")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of unusual pickle protocols, which it then refuses or reads
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DamagedFile(
            f"{where}: it holds more than plain tensors, and reading it would run code; where you trust its origin, run there:\n"
            f"  import torch\n"
            f"  module = torch.load({Path(where).name!r}, weights_only=False)\n"
            f"  torch.save(getattr(module, 'state_dict', lambda: module)(), 'weights.pt')"
        ) from None
    except Exception as error:  # damaged bytes make the restricted unpickler fail in every way there is
        raise DamagedFile(f"{where}: not a readable state_dict ({first_line(error)}); it is truncated or altered") from None
    for wrapper in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(t, torch.Tensor) for t in loaded.values()) or not loaded:
        raise DamagedFile(f"{where}: not a state_dict (tensors by name); save model.state_dict()")
    return {str(name): tensor for name, tensor in loaded.items()}


def _is_npz(data: bytes) -> bool:
    """Whether `data` is numpy's zip of arrays; torch's has other members."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
    except Exception:  # a damaged archive; what reads it next has the words for it
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def _arrays(data: bytes, where: str) -> dict[str, torch.Tensor]:
    import numpy as np

    check_zip(data, where, ".npz")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except Exception as error:  # damaged bytes make numpy fail in every way there is, and it has dtypes that torch has not
        raise DamagedFile(f"{where}: not a .npz of plain arrays ({first_line(error)}); it is damaged or holds other things") from None


def _is_pickle(data: bytes) -> bool:
    """torch.save writes a zip archive, older torch a bare pickle; a safetensors file starts with a small length."""
    return data[:2] == b"PK" or (data[:1] == b"\x80" and data[1:2] < b"\x06" and not _plausible_header(data))


def _plausible_header(data: bytes) -> bool:
    length = int.from_bytes(data[:8], "little")
    return 8 + length <= len(data) and data[8:9] == b"{"


def is_torchscript(data: bytes) -> bool:
    """Whether `data` is a TorchScript archive rather than a state_dict; both are zip files."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any(name.partition("/")[2] == "constants.pkl" for name in archive.namelist())
    except Exception:  # a damaged archive is none; check_zip has the words for it
        return False


def header_metadata(data: bytes) -> dict[str, str]:
    """The metadata in the header of a safetensors file that has been parsed already."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])  # safetensors has parsed it already, so it is well-formed
    metadata: dict[str, str] = header.get("__metadata__") or {}
    return metadata


def _plain(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}


def _numbered(classes: int) -> tuple[str, ...]:
    return tuple(map(str, range(classes)))


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"
