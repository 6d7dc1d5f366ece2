"""What every runtime shares about torch devices: names, availability, streams and the TF32 contract."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from lenet_deploy.errors import BadInput, Unusable, first_line
from lenet_deploy.records import RuntimeStatus

MAX_THREADS = 1024  # beyond it is a typing mistake, and OpenMP ends the process where the system gives no more threads


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


def _switches() -> dict[str, Any]:
    """Every torch switch that decides what a float32 product is; each has `fp32_precision`, `ieee` for full float32."""
    backends: Any = torch.backends  # some are set at run time, and torch's annotations do not know them
    return {
        "torch.cuda.matmul": backends.cuda.matmul,
        "torch.cudnn.conv": backends.cudnn.conv,
        "torch.mkldnn.matmul": backends.mkldnn.matmul,
        "torch.mkldnn.conv": backends.mkldnn.conv,
    }


@contextlib.contextmanager
def float32_precision(allow_tf32: bool = False) -> Iterator[None]:
    """Pin torch's convolutions and matrix products to full float32, or those on CUDA to TF32, and restore what was set before.

    ONNX Runtime's own switch is set per session, from `tf32_allowed`. Without this torch convolves in TF32 by default, and a comparison
    of runtimes would compare precisions. The CPU's products stay in full float32 either way: TF32 is the GPU's.
    """
    before = {name: switch.fp32_precision for name, switch in _switches().items()}
    try:
        for name, switch in _switches().items():
            switch.fp32_precision = "tf32" if allow_tf32 and "mkldnn" not in name else "ieee"
        yield
    finally:
        for name, switch in _switches().items():
            switch.fp32_precision = before[name]


def tf32_allowed() -> bool:
    """Whether the products of float32 on CUDA may be TF32 now: what ONNX Runtime is told."""
    return bool(_switches()["torch.cuda.matmul"].fp32_precision == "tf32")


def float32_state() -> dict[str, str]:
    """What float32 means now, by switch: `ieee` or `tf32`."""
    state = {name: str(switch.fp32_precision) for name, switch in _switches().items()}
    return {**state, "onnxruntime.cuda": "tf32" if tf32_allowed() else "ieee"}


def check_threads(count: int | None) -> None:
    """Raise BadInput for a number of threads that none can have; more than there are cores is allowed."""
    if count is not None and not 1 <= count <= MAX_THREADS:
        raise BadInput(f"threads is {count}; it must be from 1 to {MAX_THREADS:,}, and is best at most the number of cores")


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Give torch `count` threads for the work inside an operator, and so each ONNX Runtime session opened inside; restore what was.

    None leaves the number as it is. It holds for the calling thread alone: OpenMP keeps the number by thread.

    Raises:
        BadInput: below 1 or beyond MAX_THREADS.
    """
    check_threads(count)
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


@contextlib.contextmanager
def computing_on(device: torch.device, allow_tf32: bool = False) -> Iterator[None]:
    """Float32 as asked for (strict by default), no gradients and, on CUDA, a stream of our own as torch's current one.

    ONNX Runtime takes a caller's stream only if it is not the default one, so all runtimes share this one.
    """
    with float32_precision(allow_tf32), torch.inference_mode():
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            yield


def synchronise(device: torch.device) -> None:
    """Wait until everything launched on torch's current stream of `device` is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
