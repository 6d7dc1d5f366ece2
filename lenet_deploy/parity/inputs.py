"""What variants are judged on: named, seeded, and with the oracle's answer computed once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lenet_deploy.checkpoint import Checkpoint
from lenet_deploy.data import Dataset, fit, normalise

SEED = 0


@dataclass(frozen=True, eq=False)
class InputSet:
    """Images and the oracle's scores for them.

    Attributes:
        name: as results show it.
        images: float32 (N, C, H, W), ready for the model.
        oracle: float64 (N, classes): the checkpoint's weights evaluated eagerly in float64 on the CPU.
    """

    name: str
    images: torch.Tensor
    oracle: torch.Tensor


def input_sets(checkpoint: Checkpoint, dataset: Dataset, count: int) -> tuple[InputSet, ...]:
    """`count` real images from `dataset`'s test split (cycled where it has fewer) and `count` standard normal ones."""
    real = dataset.test_images[torch.arange(count) % len(dataset.test_images)]
    generator = torch.Generator().manual_seed(SEED)
    candidates = (
        (f"{dataset.name} test images", normalise(fit(real, checkpoint.preprocessing), checkpoint.preprocessing)),
        (f"normal, seed {SEED}", torch.randn(count, *checkpoint.preprocessing.input_shape, generator=generator)),
    )
    oracle = checkpoint.module().double()
    with torch.no_grad():
        return tuple(InputSet(name, images, oracle(images.double())) for name, images in candidates)
