"""What variants are judged on: named, seeded, and with the oracle's answer computed once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from lenet_deploy.checkpoint import Checkpoint
from lenet_deploy.data import Dataset, fit, normalise
from lenet_deploy.parity.judge import TOLERANCES
from lenet_deploy.records import ImageInput
from lenet_deploy.runtimes.eager import trace_module

SEED = 0
LARGE = 1e4
SUBNORMAL = 1e-39  # times a standard normal value: below float32's smallest normal number, 1.2e-38
MAX_PIXELS = 4096  # one-hot images; a larger input has a seeded choice of its pixels
# Of two draws, both are small by luck now and then. That matters where an image magnifies, so such a set is drawn more often, unless it
# is a whole test split, whose images are mild and many.
DRAWS, MORE_DRAWS = 2, 16
UNSTEADY = 2.0  # condition of a set's worst image from which on it is
FEW = 1024  # images of a set that may be drawn more often
CHUNK = 32  # images at once: torch's float64 convolution was fastest where its buffers stay in the cache


@dataclass(frozen=True, eq=False)
class InputSet:
    """Images and the oracle's scores for them.

    Attributes:
        name: as results show it.
        images: float32 (N, C, H, W), ready for the model.
        oracle: float64 (N, classes): the checkpoint's weights evaluated eagerly in float64 on the CPU.
        peak: largest magnitude of an input, an intermediate value or a score of the oracle.
        smallest: smallest magnitude of an input that is not zero; infinity where all are.
        eager_rmse: takes a precision and returns float64 (N,), the root mean square error of torch's eager mode in it on the CPU, at
            least its average over the set; None where the precision has no rounding rule.
        condition: takes a precision and returns float64 (N,), at least 1: how far an image's scores move, in shares of the largest,
            per unit of relative change in weights and pixels, for changes of the size of the precision's epsilon.
        labels: int64 (N,) where they are known.

    `eager_rmse` and `condition` are computed when first asked for, once a precision.
    """

    name: str
    images: torch.Tensor
    oracle: torch.Tensor
    peak: float
    smallest: float
    eager_rmse: Callable[[str], torch.Tensor | None]
    condition: Callable[[str], torch.Tensor]
    labels: torch.Tensor | None = None


def input_sets(checkpoint: Checkpoint, dataset: Dataset, count: int) -> tuple[InputSet, ...]:
    """Every input set of a checkpoint.

    The whole test split of `dataset`; `count` each of standard normal images, uniform ones over the input range, large and
    subnormal ones; constants; and one image for each pixel that alone is one.
    """
    spec = checkpoint.preprocessing
    built = functools.partial(_built, checkpoint)
    return (
        built(f"{dataset.name} test split", normalise(fit(dataset.test_images, spec), spec), dataset.test_labels),
        *(built(name, images) for name, images in generated(spec, count).items()),
    )


def generated(spec: ImageInput, count: int, pixels: int = MAX_PIXELS) -> dict[str, torch.Tensor]:
    """The images that no data set is needed for, float32 (N, C, H, W) by name.

    Args:
        count: of each random kind.
        pixels: the most one-hot images; where there are more pixels, a seeded choice of them.
    """
    shape = spec.input_shape
    generator = torch.Generator().manual_seed(SEED)
    low, high = ((edge - spec.mean[0]) / spec.std[0] for edge in (0.0, 1.0))
    normal = torch.randn(count, *shape, generator=generator)
    uniform = low + (high - low) * torch.rand(count, *shape, generator=generator)
    constants = torch.tensor(tuple(dict.fromkeys((0.0, 1.0, low, high)))).view(-1, 1, 1, 1).expand(-1, *shape)
    return {
        f"normal, seed {SEED}": normal,
        f"uniform, seed {SEED}": uniform,
        "constants": constants.contiguous(),
        "one-hot pixels": _one_hot(shape, generator, pixels),
        f"large, normal x {LARGE:g}": normal * LARGE,
        f"subnormal, normal x {SUBNORMAL:g}": normal * SUBNORMAL,
    }


def _built(checkpoint: Checkpoint, name: str, images: torch.Tensor, labels: torch.Tensor | None = None) -> InputSet:
    module = checkpoint.module().double()
    oracle = _evaluated(lambda chunk: module(chunk.double()), images)
    with torch.inference_mode():
        # Of a sample: the peak decides only whether a format can hold the values, and every set is homogeneous.
        peak = max(float(tap.value.abs().max()) for tap in trace_module(module, images[:: len(images) // CHUNK + 1].double()))
    condition = functools.cache(lambda precision: _condition(checkpoint, images, oracle, precision))
    return InputSet(
        name,
        images,
        oracle,
        max(peak, float(oracle.abs().max())),
        float(images.abs().masked_fill(images == 0, torch.inf).min()),
        functools.cache(lambda precision: _eager_rmse(checkpoint, images, oracle, condition(precision), precision)),
        condition,
        labels,
    )


def _eager_rmse(
    checkpoint: Checkpoint, images: torch.Tensor, oracle: torch.Tensor, condition: torch.Tensor, precision: str
) -> torch.Tensor | None:
    """Per image, or what eager needs of the set on average where that is more: luck on one image is no measure for others."""
    if precision not in EAGER:
        return None
    scores = _evaluated(EAGER[precision](checkpoint.module()), images)
    rmse = (scores.double() - oracle).square().mean(dim=1).sqrt()
    scale = (condition * oracle.square().mean(dim=1).sqrt()).clamp_min(2.0**-1000)
    return rmse.maximum(scale * (rmse / scale).square().mean().sqrt())


def _condition(checkpoint: Checkpoint, images: torch.Tensor, oracle: torch.Tensor, precision: str) -> torch.Tensor:
    """Measured on the oracle itself, with every weight and pixel moved up or down by one epsilon, at random: the root mean square of draws.

    Rounding does the same to a healthy variant, so what this magnifies, that may be off by as much. It is near 1 for most images;
    where tanh's slope or a difference of large numbers magnifies, no implementation can do better.
    """
    largest = oracle.abs().amax(dim=1).clamp_min(2.0**-1000)
    if precision not in TOLERANCES:
        return torch.ones_like(largest)
    step = TOLERANCES[precision].epsilon
    generator = torch.Generator().manual_seed(SEED)

    def moved(values: torch.Tensor) -> torch.Tensor:
        return values * (1 + step * (2.0 * torch.randint(0, 2, values.shape, generator=generator) - 1))

    module = checkpoint.module().double()
    tensors = [(tensor, tensor.detach().clone()) for tensor in (*module.parameters(), *module.buffers())]

    def drawn() -> torch.Tensor:
        with torch.no_grad():
            for tensor, exact in tensors:
                tensor.copy_(moved(exact))
        return (_evaluated(module, moved(images.double())) - oracle).abs().amax(dim=1) / (step * largest)

    draws = [drawn() for _ in range(DRAWS)]
    if len(images) <= FEW and torch.stack(draws).max() >= UNSTEADY:
        draws += [drawn() for _ in range(MORE_DRAWS - DRAWS)]
    return torch.stack(draws).square().mean(dim=0).sqrt().clamp_min(1.0)


def _evaluated(run: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Scores of `images` in chunks, as many at a time as torch may use threads, each on one.

    Torch's own threads meet in every operator. A LeNet's are so short that this gains nothing on an idle machine, and on a busy one
    it was measured to take ten to forty times as long.
    """
    threads, chunks = torch.get_num_threads(), images.split(CHUNK)

    def one(chunk: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return run(chunk)

    torch.set_num_threads(1)
    try:
        if min(threads, len(chunks)) == 1:  # most sets are one chunk, and are evaluated often
            return torch.cat([one(chunk) for chunk in chunks])
        with ThreadPoolExecutor(threads) as pool:
            return torch.cat(list(pool.map(one, chunks)))
    finally:
        torch.set_num_threads(threads)


def _in_dtype(dtype: torch.dtype) -> Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]]:
    def make(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        cast = module.to(dtype)
        return lambda images: cast(images.to(dtype))

    return make


def _in_tf32(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """TF32 as tensor cores do it: operands of convolutions and matrix products rounded to 10 bits, sums in float32."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight.data = round_to_tf32(layer.weight.data)
            layer.register_forward_pre_hook(lambda _, inputs: (round_to_tf32(inputs[0]),))
    return module


def round_to_tf32(values: torch.Tensor) -> torch.Tensor:
    """Float32 rounded to TF32's 10 bits of mantissa, to nearest, ties away from zero (PTX ISA, cvt.rna.tf32.f32)."""
    return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


# Eager in each precision that has a tolerance.
EAGER: dict[str, Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]]] = {
    "fp32": _in_dtype(torch.float32),
    "tf32": _in_tf32,
    "fp16": _in_dtype(torch.float16),
    "bf16": _in_dtype(torch.bfloat16),
}


def _one_hot(shape: tuple[int, int, int], generator: torch.Generator, most: int = MAX_PIXELS) -> torch.Tensor:
    pixels = shape[0] * shape[1] * shape[2]
    chosen = torch.arange(pixels)
    if pixels > most:
        chosen = torch.randperm(pixels, generator=generator)[:most].sort().values
    images = torch.zeros(len(chosen), pixels)
    images[torch.arange(len(chosen)), chosen] = 1.0
    return images.view(-1, *shape)
