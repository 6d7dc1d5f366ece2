"""`lenet-deploy train`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import MODEL_NAMES, Data, DataDir, Device, Download, Quiet, Seed, Set, settings
from .output import note, progress

if TYPE_CHECKING:
    from lenet_deploy.checkpoint import Checkpoint
    from lenet_deploy.data import Dataset
    from lenet_deploy.train import TrainConfig


def train(
    model: Annotated[str, typer.Option(help=f"One of {MODEL_NAMES}.")] = "lenet5",
    data: Data = "digits",
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.003,
    seed: Seed = 0,
    set_: Set = None,
    data_dir: DataDir = None,
    download: Download = False,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder of the results. Default: ./MODEL-DATA")] = None,
    quiet: Quiet = False,
) -> None:
    """Train a model and write checkpoint.safetensors and metrics.json."""
    from lenet_deploy.data import load_dataset
    from lenet_deploy.store import make_folder
    from lenet_deploy.train import TrainConfig, resolve

    config = TrainConfig(model, settings(set_), epochs, batch_size, lr, seed, device)
    dataset = load_dataset(data, data_dir, download)
    resolve(config, dataset)  # whatever is wrong is said before a folder is made
    folder = out or Path(f"{model}-{Path(data).stem}")
    made = not folder.exists()
    make_folder(folder)  # a place that cannot be written is found before the training, not after
    try:
        path, accuracy = run_training(config, dataset, folder, quiet)[1:]
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    typer.echo(f"{path}: {accuracy:.2f} % of {len(dataset.test_images):,} test images of {dataset.name}")


def run_training(config: TrainConfig, dataset: Dataset, folder: Path, quiet: bool) -> tuple[Checkpoint, Path, float]:
    """Train with progress, write both files into an existing folder; returns checkpoint, its path and the test accuracy."""
    import dataclasses

    from lenet_deploy import checkpoint, environment
    from lenet_deploy.records import EpochStats
    from lenet_deploy.store import metrics_json, write_file
    from lenet_deploy.train import train as run

    epochs: list[EpochStats] = []
    with progress(quiet) as show:

        def report(stats: EpochStats) -> None:
            epochs.append(stats)
            line = f"Epoch: {stats.epoch}, LR: {stats.lr:.6f}, Loss: {stats.loss:.4f}"
            line += f", accuracy: {stats.accuracy:.2f} %, {stats.images_per_s:,.0f} images/s"
            show(stats.epoch, config.epochs, line)
            note(line, quiet)

        trained = run(config, dataset, report)
    path = folder / "checkpoint.safetensors"
    write_file(path, checkpoint.to_bytes(trained))
    write_file(folder / "metrics.json", metrics_json(tuple(epochs), dataclasses.asdict(config), environment.capture()).encode())
    return trained, path, epochs[-1].accuracy
