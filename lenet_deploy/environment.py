"""The machine and the versions that a result came from."""

from __future__ import annotations

import functools
import os
import platform
import sys
from pathlib import Path

from lenet_deploy.records import Environment

PACKAGES = (
    "lenet-deploy",
    "torch",
    "torchvision",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "safetensors",
)


def capture() -> Environment:
    """The environment of this process; asks CUDA only if torch is loaded already, and git only in a source tree."""
    torch = sys.modules.get("torch")
    has_gpu = torch is not None and torch.cuda.is_available()
    return Environment(
        os=platform.platform(),
        python=platform.python_version(),
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads() if torch else None,
        gpu=torch.cuda.get_device_name() if torch and has_gpu else None,
        driver=_driver(),
        versions=versions(),
        commit=_commit(),
    )


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result, by distribution name."""
    from importlib import metadata  # 15 ms that --help need not spend

    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def _driver() -> str | None:
    """Version of NVIDIA's kernel driver, from the file it publishes."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), None)


@functools.cache
def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    import subprocess

    try:
        done = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
