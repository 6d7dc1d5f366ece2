"""A training run as pictures: curves, the confusion matrix, and the most confident mistakes. matplotlib is an extra."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenet_deploy.records import EpochStats
from lenet_deploy.store import write_file

if TYPE_CHECKING:
    from torch import Tensor

    from lenet_deploy.checkpoint import Checkpoint
    from lenet_deploy.data import Dataset

MISTAKES = 25
LARGEST_MATRIX = 30  # classes, beyond which the numbers in the cells cannot be read


def write_plots(folder: Path, epochs: Sequence[EpochStats], checkpoint: Checkpoint, dataset: Dataset) -> tuple[str, ...]:
    """Write `curves.png`, `confusion.png` and `mistakes.png`; returns what a reader should know, e.g. that matplotlib is absent.

    Raises:
        CannotWrite: the system refused.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ("no curves.png, confusion.png and mistakes.png: pip install 'lenet-deploy[plots]'",)
    from lenet_deploy.evaluation import probabilities

    shares = probabilities(checkpoint, dataset.test_images)
    labels = checkpoint.labels
    for name, figure in (
        ("curves", curves(Figure, epochs)),
        ("confusion", confusion(Figure, shares.argmax(dim=1), dataset.test_labels, labels)),
        ("mistakes", mistakes(Figure, shares, dataset, labels)),
    ):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        write_file(folder / f"{name}.png", buffer.getvalue())
    return ()


def curves(figure: Any, epochs: Sequence[EpochStats]) -> Any:
    """Loss, accuracy on the test split, and learning rate over the epochs."""
    made = figure(figsize=(9, 3))
    made.subplots_adjust(left=0.06, right=0.98, bottom=0.16, top=0.88, wspace=0.35)
    numbers = [stats.epoch for stats in epochs]
    for axes, (title, values) in zip(
        made.subplots(1, 3),
        (
            ("training loss", [stats.loss for stats in epochs]),
            ("test accuracy (%)", [stats.accuracy for stats in epochs]),
            ("learning rate", [stats.lr for stats in epochs]),
        ),
        strict=True,
    ):
        axes.plot(numbers, values, marker="." if len(numbers) < 30 else "")
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
    return made


def confusion(figure: Any, predicted: Tensor, truth: Tensor, labels: Sequence[str]) -> Any:
    """How many test images of each class (rows) were taken for which (columns)."""
    import torch

    classes = len(labels)
    counts = torch.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    made = figure(figsize=(6, 6))
    made.subplots_adjust(left=0.2, right=0.97, bottom=0.2, top=0.94)
    axes = made.subplots()
    axes.imshow(counts.float().log1p().numpy(), cmap="Blues")
    axes.set(title="test images by class and prediction", xlabel="predicted", ylabel="class")
    if classes <= LARGEST_MATRIX:
        axes.set_xticks(range(classes), labels, rotation=90)
        axes.set_yticks(range(classes), labels)
        largest = int(counts.max())
        for row in range(classes):
            for column in range(classes):
                number = int(counts[row, column])
                if number:
                    axes.text(column, row, number, ha="center", va="center", fontsize=7, color="white" if number > largest / 8 else "black")
    return made


def mistakes(figure: Any, shares: Tensor, dataset: Dataset, labels: Sequence[str]) -> Any:
    """The test images that the model got wrong and was surest of, the surest first."""
    confidence, predicted = shares.max(dim=1)
    wrong = (predicted != dataset.test_labels).nonzero().flatten()
    surest = wrong[confidence[wrong].argsort(descending=True)][:MISTAKES].tolist()
    made = figure(figsize=(8, 9))
    made.subplots_adjust(left=0.02, right=0.98, bottom=0.02, top=0.92)
    made.suptitle(f"the {len(surest)} surest of {len(wrong):,} mistakes: class > prediction, its probability")
    side = 5
    for axes in (grid := made.subplots(side, side).flatten()):
        axes.axis("off")
    for axes, place in zip(grid, surest, strict=False):
        image = dataset.test_images[place].permute(1, 2, 0).numpy()
        axes.imshow(image.squeeze(2) if image.shape[2] == 1 else image, cmap="gray", vmin=0, vmax=255)
        axes.set_title(
            f"{labels[int(dataset.test_labels[place])]} > {labels[int(predicted[place])]} {float(confidence[place]):.0%}", fontsize=7
        )
    return made
