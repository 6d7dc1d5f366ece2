"""`lenet-deploy predict`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from .options import Device, Json, Quiet, Seed, What
from .output import emit, note_if_fresh


def predict(
    what: What,
    images: Annotated[list[str], typer.Argument(help="PNG or JPEG files of any size and mode.", show_default=False)],
    variant: Annotated[str | None, typer.Option(help="Default: the first that runs here.")] = None,
    top: Annotated[int, typer.Option(help="Labels an image.")] = 3,
    invert: Annotated[bool, typer.Option("--invert", help="Swap dark and light, for dark strokes on paper.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Classify image files with one variant and print the top labels with probabilities."""
    from lenet_deploy import api, environment
    from lenet_deploy.report.tables import prediction_table
    from lenet_deploy.store import dump

    note_if_fresh(what, seed, quiet)
    predictions = api.predict(what, images, variant=variant, seed=seed, device=device, top=top, invert=invert)
    body = {"predictions": [dataclasses.asdict(prediction) for prediction in predictions]}
    emit(
        prediction_table(predictions),
        lambda: dump("predict", 1, environment.capture(), body),
        json,
        None,
        f"variant: {predictions[0].variant}",
    )
