"""Checkpoints: trained weights and all that rebuilds the model, in safetensors; foreign state_dicts, safely."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
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
from lenet_deploy.errors import BadInput, DamagedFile, LenetDeployError
from lenet_deploy.foreign import Adopted, Pixels
from lenet_deploy.models import MODELS, Model, find_model, initialise
from lenet_deploy.models.config import LeNet5Config, ModelConfig
from lenet_deploy.records import ArtifactMetadata, Preprocessing
from lenet_deploy.state_dicts import is_state_dict, read_state_dict, without_prefix
from lenet_deploy.store import digest, read_file

METADATA_KEY = "lenet_deploy"
CARRIED = "--model, --set, --pooling, --activation, --mean, --std and --border"  # what a file that says all of it takes from nobody
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

    @property
    def origin(self) -> tuple[str, ...]:
        """What was inferred, assumed and probed of weights that came without metadata, one line each."""
        found = [(word, self.provenance.get(word)) for word in ("inferred", "assumed", "probed")]
        return tuple(f"{word}: {line}" for word, lines in found if isinstance(lines, list) for line in lines)

    def metadata(self) -> ArtifactMetadata:
        """What each artifact made from this checkpoint carries."""
        config = json.loads(json.dumps(dataclasses.asdict(self.config)))  # type: ignore[call-overload]  # configs are dataclasses
        return ArtifactMetadata(self.model, config, self.preprocessing, self.labels, weights_sha256(self.weights))


def fresh(model: Model, settings: Mapping[str, str], seed: int) -> Checkpoint:
    """An untrained checkpoint of a registered model; raises UnknownName or InvalidConfig."""
    config = model.configured(settings)
    weights = copied(initialise(model.name, config, seed).state_dict())
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


def load(path: Path, model: str | None = None, settings: Mapping[str, str] | None = None, pixels: Pixels | None = None) -> Checkpoint:
    """Read a checkpoint, or foreign weights (safetensors, a state_dict, `.npz`); nothing in it is executed.

    Args:
        model: registered name for a file that does not say what it is; None goes by its tensors.
        settings: `KEY=VALUE` config settings for such a file.
        pixels: what is said of its input; None is the model's own.

    Raises:
        BadInput: absent or unreadable; or its tensors fit no model asked for.
        DamagedFile: truncated, altered, of another kind, or needing to run code to load.
    """
    return from_bytes(read_file(path, "a checkpoint"), str(path), model, settings, pixels)


def from_bytes(
    data: bytes, where: str, model: str | None = None, settings: Mapping[str, str] | None = None, pixels: Pixels | None = None
) -> Checkpoint:
    """As `load`, from bytes already read; `where` names them in messages."""
    tensors, metadata, notes = _opened(data, where)
    if metadata is None:
        return foreign_checkpoint(_recognised(tensors, where, model, settings or {}, notes), pixels)
    if settings or model or pixels:
        raise BadInput(f"{where}: this checkpoint carries its own model and config; leave out {CARRIED}")
    return _decode(metadata, tensors, where)


def recognise(path: Path, model: str | None = None, settings: Mapping[str, str] | None = None) -> Adopted:
    """What `load` makes of foreign weights before it assumes anything; raises as `load`, and BadInput for a checkpoint."""
    tensors, metadata, notes = _opened(read_file(path, "foreign weights"), str(path))
    if metadata is not None:
        raise BadInput(f"{path}: this checkpoint carries its own model and config, so that nothing is open; leave out --probe")
    return _recognised(tensors, str(path), model, settings or {}, notes)


def foreign_checkpoint(adopted: Adopted, pixels: Pixels | None = None) -> Checkpoint:
    """A checkpoint of foreign weights with the first of its configurations; its provenance says what was inferred and assumed."""
    model, config = find_model(adopted.model), adopted.configs[0]
    preprocessing = make_preprocessing(config.in_channels, config.image_size, model.pixel_range)
    preprocessing = pixels.applied(preprocessing) if pixels else preprocessing
    assumed = [f"{key} {getattr(config, key)}" for key in adopted.left_open]
    if not (pixels and pixels.mean):
        assumed.append(f"pixels from {model.pixel_range[0]:g} to {model.pixel_range[1]:g}")
    provenance = {"source": "weights without metadata", "inferred": list(adopted.inferred), "assumed": assumed}
    return Checkpoint(model.name, config, preprocessing, _numbered(config.classes), provenance, copied(adopted.weights))


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


def _opened(data: bytes, where: str) -> tuple[dict[str, torch.Tensor], str | None, tuple[str, ...]]:
    """The tensors of a file, this project's metadata or None, and notes about where the tensors stood in it."""
    if not data:
        raise DamagedFile(f"{where}: the file is empty")
    if is_torchscript(data):
        raise DamagedFile(f"{where}: a TorchScript archive, not a checkpoint; predict, evaluate and inspect take it, export needs weights")
    if is_state_dict(data):
        tensors, notes = read_state_dict(data, where)
        return tensors, None, notes
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DamagedFile(f"{where}: not a readable safetensors file ({error}); it is truncated, altered or of another kind") from None
    metadata = header_metadata(data)
    text = metadata.get(METADATA_KEY)
    if text is None and any(SCHEMA in value for value in metadata.values()):
        raise DamagedFile(f"{where}: a checkpoint whose metadata has lost its name; the file was altered, get a fresh copy")
    return tensors, text, ()


def _recognised(
    tensors: Mapping[str, torch.Tensor], where: str, name: str | None, settings: Mapping[str, str], notes: tuple[str, ...]
) -> Adopted:
    """Foreign weights as a LeNet-5 under any names, or as a model with fixed tensors (`lenet5-1998`) under its own."""
    weights, converted = foreign.plain(without_prefix(tensors), where)
    for model in (find_model(name),) if name else MODELS:
        if isinstance(model.defaults, LeNet5Config):
            continue
        fixed = [buffer for buffer, _ in initialise(model.name, model.defaults).named_buffers()]
        if name or not weights.keys().isdisjoint(fixed):
            config = model.configured(settings)
            _check_fit(weights, model, config, where)
            line = f"{model.name}, by the names and shapes of its tensors"
            return Adopted(model.name, (config,), weights, (*notes, line, *converted), ())
    found = foreign.adopt(weights, where, settings, name)
    return dataclasses.replace(found, inferred=(*notes, *found.inferred, *converted))


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


def copied(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, contiguous, shared with nothing."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}


def _numbered(classes: int) -> tuple[str, ...]:
    return tuple(map(str, range(classes)))


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"
