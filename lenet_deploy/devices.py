"""What every runtime shares about torch devices: names, availability, streams and the TF32 contract."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from lenet_deploy.errors import BadInput, Unusable, first_line
from lenet_deploy.records import RuntimeStatus


def parse_device(text: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a torch device; `auto` is CUDA where it works, else the CPU.

    Raises:
        BadInput: another word.
        Unusable: CUDA is asked for and does not work here.
    """
    if text == "auto":
        text = "cuda" if probe_torch("cuda", "cuda").usable else "cpu"
    kind, _, index = text.partition(":")
    if kind == "cpu" and not index and text == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or (":" in text and not index.isdecimal()):
        raise BadInput(f"unknown device {text!r}; use auto, cpu, cuda or cuda:N")
    status = probe_torch("cuda", "cuda")
    if not status.usable:
        raise Unusable(f"device {text} cannot be used: {status.reason}; {status.fix}")
    number = int(index or 0)
    if number >= torch.cuda.device_count():
        raise Unusable(f"device {text} cannot be used: this machine has {torch.cuda.device_count()} CUDA devices, numbered from 0")
    return torch.device("cuda", number)


def probe_torch(name: str, device: str) -> RuntimeStatus:
    """Whether torch computes on `device` here, by computing on it."""
    if device == "cuda" and not torch.cuda.is_available():
        if torch.version.cuda is None:
            return RuntimeStatus(name, False, "this torch is a build without CUDA", "pip install torch (the default build has CUDA)")
        return RuntimeStatus(
            name, False, "torch finds no CUDA device", "run on a machine with an NVIDIA GPU and its driver (check with nvidia-smi)"
        )
    try:
        torch.ones(2, device=device).sum().item()
    except RuntimeError as error:
        reason = first_line(error)
        return RuntimeStatus(name, False, f"torch fails on {device}: {reason}", "install the torch build for this GPU and driver")
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    return RuntimeStatus(name, True, f"torch {torch.__version__}, {where}")


@contextlib.contextmanager
def strict_float32() -> Iterator[None]:
    """Pin torch's convolutions and matrix products on CUDA to full float32, and restore what was set before.

    ONNX Runtime's own switch is set per session. Without this torch convolves in TF32 by default, and a comparison of
    runtimes would compare precisions.
    """
    knobs = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]  # conv is set at run time
    before = [knob.fp32_precision for knob in knobs]
    try:
        for knob in knobs:
            knob.fp32_precision = "ieee"
        yield
    finally:
        for knob, value in zip(knobs, before, strict=True):
            knob.fp32_precision = value


@contextlib.contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Strict float32, no gradients and, on CUDA, a stream of our own as torch's current one.

    ONNX Runtime takes a caller's stream only if it is not the default one, so all runtimes share this one.
    """
    with strict_float32(), torch.inference_mode():
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            yield


def synchronise(device: torch.device) -> None:
    """Wait until everything launched on torch's current stream of `device` is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
