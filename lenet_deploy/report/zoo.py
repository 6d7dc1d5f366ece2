"""What comes with the package: the list of it, and a card for each, from what its checkpoint says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lenet_deploy.models import find_model
from lenet_deploy.order_statistics import wilson_ci95
from lenet_deploy.report.table import Table

if TYPE_CHECKING:
    from lenet_deploy.checkpoint import Checkpoint

REMARKS = {
    "cifar10": "The images are CIFAR-10's in a lossless copy, but for 93 that are JPEG decodes of the originals (73 of training, 20 of the "
    "test split), so the digest is not that of the official archive, and `evaluate` on it may differ by an image or two.",
}


def accuracy_of(checkpoint: Checkpoint) -> tuple[float, float, float]:
    """The accuracy that training recorded on its test split, and its 95 % Wilson interval, in percent."""
    accuracy, images = checkpoint.provenance["test_accuracy"], checkpoint.provenance["test_images"]
    low, high = wilson_ci95(round(accuracy * images / 100), images)
    return accuracy, 100 * low, 100 * high


def zoo_values(name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """One entry as JSON values."""
    accuracy, *interval = accuracy_of(checkpoint)
    told = checkpoint.provenance
    return {
        "name": name,
        "model": checkpoint.model,
        "accuracy": accuracy,
        "ci95": interval,
        "images": told["test_images"],
        **{key: told[key] for key in ("dataset", "data_sha256", "recipe", "seed", "date")},
        "weights_sha256": checkpoint.metadata().weights_sha256,
    }


def zoo_table(entries: Sequence[tuple[str, Checkpoint]]) -> Table:
    """One row a name."""
    rows = []
    for name, checkpoint in entries:
        (accuracy, low, high), told = accuracy_of(checkpoint), checkpoint.provenance
        parameters = sum(layer.parameters for layer in checkpoint.config.layers())
        shares = (f"{accuracy:.2f} %", f"{low:.2f} to {high:.2f} %")
        rows.append((name, checkpoint.model, told["dataset"], *shares, f"{parameters:,}", f"{told['recipe']}, seed {told['seed']}"))
    return Table(("name", "model", "data", "test accuracy", "95 % interval", "parameters", "recipe"), tuple(rows))


def card(name: str, checkpoint: Checkpoint) -> str:
    """The model card, Markdown."""
    (accuracy, low, high), told = accuracy_of(checkpoint), checkpoint.provenance
    images, layers = told["test_images"], checkpoint.config.layers()
    parameters, macs = sum(layer.parameters for layer in layers), sum(layer.macs for layer in layers)
    channels, height, width = checkpoint.preprocessing.input_shape
    data = f"{told['dataset']}, {told['train_images']:,} images of training, {told['test_images']:,} of test"
    command = f"lenet-deploy train --model {checkpoint.model} --data {told['dataset']} --recipe {told['recipe']} --seed {told['seed']}"
    remark = REMARKS.get(told["dataset"])
    lines = (
        f"# {name}",
        "",
        f"{checkpoint.model}: {find_model(checkpoint.model).summary}.",
        "",
        f"- Test accuracy: {accuracy:.2f} % (95 % interval {low:.2f} to {high:.2f} %, {images:,} images), after the last epoch",
        f"- Data: {data}; sha256 {told['data_sha256']}",
        *((f"- {remark}",) if remark else ()),
        f"- Recipe: {told['recipe']}, {told['epochs']} epochs, seed {told['seed']}, on {told['device']}",
        f"- Command: `{command}`",
        f"- Date: {told['date']}, torch {told['versions']['torch']}",
        f"- Input: {channels} x {height} x {width}, float32 in N, C, H, W; labels {', '.join(checkpoint.labels)}",
        f"- {parameters:,} parameters, {macs:,} multiply-accumulates an image",
        f"- sha256 of the weights: {checkpoint.metadata().weights_sha256}",
        "",
        "For teaching, comparing runtimes, and testing deployments; not for decisions about people or things.",
    )
    return "\n".join(lines) + "\n"
