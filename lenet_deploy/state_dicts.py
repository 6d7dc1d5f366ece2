"""Tensors by name out of what `torch.save` and `numpy.savez` write, without running anything that is in it."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lenet_deploy.errors import DamagedFile, first_line
from lenet_deploy.models.config import MAX_PARAMETERS
from lenet_deploy.store import check_zip

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")  # where others keep the tensors, the likeliest first
MAX_BYTES = 8 * MAX_PARAMETERS * 4  # unpacked: float64 weights with an optimiser's state and a copy, of the largest network that is built


def is_state_dict(data: bytes) -> bool:
    """Whether `data` is a zip archive or a pickle: torch writes either, numpy the former. A safetensors file starts with a small length."""
    return data[:2] == b"PK" or (data[:1] == b"\x80" and data[1:2] < b"\x06" and not _plausible_header(data))


def read_state_dict(data: bytes, where: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors in the order of the file, and what there is to say about where they stood, one line each.

    Raises:
        DamagedFile: truncated, altered, holding other things than tensors, or needing to run code to load.
    """
    if data[:2] == b"PK":
        check_zip(data, where, "state_dict or .npz")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
        if sum(member.file_size for member in members) > MAX_BYTES:
            raise DamagedFile(f"{where}: it unpacks to more than {MAX_BYTES:,} bytes, which no LeNet-5 needs; save its weights alone")
        if members and all(member.filename.endswith(".npy") for member in members):
            return _arrays(data, where), ()
    return _unwrapped(_unpickled(data, where), where)


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the part that all of them begin with, as wrappers leave it: `module.`, `_orig_mod.`, `model.`."""
    while len({name.partition(".")[0] for name in tensors}) == 1 and all(name.count(".") > 1 for name in tensors):
        tensors = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _unpickled(data: bytes, where: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of unusual pickle protocols, which it then refuses or reads
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DamagedFile(
            f"{where}: it holds more than plain tensors, and reading it would run code; where you trust its origin, run there:\n"
            f"  import torch\n"
            f"  model = torch.load({Path(where).name!r}, weights_only=False)  # and ['model'] or the like, if that gives a dict\n"
            f"  torch.save(model.state_dict(), 'weights.pt')"
        ) from None
    except Exception as error:  # damaged bytes make the restricted unpickler fail in every way there is
        raise DamagedFile(f"{where}: not a readable state_dict ({first_line(error)}); it is truncated or altered") from None


def _unwrapped(loaded: Any, where: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    notes = []
    while isinstance(loaded, dict):
        wrapper = next((key for key in WRAPPERS if isinstance(loaded.get(key), dict)), None)
        if wrapper is None:
            break
        aside = [str(key) for key in loaded if key != wrapper]
        notes.append(f"the weights under {wrapper}" + (f"; left aside: {', '.join(aside)[:200]}" if aside else ""))
        loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not loaded:
        raise DamagedFile(f"{where}: not a state_dict (tensors by name); save model.state_dict()")
    for name, value in loaded.items():
        if not isinstance(value, Tensor):
            raise DamagedFile(f"{where}: not a state_dict: {name} is a {type(value).__name__}, not a tensor; save model.state_dict()")
    return {str(name): tensor for name, tensor in loaded.items()}, tuple(notes)


def _arrays(data: bytes, where: str) -> dict[str, Tensor]:
    import numpy as np

    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except Exception as error:  # damaged bytes make numpy fail in every way there is, and it has dtypes that torch has not
        raise DamagedFile(f"{where}: not a .npz of plain arrays ({first_line(error)}); it is damaged or holds other things") from None


def _plausible_header(data: bytes) -> bool:
    length = int.from_bytes(data[:8], "little")
    return 8 + length <= len(data) and data[8:9] == b"{"
