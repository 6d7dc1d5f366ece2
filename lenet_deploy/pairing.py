"""The public function `check_pair`: whether two files compute the same function, whoever exported them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lenet_deploy import environment
from lenet_deploy.bench.coordinator import Progress
from lenet_deploy.bench.run import silent, sizes_for
from lenet_deploy.errors import BadInput, DamagedFile, Unusable
from lenet_deploy.records import ParityReport, ParityResult, Preprocessing
from lenet_deploy.sources import Source, computing, device_of, on_device, open_path, open_session, parity_dataset
from lenet_deploy.variants import CHECKPOINT, Variant

if TYPE_CHECKING:
    import torch

    from lenet_deploy.checkpoint import Checkpoint
    from lenet_deploy.data import Dataset

INPUTS = 256  # generated images of each kind, where they are small
MOST_VALUES = 2**24  # of the images of a set, and of a batch that nobody asked for: 64 MiB in float32
REFERENCE_BATCH = 64


def check_pair(
    a: str | Path,
    b: str | Path,
    *,
    input_shape: tuple[int, int, int] | None = None,
    tolerance: float | None = None,
    batch_sizes: Sequence[int] | None = None,
    device: str = "auto",
    dataset: Dataset | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Judge `b` against `a` on the same images: artifacts of any origin, checkpoints or bundles.

    Where one of them is a checkpoint or a bundle, the other is judged against its float64 oracle, as `check_parity` does. Where none is,
    `b` is judged against what `a` gives on the CPU.

    Args:
        input_shape: (C, H, W) of the images that a file takes, where it does not say.
        tolerance: share of an image's largest score that scores may differ by; `PAIR_TOLERANCE` of `lenet_deploy.parity.judge` when None.
        batch_sizes: each at least 1.
        device: `auto` judges `b` on every device here; `cpu` or `cuda[:N]` on that one.
        dataset: real images beside the generated ones.

    Raises:
        BadInput: see `open_path`; inputs or outputs of different shapes; a tolerance where the oracle has its own; a reference that does
            not run.
        Unusable: the reference or `device` does not work here.
    """
    from lenet_deploy.checkpoint import from_bytes
    from lenet_deploy.parity.check import BATCH_SIZES

    first, second = open_path(a, input_shape), open_path(b, input_shape)
    shape = first.input.input_shape
    if shape != second.input.input_shape:
        sides = " and ".join(f"{each.described} images of {_sides(each.input.input_shape)}" for each in (first, second))
        raise BadInput(f"only files that take the same images can be compared: {sides}")
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise BadInput(f"the tolerance is {tolerance:g}; it must be a number above 0, as a share of an image's largest score")
    with_weights = next((each for each in (first, second) if any(v.artifact == CHECKPOINT for v in each.variants)), None)
    reference, judged = (second, first) if with_weights is second else (first, second)
    small = tuple(size for size in BATCH_SIZES if size == 1 or size * math.prod(shape) <= MOST_VALUES)
    sizes = sizes_for(judged, batch_sizes, small)
    chosen = on_device(judged.variants, device)
    if with_weights is None:
        return _against_a_file(reference, judged, chosen, sizes, tolerance, device, dataset, progress)
    if tolerance is not None:
        raise BadInput(f"{reference.described} is judged against in float64, with a tolerance of its own; leave the tolerance out")
    entry = next(variant for variant in reference.variants if variant.artifact == CHECKPOINT)
    weights = from_bytes(reference.read(entry), reference.described)
    return _against_the_oracle(weights, reference, judged, chosen, sizes, device, dataset, progress)


def _against_the_oracle(
    checkpoint: Checkpoint,
    reference: Source,
    judged: Source,
    chosen: Sequence[Variant],
    sizes: tuple[int, ...],
    device: str,
    dataset: Dataset | None,
    progress: Progress,
) -> ParityReport:
    from lenet_deploy.devices import float32_state
    from lenet_deploy.parity.check import Trial, check_variant
    from lenet_deploy.parity.inputs import input_sets

    results: list[ParityResult] = []
    with computing(device):
        _check_scores(judged, chosen, sizes[0], len(checkpoint.labels), reference, device)
        progress(0, len(chosen) + 1, "oracle")
        trial = Trial(input_sets(checkpoint, dataset or parity_dataset(checkpoint), INPUTS), sizes, checkpoint, foreign=True)
        for number, variant in enumerate(chosen, 1):
            progress(number, len(chosen) + 1, variant.name)
            results += check_variant(variant, judged.read(variant), trial, device_of(variant, device))
        state = float32_state()
    notes = (f"{judged.described} is judged against the float64 oracle of {reference.described}",)
    return ParityReport(tuple(results), notes, environment.capture(), state)


