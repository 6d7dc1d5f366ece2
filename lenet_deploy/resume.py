"""Where a training run stands between two epochs, as a file: safetensors, so that reading it runs nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lenet_deploy.checkpoint import header_metadata, weights_sha256
from lenet_deploy.errors import BadInput, DamagedFile
from lenet_deploy.recipes import TrainConfig, config_from_values
from lenet_deploy.records import EpochStats
from lenet_deploy.store import digest

METADATA_KEY = "lenet_deploy_training"
SCHEMA = "lenet-deploy/training/1"


@dataclass(frozen=True, eq=False)
class TrainState:
    """All that decides how a run goes on; the learning rate follows from the config and the number of epochs done.

    Attributes:
        data_sha256: of the data set, as `data.fingerprint` gives it.
        history: of the epochs done, in order.
        tensors: `model.*`, `optimizer.PARAMETER.NAME` and `generator`, on the CPU.
    """

    config: TrainConfig
    data_sha256: str
    history: tuple[EpochStats, ...]
    tensors: Mapping[str, Tensor]

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return len(self.history) >= self.config.epochs

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `name.`, without it."""
        return {key.removeprefix(f"{name}."): tensor for key, tensor in self.tensors.items() if key.startswith(f"{name}.")}

    def check_fits(self, config: TrainConfig, data_sha256: str) -> None:
        """Raise BadInput where this state belongs to a run of another config or other data."""
        mine, other = dataclasses.asdict(self.config), dataclasses.asdict(config)
        deciding = [name for name in mine if name not in ("recipe", "device")]  # a run may move, and then differs by rounding
        unlike = [f"{name} was {mine[name]!r} and is {other[name]!r}" for name in deciding if mine[name] != other[name]]
        if unlike:
            raise BadInput(f"the run to resume was another: {'; '.join(unlike)}; leave these options out, or train into another folder")
        if data_sha256 != self.data_sha256:
            raise BadInput("the run to resume was trained on other data; give the same --data, or train into another folder")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by `optimizer.PARAMETER.NAME`, on the CPU."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{number}.{name}": tensor.detach().cpu().clone() for number, each in state.items() for name, tensor in each.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took, names without `optimizer.`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def to_bytes(state: TrainState) -> bytes:
    """The state as a safetensors file; its metadata carries a digest over tensors and metadata."""
    body = {
        "schema": SCHEMA,
        "config": dataclasses.asdict(state.config),
        "data_sha256": state.data_sha256,
        "history": [dataclasses.asdict(stats) for stats in state.history],
        "tensors_sha256": weights_sha256(state.tensors),
    }
    body = json.loads(json.dumps(body))
    text = json.dumps({**body, "digest": digest(body)}, sort_keys=True)
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.tensors.items()}, metadata={METADATA_KEY: text})


def from_bytes(data: bytes, where: str) -> TrainState:
    """The state that `to_bytes` wrote; `where` names it in messages.

    Raises:
        DamagedFile: truncated, altered, or of another kind.
    """
    try:
        tensors = safetensors.torch.load(data)
        body: dict[str, Any] = json.loads(header_metadata(data)[METADATA_KEY])
        claimed, schema = body.pop("digest"), body["schema"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError):
        raise DamagedFile(f"{where}: not the state of a training run; it is truncated, altered or of another kind") from None
    if schema != SCHEMA:
        raise DamagedFile(f"{where}: schema is {schema!r}, this version reads {SCHEMA!r}")
    if digest(body) != claimed or weights_sha256(tensors) != body["tensors_sha256"]:
        raise DamagedFile(f"{where}: its digest does not match its content; the file was altered, so the run cannot go on from it")
    history = tuple(EpochStats(**stats) for stats in body["history"])
    return TrainState(config_from_values(body["config"], where), body["data_sha256"], history, tensors)
