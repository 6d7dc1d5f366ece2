"""What the machine was doing while a worker measured: part of every result, since it decides how far the numbers can be trusted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenet_deploy.bench import cpu, nvml
from lenet_deploy.bench_records import MachineState

if TYPE_CHECKING:
    import torch


class Watch:
    """Watches the machine from when it is made until asked for its `state`.

    Args:
        threads: intra-op threads that launches use.
        gpu: from `nvml.opened`.
        root: where /proc and /sys are.
    """

    def __init__(self, threads: int, gpu: nvml.Device | None = None, root: Path = Path("/")) -> None:
        self._threads, self._gpu, self._root = threads, gpu, root
        self._clocks: list[nvml.Clock] = []
        self._gpu_before = nvml.read_device(gpu) if gpu else {}
        self._cpu_before = cpu.read_cpu(root)

    @classmethod
    @contextlib.contextmanager
    def over(cls, devices: Iterable[torch.device]) -> Iterator[Watch]:
        """A watch of this machine, its first GPU among `devices`, and the threads that torch has now."""
        import torch

        with nvml.opened(devices) as gpu:
            yield cls(torch.get_num_threads(), gpu)

    def throttled(self) -> str | None:
        """Why the GPU's clock is too low now for a visit to count, in words; None without one (see `nvml.throttled`)."""
        if self._gpu is None:
            return None
        clock = nvml.read_clock(self._gpu)
        self._clocks.append(clock)
        return nvml.throttled(clock)

    def energy_j(self) -> float | None:
        """Joules that the GPU has drawn so far, to be subtracted from a later answer; None where none are counted."""
        return nvml.energy_j(self._gpu) if self._gpu else None

    def state(self, process: int) -> MachineState:
        """What the machine did meanwhile, and what of it makes measurements noisy; `process` is the number of the worker."""
        found = cpu.cpu_state(self._cpu_before, cpu.read_cpu(self._root), self._threads)
        gpu: dict[str, Any] = {}
        if self._gpu:
            gpu = nvml.device_state(self._gpu_before, nvml.read_device(self._gpu), self._clocks, os.getpid())
        return MachineState(process, found, gpu, cpu.cpu_remarks(found) + nvml.device_remarks(gpu))