def _against_a_file(
    reference: Source,
    judged: Source,
    chosen: Sequence[Variant],
    sizes: tuple[int, ...],
    tolerance: float | None,
    device: str,
    dataset: Dataset | None,
    progress: Progress,
) -> ParityReport:
    from lenet_deploy.devices import float32_state
    from lenet_deploy.parity.inputs import MAX_PIXELS, generated
    from lenet_deploy.parity.judge import PAIR_TOLERANCE
    from lenet_deploy.parity.pair import check_against, in_batches, reference_set

    spec = next((each.input for each in (reference, judged) if isinstance(each.input, Preprocessing)), reference.input)
    fitting = max(1, MOST_VALUES // math.prod(spec.input_shape))
    images = _real(dataset, reference, judged) | generated(spec, min(INPUTS, fitting), min(MAX_PIXELS, fitting))
    runner = next(variant for variant in reference.variants if variant.device == "cpu")
    size = reference.batch_size or max((each for each in sizes if each <= REFERENCE_BATCH), default=1)
    allowed = tolerance or PAIR_TOLERANCE
    results: list[ParityResult] = []
    with computing(device):
        progress(0, len(chosen) + 1, reference.described)
        try:
            with open_session(reference, runner, device) as session:
                sets = [reference_set(name, each, lambda batch: in_batches(session, batch, size)) for name, each in images.items()]
        except DamagedFile as error:
            raise DamagedFile(f"{reference.described}: {error}") from None
        _check_scores(judged, chosen, sizes[0], sets[0].scores.shape[1], reference, device)
        for number, variant in enumerate(chosen, 1):
            progress(number, len(chosen) + 1, variant.name)
            results += check_against(sets, variant, judged.read(variant), sizes, allowed, device_of(variant, device))
        state = float32_state()
    notes = (
        f"{judged.described} is judged against {reference.described} as {runner.name} runs it; neither is known to be right",
        f"scores may differ by {allowed:.3g} of an image's largest score, times its condition",
    )
    return ParityReport(tuple(results), notes, environment.capture(), state)


def _real(dataset: Dataset | None, *sides: Source) -> dict[str, torch.Tensor]:
    """The test split as a side with known preprocessing takes it; else as pixels / 255, where the images have the shape."""
    from lenet_deploy.data import fit, normalise

    if dataset is None:
        return {}
    name, images = f"{dataset.name} test split", dataset.test_images
    for side in sides:
        if isinstance(side.input, Preprocessing):
            return {name: normalise(fit(images, side.input), side.input)}
    shape = sides[0].input.input_shape
    if tuple(images.shape[1:]) != shape:
        fits = f"{dataset.name} has images of {_sides(tuple(images.shape[1:]))}, and these files take {_sides(shape)}"
        raise BadInput(f"{fits} by a preprocessing that is not known; give a .npz file of images that fit, or leave the data out")
    return {name: normalise(images, sides[0].input)}


def _check_scores(judged: Source, chosen: Sequence[Variant], size: int, wanted: int, reference: Source, device: str) -> None:
    """Raise BadInput where the artifact does not run at all, or has another number of scores than the reference."""
    import torch

    from lenet_deploy.parity.pair import in_batches

    for variant in chosen:
        try:
            with open_session(judged, variant, device) as session:
                found = in_batches(session, torch.zeros(size, *judged.input.input_shape), size).shape[1]
        except Unusable:
            continue
        except DamagedFile as error:
            raise DamagedFile(f"{judged.described}: {error}") from None
        if found != wanted:
            raise BadInput(f"{judged.described} gives {found} scores an image, and {reference.described} {wanted}: nothing can be compared")
        return


def _sides(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
