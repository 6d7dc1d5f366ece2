"""Processes that train together, as torchrun starts them: each has its share of every batch, and their gradients are averaged."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lenet_deploy.devices import parse_device


@dataclass(frozen=True)
class Team:
    """This process among `size`, which are numbered from 0."""

    rank: int = 0
    size: int = 1

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of a batch: every `size`-th row."""
        return batch[self.rank :: self.size] if self.size > 1 else batch

    def total(self, value: Tensor) -> float:
        """The sum of a scalar over all processes."""
        if self.size > 1:
            distributed.all_reduce(value)
        return float(value)

    def together(self, module: nn.Module) -> nn.Module:
        """The module, whose gradients are from now on the mean over all processes."""
        return DistributedDataParallel(module) if self.size > 1 else module


ALONE = Team()


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def own_device(text: str) -> str:
    """The device asked for, or this process's own GPU where several processes train together on GPUs."""
    if launched() and parse_device(text).type == "cuda":
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return text


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Team]:
    """The team that torchrun started, over gloo on the CPU and NCCL on GPUs; alone where it started none."""
    if not launched():
        yield ALONE
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Team(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
