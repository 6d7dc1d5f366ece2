"""What a deployed model answers: accuracy on a test split, and labels for image files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lenet_deploy import environment
from lenet_deploy.errors import BadInput, DamagedFile, Unusable, first_line
from lenet_deploy.records import AccuracyReport, AccuracyRow, Failure, Prediction, Preprocessing
from lenet_deploy.sources import Source, computing, on_device, open_session, open_source
from lenet_deploy.variants import Variant, select_variants

if TYPE_CHECKING:
    import torch

    from lenet_deploy.checkpoint import Checkpoint
    from lenet_deploy.data import Dataset
    from lenet_deploy.runtimes import Session


def accuracies(
    source: Source, variants: Iterable[Variant], dataset: Dataset, device: str = "auto"
) -> tuple[tuple[AccuracyRow, ...], tuple[Failure, ...]]:
    """Top-1 answers on `dataset`'s test split of each variant that runs here, and why the others do not."""
    import torch

    labels, batches = source.known.labels, _test_batches(dataset, source.known.preprocessing)
    rows, skipped = [], []
    with computing(device):
        for variant in variants:
            try:
                with open_session(source, variant, device) as session:
                    counted = torch.stack([_confusion(_scores(source, session, images), truth) for images, truth in batches]).sum(dim=0)
            except Unusable as error:
                skipped.append(Failure(variant.name, str(error)))
                continue
            except DamagedFile as error:
                raise DamagedFile(f"{source.described}: {error}") from None
            confusion = tuple(map(tuple, counted.tolist()))
            rows.append(AccuracyRow(variant.name, int(counted.trace()), len(dataset.test_images), confusion, labels))
    return tuple(rows), tuple(skipped)


def evaluate(what: str | Path, dataset: Dataset, *, seed: int = 0, device: str = "auto") -> AccuracyReport:
    """Accuracy, and precision and recall of each class, on `dataset`'s test split: of a checkpoint, an artifact, or a bundle's variants.

    Args:
        seed: of the weights, where `what` is a model's name.

    Raises:
        BadInput: see `open_source`; or the data set's labels do not fit the model.
        Unusable: nothing of it runs here.
    """
    source = open_source(what, seed=seed)
    if len(dataset.labels) > len(source.known.labels):
        raise BadInput(f"{dataset.name} has {len(dataset.labels)} classes and this model {len(source.known.labels)}")
    rows, skipped = accuracies(source, on_device(source.variants, device), dataset, device)
    if not rows:
        raise Unusable("; ".join(f"{failure.name}: {failure.reason}" for failure in skipped))
    return AccuracyReport(rows, skipped, environment.capture())


def predict(
    what: str | Path,
    images: Sequence[str | Path],
    *,
    variant: str | None = None,
    seed: int = 0,
    device: str = "auto",
    top: int = 3,
    invert: bool = False,
) -> tuple[Prediction, ...]:
    """Classify PNG or JPEG files with one variant: the first of `what` that runs here, or the one named.

    Args:
        seed: of the weights, where `what` is a model's name.
        top: labels per image.
        invert: swap dark and light first, for dark strokes on paper.

    Raises:
        BadInput: see `open_source`; or an image that cannot be read.
        Unusable: the variant does not run here.
    """
    import torch

    from lenet_deploy.data import load_image, normalise

    if not images:
        raise BadInput("no images; name at least one PNG or JPEG file")
    if top < 1:
        raise BadInput(f"top is {top}; it must be at least 1")
    source = open_source(what, seed=seed)
    candidates = on_device(select_variants((variant,), source.variants) if variant else source.variants, device)
    spec = source.known.preprocessing
    pixels = torch.cat([load_image(Path(path), spec, invert) for path in images])
    reasons = []
    with computing(device):
        for candidate in candidates:
            try:
                with open_session(source, candidate, device) as session:
                    shares = _scores(source, session, normalise(pixels, spec)).softmax(dim=1)
            except Unusable as error:
                reasons.append(f"{candidate.name}: {error}")
                continue
            except DamagedFile as error:
                raise DamagedFile(f"{source.described}: {error}") from None
            ranked = shares.topk(min(top, shares.shape[1]))
            return tuple(
                Prediction(str(path), candidate.name, tuple((source.known.labels[i], p) for i, p in zip(row, values, strict=True)))
                for path, row, values in zip(images, ranked.indices.tolist(), ranked.values.tolist(), strict=True)
            )
    raise Unusable("; ".join(reasons))


def probabilities(checkpoint: Checkpoint, images: torch.Tensor) -> torch.Tensor:
    """Softmax of a checkpoint's scores, float32 (N, classes), of uint8 images (N, C, H, W) of any size, on the CPU."""
    import torch

    from lenet_deploy.data import fit, normalise
    from lenet_deploy.train import EVALUATION_BATCH

    module, spec = checkpoint.module(), checkpoint.preprocessing
    with torch.inference_mode():
        return torch.cat([module(normalise(batch, spec)).softmax(dim=1) for batch in fit(images, spec).split(EVALUATION_BATCH)])


def _scores(source: Source, session: Session, images: torch.Tensor) -> torch.Tensor:
    """Scores (N, classes) of images (N, C, H, W); raises DamagedFile where the artifact does not run or has other scores than labels."""
    from lenet_deploy.parity.check import run_batch

    try:
        scores = run_batch(session, images)
    except Exception as error:  # whatever a runtime raises for a graph that does not take this batch
        raise DamagedFile(f"it does not run on its own kind of image: {first_line(error)}") from None
    wanted = (len(images), len(source.known.labels))
    if scores.shape != wanted:
        raise DamagedFile(f"its scores have shape {tuple(scores.shape)} where its labels ask for {wanted}")
    return scores


def _confusion(scores: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Images by class (rows) and by class of the top score (columns): int64 (classes, classes).

    Args:
        scores: (N, classes).
        truth: int64 (N,), below `classes`.
    """
    classes = scores.shape[1]
    return (truth * classes + scores.argmax(dim=1)).bincount(minlength=classes * classes).view(classes, classes)


def _test_batches(dataset: Dataset, preprocessing: Preprocessing) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The test split as the model takes it, once for all variants: float32 (N, C, H, W) and labels int64 (N,)."""
    from lenet_deploy.data import fit, normalise
    from lenet_deploy.train import EVALUATION_BATCH

    images, labels = dataset.test_images.split(EVALUATION_BATCH), dataset.test_labels.split(EVALUATION_BATCH)
    return [(normalise(fit(batch, preprocessing), preprocessing), truth) for batch, truth in zip(images, labels, strict=True)]
